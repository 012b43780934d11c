"""What every encoding holds: far positions in half precision and beyond float32's whole numbers, and odd values of the
flag."""

import contextlib

import pytest
import torch
from tiny import bound, sums

import posenc
from core import specs
from core.place import Place
from model import GPT, Cache, GPTConfig

CPU = torch.device("cpu")
# Forms that no test trains, beside all others.
SPECS = [*posenc.every(), 'dape(form="power")', "rerope(leak=8)", "randomized(inner=xpos)"]
LONGROPE = f'rope(scaling="longrope", short_factor={[1] * 8}, long_factor={[2] * 8}, attention_factor=1.9)'


def logits(spec, T, pos, dtype=torch.float32, place=None):
    """Those of a model for tokens at positions pos, which come in two calls as into a cache."""
    settings = dict(vocab_size=50, n_layer=1, n_embd=64, n_head=4, train_length=T, zero_init=False)
    model = GPT(GPTConfig(posenc=spec, **settings), 1).eval()
    pos = pos[pos < model.max_length]
    tokens, cache = torch.arange(len(pos))[None] * 7 % 50, Cache(total=int(pos[-1]) + 1)
    if place is None:
        model.to(dtype)
    else:
        place.prepare(model)
    with torch.no_grad(), place.autocast() if place else contextlib.nullcontext():
        read = [model(x, past=cache, pos=p) for x, p in zip(tokens.split(24, 1), pos.split(24), strict=True)]
    return torch.cat(read, dim=1).double(), model.config


def stretched(last, at_once):
    """24 positions all over the first `at_once`, as of a text that is read at once, and 8 before `last`."""
    return torch.cat((torch.linspace(0, min(last, at_once) - 9, 24).long(), torch.arange(last - 8, last)))


@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_holds_64_training_lengths(spec):
    """Both ways that commands have: autocast over prepared weights, and a model that is half precision itself."""
    for T in (16, 512):
        if T == 512 and spec == "recurrent":
            continue  # its table takes as many steps as there are positions
        pos = stretched(64 * T, at_once=1 << 14)
        exact, config = logits(spec, T, pos)
        for dtype in (torch.float16, torch.bfloat16):
            # Every layer rounds eight times: q k v, logits, weights, y, and once each product after them.
            rounding = bound(dtype, 2 * 8 + 1, scale=exact.std().item())
            for place in (None, Place(CPU, dtype)):
                half, _ = logits(spec, T, pos, dtype, place)
                assert (half - exact).abs().max() < rounding, (T, dtype, place)

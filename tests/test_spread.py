"""How widely attention spreads, against the model's own computation and answers that are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import CPU, HALF, blind, make, text

import model as model_module
import posenc
from core import attention, cache
from core.cache import Cache
from lab import spread


def test_a_watch_sees_what_attention_computes_with_and_changes_nothing(monkeypatch):
    model, tokens, watched, computed = make("xpos"), torch.from_numpy(text(2, 9)), [], []
    plainly = model(tokens)
    attend = model_module.attend
    monkeypatch.setattr(model_module, "attend", lambda *args: computed.append(args) or attend(*args))
    for part, past in ((tokens, None), (tokens, Cache()), (tokens[:, 4:], Cache())):
        if part is not tokens:
            model(tokens[:, :4], past=past)
        watched.clear(), computed.clear()
        logits = model(part, past=past, watch=lambda *args: watched.append(args))
        assert torch.allclose(logits, plainly[:, -part.shape[1] :])
        assert [layer for layer, *_ in watched] == [0, 1]
        for (_, encoding, new, pairs), args in zip(watched, computed, strict=True):
            assert encoding is args[0] and [pairs] == args[1]
            assert new.q.shape == pairs.q.shape and not torch.allclose(new.q, pairs.q)
            assert new.k.shape[2] == part.shape[1]


@pytest.mark.parametrize("spec", [spec for spec in posenc.every() if spec != "shaw" and "values" not in spec])
@pytest.mark.parametrize("sizes", [[24], [13, 11], [23, 1]])
def test_weights_are_those_of_the_models_own_attention(spec, sizes):
    """Attention over values that are one-hot vectors, as many keys at a time as fit."""
    model, past, tokens = make(spec), Cache(total=24), torch.from_numpy(text(1, 24))
    checked = []

    def watch(layer, encoding, new, pairs):
        ours, _ = spread.weights(encoding, pairs)
        keys = len(pairs.j)
        one_hot = torch.eye(keys + 8, dtype=pairs.k.dtype)[:keys].expand(*pairs.k.shape[:2], -1, -1)
        for begin in range(0, keys, 8):
            exact = attention.attend(encoding, [replace(pairs, v=one_hot[..., begin : begin + 8])])
            part = ours[..., begin : begin + 8]
            assert torch.allclose(part, exact[..., : part.shape[-1]], atol=1e-12)
        assert torch.allclose(ours.sum(-1), torch.ones(()).double())
        checked.append(layer)

    with torch.no_grad():
        for part in tokens.split(sizes, dim=1):
            model(part, past=past, watch=watch)
    assert checked == [0, 1] * len(sizes)


def test_attention_that_is_uniform(monkeypatch):
    for name in ("WHOLE", "PIECE"):  # contexts enter the cache in many pieces
        monkeypatch.setattr(cache, name, 7)
    found = spread.attention(blind("none"), text(3, 65), CPU, [8, 16, 64])
    for row, length in enumerate((8, 16, 64)):
        seen = np.arange(length - 4, length) + 1
        assert found["entropy"][row] == pytest.approx(np.log(seen).mean())
        assert found["first"][row] == pytest.approx((1 / seen).mean())
        assert found["far"][row] == pytest.approx((np.maximum(0, seen - 16) / seen).mean(), abs=1e-12)
        assert found["share"][row] == pytest.approx(1)
        assert found["by_layer"]["entropy"][row] == pytest.approx([np.log(seen).mean()] * 2)


def test_attention_that_falls_by_a_constant_factor():
    """alibi alone: the weights are a geometric series."""
    found = spread.attention(blind("alibi"), text(1, 65), CPU, [16, 64])
    for row, length in enumerate((16, 64)):
        entropy, first, far = [], [], []
        for slope in (2.0 ** (-2 * h) for h in (1, 2, 3, 4)):
            for count in range(length - 3, length + 1):
                r = math.exp(-slope)
                total, mean = (1 - r**count) / (1 - r), r / (1 - r) - count * r**count / (1 - r**count)
                entropy.append(math.log(total) + slope * mean)
                first.append(r ** (count - 1) / total)
                far.append(max(0.0, r**16 - r**count) / (1 - r) / total)
        assert found["entropy"][row] == pytest.approx(np.mean(entropy))
        assert found["first"][row] == pytest.approx(np.mean(first))
        assert found["far"][row] == pytest.approx(np.mean(far), abs=1e-12)


@pytest.mark.parametrize("window", [8, 20])
def test_a_window_bounds_what_is_far(window, monkeypatch):
    """Uniform attention over a layer's window, from a cache that has dropped what lies before it."""
    monkeypatch.setattr(cache, "PIECE", 7)
    found = spread.attention(blind(f"none(window={window})"), text(2, 65), CPU, [64])
    assert found["far"] == pytest.approx([max(0, window - 16) / window], abs=1e-12)
    near = spread.attention(blind("none"), text(2, 65), CPU, [64], T=8)["far"]  # the last two queries
    assert near == pytest.approx([np.mean([(n - 8) / n for n in (63, 64)])])


@pytest.mark.parametrize("spec", ["rope", "fox", "t5", "sinusoidal"])
def test_chunks_and_batches_change_nothing_and_the_input_ends_before_the_last_token(spec, monkeypatch):
    model, windows, found = make(spec), text(3, 41), []
    for piece, budget in ((512, 1 << 12), (3, 1)):
        monkeypatch.setattr(cache, "WHOLE", piece)
        monkeypatch.setattr(cache, "PIECE", piece)
        found.append(spread.attention(model, windows, CPU, [16, 40], budget))
    windows[:, -1] = 0
    found.append(spread.attention(model, windows, CPU, [16, 40]))
    for name in spread.SPREAD:
        for other in found[1:]:
            assert np.allclose(found[0]["by_layer"][name], other["by_layer"][name], rtol=1e-9)
    assert len({round(x, 6) for layers in found[0]["by_layer"]["entropy"] for x in layers}) == 4
    assert found[0]["entropy"][1] == pytest.approx(np.mean(found[0]["by_layer"]["entropy"][1]))


def test_segments_are_watched_one_by_one():
    watched = []
    make("rope")(
        torch.from_numpy(text(1, 12)), segments=3, watch=lambda *args: watched.append((args[0], len(args[3].j)))
    )
    assert watched == [(0, 4), (1, 4), (0, 8), (1, 8), (0, 8), (1, 8)]


def test_lengths_without_positions_are_left_out_and_short_windows_refused():
    assert spread.attention(make("learned"), text(1, 33), CPU, [8, 16, 32])["lengths"] == [8, 16]
    with pytest.raises(ValueError, match="32 ids hold no 32 tokens"):
        spread.attention(make("rope"), text(1, 32), CPU, [32])


def test_one_key_alone_has_no_spread():
    found = spread.attention(make("rope"), text(1, 5), CPU, [1])
    assert (found["entropy"], found["share"], found["first"]) == ([0.0], [0.0], [1.0])


def test_half_precision_is_close():
    windows = text(2, 41)
    for spec in ("rope", "alibi", "cope"):
        model = make(spec).float()
        exact, rounded = (spread.attention(model, windows, place, [40])["entropy"] for place in (CPU, HALF))
        assert rounded == pytest.approx(exact, rel=0.02)
        assert rounded != exact

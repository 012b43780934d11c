"""Schedules over the layers: what each layer sees, in training as from a cache, and what the flag says of it."""

import pytest
import small
import torch
from tiny import bound, sums

import posenc
from core.cache import Cache, Memory, Past, Slots
from core.encoding import Sight
from model import GPTConfig

T = small.T
W = 5  # a trained window, in tokens
LOGIT = 64  # the largest logit of attention that counts here; its rounding moves the weights by as much
EXACT = bound(torch.float64, sums(GPTConfig(vocab_size=50, n_layer=4, n_embd=32), keys=8 * T), scale=LOGIT)
SCHEDULES = [
    f"rope(window={W})",
    "rope(chunk=6)",
    f"alibi(window={W}, chunk=3)",
    f"randomized(inner=rope, window={W})",
    [f"rope(window={W})", f"rope(window={W})", "none"],
    ["rope(chunk=6)", "rope(chunk=6)", "none"],
    [f"fox(window={W})", "t5(window=9)", "shaw", f"cope(window={W})"],
    [f"sinusoidal(window={W})", "sinusoidal"],
    ['rope(scaling="dynamic", window=4)', "rerope", f"xpos(window={W})"],
]


def make(spec, **settings):
    return small.make(spec, n_layer=len(posenc.members(spec)), **settings)


def cached(model, tokens, size, **options):
    """The logits of tokens that enter a cache so many at a time, and the cache."""
    cache = Cache(total=tokens.shape[1], **options)
    return torch.cat([model(part, past=cache) for part in tokens.split(size, dim=1)], dim=1), cache


def close(one, other):
    return torch.allclose(one, other, rtol=0, atol=EXACT)


@torch.no_grad()
@pytest.mark.parametrize("spec", SCHEDULES, ids=str)
@pytest.mark.parametrize("length", [T // 2, T, W - 1, W, W + 1, 8 * T])
def test_cached_logits_equal_the_full_forward(spec, length):
    model, tokens = make(spec), torch.randint(50, (2, length))
    full = model(tokens)
    for size in (1, 3, 7) if length <= T else (3, 50):
        logits, cache = cached(model, tokens, size)
        assert close(logits, full)
        for sight, own in cache.narrow.items():  # at most two windows and a piece
            assert own.length <= 2 * sight.span + size
            assert all(x.shape[2] <= max(64, 4 * sight.span + 2 * size) for x in own.layers[min(own.layers)].values())


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, cls in posenc.ENCODINGS.items() if cls.relative])
@pytest.mark.parametrize(("bound", "first"), [("window", lambda i: max(0, i - W + 1)), ("chunk", lambda i: i - i % W)])
def test_one_layer_sees_what_its_sight_says(name, bound, first):
    """A relative encoding cannot tell a text cut there from one that goes on, if it sees no further."""
    if bound in posenc.ENCODINGS[name].arguments:
        pytest.skip("its window is its own, and no trained one")
    model, tokens = make(f"{name}({bound}={W})"), torch.randint(50, (2, 3 * T))
    logits = model(tokens)
    for i in range(3 * T):
        alone = model(tokens[:, first(i) : i + 1])
        if name == "fox":  # It keeps what was forgotten since the beginning, which rounds otherwise and no more.
            assert torch.allclose(logits[:, i], alone[:, -1], rtol=0, atol=10 * EXACT)
        else:
            assert close(logits[:, i], alone[:, -1])


def test_windows_add_up_over_the_layers():
    """The last logits of L layers depend on the last L (W - 1) + 1 tokens and no others."""
    model, tokens = small.make(f"rope(window={W})", n_layer=3), torch.randint(50, (1, 3 * T))
    embedded = model.token(tokens).detach().requires_grad_()
    model.token.forward = lambda ids: embedded
    model(tokens)[0, -1].sum().backward()
    reached = embedded.grad[0].abs().amax(-1) > 0
    assert reached.sum() == 3 * (W - 1) + 1 and reached[-3 * (W - 1) - 1 :].all()


@torch.no_grad()
@pytest.mark.parametrize("bound", ["window", "chunk"])
def test_a_bound_that_hides_nothing_is_none_to_the_last_bit(bound):
    tokens = torch.randint(50, (2, T))
    for spec in ("rope", "alibi", "fox"):
        free, bounded = small.make(spec), small.make(f"{spec}({bound}={T})")
        assert torch.equal(bounded(tokens), free(tokens))
        assert free.state_dict().keys() == bounded.state_dict().keys()
        assert torch.equal(cached(bounded, tokens, 3)[0], cached(free, tokens, 3)[0])
        assert not torch.equal(bounded(torch.cat((tokens, tokens), 1)), free(torch.cat((tokens, tokens), 1)))


@torch.no_grad()
def test_a_window_at_test_time_narrows_the_layers_that_see_more():
    tokens = torch.randint(50, (2, 4 * T))
    for own, window, same in ((W, 9, W), (9, W, W)):  # trained window, that at test time, the narrower one
        asked, trained = small.make(f"rope(window={own})"), small.make(f"rope(window={same})")
        assert close(asked(tokens, past=Past(window)), trained(tokens))
        assert close(cached(asked, tokens, 3, window=window)[0], trained(tokens))
    # A layer that stays as it was trained has no sinks; one that is narrowed has them.
    with_sinks = small.make(f"rope(window={W})")(tokens, past=Past(9, 2))
    assert close(with_sinks, small.make(f"rope(window={W})")(tokens))
    both = make(["none", f"rope(window={W})"])
    assert close(cached(both, tokens, 3, window=9, sinks=2)[0], both(tokens, past=Past(9, 2)))
    assert not close(both(tokens, past=Past(9, 2)), both(tokens, past=Past(9)))


@torch.no_grad()
@pytest.mark.parametrize("spec", [spec for spec in SCHEDULES if "fox" not in str(spec)], ids=str)
def test_tokens_from_fixed_slots_equal_the_full_forward(spec):
    model, tokens = make(spec), torch.randint(50, (2, 3 * T))
    full, cache = model(tokens), Cache(total=3 * T)
    for part in tokens[:, : 2 * T].split(3, dim=1):  # enough of them that windowed layers have dropped some
        model(part, past=cache)
    slots = Slots(cache)
    for index in range(2 * T, 3 * T):
        logits = model(tokens[:, index : index + 1], past=slots, pos=torch.tensor([index]))
        assert close(logits[:, 0], full[:, index])


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", [f"rope(window={W})", ["rope(window=20)", "none"], ["alibi(chunk=6)", "rope"]], ids=str
)
def test_segments_see_as_far_back_as_the_window(spec):
    """Over a memory, one segment after the other, as over one long one where it reaches no further back."""
    model, tokens = make(spec), torch.randint(50, (2, 2 * T))
    memory = Memory()
    parts = torch.cat([model(part, past=memory) for part in tokens.chunk(2, dim=1)], dim=1)
    assert close(parts, model(tokens))


def test_a_schedule_trains_the_layers_that_see_least_too():
    model, tokens = make([f"rope(window={W})", "rope(chunk=4)", "none"]), torch.randint(50, (2, 2 * T))
    model(tokens, tokens).mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_the_flag_says_what_a_layer_sees():
    assert posenc.parse("rope(window=32, base=5.0)") == (posenc.RoPE, {"base": 5.0}, {"window": 32})
    assert posenc.sights(["rope(window=8)", "none"], 3) == [Sight(8), Sight(), Sight(8)]
    assert posenc.sights("alibi(chunk=8)", 1) == [Sight(chunk=8)] and Sight(8, 6).span == 6
    assert posenc.merge("rope(window=8)", "rope(base=5.0)") == "rope(base=5.0, window=8)"
    assert posenc.merge(["rope(window=8)", "none"], "rope(window=0)") == ["rope", "none"]
    assert posenc.merge(["rope(window=8)", "none"], "alibi") == "alibi"
    assert len({id(encoding) for encoding in make(["kerple(window=8)", "kerple"]).posenc}) == 2
    assert len({id(encoding) for encoding in make(["t5(window=8)", "t5"]).posenc}) == 1  # its layers share their table


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rope(window=-1)", "number of tokens"),
        ("rope(window=2.5)", "number of tokens"),
        ("rope(chunk=True)", "number of tokens"),
        ("randomized(inner=rope(window=3))", "belongs to the layer"),
        (["rope", "none", "alibi"], "alibi would do nothing"),
        (["learned(window=3)", "rope"], "cannot stand in a list"),
    ],
)
def test_mistakes_say_what_is_allowed(spec, said):
    with pytest.raises(ValueError, match=said):
        small.make(spec)


def test_an_encoding_with_a_window_of_its_own_is_not_laid_over_a_trained_one():
    with pytest.raises(ValueError, match="rerope has a window of its own"):
        posenc.merge("rope(window=8)", "rerope")


def test_flops_count_the_keys_in_sight():
    free, narrow = (small.make(spec, n_layer=2).flops_per_token() for spec in ("rope", [f"rope(window={W})", "rope"]))
    assert free - narrow == 12 * 32 * (T - W)

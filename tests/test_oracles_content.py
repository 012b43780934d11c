"""repo, selective_rope, wall and path against their formulas, in plain loops: one query, one key and one token on the
way between them at a time. Nothing here is derived from zoo/paths.py; each test names the code that it follows.

Then what must come out where the content says nothing: rope, or no encoding at all.
"""

import cmath
import math

import hooks
import pytest
import small
import torch
from test_oracles import EXACT, QUERIES, ask, dot, linear, make, pairs, theta

from core.cache import Cache, Past
from model import GPT, GPTConfig
from zoo import paths

T = small.T


def unit(x):
    length = math.sqrt(dot(x, x))
    return [u / length for u in x]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def silu(x):
    return x * sigmoid(x)


def convolved(rows, weight, t):
    """Token t of a causal convolution of every channel c by itself; weight[c] ends with the tap of the token itself."""
    taps = range(min(len(weight[0]), t + 1))
    return [sum(weight[c][-1 - m] * rows[t - m][c] for m in taps) for c in range(len(weight))]


def complex_product(q, k, angle_q, angle_k, frequencies):
    """q k of vectors whose pairs (m, m + D/2) turn by an angle for each times its frequency."""
    half, total = len(frequencies), 0.0
    for m, w in enumerate(frequencies):
        one = complex(q[m], q[m + half]) * cmath.exp(1j * angle_q[m] * w)
        other = complex(k[m], k[m + half]) * cmath.exp(1j * angle_k[m] * w)
        total += (one * other.conjugate()).real
    return total / math.sqrt(2 * half)


def check(encoding, expected):
    """Every logit against expected(q, k, x, i, j, h): a query and a key, the inputs of their sequence's tokens, the
    indices of both, and the head."""
    given, q, k, x = ask(encoding)
    for b, h, t, s in pairs(encoding):
        one = expected(q[b][h][t], k[b][h][s], x[b], 10 - QUERIES + t, s, h)
        assert given[b][h][t][s] == pytest.approx(one, abs=EXACT), (b, h, t, s)


def test_repo():
    # Li et al. 2025; dynamic_position_encoding_swigluex_multihead of OLMo/olmo/model.py in SakanaAI/repo. There each
    # head has keys of its own; here two query heads share a key and its place.
    encoding = make("repo(base=500)")
    assert make("repo").base == 500000 and encoding.gate.weight.shape == (24 // 8, 24)

    def place(x, head):
        hidden = [silu(g) * c for g, c in zip(linear(encoding.gate, x), linear(encoding.content, x), strict=True)]
        return [linear(encoding.final, hidden)[head // 2]] * 4

    check(encoding, lambda q, k, x, i, j, h: complex_product(q, k, place(x[i], h), place(x[j], h), theta(8, 500)))


@pytest.mark.parametrize("options", ["", ", gate=True", ", bias=True", ", gate=True, bias=True", ", taps=1"])
def test_selective_rope(options):
    # Movahedi et al. 2025; SelectiveRoPE of src/selective_rope/modules/rotary.py in timurcarstensen/selective-rope: its
    # input is normalised head by head, exp(bias) is added before the gate, and the sum has the token's own phase.
    encoding = make(f"selective_rope(base=500, rank=3{options})")
    defaults = make("selective_rope")
    assert (defaults.base, defaults.rank, defaults.taps) == (500000, 16, 4)
    assert defaults.gate is None and defaults.offset is None
    taps = encoding.conv.weight.tolist()

    def angles(x, t, head):
        rows = [[u for part in range(4) for u in unit(row[6 * part : 6 * part + 6])] for row in x[: t + 1]]
        inner = [linear(encoding.up, linear(encoding.down, row)) for row in rows]
        total = [0.0] * 4
        for s in range(t + 1):
            phase = convolved(inner, taps, s)[4 * (head // 2) : 4 * (head // 2) + 4]
            if "bias" in options:
                phase = [u + math.exp(b) for u, b in zip(phase, encoding.offset[head // 2].tolist(), strict=True)]
            if "gate" in options:
                phase = [u * sigmoid(linear(encoding.gate, rows[s])[head // 2]) for u in phase]
            total = [a + u for a, u in zip(total, phase, strict=True)]
        return total

    check(encoding, lambda q, k, x, i, j, h: complex_product(q, k, angles(x, i, h), angles(x, j, h), theta(8, 500)))


@pytest.mark.parametrize("forget", [False, True])
def test_wall(forget):
    # naive_wall_attn of fla/ops/wall_attn/naive.py and fla/layers/wall_attn.py in fla-org/flash-linear-attention: one
    # gate for each query head and channel; the scalar gate of a head is not divided by sqrt(D).
    encoding = make(f"wall(forget={forget})")

    def expected(q, k, x, i, j, h):
        total = 0.0
        logs = [[-math.log(1 + math.exp(-u)) for u in linear(encoding.fade, row)[8 * h : 8 * h + 8]] for row in x]
        for d in range(8):
            total += q[d] * k[d] * math.exp(sum(logs[t][d] for t in range(j + 1, i + 1)))
        total /= math.sqrt(8)
        if forget:
            total += sum(-math.log(1 + math.exp(-linear(encoding.forget, x[t])[h])) for t in range(j + 1, i + 1))
        return total

    check(encoding, expected)


@pytest.mark.parametrize("forget", [False, True])
def test_path(forget):
    # PaTHAttention of fla/layers/path_attn.py and naive_path_attn of fla/ops/path_attn/naive.py in the same repository,
    # here as the paper defines it: the query meets one reflection after another. The gate is divided by sqrt(D) too.
    encoding = make(f"path(forget={forget}, rank=5)")
    defaults = make("path")
    assert (defaults.rank, defaults.taps) == (32, 3) and defaults.forget is None
    taps = encoding.conv.weight.tolist()

    def expected(q, k, x, i, j, h):
        inner, fading = [linear(encoding.up, linear(encoding.down, row)) for row in x], 0.0
        for t in range(i, j, -1):
            w = unit([silu(u) for u in convolved(inner, taps, t)][8 * (h // 2) : 8 * (h // 2) + 8])
            strength = 2 * sigmoid(linear(encoding.strength, x[t])[h // 2])
            q = [u - strength * dot(q, w) * v for u, v in zip(q, w, strict=True)]
            if forget:
                fading -= math.log(1 + math.exp(-linear(encoding.forget, x[t])[h]))
        return (dot(q, k) + fading) / math.sqrt(8)

    check(encoding, expected)


def test_the_first_values_are_the_authors():
    wall, path = (GPT(GPTConfig(posenc=spec, vocab_size=5)).posenc[0] for spec in ("wall(forget=True)", "path"))
    assert (wall.fade.bias == 8).all() and (wall.forget.bias == 8).all()  # gates that are nearly one
    assert (path.strength.bias == 0).all()
    assert path.conv.weight.std().item() == pytest.approx(3**-0.5, rel=0.2)


# What must come out where the content says nothing.


@torch.no_grad()
def logits_of(spec, change=None, length=3 * T):
    model = small.make(spec, n_layer=2)
    for encoding in model.posenc:
        if change is not None:
            change(encoding)
    return model(torch.arange(2 * length).view(2, length) * 7 % 50)


@torch.no_grad()
@pytest.mark.parametrize("forget", [False, True])
def test_path_without_strength_and_wall_without_decay_are_none(forget):
    def silenced(encoding):
        for layer in (encoding.strength if encoding.name == "path" else encoding.fade, encoding.forget):
            if layer is not None:
                layer.weight.zero_()
                layer.bias.fill_(-800 if layer is getattr(encoding, "strength", None) else 800)  # a sigmoid of 0, or 1

    none = logits_of("none")
    for name in ("path", "wall"):
        spec = f"{name}(forget={forget})"
        assert torch.allclose(logits_of(spec, silenced), none, rtol=0, atol=EXACT)
        assert not torch.allclose(logits_of(spec), none, rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_phase_of_one_and_a_place_that_is_the_index_are_rope(monkeypatch):
    def constant(encoding):
        encoding.up.weight.zero_()  # phi is exp(bias) = 1
        encoding.offset.zero_()

    rope = logits_of("rope(base=300)")
    assert torch.allclose(logits_of("selective_rope(base=300, taps=1, bias=True)", constant), rope, rtol=0, atol=EXACT)

    def numbered(encoding):
        def state(x, last):
            return {"place": torch.arange(x.shape[1], dtype=x.dtype).view(1, 1, -1, 1).expand(len(x), 2, -1, -1)}

        monkeypatch.setattr(encoding, "state", state)

    assert torch.allclose(logits_of("repo(base=300)", numbered), rope, rtol=0, atol=EXACT)


def test_path_with_full_strength_reflects():
    """b = 2 turns each query without changing its length, and hides nothing of it: H H = I."""
    encoding = make("path")
    q, w = (
        torch.randn(1, 4, 1, 8, dtype=torch.float64),
        torch.nn.functional.normalize(torch.randn(1, 2, 1, 8).double(), dim=-1),
    )
    twice = torch.cat((w, w, w), dim=2)  # the key's own token reflects nothing, the two after it undo each other
    k = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    got = hooks.logits(
        encoding, q, k, torch.tensor([2]), torch.arange(3), None, w=twice, b=torch.full((1, 2, 3, 1), 2.0).double()
    )
    plain = (q @ k.mT) / math.sqrt(8)
    assert torch.allclose(got[..., 0], plain[..., 0], rtol=0, atol=EXACT)
    assert not torch.allclose(got[..., 1], plain[..., 1], rtol=0, atol=1e-3)


# What could overflow, or would be too narrow.


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("logit", [-100.0, -2.0, 8.0])
def test_wall_neither_overflows_nor_drifts_whatever_its_gates(length, logit):
    """At a logit of -100 a key fades by e^-100 a token; all of it is in float32."""
    encoding = make("wall").float()
    encoding.fade.weight.mul_(0.1)
    encoding.fade.bias.fill_(logit)
    x, q, k = torch.randn(1, length, 24), torch.randn(1, 4, length, 8), torch.randn(1, 4, length, 8)
    pos = torch.arange(length)

    def found(dtype):
        narrow = [y.to(dtype) for y in (q, k)]
        state = encoding.to(dtype).state(x.to(dtype), {})
        return hooks.logits(encoding, *narrow, pos, pos, None, **state)

    exact, single = found(torch.float64), found(torch.float32)
    whole = encoding.state(x, {})["faded"].double()  # the plain product, as far as float64 reaches
    fades = (whole[:, :, :, None] - whole[:, :, None]).clamp(max=0).exp()
    plain = torch.einsum("bhid,bhjd,bhijd->bhij", q.double(), k.double(), fades) / math.sqrt(8)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    # Sums that reach 100 a token are rounded as they are, and the exponential has that as its relative error.
    rounding = 8 * 2**-24 * (1 + whole.abs().max().item()) * plain.abs().max().item()
    for other in (exact, single.double()):
        assert other.isfinite().all()
        assert (other - plain).masked_fill(later, 0).abs().max() < rounding
    assert exact.masked_fill(~later, 0).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 31, 32, 33, 70])
def test_blocks_of_path_equal_one_solve_over_all_keys(count, monkeypatch):
    """32 keys are solved together; here all of them are, or three."""
    encoding = make("path(forget=True)")
    x, q, k = (torch.randn(1, *shape, dtype=torch.float64) for shape in ((count, 24), (4, count, 8), (4, count, 8)))
    pos, state, found = torch.arange(count), encoding.state(x, {}), []
    for size in (32, 3, 1000):
        monkeypatch.setattr(paths, "BLOCK", size)
        found.append(hooks.logits(encoding, q, k, pos, pos, None, **state).tril())
    assert torch.allclose(found[1], found[0], rtol=0, atol=EXACT)
    assert torch.allclose(found[2], found[0], rtol=0, atol=EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["wall", "path"])
def test_under_autocast_logits_are_in_float32(name):
    encoding = make(name).float()
    x, q = torch.randn(1, 70, 24, dtype=torch.bfloat16), torch.randn(1, 4, 70, 8, dtype=torch.bfloat16)
    pos = torch.arange(70)
    exact = hooks.logits(encoding, q, q, pos, pos, None, **encoding.state(x, {}))
    with torch.autocast("cpu", torch.bfloat16):
        half = hooks.logits(encoding, q, q, pos, pos, None, **encoding.state(x, {}))
    assert half.dtype == torch.float32
    assert torch.equal(half, exact)


# The inputs that a convolution reads again.


@torch.no_grad()
@pytest.mark.parametrize("spec", ["selective_rope(taps=6)", "path(taps=6)"])
@pytest.mark.parametrize("window", [None, 1, 2])
def test_a_convolution_finds_its_inputs_in_the_cache_beside_those_of_short_conv(spec, window):
    """Also under windows that are shorter than it, and where fewer tokens have entered than it reads."""
    model, tokens = small.make(spec, short_conv=True), torch.randint(50, (2, 3 * T))
    for name, parameter in model.blocks.named_parameters():
        if "conv" in name:
            torch.nn.init.normal_(parameter)
    full = model(tokens, past=Past(window))
    for size in (1, 2, 5):
        cache = Cache(window)
        parts = [model(part, past=cache) for part in tokens.split(size, dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), full, rtol=0, atol=EXACT)
    assert {name: x.shape[2] for name, x in cache.tails[0].items()} == {"k": 3, "v": 3, "x": 5}

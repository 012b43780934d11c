"""The encodings of 2025 and 2026 against their formulas in plain loops, as test_oracles.py has those before."""

import itertools
import math

import pytest
import torch
from hooks import attend, pairs, rotate
from test_oracles import APART, BESIDE, EXACT, QUERIES, ask, compare, content, dot, make, theta, turned
from test_oracles import pairs as each
from tiny import bound

import posenc
from core import attention
from model import GPT, Cache, GPTConfig, Slots


def softplus(u):
    return math.log1p(math.exp(-abs(u))) + max(u, 0.0)


def unit(x):
    length = math.sqrt(sum(u * u for u in x))
    return [u / length for u in x]


def cosines(q, k, n, phases, base):
    """Gopalakrishnan et al. 2025; PolarEmbedding and apply_polar_pos_emb of lucidrains/x-transformers."""
    terms = zip(q, k, phases, strict=True)
    waves = [softplus(a) * softplus(b) * math.cos(n * base ** (-c / 8) - d) for c, (a, b, d) in enumerate(terms)]
    return sum(waves) / math.sqrt(8)


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_pope(base):
    encoding = make(f"pope(base={base})")
    phases = [[min(max(d, -2 * math.pi), 0.0) for d in head] for head in encoding.phase[:, 0].tolist()]
    assert any(d == 0 for head in phases for d in head) and any(d < 0 for head in phases for d in head)
    compare(encoding, lambda q, k, i, j, h: cosines(q, k, i - j, phases[h], base))


@pytest.mark.parametrize(("start", "low", "high"), [("zero", 0, 0), ("uniform", -6.2, -0.1)])
def test_phases_of_pope_start_at_zero_or_anywhere(start, low, high):
    encoding = make(f"pope(start='{start}')", n_head=64, n_kv_head=64)
    with torch.no_grad():
        encoding.init_parameter("phase", encoding.phase, torch.Generator().manual_seed(0))
    assert -2 * math.pi <= encoding.phase.min() <= low and 0 >= encoding.phase.max() >= high


@pytest.mark.parametrize("sink", [None, [0.3, -1.0, 2.0, 0.0]])
@pytest.mark.parametrize("form", [attention.fused, attention.written_out])
def test_the_kernel_at_twice_the_width_makes_the_weights_of_the_cosines(form, sink):
    encoding, pos = make("pope"), torch.arange(7)
    phases = encoding.phase[:, 0].clamp(-2 * math.pi, 0).tolist()
    q, k, v = (torch.randn(1, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    part = pairs(*rotate(encoding, q, k, pos, pos, 7), v, pos, pos)
    part.sink = None if sink is None else torch.tensor(sink, dtype=torch.float64)
    assert part.q.shape[-1] == part.k.shape[-1] == 16
    assert attention.choose(encoding, [part], 0.0) is attention.fused
    y = form(encoding, [part])
    for h, t in itertools.product(range(4), range(7)):
        keys, values = k[0, h // 2].tolist(), v[0, h // 2].tolist()
        weights = [math.exp(cosines(q[0, h, t].tolist(), keys[s], t - s, phases[h], 1e4)) for s in range(t + 1)]
        total = sum(weights) + (0.0 if sink is None else math.exp(sink[h]))
        expected = [sum(w * values[s][c] for s, w in enumerate(weights)) / total for c in range(8)]
        assert y[0, h, t].tolist() == pytest.approx(expected, abs=EXACT)


@torch.no_grad()
def test_a_temper_multiplies_what_pope_makes_and_not_what_enters_it():
    settings = {"vocab_size": 50, "n_layer": 1, "n_embd": 32, "train_length": 8, "zero_init": False}
    seen, tokens = {}, torch.randint(50, (1, 20))
    for temper in ("none", "su"):
        model = GPT(GPTConfig(posenc="pope", temper=temper, **settings)).double().eval()
        model(tokens, watch=lambda *call, temper=temper: seen.update({temper: call[3].q}))
    for t in range(20):
        factor = max(1.0, math.log(t + 1) / math.log(8))
        assert torch.allclose(seen["su"][:, :, t], seen["none"][:, :, t] * factor, rtol=0, atol=EXACT)


def relative_logits(encoding, x, h, n):
    """InklingRelativeLogits of modeling_inkling.py in huggingface/transformers; RelativeProjPositionalBias of
    lucidrains/x-transformers."""
    if n >= encoding.extent:
        return 0.0
    rows = encoding.project.weight[h * encoding.width : (h + 1) * encoding.width].tolist()
    return sum(dot(row, x) * p for row, p in zip(rows, encoding.profile[n].tolist(), strict=True))


@pytest.mark.parametrize(("spec", "extent"), [("inkling", 8), ("inkling(extent=3, width=5)", 3)])
@pytest.mark.parametrize("pos", [BESIDE, APART])
def test_inkling(spec, extent, pos):
    encoding = make(spec)
    assert encoding.extent == extent
    given, q, k, x = ask(encoding, pos)
    far = 0
    for b, h, t, s in each(encoding):
        n = pos[t - QUERIES] - pos[s]
        far += n >= extent
        one = content(q[b][h][t], k[b][h][s]) + relative_logits(encoding, x[b][t - QUERIES], h, n)
        assert given[b][h][t][s] == pytest.approx(one, abs=EXACT)
    assert far


@torch.no_grad()
@pytest.mark.parametrize("temper", ["none", "inkling", "ssmax"])
def test_a_temper_sharpens_inklings_bias_too(temper):
    # InklingAttention of modeling_inkling.py multiplies queries and bias by tau, before the product of q and k.
    settings = {"vocab_size": 50, "n_layer": 1, "n_embd": 32, "train_length": 8, "zero_init": False, "qk_norm": True}
    model = GPT(GPTConfig(posenc="inkling", temper=temper, **settings)).double().eval()
    torch.nn.init.normal_(model.posenc[0].profile)
    plain = GPT(GPTConfig(posenc="inkling", **settings)).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    found, tokens = [], torch.randint(50, (1, 30))

    def watch(layer, encoding, new, pairs):
        found.append(encoding.logits(attention.ready(pairs)))

    model(tokens, watch=watch), plain(tokens, watch=watch)
    for t in range(30):
        ssmax = math.log(t + 1) * model.blocks[0].attn.temper if temper == "ssmax" else 1.0  # (H, 1, 1) or 1
        tau = 1 + 0.1 * math.log(max(1, (t + 1) / 8)) if temper == "inkling" else ssmax
        expected = tau * found[1][:, :, t, : t + 1]
        assert torch.allclose(found[0][:, :, t, : t + 1], expected, rtol=0, atol=EXACT)


@torch.no_grad()
def test_inkling_keeps_nothing_but_keys_and_values():
    model = GPT(GPTConfig(posenc="inkling", vocab_size=50, n_layer=1, n_embd=32, train_length=8)).eval()
    cache = Cache(total=20)
    model(torch.randint(50, (1, 8)), past=cache)
    assert cache.layers[0].keys() == {"k", "v"}
    Slots(cache)


@pytest.mark.parametrize("tau", [10.0, 2.5])
def test_scale_invariant(tau):
    # Anson et al. 2025, section 3. p-RoPE of base 1024 turns the first half of the pairs.
    frequencies = [*theta(8, 1024)[:2], 0, 0]

    def logit(q, k, i, j, h):
        grown = math.log(1 + (i - j) / tau)
        return math.sqrt(1 + 2 * grown) * content(turned(q, i, frequencies), turned(k, j, frequencies)) - 2 * grown

    compare(make(f"scale_invariant(tau={tau})"), logit)
    # What makes it invariant: of a normal variable of mean m and variance a^2, the mean of e^x is e^(m + a^2 / 2).
    encoding, n = make(f"scale_invariant(tau={tau})"), torch.tensor([0, 1, 10, 1000])
    weight = (encoding.distance_bias(n) + encoding.distance_scale(n).square() / 2).exp()
    expected = [math.exp(0.5) / (1 + x / tau) for x in n.tolist()]
    assert all(row == pytest.approx(expected, rel=EXACT) for row in weight.tolist())


def at_the_limit(spec, other):
    """Whether two encodings make the same output of attention, of the same keys, queries and values, a cache's too."""
    q, k, v = (torch.randn(2, heads, 40, 8, dtype=torch.float64) for heads in (4, 2, 2))
    found = []
    for name in (spec, other):
        encoding, x = (
            make(name),
            torch.randn(2, 40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
        )
        for i in (torch.arange(40), torch.arange(30, 40)):
            new_q, new_k = rotate(encoding, q[:, :, i], k, i, torch.arange(40), 40)
            part = pairs(new_q, new_k, v, i, torch.arange(40), asked=encoding.asks(x[:, i]))
            part.seen = i[:, None] >= torch.arange(40)
            found.append(attention.attend(encoding, [part]))
    return all(torch.allclose(one, two, rtol=0, atol=EXACT) for one, two in zip(found[:2], found[2:], strict=True))


def test_at_its_limit_each_is_another():
    assert at_the_limit("scale_invariant(tau=1e29, fraction=0)", "none")
    assert at_the_limit("scale_invariant(tau=1e29)", "rope(base=1024, fraction=0.5)")
    assert not at_the_limit("scale_invariant(fraction=0)", "none")
    assert not at_the_limit("inkling", "none")
    assert at_the_limit("alibi(heads=1.0)", "alibi")


def test_past_its_extent_inkling_is_none():
    far = [0, 8, 16, 30, 47, 55, 100, 120, 130, 200]  # no two of them nearer than eight
    given, q, k, _ = ask(make("inkling"), far)
    for b, h, t, s in each(make("inkling")):
        if s != 10 - QUERIES + t:
            assert given[b][h][t][s] == pytest.approx(content(q[b][h][t], k[b][h][s]), abs=EXACT)
        else:
            assert given[b][h][t][s] != pytest.approx(content(q[b][h][t], k[b][h][s]), abs=1e-3)


@pytest.mark.parametrize(("heads", "share", "with_slopes"), [(8, 0.5, 4), (6, 0.5, 3), (4, 1, 4), (5, 0.5, 2)])
def test_alibi_on_some_heads(heads, share, with_slopes):
    # get_nape_slopes of deep-spin/asentmax: 1/h for the first half of the heads, zero for the others.
    encoding = make(f"alibi(slopes='harmonic', heads={share})", n_head=heads, n_kv_head=heads)
    expected = [1 / (h + 1) if h < with_slopes else 0.0 for h in range(heads)]
    compare(
        encoding,
        lambda q, k, i, j, h: content(q, k) - expected[h] * (i - j),
        tolerance=bound(torch.float32, 1, scale=200),
    )


def test_learned_frequencies():
    # MSGRAPECommuting of model-architectures/GRAPE, its spectrum shared by the heads and log_freq_scale=16.
    encoding = make("rope(learned=True)")
    frequencies = [math.exp(z / 16) for z in encoding.slowed.tolist()]
    compare(encoding, lambda q, k, i, j, h: content(turned(q, i, frequencies), turned(k, j, frequencies)))
    with torch.no_grad():
        encoding.init_parameter("slowed", encoding.slowed, None)
    compare(encoding, lambda q, k, i, j, h: content(turned(q, i, theta(8)), turned(k, j, theta(8))))
    layers = posenc.build("rope(learned=True)", 2, n_embd=24, n_head=4, n_kv_head=4, head_dim=8, train_length=16)
    assert layers[0] is not layers[1]


def test_grape_a():
    # Zhang et al. 2025; QueryKeyGatedAdditiveBias of model-architectures/GRAPE.
    encoding = make("grape_a")
    slope = [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    u, v = ([unit(head) for head in x[..., 0].tolist()] for x in (encoding.u, encoding.v))

    def logit(q, k, i, j, h):
        rate = softplus(dot(v[h], q) / math.sqrt(8)) + softplus(dot(u[h], k) / math.sqrt(8))
        return content(q, k) - (i - j) * slope[h] * softplus(encoding.strength[h].item()) * rate

    compare(encoding, logit)
    with torch.no_grad():
        encoding.init_parameter("strength", encoding.strength, None)
    assert torch.nn.functional.softplus(encoding.strength).tolist() == pytest.approx([1.0] * 4, rel=EXACT)


def test_scaled_logits_take_the_form_that_can_hold_them(monkeypatch):
    encoding, pos = make("scale_invariant").float(), torch.arange(256)
    q = torch.zeros(1, 4, 256, 8)
    assert attention.choose(encoding, [pairs(q, q, q, pos, pos)], 0.0) is attention.written_out
    monkeypatch.setattr(attention, "flexes", lambda q: True)
    half = q.half()
    assert attention.choose(encoding, [pairs(half, half, half, pos, pos)], 0.0) is attention.flex


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_table_of_a_kernel_holds_factors_and_biases(monkeypatch):
    """torch's own definition of flex_attention, uncompiled, of what `flex` hands to it."""
    monkeypatch.setattr(attention, "compiled_flex", lambda: attention.flex_attention)
    pos = torch.arange(256)
    q, k, v = (torch.randn(1, heads, 256, 16) for heads in (4, 2, 2))
    for spec in ("scale_invariant(fraction=0)", "alibi"):
        encoding = make(spec, head_dim=16, n_embd=64).float()
        found = attention.flex(encoding, [pairs(q, k, v, pos, pos)])
        expected = attend(encoding, q, k, v, pos, pos)
        assert torch.allclose(found, expected, rtol=0, atol=bound(torch.float32, 256 + 16, scale=8))

"""The model's invariants: causality, a cache that changes nothing, the same start for the same seed."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hooks import attend, pairs
from small import SUMMED, first_of_each
from tiny import bound, step_sums, sums
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask

import model as model_module
import posenc
from core import attention
from core import cache as caches
from core.attention import biased, flex, fused, visible, written_out
from core.cache import Cache, Past, Slots, pieces
from core.encoding import Sight
from core.errors import UserError
from core.place import no_compiler
from model import GPT, GPTConfig, draw, generate
from posenc import ENCODINGS

T = 16
UNBOUNDED = posenc.every()
STATELESS = [spec for spec in UNBOUNDED if not posenc.parse(spec)[0].has_state]
LOGIT = 64  # the largest logit of attention that counts here; its rounding moves the weights by as much
# Two ways to the same logits of a model in float64, up to 8 T tokens long.
EXACT = bound(torch.float64, sums(GPTConfig(vocab_size=50, n_layer=4, n_embd=32), keys=8 * T), scale=LOGIT)
BY_DISTANCE = [
    "scaled_bias", "alibi", 'alibi(slopes="harmonic", heads=0.5)', "t5", "kerple", 'kerple(form="power")', "sandwich",
    "scale_invariant", "scale_invariant(fraction=0)",
]  # fmt: skip
BOUNDED = ["rope(window=70)", "none(chunk=100)", "alibi(window=129)", "rope(values=True, window=150, chunk=200)"]


def make(spec, seed=0, **settings):
    """A small model in float64 whose every parameter matters."""
    layers = 2 if isinstance(spec, str) else len(spec)
    defaults = dict(vocab_size=50, n_layer=layers, n_head=4, n_kv_head=2, n_embd=32, train_length=T, zero_init=False)
    model = GPT(GPTConfig(posenc=spec, **(defaults | settings)), seed).double().eval()
    torch.manual_seed(7)
    for parameter in model.posenc.parameters():
        torch.nn.init.normal_(parameter)
    return model


def cached(model, tokens, sizes, **cache):
    """Logits of `tokens` that enter a cache in pieces of the given sizes, the last size repeated."""
    cache, logits, start = Cache(total=tokens.shape[1], **cache), [], 0
    while start < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits.append(model(tokens[:, start : start + size], past=cache))
        start += size
    return torch.cat(logits, dim=1), cache


@torch.no_grad()
@pytest.mark.parametrize("length", [T // 2, T, T + 1, 8 * T])
@pytest.mark.parametrize("spec", first_of_each(UNBOUNDED))
def test_cached_logits_equal_the_full_forward(spec, length):
    model, tokens = make(spec), torch.randint(50, (2, length))
    full = model(tokens)
    singly = [1] if length <= T + 1 else [7 * T, 1]  # a whole context one by one is what generating does below
    for sizes in (singly, [5], [length - 1, 1], [1, 7, 3]):
        logits, cache = cached(model, tokens, sizes)
        assert torch.allclose(logits, full, rtol=0, atol=EXACT)
        assert cache.length == length


@torch.no_grad()
@pytest.mark.parametrize("spec", first_of_each([*UNBOUNDED, ["rope", "t5", "none"]]))
@pytest.mark.parametrize("sinks", [0, 3])
def test_window_over_the_cache_equals_the_masked_full_forward_in_constant_memory(spec, sinks):
    model, tokens = make(spec), torch.randint(50, (2, 8 * T))
    if sinks and model.posenc[0].unbroken:
        with pytest.raises(UserError, match=r"path reads all tokens .* no sinks"):
            model(tokens, past=Past(T, sinks))
        return
    full = model(tokens, past=Past(T, sinks))
    for sizes in ([5], [1, 7, 3]):
        logits, cache = cached(model, tokens, sizes, window=T, sinks=sinks)
        assert torch.allclose(logits, full, rtol=0, atol=EXACT)
        assert cache.length <= 2 * (T + sinks) + 7
        assert max(x.shape[2] for held in cache.layers.values() for x in held.values()) <= 5 * (T + sinks)
    assert not torch.allclose(full, model(tokens))


@torch.no_grad()
@pytest.mark.parametrize("spec", [*STATELESS, ["rope", "t5", "none"]])
def test_tokens_from_fixed_slots_equal_the_full_forward(spec):
    model, tokens = make(spec), torch.randint(50, (2, 2 * T))
    full, cache = model(tokens), Cache(total=2 * T)
    model(tokens[:, : T - 3], past=cache)
    cache, pos = Slots(cache), torch.tensor([T - 3])
    places = [x.data_ptr() for held in cache.layers.values() for x in held.values()]
    for index in range(T - 3, 2 * T):
        logits = model(tokens[:, index : index + 1], past=cache, pos=pos)
        assert torch.allclose(logits[:, 0], full[:, index], rtol=0, atol=EXACT)
        pos = pos + 1
    assert places == [x.data_ptr() for held in cache.layers.values() for x in held.values()]


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize(
    "settings", [{}, {"n_kv_head": 4, "qk_norm": True, "activation": "relu2", "norm": "layernorm"}]
)
def test_causality(name, settings):
    model, tokens = make(name, **settings), torch.randint(50, (1, T))
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 0


@pytest.mark.parametrize("name", [name for name, cls in ENCODINGS.items() if cls.relative and name not in SUMMED])
def test_sinks_lie_just_before_the_window(name):
    """In one layer, what the last token sees is the sinks and the window, numbered as if nothing lay between them."""
    model, tokens = make(name, n_layer=1), torch.randint(50, (2, 8 * T))
    logits, _ = cached(model, tokens, [5], window=T // 2, sinks=3)
    packed = torch.cat((tokens[:, :3], tokens[:, -T // 2 :]), dim=1)
    assert torch.allclose(logits[:, -1], model(packed)[:, -1], rtol=0, atol=EXACT)


def plain_attention(q, k, v, bias, seen):
    """Attention of one head by its definition, one query at a time."""
    out = torch.zeros(q.shape[0], v.shape[1], dtype=q.dtype)
    for i in range(q.shape[0]):
        keys = [j for j in range(k.shape[0]) if seen(i, j)]
        logits = [sum(q[i] * k[j]).item() / math.sqrt(q.shape[1]) + bias(i, j) for j in keys]
        total = sum(math.exp(logit) for logit in logits)
        for j, logit in zip(keys, logits, strict=True):
            out[i] += math.exp(logit) / total * v[j]
    return out


def encoding(spec, n_head=4):
    return posenc.build(spec, 1, n_embd=8 * n_head, n_head=n_head, n_kv_head=2, head_dim=8, train_length=T)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_is_its_definition(dtype):
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    got = attend(encoding("alibi"), q, k, v, torch.arange(3, 9), torch.arange(9))
    for head in range(4):
        expected = plain_attention(
            *(x[0, head // 2 if x is not q else head].double() for x in (q, k, v)),
            lambda i, j, head=head: -(2.0 ** (-2 * (head + 1))) * (3 + i - j),
            lambda i, j: j <= 3 + i,
        )
        # Sums of 8 and of 9 terms. In half precision they are float32's, rounded once each: logits, weights and y.
        terms = 8 + 9 if dtype == torch.float64 else 3
        assert torch.allclose(got[0, head].double(), expected, rtol=0, atol=bound(dtype, terms, v.abs().max().item()))


def test_causality_is_the_lower_triangle_in_both_paths():
    pos = torch.arange(7)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(2, 4, 7, 8).to(dtype) for _ in range(3))
        arguments = encoding("none"), q, k, v, pos, pos
        rounding = bound(torch.float32, 8 + 7, scale=v.abs().max().item())  # in half precision both are written out
        assert torch.allclose(attend(*arguments), attend(*arguments, seen=visible(pos, pos)), rtol=0, atol=rounding)


@pytest.mark.parametrize("spec", first_of_each(UNBOUNDED))
@pytest.mark.parametrize("options", [{}, {"window": T, "sinks": 3}])
def test_chunks_of_queries_change_nothing(spec, options, monkeypatch):
    """Neither logits nor gradients, with or without a window."""
    model, tokens, found = make(spec), torch.randint(50, (2, 4 * T)), []
    if model.posenc[0].unbroken and options:
        options = {"window": T}
    for chunk in (4 * T, 7):
        monkeypatch.setattr(attention, "CHUNK", chunk)
        model.zero_grad()
        logits = model(tokens, past=Past(**options))
        logits.square().sum().backward()
        found.append((logits, [parameter.grad.clone() for parameter in model.parameters()]))
    (whole, gradients), (pieces, others) = found
    terms, largest = step_sums(model.config, tokens=8 * T), max(one.abs().max().item() for one in gradients)
    rounding = bound(torch.float64, terms, scale=LOGIT * largest)
    assert torch.allclose(whole, pieces, rtol=0, atol=EXACT)
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=rounding)


def test_one_query_sees_the_whole_cache():
    """The kernel's causal flag would show it key 0 alone."""
    model, tokens = make("none"), torch.randint(50, (1, 6))
    logits, _ = cached(model, tokens, [5, 1])
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % 50
    other, _ = cached(model, changed, [5, 1])
    assert not torch.allclose(logits[:, -1], other[:, -1])


def test_grouped_heads_equal_repeated_heads():
    grouped = make("rope", n_kv_head=2)
    full = make("rope", n_kv_head=4)
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("qkv.weight")]:
        q, k, v = state[name].split((32, 16, 16))
        repeat = lambda w: w.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)  # noqa: E731
        state[name] = torch.cat((q, repeat(k), repeat(v)))
    full.load_state_dict(state)
    tokens = torch.randint(50, (2, T))
    assert torch.allclose(grouped(tokens), full(tokens), rtol=0, atol=EXACT)


def test_loss_is_cross_entropy_and_masked_targets_count_nothing():
    model, tokens = make("rope"), torch.randint(50, (2, 8))
    targets = torch.randint(50, (2, 8))
    targets[0, 3] = -1
    loss, logits = model(tokens, targets), model(tokens)
    for row in range(2):
        for t in range(8):
            expected = 0.0 if targets[row, t] < 0 else -logits[row, t].log_softmax(-1)[targets[row, t]].item()
            assert loss[row, t].item() == pytest.approx(expected, rel=bound(torch.float32, 50))  # the vocabulary
    assert torch.allclose(model(tokens, targets[:, -3:], last=3), loss[:, -3:], rtol=bound(torch.float32, 50))


def test_softcap_bounds_logits():
    model = make("rope", logit_softcap=0.5)
    assert model(torch.randint(50, (1, 8))).abs().max() < 0.5


def test_initial_weights_depend_on_seed_and_name_alone():
    """Two models that differ in the encoding, or in depth, start with all else equal."""
    rope, t5, deep = (
        GPT(GPTConfig(posenc=p, vocab_size=50, n_layer=n)) for p, n in (("rope", 2), ("t5", 2), ("rope", 3))
    )
    state, other = rope.state_dict(), GPT(GPTConfig(vocab_size=50, n_layer=2), seed=1).state_dict()
    for name, value in state.items():
        assert torch.equal(value, t5.state_dict()[name])
        assert torch.equal(value, deep.state_dict()[name])
    assert not torch.equal(state["token.weight"], other["token.weight"])
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])


def test_zero_init_makes_every_block_the_identity():
    model = GPT(GPTConfig(vocab_size=50, n_layer=2))
    tokens = torch.randint(50, (1, 8))
    assert torch.equal(model(tokens), model.head(model.norm(model.token_norm(model.token(tokens)))))


def test_every_parameter_gets_a_gradient():
    for name in ENCODINGS:
        model = make(name, norm_affine=True, bias=True)
        model(torch.randint(50, (2, T)), torch.randint(50, (2, T))).sum().backward()
        for path, parameter in model.named_parameters():
            assert parameter.grad is not None, path
            assert parameter.grad.abs().sum() > 0, path


def test_learned_refuses_positions_past_its_table_and_says_what_to_do():
    model = make("learned")
    model(torch.randint(50, (1, T)))
    for call in (
        lambda: model(torch.randint(50, (1, T + 1))),
        lambda: cached(model, torch.randint(50, (1, T + 1)), [1]),
        lambda: next(generate(model, torch.randint(50, (1, 4)), T)),
    ):
        with pytest.raises(ValueError, match="clamp") as caught:
            call()
        assert "interpolate" in str(caught.value)
        assert "crop" in str(caught.value)


def test_flops_count_products():
    config = GPTConfig(vocab_size=50, n_layer=2, n_embd=32, n_head=4, train_length=T)
    per_token = 2 * (4 * 32 * 32 + 3 * 32 * 96) + 32 * 50  # weights of both blocks and the head
    assert GPT(config).flops_per_token() == 6 * per_token + 12 * 2 * 32 * T


# ---- generate


def test_only_what_needs_no_mask_enters_a_cache_at_once(monkeypatch):
    monkeypatch.setattr(caches, "WHOLE", 16)
    monkeypatch.setattr(caches, "PIECE", 3)
    held = Cache()
    held.advance(torch.arange(2), 2)
    sizes = [[p.shape[1] for p in pieces(torch.zeros(2, n), c)] for n, c in (
        (12, Cache()), (7, Cache(window=4)), (7, held), (8, Cache()), (0, Cache()))]  # fmt: skip
    assert sizes == [[8, 3, 1], [3, 3, 1], [3, 3, 1], [8], []]


@pytest.mark.parametrize("spec", first_of_each(UNBOUNDED))
def test_generate_equals_naive_greedy_decoding_at_8_times_the_training_length(spec, monkeypatch):
    for name in ("WHOLE", "PIECE"):  # the prompt enters the cache in two pieces
        monkeypatch.setattr(caches, name, 3)
    model, tokens = make(spec), torch.randint(50, (2, 5))
    made = torch.stack(list(generate(model, tokens, 8 * T - 5, temperature=0)), dim=1)
    whole = torch.cat((tokens, made), dim=1)
    logits = model(whole[:, :-1])  # of every step at once, since no token sees later ones
    assert torch.equal(logits[:, 4:].argmax(-1), made)


def test_crop_reencodes_the_last_tokens():
    model, tokens = make("learned"), torch.randint(50, (1, 5))
    made = torch.stack(list(generate(model, tokens, 3 * T, temperature=0, crop=T)), dim=1)
    for _ in range(3 * T):
        tokens = torch.cat((tokens, model(tokens[:, -T:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(made, tokens[:, 5:])


def test_generate_is_seeded_and_never_draws_forbidden_tokens():
    model, tokens = make("rope"), torch.randint(50, (4, 5))
    draws = [torch.stack(list(generate(model, tokens, 40, seed=s, forbidden=range(25))), dim=1) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].min() >= 25


def test_draw_keeps_what_top_k_and_top_p_say_in_the_right_proportions():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**kwargs):  # to .02, six standard deviations of 20,000 draws
        options = dict(temperature=1.0, top_k=0, top_p=1.0) | kwargs
        counts = torch.bincount(draw(logits, generator=generator, **options)[:, 0], minlength=4)
        return (counts / counts.sum()).tolist()

    assert shares() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)
    assert shares(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.02)
    assert shares(top_k=99) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)
    assert shares(top_p=0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.02)
    assert shares(top_p=0.01) == [1, 0, 0, 0]
    squared = [p**2 / 0.3 for p in (0.4, 0.3, 0.2, 0.1)]
    assert shares(temperature=0.5) == pytest.approx(squared, abs=0.02)
    assert shares(temperature=0) == [1, 0, 0, 0]


def test_bfloat16_autocast_stays_close_to_float32_for_every_encoding():
    for name in ENCODINGS:
        model, tokens = make(name).float(), torch.randint(50, (2, T))
        exact = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(tokens)
        # Every layer rounds to half precision eight times: q k v, logits, weights, y, and once each product after them.
        rounding = bound(torch.bfloat16, 2 * 8 + 1, scale=exact.std().item())
        assert (half.float() - exact).abs().max() < rounding
        assert (half.float() - exact).abs().max() > 0


def test_half_precision_keeps_distances_apart():
    """Distances that bfloat16 cannot tell apart give different weights: biases are added in float32."""
    alibi = encoding("alibi", n_head=2)  # of slope 1/16 in the first head
    q, k, seen = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 4096, 8), torch.arange(4095, -1, -1)[None] >= 3000
    for n in (3000, 3001):
        v = torch.zeros(1, 2, 4096, 8)
        v[:, :, 4095 - n] = 1
        q_pos, k_pos = torch.tensor([4095]), torch.arange(4096)
        weight = attend(alibi, *(x.bfloat16() for x in (q, k, v)), q_pos, k_pos, seen)[0, 0, 0, 0].item()
        assert weight == pytest.approx(
            math.exp(-(n - 3000) / 16) * (1 - math.exp(-1 / 16)), rel=bound(torch.bfloat16, 1)
        )


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """torch computes flex_attention's gradients on the CPU, but refuses to."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_module, "_warn_once", lambda *_, **__: None)  # that it is slow
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_module.flex_attention)


def attended(how, spec, T, dtype, device="cpu"):
    """Attention computed in the named way, and its gradients: of q, k, v and the encoding's parameters."""
    (sight,) = posenc.sights(spec, 1)
    one = posenc.build(spec, 1, n_embd=64, n_head=4, n_kv_head=2, head_dim=16, train_length=T)[0].to(device)
    one = one.double() if dtype == torch.float64 else one
    generator = torch.Generator().manual_seed(5)
    for parameter in one.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    q, k, v, weight = (torch.randn(2, h, T, 16, generator=generator).to(device, dtype) for h in (4, 2, 2, 4))
    pos, leaves = torch.arange(T, device=device), [x.requires_grad_() for x in (q, k, v, *one.parameters())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose", lambda *_: how)
        y = attend(one, q, k, v, pos + 9, pos + 9, sight=sight)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
@pytest.mark.parametrize("spec", BY_DISTANCE + BOUNDED)
def test_flex_attention_is_what_is_written_out(spec, dtype, flex_on_cpu):
    for got, expected in zip(*(attended(how, spec, 256, dtype) for how in (flex, written_out)), strict=True):
        terms = 3 * (16 + 256) + 2 * 256  # forward, twice as much back, and for parameters a sum over all queries
        assert torch.allclose(got, expected, rtol=0, atol=bound(dtype, terms, scale=expected.abs().max().item()))


def test_a_compiled_model_calls_flex_attention_without_a_break(flex_on_cpu, monkeypatch):
    tokens, spec = torch.randint(50, (1, 256)), ["t5", "rope(window=70)"]
    exact, rounding = make(spec)(tokens), bound(torch.float64, sums(make(spec).config, 256), scale=LOGIT)
    monkeypatch.setattr(attention, "choose", lambda *_: flex)
    assert torch.allclose(
        torch.compile(make(spec), backend="eager", fullgraph=True)(tokens), exact, rtol=0, atol=rounding
    )


def chosen(spec, q, S=None, seen=None, parts=1, dropout=0.0, sink=None):
    """The form that is chosen for queries q (B, H, T, D) over S keys, by default T."""
    T, S = q.shape[2], S or q.shape[2]
    k = q.new_zeros(*q.shape[:2], S, q.shape[3])
    model = make(spec)
    part = pairs(q, k, k, torch.arange(S - T, S), torch.arange(S), seen, sight=model.sights[0])
    return attention.choose(model.posenc[0], [replace(part, sink=sink)] * parts, dropout)


def test_flex_attention_serves_biases_by_distance_and_bounds_alone(monkeypatch):
    monkeypatch.setattr(attention, "flexes", lambda q: True)
    q = torch.zeros(1, 4, 256, 16, dtype=torch.float16)
    assert [spec for spec in UNBOUNDED if chosen(spec, q) is flex] == sorted(BY_DISTANCE, key=UNBOUNDED.index)
    for more in (dict(seen=torch.ones(256, 256).bool()), dict(parts=2), dict(S=300), dict(dropout=0.1)):
        assert chosen("t5", q, **more) is written_out
    assert chosen("t5", q.float()) is biased
    assert [chosen(f"{name}(window=70)", q) for name in ("rope", "t5", "cope")] == [flex, flex, written_out]
    for more in (dict(seen=torch.ones(256, 256).bool()), dict(dropout=0.1), dict(sink=torch.zeros(4))):
        assert chosen("rope(chunk=70)", q, **more) is fused
    assert chosen("rope(window=70)", q.float()) is fused


def test_bfloat16_on_the_cpu_takes_the_fused_kernel_where_no_gradient_flows():
    q = torch.zeros(1, 4, 8, 16, dtype=torch.bfloat16)
    assert (chosen("rope", q), chosen("t5", q)) == (written_out, written_out)
    with torch.no_grad():
        assert (chosen("rope", q), chosen("t5", q)) == (fused, written_out)  # the kernel would round the biases


def test_positions_that_do_not_follow_one_another_get_a_mask():
    """Or flex_attention would take the distance of two tokens for that of their positions."""
    seen = []
    for pos in (None, 3 * torch.arange(T)):
        make("t5", n_layer=1)(torch.randint(50, (1, T)), pos=pos, watch=lambda *call: seen.append(call[3].seen))
    assert seen[0] is None
    assert seen[1] is not None


SIGHTS = [(0, 0), (1, 0), (70, 0), (128, 0), (129, 0), (300, 0), (0, 100), (0, 128), (0, 256), (200, 300), (9999, 0)]


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_blocks_hold_the_keys_in_sight_and_skip_all_others(sight):
    def seen(b, h, i, j):
        near = (i >= j) & (i - j < (sight[0] or 640))
        return near & (i // sight[1] == j // sight[1]) if sight[1] else near

    ours, theirs = attention.blocks(640, Sight(*sight), "cpu"), create_block_mask(seen, 1, 1, 640, 640, "cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.slow
@pytest.mark.skipif(no_compiler(torch.device("cpu")) is not None, reason="nothing compiles here")
@pytest.mark.parametrize("spec", BOUNDED)
def test_a_kernel_that_skips_blocks_computes_what_is_written_out(spec, monkeypatch):
    """The eager form reads no blocks, but what torch compiles for a CPU does; it has no gradient there."""
    one, (sight,) = make(spec).posenc[0].float(), posenc.sights(spec, 1)
    monkeypatch.setattr(attention, "compiled_flex", lambda: torch.compile(flex_module.flex_attention, dynamic=False))
    q, k, v, pos = torch.randn(2, 4, 640, 8), torch.randn(2, 2, 640, 8), torch.randn(2, 2, 640, 8), torch.arange(640)
    outputs = []
    for form in (flex, written_out):
        monkeypatch.setattr(attention, "choose", lambda *_, form=form: form)
        with torch.no_grad():
            outputs.append(attend(one, q, k, v, pos, pos, sight=sight))
    assert torch.allclose(*outputs, rtol=0, atol=bound(torch.float32, 8 + 640, scale=LOGIT))


@pytest.mark.parametrize("spec", [*BOUNDED, "cope(window=70)", "fox(chunk=100)"])
def test_under_a_bound_queries_are_given_the_keys_in_sight_alone(spec, monkeypatch):
    sizes, found, in_sight = [], [], attention.in_sight
    tokens, model, (sight,) = torch.randint(50, (1, 300)), make(spec, n_layer=1), posenc.sights(spec, 1)

    def counted(*arguments):
        part = in_sight(*arguments)
        sizes.append((len(part.i), len(part.j), part.k.shape[2]))
        return part

    monkeypatch.setattr(attention, "in_sight", counted)
    for chunk in (300, 64):
        monkeypatch.setattr(attention, "CHUNK", chunk)
        logits = model(tokens)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    assert sizes and all(S == held < T + sight.span for T, S, held in sizes)
    terms, largest = step_sums(model.config, tokens=300), max(one.abs().max().item() for one in found[0])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=bound(torch.float64, terms, scale=LOGIT * largest))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_groups_of_heads_reach_a_kernel_that_takes_them_alone(device, monkeypatch):
    """On a GPU none takes them under a mask or in float32: torch would write out all logits instead, (T, T)."""
    heads = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: (heads.append(k.shape[1]), q)[1])
    for dtype in (torch.float32, torch.float16):
        q, k, pos = (torch.zeros(size, dtype=dtype, device=device) for size in ((1, 4, 8, 8), (1, 2, 8, 8), 8))
        for seen in (None, torch.ones(8, 8, dtype=torch.bool, device=device)):
            fused(encoding("none"), [pairs(q, k, k, pos, pos, seen)])
    assert heads == ([2, 2, 2, 2] if device == "cpu" else [4, 4, 2, 4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("spec", BY_DISTANCE + BOUNDED)
def test_flex_attention_on_a_gpu(spec):
    """It is as near to float32 as what is written out in bfloat16, and its memory grows with T, not T T."""
    exact = attended(written_out, spec, 640, torch.float32, "cuda")
    flexed, written = (attended(how, spec, 640, torch.bfloat16, "cuda") for how in (flex, written_out))
    for found, other, expected in zip(flexed, written, exact, strict=True):
        errors = [(x.float() - expected).norm() / expected.norm() for x in (found, other)]
        assert errors[0] < 2 * errors[1] + 0.01
    peaks = []
    for length in (2048, 8192):
        for _ in range(2):  # the first of them compiles
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            attended(flex, spec, length, torch.bfloat16, "cuda")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0]


def test_derived_seeds_differ_where_sums_would_collide():
    seeds = {model_module.derive_seed(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500


def test_sdpa_takes_top_left_for_fewer_queries_than_keys():
    """Why `attend` asks for T = S with its causal flag: the kernel's triangle starts at the top left."""
    q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    assert torch.allclose(F.scaled_dot_product_attention(q, k, v, is_causal=True), v[:, :, :1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("spec", UNBOUNDED)
def test_a_gpu_computes_what_the_cpu_does(spec):
    model, tokens = make(spec).float(), torch.randint(50, (2, 4 * T))
    exact = model(tokens)
    model, tokens = model.cuda(), tokens.cuda()
    rounding = bound(torch.float32, sums(model.config, 4 * T), scale=LOGIT)
    assert torch.allclose(model(tokens).cpu(), exact, rtol=0, atol=rounding)
    assert torch.allclose(cached(model, tokens, [7, 1])[0].cpu(), exact, rtol=0, atol=rounding)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            rounding = bound(torch.bfloat16, 2 * 8 + 1, scale=exact.std().item())
            assert (model(tokens).float().cpu() - exact).abs().max() < rounding


def test_a_compiled_model_generates_the_same_text():
    model, tokens = make("rope").float(), torch.randint(50, (2, T))
    calls = []

    def compiled(*arguments, **more):  # what torch.compile returns is called as the model is
        calls.append(more["past"])
        return model(*arguments, **more)

    plain, slots = (list(generate(model, tokens, 40, seed=1, compiled=way)) for way in (None, compiled))
    assert torch.equal(torch.stack(plain), torch.stack(slots))
    assert len(calls) == 39
    assert all(cache is calls[0] and isinstance(cache, Slots) for cache in calls)


@pytest.mark.parametrize("spec", ["rope", "t5"])
def test_a_token_from_slots_compiles_into_one_graph(spec):
    model, tokens = make(spec), torch.randint(50, (1, T))
    cache = Cache(total=2 * T)
    with torch.inference_mode():
        model(tokens, past=cache)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)  # which refuses breaks
        slots, other = Slots(cache), Slots(cache)
        for index in range(T, T + 3):
            given = tokens[:, :1], torch.tensor([index])
            one, two = (run(given[0], pos=given[1], past=held) for run, held in ((compiled, slots), (model, other)))
            assert torch.allclose(one, two, rtol=0, atol=EXACT)


@pytest.mark.parametrize("spec", [spec for spec in UNBOUNDED if spec not in STATELESS])
def test_slots_refuse_what_keeps_more_than_keys_and_values(spec):
    model = make(spec)
    with pytest.raises(ValueError, match="keys and values"):
        list(generate(model, torch.zeros(1, 3, dtype=torch.long), 3, compiled=model))


@pytest.mark.parametrize("affine", [False, True])
def test_rmsnorm_is_torchs_with_its_gradient(affine):
    torch.manual_seed(3)
    norm = model_module.RMSNorm(8, eps=1e-2, elementwise_affine=affine).double()
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    x[0] *= 0.01  # where eps is what counts
    x[1, 0] = 0
    if affine:
        torch.nn.init.normal_(norm.weight)
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
    for y in (norm(here), F.rms_norm(there, (8,), norm.weight, 1e-2)):
        (y * torch.arange(8)).sin().sum().backward()
    for ours, theirs in ((norm(x), F.rms_norm(x, (8,), norm.weight, 1e-2)), (here.grad, there.grad)):
        # A sum of 8 squares, a root and its inverse; backward twice as much.
        assert torch.allclose(ours, theirs, rtol=0, atol=bound(torch.float64, 3 * 10, theirs.abs().max().item()))
    assert torch.autograd.gradcheck(norm, (x.clone().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_in_half_precision_neither_overflows_nor_drifts(dtype):
    norm, x = model_module.RMSNorm(512, eps=1e-7, elementwise_affine=False), 100 * torch.randn(3, 512).to(dtype)
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x), norm(x.float()).to(dtype))

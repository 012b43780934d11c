"""Schedules over the layers: what each layer sees, in training as from a cache, and what the flag says of it."""

import math

import pytest
import small
import torch
from tiny import bound, command, sums

import posenc
from core import runs
from core.additions import BY_POSITION, TEMPERS
from core.cache import Cache, Memory, Past, Slots
from core.encoding import Sight
from core.errors import UserError
from core.optimizers import whole_matrices
from core.settings import Config, Reading
from lab import frequencies, spread
from model import GPT, GPTConfig, generate
from posenc import members

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
    [f"selective_rope(window={W})", f"path(forget=True, window={W})", "repo", f"wall(window={W}, chunk=3)"],
    [f"sinusoidal(window={W})", "sinusoidal"],
    ['rope(scaling="dynamic", window=4)', "rerope", f"xpos(window={W})"],
]


# Recipes at the sizes here; how windows grow is not the model's.
RECIPES = {
    name: {key: value for key, value in settings.items() if key != "window_schedule"}
    for name, settings in small.RECIPES.items()
}


def make(posenc, **settings):
    return small.make(posenc, **{"n_layer": len(members(posenc))} | settings)


def cached(model, tokens, size, **options):
    """The logits of tokens that enter a cache so many at a time, and the cache."""
    cache = Cache(total=tokens.shape[1], **options)
    return torch.cat([model(part, past=cache) for part in tokens.split(size, dim=1)], dim=1), cache


def close(one, other):
    return torch.allclose(one, other, rtol=0, atol=EXACT)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        *({"posenc": spec} for spec in SCHEDULES),
        *(pytest.param(settings, id=name, marks=pytest.mark.slow) for name, settings in RECIPES.items()),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [T // 2, T, W - 1, W, W + 1, 8 * T])
def test_cached_logits_equal_the_full_forward(settings, length):
    model, tokens = make(**settings), torch.randint(50, (2, length))
    full = model(tokens)
    for size in (1, 3, 7) if length <= T else (3, 50):
        logits, cache = cached(model, tokens, size)
        assert close(logits, full)
        for sight, own in cache.narrow.items():  # at most two windows and a piece
            assert own.length <= 2 * sight.span + size
            assert all(x.shape[2] <= max(64, 4 * sight.span + 2 * size) for x in own.layers[min(own.layers)].values())


@torch.no_grad()
@pytest.mark.parametrize("spec", ["rope(window=40)", "fox(chunk=40)", ["alibi(window=40)", "none"]], ids=str)
def test_the_memory_of_a_window_is_that_of_two_windows_and_a_piece(spec):
    """All of it, storages whole, while a text grows to 10 windows; and nothing else of the cache grows beside it."""

    def held(past):
        tensors = [x for each in (past.layers, past.tails) for layer in each.values() for x in layer.values()]
        return sum(x.untyped_storage().nbytes() for x in (past.pos, *tensors))

    model, cache, piece, sizes, others = make(spec, short_conv=True), Cache(total=400), 25, [], []
    for size in (piece, *[1] * 374):
        model(torch.randint(50, (1, size)), past=cache)
        sizes.append(sum(map(held, cache.narrow.values())))
        others.append(held(cache))
    layers = sum(sight.span > 0 for sight in posenc.sights(spec, len(model.blocks)))
    # Room is made for twice as many as there are: of keys, values and fox's sum, a float64 each, and three tails.
    tokens, width = 2 * (2 * 40 + piece), 2 * model.config.kv_heads * 8 + model.config.n_head
    assert max(sizes) <= layers * 8 * (tokens * width + 3 * width) + 8 * tokens
    assert max(sizes[100:]) == max(sizes[100:200]) == max(sizes[300:])
    assert (others[-1] > 2 * others[100]) == (len(set(posenc.sights(spec, len(model.blocks)))) > 1)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, cls in posenc.ENCODINGS.items() if cls.relative])
@pytest.mark.parametrize(("bound", "first"), [("window", lambda i: max(0, i - W + 1)), ("chunk", lambda i: i - i % W)])
def test_one_layer_sees_what_its_sight_says(name, bound, first):
    """A relative encoding cannot tell a text cut there from one that goes on, if it sees no further."""
    if bound in posenc.ENCODINGS[name].arguments:
        pytest.skip("its window is its own, and no trained one")
    alone = "taps=1, " if "taps" in posenc.ENCODINGS[name].arguments else ""  # no convolution, which would see further
    model, tokens = make(f"{name}({alone}{bound}={W})"), torch.randint(50, (2, 3 * T))
    logits = model(tokens)
    for i in range(3 * T):
        alone = model(tokens[:, first(i) : i + 1])
        if name in small.SUMMED:  # They count from the beginning, which rounds otherwise and no more.
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
@pytest.mark.parametrize(
    "spec", [spec for spec in SCHEDULES if not any(cls.has_state for cls, *_ in posenc.members(spec))], ids=str
)
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


def test_settings_that_would_do_nothing_are_refused():
    for settings, said in (
        ({"window_schedule": {0.0: 0.5, 0.5: 1.0}}, "needs a window in posenc"),
        ({"posenc": "rope(window=3)", "temper": "llama4"}, "without window or chunk alone, and there are none"),
        ({"posenc": ["rope", "none", "rope(window=3)"], "n_layer": 2}, "would do nothing"),
        ({"short_conv": True, "segments": 2}, "segments and short_conv exclude each other"),
    ):
        with pytest.raises(ValueError, match=said):
            Config(**settings)


def test_the_row_of_a_list_with_empty_members_says_what_is_in_force():
    spec = ["rope(window=8)", "none"]
    assert posenc.title(["", ""], posenc.merge(spec, ["", ""])) == str(spec)
    assert posenc.title(spec, posenc.merge(spec, spec)) == str(spec)


@torch.no_grad()
def test_a_cache_that_no_layer_uses_does_not_grow():
    model, tokens = small.make(f"rope(window={W})"), torch.randint(50, (1, 8 * T))
    _, cache = cached(model, tokens, 1)
    assert cache.next == 8 * T and len(cache.pos) == 1
    assert len(list(generate(model, tokens[:, :4], 20, compiled=model))) == 20


@torch.no_grad()
def test_logits_are_taken_apart_where_the_layer_sees_them():
    model, tokens = make(["rope(window=4)", "rope"]), torch.randint(50, (2, T + 1))
    found, whole = (
        frequencies.frequencies(each, tokens, small.CPU)["absolute"] for each in (model, make(["rope"] * 2))
    )
    assert not torch.equal(found[0], whole[0]) and found[1].shape == whole[1].shape
    turning = small.make("rope(values=True)")
    with frequencies.silenced(turning, range(4)):  # all pairs: queries and keys are nothing, and values still turn
        silent = turning(tokens)
    blind = small.make("rope(values=True)")
    for block in blind.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight[:32])
    assert close(silent, blind(tokens))


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


# Tempers, sinks, gates, convolutions.

EVERYTHING = dict(sink_logit=True, gate="elementwise", short_conv=True, qk_norm=True, learn_qk_scale=True)
FACTORS = {  # temper -> the factor of the i-th of the queries that sees n keys, T being the training length
    "none": lambda n, i: 1.0,
    "su": lambda n, i: max(1.0, math.log(n) / math.log(T)),
    "llama4": lambda n, i: 1 + 0.1 * math.log(1 + (i + 1) // T),
    "inkling": lambda n, i: 1 + 0.1 * math.log(max(1.0, (i + 1) / T)),
}


def shaken(model):
    """The model with what its settings add drawn at random, so that all of it matters."""
    for block in model.blocks:
        for name in block.attn.first_values:
            if (parameter := getattr(block.attn, name)) is not None:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def by_loops(model, tokens, first):
    """Logits of a model of one layer without positions, in plain loops. first(i): the first key that query i sees."""
    attn, config, block = model.blocks[0].attn, model.config, model.blocks[0]
    H, D, groups = config.n_head, config.n_embd // config.n_head, config.n_head // config.kv_heads
    embedded = model.token_norm(model.token(tokens))[0]
    x = block.attn_norm(embedded)
    q, k, v = attn.qkv(x).split((H * D, config.kv_heads * D, config.kv_heads * D), dim=-1)
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(H):
            g = h // groups

            def mixed(kind, x, j, g=g):
                total = x[j, g * D : (g + 1) * D].clone()
                for m in range(4):
                    if config.short_conv and j - m >= 0:
                        total += x[j - m, g * D : (g + 1) * D] * getattr(attn, kind)[m, g, 0]
                return total

            def unit(x):
                return x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt() if config.qk_norm else x

            query, keys = unit(q[i, h * D : (h + 1) * D]), range(first(i), i + 1)
            temper, n = attn.temper_kind, len(keys)
            if temper == "ssmax":
                factor = attn.temper[h].item() * math.log(n)
            elif temper == "adaptive":
                a, b = (attn.temper[row] @ x[i] for row in (h, H + h))
                factor = (1 + math.log1p(math.exp(a)) * math.log(n + 1) ** (2 * math.tanh(b))) / (1 + math.log(2))
            else:
                factor = FACTORS[temper](n, i)
            scale = factor * (attn.qk_scale[h].item() if config.learn_qk_scale else config.qk_scale)
            logits = [scale * (query @ unit(mixed("conv_k", k, j))).item() / math.sqrt(D) for j in keys]
            sink = math.exp(attn.sink_logit[h].item()) if config.sink_logit else 0.0
            total = sum(map(math.exp, logits)) + sink
            y = sum(math.exp(s) / total * mixed("conv_v", v, j) for s, j in zip(logits, keys, strict=True))
            if config.gate == "elementwise":
                y = y * 2 / (1 + (-(attn.gate[h * D : (h + 1) * D] @ x[i])).exp())
            elif config.gate == "head":
                y = y * 2 / (1 + math.exp(-(attn.gate[h] @ x[i])))
            elif config.gate == "softplus":
                y = y * math.log1p(math.exp(attn.gate[h] @ x[i])) / math.log(2)
            heads.append(y)
        rows.append(attn.proj(torch.cat(heads)))
    y = embedded + torch.stack(rows)
    return model.head(model.norm(y + block.ff(block.ff_norm(y))))


SIGHTS = {
    "none": lambda i: 0,
    f"none(window={W})": lambda i: max(0, i - W + 1),
    f"none(chunk={W})": lambda i: i - i % W,
}
ADDED = [
    *({"temper": temper} for temper in TEMPERS),
    *({"gate": gate} for gate in ("elementwise", "head", "softplus")),
    {"sink_logit": True},
    {"short_conv": True},
    {"qk_norm": True, "qk_scale": 1.2},
    {"learn_qk_scale": True},
    {"temper": "ssmax"} | EVERYTHING,
]


@torch.no_grad()
@pytest.mark.parametrize("settings", ADDED, ids=str)
@pytest.mark.parametrize("spec", SIGHTS)
def test_attention_is_what_plain_loops_compute(settings, spec):
    if spec != "none" and settings.get("temper") in BY_POSITION:
        pytest.skip("a temper that would act on no layer is refused")
    model, tokens = shaken(small.make(spec, n_layer=1, **settings)), torch.randint(50, (1, T + 5))
    assert close(model(tokens)[0], by_loops(model, tokens, SIGHTS[spec]))


@torch.no_grad()
@pytest.mark.parametrize("temper", ["none", "ssmax", "adaptive"])
@pytest.mark.parametrize(
    "spec", [["rope", f"alibi(window={W})"], ["cope", f"shaw(chunk={W})"], [f"rope(window={W})", "none"]], ids=str
)
def test_all_of_it_together_is_the_same_from_a_cache(spec, temper):
    model, tokens = shaken(make(spec, temper=temper, **EVERYTHING)), torch.randint(50, (2, 3 * T))
    full = model(tokens)
    for size in (1, 7):
        assert close(cached(model, tokens, size)[0], full)
    cache = Cache(total=3 * T)
    model(tokens[:, : 2 * T], past=cache)
    slots = Slots(cache)
    for index in range(2 * T, 3 * T):
        assert close(model(tokens[:, index : index + 1], past=slots, pos=torch.tensor([index]))[:, 0], full[:, index])


@pytest.mark.parametrize("spec", ["none", "alibi", "cope", f"rope(window={W})"])
def test_a_sink_of_minus_infinity_and_a_gate_of_one_are_none(spec):
    tokens = torch.randint(50, (2, 2 * T))
    plain, model = (small.make(spec, **settings) for settings in ({}, {"sink_logit": True, "gate": "head"}))
    for block in model.blocks:
        torch.nn.init.constant_(block.attn.sink_logit, -math.inf)
    logits = model(tokens)
    assert close(logits, plain(tokens))
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_starts_neutral_changes_nothing():
    tokens = torch.randint(50, (2, 2 * T))
    plain = small.make()(tokens)
    for settings in ({"gate": "elementwise"}, {"gate": "softplus"}, {"short_conv": True}, {"learn_qk_scale": True}):
        assert close(small.make(**settings)(tokens), plain)
    assert not close(small.make(sink_logit=True)(tokens), plain)


def test_muon_gets_whole_matrices_alone():
    model = small.make(temper="adaptive", **EVERYTHING)
    ours = {name for name, p in model.blocks.named_parameters() if any(p is matrix for matrix in whole_matrices(model))}
    assert {name.removeprefix("0.") for name in ours if name.startswith("0.")} == {
        "attn.gate", "attn.qkv.weight", "attn.proj.weight", "ff.fc.weight", "ff.proj.weight"}  # fmt: skip
    heads = small.make(gate="head")
    assert not any(p is heads.blocks[0].attn.gate for p in whole_matrices(heads))


@torch.no_grad()
def test_tempers_by_position_leave_layers_with_a_window_alone():
    tokens = torch.randint(50, (2, 3 * T))
    for temper in BY_POSITION:
        model = make([f"rope(window={W})", "none"], temper=temper)
        for block in model.blocks:
            assert block.attn.temper_kind == temper
        told = make([f"rope(window={W})", f"none(temper='{temper}')"])
        assert close(model(tokens), told(tokens)) and not close(
            model(tokens), make([f"rope(window={W})", "none"])(tokens)
        )


def test_a_member_names_its_temper():
    model = make(['rope(window=4, temper="su")', 'none(temper="ssmax")', "alibi"], temper="inkling")
    assert [block.attn.temper_kind for block in model.blocks] == ["su", "ssmax", "inkling"]
    assert posenc.merge('none(temper="ssmax")', "none(window=3)") == "none(temper='ssmax', window=3)"
    for spec, said in (('rope(temper="x")', "temper must be"), ('rope(window=3, temper="llama4")', "without window")):
        with pytest.raises(ValueError, match=said):
            posenc.parse(spec)


# What RoPE learned since.


@torch.no_grad()
@pytest.mark.parametrize("window", ["", ", window=5"])
def test_values_that_turn_are_relative_too(window):
    model, tokens = small.make(f"rope(values=True{window})", n_layer=1, n_head=2), torch.randint(50, (1, T))
    attn, encoding, block = model.blocks[0].attn, model.posenc[0], model.blocks[0]
    embedded = model.token_norm(model.token(tokens))[0]
    q, k, v = (part.view(T, -1, 16) for part in attn.qkv(block.attn_norm(embedded)).split((32, 32, 32), dim=-1))

    def turned(x, by):
        angles = [by * 10000 ** (-2 * m / 16) for m in range(8)]
        cos, sin = (torch.tensor([f(angle) for angle in angles], dtype=x.dtype) for f in (math.cos, math.sin))
        return torch.cat((x[:8] * cos - x[8:] * sin, x[8:] * cos + x[:8] * sin))

    rows = []
    for i in range(T):
        keys, heads = range(max(0, i - 4) if window else 0, i + 1), []
        for h in range(2):
            weights = torch.stack([turned(q[i, h], i - j) @ k[j, h] / 4 for j in keys]).softmax(-1)
            heads.append(sum(w * turned(v[j, h], j - i) for w, j in zip(weights, keys, strict=True)))
        rows.append(attn.proj(torch.cat(heads)))
    y = embedded + torch.stack(rows)
    assert encoding.relative and close(model(tokens)[0], model.head(model.norm(y + block.ff(block.ff_norm(y)))))


@torch.no_grad()
def test_values_that_turn_are_the_same_from_a_cache_and_near_sinks():
    model, tokens = small.make(["rope(values=True)", "alibi"]), torch.randint(50, (2, 4 * T))
    assert close(cached(model, tokens, 7)[0], model(tokens))
    assert close(cached(model, tokens, 7, window=T, sinks=2)[0], model(tokens, past=Past(T, 2)))


def test_cut_stops_what_takes_too_long_and_clip_fades_the_last_pairs():
    sizes = dict(n_embd=64, n_head=1, n_kv_head=1, head_dim=64, train_length=128, n_layer=1)
    of = lambda spec: posenc.build(spec, **sizes)[0].frequency(128, torch.float64)[0]  # noqa: E731
    free, cut, clip = of("rope"), of("rope(cut=128)"), of("rope(clip=0.25)")
    turn_in_time = [2 * math.pi / w <= 128 for w in free.tolist()]
    assert 0 < sum(turn_in_time) < 32
    assert torch.equal(cut, free * torch.tensor(turn_in_time))
    assert torch.equal(of("rope(cut=10000000)"), free) and torch.equal(clip[:24], free[:24])
    faded = [(1 + math.cos(math.pi * k / 7)) / 2 for k in range(8)]
    assert (clip[24:] / free[24:]).tolist() == pytest.approx(faded, abs=bound(torch.float64, 4))


def test_a_list_of_the_same_length_is_laid_over_member_by_member():
    spec = ["rope(window=8)", "rope(window=8)", "none"]
    assert posenc.merge(spec, ["", 'rope(scaling="yarn")', ""]) == [spec[0], "rope(scaling='yarn', window=8)", "none"]
    assert posenc.merge(spec, ["rope", "alibi"]) == ["rope", "alibi"]


@pytest.mark.slow
def test_init_from_adds_windows_and_gates_and_gives_positions_up(learned, trained, corpus, tmp_path, call_script):
    """What is new begins where it changes nothing; what the encoding learned stays."""
    added = {"gate": "elementwise", "short_conv": True, "learn_qk_scale": True, "init_from": trained, "max_steps": 1}
    for name, spec in (("windows", ["rope(window=16)", "rope"]), ("fewer", ["rope(window=4)", "none"])):
        done = call_script("train.py", *command(corpus, tmp_path / name, posenc=spec, **added)[2:])
        assert done.returncode == 0, done.stderr
    model = runs.build(runs.config_of(runs.load(trained)), initial=False)
    state = runs.load(trained)
    runs.load_weights(model, state)
    wide = runs.build(runs.config_of(state, posenc=["rope(window=4)", "rope"], gate="head", short_conv=True))
    narrow = runs.build(runs.config_of(state, posenc=["rope(window=4)", "rope"]))
    for each in (wide, narrow):
        runs.load_weights(each, state, fresh=True)
    tokens, rounding = torch.randint(50, (2, 16)), bound(torch.float32, sums(wide.config, 16), scale=LOGIT)
    assert torch.allclose(wide.eval()(tokens), narrow.eval()(tokens), rtol=0, atol=rounding)
    state = runs.load(learned)
    kept = runs.build(runs.config_of(state, posenc=["learned(window=4)", "learned"]))
    runs.load_weights(kept, state, fresh=True)
    assert torch.equal(kept.state_dict()["posenc.0.weight"], state["model"]["posenc.0.weight"])


def test_windows_grow_by_shares_of_the_run(corpus, tmp_path, call_script, monkeypatch):
    seen, narrow = [], GPT.narrow
    monkeypatch.setattr(GPT, "narrow", lambda model, factor: (seen.append(factor), narrow(model, factor))[1])
    settings = dict(posenc="rope(window=8)", window_schedule={0.0: 0.25, 0.5: 1.0}, max_steps=4, length_targets=0)
    words = command(corpus, tmp_path / "run", eval_interval=2, **settings)[2:]
    assert call_script("train.py", *words).returncode == 0
    assert seen == [0.25, 0.25, 1.0, 1.0]
    done = call_script("train.py", *words, "--max_steps=8")
    assert done.returncode == 2 and "window_schedule" in done.stderr and "--init_from" in done.stderr
    model, wanted = small.make("rope(window=8)"), small.make("rope(window=2)")
    narrow(model, 0.25)
    tokens = torch.randint(50, (2, T))
    assert torch.equal(model.train()(tokens), wanted(tokens))
    assert torch.equal(model.eval()(tokens), small.make("rope(window=8)")(tokens))  # as it will be read
    for schedule in ({0.5: 1.0}, {0.0: 0.5}, {0.0: 2.0, 0.5: 1.0}, {0.0: 0.5, 1.0: 1.0}, {"a": 1.0}):
        with pytest.raises(ValueError, match="window_schedule must look like"):
            Config(posenc="rope(window=8)", window_schedule=schedule)


def test_log_n_at_test_time_is_for_models_without_a_temper():
    assert Reading(log_n=True).check_model(small.make()) is None
    with pytest.raises(UserError, match="trained with ssmax: leave it out"):
        Reading(log_n=True).check_model(small.make(['none(temper="ssmax")', "rope"]))


@torch.no_grad()
def test_what_spreads_in_a_schedule_is_what_its_layers_see():
    model, tokens = shaken(make([f"none(window={W})", "none"], sink_logit=True)), torch.randint(50, (2, 600))
    for block in model.blocks:  # Queries of zero: all keys in sight and the sink have the same weight.
        torch.nn.init.zeros_(block.attn.qkv.weight[:32])
        torch.nn.init.zeros_(block.attn.sink_logit)
    found = spread.attention(model, tokens, small.CPU, [599], T=32)["by_layer"]
    each = [n / (n + 1) * math.log(n + 1) for n in (W, 595.5)]  # n keys with a weight of 1 / (n + 1) each
    assert found["entropy"][0] == pytest.approx(each, rel=1e-4)
    assert found["first"][0] == [0, pytest.approx(1 / 596.5, rel=1e-3)]


@torch.no_grad()
def test_a_temper_counts_the_keys_of_a_memory_and_not_those_that_have_left():
    """The same text again and again: from the second segment on, every one has the same before it."""
    model = make("none", temper="ssmax", n_layer=1)
    logits = model(torch.randint(50, (1, T)).repeat(1, 4), segments=4)
    assert close(logits[:, 2 * T : 3 * T], logits[:, 3 * T :])
    assert not close(logits[:, :T], logits[:, T : 2 * T])


def test_what_reads_all_tokens_between_has_no_sinks_from_the_first_word_on():
    with pytest.raises(UserError, match="no sinks"):
        Reading(window=8, sinks=2).check_model(make("path"))
    Reading(window=8).check_model(make("path"))

"""What attention does inside, against the model's own computation and answers that are known."""

import functools
import json
import math

import numpy as np
import pytest
import torch

import data
import evaluate
import model as model_module
import posenc
from core.errors import UserError
from core.place import Place
from lab import spread as inside
from model import GPT, Cache, GPTConfig

CPU = Place(torch.device("cpu"), torch.float32)
T = 16
SIZES = dict(vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, train_length=T, zero_init=False)
ROTATIONS = [
    "rope", "rope(fraction=0.5)", "rope(fraction=0)", "rope(dims=4)", "xpos", "xpos(fraction=0.5)", "randomized",
    'rope(scaling="yarn")', 'rope(scaling="dynamic", factor=1)',
]  # fmt: skip


def make(spec="rope", seed=0, **settings):
    """A small model in float64 whose every parameter matters."""
    model = GPT(GPTConfig(posenc=spec, **(SIZES | settings)), seed).double().eval()
    torch.manual_seed(7)
    for parameter in model.posenc.parameters():
        torch.nn.init.normal_(parameter)
    return model


def blind(spec):
    """A model whose queries are all zero: what is left are biases."""
    model = make(spec)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight[: model.config.n_embd])
    return model


def text(count, length, seed=0):
    return np.random.default_rng(seed).integers(50, size=(count, length))


def dataset(size=600):
    ids = text(1, size)[0]
    return data.Dataset(ids, ids, {"documents": {"val": [0]}, "tokens": {"val": size}}, None)


# The hook.


def test_a_watch_sees_what_attention_computes_with_and_changes_nothing(monkeypatch):
    model, tokens, watched, given = make("xpos"), torch.from_numpy(text(2, 9)), [], []
    plainly = model(tokens)
    attend = model_module.attend
    monkeypatch.setattr(model_module, "attend", lambda *args: given.append(args) or attend(*args))
    for part, cache in ((tokens, None), (tokens, Cache()), (tokens[:, 4:], Cache())):
        watched.clear(), given.clear()
        if part is not tokens:
            model(tokens[:, :4], past=cache)
            given.clear()
        logits = model(part, past=cache, watch=lambda *args: watched.append(args))
        assert torch.allclose(logits, plainly[:, -part.shape[1] :])
        assert [args[0] for args in watched] == [0, 1]
        for (_, encoding, plain, q, k, q_pos, k_pos, seen, state), args in zip(watched, given, strict=True):
            ours = encoding, q, k, q_pos, k_pos, seen, state
            theirs = *args[:3], *args[4:7], args[9]
            assert all(one is other for one, other in zip(ours, theirs, strict=True))
            assert plain[0].shape == q.shape and not torch.allclose(plain[0], q)
            assert plain[1].shape[2] == part.shape[1]


@pytest.mark.parametrize("spec", [spec for spec in posenc.every() if spec != "shaw"])  # which adds to the values
@pytest.mark.parametrize("sizes", [[24], [13, 11], [23, 1]])
def test_weights_are_those_of_the_models_own_attention(spec, sizes):
    """Attention over values that are one-hot vectors, as many keys at a time as fit."""
    model, cache, tokens = make(spec), Cache(total=24), torch.from_numpy(text(1, 24))
    checked = []

    def watch(layer, encoding, plain, q, k, q_pos, k_pos, seen, state):
        found, _ = inside.weights(encoding, q, k, q_pos, k_pos, seen, state)
        one_hot = torch.eye(len(k_pos) + 8, dtype=k.dtype)[: len(k_pos)].expand(*k.shape[:2], -1, -1)
        for begin in range(0, len(k_pos), 8):
            v = one_hot[..., begin : begin + 8]
            exact = model_module.attend(encoding, q, k, v, q_pos, k_pos, seen, state=state)
            part = found[..., begin : begin + 8]
            assert torch.allclose(part, exact[..., : part.shape[-1]], atol=1e-12)
        assert torch.allclose(found.sum(-1), torch.ones(()).double())
        checked.append(layer)

    with torch.no_grad():
        for part in tokens.split(sizes, dim=1):
            model(part, past=cache, watch=watch)
    assert checked == [0, 1] * len(sizes)


# How widely attention spreads.


def test_attention_that_is_uniform(monkeypatch):
    for name in ("WHOLE", "PIECE"):  # contexts enter the cache in many pieces
        monkeypatch.setattr(model_module, name, 7)
    found = inside.attention(blind("none"), text(3, 65), CPU, [8, 16, 64])
    for row, length in enumerate((8, 16, 64)):
        seen = np.arange(length - 4, length) + 1
        assert found["entropy"][row] == pytest.approx(np.log(seen).mean())
        assert found["first"][row] == pytest.approx((1 / seen).mean())
        assert found["share"][row] == pytest.approx(1)
        assert found["by_layer"]["entropy"][row] == pytest.approx([np.log(seen).mean()] * 2)


def test_attention_that_falls_by_a_constant_factor():
    """alibi alone: the weights are a geometric series."""
    found = inside.attention(blind("alibi"), text(1, 65), CPU, [16, 64])
    for row, length in enumerate((16, 64)):
        entropy, first = [], []
        for slope in (2.0 ** (-2 * h) for h in (1, 2, 3, 4)):
            for count in range(length - 3, length + 1):
                r = math.exp(-slope)
                total, mean = (1 - r**count) / (1 - r), r / (1 - r) - count * r**count / (1 - r**count)
                entropy.append(math.log(total) + slope * mean)
                first.append(r ** (count - 1) / total)
        assert found["entropy"][row] == pytest.approx(np.mean(entropy))
        assert found["first"][row] == pytest.approx(np.mean(first))


@pytest.mark.parametrize("spec", ["rope", "fox", "t5", "sinusoidal"])
def test_chunks_and_batches_change_nothing_and_the_input_ends_before_the_last_token(spec, monkeypatch):
    model, windows, found = make(spec), text(3, 41), []
    for piece, budget in ((512, 1 << 12), (3, 1)):
        monkeypatch.setattr(model_module, "WHOLE", piece)
        monkeypatch.setattr(model_module, "PIECE", piece)
        found.append(inside.attention(model, windows, CPU, [16, 40], budget))
    windows[:, -1] = 0
    found.append(inside.attention(model, windows, CPU, [16, 40]))
    for name in inside.SPREAD:
        for other in found[1:]:
            assert np.allclose(found[0]["by_layer"][name], other["by_layer"][name], rtol=1e-9)
    assert len({round(x, 6) for layers in found[0]["by_layer"]["entropy"] for x in layers}) == 4
    assert found[0]["entropy"][1] == pytest.approx(np.mean(found[0]["by_layer"]["entropy"][1]))


def test_half_precision_is_close():
    half, windows = Place(torch.device("cpu"), torch.bfloat16), text(2, 41)
    for spec in ("rope", "alibi", "cope"):
        model = make(spec).float()
        found = [inside.attention(model, windows, device, [40])["entropy"] for device in (CPU, half)]
        assert found[1] == pytest.approx(found[0], rel=0.02)
        assert found[1] != found[0]
    model = make("xpos").float()
    exact, rounded = (inside.frequencies(model, windows, device)["absolute"] for device in (CPU, half))
    assert torch.allclose(exact, rounded, rtol=0.1)


def test_segments_are_watched_one_by_one():
    watched = []
    make("rope")(torch.from_numpy(text(1, 12)), segments=3, watch=lambda *args: watched.append((args[0], len(args[6]))))
    assert watched == [(0, 4), (1, 4), (0, 8), (1, 8), (0, 8), (1, 8)]


def test_lengths_without_positions_are_left_out_and_short_windows_refused():
    assert inside.attention(make("learned"), text(1, 33), CPU, [8, 16, 32])["lengths"] == [8, 16]
    with pytest.raises(ValueError, match="32 ids hold no 32 tokens"):
        inside.attention(make("rope"), text(1, 32), CPU, [32])


def test_one_key_alone_has_no_spread():
    found = inside.attention(make("rope"), text(1, 5), CPU, [1])
    assert (found["entropy"], found["share"], found["first"]) == ([0.0], [0.0], [1.0])


# What the pairs of a rotation do.


@pytest.mark.parametrize("spec", ROTATIONS)
@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 4, "qk_norm": True}])
def test_contributions_and_norms_by_their_definitions(spec, settings):
    model, windows = make(spec, **settings), text(2, T + 5)
    found = inside.frequencies(model, windows, CPU, budget=300)
    dims = inside.rotation(model).dims
    pairs = [(m, m + dims // 2) for m in range(dims // 2)] + [(d, d + 1) for d in range(dims, 8, 2)]
    norms, terms = [], []

    def watch(layer, encoding, plain, q, k, *positions):
        norms.append([[x[..., list(pair)].square().sum(-1).sqrt().mean((0, 2)) for pair in pairs] for x in plain])
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        products = [
            sum(q[:, :, :, None, d] * k[:, :, None, :, d] for d in pair).div(math.sqrt(8)).tril() for pair in pairs
        ]
        terms.append([[x.sum((0, 2, 3)) / (2 * 136) for x in (p, p.abs())] for p in products])

    with torch.no_grad():
        model(torch.from_numpy(windows)[:, -T - 1 : -1], watch=watch)
    for layer in range(2):
        for name, of_pairs in zip(("q_norm", "k_norm"), norms[layer], strict=True):
            assert torch.allclose(found[name][layer], torch.stack(of_pairs, -1), rtol=1e-6)  # float32
        for index, name in enumerate(("signed", "absolute")):
            assert torch.allclose(found[name][layer], torch.stack([term[index] for term in terms[layer]], -1))
    assert found["k_norm"].shape == (2, model.config.kv_heads, 4)
    assert found["q_norm"].shape == found["signed"].shape == (2, 4, 4)


@pytest.mark.parametrize("dims", [6, 8, 4])
def test_contributions_add_up_where_heads_are_odd(dims):
    q, k = torch.randn(1, 2, 5, 9).double(), torch.randn(1, 2, 7, 9).double()
    each = inside.contributions(q, k, dims)
    assert each.shape == (1, 2, 5, 7, 5)
    assert torch.allclose(each.sum(-1), q @ k.mT / 3)


def test_norms_of_queries_set_by_hand():
    """The queries are the token's first dimensions, which the norm before attention leaves as they are."""
    model = make("rope", n_layer=1, n_head=1, n_kv_head=1, n_embd=8)
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)
    model.blocks[0].attn.qkv.weight.data[:8] = torch.eye(8)
    model.token.weight.data[:] = torch.tensor([3.0, 0, 2, 0, 4, 1, 0, 0])
    scale = math.sqrt(8 / 30)  # of RMS norm
    found = inside.frequencies(model, text(1, T + 1), CPU)
    assert found["q_norm"].flatten().tolist() == pytest.approx([5 * scale, scale, 2 * scale, 0], rel=1e-4)
    assert torch.equal(found["k_norm"], torch.zeros(1, 1, 4).double())


def test_logits_that_no_sum_of_pairs_gives_are_noticed(monkeypatch):
    model = make("rope")
    honest = posenc.RoPE.logits
    monkeypatch.setattr(posenc.RoPE, "logits", lambda self, *args: honest(self, *args) + 1e-2)
    with pytest.raises(AssertionError):
        inside.frequencies(model, text(1, T + 1), CPU)


def test_wavelengths_in_tokens():
    turn = 2 * math.pi
    for spec, expected in {
        "rope(base=10000)": [turn, 10 * turn, 100 * turn, 1000 * turn],
        "rope(base=10000, fraction=0.5)": [turn, 10 * turn, math.inf, math.inf],
        "rope(base=10000, dims=4)": [turn, 100 * turn, math.inf, math.inf],
        'rope(scaling="linear", factor=4)': [4 * turn, 40 * turn, 400 * turn, 4000 * turn],
        "randomized(length=32)": [turn / 2, 5 * turn, 50 * turn, 500 * turn],  # two positions a token
    }.items():
        found = inside.frequencies(make(spec), text(1, T + 1), CPU)
        assert found["wavelength"].tolist() == pytest.approx(expected), spec
        assert found["turns"].tolist() == pytest.approx([T / wavelength for wavelength in expected])
        assert found["unfinished"].tolist() == [wavelength > T for wavelength in expected]


@pytest.mark.parametrize("spec", ROTATIONS)
@torch.no_grad()
def test_silencing_all_pairs_is_having_no_queries_and_silencing_none_changes_nothing(spec):
    model, tokens = make(spec), torch.from_numpy(text(2, 2 * T))
    before = model(tokens)
    with inside.silenced(model, []):
        assert torch.equal(model(tokens), before)
    with inside.silenced(model, range(4)):
        silent = model(tokens)
    assert torch.allclose(silent, blind(spec)(tokens), atol=1e-12)
    assert not torch.allclose(silent, before)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("spec", ["rope", "rope(dims=4)", "xpos"])
@torch.no_grad()
def test_a_silenced_pair_takes_its_contribution_from_the_logits(spec):
    model, tokens, logits = make(spec, n_layer=1), torch.from_numpy(text(1, T)), []

    def watch(layer, encoding, plain, q, k, *positions):
        k = k.repeat_interleave(2, dim=1)
        logits.append((q @ k.mT / math.sqrt(8), inside.contributions(q, k, inside.rotation(model).dims)))

    model(tokens, watch=watch)
    with inside.silenced(model, [1, 3]), inside.silenced(model, [0]):
        model(tokens, watch=watch)
    (whole, each), (less, _) = logits
    assert torch.allclose(less, whole - each[..., [0, 1, 3]].sum(-1))


@torch.no_grad()
def test_frozen_pairs_are_those_that_p_rope_does_not_turn():
    tokens = torch.from_numpy(text(2, 2 * T))
    for spec, fewer in (("rope", "rope(fraction=0.5)"), ("xpos", "xpos(fraction=0.5)")):
        model = make(spec)
        with inside.silenced(model, [2, 3], frozen=True):
            assert torch.allclose(model(tokens), make(fewer)(tokens), atol=1e-12)
        with inside.silenced(model, [0, 1], frozen=True):  # the last pairs are the slow ones
            assert not torch.allclose(model(tokens), make(fewer)(tokens))


def test_an_error_within_leaves_the_model_as_it_was():
    model, tokens = make(), torch.from_numpy(text(1, T))
    before = model(tokens)
    with pytest.raises(KeyError), inside.silenced(model, [0]):
        raise KeyError
    assert torch.equal(model(tokens), before)


def loss_of(model, source):
    return functools.partial(evaluate.length_loss, model, source, CPU, 4, (1, 2, 4))


def test_silencing_scores_as_the_evaluation_does():
    model, source = make(n_kv_head=4), dataset()
    found = inside.silencing(model, loss_of(model, source))
    assert found["lengths"] == [16, 32, 64]
    assert list(found["loss"]) == [
        "as trained", "fastest 25%, silenced: pairs 0", "fastest 25%, frozen: pairs 0",
        "slowest 25%, silenced: pairs 3", "slowest 25%, frozen: pairs 3",
        "less than a turn in T, silenced: pairs 1–3", "less than a turn in T, frozen: pairs 1–3",
        "silenced: pairs 0", "silenced: pairs 1", "silenced: pairs 2", "silenced: pairs 3",
    ]  # fmt: skip
    loss = found["loss"]
    assert loss["as trained"] == evaluate.length_loss(model, source, CPU, 4, (1, 2, 4))["loss"]
    assert loss["slowest 25%, silenced: pairs 3"] == loss["silenced: pairs 3"]
    assert len({tuple(loss) for loss in found["loss"].values()}) == len(found["loss"]) - 2
    half = evaluate.length_loss(make("rope(fraction=0.25)", n_kv_head=4), source, CPU, 4, (1, 2, 4))["loss"]
    assert loss["less than a turn in T, frozen: pairs 1–3"] == pytest.approx(half, rel=1e-9)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("alibi", "alibi has none; name runs of rope"),
        ("none", "none has none"),
        ("dape", "dape has none"),
        ("randomized(inner=t5)", "has none"),
        ("rerope", "more than turn"),
        (["rope", "none"], "more than turn"),
        (["rope", "rope(base=50)"], "more than turn"),
    ],
)
def test_other_encodings_are_refused_in_one_line_before_any_work(spec, said, tmp_path):
    opened = {"good": (make(), None, None), "other": (make(spec), None, None)}
    with pytest.raises(UserError, match=said) as refused:
        inside.report_frequencies(opened, CPU, tmp_path / "pictures")
    assert "--frequencies looks at rotations" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "pictures").exists()


def test_runs_alike_are_told_together_with_their_deviation(tmp_path):
    source = dataset()
    windows = evaluate.long_windows(source, T, 4, 4)
    models = {"a": make(seed=1), "b": make("rope(dims=4)"), "out/c": make(seed=2)}
    opened = {name: (model, windows, loss_of(model, source)) for name, model in models.items()}
    lines, found = inside.report_frequencies(opened, CPU, tmp_path / "pictures")
    assert list(json.loads(json.dumps(found, allow_nan=False))) == ["a", "b", "out/c"]
    assert found["b"]["wavelength"][2:] == [None, None]
    assert found["a"]["unfinished"] == [False, True, True, True]
    assert [line for line in lines if line.startswith("**")] == [
        "**rope** (a, out/c), T = 16 tokens: means over 4 windows, ± the standard deviation over 2 runs. "
        "Frequencies descend: the last pairs are the slowest.",
        "**rope(dims=4)** (b), T = 16 tokens: means over 4 windows. "
        "Frequencies descend: the last pairs are the slowest.",
    ]
    norms = np.array([found[name]["q_norm"] for name in ("a", "out/c")])[..., 1].mean((1, 2))  # of pair 1
    assert f"| 1 | 63 | 0.255 | {norms.mean():.3f} ± {norms.std(ddof=1):.3f} |" in "\n".join(lines)
    losses = [np.array(found[name]["silencing"]["loss"]["silenced: pairs 1"]) for name in ("a", "out/c")]
    trained = [np.array(found[name]["silencing"]["loss"]["as trained"]) for name in ("a", "out/c")]
    change = np.array(losses) - trained
    pairs = zip(change.mean(0), change.std(0, ddof=1), strict=True)
    cells = [f"{mean:+.3f} ± {deviation:.3f}" for mean, deviation in pairs]
    assert f"| silenced: pairs 1 | {' | '.join(cells)} |" in lines
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in drawn] == [
        f"{name}-{what}.png" for name in ("a", "b") for what in ("absolute", "k_norm", "q_norm")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_the_largest_pairs_and_how_many_runs_agree():
    one, other = [5.0, 1, 4, 2.5, 0], [5.0, 4, 1, 2.5, 0]
    assert inside.largest(torch.tensor([one])) == "0, 2, 3"
    assert inside.largest(torch.tensor([one, one, other])) == "0 (3 of 3), 2 (2 of 3), 3 (3 of 3)"

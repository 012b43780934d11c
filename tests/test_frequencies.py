"""The use of the pairs of a rotation, against their definitions and answers that are known."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from small import CPU, HALF, T, blind, dataset, make, text

import posenc
from core import report
from core.errors import UserError
from core.measure import length_loss, targets
from lab import frequencies

ROTATIONS = [
    "rope", "rope(fraction=0.5)", "rope(fraction=0)", "rope(dims=4)", "xpos", "xpos(fraction=0.5)", "randomized",
    'rope(scaling="yarn")', 'rope(scaling="dynamic", factor=1)',
]  # fmt: skip


def source(size=600):
    return dataset([size], text(1, size)[0])


@pytest.mark.parametrize("spec", ROTATIONS)
@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 4, "qk_norm": True}])
def test_contributions_and_norms_by_their_definitions(spec, settings):
    model, windows = make(spec, **settings), text(2, T + 5)
    found = frequencies.frequencies(model, windows, CPU, budget=300)
    dims = frequencies.rotation(model).dims
    pairs = [(m, m + dims // 2) for m in range(dims // 2)] + [(d, d + 1) for d in range(dims, 8, 2)]
    norms, terms = [], []

    def watch(layer, encoding, new, rotated):
        plain, q = (new.q, new.k), rotated.q
        norms.append([[x[..., list(pair)].square().sum(-1).sqrt().mean((0, 2)) for pair in pairs] for x in plain])
        k = rotated.k.repeat_interleave(q.shape[1] // rotated.k.shape[1], dim=1)
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
    each = frequencies.contributions(q, k, dims)
    assert each.shape == (1, 2, 5, 7, 5)
    assert torch.allclose(each.sum(-1), q @ k.mT / 3)


def test_norms_of_queries_set_by_hand():
    """The queries are the token's first dimensions, which the norm before attention leaves as they are."""
    model = make("rope", n_layer=1, n_head=1, n_kv_head=1, n_embd=8)
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)
    model.blocks[0].attn.qkv.weight.data[:8] = torch.eye(8)
    model.token.weight.data[:] = torch.tensor([3.0, 0, 2, 0, 4, 1, 0, 0])
    scale = math.sqrt(8 / 30)  # of RMS norm
    found = frequencies.frequencies(model, text(1, T + 1), CPU)
    assert found["q_norm"].flatten().tolist() == pytest.approx([5 * scale, scale, 2 * scale, 0], rel=1e-4)
    assert torch.equal(found["k_norm"], torch.zeros(1, 1, 4).double())


def test_logits_that_no_sum_of_pairs_gives_are_noticed(monkeypatch):
    model = make("rope")
    honest = posenc.RoPE.logits
    monkeypatch.setattr(posenc.RoPE, "logits", lambda self, *args: honest(self, *args) + 1e-2)
    with pytest.raises(AssertionError):
        frequencies.frequencies(model, text(1, T + 1), CPU)


def test_wavelengths_in_tokens():
    turn = 2 * math.pi
    for spec, expected in {
        "rope(base=10000)": [turn, 10 * turn, 100 * turn, 1000 * turn],
        "rope(base=10000, fraction=0.5)": [turn, 10 * turn, math.inf, math.inf],
        "rope(base=10000, dims=4)": [turn, 100 * turn, math.inf, math.inf],
        'rope(scaling="linear", factor=4)': [4 * turn, 40 * turn, 400 * turn, 4000 * turn],
        "randomized(length=32)": [turn / 2, 5 * turn, 50 * turn, 500 * turn],  # two positions a token
    }.items():
        found = frequencies.frequencies(make(spec), text(1, T + 1), CPU)
        assert found["wavelength"].tolist() == pytest.approx(expected), spec
        assert found["turns"].tolist() == pytest.approx([T / wavelength for wavelength in expected])
        assert found["unfinished"].tolist() == [wavelength > T for wavelength in expected]


@pytest.mark.parametrize("spec", ROTATIONS)
@torch.no_grad()
def test_silencing_all_pairs_is_having_no_queries_and_silencing_none_changes_nothing(spec):
    model, tokens = make(spec), torch.from_numpy(text(2, 2 * T))
    before = model(tokens)
    with frequencies.silenced(model, []):
        assert torch.equal(model(tokens), before)
    with frequencies.silenced(model, range(4)):
        silent = model(tokens)
    assert torch.allclose(silent, blind(spec)(tokens), atol=1e-12)
    assert not torch.allclose(silent, before)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("spec", ["rope", "rope(dims=4)", "xpos"])
@torch.no_grad()
def test_a_silenced_pair_takes_its_contribution_from_the_logits(spec):
    model, tokens, logits = make(spec, n_layer=1), torch.from_numpy(text(1, T)), []

    def watch(layer, encoding, new, pairs):
        q, k = pairs.q, pairs.k.repeat_interleave(2, dim=1)
        logits.append((q @ k.mT / math.sqrt(8), frequencies.contributions(q, k, frequencies.rotation(model).dims)))

    model(tokens, watch=watch)
    with frequencies.silenced(model, [1, 3]), frequencies.silenced(model, [0]):
        model(tokens, watch=watch)
    (whole, each), (less, _) = logits
    assert torch.allclose(less, whole - each[..., [0, 1, 3]].sum(-1))


@torch.no_grad()
def test_frozen_pairs_are_those_that_p_rope_does_not_turn():
    tokens = torch.from_numpy(text(2, 2 * T))
    for spec, fewer in (("rope", "rope(fraction=0.5)"), ("xpos", "xpos(fraction=0.5)")):
        model = make(spec)
        with frequencies.silenced(model, [2, 3], frozen=True):
            assert torch.allclose(model(tokens), make(fewer)(tokens), atol=1e-12)
        with frequencies.silenced(model, [0, 1], frozen=True):  # the last pairs are the slow ones
            assert not torch.allclose(model(tokens), make(fewer)(tokens))


def test_an_error_within_leaves_the_model_as_it_was():
    model, tokens = make(), torch.from_numpy(text(1, T))
    before = model(tokens)
    with pytest.raises(KeyError), frequencies.silenced(model, [0]):
        raise KeyError
    assert torch.equal(model(tokens), before)


def loss_of(model, read):
    return functools.partial(length_loss, model, read, CPU, 4, (1, 2, 4))


def test_silencing_scores_as_the_evaluation_does():
    model, read = make(n_kv_head=4), source()
    found = frequencies.silencing(model, loss_of(model, read))
    assert found["lengths"] == [16, 32, 64]
    assert list(found["loss"]) == [
        "as trained", "fastest 25%, silenced: pairs 0", "fastest 25%, frozen: pairs 0",
        "slowest 25%, silenced: pairs 3", "slowest 25%, frozen: pairs 3",
        "less than a turn in T, silenced: pairs 1–3", "less than a turn in T, frozen: pairs 1–3",
        "silenced: pairs 0", "silenced: pairs 1", "silenced: pairs 2", "silenced: pairs 3",
    ]  # fmt: skip
    loss = found["loss"]
    assert loss["as trained"] == length_loss(model, read, CPU, 4, (1, 2, 4))["loss"]
    assert loss["slowest 25%, silenced: pairs 3"] == loss["silenced: pairs 3"]
    assert len({tuple(loss) for loss in found["loss"].values()}) == len(found["loss"]) - 2
    half = length_loss(make("rope(fraction=0.25)", n_kv_head=4), read, CPU, 4, (1, 2, 4))["loss"]
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
def test_other_encodings_are_refused_in_one_line_before_any_work(spec, said):
    opened = {"good": (make(), None, None), "other": (make(spec), None, None)}
    with pytest.raises(UserError, match=said) as refused:
        frequencies.look(opened, CPU)
    assert "--frequencies looks at rotations" in str(refused.value) and "\n" not in str(refused.value)


def test_runs_alike_are_told_together_with_their_deviation(tmp_path):
    read = source()
    windows = targets(read, T, 4).windows(T)
    models = {"a": make(seed=1), "b": make("rope(dims=4)"), "out/c": make(seed=2)}
    opened = {name: (model, windows, loss_of(model, read)) for name, model in models.items()}
    found, lines, draw = frequencies.look(opened, CPU)
    (tmp_path / "pictures").mkdir()
    draw(tmp_path / "pictures")
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


def test_layers_are_called_by_their_members(monkeypatch, tmp_path):
    read, ticks = source(), []
    model = make(["rope(window=8)", 'rope(temper="su")'])  # they share one rope
    monkeypatch.setattr(report, "heat", lambda *_, **options: ticks.extend(options["ticks"][1].values()))
    _, lines, draw = frequencies.look({"a": (model, targets(read, T, 2).windows(T), loss_of(model, read))}, CPU)
    draw(tmp_path)
    cells = [line.split(" | ")[1] for line in lines if line.startswith("| norm of the keys' pairs")]
    assert cells == ["1, rope(window=8)", '2, rope(temper="su")']
    assert ticks == [f"layer {cell}" for cell in cells] * 3


def test_the_largest_pairs_and_how_many_runs_agree():
    one, other = [5.0, 1, 4, 2.5, 0], [5.0, 4, 1, 2.5, 0]
    assert frequencies.largest(torch.tensor([one])) == "0, 2, 3"
    assert frequencies.largest(torch.tensor([one, one, other])) == "0 (3 of 3), 2 (2 of 3), 3 (3 of 3)"


def test_half_precision_is_close():
    model, windows = make("xpos").float(), text(2, 41)
    exact, rounded = (frequencies.frequencies(model, windows, place)["absolute"] for place in (CPU, HALF))
    assert torch.allclose(exact, rounded, rtol=0.1)

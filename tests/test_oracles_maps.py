"""Maps of distances laid over rope, weights that are no softmax, and skips of positions, each against its published
formula in plain loops. What is asked and compared is test_oracles.py's; the formulas follow the authors' code."""

import itertools
import math

import pytest
import torch
from hooks import pairs
from test_oracles import APART, BESIDE, EXACT, FAR, QUERIES, compare, content, make, theta, turned
from tiny import bound, sums

from core.attention import written_out
from core.cache import Cache, Past
from model import GPT, GPTConfig
from posenc import merge

T = 16  # the training length of the encodings here


@pytest.mark.parametrize(("chunk_len", "window"), [(0, 0), (7, 3), (4, 6), (5, 1)])
def test_dca(chunk_len, window):
    # An et al. 2024 (arXiv 2402.17463); chunkllama_attn_replace.py in HKUNLP/ChunkLlama, its chunk_size being c + w.
    # For all chunks before the last, its queries stand at the last place of a chunk, moved on by c and then clamped.
    encoding = make(f"dca(chunk_len={chunk_len}, window={window})")
    w = window or T // 8
    c = chunk_len or T * 3 // 4 - T // 8

    def logit(q, k, i, j, h):
        apart = i // c - j // c
        place = [i % c, min(i % c + c, c + w), min(c - 1 + c, c + w)][min(apart, 2)]
        return content(turned(q, place - j % c, theta(8)), k)

    compare(encoding, logit, positions=(BESIDE, APART, FAR))


@pytest.mark.parametrize(("window", "local"), [(0, 0), (9, 4), (6, 6)])
def test_string(window, local):
    # An et al. 2024 (arXiv 2410.18745); string_for_qwen2.py in HKUNLP/STRING, in the form that reads from a
    # cache: s keys at their distance, all before at i - s + w.
    encoding = make(f"string(window={window}, local={local})")
    s, w = window or int(0.33 * T), local or 1

    def logit(q, k, i, j, h):
        n = i - j
        return content(turned(q, n if n < s else n - s + w, theta(8)), k)

    compare(encoding, logit, positions=(BESIDE, APART, FAR))


def of(spec, **settings):
    """A small model in float64."""
    sizes = dict(vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, train_length=T, zero_init=False)
    return GPT(GPTConfig(posenc=spec, **(sizes | settings))).double().eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "same"),
    [("dca(chunk_len=64)", True), ("dca(chunk_len=60)", False), ("dca(chunk_len=30, window=60)", True),
     ("string(window=9, local=9)", True), ("string(window=64, local=1)", True), ("string(window=63, local=1)", False)],
)  # fmt: skip
def test_maps_that_change_no_distance_are_rope(spec, same):
    """For 64 tokens; and of a distance more, they are not. Two chunks that lie beside each other are exact in a wide
    window."""
    tokens = torch.randint(50, (2, 60 if "window=60" in spec else 64), generator=torch.Generator().manual_seed(1))
    difference = (of("rope")(tokens) - of(spec)(tokens)).abs().max().item()
    exact = bound(torch.float64, sums(GPTConfig(vocab_size=50, n_layer=2, n_embd=32), keys=64), scale=64)
    assert difference < exact if same else difference > 1e-6


def test_maps_are_laid_over_a_trained_rope():
    assert merge("rope(base=500.0)", "dca(window=4)") == "dca(base=500.0, window=4)"
    assert merge(["rope(base=500.0)", "none"], "string") == ["string(base=500.0)", "none"]
    with pytest.raises(ValueError, match="dca has a window of its own"):
        merge("rope(window=8)", "dca")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("string(window=4, local=5)", "local must lie in 1 ... 4"),
        ("dca(chunk_len=-1)", "chunk_len must not be negative"),
        ("dca(window=-1)", "window must not be negative"),
        ("dca(scaling='dynamic')", "unnecessary"),
        ("randomized(form='skip')", "'uniform', 'pose'"),
    ],
)
def test_mistakes_say_what_is_allowed(spec, said):
    with pytest.raises(ValueError, match=r"\w") as caught:
        make(spec)
    assert said in str(caught.value)


def stick(logits, own, rest):
    """Weights of one query over its keys, the nearest last: each takes its share of what is left, in exact steps."""
    left, weights = 1.0, [0.0] * len(logits)
    for s in reversed(range(len(logits))):
        if s != own:
            share = 1 / (1 + math.exp(-logits[s]))
            weights[s], left = left * share, left * (1 - share)
    weights[own] = left if rest == "own" else 0.0
    return weights


@pytest.mark.parametrize("rest", ["own", "nowhere"])
@pytest.mark.parametrize("pos", [BESIDE, APART])
def test_stick_breaking(rest, pos):
    # Tan et al. 2024 (arXiv 2410.17980); sb_ref.py in shawntan/stickbreaking-attention; the mask is that of its tests:
    # it hides a query's own key, whose value gets what is left ("rem").
    encoding = make(f"stick_breaking(rest={rest!r})")
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, QUERIES, 8, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, 4, 10, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    j = torch.tensor(pos)
    got = written_out(encoding, [pairs(q, k, v, j[-QUERIES:], j)])
    for b in range(2):
        for h in range(4):
            for t in range(QUERIES):
                count = 10 - QUERIES + t + 1
                logits = [content(q[b, h, t].tolist(), k[b, h, s].tolist()) for s in range(count)]
                weights = stick(logits, count - 1, rest)
                expected = [sum(weights[s] * v[b, h, s, d].item() for s in range(count)) for d in range(8)]
                assert got[b, h, t].tolist() == pytest.approx(expected, abs=EXACT)


def test_a_stick_is_broken_in_logarithms():
    """With logits of 60 a share leaves e^-60, which 1 - share rounds to 0; of 20 such keys e^-1200 is left, below the
    least float64. Logits of -60 leave all of it. Nothing overflows, and gradients are numbers."""
    encoding = make("stick_breaking")
    for size, expected in ((60.0, [0.0, 1.0, 0.0]), (-60.0, [math.exp(-60), math.exp(-60), 1.0])):
        logits = torch.full((1, 1, 20, 20), size, requires_grad=True)  # float32
        i = torch.arange(20)
        seen = i <= i[:, None]
        hidden = logits + torch.zeros(20, 20).masked_fill(~seen, -math.inf)
        x = torch.zeros(1, 1, 20, 8)
        weights = encoding.weights(hidden, [pairs(x, x, x, i, i)])
        rounding = bound(torch.float32, 20)
        assert weights[0, 0, -1, [0, 18, 19]].tolist() == pytest.approx(expected, rel=60 * rounding, abs=1e-30)
        assert weights.sum(-1).sub(1).abs().max() < rounding
        assert weights[0, 0].triu(1).abs().max() == 0
        weights[..., 0].sum().backward()
        assert logits.grad.isfinite().all()
    # A key that takes half of what a heavy one left: the ratio of the two is known though both are tiny.
    logits = torch.tensor([0.0, 0.0, 80.0, 0.0]).view(1, 1, 1, 4)
    x = torch.zeros(1, 1, 4, 8)
    one = encoding.weights(logits, [pairs(x[:, :, -1:], x, x, torch.tensor([3]), torch.arange(4))]).flatten()
    assert one[1].item() == pytest.approx(math.exp(-80) / 2, rel=80 * bound(torch.float32, 4))
    assert (one[0] / one[1]).item() == pytest.approx(0.5, rel=80 * bound(torch.float32, 4))


@torch.no_grad()
@pytest.mark.parametrize("rest", ["own", "nowhere"])
def test_a_broken_stick_knows_order_from_nearness(rest):
    """Among equal keys of logit 0 the n-th back takes 2^-n, and a window cuts off the rest of the stick."""
    encoding = make(f"stick_breaking(rest={rest!r})")
    x = torch.zeros(1, 4, 9, 8, dtype=torch.float64)
    i = torch.arange(9)
    v = torch.eye(9, 8, dtype=torch.float64).expand(1, 4, 9, 8)  # a value tells its key; the last, its own, has none
    for window in (9, 4):
        seen = (i <= i[:, None]) & (i > i[:, None] - window)
        found = written_out(encoding, [pairs(x, x, v, i, i, seen)])[0, 0, -1].tolist()
        expected = [2.0 ** (j - 8) if 8 - j < window else 0.0 for j in range(8)]
        assert found == pytest.approx(expected, abs=EXACT)


def test_a_learned_sink_is_refused_where_there_is_no_softmax():
    for spec in ("stick_breaking", "randomized(inner=stick_breaking)", ["rope", "stick_breaking"]):
        with pytest.raises(ValueError, match="sink_logit is a term of a softmax"):
            of(spec, sink_logit=True)


def test_pose():
    # Zhu et al. 2023 (arXiv 2309.10400); train_preprocess_function_pose in dwzhu-pku/PoSE (train_pose.py): the first
    # part has 1 ... (T + 1) // 2 tokens and begins at 0, the second is moved by 0 ... L - T, both ends included.
    encoding = make("randomized(form='pose', length=20)").train()
    index, found = torch.arange(T), set()
    for seed in range(600):
        encoding.redraw(T, torch.Generator().manual_seed(seed), "cpu")
        drawn = encoding.positions(index, T).tolist()
        gaps = [b - a for a, b in itertools.pairwise(drawn)]
        assert drawn[0] == 0 and sum(gap != 1 for gap in gaps) <= 1
        shift = drawn[-1] - (T - 1)
        found.add((gaps.index(shift + 1) + 1 if shift else 0, shift))
    # 8 lengths of the first part and 5 shifts, each with a chance of 1/40: (39/40)^600 < 1e-6 that one is missing.
    assert found == {(0, 0), *((kept, shift) for kept in range(1, (T + 1) // 2 + 1) for shift in range(1, 5))}
    assert encoding.eval().positions(index, T).tolist() == list(range(T))
    assert not encoding.by_length


@torch.no_grad()
def test_pose_at_test_time_is_its_inner_encoding():
    tokens = torch.randint(50, (2, 4 * T), generator=torch.Generator().manual_seed(1))
    assert torch.equal(of("randomized(form='pose')")(tokens), of("rope")(tokens))


@torch.no_grad()
@pytest.mark.parametrize("spec", ["dca", "string", "stick_breaking(rest='nowhere')", "randomized(form='pose')"])
@pytest.mark.parametrize("window", [None, 11])
def test_chunks_of_queries_and_pieces_of_a_cache_are_the_whole(spec, window, monkeypatch):
    model, tokens = of(spec), torch.randint(50, (2, 5 * T), generator=torch.Generator().manual_seed(1))
    whole = model(tokens, past=Past(window))
    exact = bound(torch.float64, sums(model.config, keys=5 * T), scale=64)
    monkeypatch.setattr("core.attention.CHUNK", 7)
    assert torch.allclose(model(tokens, past=Past(window)), whole, rtol=0, atol=exact)
    cache = Cache(window)
    parts = [model(part, past=cache) for part in tokens.split(13, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, rtol=0, atol=exact)

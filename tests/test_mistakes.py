"""The mistakes of docs/mistakes.md, one test each: the wrong version, what it does, and ours by the same measure.

`says(4, "from 62.8")` asserts that section 4 of that page has these words, so page and test cannot part.
"""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from hooks import attend, logits, rotate
from tiny import bound, sums

import posenc
from core.attention import visible
from core.cache import Cache, Past
from core.encoding import Encoding
from core.settings import Config
from model import GPT, GPTConfig

T = 32  # the training length of the tiny models
SIZES = dict(n_embd=32, n_head=4, n_kv_head=4, head_dim=8, train_length=T)
PAGE = (Path(__file__).parent.parent / "docs" / "mistakes.md").read_text(encoding="utf-8")
SECTIONS = [" ".join(section.split()) for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)]


# The page says how near rounding leaves two ways to one number: 1e-12 for a formula, 1e-11 for a model, 1e-10 for six
# layers without a norm, whose numbers grow. This is what arithmetic allows at most, so that any CPU is within it.
assert bound(torch.float64, 100, scale=32) < 1e-12
assert bound(torch.float64, sums(GPTConfig(vocab_size=9, n_layer=2, n_embd=32), keys=2 * T), scale=64) < 1e-11


def says(section, *words):
    for phrase in words:
        assert phrase in SECTIONS[section], phrase


def build(spec, **sizes):
    """An encoding in float64 whose every parameter matters."""
    encoding = posenc.build(spec, 1, **(SIZES | sizes))[0].double()
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter)
    return encoding


def gpt(spec, **settings):
    """A model in float64, untrained, whose every part matters."""
    sizes = dict(vocab_size=9, n_layer=2, n_head=4, n_embd=32, train_length=T, zero_init=False)
    return GPT(GPTConfig(posenc=spec, **(sizes | settings))).double().eval()


# ---- tiny models, trained once

WORDS = torch.randint(1, 9, (24, 4), generator=torch.Generator().manual_seed(1))
WORDS[:, 3] = 0  # the space


def text(rows, length, seed):
    """Every row repeats three words of its own in random order: near tokens spell, far ones tell which."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(len(WORDS), (rows, 3), generator=generator)
    order = torch.randint(3, (rows, length // 4 + 2), generator=generator)
    start = int(torch.randint(4, (), generator=generator))
    return WORDS[own.gather(1, order)].flatten(1)[:, start : start + length + 1]


def fit(model, length, rows, steps, rate=3e-3):
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        tokens = text(rows, length, step)
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def loss(model, length, **options):
    """Mean loss of the same targets under a context that begins ever earlier, in nats per token."""
    tokens = text(64, 4 * T, 10**6)[:, -length - 1 :]
    last = T // 2
    return model(tokens[:, :-1], tokens[:, 1:][:, -last:], last=last, **options).mean().item()


def changed(model, spec):
    """The same weights under another value of the flag."""
    other = GPT(GPTConfig(**(vars(model.config) | {"posenc": spec})))
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module")
def trained():
    settings = dict(vocab_size=9, n_layer=2, n_head=4, n_embd=32, train_length=T)
    return {
        p: fit(GPT(GPTConfig(posenc=p, **settings)), T, 16, 200, rate=4e-3) for p in ("sinusoidal", "rope", "alibi")
    }


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the mistakes


def test_1_a_batch_of_one_gets_the_first_position_alone():
    sinusoidal = build("sinusoidal")
    pe = sinusoidal.embed(torch.arange(512))

    def wrong(x):
        return x + pe[: x.size(0)]

    def ours(x):
        return x + sinusoidal.embed(torch.arange(x.size(1)))

    def vectors(add):
        """How many different vectors twenty tokens are given."""
        return len(add(torch.zeros(1, 20, 32))[0].unique(dim=0))

    assert torch.equal(wrong(torch.zeros(1, 20, 32)), pe[0].expand(1, 20, 32))
    assert vectors(wrong) == 1
    assert vectors(ours) == 20
    with pytest.raises(RuntimeError, match="must match"):
        wrong(torch.zeros(8, 20, 32))
    assert torch.equal(wrong(torch.zeros(20, 20, 32)), ours(torch.zeros(20, 20, 32)))  # right by accident
    says(1, "all 20 tokens get the same vector", "batch of 8 rows", "one of 20 rows", "20 tokens, 20 vectors")


@pytest.mark.slow
def test_2_a_longer_sinusoidal_table_does_not_extrapolate(trained):
    table = trained["sinusoidal"].posenc[0].embed(torch.arange(100 * T))
    assert table.isfinite().all() and len(table.unique(dim=0)) == 100 * T  # nothing is missing, and yet:
    for length in (2 * T, 4 * T):
        assert loss(trained["sinusoidal"], length) > loss(trained["sinusoidal"], T) + 0.5
        assert loss(trained["alibi"], length) < loss(trained["alibi"], T) + 0.01
    says(2, "3,200 rows", "more than 0.5 nats", "at most 0.01 above")


def test_3_powers_of_positions_are_not_relative():
    def wrong(i, j):
        """The factor that a product of a query at i and a key at j gets."""
        q, k = torch.ones(8) / 8**0.5, torch.ones(8) / 8**0.5
        return ((q * (1 + i / 512) ** -1) @ (k * (1 + j / 512))).item()

    xpos = build("xpos")

    def ours(i, j):
        pos = torch.tensor([j, i])  # both tokens are queries and keys, as in a call of the model
        q, k = rotate(xpos, torch.ones(1, 1, 2, 8).double(), torch.ones(1, 1, 2, 8).double(), pos, pos, T)
        return (q[0, 0, 1] @ k[0, 0, 0]).item() / 8

    assert [f"{wrong(i, i - 100):.3f}" for i in (100, 1100)] == ["0.837", "0.938"]
    assert ours(1100, 1000) == pytest.approx(ours(100, 0), abs=1e-12)
    assert abs(ours(100, 0) - ours(101, 0)) > 1e-3  # it is the distance that counts
    says(3, "0.837 at the beginning", "0.938 after 1000 tokens", "less than 1e-12")


def test_4_the_first_frequencies_are_the_highest():
    def wrong(n, dim=64, base=10000.0):
        inv_freq = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        inv_freq[:n] = 0
        return inv_freq

    def ours(fraction):
        """The angle of every pair from one position to the next, read off the rotation itself."""
        x = torch.cat((torch.ones(32), torch.zeros(32))).double().view(1, 1, 1, 64)
        one = torch.tensor([1])
        turned, _ = rotate(build(f"rope(fraction={fraction})", head_dim=64), x, x, one, one, T)
        return torch.atan2(turned[0, 0, 0, 32:], turned[0, 0, 0, :32])

    def wavelengths(angles):
        """Number of pairs that turn, tokens for a turn of the fastest and of the slowest of them."""
        lengths = 2 * math.pi / angles[angles > 0]
        return len(lengths), f"{lengths.min():,.1f}", f"{lengths.max():,.0f}"

    assert wavelengths(wrong(0)) == wavelengths(ours(1.0)) == (32, "6.3", "47,117")
    assert wavelengths(wrong(8)) == (24, "62.8", "47,117")
    assert wavelengths(ours(0.75)) == (24, "6.3", "4,712")
    says(
        4, "32 pairs, whose wavelengths go from 6.3 to 47,117", "24, from 62.8 to 47,117", "24 pairs from 6.3 to 4,712"
    )


def queries_and_keys(model, tokens):
    """(2, H, T, D) before they are turned, of the first layer."""
    caught = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: caught.append(output))
    model(tokens)
    handle.remove()
    return torch.stack(caught[0][0].unflatten(-1, (3, model.config.n_head, -1)).unbind(1)[:2]).transpose(1, 2)


def test_5_the_spectrum_of_an_attention_map_says_little_about_frequencies():
    def wrong(maps):
        """Mean power below a quarter of the sampling frequency, over that above; without the mean of the map."""
        power = torch.fft.fft2(maps).abs().square().mean(0)
        slow = torch.fft.fftfreq(maps.shape[-1]).abs() < 0.25
        low = slow[:, None] & slow
        power[0, 0] = 0
        return (power[low].sum() / (low.sum() - 1) / power[~low].mean()).item()

    def ours(model, tokens):
        """The mean 2-norm of each query and key pair (2, H, D/2); turning a pair does not change it."""
        q_and_k = queries_and_keys(model, tokens)
        return q_and_k.unflatten(-1, (2, -1)).norm(dim=-2).mean(dim=2)

    pos = torch.arange(64)
    hidden = ~visible(pos, pos)
    noise = torch.randn(200, 64, 64).masked_fill(hidden, -math.inf).softmax(-1)  # no position anywhere
    assert 3.2 < wrong(noise) < 3.5
    assert wrong((~hidden / (pos + 1.0)[:, None])[None]) == pytest.approx(11.45, abs=0.005)  # equal weights
    says(5, "200 such maps of 64 tokens the ratio is between 3.2 and 3.5", "score 11.45")

    tokens = torch.randint(500, (1, 64))
    for used in ({0, 1}, {6, 7}):  # the fastest pairs, the slowest
        model = gpt("rope", n_embd=64, vocab_size=500)  # 4 heads of 8 pairs
        even = ours(model, tokens)
        assert even.max() < 2 * even.min()
        with torch.no_grad():
            weight = model.blocks[0].attn.qkv.weight[:128].view(2, 4, 2, 8, 64)  # q and k, heads, halves, pairs
            weight[:, :, :, [m for m in range(8) if m not in used]] *= 0.1
        q, k = rotate(model.posenc[0], *queries_and_keys(model, tokens)[:, None], pos, pos, 64)
        maps = (q @ k.mT / 4)[0].masked_fill(hidden, -math.inf).softmax(-1)
        assert wrong(maps) > 5  # "low frequencies", whichever it uses
        norms = ours(model, tokens)
        for row in norms.flatten(0, 1):
            assert set(row.topk(2).indices.tolist()) == used
            assert row.sort().values[-2] > 4 * row.sort().values[-3]
    says(5, "both score above 5", "twice the norm", "multiplied by 0.1", "more than 4 times")


def test_6_a_bias_on_keys_depends_on_the_query():
    t5 = build("t5")
    n, q, k = torch.tensor([5]), torch.randn(1000, 4, 1, 8).double(), torch.randn(1000, 4, 1, 8).double()
    plain = q @ k.mT / 8**0.5
    vectors = torch.randn(32, 4, 8).double()  # a vector for every bucket and head

    def wrong(q, k):
        return q @ (k + vectors[t5.bucket(n)].transpose(0, 1)).mT / 8**0.5

    def ours(q, k):
        return logits(t5, q, k, n, torch.tensor([0]), torch.tensor([[True]]))

    def spread(given):
        """What the encoding added for the same distance: the largest less the smallest of 1000 queries, by head."""
        added = given - plain
        return (added.amax(0) - added.amin(0)).flatten()

    assert spread(wrong(q, k)).min() > 1
    assert torch.allclose(wrong(-q, k) + plain, -(wrong(q, k) - plain))  # what one query seeks, its opposite shuns
    assert spread(ours(q, k)).max() < 1e-12
    assert torch.allclose((ours(q, k) - plain)[0].flatten(), t5.weight[5])
    assert type(t5).values is Encoding.values  # nor does it add to what attention reads
    says(6, "1000 random queries", "more than 1 in every head", "less than 1e-12")


def test_7_a_clipped_table_merges_distances():
    shaw, xl = build("shaw(clip=16, with_values=False)"), build("transformer_xl")
    q_pos, k_pos = torch.tensor([63]), torch.arange(64)
    n, seen = 63 - k_pos, torch.ones(1, 64, dtype=torch.bool)
    q, k = torch.randn(1, 4, 1, 8).double(), torch.randn(1, 4, 1, 8).double().expand(1, 4, 64, 8)  # 64 times one key

    def wrong(q, k):
        return q @ (k + shaw.key[n.clamp(max=16)]).mT / 8**0.5

    def ours(q, k):
        return logits(xl, q, k, q_pos, k_pos, seen)

    def distinct(given):
        return {len(head.round(decimals=9).unique()) for head in given.flatten(0, 2)}

    assert distinct(wrong(q, k)) == {17}
    assert distinct(ours(q, k)) == {64}
    shaws = logits(shaw, q, k, q_pos, k_pos, seen)  # an encoding, under its own name
    assert torch.allclose(wrong(q, k), shaws, rtol=0, atol=1e-12)
    angle = n[:, None] * 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    r = xl.project(torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)).view(64, 4, 8).transpose(0, 1)
    terms = [q @ k.mT, q @ r.mT, xl.u @ k.mT, xl.v @ r.mT]
    # The angles up to 63 of 16 frequencies, as sines and cosines in float32, times a query of 8 numbers.
    angles = 2 * sum(63 / 10000 ** (m / 16) for m in range(16))
    rounding = bound(torch.float32, 2, scale=angles * 8 / 8**0.5)
    assert torch.allclose(sum(terms) / 8**0.5, ours(q, k), rtol=0, atol=rounding)
    assert min(term.abs().max() for term in terms) > 0.1

    model, tokens = gpt("transformer_xl", n_layer=1), torch.randint(9, (2, 65))
    x, y = tokens[:, :-1], tokens[:, 1:]
    whole, late = model(x, y), model(x[:, 32:], y[:, 32:])
    assert torch.allclose(model(x, y, segments=2), whole, rtol=0, atol=1e-11)
    assert (late - whole[:, 32:]).abs().max() > 0.1  # without memory
    says(7, "17 different logits", "64 distances give 64 logits", "to 1e-11", "more than 0.1")


@pytest.mark.slow
def test_8_rope_breaks_past_its_length_and_llama_3_scales_by_bands(trained):
    rope = trained["rope"]
    for length in (2 * T, 4 * T):
        assert loss(rope, length) > loss(rope, T) + 1
        assert loss(rope, length, past=Past(T)) < loss(rope, T) + 0.1  # ours: a window over the same context
    says(8, "more than 1 nat", "within 0.1")

    def divisors(scaling):
        """What the wavelengths of Llama 3's heads are divided by."""
        spec = f"rope(base=500000, scaling={scaling!r}, factor=8)"
        encoding = build(spec, n_embd=512, head_dim=128, train_length=8192)
        w = posenc.frequencies(128, 500000.0, torch.float64)
        return w / getattr(encoding, f"by_{scaling}")(w, 8192)[0]

    wrong, ours = divisors("linear"), divisors("llama3")
    assert set(wrong.tolist()) == {8}
    assert ours.tolist() == sorted(ours.tolist())
    assert [(ours == 1).sum(), (ours == 8).sum(), len(ours)] == [29, 29, 64]
    says(8, "all 64 frequencies divided by 8", "29 of 64 exactly as they were, 6 between, 29 divided by 8")


def test_9_rope_without_an_offset_breaks_under_a_cache(monkeypatch):
    tokens = torch.randint(9, (2, 20))
    model = gpt("rope")

    def wrong(self, pairs):
        return tuple(self.turn(x, torch.arange(x.shape[2])) for x in (pairs.q, pairs.k))

    def difference():
        """The cached logits, token by token, against those of the full forward."""
        cache = Cache()
        cached = torch.cat([model(token, past=cache) for token in tokens.split(1, dim=1)], dim=1)
        return (cached - model(tokens)).abs().max().item()

    full = model(tokens)
    assert difference() < 1e-11
    monkeypatch.setattr(posenc.RoPE, "rotate", wrong)
    assert torch.equal(model(tokens), full)  # training does not show it
    assert difference() > 0.1
    says(9, "Over 20 tokens", "more than 0.1", "less than 1e-11")


def test_10_a_length_for_every_epoch_is_a_compilation_for_every_epoch():
    wrong = [(8, min(128 + 41 * epoch, 8192)) for epoch in range(200)]  # (rows, length) of the batches
    config = Config(train_length=8192, length_schedule={0.0: 512, 0.5: 2048, 0.8: 8192}, max_steps=200, batch_size=8)
    rows = [config.batch_size * config.train_length // length for _, length in config.phases]
    ours = [(count, length) for count, (_, length) in zip(rows, config.phases, strict=True)]
    tokens = [count * length for count, length in wrong]
    assert (len(set(wrong)), max(tokens) / min(tokens)) == (198, 64)
    assert ours == [(128, 512), (32, 2048), (8, 8192)]
    assert {count * length for count, length in ours} == {8 * 8192}
    says(10, "41 * epoch", "198 different lengths", "64 times the tokens", "128, 32 and 8 of them", "65,536 tokens")

    def compiled(lengths):
        """The number of graphs that torch.compile has made of a layer, for fixed shapes, after each of the lengths."""
        graphs, after = [], []
        torch._dynamo.reset()
        small = torch.compile(
            gpt("rope").blocks[0].ff, dynamic=False, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]
        )
        for length in lengths:
            small(torch.zeros(1, length, 32).double())
            after.append(len(graphs))
        torch._dynamo.reset()
        return after

    # At its limit torch gives up and runs the rest uncompiled.
    assert compiled([length for _, length in wrong[:10]]) == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    assert compiled([64, 64, 128, 128, 256, 256]) == [1, 1, 2, 2, 3, 3]
    says(10, "a graph for each of the first 8 lengths", "3 lengths are 3 graphs")


def test_11_a_causal_decoder_is_not_blind_to_order():
    none, pos = build("none"), torch.arange(8)
    x, order = torch.randn(1, 4, 8, 8).double(), [0, 2, 1, 3, 4, 5, 6, 7]
    weights = torch.randn(6, 8, 8).double()

    def change(layers, seen):
        """What a swap of tokens 1 and 2 changes at the last token."""
        found = []
        for y in (x, x[:, :, order]):
            for weight in weights[:layers]:
                y = y + attend(none, y @ weight, y, y, pos, pos, seen)
            found.append(y[:, :, -1])
        return (found[0] - found[1]).abs().max().item()

    everything = torch.ones(8, 8, dtype=torch.bool)  # an encoder: the claim is true of it
    assert max(change(layers, everything) for layers in (1, 2, 6)) < 1e-10
    assert change(1, visible(pos, pos)) < 1e-10
    assert change(2, visible(pos, pos)) > 0.01

    def ours(layers):
        model, tokens = gpt("none", n_layer=layers), torch.arange(8)
        return (model(tokens[None]) - model(tokens[order][None]))[0, -1].abs().max().item()

    assert ours(1) < 1e-10
    assert ours(2) > 0.01
    says(11, "less than 1e-10, be it 1, 2 or 6 layers", "above 0.01")


@pytest.mark.slow
def test_12_position_interpolation_costs_until_it_is_tuned(trained):
    spec = 'rope(scaling="linear", factor=4)'
    wrong = changed(trained["rope"], spec)
    before = loss(trained["rope"], T)
    assert loss(wrong, T) > before + 1
    assert loss(wrong, 4 * T) > before + 1
    ours = fit(copy.deepcopy(wrong), 4 * T, 4, 200)
    assert loss(ours, T) < before + 0.2
    assert loss(ours, 4 * T) < before + 0.2
    says(12, "more than 1 nat", "200 more steps", "within 0.2")

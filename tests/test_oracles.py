"""Every positional encoding against its published formula, in plain loops: one query, one key and one head at a time.

Nothing here is derived from posenc.py. Each test names the paper and the public code that its formula follows. All is
in float64, the encodings too, so that EXACT is rounding and no more; a wider tolerance says where float32 stays.
"""

import itertools
import math

import pytest
import torch
from hooks import logits, rotate
from tiny import bound

import posenc
from core.encoding import Pairs

# No formula adds more than 500 terms, and none is larger than 4000: positions, whose angles are rounded as they are.
EXACT = bound(torch.float64, 500, scale=4000)
SIZES = dict(n_embd=24, n_head=4, n_kv_head=2, head_dim=8, train_length=16)
BESIDE = list(range(3, 13))  # positions of the keys: neighbours, away from zero,
APART = [0, 1, 2, 5, 6, 14, 15, 16, 47, 200]  # with gaps, below and far above the training length,
FAR = [0, 1, 30, 63, 64, 300, 511, 512, 1700, 4000]  # and for what changes over thousands of positions
QUERIES = 6  # the last six tokens ask, all ten answer


def make(spec, **sizes):
    """The encoding in float64, its parameters drawn from N(0, 1)."""
    encoding = posenc.build(spec, 1, **(SIZES | sizes))[0].double().eval()
    torch.manual_seed(0)
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter)
    return encoding


def put(encoding, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(encoding, name).copy_(torch.tensor(value, dtype=torch.float64))


def ask(encoding, pos=APART, length=None):
    """The logits as a model gets them from the hooks, for random queries, keys and inputs x of the layer at `pos`.

    Returns logits, q, k, x as nested lists [batch][head][token], every head of q with its own copy of its keys."""
    torch.manual_seed(1)
    q = torch.randn(2, encoding.n_head, QUERIES, encoding.head_dim, dtype=torch.float64)
    k = torch.randn(2, encoding.n_kv_head, 10, encoding.head_dim, dtype=torch.float64)
    x = torch.randn(2, 10, encoding.n_embd, dtype=torch.float64)
    k_pos, groups = torch.tensor(pos), encoding.n_head // encoding.n_kv_head
    q_pos = k_pos[-QUERIES:]
    with torch.no_grad():
        new_q, new_k = rotate(encoding, q, k, q_pos, k_pos, length or pos[-1] + 1)
        new_k = new_k.repeat_interleave(groups, 1)
        asked = encoding.asks(x[:, -QUERIES:])
        got = logits(encoding, new_q, new_k, q_pos, k_pos, k_pos <= q_pos[:, None], asked, **encoding.state(x, {}))
    return got.tolist(), q.tolist(), k.repeat_interleave(groups, 1).tolist(), x.tolist()


def pairs(encoding):
    """(batch, head, query, key) for every one of the ten keys that a query sees."""
    grid = itertools.product(range(2), range(encoding.n_head), range(QUERIES), range(10))
    return [(b, h, t, s) for b, h, t, s in grid if s <= 10 - QUERIES + t]


def compare(encoding, expected, positions=(BESIDE, APART), length=None, tolerance=EXACT):
    """Every logit against expected(q, k, i, j, h), which takes a query, a key, their positions and the head."""
    for pos in positions:
        given, q, k, _ = ask(encoding, pos, length)
        without = 0.0  # the largest difference to attention without positions: the comparison must not be empty
        for b, h, t, s in pairs(encoding):
            one = expected(q[b][h][t], k[b][h][s], pos[t - QUERIES], pos[s], h)
            assert given[b][h][t][s] == pytest.approx(one, abs=tolerance), (b, h, pos[t - QUERIES], pos[s])
            without = max(without, abs(one - content(q[b][h][t], k[b][h][s])))
        assert without > 1e-2


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def content(q, k):
    return dot(q, k) / math.sqrt(len(q))


def linear(layer, x):
    biases = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [dot(row, x) + bias for row, bias in zip(layer.weight.tolist(), biases, strict=True)]


def gelu(x):
    return [u * (1 + math.erf(u / math.sqrt(2))) / 2 for u in x]


def wave(p, width, base=10000.0):
    """sin, cos, sin, cos ... of p at the frequencies base^(-2i/width) (Vaswani et al. 2017, section 3.5)."""
    return [(math.sin, math.cos)[c % 2](p / base ** (c // 2 * 2 / width)) for c in range(width)]


def theta(width, base=10000.0):
    return [base ** (-2 * m / width) for m in range(width // 2)]


def turned(x, p, frequencies, amplitude=1.0):
    """x with pair m = (x_m, x_(m + half)) turned by p times frequency m; what lies past the last pair is left alone."""
    out, half = list(x), len(frequencies)
    for m, frequency in enumerate(frequencies):
        number = complex(x[m], x[m + half]) * amplitude * complex(math.cos(p * frequency), math.sin(p * frequency))
        out[m], out[m + half] = number.real, number.imag
    return out


ANGLE = bound(torch.float32, 2)  # of an angle in float32, relative: a frequency is rounded, and its product with p


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_sinusoids(base):
    # Vaswani et al. 2017, section 3.5.
    pos = [0, 1, 15, 16, 500]
    embedded = make(f"sinusoidal(base={base})").embed(torch.tensor(pos)).tolist()
    inside = make(f"ffn(base={base})").ffn(torch.tensor(pos), 128).tolist()
    for row, p in enumerate(pos):
        assert embedded[row] == pytest.approx(wave(p, 24, base), abs=ANGLE * 500)
        assert inside[row] == pytest.approx(wave(p, 128, base), abs=ANGLE * 500)


def test_fourier():
    # The formula of POSENC.md, after Li et al. 2021, "Learnable Fourier features", equations 2 and 3.
    encoding = make("fourier")
    pos = [0, 1, 2, 15, 16, 300]
    given, w = encoding.embed(torch.tensor(pos)).tolist(), encoding.frequency.tolist()
    for row, p in enumerate(pos):
        features = [math.cos(p * f) for f in w] + [math.sin(p * f) for f in w] + [math.log(1 + p)]
        expected = linear(encoding.outer, gelu(linear(encoding.inner, features)))
        assert given[row] == pytest.approx(expected, abs=EXACT)
    # They start log-uniform in [1e-4, 1] (POSENC.md): a quarter of them in each factor of ten.
    many = torch.empty(4000, dtype=torch.float64)
    encoding.init_parameter("frequency", many, torch.Generator().manual_seed(0))
    decades = [math.log10(w) for w in many.tolist()]
    assert min(decades) >= -4 - 1e-6 and max(decades) <= 1e-6
    for low in (-4, -3, -2, -1):
        assert sum(low <= u < low + 1 for u in decades) / 4000 == pytest.approx(0.25, abs=0.03)


def test_recurrent_learned():
    # PE[p] = PE[p-1] + MLP(PE[p-1] / rms): a step of Euler's rule for the flow of FLOATER (Liu et al. 2020), whose
    # network is given vectors of one size.
    encoding = make("recurrent(form='learned')")
    given = encoding.embed(torch.tensor([0, 1, 2, 15, 16, 40])).tolist()
    code, codes = encoding.start.tolist(), []
    for _ in range(41):
        codes.append(code)
        rms = math.sqrt(sum(x * x for x in code) / len(code))
        step = linear(encoding.outer, gelu(linear(encoding.inner, [x / rms for x in code])))
        code = [x + y for x, y in zip(code, step, strict=True)]
    for row, p in enumerate([0, 1, 2, 15, 16, 40]):
        assert given[row] == pytest.approx(codes[p], rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("base", [10000.0, 1000.0])
def test_recurrent_linear(base):
    # x_p = 2 cos(w) x_(p-1) - x_(p-2) is solved by sin(wp) and cos(wp). In float32, rounded once at the end: 2^-24.
    pos = [0, 1, 2, 16, 999, 4096, 12345, 16000]
    given = posenc.build(f"recurrent(form='linear', base={base})", 1, **SIZES)[0].embed(torch.tensor(pos))
    assert given.dtype == torch.float32
    for row, p in enumerate(pos):
        assert given[row].tolist() == pytest.approx(wave(p, 24, base), abs=bound(torch.float32, 1))


def test_the_two_term_recurrence_drifts():
    # The same equation stepped in float32 at w = .001: why the encoding must not do it so. POSENC.md has .39.
    last, x, twice = torch.tensor(0.0), torch.tensor(math.sin(1e-3)), torch.tensor(2 * math.cos(1e-3))
    drift = 0.0
    for p in range(2, 16001):
        last, x = x, twice * x - last
        drift = max(drift, abs(x.item() - math.sin(1e-3 * p)))
    assert drift > 0.1


def test_scaled_bias():
    # POSENC.md: softmax((QK^T + B) / sqrt(D)), one scalar for every head and distance, the last one for all beyond.
    encoding = make("scaled_bias")
    table = encoding.weight.tolist()
    compare(encoding, lambda q, k, i, j, h: (dot(q, k) + table[min(i - j, 15)][h]) / math.sqrt(8))


def alibi_slopes(heads, slopes):
    # Press et al. 2021, section 3. In the authors' code the heads past a power of two P take every other slope of 2P.
    if slopes == "paper":
        return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
    power = max(2**e for e in range(10) if 2**e <= heads)
    first = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return first + [2 ** (-4 * h / power) for h in range(1, 2 * (heads - power), 2)]


@pytest.mark.parametrize("heads", [8, 12, 16, 6, 1])
@pytest.mark.parametrize("slopes", ["authors", "paper"])
def test_alibi(heads, slopes):
    encoding = make(f"alibi(slopes='{slopes}')", n_head=heads, n_kv_head=heads)
    expected = alibi_slopes(heads, slopes)
    exact = all(math.log2(slope).is_integer() for slope in expected)  # others are kept in float32, distances up to 200
    tolerance = EXACT if exact else bound(torch.float32, 1, scale=200 * max(expected))
    compare(encoding, lambda q, k, i, j, h: content(q, k) - expected[h] * (i - j), tolerance=tolerance)
    # In four digits.
    published = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.7071, 0.3536, 0.1768, 0.0884]
    if slopes == "authors" and heads in (8, 12):
        assert (-encoding.distance_bias(torch.tensor(1))).tolist() == pytest.approx(
            published[:heads], abs=5e-5
        )  # four digits


def t5_bucket(n, buckets, max_distance, bidirectional):
    # Raffel et al. 2020, as in Mesh TensorFlow and Hugging Face's T5. Logarithms are compared as powers of integers, so
    # that no rounding decides where a bucket begins.
    start = 0
    if bidirectional:
        buckets //= 2
        start, n = (buckets if n < 0 else 0), abs(n)
    exact = buckets // 2
    if n < exact:
        return start + n
    rest = buckets - exact
    steps = 0
    while steps < rest - 1 and n**rest * exact ** (steps + 1) >= max_distance ** (steps + 1) * exact**rest:
        steps += 1
    return start + exact + steps


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 64), (32, 1000), (8, 100)])
def test_t5(buckets, max_distance, bidirectional):
    encoding = make(f"t5(buckets={buckets}, max_distance={max_distance}, bidirectional={bidirectional})")
    distances = list(range(-1500 if bidirectional else 0, 1501))
    expected = [t5_bucket(n, buckets, max_distance, bidirectional) for n in distances]
    assert encoding.bucket(torch.tensor(distances)).tolist() == expected
    # Every bucket is used but, with two directions, that of a later key at distance zero.
    assert set(expected) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())
    table = encoding.weight.tolist()

    def logit(q, k, i, j, h):
        return content(q, k) + table[t5_bucket(i - j, buckets, max_distance, bidirectional)][h]

    compare(encoding, logit)
    published = {0: 0, 15: 15, 16: 16, 112: 30, 113: 31, 99999: 31}  # POSENC.md, for the defaults
    assert make("t5").bucket(torch.tensor(list(published))).tolist() == list(published.values())


def kerple_bias(form, r1, r2, n):
    # Chi et al. 2022, sections 4.1 and 4.2; the clamps and ranges of megatron/mpu/layers.py in chijames/KERPLE.
    r1 = max(r1, 0.01)
    if form == "log":
        return -r1 * math.log(1 + max(r2, 0.01) * n)
    return -r1 * n ** min(max(r2, 0.01), 2.0)


R1, R2 = [0.7, -1.0, 1.3, 0.02], [0.4, 0.9, -2.0, 3.0]  # inside the clamps and, for every clamp, one outside


@pytest.mark.parametrize(("form", "ranges"), [("log", (2, 1)), ("power", (1, 2))])
def test_kerple(form, ranges):
    encoding = make(f"kerple(form='{form}')")
    put(encoding, r1=R1, r2=R2)
    compare(encoding, lambda q, k, i, j, h: content(q, k) + kerple_bias(form, R1[h], R2[h], i - j))
    many = make(f"kerple(form='{form}')", n_head=4000, n_kv_head=4000)  # r1, r2 start uniform up to these tops
    for (name, parameter), top in zip(many.named_parameters(), ranges, strict=True):
        with torch.no_grad():
            many.init_parameter(name, parameter, torch.Generator().manual_seed(0))
        assert 0 <= parameter.min().item() < 0.011  # clamped at .01 in the forward pass, or already here
        assert 0.99 * top < parameter.max().item() <= top
        assert parameter.mean().item() == pytest.approx(top / 2, abs=0.05)


def test_fire():
    # Li et al. 2023, equation 19, as the class FIRE of DAPE.py in chuanyang-Zheng/DAPE (1e-6 in the denominator).
    encoding = make("fire")
    put(encoding, steepness=-0.3, threshold=-0.6)
    c, limit = -0.3, 0.6 * 16  # queries lie on both sides of it

    def logit(q, k, i, j, h):
        ratio = math.log(abs(c) * (i - j) + 1) / (math.log(abs(c) * max(i, limit) + 1) + 1e-6)
        hidden = [max(u, 0.0) for u in linear(encoding.inner, [ratio])]
        return content(q, k) + linear(encoding.outer, hidden)[h]

    compare(encoding, logit)


@pytest.mark.parametrize("dims", [128, 32])
def test_sandwich(dims):
    # Chi et al. 2023, section 4, in the form of NVIDIA/NeMo's sandwich_relative_position_embedding.py: heads from 1.
    def logit(q, k, i, j, h):
        total = sum(math.cos((i - j) / 10000 ** (2 * m / dims)) for m in range(1, dims // 2 + 1))
        return content(q, k) + (total - dims / 2) / (8 * (h + 1) / 4)

    angles = sum(200 / 10000 ** (2 * m / dims) for m in range(dims // 2))  # of the cosines, in float32
    compare(make(f"sandwich(dims={dims})"), logit, tolerance=ANGLE * angles / 2)


def ntk(width, scale, base=10000.0):
    return theta(width, base * scale ** (width / (width - 2)))


def yarn(width, scale, length, fast=32, slow=1, base=10000.0):
    # Peng et al. 2023, in the pair index as LlamaYaRNScaledRotaryEmbedding.py of jquesnelle/yarn.
    def pair_that_makes(turns):
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair_that_makes(fast)), 0), min(math.ceil(pair_that_makes(slow)), width - 1)
    high += 0.001 if low == high else 0
    stretched = [min(max((m - low) / (high - low), 0), 1) for m in range(width // 2)]
    return [w / scale * r + w * (1 - r) for w, r in zip(theta(width, base), stretched, strict=True)]


def llama3(width, scale, length, low=1, high=4, base=10000.0):
    # Dubey et al. 2024; modeling_rope_utils.py in huggingface/transformers.
    out = []
    for w in theta(width, base):
        turns = length * w / (2 * math.pi)  # that the pair makes in the original length
        keep = min(max((turns - low) / (high - low), 0), 1)
        out.append(keep * w + (1 - keep) * w / scale)
    return out


SHORT, LONG = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 3.7], [1.0, 1.5, 2.0, 4.0, 8.0, 11.0, 13.0, 16.0]
LONGROPE = f"rope(scaling='longrope', factor=4, short_factor={SHORT}, long_factor={LONG})"
GROWN = math.sqrt(1 + math.log(4) / math.log(512))  # the amplitude of longrope at s = 4, T = 512

# flag, length of the context, frequencies, amplitude of cos and sin; D = 16 and T = 512 throughout
ROPES = [
    # Su et al. 2021, equation 34; pairs (m, m + D/2).
    ("rope", 4001, theta(16), 1),
    ("rope(base=500)", 4001, theta(16, 500), 1),
    # Barbero et al. 2024, appendix D: the highest int(p D / 2) frequencies turn, the others stand still.
    ("rope(fraction=0.75)", 4001, [*theta(16)[:6], 0, 0], 1),
    ("rope(fraction=0.3)", 4001, [*theta(16)[:2], 0, 0, 0, 0, 0, 0], 1),
    # GPT-NeoX's partial rotary: the first dims dimensions as if they were the head.
    ("rope(dims=8)", 4001, theta(8), 1),
    # Chen et al. 2023, equation 4.
    ("rope(scaling='linear', factor=4)", 4001, [w / 4 for w in theta(16)], 1),
    ("rope(scaling='linear', factor=4, dims=8)", 4001, [w / 4 for w in theta(8)], 1),
    # bloc97's NTK-aware rule, base s^(d/(d-2)).
    ("rope(scaling='ntk')", 4001, ntk(16, 8), 1),
    ("rope(scaling='ntk', factor=4, base=500, dims=8)", 4001, ntk(8, 4, 500), 1),
    # _compute_dynamic_ntk_parameters of huggingface/transformers: s L / T - (s - 1) takes the place of s.
    ("rope(scaling='dynamic', factor=2)", 4001, ntk(16, 2 * 4001 / 512 - 1), 1),
    ("rope(scaling='dynamic', factor=4)", 600, ntk(16, 4 * 600 / 512 - 3), 1),
    ("rope(scaling='yarn')", 4001, yarn(16, 8, 512), 0.1 * math.log(8) + 1),
    ("rope(scaling='yarn', factor=4, beta_fast=8, beta_slow=2)", 4001, yarn(16, 4, 512, 8, 2), 0.1 * math.log(4) + 1),
    ("rope(scaling='yarn', base=10)", 4001, yarn(16, 8, 512, base=10), 0.1 * math.log(8) + 1),  # pair 16 clamped at 15
    ("rope(scaling='llama3')", 4001, llama3(16, 8, 512), 1),
    ("rope(scaling='llama3', low_freq_factor=2, high_freq_factor=30, base=99)", 99, llama3(16, 8, 512, 2, 30, 99), 1),
    # Ding et al. 2024; _compute_longrope_parameters of huggingface/transformers. T itself is still short.
    (LONGROPE, 512, [w / f for w, f in zip(theta(16), SHORT, strict=True)], GROWN),
    (LONGROPE, 513, [w / f for w, f in zip(theta(16), LONG, strict=True)], GROWN),
    # What does not scale is rope.
    ("rope(scaling='linear', factor=1)", 4001, theta(16), 1),
    ("rope(scaling='ntk', factor=1)", 4001, theta(16), 1),
    ("rope(scaling='yarn', factor=1)", 4001, theta(16), 1),
    ("rope(scaling='dynamic', factor=8)", 512, theta(16), 1),
    ("rope(scaling='dynamic', factor=3.5)", 20, theta(16), 1),
    ("rope(fraction=1.0)", 4001, theta(16), 1),
    ("rope(dims=16)", 4001, theta(16), 1),
]


@pytest.mark.parametrize(("spec", "length", "frequencies", "amplitude"), ROPES)
def test_rope(spec, length, frequencies, amplitude):
    encoding = make(spec, head_dim=16, train_length=512)
    pos = FAR if length > 4000 else APART
    q, k = torch.randn(1, 4, QUERIES, 16, dtype=torch.float64), torch.randn(1, 2, 10, 16, dtype=torch.float64)
    at = torch.tensor(pos)
    new_q, new_k = rotate(encoding, q, k, at[-QUERIES:], at, length)
    for new, old, where in ((new_q, q, pos[-QUERIES:]), (new_k, k, pos)):  # the rotated pairs, of 4 heads and of 2
        assert new.shape == old.shape
        for h, (t, p) in itertools.product(range(old.shape[1]), enumerate(where)):
            one = turned(old[0, h, t].tolist(), p, frequencies, amplitude)
            assert new[0, h, t].tolist() == pytest.approx(one, abs=EXACT)

    def logit(q, k, i, j, h):
        return content(turned(q, i, frequencies, amplitude), turned(k, j, frequencies, amplitude))

    compare(encoding, logit, positions=[BESIDE, pos], length=length)


@pytest.mark.parametrize("length", [64, 512, 2048])
@pytest.mark.parametrize("scaling", [yarn, llama3])
def test_bands_at_the_width_of_llama(scaling, length):
    # The same two formulas where every band holds several pairs, and where yarn's lowest pair index is clamped at zero.
    frequencies, amplitude = scaling(64, 8, length), 0.1 * math.log(8) + 1 if scaling is yarn else 1
    ratios = [w / plain for w, plain in zip(frequencies, theta(64), strict=True)]
    assert ratios[0] == 1 and ratios[-1] == pytest.approx(1 / 8) and any(0.13 < r < 0.99 for r in ratios)
    x = torch.ones(1, 1, 1, 64, dtype=torch.float64)
    encoding = make(f"rope(scaling='{scaling.__name__}')", head_dim=64, train_length=length)
    given = rotate(encoding, x, x, torch.tensor([777]), torch.tensor([777]), 4000)[0]
    assert given.flatten().tolist() == pytest.approx(turned([1.0] * 64, 777, frequencies, amplitude), abs=EXACT)


def test_ntk_end_ratios():
    # The highest frequency stays, the lowest becomes 1/s of itself: read off the angle by which unit vectors turn.
    encoding = make("rope(scaling='ntk', factor=8)", head_dim=16)
    x = torch.tensor([1.0] * 8 + [0.0] * 8, dtype=torch.float64).view(1, 1, 1, 16)
    one = rotate(encoding, x, x, torch.tensor([1]), torch.tensor([1]), 2)[0].flatten().tolist()
    ratios = [math.atan2(one[m + 8], one[m]) / w for m, w in enumerate(theta(16))]
    assert ratios[0] == pytest.approx(1, rel=EXACT)
    assert ratios[-1] == pytest.approx(1 / 8, rel=EXACT)
    assert all(high > low for high, low in itertools.pairwise(ratios))


@pytest.mark.parametrize(("gamma", "scale_base"), [(0.4, 512), (0.4, 64), (1.5, 512), (1e9, 512)])
def test_xpos(gamma, scale_base):
    # Sun et al. 2022; xpos_relative_position.py in microsoft/torchscale, without its centring, which cancels in q.k.
    # zeta = 1 is rope, and gamma = 1e9 makes it 1 - 1e-9 or more, so 4000 positions change a factor by 8e-9 at most.
    frequencies = theta(8)
    zeta = [1.0 if gamma == 1e9 else (2 * m + gamma * 8) / ((1 + gamma) * 8) for m in range(4)]

    def logit(q, k, i, j, h):
        q, k = turned(q, i, frequencies), turned(k, j, frequencies)
        power = [z ** ((i - j) / scale_base) for z in zeta]
        return sum(power[m] * (q[m] * k[m] + q[m + 4] * k[m + 4]) for m in range(4)) / math.sqrt(8)

    encoding = make(f"xpos(gamma={gamma}, scale_base={scale_base})")
    compare(encoding, logit, positions=(BESIDE, APART, FAR), tolerance=1e-7 if gamma == 1e9 else EXACT)


@pytest.mark.parametrize(
    ("spec", "window", "leak"),
    [("rerope", 8, math.inf), ("rerope(window=5)", 5, math.inf), ("rerope(window=5, leak=3)", 5, 3)],
)
def test_rerope(spec, window, leak):
    # Su 2023 (kexue.fm/archives/9708); rerope_patch.py and leaky_rerope_patch.py in bojone/rerope, without the log-n
    # temperature that they also put on the queries. A third of a distance up to 200 is rounded to float32.
    def logit(q, k, i, j, h):
        n = i - j
        return content(turned(q, n if n < window else window + (n - window) / leak, theta(8)), k)

    compare(make(spec), logit, tolerance=bound(torch.float32, 8, scale=200 / 3) if leak == 3 else EXACT)


@pytest.mark.parametrize(("window", "group"), [(0, 4), (6, 3), (7, 3)])
def test_self_extend(window, group):
    # Jin et al. 2024, algorithm 1 (the shift W - W // G in integers); self_extend_patch in datamllab/LongLM.
    encoding, window = make(f"self_extend(window={window}, group={group})"), window or 8

    def logit(q, k, i, j, h):
        n = i - j
        return content(turned(q, n if n < window else i // group - j // group + window - window // group, theta(8)), k)

    compare(encoding, logit)


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("clip", [16, 3])
def test_shaw(clip, with_values):
    # Shaw et al. 2018, equations 3 and 4, for keys that are not later than the query.
    encoding = make(f"shaw(clip={clip}, with_values={with_values})")
    key = encoding.key.tolist()
    assert len(key) == clip + 1

    def logit(q, k, i, j, h):
        return content(q, [x + y for x, y in zip(k, key[min(i - j, clip)], strict=True)])

    compare(encoding, logit)
    at = torch.tensor(APART)
    weights = torch.rand(2, 4, QUERIES, len(APART), dtype=torch.float64) * (at <= at[-QUERIES:, None])
    v = torch.randn(2, 4, len(APART), 8, dtype=torch.float64)
    given = encoding.values(weights, Pairs(None, None, v, at[-QUERIES:], at))
    value = encoding.value.tolist() if with_values else [[0.0] * 8] * (clip + 1)
    for b, h, t in itertools.product(range(2), range(4), range(QUERIES)):
        expected = [0.0] * 8
        for s in range(10 - QUERIES + t + 1):
            row = zip(v[b, h, s].tolist(), value[min(APART[t - QUERIES] - APART[s], clip)], strict=True)
            expected = [x + weights[b, h, t, s].item() * (y + z) for x, (y, z) in zip(expected, row, strict=True)]
        assert given[b, h, t].tolist() == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_transformer_xl(base):
    # Dai et al. 2019, section 3.3; RelPartialLearnableMultiHeadAttn of kimiyoung/transformer-xl. Theirs puts all sines
    # before all cosines, which is the same up to the order of the columns of W. Sinusoids are in float32.
    encoding = make(f"transformer_xl(base={base})")
    u, v = encoding.u.tolist(), encoding.v.tolist()
    codes = {}  # W r_n

    def logit(q, k, i, j, h):
        n = i - j
        if n not in codes:
            codes[n] = linear(encoding.project, wave(n, 24, base))
        r = codes[n][h * 8 : h * 8 + 8]
        return (dot(q, k) + dot(q, r) + dot(u[h][0], k) + dot(v[h][0], r)) / math.sqrt(8)

    # The angles of 12 frequencies, as sines and cosines, times weights and a query of 8 numbers near 1, over sqrt(8).
    angles = 2 * sum(200 / base ** (m / 12) for m in range(12))
    compare(encoding, logit, tolerance=ANGLE * angles * 8 / math.sqrt(8))


@pytest.mark.parametrize("max_position", [64, 4])
def test_cope(max_position):
    # Golovneva et al. 2024, appendix B, and CoPE of lucidrains/x-transformers: gates from logits divided by sqrt(D),
    # codes of positions added undivided. (facebookresearch/RAM divides those too, unless told --cope-nodiv.)
    encoding = make(f"cope(max_position={max_position})")
    table = encoding.weight.tolist()
    given, q, k, _ = ask(encoding)
    clamped = 0
    for b, h, t, s in pairs(encoding):
        query, keys = q[b][h][t], k[b][h]
        gates = [1 / (1 + math.exp(-content(query, keys[m]))) for m in range(s, 10 - QUERIES + t + 1)]
        clamped += sum(gates) > max_position - 1
        p = min(sum(gates), max_position - 1)
        low = math.floor(p)
        at_low, at_high = dot(query, table[low]), dot(query, table[math.ceil(p)])
        expected = content(query, keys[s]) + (1 - (p - low)) * at_low + (p - low) * at_high
        assert given[b][h][t][s] == pytest.approx(expected, abs=EXACT)
    assert (clamped > 0) == (max_position == 4)


def test_fox():
    # Lin et al. 2025, equation 4; forgetting_transformer in zhixuan-lin/forgetting-transformer.
    encoding = make("fox")
    given, q, k, x = ask(encoding)
    kept = [[[-math.log(1 + math.exp(-u)) for u in linear(encoding.gate, x_t)] for x_t in row] for row in x]
    for b, h, t, s in pairs(encoding):
        between = sum(kept[b][m][h] for m in range(s + 1, 10 - QUERIES + t + 1))  # the query's gate, not the key's
        assert given[b][h][t][s] == pytest.approx(content(q[b][h][t], k[b][h][s]) + between, abs=EXACT)
    for chunks in ([4, 6], [1] * 10, [3, 1, 6]):  # a state that starts from the one before goes on with its sum
        totals, last = [], {}
        for part in torch.tensor(x, dtype=torch.float64).split(chunks, 1):
            state = encoding.state(part, last)
            assert set(state) == {"total"} and state["total"].shape == (2, 4, part.shape[1], 1)
            totals.append(state["total"])
            last = {"total": totals[-1][:, :, -1:]}
        for b, h, m in itertools.product(range(2), range(4), range(10)):
            expected = sum(kept[b][n][h] for n in range(m + 1))
            assert torch.cat(totals, 2)[b, h, m].item() == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("form", ["log", "power"])
def test_dape(form):
    # Zheng et al. 2024, equation 5; ParallelKerpleLog_DAPE of DAPE.py in chuanyang-Zheng/DAPE: the logits of all heads
    # are the first inputs of the network, their biases the last.
    encoding = make(f"dape(form='{form}')")
    put(encoding, r1=R1, r2=R2)
    given, q, k, _ = ask(encoding)
    signs = set()
    for b, h, t, s in pairs(encoding):
        n = APART[t - QUERIES] - APART[s]
        scores = [content(q[b][g][t], k[b][g][s]) for g in range(4)]
        biases = [kerple_bias(form, R1[g], R2[g], n) for g in range(4)]
        hidden = [u if u > 0 else 0.01 * u for u in linear(encoding.inner, scores + biases)]
        signs |= {u > 0 for u in hidden}
        expected = scores[h] + biases[h] + linear(encoding.outer, hidden)[h]
        assert given[b][h][t][s] == pytest.approx(expected, abs=EXACT)
    assert signs == {True, False}


def test_randomized():
    # Ruoss et al. 2023, section 3; noisy_fixed_positional_encodings in google-deepmind/randomized_positional_encodings:
    # drawn without replacement from 0 ... L - 1, then sorted. The authors draw in evaluation too; here it takes even
    # steps, the project's own choice.
    encoding = make("randomized")
    limit, index = 16 * 16, torch.arange(16)

    def drawn(seed):
        encoding.train().redraw(16, torch.Generator().manual_seed(seed), "cpu")
        return encoding.positions(index, 16).tolist()

    several = [drawn(seed) for seed in range(200)]
    for positions in several:
        assert positions == sorted(set(positions)) and len(positions) == 16
        assert positions[0] >= 0 and positions[-1] < limit
    assert drawn(7) == several[7] != several[8]
    # Uniform: the expectation of the m-th smallest of 16 out of L is m (L + 1) / 17 - 1; its deviation here is below 2.
    for m in range(16):
        assert sum(row[m] for row in several) / 200 == pytest.approx((m + 1) * (limit + 1) / 17 - 1, abs=8)
    encoding.eval()
    assert encoding.positions(index, 16).tolist() == [16 * p for p in range(16)]
    assert encoding.positions(torch.tensor([5, 99]), 100).tolist() == [10, 198]
    assert encoding.positions(torch.tensor([5, 299]), 300).tolist() == [5, 299]


@pytest.mark.parametrize("train", [True, False])
def test_randomized_over_nothing_more_is_its_inner_encoding(train):
    encoding = make("randomized(length=16)").train(train)
    encoding.redraw(16, torch.Generator().manual_seed(0), "cpu")
    assert encoding.positions(torch.arange(16), 16).tolist() == list(range(16))
    compare(encoding, lambda q, k, i, j, h: content(turned(q, i, theta(8)), turned(k, j, theta(8))))
    slopes = alibi_slopes(4, "authors")
    encoding = make("randomized(inner='alibi', length=16)").train(train)
    compare(encoding, lambda q, k, i, j, h: content(q, k) - slopes[h] * (i - j))

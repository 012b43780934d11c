"""The positional encodings that everybody should know, in teaching order: each answers what the one before left open.

    none        nothing but the causal mask: what does a decoder know of order by itself?
    sinusoidal  fixed waves, added to the embeddings
    learned     a learned vector for every position, added to the embeddings
    t5          one scalar for every distance, added to the logits: distance is what counts
    alibi       the same place, without anything learned: far keys simply fade
    rope        queries and keys turn, so that their product knows the distance; and its scalings stretch it

They subclass `Encoding` (core/encoding.py), which lists the places where position can enter. The other encodings stand
in zoo/, in chapters by those places. `ENCODINGS` maps the names of all of them to their classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from core.encoding import ENCODINGS, Encoding, along_heads
from core.specs import build, check, derives, every, members, merge, parse, sights, tempers, title, written

# Import encodings and their language from here: this module has loaded all of them.
__all__ = [
    "ENCODINGS", "Encoding", "build", "check", "derives", "every", "members", "merge", "parse", "sights", "tempers",
    "title", "written",
]  # fmt: skip

FAR = 1 << 15  # positions from which on `angles` takes care of whole turns


class NoPE(Encoding):
    """No positional encoding (NoPE): the causal mask alone tells a decoder where it is.

    Costs nothing. In distribution a causal decoder without any encoding comes close to one that has it (Haviv et al.
    2022; Kazemnejad et al. 2023). Past T attention spreads over more keys than it ever saw, and the loss rises early.
    Trap: an encoder without positions is blind to order, a causal decoder is not.
    """

    name = "none"
    standing = "alive"
    relative = True
    positionless = True


class Sinusoidal(Encoding):
    """Fixed sines and cosines added to the token embeddings (Vaswani et al. 2017, section 3.5).

        PE[p, 2i] = sin(p w_i),  PE[p, 2i+1] = cos(p w_i),  w_i = base^(-2i/C),  i = 0 ... C/2 - 1

    No parameters. Every position has a code, yet past T the loss climbs steeply: the layers above learned sums of token
    and T codes, and now meet others. Trap: a longer table is not extrapolation.
    """

    name = "sinusoidal"
    standing = "control"
    arguments = {"base": 10000.0}
    shared = True

    def setup(self):
        self.require(self.n_embd % 2 == 0, f"n_embd must be even, not {self.n_embd}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")

    def embed(self, pos):
        return sinusoids(pos, self.n_embd, self.base)


class Learned(Encoding):
    """A learned vector for every position, added to the token embeddings (GPT-2; Radford et al. 2019).

        x + W[p],  W of T x C drawn from N(0, 0.02)

    T C parameters. There is no row past T, which is an error here and never a silent crop. Ways out, none of them good:
    `overflow="clamp"` gives every later token the last row, `overflow="interpolate"` with `factor` f reads the table at
    p/f, between two rows (fine-tune after it).
    """

    name = "learned"
    standing = "history"
    arguments = {"overflow": ("error", "clamp", "interpolate"), "factor": 8.0}
    forms = {"overflow": {"interpolate": ("factor",)}}
    shared = True
    unbounded = 'learned(overflow="clamp")'
    stretches = ('learned(overflow="clamp")', 'learned(overflow="interpolate")')

    def setup(self):
        self.require(self.factor >= 1, f"factor must be at least 1, not {self.factor}")
        self.weight = nn.Parameter(torch.empty(self.train_length, self.n_embd))
        self.max_length = {
            "error": self.train_length,
            "clamp": math.inf,
            "interpolate": int(self.train_length * self.factor),
        }[self.overflow]
        self.way_out = (
            "a learned table has no rows past its training length. Re-encode the last T tokens at every step (--crop), "
            """or set posenc to 'learned(overflow="clamp")' or 'learned(overflow="interpolate", factor=8)'"""
        )

    def init_parameter(self, name, parameter, generator):
        parameter.normal_(std=0.02, generator=generator)

    def embed(self, pos):
        if self.overflow != "interpolate":
            return F.embedding(pos.clamp(max=self.train_length - 1), self.weight)
        place = pos.to(self.weight.dtype) / self.factor
        low = place.long().clamp(max=self.train_length - 1)
        high = (low + 1).clamp(max=self.train_length - 1)
        return torch.lerp(F.embedding(low, self.weight), F.embedding(high, self.weight), (place - low)[:, None])


class T5(Encoding):
    """One learned scalar for every head and bucket of distances, added to the logits (Raffel et al. 2020, section 2.1).

        b = w[h, bucket(n)],  bucket(n) = n for n < E, else E + floor(ln(n / E) / ln(M / E) E) and at most 2E - 1

    with 2E = 32 buckets, M = 128: the last bucket begins at n = 113 and holds all distances beyond, so nothing is
    undefined past T, and the loss stays near its value at T for a while. `bidirectional=True` is the encoder's
    rule: half of the buckets for each direction (a decoder uses one half). One table for all layers: 2E H
    parameters, starting at zero. Trap: it is a scalar on the logits of self-attention, not a vector added to keys
    or values.
    """

    name = "t5"
    standing = "control"
    arguments = {"buckets": 32, "max_distance": 128, "bidirectional": False}
    shared = True
    relative = True

    def setup(self):
        self.exact = self.buckets // (4 if self.bidirectional else 2)  # distances with a bucket of their own
        even = 4 if self.bidirectional else 2
        self.require(
            self.buckets >= even and self.buckets % even == 0,
            f"buckets must be a multiple of {even}, not {self.buckets}",
        )
        self.require(self.max_distance > self.exact, f"max_distance must be above {self.exact}")
        self.weight = nn.Parameter(torch.empty(self.buckets, self.n_head))

    def bucket(self, n):
        """n of any sign, int64 -> buckets of the same shape. Later keys share bucket 0, or have their half."""
        distance = n.abs() if self.bidirectional else n.clamp(min=0)
        # float32 as in the authors' code; n = 113 and not 112 opens the last bucket in float64 too
        spread = torch.log(distance.clamp(min=1) / self.exact) / math.log(self.max_distance / self.exact)
        wide = (self.exact + (spread * self.exact).long()).clamp(max=2 * self.exact - 1)
        bucket = torch.where(distance < self.exact, distance, wide)
        return bucket + (n < 0) * 2 * self.exact if self.bidirectional else bucket

    def distance_bias(self, n):
        return F.embedding(self.bucket(n), self.weight).movedim(-1, 0)


class ALiBi(Encoding):
    """Attention with linear biases (Press et al. 2021, section 3): logits fall with distance, head by head.

        b = -m_h n,  m_h = 2^(-8h/H),  h = 1 ... H

    For H not a power of two there are two published rules. `slopes="authors"`, the code's, takes the slopes of the next
    lower power P and every other slope of 2P: 12 heads get .5 ... .0039, then .7071, .3536, .1768, .0884.
    `slopes="paper"` is the formula as it stands, and "harmonic" is 1/h. `heads` is the share that has slopes: with half
    of them, harmonic, it is NAPE (Vasylenko et al. 2025), whose other heads see all keys alike. No parameters. Past T
    the loss stays flat: far keys have faded out already, which is also why it gains little from a longer context;
    heads without a slope see far, and spread. Traps: the bias is not divided by sqrt(D), and bfloat16 would merge most
    of its values; NAPE's authors sharpen the heads without slopes alone, and a temper here sharpens all.
    """

    name = "alibi"
    standing = "control"
    arguments = {"slopes": ("authors", "paper", "harmonic"), "heads": 1.0}
    relative = True
    variants = ('alibi(slopes="harmonic", heads=0.5)',)

    def setup(self):
        count = round(self.heads * self.n_head)
        self.require(1 <= count <= self.n_head, f"heads must be a share that gives 1 ... {self.n_head} heads a slope")
        slope = slopes(count, self.slopes) + [0.0] * (self.n_head - count)
        self.register_buffer("slope", torch.tensor(slope), persistent=False)

    def distance_bias(self, n):
        return -along_heads(self.slope, n) * n


def slopes(heads, rule):
    """alibi's slopes for so many heads, by one of its rules."""
    if rule == "harmonic":
        return [1 / h for h in range(1, heads + 1)]

    def powers(heads):
        return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]

    lower = 2 ** int(math.log2(heads)) if rule == "authors" else heads
    return powers(lower) + powers(2 * lower)[::2][: heads - lower]


class RoPE(Encoding):
    """Rotary position embedding: pairs of dimensions turn by an angle proportional to position (Su et al. 2021).

        (x_m, x_{m+D/2}) turned by p w_m,  w_m = base^(-2m/D),  m = 0 ... D/2 - 1

    Turning the query by i w and the key by j w leaves only i - j in their product. Pairs are (m, m + D/2), as in
    GPT-NeoX and Llama. No parameters; the fused attention kernel stays. Past about 1.1 to 1.25 T (docs/log.md) the loss
    rises: the slow pairs, which never finish a turn within T, reach angles that training never showed.

    `fraction` p is p-RoPE (Barbero et al. 2024, appendix D): only the int(p D/2) highest frequencies turn, the other
    pairs take part unrotated. fraction=1 is RoPE, fraction=0 is none. `dims` r is GPT-NeoX's partial rotation, of the
    first r dimensions, with exponents over r. Traps: frequencies descend with m, so the *last* pairs are the slow ones;
    and a module that is not told positions turns every cached step as position 0.

    `scaling` stretches a trained model by `factor` s (T is the length it was trained at, d = dims or D):

        linear    w / s: position interpolation (Chen et al. 2023). Fine-tune after it: untrained it loses a lot
        ntk       base' = base s^(d/(d-2)): the highest frequency stays, the lowest is divided by s (bloc97, 2023)
        dynamic   ntk with s replaced by s L/T - (s - 1), where L = max(length of the context, T): with factor=1,
                  just as far as needed (emozilla, 2023)
        yarn      between w for pairs that turn over beta_fast times in T and w / s for those below beta_slow, linear in
                  m as in the authors' code, from and to whole m unless truncate=False; cos and sin times .1 ln s + 1
                  (Peng et al. 2023)
        llama3    w for wavelengths below T / high_freq_factor, w / s above T / low_freq_factor, smooth between
        longrope  w_m divided by long_factor[m], or short_factor[m] up to T; cos and sin times sqrt(1 + ln s / ln T)
                  (Ding et al. 2024, whose factors a search finds for each model)

    yarn and longrope take another factor on cos and sin from attention_factor. dynamic and longrope change with the
    length of the context, so the cache then holds keys unrotated; and that is the length it will have in the end: the
    same prompt and seed continue otherwise where more tokens are asked for. A scaling laid over another one begins with
    its own defaults, and scaling="none" turns it off.

    What is slow can also be taken out, after any scaling: `cut` c stops all pairs whose turn takes more than c tokens,
    for c = T those that never showed a whole turn; `clip` fades the last pairs, that share of all, to 0 along a cosine,
    which its authors call CoPE (Li et al. 2026, .31 there). `values` turns values as keys, and what attention returns
    back by the query's angle, so that values are relative too (DeepSeek V4's code).

    `learned` frequencies are GRAPE-M's (Zhang et al. 2025): every layer has its own w_m = e^(z_m / 16), which begin as
    those of `base`. The 16, their code's, slows them down, since an angle at position p moves p times as far as w.
    """

    name = "rope"
    standing = "alive"
    arguments = {
        "base": 10000.0, "fraction": 1.0, "dims": 0,
        "scaling": ("none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"), "factor": 8.0,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "short_factor": [], "long_factor": [], "attention_factor": 0.0, "cut": 0, "clip": 0.0, "values": False,
        "learned": False,
    }  # fmt: skip
    forms = {"scaling": {
        "linear": ("factor",),
        "ntk": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("factor", "short_factor", "long_factor", "attention_factor"),
    }}  # fmt: skip
    shared = True
    relative = True
    variants = ("rope(fraction=0.75)", "rope(dims=8)", "rope(values=True)", "rope(learned=True)")
    stretches = (
        'rope(scaling="linear")', 'rope(scaling="ntk")', 'rope(scaling="dynamic", factor=1)', 'rope(scaling="yarn")',
        'rope(scaling="llama3")', "rerope", "self_extend", "dca", "string",
    )  # fmt: skip

    def setup(self):
        self.dims = self.dims or self.head_dim
        self.require(self.dims % 2 == 0, f"the number of rotated dimensions must be even, not {self.dims}")
        self.require(0 < self.dims <= self.head_dim, f"dims must lie in 1 ... {self.head_dim}, the width of a head")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        self.require(0 <= self.fraction <= 1, f"fraction must lie in 0 ... 1, not {self.fraction}")
        self.require(self.factor >= 1, f"factor must be at least 1, not {self.factor}")
        given = self.scaling != "none" or self.factor == RoPE.arguments["factor"]
        self.require(given, "factor does nothing without a scaling; add scaling='yarn', say")
        self.require(self.scaling not in ("ntk", "dynamic") or self.dims > 2, f"{self.scaling} needs more than 2 dims")
        self.require(self.beta_fast > self.beta_slow > 0, "beta_fast must be above beta_slow, and both above 0")
        self.require(self.attention_factor >= 0, f"attention_factor must not be negative, is {self.attention_factor}")
        self.require(self.high_freq_factor > self.low_freq_factor > 0, "high_freq_factor must be above low_freq_factor")
        if self.scaling == "longrope":
            self.require(self.train_length > 1, "longrope needs a training length above 1")
            for key in ("short_factor", "long_factor"):
                form = f"longrope needs {key}=[...] with {self.dims // 2} numbers above 0, one for each pair"
                factors = getattr(self, key)
                self.require(len(factors) == self.dims // 2, form)
                self.require(all(type(x) in (int, float) and 0 < x < 1e30 for x in factors), form)
        self.require(self.cut >= 0, f"cut must be a number of tokens, or 0 for none, not {self.cut}")
        self.require(0 <= self.clip <= 1, f"clip must lie in 0 ... 1, not {self.clip}")
        self.by_length = self.scaling in ("dynamic", "longrope")
        self.rotate_once = not self.by_length
        self.turns_values = self.__dict__.pop("values")  # The argument would hide the hook of that name.
        fits = self.rotate_once or not self.turns_values
        self.require(fits, f"values that turn need a scaling other than {self.scaling}")
        self.shared = not self.learned
        self.slowed = nn.Parameter(torch.empty(self.dims // 2)) if self.learned else None  # 16 ln w

    def init_parameter(self, name, parameter, generator):
        parameter.copy_(16 * frequencies(self.dims, self.base, parameter.dtype, parameter.device).log())

    def rotate(self, pairs):
        return self.turn(pairs.q, pairs.i, pairs.length), self.turn(pairs.k, pairs.j, pairs.length)

    def turn_values(self, v, pos, back=False):
        return self.turn(v, pos, back=back, magnify=False)

    def turn(self, x, pos, length=0, back=False, magnify=True):
        """x (B, H, T, D) at positions pos (T,), turned by their angles, or `back` by these. magnify: with the scaling's
        factor on cos and sin."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (pos, dtype, length, magnify)
        cos, sin = self.once_per_weights(key, lambda: self.table(pos, dtype, length, magnify))  # (T, dims/2) each
        sin = -sin if back else sin
        a, b, rest = x.to(dtype).split((self.dims // 2, self.dims // 2, self.head_dim - self.dims), dim=-1)
        turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
        return torch.cat((*turned, rest), dim=-1).to(x.dtype)

    def frequency(self, length, dtype, device=None):
        """Frequencies (dims/2,) in a context of `length` tokens, 0 for pairs that stay; and the factor on cos, sin."""
        if self.learned:
            frequency = (self.slowed.to(dtype) / 16).exp()
        else:
            frequency = frequencies(self.dims, self.base, dtype, device)
        frequency, magnitude = getattr(self, f"by_{self.scaling}")(frequency, max(length, self.train_length))
        pairs = torch.arange(self.dims // 2, device=device, dtype=dtype)
        turning = pairs < int(self.fraction * self.dims / 2)
        if self.cut:
            turning = turning & (frequency * self.cut >= 2 * math.pi)
        if faded := round(self.clip * self.dims / 2):
            k = (pairs - (self.dims // 2 - faded)).clamp(min=0)  # 0, ..., 0, 1, ... faded - 1
            frequency = frequency * (1 + torch.cos(math.pi * k / max(1, faded - 1))) / 2
        return frequency * turning, magnitude

    def table(self, pos, dtype, length, magnify=True):
        def frequency(dtype):
            return self.once_per_weights((length, dtype, pos.device), lambda: self.frequency(length, dtype, pos.device))

        angle, (_, magnitude) = angles(pos, dtype, lambda dtype: frequency(dtype)[0]), frequency(dtype)
        magnitude = magnitude if magnify else 1.0
        return angle.cos() * magnitude, angle.sin() * magnitude

    # The scalings: frequencies (dims/2,), length of the context -> scaled frequencies, factor on cos and sin.

    def by_none(self, w, length):
        return w, 1.0

    def by_linear(self, w, length):
        return w / self.factor, 1.0

    def by_ntk(self, w, length, stretch=None):
        m = torch.arange(self.dims // 2, device=w.device, dtype=w.dtype)
        return w * (stretch or self.factor) ** (-2 * m / (self.dims - 2)), 1.0

    def by_dynamic(self, w, length):
        return self.by_ntk(w, length, self.factor * length / self.train_length - (self.factor - 1))

    def by_yarn(self, w, length):
        def pair(turns):
            """The index, not rounded, of the pair that makes so many turns in T."""
            return self.dims * math.log(self.train_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dims - 1)
        m = torch.arange(self.dims // 2, device=w.device, dtype=w.dtype)
        slow = ((m - low) / max(high - low, 0.001)).clamp(0, 1)  # .001: a step, where the ramp has no width
        return w * (1 - slow) + w / self.factor * slow, self.attention_factor or 0.1 * math.log(self.factor) + 1

    def by_llama3(self, w, length):
        turns = self.train_length * w / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return w * keep + w / self.factor * (1 - keep), 1.0

    def by_longrope(self, w, length):
        factors = self.long_factor if length > self.train_length else self.short_factor
        magnitude = self.attention_factor or math.sqrt(1 + math.log(self.factor) / math.log(self.train_length))
        return w / torch.tensor(factors, device=w.device, dtype=w.dtype), magnitude


def frequencies(dim, base, dtype=torch.float32, device=None):
    """w_m = base^(-2m/dim), m = 0 ... dim/2 - 1: the highest frequency first."""
    return base ** -(torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)


def angles(pos, dtype, frequency):
    """pos (T,), ascending -> (T, N), the angles p w, some of them less whole turns. frequency(dtype) gives w (N,).

    float32 would round p w to 2^-24 of itself, which from p = 2^20 on is much of a turn, and p itself from 2^24 on. So
    what p has above its last 15 bits turns by a step of its own, w 2^15, that is known without its whole turns. Below
    2^15 there is none of that: the angle is p w to the last bit. On MPS, which has no float64, the step is rounded.
    """
    # Reading a position from a GPU would make the CPU wait.
    near = pos.device.type == "cpu" and not torch.compiler.is_compiling() and pos[-1] < FAR
    if near or dtype == torch.float64:
        return pos[:, None].to(dtype) * frequency(dtype)
    exact = torch.float32 if pos.device.type == "mps" else torch.float64
    high = pos // FAR
    step = (frequency(exact) * FAR).remainder(2 * math.pi)
    far = (high[:, None].to(exact) * step).remainder(2 * math.pi)
    return (pos - high * FAR)[:, None].to(dtype) * frequency(dtype) + far.to(dtype)


def sinusoids(pos, dim, base, dtype=torch.float32):
    """pos (T,) -> (T, dim), sines at even columns and cosines at odd ones (Vaswani et al. 2017)."""
    angle = angles(pos, dtype, lambda dtype: frequencies(dim, base, dtype, pos.device))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


import zoo  # noqa: F401  # last, as its chapters build on the classes above

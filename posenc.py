"""Positional encodings, one class each, and the registry that makes each of them one flag.

Attention by itself is a function of a set. Position can enter a transformer at a few places, and an encoding is a class
that overrides the hooks it needs:

    embed(pos)                         (T,) -> (T, C)          added to the token embeddings
    rotate(q, k, q_pos, k_pos)         -> q, k                 queries (B, H, T, D), keys (B, H_kv, S, D), transformed
    distance_bias(n)                   (...) -> (H, ...)       added to the logits, from the distance n = i - j alone
    bias(q_pos, k_pos)                 -> (H, T, S)            the same where i and j themselves matter

Two rules prevent most bugs. Positions are explicit int64 tensors: nothing here derives a position from a shape, so a
cache, a shifted window or a random position needs no special case. Angles, distances and biases are computed in float32
(float64 when the model is) and cast last: bfloat16 cannot tell positions above 256 apart.

i is a query's position, j a key's, n = i - j >= 0, D the width of a head, C of the model, T the training length.
To add an encoding, write one class below. Its name is then a value of the `posenc` flag, and the tests and the
benchmark find it by themselves.
"""

import ast
import difflib
import math

import torch
import torch.nn.functional as F
from torch import nn

ENCODINGS = {}  # name -> class


class Encoding(nn.Module):
    """Base class: every hook does nothing. A subclass registers itself under its `name`.

    n_embd, n_head, n_kv_head, head_dim, train_length are the sizes of the model, layer is the layer this instance
    serves. `arguments` maps what the flag may set, as in `rope(base=500000)`, to its default; a tuple lists the allowed
    values, the default first. Each becomes an attribute before `setup` runs.
    """

    name = None  # the flag's value
    arguments = {}
    shared = False  # one instance serves all layers
    relative = False  # logits do not change when all positions shift by the same amount
    rotate_once = True  # a rotated key stays true as the context grows, so the cache holds it rotated
    max_length = math.inf  # positions that exist are 0 ... max_length - 1
    way_out = ""  # what to do past max_length
    unbounded = None  # the flag's value that gives it positions without end, where its default has none

    def __init_subclass__(cls):
        if cls.name:
            ENCODINGS[cls.name] = cls

    def __init__(self, n_embd, n_head, n_kv_head, head_dim, train_length, layer, **arguments):
        super().__init__()
        self.n_embd, self.n_head, self.n_kv_head, self.head_dim = n_embd, n_head, n_kv_head, head_dim
        self.train_length, self.layer = train_length, layer
        for key, value in self.checked(arguments).items():
            setattr(self, key, value)
        self.setup()

    @classmethod
    def checked(cls, given):
        """The arguments, defaults filled in. ValueError names an unknown one, or a value that is not allowed."""
        for key, value in given.items():
            if key not in cls.arguments:
                known = nearest(key, cls.arguments) if cls.arguments else "it takes no arguments"
                raise ValueError(f"{cls.name} has no argument '{key}'; {known}")
            default = cls.arguments[key]
            if isinstance(default, tuple):
                if value not in default:
                    raise ValueError(f"{cls.name}({key}={value!r}): choose from {', '.join(map(repr, default))}")
            elif type(value) is not type(default) and not (type(default) is float and type(value) is int):
                raise ValueError(f"{cls.name}({key}={value!r}): expected {type(default).__name__}, such as {default!r}")
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{cls.name}({key}={value!r}): expected a finite number")
        defaults = {key: value[0] if isinstance(value, tuple) else value for key, value in cls.arguments.items()}
        return defaults | given

    def setup(self):
        """Create parameters and check arguments (ValueError)."""

    def init_parameter(self, name, parameter, generator):
        """Draw the parameter called `name`, in place. Here: zeros."""
        parameter.zero_()

    def embed(self, pos):
        """pos (T,) -> (T, C) added to the token embeddings, or None."""
        return None

    def rotate(self, q, k, q_pos, k_pos):
        """q (B, H, T, D), k (B, H_kv, S, D), q_pos (T,), k_pos (S,) -> q, k of the same shapes and dtypes."""
        return q, k

    def distance_bias(self, n):
        """n >= 0, int64 of any shape -> (H, *n.shape), added to the logits after their division by sqrt(D), or None."""
        return None

    def bias(self, q_pos, k_pos):
        """q_pos (T,), k_pos (S,) -> (H, T, S) added to the logits, or None. The causal mask is not its business."""
        if type(self).distance_bias is Encoding.distance_bias:
            return None  # and no T x S tensor of distances
        return self.distance_bias((q_pos[:, None] - k_pos).clamp(min=0))

    def require(self, condition, message):
        if not condition:
            raise ValueError(f"{self.name}: {message}")


class NoPE(Encoding):
    """No positional encoding (NoPE): the causal mask alone tells a decoder where it is.

    Costs nothing. In distribution a causal decoder without any encoding comes close to one that has it (Haviv et al.
    2022; Kazemnejad et al. 2023). Past T attention spreads over more keys than it ever saw, and the loss rises early.
    Trap: an encoder without positions is blind to order, a causal decoder is not.
    """

    name = "none"
    relative = True


class Sinusoidal(Encoding):
    """Fixed sines and cosines added to the token embeddings (Vaswani et al. 2017, section 3.5).

        PE[p, 2i] = sin(p w_i),  PE[p, 2i+1] = cos(p w_i),  w_i = base^(-2i/C),  i = 0 ... C/2 - 1

    No parameters. Every position has a code, yet past T the loss climbs steeply: the layers above learned sums of token
    and T codes, and now meet others. Trap: a longer table is not extrapolation.
    """

    name = "sinusoidal"
    arguments = {"base": 10000.0}
    shared = True

    def setup(self):
        self.require(self.n_embd % 2 == 0, f"n_embd must be even, not {self.n_embd}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")

    def embed(self, pos):
        angle = angles(pos, self.n_embd, self.base)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)  # (T, C), sines at even columns


class Learned(Encoding):
    """A learned vector for every position, added to the token embeddings (GPT-2; Radford et al. 2019).

        x + W[p],  W of T x C drawn from N(0, 0.02)

    T C parameters. There is no row past T, which is an error here and never a silent crop. Ways out, none of them good:
    `overflow="clamp"` gives every later token the last row, `overflow="interpolate"` with `factor` f reads the table at
    p/f, between two rows (fine-tune after it).
    """

    name = "learned"
    arguments = {"overflow": ("error", "clamp", "interpolate"), "factor": 8.0}
    shared = True
    unbounded = 'learned(overflow="clamp")'

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


class RoPE(Encoding):
    """Rotary position embedding: pairs of dimensions turn by an angle proportional to position (Su et al. 2021).

        (x_m, x_{m+D/2}) turned by p w_m,  w_m = base^(-2m/D),  m = 0 ... D/2 - 1

    Turning the query by i w and the key by j w leaves only i - j in their product. Pairs are (m, m + D/2), as in
    GPT-NeoX and Llama. No parameters; the fused attention kernel stays. Past about 1.1 to 1.25 T the loss rises: the
    slow pairs, which never finish a turn within T, reach angles that training never showed.

    `fraction` p is p-RoPE (Barbero et al. 2024, appendix D): only the int(p D/2) highest frequencies turn, the other
    pairs take part unrotated. fraction=1 is RoPE, fraction=0 is none. Traps: frequencies descend with m, so the *last*
    pairs are the slow ones; and a module that is not told positions turns every cached step as position 0.
    """

    name = "rope"
    arguments = {"base": 10000.0, "fraction": 1.0}
    shared = True
    relative = True

    def setup(self):
        self.require(self.head_dim % 2 == 0, f"the width of a head must be even, not {self.head_dim}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        self.require(0 <= self.fraction <= 1, f"fraction must lie in 0 ... 1, not {self.fraction}")
        self.latest = None, None  # what a table was computed for, and the table

    def rotate(self, q, k, q_pos, k_pos):
        return self.turn(q, q_pos), self.turn(k, k_pos)

    def turn(self, x, pos):
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.table(pos, dtype)  # (T, D/2) each
        a, b = x.to(dtype).chunk(2, dim=-1)  # (B, H, T, D/2) each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    def table(self, pos, dtype):
        """Computed once for all layers of a call, which share the tensor `pos` itself; else a quarter of decoding."""
        key = (pos, dtype, torch.is_inference_mode_enabled())
        known, table = self.latest
        if known is None or known[0] is not pos or known[1:] != key[1:]:
            angle = angles(pos, self.head_dim, self.base, dtype)
            angle[:, int(self.fraction * self.head_dim / 2) :] = 0
            table = angle.cos(), angle.sin()
            if not torch.compiler.is_compiling():
                self.latest = key, table
        return table


class ALiBi(Encoding):
    """Attention with linear biases (Press et al. 2021, section 3): logits fall with distance, head by head.

        b = -m_h n,  m_h = 2^(-8h/H),  h = 1 ... H

    For H not a power of two, the authors' code takes the slopes of the next lower power P and every other slope of 2P:
    12 heads get .5 ... .0039, then .7071, .3536, .1768, .0884. No parameters. Past T the loss stays flat: far keys have
    faded out already, which is also why it gains little from a longer context. Traps: the bias is not divided by
    sqrt(D), and bfloat16 would merge most of its values.
    """

    name = "alibi"
    relative = True

    def setup(self):
        def powers(heads):
            return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]

        lower = 2 ** int(math.log2(self.n_head))
        slope = powers(lower) + powers(2 * lower)[::2][: self.n_head - lower]
        self.register_buffer("slope", torch.tensor(slope), persistent=False)

    def distance_bias(self, n):
        return -self.slope.view(-1, *[1] * n.dim()) * n


class T5(Encoding):
    """One learned scalar for every head and bucket of distances, added to the logits (Raffel et al. 2020, section 2.1).

        b = w[h, bucket(n)],  bucket(n) = n for n < E, else E + floor(ln(n / E) / ln(M / E) E) and at most 2E - 1

    with 2E = 32 buckets, M = 128: the last bucket begins at n = 113 and holds all distances beyond, so nothing is
    undefined past T, and the loss stays near its value at T for a while. One table for all layers: 2E H parameters,
    starting at zero. Trap: it is a scalar on the logits of self-attention, not a vector added to keys or values.
    """

    name = "t5"
    arguments = {"buckets": 32, "max_distance": 128}
    shared = True
    relative = True

    def setup(self):
        self.require(self.buckets >= 2 and self.buckets % 2 == 0, f"buckets must be even, not {self.buckets}")
        self.require(self.max_distance > self.buckets // 2, f"max_distance must be above {self.buckets // 2}")
        self.weight = nn.Parameter(torch.empty(self.buckets, self.n_head))

    def bucket(self, n):
        exact = self.buckets // 2
        # float32 as in the authors' code; n = 113 and not 112 opens the last bucket in float64 too
        spread = torch.log(n.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        return torch.where(n < exact, n, (exact + (spread * exact).long()).clamp(max=self.buckets - 1))

    def distance_bias(self, n):
        return F.embedding(self.bucket(n), self.weight).movedim(-1, 0)


def angles(pos, dim, base, dtype=torch.float32):
    """p w_m for pos (T,) -> (T, dim/2), with w_m = base^(-2m/dim), m = 0 ... dim/2 - 1: the highest frequency first."""
    exponent = torch.arange(0, dim, 2, device=pos.device, dtype=dtype) / dim
    return pos[:, None].to(dtype) * base**-exponent


def nearest(word, known, cutoff=0.6):
    """'did you mean X?', or all that is known where nothing is as similar as `cutoff`."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"did you mean '{match[0]}'?" if match else f"choose from {', '.join(known)}"


def parse(spec):
    """'rope(base=5e5)' -> (RoPE, {'base': 5e5}). Arguments are literals, never evaluated; ValueError says what is off.

    A name or a call as an argument, such as randomized(inner=rope(base=5e5)), stays a string for the encoding to parse.
    """
    wrong = f"posenc {spec!r} is not a name or name(argument=value, ...)"
    try:
        node = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(wrong) from None
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(wrong)
    name, arguments = call.func.id, {}
    if name not in ENCODINGS:
        raise ValueError(f"no positional encoding is called '{name}'; {nearest(name, ENCODINGS)}")
    for keyword in call.keywords:
        if keyword.arg in arguments:
            raise ValueError(f"posenc {spec!r} gives {keyword.arg} twice")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            if not isinstance(keyword.value, ast.Name | ast.Call):
                raise ValueError(wrong) from None
            arguments[keyword.arg] = ast.unparse(keyword.value)
    ENCODINGS[name].checked(arguments)
    return ENCODINGS[name], arguments


def same(spec, other):
    """Whether two values of the flag name the same encodings, whatever their arguments."""
    one, two = ([parse(text)[0] for text in ([value] if isinstance(value, str) else value)] for value in (spec, other))
    return one == two


def build(spec, n_layer, **sizes):
    """One encoding for every layer from `spec`, a string or a list of strings that is cycled over the layers."""
    parsed = [parse(text) for text in ([spec] if isinstance(spec, str) else spec)]
    if not parsed:
        raise ValueError("posenc is an empty list; name at least one encoding")
    for cls, _ in parsed:
        if len(parsed) > 1 and cls.embed is not Encoding.embed:
            raise ValueError(f"{cls.name} acts before the first layer, so it cannot stand in a list over the layers")
    one, layers = {}, []  # the instances that serve several layers
    for layer in range(n_layer):
        cls, arguments = parsed[layer % len(parsed)]
        key = (cls, repr(arguments))
        if key not in one or not cls.shared:
            one[key] = cls(**sizes, layer=layer, **arguments)
        layers.append(one[key])
    return layers


def merge(spec, override):
    """`override` laid over `spec`: arguments given again for the same encoding replace its own, the others stay. In a
    list over the layers that is done for the members of that encoding, where there are any."""
    if not isinstance(override, str):
        return override
    if not isinstance(spec, str):
        ours = [parse(member)[0] is parse(override)[0] for member in spec]
        return [merge(m, override) if own else m for m, own in zip(spec, ours, strict=True)] if any(ours) else override
    (old, old_arguments), (new, new_arguments) = parse(spec), parse(override)
    if old is not new:
        return override
    arguments = ", ".join(f"{key}={value!r}" for key, value in (old_arguments | new_arguments).items())
    return f"{new.name}({arguments})" if arguments else new.name

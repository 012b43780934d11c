"""Positional encodings, one class each, and the registry that makes each of them one flag.

Attention by itself is a function of a set. Position can enter a transformer at a few places, and an encoding is a class
that overrides the hooks it needs:

    embed(pos)                                (T,) -> (T, C)    added to the token embeddings
    ffn(pos, width)                           (T,) -> (T, width) added inside the feed-forward layer
    rotate(q, k, q_pos, k_pos, length)        -> q, k           queries (B, H, T, D), keys (B, H_kv, S, D), transformed
    distance_bias(n)                          (...) -> (H, ...) added to the logits, from the distance n = i - j alone
    bias(q_pos, k_pos)                        -> (H, T, S)      the same where i and j themselves matter
    logits(q, k, q_pos, k_pos, seen, **state) -> (B, H, T, S)   where the content matters too
    values(weights, q_pos, k_pos)             -> (B, H, T, D)   added to what attention reads

Two rules prevent most bugs. Positions are explicit int64 tensors: nothing here derives a position from a shape, so a
cache, a shifted window or a random position needs no special case. Angles, distances and biases are computed in float32
(float64 when the model is) and cast last: bfloat16 cannot tell positions above 256 apart.

i is a query's position, j a key's, n = i - j >= 0, D the width of a head, C of the model, H the number of heads, T the
training length. To add an encoding, write one class below. Its name is then a value of the `posenc` flag, and the
tests, the benchmark and the gallery find it by themselves.
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
    chunk = math.inf  # queries whose logits a CPU does well to compute at once: few, where each costs much
    max_length = math.inf  # positions that exist are 0 ... max_length - 1
    way_out = ""  # what to do past max_length
    unbounded = None  # the flag's value that gives it positions without end, where its default has none
    variants = ()  # further values of the flag that are worth training, testing and showing
    stretches = ()  # values of the flag to try on a finished run of this encoding, at test time

    def __init_subclass__(cls):
        cls.embeds = cls.embed is not Encoding.embed
        cls.biases = cls.bias is not Encoding.bias or cls.distance_bias is not Encoding.distance_bias
        cls.folds = cls.fold is not Encoding.fold
        cls.keeps = cls.state is not Encoding.state
        # A table of distances holds the bias, and those are distances between tokens.
        cls.by_distance = cls.distance_bias is not Encoding.distance_bias and cls.positions is Encoding.positions
        cls.writes_out = cls.logits is not Encoding.logits or cls.values is not Encoding.values  # no fused kernel
        if cls.name:
            ENCODINGS[cls.name] = cls

    def __init__(self, n_embd, n_head, n_kv_head, head_dim, train_length, layer, **arguments):
        super().__init__()
        self.sizes = dict(
            n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, train_length=train_length, layer=layer
        )
        self.kept = {}  # see `once`
        for key, value in (self.sizes | self.checked(arguments)).items():
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
            elif isinstance(value, int | float) and not abs(value) < 1e30:
                raise ValueError(f"{cls.name}({key}=...): numbers go to 1e30")
        defaults = {key: value[0] if isinstance(value, tuple) else value for key, value in cls.arguments.items()}
        return defaults | given

    def setup(self):
        """Create parameters and check arguments (ValueError)."""

    def init_parameter(self, name, parameter, generator):
        """Draw the parameter called `name`, in place. Here: matrices of linear layers from N(0, 1 / inputs), all else
        zeros."""
        parameter.zero_()
        if parameter.dim() == 2 and name.endswith(".weight"):
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)

    def redraw(self, length, generator, device):
        """Called before every training step with the length of its windows: the place for random positions."""

    def positions(self, pos, length):
        """Indices of tokens (T,) -> the positions that the hooks are given, in a context of `length` tokens."""
        return pos

    def embed(self, pos):
        """pos (T,) -> (T, C) added to the token embeddings, or None."""
        return None

    def ffn(self, pos, width):
        """pos (T,) -> (T, width) added before the activation of the feed-forward layer of that width, or None."""
        return None

    def rotate(self, q, k, q_pos, k_pos, length):
        """q (B, H, T, D), k (B, H_kv, S, D), q_pos (T,), k_pos (S,) -> q, k of the same shapes and dtypes.

        length: tokens in the whole context, including those to come, for what is scaled to it."""
        return q, k

    def distance_bias(self, n):
        """n >= 0, int64 of any shape -> (H, *n.shape), added to the logits after their division by sqrt(D). Whoever
        overrides it promises that `bias` is nothing else: on a GPU a kernel may read it from a table."""

    def bias(self, q_pos, k_pos):
        """q_pos (T,), k_pos (S,) -> (H, T, S) added to the logits. The causal mask is not its business."""
        return self.distance_bias(distances(q_pos, k_pos))

    def fold(self, q, k, k_pos):
        """Wider q and k, in half precision, whose products hold the bias but for a part that all keys of a query share,
        which softmax cancels: so the fused kernel computes it. Only for whoever `folds`."""

    def state(self, x, last):
        """The layer's input x (B, T, C) -> {name: (B, H, T, any)} to keep for every token, as its key is kept, and to
        give to `logits`. last: the same of the token before, or {}."""
        return {}

    def logits(self, q, k, q_pos, k_pos, seen, **state):
        """q (B, H, T, D), k (B, H, S, D), both as `rotate` left them, seen (T, S) bool, state (B, H, S, any) ->
        (B, H, T, S). The queries are the last T of the keys' tokens, but for unused keys of a fixed cache, which lie
        behind them and are not seen. Whoever overrides it gives up the fused kernel."""
        logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        return logits + self.bias(q_pos, k_pos).masked_fill(~seen, -math.inf) if self.biases else logits

    def values(self, weights, q_pos, k_pos):
        """weights of attention (B, H, T, S) -> (B, H, T, D) added to their mean of the values, or None."""
        return None

    def require(self, condition, message):
        if not condition:
            raise ValueError(f"{self.name}: {message}")

    def once(self, key, compute):
        """compute(), or what it gave for the same key before. A tensor in the key is itself alone, not its equals: all
        layers of a call share their tensors of positions."""
        if torch.compiler.is_compiling():
            return compute()
        mark = (torch.is_inference_mode_enabled(), *(id(part) if torch.is_tensor(part) else part for part in key))
        if mark not in self.kept:
            self.kept = dict(list(self.kept.items())[-3:])
            self.kept[mark] = key, compute()  # the key too, or another tensor could get its id
        return self.kept[mark][1]

    def once_per_weights(self, key, compute):
        """The same for what depends on the parameters: computed anew where gradients flow, and after training."""
        if torch.is_grad_enabled():
            return compute()
        return self.once((*key, *((p.data_ptr(), p._version) for p in self.parameters())), compute)

    def train(self, mode=True):
        self.kept = {}  # fused optimisers change parameters without telling their version
        return super().train(mode)

    def __getstate__(self):
        return self.__dict__ | {"kept": {}}  # a copy has other tensors, and the ids of some may be the same

    def _apply(self, fn, recurse=True):
        # A model cast to half precision keeps its encodings in float32: bfloat16 merges distances above 256.
        def keep(x):
            y = fn(x)
            return x.to(y.device, torch.float32) if y.dtype in (torch.bfloat16, torch.float16) else y

        return super()._apply(keep, recurse)


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
        return sinusoids(pos, self.n_embd, self.base)


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


class Fourier(Encoding):
    """A learned function of position: sines of learned frequencies through a small network (after Li et al. 2021).

        PE[p] = W2 gelu(W1 [cos(p w), sin(p w), ln(1 + p)]),  w of C/2 frequencies drawn log-uniform in [1e-4, 1]

    Added to the token embeddings; about 2 C^2 parameters, whatever the length. Without the network and at the fixed
    frequencies of `sinusoidal` it is that encoding. Past T it is defined everywhere and trained nowhere: the network
    meets phases of its slow waves, and logarithms, that it never saw, and the loss climbs as it does for sinusoids.
    """

    name = "fourier"
    shared = True

    def setup(self):
        self.frequency = nn.Parameter(torch.empty(self.n_embd // 2))
        self.inner = nn.Linear(2 * (self.n_embd // 2) + 1, self.n_embd)
        self.outer = nn.Linear(self.n_embd, self.n_embd)

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name == "frequency":
            parameter.uniform_(math.log(1e-4), 0, generator=generator).exp_()

    def embed(self, pos):
        with torch.autocast(pos.device.type, enabled=False):
            p = pos[:, None].to(self.frequency.dtype)
            angle = p * self.frequency
            features = torch.cat((angle.cos(), angle.sin(), torch.log1p(p)), dim=-1)  # (T, C + 1)
            return self.outer(F.gelu(self.inner(features)))


class Recurrent(Encoding):
    """Every position's vector from the one before it (the discrete form of FLOATER, Liu et al. 2020).

        learned:  PE[p] = PE[p-1] + W2 gelu(W1 norm(PE[p-1])),  PE[0] learned
        linear:   x_p = 2 cos(w) x_{p-1} - x_{p-2}, which is sin(p w) or cos(p w): exactly `sinusoidal`

    Added to the token embeddings. learned has 2 C^2 parameters and takes T small steps one after the other, rolled out
    once a training step and once per weights afterwards. Past T it goes on from where it was, into places that training
    never saw. Trap: the two-term form drifts (by .39 at p = 16,000 for w = .001, in float32), so linear is rolled out
    as products of rotations in float64.
    """

    name = "recurrent"
    arguments = {"form": ("learned", "linear"), "base": 10000.0}
    shared = True

    def setup(self):
        self.require(self.n_embd % 2 == 0, f"n_embd must be even, not {self.n_embd}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        if self.form == "learned":
            self.start = nn.Parameter(torch.empty(self.n_embd))
            self.inner, self.outer = nn.Linear(self.n_embd, self.n_embd), nn.Linear(self.n_embd, self.n_embd)

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name == "start":
            parameter.normal_(generator=generator)

    def embed(self, pos):
        rows = rows_beyond(pos[-1], self.train_length)
        if self.form == "linear":
            table = self.once((rows, pos.device), lambda: self.roll_linear(rows).to(pos.device))
        else:
            table = self.once_per_weights((rows,), lambda: self.roll_learned(rows))
        return F.embedding(pos, table)

    @torch.compiler.disable  # which would unroll it
    def roll_learned(self, rows):
        with torch.autocast(self.start.device.type, enabled=False):
            x = [self.start]
            for _ in range(rows - 1):
                x.append(x[-1] + self.outer(F.gelu(self.inner(F.rms_norm(x[-1], x[-1].shape)))))
            return torch.stack(x)

    def roll_linear(self, rows):
        turn = torch.polar(torch.ones(self.n_embd // 2).double(), frequencies(self.n_embd, self.base, torch.float64))
        turned = turn.expand(rows - 1, -1).cumprod(dim=0)
        turned = torch.cat((torch.ones_like(turn)[None], turned))
        return torch.stack((turned.imag, turned.real), dim=-1).flatten(-2).float()


class FeedForwardPE(Encoding):
    """Sinusoids added inside the feed-forward layers: attention gets no position (a proposal without a paper).

        FFN(x) = W2 act(W1 x + b1 + PE[p]),  PE the sinusoids of `sinusoidal`, as wide as the layer

    No parameters. What a position's own activations say of it reaches the others through the layers above. Past T it is
    as lost as other absolute codes.
    """

    name = "ffn"
    arguments = {"base": 10000.0}
    shared = True

    def setup(self):
        self.require(self.base > 1, f"base must be above 1, not {self.base}")

    def ffn(self, pos, width):
        return self.once((pos, width), lambda: sinusoids(pos, width + width % 2, self.base)[:, :width])


class ScaledBias(Encoding):
    """A learned scalar for every head and distance, inside the division by sqrt(D) (a proposal without a paper).

        softmax((q k^T + B) / sqrt(D)),  B[h, min(n, T - 1)] starting at zero

    T H parameters a layer. Distances past T share the last entry, which only one query of a window trains, so the loss
    rises past T. Trap: what is learned counts 1 / sqrt(D) times as much as in `t5` or `alibi`: .5 acts as .0625 at
    D = 64.
    """

    name = "scaled_bias"
    relative = True

    def setup(self):
        self.weight = nn.Parameter(torch.empty(self.train_length, self.n_head))

    def distance_bias(self, n):
        return F.embedding(n.clamp(max=self.train_length - 1), self.weight).movedim(-1, 0) * self.head_dim**-0.5


class Shaw(Encoding):
    """Learned vectors for clipped distances, added to keys and to values (Shaw et al. 2018, equations 3 and 4).

        e_ij = q_i (k_j + aK[c]) / sqrt(D),  z_i = sum_j alpha_ij (v_j + aV[c]),  c = min(n, K)

    Shared by the heads of a layer; 2 (K + 1) D parameters a layer, as causal attention meets one direction only.
    Queries meet the table and not a T x T x D tensor of keys. Past T all far keys count as K away, a distance that
    training met all the time: the loss rises slowly, as attention spreads over more of them. `with_values=False`
    leaves aV out. Trap: this clipped table is often sold as Transformer-XL's.
    """

    name = "shaw"
    arguments = {"clip": 16, "with_values": True}
    relative = True
    variants = ("shaw(with_values=False)",)

    def setup(self):
        self.require(self.clip >= 1, f"clip must be at least 1, not {self.clip}")
        self.key = nn.Parameter(torch.empty(self.clip + 1, self.head_dim))
        self.value = nn.Parameter(torch.empty(self.clip + 1, self.head_dim)) if self.with_values else None

    def logits(self, q, k, q_pos, k_pos, seen):
        return super().logits(q, k, q_pos, k_pos, seen) + by_row(
            q * self.head_dim**-0.5, self.key.to(q.dtype), distances(q_pos, k_pos).clamp(max=self.clip)
        )

    def values(self, weights, q_pos, k_pos):
        if not self.with_values:
            return None
        row = distances(q_pos, k_pos).clamp(max=self.clip).expand_as(weights)
        of_rows = weights.new_zeros(*weights.shape[:3], self.clip + 1).scatter_add(-1, row, weights)
        return of_rows @ self.value.to(weights.dtype)  # the weights of a row's keys, summed, times the row


class TransformerXL(Encoding):
    """Transformer-XL's relative attention: fixed sinusoids of the distance, and four terms (Dai et al. 2019, sec. 3.3).

        (q_i k_j + q_i W r_n + u k_j + v W r_n) / sqrt(D),  r_n the sinusoid of n,  u, v learned for every head

    C^2 + 2 C parameters a layer; values are untouched. Train it with `--segments`, which reads a window segment by
    segment over the hidden states of the segment before (their gradient stopped): that, and not the bias, carried
    the paper's long contexts. Past T the projected sinusoids meet new phases, and the loss rises slowly. Traps: it is
    not a clipped table of 2 R + 1 rows, which is Shaw's; and W r depends on the weights alone, so decoding keeps it.
    """

    name = "transformer_xl"
    arguments = {"base": 10000.0}
    relative = True

    def setup(self):
        self.require(self.n_embd % 2 == 0, f"n_embd must be even, not {self.n_embd}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        self.project = nn.Linear(self.n_embd, self.n_head * self.head_dim, bias=False)
        self.u = nn.Parameter(torch.empty(self.n_head, 1, self.head_dim))
        self.v = nn.Parameter(torch.empty(self.n_head, 1, self.head_dim))

    def table(self, rows, device):
        """(rows, C): the projected sinusoids of all distances."""
        with torch.autocast(device.type, enabled=False):
            wave = sinusoids(torch.arange(rows, device=device), self.n_embd, self.base, self.project.weight.dtype)
            return self.project(wave)

    def logits(self, q, k, q_pos, k_pos, seen):
        n = distances(q_pos, k_pos)
        rows = rows_beyond(n[-1, 0], self.train_length)
        table = self.once_per_weights((rows,), lambda: self.table(rows, n.device)).to(q.dtype)
        table = table.unflatten(-1, (self.n_head, -1)).transpose(0, 1)  # (H, rows, D)
        q = q * self.head_dim**-0.5
        u, v = (x.to(q.dtype) * self.head_dim**-0.5 for x in (self.u, self.v))
        return (q + u) @ k.transpose(-2, -1) + by_row(q + v, table, n)


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
    length of the context, so the cache then holds keys unrotated.
    """

    name = "rope"
    arguments = {
        "base": 10000.0, "fraction": 1.0, "dims": 0,
        "scaling": ("none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"), "factor": 8.0,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "short_factor": [], "long_factor": [], "attention_factor": 0.0,
    }  # fmt: skip
    shared = True
    relative = True
    variants = ("rope(fraction=0.75)", "rope(dims=8)")
    stretches = (
        'rope(scaling="linear")', 'rope(scaling="ntk")', 'rope(scaling="dynamic", factor=1)', 'rope(scaling="yarn")',
        'rope(scaling="llama3")', "rerope", "self_extend",
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
                self.require(all(type(x) in (int, float) and x > 0 for x in factors), form)
        self.rotate_once = self.scaling not in ("dynamic", "longrope")

    def rotate(self, q, k, q_pos, k_pos, length):
        return self.turn(q, q_pos, length), self.turn(k, k_pos, length)

    def turn(self, x, pos, length=0):
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.once((pos, dtype, length), lambda: self.table(pos, dtype, length))  # (T, dims/2) each
        a, b, rest = x.to(dtype).split((self.dims // 2, self.dims // 2, self.head_dim - self.dims), dim=-1)
        turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
        return torch.cat((*turned, rest), dim=-1).to(x.dtype)

    def frequency(self, length, dtype, device=None):
        """Frequencies (dims/2,) in a context of `length` tokens, 0 for pairs that stay; and the factor on cos, sin."""
        frequency = frequencies(self.dims, self.base, dtype, device)
        frequency, magnitude = getattr(self, f"by_{self.scaling}")(frequency, max(length, self.train_length))
        turning = torch.arange(self.dims // 2, device=device) < int(self.fraction * self.dims / 2)
        return frequency * turning, magnitude

    def table(self, pos, dtype, length):
        frequency, magnitude = self.frequency(length, dtype, pos.device)
        angle = pos[:, None].to(dtype) * frequency
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


class XPos(RoPE):
    """RoPE whose products also decay with distance, faster in the fast pairs (Sun et al. 2022, section 3).

        rope, times zeta_m^(n / 512),  zeta_m = (2m + gamma D) / ((1 + gamma) D)

    as q zeta^(i/512) and k zeta^(-j/512). No parameters; the fused kernel stays. Past T the decay softens what rope
    breaks, at long distances only: 512 is four default training lengths. Traps: those powers overflow (float16 at
    position 4,532), so exponents count from the middle of the queries of a call, and the cache holds plain keys, whose
    scale is never stale; and (1 + i/512)^-1 in place of zeta^(i/512) is not a function of i - j at all.
    """

    name = "xpos"
    arguments = {key: value for key, value in RoPE.arguments.items() if key != "dims"}
    arguments |= {"gamma": 0.4, "scale_base": 512.0}
    dims = 0  # all of them
    variants = ()
    stretches = ()

    def setup(self):
        super().setup()
        self.require(self.gamma > 0 and self.scale_base > 0, "gamma and scale_base must be above 0")
        self.rotate_once = False

    def rotate(self, q, k, q_pos, k_pos, length):
        middle = (q_pos[0] + q_pos[-1]) // 2
        q, k = super().rotate(q, k, q_pos, k_pos, length)
        return self.scale(q, q_pos - middle), self.scale(k, middle - k_pos)

    def scale(self, x, power):
        dtype = torch.promote_types(x.dtype, torch.float32)
        m = torch.arange(self.head_dim // 2, device=x.device, dtype=dtype)
        zeta = (2 * m + self.gamma * self.head_dim) / ((1 + self.gamma) * self.head_dim)
        scale = zeta.repeat(2) ** (power[:, None].to(dtype) / self.scale_base)  # (T, D)
        return (x * scale).to(x.dtype)


class ReRoPE(RoPE):
    """Rectified RoPE: distances of a window and beyond all count as the window (Su 2023, kexue.fm/archives/9708).

        n' = n for n < w, else w + (n - w) / leak,  where leak=0 stands for infinity

    For a trained rope model, at test time: `--posenc=rerope`. `window` w is T/2 unless given. No distance past T is
    ever met, so the loss stays near its value at T; all far keys look equally far. Costs two products of queries
    and keys and the fused kernel.
    """

    name = "rerope"
    arguments = RoPE.arguments | {"window": 0, "leak": 0.0}
    variants = ()
    stretches = ()

    def setup(self):
        super().setup()
        self.require(self.rotate_once, f"{self.scaling} changes with the context, which {self.name} makes unnecessary")
        self.require(self.window >= 0, f"window must not be negative, is {self.window}")
        self.require(self.leak == 0 or self.leak >= 1, f"leak must be 0 (for infinity) or at least 1, not {self.leak}")
        self.window = self.window or max(1, self.train_length // 2)

    def rotate(self, q, k, q_pos, k_pos, length):
        return q, k

    def far(self, q_pos, k_pos):
        """Positions (T,), (S,) for distances of the window and beyond."""
        share = 1 / self.leak if self.leak else 0.0
        return self.window + (q_pos - self.window) * share, k_pos * share

    def logits(self, q, k, q_pos, k_pos, seen):
        pairs = (q_pos, k_pos), self.far(q_pos, k_pos)
        near, far = (super(ReRoPE, self).logits(self.turn(q, i), self.turn(k, j), q_pos, k_pos, seen) for i, j in pairs)
        return torch.where(distances(q_pos, k_pos) < self.window, near, far)


class SelfExtend(ReRoPE):
    """Self-Extend: exact distances in a window, positions shared by groups of tokens beyond (Jin et al. 2024, sec. 3).

        n' = n for n < w, else floor(i / G) - floor(j / G) + w - floor(w / G)

    For a trained rope model, at test time: `--posenc=self_extend`. `window` w is T/2 unless given; distances stay
    below T up to a context of w + (T - w) G, 16.5 T for the default `group` G. Costs what ReRoPE costs. Trap:
    rounding i and j down each by itself makes it not quite a function of i - j.
    """

    name = "self_extend"
    arguments = RoPE.arguments | {"window": 0, "group": 32}
    relative = False
    leak = 0.0

    def setup(self):
        super().setup()
        self.require(self.group >= 1, f"group must be at least 1, not {self.group}")

    def far(self, q_pos, k_pos):
        return q_pos // self.group + self.window - self.window // self.group, k_pos // self.group


class ALiBi(Encoding):
    """Attention with linear biases (Press et al. 2021, section 3): logits fall with distance, head by head.

        b = -m_h n,  m_h = 2^(-8h/H),  h = 1 ... H

    For H not a power of two there are two published rules. `slopes="authors"`, the code's, takes the slopes of the next
    lower power P and every other slope of 2P: 12 heads get .5 ... .0039, then .7071, .3536, .1768, .0884.
    `slopes="paper"` is the formula as it stands. No parameters. Past T the loss stays flat: far keys have faded out
    already, which is also why it gains little from a longer context. Traps: the bias is not divided by sqrt(D), and
    bfloat16 would merge most of its values.
    """

    name = "alibi"
    arguments = {"slopes": ("authors", "paper")}
    relative = True

    def setup(self):
        def powers(heads):
            return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]

        lower = 2 ** int(math.log2(self.n_head)) if self.slopes == "authors" else self.n_head
        slope = powers(lower) + powers(2 * lower)[::2][: self.n_head - lower]
        self.register_buffer("slope", torch.tensor(slope), persistent=False)

    def distance_bias(self, n):
        return -along_heads(self.slope, n) * n

    def fold(self, q, k, k_pos):
        # -m n = m j - m i, and the last is the same for all keys. m sqrt(D) is split into three numbers of half
        # precision and j into two, whose products the kernel adds up in float32: to 2^-24 m j for j < 65,536.
        slopes = parts(self.slope * self.head_dim**0.5, 3, q.dtype)
        places = parts(k_pos.to(torch.float32), 2, q.dtype)
        for_q = torch.stack([m for m in slopes for _ in places], dim=-1)[:, None]  # (H, 1, 6)
        for_k = torch.stack([j for _ in slopes for j in places], dim=-1)  # (S, 6)
        wider = (torch.cat((x, more.expand(*x.shape[:3], -1)), dim=-1) for x, more in ((q, for_q), (k, for_k)))
        return tuple(F.pad(x, (0, 2)) for x in wider)  # kernels like multiples of 8


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


class Kerple(Encoding):
    """Kernelized relative biases with two learned scalars for every head (Chi et al. 2022, section 4).

        log:    b = -r1 ln(1 + r2 n)      r1 ~ U(0, 2), r2 ~ U(0, 1)
        power:  b = -r1 n^r2              r1 ~ U(0, 1), r2 ~ U(0, 2), at most 2

    both at least .01. 2 H parameters a layer. Past T the loss stays flat or falls: far keys fade as in alibi, the log
    form slowly enough to keep using them. Trap: clamping in the forward pass gives a parameter below .01 no gradient,
    and it never comes back; here the gradient passes.
    """

    name = "kerple"
    arguments = {"form": ("log", "power")}
    relative = True
    variants = ('kerple(form="power")',)

    def setup(self):
        self.r1, self.r2 = (nn.Parameter(torch.empty(self.n_head)) for _ in range(2))

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name in ("r1", "r2"):
            parameter.uniform_(0, 2 if (name == "r1") == (self.form == "log") else 1, generator=generator)

    def distance_bias(self, n):
        r1 = along_heads(clamped(self.r1, 0.01), n)
        r2 = along_heads(clamped(self.r2, 0.01, 2 if self.form == "power" else None), n)
        if self.form == "log":
            return -r1 * torch.log1p(r2 * n)
        power = torch.exp(r2 * torch.log(n.clamp(min=1).to(r2.dtype)))  # n^r2, with a gradient at 0 too
        return -r1 * power * (n > 0)


class FIRE(Encoding):
    """Functional interpolation: a small network of the distance's share of the context (Li et al. 2023, section 4).

        b = MLP(psi(n) / psi(max(i, L))),  psi(x) = ln(c x + 1),  the MLP 1 -> 32 -> H with ReLU

    c starts at .1, L at T; both are learned. About 32 (H + 2) parameters a layer. The argument lies in 0 ... 1 at any
    length, so nothing is outside of what training met. Yet while L is T or more, training never sees max(i, L) change,
    and past T near keys get arguments that only nearer ones had: the loss rises. `L` below 1 (in units of T) lets it
    see that. It depends on i too: logits are not relative, and no table of distances can hold them.
    """

    name = "fire"
    arguments = {"width": 32, "c": 0.1, "L": 1.0}
    variants = ("fire(L=0.25)",)

    def setup(self):
        self.require(self.width >= 1, f"width must be at least 1, not {self.width}")
        self.require(self.c > 0 and self.L > 0, "c and L must be above 0")
        self.inner, self.outer = nn.Linear(1, self.width), nn.Linear(self.width, self.n_head)
        self.steepness = nn.Parameter(torch.empty(()))
        self.threshold = nn.Parameter(torch.empty(()))  # in units of T

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name in ("steepness", "threshold"):
            parameter.fill_(self.c if name == "steepness" else self.L)

    def bias(self, q_pos, k_pos):
        with torch.autocast(q_pos.device.type, enabled=False):
            c, dtype = self.steepness.abs(), self.steepness.dtype
            whole = torch.maximum(q_pos.to(dtype), (self.threshold * self.train_length).abs())[:, None]
            share = torch.log1p(c * distances(q_pos, k_pos).to(dtype)) / (torch.log1p(c * whole) + 1e-6)
            return self.outer(F.relu(self.inner(share[..., None]))).movedim(-1, 0)


class Sandwich(Encoding):
    """What the products of sinusoids leave of the distance, as a fixed bias (Chi et al. 2023, section 4).

        b = (sum_{m=1}^{d/2} cos(n / 10000^(2m/d)) - d/2) H / (8 h),  d = 128, h = 1 ... H

    No parameters. It falls about as the logarithm of the distance, and fast in the first heads, slowly in the last;
    past T it goes on falling, and the loss stays flat. Trap: copies that sum n w_m instead of cos(n w_m) are linear
    biases.
    """

    name = "sandwich"
    arguments = {"dims": 128, "base": 10000.0}
    shared = True
    relative = True

    def setup(self):
        self.require(self.dims >= 2 and self.dims % 2 == 0, f"dims must be even, not {self.dims}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")

    def distance_bias(self, n):
        dtype, half = torch.float64 if n.device.type == "cpu" else torch.float32, self.dims // 2
        n = n.to(dtype)
        waves = sum(torch.cos(n / self.base ** (m / half)) for m in range(1, half + 1))
        compression = self.n_head / (8 * torch.arange(1, self.n_head + 1, device=n.device, dtype=dtype))
        return (along_heads(compression, n) * (waves - half)).to(torch.float32)

    def bias(self, q_pos, k_pos):
        # One for all layers, in windows up to a chunk.
        return self.once((q_pos, k_pos), lambda: super(Sandwich, self).bias(q_pos, k_pos))


class CoPE(Encoding):
    """Contextual position encoding: keys are counted only if a gate opens on them (Golovneva et al. 2024, section 4).

        g_ij = sigmoid(q_i k_j / sqrt(D)),  p_ij = sum_{t=j..i} g_it,  b_ij = q_i e[p_ij], between rows for fractions

    p is at most M - 1, M = `max_position`. M D parameters a layer, starting at zero; and two gathers of B H T S
    elements, so it is slow. It counts words or lines where the content says so. Past T the gates, summed over more
    keys, push far keys to the last row together, which training met: the loss rises slowly. Positions themselves
    are never used.
    """

    name = "cope"
    arguments = {"max_position": 64}
    chunk = 32
    relative = True

    def setup(self):
        self.require(self.max_position >= 2, f"max_position must be at least 2, not {self.max_position}")
        self.weight = nn.Parameter(torch.empty(self.max_position, self.head_dim))

    def logits(self, q, k, q_pos, k_pos, seen):
        logits = super().logits(q, k, q_pos, k_pos, seen).masked_fill(~seen, -math.inf)
        gate = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        p = gate.sum(-1, keepdim=True) - gate.cumsum(-1) + gate  # the sum from j on
        p = p.clamp(0, self.max_position - 1)
        low = p.detach().long()
        at = q @ self.weight.to(q.dtype).T  # (B, H, T, max_position)
        step = F.pad(at.diff(dim=-1), (0, 1))
        return logits + torch.addcmul(at.gather(-1, low), p - low, step.gather(-1, low))


class FoX(Encoding):
    """Forgetting attention: a gate of every token lets what lies before it fade (Lin et al. 2025, section 3).

        b_ij = sum_{t=j+1..i} ln f_t = F_i - F_j,  f_t = sigmoid(w_h x_t + b_h)

    H (C + 1) parameters a layer. The cache keeps the running sum F beside the keys. Past T what is far has been
    forgotten, as in alibi, but by decisions of the content: the loss stays flat. Positions themselves are never
    used. Traps: F in half precision loses the small differences that matter; and sinks are forgotten like anything
    else.
    """

    name = "fox"
    relative = True

    def setup(self):
        self.gate = nn.Linear(self.n_embd, self.n_head)

    def state(self, x, last):
        with torch.autocast(x.device.type, enabled=False):
            forget = F.logsigmoid(self.gate(x.to(self.gate.weight.dtype)))  # (B, T, H)
            return {"total": forget.transpose(1, 2)[..., None].cumsum(dim=2) + last.get("total", 0)}

    def logits(self, q, k, q_pos, k_pos, seen, total):
        return super().logits(q, k, q_pos, k_pos, seen) + (total[:, :, -len(q_pos) :] - total.mT)


class DAPE(Kerple):
    """Data-adaptive biases: a network over all heads changes logits and biases together (Zheng et al. 2024, section 3).

        S + B + MLP([S ; B]),  S = q k^T / sqrt(D),  B the bias of kerple,  the MLP 2H -> 32 -> H with leaky ReLU

    applied to every pair of query and key: about 100 H parameters a layer, and a tensor of B 32 T S elements, which
    makes it the slowest here. Past T it keeps what kerple gives and corrects it by content.
    """

    name = "dape"
    arguments = Kerple.arguments | {"width": 32}
    chunk = 64
    variants = ()

    def setup(self):
        super().setup()
        self.require(self.width >= 1, f"width must be at least 1, not {self.width}")
        self.inner, self.outer = nn.Linear(2 * self.n_head, self.width), nn.Linear(self.width, self.n_head)

    def logits(self, q, k, q_pos, k_pos, seen):
        s, b = (q * self.head_dim**-0.5) @ k.transpose(-2, -1), self.bias(q_pos, k_pos)
        on_s, on_b = self.inner.weight.chunk(2, dim=1)  # (width, H) each; the part of B is the same for all sequences
        from_b = on_b @ b.flatten(1) + self.inner.bias[:, None]
        into, out = (weight.to(s.dtype).expand(len(s), -1, -1) for weight in (on_s, self.outer.weight))
        hidden = torch.baddbmm(from_b.to(s.dtype), into, s.flatten(2))  # (B, width, T S)
        mixed = torch.bmm(out, F.leaky_relu(hidden)).view_as(s) + self.outer.bias[:, None, None]
        return s + b + mixed


class Randomized(Encoding):
    """Training on random positions, so that a test's positions are none of them new (Ruoss et al. 2023).

        train: T positions drawn from 0 ... L - 1 without replacement, in order, anew for every step
        test:  0, s, 2s, ... with the stride s = floor(L / length), at least 1

    around any `inner` encoding, which is built for L = `length`, 16 T unless given. The authors sample at test time
    too; a fixed stride is their mean, and lets a cache be exact. Costs what the inner one costs. In distribution the
    loss is worse than with the inner encoding, since neighbours are rarely one apart. Past T every position has been
    met, but strides as short as the test's were rare: the loss is nearly flat to 2 T, and then rises.
    """

    name = "randomized"
    arguments = {"inner": "rope", "length": 0}
    rotate_once = False  # another length of the context is another stride
    variants = ("randomized(inner=learned)", "randomized(inner=t5)")

    def setup(self):
        self.length = self.length or 16 * self.train_length
        self.require(
            self.length >= self.train_length, f"length must be at least {self.train_length}, not {self.length}"
        )
        cls, arguments = parse(self.inner)
        self.require(cls is not Randomized, "the inner encoding must be another one")
        self.inner = cls(**(self.sizes | {"train_length": self.length}), **arguments)
        self.drawn = None  # positions (length,) of this training step; no buffer, or DDP would send it around
        for name in DELEGATED:
            setattr(self, name, getattr(self.inner, name))

    def init_parameter(self, name, parameter, generator):
        self.inner.init_parameter(name.removeprefix("inner."), parameter, generator)

    def redraw(self, length, generator, device):
        drawn = torch.randperm(self.length, generator=generator)[:length].sort().values
        # Else the copy waits until the GPU has done all it was given.
        self.drawn = drawn.to(device, non_blocking=torch.device(device).type == "cuda")

    def positions(self, pos, length):
        if self.training and self.drawn is not None:
            return self.drawn[pos]
        return pos * max(1, self.length // length)


# What `randomized` takes from its inner encoding.
DELEGATED = (
    "embed", "ffn", "rotate", "distance_bias", "bias", "fold", "state", "logits", "values",
    "embeds", "biases", "folds", "keeps", "writes_out", "shared", "chunk", "max_length", "way_out",
)  # fmt: skip


def distances(q_pos, k_pos):
    """(T,), (S,) -> n = i - j (T, S); 0 for keys that come later, which nobody sees."""
    return (q_pos[:, None] - k_pos).clamp(min=0)


def frequencies(dim, base, dtype=torch.float32, device=None):
    """w_m = base^(-2m/dim), m = 0 ... dim/2 - 1: the highest frequency first."""
    return base ** -(torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)


def sinusoids(pos, dim, base, dtype=torch.float32):
    """pos (T,) -> (T, dim), sines at even columns and cosines at odd ones (Vaswani et al. 2017)."""
    angle = pos[:, None].to(dtype) * frequencies(dim, base, dtype, pos.device)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def rows_beyond(last, rows):
    """`rows` doubled until a table of so many reaches `last`, a tensor of one int64: so tables are seldom made anew."""
    while rows <= int(last):
        rows *= 2
    return rows


def along_heads(x, n):
    """x (H,) -> (H, 1, ...) that broadcasts over n."""
    return x.view(-1, *[1] * n.dim())


def clamped(x, low, high=None):
    """x kept in low ... high, with the gradient of x itself, so that what lies outside can come back."""
    return x + (x.clamp(low, high) - x).detach()


def parts(x, count, dtype):
    """x as a sum of `count` numbers of a narrower dtype."""
    found = []
    for _ in range(count):
        found.append(x.to(dtype))
        x = x - found[-1].to(x.dtype)
    return found


def by_row(x, table, row):
    """x (B, H, T, D), table (rows, D) or (H, rows, D), row (T, S) -> (B, H, T, S): x times the row named there."""
    products = x @ table.mT  # (B, H, T, rows)
    return products.gather(-1, row.expand(*x.shape[:2], -1, -1))


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


def every():
    """Values of the flag to train, test and show: all encodings, in the form that has positions without end, and their
    variants."""
    specs = (spec for name, cls in ENCODINGS.items() for spec in (cls.unbounded or name, *cls.variants, *cls.stretches))
    return list(dict.fromkeys(specs))


def derives(spec, base):
    """Whether a value of the flag names the encodings of another, whatever their arguments, or such as derive from them
    (rerope from rope): those may take over its weights and arguments."""
    new, old = ([parse(text)[0] for text in ([value] if isinstance(value, str) else value)] for value in (spec, base))
    return len(new) == len(old) and all(map(issubclass, new, old))


def build(spec, n_layer, **sizes):
    """One encoding for every layer from `spec`, a string or a list of strings that is cycled over the layers."""
    parsed = [parse(text) for text in ([spec] if isinstance(spec, str) else spec)]
    if not parsed:
        raise ValueError("posenc is an empty list; name at least one encoding")
    one, layers = {}, []  # the instances that serve several layers
    for layer in range(max(n_layer, len(parsed))):
        cls, arguments = parsed[layer % len(parsed)]
        key = (cls, repr(arguments))
        if key not in one or not one[key].shared:
            one[key] = cls(**sizes, layer=layer, **arguments)
        if len(parsed) > 1 and one[key].embeds:
            raise ValueError(f"{cls.name} acts before the first layer, so it cannot stand in a list over the layers")
        layers.append(one[key])
    return layers[:n_layer]


def merge(spec, override):
    """`override` laid over `spec`: arguments given again for an encoding, or one that derives from it, replace its own,
    the others stay. In a list over the layers that is done for the members of that encoding, where there are any."""
    if not isinstance(override, str):
        return [merge(member, member) for member in override]  # says what is wrong with them
    if not isinstance(spec, str):
        ours = [derives(override, member) for member in spec]
        return [merge(m, override) if own else m for m, own in zip(spec, ours, strict=True)] if any(ours) else override
    (_, old), (new, given) = parse(spec), parse(override)
    if not derives(override, spec):
        return override
    arguments = ", ".join(f"{key}={value!r}" for key, value in (old | given).items())
    return f"{new.name}({arguments})" if arguments else new.name

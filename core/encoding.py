"""The places where position can enter a model, and the class that fills them.

Attention by itself is a function of a set. Position can enter a transformer at a few places, and an encoding is a class
that overrides the hooks it needs:

    embed(pos)               (T,) -> (T, C)           added to the token embeddings
    ffn(pos, width)          (T,) -> (T, width)       added inside the feed-forward layer
    rotate(pairs)            -> q, k                  queries and keys, transformed
    distance_bias(n)         (...) -> (H, ...)        added to the logits, from the distance n = i - j alone
    distance_scale(n)        (...) -> (H, ...)        a factor on the logits, before that is added
    bias(i, j)               (T,), (S,) -> (H, T, S)  added to the logits where i and j themselves matter
    logits(pairs)            -> (B, H, T, S)          all of the logits, where the content matters too
    weights(logits, parts)   -> (B, H, T, S)          the weights of attention, in the place of a softmax
    values(weights, pairs)   -> (B, H, T, D)          the output of attention, from its weights
    turn_values(v, pos)      -> (B, H, T, D)          values, transformed, and the output of attention, turned back

and, for hooks that content decides, says what it reads of the layer's input x (B, T, C):

    state(x, last)           name -> (B, H, T, any)   what is kept for every token beside its key
    asks(x)                  name -> (B, H, T, any)   what belongs to the queries alone, and is not kept

Two rules prevent most bugs. Positions are explicit int64 tensors: nothing here derives a position from a shape, so a
cache, a shifted window or a random position needs no special case. Angles, distances and biases are computed in float32
(float64 when the model is) and cast last: bfloat16 cannot tell positions above 256 apart.

B counts sequences, T queries (or tokens), S keys; i is a query's position, j a key's, n = i - j >= 0; D is the width of
a head, C of the model, H the number of heads. In the formulas of the classes T is the training length.

To add an encoding, write one class into posenc.py or any file of zoo/. Its name is then a value of the `posenc` flag,
and the tests, the benchmark and the gallery find it by themselves.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.errors import UserError, brief, nearest, require

ENCODINGS = {}  # name -> class


class Sight(NamedTuple):
    """The keys that a layer sees, in training as later, whatever its encoding. Bounds count tokens; 0 means none."""

    window: int = 0  # keys at a distance below it
    chunk: int = 0  # keys of the query's own chunk of so many tokens (Llama 4)

    @property
    def span(self):
        """The most keys that a query can see, or 0 where there is no bound."""
        return min(filter(None, self), default=0)

    def first(self, i):
        """The index of the first key that query i sees, both being counted from the beginning."""
        return max(0, i - self.window + 1 if self.window else 0, i - i % self.chunk if self.chunk else 0)

    def times(self, factor):
        """The Sight with all bounds multiplied by a factor <= 1, and rounded."""
        return self._replace(**{key: max(1, round(bound * factor)) for key, bound in self._asdict().items() if bound})


ALL = Sight()


@dataclass
class Pairs:
    """T queries and the S keys that they may meet, in one layer."""

    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, H_kv, S, D); `logits` is given one for every head, (B, H, S, D)
    v: Tensor  # (B, H_kv, S, D)
    i: Tensor  # (T,) positions of the queries, as `Encoding.positions` gave them
    j: Tensor  # (S,) positions of the keys
    seen: Tensor | None = None  # (T, S) bool; None: every key of `sight` up to the query's own, which is a last token
    state: dict = field(default_factory=dict)  # name -> (B, H, S, any): what the encoding keeps for every key
    own: dict = field(default_factory=dict)  # name -> (B, H, T, any): the same for the queries' own tokens, and `asks`
    length: int = 0  # tokens in sight, those to come included, for what is scaled to the context
    temper: Tensor | None = None  # broadcasts over q: the factor that q gets once it is rotated
    sink: Tensor | None = None  # (H,) the logit of a key without a value, which every query sees besides
    sight: Sight = ALL  # what hides keys besides causality where `seen` is None; of all tokens from the first on, S = T

    def rows(self, begin, end, keys):
        """The Pairs of queries begin ... end - 1 and a slice of the keys, under no `sight`."""
        return Pairs(
            self.q[:, :, begin:end], self.k[:, :, keys], self.v[:, :, keys], self.i[begin:end], self.j[keys],
            None if self.seen is None else self.seen[begin:end, keys],
            {name: x[:, :, keys] for name, x in self.state.items()},
            {name: x[:, :, begin:end] for name, x in self.own.items()},
            self.length, None if self.temper is None else self.temper[..., begin:end, :], self.sink,
        )  # fmt: skip


class Encoding(nn.Module):
    """Base class: every hook does nothing. A subclass registers itself under its `name`.

    n_embd, n_head, n_kv_head, head_dim, train_length are the sizes of the model, layer is the layer this instance
    serves. `arguments` maps what the flag may set, as in `rope(base=500000)`, to its default; a tuple lists the allowed
    values, the default first. Each becomes an attribute before `setup` runs.
    """

    name = None  # the flag's value
    standing = ""  # in 2026: "alive", a "control" that papers still print beside theirs, or "history"
    arguments = {}
    forms = {}  # argument that chooses a form -> {form: the arguments that this form reads, of those that not all read}
    nested = ()  # arguments that are values of the flag themselves
    shared = False  # one instance serves all layers
    # Logits do not change when all positions shift by the same amount: it may have segments, and sinks near a window.
    relative = False
    positionless = False  # no hook reads a position, as order enters through the causal mask or the content alone
    unbroken = False  # it reads all tokens between a key and a query, so that sinks far before a window are refused
    turns_values = False  # `turn_values` is to be called
    rotate_once = True  # a rotated key stays true as the context grows, so the cache holds it rotated
    by_length = False  # it is scaled to the length of the whole context, so that what is asked for changes the text
    recalls = 0  # inputs of attention before the present ones that `state` is given besides, for a short convolution
    chunk = math.inf  # the most queries that a CPU computes at once; lower it where logits cost much memory
    max_length = math.inf  # positions that exist are 0 ... max_length - 1
    way_out = ""  # what to do past max_length
    unbounded = None  # the flag's value that gives it positions without end, where its default has none
    variants = ()  # further values of the flag that are worth training, testing and showing
    stretches = ()  # values of the flag to try on a finished run of this encoding, at test time

    def __init_subclass__(cls):
        def overrides(hook):
            return getattr(cls, hook) is not getattr(Encoding, hook)

        cls.positionless = cls.__dict__.get("positionless", False)  # subclasses may read positions: it is not inherited
        cls.embeds = overrides("embed")
        cls.has_state = overrides("state")
        cls.biases = overrides("bias") or overrides("distance_bias")
        cls.scales = overrides("distance_scale")
        # A table by distance can hold bias and factor only where positions are the tokens' indices.
        cls.by_distance = not overrides("positions") and overrides("distance_bias") == cls.biases
        cls.weighs = overrides("weights")  # its weights are no softmax
        cls.writes_out = cls.weighs or overrides("logits") or overrides("values")  # no fused kernel computes it
        if cls.name:
            ENCODINGS[cls.name] = cls

    def __init__(self, n_embd, n_head, n_kv_head, head_dim, train_length, layer, **arguments):
        super().__init__()
        self.sizes = dict(
            n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, train_length=train_length, layer=layer
        )
        self.memo = {}  # the results of `once`
        for key, value in (self.sizes | self.checked(arguments)).items():
            setattr(self, key, value)
        self.setup()

    @classmethod
    def checked(cls, arguments):
        """The arguments, defaults filled in. ValueError names an unknown one, or a value that is not allowed."""
        for key, value in arguments.items():
            if key not in cls.arguments:
                known = nearest(key, cls.arguments) if cls.arguments else "it takes no arguments"
                raise ValueError(f"{cls.name} has no argument '{brief(key)}'; {known}")
            default = cls.arguments[key]
            written = f"{cls.name}({key}={brief(repr(value))})"
            if isinstance(default, tuple):
                require(value in default, f"{written}: choose from {', '.join(map(repr, default))}")
                continue
            serves = type(value) is type(default) or (type(default) is float and type(value) is int)
            require(serves, f"{written}: expected {type(default).__name__}, such as {default!r}")
            for number in value if type(value) is list else [value]:
                # Sums and products of whole numbers stay below 2^63.
                limit, end = (2**40, "2^40") if type(default) is int else (1e30, "1e30")
                bounded = not isinstance(number, int | float) or abs(number) < limit
                require(bounded, f"{written}: numbers go to {end}")
        defaults = {key: value[0] if isinstance(value, tuple) else value for key, value in cls.arguments.items()}
        return defaults | arguments

    def setup(self):
        """Create parameters and check arguments (ValueError)."""

    def init_parameter(self, name, parameter, generator):
        """Draw the parameter called `name`, in place. Here: matrices of linear layers from N(0, 1 / inputs), all others
        zeros."""
        parameter.zero_()
        if parameter.dim() == 2 and name.endswith(".weight"):
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)

    def redraw(self, length, generator, device):
        """Called before every training step with the length of its windows: the place for random positions."""

    # The hooks.

    def positions(self, pos, length):
        """Indices of tokens (T,) -> the positions that the other hooks are given, in a context of `length` tokens."""
        return pos

    def embed(self, pos):
        """pos (T,) -> (T, C) added to the token embeddings, or None. With the setting embed_norm, the default, both are
        normalised first, each by itself, so that the scale of what it returns does not matter."""
        return None

    def ffn(self, pos, width):
        """pos (T,) -> (T, width) added before the activation of the feed-forward layer of that width, or None."""
        return None

    def rotate(self, pairs):
        """Pairs -> its q and k, transformed. The keys are those of this call alone if `rotate_once`, else all keys of
        the cache."""
        return pairs.q, pairs.k

    def distance_bias(self, n):
        """n >= 0, int64 of any shape -> (H, *n.shape), added to the logits after their division by sqrt(D). Whoever
        overrides it promises that `bias` is nothing else: on a GPU a kernel may read it from a table."""

    def distance_scale(self, n):
        """n >= 0, int64 of any shape -> (H, *n.shape), by which q k / sqrt(D) is multiplied before any bias is added.
        Whoever overrides it gives up the fused kernel, but not the one that reads tables."""

    def bias(self, i, j):
        """i (T,), j (S,) -> (H, T, S) added to the logits. The causal mask is not its business."""
        return self.distance_bias(distances(i, j))

    def state(self, x, last):
        """The input of attention x (B, T, C), which is normalised -> {name: (B, H, T, any width)}, to be kept for every
        token beside its key. last: that of the token before; {} at the beginning, and over a Memory, which is in x.
        Where `recalls` is set, last["x"] (B, 1, recalls, C) are the inputs before x, zeros where there are none."""
        return {}

    def asks(self, x):
        """The input of attention x (B, T, C) of the queries' tokens -> {name: (B, H, T, any)} that belong to queries
        alone, and so are not kept: they are in `Pairs.own`."""
        return {}

    def logits(self, pairs):
        """Pairs, as `rotate` left them, with `seen` made and a key for every head -> (B, H, T, S). Whoever overrides it
        gives up the fused kernel. Keys that are not seen are hidden afterwards; those of a class that has a bias are
        minus infinity in what this method returns, which must then be added to and not multiplied."""
        logits = (pairs.q * self.head_dim**-0.5) @ pairs.k.transpose(-2, -1)
        if self.scales:
            logits = logits * self.distance_scale(distances(pairs.i, pairs.j))
        if not self.biases:
            return logits
        return logits + self.bias(pairs.i, pairs.j).masked_fill(~pairs.seen, -math.inf)

    def weights(self, logits, parts):
        """logits (B, H, T, S) over the keys of parts, [Pairs] side by side, minus infinity where a key is not seen ->
        the weights of all keys. Whoever overrides it gives up the fused kernel, and sinks learned as a logit."""
        return logits.softmax(-1)

    def values(self, weights, pairs):
        """weights (B, H, T, S), Pairs -> (B, H, T, D), the output of attention. Whoever overrides it gives up the fused
        kernel."""
        return turned_back(self, weights @ pairs.v, pairs.i)

    def turn_values(self, v, pos, back=False):
        """Values (B, H_kv, S, D) at positions pos (S,), transformed as they enter the cache; or `back`, the output of
        attention (B, H, T, D) at the queries' positions. Called where `turns_values` is set."""
        return v

    def check_sinks(self):
        """UserError where sinks, which lie far before a window, would leave out tokens that it reads."""
        if self.unbroken:
            why = "reads all tokens between a key and its query: it has no sinks; leave them out"
            raise UserError(f"{self.name} {why}")

    def require(self, condition, message):
        if not condition:
            raise ValueError(f"{self.name}: {message}")

    def once(self, key, compute):
        """compute(), or its result for the same key before. Tensors in a key are compared by identity: layers of a call
        share their tensors of positions."""
        if torch.compiler.is_compiling():
            return compute()
        cache_key = (torch.is_inference_mode_enabled(), *(id(part) if torch.is_tensor(part) else part for part in key))
        if cache_key not in self.memo:
            self.memo = dict(list(self.memo.items())[-3:])  # the latest few
            self.memo[cache_key] = key, compute()  # the key is stored too, so that no id is reused
        return self.memo[cache_key][1]

    def once_per_weights(self, key, compute):
        """compute(), stored as by `once` until a parameter changes; computed anew wherever gradients flow to one."""
        versions = [(p.data_ptr(), p._version) for p in self.parameters()]
        return compute() if versions and torch.is_grad_enabled() else self.once((*key, *versions), compute)

    def train(self, mode=True):
        self.memo = {}  # fused optimisers change parameters without telling their version
        return super().train(mode)

    def __getstate__(self):
        return self.__dict__ | {"memo": {}}  # a copy has other tensors, and the ids of some may be the same

    def _apply(self, fn, recurse=True):
        # A model cast to half precision keeps its encodings in float32: bfloat16 merges distances above 256.
        def keep(x):
            y = fn(x)
            return x.to(y.device, torch.float32) if y.dtype in (torch.bfloat16, torch.float16) else y

        return super()._apply(keep, recurse)


def turned_back(encoding, y, pos):
    """Attention's output y (B, H, T, D) at the queries' positions (T,), turned back if the encoding turns values."""
    return encoding.turn_values(y, pos, back=True) if encoding.turns_values else y


def distances(i, j):
    """Positions of queries (T,) and keys (S,) -> n = i - j (T, S); 0 for keys that come later, which nobody sees."""
    return (i[:, None] - j).clamp(min=0)


def along_heads(x, n):
    """x (H,) -> (H, 1, ...) that broadcasts over n."""
    return x.view(-1, *[1] * n.dim())

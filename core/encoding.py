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
import math

import torch
from torch import nn

from core.errors import nearest

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


def distances(q_pos, k_pos):
    """(T,), (S,) -> n = i - j (T, S); 0 for keys that come later, which nobody sees."""
    return (q_pos[:, None] - k_pos).clamp(min=0)


def along_heads(x, n):
    """x (H,) -> (H, 1, ...) that broadcasts over n."""
    return x.view(-1, *[1] * n.dim())


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

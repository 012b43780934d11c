"""A GPT as one would draw it: embeddings, blocks of attention and feed-forward, a head; and how to continue a text.

Shapes: B sequences, T tokens of this call, S keys (those of this call and those before it), C the model's width,
H heads of width D, V tokens in the vocabulary. Position enters through the hooks of an encoding (posenc.py) alone; how
attention is computed stands in core/attention.py; the past of a call, such as a cache, in core/cache.py.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import posenc
from core import additions
from core.attention import attend
from core.cache import Cache, Call, Memory, Past, Slots, pieces
from core.errors import require, require_range
from core.norms import RMSNorm


@dataclass
class GPTConfig:
    """The model's settings. The comment beside a setting is its line in `--help`."""

    posenc: str | list = "rope"  # encoding: name, name(argument=value), or layers in turn, '["rope(window=9)", "none"]'
    train_length: int = 128  # T, the context length in tokens that training sees
    original_length: int = 0  # training length of the weights, to which positions are scaled; 0 means train_length
    vocab_size: int = 0  # tokens in the vocabulary; 0 takes the tokenizer's
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_kv_head: int = 0  # heads of keys and values, each serving n_head / n_kv_head query heads; 0 means n_head
    n_embd: int = 128  # C, the width of the model
    n_hidden: int = 0  # width of the feed-forward layer; 0 means 4 C, or for swiglu 8/3 C in multiples of 32
    activation: Literal["relu2", "gelu", "gelu_tanh", "swiglu"] = "swiglu"  # of the feed-forward layer
    parallel_residual: bool = False  # attention and feed-forward read the same input and are added together
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # normalisation before attention, feed-forward and head
    norm_eps: float = 0.0  # added to mean squares (layernorm: variances); 0 means 1e-7 (layernorm: 1e-5)
    norm_affine: bool = False  # normalisation layers have learned weights (layernorm: and biases)
    embed_norm: bool = True  # normalise token embeddings, and what the encoding adds to them, each on its own
    qk_norm: bool = False  # normalise queries and keys; changes the scale that attention biases act on
    qk_scale: float = 1.0  # factor on the product of query and key
    learn_qk_scale: bool = False  # qk_scale is learned, for every head of every layer
    temper: Literal["none", "su", "ssmax", "llama4", "inkling", "adaptive"] = "none"  # factor by the keys in sight
    sink_logit: bool = False  # attention may also go nowhere: every head learns the logit of a key without a value
    gate: Literal["none", "elementwise", "head", "softplus"] = "none"  # learned factor on what attention returns
    short_conv: bool = False  # keys and values are mixed with those of the three tokens before
    bias: Literal[False, True, "attention", "qkv"] = False  # linear layers have biases: all, or of these alone
    init_std: float = 0.0  # standard deviation of initial weights; 0 means 1 / sqrt(inputs)
    zero_init: bool = True  # output projections start at zero, so every block starts as the identity
    tie_embeddings: bool = False  # the head uses the token embeddings
    logit_softcap: float = 0.0  # c > 0 squashes logits to c tanh(logits / c)
    dropout: float = 0.0  # on embeddings, attention weights and block outputs

    def __post_init__(self):
        require_range(self, "in 1 ... 10^4", "n_layer")
        require_range(self, "in 1 ... 10^8", "train_length", "n_head", "n_embd")
        require_range(self, "in 0 ... 10^8", "original_length", "vocab_size", "n_kv_head", "n_hidden")
        require_range(self, "0 or more", "norm_eps", "logit_softcap", "init_std")
        require_range(self, "in 0 ... 1 and below 1", "dropout")
        require_range(self, "above 0", "qk_scale")
        require(self.n_embd % self.n_head == 0, f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        require(self.n_head % self.kv_heads == 0, f"n_head ({self.n_head}) must be a multiple of n_kv_head")
        posenc.check(self.posenc, self.n_layer, self.temper, self.sink_logit, **self.sizes)

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def hidden(self):
        gated = 32 * math.ceil(self.n_embd / 12)  # 8/3 C, up to a multiple of 32: as many weights as 4 C without gates
        return self.n_hidden or (gated if self.activation == "swiglu" else 4 * self.n_embd)

    @property
    def sizes(self):
        """The sizes that every positional encoding is told."""
        return dict(
            n_embd=self.n_embd, n_head=self.n_head, n_kv_head=self.kv_heads, head_dim=self.n_embd // self.n_head,
            train_length=self.original_length or self.train_length,
        )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, config, layer, temper="none"):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.kv_heads
        self.head_dim, self.qk_norm, self.dropout = config.n_embd // config.n_head, config.qk_norm, config.dropout
        self.train_length = max(2, config.sizes["train_length"])  # at least 2, as `temper` divides by its logarithm
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.qkv = nn.Linear(config.n_embd, width, bias=bool(config.bias))
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias in (True, "attention"))
        self.temper_kind, self.gate_kind, self.fixed_scale = temper, config.gate, config.qk_scale
        added = additions.parameters(config, temper, self.train_length)
        for name, (shape, _) in added.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape)))
        self.first_values = {name: value for name, (_, value) in added.items()}

    def forward(self, x, encoding, call):
        """x (B, M, C) -> (B, T, C): the call's T tokens, which are the last of M where a memory lies before them."""
        (B, M, C), T = x.shape, len(call.pos)
        qkv = self.qkv(x).view(B, M, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, M, D)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q, x_now = q[:, :, M - T :], x[:, M - T :]
        if self.conv_k is not None:
            before = call.past.recent(self.layer, additions.MIXED - 1, k=k, v=v)
            k, v = additions.mixed(k, before["k"], self.conv_k), additions.mixed(v, before["v"], self.conv_v)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        if self.qk_scale is not None or self.fixed_scale != 1:
            q = q * (self.fixed_scale if self.qk_scale is None else self.qk_scale.to(q.dtype))
        temper = call.temper(q, self.temper_kind, self.train_length, self.temper, x_now)
        parts = call.parts(encoding, self.layer, (q, k, v), x, temper, self.sink_logit)
        y = attend(encoding, parts, self.dropout if self.training else 0.0).transpose(1, 2)  # (B, T, H, D)
        if self.gate is not None:
            y = additions.gated(y, self.gate_kind, F.linear(x_now, self.gate))
        return self.proj(y.reshape(B, T, C))


ACTIVATIONS = {
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,  # of one half, times the other
}


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[config.activation], config.activation == "swiglu"
        self.hidden, bias = config.hidden, config.bias is True
        self.fc = nn.Linear(config.n_embd, (2 if self.gated else 1) * config.hidden, bias=bias)
        self.proj = nn.Linear(config.hidden, config.n_embd, bias=bias)

    def forward(self, x, added=None):
        """x (B, T, C) -> (B, T, C); `added` (T, hidden) is added to the input of the activation."""
        x, *gated = self.fc(x).chunk(2 if self.gated else 1, dim=-1)  # (B, T, hidden) each
        if added is not None:
            x = x + added.to(x.dtype)
        x = self.activation(x)
        return self.proj(x * gated[0] if gated else x)


def make_norm(config):
    cls, eps = (RMSNorm, 1e-7) if config.norm == "rmsnorm" else (nn.LayerNorm, 1e-5)
    return cls(config.n_embd, eps=config.norm_eps or eps, elementwise_affine=config.norm_affine)


class Block(nn.Module):
    def __init__(self, config, layer, temper="none"):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer, temper)
        self.ff_norm, self.ff = make_norm(config), FeedForward(config)
        self.drop, self.parallel = nn.Dropout(config.dropout), config.parallel_residual

    def forward(self, x, encoding, call):
        extended = call.past.extend(self.attn.layer, x)  # (B, M, C), with what a memory holds before x
        y = x + self.drop(self.attn(self.attn_norm(extended), encoding, call))
        added = encoding.ffn(encoding.positions(call.pos, call.length), self.ff.hidden)
        return y + self.drop(self.ff(self.ff_norm(x if self.parallel else y), added))


class GPT(nn.Module):
    """A decoder-only transformer (GPT-2's skeleton, pre-norm) whose settings are a GPTConfig."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.n_embd)
        self.token_norm = make_norm(config) if config.embed_norm else nn.Identity()
        self.drop = nn.Dropout(config.dropout)
        tempers = enumerate(posenc.tempers(config.posenc, config.n_layer, config.temper))
        self.blocks = nn.ModuleList(Block(config, layer, temper) for layer, temper in tempers)
        self.posenc = nn.ModuleList(posenc.build(config.posenc, config.n_layer, **config.sizes))
        sights = posenc.sights(config.posenc, config.n_layer)
        self.sights = self.narrowed = list(dict.fromkeys(sights))  # the different ones
        self.sight_of = [self.sights.index(sight) for sight in sights]  # of every layer
        self.norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token.weight
        self.max_length = min(encoding.max_length for encoding in self.posenc)
        if seed is not None:  # None is for weights that come from elsewhere
            self.init_parameters(seed)

    @torch.no_grad()
    def init_parameters(self, seed):
        """Draw each parameter from a generator keyed by (seed, its name): two models that differ in one part start with
        everything else equal."""
        for path, parameter in self.named_parameters():
            owner, name = self.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            generator = torch.Generator().manual_seed(derive_seed(seed, path))
            if path.startswith("posenc."):
                _, layer, name = path.split(".", maxsplit=2)
                self.posenc[int(layer)].init_parameter(name, parameter, generator)
            elif isinstance(owner, nn.Embedding):
                parameter.normal_(std=0.02, generator=generator)
            elif isinstance(owner, nn.Linear) and name == "weight":
                std = self.config.init_std or parameter.shape[1] ** -0.5
                if path.endswith("proj.weight"):  # the 2 n_layer sums into the residual stream (Radford et al. 2019)
                    std *= 0.0 if self.config.zero_init else (2 * self.config.n_layer) ** -0.5
                parameter.normal_(std=std, generator=generator)
            elif isinstance(owner, Attention):
                parameter.fill_(owner.first_values[name])
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)  # normalisation weights; biases

    def forward(self, tokens, targets=None, past=None, *, pos=None, last=None, segments=1, watch=None):
        """tokens (B, T) -> logits (B, T, V), or with targets (B, T) the loss of every token in nats (B, T).

        A target of -1 counts as 0. `past` is a Cache, Slots or a Memory (core/cache.py), which comes before the tokens
        and takes them in; a cache's window, sinks and log_n hold for this call. pos (T,) are ascending positions, by
        default those after the past's. `last` keeps only that many final positions of the output (targets are then
        (B, last)). `segments` reads the tokens in as many parts, each over a Memory of the one before.
        ValueError for positions past `max_length`.

        watch(layer, encoding, new, pairs) is called in every layer before attention: `new` are the Pairs of this call's
        tokens before any rotation, `pairs` those that attention is given.
        """
        if segments > 1:
            return self.by_segments(tokens, targets, segments, watch)
        past = Past() if past is None else past
        self.check_length(past.end(tokens.shape[1], pos))
        calls = Call.each(past, self.narrowed if self.training else self.sights, tokens, pos, watch)

        x = self.embed(tokens, calls[0])  # (B, T, C)
        for block, encoding, index in zip(self.blocks, self.posenc, self.sight_of, strict=True):
            x = block(x, encoding, calls[index])
        logits = self.head(self.norm(x if last is None else x[:, -last:]))
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits if targets is None else nats(logits, targets)

    def embed(self, tokens, call):
        """tokens (B, T) -> (B, T, C): their embeddings, and what the encoding adds to them, each normalised alone."""
        x = self.token_norm(self.token(tokens))
        first = self.posenc[0]  # all layers share an encoding that acts here
        if first.embeds:
            added = first.embed(first.positions(call.pos, call.length))
            x = x + self.token_norm(added.to(x.dtype))
        return self.drop(x)

    def by_segments(self, tokens, targets, count, watch):
        """`forward` in `count` parts, each over a Memory of what entered the layers for the one before."""
        memory, inputs = Memory(), tokens.chunk(count, dim=1)
        wanted = [None] * count if targets is None else targets.chunk(count, dim=1)
        return torch.cat([self(x, y, memory, watch=watch) for x, y in zip(inputs, wanted, strict=True)], dim=1)

    def narrow(self, factor):
        """Multiply the windows that training sees by a factor <= 1, until the next call: it may let them grow."""
        self.narrowed = [sight.times(factor) for sight in self.sights]

    def redraw(self, length, seed, windows=1.0):
        """Before a training step on `length` tokens: encodings with random positions draw them anew, and the layers'
        windows are narrowed by the factor `windows`."""
        self.narrow(windows)
        for encoding in self.posenc:
            encoding.redraw(length, torch.Generator().manual_seed(seed), self.token.weight.device)

    def check_length(self, length):
        """ValueError where the encoding has no positions for `length` tokens."""
        if length > self.max_length:
            raise ValueError(self.too_long(length))

    def too_long(self, length):
        encoding = next(encoding for encoding in self.posenc if encoding.max_length == self.max_length)
        return f"{encoding.name} has {self.max_length} positions, {length} are needed: {encoding.way_out}"

    @property
    def bounded(self):
        """Whether some layers see less than all tokens."""
        return any(sight.span for sight in self.sights)

    def flops_per_token(self):
        """Floating-point operations to train on one token: 6 for each weight of a product, 12 S C a layer in attention,
        S keys being T or what a layer's window lets it see. (Chowdhery et al. 2022, appendix B; the causal half of
        attention is counted as a whole, as is the custom.)"""
        products = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2) + self.head.weight.numel()
        T, spans = self.config.train_length, [self.sights[index].span for index in self.sight_of]
        return 6 * products + 12 * self.config.n_embd * sum(min(T, span or T) for span in spans)


def nats(logits, targets):
    """logits (B, T, V), targets (B, T) -> the loss of every token (B, T), in float32 at least; 0 for a target of -1."""
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
    return loss.view(targets.shape)


def derive_seed(*key):
    """A 63-bit seed from any values: hash() differs from process to process, and sums of seeds collide."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def draw(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> tokens (B, 1). temperature 0 takes the likeliest; top_k and top_p keep the likeliest tokens."""
    if temperature < 1e-6:  # dividing by less would overflow
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k:
        kept = logits.topk(min(top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        tail = ordered.cumsum(-1) - ordered >= top_p
        tail[:, 0] = False  # the likeliest token always stays, also for a top_p that float32 rounds to 0
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def generate(
    model, tokens, count, *, temperature=1.0, top_k=0, top_p=1.0, seed=0, window=None, sinks=0, log_n=False, crop=None,
    forbidden=(), compiled=None,
):  # fmt: skip
    """Continue tokens (B, T >= 1): yields `count` times the next token of every sequence, (B,).

    window, sinks: attend to the last `window` tokens and the first `sinks` alone, over a cache that stays that small.
    log_n: see core/cache.py, Past.
    crop: no cache; re-encode the last `crop` tokens from position 0 for every token. forbidden: ids never drawn.
    compiled: the model as torch.compile returned it, to which all tokens after the first go (no window, no crop).
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    barred = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    barred[list(forbidden)] = True
    barred = barred.to(tokens.device)
    total = tokens.shape[1] + count - 1  # the last token drawn is not read
    if crop is None:
        model.check_length(total)
    cache, forward, pos = Cache(window, sinks, log_n, total), model, None
    for index in range(count):
        if crop is not None:
            tokens = tokens[:, -crop:]
            logits = model(tokens, last=1)
        else:
            if index == 1 and compiled is not None:  # the prompt is in the cache, and from here on shapes stay
                forward, cache, pos = compiled, Slots(cache), cache.pos[-1:]
            pos = None if pos is None else pos + 1  # a new tensor, as encodings remember tables by its identity
            for piece in pieces(tokens, cache, model.bounded):
                logits = forward(piece, past=cache, last=1, pos=pos)
        logits = logits[:, -1].masked_fill(barred, -math.inf)
        new = draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
        tokens = new if crop is None else torch.cat((tokens, new), dim=1)
        yield new[:, 0]

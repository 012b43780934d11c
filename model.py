"""A GPT in one file: embeddings, blocks of attention and feed-forward, a cache for decoding, and generate.

Shapes: B sequences, T tokens of this call, S keys (those of this call and those in the cache), C the model's width,
H heads of width D, V tokens in the vocabulary. Position enters through posenc.py alone.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

import posenc
from core import place as places
from core.errors import require

CHUNK = 256  # queries whose logits are computed at once; in longer windows, gradients compute them anew
WHOLE, PIECE = 1 << 14, 512  # tokens that enter an empty cache at once, and one that holds some
BLOCK = 128  # queries, and keys, that flex_attention skips or masks together


@dataclass
class GPTConfig:
    """The model's settings. The comment beside a setting is its line in `--help`."""

    posenc: str | list = "rope"  # positional encoding: a name, name(argument=value), or a list cycled over the layers
    train_length: int = 128  # T, the context length in tokens that training sees
    original_length: int = 0  # the length that positions are relative to; 0 means T, init_from sets its run's
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
    bias: Literal[False, True, "attention", "qkv"] = False  # linear layers have biases: all, or of these alone
    init_std: float = 0.0  # standard deviation of initial weights; 0 means 1 / sqrt(inputs)
    zero_init: bool = True  # output projections start at zero, so every block starts as the identity
    tie_embeddings: bool = False  # the head uses the token embeddings
    logit_softcap: float = 0.0  # c > 0 squashes logits to c tanh(logits / c)
    dropout: float = 0.0  # on embeddings, attention weights and block outputs

    def __post_init__(self):
        for key in ("train_length", "n_layer", "n_head", "n_embd"):
            require(getattr(self, key) >= 1, f"{key} must be at least 1, not {getattr(self, key)}")
        for key in ("original_length", "vocab_size", "n_kv_head", "n_hidden", "norm_eps", "logit_softcap", "init_std"):
            require(getattr(self, key) >= 0, f"{key} must not be negative")
        require(self.n_embd % self.n_head == 0, f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        require(self.n_head % self.kv_heads == 0, f"n_head ({self.n_head}) must be a multiple of n_kv_head")
        require(0 <= self.dropout < 1, f"dropout must lie in 0 ... 1, not {self.dropout}")
        cycle = 1 if isinstance(self.posenc, str) else len(self.posenc)
        posenc.build(self.posenc, cycle, **self.sizes)  # raises ValueError for what cannot be built

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def hidden(self):
        gated = 32 * math.ceil(self.n_embd / 12)  # 8/3 C, up to a multiple of 32: as many weights as 4 C without gates
        return self.n_hidden or (gated if self.activation == "swiglu" else 4 * self.n_embd)

    @property
    def sizes(self):
        """What every positional encoding is told."""
        head_dim = self.n_embd // self.n_head
        return dict(
            n_embd=self.n_embd,
            n_head=self.n_head,
            n_kv_head=self.kv_heads,
            head_dim=head_dim,
            train_length=self.original_length or self.train_length,
        )


class Cache:
    """Keys, values and what else an encoding keeps for every token and layer, preallocated and doubled when full, with
    the position of every kept token.

    A window bounds it: tokens that no later query can see are dropped, so memory and time per token stay constant.
    `total` is the number of tokens that will ever enter, for encodings that scale with the context; by default those
    that have entered so far.
    """

    def __init__(self, window=None, sinks=0, log_n=False, total=0):
        self.window, self.sinks, self.log_n, self.total = window, sinks, log_n, total
        self.next = 0  # the position of the next token
        self.length = 0  # tokens held
        self.new = 0  # those of them that the present call brought
        self.layers = {}  # layer -> {name: (B, H, capacity, any)}
        self.pos = None  # (length,)

    def advance(self, pos, end):
        """Take in the positions (T,) of the tokens that the coming call appends, and the position that follows them;
        returns the positions of all keys (S,)."""
        if self.window and self.length > 2 * (self.window + self.sinks):
            self.drop(self.length - self.window - self.sinks)
        self.pos = pos if self.pos is None else torch.cat((self.pos, pos))
        self.length, self.new, self.next = len(self.pos), len(pos), end
        return self.pos

    def last(self, layer):
        """{name: (B, H, 1, any)} of the token before those just announced by `advance`, or {}."""
        index = self.length - self.new
        return {name: x[:, :, index - 1 : index] for name, x in self.layers.get(layer, {}).items() if index}

    def append(self, layer, **new):
        """new: name -> (B, H, T, any) of the tokens just announced; returns name -> (B, H, S, any) of all."""
        held = self.layers.setdefault(layer, {})
        for name, x in new.items():
            old = held.get(name)
            if old is None or old.shape[2] < self.length:
                room = min(2 * self.length, max(self.length, self.total)) if self.total else 2 * self.length
                held[name] = x.new_empty(*x.shape[:2], max(64, room), x.shape[3])
                if old is not None:
                    held[name][:, :, : old.shape[2]] = old
            held[name][:, :, self.length - self.new : self.length] = x
        return {name: x[:, :, : self.length] for name, x in held.items()}

    def drop(self, count):
        """Forget the `count` oldest tokens after the sinks."""
        for held in self.layers.values():
            for x in held.values():
                x[:, :, self.sinks : self.length - count] = x[:, :, self.sinks + count : self.length].clone()
        self.pos = torch.cat((self.pos[: self.sinks], self.pos[self.sinks + count :]))
        self.length -= count


def pieces(tokens, cache):
    """tokens (B, T) in the parts in which they best enter a cache: many where it is empty and has no window, as fused
    attention then needs no mask; and few, whose masks (T, S) are small, where not."""
    first = PIECE if cache.length or cache.window else max(PIECE, WHOLE // len(tokens))
    parts = tokens[:, :first], *tokens[:, first:].split(PIECE, dim=1)
    return [part for part in parts if part.shape[1]]


class Slots(Cache):
    """A cache whose tensors keep their shapes and places from token to token, as a compiled model and a CUDA graph need
    it: room for `total` tokens from the start. It begins with what `cache` holds, takes one token at a time, whose
    position has to be given, and keeps nothing but keys and values (ValueError). Unused places lie behind the query."""

    def __init__(self, cache):
        super().__init__(total=cache.total, log_n=cache.log_n)
        self.length, self.pos = cache.total, torch.arange(cache.total, device=cache.pos.device)
        for layer, held in cache.layers.items():
            require(held.keys() == {"k", "v"}, f"fixed slots hold keys and values, not {', '.join(held)}")
            self.layers[layer] = {name: x.new_zeros(*x.shape[:2], cache.total, x.shape[3]) for name, x in held.items()}
            for name, x in self.layers[layer].items():
                x[:, :, : cache.length] = held[name][:, :, : cache.length]
                torch._dynamo.mark_static_address(x)

    def advance(self, pos, end):
        self.new = pos
        return self.pos

    def append(self, layer, **new):
        for name, x in new.items():
            self.layers[layer][name].index_copy_(2, self.new, x)
        return dict(self.layers[layer])


class Memory:
    """Transformer-XL's recurrence (Dai et al. 2019, section 3.2): what entered every layer for the last segment,
    without its gradient. It stands before the next segment's tokens, so that keys and values reach back over it."""

    def __init__(self):
        self.next = 0  # the position of the next token
        self.pos, self.layers = None, {}  # positions (M,), layer -> (B, M, C)

    def advance(self, pos, end):
        """Take in the positions (T,) of a segment, and the one that follows; returns those of all its keys (S,)."""
        before, self.pos, self.next = self.pos, pos, end
        return pos if before is None else torch.cat((before, pos))

    def extend(self, layer, x):
        """x (B, T, C) -> (B, S, C), the memory before it; and x is the next memory."""
        before, self.layers[layer] = self.layers.get(layer), x.detach()
        return x if before is None else torch.cat((before, x), dim=1)


@dataclass
class Call:
    """What all layers share in one call of the model."""

    pos: torch.Tensor  # (T,) indices of this call's tokens
    k_pos: torch.Tensor  # (S,) of the keys, whose last are this call's, but in `Slots`
    # (T, S) bool; None where every key up to the query's own is seen, and positions follow one another
    seen: torch.Tensor | None
    near: torch.Tensor | None  # (T,) where queries stand for sinks that lie before a window
    sinks: int
    length: int  # tokens in the whole context
    reach: int  # of them at most as many are seen at once
    temper: torch.Tensor | None  # (T, 1) factors on the queries
    cache: Cache | None
    memory: Memory | None
    watch: Callable | None


def visible(q_pos, k_pos, window=None, sinks=0):
    """(T,), (S,) -> (T, S) bool: keys no later than their query and, with a window W, either n < W or a sink."""
    q_pos = q_pos[:, None]  # compared and not subtracted: differences would be eight bytes for every pair
    seen = k_pos <= q_pos
    return seen if window is None else seen & ((k_pos > q_pos - window) | (k_pos < sinks))


def kernel(encoding, q, seen, sunk, keys, dropout):
    """How attention of q (B, H, T, D) over so many keys is computed: "fused", "folded", "biased" (the fused kernel with
    a mask of numbers), "flex" (a kernel made for biases by distance) or "written out". In half precision the fused
    kernel would round biases, which merges distances; and on the CPU its gradient for bfloat16 is several times slower
    than that of plain products."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if encoding.writes_out or sunk is not None or slow:
        return "written out"
    if not encoding.biases:
        return "fused"
    if half and seen is None and q.shape[2] == keys:
        if encoding.folds:
            return "folded"
        if encoding.by_distance and not dropout and flexes(q):
            return "flex"
    return "written out" if half else "biased"


def flexes(q):
    """Whether flex_attention takes q (B, H, T, D). It is compiled for every T, so for whole blocks alone."""
    able = q.is_cuda and q.shape[2] % BLOCK == 0 and 16 <= q.shape[3] <= 256
    return able and (torch.compiler.is_compiling() or compiled_flex() is not None)


@functools.cache
def compiled_flex():
    """flex_attention for models that are not compiled themselves; None where nothing compiles. Its eager form would
    make (T, T) of all, and so would a compiled one that gave up after the usual eight lengths."""
    if places.no_compiler(torch.device("cuda")):
        return None
    return torch._dynamo.config.patch(recompile_limit=64)(torch.compile(flex_attention, dynamic=False))


def causal(b, h, i, j):
    return i >= j


def triangle(T, device):
    """flex_attention's causal mask of T tokens, T a multiple of BLOCK. Its own way to make one starts from (T, T)."""
    i = torch.arange(T // BLOCK, device=device, dtype=torch.int32)  # row i: block i is masked, those before it are full
    diagonal, before = i[:, None].expand(-1, len(i)), i.expand(len(i), -1)
    counted = (torch.ones_like(i), diagonal, i, before)
    return BlockMask.from_kv_blocks(*(x[None, None].contiguous() for x in counted), BLOCK, causal, seq_lengths=(T, T))


@functools.lru_cache(maxsize=8)
def kept_triangle(T, device, inference):
    """The same, kept; and apart for inference_mode, whose tensors gradients cannot use."""
    return triangle(T, device)


def flex(encoding, q, k, v):
    """`attend` for T = S and a bias by distance alone: the kernel adds it in float32, and makes nothing of (T, T)."""
    T = q.shape[2]
    table = encoding.distance_bias(torch.arange(T, device=q.device)).contiguous()  # (H, T)
    if torch.compiler.is_compiling():
        attention, mask = flex_attention, triangle(T, q.device)
    else:
        attention, mask = compiled_flex(), kept_triangle(T, q.device, torch.is_inference_mode_enabled())
    return attention(
        q, k, v, scale=q.shape[-1] ** -0.5, enable_gqa=q.shape[1] != k.shape[1], block_mask=mask,
        score_mod=lambda score, b, h, i, j: score + table[h, (i - j).abs()],  # later keys: any entry, never seen
    )  # fmt: skip


def attend(encoding, q, k, v, q_pos, k_pos, seen=None, sunk=None, dropout=0.0, state=None):
    """Attention of queries (B, H, T, D) over keys and values (B, H_kv, S, D) -> (B, H, T, D).

    q and k are as `encoding.rotate` left them. seen (T, S) bool; None means keys up to the query's own, the queries
    being the last T of the tokens, whose positions follow one another. sunk: (q, k, positions (T,), which keys are
    sinks (S,)) for keys met at other distances. state: what the encoding keeps for every key.
    """
    how, T, S = kernel(encoding, q, seen, sunk, len(k_pos), dropout), len(q_pos), len(k_pos)
    if how == "flex":
        return flex(encoding, q, k, v)
    chunk = min(CHUNK, encoding.chunk) if q.device.type == "cpu" else CHUNK
    if how in ("fused", "folded") or chunk >= T:
        return attend_at_once(encoding, how, q, k, v, q_pos, k_pos, seen, sunk, dropout, state or {})
    parts = []  # so that memory grows with S, not with T S
    for begin in range(0, T, chunk):
        rows = slice(begin, min(T, begin + chunk))
        keys = slice(S - T + rows.stop)  # later ones are not seen
        part = functools.partial(
            attend_at_once, encoding, how, q[:, :, rows], k[:, :, keys], v[:, :, keys], q_pos[rows], k_pos[keys],
            None if seen is None else seen[rows, keys],
            None if sunk is None else (sunk[0][:, :, rows], sunk[1][:, :, keys], sunk[2][rows], sunk[3][keys]),
            dropout, {name: x[:, :, keys] for name, x in (state or {}).items()},
        )  # fmt: skip
        parts.append(checkpoint(part, use_reentrant=False) if torch.is_grad_enabled() and T > CHUNK else part())
    return torch.cat(parts, dim=2)


def attend_at_once(encoding, how, q, k, v, q_pos, k_pos, seen, sunk, dropout, state):
    """The same for all queries together."""
    T, S, D = len(q_pos), len(k_pos), v.shape[-1]
    causal = seen is None and T == S  # the kernel's own triangle; for T < S it would be aligned at the top left
    if seen is None and (how in ("biased", "written out") or 1 < T < S):
        seen, causal = visible(q_pos, k_pos), False
    if how != "written out":
        if how == "biased":
            seen = encoding.bias(q_pos, k_pos).masked_fill(~seen, -math.inf).to(q.dtype)
        if how == "folded":
            (q, k), v = encoding.fold(q, k, k_pos), F.pad(v, (0, 8))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal, scale=D**-0.5,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return y[..., :D]
    groups = q.shape[1] // k.shape[1]
    repeat = lambda x: x.repeat_interleave(groups, dim=1) if groups > 1 else x  # noqa: E731
    logits = encoding.logits(q, repeat(k), q_pos, k_pos, seen, **state)  # (B, H, T, S)
    if sunk is not None:
        near_q, near_k, near, sink = sunk
        logits = torch.where(sink, encoding.logits(near_q, repeat(near_k), near, k_pos, seen, **state), logits)
    if encoding.writes_out or not encoding.biases:  # else the bias is -inf already where nothing is seen
        # A sum, which passes gradients on as they are; filling would fill the gradient too (docs/log.md).
        logits = logits + torch.zeros_like(seen, dtype=logits.dtype).masked_fill_(~seen, -math.inf)
    weights = F.dropout(logits.softmax(-1).to(v.dtype), dropout)
    y = weights @ repeat(v)
    for share, i in [(weights, q_pos)] if sunk is None else [(weights * ~sink, q_pos), (weights * sink, near)]:
        more = encoding.values(share, i, k_pos)
        y = y if more is None else y + more
    return y


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.kv_heads
        self.head_dim, self.qk_norm, self.dropout = config.n_embd // config.n_head, config.qk_norm, config.dropout
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.qkv = nn.Linear(config.n_embd, width, bias=bool(config.bias))
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias in (True, "attention"))

    def forward(self, x, encoding, call):
        B, M, C = x.shape  # M tokens: the call's T, after those of a memory
        T, cache = len(call.pos), call.cache
        pos, k_pos = (encoding.positions(p, call.length) for p in (call.pos, call.k_pos))
        qkv = self.qkv(x).view(B, M, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, M, D)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q = q[:, :, M - T :]
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        if call.temper is not None:
            q = q * call.temper.to(q.dtype)
        last = cache.last(self.layer) if cache and encoding.keeps else {}
        state, plain, sunk = encoding.state(x, last), (q, k), None
        if encoding.rotate_once:
            q, k = encoding.rotate(q, k, pos, pos if M == T else k_pos, call.reach)
        if cache is not None:
            state = cache.append(self.layer, k=k, v=v, **state)
            k, v = state.pop("k"), state.pop("v")
        if call.near is not None and encoding.relative:  # sinks are met by queries at `near`
            if encoding.rotate_once:  # and keys stay as they are
                sunk = encoding.rotate(plain[0], plain[0], call.near, call.near, call.reach)[0], k
            else:
                sunk = encoding.rotate(q, k, call.near, k_pos, call.reach)
            sunk = *sunk, call.near, k_pos < call.sinks
        if not encoding.rotate_once:
            q, k = encoding.rotate(q, k, pos, k_pos, call.reach)
        if call.watch is not None:
            call.watch(self.layer, encoding, plain, q, k, pos, k_pos, call.seen, state)
        y = attend(encoding, q, k, v, pos, k_pos, call.seen, sunk, self.dropout if self.training else 0.0, state)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


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
        """x (B, T, C), added (T, hidden) to what the activation meets."""
        x, *gated = self.fc(x).chunk(2 if self.gated else 1, dim=-1)  # (B, T, hidden) each
        if added is not None:
            x = x + added.to(x.dtype)
        x = self.activation(x)
        return self.proj(x * gated[0] if gated else x)


def unit(x, eps):
    """x (..., C) / rms(x) over C, computed in float32 at least; and 1 / rms(x) (..., 1)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    scale = (norm.square() / x.shape[-1] + eps).rsqrt()
    return (x * scale).to(x.dtype), scale


class Unit(torch.autograd.Function):
    """`unit` with its gradient: with s = 1 / rms(x) and y = s x, the gradient g of y becomes s (g - y mean(g y)). A few
    passes, where torch's own RMSNorm takes ten on the CPU (docs/log.md)."""

    @staticmethod
    def forward(ctx, x, eps):
        y, scale = unit(x, eps)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True)  # the part of the gradient that would change the length
        return torch.addcmul(grad, y, along.to(y.dtype), value=-1 / y.shape[-1]).mul(scale).to(y.dtype), None


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        if x.is_cuda:  # which has a kernel for it
            return super().forward(x)
        if torch.is_grad_enabled():
            y = Unit.apply(x, self.eps)
            return y if self.weight is None else y * self.weight
        y, _ = unit(x, self.eps)
        return y if self.weight is None else y.mul_(self.weight)  # in place: y is nobody else's


def make_norm(config):
    cls, eps = (RMSNorm, 1e-7) if config.norm == "rmsnorm" else (nn.LayerNorm, 1e-5)
    return cls(config.n_embd, eps=config.norm_eps or eps, elementwise_affine=config.norm_affine)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.ff_norm, self.ff = make_norm(config), FeedForward(config)
        self.drop, self.parallel = nn.Dropout(config.dropout), config.parallel_residual

    def forward(self, x, encoding, call):
        context = x if call.memory is None else call.memory.extend(self.attn.layer, x)
        y = x + self.drop(self.attn(self.attn_norm(context), encoding, call))
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
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.posenc = nn.ModuleList(posenc.build(config.posenc, config.n_layer, **config.sizes))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token.weight
        self.max_length = min(encoding.max_length for encoding in self.posenc)
        if seed is not None:  # None: for weights that come from elsewhere
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
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)  # normalisation weights; biases

    def forward(
        self, tokens, targets=None, pos=None, cache=None, window=None, sinks=0, log_n=False, last=None, segments=1,
        memory=None, watch=None,
    ):  # fmt: skip
        """tokens (B, T) -> logits (B, T, V), or with targets (B, T) the loss of every token in nats (B, T).

        A target of -1 counts as 0. pos (T,) are ascending positions, by default those that follow the cache's. `last`
        keeps only that many final positions of the output (targets are then (B, last)). A window W hides keys at
        distance W and beyond, except the first `sinks` tokens. Relative encodings see those as if they lay just before
        the window (StreamingLLM, Xiao et al. 2023): at their true distance they would be farther than training showed.
        log_n multiplies queries by ln n / ln T where they see n > T tokens, which keeps attention from spreading (Su
        2021, kexue.fm/archives/8823). `segments` reads the tokens in so many equal parts, each over a memory of the one
        before. ValueError for positions past `max_length`.

        watch(layer, encoding, plain, q, k, q_pos, k_pos, seen, state) is called in every layer before attention, with
        what `attend` is given but for values and sinks; plain are this call's q and k before they were rotated.
        """
        if segments > 1:
            memory, parts = Memory(), tokens.chunk(segments, dim=1)
            wanted = [None] * segments if targets is None else targets.chunk(segments, dim=1)
            pairs = zip(parts, wanted, strict=True)
            return torch.cat([self(x, y, memory=memory, watch=watch) for x, y in pairs], dim=1)
        T, fixed = tokens.shape[1], isinstance(cache, Slots)
        if cache is not None:
            window, sinks, log_n = cache.window, cache.sinks, cache.log_n
        past, consecutive = memory if cache is None else cache, pos is None
        if consecutive:
            start = past.next if past is not None else 0
            pos, end = torch.arange(start, start + T, device=tokens.device), start + T
        else:
            end = cache.total if fixed else int(pos[-1]) + 1
        self.check_length(end)
        fresh = cache is None or cache.length == 0
        k_pos = past.advance(pos, end) if past is not None else pos
        length, limit = max(end, cache.total if cache else 0), window + sinks if window else math.inf
        # One query over a whole cache needs no mask at all, and a first call the kernel's own.
        unmasked = window is None and not fixed and (T == 1 or (fresh and consecutive))
        reach, trained = min(length, limit), max(2, self.config.sizes["train_length"])
        call = Call(
            pos=pos,
            k_pos=k_pos,
            seen=None if unmasked else visible(pos, k_pos, window, sinks),
            near=pos.clamp(max=reach - 1) if window and sinks else None,
            sinks=sinks,
            length=length,
            reach=reach,
            temper=(pos[:, None] + 1).clamp(trained, max(trained, reach)).log() / math.log(trained) if log_n else None,
            cache=cache,
            memory=memory,
            watch=watch,
        )

        x = self.token_norm(self.token(tokens))  # (B, T, C)
        first = self.posenc[0]
        if first.embeds:
            x = x + self.token_norm(first.embed(first.positions(pos, length)).to(x.dtype))  # no norm: the identity
        x = self.drop(x)
        for block, encoding in zip(self.blocks, self.posenc, strict=True):
            x = block(x, encoding, call)
        logits = self.head(self.norm(x if last is None else x[:, -last:]))
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        if targets is None:
            return logits
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
        return loss.view(targets.shape)

    def redraw(self, length, seed):
        """Before a training step on windows of `length` tokens: encodings with random positions draw them anew."""
        for encoding in self.posenc:
            encoding.redraw(length, torch.Generator().manual_seed(seed), self.token.weight.device)

    def check_length(self, length):
        """ValueError where the encoding has no positions for `length` tokens."""
        if length > self.max_length:
            raise ValueError(self.too_long(length))

    def too_long(self, length):
        encoding = next(encoding for encoding in self.posenc if encoding.max_length == self.max_length)
        return f"{encoding.name} has {self.max_length} positions, {length} are needed: {encoding.way_out}"

    def flops_per_token(self):
        """Floating-point operations to train on one token: 6 for each weight of a product, 12 T C a layer in attention.
        (Chowdhery et al. 2022, appendix B; the causal half of attention is counted as a whole, as is the custom.)"""
        products = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2) + self.head.weight.numel()
        return 6 * products + 12 * self.config.n_layer * self.config.n_embd * self.config.train_length


def derive_seed(*key):
    """A 63-bit seed from any values: hash() differs from process to process, and arithmetic on seeds collides."""
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
        tail = ordered.cumsum(-1) - ordered >= top_p  # the likeliest token always stays
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def generate(
    model, tokens, count, *, temperature=1.0, top_k=0, top_p=1.0, seed=0, window=None, sinks=0, log_n=False, crop=None,
    forbidden=(), compiled=None,
):  # fmt: skip
    """Continue tokens (B, T >= 1): yields `count` times the next token of every sequence, (B,).

    window, sinks: attend to the last `window` tokens and the first `sinks` alone, over a cache that stays that small.
    log_n: see GPT.forward.
    crop: no cache; re-encode the last `crop` tokens from position 0 for every token. forbidden: ids never drawn.
    compiled: the model as torch.compile returned it, to which all tokens after the first go (no window, no crop).
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    barred = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    barred[list(forbidden)] = True
    barred = barred.to(tokens.device)
    cache, new = Cache(window, sinks, log_n, tokens.shape[1] + count - 1), tokens
    if crop is None:
        model.check_length(tokens.shape[1] + count - 1)
    forward, pos = model, None
    for index in range(count):
        if compiled is not None and index == 1:  # the prompt is in the cache
            forward, cache, pos = compiled, Slots(cache), cache.pos[-1:] + 1
        if crop is not None:
            tokens = tokens[:, -crop:]
            logits = model(tokens, last=1)
        else:
            for part in pieces(new, cache):
                logits = forward(part, cache=cache, last=1, pos=pos)
            pos = None if pos is None else pos + 1  # anew: encodings know a tensor of positions by itself
        logits = logits[:, -1].masked_fill(barred, -math.inf)
        new = draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
        if crop is not None:
            tokens = torch.cat((tokens, new), dim=1)
        yield new[:, 0]

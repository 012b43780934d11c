"""Attention: first written out as it is defined, then the faster forms that compute the same, and the choice of one.

Shapes: B sequences, T queries, S keys, H heads of width D, H_kv heads of keys and values.
"""

import functools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from core.encoding import Sight, turned_back
from core.place import no_compiler

CHUNK = 256  # queries whose logits are computed at once; beyond it, the backward pass computes them anew
BLOCK = 128  # queries, and keys, that flex_attention skips or masks together


def written_out(encoding, parts, dropout=0.0):
    """Attention as it is defined, of the same T queries in every one of `parts`, a list of Pairs: (B, H, T, D).

        y_i = sum_j w_ij v_j,  w_i = softmax over j of s_ij,  s_ij = q_i k_j / sqrt(D) + what the encoding adds

    The keys of several parts stand side by side. A sink's logit stands in the sum of the softmax, and has no value.
    An encoding may have weights of its own in the place of the softmax.
    """
    parts = [ready(part) for part in parts]
    logits, sizes = [masked_logits(encoding, part) for part in parts], [len(part.j) for part in parts]  # (B, H, T, S)
    if parts[0].sink is not None:
        logits.append(parts[0].sink.to(logits[0].dtype).view(-1, 1, 1).expand(*logits[0].shape[:3], 1))
    weights = encoding.weights(logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1), parts)
    weights = F.dropout(weights[..., : sum(sizes)].to(parts[0].v.dtype), dropout)
    shares = [weights] if len(parts) == 1 else weights.split(sizes, dim=-1)
    return functools.reduce(torch.add, map(encoding.values, shares, parts))


def widened(encoding, parts, dropout=0.0):
    """`written_out` for queries and keys that the encoding left in a wider dtype than the values', as float16 cannot
    hold them: without autocast, which would bring them back to it."""
    with torch.autocast(parts[0].q.device.type, enabled=False):
        return written_out(encoding, parts, dropout)


def ready(pairs):
    """The Pairs with a mask, and with a key and a value for every head: H / H_kv heads of queries share theirs."""
    return replace(pairs, k=for_every_head(pairs.k, pairs.q), v=for_every_head(pairs.v, pairs.q), seen=mask(pairs))


def for_every_head(x, q):
    """Keys or values x (B, H_kv, S, D), repeated for every head of the queries: (B, H, S, D)."""
    groups = q.shape[1] // x.shape[1]
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def mask(pairs):
    """The Pairs' (T, S) bool: `seen`, or where it is None what their `sight` leaves of every key up to the query's own,
    the queries being the last tokens of the keys. Positions do not come into it."""
    if pairs.seen is not None:
        return pairs.seen
    j = torch.arange(len(pairs.j), device=pairs.q.device)
    return visible(j[len(j) - len(pairs.i) :], j, pairs.sight.window, 0, pairs.sight.chunk)


def masked_logits(encoding, pairs):
    """The logits of the Pairs (B, H, T, S), with minus infinity for keys that are not seen."""
    logits = encoding.logits(pairs)
    if encoding.biases and not encoding.writes_out:  # the bias is minus infinity there already
        return logits
    # A sum passes gradients on as they are, where filling would fill the gradient too (docs/log.md).
    return logits + torch.zeros_like(pairs.seen, dtype=logits.dtype).masked_fill_(~pairs.seen, -math.inf)


def visible(i, j, window=None, sinks=0, chunk=0):
    """Indices of queries (T,) and keys (S,) -> (T, S) bool: keys no later than their query and, with a window W, at a
    distance below W; with a chunk c, in the query's own c tokens. The first `sinks` tokens are seen from everywhere."""
    near = sees(i[:, None], j, Sight(window or 0, chunk))
    return near | ((j < sinks) & (j <= i[:, None])) if window and sinks else near


def sees(i, j, sight):
    """Whether queries i see keys j, indices of shapes that broadcast, as far as causality and the Sight go."""
    seen = j <= i  # compared and not subtracted: differences would be eight bytes for every pair
    if sight.window:
        seen = seen & (j > i - sight.window)
    if sight.chunk:
        seen = seen & (j // sight.chunk == i // sight.chunk)
    return seen


# These forms compute the same faster, each where it can. They take (encoding, parts, dropout), as `written_out` does.


def fused(encoding, parts, dropout=0.0, bias=None):
    """Attention by torch's fused kernel, for logits that the encoding leaves alone, or whose mask `bias` (H, T, S) is
    added to them. Without a mask, T is 1 or S."""
    (pairs,) = parts
    q, k, v, T, D = pairs.q, pairs.k, pairs.v, len(pairs.i), pairs.v.shape[-1]
    if bias is None and (pairs.seen is not None or pairs.sight.span):
        bias = mask(pairs)
    if pairs.sink is not None:
        q, k, v, bias = with_sink(pairs.sink, q, k, v, bias)
    if v.shape[-1] < q.shape[-1]:  # The kernel has one width for all of them.
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    if not (q.device.type == "cpu" or (bias is None and is_half(q))):
        # A GPU's kernel for masks, or for float32, takes no groups: torch would write all logits out, without a word.
        k, v = for_every_head(k, q), for_every_head(v, q)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout,
        # The kernel's own triangle begins at the top left: right for T = S. One query over all keys needs no mask.
        is_causal=bias is None and T > 1, scale=D**-0.5, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return turned_back(encoding, y[:, :, -T:, :D], pairs.i)


def with_sink(sink, q, k, v, bias):
    """Queries, keys, values and mask of the fused kernel, with the sink's logits (H,) as a first key that has no value.

    A further dimension of the queries holds the logits, and is 1 in that key alone. Where the kernel draws the triangle
    itself, a first query comes before the others, so that all of them lie below it. Half precision rounds the logits,
    by 2^-9 of their size in bfloat16. Below -1000 a sink has no weight, and minus infinity times 0 would be no number.
    """
    (_, H, T, D), wide = q.shape, 8  # the dimensions that are added: kernels like multiples of 8
    logits = sink.clamp(min=-1000).view(H, 1, 1).expand(*q.shape[:2], T, 1).to(q.dtype) * v.shape[-1] ** 0.5
    q = torch.cat((q, logits, q.new_zeros(*q.shape[:3], wide - 1)), dim=-1)
    k, v = F.pad(k, (0, wide, 1, 0)), F.pad(v, (0, wide, 1, 0))
    k[:, :, 0, D] = 1
    if bias is None:
        return (F.pad(q, (0, 0, 1, 0)) if T > 1 else q), k, v, None
    return q, k, v, F.pad(bias, (1, 0), value=True if bias.dtype == torch.bool else 0.0)


def biased(encoding, parts, dropout=0.0):
    """Attention by the fused kernel, with the encoding's bias and the causal mask as one mask of numbers."""
    (pairs,) = parts
    numbers = encoding.bias(pairs.i, pairs.j).masked_fill(~mask(pairs), -math.inf).to(pairs.q.dtype)
    return fused(encoding, parts, dropout, numbers)


def chunked(form, encoding, parts, dropout=0.0):
    """Attention in that form, a few queries at a time over the keys that they can see: memory grows with S, not T S,
    and under a window of W time does with T W."""
    T = len(parts[0].i)
    chunk = min(CHUNK, encoding.chunk) if parts[0].q.device.type == "cpu" else CHUNK
    if chunk >= T:
        return form(encoding, parts, dropout)
    outputs = []
    for begin in range(0, T, chunk):
        end = min(T, begin + chunk)
        rows = [in_sight(parts[0], begin, end)]
        rows += [part.rows(begin, end, slice(None)) for part in parts[1:]]  # sinks, which come before all queries
        compute = functools.partial(form, encoding, rows, dropout)
        # Logits are computed anew in the backward pass, instead of being kept. The fused kernel keeps none.
        recompute = torch.is_grad_enabled() and T > CHUNK and form is not fused
        outputs.append(checkpoint(compute, use_reentrant=False) if recompute else compute())
    return torch.cat(outputs, dim=2)


def in_sight(pairs, begin, end):
    """The Pairs of queries begin ... end - 1 and of the keys from the first to the last that one of them sees."""
    before, sight = len(pairs.j) - len(pairs.i), pairs.sight
    if not sight.span:
        return pairs.rows(begin, end, slice(before + end))
    first, index = sight.first(begin), torch.arange(end, device=pairs.q.device)
    seen = visible(index[begin:], index[first:], sight.window, 0, sight.chunk)
    return replace(pairs.rows(begin, end, slice(first, end)), seen=seen)


def flex(encoding, parts, dropout=0.0):
    """Attention by a kernel compiled for a factor and a bias by distance alone, in float32, and for what a layer sees:
    it skips the blocks of keys that no query of a block sees. T = S, and nothing is (T, T)."""
    (pairs,) = parts
    T, device = len(pairs.i), pairs.q.device
    n = torch.arange(T, device=device)
    scale, bias = (None if table is None else table.contiguous()  # (H, T)
                   for table in (encoding.distance_scale(n), encoding.distance_bias(n)))  # fmt: skip

    def score(product, b, h, i, j):
        n = (i - j).abs()  # later keys take any entry, unseen
        scaled = product if scale is None else product * scale[h, n]
        return scaled if bias is None else scaled + bias[h, n]

    if torch.compiler.is_compiling():
        attention, pattern = flex_attention, blocks(T, pairs.sight, device)
    else:
        attention, pattern = compiled_flex(), kept_blocks(T, pairs.sight, device, torch.is_inference_mode_enabled())
    y = attention(
        pairs.q, pairs.k, pairs.v, scale=pairs.v.shape[-1] ** -0.5, block_mask=pattern,
        enable_gqa=pairs.q.shape[1] != pairs.k.shape[1], score_mod=score,
    )  # fmt: skip
    return turned_back(encoding, y, pairs.i)


def attend(encoding, parts, dropout=0.0):
    """Attention of the queries of `parts`, [Pairs] as `Call.parts` gives them, in the fastest form that is
    right -> (B, H, T, D)."""
    form = choose(encoding, parts, dropout)
    # The fused kernel goes over all keys that it is given, so under a bound it is given those in sight.
    at_once = form is flex or (form is fused and not parts[0].sight.span)
    return form(encoding, parts, dropout) if at_once else chunked(form, encoding, parts, dropout)


def choose(encoding, parts, dropout):
    """The form to compute attention in. In half precision the fused kernel would round biases, which merges distances;
    and on the CPU its gradient for bfloat16 is several times slower than that of plain products."""
    q, pairs = parts[0].q, parts[0]
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if q.dtype != pairs.v.dtype:
        return widened
    if encoding.writes_out or len(parts) > 1 or slow:
        return written_out
    plain = pairs.seen is None and len(pairs.i) == len(pairs.j) and pairs.sink is None and not dropout
    skips = plain and is_half(q) and q.shape[-1] == pairs.v.shape[-1] and flexes(q)
    if not encoding.biases and not encoding.scales:
        return flex if skips and pairs.sight.span else fused
    if not is_half(q):
        return written_out if encoding.scales else biased
    return flex if skips and encoding.by_distance else written_out


def is_half(q):
    return q.dtype in (torch.bfloat16, torch.float16)


def flexes(q):
    """Whether flex_attention takes q (B, H, T, D). It is compiled for every T, so for whole blocks alone."""
    able = q.is_cuda and q.shape[2] % BLOCK == 0 and 16 <= q.shape[3] <= 256
    return able and (torch.compiler.is_compiling() or compiled_flex() is not None)


@functools.cache
def compiled_flex():
    """flex_attention for models that are not compiled themselves; None where nothing compiles. Its eager form would
    make (T, T) of everything, and so would a compiled one that gave up after the usual eight lengths."""
    if no_compiler(torch.device("cuda")):
        return None
    return torch._dynamo.config.patch(recompile_limit=64)(torch.compile(flex_attention, dynamic=False))


def blocks(T, sight, device):
    """flex_attention's mask of T tokens, a multiple of BLOCK, with that Sight: by blocks of keys for every block of
    queries, and never (T, T) as its own way to make one would be."""
    first = torch.arange(0, T, BLOCK, device=device)
    last = first + BLOCK - 1
    # Blocks before the queries' own: some key is seen where the nearest two are a pair, and all where the farthest are.
    some = sees(first[:, None], last, sight)
    full = some & sees(last[:, None], first, sight)
    masked = (some & ~full) | (first[:, None] == first)

    def listed(x):
        """For every row (R, R) bool: the number of its blocks, and all blocks with those first."""
        order = x.int().argsort(dim=-1, descending=True, stable=True)
        return x.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    pair = lambda b, h, i, j: sees(i, j, sight)  # noqa: E731  # as flex_attention asks for it
    return BlockMask.from_kv_blocks(*listed(masked), *listed(full), BLOCK, pair, seq_lengths=(T, T))


@functools.lru_cache(maxsize=32)
def kept_blocks(T, sight, device, inference):
    """`blocks`, kept for all layers and calls; apart for inference_mode, whose tensors gradients cannot use."""
    return blocks(T, sight, device)

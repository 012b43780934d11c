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

from core.encoding import turned_back
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
    groups = pairs.q.shape[1] // pairs.k.shape[1]
    k, v = pairs.k, pairs.v
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return replace(pairs, k=k, v=v, seen=mask(pairs))


def mask(pairs):
    """The Pairs' (T, S) bool: `seen`, or where it is None every key up to the query's own, the queries being the last
    tokens of the keys. Positions do not come into it."""
    if pairs.seen is not None:
        return pairs.seen
    T, S = len(pairs.i), len(pairs.j)
    every = torch.ones(T, S, dtype=torch.bool, device=pairs.q.device)
    return every if T == 1 else every.tril(S - T)


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
    i = i[:, None]  # compared and not subtracted: differences would be eight bytes for every pair
    seen = j <= i
    if not window:
        return seen
    near = j > i - window
    if chunk:
        near &= j // chunk == i // chunk
    return seen & (near | (j < sinks)) if sinks else seen & near


# These forms compute the same faster, each where it can. They take (encoding, parts, dropout), as `written_out` does.


def fused(encoding, parts, dropout=0.0, bias=None):
    """Attention by torch's fused kernel, for logits that the encoding leaves alone, or whose mask `bias` (H, T, S) is
    added to them. Without a mask, T is 1 or S."""
    (pairs,) = parts
    bias, (q, k, v) = pairs.seen if bias is None else bias, (pairs.q, pairs.k, pairs.v)
    T, D = len(pairs.i), v.shape[-1]
    if pairs.sink is not None:
        q, k, v, bias = with_sink(pairs.sink, q, k, v, bias)
    if v.shape[-1] < q.shape[-1]:  # The kernel has one width for all of them.
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
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
    """Attention in that form, a few queries at a time over the keys that they can see: memory grows with S, not T S."""
    T, S = len(parts[0].i), len(parts[0].j)
    chunk = min(CHUNK, encoding.chunk) if parts[0].q.device.type == "cpu" else CHUNK
    if chunk >= T:
        return form(encoding, parts, dropout)
    outputs = []
    for begin in range(0, T, chunk):
        end = min(T, begin + chunk)
        # Nobody sees the keys after the last of these queries. The sinks of a second part come before all of them.
        rows = [parts[0].rows(begin, end, S - T + end)]
        rows += [part.rows(begin, end, len(part.j)) for part in parts[1:]]
        compute = functools.partial(form, encoding, rows, dropout)
        recompute = torch.is_grad_enabled() and T > CHUNK  # in the backward pass, instead of keeping the logits
        outputs.append(checkpoint(compute, use_reentrant=False) if recompute else compute())
    return torch.cat(outputs, dim=2)


def flex(encoding, parts, dropout=0.0):
    """Attention by a kernel compiled for a factor and a bias by distance alone, in float32. T = S, and nothing is
    (T, T)."""
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
        attention, blocks = flex_attention, triangle(T, device)
    else:
        attention, blocks = compiled_flex(), kept_triangle(T, device, torch.is_inference_mode_enabled())
    y = attention(
        pairs.q, pairs.k, pairs.v, scale=pairs.v.shape[-1] ** -0.5, block_mask=blocks,
        enable_gqa=pairs.q.shape[1] != pairs.k.shape[1], score_mod=score,
    )  # fmt: skip
    return turned_back(encoding, y, pairs.i)


def attend(encoding, parts, dropout=0.0):
    """Attention of the queries of `parts`, [Pairs] as `Call.parts` gives them, in the fastest form that is
    right -> (B, H, T, D)."""
    form = choose(encoding, parts, dropout)
    return form(encoding, parts, dropout) if form in (fused, flex) else chunked(form, encoding, parts, dropout)


def choose(encoding, parts, dropout):
    """The form to compute attention in. In half precision the fused kernel would round biases, which merges distances;
    and on the CPU its gradient for bfloat16 is several times slower than that of plain products."""
    q, pairs = parts[0].q, parts[0]
    half = q.dtype in (torch.bfloat16, torch.float16)
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if q.dtype != pairs.v.dtype:
        return widened
    if encoding.writes_out or len(parts) > 1 or slow:
        return written_out
    if not encoding.biases and not encoding.scales:
        return fused
    if not half:
        return written_out if encoding.scales else biased
    whole = pairs.seen is None and len(pairs.i) == len(pairs.j)
    tabled = encoding.by_distance and pairs.sink is None
    return flex if whole and tabled and not dropout and flexes(q) else written_out


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


def causal(b, h, i, j):
    return i >= j


def triangle(T, device):
    """flex_attention's causal mask of T tokens, T a multiple of BLOCK. Its own way to make one starts from (T, T)."""
    i = torch.arange(T // BLOCK, device=device, dtype=torch.int32)  # row i: block i is masked, those before it are full
    diagonal, before = i[:, None].expand(-1, len(i)), i.expand(len(i), -1)
    # For every row: the number of masked blocks and which they are, the number of full blocks and which they are.
    counted = (torch.ones_like(i), diagonal, i, before)
    return BlockMask.from_kv_blocks(*(x[None, None].contiguous() for x in counted), BLOCK, causal, seq_lengths=(T, T))


@functools.lru_cache(maxsize=8)
def kept_triangle(T, device, inference):
    """`triangle`, kept; apart for inference_mode, whose tensors gradients cannot use."""
    return triangle(T, device)

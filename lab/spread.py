"""How widely attention spreads as the context grows, for any encoding, and how much of it goes to the first token (a
sink) and further back than T (dilution, where that does not lower the loss)."""

import math
from dataclasses import replace

import torch

from core import report
from core.attention import ready
from core.cache import Cache, pieces

# Of weights (B, H, T, S), the keys seen (T, S) and a distance: what `attention` averages over queries and heads.
SPREAD = {
    "entropy": lambda weights, seen, distance: torch.special.entr(weights).sum(-1),  # in nats
    # One key alone has an entropy of 0 out of 0, which counts as 0.
    "share": lambda weights, seen, distance: torch.special.entr(weights).sum(-1) / seen.sum(-1).clamp(min=2).log(),
    "first": lambda weights, seen, distance: weights[..., 0],
    # The queries are the last keys, so that the key at column s stands S - T + t - s tokens before query t.
    "far": lambda weights, seen, distance: weights.tril(weights.shape[-1] - weights.shape[-2] - distance).sum(-1),
}


def weights(encoding, pairs):
    """The Pairs that a watch is given (model.GPT.forward) -> weights of attention (B, H, T, S), and which keys are seen
    (T, S). What a learned sink takes is missing in their sum."""
    pairs = ready(pairs)
    wide = torch.promote_types(pairs.q.dtype, torch.float32)  # the fused kernel adds up half precision in float32
    pairs = replace(pairs, q=pairs.q.to(wide), k=pairs.k.to(wide))
    with torch.autocast(pairs.q.device.type, enabled=False):
        logits = encoding.logits(pairs).masked_fill(~pairs.seen, -math.inf)
        if pairs.sink is not None:
            logits = torch.cat((logits, pairs.sink.to(wide).view(-1, 1, 1).expand(*logits.shape[:3], 1)), dim=-1)
        return encoding.weights(logits, [pairs])[..., : len(pairs.j)], pairs.seen


def spread(model, tokens, last, distance, place):
    """tokens (B, L) -> (len(SPREAD), n_layer), sums over the last so many queries of every sequence and the heads."""
    total = torch.zeros(len(SPREAD), model.config.n_layer, dtype=torch.float64)

    def watch(layer, encoding, new, pairs):
        watched = weights(encoding, pairs)
        sums = {name: measure(*watched, distance).sum().cpu().double() for name, measure in SPREAD.items()}
        if len(pairs.j) < cache.next:  # The layer's window has left the first token behind.
            sums["first"] *= 0
        total[:, layer] += torch.stack(list(sums.values()))

    cache, context, queries = Cache(total=tokens.shape[1]), *tokens.tensor_split([tokens.shape[1] - last], dim=1)
    with place.autocast():
        for part in pieces(context, cache, model.bounded):
            model(part, past=cache, last=1)
        for part in queries.split(32, dim=1):  # few of them, whose weights are held for all keys
            model(part, past=cache, last=1, watch=watch)
    return total


@torch.inference_mode()
def attention(model, windows, place, lengths, budget=1 << 12, T=0):
    """Where the last T/4 queries of L tokens look, for every length L that the encoding has positions for. T is the
    model's own unless named.

    windows (N, Lmax + 1) ids, as core.measure.Targets gives them: the input is the L tokens before the last, as it
    is for length_loss. They enter a cache in chunks, about `budget` tokens at once, so memory grows with L alone.
    Returns {"lengths", "entropy", "share", "first", "far", "by_layer"}: for every length the mean over queries, heads
    and layers of the entropy of the weights (nats), of the entropy / ln(keys seen), of the weight on the first token,
    and of that on all keys T tokens back or more; "by_layer" has the same with a list over the layers for every length.
    ValueError for windows that are too short.
    """
    T = T or model.config.train_length
    wanted = max(1, T // 4)
    reached = [length for length in lengths if length <= model.max_length]
    if reached and max(reached) >= windows.shape[1]:
        raise ValueError(f"windows of {windows.shape[1]} ids hold no {max(reached)} tokens and their last target")
    windows, by_layer = torch.as_tensor(windows), {name: [] for name in SPREAD}
    with report.progress(len(windows) * sum(reached), "attention", place) as bar:
        for length in reached:
            last, total = min(wanted, length), 0.0
            for rows in windows[:, -length - 1 : -1].split(max(1, budget // length)):
                total = total + spread(model, rows.to(place.device), last, T, place)
                bar.update(rows.numel())
            for name, sums in zip(SPREAD, total / (len(windows) * last * model.config.n_head), strict=True):
                by_layer[name].append(sums.tolist())
    means = {name: [sum(layers) / len(layers) for layers in at_lengths] for name, at_lengths in by_layer.items()}
    return {"lengths": reached, **means, "by_layer": by_layer}

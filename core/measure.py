"""Measures of prediction: validation loss, loss as the context grows, the share of tasks answered without a mistake.

**The same targets**: `length_loss` scores the last T/4 tokens of windows inside one long validation document each, with
the L tokens that end there as input. The question is the same at every length, and only the context grows: a loss that
falls uses the longer context, one that is flat ignores it, one that rises is broken by it.

Each function takes the `place` (core/place.py) where it computes. The processes of a run share the windows among them.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from core import report
from core.cache import PIECE, WHOLE, Cache, pieces
from core.errors import UserError

MULTIPLES = (0.5, 1, 1.1, 1.25, 1.5, 2, 4, 8, 16)  # of the training length: contexts that text is read with
TASK_MULTIPLES = (0.5, 1, 1.5, 2, 4, 8)  # of the training length: examples of a task


def batches(array, rows):
    """An array (N, ...) as tensors of at most so many rows each."""
    return torch.from_numpy(array).split(rows) if len(array) else []


@torch.inference_mode()
def validation_loss(model, windows, token_bytes, place, rows):
    """Mean loss of `windows`, inputs and targets (N, T), `rows` at a time -> (nats per token, bits per byte).

    token_bytes (V,) are the bytes that each token stands for. A target below 0 does not count.
    """
    inputs, targets = (half[place.rank :: place.world] for half in windows)
    nats = 0.0
    for x, y in zip(batches(inputs, rows), batches(targets, rows), strict=True):
        with place.autocast():
            nats += model(x.to(place.device), y.to(place.device)).cpu().double().sum().item()
    targets = targets[targets >= 0]
    nats, tokens, size = place.sum(nats, targets.size, float(token_bytes[targets].sum()))
    return nats / tokens, nats / size / math.log(2)


# Losses with a context of any length.


@torch.inference_mode()
def token_losses(model, ids, scored, place, **reading):
    """ids (B, L + 1) -> (B, scored) nats of the last tokens, each seen with all before it.

    They enter a cache in chunks, so that attention and logits of long contexts fit in memory. reading: the cache's
    window, sinks and log_n.
    """
    ids, cache, losses = ids.to(place.device), Cache(total=ids.shape[1] - 1, **reading), []
    context, inputs, targets = ids[:, : -scored - 1], ids[:, -scored - 1 : -1], ids[:, -scored:]
    with place.autocast():
        for part in pieces(context, cache, model.bounded):
            model(part, past=cache, last=1)
        for x, y in zip(inputs.split(PIECE, dim=1), targets.split(PIECE, dim=1), strict=True):
            losses.append(model(x, y, past=cache))
    return torch.cat(losses, dim=1).cpu()


def windowed_losses(model, ids, length, stride, place, **reading):
    """ids (B, N + 1) -> (B, N) nats of every token after the first, in windows of `length` tokens that move by `stride`
    and begin at position 0: from the second window on, a token has `length` - `stride` tokens before it or more."""
    losses, done, total = [], 0, ids.shape[1] - 1
    while done < total:
        begin, end = max(0, done - length + stride), min(total, done + (stride if done else length))
        losses.append(token_losses(model, ids[:, begin : end + 1], end - done, place, **reading))
        done = end
    return torch.cat(losses, dim=1)


def at_once(model, length):
    """Windows of so many tokens that are computed together: what their activations and logits leave room for."""
    return max(1, min(WHOLE, (1 << 28) // model.config.vocab_size) // length)


# The same targets, with more and more context before them.


def long_windows(dataset, length, step, count):
    """(<= count, length + 1) ids from the validation set, whose last `step` tokens differ: windows inside one document
    each, from as many documents as there are. Where so many do not fit into documents, windows span them."""
    borders = dataset.documents("val")
    if (np.diff(borders) - length).clip(0).sum() < count * step:
        borders = borders[[0, -1]]
    ends = [
        (turn, end)  # first one window of every document, then a second of each, ...
        for begin, stop in itertools.pairwise(borders)
        for turn, end in enumerate(range(begin + length + 1, stop + 1, step))
    ]
    chosen = [end for _, end in sorted(ends)]
    if len(borders) == 2:  # one document: from all over it
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, min(count, len(chosen))).astype(int)]
    return np.stack([dataset.val[end - length - 1 : end] for end in chosen[:count]]).astype(np.int64)


def scored_at(T, multiples=MULTIPLES):
    """Targets of a window: the last T/4 tokens, and at most half of the shortest context."""
    return max(1, min(T // 4, round(T * min(multiples)) // 2))


def reach(model, T, available, multiples=MULTIPLES):
    """Tokens of context to measure, as far as there is text, and those of them that the encoding has positions for.
    UserError where there are none."""
    wanted = [max(1, round(T * multiple)) for multiple in multiples]
    lengths = [length for length in wanted if length < available]
    if min(wanted) > min(available - 1, model.max_length):
        least = f"{min(wanted)} tokens of context, the least for a T of {T}"
        raise UserError(f"{least}, exceed the text ({available}) or the positions ({model.max_length}); lower T")
    return lengths, [length for length in lengths if length <= model.max_length]


def length_loss(model, dataset, place, count, multiples=MULTIPLES, T=0, **reading):
    """Loss of the same targets against context -> a record {"train_length", "lengths", "loss", ...}, as length.json
    holds it.

    `count` windows are scored at each length that the encoding has positions for. T of lengths and targets is the
    model's own unless named.
    """
    T = T or model.config.train_length
    scored = scored_at(T, multiples)
    lengths, reached = reach(model, T, len(dataset.val), multiples)
    windows = long_windows(dataset, lengths[-1], scored, count)
    mine, losses = windows[place.rank :: place.world], []
    with report.progress(len(mine) * sum(reached), "loss against context", place) as bar:
        for length in reached:
            nats = 0.0
            for rows in batches(mine, at_once(model, length)):
                nats += token_losses(model, rows[:, -length - 1 :], scored, place, **reading).double().sum().item()
                bar.update(length * len(rows))
            (total,) = place.sum(nats)
            losses.append(total / (len(windows) * scored))
    return record(model, T, reached, len(windows), loss=losses, targets=len(windows) * scored)


def record(model, T, lengths, windows, **numbers):
    """A measurement at several lengths as it is kept: the lengths in tokens, and for each of them the numbers."""
    limit = None if model.max_length == math.inf else model.max_length
    return {"train_length": T, "lengths": lengths, **numbers, "windows": windows, "max_length": limit}


# Tasks with known answers.


@torch.inference_mode()
def exact_match(model, task, place, count, multiples=TASK_MULTIPLES, budget=1 << 14, **more):
    """The share of `count` examples of each length whose every target is right -> a record with "exact" and "loss".

    One forward pass over question and answer scores what greedy decoding would write: up to the first wrong token both
    have read the same text, so either no argmax is wrong, or both have the same first one that is. (States beside a
    text are read off it, and nothing is decoded.) Lengths without positions are left out. At most `budget` tokens are
    computed at once. more: for the task, such as depth.
    """
    T, exact, loss = model.config.train_length, [], []
    lengths = sorted({max(task.shortest, int(T * multiple)) for multiple in multiples})
    lengths = [length for length in lengths if length <= model.max_length]
    for length in lengths:
        right, nats, targets = 0, 0.0, 0
        mine = (torch.from_numpy(half[place.rank :: place.world]) for half in task.examples(length, count, **more))
        for x, y in zip(*(half.split(max(1, budget // length)) for half in mine), strict=True):
            y = y.to(place.device)
            with place.autocast():
                logits = model(x.to(place.device))
            wrong = (logits.argmax(-1) != y) & (y >= 0)
            right += int((~wrong.any(1)).sum())
            nats += F.cross_entropy(logits[y >= 0].float(), y[y >= 0], reduction="none").cpu().double().sum().item()
            targets += int((y >= 0).sum())
        right, nats, targets = place.sum(right, nats, targets)
        exact.append(right / count)
        loss.append(nats / targets)
    return record(model, T, lengths, count, exact=exact, loss=loss)

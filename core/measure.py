"""Measures of prediction: validation loss, loss as the context grows, the share of tasks answered without a mistake.

**The same targets**: `length_loss` scores blocks of T/4 tokens, deep inside validation documents, with the L tokens
that end there as input. The question is the same at every length, and only the context grows: a loss that falls uses
the longer context, one that is flat ignores it, one that rises is broken by it.

Each function takes the `place` (core/place.py) where it computes. The processes of a run share the windows among them.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from core import report
from core.cache import PIECE, WHOLE, Cache, pieces
from core.errors import UserError

MULTIPLES = (0.5, 1, 1.1, 1.25, 1.5, 2, 4, 8, 16)  # of the training length: contexts that text is read with
ENOUGH = 0.25  # of a text: from that much of it on, targets are drawn
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


@dataclass
class Targets:
    """Blocks of `scored` tokens of a text, which are scored with any number of tokens before them."""

    text: np.ndarray  # (tokens,) ids, whose last token is taken to stand before its first
    ends: np.ndarray  # (N,) the index after each block
    scored: int
    own: int  # the longest context, in tokens, that is each block's own document alone

    def windows(self, length, back=0):
        """(N, length + 1) ids that end with the blocks, or `back` tokens before their ends."""
        return self.text[self.ends[:, None] - back + np.arange(-length - 1, 0)].astype(np.int64)


def targets(dataset, T, count):
    """`count` blocks of T/4 tokens of the validation set, or as many as there are -> Targets, evenly over documents and
    the places in them: each document has as many as its share of the tokens to draw from.

    Text, T and count alone decide them, so that a model has the same loss at T whichever other lengths are asked for. A
    block near the beginning of its document has no long context of its own: other documents would fill it, which can
    distract and not help. So all blocks have 16 T of their document before them, the longest of MULTIPLES; where less
    than ENOUGH of the text lies that deep, 8, 4, 2 or 1 T; and where documents are shorter still, the text counts as
    one.
    """
    val, documents = dataset.val, dataset.documents("val")
    scored = max(1, min(T, len(val)) // 4)
    depths = [(borders, T * depth) for borders in (documents, documents[[0, -1]]) for depth in (16, 8, 4, 2, 1)]
    enough = [(borders, own) for borders, own in depths if (np.diff(borders) - own).clip(0).sum() >= ENOUGH * len(val)]
    borders, own = (enough or [(documents[[0, -1]], scored)])[0]
    ends = np.concatenate([np.arange(a + own + 1, b + 1, scored) for a, b in itertools.pairwise(borders)])
    count = min(count, len(ends))
    return Targets(val, ends[((np.arange(count) + 0.5) * len(ends) / count).astype(int)], scored, own)


def last_losses(model, windows, scored, place, bar, **reading):
    """windows (N, L + 1) ids -> (N, scored) nats of their last tokens, each seen with all before it. As many windows
    are computed at once as there is room for; bar counts their tokens."""
    losses = [torch.empty(0, scored)]
    for rows in batches(windows, at_once(model, windows.shape[1] - 1)):
        losses.append(token_losses(model, rows, scored, place, **reading))
        bar.update(losses[-1].shape[0] * (windows.shape[1] - 1))
    return torch.cat(losses)


def target_losses(model, drawn, length, place, bar, **reading):
    """(N, scored) nats of Targets, with the `length` tokens before the last of each block as input. Where these are
    less than two blocks, blocks are scored in parts, so that every target has half of `length` before it or more."""
    scored, size, parts = drawn.scored, max(1, min(drawn.scored, length // 2)), []
    for begin in range(0, scored, size):
        end = min(begin + size, scored)
        parts.append(last_losses(model, drawn.windows(length, scored - end), end - begin, place, bar, **reading))
    return torch.cat(parts, dim=1)


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
    model's own unless named. "own_context" is what Targets call `own`: longer windows reach into other documents.
    """
    T = T or model.config.train_length
    _, reached = reach(model, T, len(dataset.val), multiples)
    drawn = targets(dataset, T, count)
    mine, losses = replace(drawn, ends=drawn.ends[place.rank :: place.world]), []
    total = len(drawn.ends) * drawn.scored
    with report.progress(len(mine.ends) * sum(reached), "loss against context", place) as bar:
        for length in reached:
            nats = target_losses(model, mine, length, place, bar, **reading).double().sum().item()
            losses.append(place.sum(nats)[0] / total)
    return record(model, T, reached, len(drawn.ends), loss=losses, targets=total, own_context=drawn.own)


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

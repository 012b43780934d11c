"""The usual perplexities, and the loss by position, over stretches of validation text.

In windows that do not overlap the first tokens have little context, so that longer windows look better for that alone
(the early-token curse; Press et al. 2021, appendix B). In windows that slide by L/2 all but the first tokens have at
least that much. The loss of the same targets, in core/measure.py, has neither fault.
"""

import math

import numpy as np
import torch

import data
from core import report
from core.measure import MULTIPLES, at_once, batches, last_losses, reach, windowed_losses


def usual_losses(model, dataset, token_bytes, place, count, multiples=MULTIPLES, T=0, **reading):
    """Nats per token over `count` stretches of validation text, each as long as the longest context ->

    {"non_overlapping", "sliding", "bits_per_byte" of the former}: a number for each length. token_bytes (V,) are the
    bytes that each token stands for. T is the model's own unless named. reading: the cache's window, sinks and log_n.
    """
    T = T or model.config.train_length
    lengths, reached = reach(model, T, len(dataset.val), multiples)
    ids = stretches(dataset, lengths[-1], count)
    bytes_per_token = float(token_bytes[ids[:, 1:]].mean())

    def loss(length, stride):
        rows = batches(ids, at_once(model, length))
        losses = torch.cat([windowed_losses(model, part, length, stride, place, **reading) for part in rows])
        bar.update(length // stride * losses.numel())
        return losses.double().mean().item()

    with report.progress(3 * len(reached) * ids[:, 1:].size, "perplexity", place) as bar:
        apart, sliding = ([loss(length, max(1, length // parts)) for length in reached] for parts in (1, 2))
    bits = [nats / bytes_per_token / math.log(2) for nats in apart]
    return {"non_overlapping": apart, "sliding": sliding, "bits_per_byte": bits}


def position_loss(model, dataset, place, count, T=0, **reading):
    """Nats per token by position, over `count` windows of 8 T tokens or as many as there are positions -> {"position":
    the middle of every T/4 of them, "loss"}."""
    T = T or model.config.train_length
    ids = stretches(dataset, int(min(8 * T, model.max_length, len(dataset.val) - 1)), count)
    with report.progress(ids[:, 1:].size, "loss by position", place) as bar:
        losses = last_losses(model, ids, ids.shape[1] - 1, place, bar, **reading)
    width = max(1, T // 4)
    bins = losses.double().mean(0).split(width)
    middles = [width * index + len(part) / 2 for index, part in enumerate(bins)]
    return {"position": middles, "loss": [part.mean().item() for part in bins]}


def stretches(dataset, length, count):
    """(<= count, length + 1) ids of the validation set, evenly spread."""
    inputs, targets = data.even_windows(dataset.val, length, count)
    return np.concatenate((inputs, targets[:, -1:]), axis=1)

"""How far a model's abilities extrapolate: examples of a task answered without a mistake, at 1/2 to 4 T."""

import math

import torch
import torch.nn.functional as F

from core import report

TASK_MULTIPLES = (0.5, 1, 1.5, 2, 3, 4)  # of the training length
DEPTHS = (0, 0.25, 0.5, 0.75, 1)  # of the pass key in its text


@torch.inference_mode()
def exact_match(model, task, device, count, multiples=TASK_MULTIPLES, budget=1 << 14, **more):
    """The share of `count` examples of each length whose every target is right -> what length.json holds.

    One forward pass over question and answer scores what greedy decoding would write: up to the first wrong token both
    have read the same text, so either no argmax is wrong, or both have the same first one that is. Lengths without
    positions are left out. At most `budget` tokens are computed at once. more: for the task, such as depth.
    """
    T, exact, loss = model.config.train_length, [], []
    lengths = sorted({max(task.shortest, int(T * multiple)) for multiple in multiples})
    lengths = [length for length in lengths if length <= model.max_length]
    for length in lengths:
        right, nats, asked = 0, 0.0, 0
        mine = (torch.from_numpy(half[device.rank :: device.world]) for half in task.examples(length, count, **more))
        for x, y in zip(*(half.split(max(1, budget // length)) for half in mine), strict=True):
            y = y.to(device.device)
            with device.autocast():
                logits = model(x.to(device.device))
            wrong = (logits.argmax(-1) != y) & (y >= 0)
            right += int((~wrong.any(1)).sum())
            nats += F.cross_entropy(logits[y >= 0].float(), y[y >= 0], reduction="none").cpu().double().sum().item()
            asked += int((y >= 0).sum())
        right, nats, asked = device.sum(right, nats, asked)
        exact.append(right / count)
        loss.append(nats / asked)
    return {
        "train_length": T,
        "lengths": lengths,
        "exact": exact,
        "loss": loss,
        "windows": count,
        "max_length": None if model.max_length == math.inf else model.max_length,
    }


def passkey_map(model, task, device, count, multiples=TASK_MULTIPLES, depths=DEPTHS):
    """Exact match by how far into the text the key stands, and by length: "exact" (depths, lengths)."""
    found = [exact_match(model, task, device, count, multiples, depth=depth) for depth in depths]
    return {
        "train_length": found[0]["train_length"],
        "lengths": found[0]["lengths"],
        "depths": list(depths),
        "exact": [one["exact"] for one in found],
        "windows": count,
    }


def picture_map(path, result):
    """passkey_map's result as a PNG: blue is found, red is not, and right of the dashed line lies what is longer than
    the training examples."""
    T, lengths, depths = result["train_length"], result["lengths"], result["depths"]
    ticks = (
        {place + 0.5: f"{length / T:g} T" for place, length in enumerate(lengths)},
        {place + 0.5: f"{depth:g}" for place, depth in enumerate(depths)},
    )
    report.heat(
        path, torch.tensor(result["exact"]).numpy(), "length of the text", "depth of the pass key", span=(0, 1),
        ticks=ticks, mark_x=sum(length <= T for length in lengths),
    )  # fmt: skip

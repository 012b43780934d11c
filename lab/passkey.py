"""Where in a text a pass key is found: exact match by how deep it stands, and by the length of the text."""

import torch

from core import report
from core.measure import TASK_MULTIPLES, exact_match

DEPTHS = (0, 0.25, 0.5, 0.75, 1)  # of the pass key in its text: the share of the filler before it


def depth_map(model, task, place, count, multiples=TASK_MULTIPLES, depths=DEPTHS):
    """Exact match of `count` examples for each depth and length -> {"train_length", "lengths", "depths",
    "exact": a list over the lengths for each depth, "windows"}."""
    records = [exact_match(model, task, place, count, multiples, depth=depth) for depth in depths]
    shared = {key: records[0][key] for key in ("train_length", "lengths")}
    return shared | {"depths": list(depths), "exact": [record["exact"] for record in records], "windows": count}


def picture(path, depths):
    """A depth_map as a PNG: blue is found, red is not, and right of the dashed line lies what is longer than the
    training examples."""
    T, lengths = depths["train_length"], depths["lengths"]
    ticks = (
        {column + 0.5: f"{length / T:g} T" for column, length in enumerate(lengths)},
        {row + 0.5: f"{depth:g}" for row, depth in enumerate(depths["depths"])},
    )
    report.heat(
        path, torch.tensor(depths["exact"]).numpy(), "length of the text", "depth of the pass key", span=(0, 1),
        ticks=ticks, mark_x=sum(length <= T for length in lengths),
    )  # fmt: skip

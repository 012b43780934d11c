"""How far checkpoints extrapolate: the loss of the same tokens under ever longer contexts.

    python evaluate.py out/rope out/alibi --picture=length.png

The targets are the last T/4 tokens of windows inside one long validation document each, and the input is the L tokens
that end there, for L from T/2 to 8 T. So every length is asked the same question and only the context grows: a curve
that falls uses the longer context, one that is flat ignores it, one that rises is broken by it.
"""

import before_torch  # noqa: F401  # isort: skip

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

import data
import device as devices
import probes
import report
import runs
from configs import flags, make
from errors import UserError, run
from model import Cache, require

MULTIPLES = (0.5, 1, 1.5, 2, 4, 8)  # of the training length
KINDS = {  # what length.json may hold: its name in a table, its form there, and its axis in a picture
    "exact": ("exact match", ".1%", "exact match"),
    "loss": ("nats per token", ".3f", "loss (nats per token)"),
}


@torch.inference_mode()
def validation_loss(model, windows, token_bytes, device, rows):
    """Mean loss of `windows`, inputs and targets (N, T), `rows` at a time -> (nats per token, bits per byte).

    token_bytes (V,) are the bytes that each token stands for. The processes of a run share the windows among them.
    """
    inputs, targets = (half[device.rank :: device.world] for half in windows)
    nats = 0.0
    for x, y in zip(batches(inputs, rows), batches(targets, rows), strict=True):
        with device.autocast():
            nats += model(x.to(device.device), y.to(device.device)).cpu().double().sum().item()
    targets = targets[targets >= 0]
    nats, tokens, size = device.sum(nats, targets.size, float(token_bytes[targets].sum()))
    return nats / tokens, nats / size / math.log(2)


def batches(array, rows):
    return torch.from_numpy(array).split(rows) if len(array) else []


def long_windows(dataset, length, step, count):
    """(<= count, length + 1) ids from the validation set: windows inside one document each, from as many documents as
    there are, whose last `step` tokens differ. Where no document is long enough, windows span documents."""
    borders = dataset.documents("val")
    if np.diff(borders).max() <= length:
        borders = borders[[0, -1]]
    ends = [
        (turn, end)  # first one window of every document, then a second of each, ...
        for begin, stop in itertools.pairwise(borders)
        for turn, end in enumerate(range(begin + length + 1, stop + 1, step))
    ]
    chosen = [end for _, end in sorted(ends)[:count]]
    return np.stack([dataset.val[end - length - 1 : end] for end in chosen]).astype(np.int64)


@torch.inference_mode()
def length_loss(model, dataset, device, count, multiples=MULTIPLES, budget=1 << 14, chunk=512):
    """Loss against context -> {"train_length", "lengths", "loss", ...}, as length.json holds it.

    `count` windows are scored at each length that the encoding has positions for. At most `budget` tokens are computed
    at once, and their context enters a cache in chunks of queries, so the attention of long ones fits in memory.
    """
    T = model.config.train_length
    scored = max(1, T // 4)
    lengths = [max(scored, int(T * multiple)) for multiple in multiples]
    fit = [length for length in lengths if length < len(dataset.val)]
    windows = long_windows(dataset, fit[-1], scored, count)
    mine = windows[device.rank :: device.world]
    losses = []
    reached = [length for length in fit if length <= model.max_length]
    bar = tqdm(
        total=len(mine) * sum(reached), desc="loss against context", unit=" tokens", unit_scale=True, leave=False,
        disable=None if device.main else True,
    )  # fmt: skip
    for length in reached:
        nats = 0.0
        for rows in batches(mine, max(1, budget // length)):
            rows = rows[:, -length - 1 :].to(device.device)
            context, last, targets = rows[:, : length - scored], rows[:, length - scored : -1], rows[:, -scored:]
            cache = Cache(total=length)
            with device.autocast():
                for part in context.split(chunk, dim=1) if context.shape[1] else ():
                    model(part, cache=cache, last=1)
                nats += model(last, targets, cache=cache).cpu().double().sum().item()
            bar.update(length * len(rows))
        (total,) = device.sum(nats)
        losses.append(total / (len(windows) * scored))
    bar.close()
    return {
        "train_length": T,
        "lengths": reached,
        "loss": losses,
        "windows": len(windows),
        "targets": len(windows) * scored,
        "max_length": None if model.max_length == math.inf else model.max_length,
    }


def measure(model, dataset, device, count):
    """What a run closes with, and length.json holds: exact match for a task, else loss against context."""
    return (probes.exact_match if dataset.masks else length_loss)(model, dataset, device, count)


def kind(results):
    """The key of KINDS that all of the results are about, and its value."""
    return next((key, value) for key, value in KINDS.items() if all(key in result for result in results.values()))


def table(results):
    """{name: length_loss's result, or exact_match's} -> lines of a Markdown table: losses in nats per token, or shares
    of examples, at multiples of T."""
    key, (what, form, _) = kind(results)
    multiples = sorted({length / r["train_length"] for r in results.values() for length in r["lengths"]})
    windows = " or ".join(str(count) for count in sorted({r["windows"] for r in results.values()}))
    lines = [f"| {what}, {windows} windows | " + " | ".join(f"{multiple:g} T" for multiple in multiples) + " |"]
    lines.append("|---" * (len(multiples) + 1) + "|")
    for name, result in results.items():
        found = {
            length / result["train_length"]: value for length, value in zip(result["lengths"], result[key], strict=True)
        }
        cells = [format(found[multiple], form) if multiple in found else "no position" for multiple in multiples]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def picture(path, results):
    key, (_, _, label) = kind(results)
    series = {name: ([length / r["train_length"] for length in r["lengths"]], r[key]) for name, r in results.items()}
    report.lines(path, series, "context / training length", label, log_x=True, mark_x=1)


@dataclass
class Options:
    usage: ClassVar[str] = "python evaluate.py RUN [RUN ...] [--key=value ...]"

    targets: int = 256  # windows scored at every length
    table: str = ""  # also write the table to this Markdown file, with what made it
    picture: str = ""  # also draw the curves into this PNG
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    data_dir: str = ""  # where the token files are; by default where the run had them

    def __post_init__(self):
        require(self.targets >= 1, f"--targets must be at least 1, not {self.targets}")
        require(not self.picture or self.picture.endswith(".png"), f"--picture={self.picture} must end in .png")
        for key, path in (("table", self.table), ("picture", self.picture)):
            require(Path(path).parent.is_dir(), f"--{key}={path}: there is no folder {Path(path).parent}")
            require(not path or not Path(path).is_dir(), f"--{key}={path} is a folder; name a file in it")


def main(argv):
    paths, given = flags(argv, Options)
    options = make(Options, given)
    if not paths:
        raise UserError(f"which runs? usage: {Options.usage}")
    opened_runs = [runs.open_run(path) for path in paths]  # all of them first: a mistake comes before the work
    if len({opened.config.tokenizer for opened in opened_runs}) > 1:
        raise UserError("these runs have different tokenizers: a loss per token does not compare them")
    if len({opened.config.dataset in data.tasks.TASKS for opened in opened_runs}) > 1:
        raise UserError("some of these runs learned a task and some a text: exact match and loss do not compare them")
    results, seeds = {}, []
    for path, opened in zip(paths, opened_runs, strict=True):
        config, device = opened.config, devices.choose(options.device, opened.config.dtype)
        config.data_dir = options.data_dir or config.data_dir
        dataset = data.open_dataset(config, opened.encoding)
        if dataset.meta["data_checksum"] != opened.data_checksum:
            raise UserError(f"the corpus of {path} is not the one here ({dataset.folder}); name another --data_dir")
        name = Path(path).name if len({Path(one).name for one in paths}) == len(paths) else path
        results[name] = measure(opened.model.to(device.device), dataset, device, options.targets)
        seeds.append(config.seed)
    lines = table(results)
    print("\n".join(lines))
    if options.table:
        command = " ".join(["python evaluate.py", *argv])
        seed = ", ".join(map(str, sorted(set(seeds))))
        report.write_table(options.table, "evaluate", lines, command, device.device, seed=seed)
    if options.picture:
        picture(options.picture, results)


if __name__ == "__main__":
    run(main)

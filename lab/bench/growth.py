"""How time and memory grow with each size of a model, in a training step and in decoding a token.

    python -m lab.bench.growth docs/growth --rounds=3 --table=docs/speed.md

The word is what the names of two pictures begin with: docs/growth-time.png and docs/growth-memory.png. An exponent of 1
means twice as much for twice the size; it is that of the last step, where what does not grow weighs least.
"""

import core.start  # noqa: F401  # isort: skip

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from core import errors, flags, report
from core import place as places
from core.errors import UserError
from lab.bench import timing
from lab.bench.timing import Decoding

# What grows, by which factors, and the exponents that time and memory may come to: attention is T^2 in training time
# alone; a matrix has width^2 numbers, and Muon's products, which no number of tokens shares, take width^3.
CONTEXT, WINDOWED = "context", "context, with a window"  # of decoding, in training lengths; the others grow in training
GROWTH = {
    "train_length": ((1, 2, 4, 8, 16, 32), 2, 1),
    "n_layer": ((1, 2, 4, 8), 1, 1),
    "n_embd": ((1, 2, 4, 8), 3, 2),
    "batch_size": ((1, 2, 4, 8, 16), 1, 1),
    CONTEXT: ((1, 4, 16, 64, 256), 1, 1),
    WINDOWED: ((1, 4, 16, 64, 256), 0, 0),
}


@dataclass
class Options(Decoding):
    """The flags of this command."""

    usage: ClassVar[str] = "python -m lab.bench.growth PREFIX [configs/FILE.py ...] [--key=value ...]"


def grown(base, size, factor):
    """The config of training when a size has grown; for a context the arguments of timing's `decoding_memory`."""
    if trained(size):
        return [flags.changed(base, **{size: factor * getattr(base, size)})]
    T = base.train_length
    return [base, factor * T, base.decode_tokens, T if size == WINDOWED else None]


def trained(size):
    """Whether the size grows in training, or else in decoding."""
    return size not in (CONTEXT, WINDOWED)


def memory(base, size):
    """MiB at every factor, each measured in a process of its own."""
    peak = timing.training_memory if trained(size) else timing.decoding_memory
    return [timing.in_own_process(peak, *grown(base, size, factor)) for factor in GROWTH[size][0]]


def seconds(base, size):
    """Seconds of a training step, or of a decoded token, at every factor."""
    place = places.choose(base.device, base.dtype, inference=not trained(size))
    calls, functions = {factor: grown(base, size, factor) for factor in GROWTH[size][0]}, {}
    for factor, (config, *context) in calls.items():
        functions[factor] = (
            timing.decoder(config, place, *context) if context else timing.training_step(config, place)[0]
        )
    times = timing.median_times(functions, base.rounds).values()
    return [each if trained(size) else each / base.decode_tokens for each in times]


def measure(options, prefix):
    """Lines of Markdown, a row for every size; and two pictures, whose names begin with the prefix."""
    if not Path(prefix).parent.is_dir():
        raise UserError(f"{prefix}: there is no folder {Path(prefix).parent} for the pictures")
    base = flags.changed(options, batch_size=4, micro_batch_size=0, length_schedule={})
    names = {size: "training" if trained(size) else "decoding" for size in GROWTH}
    costs = {"memory": {size: memory(base, size) for size in GROWTH}}  # It comes first, while this process is small.
    costs["time"] = {size: seconds(base, size) for size in GROWTH}
    rows = []
    for size, (factors, *limits) in GROWTH.items():
        row = [names[size], size, f"x {factors[-2]} to x {factors[-1]}"]
        for values, limit in zip((costs["time"][size], costs["memory"][size]), limits, strict=True):
            exponent = math.log(values[-1] / values[-2]) / math.log(factors[-1] / factors[-2])
            row.append(f"{exponent:.2f} (at most {limit})")
        rows.append(row)
    for name, unit in (("time", "seconds"), ("memory", "MiB")):
        series = {f"{names[size]}: {size}": (GROWTH[size][0], values) for size, values in costs[name].items()}
        report.lines(f"{prefix}-{name}.png", series, "factor by which a size grew", unit, log_x=True, log_y=True)
    return report.markdown(["", "what grows", "over the last step", "exponent of time", "exponent of memory"], rows)


def main(argv):
    timing.command(argv, Options, measure, "what the pictures' names begin with")


if __name__ == "__main__":
    errors.run(main)

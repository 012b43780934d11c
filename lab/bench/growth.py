"""How time and memory grow with each size of a model, in a training step and in decoding a token.

    python -m lab.bench.growth docs/growth --rounds=3 --table=docs/speed.md

The word is what the names of two pictures begin with: docs/growth-time.png and docs/growth-memory.png. An exponent of 1
means twice as much for twice the size; it is that of the last step, where what does not grow weighs least.
"""

import core.start  # noqa: F401  # isort: skip

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from core import errors, report
from core import place as places
from core.errors import UserError
from lab.bench import timing
from lab.bench.timing import Decoding

# What grows, by which factors, and the exponents that time and memory of training may come to: attention is T^2 in time
# alone; a matrix has width^2 numbers, and Muon's products, which no number of tokens shares, take width^3.
GROWTH = {
    "train_length": ((1, 2, 4, 8, 16, 32), 2, 1),
    "n_layer": ((1, 2, 4, 8), 1, 1),
    "n_embd": ((1, 2, 4, 8), 3, 2),
    "batch_size": ((1, 2, 4, 8, 16), 1, 1),
}
CONTEXTS = (1, 4, 16, 64, 256)  # in training lengths


@dataclass
class Options(Decoding):
    """The flags of this command."""

    usage: ClassVar[str] = "python -m lab.bench.growth PREFIX [configs/FILE.py ...] [--key=value ...]"


@dataclass
class Curve:
    """A measurement that is taken at every factor by which a size has grown."""

    name: str  # training or decoding
    size: str  # what grows
    factors: tuple
    limits: tuple  # the exponents of time and of memory that theory allows
    function: Callable  # factor -> a function to be timed
    memory: Callable  # factor -> MiB
    repeats: int = 1  # how often the function does what is measured


def training(base, size, factors, *limits):
    """The Curve of a training step as one key of the config grows."""
    place = places.choose(base.device, base.dtype)

    def config(factor):
        return dataclasses.replace(base, **{size: factor * getattr(base, size)})

    def step(factor):
        return timing.training_step(config(factor), place)[0]

    def memory(factor):
        return timing.in_own_process(timing.training_memory, config(factor))

    return Curve("training", size, factors, limits, step, memory)


def decoding(base, size, window, *limits):
    """The Curve of a decoded token as its context grows."""
    place = places.choose(base.device, base.dtype, inference=True)
    T, count = base.train_length, base.decode_tokens

    def decoder(factor):
        return timing.decoder(base, place, factor * T, count, window)

    def memory(factor):
        return timing.in_own_process(timing.decoding_memory, base, factor * T, count, window)

    return Curve("decoding", size, CONTEXTS, limits, decoder, memory, count)


def exponent(factors, values):
    """The power of the factor with which values grow over the last step."""
    return math.log(values[-1] / values[-2]) / math.log(factors[-1] / factors[-2])


def measure(options, prefix):
    """Lines of Markdown, a row for every curve; and two pictures, whose names begin with the prefix."""
    if not Path(prefix).parent.is_dir():
        raise UserError(f"{prefix}: there is no folder {Path(prefix).parent} for the pictures")
    base = dataclasses.replace(options, batch_size=4, micro_batch_size=0, length_schedule={})
    curves = [training(base, size, *growth) for size, growth in GROWTH.items()]
    curves.append(decoding(base, "context", None, 1, 1))
    curves.append(decoding(base, "context, with a window", base.train_length, 0, 0))
    memory = [[curve.memory(factor) for factor in curve.factors] for curve in curves]  # while this process is small
    seconds = []
    for curve in curves:
        times = timing.median_times({factor: curve.function(factor) for factor in curve.factors}, options.rounds)
        seconds.append([time / curve.repeats for time in times.values()])
    rows = []
    for curve, *values in zip(curves, seconds, memory, strict=True):
        exponents = [exponent(curve.factors, each) for each in values]
        cells = [f"{power:.2f} (at most {limit})" for power, limit in zip(exponents, curve.limits, strict=True)]
        rows.append([curve.name, curve.size, f"x {curve.factors[-2]} to x {curve.factors[-1]}", *cells])
    for name, values, unit in (("time", seconds, "seconds"), ("memory", memory, "MiB")):
        series = {f"{c.name}: {c.size}": (c.factors, each) for c, each in zip(curves, values, strict=True)}
        report.lines(f"{prefix}-{name}.png", series, "factor by which a size grew", unit, log_x=True, log_y=True)
    return report.markdown(["", "what grows", "over the last step", "exponent of time", "exponent of memory"], rows)


def main(argv):
    timing.command(argv, Options, measure, "what the pictures' names begin with")


if __name__ == "__main__":
    errors.run(main)

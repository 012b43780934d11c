"""Time and memory of a token while 32 training lengths are generated, by what the layers see.

    OMP_NUM_THREADS=1 python -m lab.bench.generation docs/generation --rounds=3 --decode_tokens=64 --table=docs/speed.md

The word is what the names of two pictures begin with: docs/generation-time.png and docs/generation-memory.png. Every
token is timed by itself, the models taking turns: a figure is the median of the last `decode_tokens` up to its length.
On a CPU it is the processor's time, which is that of the clock for one thread with nothing beside it.
"""

import core.start  # noqa: F401  # isort: skip

import itertools
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from core import errors, flags, report, runs
from core import place as places
from core.cache import Cache
from core.errors import UserError
from lab.bench import timing
from lab.bench.timing import Decoding

LENGTHS = (1, 2, 4, 8, 16, 32)  # in training lengths


@dataclass
class Options(Decoding):
    """The flags of this command."""

    usage: ClassVar[str] = "python -m lab.bench.generation PREFIX [configs/FILE.py ...] [--key=value ...]"


def schedules(T):
    """{name: value of `posenc`}: all keys for every layer, a quarter of T for all, and that for three layers of four,
    as configs/recipes/rnope_swa.py has it."""
    near = f"rope(window={max(1, T // 4)})"
    return {"rope": "rope", near: near, "rnope_swa": [near, near, near, "none"]}


def reserved(cache):
    """{the most keys that layers see, or "all": KiB that the cache has for keys and values of each of them}."""
    pasts = {"all": cache} | {sight.span: past for sight, past in cache.narrow.items()}
    return {
        span: [sum(x.numel() * x.element_size() for x in held.values()) / 2**10 for held in past.layers.values()]
        for span, past in pasts.items()
        if past.layers
    }


@torch.inference_mode()
def generated(models, lengths, last, place):
    """{name: model} whose texts all grow by a token in turn -> {name: {length: milliseconds of each of the `last`
    tokens up to it}} and {name: {length: `reserved`}}."""
    caches = {name: Cache(total=max(lengths)) for name in models}
    token = torch.zeros(1, 1, dtype=torch.long, device=place.device)
    clock = time.process_time if place.device.type == "cpu" else time.perf_counter
    ms, kib = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for length, (name, model) in itertools.product(range(1, max(lengths) + 1), models.items()):
        start = clock()
        with place.autocast():
            model(token, past=caches[name])
        place.synchronize()
        took = 1e3 * (clock() - start)
        for mark in lengths:
            if mark - last < length <= mark:
                ms[name][mark].append(took)
        if length in lengths:
            kib[name][length] = reserved(caches[name])
    return ms, kib


def measure(options, prefix):
    """Lines of Markdown, a row for every length; and two pictures, whose names begin with the prefix."""
    if not Path(prefix).parent.is_dir():
        raise UserError(f"{prefix}: there is no folder {Path(prefix).parent} for the pictures")
    place = places.choose(options.device, options.dtype, inference=True)
    lengths = [factor * options.train_length for factor in LENGTHS]
    specs = schedules(options.train_length).items()
    models = {name: runs.build(flags.changed(options, posenc=spec), place.device).eval() for name, spec in specs}
    rounds = [generated(models, lengths, options.decode_tokens, place) for _ in range(options.rounds)]

    def median(name, length):
        return statistics.median(itertools.chain.from_iterable(ms[name][length] for ms, _ in rounds))

    times = {name: [median(name, length) for length in lengths] for name in models}
    kib = {name: [sizes[length] for length in lengths] for name, sizes in rounds[0][1].items()}
    whole = {name: [sum(map(sum, sizes.values())) for sizes in each] for name, each in kib.items()}
    for figure, unit, values in (("time", "ms for a token", times), ("memory", "KiB of the cache", whole)):
        series, log_y = {name: (lengths, values[name]) for name in models}, figure == "memory"
        report.lines(f"{prefix}-{figure}.png", series, "tokens so far", unit, log_x=True, log_y=log_y)
    columns = {"tokens": [f"{length:,}" for length in lengths]}
    columns |= {f"ms: {name}": [f"{ms:.2f}" for ms in each] for name, each in times.items()}
    for name, each in kib.items():
        for span in each[0]:
            columns[f"KiB: {name}, a layer that sees {span}"] = [f"{sizes[span][0]:,.0f}" for sizes in each]
    return report.markdown(list(columns), list(zip(*columns.values(), strict=True)))


def main(argv):
    timing.command(argv, Options, measure, "what the pictures' names begin with")


if __name__ == "__main__":
    errors.run(main)

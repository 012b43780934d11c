"""The parts that all benchmarks share: a training step and a decoder to be timed, taking turns, and peaks of memory."""

import concurrent.futures
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from core import flags, report, runs
from core import place as places
from core.cache import Cache, pieces
from core.errors import UserError, nearest, pasted, require, require_range
from core.optimizers import make as make_optimizers
from core.settings import Config
from data import vocabulary
from posenc import ENCODINGS

ROOT = Path(__file__).resolve().parents[2]  # of the repository
LONG = 16  # the long context, in training lengths


@dataclass
class Rounds:
    """The number of times that every figure is taken, and where the table goes."""

    rounds: int = 7  # times that every figure is taken
    table: str = ""  # also write the table to this Markdown file, with what made it

    def __post_init__(self):
        require_range(self, "in 1 ... 10^6", "rounds")
        folder = Path(self.table).parent
        require(folder.is_dir(), f"--table={self.table}: there is no folder {folder}")


@dataclass
class Decoding(Rounds, Config):
    """A Config whose model is measured, and how many tokens it decodes."""

    decode_tokens: int = 16  # tokens decoded in a round

    def __post_init__(self):
        Rounds.__post_init__(self)
        Config.__post_init__(self)
        require_range(self, "in 1 ... 10^6", "decode_tokens")


@dataclass
class Bench(Decoding):
    """A Config whose model is measured with several encodings: the flags of `lab.bench` itself."""

    usage: ClassVar[str] = "python -m lab.bench [configs/FILE.py ...] [--key=value ...]"

    only: str | list = ""  # encodings to measure, a name or a list; by default all


def command(argv, cls, measure, subject="", files=(), on_cpu=False):
    """The whole of a command: read its flags, measure, print the table, and write it where --table says.

    cls: the options' dataclass, whose `usage` names the command. measure(options) returns the lines of the table;
    with a `subject`, which is what the first word of the command line names, it is measure(options, word).
    files: config files that lie under those of the command line. on_cpu: all sides compute there, in their precision.
    """
    words, given = flags.flags(argv, cls)
    if subject and not words:
        raise UserError(f"name {subject}; usage: {cls.usage}")
    named = words[:1] if subject else []
    settings = {}
    for file in (*files, *words[len(named) :]):
        settings |= flags.read(file, cls)
    options = flags.make(cls, settings | given)
    if isinstance(options, Config):
        options.vocab_size = options.vocab_size or vocabulary.load(options.tokenizer).n_vocab
    with torch._dynamo.config.patch(recompile_limit=256):  # By default the ninth model would stay uncompiled.
        lines = measure(options, *named)
    print("\n".join(lines))
    if options.table:
        place = places.choose("cpu") if on_cpu else places.choose(options.device, options.dtype)
        program, precision = cls.usage.split()[2], {} if on_cpu else {"dtype": place.dtype_name}
        made_by = pasted("python", "-m", program, *argv)
        report.write_table(options.table, program.rpartition(".")[2], lines, made_by, place, **precision)


def chosen(only):
    """The encodings to measure, which are `only` (a name or a list, all where it is empty) and none, in their order."""
    names = [only] if isinstance(only, str) else only
    for name in filter(None, names):
        if name not in ENCODINGS:
            raise UserError(f"no positional encoding is called '{name}'; {nearest(name, ENCODINGS)}")
    return [name for name in ENCODINGS if name == "none" or name in names or not only]


def variant(config, name, length):
    """The config with another encoding and context, at the same number of tokens at once."""
    rows = max(1, (config.micro_batch_size or config.batch_size) * config.train_length // length)
    return flags.changed(
        config, posenc=name, train_length=length, batch_size=rows, micro_batch_size=0, length_schedule={}
    )


def training_step(config, place, steps=1):
    """A function that trains so many steps on random tokens before it waits for the GPU, and the number of tokens."""
    model = runs.build(config, place.device)
    forward, _ = places.compiled(model, config.compile, place)
    return stepper(forward, make_optimizers(model, config, place), config, place, steps)


def stepper(forward, optimizers, config, place, steps):
    """`training_step` of any model and its optimizers. forward: tokens, targets (B, T) -> losses, or their mean."""
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.train_length), device=place.device)

    def step():
        for _ in range(steps):
            with place.autocast():
                loss = forward(tokens, tokens).mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        place.synchronize()

    return step, steps * tokens.numel()


def decoder(config, place, context, count, window=None):
    """A function that decodes `count` tokens after `context` others from a cache, under a window where one is named.

    Without a window every call begins at the same context. Encodings whose positions end are read as they go on.
    """
    spec = ENCODINGS[config.posenc].unbounded if config.posenc in ENCODINGS else None
    model = runs.build(flags.changed(config, posenc=spec or config.posenc), place.device).eval()
    context = min(context, model.max_length - count)
    tokens = torch.randint(config.vocab_size, (1, context), device=place.device)
    cache = Cache(window, total=context + count)
    with torch.inference_mode(), place.autocast():
        for part in pieces(tokens, cache, model.bounded):
            model(part, past=cache, last=1)

    @torch.inference_mode()
    def decode():
        with place.autocast():
            for _ in range(count):
                model(tokens[:, :1], past=cache)
        place.synchronize()
        if window is None:  # Forget the new tokens; what they wrote behind the context is written over.
            cache.pos, cache.length, cache.next = cache.pos[:context], context, context

    return decode


def product(place, dtype, size, times=1):
    """A function that multiplies two matrices (size, size) so many times, and its floating-point operations."""
    a, b, out = (torch.randn(size, size, device=place.device).to(dtype) for _ in range(3))

    def multiply():
        for _ in range(times):
            torch.mm(a, b, out=out)
        place.synchronize()

    return multiply, times * 2 * size**3


def median_times(functions, rounds):
    """{key: function} -> {key: median seconds}: one call each to warm up, then all of them in turn."""
    for function in tqdm(functions.values(), "warming up", disable=None, leave=False):
        function()
    seconds = {key: [] for key in functions}
    for _ in tqdm(range(rounds), "measuring", disable=None, leave=False):
        for key, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(times) for key, times in seconds.items()}


def spread(values, form):
    """Median (least - most) of some numbers, each in the format `form`; a dash where one is None."""
    if None in values:
        return "-"
    middle, low, high = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} - {high})"


def training_memory(config):
    """MiB at the peak of three training steps, of the whole process: see `in_own_process`."""
    place = places.choose(config.device, config.dtype)
    step, _ = training_step(config, place)
    for _ in range(3):
        step()
    return most_memory(place)


def decoding_memory(config, context, count, window):
    """MiB at the peak of decoding `count` tokens after `context`, of the whole process: see `in_own_process`."""
    place = places.choose(config.device, config.dtype, inference=True)
    decoder(config, place, context, count, window)()
    return most_memory(place)


def most_memory(place):
    """MiB that this process held at most, or on CUDA its part of the GPU."""
    import resource  # Windows has none.

    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def in_own_process(function, *arguments):
    """function(*arguments), called in a fresh process.

    On Linux the peak of a process starts from that of its parent, so memory is measured while the parent is small.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def plain_environment():
    """The environment of this process without what core/start.py laid over it, for other programs and commits."""
    return {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}

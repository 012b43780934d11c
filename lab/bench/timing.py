"""Speed and memory of every encoding, in training and in cached decoding, at the training length T and at 16 T.

    python bench.py                                    # every encoding, in the default model
    python bench.py configs/small_gpu.py --table=docs/bench.md
    python bench.py --before=FOLDER                    # and a checkout of an earlier commit, by turns
    python bench.py --growth=docs/growth               # what grows how fast, with pictures
    python bench.py --race=NANOGPT --rounds=3          # training against a checkout of nanoGPT
    python bench.py --decode=NANOGPT --rounds=3        # decoding against it, and against transformers if installed
    python bench.py --published=hf:FOLDER --rounds=3   # a published model here and in transformers
    python bench.py --gpu                              # what one NVIDIA GPU does: gpu.py

Encodings take turns, round after round, and each figure is the median of its rounds: machines drift, ratios within one
run hold. Memory is the peak of a process of its own.
"""

import core.start  # noqa: F401  # isort: skip

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from core import flags as configs
from core import optimizers, report, runs
from core import place as places
from core.cache import Cache, pieces
from core.errors import UserError, nearest, require, run
from core.settings import Config
from data import vocabulary
from lab.bench import race
from model import generate
from posenc import ENCODINGS

LONG = 16  # the long context, in training lengths
CONTEXT = 1024  # where decoding from a cache is compared with computing the whole context anew


@dataclass
class Bench(Config):
    """A Config, and how to measure."""

    usage: ClassVar[str] = "python bench.py [configs/FILE.py ...] [--key=value ...]"

    only: str | list = ""  # encodings to measure beside none, a name or a list; by default all
    rounds: int = 7  # times that every figure is taken
    decode_tokens: int = 16  # tokens decoded in a round
    table: str = ""  # also write the table to this Markdown file, with what made it
    before: str = ""  # a checkout of an earlier commit, whose training steps take turns with ours
    growth: str = ""  # time and memory as each size grows, with pictures whose names begin so
    race: str = ""  # a checkout of nanoGPT: its example for the CPU and configs/shakespeare.py as they are, by turns
    decode: str = ""  # a checkout of nanoGPT: decode with it, with transformers (if installed) and with ours, by turns
    published: str = ""  # a published model, hf:FOLDER: prefill and decoding here and in transformers, by turns
    gpu: bool = False  # measure one NVIDIA GPU instead, with configs/gpt2.py's model: gpu.py
    nanogpt: str = ""  # a checkout of nanoGPT, whose model --gpu measures too

    def __post_init__(self):
        super().__post_init__()
        for key in ("table", "growth"):
            folder = Path(getattr(self, key)).parent
            require(folder.is_dir(), f"--{key}={getattr(self, key)}: there is no folder {folder}")
        require(self.rounds >= 1, f"--rounds must be at least 1, not {self.rounds}")
        fewest = 4 if self.decode else 3 if self.published else 1  # the first ones are not timed
        require(self.decode_tokens >= fewest, f"--decode_tokens must be at least {fewest}, not {self.decode_tokens}")
        require(self.gpu or not self.nanogpt, "--nanogpt=PATH goes with --gpu")
        found = not self.nanogpt or (Path(self.nanogpt) / "model.py").is_file()
        require(found, f"--nanogpt={self.nanogpt}: there is no model.py in it")


def chosen(only):
    """The encodings to measure; all are compared with none."""
    names = [only] if isinstance(only, str) else only
    for name in filter(None, names):
        if name not in ENCODINGS:
            raise UserError(f"no positional encoding is called '{name}'; {nearest(name, ENCODINGS)}")
    return [name for name in ENCODINGS if name == "none" or name in names or not only]


def variant(config, name, length):
    """The config with another encoding and context, at the same number of tokens at once."""
    rows = max(1, (config.micro_batch_size or config.batch_size) * config.train_length // length)
    return dataclasses.replace(
        config, posenc=name, train_length=length, batch_size=rows, micro_batch_size=0, length_schedule={}
    )


def training_step(config, device, steps=1):
    """A function that trains so many steps on random tokens before it waits for the GPU, and the number of those."""
    model = runs.build(config, device.device)
    updaters = optimizers.make(model, config, device)
    forward, _ = places.compiled(model, config.compile, device)
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.train_length), device=device.device)

    def step():
        for _ in range(steps):
            with device.autocast():
                loss = forward(tokens, tokens).mean()
            loss.backward()
            for updater in updaters:
                updater.step()
                updater.zero_grad(set_to_none=True)
        device.synchronize()

    return step, steps * tokens.numel()


def decoder(config, device, context, count, window=None):
    """A function that decodes `count` tokens after `context` ones from a cache, with a window perhaps."""
    spec = ENCODINGS[config.posenc].unbounded if config.posenc in ENCODINGS else None
    model = runs.build(dataclasses.replace(config, posenc=spec or config.posenc), device.device).eval()
    context = min(context, model.max_length - count)
    tokens = torch.randint(config.vocab_size, (1, context), device=device.device)
    cache = Cache(window, total=context + count)
    with torch.inference_mode(), device.autocast():
        for part in pieces(tokens, cache):
            model(part, past=cache, last=1)

    @torch.inference_mode()
    def decode():
        with device.autocast():
            for _ in range(count):
                model(tokens[:, :1], past=cache)
        device.synchronize()
        if window is None:
            cache.pos, cache.length, cache.next = cache.pos[:context], context, context  # as it was

    return decode


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


def peak_memory(config):
    """MiB at the peak of three training steps; of the whole process, so call it in one of its own."""
    device = places.choose(config.device, config.dtype)
    step, _ = training_step(config, device)
    for _ in range(3):
        step()
    return peak(device)


def decoding_memory(config, context, count, window):
    """The same of decoding."""
    device = places.choose(config.device, config.dtype, inference=True)
    decoder(config, device, context, count, window)()
    return peak(device)


def peak(device):
    """MiB that this process, or its part of the GPU, held at most."""
    import resource  # Windows has none

    if device.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def in_own_process(function, *arguments):
    """function(*arguments), called in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def every_encoding(config):
    """The table of all encodings, and two lines: against recomputing, and against what products alone would take."""
    device = places.choose(config.device, config.dtype)
    serving = places.choose(config.device, config.dtype, inference=True)
    T, names = config.train_length, chosen(config.only)
    lengths = (T, LONG * T)

    # First, while this process is small: on Linux a new one starts from its parent's peak.
    cells = [(name, n) for name in names for n in lengths]
    memory = {
        cell: in_own_process(peak_memory, variant(config, *cell))
        for cell in tqdm(cells, "memory", disable=None, leave=False)
    }
    steps = {(name, n): training_step(variant(config, name, n), device) for name in names for n in lengths}
    products = {("product", dtype): product(dtype, device) for dtype in {torch.float32: 0, device.dtype: 0}}
    seconds = median_times({key: step for key, (step, _) in (steps | products).items()}, config.rounds)
    speed = {key: steps[key][1] / seconds[key] for key in steps}
    per_token = runs.build(config).flops_per_token()
    peaks = {key[1]: products[key][1] / seconds[key] for key in products}
    del steps
    decoders = {
        (name, n): decoder(variant(config, name, T), serving, n, config.decode_tokens)
        for name in names
        for n in lengths
    }
    decoded = median_times(decoders, config.rounds)
    del decoders
    long, rows = f"at {LONG} T", []
    for name in names:
        row = [name]
        for n in lengths:
            row += [f"{speed[name, n]:,.0f}", f"{speed[name, n] / speed['none', n]:.2f}"]
        row += [f"{decoded[name, n] / config.decode_tokens * 1e3:.2f}" for n in lengths]
        row += [f"{memory[name, n]:,.0f}" for n in lengths]
        rows.append(row)
    heads = f"train tokens/s at T = {T}", "/ none", long, "/ none", "decode ms/token at T", long, "train MiB at T", long
    reached = ", ".join(
        f"{speed['none', T] * per_token / peak:.1%} of the {peak / 1e9:,.0f} that products of 4096 x 4096 reach in "
        f"{str(dtype).removeprefix('torch.')}"
        for dtype, peak in peaks.items()
    )
    return [
        *report.markdown(["encoding", *heads], rows), "", against_recomputing(config, serving), "",
        f"none trains at {speed['none', T] * per_token / 1e9:,.0f} GFLOP/s: {reached}",
    ]  # fmt: skip


def product(dtype, device, n=4096):
    """A function that multiplies two matrices, and its floating-point operations."""
    a = torch.randn(n, n, device=device.device).to(dtype)

    def multiply():
        a @ a
        device.synchronize()

    return multiply, 2 * n**3


def against_recomputing(config, device):
    """One line: a token from the cache against a token from its whole context of CONTEXT tokens."""
    small = variant(config, "rope", config.train_length)
    model = runs.build(small, device.device).eval()
    tokens = torch.randint(small.vocab_size, (1, CONTEXT), device=device.device)

    def recompute():
        with device.autocast():
            next(generate(model, tokens, 1, crop=CONTEXT))
        device.synchronize()

    functions = {"cache": decoder(small, device, CONTEXT, config.decode_tokens), "recompute": recompute}
    seconds = median_times(functions, 3 * config.rounds)
    cached, anew = seconds["cache"] / config.decode_tokens * 1e3, seconds["recompute"] * 1e3
    return (
        f"rope, context of {CONTEXT}: {cached:.2f} ms/token from the cache, {anew:.2f} ms computing it anew: "
        f"{anew / cached:.0f} times"
    )


# Answers questions on its standard input, one a line: the seconds of a training step of the checkout in its folder.
STEPS = """
import json, sys
import core.start, time, bench, configs, device
config, here = configs.make(bench.Bench, json.loads(sys.argv[1])), device.choose("cpu")
steps = {}
for line in sys.stdin:
    name, length = line.split()
    if line not in steps:
        steps[line] = bench.training_step(bench.variant(config, name, int(length)), here)[0]
        steps[line]()
    start = time.perf_counter()
    steps[line]()
    print(time.perf_counter() - start, flush=True)
"""


def before_and_after(config):
    """Training steps of a checkout of an earlier commit and of this one, by turns -> lines of a table."""
    if not (Path(config.before) / "bench.py").is_file():
        raise UserError(
            f"--before={config.before}: there is no bench.py in it; make one with git worktree add FOLDER COMMIT"
        )
    known = {field.name for field in dataclasses.fields(Config)}
    given = {key: value for key, value in dataclasses.asdict(config).items() if key in known} | {"length_schedule": {}}
    folders = {"before": config.before, "after": Path(__file__).parent.parent.parent}
    workers = {
        key: subprocess.Popen(
            [sys.executable, "-c", STEPS, json.dumps(given)],
            cwd=folder,
            env=race.plain_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for key, folder in folders.items()
    }

    def seconds(key, name, length):
        with contextlib.suppress(BrokenPipeError):
            print(name, length, file=workers[key].stdin, flush=True)
        answer = workers[key].stdout.readline()
        if not answer:
            raise UserError(f"the steps of {folders[key]} failed: see above")
        return float(answer)

    T, rows = config.train_length, []
    for name in tqdm(chosen(config.only), "before and after", disable=None):
        row = [name]
        for length in (T, LONG * T):
            pairs = [[seconds(key, name, length) for key in workers] for _ in range(config.rounds)]
            old, new = (statistics.median(times) for times in zip(*pairs, strict=True))
            ratio = statistics.median(before / after for before, after in pairs)
            row += [f"{old * 1e3:,.0f}", f"{new * 1e3:,.0f}", f"{ratio:.2f}"]
        rows.append(row)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    heads = [
        f"{what} at {where}" for where in ("T", f"{LONG} T") for what in ("ms before", "ms after", "before / after")
    ]
    return report.markdown(["encoding", *heads], rows)


# What grows, by which factors, and the exponents that time and memory of training may come to: attention is T^2 in time
# alone; a matrix has width^2 numbers, and Muon's products, which no number of tokens shares, take width^3.
GROWTH = {
    "train_length": ((1, 2, 4, 8, 16, 32), 2, 1),
    "n_layer": ((1, 2, 4, 8), 1, 1),
    "n_embd": ((1, 2, 4, 8), 3, 2),
    "batch_size": ((1, 2, 4, 8, 16), 1, 1),
}


def growth(config):
    """Time and memory as one size after another grows, of a training step and of decoding a token -> lines of a table,
    and two pictures."""
    base = dataclasses.replace(config, batch_size=4, micro_batch_size=0, length_schedule={})
    device = places.choose(config.device, config.dtype)
    serving = places.choose(config.device, config.dtype, inference=True)
    factors, T, count = (1, 4, 16, 64, 256), config.train_length, config.decode_tokens
    spans = {"context": None, "context, with a window": T}
    sizes = {
        key: {f: dataclasses.replace(base, **{key: f * getattr(base, key)}) for f in factors}
        for key, (factors, *_) in GROWTH.items()
    }
    # First, while this process is small: on Linux a new one starts from its parent's peak.
    memory = {key: [in_own_process(peak_memory, one) for one in sizes[key].values()] for key in sizes}
    for name, window in spans.items():
        memory[name] = [in_own_process(decoding_memory, base, f * T, count, window) for f in factors]
    curves = {}  # (what, size) -> factors, seconds, MiB, the exponents they may have
    for key, variants in sizes.items():
        steps = {f: training_step(one, device)[0] for f, one in variants.items()}
        seconds = median_times(steps, config.rounds)
        curves["training", key] = list(seconds), list(seconds.values()), memory[key], GROWTH[key][1:]
    for name, window in spans.items():
        decoders = {f: decoder(base, serving, f * T, count, window) for f in factors}
        seconds = [found / count for found in median_times(decoders, config.rounds).values()]
        curves["decoding", name] = factors, seconds, memory[name], (0, 0) if window else (1, 1)
    rows = []
    for (what, key), (factors, seconds, memory, most) in curves.items():
        step = math.log(factors[-1] / factors[-2])
        found = [math.log(values[-1] / values[-2]) / step for values in (seconds, memory)]
        cells = [f"{exponent:.2f} (at most {limit})" for exponent, limit in zip(found, most, strict=True)]
        rows.append([what, key, f"x {factors[-2]} to x {factors[-1]}", *cells])
    for index, (name, unit) in enumerate((("time", "seconds"), ("memory", "MiB")), start=1):
        series = {f"{what}: {key}": (curve[0], curve[index]) for (what, key), curve in curves.items()}
        report.lines(f"{config.growth}-{name}.png", series, "factor by which a size grew", unit, log_x=True, log_y=True)
    return report.markdown(["", "what grows", "over the last step", "exponent of time", "exponent of memory"], rows)


def one_gpu(config):
    from lab.bench import gpu  # which measures with what is defined here

    device = places.choose(config.device, config.dtype)
    gpu.need_cuda(device)
    return gpu.measure(config, device, chosen(config.only) if config.only else gpu.NAMES)


def main(argv):
    _, settings = configs.parse(argv, Bench)
    if settings.get("gpu"):
        _, settings = configs.parse([str(Path("configs/gpt2.py")), *argv], Bench)
    config = configs.make(Bench, settings)
    config.vocab_size = config.vocab_size or vocabulary.load(config.tokenizer).n_vocab
    asked = [name for name in KINDS if getattr(config, name)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two measurements; take one at a time")
    name = asked[0] if asked else "bench"
    with torch._dynamo.config.patch(recompile_limit=256):  # or the ninth model, and all after it, would not be compiled
        lines = KINDS.get(name, every_encoding)(config)
    print("\n".join(lines))
    if config.table:
        on_cpu = name in ("race", "decode", "published", "before")  # each side in its own precision
        device = places.choose("cpu" if on_cpu else config.device, config.dtype)
        more = {} if on_cpu else {"dtype": device.dtype_name}
        report.write_table(config.table, name, lines, " ".join(["python bench.py", *argv]), device, **more)


KINDS = {
    "before": before_and_after, "growth": growth, "race": race.run, "decode": race.decode, "published": race.published,
    "gpu": one_gpu,
}  # fmt: skip


if __name__ == "__main__":
    run(main)

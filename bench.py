"""Speed and memory of every encoding, in training and in cached decoding, at the training length T and at 16 T.

    python bench.py                          # the default model
    python bench.py configs/small_gpu.py --table=docs/bench.md
    python bench.py --gpu                    # gpu.py's table, of one NVIDIA GPU

Encodings take turns, round after round, and each figure is the median of its rounds: machines drift, ratios within one
run hold. Memory is the peak of a process of its own.
"""

import before_torch  # noqa: F401  # isort: skip

import concurrent.futures
import dataclasses
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

import configs
import device as devices
import optimizers
import report
import runs
from configs import Config
from data import tokenizer
from errors import UserError, run
from model import Cache, generate, require
from posenc import ENCODINGS, nearest

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
    gpu: bool = False  # measure one NVIDIA GPU instead, with configs/gpt2.py's model: gpu.py
    nanogpt: str = ""  # a checkout of nanoGPT, whose model --gpu measures too

    def __post_init__(self):
        super().__post_init__()
        require(Path(self.table).parent.is_dir(), f"--table={self.table}: there is no folder {Path(self.table).parent}")
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
    forward, _ = devices.compiled(model, config.compile, device.device)
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


def decoder(config, device, context, count):
    """A function that decodes `count` tokens after `context` ones from a cache."""
    spec = ENCODINGS[config.posenc].unbounded if config.posenc in ENCODINGS else None
    model = runs.build(dataclasses.replace(config, posenc=spec or config.posenc), device.device).eval()
    context = min(context, model.max_length - count)
    tokens = torch.randint(config.vocab_size, (1, context), device=device.device)
    cache = Cache(total=context + count)
    with torch.inference_mode(), device.autocast():
        for part in tokens.split(512, dim=1):
            model(part, cache=cache, last=1)

    @torch.inference_mode()
    def decode():
        with device.autocast():
            for _ in range(count):
                model(tokens[:, :1], cache=cache)
        device.synchronize()
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
    import resource  # Windows has none

    device = devices.choose(config.device, config.dtype)
    step, _ = training_step(config, device)
    for _ in range(3):
        step()
    if device.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def in_own_process(function, *arguments):
    """function(*arguments), called in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def main(argv):
    _, settings = configs.parse(argv, Bench)
    if settings.get("gpu"):
        _, settings = configs.parse([str(Path(configs.__file__).with_name("gpt2.py")), *argv], Bench)
    config = configs.make(Bench, settings)
    config.vocab_size = config.vocab_size or tokenizer.load(config.tokenizer).n_vocab
    device = devices.choose(config.device, config.dtype)
    torch._dynamo.config.recompile_limit = 256  # or the ninth model, and all after it, would not be compiled
    if config.gpu:
        import gpu  # which measures with what is defined here

        gpu.need_cuda(device)
        return show(
            gpu.measure(config, device, chosen(config.only) if config.only else gpu.NAMES), config, argv, device
        )
    serving = devices.choose(config.device, config.dtype, inference=True)
    T, names = config.train_length, chosen(config.only)
    lengths = (T, LONG * T)

    # First, while this process is small: on Linux a new one starts from its parent's peak.
    cells = [(name, n) for name in names for n in lengths]
    memory = {
        cell: in_own_process(peak_memory, variant(config, *cell))
        for cell in tqdm(cells, "memory", disable=None, leave=False)
    }
    steps = {(name, n): training_step(variant(config, name, n), device) for name in names for n in lengths}
    trained = median_times({key: step for key, (step, _) in steps.items()}, config.rounds)
    speed = {key: steps[key][1] / seconds for key, seconds in trained.items()}
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
    lines = [*report.markdown(["encoding", *heads], rows), "", against_recomputing(config, serving)]
    show(lines, config, argv, device)


def show(lines, config, argv, device):
    """Print a table, and write it where it was asked for."""
    print("\n".join(lines))
    if config.table:
        command = " ".join(["python bench.py", *argv])
        report.write_table(config.table, "bench", lines, command, device.device, dtype=device.dtype_name)


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


if __name__ == "__main__":
    run(main)

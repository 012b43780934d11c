"""One NVIDIA GPU with these models, beside what it could do: training, memory and decoding.

    python -m lab.bench.gpu --table=docs/gpu.md
    python -m lab.bench.gpu --nanogpt=../nanoGPT

The model is that of configs/gpt2.py, with rope and AdamW; flags change its sizes. A figure that cannot be had leaves
its cell empty and a line below the tables that says why; so does one that was not begun in the first MINUTES.
"""

import core.start  # noqa: F401  # isort: skip

import contextlib
import gc
import io
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from core import errors, flags, report, runs
from core import place as places
from core.errors import UserError, require
from lab.bench import others, timing
from lab.bench.timing import ROOT, Bench, variant
from model import generate

NAMES = "none", "rope", "alibi", "t5", "kerple", "sandwich", "fire", "fox", "cope"  # one of each way into attention
FRUGAL = "none", "rope", "alibi", "kerple"  # whose memory is measured
LENGTHS = 1, 4, 16, 32  # in training lengths
LAYERS = 4  # of the model that all encodings are put into
STEPS = 5  # between two looks at the clock
MINUTES = 6
PRODUCT, MEGABYTES = 8192, 1024  # rows and columns of a product, and the size of a copy, that measure the machine


@dataclass
class Options(Bench):
    """The flags of this command."""

    usage: ClassVar[str] = "python -m lab.bench.gpu [configs/FILE.py ...] [--key=value ...]"

    decode_tokens: int = 128  # tokens decoded in a round
    nanogpt: str = ""  # a checkout of nanoGPT, whose model is measured too

    def __post_init__(self):
        super().__post_init__()
        there = not self.nanogpt or (Path(self.nanogpt) / "model.py").is_file()
        require(there, f"--nanogpt={self.nanogpt}: there is no model.py in it")


class Attempts:
    """Figures that may fail: `notes` gathers why."""

    def __init__(self):
        self.end, self.notes = time.monotonic() + 60 * MINUTES, []

    def __call__(self, what, function, *arguments):
        """function(*arguments), or None."""
        try:
            if time.monotonic() > self.end:
                raise UserError("no time was left")
            return function(*arguments)
        except Exception as error:  # A compiler, a kernel or a foreign model may raise anything.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.notes.append(f"- {what}: {reason[:150]}")


def copy(place, megabytes, times):
    """A function that copies so many MiB so many times, and the bytes that it reads and writes."""
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)

    def repeat():
        for _ in range(times):
            target.copy_(source)
        place.synchronize()

    return repeat, times * 2 * source.numel()


def machine(place, rounds):
    """The machine's own speed: (FLOP/s of a product of two matrices, bytes/s that a copy reads and writes)."""
    work = {"product": timing.product(place, place.dtype, PRODUCT, 10), "copy": copy(place, MEGABYTES, 10)}
    seconds = timing.median_times({key: function for key, (function, _) in work.items()}, rounds)
    return tuple(amount / seconds[key] for key, (_, amount) in work.items())


def warmed(make, *arguments):
    """What make(*arguments) returns, a step and its tokens, after two calls of the step, which compile it."""
    step, tokens = make(*arguments, STEPS)
    step()
    step()
    return step, tokens


def nanogpt_step(checkout, config, place, steps):
    """`timing.training_step` of nanoGPT's own model and optimizer."""
    sizes = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, vocab_size=config.vocab_size)
    module, betas = others.nanogpt(checkout), (config.beta1, config.beta2)
    model = others.build(module, block_size=config.train_length, bias=False, dropout=0.0, **sizes).to(place.device)
    with contextlib.redirect_stdout(io.StringIO()):  # It would print its sizes.
        optimizer = model.configure_optimizers(config.weight_decay, 6e-4, betas, place.device.type)
    forward, _ = places.compiled(model, config.compile, place)
    return timing.stepper(lambda x, y: forward(x, y)[1], [optimizer], config, place, steps)


def speeds(steps, rounds):
    """{name: (step, its tokens), or None where it failed} -> {name: tokens/s}, measured in turn."""
    steps = {name: step for name, step in steps.items() if step}
    seconds = timing.median_times({name: step for name, (step, _) in steps.items()}, rounds)
    return {name: steps[name][1] / seconds[name] for name in steps}


def gradient_memory(config, place):
    """GiB at the peak of a forward and a backward pass, with the weights and their gradients; not compiled."""
    gc.collect()  # Models whose parts know one another are freed by this alone.
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = runs.build(config, place.device)
    tokens = torch.randint(config.vocab_size, (1, config.train_length), device=place.device)
    for _ in range(2):  # The first may compile a kernel.
        torch.cuda.reset_peak_memory_stats()
        with place.autocast():
            loss = model(tokens, tokens).mean()
        loss.backward()
        model.zero_grad()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def decode_ms(model, compiled, context, count, place):
    """Milliseconds for each of `count` tokens that generate() writes after `context` ones, a single sequence."""
    tokens = torch.randint(model.config.vocab_size, (1, context), device=place.device)
    stream = generate(model, tokens, count + 4, temperature=0, compiled=compiled)
    for _ in range(4):  # The first takes in the context, the others compile and record the graph.
        next(stream)
    place.synchronize()
    start = time.perf_counter()
    for _ in stream:
        pass
    place.synchronize()
    return (time.perf_counter() - start) / count * 1e3


def decoding(config, place):
    """(median of decode_ms, bytes of weights that every token reads) of a model in the place's half precision."""
    model = runs.build(config, place.device).to(place.dtype).eval()
    compiled, _ = places.compiled(model, config.compile, place, decoding=True)
    compiled = compiled if compiled is not model else None
    times = [decode_ms(model, compiled, config.train_length, config.decode_tokens, place) for _ in range(4)][1:]
    unread = 0 if config.tie_embeddings else model.token.weight.nbytes
    return statistics.median(times), sum(p.nbytes for p in model.parameters()) - unread


def machine_table(place, flops, bandwidth):
    product = f"product of two {PRODUCT:,} x {PRODUCT:,} matrices, {place.dtype_name}", f"{flops / 1e12:,.1f} TFLOP/s"
    copied = f"copy of {MEGABYTES:,} MiB, reading and writing", f"{bandwidth / 1e9:,.0f} GB/s"
    return report.markdown(["the machine", "median"], [product, copied])


def training_table(config, place, attempt, flops):
    """The whole model, and nanoGPT's where there is a checkout, beside the FLOP/s of the machine."""
    steps = {"rope": attempt(f"{config.n_layer} layers", warmed, timing.training_step, config, place)}
    if config.nanogpt:
        steps["nanoGPT"] = attempt("nanoGPT", warmed, nanogpt_step, config.nanogpt, config, place)
    speed, per_token, rows = speeds(steps, config.rounds), runs.build(config).flops_per_token(), []
    for name in steps:
        row = [name, "", "", "", ""]
        if name in speed:
            reached = speed[name] * per_token  # nanoGPT's products are as many.
            row[1:4] = f"{speed[name]:,.0f}", f"{reached / 1e12:,.1f}", f"{reached / flops:.0%}"
            row[4] = f"{speed[name] / speed['nanoGPT']:.2f}" if "nanoGPT" in speed else ""
        rows.append(row)
    head = f"training, {config.n_layer} layers, {sizes(config)}, {config.batch_size} sequences"
    return report.markdown([head, "tokens/s", "TFLOP/s", "of the product's", "/ nanoGPT"], rows)


def decoding_table(config, place, attempt, bandwidth):
    """The whole model beside the time that reading its weights takes."""
    row = ["rope, one sequence", "", "", ""]
    if measured := attempt("decoding", decoding, config, place):
        bound = measured[1] / bandwidth * 1e3
        row[1:] = f"{measured[0]:.3f}", f"{bound:.3f}", f"{measured[0] / bound:.1f}"
    head = f"decoding, {config.n_layer} layers, after {config.train_length:,} tokens"
    return report.markdown([head, "ms/token", "to read the weights", "times"], [row])


def memory_table(config, place, attempt):
    """The memory of some encodings in contexts of all LENGTHS."""
    lengths, rows = [multiple * config.train_length for multiple in LENGTHS], []
    for name in FRUGAL:
        figures = [
            attempt(f"memory of {name} at {length:,}", gradient_memory, variant(config, name, length), place)
            for length in lengths
        ]
        rows.append([name, *("" if figure is None else f"{figure:.2f}" for figure in figures)])
    head = f"peak GiB, no update, {config.n_layer} layers, {sizes(config)}, not compiled, one sequence of"
    return report.markdown([head, *(f"{length:,}" for length in lengths)], rows)


def encodings_table(config, place, attempt, names):
    """The training speed of the encodings, beside rope's."""
    T = config.train_length
    variants = {name: variant(config, name, T) for name in names}
    steps = {name: attempt(name, warmed, timing.training_step, variants[name], place) for name in names}
    speed = speeds(steps, config.rounds)
    ratio = {name: f"{speed[name] / speed['rope']:.2f}" for name in speed if "rope" in speed}
    rows = [[name, f"{speed[name]:,.0f}" if name in speed else "", ratio.get(name, "")] for name in names]
    head = f"training, {config.n_layer} layers, {sizes(config)}, {config.batch_size} sequences"
    return report.markdown([head, "tokens/s", "/ rope"], rows)


def sizes(config):
    return f"{config.n_embd} wide, T = {config.train_length:,}"


def tables(options, place):
    """All figures -> lines of Markdown."""
    attempt, names = Attempts(), timing.chosen(options.only) if options.only else NAMES
    flops, bandwidth = machine(place, options.rounds)
    # AdamW here as in nanoGPT: every micro batch has its update, of which Muon's would be the longer.
    config = flags.changed(variant(options, "rope", options.train_length), optimizer="adamw")
    small = flags.changed(config, n_layer=LAYERS)
    parts = [
        machine_table(place, flops, bandwidth),
        training_table(config, place, attempt, flops),
        decoding_table(config, place, attempt, bandwidth),
        memory_table(small, place, attempt),
        encodings_table(small, place, attempt, names),
        attempt.notes,
    ]
    return [line for part in parts if part for line in (*part, "")][:-1]


def measure(options):
    """The tables of this machine's GPU; UserError where it has none."""
    place = places.choose(options.device, options.dtype)
    if place.device.type != "cuda":
        raise UserError(f"this needs an NVIDIA GPU, and would run on {place.device.type}")
    return tables(options, place)


def main(argv):
    timing.command(argv, Options, measure, files=[ROOT / "configs" / "gpt2.py"])


if __name__ == "__main__":
    errors.run(main)

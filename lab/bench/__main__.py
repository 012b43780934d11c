"""Speed and memory of every encoding, in training and in cached decoding, at the training length T and at 16 T.

    python -m lab.bench                                         # every encoding, in the default model
    python -m lab.bench configs/small_gpu.py --only=alibi --table=docs/bench.md

All encodings are compared with none. Memory is the peak of a process of its own.
"""

import core.start  # noqa: F401  # isort: skip

import torch
from tqdm import tqdm

from core import errors, report, runs
from core import place as places
from lab.bench import timing
from lab.bench.timing import LONG, Bench, variant
from model import generate

CONTEXT = 1024  # tokens, where decoding from a cache is compared with computing the whole context anew
PRODUCT = 4096  # rows and columns of the matrices whose product shows what the machine can do


def measure(options):
    """Lines of Markdown: a row for every encoding, and below them two comparisons."""
    place = places.choose(options.device, options.dtype)
    serving = places.choose(options.device, options.dtype, inference=True)
    T, names = options.train_length, timing.chosen(options.only)
    cells = [(name, length) for name in names for length in (T, LONG * T)]
    memory = {
        cell: timing.in_own_process(timing.training_memory, variant(options, *cell))
        for cell in tqdm(cells, "memory", disable=None, leave=False)
    }
    speed, attainable = training(options, cells, place)
    decoded = decoding(options, cells, serving)
    rows = []
    for name in names:
        both = [(name, length) for length in (T, LONG * T)]
        row = [name]
        for cell in both:
            row += [f"{speed[cell]:,.0f}", f"{speed[cell] / speed['none', cell[1]]:.2f}"]
        rows.append(
            [*row, *(f"{decoded[cell] * 1e3:.2f}" for cell in both), *(f"{memory[cell]:,.0f}" for cell in both)]
        )
    long = f"at {LONG} T"
    heads = f"train tokens/s at T = {T}", "/ none", long, "/ none", "decode ms/token at T", long, "train MiB at T", long
    flops = speed["none", T] * runs.build(options).flops_per_token()
    reached = ", ".join(
        f"{flops / most:.1%} of the {most / 1e9:,.0f} that products of {PRODUCT} x {PRODUCT} reach in {name}"
        for name, most in attainable.items()
    )
    return [
        *report.markdown(["encoding", *heads], rows), "", against_recomputing(options, serving), "",
        f"none trains at {flops / 1e9:,.0f} GFLOP/s: {reached}",
    ]  # fmt: skip


def training(options, cells, place):
    """({(encoding, length): tokens/s}, {name of a dtype: FLOP/s of products alone}), all of them taking turns."""
    steps = {cell: timing.training_step(variant(options, *cell), place) for cell in cells}
    dtypes = dict.fromkeys((torch.float32, place.dtype))
    products = {str(dtype).removeprefix("torch."): timing.product(place, dtype, PRODUCT) for dtype in dtypes}
    functions = {key: function for key, (function, _) in (steps | products).items()}
    seconds = timing.median_times(functions, options.rounds)
    rates = [{key: amount / seconds[key] for key, (_, amount) in each.items()} for each in (steps, products)]
    return rates[0], rates[1]


def decoding(options, cells, place):
    """{(encoding, length of the context): seconds for a token}, all of them taking turns."""
    T, count = options.train_length, options.decode_tokens
    decoders = {
        (name, context): timing.decoder(variant(options, name, T), place, context, count) for name, context in cells
    }
    return {cell: seconds / count for cell, seconds in timing.median_times(decoders, options.rounds).items()}


def against_recomputing(options, place):
    """One line: a token from the cache against a token from its whole context of CONTEXT tokens."""
    small, count = variant(options, "rope", options.train_length), options.decode_tokens
    model = runs.build(small, place.device).eval()
    tokens = torch.randint(small.vocab_size, (1, CONTEXT), device=place.device)

    def recompute():
        with place.autocast():
            next(generate(model, tokens, 1, crop=CONTEXT))
        place.synchronize()

    functions = {"cache": timing.decoder(small, place, CONTEXT, count), "recompute": recompute}
    seconds = timing.median_times(functions, 3 * options.rounds)
    cached, anew = seconds["cache"] / count * 1e3, seconds["recompute"] * 1e3
    return (
        f"rope, context of {CONTEXT}: {cached:.2f} ms/token from the cache, {anew:.2f} ms computing it anew: "
        f"{anew / cached:.0f} times"
    )


def main(argv):
    timing.command(argv, Bench, measure)


if __name__ == "__main__":
    errors.run(main)

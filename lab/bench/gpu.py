"""What one NVIDIA GPU does with these models, next to what it could do: training, memory and decoding.

    python bench.py --gpu --table=docs/gpu.md
    python bench.py --gpu --nanogpt=../nanoGPT

The model is that of configs/gpt2.py, with rope and AdamW; flags change its sizes. A figure that cannot be had leaves
its cell empty and a line below the tables that says why; so does one that was not begun in the first MINUTES.
"""

import contextlib
import dataclasses
import gc
import io
import statistics
import time

import torch

from core import place as places
from core import report, runs
from core.errors import UserError
from lab.bench import race
from lab.bench import timing as bench
from model import generate

NAMES = "none", "rope", "alibi", "t5", "kerple", "sandwich", "fire", "fox", "cope"  # one of each way into attention
LONG = "none", "rope", "alibi", "kerple"  # whose memory is measured
LENGTHS = 1, 4, 16, 32  # in training lengths
LAYERS = 4  # of the model that all encodings are put into
STEPS = 5  # between two looks at the clock
MINUTES = 6


class Attempts:
    """Figures that may fail: `notes` gathers why."""

    def __init__(self, minutes=MINUTES):
        self.end, self.notes = time.monotonic() + 60 * minutes, []

    def __call__(self, what, function, *arguments):
        """function(*arguments), or None."""
        try:
            if time.monotonic() > self.end:
                raise UserError("no time was left")
            return function(*arguments)
        except Exception as error:  # whatever a compiler, a kernel or a foreign model may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.notes.append(f"- {what}: {reason[:150]}")


def need_cuda(device):
    if device.device.type != "cuda":
        raise UserError(f"--gpu needs an NVIDIA GPU, and this would run on {device.device.type}")


def machine(device, size, megabytes, rounds):
    """The machine's own speed: (FLOP/s of a product of size x size matrices, bytes/s that a copy reads and writes)."""
    a, b, c = (torch.randn(size, size, device=device.device).to(device.dtype) for _ in range(3))
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)

    def repeated(function):
        def call():
            for _ in range(10):
                function()
            device.synchronize()

        return call

    functions = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    seconds = bench.median_times({key: repeated(function) for key, function in functions.items()}, rounds)
    return 10 * 2 * size**3 / seconds["product"], 10 * 2 * source.numel() / seconds["copy"]


def warmed(config, device):
    """bench.training_step after two calls, which compile it, and the tokens of one call."""
    step, tokens = bench.training_step(config, device, STEPS)
    step()
    step()
    return step, tokens


def nanogpt(folder, config, device):
    """The same for nanoGPT's own model and optimiser, read from a checkout of it."""
    sizes = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, vocab_size=config.vocab_size)
    model = race.build(race.nanogpt(folder), block_size=config.train_length, bias=False, dropout=0.0, **sizes)
    model, betas = model.to(device.device), (config.beta1, config.beta2)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its sizes
        optimizer = model.configure_optimizers(config.weight_decay, 6e-4, betas, device.device.type)
    forward, _ = places.compiled(model, config.compile, device)
    shape = config.batch_size, config.train_length
    tokens = torch.randint(config.vocab_size, shape, device=device.device)

    def step():
        for _ in range(STEPS):
            with device.autocast():
                _, loss = forward(tokens, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        device.synchronize()

    step()
    step()
    return step, STEPS * tokens.numel()


def speeds(warm, rounds):
    """{name: (step, tokens), or None where it failed} -> {name: tokens/s}, measured in turn."""
    warm = {name: pair for name, pair in warm.items() if pair}
    seconds = bench.median_times({name: step for name, (step, _) in warm.items()}, rounds)
    return {name: warm[name][1] / seconds[name] for name in warm}


def training_memory(config, device):
    """GiB at the peak of a forward and a backward pass, with the weights and their gradients; not compiled."""
    free()
    before = torch.cuda.memory_allocated()
    model = runs.build(config, device.device)
    tokens = torch.randint(config.vocab_size, (1, config.train_length), device=device.device)
    for _ in range(2):  # the first may compile a kernel
        torch.cuda.reset_peak_memory_stats()
        with device.autocast():
            loss = model(tokens, tokens).mean()
        loss.backward()
        model.zero_grad()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def free():
    """Give back the memory of what is no longer used, models whose parts know one another too."""
    gc.collect()
    torch.cuda.empty_cache()


def decode_ms(model, compiled, context, count, device):
    """Milliseconds for each of `count` tokens that generate() writes after `context` ones, a single sequence."""
    tokens = torch.randint(model.config.vocab_size, (1, context), device=device.device)
    stream = generate(model, tokens, count + 4, temperature=0, compiled=compiled)
    for _ in range(4):  # the first takes in the context, the others compile and record the graph
        next(stream)
    device.synchronize()
    start = time.perf_counter()
    for _ in stream:
        pass
    device.synchronize()
    return (time.perf_counter() - start) / count * 1e3


def decoding(config, device, count):
    """(median of decode_ms, bytes of weights that every token reads) of a model in the device's half precision."""
    model = runs.build(config, device.device).to(device.dtype).eval()
    compiled, _ = places.compiled(model, config.compile, device, decoding=True)
    compiled = compiled if compiled is not model else None
    times = [decode_ms(model, compiled, config.train_length, count, device) for _ in range(4)][1:]
    unread = 0 if config.tie_embeddings else model.token.weight.nbytes
    return statistics.median(times), sum(p.nbytes for p in model.parameters()) - unread


def measure(config, device, names=NAMES, lengths=LENGTHS, product=8192, megabytes=1024, count=128, minutes=MINUTES):
    """All figures of a Bench -> the lines of Markdown tables."""
    attempt, T = Attempts(minutes), config.train_length
    flops, bandwidth = machine(device, product, megabytes, config.rounds)
    machine_rows = [
        [f"product of two {product:,} x {product:,} matrices, {device.dtype_name}", f"{flops / 1e12:,.1f} TFLOP/s"],
        [f"copy of {megabytes:,} MiB, reading and writing", f"{bandwidth / 1e9:,.0f} GB/s"],
    ]

    # AdamW for both: here every micro batch has its update, of which Muon's would be the longer.
    config = dataclasses.replace(bench.variant(config, "rope", T), optimizer="adamw")
    warm = {"rope": attempt(f"{config.n_layer} layers", warmed, config, device)}
    if config.nanogpt:
        warm["nanoGPT"] = attempt("nanoGPT", nanogpt, config.nanogpt, config, device)
    speed, per_token, whole_rows = speeds(warm, config.rounds), runs.build(config).flops_per_token(), []
    for name in warm:
        row = [name, "", "", "", ""]
        if name in speed:
            reached = speed[name] * per_token  # nanoGPT's products are as many
            row[1:4] = f"{speed[name]:,.0f}", f"{reached / 1e12:,.1f}", f"{reached / flops:.0%}"
            row[4] = f"{speed[name] / speed['nanoGPT']:.2f}" if "nanoGPT" in speed else ""
        whole_rows.append(row)
    del warm

    decoded = attempt("decoding", decoding, config, device, count)
    bound = decoded and decoded[1] / bandwidth * 1e3
    decode_row = [f"{decoded[0]:.3f}", f"{bound:.3f}", f"{decoded[0] / bound:.1f}"] if decoded else [""] * 3

    small, memory_rows = dataclasses.replace(config, n_layer=LAYERS), []
    for name in LONG:
        found = [
            attempt(f"memory of {name} at {n * T:,}", training_memory, bench.variant(small, name, n * T), device)
            for n in lengths
        ]
        memory_rows.append([name, *("" if gib is None else f"{gib:.2f}" for gib in found)])

    warm = {name: attempt(name, warmed, bench.variant(small, name, T), device) for name in names}
    speed = speeds(warm, config.rounds)
    ratio = {name: f"{speed[name] / speed['rope']:.2f}" for name in speed if "rope" in speed}
    encoding_rows = [[name, f"{speed[name]:,.0f}" if name in speed else "", ratio.get(name, "")] for name in names]

    sizes = f"{config.n_embd} wide, T = {T:,}"
    whole = f"training, {config.n_layer} layers, {sizes}, {config.batch_size} sequences"
    few = f"{LAYERS} layers, {sizes}"
    tables = [
        (["the machine", "median"], machine_rows),
        ([whole, "tokens/s", "TFLOP/s", "of the product's", "/ nanoGPT"], whole_rows),
        ([f"decoding, {config.n_layer} layers, after {T:,} tokens", "ms/token", "to read the weights", "times"],
         [["rope, one sequence", *decode_row]]),
        ([f"peak GiB, no update, {few}, not compiled, one sequence of", *(f"{n * T:,}" for n in lengths)], memory_rows),
        ([f"training, {few}, {config.batch_size} sequences", "tokens/s", "/ rope"], encoding_rows),
    ]  # fmt: skip
    lines = [line for heads, rows in tables for line in (*report.markdown(heads, rows), "")]
    return [*lines, *attempt.notes] if attempt.notes else lines[:-1]

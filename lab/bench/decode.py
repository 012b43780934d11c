"""Decoding here, in nanoGPT and in transformers, on the CPU: tokens per second after contexts of T, 4 T and 16 T.

    python -m lab.bench.decode ../nanoGPT --rounds=3 --decode_tokens=12 --table=docs/speed.md

One model of the same shape in each (layers, heads, width, vocabulary), with random weights in float32. nanoGPT computes
its whole context anew for every token; transformers, where it is installed, decodes a Llama with its cache; and
"compiled" is ours as `sample.py --compile` has it, where there is a compiler. The first two tokens are not timed.
"""

import core.start  # noqa: F401  # isort: skip

import importlib.util
import statistics
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from tqdm import tqdm

from core import errors, report, runs
from core import place as places
from core.errors import UserError, require
from lab.bench import others, timing
from lab.bench.timing import Decoding
from model import generate

BATCHES = (1, 16)
OURS = "trainshort", "compiled"


@dataclass
class Options(Decoding):
    """The flags of this command."""

    usage: ClassVar[str] = "python -m lab.bench.decode NANOGPT [configs/FILE.py ...] [--key=value ...]"

    def __post_init__(self):
        super().__post_init__()
        require(self.decode_tokens >= 4, f"--decode_tokens must be at least 4, not {self.decode_tokens}")


def own(config, longest):
    """{name: decoder} of our model, plain and compiled. A decoder takes tokens (B, T) and a count, decodes so many
    tokens, and returns the times at which it had each."""
    model = runs.build(config).eval()
    if model.max_length < longest:
        raise UserError(model.too_long(longest))
    compiled, _ = places.compiled(model, True, places.choose("cpu"), decoding=True)

    def decoder(faster):
        def decode(tokens, count):
            return [time.perf_counter() for _ in generate(model, tokens, count, temperature=0, compiled=faster)]

        return decode

    return {"trainshort": decoder(None)} | ({} if compiled is model else {"compiled": decoder(compiled)})


def nanogpt(config, longest, checkout):
    """A decoder, as `own` has them, of nanoGPT's model with so many positions."""
    shape = dict(vocab_size=config.vocab_size, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    model = others.build(others.nanogpt(checkout), block_size=longest, dropout=0.0, bias=False, **shape).eval()
    return lambda tokens, count: others.watched(model, lambda: model.generate(tokens, count))[1]


def llama(config, longest):
    """A decoder, as `own` has them, of a Llama of transformers."""
    import transformers

    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.hidden,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, max_position_embeddings=longest,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).eval()
    return lambda tokens, count: others.greedy(model, tokens, count)[1]


def measure(options, checkout):
    """Lines of Markdown: a row for every context and batch."""
    T, count = options.train_length, options.decode_tokens
    contexts = [T, 4 * T, 16 * T]
    longest = contexts[-1] + count
    theirs = nanogpt(options, longest, checkout)
    decoders = own(options, longest) | {"nanoGPT": theirs}
    if importlib.util.find_spec("transformers"):
        decoders["transformers"] = llama(options, longest)
    pairs = [(ours, other) for other in decoders if other not in OURS for ours in OURS if ours in decoders]
    rows = []
    for context, batch in tqdm([(n, b) for n in contexts for b in BATCHES], "decoding", disable=None):
        tokens, rates = torch.randint(options.vocab_size, (batch, context)), {name: [] for name in decoders}
        for _ in range(options.rounds):
            for name, decode in decoders.items():
                times = decode(tokens, count)[2:]  # The first took in the context, the second may have compiled.
                rates[name].append(batch / others.median_gap(times))
        speed = {name: statistics.median(each) for name, each in rates.items()}
        ratios = [f"{speed[ours] / speed[other]:.1f}" for ours, other in pairs]
        rows.append([str(context), str(batch), *(f"{each:,.0f}" for each in speed.values()), *ratios])
    heads = ["context", "batch", *(f"{name} tokens/s" for name in decoders)]
    return report.markdown([*heads, *(" / ".join(pair) for pair in pairs)], rows)


def main(argv):
    timing.command(argv, Options, measure, "a checkout of nanoGPT", on_cpu=True)


if __name__ == "__main__":
    errors.run(main)

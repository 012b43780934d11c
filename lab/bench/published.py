"""A published model here and in transformers, on the CPU: tokens per second of taking in a context and of decoding.

    pip install -r requirements-hf.txt
    python -m lab.bench.published out/smollm2 --rounds=3 --decode_tokens=40 --table=docs/speed.md

The context is Python source, and what follows it is greedy; the last column says how many tokens are the same in both
until the first that differs.
"""

import core.start  # noqa: F401  # isort: skip

import importlib.util
import inspect
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from core import errors, report, runs
from core import place as places
from core.errors import UserError, require
from lab.bench import others, timing
from lab.bench.timing import Rounds
from model import generate

CONTEXTS = (1024, 8192)  # tokens
DTYPES = ("float32", "bfloat16")


@dataclass
class Options(Rounds):
    """The flags of this command."""

    usage: ClassVar[str] = "python -m lab.bench.published FOLDER [--key=value ...]"

    decode_tokens: int = 16  # tokens decoded in a round

    def __post_init__(self):
        super().__post_init__()
        require(self.decode_tokens >= 3, f"--decode_tokens must be at least 3, not {self.decode_tokens}")


def measure(options, folder):
    """Lines of Markdown: a row for every dtype and context."""
    count = options.decode_tokens
    if not importlib.util.find_spec("transformers"):
        raise UserError("transformers is not installed: pip install -r requirements-hf.txt")
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} is no folder of a published model: it has no config.json")
    longest = runs.open_run(f"hf:{folder}").model.max_length
    cells = [(dtype, context) for dtype in DTYPES for context in CONTEXTS if context + count <= longest]
    if not cells:
        raise UserError(f"{folder} has {longest} positions, and {CONTEXTS[0] + count} are needed")
    rows = []
    for dtype, context in tqdm(cells, "prefill and decoding", disable=None):
        prefill, decoding, same = by_turns(options, folder, places.choose("cpu", dtype), context)
        row = [dtype, str(context)]
        for pairs in (prefill, decoding):
            row += [f"{1 / statistics.median(seconds):,.0f}" for seconds in zip(*pairs, strict=True)]
            row.append(timing.spread([theirs / ours for ours, theirs in pairs], ".2f"))
        rows.append([*row, f"{same} of {count}"])
    columns = ("trainshort", "transformers", "ours / theirs")
    heads = [f"{kind}: {column}" for kind in ("prefill", "decoding") for column in columns]
    return report.markdown(["tokens/s", "context", *heads, "the same tokens"], rows)


def by_turns(options, folder, place, context):
    """(prefill, decoding, same): seconds for a token in pairs of ours and theirs, one pair for each round; and after
    how many tokens both first differ."""
    import transformers

    opened, count = runs.open_run(f"hf:{folder}"), options.decode_tokens
    model = opened.model
    place.prepare(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=place.dtype).eval()
    theirs.generation_config.eos_token_id = None  # Its text must not end where ours would go on.
    tokens = torch.tensor([opened.tokenizer.encode_ordinary(inspect.getsource(inspect))[:context]])
    prefill, decoding = [], []
    for _ in range(options.rounds):
        with place.autocast():
            drawn, our_times = others.watched(model, lambda: list(generate(model, tokens, count, temperature=0)))
        ids, their_times = others.greedy(theirs, tokens, count)
        # The first call takes in the context, and the second begins when that is done.
        prefill.append([(times[1] - times[0]) / context for times in (our_times, their_times)])
        decoding.append([others.median_gap(times[1:]) for times in (our_times, their_times)])
    equal = torch.cat(drawn) == ids[0, context:]
    return prefill, decoding, int(equal.long().cumprod(0).sum())


def main(argv):
    timing.command(argv, Options, measure, "the folder of a published model", on_cpu=True)


if __name__ == "__main__":
    errors.run(main)

"""Training steps and cached decoding of every encoding at an earlier commit and at this one, by turns.

    git worktree add FOLDER COMMIT
    python -m lab.bench.before FOLDER --rounds=5
    python -m lab.bench.before FOLDER --only='["rope", "alibi"]' --table=docs/speed.md

Both commits answer from processes of their own, and the one that begins changes from round to round. The last column of
each length is the median of before / after over the rounds, with the least and the largest: above 1, ours is faster.
"""

import core.start  # noqa: F401  # isort: skip

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from core import errors, report
from core.errors import UserError
from core.settings import Config
from lab.bench import timing
from lab.bench.timing import LONG, ROOT, Bench

# This runs in the folder of either commit and answers questions, one a line: 'training rope 128' is the seconds of a
# training step at a length, 'decoding rope 128' those of a token after so many others. Earlier commits have their
# modules at the top.
WORKER = """
import json, os, sys, time
if os.path.isdir("core"):
    import core.start
    from core.flags import make
    from core.place import choose
    from core.settings import Config
    from lab.bench import timing
else:
    import before_torch
    import bench as timing
    from configs import Config, make
    from device import choose

settings, count = json.loads(sys.argv[1]), int(sys.argv[2])
config = make(Config, {key: value for key, value in settings.items() if key in Config.__dataclass_fields__})
places = {"training": choose(config.device, config.dtype), "decoding": choose(config.device, config.dtype, True)}
last = None
for question in sys.stdin:
    kind, name, length = question.split()
    if question != last:
        if kind == "training":
            call, _ = timing.training_step(timing.variant(config, name, int(length)), places[kind])
        else:
            variant = timing.variant(config, name, config.train_length)
            call = timing.decoder(variant, places[kind], int(length), count)
        call()
        last = question
    start = time.perf_counter()
    call()
    print((time.perf_counter() - start) / (1 if kind == "training" else count), flush=True)
"""
PLACES = "bench.py", "lab/bench/timing.py"  # where a commit has what the worker asks for
KINDS = {"training": ("ms of a step", ",.0f"), "decoding": ("ms of a token", ",.2f")}


@dataclass
class Options(Bench):
    """The flags of this command."""

    usage: ClassVar[str] = "python -m lab.bench.before FOLDER [configs/FILE.py ...] [--key=value ...]"


class Worker:
    """The process that answers for the commit in a folder."""

    def __init__(self, folder, options):
        self.folder = folder
        settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(Config)}
        words = json.dumps(settings | {"length_schedule": {}}), str(options.decode_tokens)
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *words],
            cwd=folder, env=timing.plain_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip

    def seconds(self, *question):
        """The answer to a question; UserError where the process failed, which has said why on stderr."""
        with contextlib.suppress(BrokenPipeError):
            print(*question, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(f"{' '.join(map(str, question))} failed in {self.folder}: see above")
        return float(answer)


def paired(before, after, question, rounds):
    """[(seconds before, seconds after), ...] of two workers, one pair for each round."""
    pairs = []
    for index in range(rounds):
        order = (before, after) if index % 2 == 0 else (after, before)
        seconds = {worker: worker.seconds(*question) for worker in order}
        pairs.append((seconds[before], seconds[after]))
    return pairs


def measure(options, folder):
    """Lines of Markdown: a table of training and one of decoding, a row for every encoding."""
    if not any((Path(folder) / name).is_file() for name in PLACES):
        way_out = "make a checkout of an earlier commit with git worktree add FOLDER COMMIT"
        raise UserError(f"{folder} has neither {' nor '.join(PLACES)}; {way_out}")
    T = options.train_length
    lengths, rows = {"T": T, f"{LONG} T": LONG * T}, {kind: [] for kind in KINDS}
    turns = [(kind, name) for kind in KINDS for name in timing.chosen(options.only)]
    before, after = Worker(folder, options), Worker(ROOT, options)
    with before.process, after.process:
        for kind, name in tqdm(turns, "before and after", disable=None):
            row = [name]
            for length in lengths.values():
                pairs = paired(before, after, (kind, name, length), options.rounds)
                medians = [statistics.median(seconds) * 1e3 for seconds in zip(*pairs, strict=True)]
                row += [format(median, KINDS[kind][1]) for median in medians]
                row.append(timing.spread([old / new for old, new in pairs], ".2f"))
            rows[kind].append(row)
    lines = []
    for kind, (unit, _) in KINDS.items():
        columns = f"{unit} before", "after", "before / after"
        heads = [f"{column} at {where}" for where in lengths for column in columns]
        lines += ["", *report.markdown([kind, *heads], rows[kind])]
    return lines[1:]


def main(argv):
    timing.command(argv, Options, measure, "a checkout of an earlier commit")


if __name__ == "__main__":
    errors.run(main)

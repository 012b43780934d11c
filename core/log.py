"""What a run says while it goes on: metrics.jsonl, the progress bar, the picture of the loss."""

import json
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from core import files, optimizers, report
from core.errors import brief
from core.files import write_whole
from core.place import Neighbours
from core.runs import set_aside


def written(line):
    """A line of metrics.jsonl, with its checksum behind the numbers."""
    return json.dumps(line | {"crc32": files.checksum(line)}) + "\n"


class Log:
    """metrics.jsonl, the progress bar and the picture of the loss. Only the main process writes.

    step, before: where the run goes on, and the Config that it had until then. start: time.perf_counter() when the
    process began. Lines of steps after `step` are cut off: they are done again.
    """

    def __init__(self, config, place, step, before, start):
        folder, max_steps = Path(config.out_dir), config.max_steps
        self.path, self.main, self.start = folder / "metrics.jsonl", place.main, start
        self.neighbours = Neighbours()
        self.bar = tqdm(
            initial=step, total=max_steps, desc=brief(folder.name, 60), dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10, disable=not self.main or step >= max_steps,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip
        if self.main:
            self.begin(step, max(config.log_interval, before.log_interval))
            self.say_jump(step, before, config)

    def begin(self, step, interval):
        """Keep the lines up to `step`, and say what is not there: damaged lines, or none for more steps than the
        interval between two."""
        lines, damaged = self.lines()
        if damaged:
            set_aside(self.path, f"has {damaged} damaged lines; the others are kept")
        kept = [line for line in lines if line["step"] <= step]
        write_whole(self.path, "".join(map(written, kept)))
        logged = [0, *(line["step"] for line in kept if "loss" in line), step + 1]
        sizes = [after - before for before, after in pairwise(logged)]
        for index, (before, after) in enumerate(pairwise(logged)):
            # Distances as large beside it are those of a log_interval that the run had once.
            beside = [*sizes[max(0, index - 1) : index], *sizes[index + 1 : index + 2]]
            if sizes[index] > max(interval, *beside, 0):
                self.say(f"{self.path} says nothing of the loss between steps {before} and {min(after, step)}")

    def say_jump(self, step, before, config):
        """Say how the learning rate goes on where max_steps is another than before: it follows shares of all steps."""
        if before.max_steps != config.max_steps and 0 < step < config.max_steps:
            was, now = (optimizers.learning_rate(*known) for known in ((before, step - 1), (config, step)))
            rates = f"{was * before.learning_rate:.3g} to {now * config.learning_rate:.3g}"
            jump = f"the learning rate goes {'back up' if now > was else 'on'} from {rates}"
            self.say(f"max_steps was {before.max_steps} and is now {config.max_steps}: {jump}")

    def lines(self):
        """(the lines so far, how many others are damaged). The last one may have been cut short by a kill."""
        if not self.path.is_file():
            return [], int(self.path.exists())
        lines, damaged, texts = [], 0, self.path.read_bytes().split(b"\n")
        older = not any(b'"crc32"' in text for text in texts)  # from before there was a checksum
        for text in texts:
            try:
                line = json.loads(text)
                checksum = line.pop("crc32", None)
                whole = checksum == files.checksum(line) or (older and checksum is None)
                numbers = whole and {type(value) for value in line.values()} <= {int, float, type(None)}
            except (ValueError, RecursionError, AttributeError, TypeError):
                numbers = False
            if numbers and type(line.get("step")) is int:
                lines.append(line)
            elif text is not texts[-1]:
                damaged += 1
        return lines, damaged

    def write(self, **line):
        """Add a line of numbers, and the seconds since the start."""
        if self.main:
            # JSON knows no infinity, which is the norm of a gradient that overflowed float16.
            line = {key: value if math.isfinite(value) else None for key, value in line.items()}
            line["seconds"] = round(time.perf_counter() - self.start, 2)
            files.append(self.path, written(line))

    def say(self, text):
        """Print a line above the bar. Where nobody reads it any more, the run goes on (core.streams)."""
        if self.main:
            tqdm.write(text)

    def draw(self):
        """loss.png, from the lines so far."""
        lines, _ = self.lines()
        series = {
            name: ([line["step"] for line in lines if key in line], [line[key] for line in lines if key in line])
            for name, key in (("training", "loss"), ("validation", "val_loss"))
        }
        report.lines(self.path.with_name("loss.png"), series, "step", "loss (nats per token)")

"""Training against nanoGPT on the CPU: seconds until both know the same characters as well as a goal says, by turns.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python -m lab.bench.race ../nanoGPT --rounds=3 --table=docs/speed.md

nanoGPT runs the example for a CPU of its own README, ours what OURS lists. Every checkpoint of both is measured by one
function, in nats per character, in one pass over all of the validation text. The clock starts with the process: imports
and evaluations count. nanoGPT's code is the user's checkout.
"""

import core.start  # noqa: F401  # isort: skip

import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

from core import errors, report, runs
from core.errors import UserError
from data import shakespeare
from data.download import fetch
from lab.bench import others, timing
from lab.bench.timing import ROOT, Rounds, spread

# nanoGPT's own example for the CPU, from its README; the last flag only makes it keep every checkpoint.
THEIRS = [
    "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12",
    "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
    "--always_save_checkpoint=True",
]  # fmt: skip
OURS = {
    "trainshort, 240 small steps": (
        "configs/shakespeare.py --train_length=64 --length_schedule={} --n_layer=3 --n_embd=128 --n_head=4 "
        "--batch_size=16 --max_steps=240 --learning_rate=1e-2 --decay=0.6"
    ),
    "trainshort, 820 steps": "configs/shakespeare.py --max_steps=820 --eval_interval=410 --checkpoint_interval=410",
    "trainshort, 1900 steps": "configs/shakespeare.py",
}
A100 = 1.4697  # the loss of nanoGPT's larger model after three minutes of an A100, with 256 of context, by its README
CONTEXTS = NEAR, FAR = 64, 256  # characters
# This runs a training script, and keeps each checkpoint's weights in a file named for its step and the seconds it took.
DRIVER = """
import runpy, sys, time
from pathlib import Path
began, folder, script = float(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.argv = sys.argv[3:]
sys.path.insert(0, str(Path(script).parent))
if (Path(script).parent / "core").is_dir():
    import core.start
import torch
save = torch.save
def keep(state, *where):
    step = state["step"] if "step" in state else state["iter_num"]
    if not list(Path(folder).glob(f"{step}-*")):
        kept = ("model", "config", "model_args", "step", "tokenizer_fingerprint")
        save({key: state[key] for key in kept if key in state},
             f"{folder}/{step}-{time.time() - began:.3f}.pt")
    save(state, *where)
torch.save = keep
runpy.run_path(script, run_name="__main__")
"""


@dataclass
class Options(Rounds):
    """The flags of this command."""

    usage: ClassVar[str] = "python -m lab.bench.race NANOGPT [--key=value ...]"

    data_dir: str = "data"  # the text is downloaded to its raw/


class NanoGPT:
    """A checkout of nanoGPT, and its files of tokens made from `text` in the folder `work`."""

    def __init__(self, checkout, text, work):
        checkout, self.module = Path(checkout).resolve(), others.nanogpt(checkout)
        self.words = [str(checkout / "train.py"), str(checkout / "config" / "train_shakespeare_char.py"), *THEIRS]
        letters = sorted(set(text))
        ids = {letter: index for index, letter in enumerate(letters)}
        folder = work / "data" / "shakespeare_char"
        folder.mkdir(parents=True)
        border = int(0.9 * len(text))
        self.val = np.array([ids[letter] for letter in text[border:]])
        np.array([ids[letter] for letter in text[:border]], np.uint16).tofile(folder / "train.bin")
        self.val.astype(np.uint16).tofile(folder / "val.bin")
        meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": ids}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
        shutil.copy(checkout / "configurator.py", work)  # train.py opens it in the folder where it runs.

    def losses(self, checkpoint):
        """(the function that `full_pass` asks for, the longest context that has positions) of a checkpoint's model."""
        state = torch.load(checkpoint, weights_only=True)
        model = others.build(self.module, **state["model_args"]).eval()
        model.load_state_dict(state["model"])
        return lambda x, y: model(x, y)[1].item() * y.numel(), state["model_args"]["block_size"]


class Trainshort:
    """Our train.py with a line of OURS in the folder `work`, and the validation part of the same text as bytes."""

    def __init__(self, line, text, data_dir, work):
        config, *flags = line.split()
        folders = [f"--data_dir={Path(data_dir).resolve()}", f"--out_dir={work}/out"]
        self.words = [
            str(ROOT / "train.py"),
            str(ROOT / config),
            "--device=cpu",
            "--length_targets=0",
            *folders,
            *flags,
        ]
        self.val = np.frombuffer(text[int(0.9 * len(text)) :].encode(), np.uint8).astype(np.int64)

    def losses(self, checkpoint):
        """(the function that `full_pass` asks for, the longest context that has positions) of a checkpoint's model."""
        state = runs.load(checkpoint)
        model = runs.build(runs.config_of(state)).eval()
        runs.load_weights(model, state)
        return lambda x, y: model(x, y).sum().item(), model.max_length


def timed(words, work):
    """Run a training command in the folder `work` -> ({step: (seconds, checkpoint)}, seconds to its end)."""
    kept = Path(tempfile.mkdtemp(dir=work))
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(began), str(kept), *words],
        cwd=work, env=timing.plain_environment(), capture_output=True, encoding="utf-8",
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{words[0]} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    seconds = time.time() - began
    files = {int(file.stem.partition("-")[0]): file for file in kept.glob("*.pt")}
    return {step: (float(files[step].stem.partition("-")[2]), files[step]) for step in sorted(files)}, seconds


@torch.inference_mode()
def full_pass(losses, ids, context, at_once=64):
    """Mean nats per token over all of ids (N,) but the first, in windows of `context` tokens side by side.

    losses: inputs (B, T), targets (B, T) -> nats of all those targets together.
    """
    total, ids = 0.0, torch.as_tensor(ids)
    whole = (len(ids) - 1) // context
    inputs, targets = (x[: whole * context].view(-1, context) for x in (ids[:-1], ids[1:]))
    for x, y in zip(inputs.split(at_once), targets.split(at_once), strict=True):
        total += losses(x, y)
    rest = slice(whole * context, None)
    if len(ids[:-1][rest]):
        total += losses(ids[:-1][rest][None], ids[1:][rest][None])
    return total / (len(ids) - 1)


@dataclass
class Result:
    """One round of a contestant."""

    curves: dict  # context -> [(seconds, step, loss, or None past the positions), ...], a point for each checkpoint
    seconds: float  # in all
    speed: float  # tokens per second up to the last checkpoint

    def reached(self, context, goal):
        """Seconds until the curve passed the goal; None where it did not, or has no losses."""
        passed = (seconds for seconds, _, loss in self.curves[context] if loss is not None and loss <= goal)
        return next(passed, None)


def one_round(contestant, work):
    """Train a contestant and measure its checkpoints -> Result."""
    checkpoints, seconds = timed(contestant.words, work)
    curves = {context: [] for context in CONTEXTS}
    for step, (when, file) in checkpoints.items():
        losses, longest = contestant.losses(file)
        for context, curve in curves.items():
            loss = full_pass(losses, contestant.val, context) if context <= longest else None
            curve.append((when, step, loss))
    config = torch.load(file, weights_only=True)["config"]
    tokens = config["batch_size"] * config["train_length" if "train_length" in config else "block_size"]
    return Result(curves, seconds, step * tokens / when)


def measure(options, checkout):
    """Lines of Markdown: when each contestant reached which goal, and its loss at every checkpoint."""
    others.nanogpt(checkout)  # a folder that is none is said before anything is downloaded
    file = fetch(shakespeare.URL, f"{options.data_dir}/raw/tinyshakespeare.txt", shakespeare.SHA256)
    text = file.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        contestants = {"nanoGPT": NanoGPT(checkout, text, work)}
        contestants |= {name: Trainshort(line, text, options.data_dir, work) for name, line in OURS.items()}
        results = {name: [] for name in contestants}
        turns = [name for _ in range(options.rounds) for name in contestants]
        for name in tqdm(turns, "training", disable=None):
            results[name].append(one_round(contestants[name], work))
            shutil.rmtree(work / "out", ignore_errors=True)  # The next run begins anew.
    return [*goals(results), "", *checkpoints(results)]


def goals(results):
    """{contestant: [Result, ...]} -> lines of Markdown: the seconds to every goal, the last losses, the speed."""
    theirs = max(result.curves[NEAR][-1][2] for result in results["nanoGPT"])
    targets, rows = [(NEAR, theirs), (FAR, 1.5), (FAR, A100)], []
    for name, rounds in results.items():
        row = [name, *(spread([result.reached(*target) for result in rounds], ".1f") for target in targets)]
        row += [spread([result.curves[context][-1][2] for result in rounds], ".4f") for context in CONTEXTS]
        row.append(spread([result.seconds for result in rounds], ".1f"))
        rows.append([*row, spread([result.speed for result in rounds], ",.0f")])
    heads = ["", *(f"seconds to {goal:.4g}, {context} of context" for context, goal in targets)]
    heads += [f"last loss, {NEAR} of context", f"{FAR} of context", "seconds in all", "tokens/s"]
    return report.markdown(heads, rows)


def checkpoints(results):
    """{contestant: [Result, ...]} -> lines of Markdown: seconds and losses at every checkpoint."""
    rows = []
    for name, rounds in results.items():
        for index, (_, step, _) in enumerate(rounds[0].curves[NEAR]):
            points = [[result.curves[context][index] for result in rounds] for context in CONTEXTS]
            losses = [spread([loss for *_, loss in each], ".4f") for each in points]
            rows.append([name, str(step), spread([seconds for seconds, *_ in points[0]], ".1f"), *losses])
    return report.markdown(["", "step", "seconds", *(f"loss, {context} of context" for context in CONTEXTS)], rows)


def main(argv):
    timing.command(argv, Options, measure, "a checkout of nanoGPT", on_cpu=True)


if __name__ == "__main__":
    errors.run(main)

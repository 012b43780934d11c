"""Run folders: what a run leaves on disk, written so that it is never lost, and read so that it can do no harm."""

import json
import math
import os
import pickle
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tiktoken
import torch
from tqdm import tqdm

import posenc
from core import report
from core.errors import UserError, nearest
from core.flags import make
from core.settings import Config
from data import vocabulary
from model import GPT, GPTConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PUBLISHED = "hf:"  # what a published model's name begins with
CKPT, PREVIOUS, BEST = "ckpt.pt", "ckpt_prev.pt", "best.pt"
LOCK = "train.lock"


def lock(folder):
    """Make the run folder, and keep other processes from training into it while the file returned is open. None where
    another process does. The kernel ends the lock with its process, however that ends; the empty file stays. UserError
    for a folder that holds something else."""
    folder = Path(folder)
    ours = any((folder / name).exists() for name in (LOCK, CKPT, PREVIOUS))
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds other files; choose another folder with --out_dir")
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "w")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:  # a file system without locks
        pass
    return file


def save(folder, name, state):
    """Write a checkpoint to the side, flush it to the disk, and only then put it in place."""
    part = Path(folder) / f"{name}.part"
    with open(part, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    if name == CKPT and (Path(folder) / CKPT).exists():
        os.replace(Path(folder) / CKPT, Path(folder) / PREVIOUS)
    os.replace(part, Path(folder) / name)


def find(run):
    """A run folder, a checkpoint file, or a published model (hf:...) -> the checkpoint's path, or that model's
    config.json. UserError when there is none."""
    if str(run).startswith(PUBLISHED):
        from hub import load as hf

        return hf.find(str(run)) / "config.json"
    path = Path(run)
    if path.is_file():
        return path
    for name in (CKPT, PREVIOUS):  # a kill between the two renames of `save` leaves the previous one alone
        if (path / name).exists():
            return path / name
    if not path.exists():
        beside = sorted(str(folder.parent) for folder in Path("out").glob(f"*/{CKPT}"))
        hint = nearest(str(run), beside) if beside else "train one with python train.py configs/rope.py"
        raise UserError(f"no run {run}; {hint}")
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        raise UserError(f"{run} holds a published model and no run; name it hf:{run}")
    raise UserError(f"{run} holds no checkpoint ({CKPT}); train one with python train.py configs/rope.py")


def load(run):
    """A run folder, checkpoint file or published model -> its state, of tensors and plain values. Nothing in it can run
    code."""
    if str(run).startswith(PUBLISHED):
        from hub import load as hf

        return hf.load(str(run))
    path = find(run)
    previous, best = path.with_name(PREVIOUS), path.with_name(BEST)
    if path.name == CKPT and previous.exists():
        way_out = f"go back to the one before: mv {previous} {path}"
    elif path.name != BEST and best.exists():
        way_out = f"the run's best weights are in {best}: go on from them with --init_from={best} and another --out_dir"
    else:
        way_out = "train it anew, with another --out_dir"
    try:
        with warnings.catch_warnings(action="ignore"):  # on pickle protocols: the error says what matters
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is damaged, or no checkpoint of ours: it holds more than tensors and plain values; {way_out}"
        ) from None
    except PermissionError:
        raise
    except (RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise UserError(f"{path} is damaged, perhaps cut short; {way_out}") from None
    if not isinstance(state, dict) or not {"model", "step", "config"} <= state.keys():
        raise UserError(f"{path} is no checkpoint of ours: it lacks model, step or config")
    return state


def config_of(state, **changes):
    """The Config of a checkpoint, with some keys changed."""
    known = {field.name for field in fields(Config)}
    unknown = set(state["config"]) - known
    if unknown:
        raise UserError(f"the checkpoint has settings this version does not know: {', '.join(sorted(unknown))}")
    return make(Config, state["config"] | changes)


def names(paths):
    """What to call runs in tables: the last parts of their paths, or the paths where two would be the same."""
    short = [Path(path.removeprefix(PUBLISHED)).name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def build(config, device="cpu", initial=True):
    """A new model with its initial weights, or any; UserError for settings that do not fit together."""
    try:
        return GPT(config, config.seed if initial else None).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_weights(model, state, fresh=False, share=False):
    """Put a checkpoint's weights into the model, or with `share` the tensors themselves. An encoding that it was not
    trained with has none there: that is an error, or with `fresh` it keeps its initial values."""
    weights, initial = state["model"], model.state_dict()
    old, new = state["config"]["posenc"], model.config.posenc
    if not posenc.derives(new, old):
        weights = {name: weight for name, weight in weights.items() if not name.startswith("posenc.")}
    if fresh:
        weights = {name: weight for name, weight in initial.items() if name.startswith("posenc.")} | weights
    shapes = [{(name, weight.shape) for name, weight in held.items()} for held in (weights, initial)]
    wrong = sorted(name for name, _ in shapes[0] ^ shapes[1])
    if wrong and old != new and all(name.startswith("posenc.") for name in wrong):
        way_out = "leave out --init_from" if fresh else "train it, or go on from here with train.py's --init_from"
        raise UserError(f"the checkpoint was trained with {old}, and {new} has weights of its own: {way_out}")
    if wrong:
        raise UserError(
            f"the checkpoint's weights do not fit these settings ({wrong[0]}); leave the model's size as it was"
        )
    model.load_state_dict(weights, assign=share)
    if model.config.tie_embeddings:
        model.head.weight = model.token.weight  # which assigning takes apart


# These settings may differ when a run goes on; any other would make it another run.
MAY_CHANGE = {
    "max_steps", "eval_interval", "log_interval", "checkpoint_interval", "device", "compile", "micro_batch_size",
    "out_dir", "data_dir", "length_targets",
}  # fmt: skip


def settle(names, settings):
    """Names of the config files and {key: value} -> the whole Config. `init_from` lends it model settings."""
    inherited = {}
    if settings.get("init_from"):
        base = load(settings["init_from"])["config"]
        keys = [field.name for field in fields(GPTConfig)] + ["tokenizer"]
        inherited = {key: base[key] for key in keys if key in base}
        settings["posenc"] = merge_posenc(base["posenc"], settings.get("posenc", ""))
        # What an encoding learned, and what stretches it, stays relative to the length it was trained at.
        kept = posenc.derives(settings["posenc"], base["posenc"])
        inherited["original_length"] = (base["original_length"] or base["train_length"]) if kept else 0
    config = make(Config, inherited | settings)
    if not config.out_dir:
        spec = config.posenc if isinstance(config.posenc, str) else "-".join(config.posenc)
        config.out_dir = "out/" + ("-".join(names) or spec.partition("(")[0])
    return config


def resume(config, dataset, tokenizer):
    """The state that the run of this Config goes on from, or None where it is new. UserError if it is another run's."""
    out = Path(config.out_dir)
    if not any((out / name).exists() for name in (CKPT, PREVIOUS)):
        return None
    state = load(out)
    # A run from before a setting existed has its default.
    old, new = plain(config_of(state)), plain(config)
    differ = [f"{key} was {old[key]!r} and is now {new[key]!r}" for key in new if old[key] != new[key]]
    differ = [text for text in differ if text.partition(" ")[0] not in MAY_CHANGE]
    if differ:
        way_out = "Start another with --out_dir, or set them back"
        raise UserError(f"{out} holds a run with other settings: {', '.join(differ)}. {way_out}")
    if "optimizer" not in state:
        why = "it holds no optimiser state (best.pt does not); use --init_from"
        raise UserError(f"{find(out)} cannot go on: {why}")
    check_tokenizer(tokenizer, state)
    if state["data_checksum"] != dataset.meta["data_checksum"]:
        raise UserError(f"the corpus of {out} has changed since it began ({dataset.folder}); start anew with --out_dir")
    return state


@dataclass
class Run:
    """A checkpoint, ready for use."""

    path: str | Path  # as it was asked for
    model: GPT  # in eval mode
    config: Config
    tokenizer: tiktoken.Encoding
    data_checksum: str  # "" where the corpus is not known
    step: int  # at which it was saved
    trained: str | list  # the `posenc` it was trained with, whatever is laid over it


def open_run(run, device="cpu", override=""):
    """A run folder, checkpoint file or published model -> Run. `override` is merged into its `posenc`."""
    return open_runs(run, [override], device)[0]


def open_runs(run, overrides, device="cpu"):
    """The same with each of several overrides. On the CPU they share their weights, until one is changed."""
    state, opened = load(run), []
    trained = state["config"]["posenc"]
    encoding = vocabulary.load(state["config"]["tokenizer"])
    check_tokenizer(encoding, state)
    for override in overrides:
        config = config_of(state, posenc=merge_posenc(trained, override))
        model = build(config, initial=False)
        load_weights(model, state, share=True)
        model = model.to(device).eval()
        opened.append(Run(run, model, config, encoding, state.get("data_checksum", ""), state["step"], trained))
    return opened


def merge_posenc(spec, override):
    """A checkpoint's `posenc` with what was asked for laid over it; '' asks for nothing."""
    try:
        return posenc.merge(spec, override) if override else spec
    except ValueError as error:
        raise UserError(str(error)) from None


def check_tokenizer(encoding, state):
    """UserError when `encoding` is not the tokenizer that the checkpoint was trained with."""
    if vocabulary.fingerprint(encoding) != state.get("tokenizer_fingerprint"):
        name = state["config"]["tokenizer"]
        raise UserError(f"tokenizer {name} is not the one that the checkpoint was trained with: its vocabulary differs")


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole(path, text):
    """Write a text file to the side and put it in place: a kill leaves the old one or the new one."""
    part = Path(f"{path}.part")
    part.write_text(text)
    os.replace(part, path)


def read_json(path):
    """The JSON file's value, or {} where there is none that is whole."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def plain(config):
    """The Config as plain values, for checkpoints and config.json."""
    return asdict(config)


class Log:
    """metrics.jsonl, the progress bar and the picture of the loss. Only the main process writes.

    start: time.perf_counter() when the process began. Lines of steps after `step` are cut off: they are done again.
    """

    def __init__(self, folder, device, step, max_steps, start):
        self.path, self.main, self.start = Path(folder) / "metrics.jsonl", device.main, start
        self.bar = tqdm(
            initial=step, total=max_steps, desc=Path(folder).name, disable=not self.main or step >= max_steps,
            mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip
        if self.main:
            kept = [line for line in self.lines() if line["step"] <= step]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self):
        """The lines so far; one that a kill cut short is left out."""
        found = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def write(self, **line):
        if self.main:
            # JSON knows no infinity, which is the norm of a gradient that overflowed float16.
            line = {key: value if math.isfinite(value) else None for key, value in line.items()}
            line["seconds"] = round(time.perf_counter() - self.start, 2)
            with self.path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    def say(self, text):
        if self.main:
            tqdm.write(text)

    def draw(self):
        lines = self.lines()
        series = {
            name: ([line["step"] for line in lines if key in line], [line[key] for line in lines if key in line])
            for name, key in (("training", "loss"), ("validation", "val_loss"))
        }
        report.lines(self.path.with_name("loss.png"), series, "step", "loss (nats per token)")

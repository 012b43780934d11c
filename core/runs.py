"""Run folders: what a run leaves on disk, found, gone on from, opened and logged. Its checkpoints: checkpoints.py."""

import contextlib
import json
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tiktoken
from tqdm import tqdm

import posenc
from core import checkpoints, files
from core.checkpoints import BEST, CKPT, PREVIOUS, SOURCE, save  # noqa: F401  # They are used as parts of runs.
from core.errors import UserError, command, line_of, nearest, note, pasted
from core.files import write_json, write_record, write_whole  # noqa: F401
from core.flags import make
from core.settings import Config
from data import vocabulary
from model import GPT, GPTConfig

PUBLISHED = "hf:"  # what a published model's name begins with
LOCK = "train.lock"


# Writing a run.


def lock(folder):
    """Make the run folder, and keep other processes from training into it while the lock returned exists. None where
    another process does. UserError for a folder that holds something else."""
    folder = Path(folder)
    ours = any((folder / name).exists() for name in (LOCK, CKPT, PREVIOUS))
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds other files; choose another folder with --out_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return files.lock(folder / LOCK)


def read_json(path):
    """The object in a JSON file of ours, or {} where there is none. One that is damaged is set aside, with a line: none
    of these files is worth stopping for."""
    path = Path(path)
    if not path.exists():
        return {}
    if path.is_file():
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            value = None
        except FileNotFoundError:  # Another process of the run has set it aside.
            return {}
        except OSError as error:  # It may be another user's.
            tqdm.write(f"{line_of(error)}; going on without it", file=sys.stderr)
            return {}
        if isinstance(value, dict) and value.pop("crc32", None) in (
            None,
            files.checksum(value),
        ):  # older ones have none
            return value
    set_aside(path)
    return {}


def set_aside(path, why="is damaged"):
    """Rename a damaged file of ours to NAME.damaged, and say so."""
    with contextlib.suppress(FileNotFoundError):  # Another process of the run may have been faster.
        tqdm.write(f"{path} {why}: set aside as {files.set_aside(path).name}", file=sys.stderr)


def plain(config):
    """The Config as plain values, for checkpoints and config.json; a published model's tokenizer is a file beside
    them."""
    name = vocabulary.FILE if vocabulary.published(config.tokenizer) else config.tokenizer
    return asdict(config) | {"tokenizer": name}


def bring_tokenizer(config, folder):
    """Copy a published model's tokenizer into a run's folder, so that the run can be moved. Other tokenizers have names
    that hold everywhere."""
    if vocabulary.published(config.tokenizer):
        from data import tokenizer_json  # It needs the extra packages.

        tokenizer_json.copy(vocabulary.load(config.tokenizer), Path(folder))


# Finding and reading a checkpoint.


def find(run):
    """A run folder, a checkpoint file, or a published model (hf:...), which becomes a run folder -> the checkpoint's
    path. UserError when there is none."""
    if str(run).startswith(PUBLISHED):
        from hub import load as hub  # It stands above this module, and needs the extra packages.

        run = hub.as_run(str(run))
    path = Path(run)
    if path.is_file() and path.suffix == ".py":
        raise UserError(f"{run} is a config file; name the folder of its run, out/{path.stem} say")
    if path.is_file():
        return path
    for name in (CKPT, PREVIOUS):  # A kill of an older version, at a certain moment, left the previous one alone.
        if (path / name).exists():
            return path / name
    if not path.exists():
        beside = sorted(str(folder.parent) for folder in Path("out").glob(f"*/{CKPT}"))
        hint = nearest(str(run), beside) if beside else f"train one with {command('train.py', 'configs/rope.py')}"
        raise UserError(f"no run {run}; {hint}")
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        raise UserError(f"{run} holds a published model and no run; name it {pasted(f'{PUBLISHED}{run}')}")
    inside = ", ".join(sorted(str(folder.parent) for folder in path.glob(f"*/{CKPT}")))
    hint = f"name one of {inside}" if inside else f"train one with {command('train.py', 'configs/rope.py')}"
    raise UserError(f"{run} holds no checkpoint ({CKPT}); {hint}")


def load(run):
    """A run folder, checkpoint file or published model -> its state, as `checkpoints.read` checked it. UserError for
    what is damaged or no checkpoint of ours, with what to do."""
    path = find(run)
    if path.name == PREVIOUS and path != Path(run):
        note(f"{path.with_name(CKPT)} is missing: taking {path}, the one before it")
    state = checkpoints.read(path)
    state["config"]["tokenizer"] = locate_tokenizer(state["config"]["tokenizer"], path)
    return state


def locate_tokenizer(name, path):
    """A tokenizer's name in the checkpoint at `path`, as `vocabulary.load` takes it: `tokenizer.json` is the file
    beside the checkpoint. Older runs call it hf:..., by the published model that has it."""
    beside, older = path.with_name(vocabulary.FILE), name.startswith(PUBLISHED)
    if name == vocabulary.FILE or (older and beside.exists()):
        return str(beside)
    if not older or vocabulary.published(name).exists():
        return name
    try:
        return str(find(name).with_name(vocabulary.FILE))
    except UserError as error:
        raise UserError(f"{path}: its tokenizer is that of a published model: {error}") from None


def config_of(state, **changes):
    """The Config of a checkpoint, with some keys changed."""
    return make(Config, state["config"] | changes)


def check_tokenizer(tokenizer, state):
    """UserError when `tokenizer` is not the one that the checkpoint was trained with."""
    if vocabulary.fingerprint(tokenizer) != state.get("tokenizer_fingerprint"):
        name = state["config"]["tokenizer"]
        raise UserError(f"tokenizer {name} is not the one that the checkpoint was trained with: its vocabulary differs")


def merge_posenc(spec, override):
    """A checkpoint's `posenc` with `override` laid over it, which '' leaves as it is."""
    try:
        return posenc.merge(spec, override) if override else spec
    except ValueError as error:
        raise UserError(str(error)) from None


# From a checkpoint to a model.


def build(config, device="cpu", initial=True):
    """A new model on a torch device, with its initial weights or, without `initial`, any. UserError for settings that
    do not fit together."""
    try:
        return GPT(config, config.seed if initial else None).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None


# Parameters of attention that begin where they change nothing, so that a run may add them to another's weights.


# Names of the weights of encodings, and of what settings add to attention, such as blocks.0.attn.gate.
OPTIONAL = re.compile(r"posenc\.|blocks\.\d+\.attn\.\w+$")


def load_weights(model, state, fresh=False, share=False):
    """Put a checkpoint's weights into the model, or with `share` the tensors themselves. Those of an encoding that the
    checkpoint was not trained with are missing there: a UserError, or with `fresh` they stay as they were drawn."""
    weights, initial = state["model"], model.state_dict()
    old, new = state["config"]["posenc"], model.config.posenc
    if not posenc.derives(new, old):
        weights = {name: weight for name, weight in weights.items() if not name.startswith("posenc.")}
    if fresh:
        weights = {name: weight for name, weight in initial.items() if OPTIONAL.match(name)} | weights
    wrong = checkpoints.misfits(weights, model)
    if wrong and old != new and all(map(OPTIONAL.match, wrong)):
        way_out = "leave out --init_from" if fresh else "train it, or go on from here with train.py's --init_from"
        raise UserError(f"the checkpoint was trained with {old}, and {new} has weights of its own: {way_out}")
    if wrong:
        raise UserError(
            f"the checkpoint's weights do not fit these settings ({wrong[0]}); leave the model's size as it was"
        )
    if share:  # A published model's may be in half precision.
        weights = {name: weight.to(initial[name].dtype) for name, weight in weights.items()}
    model.load_state_dict(weights, assign=share)
    if model.config.tie_embeddings:
        model.head.weight = model.token.weight  # Assigning took the tied weights apart.


# Starting a run, or going on with it.

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
    old, new = plain(config_of(state)), plain(config)
    changed = [key for key in new if key not in MAY_CHANGE and old[key] != new[key]]
    if changed:
        differ = [f"{key} was {old[key]!r} and is now {new[key]!r}" for key in changed]
        way_out = "Start another with --out_dir, or set them back"
        raise UserError(f"{out} holds a run with other settings: {', '.join(differ)}. {way_out}")
    steps = state["config"]["max_steps"]
    # The shares of a schedule are those of all steps.
    if config.phases != config_of(state).phases or (config.window_schedule and config.max_steps != steps):
        was = f"max_steps was {steps} and is now {config.max_steps}"
        twice = "length_schedule, and batches would come twice"
        moved = f"which would move the phases of its {'window_schedule' if config.window_schedule else twice}"
        way_out = f"Set it back, or go on from its weights with {pasted(f'--init_from={out}')} and another --out_dir"
        raise UserError(f"{out}: {was}, {moved}. {way_out}")
    if "optimizer" not in state:
        why = "it holds no optimiser state (best.pt does not); use --init_from"
        raise UserError(f"{find(out)} cannot go on: {why}")
    if state["step"] > config.max_steps:
        at = f"{out} is at step {state['step']} already, past --max_steps={config.max_steps}"
        raise UserError(f"{at}; ask for more steps, or start another run with --out_dir")
    check_tokenizer(tokenizer, state)
    if state["data_checksum"] != dataset.meta["data_checksum"]:
        raise UserError(f"the corpus of {out} has changed since it began ({dataset.folder}); start anew with --out_dir")
    return state


# Opening a finished run.


@dataclass
class Run:
    """A checkpoint, ready for use."""

    path: str | Path  # the name that it was opened by
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
    """A run folder, checkpoint file or published model -> [Run], one for each of the overrides of its `posenc`. On the
    CPU they share their weights, until one is changed."""
    state, opened = load(run), []
    note_progress(run, state)
    trained, tokenizer = state["config"]["posenc"], vocabulary.load(state["config"]["tokenizer"])
    check_tokenizer(tokenizer, state)
    for override in overrides:
        config = config_of(state, posenc=merge_posenc(trained, override))
        model = build(config, initial=False)
        load_weights(model, state, share=True)
        state["model"] |= model.state_dict()  # Weights that became float32 did so once for all overrides.
        model = model.to(device).eval()
        opened.append(Run(run, model, config, tokenizer, state.get("data_checksum", ""), state["step"], trained))
    return opened


def note_progress(run, state):
    """Say where a run stands that is not finished. A published model, which is at step 0, never was a run."""
    if 0 < state["step"] < state["config"]["max_steps"]:
        note(f"{run} is at step {state['step']} of {state['config']['max_steps']}")


def names(paths):
    """The names of runs in tables: the last parts of their paths, or the paths where two would be the same."""
    short = [Path(path.removeprefix(PUBLISHED)).name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)

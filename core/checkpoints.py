"""Checkpoint files: written so that one is always there, read so that nothing damaged or odd is ever used."""

import errno
import math
import os
import pickle
import shutil
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from core import files, optimizers
from core.errors import UserError, pasted, require
from core.flags import convert, make
from core.place import Place
from core.settings import Config
from model import GPT

CKPT, PREVIOUS, BEST = "ckpt.pt", "ckpt_prev.pt", "best.pt"
SOURCE = "source.json"  # in a run that hub/load.py made: which published model it was made from


# Writing.


def save(folder, name, state):
    """Write a checkpoint. The latest one before it stays, as ckpt_prev.pt. At every moment ckpt.pt is a whole one."""
    path = Path(folder) / name
    with files.atomic(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps what the disk refuses, a full one say
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        files.flush(file)
        if name == CKPT and path.exists():
            keep(path)


def keep(latest):
    """Make ckpt.pt known as ckpt_prev.pt too: as a link, or as a copy on disks that know no links."""
    previous = latest.with_name(PREVIOUS)
    part = previous.with_name(f"{PREVIOUS}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(latest), part)
        os.replace(part, previous)  # which does nothing where both are one file already, and leaves `part`
    except OSError:
        with open(latest, "rb") as old, files.atomic(previous, "wb") as new:
            shutil.copyfileobj(old, new, 1 << 20)
    part.unlink(missing_ok=True)


# Reading.


def read(path):
    """A checkpoint file -> its state, of tensors and plain values, whole and checked. Nothing in it can run code.
    UserError for what is damaged or no checkpoint of ours, with what to do; OSError where the file cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} is no file, and so no checkpoint; {instead_of(path)}")
    mapped = path.with_name(SOURCE).exists()  # A published model can be large, and no training writes over it.
    wrong = "is damaged, perhaps cut short, or no checkpoint of ours"
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            require(is_whole(file), wrong)
            state = torch.load(str(path) if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise cannot(path, error.errno) from None
    except pickle.UnpicklingError:
        wrong = "is no checkpoint of ours: it holds more than tensors and plain values"
    except Exception as error:  # torch passes on what it met.
        for code in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            if os.strerror(code) in str(error) or (code == errno.ENOMEM and isinstance(error, MemoryError)):
                raise cannot(path, code) from None
    else:
        try:
            return state | {"config": check(state)}
        except (ValueError, UserError) as error:
            wrong = str(error)
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            wrong = f"is no checkpoint of ours: {error}"
    raise UserError(f"{path} {wrong}; {instead_of(path)}")


def cannot(path, code):
    """The OSError for a file that may be whole and cannot be read."""
    return OSError(code, f"cannot be read: {os.strerror(code)}", str(path))


def is_whole(file):
    """Whether an open file is a zip archive, as torch writes them, whose records all have the checksums (CRC-32) that
    they were written with. torch.load asks for none."""
    try:
        with zipfile.ZipFile(file) as archive:
            # A file that says to be a folder (an attribute of 16) is read by torch as one of nothing.
            plain = all(item.external_attr == 0 and not item.compress_type for item in archive.infolist())
            whole = plain and archive.testzip() is None
        file.seek(0)
        return whole
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # EINVAL comes from a header that points nowhere.
            raise
    except MemoryError:
        raise
    except Exception:  # zipfile passes on what a damaged header made it meet.
        pass
    return False


def instead_of(path):
    """The way out where the checkpoint at `path` cannot be used, in words."""
    if path.with_name(SOURCE).exists():
        return f"remove {path.parent}, and it is made again from the published model"
    previous, best = path.with_name(PREVIOUS), path.with_name(BEST)
    if path.name == CKPT and previous.exists():
        return f"go back to the one before: {pasted('mv', previous, path)}"
    if path.name != BEST and best.exists():
        return f"go on from the run's best weights with {pasted(f'--init_from={best}')} and another --out_dir"
    return "train it anew, with another --out_dir"


# Checking what was read.

NEEDED = {"model": dict, "step": int, "config": dict, "tokenizer_fingerprint": str}
GOING_ON = {"optimizer": list, "scaler": dict, "best": float, "data_checksum": str}  # needed to go on, beside them
NOWHERE = Place(torch.device("meta"), torch.float32)  # where tensors have shapes and no memory


def check(state):
    """The settings in a state, with a default for every one that it is older than. ValueError or UserError, which goes
    on where a sentence began with the file's name, for anything in the state that no run of ours leaves."""
    require(isinstance(state, dict), "is no checkpoint of ours: it holds no dictionary")
    needed = NEEDED | GOING_ON if "optimizer" in state else NEEDED
    lacking = ", ".join(key for key in needed if key not in state)
    require(not lacking, f"is no checkpoint of ours: it lacks {lacking}")
    for key, kind in (NEEDED | GOING_ON).items():
        value = state.get(key)
        fits = key not in state or (isinstance(value, kind) and not isinstance(value, bool))
        require(fits, f"is no checkpoint of ours: its {key} is of the type {type(value).__name__}")
    config = check_config(state["config"])
    require(0 <= state["step"] <= config.max_steps, f"has the step {state['step']}, of {config.max_steps}")
    check_scaler(state.get("scaler", {}))
    require(not math.isnan(state.get("best", 0.0)), "has a best loss that is no number")
    model = empty_model(config, state["model"])
    if "optimizer" in state:
        kept = optimizers.make(model, config, NOWHERE)
        require(len(kept) == len(state["optimizer"]), "has the state of another optimizer")
        for optimizer, saved in zip(kept, state["optimizer"], strict=True):
            check_optimizer(optimizer, saved, state["step"])
    return asdict(config)


def check_config(saved):
    """The Config of the settings in a state."""
    unknown = saved.keys() - {field.name for field in fields(Config)}
    require(not unknown, f"has settings this version does not know: {', '.join(sorted(map(str, unknown)))}")
    finite = all(abs(value) < 1e30 for value in saved.values() if type(value) in (int, float))
    require(finite, "has settings beyond 1e30")
    converted = {key: convert(value, key, Config, "has odd settings") for key, value in saved.items()}
    try:
        return make(Config, converted)
    except (UserError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"has settings that do not fit together: {error}") from None


def empty_model(config, weights):
    """The model of a Config, without memory. ValueError unless `weights` are its own, {name: tensor of floats}."""
    for name, weight in weights.items():
        plain = isinstance(weight, torch.Tensor) and weight.layout == torch.strided and weight.device.type == "cpu"
        require(isinstance(name, str) and plain, f"has weights that are no tensors ({name})")
        require(weight.is_floating_point(), f"has weights of {weight.dtype} ({name})")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    # A million blocks would take long to build, even without memory.
    require(len(blocks) == config.n_layer, "has weights that do not fit its settings (n_layer)")
    try:
        with NOWHERE.device, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes of zero
            model = GPT(config, None)
    except (ValueError, TypeError, ArithmeticError, RuntimeError):
        raise ValueError("has settings that no model can have") from None
    wrong = misfits(weights, model)
    require(not wrong, f"has weights that do not fit its settings ({wrong[0] if wrong else None})")
    return model


def misfits(weights, model):
    """The names of weights, {name: tensor}, that the model has not, or in another shape, and of those that it lacks."""
    shapes = [{(name, weight.shape) for name, weight in held.items()} for held in (weights, model.state_dict())]
    return sorted({name for name, _ in shapes[0] ^ shapes[1]})


def check_scaler(scaler):
    """ValueError for what torch's GradScaler has not left; one that is without effect leaves nothing."""
    known = torch.amp.GradScaler("cpu").state_dict()
    numbers = all(type(value) in (int, float) and 0 <= value < math.inf for value in scaler.values())
    fits = not scaler or (scaler.keys() == known.keys() and numbers and scaler["scale"] > 0)
    require(fits, "has an odd scale of the loss (scaler)")


def check_optimizer(optimizer, saved, step):
    """ValueError for a state that was not left by an optimizer of the same parameters, after so many steps."""
    groups = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    odd = "has an odd state of its optimizer"
    dicts = isinstance(saved, dict) and isinstance(saved.get("state"), dict)
    require(dicts and isinstance(saved.get("param_groups"), list), odd)
    require(all(isinstance(group, dict) for group in saved["param_groups"]), odd)
    require(repr([group.get("params") for group in saved["param_groups"]]) == repr(groups), odd)
    every = set(range(len(parameters)))
    require(saved["state"].keys() in (set(), every), odd)  # none where each step so far overflowed float16
    means = {"mean"} if isinstance(optimizer, optimizers.Muon) else {"exp_avg", "exp_avg_sq"}
    for index, held in saved["state"].items():
        require(isinstance(held, dict) and means == held.keys() - {"step"}, odd)
        for name, value in held.items():
            shape = () if name == "step" else parameters[index].shape
            require(isinstance(value, torch.Tensor) and value.shape == shape, f"{odd} ({name} of parameter {index})")
            require(value.is_floating_point() and value.layout == torch.strided, f"{odd} ({name} of {index})")
        count = float(held.get("step", 0))
        require(("step" in held) == ("mean" not in held) and 0 <= count <= step, f"{odd} (step of parameter {index})")

"""The programs that ours is compared with: the model of a checkout of nanoGPT, and transformers."""

import contextlib
import importlib.util
import io
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

from core.errors import UserError

FILES = "model.py", "train.py", "configurator.py", "config/train_shakespeare_char.py"  # of a checkout of nanoGPT


def nanogpt(checkout):
    """The module model.py of a checkout of nanoGPT; UserError where the folder is none."""
    for name in FILES:
        if not (Path(checkout) / name).is_file():
            raise UserError(f"{checkout} has no {name}; name a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt", Path(checkout) / "model.py")
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(module, **shape):
    """A model of nanoGPT's module, of that shape and in silence, as it would print its size."""
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**shape))


def watched(model, call):
    """The result of call(), and the times at which it called the model."""
    times = []
    handle = model.register_forward_pre_hook(lambda *_: times.append(time.perf_counter()))
    with torch.inference_mode():
        result = call()
    handle.remove()
    return result, times


def greedy(model, tokens, count):
    """Greedy decoding of `count` tokens by a model of transformers -> ids (B, T + count), the times of its calls."""
    settings = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return watched(model, lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings))


def median_gap(times):
    """The median of the seconds from each time to the next."""
    return statistics.median(after - before for before, after in itertools.pairwise(times))

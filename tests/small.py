"""Small models whose every parameter matters, or whose answers are known, and random text for them to read."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import posenc
from core import flags
from core.place import Place
from core.settings import Config
from model import GPT, GPTConfig

CPU = Place(torch.device("cpu"), torch.float32)
HALF = Place(torch.device("cpu"), torch.bfloat16)
T = 16
# What they keep for a token sums up all before it, so sinks stay where they were, whatever has been dropped since.
SUMMED = ("fox", "selective_rope", "wall", "path")
SIZES = dict(vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, train_length=T, zero_init=False)


def shrunk(file):
    """The settings of a recipe of configs/recipes at the sizes here: windows and chunks an eighth of theirs."""
    settings = flags.read(file, Config)
    bounds = re.compile(r"(window|chunk)=(\d+)")
    members = [settings["posenc"]] if isinstance(settings["posenc"], str) else settings["posenc"]
    members = [bounds.sub(lambda found: f"{found[1]}={int(found[2]) // 8}", member) for member in members]
    settings.pop("n_embd", None)
    return {"n_layer": len(members)} | settings | {"posenc": members}


FILES = sorted((Path(data.__file__).parent.parent / "configs/recipes").glob("*.py"))
RECIPES = {file.stem: shrunk(file) for file in FILES}


def first_of_each(specs):
    """Values of the flag as parameters of a test: the first of each class, and all others for the slow tests."""
    seen, parameters = set(), []
    for spec in specs:
        cls = str(spec) if isinstance(spec, list) else posenc.parse(spec)[0]
        parameters.append(pytest.param(spec, marks=pytest.mark.slow, id=spec) if cls in seen else spec)
        seen.add(cls)
    return parameters


def make(spec="rope", seed=0, **settings):
    """A model in float64."""
    model = GPT(GPTConfig(posenc=spec, **(SIZES | settings)), seed).double().eval()
    torch.manual_seed(7)
    for parameter in model.posenc.parameters():
        torch.nn.init.normal_(parameter)
    return model


def blind(spec):
    """A model whose queries are all zero: what is left are biases."""
    model = make(spec)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight[: model.config.n_embd])
    return model


def text(count, length, seed=0):
    return np.random.default_rng(seed).integers(50, size=(count, length))


def dataset(lengths, tokens=None):
    """Validation documents of the given lengths, of numbered tokens unless they are given."""
    total, starts = sum(lengths), np.cumsum([0, *lengths[:-1]]).tolist()
    ids = np.arange(total) if tokens is None else tokens
    return data.Dataset(ids, ids, {"documents": {"val": starts}, "tokens": {"val": total}}, None)


class Copier(torch.nn.Module):
    """Stands for a model that copies: what stood `period` tokens before gets probability 3/4, the other V - 1 tokens
    share the rest; without that much context all are equal."""

    bounded = False

    def __init__(self, period, vocab_size, train_length):
        super().__init__()
        self.config, self.max_length = GPTConfig(train_length=train_length, vocab_size=vocab_size), math.inf
        self.period = period

    def forward(self, tokens, targets=None, past=None, last=None):
        before = past.layers.get(0, tokens[:, :0])
        seen = past.layers[0] = torch.cat((before, tokens), dim=1)
        if targets is None:
            return None
        place = torch.arange(seen.shape[1] - targets.shape[1], seen.shape[1]) + 1 - self.period
        guess, V = seen[:, place.clamp(min=0)], self.config.vocab_size
        p = torch.where(guess == targets, 0.75, 0.25 / (V - 1))
        return -torch.where(place >= 0, p, 1 / V).log()

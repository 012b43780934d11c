"""Whatever is typed, written into a file or left in one: a command works, or says in one line what is wrong.

Inputs are mutations of good ones, drawn from a seed; published folders have theirs in test_bad_folders.py.
"""

import copy
import math
import random
import sys
import warnings
from dataclasses import fields

import pytest
import torch
from tiny import ROOT

import posenc
import sample
import train
from core import errors, runs
from core.settings import Config
from data import vocabulary

pytestmark = pytest.mark.slow
INPUTS = range(300)  # the seeds of each kind; thousands found nothing more
ODD = [
    0, 1, -1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, 0.5, -0.5, 1e-300, 1e300, math.nan,
    math.inf, True, False, None, "", "x", "0", "none", "rope", "é", "\x00", "\udcff", "a" * 100_000,
    [], [1], ["rope"], ["rope", 1], {}, {"a": 1}, {0.0: 128}, (), b"x",
]  # fmt: skip
CHARACTERS = "()[]{}\"',.=:#-+*/\\\n\r\t \x00abz019_é\udcff"


def mutated(text, random):
    """A text with one to four pieces left out, doubled, moved, or put in."""
    for _ in range(random.randint(1, 4)):
        begin, end = sorted(random.choices(range(len(text) + 1), k=2))
        piece = random.choice(
            [
                "",
                text[begin:end] * 2,
                random.choice(CHARACTERS),
                str(random.choice(ODD)),
                random.choice(CHARACTERS) * 5000,
            ]
        )
        text = text[:begin] + piece + text[random.choice([begin, end]) :]
    return text


def ends_well(main, words, capsys, monkeypatch):
    """Run a command in this process: it succeeds, or says one line and leaves with status 2."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    capsys.readouterr()
    with warnings.catch_warnings(action="error"), pytest.raises(SystemExit) as left:
        errors.run(main)
    said = capsys.readouterr().err
    status = left.value.code or 0
    assert status in (0, 2), (words, status)
    if status == 2:
        lines = said.strip("\n").split("\n")
        assert len(lines) == 1 and len(lines[0]) < 2000, (words, lines[:3])
    return status


@pytest.fixture
def told(monkeypatch):
    """train.py's main, which builds the model that it was told to, where it is small, and trains nothing."""

    def build(config, place):
        train.sequences(config, place)
        size = config.n_layer * config.n_embd * (config.n_embd + config.hidden) + config.n_embd * config.vocab_size
        if size < 10**6 and config.train_length < 2000:
            config.vocab_size = config.vocab_size or 257
            runs.build(config)
        return 0

    monkeypatch.setattr(train, "train", build)
    return train.main


SPECS = [
    *posenc.every(), '["rope", "none"]', '["rope(window=32)", "rope(chunk=8)", "none(temper=\'ssmax\')"]',
    'rope(scaling="yarn", factor=4.0)', "randomized(inner=rope(base=500))",
    'rope(scaling="longrope", short_factor=[1.0], long_factor=[2.0])',
]  # fmt: skip


def test_flags(told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    keys = [field.name for field in fields(Config) if field.name not in ("device", "init_from")]
    ends = []
    for seed in INPUTS:
        draw = random.Random(seed)
        words = [f"--{draw.choice(keys)}={draw.choice(ODD)}" for _ in range(draw.randint(1, 3))]
        if draw.random() < 0.3:
            words = [mutated(word, draw) for word in words]
        ends.append(ends_well(told, [str(ROOT / "configs/rope.py"), *words], capsys, monkeypatch))
    assert 2 in ends


def test_specs(told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ends = []
    for seed in INPUTS:
        draw = random.Random(seed)
        spec = mutated(draw.choice(SPECS), draw)
        ends.append(ends_well(told, [f"--posenc={spec}"], capsys, monkeypatch))
    assert 2 in ends


def test_config_files(told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    good = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "configs").rglob("*.py"))]
    ends = []
    for seed in INPUTS:
        draw = random.Random(seed)
        text = mutated(draw.choice(good), draw)
        (tmp_path / "odd.py").write_bytes(text.encode("utf-8", "surrogateescape" if draw.random() < 0.5 else "replace"))
        ends.append(ends_well(told, ["odd.py"], capsys, monkeypatch))
    assert 2 in ends


def leaves(value, path=()):
    """The paths of all that a nest of dicts and lists holds, containers included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


TENSORS = [
    torch.zeros(()), torch.zeros(3), torch.full((2, 2), math.nan), torch.zeros(2, dtype=torch.int64), torch.zeros(0),
]  # fmt: skip


def odd_state(state, draw):
    """A checkpoint's state with one to three of its parts replaced or left out."""
    state = copy.deepcopy(state)
    for _ in range(draw.randint(1, 3)):
        *above, key = draw.choice([path for path in leaves(state) if path] or [("x",)])
        holder = state
        for step in above:
            holder = holder[step]
        if draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = draw.choice([*ODD, *TENSORS])
    return state


def test_checkpoints(trained, corpus, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    good = torch.load(trained / runs.CKPT, weights_only=True)
    (tmp_path / "run").mkdir()
    flags_of = {key: value for key, value in good["config"].items() if key not in ("out_dir", "device")}
    ends = []
    for seed in INPUTS:
        draw = random.Random(seed)
        torch.save(odd_state(good, draw), "run/ckpt.pt")
        if draw.random() < 0.5:
            ends.append(ends_well(sample.main, ["run", "--tokens=1", "--device=cpu"], capsys, monkeypatch))
        else:
            words = [f"--{key}={value}" for key, value in flags_of.items() if value != "" or key == "init_from"]
            ends.append(
                ends_well(
                    train.main,
                    [*words, "--out_dir=run", "--device=cpu", "--length_targets=0", "--max_steps=24"],
                    capsys,
                    monkeypatch,
                )
            )
    assert 2 in ends


def test_vocabularies(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    good = vocabulary.SHIPPED["bpe"].read_text(encoding="utf-8")
    head = "".join(good.splitlines(keepends=True)[:300])

    def main(argv):
        tokenizer = vocabulary.load(argv[0])
        vocabulary.fingerprint(tokenizer)
        tokenizer.decode(tokenizer.encode_ordinary("def f(x): return é"), errors="replace")
        return 0

    ends = []
    for seed in INPUTS:
        draw = random.Random(seed)
        (tmp_path / "odd.tiktoken").write_bytes(mutated(draw.choice([good, head]), draw).encode("utf-8", "replace"))
        ends.append(ends_well(main, ["odd.tiktoken"], capsys, monkeypatch))
    assert 2 in ends

"""A run that the code from before the house left half-way goes on as that code went on, and says what that code said.

before_the_house/ holds its config.json, ckpt.pt and metrics.jsonl at step 60, and in expected.json what the old code
made of them: greedy text, the losses of steps 61 to 72 and the lengths that it measured.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_train import lengths, metrics, state
from tiny import ROOT, bound, finish, step_sums

from core import runs

PINNED = Path(__file__).parent / "before_the_house"
EXPECTED = json.loads((PINNED / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path, corpus):
    """A folder to work in, with the text, which the run names by a relative path, and the run itself."""
    shutil.copy(corpus, tmp_path / "text.txt")
    shutil.copytree(PINNED, tmp_path / "run", ignore=shutil.ignore_patterns("expected.json"))
    return tmp_path


def go_on(folder, max_steps):
    """The old command line, whose flags are the run's own settings."""
    settings = json.loads((PINNED / "config.json").read_text(encoding="utf-8")) | {"max_steps": max_steps}
    flags = [f"--{key}={value}" for key, value in settings.items() if value != ""]
    done = finish([sys.executable, ROOT / "train.py", *flags], cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def nearly(pinned, found, steps):
    """Whether numbers are the pinned ones but for the rounding of so many steps on another CPU (see test_train.nearly).
    On the machine that made them they are the same."""
    config = runs.config_of(state(PINNED))
    terms = steps * step_sums(config, tokens=config.batch_size * config.train_length)
    return found == pytest.approx(pinned, rel=bound(torch.float32, terms))


def test_it_says_the_same(folder):
    """At every of the 48 tokens the likeliest is .002 nats above the second, which is a hundred times what float32 can
    round."""
    flags = [f"--prompt={EXPECTED['prompt']}", "--tokens=48", "--temperature=0", "--device=cpu"]
    done = finish([sys.executable, ROOT / "sample.py", "run", *flags], cwd=folder)
    assert done.stdout.startswith(EXPECTED["sample"]), done.stdout + done.stderr


def test_it_is_finished_and_measured_at_the_same_lengths(folder):
    """On other targets than that code drew, whose losses are so no longer pinned."""
    assert "finished" in go_on(folder, 60).stdout
    found = lengths(folder / "run")
    assert {key: found[key] for key in ("lengths", "train_length")} == EXPECTED["length"]


def test_it_goes_on_alike(folder):
    go_on(folder, 72)
    assert state(folder / "run")["step"] == 72
    before = {key: metrics(PINNED, key) for key in ("loss", "val_loss", "grad_norm")}
    for key, lines in before.items():
        found = metrics(folder / "run", key)
        assert lines == {step: value for step, value in found.items() if step <= 60}
        assert [step for step in found if step > 60] == [int(step) for step in EXPECTED[key]]
        for step, value in EXPECTED[key].items():
            assert nearly(value, found[int(step)], int(step) - 60), (key, step)

"""A run of a few seconds, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# One thread, so that runs are the same to the last bit; not a member of any torchrun that may have started the tests.
ENV = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENV["OMP_NUM_THREADS"] = "1"
TINY = {
    "dataset": "text", "train_length": 16, "n_layer": 2, "n_embd": 32, "batch_size": 8, "max_steps": 24,
    "eval_interval": 8, "checkpoint_interval": 4, "log_interval": 1, "eval_tokens": 256, "length_targets": 4,
    "dropout": 0.1, "dtype": "float32", "device": "cpu",
}  # fmt: skip


def command(corpus, out, launcher=(), **settings):
    """The command line that trains the tiny run into `out`; launcher: what stands before train.py, torchrun say."""
    settings = TINY | {"text": corpus, "data_dir": corpus.parent / "data", "out_dir": out} | settings
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *flags]


def run(corpus, out, check=True, **settings):
    done = subprocess.run(command(corpus, out, **settings), env=ENV, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done

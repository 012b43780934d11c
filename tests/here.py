"""Comparisons without processes: what lab/workers.py would start runs in this one, a script after another."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest

import evaluate
from core import errors, log
from lab.workers import Workers


def wait(self, command, log):
    """Stands for Workers.wait: the script's main, with its output in the file."""
    argv, sys.argv = sys.argv, command[1:]
    try:
        with open(log, "w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            errors.run(importlib.import_module(Path(command[1]).stem).main)
    except SystemExit as left:
        return left.code or 0
    finally:
        sys.argv = argv


@pytest.fixture
def in_process(monkeypatch):
    """Pictures of single runs are left out: they take most of the time, and other tests look at them."""
    monkeypatch.setattr(Workers, "wait", wait)
    monkeypatch.setattr(evaluate, "pictures", lambda folder, records: None)
    monkeypatch.setattr(log.Log, "draw", lambda self: None)
    monkeypatch.setattr(Workers, "all", lambda self, functions: {key: work() for key, work in functions.items()})

"""Signals: answered while an operation runs, obeyed at the second, forgotten never."""

import contextlib
import os
import re
import signal
import sys
import time

import pytest
import tiny
import torch
from tiny import ROOT, TINY

import train
from core import runs
from core.place import Place
from core.settings import Config
from core.stop import SIGNALS, Stop

CPU = Place(torch.device("cpu"), torch.float32)
# A mutex that is locked twice waits for ever, and no signal ends that: so does a step of minutes.
SCRIPT = f"""
import ctypes
import sys

sys.path.insert(0, {str(ROOT)!r})
import torch

from core.place import Place
from core.stop import Stop

library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
library.pthread_mutex_init(mutex, None)
library.pthread_mutex_lock(mutex)
with Stop(Place(torch.device("cpu"), torch.float32)):
    print("computing", flush=True)
    library.pthread_mutex_lock(mutex)
"""


def wait_for(process, name, text):
    deadline = time.monotonic() + 30
    while text not in getattr(process, name):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="a mutex of POSIX")
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_step_of_minutes_is_no_reason_to_ignore_signals(tmp_path, second):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    process = tiny.start([sys.executable, tmp_path / "script.py"])
    wait_for(process, "stdout", "computing")
    for _ in range(2):  # as `timeout` sends them
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    wait_for(process, "stderr", "stopping after this step; again to quit now\n")
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(30) == 128 + second


def test_signals_are_as_they_were_once_there_is_nothing_to_save():
    before = [signal.getsignal(number) for number in SIGNALS]
    with contextlib.suppress(ValueError), Stop(CPU) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked() == signal.SIGTERM
        raise ValueError
    assert before == [signal.getsignal(number) for number in SIGNALS]
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.skipif(os.name != "posix", reason="no hangups")
def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(CPU) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_last_evaluation_leaves_the_closing_table_to_the_next_start(
    corpus, tmp_path, monkeypatch, capsys
):
    settings = TINY | {"max_steps": 2, "n_layer": 1, "text": str(corpus), "data_dir": str(corpus.parent / "data")}
    settings["out_dir"] = str(tmp_path / "run")
    measure = train.validation_loss

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    monkeypatch.setattr(train, "validation_loss", interrupted)
    assert train.train(Config(**settings), CPU) == 128 + signal.SIGTERM
    assert runs.load(tmp_path / "run")["step"] == 2
    assert re.search("stopped after step 2, saved in .*; the same command goes on from there", capsys.readouterr().out)
    assert not (tmp_path / "run" / "length.json").exists()
    assert train.train(Config(**settings), CPU) == 0
    assert runs.read_json(tmp_path / "run" / "length.json")["step"] == 2

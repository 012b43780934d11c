"""Processes that work side by side, with small scripts in the place of train.py and evaluate.py."""

import functools
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny import ROOT

from core import runs
from core.errors import UserError
from lab import workers
from lab.workers import Workers

SCRIPTS = {
    "say.py": "import os, sys; print(*sys.argv[1:], os.environ['OMP_NUM_THREADS'])",
    "fail.py": "import sys; print('fail.py: the first'); print('fail.py: the last'); print('more'); sys.exit(2)",
    "die.py": "import os; os.kill(os.getpid(), 9)",
    "quit.py": "import sys; sys.exit(3)",
    "sleep.py": "import time; time.sleep(60)",
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(jobs) -> Workers, whose scripts are those above."""
    for name, source in SCRIPTS.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    monkeypatch.setattr(workers, "ROOT", tmp_path)
    return lambda jobs=1: Workers(jobs, torch.device("cpu"), tmp_path)


def test_what_a_script_says_goes_to_a_file(start, tmp_path):
    start(jobs=torch.get_num_threads()).call("one", "say.py", "a", 2)
    assert (tmp_path / "one.log").read_text(encoding="utf-8") == "a 2 --device=cpu 1\n"


def test_a_failure_is_told_by_the_last_line_of_the_script_itself(start, tmp_path):
    for script, why in (("fail.py", "fail.py: the last"), ("die.py", "killed by signal 9"), ("quit.py", "status 3")):
        with pytest.raises(UserError, match=why) as failed:
            start().call("one", script)
        assert str(failed.value).startswith("one: ") and f"{tmp_path}/one.log" in str(failed.value)


def test_results_come_by_key_and_the_first_failure_ends_the_others(start):
    assert start(2).all({key: functools.partial(abs, key) for key in (-1, -2, -3)}) == {-1: 1, -2: 2, -3: 3}
    crew, began = start(2), time.monotonic()
    jobs = {name: functools.partial(crew.call, name, name) for name in ("sleep.py", "fail.py")}
    jobs["late"] = functools.partial(crew.call, "late", "sleep.py")
    with pytest.raises(UserError, match="the last"):
        crew.all(jobs)
    assert time.monotonic() - began < 30 and not crew.running


def test_a_folder_whose_name_begins_with_a_dash_is_measured(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x").mkdir()
    (tmp_path / "-x" / "ckpt.pt").touch()
    (tmp_path / "evaluate.py").write_text(SCRIPTS["say.py"], encoding="utf-8")
    with pytest.raises(UserError, match="is not at step 3"):
        workers.measured(start(), Path("-x"), 3, "")
    assert (tmp_path / "-x-reach.log").read_text(encoding="utf-8").startswith("./-x --out_dir=-x/reach ")


PARENT = f"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, {str(ROOT)!r})
from lab import workers

workers.ROOT = here = Path(__file__).parent
workers.Workers(1, torch.device("cpu"), here).call("one", "child.py", here)
"""
CHILD = f"""
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
from core import errors

def main(argv):
    signal.signal(signal.SIGTERM, lambda *_: (Path(argv[0], "ended").touch(), sys.exit(0)))
    Path(argv[0], "begun").touch()
    time.sleep(60)

errors.run(main)
"""


def test_processes_end_with_the_one_that_started_them_however_it_ends(tmp_path):
    for name, source in (("parent.py", PARENT), ("child.py", CHILD)):
        (tmp_path / name).write_text(source, encoding="utf-8")
    process = tiny.start([sys.executable, tmp_path / "parent.py"])
    for name in ("begun", "ended"):
        deadline = time.monotonic() + 30
        while not (tmp_path / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)


def test_a_run_waits_for_the_process_that_still_saves_it(start, tmp_path, capsys):
    held = runs.lock(tmp_path / "run")
    waiting = threading.Thread(target=start().wait_for, args=(tmp_path / "run",))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    held.release()
    waiting.join(10)
    assert not waiting.is_alive()
    assert capsys.readouterr().err == f"waiting for another process, which trains into {tmp_path}/run\n"
    start().wait_for(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_odd_results_are_set_aside_and_made_again(tmp_path, capsys):
    record = {"step": 3, "train_length": 16, "lengths": [16], "loss": [1.0], "windows": 4}
    whole = {"made": {"command": "python evaluate.py", "commit": "abc"}, "runs": {"a": record}}
    file = tmp_path / "results.json"
    runs.write_json(file, whole)
    assert workers.left(tmp_path)[:2] == ("python evaluate.py", {"a": record | {"commit": "abc"}})
    odd = [whole | {key: value} for key in whole for value in (None, 3, [], {"a": 3}, {"a": {}})]
    odd += [whole | {"runs": {"a": record | {key: None}}} for key in ("train_length", "lengths", "loss")]
    for content in odd:
        runs.write_json(file, content)
        assert workers.left(tmp_path) == ("", {}, 0.0) and not file.exists()
        assert capsys.readouterr().err.startswith(f"{file} is damaged: set aside as results.json.damaged")


def test_a_text_that_was_scored_on_other_targets_is_measured_anew():
    record = {"train_length": 32, "step": 5, "lengths": [16, 32], "loss": [1.0] * 2}
    assert not workers.up_to_date({"a": record}, 5, "x")
    assert workers.up_to_date({"a": record | {"own_context": 512}}, 5, "x")


def test_a_task_that_was_measured_at_other_lengths_is_measured_anew():
    record = {"train_length": 32, "step": 5, "lengths": [16, 32, 48, 64, 128, 256], "exact": [1.0] * 6}
    assert workers.up_to_date({"a": record}, 5, "x")
    older = record | {"lengths": [16, 32, 48, 64, 96, 128]}
    assert not workers.up_to_date({"a": older}, 5, "x")
    assert not workers.up_to_date({"a": {"step": 5, "lengths": [32], "tasks": {"copy": older}}}, 5, "x")

"""Processes that work side by side, with small scripts in the place of train.py and evaluate.py."""

import functools
import time
from pathlib import Path

import pytest
import torch

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
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(workers, "ROOT", tmp_path)
    return lambda jobs=1: Workers(jobs, torch.device("cpu"), tmp_path)


def test_what_a_script_says_goes_to_a_file(start, tmp_path):
    start(jobs=torch.get_num_threads()).call("one", "say.py", "a", 2)
    assert (tmp_path / "one.log").read_text() == "a 2 --device=cpu 1\n"


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
    (tmp_path / "evaluate.py").write_text(SCRIPTS["say.py"])
    with pytest.raises(UserError, match="is not at step 3"):
        workers.measured(start(), Path("-x"), 3, "")
    assert (tmp_path / "-x-reach.log").read_text().startswith("./-x --out_dir=-x/reach ")


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

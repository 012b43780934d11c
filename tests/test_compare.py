"""Comparisons: paired statistics by hand, and a real one that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import ENV, ROOT, TINY

import compare
from core import runs

LENGTHS = [8, 16, 32]


def result(*losses):
    return {"train_length": 16, "lengths": LENGTHS[: len(losses)], "loss": list(losses), "windows": 4}


def test_means_and_paired_differences():
    results = {
        "rope": [result(3.0, 1.0, 2.0), result(3.0, 2.0, 4.0), result(3.0, 3.0, 6.0)],
        "learned": [result(3.0, 1.1), result(3.0, 2.4), result(3.0, 3.1)],
    }
    lines = compare.seeds_table(results, [7, 8, 9], "loss")
    assert lines[0] == "| nats per token |  | 0.5 T | 1 T | 2 T |"
    assert lines[2] == "| rope | mean | **3.000** | **2.000** | **4.000** |"
    assert lines[5] == "| rope | seed 9 | 3.000 | 3.000 | 6.000 |"
    # Differences .1, .4, .1: mean .2, standard deviation sqrt(.06 / 2), error that over sqrt(3).
    assert lines[-1] == "| learned | less rope | +0.000 ± 0.000 | +0.200 ± 0.100 | no position |"
    assert "±" not in compare.seeds_table({name: many[:1] for name, many in results.items()}, [7], "loss")[-1]
    assert compare.with_error([0.25, 0.75], "{:.1%}") == "+50.0% ± 25.0%"
    means = {name: compare.mean(many) for name, many in results.items()}
    assert means["rope"] == result(3.0, 2.0, 4.0)
    assert compare.ratio_table(means)[2:] == [
        "| rope | 2.72 | 1.00 | 7.39 |",
        "| learned | 2.23 | 1.00 | no position |",
    ]


@pytest.fixture
def command(corpus, tmp_path):
    """The words of a comparison of rope and none, in tmp_path/out."""
    settings = {key: value for key, value in TINY.items() if key not in ("max_steps", "length_targets", "device")}
    settings |= {
        "length_schedule": "{0.0:8,0.5:16}",
        "text": corpus,
        "data_dir": corpus.parent / "data",
        "max_steps": 40,
        "length_targets": 0,
    }
    (tmp_path / "shared.py").write_text("checkpoint_interval = 2\n")
    flags = [f"--{key}={value}" for key, value in settings.items()]
    flags += [
        f"--common={tmp_path}/shared.py",
        f"--docs={tmp_path}",
        "--targets=4",
        "--seeds=1",
        "--jobs=2",
        f"--out_dir={tmp_path}/out",
    ]
    return ["rope", "none", *flags, "--device=cpu"]


def test_a_killed_comparison_goes_on_where_it_was(command, tmp_path, run_script, call_script):
    (tmp_path / "results.md").write_text("before\n<!-- out -->\n<!-- /out -->\nafter\n")
    words, out = [sys.executable, str(ROOT / "compare.py"), *map(str, command)], tmp_path / "out"
    process = subprocess.Popen(words, env=ENV, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(out.glob("*/ckpt.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists()

    done = run_script("compare.py", *command)
    assert done.returncode == 0, done.stderr
    saved = json.loads((out / "results.json").read_text())
    assert {name: list(seeds) for name, seeds in saved["runs"].items()} == {"rope": ["1337"], "none": ["1337"]}
    one = saved["runs"]["none"]["1337"]
    assert one["train_length"] == 16
    assert len(one["loss"]) == len(one["lengths"]) == len(one["sliding"]) == len(one["attention"]["entropy"]) == 9
    assert "commit" in saved["made"]
    page = (out / "results.md").read_text()
    assert all(word in page for word in ("| none | less rope |", "seed 1337", "holds to", "Made by `python compare.py"))
    assert (tmp_path / "results.md").read_text() == "before\n<!-- out -->\n" + page + "<!-- /out -->\nafter\n"
    assert (tmp_path / "out.png").read_bytes() == (out / "length.png").read_bytes()
    for picture in ("length.png", "position.png", "attention.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert [torch.load(path, weights_only=True)["step"] for path in out.glob("*/ckpt.pt")] == [40, 40]

    # Once more: nothing is trained or measured again. Another setting is refused, and nothing is lost.
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*") if path.suffix in (".pt", ".json")}
    assert call_script("compare.py", *command).returncode == 0
    other = call_script("compare.py", *command, "--batch_size=16")
    assert other.returncode == 2
    assert "batch_size was 8 and is now 16" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_stretched_runs_are_set_beside_what_they_came_from(trained, corpus, tmp_path, run_script):
    (tmp_path / "extend.py").write_text(
        f"init_from = '{trained}'\ntrain_length = 32\nmax_steps = 2\nlength_targets = 0\n"
    )
    flags = [
        f"--common={tmp_path}/extend.py",
        "--targets=2",
        "--seeds=1",
        "--jobs=2",
        f"--out_dir={tmp_path}/out",
        "--device=cpu",
    ]
    flags += [f"--text={corpus}", "--dataset=text", f"--data_dir={corpus.parent}/data", "--batch_size=4"]
    done = run_script("compare.py", 'rope(scaling="linear", factor=2)', *flags)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    linear = 'rope(scaling="linear", factor=2)'
    assert list(saved["untrained"]) == ["run as it is", "run under a window of T", f"{linear}, untrained"]
    assert saved["train_length"] == 16  # of the run they came from
    losses = [one["loss"] for one in saved["untrained"].values()] + [saved["runs"][linear]["1337"]["loss"]]
    assert len({round(one[5], 6) for one in losses}) == 4  # at 2 T all differ
    assert losses[0][1] == pytest.approx(losses[1][1], abs=1e-6)  # the window does nothing at T


def test_untrained_are_encodings_without_weights_of_their_own(trained):
    state = runs.load(trained)
    over = {spec: compare.lies_over(state, spec) for spec in ("none", "rope(base=80000.0)", "kerple", "learned")}
    assert over == {"none": True, "rope(base=80000.0)": True, "kerple": False, "learned": False}


def test_results_of_other_steps_are_not_taken(corpus, tmp_path, call_script):
    settings = {**TINY, "text": corpus, "data_dir": corpus.parent / "data", "length_targets": 0, "out_dir": tmp_path}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    words = ["none", *flags, "--targets=2", "--seeds=1"]
    call_script("train.py", *flags, "--posenc=none", "--max_steps=2", f"--out_dir={tmp_path}/none-1337")
    call_script("evaluate.py", tmp_path / "none-1337", "--targets=2", f"--out_dir={tmp_path}/none-1337/reach")
    # Told to go on, and killed before it had: its settings are the new ones, its result is the old one.
    file = tmp_path / "none-1337" / "config.json"
    runs.write_json(file, runs.read_json(file) | {"max_steps": 4})
    assert call_script("compare.py", *words, "--max_steps=4").returncode == 0
    assert runs.read_json(tmp_path / "results.json")["runs"]["none"]["1337"]["step"] == 4
    done = call_script("compare.py", *words, "--max_steps=2")
    assert (done.returncode, "is not at step 2" in done.stderr) == (2, True), done.stderr


def test_mistakes_are_one_line(call_script, tmp_path, trained):
    (tmp_path / "results.md").write_text("mine\n<!-- out -->\n")
    (tmp_path / "bpe.py").write_text("tokenizer = 'bpe'\n")
    (tmp_path / "long.py").write_text("train_length = 64\n")
    for words, said in (
        (["rope", f"--docs={tmp_path}", "--out_dir=out"], "has no place for the tables"),
        (["rope", f"{tmp_path}/long.py", "--dataset=copy"], "train_length must be the same"),
        (["rope", f"{tmp_path}/bpe.py"], "tokenizer is not the same in all of them"),
        ([], "which configs"),
        (["rpe"], "did you mean 'rope'"),
        (["nowhere.py"], "no config file nowhere.py"),
        (["rope", "rope"], "two are called"),
        (["rope", "--posenc=none"], "--posenc"),
        (["rope", "--seeds=0"], "at least 1"),
        (["rope", "--common=nowhere.py"], "no config file nowhere.py"),
        (["rope", "--learning_rat=1"], "learning_rate"),
        (["rope", f"--out_dir={trained}"], "is a run"),
    ):
        done = call_script("compare.py", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
        assert not (tmp_path / "out").exists()

"""Comparisons: what is trained and measured, what is taken as it is, and a real one that is killed and goes on."""

import json
import subprocess
import sys
import time

import pytest
import torch
from here import in_process  # noqa: F401
from tiny import ENV, ROOT, TINY

import compare
from core import runs
from core.errors import UserError
from core.settings import Config


def stamps(out):
    """When each checkpoint and measurement in the folder of a comparison was written."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*/**/*") if path.suffix in (".pt", ".json")}


@pytest.fixture
def command(corpus, tmp_path):
    """The words of a comparison of rope and none, in tmp_path/out."""
    own = {"length_schedule": "{0.0:8,0.5:16}", "max_steps": 12, "targets": 4, "seeds": 1}
    where = {"text": corpus, "data_dir": corpus.parent / "data", "out_dir": tmp_path / "out", "docs": tmp_path}
    (tmp_path / "shared.py").write_text("checkpoint_interval = 2\n", encoding="utf-8")
    settings = {key: value for key, value in TINY.items() if key != "checkpoint_interval"} | own | where
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return ["rope", "none", f"--common={tmp_path}/shared.py", *flags]


@pytest.fixture
def page(tmp_path):
    """A page with a place for the comparison in tmp_path/out."""
    file = tmp_path / "results.md"
    file.write_text("before\n<!-- out -->\n<!-- /out -->\nafter\n", encoding="utf-8")
    return file


def check(out, page, steps):
    """That a finished comparison of rope and none has left all there is to leave."""
    saved = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {name: list(seeds) for name, seeds in saved["runs"].items()} == {"rope": ["1337"], "none": ["1337"]}
    one = saved["runs"]["none"]["1337"]
    assert one["train_length"] == 16
    assert len(one["loss"]) == len(one["lengths"]) == len(one["sliding"]) == len(one["attention"]["entropy"]) == 9
    assert "commit" in saved["made"]
    text = (out / "results.md").read_text(encoding="utf-8")
    said = ("| none | less rope |", "seed 1337", "not broken to | uses to", "nats saved", "Made by `python compare.py")
    assert all(word in text for word in said)
    assert page.read_text(encoding="utf-8") == "before\n<!-- out -->\n" + text + "<!-- /out -->\nafter\n"
    assert (page.parent / "out.png").read_bytes() == (out / "length.png").read_bytes()
    assert (page.parent / "out-gain.png").read_bytes() == (out / "gain.png").read_bytes()
    for picture in ("length.png", "position.png", "attention.png", "gain.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert [torch.load(path, weights_only=True)["step"] for path in out.glob("*/ckpt.pt")] == [steps, steps]


@pytest.mark.usefixtures("in_process")
def test_a_comparison_leaves_tables_and_is_not_made_twice(command, page, tmp_path, call_script):
    out = tmp_path / "out"
    done = call_script("compare.py", *command)
    assert done.returncode == 0, done.stderr
    check(out, page, 12)

    # Once more: nothing is trained or measured again.
    before = stamps(out)
    assert call_script("compare.py", *command).returncode == 0
    assert stamps(out) == before

    # Measurements from before results.json had its name count as well, until the checkpoint is a newer one.
    for folder in out.glob("*/reach"):
        (folder / "results.json").rename(folder / "length.json")
    before = stamps(out)
    assert call_script("compare.py", *command).returncode == 0
    assert stamps(out) == before
    check(out, page, 12)
    (out / "none-1337" / "ckpt.pt").touch()
    assert call_script("compare.py", *command).returncode == 0
    assert [path.parent.parent.name for path in out.glob("*/reach/results.json")] == ["none-1337"]

    # Another setting is refused, and nothing is lost.
    before = stamps(out)
    other = call_script("compare.py", *command, "--batch_size=16")
    assert (other.returncode, other.stderr.count("train.py: ")) == (2, 1)
    assert "batch_size was 8 and is now 16" in other.stderr and "rope-1337.log" in other.stderr
    assert stamps(out) == before


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(command, page, tmp_path, run_script):
    command, out = [*command, "--max_steps=40", "--jobs=2"], tmp_path / "out"
    words = [sys.executable, str(ROOT / "compare.py"), *map(str, command)]
    process = subprocess.Popen(words, env=ENV, stderr=subprocess.DEVNULL)
    while not list(out.glob("*/ckpt.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()  # It alone: the runs that it has started end by themselves.
    process.wait()
    assert not (out / "results.json").exists()
    done = run_script("compare.py", *command)
    assert done.returncode == 0, done.stderr
    check(out, page, 40)


@pytest.mark.usefixtures("in_process")
def test_stretched_runs_are_measured_as_what_they_came_from_is(trained, corpus, tmp_path, call_script):
    linear = 'rope(scaling="linear", factor=2)'
    (tmp_path / "extend.py").write_text(
        f"init_from = '{trained}'\ntrain_length = 32\nmax_steps = 2\nbatch_size = 4\n", encoding="utf-8"
    )
    flags = [f"--common={tmp_path}/extend.py", "--targets=2", "--seeds=1", "--out_dir=out", "--device=cpu"]
    flags += [f"--text={corpus}", "--dataset=text", f"--data_dir={corpus.parent}/data"]
    done = call_script("compare.py", linear, *flags)
    assert done.returncode == 0, done.stderr
    saved = runs.read_json(tmp_path / "out" / "results.json")
    assert saved["train_length"] == 16  # of the run they came from
    assert saved["runs"][linear]["1337"]["lengths"][:2] == [8, 16]

    # The base itself: as it is, with encodings laid over, and under a window of T.
    same = ["--targets=2", "--train_length=16", "--lengths=[16, 32]", "--device=cpu"]
    ways = [f"--posenc={spec}" for spec in ("rope", linear, "none", "rope(base=80000.0)")]
    assert call_script("evaluate.py", trained, *ways, *same, "--out_dir=untrained").returncode == 0
    assert call_script("evaluate.py", trained, "--window=16", "--sinks=4", *same, "--out_dir=window").returncode == 0
    losses = []
    for folder in ("untrained", "window"):
        losses += [record["loss"] for record in runs.read_json(tmp_path / folder / "results.json")["runs"].values()]
    assert len({round(at_twice, 6) for _, at_twice in losses}) == 5
    assert losses[0][0] == pytest.approx(losses[4][0], abs=1e-6)  # the window does nothing at T
    for spec in ("kerple", "learned"):
        done = call_script("evaluate.py", trained, f"--posenc={spec}", *same)
        assert done.returncode == 2 and "has weights of its own" in done.stderr


@pytest.mark.usefixtures("in_process")
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
    assert (done.returncode, "is at step 4 already, past --max_steps=2" in done.stderr) == (2, True), done.stderr


def test_a_folder_of_other_pages_is_left_alone(call_script, tmp_path, trained):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text("mine", encoding="utf-8")
    for words in (["compare.py", "rope"], ["evaluate.py", trained]):
        done = call_script(*words, "--out_dir=docs")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "--out_dir=docs holds other files (results.md)" in done.stderr
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["results.md"]
    assert (tmp_path / "docs/results.md").read_text(encoding="utf-8") == "mine"


def test_mistakes_are_one_line(call_script, tmp_path, trained):
    (tmp_path / "results.md").write_text("mine\n<!-- out -->\n", encoding="utf-8")
    (tmp_path / "bpe.py").write_text("tokenizer = 'bpe'\n", encoding="utf-8")
    (tmp_path / "long.py").write_text("train_length = 64\n", encoding="utf-8")
    for words, said in (
        (["rope", f"--docs={tmp_path}", "--out_dir=out"], "has no place for the tables"),
        (["rope", f"--docs={trained}", "--out_dir=out"], "there is no page"),
        (["rope", f"{tmp_path}/long.py", "--dataset=copy"], "train_length must be the same"),
        (["rope", f"{tmp_path}/bpe.py"], "tokenizer is not the same in all of them"),
        ([], "which configs"),
        (["rpe"], "did you mean 'rope'"),
        (["nowhere.py"], "no config file nowhere.py"),
        (["rope", "rope"], "two are called"),
        (["rope", "--posenc=none"], "--posenc"),
        (["rope", "--seeds=0"], "seeds must be in 1"),
        (["rope", "--common=nowhere.py"], "no config file nowhere.py"),
        (["rope", "--learning_rat=1"], "learning_rate"),
        (["rope", f"--out_dir={trained}"], "is a run"),
    ):
        done = call_script("compare.py", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
        assert not (tmp_path / "out").exists()


def test_an_encoding_laid_over_a_base_is_named_with_all_that_is_in_force():
    rope, file = (compare.Contestant(name, name, [], {"posenc": "rope"}) for name in ("rope", "a"))
    config = Config(posenc="rope(scaling='yarn', factor=4)")
    assert rope.title(config) == config.posenc
    assert rope.title(Config(posenc="rope")) == "rope"
    assert file.title(config) == "a"


def test_a_schedule_over_the_layers_is_a_contestant_too():
    (one,) = compare.contestants(['["rope(window=8)", "none"]'], [], {})
    assert one.settings["posenc"] == ["rope(window=8)", "none"] and one.folder == "rope-window-8-none"
    assert one.argv == ['--posenc=["rope(window=8)", "none"]']
    with pytest.raises(UserError, match="as an encoding: no positional encoding is called 'rop'"):
        compare.contestants(['["rope", "rop"]'], [], {})

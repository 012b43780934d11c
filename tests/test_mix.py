"""Tasks in one run, with a text or without: whose row comes when, what of each is learned, and that it is measured."""

import json
import shutil

import numpy as np
import pytest
from here import in_process  # noqa: F401
from small import CPU
from test_data import config_of, mistake, open_dataset
from test_tasks import learn  # noqa: F401  # a fixture
from test_train import metrics, same, state
from tiny import TINY

import evaluate
from lab import tables
from model import GPT, GPTConfig

T = 16
MIXED = ["text", "copy", "text", "recall"]


@pytest.fixture
def mixed(tmp_path, corpus):
    config = config_of(tmp_path, corpus, train_length=T)
    one = {name: open_dataset(config_of(tmp_path, train_length=T, dataset=name)) for name in ("copy", "recall")}
    one["text"] = open_dataset(config)
    config.dataset = MIXED
    return open_dataset(config), one


def test_each_data_set_gives_its_own_rows_in_their_order_whoever_computes_them(mixed):
    mix, one = mixed
    key, count, steps = (7, 0), 6, 4
    drawn = [mix.batch(T, count, key, step) for step in range(steps)]
    rows = [np.concatenate(half) for half in zip(*drawn, strict=True)]
    for name in one:
        mine = [index for index in range(count * steps) if MIXED[index % 4] == name]
        expected = one[name].batch(T, len(mine), key, 0)
        for found, wanted in zip(rows, expected, strict=True):
            assert np.array_equal(found[mine], wanted)
    halves = [mix.batch(T, count, key, 2, part) for part in (slice(0, 3), slice(3, 6))]
    for found, wanted in zip(zip(*halves, strict=True), drawn[2], strict=True):
        assert np.array_equal(np.concatenate(found), wanted)


def test_the_validation_set_has_as_much_of_each_as_the_rows_have(mixed):
    mix, one = mixed
    inputs, targets = mix.validation(T, 8)
    for part, wanted in ((slice(0, 4), "text"), (slice(4, 6), "copy"), (slice(6, 8), "recall")):
        expected = one[wanted].validation(T, part.stop - part.start)
        assert np.array_equal(inputs[part], expected[0]) and np.array_equal(targets[part], expected[1])
    assert (targets[:4] >= 0).all() and (targets[4:] < 0).any()


def test_another_mixture_is_another_corpus(mixed, tmp_path, corpus):
    config = config_of(tmp_path, corpus, train_length=T)
    config.dataset = MIXED[::-1]
    assert open_dataset(config).meta["data_checksum"] != mixed[0].meta["data_checksum"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset": ["python", "shakespeare"]}, "a mixture has one text"),
        ({"dataset": ["python", "text", "copy"], "text": "a.txt"}, "a mixture has one text"),
        ({"dataset": ["python", "copy"], "tokenizer": "bpe"}, "--tokenizer=bytes"),
    ],
)
def test_what_makes_no_mixture_is_one_line(settings, said, tmp_path, corpus):
    if "text" in settings:
        settings["text"] = str(corpus)
    assert said in mistake(config_of(tmp_path, **settings))


@pytest.mark.parametrize("names", [[], ["copy", "nothing"], [1]])
def test_a_list_names_data_sets(names, tmp_path):
    with pytest.raises(ValueError, match="dataset must list some of python"):
        config_of(tmp_path, dataset=names)


def test_a_run_learns_both_resumes_exactly_and_is_asked_both(learn, call_script, corpus, tmp_path):  # noqa: F811
    out, again, settings = tmp_path / "run", tmp_path / "again", {"dataset": ["text", "copy"], "text": str(corpus)}
    said = learn(out, **settings).stdout
    assert "training tokens (text + copy, bytes)" in said and "| nats per token, 4 windows |" in said
    shutil.copytree(out, again)
    (again / "ckpt_prev.pt").replace(again / "ckpt.pt")
    learn(again, **settings)
    assert same(state(again), state(out) | {"config": state(again)["config"]})
    assert metrics(again, "loss") == metrics(out, "loss")
    length = json.loads((out / "length.json").read_text(encoding="utf-8"))
    assert len(length["loss"]) == len(length["lengths"]) and length["tasks"]["copy"]["lengths"] == [
        8,
        16,
        24,
        32,
        64,
        128,
    ]

    done = call_script("evaluate.py", out, "--targets=4", f"--out_dir={tmp_path}/reach")
    assert done.returncode == 0 and "| exact match, copy, 4 windows | 0.5 T |" in done.stdout, done.stderr
    assert (tmp_path / "reach" / "exact-copy.png").read_bytes().startswith(b"\x89PNG")
    done = call_script("evaluate.py", out, "--targets=4", "--lengths=[8, 24]")
    assert done.returncode == 0 and "copy" not in done.stdout, done.stderr
    done = call_script("evaluate.py", out, "--targets=4", "--data=" + str(corpus))
    assert done.returncode == 0 and "copy" not in done.stdout, done.stderr


def test_tasks_without_a_text_have_a_table_each(tmp_path):
    mix = open_dataset(config_of(tmp_path, train_length=T, dataset=["copy", "parity"]))
    assert mix.text is None and mix.masks and mix.size == "endless" and list(mix.tasks) == ["copy", "parity"]
    model = GPT(GPTConfig(vocab_size=257, n_layer=1, n_embd=32, train_length=T), seed=0).eval()
    record = evaluate.summary(model, mix, CPU, 4)
    assert record["lengths"] == [] and "loss" not in record and "exact" not in record
    assert {name: len(of_task["exact"]) for name, of_task in record["tasks"].items()} == {"copy": 6, "parity": 6}
    assert tables.is_whole(record) and tables.kinds({"run": record}) == [("exact", "copy"), ("exact", "parity")]
    lines = tables.tables({"run": record, "other": record | {"tasks": {"parity": record["tasks"]["parity"]}}})
    assert lines[0] == "| exact match, parity, 4 windows | 0.5 T | 1 T | 1.5 T | 2 T | 4 T | 8 T |" and len(lines) == 4


@pytest.mark.slow
def test_runs_that_learned_tasks_are_closed_and_compared_by_those_they_share(learn, call_script, tmp_path):  # noqa: F811
    out, other = tmp_path / "run", tmp_path / "other"
    said = learn(out, dataset=["copy", "parity"]).stdout
    assert "endless training tokens (copy + parity, bytes)" in said and "nats per token" not in said
    for task in ("copy", "parity"):
        assert f"| exact match, {task}, 4 windows | 0.5 T |" in said
    record = json.loads((out / "length.json").read_text(encoding="utf-8"))
    assert record["lengths"] == [] and list(record["tasks"]) == ["copy", "parity"] and "loss" not in record
    assert len(record["tasks"]["parity"]["exact"]) == 6
    pictures = ["exact-copy.png", "exact-parity.png"]
    assert sorted(file.name for file in out.glob("exact-*")) == pictures and not (out / "length.png").exists()
    before = (out / "length.json").stat().st_mtime_ns
    assert "is finished" in learn(out, dataset=["copy", "parity"]).stdout
    assert (out / "length.json").stat().st_mtime_ns == before  # it was closed
    (out / "exact-parity.png").unlink()
    learn(out, dataset=["copy", "parity"])
    assert (out / "length.json").stat().st_mtime_ns > before

    learn(other, dataset=["parity", "sort"], length_targets=0)
    words = ["--targets=4", f"--out_dir={tmp_path}/reach", f"--table={tmp_path}/table.md"]
    done = call_script("evaluate.py", out, other, *words, f"--picture={tmp_path}/a.png")
    assert done.returncode == 0 and done.stdout.count("exact match") == 1, done.stderr  # of what both learned
    assert "| exact match, parity, 4 windows |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "reach" / "exact-parity.png").exists() and (tmp_path / "a.png").exists()
    learn(tmp_path / "one", dataset="sort", length_targets=0, max_steps=1)
    learn(tmp_path / "third", dataset=["sort", "reverse"], length_targets=0, max_steps=1)
    for wrong in ("one", "third"):
        done = call_script("evaluate.py", out, tmp_path / wrong)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "no table has all of them" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_comparison_of_runs_that_learned_tasks(call_script, tmp_path):
    (tmp_path / "results.md").write_text("<!-- out -->\n<!-- /out -->\n", encoding="utf-8")
    settings = TINY | {"dataset": ["copy", "parity"], "text": "", "max_steps": 2, "targets": 2, "seeds": 2}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = call_script("compare.py", "rope", "none", *flags, f"--out_dir={tmp_path}/out", f"--docs={tmp_path}")
    assert done.returncode == 0 and "exact-copy.png, exact-parity.png" in done.stdout, done.stderr
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    for task in ("copy", "parity"):
        assert f"| exact match, {task} |  | 0.5 T |" in text and (tmp_path / f"out-{task}.png").exists()
    assert text.count("| none | less rope |") == 2 and "nats per token" not in text

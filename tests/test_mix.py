"""A text and tasks in one run: whose row comes when, what is learned of each, and that both are measured."""

import json
import shutil

import numpy as np
import pytest
from test_data import config_of, mistake, open_dataset
from test_tasks import learn  # noqa: F401  # a fixture
from test_train import metrics, same, state

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
        ({"dataset": ["copy", "recall"]}, "a mixture has one text"),
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

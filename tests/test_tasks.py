"""The tasks: their answers by an oracle that shares no code, what is asked for, and how it is scored."""

import json
import math
import shlex
import shutil
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from solve import SOLVE
from test_train import metrics, nearly, same, state
from tiny import TINY, bound, command, run, sums

import data
from core.errors import UserError
from core.measure import exact_match, validation_loss
from core.place import Place
from core.settings import Config, Dataset
from data import vocabulary
from data.tasks import BESIDE, TASKS
from lab import passkey
from model import GPT, GPTConfig, generate

CPU = Place(torch.device("cpu"), torch.float32)
END, T = 256, 128
NAMES = list(TASKS)


def task_of(name, **settings):
    config = Config(dataset=name, **settings)
    return data.open_dataset(config, vocabulary.load(config.tokenizer))


def read(inputs, targets):
    """A row -> (its text, {position in the text: what is asked for there}). The text ends where the padding begins."""
    ids = [*inputs.tolist(), END]
    end = ids.index(END)
    assert set(ids[end:]) == {END}
    text = bytes(ids[:end]).decode()
    assert max(np.flatnonzero(targets >= 0), default=0) <= end
    asked = {place + 1: target for place, target in enumerate(targets.tolist()) if target != -1}
    return text, {place: chr(target) if target != END else "END" for place, target in asked.items()}


# {name: (shortest example, the most characters that an example can stay below the length it is to fill)}
SIZES = {
    "copy": (3, 1), "reverse": (3, 1), "recall": (6, 5), "addition": (6, 2), "passkey": (42, 30), "multikey": (14, 6),
    "multivalue": (47, 6), "multiquery": (56, 6), "variables": (43, 5), "indexing": (24, 0), "flipflop": (4, 1),
    "sort": (3, 1), "parity": (1, 0), "s5": (1, 0), "dyck": (1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_and_nothing_else_is_asked_for(name):
    task, (shortest, slack) = task_of(name), SIZES[name]
    for rows, least in (
        (task.batch(T, 300, (1, 0), 0), 0),
        (task.validation(T, 100), 0),
        (task.examples(T, 50), T - slack),
        (task.examples(4 * T, 20), 4 * T - slack),
    ):
        inputs, targets = rows
        assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == targets.shape
        lengths = set()
        for x, y in zip(inputs, targets, strict=True):
            text, asked = read(x, y)
            assert asked == SOLVE[name](text)
            lengths.add(len(text))
        length = inputs.shape[1]
        assert max(lengths) <= length and min(lengths) >= max(least, shortest)
        if not least:  # of all lengths
            assert min(lengths) <= shortest + 6 and max(lengths) >= length - slack - 6 and len(lengths) >= 10


@pytest.mark.parametrize(
    ("name", "text", "answers"),
    [
        ("variables", "ab=42 gh=17 cd=ab xy=gh ef=cd ij=ef kl=ij ?42abcdefijkl", "abcdefijkl"),
        ("indexing", "QEOHoUbzK,z-3o,E+5b,K-1z,U+1b", "obzb"),
        ("flipflop", "w1i0i1r1w0r0", "10"),
        ("sort", "31415=11345", "11345"),
        ("parity", "0110", "0100"),
        ("s5", "aej", "233"),
        ("dyck", "([]{", ")])}"),
    ],
)
def test_examples_by_hand(name, text, answers):
    """Those of the docstrings: the solvers are right too."""
    asked = SOLVE[name](text)
    assert "".join(asked[place] for place in sorted(asked)).removesuffix("END") == answers


@pytest.mark.parametrize("name", ["multikey", "multivalue", "multiquery", "variables", "indexing"])
def test_no_alphabet_bounds_a_length(name):
    """There are 676 keys of two letters, a hundred numbers of two digits, and 52 letters."""
    for x, y in zip(*task_of(name).examples(6000, 2), strict=True):
        text, asked = read(x, y)
        assert len(text) > 5990 and asked == SOLVE[name](text)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_read_unless_they_stand_beside_the_text(name):
    x, y = task_of(name).examples(T, 20)
    follows = np.concatenate([x[:, 1:], np.full((20, 1), END)], axis=1)
    assert (y[y >= 0] == follows[y >= 0]).all() == (name not in BESIDE)


@pytest.mark.parametrize("name", NAMES)
def test_examples_vary(name):
    texts = {read(x, y)[0] for x, y in zip(*task_of(name).examples(T, 100), strict=True)}
    assert len(texts) == 100


def test_recall_orders_its_questions_anew():
    """Else they could be answered by distance alone."""
    for x, y in zip(*task_of("recall").examples(T, 20), strict=True):
        text, _ = read(x, y)
        assert text[: len(text) // 2] != text[len(text) // 2 :]


@pytest.mark.parametrize(("depth", "share"), [(0, 0), (0.25, 0.25), (0.5, 0.5), (1, 1)])
def test_the_pass_key_stands_at_its_depth(depth, share):
    for x, y in zip(*task_of("passkey").examples(1000, 10, depth=depth), strict=True):
        text, _ = read(x, y)
        filler = text.rindex("The pass key") - len("The pass key is 1234. ")
        assert text.index("The pass key") / filler == pytest.approx(share, abs=0.05)


def test_the_pass_key_stands_anywhere_in_training():
    places = {
        read(x, y)[0].index("The pass key") for x, y in zip(*task_of("passkey").batch(400, 200, (1, 0), 0), strict=True)
    }
    assert min(places) == 0 and max(places) > 250 and len(places) > 50


# Batches.


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_pure_and_parts_make_up_the_whole(name):
    task = task_of(name)
    whole = {step: task.batch(T, 12, (1337, 0), step) for step in (0, 1, 7)}
    for world in (1, 2, 3):
        for step in (7, 0, 1):
            share = 12 // world
            parts = [
                task_of(name).batch(T, 12, (1337, 0), step, slice(rank * share, (rank + 1) * share))
                for rank in range(world)
            ]
            for half in (0, 1):
                assert np.array_equal(np.concatenate([part[half] for part in parts]), whole[step][half])


def test_every_row_has_a_seed_of_its_own_and_validation_has_none_of_trainings(monkeypatch):
    """Also for seeds that numpy would run together: 2**32 is (0, 1) to it, and [1] is [1, 0]."""
    task, drawn, make = task_of("copy"), [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (drawn.append(seed), make(seed))[1])
    for seed in (0, 1, 10, 2**32, 2**64, 2**32 + 1):
        for phase in (0, 1):
            for step in (0, 1):
                task.batch(T, 8, (seed, phase), step)
    task.validation(T, 8)
    task.validation(2 * T, 8)
    task.examples(T, 8)
    assert len(drawn) == len(set(drawn)) == 6 * 2 * 2 * 8 + 3 * 8


# Settings.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer": "bpe"}, "--tokenizer=bytes"),
        ({"segments": 2}, "--segments=1"),
        ({"eval_tokens": 10**12}, "--eval_tokens=32768"),
        ({"train_length": 41}, "passkey needs 42 characters, not 41"),
        ({"train_length": 64, "length_schedule": {0.0: 32, 0.5: 64}}, "passkey needs 42 characters, not 32"),
    ],
)
def test_settings_that_a_task_cannot_have(settings, said):
    with pytest.raises(UserError, match=said) as error:
        task_of("passkey", **settings)
    assert "\n" not in str(error.value)
    task_of("passkey", train_length=42)


def test_every_task_and_corpus_can_be_chosen():
    assert set(typing.get_args(Dataset)) == {*TASKS, *data.SOURCES}


# Scoring.


class Reader:
    """Stands for a model: its likeliest token is the one that really follows, but for the places in `mistakes`, which
    are numbered over all calls as (row, column)."""

    def __init__(self, train_length, mistakes=(), max_length=math.inf):
        self.config, self.max_length = GPTConfig(train_length=train_length), max_length
        self.mistakes, self.rows, self.calls = mistakes, 0, []

    def __call__(self, tokens):
        said = F.pad(tokens[:, 1:], (0, 1), value=END)
        for row, column in self.mistakes:
            if 0 <= row - self.rows < len(tokens):
                said[row - self.rows, column] = ord("?")
        self.rows += len(tokens)
        self.calls.append(tokens.shape)
        return 30.0 * F.one_hot(said, 257)


def test_all_right_is_one():
    for name in set(NAMES) - BESIDE:
        result = exact_match(Reader(T), task_of(name), CPU, 5)
        assert result["lengths"] == [64, 128, 192, 256, 512, 1024] and result["exact"] == [1.0] * 6
        assert (result["train_length"], result["windows"], result["max_length"]) == (T, 5, None)
        assert max(result["loss"]) < bound(torch.float32, 257)  # a softmax over the vocabulary


@pytest.mark.parametrize("budget", [1, 300, 10**6])
def test_one_wrong_token_is_one_wrong_row(budget):
    task = task_of("copy")  # 127 characters, 63 of them given with a "=": columns 63 to 126 hold targets
    for column, right in ((62, 8), (63, 7), (100, 7), (126, 7), (127, 8)):
        model = Reader(T, mistakes=[(3, column)])
        result = exact_match(model, task, CPU, 8, multiples=(1,), budget=budget)
        assert result["exact"] == [right / 8]
        assert all(rows * length <= max(budget, length) for rows, length in model.calls)
    both = Reader(T, mistakes=[(3, 80), (3, 90)])
    assert exact_match(both, task, CPU, 8, multiples=(1,))["exact"] == [7 / 8]


def test_lengths_are_those_with_positions_that_an_example_fits_in():
    result = exact_match(Reader(T, max_length=T), task_of("copy"), CPU, 2)
    assert (result["lengths"], result["max_length"]) == ([64, 128], 128)
    assert exact_match(Reader(50), task_of("passkey"), CPU, 2, multiples=(0.5, 0.6, 1))["lengths"] == [42, 50]


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary():
    class Uniform(Reader):
        def __call__(self, tokens):
            return torch.zeros(*tokens.shape, 257)

    result = exact_match(Uniform(T), task_of("recall"), CPU, 4)
    assert result["loss"] == pytest.approx([math.log(257)] * 6) and result["exact"] == [0.0] * 6


def small(seed=0, train_length=16):
    config = GPTConfig(vocab_size=257, n_layer=2, n_embd=64, train_length=train_length, zero_init=False)
    return GPT(config, seed).eval()


def test_losses_are_means_over_targets():
    model, task = small(), task_of("recall")
    rounding = bound(torch.float32, sums(model.config, T))
    x, y = map(torch.from_numpy, task.examples(16, 6))
    expected = sum(model(x, y)[y >= 0].tolist()) / int((y >= 0).sum())
    assert exact_match(model, task, CPU, 6, multiples=(1,))["loss"] == pytest.approx([expected], rel=rounding)
    windows = task.validation(T, 6)
    x, y = map(torch.from_numpy, windows)
    counts = (y >= 0).sum(1)
    assert len(set(counts.tolist())) > 2  # a mean of means would be another number
    expected = sum(model(x, y)[y >= 0].tolist()) / int(counts.sum())
    sizes = vocabulary.byte_lengths(vocabulary.load("bytes"))
    for rows in (1, 4, 6):
        nats, bits = validation_loss(model, windows, sizes, CPU, rows)
        assert nats == pytest.approx(expected, rel=rounding)
        assert bits == pytest.approx(expected / math.log(2), rel=rounding)


@pytest.mark.parametrize(("name", "length"), [("copy", 5), ("reverse", 5), ("addition", 6)])
def test_exact_match_is_what_greedy_decoding_gets_right(name, length):
    model, task = small(train_length=length), task_of(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        x, y = map(torch.from_numpy, task.batch(length, 64, (1, 0), step))
        (model(x, y).sum() / (y >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            (exact,) = exact_match(model, task, CPU, 200, multiples=(1,))["exact"]
            if exact > 0.2:
                break
    assert 0.2 < exact < 0.9
    inputs, targets = task.examples(length, 200)
    given = int((targets[0] < 0).sum()) + 1
    asked = torch.from_numpy(targets[:, given - 1 :])
    wrote = torch.stack([*generate(model, torch.from_numpy(inputs[:, :given]), asked.shape[1], temperature=0)], dim=1)
    assert (wrote == asked).all(1).double().mean().item() == pytest.approx(exact)


def test_the_map_tells_depths_from_lengths():
    """A model that sees the last 100 characters, and so no key that stands before them."""

    class Near(Reader):
        def __call__(self, tokens):
            answers = super().__call__(tokens)
            for row, text in enumerate(tokens.tolist()):
                end = text.index(END) if END in text else len(text)
                if not any(48 <= token < 58 for token in text[max(0, end - 104) : end - 4]):
                    answers[row] = 0
            return answers

    result = passkey.depth_map(Near(T), task_of("passkey"), CPU, 4, multiples=(1, 4))
    assert (result["lengths"], result["depths"]) == ([128, 512], [0, 0.25, 0.5, 0.75, 1])
    exact = np.array(result["exact"])
    assert exact.shape == (5, 2) and exact[:, 1].tolist() == [0, 0, 0, 0, 1] and exact[-1, 0] == 1


# Whole runs.


@pytest.fixture
def learn(call_script, corpus):
    def start(out, check=True, **settings):
        done = call_script("train.py", *command(corpus, out, **{"dataset": "copy", "text": "", **settings})[2:])
        assert not check or done.returncode == 0, done.stderr
        return done

    return start


def test_a_run_resumes_exactly_and_can_be_sampled_and_evaluated(learn, call_script, trained, tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    said = learn(out).stdout
    assert "endless training tokens (copy, bytes)" in said and "| exact match, 4 windows | 0.5 T | 1 T |" in said
    length = json.loads((out / "length.json").read_text(encoding="utf-8"))
    assert length["lengths"] == [8, 16, 24, 32, 64, 128] and len(length["exact"]) == len(length["loss"]) == 6
    assert length["step"] == 24 and "commit" in length
    assert metrics(out, "loss")[24] < metrics(out, "loss")[1] - 1
    shutil.copytree(out, again)
    (again / "ckpt_prev.pt").replace(again / "ckpt.pt")
    learn(again)
    assert same(state(again), state(out) | {"config": state(again)["config"]})
    assert metrics(again, "loss") == metrics(out, "loss")

    command_line = shlex.split(said.strip().splitlines()[-1].removeprefix("next: python "))
    assert command_line[0] == "sample.py" and "--stop" in command_line and "=" in command_line[2]
    done = call_script(*command_line)
    assert done.returncode == 0, done.stderr
    done = call_script("evaluate.py", out, "--targets=4", f"--picture={tmp_path}/a.png")
    assert done.returncode == 0 and "exact match" in done.stdout, done.stderr
    done = call_script("evaluate.py", out, trained)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "some a text" in done.stderr


def test_a_task_of_another_version_is_another_corpus(learn, tmp_path, monkeypatch):
    learn(tmp_path / "run", max_steps=4)
    monkeypatch.setattr(data.tasks, "VERSION", 0)
    done = learn(tmp_path / "run", check=False, max_steps=8)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "has changed since it began" in done.stderr


def test_passkey_leaves_a_map(learn, tmp_path):
    out = tmp_path / "run"
    learn(out, dataset="passkey", train_length=48, max_steps=4, batch_size=2)
    assert (out / "passkey.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "length.json").read_text(encoding="utf-8"))
    assert np.array(result["map"]["exact"]).shape == (5, 6) == (5, len(result["lengths"]))


def test_lengths_may_grow(learn, tmp_path):
    learn(tmp_path / "run", length_schedule={0.0: 4, 0.5: 16}, max_steps=4, length_targets=0)
    assert list(metrics(tmp_path / "run", "loss")) == [1, 2, 3, 4]


def test_the_loss_is_the_mean_over_the_targets_of_all_micro_batches_and_processes(learn, corpus, tmp_path):
    """Rows have answers of many lengths, so that a mean of the parts' means would be another number."""
    settings = {"dataset": "copy", "text": "", "max_steps": 3, "dropout": 0.0, "length_targets": 0, "eval_interval": 3}
    learn(tmp_path / "one", **settings)
    learn(tmp_path / "four", micro_batch_size=2, **settings)
    run(corpus, tmp_path / "two", processes=2, **settings)
    for key in ("loss", "grad_norm", "val_loss"):
        one = metrics(tmp_path / "one", key)
        for name in ("four", "two"):
            assert nearly(one, metrics(tmp_path / name, key))
    counts = (task_of("copy").batch(16, 8, (1337, 0), 0)[1] >= 0).sum(1).reshape(4, 2).sum(1)
    assert len(set(counts.tolist())) > 2
    assert metrics(tmp_path / "one", "loss")[1] == pytest.approx(
        first_loss(), rel=bound(torch.float32, sums(first_config(), keys=16))
    )


def first_config():
    return Config(**TINY | {"dataset": "copy", "dropout": 0.0, "vocab_size": 257})


def first_loss():
    config = first_config()
    x, y = map(torch.from_numpy, task_of("copy").batch(16, 8, (1337, 0), 0))
    return F.cross_entropy(GPT(config, 1337)(x)[y >= 0], y[y >= 0]).item()

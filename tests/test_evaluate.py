"""The measurement itself, on models whose right answers are known."""

import json
import math

import numpy as np
import pytest
import torch

import data
import evaluate
import report
from device import Device
from model import GPT, GPTConfig

CPU = Device(torch.device("cpu"), torch.float32)


def dataset(lengths, tokens=None):
    """Validation documents of the given lengths, of numbered tokens unless given."""
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    ids = np.arange(total) if tokens is None else tokens
    return data.Dataset(ids, ids, {"documents": {"val": starts}, "tokens": {"val": total}}, None)


class Recorder:
    """Stands for a model: writes down what it is asked, and answers with a loss of 1 for every target."""

    def __init__(self, train_length, max_length=math.inf):
        self.config, self.max_length = GPTConfig(train_length=train_length), max_length
        self.calls, self.context = [], []

    def __call__(self, tokens, targets=None, cache=None, last=None):
        self.context.append(tokens)
        if targets is None:
            return None
        self.calls.append((torch.cat(self.context, dim=1), targets))
        self.context = []
        return torch.ones(targets.shape)


def test_every_length_is_scored_on_the_same_targets_with_the_tokens_before_them():
    model = Recorder(train_length=16)
    result = evaluate.length_loss(model, dataset([200, 50, 300]), CPU, count=10, budget=10**9, chunk=7)
    assert result["lengths"] == [8, 16, 24, 32, 64, 128]
    assert result["loss"] == [1.0] * 6
    longest = model.calls[-1][0]
    for (seen, targets), length in zip(model.calls, result["lengths"], strict=True):
        assert seen.shape == (10, length)
        assert targets.shape == (10, 4)
        assert torch.equal(seen, longest[:, -length:])  # only the context before grows
        assert torch.equal(targets, seen[:, -4:] + 1)  # tokens are numbered: the next ones
    assert len(set(targets.flatten().tolist())) == 40  # no target twice
    for row in longest:  # inside one document
        assert any(start <= row[0] and row[-1] + 1 < stop for start, stop in ((0, 200), (250, 550)))
    assert {int(row[0]) < 200 for row in longest[:2]} == {True, False}  # of as many documents as there are


def test_documents_that_are_too_short_are_read_across():
    result = evaluate.length_loss(Recorder(16), dataset([100] * 20), CPU, count=5)
    assert result["lengths"][-1] == 128


def test_lengths_the_validation_text_cannot_hold_are_left_out():
    assert evaluate.length_loss(Recorder(16), dataset([60]), CPU, count=5)["lengths"] == [8, 16, 24, 32]


def test_lengths_without_positions_are_left_out():
    result = evaluate.length_loss(Recorder(16, max_length=16), dataset([500]), CPU, count=5)
    assert (result["lengths"], len(result["loss"])) == ([8, 16], 2)
    assert evaluate.table({"learned": result, "rope": result | {"lengths": [8, 32]}})[2:] == [
        "| learned | 1.000 | 1.000 | no position |",
        "| rope | 1.000 | no position | 1.000 |",
    ]


def uniform(vocab_size):
    """A model that holds every token for equally likely."""
    model = GPT(GPTConfig(vocab_size=vocab_size, n_layer=1, n_embd=32, train_length=16)).eval()
    torch.nn.init.zeros_(model.head.weight)
    return model


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary():
    ids = np.random.default_rng(0).integers(40, size=600)
    result = evaluate.length_loss(uniform(40), dataset([600], ids), CPU, count=8)
    assert result["loss"] == pytest.approx([math.log(40)] * 6, rel=1e-6)
    windows, sizes = data.even_windows(ids, 16, 10), np.arange(40) % 3 + 1
    nats, bits = evaluate.validation_loss(uniform(40), windows, sizes, CPU, rows=3)
    assert nats == pytest.approx(math.log(40), rel=1e-6)
    assert bits == pytest.approx(160 * math.log2(40) / sum(int(sizes[y]) for y in windows[1].flatten()), rel=1e-6)


def test_chunks_and_batches_change_nothing():
    ids = np.random.default_rng(0).integers(40, size=2000)
    model = GPT(GPTConfig(vocab_size=40, n_layer=2, n_embd=32, train_length=16, zero_init=False)).double().eval()
    losses = [
        evaluate.length_loss(model, dataset([2000], ids), CPU, count=8, budget=budget, chunk=chunk)["loss"]
        for budget, chunk in ((10**9, 10**9), (1, 5), (300, 64))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)


def test_the_command_puts_runs_side_by_side(trained, learned, call_script, tmp_path):
    (tmp_path / "page.md").write_text("before\n<!-- evaluate -->\nold\n<!-- /evaluate -->\nafter\n")
    flags = [f"--table={tmp_path}/page.md", f"--picture={tmp_path}/curves.png", "--targets=4"]
    done = call_script("evaluate.py", trained, learned, *flags)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n<!-- evaluate -->\n| nats per token, 4 windows | 0.5 T | 1 T |")
    assert page.endswith(".\n<!-- /evaluate -->\nafter\n")
    assert "old" not in page
    assert page.count("no position") == 4
    assert "Made by `python evaluate.py" in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((learned / "length.json").read_text())["lengths"] == [8, 16]


def test_the_command_refuses_in_one_line(trained, call_script):
    for argv, said in (
        ([], "which runs"),
        (["nowhere"], "no run nowhere"),
        ([trained, "--target=3"], "'targets'"),
        ([trained, "--targets=0"], "at least 1"),
        ([trained, "--picture=nowhere/a.png"], "no folder nowhere"),
        ([trained, "--table=nowhere/a.md"], "no folder nowhere"),
        ([trained, f"--table={trained}"], "is a folder"),
        ([trained, "--picture=a.pdf"], "must end in .png"),
    ):
        done = call_script("evaluate.py", *argv)
        assert done.stdout == ""
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr


def test_write_table_leaves_the_rest_of_the_page_alone(tmp_path):
    page = tmp_path / "page.md"
    for between in ("", "| old |\n", "<!-- bench -->\n\n"):
        page.write_text(f"before\n<!-- x -->\n{between}<!-- /x -->\nafter\n")
        report.write_table(page, "x", ["| \\1 |"], "python x.py", torch.device("cpu"))
        text = page.read_text()
        assert text.startswith("before\n<!-- x -->\n| \\1 |\n\nMade by")
        assert text.endswith(".\n<!-- /x -->\nafter\n")
        assert "old" not in text


def test_write_table_without_markers_is_the_whole_file(tmp_path):
    report.write_table(tmp_path / "new.md", "bench", ["| a |"], "python x.py", torch.device("cpu"), seed=3)
    text = (tmp_path / "new.md").read_text()
    assert text.startswith("| a |\n\nMade by `python x.py`: seed 3, commit ")

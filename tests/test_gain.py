"""The worth of far context, of models for which it is known."""

import json
import math

import numpy as np
import pytest
import torch
from small import CPU, Copier, dataset, make

from core import measure
from core.errors import UserError
from lab import gain, tables

T, V = 16, 4000
DISTANCES = [4, 8, 12, 16, 32, 64, 128, 256]
NUMBERED = dataset([2500, 1500])  # no token stands in it twice
SURE, LOST = -math.log(0.75), math.log(V)


class Induction(Copier):
    """Stands for a model with an exact induction head: what followed the token last, at most `period` tokens before,
    gets probability 3/4, and the other V - 1 tokens share the rest; all are equal where there was none."""

    def forward(self, tokens, targets=None, past=None, last=None):
        before = past.layers.get(0, tokens[:, :0])
        seen = past.layers[0] = torch.cat((before, tokens), dim=1)
        if targets is None:
            return None
        nats = torch.full(targets.shape, LOST)
        for row, column in np.ndindex(*targets.shape):
            query = seen.shape[1] - targets.shape[1] + column
            for key in range(query - 1, max(-1, query - self.period - 1), -1):
                if seen[row, key] == seen[row, query]:
                    right = seen[row, key + 1] == targets[row, column]
                    nats[row, column] = -math.log(0.75 if right else 0.25 / (V - 1))
                    break
        return nats


def record(model, text, count=3):
    found = gain.repeats(model, text, CPU, count, T)
    return {"train_length": T, "lengths": [T], "loss": [1.0], "windows": count, "gain": found}


@pytest.mark.parametrize(("sees", "to"), [(3, 0), (4, 0.25), (15, 0.75), (100, 4), (256, 16)])
def test_an_induction_head_gains_from_all_it_sees_and_nothing_beyond(sees, to):
    """Three of four tokens follow one that stands in the earlier passage; the first follows another text."""
    measured = record(Induction(sees, V, T), NUMBERED)
    found = measured["gain"]
    assert found["distances"] == DISTANCES
    assert found["other"] == pytest.approx([LOST] * 8, rel=1e-6)
    saved = [0.75 * (LOST - SURE) * (distance <= sees) for distance in DISTANCES]
    assert found["gain"] == pytest.approx(saved, rel=1e-6)
    assert found["error"] == pytest.approx([0] * 8, abs=1e-9)  # all windows are alike
    assert tables.uses_to(measured) == to


def test_a_copier_gains_at_its_own_distance_alone():
    measured = record(Copier(16, V, T), NUMBERED)
    wrong = -math.log(0.25 / (V - 1))  # what it loses where it copies another passage
    assert measured["gain"]["gain"] == pytest.approx([0, 0, 0, wrong - SURE, 0, 0, 0, 0], rel=1e-6)
    assert tables.uses_to(measured) == 1


def test_a_uniform_model_gains_nothing():
    model = make("rope", vocab_size=40)
    torch.nn.init.zeros_(model.head.weight)
    measured = record(model, dataset([900], np.random.default_rng(0).integers(40, size=900)))
    assert measured["gain"]["gain"] == [0.0] * 8
    assert measured["gain"]["same"] == pytest.approx([math.log(40)] * 8)
    assert tables.uses_to(measured) == 0


@pytest.mark.parametrize("reading", [{}, {"window": 8}])
def test_what_lies_past_all_windows_changes_no_bit(reading):
    """Two layers that see 8 tokens reach 14 back, and the first query stands d - 4 behind the passage's last token."""
    model = make("rope" if reading else "rope(window=8)")
    text = dataset([900], np.random.default_rng(0).integers(50, size=900))
    found = gain.repeats(model, text, CPU, 3, T, **reading)
    assert [abs(x) > 1e-6 for x in found["gain"]] == [distance - 4 <= 14 for distance in DISTANCES]
    whole = gain.repeats(make("rope"), text, CPU, 3, T)
    assert all(abs(x) > 1e-6 for x in whole["gain"])


def test_distances_without_positions_or_text_are_left_out():
    text = dataset([150], np.arange(150) % 50)
    assert gain.repeats(make("learned"), text, CPU, 2, T)["distances"] == [4, 8, 12]
    assert gain.repeats(make("rope"), text, CPU, 2, T)["distances"] == DISTANCES[:-1]
    assert gain.repeats(make("rope", train_length=1), text, CPU, 2)["distances"] == [1, 2, 4, 8, 16]


def test_the_noise_of_a_gain_is_its_standard_error():
    assert gain.standard_error(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(1 / math.sqrt(3))
    assert gain.standard_error(torch.tensor([-2.0])).item() == 2
    measured = {"train_length": 10, "lengths": [10], "gain": {"distances": [5, 10, 20, 40]}}
    measured["gain"] |= {"gain": [0.2, 0.31, 0.29, -0.5], "error": [0.1] * 4}
    assert tables.uses_to(measured) == 1  # three errors are noise still
    assert tables.uses_to({"train_length": 10, "lengths": [10]}) is None
    lines = tables.table({"a": measured}, "gain")
    assert lines[0] == "| nats saved by the same passage, so far back | 0.5 T | 1 T | 2 T | 4 T |"
    assert lines[2] == "| a | 0.200 ± 0.100 | 0.310 ± 0.100 | 0.290 ± 0.100 | -0.500 ± 0.100 |"


# Key tokens.

SOURCES = [6, 40, 40, 1000, 100]  # how far before the last input of each window its source lies


def planted():
    """Numbered text, of which the last two tokens of each of five blocks of targets stand together once before."""
    drawn, ids = measure.targets(NUMBERED, T, 5), NUMBERED.val.copy()
    for end, back in zip(drawn.ends, SOURCES, strict=True):
        ids[end - 2 : end] = ids[end - 2 - back : end - back]
    return dataset([2500, 1500], ids)


def test_key_tokens_are_those_whose_source_lies_between_the_short_and_the_long_context():
    drawn = measure.targets(planted(), T, 5)
    assert (drawn.scored, drawn.own) == (4, 256)
    marks = gain.key_tokens(Induction(10**6, V, T), drawn, CPU, (T, 128), 0.5)
    assert marks.tolist() == [[False] * 3 + [16 <= back < 128] for back in SOURCES]
    assert not gain.key_tokens(Induction(10**6, V, T), drawn, CPU, (T, 128), SURE / 2).any()  # not well predicted
    assert not gain.key_tokens(Induction(16, V, T), drawn, CPU, (T, 128), 0.5).any()  # not by far context


class Marks:
    known = {"evaluator": "out/far"}

    def marks(self, text, T, count):
        drawn = measure.targets(text, T, count)
        return drawn, gain.key_tokens(Induction(10**6, V, T), drawn, CPU, (T, 128), 0.5)


def test_the_loss_of_key_tokens_falls_where_the_model_sees_their_source():
    found = gain.key_loss(Induction(50, V, T), Marks(), planted(), CPU, 5, (1, 2, 2.5, 2.625, 4, 8))
    assert found["lengths"] == [16, 32, 40, 42, 64, 128]
    part = (LOST + 2 * SURE) / 3  # two sources at 40, which 50 tokens reach, and one at 100
    assert found["loss"] == pytest.approx([LOST, LOST, LOST, part, part, part], rel=1e-6)
    whole = gain.key_loss(Induction(200, V, T), Marks(), planted(), CPU, 5, (4, 8))
    assert whole["loss"] == pytest.approx([part, SURE], rel=1e-6)
    records = {"a": {"train_length": T, "lengths": [64, 128], "key": whole}}
    title = "nats per key token, of 3 that out/far marked"
    assert tables.table(records, "key")[0] == f"| {title} | 4 T | 8 T |"


def test_marks_are_kept_until_something_else_would_make_them(trained, call_script, tmp_path, monkeypatch):
    calls, file = [], tmp_path / "reach" / gain.FILE

    def marked(model, drawn, place, lengths, nats):
        calls.append((lengths, nats))
        return np.arange(drawn.ends.size * drawn.scored).reshape(-1, drawn.scored) % 3 == 0

    monkeypatch.setattr(gain, "key_tokens", marked)
    words = ["evaluate.py", trained, "--lengths=[4, 8]", f"--key_evaluator={trained}", "--out_dir=reach", "--targets=5"]
    done = call_script(*words, "--train_length=8")
    assert done.returncode == 0, done.stderr
    assert calls == [((8, 16), 0.5)]
    found = json.loads(file.read_text(encoding="utf-8"))["8"]
    assert (len(found["tokens"]), found["made"]["evaluator"], found["made"]["step"]) == (4, str(trained), 24)
    results = json.loads((tmp_path / "reach" / "results.json").read_text(encoding="utf-8"))["runs"]["run"]
    assert (results["key"]["tokens"], results["key"]["lengths"]) == (4, [4, 8])
    assert f"nats per key token, of 4 that {trained} marked" in done.stdout
    assert (tmp_path / "reach" / "key.png").exists()
    assert call_script(*words, "--train_length=8").returncode == 0
    assert call_script(*words, "--train_length=4").returncode == 0
    assert call_script(*words, "--train_length=8").returncode == 0  # those of the other T are there still
    assert [lengths for lengths, _ in calls] == [(8, 16), (4, 16)]
    assert call_script(*words, "--train_length=8", "--targets=6").returncode == 0
    assert len(calls) == 3


def test_an_evaluator_that_cannot_judge_is_refused(trained, call_script):
    for more, said in (
        ([f"--key_evaluator={trained}"], "was trained on 16 tokens"),
        (["--key_evaluator=nowhere"], "no run nowhere"),
        ([f"--key_evaluator={trained}", "--frequencies", "--out_dir=x"], "leave out --key_evaluator"),
    ):
        done = call_script("evaluate.py", trained, "--targets=2", *more)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert said in done.stderr
    with pytest.raises(UserError, match="another tokenizer"):
        gain.Evaluator(trained, CPU).marks(dataset([900], np.arange(900) % 50), 8, 2)

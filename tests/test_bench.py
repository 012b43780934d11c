"""The benchmark runs, measures what it says, and leaves the cache as it was between rounds."""

import dataclasses
import re

import pytest
import torch
from tiny import ROOT

from core import runs
from core.place import Place
from lab.bench import timing as bench

TINY = bench.Bench(vocab_size=20, n_layer=1, n_embd=16, n_head=2, train_length=4, batch_size=32)


def test_every_variant_sees_the_same_number_of_tokens():
    long = bench.variant(TINY, "alibi", 64)
    assert (long.posenc, long.train_length, long.batch_size) == ("alibi", 64, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("posenc", ["none", "rope", "t5", "randomized"])
def test_a_training_step_never_waits_for_the_gpu(posenc, monkeypatch):
    monkeypatch.setattr(Place, "synchronize", lambda self: None)
    device = Place(torch.device("cuda"), torch.bfloat16)
    model = runs.build(dataclasses.replace(TINY, posenc=posenc), device.device)
    monkeypatch.setattr(bench.runs, "build", lambda *_: model)
    step, _ = bench.training_step(dataclasses.replace(TINY, compile=False), device)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(3):
            model.redraw(TINY.train_length, seed)
            device.send(torch.ones(4, 5)[:, :-1])
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_round_decodes_at_the_same_context(monkeypatch):
    lengths = []
    append = bench.Cache.append
    monkeypatch.setattr(
        bench.Cache, "append", lambda self, *a, **k: (lengths.append(self.length), append(self, *a, **k))[1]
    )
    decode = bench.decoder(bench.variant(TINY, "rope", 4), Place(torch.device("cpu"), torch.float32), 10, 3)
    decode()
    decode()
    assert lengths == [10, 11, 12, 13, 11, 12, 13]


def test_decoding_stays_within_the_positions_that_there_are():
    device = Place(torch.device("cpu"), torch.float32)
    for spec in ("randomized(inner=learned)", "learned"):
        bench.decoder(bench.variant(TINY, spec, 4), device, 16 * 4, 3)()


def test_the_command_prints_and_writes_one_row_for_each_encoding(run_script, tmp_path):
    settings = {key: getattr(TINY, key) for key in ("vocab_size", "n_layer", "n_embd", "n_head", "train_length")}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = run_script(
        "lab/bench/timing.py", *flags, "--only=alibi", "--rounds=1", "--decode_tokens=2", f"--table={tmp_path}/t.md"
    )
    assert done.returncode == 0, done.stderr
    rows = [re.findall(r"[^|]+", line) for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["encoding", "none", "alibi"]
    assert all(float(cell.replace(",", "")) > 0 for row in rows[1:] for cell in row[1:])
    assert re.search(r"context of 1024: [\d.]+ ms/token from the cache", done.stdout)
    assert (tmp_path / "t.md").read_text().startswith(done.stdout.split("\n\n")[0])


def test_steps_of_another_checkout_take_turns_with_ours():
    lines = bench.before_and_after(
        dataclasses.replace(TINY, before=str(ROOT), only="alibi", rounds=2, length_schedule={0.0: 2, 0.5: 4})
    )
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["none", "alibi"]
    assert all(0.02 < float(line.split("|")[cell]) < 50 for line in lines[2:] for cell in (4, 7))


def test_growth_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "GROWTH", {"n_layer": ((1, 2), 1, 1)})
    monkeypatch.setattr(bench, "in_own_process", lambda function, *arguments: function(*arguments))
    lines = bench.growth(dataclasses.replace(TINY, growth=str(tmp_path / "g"), rounds=1, decode_tokens=2))
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["n_layer", "context", "context, with a window"]
    for name in ("time", "memory"):
        assert (tmp_path / f"g-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_two_measurements_at_once_are_one_line(call_script):
    done = call_script("lab/bench/timing.py", "--growth=g", "--before=x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    for flags in (
        ["--growth=nowhere/g"],
        ["--rounds=0"],
        ["--decode=x", "--decode_tokens=3"],
        ["--race=."],
        ["--decode=."],
    ):
        done = call_script("lab/bench/timing.py", *flags)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = call_script("lab/bench/timing.py", "--before=nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "git worktree add" in done.stderr


def test_an_unknown_encoding_is_one_line(call_script):
    done = call_script("lab/bench/timing.py", "--only=rop")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "did you mean 'rope'" in done.stderr


def test_bench_takes_all_settings_of_a_run():
    assert {field.name for field in dataclasses.fields(bench.Config)} < {
        field.name for field in dataclasses.fields(bench.Bench)
    }

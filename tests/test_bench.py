"""The benchmarks run, measure what they say, and leave the cache as it was between rounds."""

import dataclasses
import io
import os
import re
import subprocess
import sys

import pytest
import torch
from tiny import ENV, ROOT

from core import runs
from core.place import Place
from core.settings import Config
from lab.bench import __main__ as bench
from lab.bench import before, generation, growth, timing
from posenc import ENCODINGS

CPU = Place(torch.device("cpu"), torch.float32)
SIZES = dict(vocab_size=20, n_layer=1, n_embd=16, n_head=2, train_length=4)
TINY = timing.Bench(**SIZES, batch_size=32, dtype="float32", decode_tokens=2, rounds=1)
FLAGS = [f"--{key}={value}" for key, value in SIZES.items()]
COMMANDS = "__main__", "before", "growth", "generation", "race", "decode", "published", "gpu"


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(timing, "in_own_process", lambda function, *arguments: function(*arguments))


def cells(lines):
    """Lines of Markdown -> rows of cells, without the rules below the heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if not row[0].startswith("---")]


def test_every_variant_sees_the_same_number_of_tokens():
    long = timing.variant(TINY, "alibi", 64)
    assert (long.posenc, long.train_length, long.batch_size) == ("alibi", 64, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("posenc", ["none", "rope", "t5", "randomized", "rope(window=70)", ["t5(chunk=99)", "none"]])
def test_a_training_step_never_waits_for_the_gpu(posenc, monkeypatch):
    monkeypatch.setattr(Place, "synchronize", lambda self: None)
    place = Place(torch.device("cuda"), torch.bfloat16)
    # Whole blocks and heads of 16, as flex_attention takes them, where layers see less than all.
    long = {} if str(posenc) in ENCODINGS else {"train_length": 256, "n_embd": 32, "n_layer": 2}
    config = dataclasses.replace(TINY, posenc=posenc, compile=False, **long)
    model = runs.build(config, place.device)
    monkeypatch.setattr(timing.runs, "build", lambda *_: model)
    step, _ = timing.training_step(config, place)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(3):
            model.redraw(config.train_length, seed)
            place.send(torch.ones(4, 5)[:, :-1])
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_round_decodes_at_the_same_context(monkeypatch):
    lengths = []
    append = timing.Cache.append
    monkeypatch.setattr(
        timing.Cache, "append", lambda self, *a, **k: (lengths.append(self.length), append(self, *a, **k))[1]
    )
    decode = timing.decoder(timing.variant(TINY, "rope", 4), CPU, 10, 3)
    decode()
    decode()
    assert lengths == [10, 11, 12, 13, 11, 12, 13]


def test_decoding_stays_within_the_positions_that_there_are():
    for spec in ("randomized(inner=learned)", "learned"):
        timing.decoder(timing.variant(TINY, spec, 4), CPU, 16 * 4, 3)()


def test_a_product_is_repeated_and_counted():
    multiply, flops = timing.product(CPU, torch.float32, 8, times=3)
    multiply()
    assert flops == 3 * 2 * 8**3


def test_the_command_prints_and_writes_one_row_for_each_encoding(in_this_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "PRODUCT", 64)
    bench.main([*FLAGS, "--only=alibi", "--rounds=1", "--decode_tokens=2", f"--table={tmp_path}/t.md"])
    check_table(capsys.readouterr().out, tmp_path / "t.md")


@pytest.mark.slow
def test_the_command_itself_prints_and_writes_one_row_for_each_encoding(tmp_path):
    words = [*FLAGS, "--only=alibi", "--rounds=1", "--decode_tokens=2", f"--table={tmp_path}/t.md"]
    done = subprocess.run(
        [sys.executable, "-m", "lab.bench", *words],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_table(done.stdout, tmp_path / "t.md")


def check_table(output, table):
    rows = cells(output.splitlines())
    assert [row[0] for row in rows] == ["encoding", "none", "alibi"]
    assert all(float(cell.replace(",", "")) > 0 for row in rows[1:] for cell in row[1:])
    assert re.search(r"context of 1024: [\d.]+ ms/token from the cache", output)
    assert re.search(r"none trains at [\d,]+ GFLOP/s: [\d.]+% of the [\d,]+ that products of", output)
    text = table.read_text(encoding="utf-8")
    assert text.startswith(output.split("\n\n")[0])
    assert "Made by `python -m lab.bench --vocab_size=20 " in text and "dtype " in text


# Stand-ins for the commits that the command compares: what a step and a token take there, by a clock of their own.
STAND_IN = """
import time
from types import SimpleNamespace
clock = [0.0]
time.perf_counter = lambda: clock[0]
def wait(seconds):
    clock[0] += seconds
def variant(config, name, length):
    return SimpleNamespace(name=name, length=length)
def training_step(config, place):
    assert place == "training"
    return (lambda: wait({step} * config.length)), 1
def decoder(config, place, context, count):
    assert place == "decoding" and config.length == 4
    return lambda: wait({token} * count)
"""
MAKE = """
class Config:
    __dataclass_fields__ = "train_length", "device", "dtype"
def make(cls, settings):
    assert settings.keys() == set(cls.__dataclass_fields__)
    cls.train_length, cls.device, cls.dtype = settings["train_length"], "cpu", "float32"
    return cls
"""
CHOOSE = """
def choose(device, dtype, inference=False):
    return "decoding" if inference else "training"
"""


@pytest.fixture
def commits(tmp_path):
    """(a checkout from before the modules had folders, one from after it that takes half the time)."""
    files = {
        "old": {
            "before_torch.py": "", "bench.py": STAND_IN.format(step=1e-3, token=1e-2), "configs/__init__.py": MAKE,
            "device.py": CHOOSE,
        },
        "new": {
            "core/start.py": "", "lab/bench/timing.py": STAND_IN.format(step=5e-4, token=5e-3), "core/flags.py": MAKE,
            "core/settings.py": "from core.flags import Config", "core/place.py": CHOOSE,
        },
    }  # fmt: skip
    for folder, texts in files.items():
        for name, text in texts.items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(text, encoding="utf-8")
    return tmp_path / "old", tmp_path / "new"


def test_both_layouts_of_commits_answer_by_turns(commits, monkeypatch):
    old, new = commits
    monkeypatch.setattr(before, "ROOT", new)
    options = dataclasses.replace(TINY, only="alibi", rounds=3, decode_tokens=2, length_schedule={0.0: 2, 0.5: 4})
    rows = cells(before.measure(options, old))
    assert [row[0] for row in rows] == ["training", "none", "alibi", "decoding", "none", "alibi"]
    assert all(row[1:] == ["4", "2", "2.00 (2.00 - 2.00)", "64", "32", "2.00 (2.00 - 2.00)"] for row in rows[1:3])
    assert all(row[1:] == ["10.00", "5.00", "2.00 (2.00 - 2.00)"] * 2 for row in rows[4:])


def test_a_pair_of_seconds_is_taken_in_every_round_and_the_first_to_answer_changes():
    class Worker:
        def __init__(self, name, answer):
            self.name, self.answer = name, answer

        def seconds(self, *question):
            asked.append(self.name)
            return self.answer

    asked = []
    assert before.paired(Worker("old", 2.0), Worker("new", 1.0), ("training", "rope", 4), 3) == [(2.0, 1.0)] * 3
    assert asked == ["old", "new", "new", "old", "old", "new"]


def test_the_worker_drives_this_commit(monkeypatch, capsys):
    settings = dataclasses.asdict(Config(**SIZES, dtype="float32")) | {"unknown_to_this_commit": 1}
    monkeypatch.setattr(sys, "argv", ["-c", before.json.dumps(settings), "2"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("training rope 4\ntraining rope 4\ndecoding learned 64\n"))
    exec(before.WORKER, {})
    seconds = capsys.readouterr().out.split()
    assert len(seconds) == 3 and all(0 < float(each) < 60 for each in seconds)


def test_a_commit_that_fails_is_named(commits, monkeypatch):
    old, new = commits
    monkeypatch.setattr(before, "ROOT", new)
    (old / "bench.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.raises(before.UserError, match=f"training none 4 failed in {old}"):
        before.measure(TINY, old)


@pytest.mark.slow
def test_steps_of_another_checkout_take_turns_with_ours():
    options = dataclasses.replace(TINY, only="alibi", rounds=2, length_schedule={0.0: 2, 0.5: 4})
    rows = cells(before.measure(options, ROOT))
    assert [row[0] for row in rows] == ["training", "none", "alibi", "decoding", "none", "alibi"]
    ratios = [row[index].split()[0] for row in rows if row[0] in ("none", "alibi") for index in (3, 6)]
    assert all(0.02 < float(ratio) < 50 for ratio in ratios)


def test_growth_is_measured_and_drawn(tmp_path, monkeypatch, in_this_process):
    few = {"n_layer": ((1, 2), 1, 1), growth.CONTEXT: ((1, 4), 1, 1), growth.WINDOWED: ((1, 4), 0, 0)}
    monkeypatch.setattr(growth, "GROWTH", few)
    rows = cells(growth.measure(TINY, str(tmp_path / "g")))
    assert [row[:3] for row in rows[1:]] == [
        ["training", "n_layer", "x 1 to x 2"],
        ["decoding", "context", "x 1 to x 4"],
        ["decoding", "context, with a window", "x 1 to x 4"],
    ]
    for name in ("time", "memory"):
        assert (tmp_path / f"g-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_exponent_is_that_of_the_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "GROWTH", {"n_layer": ((1, 2, 4), 2, 1)})
    monkeypatch.setattr(growth, "seconds", lambda *_: [1.0, 2.0, 8.0])
    monkeypatch.setattr(growth, "memory", lambda *_: [5.0, 6.0, 6.0])
    rows = cells(growth.measure(TINY, str(tmp_path / "g")))
    assert rows[1] == ["training", "n_layer", "x 2 to x 4", "2.00 (at most 2)", "0.00 (at most 1)"]


def test_what_is_generated_is_timed_and_its_cache_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "LENGTHS", (1, 8))
    rows = cells(generation.measure(dataclasses.replace(TINY, n_layer=4, train_length=16), str(tmp_path / "g")))
    assert [row[0] for row in rows[1:]] == ["16", "128"]
    assert rows[0][1:4] == ["ms: rope", "ms: rope(window=4)", "ms: rnope_swa"]
    assert all(float(cell) > 0 for row in rows[1:] for cell in row[1:4])
    kib = {head.split(": ")[1]: [int(row[at]) for row in rows[1:]] for at, head in enumerate(rows[0]) if at > 3}
    assert list(kib) == [
        "rope, a layer that sees all", "rope(window=4), a layer that sees 4", "rnope_swa, a layer that sees all",
        "rnope_swa, a layer that sees 4"]  # fmt: skip
    for name, sizes in kib.items():  # keys and values, 16 wide in float32: 128 bytes a token, at least 64 of them
        assert sizes == ([8, 8] if name.endswith("4") else [8, 16]), name
    for name in ("time", "memory"):
        assert (tmp_path / f"g-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_of_its_own_is_another_and_memory_is_in_mib():
    assert timing.in_own_process(os.getpid) != os.getpid()
    assert 50 < timing.most_memory(CPU) < 50_000


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("__main__", ["--rounds=0"], "rounds must be in 1"),
        ("__main__", ["--table=nowhere/t.md"], "there is no folder nowhere"),
        ("__main__", ["--only=rop"], "did you mean 'rope'"),
        ("__main__", ["--decode_tokens=0"], "decode_tokens must be in 1"),
        ("before", [], "name a checkout of an earlier commit; usage: python -m lab.bench.before FOLDER"),
        ("before", ["nowhere"], "git worktree add"),
        ("growth", [], "usage: python -m lab.bench.growth PREFIX"),
        ("growth", ["nowhere/g"], "there is no folder nowhere"),
        ("generation", ["nowhere/g"], "there is no folder nowhere"),
        ("race", [], "name a checkout of nanoGPT; usage: python -m lab.bench.race NANOGPT"),
        ("decode", ["."], "has no model.py"),
        ("decode", ["x", "--decode_tokens=3"], "--decode_tokens must be at least 4"),
        ("published", [], "usage: python -m lab.bench.published FOLDER"),
        ("published", ["x", "--decode_tokens=2"], "--decode_tokens must be at least 3"),
        ("gpu", ["--nanogpt=nowhere"], "--nanogpt=nowhere: there is no model.py in it"),
    ],
)
def test_a_mistake_is_one_line(command, words, says, call_script):
    done = call_script(f"lab/bench/{command}.py", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert says in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_its_flags(command, call_script):
    done = call_script(f"lab/bench/{command}.py", "--help")
    program = "lab.bench" if command == "__main__" else f"lab.bench.{command}"
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m {program} ")
    assert "--rounds=7" in done.stdout and "--table=''" in done.stdout


def test_bench_takes_all_settings_of_a_run():
    assert {field.name for field in dataclasses.fields(Config)} < {
        field.name for field in dataclasses.fields(timing.Bench)
    }

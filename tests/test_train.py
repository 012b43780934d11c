"""Whole runs in processes of their own: exact resume after real kills, two real processes, real signals."""

import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import TINY, TORCHRUN, bound, command, finish, run, start, step_sums

import evaluate
import train
from core import optimizers, runs
from core import place as places
from core.errors import UserError
from core.place import Place
from core.settings import Config
from posenc import ENCODINGS


def state(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)


def metrics(out, key):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def lengths(out):
    return json.loads((out / "length.json").read_text(encoding="utf-8"))


def same(one, other):
    """Equal to the last bit, through dicts and lists of tensors and plain values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_run_leaves_what_other_programs_read(trained, corpus):
    out = trained
    names = {path.name for path in out.iterdir()}
    expected = {
        "config.json",
        "ckpt.pt",
        "ckpt_prev.pt",
        "best.pt",
        "metrics.jsonl",
        "length.json",
        "loss.png",
        "length.png",
        "train.lock",
    }
    assert names == expected
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["n_embd"] == 32
    final = state(out)
    assert final["step"] == 24
    assert not any("_orig_mod" in name or name.startswith("module.") for name in final["model"])
    assert state(out, "ckpt_prev.pt")["step"] == 20
    assert state(out, "best.pt")["step"] == min(metrics(out, "val_loss").items(), key=lambda item: item[1])[0]
    length = lengths(out)
    assert length["train_length"] == 16
    assert length["lengths"] == [8, 16, 18, 20, 24, 32, 64, 128]
    assert len(length["loss"]) == 8
    assert list(metrics(out, "loss")) == list(range(1, 25))
    assert metrics(out, "loss")[24] < metrics(out, "loss")[1] - 1
    bytes_per_token = 1.0  # the byte tokenizer; this text has no end inside the windows that are evaluated
    assert metrics(out, "val_bpb")[24] == pytest.approx(
        metrics(out, "val_loss")[24] / math.log(2) / bytes_per_token, rel=0.01
    )


def test_a_finished_run_says_so_and_changes_nothing(trained, corpus):
    out = trained
    before = (out / "ckpt.pt").read_bytes(), (out / "metrics.jsonl").read_text(encoding="utf-8")
    again = run(corpus, out)
    assert "finished" in again.stdout
    assert ", float32\n" in again.stdout
    assert f"/sample.py {out} --tokens=128\n" in again.stdout  # a prompt of Python is for Python alone
    assert "%" not in again.stderr  # no progress where there is none to make
    assert before == ((out / "ckpt.pt").read_bytes(), (out / "metrics.jsonl").read_text(encoding="utf-8"))


def test_sigkill_at_any_moment_loses_nothing(trained, corpus, tmp_path):
    """Kill the same run again and again, at moments that have nothing to do with its steps, until it is through."""
    out, kills = tmp_path / "run", 0
    for delay in (0.0, 0.01, 0.0, 0.03, 0.06):
        process = start(command(corpus, out))
        before = len(metrics(out, "loss")) if (out / "metrics.jsonl").exists() else 0
        while process.poll() is None:  # let it get at least one step further
            time.sleep(0.005)
            try:
                if len(metrics(out, "loss")) > before:
                    break
            except (OSError, ValueError):
                continue
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    run(corpus, out)
    assert same(state(out), state(trained) | {"config": state(out)["config"]})
    assert metrics(out, "loss") == metrics(trained, "loss")
    assert metrics(out, "val_loss") == metrics(trained, "val_loss")


def wait_for_a_step(process, out):
    while process.poll() is None and not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text(encoding="utf-8")
    ):
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(trained, corpus, tmp_path, number):
    out = tmp_path / "run"
    settings = {"checkpoint_interval": 1000}
    process = start(command(corpus, out, **settings))
    wait_for_a_step(process, out)
    process.send_signal(number)
    assert process.wait() == 128 + number
    stopped = state(out)["step"]
    assert f"stopped after step {stopped}" in process.stdout
    assert stopped == max(metrics(out, "loss"))  # nothing but the step in flight came after the signal
    assert stopped < 24
    run(corpus, out, **settings)
    assert same(state(out)["model"], state(trained)["model"])


def test_a_kill_between_the_two_renames_leaves_the_previous_checkpoint_in_use(trained, corpus, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "ckpt.pt").unlink()
    (out / "length.json").unlink()
    run(corpus, out)
    assert same(state(out)["model"], state(trained)["model"])


def nearly(one, other, begin=0):
    """Whether {step: number} of two runs of the tiny size differ by rounding alone, where they were equal at `begin`.

    Every step carries on the differences in the weights and adds its own, since the optimisers give an update the size
    of the learning rate, whatever the gradient's."""
    config = Config(**TINY | {"dataset": "python", "vocab_size": 257})
    terms = step_sums(config, tokens=config.batch_size * config.train_length)
    return one.keys() == other.keys() and all(
        other[step] == pytest.approx(one[step], rel=bound(torch.float32, (step - begin) * terms)) for step in one
    )


def test_two_processes_compute_what_one_does(corpus, tmp_path):
    """Each its own half of the same batch: the losses agree to rounding."""
    settings = {"max_steps": 12, "dropout": 0.0}
    run(corpus, tmp_path / "one", **settings)
    for name, more in (("two", {}), ("accumulated", {"micro_batch_size": 2})):
        done = run(corpus, tmp_path / name, processes=2, **settings, **more)
        assert done.stdout.count("M parameters") == 1  # only one process speaks
        for key in ("loss", "val_loss", "grad_norm"):
            assert nearly(metrics(tmp_path / "one", key), metrics(tmp_path / name, key))
        for one, other in zip(*(lengths(tmp_path / out)["loss"] for out in ("one", name)), strict=True):
            assert nearly({12: one}, {12: other})


@pytest.mark.parametrize("launcher", [(), pytest.param(TORCHRUN, marks=pytest.mark.slow)])
def test_two_processes_stop_after_the_same_step_and_go_on_as_one(corpus, tmp_path, launcher):
    out, settings = tmp_path / "run", {"max_steps": 2000, "dropout": 0.0, "checkpoint_interval": 100000}
    process = start(command(corpus, out, launcher, **settings), processes=1 if launcher else 2)
    wait_for_a_step(process, out)
    # torchrun hands a signal on to all its processes; here one of them alone gets it.
    (process if launcher else process.commands[1]).send_signal(signal.SIGTERM)
    process.wait()
    assert "saved in" in process.stdout
    stopped = state(out)["step"]
    run(corpus, out, **settings | {"max_steps": stopped + 1})
    assert state(out)["step"] == stopped + 1


def test_accumulation_changes_nothing_but_rounding(corpus, tmp_path):
    settings = {"max_steps": 6, "dropout": 0.0}
    run(corpus, tmp_path / "one", **settings)
    run(corpus, tmp_path / "four", micro_batch_size=2, **settings)
    assert nearly(metrics(tmp_path / "one", "loss"), metrics(tmp_path / "four", "loss"))


def run_and_kill_and_run(corpus, out, **settings):
    """A run that is killed as soon as it has a checkpoint, and started again."""
    process = start(command(corpus, out, **settings))
    while not (out / "ckpt.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    run(corpus, out, **settings)


def test_t5_resumes_exactly_on_two_threads(corpus, tmp_path):
    """Its table's gradient is a sum of many terms for one bucket, whose order threads could change."""
    settings = {"posenc": "t5", "train_length": 128, "batch_size": 2, "n_embd": 64, "max_steps": 4, "length_targets": 0}
    for name in ("one", "two"):
        run(corpus, tmp_path / name, env={"OMP_NUM_THREADS": "2"}, **settings)
    assert same(state(tmp_path / "one")["model"], state(tmp_path / "two")["model"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_and_resumes_exactly(corpus, tmp_path, dtype):
    settings = {"dtype": dtype, "max_steps": 16}
    run(corpus, tmp_path / "whole", **settings)
    run_and_kill_and_run(corpus, tmp_path / "parts", **settings)
    one, other = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert same(one["model"], other["model"])
    assert same(one["scaler"], other["scaler"])
    assert bool(one["scaler"]) == (dtype == "float16")
    assert all(weight.dtype == torch.float32 for weight in one["model"].values())
    loss = metrics(tmp_path / "whole", "loss")
    assert loss[16] < loss[1] - 0.5


def test_length_schedule_keeps_tokens_per_step(corpus, tmp_path, monkeypatch):
    """Short windows first, as many more of them: batches of 32 x 4, then of 8 x 16."""
    seen, draw = [], train.data.batch
    monkeypatch.setattr(train.data, "batch", lambda *a: (seen.append((a[3], a[4], x := draw(*a))), x)[1])
    settings = TINY | {"length_schedule": {0.0: 4, 0.5: 16}, "max_steps": 4, "length_targets": 0}
    settings |= {"text": str(corpus), "data_dir": str(corpus.parent / "data"), "out_dir": str(tmp_path / "run")}
    assert train.train(Config(**settings), Place(torch.device("cpu"), torch.float32)) == 0
    assert [x.shape for _, _, (x, _) in seen] == [(32, 4)] * 2 + [(8, 16)] * 2
    assert [(key[1], step) for key, step, _ in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]  # each phase its own order


def start_from(base, corpus, out, **settings):
    """A run that inherits its model, and with a learning rate of 0 keeps it."""
    line = command(corpus, out, init_from=base, learning_rate=0.0, max_steps=1, **settings)
    line = [word for word in line if not word.startswith(("--n_layer", "--n_embd"))]
    done = finish(line)
    assert done.returncode == 0, done.stderr
    return state(out)


def test_init_from_takes_weights_and_model_settings(trained, corpus, tmp_path):
    new = start_from(trained, corpus, tmp_path / "new", posenc="alibi", train_length=32)
    config = new["config"]
    assert (config["n_embd"], config["posenc"], config["train_length"], config["original_length"]) == (
        32,
        "alibi",
        32,
        0,
    )
    assert same(new["model"], state(trained)["model"])


def test_init_from_keeps_the_encodings_weights_where_it_is_the_same_alone(learned, corpus, tmp_path, refuse):
    old = state(learned)["model"]
    stretched = 'learned(overflow="interpolate", factor=2)'
    new = start_from(learned, corpus, tmp_path / "stretched", posenc=stretched, train_length=32)
    assert new["config"]["original_length"] == 16  # the table is read at half the pace
    assert same(new["model"], old)
    t5 = start_from(learned, corpus, tmp_path / "t5", posenc="t5")["model"]
    assert t5["posenc.0.weight"].shape == (32, 4)
    assert t5["posenc.0.weight"].count_nonzero() == 0
    refuse(tmp_path / "long", "learned has 16 positions, 32 are needed", init_from=learned, train_length=32)


@pytest.mark.slow
def test_compiled_runs_resume_exactly_and_save_plain_names(corpus, tmp_path):
    settings = {"compile": True, "max_steps": 8, "n_layer": 1}
    run(corpus, tmp_path / "whole", **settings)
    run_and_kill_and_run(corpus, tmp_path / "parts", **settings)
    assert same(state(tmp_path / "whole")["model"], state(tmp_path / "parts")["model"])
    assert not any("_orig_mod" in name for name in state(tmp_path / "whole")["model"])
    settings |= {"dropout": 0.0}  # which draws other masks when it is compiled
    for name, compiled in (("plain", False), ("compiled", True)):
        run(corpus, tmp_path / name, **settings | {"compile": compiled})
    assert nearly(*(metrics(tmp_path / name, "val_loss") for name in ("plain", "compiled")))


# ---- mistakes: one line, status 2, nothing overwritten


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.exists() else None


@pytest.fixture
def refuse(call_script, corpus):
    """refuse(out, said, **settings): the run ends with one line that matches `said`, status 2, and nothing changed."""

    def check(out, said, **settings):
        before = contents(out)
        done = call_script("train.py", *command(corpus, out, **settings)[2:])
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert re.search(said, done.stderr), done.stderr
        assert before == contents(out)

    return check


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_changed_config_names_the_keys(copy, refuse):
    refuse(copy, r"learning_rate was 0.006 and is now 0.1.*--out_dir", learning_rate=0.1)


def test_a_run_from_before_a_setting_existed_goes_on(copy, corpus, refuse):
    old = torch.load(copy / "ckpt.pt", weights_only=True)
    del old["config"]["shards"], old["config"]["momentum"]
    torch.save(old, copy / "ckpt.pt")
    refuse(copy, "momentum was 0.95 and is now 0.5", momentum=0.5)
    run(corpus, copy, max_steps=26)
    assert state(copy)["step"] == 26 and state(copy)["config"]["shards"] == 1


def test_fewer_steps_than_were_done_are_refused(copy, refuse):
    refuse(copy, r"is at step 24 already, past --max_steps=10; .*--out_dir", max_steps=10)


def test_more_steps_may_be_asked_for_and_the_jump_of_the_learning_rate_is_said(copy, corpus):
    done = run(corpus, copy, max_steps=26, checkpoint_interval=13)
    assert state(copy)["step"] == 26
    assert lengths(copy)["step"] == 26
    # Step 24 of 24 had 1 / 24 / 2 / .4 of the peak, step 25 of 26 has 3 / 26 / 2 / .4.
    said = "max_steps was 24 and is now 26: the learning rate goes back up from 0.000313 to 0.000865\n"
    assert done.stdout.count(said) == 1


def test_more_steps_under_a_length_schedule_are_refused_since_batches_would_come_twice(corpus, tmp_path, refuse):
    settings = {"length_schedule": "{0.0: 4, 0.5: 16}", "length_targets": 0, "eval_interval": 100}
    run(corpus, tmp_path / "run", max_steps=6, **settings)
    refuse(tmp_path / "run", r"move the phases .*--init_from=\S+/run and another --out_dir", max_steps=12, **settings)


# ---- side files


def test_a_damaged_metrics_file_is_set_aside_and_a_hole_is_said(copy, corpus):
    file = copy / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    odd = ["[]", '{"loss": 1}', '{"step": "x"}', '{"step": 3, "loss": [1]}', "\0\0", '{"step": 1e999', '{"step": 1.5}']
    file.write_text("\n".join(odd + lines) + "\n" + lines[-1][:20], encoding="utf-8")
    torn = file.read_text(encoding="utf-8")
    done = run(corpus, copy)
    assert f"{file} has 7 damaged lines; the others are kept: set aside as metrics.jsonl.damaged\n" in done.stderr
    assert (copy / "metrics.jsonl.damaged").read_text(encoding="utf-8") == torn
    assert file.read_text(encoding="utf-8").splitlines() == lines and "says nothing" not in done.stdout

    holes = [line for line in lines if json.loads(line)["step"] not in (*range(3, 9), 24)]
    file.write_text("\n".join(holes) + "\n", encoding="utf-8")
    said = run(corpus, copy).stdout
    for steps in ("2 and 9", "23 and 24"):
        assert said.count(f"{file} says nothing of the loss between steps {steps}\n") == 1
    assert said.count("says nothing") == 2
    file.unlink()
    assert f"{file} says nothing of the loss between steps 0 and 24\n" in run(corpus, copy).stdout


def test_odd_files_beside_the_checkpoint_never_stop_a_run(copy, corpus, capsys):
    """Whatever is in length.json and config.json."""
    for content in ("[]", '{"step": 24}', '{"step": 24, "lengths": 3, "train_length": 16}'):
        (copy / "length.json").write_text(content, encoding="utf-8")
        assert not evaluate.is_closed(copy, 24)
        assert "length.json is damaged: set aside as length.json.damaged" in capsys.readouterr().err
    (copy / "config.json").write_text(content, encoding="utf-8")
    run(corpus, copy)
    assert evaluate.is_closed(copy, 24) and json.loads((copy / "config.json").read_bytes())["n_layer"] == 2


def test_a_record_is_written_after_its_picture_and_made_again_without_it(copy, corpus, monkeypatch, call_script):
    """A kill between the two, of an older version in the other order, lost the picture for good."""
    (copy / "length.png").unlink()
    assert not evaluate.is_closed(copy, 24)
    (copy / "length.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "pictures", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call_script("train.py", *command(corpus, copy)[2:]).returncode == 130
    assert not (copy / "length.json").exists()


def test_the_best_checkpoint_alone_cannot_go_on(copy, refuse):
    (copy / "ckpt.pt").write_bytes((copy / "best.pt").read_bytes())
    refuse(copy, "no optimiser state")


def test_a_gradient_that_is_not_finite_never_reaches_the_checkpoint(corpus, tmp_path, monkeypatch):
    """The loss of that step is still finite: the weights after it are not."""
    settings = TINY | {"text": str(corpus), "data_dir": str(corpus.parent / "data"), "out_dir": str(tmp_path / "run")}
    steps = iter(range(100))

    def clip(parameters, limit):
        return torch.tensor(math.nan if next(steps) == 11 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(UserError, match="gradient norm nan at step 12; the last good checkpoint"):
        train.train(Config(**settings), Place(torch.device("cpu"), torch.float32))
    assert state(tmp_path / "run")["step"] == 8


def test_a_mistake_is_one_line_in_a_process_of_its_own(copy, corpus):
    done = finish(command(corpus, copy, n_layer=3), fresh=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: ")
    assert done.stderr.count("\n") == 1


def test_a_cut_checkpoint(copy, refuse):
    whole = (copy / "ckpt.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 100):
        (copy / "ckpt.pt").write_bytes(whole[:size])
        refuse(copy, r"ckpt.pt is damaged.* mv \S+/ckpt_prev.pt \S+/ckpt.pt$")
    (copy / "ckpt_prev.pt").unlink()
    refuse(copy, r"ckpt.pt is damaged.*--init_from=\S+/best.pt and another --out_dir$")
    (copy / "best.pt").unlink()
    refuse(copy, r"ckpt.pt is damaged.*anew, with another --out_dir$")


def test_a_checkpoint_cannot_run_code(copy, tmp_path, refuse):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Trap(), "step": 1, "config": {}}, copy / "ckpt.pt")
    refuse(copy, "more than tensors and plain values")
    (copy / "ckpt.pt").write_bytes(pickle.dumps(Trap()))
    refuse(copy, "no checkpoint of ours")
    assert not (tmp_path / "ran").exists()


def test_a_foreign_tokenizer(copy, refuse):
    saved = state(copy)
    torch.save(saved | {"tokenizer_fingerprint": "0" * 16}, copy / "ckpt.pt")
    refuse(copy, "tokenizer bytes is not the one")


def test_a_changed_corpus(copy, refuse):
    saved = state(copy)
    torch.save(saved | {"data_checksum": "0" * 64}, copy / "ckpt.pt")
    refuse(copy, "corpus of .* has changed")


def test_a_folder_of_other_files(tmp_path, refuse):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}", encoding="utf-8")
    refuse(tmp_path / "mine", "other files")


def test_a_batch_that_does_not_divide(tmp_path, refuse):
    refuse(tmp_path / "new", "does not divide", micro_batch_size=3)
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path):
    out = tmp_path / "run"
    settings = {"optimizer": "adamw", "grad_clip": 0.0, "norm": "layernorm", "embed_norm": False, "warmup": 0.0}
    done = run(corpus, out, check=False, learning_rate=1e29, **settings)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"(loss|norm) (nan|inf)\b.* at step \d+; .*--learning_rate", done.stderr)
    for file in out.glob("*.pt"):
        assert all(weight.isfinite().all() for weight in state(out, file.name)["model"].values())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_into_the_same_folder(corpus, tmp_path, processes):
    """It leaves, on all its processes, and the first goes on; what was killed holds nothing."""
    out, settings = tmp_path / "run", {"max_steps": 100000, "checkpoint_interval": 100000, "eval_interval": 100000}
    first = start(command(corpus, out, **settings))
    wait_for_a_step(first, out)
    second = run(corpus, out, check=False, processes=processes, **settings)
    assert first.poll() is None
    first.kill()
    first.wait()
    assert second.stderr.count("train.py: another process trains into") == 1
    assert processes > 1 or (second.returncode, second.stderr.count("\n"), second.stdout) == (2, 1, "")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    run(corpus, out, max_steps=1)
    assert state(out)["step"] == 1


def test_a_missing_init_from(tmp_path, refuse):
    refuse(tmp_path / "new", "no run .*nowhere", init_from="nowhere")


def test_weights_that_do_not_fit(learned, tmp_path, refuse):
    refuse(tmp_path / "new", "do not fit .*leave the model's size", init_from=learned, n_embd=64)
    old, new = (runs.build(Config(vocab_size=257, n_layer=1, posenc=spec)) for spec in ("t5", "t5(buckets=16)"))
    with pytest.raises(UserError, match=r"with t5, and t5\(buckets=16\) has weights of its own: leave out --init_from"):
        runs.load_weights(new, {"model": old.state_dict(), "config": {"posenc": "t5"}}, fresh=True)


# ---- pieces


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_learning_rate_rises_stays_and_falls(schedule):
    config = Config(schedule=schedule, max_steps=100, warmup=0.1, decay=0.3, final_lr=0.1)
    rates = [optimizers.learning_rate(config, step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] == pytest.approx(0.05)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.02)
    if schedule == "wsd":
        assert rates[10:70] == [1.0] * 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("posenc", ENCODINGS)
def test_training_on_a_gpu(corpus, tmp_path, dtype, posenc):
    run(corpus, tmp_path / "run", device="cuda", dtype=dtype, posenc=posenc, n_embd=64)
    loss = metrics(tmp_path / "run", "loss")
    assert loss[24] < loss[1] - 0.5


def test_one_process_is_its_own_sum():
    assert Place(torch.device("cpu"), torch.float32).sum(1.0, 2.0) == (1.0, 2.0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or not Path("/proc/self/schedstat").exists(), reason="Linux")
def test_a_neighbour_on_the_same_core_is_waited_for_and_said_once(monkeypatch):
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # It inherits the core.
    try:
        before, end = places.waited(), time.perf_counter() + 0.5
        while time.perf_counter() < end:
            sum(range(1000))
        assert places.waited() > before
    finally:
        neighbour.kill()
        os.sched_setaffinity(0, cores)
    clock, held_up, threads = [0.0], [0.0], torch.get_num_threads()
    monkeypatch.setattr(places.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(places, "waited", lambda: held_up[0])
    neighbours = places.Neighbours()
    said = []
    for clock[0], held_up[0] in ((5.0, 0.9 * threads), (10.0, 2.4 * threads), (15.0, 4.9 * threads)):
        said.append(neighbours.line())
    assert said == [None, "slow: other programs had this run's cores for 30% of the last 5 s", None]

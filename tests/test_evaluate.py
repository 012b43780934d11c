"""The command that measures finished runs."""

import dataclasses
import json

import torch
from small import HALF

import evaluate
from model import GPT, GPTConfig


def test_the_command_puts_runs_side_by_side(trained, learned, call_script, tmp_path):
    (tmp_path / "page.md").write_text("before\n<!-- evaluate -->\nstale\n<!-- /evaluate -->\nafter\n", encoding="utf-8")
    flags = [f"--table={tmp_path}/page.md", f"--picture={tmp_path}/curves.png", "--targets=4"]
    done = call_script("evaluate.py", trained, learned, *flags)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("before\n<!-- evaluate -->\n| nats per token, 4 windows | 0.5 T | 1 T | 1.12 T |")
    assert page.endswith(".\n<!-- /evaluate -->\nafter\n")
    assert "stale" not in page
    assert page.count("no position") == 7 + 5  # of nine lengths of context, and of eight distances
    assert "Made by `python evaluate.py" in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((learned / "length.json").read_text(encoding="utf-8"))["lengths"] == [8, 16]


def test_several_encodings_of_one_run_share_a_table(trained, call_script, tmp_path):
    ways = ["--posenc=rope", '--posenc=rope(scaling="linear", factor=2)', "--posenc=none"]
    done = call_script("evaluate.py", trained, *ways, "--lengths=[8, 16, 48]", "--targets=4", "--out_dir=reach")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "reach" / "results.json").read_text(encoding="utf-8"))["runs"]
    assert list(found) == ["rope", 'rope(scaling="linear", factor=2)', "none"]
    for way, result in found.items():
        alone = call_script("evaluate.py", trained, f"--posenc={way}", "--lengths=[8, 16, 48]", "--targets=4")
        assert alone.returncode == 0
        assert result["lengths"] == [8, 16, 48]
        assert all(f"{loss:.3f}" in alone.stdout for loss in result["loss"])
        assert "non_overlapping" not in result
    assert len({tuple(result["loss"]) for result in found.values()}) == 3
    assert (tmp_path / "reach" / "length.png").exists()


def test_figures_are_written_last_and_a_killed_call_goes_on(trained, call_script, tmp_path, monkeypatch):
    words = ["evaluate.py", trained, "--lengths=[8, 16]", "--targets=2", "--out_dir=reach"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "pictures", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call_script(*words).returncode == 130
    assert [path.name for path in (tmp_path / "reach").iterdir()] == ["results.md"]
    assert call_script(*words).returncode == 0
    assert (tmp_path / "reach" / "results.json").exists()


def test_a_row_names_the_scaling_that_stays_in_force(trained, tmp_path):
    """`rope` laid over a run that yarn stretches leaves yarn on."""
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    state["config"]["posenc"] = 'rope(scaling="yarn", factor=4)'
    (tmp_path / "yarn").mkdir()
    torch.save(state, tmp_path / "yarn" / "ckpt.pt")
    ways = ["", "rope", 'rope(scaling="none")', "none"]
    opened = evaluate.open_runs([str(tmp_path / "yarn")], evaluate.Options(posenc=ways))
    assert list(opened) == ['rope(scaling="yarn", factor=4)', "rope(scaling='yarn', factor=4)", *ways[2:]]
    assert [run.model.posenc[0].scaling for run in list(opened.values())[:3]] == ["yarn", "yarn", "none"]


def test_a_text_may_be_shorter_than_the_training_length_where_lengths_are(trained, call_script, tmp_path):
    (tmp_path / "short.txt").write_text(
        "line 7 says that 7 times 7 is 49.\n" * 4, encoding="utf-8"
    )  # 13 tokens held out, and T is 16
    flags = [f"--data={tmp_path}/short.txt", "--targets=1"]
    assert "too short" in call_script("evaluate.py", trained, *flags).stderr
    done = call_script("evaluate.py", trained, *flags, "--lengths=[4, 8]")
    assert done.returncode == 0, done.stderr


def test_a_prepared_model_computes_what_autocast_would():
    for posenc, tied in (("fire", False), ("rope", True), ("alibi", False)):
        model = GPT(GPTConfig(posenc=posenc, vocab_size=30, tie_embeddings=tied, zero_init=False), seed=1).eval()
        tokens = torch.arange(40)[None] % 30
        with torch.no_grad(), HALF.autocast():
            before = model(tokens)
            HALF.prepare(model)
            assert torch.equal(model(tokens), before)
        assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert model.token.weight.dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in model.posenc.parameters())


def test_the_command_refuses_in_one_line(trained, learned, call_script, tmp_path):
    for argv, said in (
        ([], "which runs"),
        (["nowhere"], "no run nowhere"),
        ([trained, "--target=3"], "'targets'"),
        ([trained, "--targets=0"], "targets must be in 1"),
        ([trained, "--picture=nowhere/a.png"], "no folder nowhere"),
        ([trained, "--table=nowhere/a.md"], "no folder nowhere"),
        ([trained, f"--table={trained}"], "is a folder"),
        ([trained, f"--table={trained}/config.json"], "would replace all of it"),
        ([trained, "--picture=a.pdf"], "must end in .png"),
        ([trained, "--train_length=1000000"], "exceed the text"),
        ([learned, "--train_length=64"], "or the positions (16)"),
        ([trained, "--frequencies", "--window=8", f"--out_dir={tmp_path}"], "leave out --window"),
        ([trained, "--lengths=[16, 8]"], "that rise"),
        ([trained, "--lengths=far"], "expected int or list"),
        ([trained, "--lengths=[16, 1000000]", "--targets=2"], "exceed the text"),
        ([trained, "--posenc=rope", "--posenc=learned"], "has weights of its own"),
    ):
        done = call_script("evaluate.py", *argv)
        assert done.stdout == ""
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr


def test_help_has_a_line_for_every_option(call_script):
    done = call_script("evaluate.py", "--help")
    assert done.returncode == 0, done.stderr
    flags = [line.split("=")[0].strip() for line in done.stdout.splitlines() if line.startswith("  --")]
    assert {f"--{field.name}" for field in dataclasses.fields(evaluate.Options)} == set(flags)

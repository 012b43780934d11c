"""Text past the training length: what is printed, what is refused, and the scores under it."""

import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from small import CPU, Copier, dataset

import sample
from core import runs
from data import vocabulary
from model import draw
from train import next_command

T = 16  # of the run that `trained` makes


def test_streams_past_the_training_length_marks_it_and_scores_blocks(trained, call_script):
    done = call_script("sample.py", trained, "--prompt=line 7 says ", "--tokens=128")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("line 7 says ")
    assert done.stdout.count(f"[--- {T} tokens: the training length ends here ---]") == 1
    assert "\x1b" not in done.stdout  # no terminal, no escape codes
    assert re.search(r"128 tokens in [\d.]+ s, \d+ tokens/s", done.stdout)
    rows = re.findall(r"^ +(\d+) - (\d+) +([\d.]+) +([\d.]+)% +([+-][\d.]+)$", done.stdout, re.MULTILINE)
    assert [(int(a), int(b)) for a, b, *_ in rows][:3] == [(12, 15), (16, 31), (32, 47)]
    assert int(rows[-1][1]) == 12 + 128 - 1
    assert all(0 < float(loss) < 10 and 0 <= float(share) <= 100 for _, _, loss, share, _ in rows)
    assert float(rows[0][-1]) == 0 != float(rows[-1][-1])  # within T there is no far context
    done = call_script("sample.py", trained, "--tokens=20", f"--crop={T}")
    assert "repeated 4-grams\n" in done.stdout  # it has read no more than T tokens


def test_far_context_is_what_the_loss_changes_by_without_it():
    """Tokens after the tenth stood ten tokens before. Windows of 8 hide that, and the first of 16 shows six of them."""
    ids, options = torch.arange(10).repeat(3)[None], sample.Options()
    far = sample.far_context(Copier(10, 10, 8), ids, 8, options, CPU)
    gained = -math.log(0.75) - math.log(10)
    assert far == pytest.approx([0] * 9 + [gained] * 20, rel=1e-6)
    far = sample.far_context(Copier(10, 10, 16), ids, 16, options, CPU)
    # From token 17 on, windows of 16 move by 8: of each 8 tokens the first has 9 before it, and the others enough.
    assert far == pytest.approx([gained if token in (17, 25) else 0 for token in range(1, 30)], rel=1e-6)
    table = sample.block_table([list(range(30))], [[1.0] * 29], [[0.0] * 15 + [0.5] * 14], 1, 16)
    assert table[0].endswith("  far context")
    assert [line.split()[-1] for line in table[1:]] == ["+0.000", "+0.500"]


def test_the_same_seed_gives_the_same_text_and_samples_differ(trained, call_script):
    lines = ["sample.py", trained, "--prompt=line ", "--tokens=40", "--samples=2", "--top_k=20", "--top_p=0.95"]
    texts = [call_script(*lines, f"--seed={seed}").stdout.partition(" tokens in ")[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    first, second = texts[0].split("[--- sample 2 ---]")
    assert first.startswith("[--- sample 1 ---]\nline ")
    assert re.sub(r"\n?\[.*?\]\n", "", first).strip() != second.strip()


def test_the_mark_stands_inside_a_longer_prompt(trained, call_script):
    done = call_script("sample.py", trained, "--prompt=line 7 says that it is long", "--tokens=1")
    assert done.stdout.startswith(f"line 7 says that\n[--- {T} tokens: the training length ends here ---]\n it is long")


@pytest.mark.parametrize("prompt", ["", "naïve 日本語 👩‍👩‍👧", "tab\tnew\nline", os.fsdecode(b"\xff not UTF-8")])
def test_any_prompt_works(trained, call_script, prompt):
    done = call_script("sample.py", trained, f"--prompt={prompt}", "--tokens=5")
    assert done.returncode == 0, done.stderr
    assert "5 tokens in" in done.stdout


def test_never_prints_half_a_character(capsys):
    tokenizer, text = vocabulary.load("bytes"), "é日本👩‍👧!"
    stream, seen = sample.Stream(tokenizer), ""
    for token in tokenizer.encode_ordinary(text):
        stream.write([token])
        seen += capsys.readouterr().out
        assert text.startswith(seen)
    assert seen == text
    stream.write([0xE6], final=True)  # a character that was never finished
    assert capsys.readouterr().out == "\ufffd"


def test_window_posenc_and_crop_reach_the_model(trained, call_script):
    text = lambda done: done.stdout.partition(" tokens in ")[0]  # noqa: E731
    plain = text(call_script("sample.py", trained, "--tokens=60"))
    for flags in (["--window=4", "--sinks=1"], ["--posenc=rope(base=3)"], ["--posenc=sinusoidal"], ["--crop=5"]):
        done = call_script("sample.py", trained, "--tokens=60", *flags)
        assert done.returncode == 0, done.stderr
        assert text(done) != plain


@pytest.mark.slow
def test_compiled_text_is_the_same_text(trained, call_script):
    plain, compiled = (call_script("sample.py", trained, "--tokens=40", *flags) for flags in ([], ["--compile"]))
    assert compiled.returncode == 0, compiled.stderr
    assert "going on without" not in compiled.stderr
    assert compiled.stdout.partition(" tokens in ")[0] == plain.stdout.partition(" tokens in ")[0]


def test_a_learned_encoding_past_its_table_names_the_choices(learned, call_script):
    done = call_script("sample.py", learned, "--prompt=line ", "--tokens=40")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in ("crop", "clamp", "interpolate", "16 positions"))
    for flag in (f"--crop={T}", '--posenc=learned(overflow="clamp")', '--posenc=learned(overflow="interpolate")'):
        done = call_script("sample.py", learned, "--prompt=line ", "--tokens=40", flag)
        assert done.returncode == 0, done.stderr
    assert call_script("sample.py", learned, "--prompt=line ", f"--tokens={T - 4}").returncode == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokns=3"], "did you mean 'tokens'"),
        (["--tokens=x"], "expected int"),
        (["--posenc=rope(bse=3)"], "did you mean 'base'"),
        (["--posenc=t5"], "trained with rope, and t5 has weights of its own: .*--init_from"),
        (["--crop=99"], "--crop=16"),
        (["--crop=4", "--window=4"], "exclude"),
        (["--sinks=4"], "needs a --window"),
        (["--compile", "--window=4"], "leave out --window"),
        (["--top_p=0"], "top_p"),
        ([f"--seed={2**64}"], r"seed must be in -2\^63"),
        ([f"--seed={-(2**63) - 1}"], r"seed must be in -2\^63"),
        (["--seed=1e29"], r"seed must be in -2\^63"),
        (["--samples=1e9"], "samples must be in 1"),
        (["--tokens=1e29"], "tokens must be in 0"),
        (["--window=1e29"], "window must be in 0"),
        (["--temperature=nan"], "temperature"),
        (["--device=tpu"], "choose from auto"),
        (["--device=cuda:128"], "choose from auto"),
        (["--device=cuda:256"], "choose from auto"),
    ],
)
def test_mistakes_are_one_line(trained, call_script, flags, said):
    done = call_script("sample.py", trained, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert re.search(said, done.stderr), done.stderr


def test_numbers_at_the_ends_of_their_ranges_work(trained, call_script):
    text = lambda *flags: call_script("sample.py", trained, "--tokens=8", *flags).stdout.partition(" tokens in ")[0]  # noqa: E731
    likeliest = text("--temperature=0")
    assert likeliest.endswith("\n\n8")
    for flag in ("--top_p=1e-300", "--top_p=5e-324", "--top_k=1", "--temperature=1e-300", "--temperature=-0.0"):
        assert text(flag) == likeliest, flag
    for flag in (f"--seed={2**64 - 1}", f"--seed={-(2**63)}", "--temperature=1e29", "--top_k=1e29", "--tokens=8"):
        assert text(flag).endswith("\n\n8"), flag


def test_the_likeliest_token_stays_whatever_top_p_is():
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf], [3.0, 3.0, -1.0, 0.0]])
    for top_p in (5e-324, 1e-300, 1e-46, 1e-8, 0.2):
        drawn = draw(logits, 1.0, 0, top_p, torch.Generator().manual_seed(0))
        assert drawn[0] == 1 and drawn[1] in (0, 1)


def test_a_run_that_is_not_finished_says_where_it_is(trained, call_script, tmp_path):
    for step, said in ((12, "run is at step 12 of 24\n"), (24, "")):
        (tmp_path / "run").mkdir(exist_ok=True)
        state = {key: value for key, value in runs.load(trained).items() if key != "optimizer"}
        torch.save(state | {"step": step}, tmp_path / "run" / "ckpt.pt")
        for script, *flags in (("sample.py", "--tokens=1"), ("evaluate.py", "--targets=1", "--lengths=8")):
            done = call_script(script, "run", *flags)
            assert (done.returncode, done.stderr) == (0, said)


# What is told can be typed.


@pytest.mark.parametrize("folder", ["two  spaces", "it's", "$HOME", "--tokens=3", "é日", "a\nb"])
def test_the_command_that_a_run_ends_with_can_be_pasted(trained, call_script, tmp_path, folder):
    shutil.copytree(trained, tmp_path / folder)
    opened = runs.open_run(trained)
    opened.config.out_dir, opened.config.dataset = folder, "python"
    python, script, *words = shlex.split(next_command(opened.config, opened.model, dataset([9])))
    assert (python, script) == ("python", "sample.py") and words[1:] == ["--prompt=def ", "--tokens=128"]
    done = call_script(script, *words[:2], "--tokens=1")
    assert done.returncode == 0 and done.stdout.startswith("def "), done.stderr


@pytest.mark.parametrize("folder", ["two  spaces", "it's", "$HOME", "-x"])
def test_the_way_out_of_a_damaged_checkpoint_can_be_pasted(trained, call_script, tmp_path, folder):
    shutil.copytree(trained, tmp_path / folder)
    checkpoint, previous = tmp_path / folder / "ckpt.pt", tmp_path / folder / "ckpt_prev.pt"
    checkpoint.write_bytes(b"")
    told = call_script("sample.py", f"./{folder}", "--tokens=1").stderr
    subprocess.run(shlex.split(told.strip().partition("the one before: ")[2]), cwd=tmp_path, check=True)
    assert checkpoint.stat().st_size and not previous.exists()
    checkpoint.write_bytes(b"")
    told = call_script("sample.py", f"./{folder}", "--tokens=1").stderr
    assert Path(shlex.split(told.partition("best weights with ")[2])[0]) == Path(f"--init_from={folder}/best.pt")


def test_a_missing_run_names_the_nearest(trained, call_script):
    for argv in (["nowhere"], []):
        done = call_script("sample.py", *argv)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


def test_end_of_text_is_drawn_with_stop_alone(trained, call_script, tmp_path):
    """A head of zeros makes every token as likely as any other."""
    state = runs.load(trained)
    state["model"]["head.weight"].zero_()
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "ckpt.pt")
    words = ["sample.py", tmp_path / "run", "--samples=8", "--tokens=200", "--temperature=1"]
    assert "1600 tokens in" in call_script(*words).stdout
    stop = call_script(*words, "--stop")
    assert int(re.search(r"(\d+) tokens in", stop.stdout)[1]) < 1600


def test_repeated_counts_four_grams_that_stood_before():
    assert sample.repeated(list(range(50))) == 0
    assert sample.repeated([1, 2, 3, 4] * 5) == 1 - 4 / 17
    assert sample.repeated([1, 2]) == 0


def test_text_that_depends_on_how_much_was_asked_for_says_so(trained, call_script):
    for way, said in (("rope", 0), ('rope(scaling="dynamic", factor=1)', 1), ('rope(scaling="yarn")', 0)):
        done = call_script("sample.py", trained, "--tokens=2", f"--posenc={way}")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("another --tokens is another text") == said


def test_what_is_no_run_says_where_one_is(trained, call_script, tmp_path):
    (tmp_path / "mine.py").write_text("n_layer = 2", encoding="utf-8")
    shutil.copytree(trained, tmp_path / "runs" / "one")
    for word, said in (("mine.py", "is a config file; name the folder of its run, out/mine say"),
                       ("runs", "runs holds no checkpoint (ckpt.pt); name one of runs/one")):  # fmt: skip
        done = call_script("sample.py", word)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and said in done.stderr
    done = call_script("sample.py", trained, "--lr=x")
    assert done.stderr == "sample.py: --lr=x: unknown key 'lr'; --help lists all of them\n"

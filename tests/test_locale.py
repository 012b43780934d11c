"""Names, texts and tables pass through every command, whatever the locale and the file system call a character."""

import os
import shutil
import sys

import pytest
from tiny import ROOT, command, finish

from core import runs

NAME = os.fsdecode("naïve±$x_$".encode() + b"\xff")  # letters, a formula to matplotlib, and a byte that is no UTF-8


@pytest.fixture
def copy(trained, tmp_path):
    """A run in a folder of that name."""
    try:
        shutil.copytree(trained, tmp_path / NAME)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    return tmp_path / NAME


def test_the_name_of_a_folder_need_not_be_utf8(copy, tmp_path, call_script):
    (tmp_path / f"{NAME}.md").write_text("<!-- evaluate -->\n<!-- /evaluate -->\n", encoding="utf-8")
    for _ in range(2):  # The second reads what the first has written.
        done = call_script("evaluate.py", copy, "--lengths=[8, 16]", "--targets=1", f"--table={NAME}.md")
        assert (done.returncode, done.stderr) == (0, "") and "| naïve±$x_$\\udcff |" in done.stdout
        assert (tmp_path / f"{NAME}.md").read_bytes().count(os.fsencode(NAME)) == 3  # in the table and in the command
    words = "--lengths=[8, 16]", "--targets=1", f"--picture={NAME}.png", f"--out_dir=reach-{NAME}"
    assert call_script("evaluate.py", copy, *words).returncode == 0
    assert (tmp_path / f"{NAME}.png").exists() and (tmp_path / f"reach-{NAME}" / "length.png").exists()
    done = call_script("evaluate.py", copy, f"--data={NAME}.md")
    assert done.returncode == 2 and "naïve±$x_$\\udcff.md is not UTF-8 text" in done.stderr


@pytest.mark.slow
def test_every_command_works_under_a_locale_without_letters(copy, corpus, tmp_path):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    out = tmp_path / f"new-{NAME}"
    text = [f"--text={corpus}", f"--data_dir={corpus.parent}/data", "--device=cpu"]
    sizes = ["--max_steps=2", "--train_length=16", "--n_layer=1", "--n_embd=32", "--targets=2", "--eval_tokens=256"]
    for script, *words in (
        command(corpus, out, max_steps=2)[1:],
        ("sample.py", copy, f"--prompt={NAME}", "--tokens=40"),
        ("evaluate.py", copy, "--targets=2", f"--out_dir=reach-{NAME}"),
        ("compare.py", "rope", "none", "--seeds=2", "--dataset=text", *sizes, f"--out_dir=compare-{NAME}", *text),
        ("-m", "hub.export", copy, f"exported-{NAME}"),
    ):
        line = [sys.executable, *([script] if script == "-m" else [ROOT / script]), *words]
        done = finish(line, cwd=tmp_path, env=locale, fresh=True)
        assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert " ± ".encode() in (tmp_path / f"compare-{NAME}" / "results.md").read_bytes()
    assert runs.load(out)["step"] == 2

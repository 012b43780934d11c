"""A mistake is one line that names the command, under torchrun too, whoever makes it; and what is told can be typed."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from tiny import ROOT, TORCHRUN, finish

from core import errors

SCRIPT = f"""
import subprocess
import sys

sys.path.insert(0, {str(ROOT)!r})
from core import errors
from core import place as places

errors.PATIENCE = 2

def main(argv):
    place = places.choose("cpu")
    if str(place.rank) in argv:
        raise errors.UserError(f"rank {{place.rank}} is wrong")
    place.barrier()

errors.run(main)
"""


@pytest.mark.parametrize("launcher", [(), pytest.param(TORCHRUN, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ranks", "speaker"), [(["0", "1"], 0), (["0"], 0), (["1"], 1)])
def test_one_process_speaks_and_all_leave(tmp_path, ranks, speaker, launcher):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = finish([sys.executable, *launcher, script, *ranks], processes=1 if launcher else 2)
    assert done.returncode != 0
    assert done.stderr.count("is wrong") == 1
    assert f"\nscript.py: rank {speaker} is wrong\n" in f"\n{done.stderr}"
    assert "[rank" not in done.stderr  # no traceback of a lost connection


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["script.py"], "script.py"),
        (["-m", "one.two"], "one.two"),
        (["-m", "one"], "one"),
    ],
)
def test_the_line_begins_with_how_the_command_is_called(tmp_path, words, name):
    code = f"import sys; sys.path.append({str(ROOT)!r}); from core import errors\n"
    code += "def main(argv): raise errors.UserError(f'{argv} is\\nwrong')\nerrors.run(main)\n"
    (tmp_path / "one").mkdir()
    for file in ("script.py", "one/two.py", "one/__main__.py"):
        (tmp_path / file).write_text(code)
    done = subprocess.run([sys.executable, *words, "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{name}: ['x'] is wrong\n")


# What a line repeats.


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "a " * 50_000, " " * 100_000, "\n" * 100_000 + "a", "\0" * 100_000, "ü" * 9999]
)
def test_no_line_repeats_a_long_input(text):
    for said in (errors.UserError(f"--key={text!s} is wrong"), OSError(2, "No such file", text)):
        assert len(errors.line_of(said)) <= 1500
    assert len(errors.nearest(text, ["muon", "adamw"], cutoff=0)) < 50


def test_what_a_terminal_would_obey_is_spelled_out(capsys):
    text = "\x1b[31mred\x07 \x9b2J \u202etfel\r\nnext\x00\x7f é日👍  two spaces"
    line = errors.line_of(errors.UserError(text))
    assert line == "\\x1b[31mred\\x07 \\x9b2J \\u202etfel next\\x00\\x7f é日👍  two spaces"
    errors.note(text)
    assert capsys.readouterr().err == f"{line}\n"


def test_one_thing_is_singular():
    assert [errors.count(n, "run") for n in (0, 1, 2, 1024)] == ["0 runs", "1 run", "2 runs", "1,024 runs"]


# What can be pasted into a shell.

FOLDERS = [
    "plain",
    "two  spaces",
    "it's",
    '"',
    "$HOME",
    "`id`",
    "a;b",
    "-x",
    "--out_dir=x",
    "#",
    "~",
    "*",
    "\\",
    "é日",
    "a\nb",
    "&",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_shell_gives_back_every_word(folder):
    words = shlex.split(errors.pasted("mv", Path(folder), f"--prompt={folder}"))
    assert words[0] == "mv" and words[2] == f"--prompt={folder}"
    assert Path(words[1]) == Path(folder) and not words[1].startswith("-")  # which mv would take for a flag


def test_a_command_names_its_script_as_the_running_one_was_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a b").mkdir()
    for script in ("sample.py", "a b/sample.py"):
        Path(script).touch()
    for called, script in (
        ("train.py", "sample.py"),
        ("a b/train.py", "'a b/sample.py'"),
        (str(tmp_path / "train.py"), f"{tmp_path}/sample.py"),
        ("lab/gallery.py", "sample.py"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert errors.command("sample.py", Path("out/rope")) == f"python {script} out/rope"


# Where memory is used up.


def test_memory_that_is_used_up_is_a_line(monkeypatch, capsys):
    for fill in (lambda: np.empty(2**55), lambda: torch.empty(2**55), lambda: "a" * 2**62):
        monkeypatch.setattr(sys, "argv", ["sample.py"])
        with pytest.raises(SystemExit) as left:
            errors.run(lambda argv, fill=fill: fill())
        line = capsys.readouterr().err
        assert (left.value.code, line.count("\n")) == (2, 1) and "out of memory" in line
    with pytest.raises(RuntimeError, match="another"):
        errors.run(lambda argv: (_ for _ in ()).throw(RuntimeError("another fault")))


@pytest.mark.parametrize("error", [errors.UserError("wrong"), OSError(28, "No space left on device", "file")])
def test_a_line_is_never_glued_to_a_progress_bar(error, capsys, monkeypatch):
    def main(argv):
        for index in tqdm.tqdm(range(3), "bar"):
            if index == 1:
                raise error

    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        errors.run(main)
    said = capsys.readouterr().err
    assert "bar" in said and said.splitlines()[-1].startswith("train.py: ")

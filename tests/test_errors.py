"""A mistake is one line that names the command, under torchrun too, whoever makes it; what is told can be typed; and no
stream, encoding or Ctrl-C makes a traceback."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from tiny import ROOT, TORCHRUN, finish

from core import errors
from core.errors import UserError

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
    script.write_text(SCRIPT, encoding="utf-8")
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
        (tmp_path / file).write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *words, "x"], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False
    )
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


# Streams, Ctrl-C and the environment.


@pytest.fixture
def script(tmp_path):
    """script(body, lasting=False): the path of a command without torch, whose main(argv) has these lines."""

    def write(body, lasting=False):
        head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport core.start, os\nfrom core import errors\n"
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        path = tmp_path / "script.py"
        path.write_text(f"{head}def main(argv):\n{lines}errors.run(main, lasting={lasting})\n", encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}])
def test_no_encoding_lacks_a_letter(script, environment):
    path = script("print('\\u00b1 \\udcff'); raise errors.UserError('\\u00b1 \\udcff')")
    done = subprocess.run([sys.executable, path], env=os.environ | environment, capture_output=True, check=False)
    said = b"\\xb1 \\udcff\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, said, b"script.py: " + said)


@pytest.mark.skipif(os.name != "posix", reason="the shell closes descriptors")
def test_no_file_takes_the_place_of_a_stream_that_is_closed(script, tmp_path):
    path = script(
        "print('out'); print('err', file=sys.stderr)\n"
        "with open(argv[0], 'w', encoding='utf-8') as file:\n"
        "    for number in (1, 2): os.write(number, b'from a library')\n"
        "    file.write(sys.stdin.read() + 'whole')\n"
    )
    line = [sys.executable, path, tmp_path / "file"]
    for closed in ("<&- >&- 2>&-", ">&- </dev/null 2>/dev/null", "2>&- </dev/null >/dev/null"):
        assert subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *line], check=False).returncode == 0
        assert (tmp_path / "file").read_text(encoding="utf-8") == "whole"


def run_unread(path, *streams):
    """A command, these streams of which are pipes that nobody reads -> its exit status and what it wrote to stderr."""
    with subprocess.Popen([sys.executable, path], **dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)) as process:
        for name in streams:
            getattr(process, name).close()
        said = "" if "stderr" in streams else process.stderr.read().decode()
    return process.returncode, said


def test_a_command_whose_work_lies_in_files_outlives_its_readers(script, tmp_path):
    bar = "tqdm.tqdm('ab', mininterval=0)"
    body = f"import tqdm\nfor _ in {bar}: print('x' * 9999)\nopen({str(tmp_path / 'done')!r}, 'wb')"
    for streams in (("stdout",), ("stdout", "stderr")):
        status, said = run_unread(script(body, lasting=True), *streams)
        assert status == 0 and (tmp_path / "done").exists()
        assert "stderr" in streams or said.count("stdout: Broken pipe; going on without it\n") == 1
        (tmp_path / "done").unlink()
    assert run_unread(script(body.replace(bar, "'ab'")), "stdout") == (0, "")
    assert not (tmp_path / "done").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_is_lost_is_said_once(script):
    for lasting, status, said in ((True, 2, "stdout: No space left on device; going on without it\n"),
                                  (False, 2, "script.py: [Errno 28] No space left on device\n")):  # fmt: skip
        with open("/dev/full", "wb") as full:
            line = [sys.executable, script("print('x')", lasting)]
            done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr.decode()) == (status, said)


def test_ctrl_c_while_modules_are_imported_is_silent(tmp_path):
    """They may swallow the exception that Ctrl-C raises otherwise."""
    slow = "import time\ntry:\n    print('importing', flush=True); time.sleep(60)\nexcept BaseException: pass\n"
    (tmp_path / "slow.py").write_text(slow, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport core.start\nimport slow\n"
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    line, pipes = [sys.executable, tmp_path / "script.py"], dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(line, **pipes) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert (process.wait(), process.stderr.read()) == (130, b"")
    # These tests have imported core.start too, and still may be interrupted.
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


TOGETHER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"} | TOGETHER, (5, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "4"}, None),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, None),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, None),
        ({"WORLD_SIZE": "x"}, None),
        ({"WORLD_SIZE": "0"}, None),
        ({"RANK": "1"}, None),
        ({"LOCAL_RANK": "1"}, None),
        ({"RANK": "4", "WORLD_SIZE": "4"} | TOGETHER, None),
        ({"RANK": "-1", "WORLD_SIZE": "4"} | TOGETHER, None),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2"} | TOGETHER, None),
    ],
)
def test_what_a_cluster_left_in_the_environment_is_one_line(environment, expected, monkeypatch, call_script):
    for key in (*errors.PROCESSES, *TOGETHER):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if expected:
        assert errors.processes() == expected
        return
    with pytest.raises(UserError):
        errors.processes()
    done = call_script("train.py", "--out_dir=out", "--device=cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unset RANK WORLD_SIZE LOCAL_RANK" in done.stderr

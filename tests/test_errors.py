"""A mistake is one line that names the command, under torchrun too, whoever makes it."""

import subprocess
import sys

import pytest
from tiny import ROOT, TORCHRUN, finish

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

"""Under torchrun, a mistake is one line too, whoever makes it."""

import sys

import pytest
from tiny import ROOT, TORCHRUN, finish

SCRIPT = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
from core import errors, place

errors.PATIENCE = 3

def main(argv):
    here = place.choose("cpu")
    if str(here.rank) in argv:
        raise errors.UserError(f"rank {{here.rank}} is wrong")
    here.barrier()

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

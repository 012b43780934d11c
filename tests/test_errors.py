"""Under torchrun, a mistake is one line too, whoever makes it."""

import subprocess
import sys

import pytest
from tiny import ENV, ROOT

SCRIPT = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
from core import place as device
from core import errors

errors.PATIENCE = 3

def main(argv):
    here = device.choose("cpu")
    if str(here.rank) in argv:
        raise errors.UserError(f"rank {{here.rank}} is wrong")
    here.barrier()

errors.run(main)
"""


@pytest.mark.parametrize(("ranks", "speaker"), [(["0", "1"], 0), (["0"], 0), (["1"], 1)])
def test_one_process_speaks_and_all_leave(tmp_path, ranks, speaker):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *ranks]
    done = subprocess.run(line, env=ENV, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode != 0
    assert done.stderr.count("is wrong") == 1
    assert f"\nscript.py: rank {speaker} is wrong\n" in f"\n{done.stderr}"
    assert "[rank" not in done.stderr  # no traceback of a lost connection

"""Settings of the process that have to come before torch is imported. Every command imports this first."""

import contextlib
import ctypes
import os
import signal
import sys
import time

BEGAN = time.perf_counter()  # "seconds" in metrics.jsonl count what a user waits, imports included

# The next file that is opened, a checkpoint say, would take the place of a standard stream that is closed (`2>&-`), and
# get what libraries print there.
for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
        stream = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
        os.set_inheritable(stream.fileno(), True)
        setattr(sys, name, stream)

# Ctrl-C while a command imports its modules ends it at once and without a traceback, which some of them would swallow.
# core.errors.run takes over from there. A notebook or a test that imports a command keeps its own handler.
importer = sys._getframe(1)
while importer.f_code.co_filename.startswith("<frozen importlib"):
    importer = importer.f_back
command = importer.f_globals.get("__name__") == "__main__" and "__file__" in importer.f_globals
if command and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# OpenMP's threads on the CPU spin while they wait for each other. Where another program wants a core, each of a step's
# thousand barriers costs what is left of a time slice: 30000 turns are as fast as 1000 alone, and a third as fast
# beside a busy neighbour; with none of them, a run alone loses a fifth (docs/log.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# glibc gives large blocks back to the system when they are freed. A step's thousand tensors then get new pages each
# time, and the faults for these are a fifth of the step. M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1) keep them.
with contextlib.suppress(OSError, TypeError, AttributeError):  # Other systems have no mallopt.
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(-3, 2**30) or mallopt(-3, 2**25):  # The second is the most that older versions take.
        mallopt(-1, 2**30)

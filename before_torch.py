"""What has to happen before torch is imported. Every script imports this first."""

import contextlib
import ctypes
import os
import time

BEGAN = time.perf_counter()  # "seconds" in metrics.jsonl count what a user waits, imports included

# Threads of the CPU's OpenMP that wait for each other spin for milliseconds by default. As soon as anything else wants
# a core, a step's thousand barriers cost a time slice each, and the step takes 10 to 25 times as long (docs/log.md).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

# glibc gives large blocks back to the system when they are freed, so that a step's thousand tensors are new pages each
# time, and a fault for every page is a fifth of the step. Keep them: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
with contextlib.suppress(OSError, TypeError, AttributeError):  # other systems have no mallopt
    for parameter in (-1, -3):
        ctypes.CDLL(None).mallopt(parameter, 2**30)

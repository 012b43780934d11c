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
# time, and a fault for every page is a fifth of the step. Keep them: M_MMAP_THRESHOLD (-3), M_TRIM_THRESHOLD (-1).
with contextlib.suppress(OSError, TypeError, AttributeError):  # other systems have no mallopt
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(-3, 2**30) or mallopt(-3, 2**25):  # the most that older ones take
        mallopt(-1, 2**30)

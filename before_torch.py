"""What has to happen before torch is imported. Every script imports this first."""

import os
import time

BEGAN = time.perf_counter()  # "seconds" in metrics.jsonl count what a user waits, imports included

# Threads of the CPU's OpenMP that wait for each other spin for milliseconds by default. As soon as anything else wants
# a core, a step's thousand barriers cost a time slice each, and the step takes 10 to 25 times as long (docs/log.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

"""How torch's threads wait for each other, and whether other programs keep the cores busy.

By default a thread that waits spins for milliseconds before it sleeps. On quiet cores that makes small
updates a quarter to a third quicker. On busy cores it keeps the core from the thread it waits for, and
updates take several times as long (benchmarks/RESULTS.md). OpenMP reads OMP_WAIT_POLICY once, when torch is
loaded. So `choose` looks at the machine before that; nothing here imports torch.
"""

import os
import sys
import time
from pathlib import Path

_LOOKS = 5
_BETWEEN = 0.002
"""Seconds between two looks at the threads that run."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def running() -> int:
    """Threads of all programs that run or wait for a core: the fewest of a few looks, which end where some
    core is free. 0 where there is no Linux to say so.
    """
    fewest = sys.maxsize
    for _ in range(_LOOKS):
        try:
            fewest = min(fewest, int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))
        except (OSError, ValueError, IndexError):
            return 0
        if fewest <= cores():
            break
        time.sleep(_BETWEEN)
    return fewest


def chosen() -> bool:
    """Whether the environment says how threads wait."""
    return "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ


def choose() -> None:
    """Lets threads that wait sleep at once if other programs keep all cores busy, unless the environment says
    how they wait.
    """
    if not chosen() and running() > cores():  # this one runs, too
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

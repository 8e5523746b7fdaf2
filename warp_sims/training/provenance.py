"""The versions in use and the machine, which runs and figures are labelled with."""

import os
import platform
from pathlib import Path

import numpy as np
import torch
import warp as wp


def versions() -> dict[str, str]:
    """Returns the versions of what a run depends on."""
    from .. import __version__  # set after this module is imported

    return {
        "python": platform.python_version(),
        "warp-sims": __version__,
        "torch": torch.__version__,
        "warp-lang": wp.__version__,
        "numpy": np.__version__,
    }


def machine() -> dict[str, str]:
    """Returns a description of the machine that does not identify it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return {"cpu": model, "cores": str(cores()), "system": f"{platform.system()} {platform.machine()}"}


def cores() -> int:
    """Returns the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1

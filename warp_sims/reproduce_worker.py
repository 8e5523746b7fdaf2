"""A process that does runs of the paper's matrix: `python -m warp_sims.reproduce_worker`.

A run comes in as a line of JSON on the standard input, and every epoch goes out as one on the standard
output; so a worker whose parent was killed ends at the next epoch, or at the end of its input.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import warp as wp

from .published import Job, Scale
from .run_config import versions
from .runs import OUTCOME, write_json
from .training import TrainingRun

Report = Callable[[dict[str, Any]], None]


def run(job: Job, scale: Scale, out: Path, report: Report) -> None:
    """Does one run from where it stopped, and writes how it ended: what makes it count as finished."""
    folder = job.folder(out)
    diverged = None
    with TrainingRun(job.config(scale), folder, resume=True) as training:
        report({"epochs": training.epoch + 1, "loss": training.test_loss})
        try:
            while not training.done:
                started = time.perf_counter()
                training.run_epoch()
                seconds = time.perf_counter() - started
                report({"epochs": training.epoch + 1, "loss": training.test_loss, "seconds": seconds})
        except FloatingPointError as error:  # a result like any other
            diverged = str(error).removeprefix("train: ").split(", expected")[0]
    outcome = {
        "epochs": training.epoch + 1,
        "diverged": diverged,
        "versions": versions(),
        "machine": machine(),
    }
    write_json(folder / OUTCOME, outcome)


def machine() -> dict[str, str]:
    """Returns what the figures were made on, without a word that identifies the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return {"cpu": model, "cores": str(cores), "system": f"{platform.system()} {platform.machine()}"}


def main() -> int:
    """Does the runs that come in until there are no more."""
    # The channel to the parent is kept for it: what libraries print goes elsewhere.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    wp.config.log_level = wp.LOG_ERROR
    # With batches of 8 a second thread brings little, and the other cores have workers of their own.
    torch.set_num_threads(1)

    def report(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                run(Job(**order["job"]), Scale(**order["scale"]), Path(order["out"]), report)
            except BrokenPipeError:
                raise
            except Exception as error:
                report({"failed": f"{type(error).__name__}: {error}"})
            else:
                report({"finished": True})
    except (KeyboardInterrupt, BrokenPipeError):
        # To close what cannot be written any more would raise again.
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A process that does runs of the paper's matrix: `python -m warp_sims.reproduction.worker`.

Runs that are done together come as a line of JSON on the standard input, and every epoch of each run is a
line on the standard output. So a worker whose parent was killed ends at the next epoch, or at the end of its
input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import warp as wp

from ..training.durable import write_json
from ..training.provenance import machine, versions
from ..training.published import Job, Scale
from ..training.runs import OUTCOME
from ..training.together import TrainingTogether
from ..training.train import TrainingRun

Report = Callable[[dict[str, Any]], None]


def run(jobs: Sequence[Job], scale: Scale, out: Path, report: Report) -> None:
    """Does runs together that differ only in their seed, each from where it stopped. The outcome, which makes
    a run count as finished, is written as soon as the run has ended.
    """
    configs, folders = [job.config(scale) for job in jobs], [job.folder(out) for job in jobs]
    with TrainingTogether(configs, folders, resume=True) as training:
        numbers = {run: k for k, run in enumerate(training.runs)}

        def tell(run: TrainingRun, **more: float) -> None:
            report({"run": numbers[run], "epochs": run.epoch + 1, "loss": run.test_loss, **more})
            if run not in training.active:
                _conclude(run, folders[numbers[run]])
                report({"run": numbers[run], "finished": True})

        for one in training.runs:
            tell(one)
        while training.active:
            started = time.perf_counter()
            runs = training.run_epoch()
            seconds = (time.perf_counter() - started) / len(runs)
            for one in runs:
                tell(one, seconds=seconds)


def _conclude(run: TrainingRun, folder: Path) -> None:
    run.close()
    diverged = run.diverged and str(run.diverged).removeprefix("train: ").split(", expected")[0]
    outcome = {
        "epochs": run.epoch + 1,
        "diverged": diverged,
        "versions": versions(),
        "machine": machine(),
    }
    write_json(folder / OUTCOME, outcome)


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
                jobs = [Job(**job) for job in order["jobs"]]
                run(jobs, Scale(**order["scale"]), Path(order["out"]), report)
            except BrokenPipeError:
                raise
            except Exception as error:
                report({"failed": f"{type(error).__name__}: {error}"})
            else:
                report({"free": True})
    except (KeyboardInterrupt, BrokenPipeError):
        # To close what cannot be written any more would raise again.
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

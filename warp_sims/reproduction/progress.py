"""Shows the progress of a matrix of runs, and how long it will take."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..training.published import Job, Scale

# Seconds of an epoch on one core until there is one to measure: they need only be right to each other.
FIRST_GUESS = {"cartpole": 0.06, "guidance": 0.08, "quantum": 0.6}
START_SECONDS = 1.0  # of a run, before its first epoch and after its last
SMOOTHING = 0.1  # weight of the newest epoch in the mean


class Board:
    """Shows the matrix: a bar for all of it with the time left, and a line for each run that is under way.

    Where the output is no terminal it prints a line per finished run.

    Args:
        jobs: All runs.
        left: Those that are still to be done.
        out: Where they are, for the closing words.
        scale: Epochs of a run.
        workers: Processes that are at work.
        show: Whether to show anything.
    """

    def __init__(
        self, jobs: Sequence[Job], left: Sequence[Job], out: Path, scale: Scale, workers: int, show: bool
    ) -> None:
        self._epochs, self.workers, self._show = scale.epochs, workers, show
        self._out = out
        self._total = len(jobs)
        self._ahead = dict.fromkeys(left, scale.epochs)  # epochs to go
        self._seconds: dict[tuple[str, str], float] = {}
        self._lines: dict[Job, Any] = {}
        self._progress: Any = None
        self._bar: Any = None
        self._shown_at = -math.inf

    def __enter__(self) -> Board:
        if self._show and sys.stdout.isatty():
            try:
                from rich.progress import BarColumn, Progress, TextColumn
            except ImportError:
                return self
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}")
            )
            self._progress.start()
            self._bar = self._progress.add_task("all runs", total=self._total * self._epochs, note="")
            self._refresh()
        elif self._show:
            print(f"{self._done()} of {self._total} runs are finished", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._refresh()
            self._progress.stop()

    def epoch(self, job: Job, message: dict[str, Any]) -> None:
        """Takes in what a worker says about a run: epochs done, test loss, seconds of the last epoch, of runs
        that train together its share in them.
        """
        self._ahead[job] = self._epochs - message["epochs"]
        if "seconds" in message:
            key = (job.problem, job.flow)
            before = self._seconds.get(key, message["seconds"])
            self._seconds[key] = before + SMOOTHING * (message["seconds"] - before)
        if self._progress is None:
            return
        if job not in self._lines:
            self._lines[job] = self._progress.add_task(f"  {job.label}", total=self._epochs, note="")
        note = f"{message['epochs']}/{self._epochs} epochs  test loss {message['loss']:.3e}"
        self._progress.update(self._lines[job], completed=message["epochs"], note=note)
        if time.monotonic() - self._shown_at > 0.5:
            self._refresh()

    def finished(self, job: Job) -> None:
        """Takes a run off the board."""
        del self._ahead[job]
        if self._progress is not None:
            if job in self._lines:
                self._progress.remove_task(self._lines.pop(job))
            self._refresh()
        elif self._show:
            print(f"{job.label}: finished; {self._note()}", flush=True)

    def stopping(self) -> None:
        """Says that Ctrl-C was seen."""
        if self._show:
            print("stopping; what is done is being written", file=sys.stderr, flush=True)

    def seconds_left(self) -> float:
        """Returns the time that the rest will take, by the epochs measured so far."""
        work = sum(self._work(job, epochs) for job, epochs in self._ahead.items())
        return work / max(1, min(self.workers, len(self._ahead)))

    def seconds(self, job: Job) -> float:
        """Returns the time that a whole run takes."""
        return self._work(job, self._epochs)

    def _work(self, job: Job, epochs: int) -> float:
        seconds = self._seconds.get((job.problem, job.flow))
        if seconds is None:
            seconds = FIRST_GUESS[job.problem] * self._correction(job.problem)
        return epochs * seconds + START_SECONDS

    def _correction(self, problem: str) -> float:
        """How much slower epochs are here than guessed: of this problem, else of all that were measured."""
        measured = [(key[0], s / FIRST_GUESS[key[0]]) for key, s in self._seconds.items()]
        ratios = [ratio for p, ratio in measured if p == problem] or [ratio for _, ratio in measured]
        return sum(ratios) / len(ratios) if ratios else 1.0

    def _done(self) -> int:
        return self._total - len(self._ahead)

    def _note(self) -> str:
        left = f", {duration(self.seconds_left())} left" if self._ahead else ""
        return f"{self._done()}/{self._total} runs{left}"

    def _refresh(self) -> None:
        self._shown_at = time.monotonic()
        completed = self._total * self._epochs - sum(self._ahead.values())
        self._progress.update(self._bar, completed=completed, note=self._note())


def duration(seconds: float) -> str:
    """Returns a duration as people say it: 40 s, 5 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

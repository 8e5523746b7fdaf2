"""Runs the paper's experiments again: a matrix of runs on several processes, which can be stopped and
continued at any moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..training.durable import write_json
from ..training.provenance import cores
from ..training.published import Job, Scale
from ..training.runs import OUTCOME
from .progress import Board

MANIFEST = "reproduce.json"
FORMAT = "warp-sims reproduce 1"
LOCK = ".lock"
STOP_SECONDS = 20.0  # an epoch and the writing of what is kept take less
# Seeds of one setting that train in one batch of work. That is faster: 4 of them on one core against 4 one
# after the other, every core at such work, 1.1 to 1.3 times (cart-pole), 1.2 to 1.4 times (guidance), 1.02 to
# 1.1 times (quantum). 2 of them gain somewhat less, 8 hardly more.
TOGETHER = 4


class RunFailed(RuntimeError):
    """A run neither finished nor ended with a loss that is not finite."""


def reproduce(
    jobs: Sequence[Job],
    out: str | os.PathLike[str],
    *,
    scale: Scale | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> int:
    """Does the runs of a matrix that are not done yet, each in its folder below `out`.

    A run is finished when its outcome is written. A run that stopped in the middle continues from its last
    checkpoint. More runs of the same scale may be added to a folder at any time. Up to `TOGETHER` runs that
    differ only in the seed are done together, fewer if processes would otherwise have nothing to do.

    Args:
        jobs: The runs, in the order in which they are begun.
        out: The folder, a new one or one that this function wrote.
        scale: Epochs of a run.
        workers: Processes, each with one thread. None: as many as there are cores.
        progress: Show how far the matrix is and how long it will take, where the package rich is installed.

    Returns:
        Number of runs that were still to be done.

    Raises:
        FileExistsError: `out` holds something else.
        ValueError: `out` was begun with another scale, or `workers` is below 1.
        BlockingIOError: Another process works on `out`.
        RunFailed: A run could not be done; what is finished is kept.
        KeyboardInterrupt: Ctrl-C; finished runs are kept, and the others up to their last checkpoints.
    """
    scale = scale or Scale()
    workers = cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"reproduce: jobs={workers}, expected at least 1 process")
    out = Path(out)
    for job in jobs[:1]:
        job.config(scale)  # what it refuses is refused before a folder is touched
    open_folder(out, scale)
    with _locked(out) as lock:
        left = [job for job in jobs if not is_finished(out, job)]
        with Board(jobs, left, out, scale, min(workers, len(left)), progress) as board:
            if left:
                _run(left, out, scale, min(workers, len(left)), board, lock)
    return len(left)


def is_finished(out: Path, job: Job) -> bool:
    """Returns whether a run is written completely."""
    return (job.folder(out) / OUTCOME).is_file()


def read_scale(out: str | os.PathLike[str]) -> Scale:
    """Returns the scale of the runs below a folder.

    Raises:
        FileNotFoundError, ValueError: `out` is no folder that `reproduce` wrote.
    """
    file = Path(out) / MANIFEST
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"folder {out} holds no {MANIFEST}; give a folder that `warp-sims reproduce` wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{file} is not of the format {FORMAT!r}; give another folder")
    return Scale(**data["scale"])


def open_folder(out: Path, scale: Scale) -> None:
    """Makes the folder, or checks that it is one of the same scale."""
    if (out / MANIFEST).is_file():
        standing = read_scale(out)
        for field in dataclasses.fields(Scale):
            was, now = getattr(standing, field.name), getattr(scale, field.name)
            if was != now:
                raise ValueError(
                    f"folder {out} was begun with {field.name}={was}, now {field.name}={now}; give "
                    f"--{field.name} {was} to go on with it, or another folder with --out"
                )
        return
    if out.exists() and (not out.is_dir() or any(p.suffix != ".partial" for p in out.iterdir())):
        raise FileExistsError(
            f"{out} exists and is no folder that `warp-sims reproduce` wrote; give another one with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MANIFEST, {"format": FORMAT, "scale": dataclasses.asdict(scale)})


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[IO[str]]:
    """Keeps a second process away from the folder.

    The workers inherit the open file, and with it the lock: after the parent was killed it lasts until they
    are gone, so no two processes ever write one run.
    """
    with open(out / LOCK, "w", encoding="utf-8") as lock:
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            yield lock
            return
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BlockingIOError(
                        f"another `warp-sims reproduce` works on {out}; wait for it, or give another folder "
                        "with --out"
                    ) from None
                time.sleep(0.1)
        yield lock


class _Worker:
    """A process of `worker`. It puts (worker, message) into a queue, and None at its end."""

    def __init__(self, lock: IO[str], events: _Events) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.jobs: list[Job] = []
        self._events = events
        self.process = subprocess.Popen(
            [sys.executable, "-m", "warp_sims.reproduction.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
            # Ctrl-C reaches the parent alone, which then stops them in order.
            start_new_session=True,
            pass_fds=(lock.fileno(),) if os.name == "posix" else (),
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put((self, json.loads(line)))
        self._events.put((self, None))

    def begin(self, jobs: list[Job], scale: Scale, out: Path) -> None:
        """Hands over runs that differ in the seed alone."""
        self.jobs = jobs
        orders = [dataclasses.asdict(job) for job in jobs]
        order = {"jobs": orders, "scale": dataclasses.asdict(scale), "out": str(out)}
        assert self.process.stdin is not None
        # A worker that has died is found out by the end of what it says.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    @property
    def label(self) -> str:
        """What errors call the runs that it does."""
        more = len(self.jobs) - 1
        return self.jobs[0].label + (f" and {more} more seed{'s' * (more > 1)}" if more else "")

    def interrupt(self) -> None:
        """Lets it write what is to be kept and end."""
        with contextlib.suppress(OSError, ValueError):
            self.process.send_signal(signal.SIGINT) if os.name == "posix" else self.process.terminate()
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def why(self) -> str:
        """Returns the end of what it printed."""
        self.errors.seek(0)
        return " ".join(self.errors.read().split())[-500:]


_Events = queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]


def _run(left: list[Job], out: Path, scale: Scale, count: int, board: Board, lock: IO[str]) -> None:
    events: _Events = queue.SimpleQueue()
    waiting = list(left)
    workers: list[_Worker] = []
    try:
        for idle in range(count, 0, -1):
            worker = _Worker(lock, events)
            workers.append(worker)
            worker.begin(take(waiting, board, idle), scale, out)
        busy = count
        while busy:
            worker, message = events.get()
            if message is None:
                worker.process.wait()
                raise RunFailed(
                    f"the process of run {worker.label} ended with code {worker.process.returncode} "
                    f"({worker.why() or 'it said nothing'}); start again to go on"
                )
            if "failed" in message:
                raise RunFailed(f"run {worker.label} failed: {message['failed']}")
            if "free" in message and waiting:
                worker.begin(take(waiting, board), scale, out)
            elif "free" in message:
                busy -= 1
                board.workers = busy
            elif "finished" in message:
                board.finished(worker.jobs[message["run"]])
            else:
                board.epoch(worker.jobs[message["run"]], message)
    except KeyboardInterrupt:
        board.stopping()
        raise
    finally:
        _stop(workers)


def take(waiting: list[Job], board: Board, idle: int = 1) -> list[Job]:
    """Takes the next runs for a process from those that wait: the first, and others that differ from it only
    in the seed, but not so many that the other processes would finish before this one.

    Args:
        waiting: The runs that no process does yet, at least one for each idle process.
        board: Knows how long runs take.
        idle: Processes that have nothing to do, this one among them.
    """
    first = waiting[0]
    share = round(board.seconds_left() / board.seconds(first))
    most = max(1, min(TOGETHER, share, math.ceil(len(waiting) / idle)))
    taken = [job for job in waiting if dataclasses.replace(job, seed=first.seed) == first][:most]
    for job in taken:
        waiting.remove(job)
    return taken


def _stop(workers: list[_Worker]) -> None:
    """Ends the processes: by request, and by force where that takes too long or Ctrl-C comes again."""
    try:
        for worker in workers:
            worker.interrupt()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
            worker.errors.close()

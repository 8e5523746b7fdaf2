"""Runs prepared launches at once on several threads of a CPU: torch's threads where possible, else Python's.

A `Team` has tasks: launches, and programs of launches. If it can, it hands all of them to a kernel
(kernels/programs.py) whose threads run them one after the other without Python. If Python ran in each thread,
threads would wait for the interpreter, which takes longer than a launch over a few worlds: 37 us against 3
for two launches at once.
"""

import ctypes
import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch

from ...kernels import programs as native
from . import launches, waiting
from .compat import DirectCall, address, openmp
from .launches import Launch

_HOME = os.getpid()


class Backoff:
    """Decides whether to call a team of threads, from how long earlier calls took.

    A team waits for its last thread. If other programs keep the cores busy, that thread may not be scheduled
    for milliseconds, in every parallel part again: an update of 1 ms took 30. One thread alone would not
    wait. So if a call took longer than one thread would have taken for all the work, the next calls use one
    thread; after every further bad call twice as many do. Then a team is tried again.
    """

    TOLERANCE = 200_000
    """ns that a call may lose before it counts as bad."""
    FIRST, MOST = 8, 512
    """Calls without a team after the first bad one, and at most."""

    def __init__(self) -> None:
        self._penalty = self._left = 0

    def alone(self) -> bool:
        """Whether this call is to do without a team."""
        if self._left == 0:
            return False
        self._left -= 1
        return True

    def report(self, elapsed: int, work: int) -> None:
        """Learns how long a call with a team took, and the CPU time of its work, of all threads [ns]."""
        if elapsed > work + self.TOLERANCE:
            self._penalty = self._left = min(max(2 * self._penalty, self.FIRST), self.MOST)
        else:
            self._penalty //= 2


class Step(NamedTuple):
    """A launch in a program, with the values that are set before it."""

    launch: Launch
    dim: int | None
    """Number of its threads, on one axis; None for those that it was recorded with."""
    values: dict[str, int]
    """Integer arguments by name."""

    def __call__(self) -> None:
        for name, value in self.values.items():
            self.launch.put(name, value)
        if self.dim is not None:
            self.launch.resize(self.dim)
        self.launch()


class Program:
    """Launches one after the other; those of one kernel may share a `Launch`."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = list(steps)

    def __call__(self) -> None:
        for step in self.steps:
            step()


Task = Launch | Program | Callable[[], None]


class Team:
    """Tasks that run at once on torch's threads, prepared.

    They run through Python (`in_parallel`) if one of them is neither a launch nor a program, or where
    launches cannot be made past Warp's Python.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = list(tasks)
        programs = [_calls(task) for task in tasks]
        known = [steps for steps in programs if steps is not None]
        self._run: Callable[[], None]
        if len(tasks) == 1 and isinstance(tasks[0], Launch):
            self._run = tasks[0]
        elif len(known) == len(programs):
            self._run = _Job(known)
        else:
            self._run = functools.partial(in_parallel, self.tasks)

    def __call__(self) -> None:
        """Runs the tasks; all addresses stand in the descriptors of the launches."""
        self._run()


def _calls(task: Task) -> list[Step] | None:
    """The steps of a task; None if some of it cannot be called past Warp's Python."""
    if not sys.platform.startswith("linux"):
        return None
    if isinstance(task, Launch):
        steps = [Step(task, None, {})]
    elif isinstance(task, Program):
        steps = task.steps
    else:
        return None
    return steps if all(step.launch.direct is not None for step in steps) else None


class _Job:
    """Programs as kernels/programs.py takes them."""

    def __init__(self, programs: Sequence[Sequence[Step]]) -> None:
        team, clock = openmp(), ctypes.CDLL(None).clock_gettime
        self._programs = programs
        self._made = [_native_calls(steps) for steps in programs]
        rows = [native.Program(made, len(made)) for made in self._made]
        self._job = native.Job(
            programs=(native.Program * len(rows))(*rows),
            count=len(rows),
            read_clock=address(clock),
            number=None if team is None else team.number,
            monotonic=time.CLOCK_MONOTONIC,
            cpu=time.CLOCK_THREAD_CPUTIME_ID,
        )
        self._directs = list(dict.fromkeys(_direct(step) for steps in programs for step in steps))
        start = 0 if team is None else team.start
        kernel: Any = native.run_job
        values = {"job": ctypes.addressof(self._job), "team": start, "threads": 1}
        direct = Launch(kernel, 1, values, "cpu").direct
        assert direct is not None  # as of the programs' launches
        self._native = direct

    def __call__(self) -> None:
        for direct in self._directs:
            direct.refresh()
        self._job.taken = self._job.cpu_time = 0
        self._start()
        if launches.tracer is None:
            return
        for steps, made in zip(self._programs, self._made, strict=True):
            for (launch, dim, _), done in zip(steps, made, strict=True):
                thread = threading.get_ident() + done.thread
                dim = launch.dim if dim is None else dim
                launches.tracer.add(launch.name, launch.kernel, dim, thread, done.begin, done.end)

    def _start(self) -> None:
        programs, run = len(self._programs), self._native
        run.put("threads", 1)
        if programs == 1 or _backoff.alone():
            run()
        elif openmp() is None or os.getpid() != _HOME:
            in_parallel([run] * programs)
        else:
            run.put("threads", programs)
            start = time.perf_counter_ns()
            run()
            _backoff.report(time.perf_counter_ns() - start, self._job.cpu_time)


def _direct(step: Step) -> DirectCall:
    assert step.launch.direct is not None  # as `_calls` says
    return step.launch.direct


def _native_calls(steps: Sequence[Step]) -> Any:
    """The steps of a program as an array of structures. Values stay in place after the program, so all are
    stored before its first call, and before other calls only those that change.
    """
    made = (native.Call * len(steps))()
    stored: dict[int, int] = {}
    for step, row in zip(steps, made):
        direct = _direct(step)
        values = {direct.address_of(name): value for name, value in step.values.items()}
        if step.dim is not None:
            values |= dict.fromkeys(direct.addresses_of_dim(), step.dim)
        new = {at: value for at, value in values.items() if stored.get(at) != value}
        stored |= new
        row.kernel, row.bounds, row.arguments = direct.addresses()
        row.stores, row.count = (native.Store * len(new))(*new.items()), len(new)
    return made


_backoff = Backoff()


@functools.lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    # keyed by process: threads do not survive a fork
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="warp-sims")


def in_parallel(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs the tasks at once on Python threads, one of them on this thread. Warp's CPU kernels are serial and
    release the GIL. A `Team` runs prepared launches without Python instead.
    """
    futures = [_threads(os.getpid()).submit(task) for task in tasks[1:]]
    try:
        tasks[0]()
    finally:
        wait(futures)
    for future in futures:
        future.result()


def shares(count: int, least: int = 1) -> list[range]:
    """Splits `count` items over torch's threads, at least `least` a thread; results must not depend on
    the split.
    """
    threads = max(1, min(torch.get_num_threads(), count // least))
    bounds = [count * i // threads for i in range(threads + 1)]
    return [range(a, b) for a, b in zip(bounds[:-1], bounds[1:])]


# Forked processes and busy cores

_ASKED_EVERY = 1024
"""Rollouts between two looks at the machine's load."""


class _Watch:
    """What `settle` knows of this process. It is read once a rollout, in less than a microsecond."""

    def __init__(self) -> None:
        self.settled = _HOME
        self.calls = 0
        self.warned = waiting.chosen()


_watch = _Watch()


def settle() -> None:
    """Called before each rollout.

    In a forked process it sets torch to one thread: the other threads did not survive, and the first parallel
    operation would wait for them for ever. It warns once if other programs keep all cores busy and torch's
    threads spin while they wait, which makes an update up to 60 times slower.
    """
    if torch.compiler.is_compiling():
        return
    if _watch.settled != os.getpid():
        _settle_fork()
    if not _watch.warned:
        if _watch.calls % _ASKED_EVERY == 0:
            _look_at_load()
        _watch.calls += 1


def _settle_fork() -> None:
    _watch.settled = os.getpid()
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "warp_sims: this process was forked from one that had used torch, whose threads do not survive a "
            "fork; it computes on one thread (start processes with the spawn method for more)",
            RuntimeWarning,
            stacklevel=5,
        )


def _look_at_load() -> None:
    threads, cores = torch.get_num_threads(), waiting.cores()
    if threads > 1 and waiting.running() - threads >= cores:  # of this process so many may run, too
        _watch.warned = True
        warnings.warn(
            f"warp_sims: other programs keep all {cores} cores busy, and torch's threads wait for each other "
            "by spinning, which can make a small rollout tens of times slower; start with "
            "OMP_WAIT_POLICY=PASSIVE in the environment",
            RuntimeWarning,
            stacklevel=5,
        )

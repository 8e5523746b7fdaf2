"""Prepared launches that run at once on the threads of a CPU.

A `Team` has tasks: launches, and programs of launches. Where it can, it hands all of them to a kernel
(kernels/programs.py) whose threads run them one after the other without Python. With Python in each thread,
one waits for the interpreter while another holds it, and that takes longer than a launch over a few worlds:
37 us against 3 for two launches at once.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...kernels import programs as native
from . import tracing
from .launches import DirectCall, Launch


class Backoff:
    """Decides whether a team of threads is worth calling, from what calling it has brought.

    A team waits for its last thread. Where other programs keep the cores busy, that one may not be scheduled
    for milliseconds, in every parallel part again, while one thread alone would go on: an update of 1 ms took
    30. So when a call took longer than all of its work would have taken one thread, the next ones do without
    a team, twice as many after every further disappointment; sooner or later one tries again.
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


class _Work:
    """Tasks that a team shares."""

    def __init__(self, tasks: Sequence[Callable[[], None]]) -> None:
        self._tasks = list(tasks)
        self.times: list[int] = []
        """CPU time of each thread that came [ns]."""
        self.error: BaseException | None = None

    def take(self) -> None:
        """What each thread of a team does: take tasks until none is left, however many threads there came."""
        start = time.thread_time_ns()
        while self._tasks:
            try:
                task = self._tasks.pop()
            except IndexError:
                break
            try:
                task()
            except BaseException as error:  # raised again by the caller of in_parallel
                self.error = error
        self.times.append(time.thread_time_ns() - start)

    def finish(self) -> None:
        """Raises what a task has raised."""
        if self.error is not None:
            raise self.error


class Step(NamedTuple):
    """A launch in a program, and what it is told before."""

    launch: Launch
    dim: int
    """Number of its threads, on one axis."""
    values: dict[str, int]
    """Integer arguments by name."""

    def __call__(self) -> None:
        for name, value in self.values.items():
            self.launch.put(name, value)
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
        known = [calls for calls in programs if calls is not None]
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


class _Call(NamedTuple):
    """A step of a program whose launch can be made past Warp's Python."""

    direct: DirectCall
    launch: Launch
    dim: int
    stores: dict[int, int]
    """Integers by the addresses at which they are to stand."""


def _calls(task: Task) -> list[_Call] | None:
    """The calls of a task, None where it has others too."""
    if not sys.platform.startswith("linux"):
        return None
    if isinstance(task, Launch):
        return None if task.direct is None else [_Call(task.direct, task, task.dim, {})]
    if not isinstance(task, Program):
        return None
    calls = []
    for launch, dim, values in task.steps:
        direct = launch.direct
        if direct is None:
            return None
        stores = {direct.address_of(name): value for name, value in values.items()}
        calls.append(_Call(direct, launch, dim, stores | dict.fromkeys(direct.addresses_of_dim(), dim)))
    return calls


def _instructions(calls: Sequence[_Call]) -> list[int]:
    """Words of the instructions that make the calls."""
    words: list[int] = []
    stored: dict[int, int] = {}
    for call in calls:
        for address, value in call.stores.items():
            # all before the first call: what stands there is left by the end of the program
            if stored.get(address) != value:
                stored[address] = value
                words += [0, address, value]
        words += call.direct.addresses()
    return words


class _Job:
    """Programs as kernels/programs.py takes them."""

    def __init__(self, programs: Sequence[Sequence[_Call]]) -> None:
        self._programs = programs
        team = _team()
        words = [0, len(programs), _address("clock_gettime"), time.CLOCK_MONOTONIC]
        words += [time.CLOCK_THREAD_CPUTIME_ID, 0, 0 if team is None else _pointer(team.number)]
        self._instructions = []
        for calls in programs:
            instructions = _instructions(calls)
            self._instructions.append((ctypes.c_int64 * len(instructions))(*instructions))
            begin = ctypes.addressof(self._instructions[-1])
            words += [begin, len(instructions) // native.INSTRUCTION, 0]
        self._words = (ctypes.c_int64 * len(words))(*words)
        self._directs = list({id(call.direct): call.direct for calls in programs for call in calls}.values())
        start = 0 if team is None else _pointer(team.start)
        kernel: Any = native.run_programs
        values = {"job": ctypes.addressof(self._words), "team": start, "threads": 1}
        direct = Launch(kernel, 1, values, "cpu").direct
        assert direct is not None  # as of the programs' launches
        self._native = direct

    def __call__(self) -> None:
        for direct in self._directs:
            direct.refresh()
        self._words[native.TAKEN] = self._words[native.CPU_TIME] = 0
        tracer = tracing.active
        if tracer is None:
            self._start()
            return
        times = [(ctypes.c_int64 * (native.TIMES * len(calls)))() for calls in self._programs]
        self._take_times([ctypes.addressof(t) for t in times])
        try:
            self._start()
        finally:
            self._take_times([0] * len(times))
        for calls, found in zip(self._programs, times, strict=True):
            for i, call in enumerate(calls):
                thread, start, end = found[native.TIMES * i : native.TIMES * (i + 1)]
                launch = call.launch
                tracer.add(launch.name, launch.kernel, call.dim, threading.get_ident() + thread, start, end)

    def _take_times(self, addresses: Sequence[int]) -> None:
        for i, address in enumerate(addresses):
            self._words[native.HEADER + native.PROGRAM * i + 2] = address

    def _start(self) -> None:
        programs, run = len(self._programs), self._native
        run.put("threads", 1)
        if programs == 1 or _backoff.alone():
            run()
        elif _team() is None or os.getpid() != _HOME:
            _with_own_threads([run] * programs)
        else:
            run.put("threads", programs)
            start = time.perf_counter_ns()
            run()
            _backoff.report(time.perf_counter_ns() - start, self._words[native.CPU_TIME])


@functools.cache
def _address(name: str) -> int:
    """Of a function of the C library."""
    return _pointer(getattr(ctypes.CDLL(None), name))


def _pointer(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


_HOME = os.getpid()
_pending: dict[int, _Work] = {}
_backoff = Backoff()


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _take_tasks(call: int | None) -> None:
    _pending[call or 0].take()


class _Runtime(NamedTuple):
    """Functions of an OpenMP runtime."""

    start: Callable[..., None]
    """Runs a function on all threads of a team: (function, its argument, threads, flags)."""
    number: Callable[[], int]
    """Of the calling thread in its team."""


@functools.cache
def _team() -> _Runtime | None:
    """The GNU runtime, if torch brought it along.

    Its threads spin for some milliseconds behind every parallel operation of torch's. Threads of our own
    would wait for a core all that time; these are the ones that hold it.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            start = library.GOMP_parallel
            start.argtypes = (type(_take_tasks), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            start.restype = None
            return _Runtime(start, library.omp_get_thread_num)
    return None


@functools.lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    # keyed by process: threads do not survive a fork
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="warp-sims")


def _with_own_threads(tasks: Sequence[Callable[[], None]]) -> None:
    futures = [_threads(os.getpid()).submit(task) for task in tasks[1:]]
    try:
        tasks[0]()
    finally:
        for future in futures:
            future.result()


def in_parallel(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs the tasks at once through Python, some of them on this thread. Warp's CPU kernels are serial and
    leave the GIL free. A `Team` runs what is known before without Python.
    """
    if len(tasks) == 1:
        tasks[0]()
        return
    work = _Work(tasks)
    if _backoff.alone():
        work.take()
        work.finish()
        return
    team = _team()
    # the runtime's threads do not survive a fork either, and it would wait for them for ever
    if team is None or os.getpid() != _HOME:
        _with_own_threads(tasks)
        return
    call, start = id(work), time.perf_counter_ns()
    _pending[call] = work
    try:
        team.start(_take_tasks, call, len(tasks), 0)
    finally:
        del _pending[call]
    work.finish()
    _backoff.report(time.perf_counter_ns() - start, sum(work.times))


def shares(count: int, least: int = 1) -> list[range]:
    """Splits `count` items over torch's threads, at least `least` a thread; results must not depend on
    the split.
    """
    threads = max(1, min(torch.get_num_threads(), count // least))
    bounds = [count * i // threads for i in range(threads + 1)]
    return [range(a, b) for a, b in zip(bounds[:-1], bounds[1:])]

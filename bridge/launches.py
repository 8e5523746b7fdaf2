"""Prepared launches: what a launch needs besides addresses is packed once and kept.

`wp.launch` packs some twenty arguments anew each time, which for a small rollout takes longer than the
kernels. A `Launch` here is recorded once for given shapes; afterwards only the addresses in its array
descriptors are replaced. Whoever launches borrows the prepared object from a pool, so threads and nested
calls never share one.
"""

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import warp as wp

from . import tracing
from .arrays import keep

KEPT = 16
"""Shapes of one kind whose prepared launches are kept."""
KEPT_BYTES = 1 << 24
"""Scratch (`nbytes`) up to which a prepared object is kept; making a larger one costs little beside its
work.
"""

DIRECT_CALLS = "1.19."
"""Versions of Warp whose CPU launches are made past Warp's Python, see `_DirectCall`; others through it."""

PREPARING = threading.RLock()
"""Held while kernels are made and loaded: Warp's modules are not made for two threads at once."""

T = TypeVar("T")


@functools.cache
def _descriptor() -> Any:
    """Warp's array descriptor; asked for late, because asking starts Warp's runtime."""
    return type(wp.from_torch(torch.empty(1, device="cpu"), return_ctype=True))


def array(itemsize: int, *shape: int, components: int = 0) -> Any:
    """Descriptor of a contiguous array without an address yet; the last axes can be the components of a
    vector element.
    """
    strides = [itemsize] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    axes = len(shape) - components
    return _descriptor()(data=0, ndim=axes, shape=shape[:axes], strides=strides[:axes])


class _DirectCall:
    """A recorded launch on a CPU, called as Warp calls it, less what Warp makes anew each time: a structure
    of all arguments, and its type looked up by theirs. That takes longer than a short kernel.
    """

    def __init__(self, command: Any) -> None:
        labels = [a.label for a in command.kernel.adj.args]
        values = command.params[1 : 1 + len(labels)]
        structure = type("Arguments", (ctypes.Structure,), {"_fields_": [*zip(labels, map(type, values))]})
        self._arguments = structure(*values)
        self._arrays = [(n, v) for n, v in zip(labels, values) if isinstance(v, _descriptor())]
        self._labels, self._bounds, self._kernel = labels, command.bounds, command.hooks.forward
        self._command = command
        self._references = ctypes.byref(command.bounds), ctypes.byref(self._arguments)

    def __call__(self) -> None:
        if self._command.device.is_capturing:
            self._command.launch()  # which says that addresses of torch's cannot be recorded
        arguments = self._arguments
        for name, descriptor in self._arrays:
            setattr(arguments, name, descriptor)
        self._kernel(*self._references)

    def resize(self, dim: int) -> None:
        self._bounds.shape[0] = self._bounds.size = dim

    def put(self, index: int, value: int) -> None:
        setattr(self._arguments, self._labels[index], value)

    @staticmethod
    def possible(command: Any) -> bool:
        """Whether a launch can be made in this way, which Warp does not promise to keep."""
        if not wp.__version__.startswith(DIRECT_CALLS) or not command.device.is_cpu or command.adjoint:
            return False
        return command.block_dim == 1 and command.bounds.coord_mult == 1


class Launch:
    """A kernel with its arguments, recorded; array arguments are descriptors from `array`."""

    def __init__(
        self, kernel: wp.Kernel, dim: Any, args: Sequence[Any], device: Any, block_dim: int = 256
    ) -> None:
        self._kernel = kernel
        # an empty launch records nothing
        self._command: Any = wp.launch(
            kernel,
            dim=dim,
            inputs=list(args),
            device=device,
            record_cmd=True,
            record_tape=False,
            block_dim=block_dim,
        )
        direct = _DirectCall(self._command) if _DirectCall.possible(self._command) else None
        self._run: Callable[[], None] = direct or self._command.launch
        self.resize: Callable[[int], None] = direct.resize if direct else self._command.set_dim
        """Sets the number of threads of a launch with one axis."""
        self.put: Callable[[int, int], None] = direct.put if direct else self._command.set_param_at_index
        """Replaces the integer argument of this index."""

    def __call__(self) -> None:
        tracer = tracing.active
        if tracer is None:
            self._run()
            return
        with tracer.span(self._kernel.func.__name__.strip("_"), self._kernel, self._command.bounds.size):
            self._run()


class Pool(Generic[T]):
    """Prepared objects by key; one is borrowed by one caller at a time, the least recently used keys are
    forgotten.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._idle: OrderedDict[Hashable, list[T]] = OrderedDict()

    @contextlib.contextmanager
    def borrow(self, *key: Any) -> Iterator[T]:
        """Lends the object made by `make(*key)`."""
        idle = self._idle.setdefault(key, [])
        try:
            item = idle.pop()
        except IndexError:
            with PREPARING, torch.inference_mode(False):
                item = self._make(*key)
        try:
            yield keep(item)
        finally:
            if getattr(item, "nbytes", 0) <= KEPT_BYTES:
                idle.append(item)
            if len(self._idle) > KEPT:
                with contextlib.suppress(KeyError):
                    self._idle.popitem(last=False)


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


_HOME = os.getpid()
_pending: dict[int, _Work] = {}
_backoff = Backoff()


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _take_tasks(call: int | None) -> None:
    _pending[call or 0].take()


@functools.cache
def _team() -> Callable[..., None] | None:
    """Starts a team of OpenMP threads, if torch brought the GNU runtime along: (function, argument, threads,
    flags).

    Its threads spin for some milliseconds behind every parallel operation of torch's. Threads of our own
    would wait for a core all that time; these are the ones that hold it.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        with contextlib.suppress(OSError, AttributeError):
            start = ctypes.CDLL(str(path)).GOMP_parallel
            start.argtypes = (type(_take_tasks), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            start.restype = None
            return start
    return None


@functools.lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    # keyed by process: threads do not survive a fork
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="warp-sims")


def in_parallel(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs the tasks at once, some of them on this thread. Warp's CPU kernels are serial and leave the
    GIL free.
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
        futures = [_threads(os.getpid()).submit(task) for task in tasks[1:]]
        try:
            tasks[0]()
        finally:
            for future in futures:
                future.result()
        return
    call, start = id(work), time.perf_counter_ns()
    _pending[call] = work
    try:
        team(_take_tasks, call, len(tasks), 0)
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

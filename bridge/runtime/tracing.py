"""What runs when: launches and named parts of a pass, recorded while somebody asks for it.

Nothing is recorded, and next to nothing paid, unless `trace` is open: a launch reads one name. Times are
those of the host's clock on a CPU and of events on the current stream on a GPU, where a span is as long as
the device took.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class Event(NamedTuple):
    """One launch or one named part."""

    name: str
    """Function of the kernel, or what the part is called."""
    kernel: Any
    """The Warp kernel; None for a part."""
    dim: int
    """Threads of the launch, 0 for a part."""
    thread: int
    start: int
    """ns since the trace began."""
    end: int
    operations: int
    """Floating-point operations of torch's products in it, where the trace counts them."""


class Tracer:
    """Collects the events of one device; see `trace`."""

    def __init__(self, device: torch.device, count: Callable[[], int] | None) -> None:
        self._device = device
        self._count = count
        self._marks: list[tuple[str, Any, int, int, Any, Any, int]] = []
        self._origin = self._mark()

    def span(self, name: str, kernel: Any = None, dim: int = 0) -> contextlib.AbstractContextManager[Any]:
        """Context whose time is recorded."""
        return _Span(self, name, kernel, dim)

    def add(self, name: str, kernel: Any, dim: int, thread: int, start: int, end: int) -> None:
        """Records a launch that was timed elsewhere, on a CPU: ns of `time.perf_counter_ns`."""
        self._marks.append((name, kernel, dim, thread, start, end, 0))

    def events(self) -> list[Event]:
        """What was recorded so far, by start; waits for a GPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        made = [
            Event(name, kernel, dim, thread, self._since(start), self._since(end), operations)
            for name, kernel, dim, thread, start, end, operations in self._marks
        ]
        return sorted(made, key=lambda event: (event.start, -event.end))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _since(self, mark: Any) -> int:
        if self._device.type != "cuda":
            return mark - self._origin
        return round(1e6 * self._origin.elapsed_time(mark))


class _Span:
    # a class and no generator: entered for every launch
    __slots__ = ("_before", "_dim", "_kernel", "_name", "_start", "_tracer")

    def __init__(self, tracer: Tracer, name: str, kernel: Any, dim: int) -> None:
        self._tracer, self._name, self._kernel, self._dim = tracer, name, kernel, dim

    def __enter__(self) -> None:
        count = self._tracer._count
        self._before = 0 if count is None else count()
        self._start = self._tracer._mark()

    def __exit__(self, *error: Any) -> None:
        t = self._tracer
        end = t._mark()
        operations = 0 if t._count is None else t._count() - self._before
        t._marks.append(
            (self._name, self._kernel, self._dim, threading.get_ident(), self._start, end, operations)
        )


active: Tracer | None = None
"""The open trace of this process."""


@contextlib.contextmanager
def trace(device: torch.device, count: Callable[[], int] | None = None) -> Iterator[Tracer]:
    """Records until it is left, everything that this process launches.

    Args:
        device: Whose clock is read.
        count: Returns the floating-point operations that torch has done so far; asked at both ends of an
            event.

    Raises:
        RuntimeError: another trace is open.
    """
    global active
    if active is not None:
        raise RuntimeError("trace: another trace of this process is open; one can record at a time")
    active = Tracer(device, count)
    try:
        yield active
    finally:
        active = None


def span(name: str) -> contextlib.AbstractContextManager[Any]:
    """Context of a named part, recorded while a trace is open."""
    return contextlib.nullcontext() if active is None else active.span(name)

"""What `profile` returns: plain frozen data, as a table, as JSON, and as a Chrome trace."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..bridge.runtime.tracing import Event
from .ceilings import Ceilings
from .resources import Resources

__all__ = [
    "AgainstRow",
    "FlowProfile",
    "KernelProfile",
    "Memory",
    "Pass",
    "Profile",
    "Row",
    "Spread",
    "spread",
]

FORMAT = 1
"""Version of the JSON."""


class Spread(NamedTuple):
    """Median and quartiles over the repeats."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel, wide product or part of torch's in one pass."""

    name: str
    calls: int
    """Launches a pass; 0 for what lies between."""
    threads: int
    """Host threads that it ran on."""
    time: Spread
    """Wall time [s]: where several threads run at once, each has its part of it."""
    share: float
    """Of the pass."""
    operations: int | None
    """Floating-point operations of matrix products done in a pass; None where they are not counted."""
    bytes: int | None
    """Bytes of the arrays read and written in a pass, each once; None where they are not counted."""

    @property
    def flops(self) -> float | None:
        """Achieved operations per second."""
        return self.operations / self.time.median if self.operations and self.time.median else None

    @property
    def byte_rate(self) -> float | None:
        """Achieved bytes per second."""
        return self.bytes / self.time.median if self.bytes and self.time.median else None


@dataclasses.dataclass(frozen=True)
class Pass:
    """The forward or the backward pass of a flow."""

    time: Spread
    """Wall time without tracing [s]."""
    traced: Spread
    """Wall time while the rows were recorded [s]; they add up to it."""
    rows: tuple[Row, ...]
    """The longest first."""
    needed: int | None
    """Operations of matrix products that the mathematics needs; None without a fused policy."""
    events: tuple[Event, ...] = dataclasses.field(repr=False)
    """Of the last repeat, for the trace."""
    span: tuple[int, int]
    """When the last repeat began and ended, in the clock of its events [ns]."""


@dataclasses.dataclass(frozen=True)
class FlowProfile:
    """Both passes of one flow."""

    flow: str
    """Its letter."""
    forward: Pass
    backward: Pass
    ratio: Spread
    """Time of the backward over that of the forward pass, repeat by repeat."""

    @property
    def flops(self) -> float | None:
        """Needed operations of both passes per second of both."""
        if self.forward.needed is None or self.backward.needed is None:
            return None
        time = self.forward.time.median + self.backward.time.median
        return (self.forward.needed + self.backward.needed) / time


@dataclasses.dataclass(frozen=True)
class Memory:
    """A tensor that the forward pass keeps for the backward pass."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class KernelProfile:
    """How long a kernel takes to compile, and what it takes of a GPU."""

    name: str
    cpu_seconds: float | None
    """Compiling its module for a CPU, cold; None where it was not (it runs on GPUs, or was not asked for)."""
    resources: Resources | None
    """None where it does not run on GPUs (torch does its work there), or without ptxas."""


@dataclasses.dataclass(frozen=True)
class AgainstRow:
    """One way to a gradient, beside the hand-written adjoints."""

    what: str
    """"simulate" (open loop) or "rollout" (with the policy, flow R)."""
    way: str
    forward: Spread
    """[s]"""
    backward: Spread
    """[s]"""
    launches: int | None
    """Kernels of a backward pass; None where not counted."""
    error: float
    """Norm of the difference to the gradient in float64, relative to its norm: the hand-written one, unless
    by finite differences that is wrong and the generated one is right; a note says so.
    """


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of a rollout and its gradients goes; see `profile`. `print(result)` shows the table."""

    system: str
    policy: str
    fused: bool
    """Whether the policy runs inside the sweeps."""
    device: str
    machine: str
    threads: int
    """Of torch, which the engine uses too."""
    dtype: str
    batch: int
    horizon: int
    loss: str
    repeats: int
    ceilings: Ceilings
    flows: tuple[FlowProfile, ...]
    memory: tuple[Memory, ...]
    kernels: tuple[KernelProfile, ...]
    arch: int
    """Architecture of `KernelProfile.resources`, 90 for sm_90."""
    ptxas: bool
    """Whether there was a ptxas to tell the resources."""
    against: tuple[AgainstRow, ...]
    versions: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Returns everything as lines of text, 110 columns wide."""
        from .table import lines_of

        return "\n".join(lines_of(self))

    def to_json(self) -> str:
        """Returns everything but the single events as JSON; times in seconds, rates per second.

        A number that is not finite, such as the error of a gradient that overflows, is null.
        """
        return json.dumps(_plain(self) | {"format": FORMAT}, indent=1)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the last repeat of every flow as a Chrome trace, for chrome://tracing or ui.perfetto.dev.

        A flow is a process of its own in it, a host thread (or the stream of a GPU) a line.
        """
        entries: list[dict[str, Any]] = []
        for pid, flow in enumerate(self.flows, start=1):
            entries += _trace_of(pid, flow, self.device)
        Path(path).write_text(
            json.dumps(
                {"traceEvents": entries, "displayTimeUnit": "ms", "otherData": {"device": self.device}}
            ),
            encoding="utf-8",
        )


_RATES = {Row: ("flops", "byte_rate"), FlowProfile: ("flops",)}


def _plain(value: Any) -> Any:
    """Dictionaries and lists of a result, with the rates that it derives, without single events."""
    if dataclasses.is_dataclass(value):
        hidden = ("events", "span")
        names = [f.name for f in dataclasses.fields(value) if f.name not in hidden]
        names += _RATES.get(type(value), ())
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, (Spread, Ceilings, Resources)):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such number
    return value


def _trace_of(pid: int, flow: FlowProfile, device: str) -> list[dict[str, Any]]:
    """Events of one flow in the format of Chrome's trace viewer, times in µs."""
    start = min(flow.forward.span[0], flow.backward.span[0])
    passes = {"forward": flow.forward, "backward": flow.backward}
    # the thread that called comes first, whatever numbers the system gave
    threads: dict[int, int] = {}
    for one in passes.values():
        for event in one.events:
            threads.setdefault(event.thread, len(threads))
    entries: list[dict[str, Any]] = [_named("process_name", pid, 0, f"flow {flow.flow}")]
    entries += [_named("thread_name", pid, 0, "passes")]
    entries += [
        _named("thread_name", pid, 1 + number, f"thread {number}" if device == "cpu" else "stream")
        for number in threads.values()
    ]
    for name, one in passes.items():
        first, last = one.span
        entries.append(_complete(f"{flow.flow} {name}", "pass", pid, 0, first - start, last - first, {}))
        for event in one.events:
            begun = max(event.start, first)
            kind = "launch" if event.kernel is not None else "part"
            arguments = {"threads": event.dim} if event.dim else {}
            entries.append(
                _complete(
                    event.name,
                    kind,
                    pid,
                    1 + threads[event.thread],
                    begun - start,
                    min(event.end, last) - begun,
                    arguments,
                )
            )
    return entries


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _complete(
    name: str, kind: str, pid: int, tid: int, start: int, time: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "pid": pid,
        "tid": tid,
        "ts": start / 1e3,
        "dur": time / 1e3,
        "args": arguments,
    }

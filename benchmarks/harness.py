"""What the benchmarks share: contestants in turns, first calls and memory in fresh processes, tables.

A contestant is an object with `update()` (one whole update, done when it returns) and `gradients()`; see
peers/README.md. A row is what one problem gave, ready for JSON: its `columns` name it, `contestants` and
`ratios` hold the results.
"""

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("warp-sims", "warp-lang", "torch", "jax", "jaxlib", "optax", "numpy")

Row = dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """Where a contestant is found. Imported late: what is not asked for stays out of the process.

    Attributes:
        module: Module that holds it.
        name: Its class.
        plan: Its `plan=` argument, if it has several ways to go.
        needs: Packages that the class imports when it is built.
    """

    module: str
    name: str
    plan: str = ""
    needs: tuple[str, ...] = ()

    def load(self) -> Callable:
        """Import it and what it needs."""
        for package in self.needs:
            importlib.import_module(package)
        made = getattr(importlib.import_module(self.module), self.name)
        return partial(made, plan=self.plan) if self.plan else made


# Time


@dataclass
class Entry:
    """A contestant in one row.

    Attributes:
        name: Name in the tables.
        entrant: Where it comes from.
        contestant: The object itself.
        gradient_error: Found beforehand.
        count: Updates per turn.
        times_ms: One time per turn.
    """

    name: str
    entrant: Entrant
    contestant: Any
    gradient_error: float
    count: int = 1
    times_ms: list[float] = field(default_factory=list)


def turn(entry: Entry) -> float:
    """Milliseconds per update, over `entry.count` updates after one that is not counted."""
    entry.contestant.update()
    start = time.perf_counter_ns()
    for _ in range(entry.count):
        entry.contestant.update()
    return (time.perf_counter_ns() - start) / entry.count / 1e6


def measure(entries: Sequence[Entry], repeats: int, block: float) -> None:
    """Fill in `times_ms` in `repeats` rounds, contestants taking turns.

    Args:
        entries: The contestants.
        repeats: Number of rounds; who begins changes from round to round.
        block: Seconds per turn, about.
    """
    for entry in entries:
        # The first turn may compile; the second tells how many updates fit into a block.
        turn(entry)
        entry.times_ms, entry.count = [], 1
        entry.count = max(1, min(100, round(1e3 * block / turn(entry))))
    for i in range(repeats):
        shift = i % len(entries)
        for entry in [*entries[shift:], *entries[:shift]]:
            entry.times_ms.append(turn(entry))


def fastest(entries: Sequence[Entry], block: float) -> Entry:
    """The fastest of several plans, by a short trial in turns."""
    if len(entries) > 1:
        measure(entries, 5, block)
    return min(entries, key=lambda entry: statistics.median(entry.times_ms or [0.0]))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(entry: Entry, ours: Entry) -> dict[str, Any]:
    """Time of a contestant over ours, round by round."""
    low, middle, high = quartiles([t / o for t, o in zip(entry.times_ms, ours.times_ms, strict=True)])
    return {"median": middle, "quartiles": [low, high]}


# First calls and memory


def in_fresh_process(script: str, entrant: Entrant, case: Mapping[str, Any], ours: bool) -> dict[str, float]:
    """First call and memory of a contestant, see `first_call_and_memory`.

    Warp keeps compiled kernels on disk. The process starts without any; for ours, a second process tells
    how long the first call takes with the kernels that the first one left.

    Args:
        script: Benchmark to start with `--job JSON`; prints `first_call_and_memory`.
        entrant: The contestant.
        case: The problem, ready for JSON.
        ours: Whether it is ours.
    """
    with tempfile.TemporaryDirectory() as cache:
        result = _spawn(script, entrant, case, cache)
        if ours:
            result["first_call_cached_s"] = _spawn(script, entrant, case, cache)["first_call_s"]
    return result


def _spawn(script: str, entrant: Entrant, case: Mapping[str, Any], cache: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, script, "--job", json.dumps({"entrant": asdict(entrant), "case": case})],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "WARP_CACHE_PATH": cache},
    )
    if done.returncode:
        raise RuntimeError(f"{entrant.name} failed in a fresh process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def first_call_and_memory(entrant: Entrant, build: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the first update, and peak memory in MiB above the process after imports.

    Memory is given over everything, compiling included, and over later updates alone.
    """
    entrant.load()
    base = _status_mib("VmRSS")
    _reset_peak()
    contestant = build()
    start = time.perf_counter()
    contestant.update()
    first_call = time.perf_counter() - start
    peak_first = _status_mib("VmHWM")
    _reset_peak()
    for _ in range(5):
        contestant.update()
    peak = _status_mib("VmHWM")
    return {
        "first_call_s": first_call,
        "peak_mib": max(peak, peak_first) - base,
        "peak_updates_mib": peak - base,
    }


# Not ru_maxrss: that of a child counts what its parent had before exec; a large parent hides a small child.


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}: memory is measured on Linux only, see --no-fresh")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# Reports


def environment() -> dict[str, Any]:
    """Machine and versions."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0].strip() if models else cpu
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.system(),
        "versions": versions,
    }


def tables(rows: Sequence[Row], names: Sequence[str], ours: str) -> list[str]:
    """Lines of Markdown: times and ratios, then first calls and memory where measured, then notes."""
    names = [name for name in names if any(name in row["contestants"] for row in rows)]
    peers = [name for name in names if name != ours and ours in names]
    out = _head([*rows[0]["columns"], *(f"{name} [ms]" for name in names), *(f"{p} / ours" for p in peers)])
    for row in rows:
        cells = [str(value) for value in row["columns"].values()]
        for name in names:
            result = row["contestants"].get(name)
            cells.append(
                _spread(result["median_ms"], result["quartiles_ms"], result["plan"]) if result else "-"
            )
        for name in peers:
            ratio = row["ratios"].get(name)
            cells.append(_spread(ratio["median"], ratio["quartiles"]) if ratio else "-")
        out.append(_line(cells))
    if any("peak_mib" in result for row in rows for result in row["contestants"].values()):
        out += _fresh_table(rows, names)
    remarks = [f"- {_title(row)}: {text}" for row in rows for text in row["notes"]]
    return [*out, "", *remarks] if remarks else out


def _fresh_table(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    heads = [f"{name} {what}" for name in names for what in ("first call [s]", "peak [MiB]")]
    out = [
        "",
        "In a fresh process: first call, compiling included (in parentheses, ours with kernels on disk);",
        "peak memory above the process after imports, of later updates (in parentheses: with the first).",
        "",
        *_head([*rows[0]["columns"], *heads]),
    ]
    for row in rows:
        cells = [str(value) for value in row["columns"].values()]
        for name in names:
            result = row["contestants"].get(name, {})
            if "peak_mib" not in result:
                cells += ["-", "-"]
                continue
            cached = f" ({result['first_call_cached_s']:.2f})" if "first_call_cached_s" in result else ""
            cells.append(f"{result['first_call_s']:.2f}{cached}")
            cells.append(f"{result['peak_updates_mib']:.0f} ({result['peak_mib']:.0f})")
        out.append(_line(cells))
    return out


def _title(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["columns"].items())


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), f"|{'---|' * len(names)}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(middle: float, ends: Sequence[float], suffix: str = "") -> str:
    return f"{middle:.3g} [{ends[0]:.3g}, {ends[1]:.3g}] {suffix}".strip()

"""Times in turns, and first calls and memory in processes of their own."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .case import Case
from .contestants import Contestant, Entrant

_WARM = 0.05
"""Seconds above which an update needs none before it to bring the caches back."""
PAUSE = 0.1
"""Seconds of rest before a turn, because the threads of the contestant before it look for more work for a
while: those of JAX took half a core from the next one for 30 to 40 ms.
"""


@dataclasses.dataclass
class Runner:
    """A contestant in one row.

    Attributes:
        entrant: Who it is.
        plan: The plan it takes.
        contestant: The object itself.
        first_s: Seconds of its first update in this process, what it had to compile included.
        seconds: Of an update, about.
        times: Seconds per update, one for each turn.
    """

    entrant: Entrant
    plan: str
    contestant: Contestant
    first_s: float = 0.0
    seconds: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def turn(runner: Runner, block: float, warm: bool = False) -> float:
    """Seconds per update, over updates that fill `block` seconds, after a pause, and after an update that is
    not counted where these are short, or if `warm`.
    """
    time.sleep(PAUSE)
    update = runner.contestant.update
    if warm or runner.seconds < _WARM:
        update()
    count = max(1, min(100, round(block / max(runner.seconds, 1e-6))))
    return timed(lambda: [update() for _ in range(count)])[0] / count


def measure(runners: Sequence[Runner], rounds: int, block: float, warm: bool = False) -> None:
    """Fills in `times` in rounds: contestants take turns, and who begins changes from round to round.

    A change of the machine's speed meets all of them, and ratios are taken within a round. `warm`: every turn
    begins with an update that is not counted, because the one before was of another size, whose memory this
    one cannot use.
    """
    for runner in runners:
        runner.times = []
    collecting = gc.isenabled()
    gc.disable()  # as timeit does
    try:
        for i in range(rounds):
            shift = i % len(runners)
            for runner in [*runners[shift:], *runners[:shift]]:
                runner.times.append(turn(runner, block, warm))
    finally:
        if collecting:
            gc.enable()


def fastest(runners: Sequence[Runner], block: float, rounds: int = 3) -> Runner:
    """The fastest of several plans, by a short trial in turns."""
    if len(runners) > 1:
        measure(runners, rounds, block)
    return min(runners, key=lambda runner: statistics.median(runner.times or [0.0]))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, ready for JSON."""
    low, middle, high = quartiles(values)
    return {"median": middle, "quartiles": [low, high]}


# Processes of their own


def in_fresh_process(entrant: Entrant, case: Case, plan: str, timeout: float) -> dict[str, float]:
    """First call and memory of a contestant, see `first_call_and_memory`.

    Compiled kernels are kept on disk, by Warp and by torch. The process starts without any; for ours, a
    second process tells how long the first call takes with the kernels that the first one left.

    Raises:
        RuntimeError: the process failed; its last line of output.
        subprocess.TimeoutExpired: it took too long.
    """
    with tempfile.TemporaryDirectory() as cache:
        result = _spawn(entrant, case, plan, cache, timeout)
        if entrant.ours:
            result["first_call_cached_s"] = _spawn(entrant, case, plan, cache, timeout)["first_call_s"]
    return result


def _spawn(entrant: Entrant, case: Case, plan: str, cache: str, timeout: float) -> dict[str, float]:
    job = {"entrant": dataclasses.asdict(entrant), "case": dataclasses.asdict(case), "plan": plan}
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    caches = {"WARP_CACHE_PATH": f"{cache}/warp", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    done = subprocess.run(
        [sys.executable, "-m", "warp_sims.bench.worker", json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **caches, "PYTHONPATH": path},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def first_call_and_memory(entrant: Entrant, case: Case, plan: str, updates: int = 5) -> dict[str, float]:
    """Seconds of the first update, and peak memory in MiB above the process after imports.

    On a CPU that of the process, over everything, compiling included (`peak_mib`), and over later updates
    alone (`peak_updates_mib`). On a GPU what the process holds on it after the updates, above a bare
    context: the allocators of torch, JAX and Warp keep what they had at their peak.
    """
    entrant.unavailable(case.device)  # imports what it needs
    case.peer_arguments()  # and what building the case needs
    on_gpu = case.device != "cpu"
    if on_gpu:
        torch.zeros(1, device=case.device)
    base = _device_mib(case.device) if on_gpu else _status_mib("VmRSS")
    if not on_gpu:
        _reset_peak()
    contestant = entrant.build(case, plan)
    first_call = timed(contestant.update)[0]
    if on_gpu:
        for _ in range(updates):
            contestant.update()
        held = _device_mib(case.device) - base
        return {"first_call_s": first_call, "peak_mib": held, "peak_updates_mib": held}
    peak_first = _status_mib("VmHWM")
    _reset_peak()
    for _ in range(updates):
        contestant.update()
    peak = _status_mib("VmHWM")
    return {
        "first_call_s": first_call,
        "peak_mib": max(peak, peak_first) - base,
        "peak_updates_mib": peak - base,
    }


def _device_mib(device: str) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**20


# Not ru_maxrss: that of a child counts what its parent had before exec; a large parent hides a small child.


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}: memory is measured on Linux only")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")

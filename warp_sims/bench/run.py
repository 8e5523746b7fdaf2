"""`warp-sims bench`: training updates of the published problems, ours beside its peers, in one run.

A row is a problem, a device, a number of worlds and a flow. Every contestant of a row is built and makes its
first update, whose loss and gradients are compared with float64 ones (`bench.case`). Then all take turns in
this process, so that a change of the machine's speed concerns all of them. A contestant whose numbers are
wrong is not timed. One that is too slow for the time limit is left out. The report names both. If growth is
measured (`Settings.scaling`), the rows of all sizes and flows take turns, for the same reason. Peak memory
and first calls, compiling included, are measured in fresh processes. The machine's ceilings are measured in
the same run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..profiling.ceilings import copy_rate, matrix_product_rate
from ..training.provenance import machine, versions
from .case import (
    FLOWS,
    Case,
    Errors,
    Reference,
    benched,
    errors,
    needed_bytes,
    needed_operations,
    reference,
)
from .contestants import Entrant, default_folder, entrants
from .ensemble import run_ensembles
from .settings import LEAST_ROUNDS, Settings
from .timing import Runner, fastest, in_fresh_process, measure, quartiles, spread, timed

FORMAT = 1
"""Of the JSON file; grows when a name in it changes."""

MEMORY_BATCHES = (8, 1024)
"""Numbers of worlds at which memory is measured."""

# Plans that lost clearly at this many worlds are not tried at more: what pays for few worlds has been seen.
_PRUNED_FROM, _PRUNED_AT = 256, 1.5
_PROCESS_LIMIT = 300.0

Row = dict[str, Any]


def bench(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures everything that the settings name.

    Args:
        settings: What to measure.
        say: Called with every line of progress.

    Returns:
        The report, ready for JSON and for `bench.report`.

    Raises:
        ValueError: no contestant can run.
    """
    started = time.perf_counter()
    folder = settings.peers or default_folder()
    skipped: list[str] = []

    def skip(text: str) -> None:
        skipped.append(text)
        say(text)

    if folder is None and not settings.ensemble:
        skip(
            "peers: skipped, they live in benchmarks/peers of the repository; run from a checkout or give "
            "--peers DIR"
        )
    report: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _machine(),
        "versions": {**versions(), **_peer_versions()},
        "settings": {**dataclasses.asdict(settings), "peers": None},
        "skipped": skipped,
        "rows": [],
        "memory": [],
        "ensembles": [],
    }
    report["ceilings"] = {device: _ceilings(device) for device in settings.devices}
    for device, reached in report["ceilings"].items():
        say(
            f"{device}: matrix product {reached['flops'] / 1e9:.0f} GFLOP/s, "
            f"copy {reached['bytes'] / 1e9:.0f} GB/s"
        )
    if settings.ensemble:
        for case in settings.cases():
            say(_label(case))
            report["ensembles"].append(run_ensembles(case, settings, lambda text: say(f"  {text}")))
        report["seconds"] = round(time.perf_counter() - started, 1)
        return report
    chosen = entrants(settings.contestants, folder)
    for entrant in list(chosen):
        if settings.contestants is None and entrant.name in settings.without:
            chosen.remove(entrant)
            skip(f"{entrant.name}: left out, it compiles for long; name it with --contestants")
    for entrant in chosen:
        if entrant.ours or entrant.unavailable(settings.devices[0]):
            continue
        unknown = [p for p in settings.problems if p not in entrant.problems()]
        if unknown:
            skip(f"{entrant.name}: does not have {', '.join(unknown)}")
    fields = {device: _field(chosen, device, skip) for device in settings.devices}
    if not any(fields.values()):
        raise ValueError("bench: no contestant can run: " + "; ".join(skipped))
    history: dict[Any, _Past] = {}
    for cases in _together(settings):
        rows = run_rows(cases, fields[cases[0].device], settings, history, say)
        report["rows"] += rows
    if settings.memory:
        say("first calls and memory, in fresh processes")
        report["memory"] = list(_memory(settings, fields, report["rows"], say))
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {**machine(), "load": round(os.getloadavg()[0], 2), "gpus": gpus}


def _peer_versions() -> dict[str, str]:
    found = {}
    for package in ("jax", "jaxlib", "optax"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _ceilings(device: str) -> dict[str, float]:
    return {"flops": matrix_product_rate(device), "bytes": copy_rate(device)}


def _field(chosen: Sequence[Entrant], device: str, skip: Callable[[str], None]) -> list[Entrant]:
    """Those who can run on a device; says why of the others."""
    found = []
    for entrant in chosen:
        reason = entrant.unavailable(device)
        if reason:
            skip(f"{entrant.name} on {device}: skipped, {reason}")
        else:
            found.append(entrant)
            if set(entrant.flows()) != set(FLOWS):
                skip(f"{entrant.name}: flow {' '.join(entrant.flows())} only")
    return found


def _label(case: Case) -> str:
    size = f", {benched(case.problem).scaled[0]} {case.size}" if case.size else ""
    sizes = f"batch {case.batch}, {case.horizon} steps{size}"
    return f"{case.problem} {case.network}, {case.device}, {sizes}, {case.flow}"


def _together(settings: Settings) -> Iterator[list[Case]]:
    """The cases that take turns with one another: in the matrix each by itself, with --scaling all sizes and
    flows of a problem.
    """
    if not settings.scaling:
        yield from ([case] for case in settings.cases())
        return

    def kind(case: Case) -> tuple:
        return case.device, case.problem, case.widths, 0 if settings.scaling == "worlds" else case.batch

    for _, group in itertools.groupby(settings.cases(), kind):
        yield list(group)


# One row, or several


@dataclasses.dataclass
class _Past:
    """What an earlier row told of a contestant: seconds per update of its plans at a number of worlds."""

    batch: int
    seconds: dict[str, float]


def run_rows(
    cases: Sequence[Case],
    field: Sequence[Entrant],
    settings: Settings,
    history: dict[Any, _Past],
    say: Callable[[str], None],
) -> list[Row]:
    """Checks all contestants of some rows and times them in turns; see the top of this file."""
    entered: list[tuple[Row, list[Runner]]] = []
    for case in cases:
        say(_label(case))
        entered.append(_enter_all(case, field, settings, history, lambda text: say(f"  {text}")))
    every = [runner for _, runners in entered for runner in runners]
    if every:
        slowest = max(runner.seconds for runner in every)
        measure(every, settings.rounds_for(slowest), settings.block, warm=len(cases) > 1)
    for case, (row, runners) in zip(cases, entered, strict=True):
        if len(cases) > 1:
            say(_label(case))
        _fill_in(row, runners, lambda text: say(f"  {text}"))
    return [row for row, _ in entered]


def _enter_all(
    case: Case,
    field: Sequence[Entrant],
    settings: Settings,
    history: dict[Any, _Past],
    say: Callable[[str], None],
) -> tuple[Row, list[Runner]]:
    """A row without times, and who is to be timed in it."""
    row: Row = {
        "case": {**dataclasses.asdict(case), "horizon": case.horizon, "widths": list(case.widths)},
        "operations": needed_operations(case),
        "bytes": needed_bytes(case),
        "contestants": {},
        "ratios": {},
        "notes": [],
        "wrong": [],
    }

    def note(text: str) -> None:
        row["notes"].append(text)
        say(text)

    truth = reference(case)
    runners = []
    for entrant in field:
        if entrant.takes(case):
            runner = _enter(case, entrant, truth, settings, history, note, row)
            if runner is not None:
                runners.append(runner)
    return row, runners


def _fill_in(row: Row, runners: Sequence[Runner], say: Callable[[str], None]) -> None:
    """Writes the times of a row into it."""
    ours = next((runner for runner in runners if runner.entrant.ours), None)
    for runner in runners:
        row["contestants"][runner.entrant.name] |= {
            "plan": runner.plan,
            "first_update_s": runner.first_s,
            "seconds": spread(runner.times),
            "times": runner.times,
        }
        if ours is not None and runner is not ours:
            ratios = [t / o for t, o in zip(runner.times, ours.times, strict=True)]
            row["ratios"][runner.entrant.name] = spread(ratios)
        say(_line(row, runner))


def _line(row: Row, runner: Runner) -> str:
    name = runner.entrant.name
    result, ratio = row["contestants"][name], row["ratios"].get(name)
    low, middle, high = (1e3 * t for t in quartiles(runner.times))
    text = f"{name:14s} {runner.plan:6s} {middle:10.3f} ms [{low:.3f}, {high:.3f}]"
    text += f"  error {result['gradient_error']:.0e}"
    return text + (f"  {ratio['median']:.2f} times ours" if ratio else "")


def _enter(
    case: Case,
    entrant: Entrant,
    truth: Reference,
    settings: Settings,
    history: dict[Any, _Past],
    note: Callable[[str], None],
    row: Row,
) -> Runner | None:
    """Builds a contestant with its fastest plan and checks it; None, and a note, if it does not compete."""
    name = entrant.name
    allowed = settings.time_limit / LEAST_ROUNDS
    kind = (name, dataclasses.replace(case, batch=1))
    past = history.get(kind)
    if past is not None and past.batch >= 64:
        expected = min(past.seconds.values()) * case.batch / past.batch
        # twice as much: some costs do not grow with the worlds
        if expected > 2 * allowed:
            note(
                f"{name}: left out, {expected:.1f} s per update expected from {past.batch} worlds, "
                f"{allowed:.1f} allowed"
            )
            return None
    runners: list[Runner] = []
    found = Errors(0.0, 0.0)
    for plan in _plans(entrant, past):
        label = f"{name} {plan}".rstrip()
        try:
            runner, wrong = _first_updates(case, entrant, plan, truth)
        except Exception as error:  # a peer that fails must not end a run of half an hour
            row["wrong"].append(name)
            note(f"{label}: FAILED, {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None
        if not wrong.within(case):
            row["wrong"].append(name)
            note(
                f"{label}: WRONG, loss off by {wrong.loss:.1e}, gradients by {wrong.gradient:.1e}; not timed"
            )
            return None
        runners.append(runner)
        found = Errors(max(found.loss, wrong.loss), max(found.gradient, wrong.gradient))
    best = min(runner.seconds for runner in runners)
    history[kind] = _Past(case.batch, {runner.plan: runner.seconds for runner in runners})
    if best > allowed:
        note(f"{name}: left out, {best:.1f} s per update, {allowed:.1f} allowed")
        return None
    row["contestants"][name] = {"loss_error": found.loss, "gradient_error": found.gradient}
    return fastest([runner for runner in runners if runner.seconds <= 2 * best], settings.block / 2)


def _plans(entrant: Entrant, past: _Past | None) -> list[str]:
    """The plans to try: all, but those that lost clearly where there were many worlds already."""
    plans = list(entrant.plans())
    if past is None or past.batch < _PRUNED_FROM:
        return plans
    best = min(past.seconds.values())
    return [plan for plan in plans if past.seconds.get(plan, float("inf")) <= _PRUNED_AT * best]


def _first_updates(case: Case, entrant: Entrant, plan: str, truth: Reference) -> tuple[Runner, Errors]:
    """A contestant after its first two updates: the first is checked, the second tells how long one takes."""
    runner = Runner(entrant, plan, entrant.build(case, plan))
    runner.first_s, loss = timed(runner.contestant.update)
    wrong = errors(case, loss, runner.contestant.gradients(), truth)
    runner.seconds = timed(runner.contestant.update)[0]
    return runner, wrong


# Memory


def _memory(
    settings: Settings,
    fields: dict[str, list[Entrant]],
    rows: Sequence[Row],
    say: Callable[[str], None],
) -> Iterator[Row]:
    """First calls and memory of what was timed, flow R, at few numbers of worlds: processes take seconds."""
    for row in rows:
        case = case_of(row)
        if case.flow != "R" or case.batch not in MEMORY_BATCHES:
            continue
        result: Row = {"case": row["case"], "contestants": {}, "notes": []}
        for entrant in fields[case.device]:
            timed_one = row["contestants"].get(entrant.name)
            if timed_one is None:
                continue
            try:
                got = in_fresh_process(entrant, case, timed_one["plan"], _PROCESS_LIMIT)
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                result["notes"].append(f"{entrant.name}: not measured, {' '.join(str(error).split())[:200]}")
                say(f"  {result['notes'][-1]}")
                continue
            result["contestants"][entrant.name] = got
            say(
                f"  {_label(case)}: {entrant.name:14s} first call {got['first_call_s']:.1f} s, "
                f"peak {got['peak_updates_mib']:.0f} MiB, {got['peak_mib']:.0f} with the first call"
            )
        yield result


def case_of(row: Row) -> Case:
    """The case of a row."""
    return Case(**{**row["case"], "widths": tuple(row["case"]["widths"])})

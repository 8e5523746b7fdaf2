"""Planted mistakes, and what finds them.

    PYTHONPATH=tests python -m emulator.plants            prints the table that README.md keeps
    PYTHONPATH=tests python -m emulator.plants --write    and puts it there

A plant is one change of the text of one kernel, or a barrier that all lanes pass over. What finds it:

    numbers       other numbers than on a CPU, or NaN, in the order of the lanes
    orders        other bits in the reverse or a random order
    standstill    lanes that wait for each other for ever, or exchange what they must not
    index         an index beside a Warp array, which Warp's headers assert
    races         ThreadSanitizer
    bounds        AddressSanitizer, UBSan and the red zones around shared arrays
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import warp as wp
from torch import Tensor
from warp_sims.bridge.passes import fused, sweeps
from warp_sims.bridge.runtime import registry

import warp_sims as ws

from . import library, replay
from .device import CPU, Emulator
from .problems import TOLERANCE, Case, form_of_sweep, open_loop, relative_error

DTYPE = torch.float32


class Work(NamedTuple):
    """A launch to be spoilt."""

    kernel: str
    """Name of its function."""
    form: str
    """Of the forward sweep, see `problems.FORMS`."""
    run: Callable[[], list[Tensor]]
    """On whatever stands for the CPU."""


def _rollout(name: str, nworld: int = 6, horizon: int = 3) -> list[Tensor]:
    case = Case(name, DTYPE, nworld, horizon)
    p = registry.prepare(registry.register(case.system), DTYPE, CPU)
    states, controls, loss, hidden = fused.rollout(
        p, case.network, case.packed, case.x0, horizon, case.weights
    )
    # a CPU repeats the last world in rows of padding, or leaves zeros there: finite is what counts
    return [states, controls, loss, hidden * 0]


def _open_loop(system: ws.System) -> list[Tensor]:
    return open_loop(registry.prepare(registry.register(system), DTYPE, CPU), system, 5, 3, "R", True)


def _comparison() -> list[Tensor]:
    base, check = torch.randn(2, 2, 700, generator=torch.Generator().manual_seed(0))
    return list(sweeps.combine(base, check, False))


WORKS = {
    "resident": Work("resident_rollout", "worlds share a block", functools.partial(_rollout, "odd widths")),
    "resident, one world": Work("resident_rollout", "as chosen", functools.partial(_rollout, "quantum", 2)),
    "any network": Work("fused_rollout", "any network", functools.partial(_rollout, "guidance")),
    "any network, large state": Work(
        "fused_rollout", "any network", functools.partial(_rollout, "large herd")
    ),
    "composed": Work("fused_rollout", "any network", functools.partial(_rollout, "composed herd")),
    "adjoint": Work("adjoint", "as chosen", functools.partial(_open_loop, ws.CartPole(poles=2))),
    "adjoint, in memory": Work(
        "adjoint", "as chosen", functools.partial(_open_loop, ws.QuantumControl(points=17))
    ),
    "open loop, in memory": Work(
        "simulate", "as chosen", functools.partial(_open_loop, ws.QuantumControl(points=17))
    ),
    "loss": Work("loss", "as chosen", functools.partial(_open_loop, ws.CartPole(poles=2))),
    "comparison": Work("combine", "as chosen", _comparison),
}


class Plant(NamedTuple):
    """A mistake."""

    work: str
    """Of `WORKS`."""
    what: str
    """In words."""
    detector: str
    """What must find it."""
    old: str = ""
    """Text that is replaced, wherever it stands."""
    new: str = ""
    barrier: int = -1
    """Number of the barrier that is passed over, in the order of the text."""


BARRIERS = {
    "resident": 6,
    "resident, one world": 5,
    "any network": 5,
    "any network, large state": 5,
    "composed": 5,
}
"""How many barriers the text has."""

PLANTS = [
    *(
        Plant(w, f"barrier {i + 1} of {n} removed", "races", barrier=i)
        for w, n in BARRIERS.items()
        for i in range(n)
    ),
    Plant(
        "resident",
        "a barrier that one lane does not reach",
        "standstill",
        "  __syncthreads();",
        "  if (lane) __syncthreads();",
    ),
    Plant("resident", "mask of half a warp in an exchange", "standstill", "0xffffffffu", "0xffffu"),
    Plant("resident", "exchange over half of the lanes", "numbers", "bit < SPLIT", "bit < SPLIT / 2"),
    Plant(
        "resident",
        "rows of shared memory not cleared",
        "numbers",
        "i < WORLDS * ROW; i += THREADS) rows[i]",
        "i < 0; i += THREADS) rows[i]",
    ),
    Plant(
        "resident",
        "bias of the output not loaded",
        "numbers",
        "i < CONTROLS; i += THREADS)",
        "i < 0; i += THREADS)",
    ),
    Plant(
        "resident",
        "a unit written one place further",
        "numbers",
        "written[r * ROW] =",
        "written[r * ROW + 1] =",
    ),
    Plant("resident", "one component of the state too many", "bounds", "i < STATE", "i <= STATE"),
    Plant(
        "resident",
        "one piece of a row too many stored",
        "bounds",
        "i < WORLDS * ROW / LANES",
        "i <= WORLDS * ROW / LANES",
    ),
    Plant("resident", "control of a world given to the next", "bounds", "us[at] =", "us[at + 1] ="),
    Plant(
        "resident, one world",
        "a window one position too far",
        "numbers",
        "position * HOP",
        "(position + 1) * HOP",
    ),
    Plant(
        "any network",
        "padding of a row not cleared",
        "numbers",
        "i < section; ++i) to[i] = 0",
        "i < section; ++i) (void)to",
    ),
    Plant(
        "any network",
        "padding reads a world that is not there",
        "index",
        "(r < worlds ? r : worlds - 1)",
        "r",
    ),
    Plant(
        "any network",
        "control of a world that is not there",
        "bounds",
        "if (r < worlds) controls",
        "controls",
    ),
    Plant("any network", "one input of a layer too few", "numbers", "k < T[WINDOW]", "k < T[WINDOW] - 1"),
    Plant("any network", "one unit too few", "numbers", "at < width", "at < width - 1"),
    Plant(
        "any network",
        "padding of one row too many",
        "bounds",
        "at < 4 * T[FILL]",
        "at <= 4 * T[FILL]",
    ),
    Plant(
        "adjoint",
        "cotangent of the state one step late",
        "numbers",
        "var_adj_states, var_steps",
        "var_adj_states, var_steps - 1",
    ),
    Plant(
        "adjoint, in memory",
        "component of a cotangent one too high",
        "bounds",
        "states.data[k].c[i] = value",
        "states.data[k].c[i + 1] = value",
    ),
    Plant(
        "adjoint, in memory",
        "elimination begins beside the wall",
        "bounds",
        "substitute(y, N - 1 - k)",
        "substitute(y, N - k)",
    ),
    Plant("open loop, in memory", "a pair of rows too few", "numbers", "k < PAIRS", "k < PAIRS - 1"),
    Plant("loss", "cost of a step too far", "index", "wp::range(", "wp::range(1 + "),
    Plant(
        "comparison", "one component too many", "index", "var_begin, var_count", "var_begin, 1 + var_count"
    ),
]


class Found(NamedTuple):
    """What found a plant."""

    detectors: tuple[str, ...]
    """In the order of the list above; the sanitizers are asked only if nothing cheaper was asked for."""
    seconds: float
    """Of the one that must find it, without compiling."""


def _edit(plant: Plant, text: str) -> str:
    if not plant.old:
        return text
    assert plant.old in text, f"{plant.old!r} is not in the text of {plant.work}"
    return text.replace(plant.old, plant.new)


@contextlib.contextmanager
def _planted(plant: Plant) -> Iterator[Emulator]:
    """An emulator whose kernel of this name has the mistake."""
    work, emulator = WORKS[plant.work], Emulator()

    def spoilt(text: str) -> bool:
        return f"__locals__{work.kernel}_" in text or f"__locals___{work.kernel}_" in text

    if plant.old:
        emulator.edit = lambda text: _edit(plant, text) if spoilt(text) else text
    else:
        emulator.skip = lambda text: library.barriers(text)[1][plant.barrier] if spoilt(text) else 0
    with emulator.standing_in(), form_of_sweep(work.form):
        yield emulator


@functools.cache
def expected(work: str) -> list[Tensor]:
    """The numbers of the CPU."""
    return WORKS[work].run()


def _differs(found: list[Tensor], right: list[Tensor]) -> bool:
    errors = [relative_error(a, b) for a, b in zip(found, right, strict=True)]
    return not all(e <= TOLERANCE[DTYPE] for e in errors)


def _in_plain_mode(plant: Plant) -> dict[str, float]:
    """Detectors that need no sanitizer, with their seconds."""
    found: dict[str, float] = {}
    right = expected(plant.work)
    with _planted(plant) as emulator:
        run, first = WORKS[plant.work].run, None
        start = time.perf_counter()
        for emulator.order in range(3):
            try:
                own = run()
            except RuntimeError as error:
                if "thread" not in str(error):
                    raise
                detector = "index" if "not so" in str(error) else "standstill"
                found[detector] = time.perf_counter() - start
                break
            if first is None:
                first = own
                if _differs(own, right):
                    found["numbers"] = time.perf_counter() - start
            elif not all(torch.equal(a, b) for a, b in zip(first, own)):
                found.setdefault("orders", time.perf_counter() - start)
    return found


def _under_sanitizer(plant: Plant, mode: str) -> dict[str, float]:
    with _planted(plant) as emulator:
        # the launch is recorded as it should be, and goes wrong in the other process
        skip, emulator.skip, emulator.recorded = emulator.skip, lambda text: 0, []
        edit, emulator.edit = emulator.edit, lambda text: text
        WORKS[plant.work].run()
        launch = next(r for r in emulator.recorded if r.name == WORKS[plant.work].kernel)
        launch.command.text = edit(launch.command.text)
        line = skip(launch.command.text)
    library.build(launch.command.text, launch.command.entry, mode)
    start = time.perf_counter()
    said = replay.check(launch, mode, skip=line)
    if not said:
        return {}
    word = {"races": "data race", "bounds": "runtime error|AddressSanitizer|not so"}[mode]
    assert any(w in said for w in word.split("|")), said
    return {mode: time.perf_counter() - start}


def find(plant: Plant, everything: bool = False) -> Found:
    """Asks the detector that must find a plant, or all of them."""
    found: dict[str, float] = {}
    plain = plant.detector not in ("races", "bounds")
    # in plain mode an index beside an array would write there
    if plain or (everything and plant.detector == "races"):
        found |= _in_plain_mode(plant)
    if not plain:
        found |= _under_sanitizer(plant, plant.detector)
    return Found(tuple(found), found.get(plant.detector, 0.0))


def table() -> str:
    """The table of README.md."""
    wp.config.log_level = wp.LOG_ERROR
    rows = ["| kernel | plant | found by | seconds |", "|---|---|---|---|"]
    for plant in PLANTS:
        found = find(plant, everything=True)
        assert plant.detector in found.detectors, f"{plant}: {found}"
        rows.append(f"| {plant.work} | {plant.what} | {', '.join(found.detectors)} | {found.seconds:.2f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Prints the table."""
    made = table()
    print(made)
    if "--write" in sys.argv[1:]:
        page = Path(__file__).with_name("README.md")
        begin, end = "<!-- plants -->\n", "<!-- /plants -->\n"
        before, rest = page.read_text().split(begin)
        page.write_text(before + begin + made + end + rest.split(end)[1])


if __name__ == "__main__":
    main()

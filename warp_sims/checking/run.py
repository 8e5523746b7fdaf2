"""The function behind `warp-sims check`."""

import time
from collections.abc import Sequence
from typing import Any

import torch
import warp as wp

from ..arguments import check_count, usable_device
from ..bridge.runtime.arrays import WARP_DTYPE
from ..bridge.runtime.contract import functions_of
from ..plans import check_system
from ..systems import System
from .compare import exactly
from .forms import Form, forms_of
from .functions import check_functions, draw_points, no_finite_step
from .report import CheckReport, Comparison
from .rollouts import check_rollouts
from .sizes import check_sizes

__all__ = ["PARTS", "check"]

PARTS = ("sizes", "functions", "rollouts")
"""What can be checked, in this order; what a part needs must have agreed."""


def check(
    system: System,
    *,
    parts: Sequence[str] = PARTS,
    points: int = 12,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CheckReport:
    """Checks that a system is what it says, and that its adjoint is that of its step in every form it comes
    in.

        report = ws.check(Pendulum())
        assert report.agrees, report

    Sizes are compared with the device functions before anything is compiled. Then step and loss are
    differentiated by every state and control, in float64, by finite differences at ten step lengths. The
    adjoints must agree with these: by value, in vector lanes (CPUs) and in memory, whichever the system has.
    The forms must agree with each other, float32 with float64, and 1, 3 and 17 worlds with more. Outputs are
    filled with NaN before, and two runs must give the same bits. Gradients of whole rollouts are compared
    under R, M, N and S with finite differences of rollouts whose closed edges read a fixed trajectory, and C
    with M and R.

    A number is left out, and counted, if one-sided differences disagree (a kink such as that of `max`) or
    finite differences do not converge. If nothing is left for a pair of an output and an input, the report
    names it as not checked.

    Args:
        system: The system, built in or your own. What it does not have (a loss, further forms, initial
            states) is not checked.
        parts: Some of "sizes", "functions", "rollouts".
        points: States and controls at which step and loss are tried, about: a third of each kind, the
            system's own initial states, the same with noise, and states that random controls lead to.
        seed: Seed of everything random.
        device: "cpu", "cuda" or "cuda:INDEX". The form in lanes is checked on a CPU only.

    Returns:
        `CheckReport`: print it, ask `agrees`, or take `disagreements` or `to_json()`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """
    place = _checked(system, parts, points, seed, device)
    start = time.perf_counter()
    comparisons: list[Comparison] = check_sizes(system)
    notes: list[str] = []
    sound = all(comparison.agrees for comparison in comparisons)
    if "sizes" not in parts and sound:
        comparisons = []
    if sound and set(parts) - {"sizes"}:
        failed = _compile(system, place)
        comparisons += failed
        sound = not failed
    if sound and "functions" in parts:
        more, said = check_functions(system, place, points, seed)
        comparisons += more
        notes += said
    if sound and "rollouts" in parts:
        form = _by_value(system, place)
        drawn = draw_points(system, form, points, seed)
        # without any, the step is not finite anywhere
        comparisons += check_rollouts(system, form, drawn, seed) if len(drawn.x) else [no_finite_step()]
    if not sound:
        notes.append("the rest was not checked: mend this first")
    left = sum(comparison.left_out for comparison in comparisons)
    if left:
        notes.append(
            f"{left} numbers were left out: there the step has a kink or finite differences do not settle"
        )
    return CheckReport(
        repr(system), str(place), tuple(comparisons), tuple(notes), time.perf_counter() - start
    )


def _by_value(system: System, device: torch.device) -> Form:
    return forms_of(system, functions_of(system, WARP_DTYPE[torch.float64]), torch.float64, device)[0]


def _compile(system: System, device: torch.device) -> list[Comparison]:
    """Runs every form once; what does not compile is a disagreement with Warp's own words."""
    failed = []
    for dtype in (torch.float64, torch.float32):
        for form in forms_of(system, functions_of(system, WARP_DTYPE[dtype]), dtype, device):
            states, controls = form.sizes
            x = torch.zeros(1, states)
            try:
                form.run(x, torch.zeros(1, controls), x[None], x[:, 0])
            except Exception as error:  # Warp raises whatever its parser meets
                words = " ".join(f"{type(error).__name__}: {error}".split())
                what = f"device functions {form.name}"
                failed.append(exactly(what, form.dtype_name, "Warp's compiler", [words], 1))
    return failed


def _checked(system: Any, parts: Any, points: Any, seed: Any, device: Any) -> torch.device:
    check_system(system, "check")
    if isinstance(parts, str) or not set(parts) <= set(PARTS) or not parts:
        raise ValueError(f"check: parts is {parts!r}, expected some of {', '.join(PARTS)}")
    check_count("check", "points", points)
    check_count("check", "seed", seed, 0)
    place = usable_device("check", device)
    wp.init()
    return place

"""`warp-sims bench --ensemble`: an update of K networks trained together beside an update of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ..policies.ensembles import Ensemble
from .case import Case, errors, needed_operations, reference
from .contestants import Contestant, Entrant, WarpSims
from .settings import LEAST_ROUNDS, Settings
from .timing import Runner, measure, spread, timed


class Together(WarpSims):
    """Ours, K members with the same worlds and different weights; the first is the policy of the case, and
    its loss is returned.
    """

    def __init__(self, case: Case, members: int):
        policies: list[Any] = [case.policy() for _ in range(members)]
        for seed, policy in enumerate(policies[1:], start=2):
            policy.reset_parameters(seed=seed)
        super().__init__(case, Ensemble(policies))

    def gradients(self) -> list[np.ndarray]:
        """Gradients of the first member of the latest update."""
        return [p.grad[0].cpu().numpy().copy() for p in self._policy.parameters() if p.grad is not None]


def run_ensembles(case: Case, settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """One row: all sizes in turns, with an update of a single policy, which is what they are compared with.

    The first member of each is checked against float64 before it is timed.
    """
    row: dict[str, Any] = {
        "case": {**dataclasses.asdict(case), "widths": list(case.widths)},
        "operations": needed_operations(case),
        "members": {},
        "notes": [],
        "wrong": [],
    }

    def note(text: str) -> None:
        row["notes"].append(text)
        say(text)

    truth = reference(case)
    runners: dict[int, Runner] = {}
    for members in sorted({0, *settings.ensemble}):
        made: Contestant = Together(case, members) if members else WarpSims(case)
        label = f"{members} together" if members else "one alone"
        runner = Runner(Entrant(label), "", made)
        runner.first_s, loss = timed(made.update)
        found = errors(case, loss, made.gradients(), truth)
        if not found.within(case):
            row["wrong"].append(label)
            note(
                f"{label}: WRONG, loss off by {found.loss:.1e}, gradients by {found.gradient:.1e}; not timed"
            )
            continue
        runner.seconds = timed(made.update)[0]
        if runner.seconds > settings.time_limit / LEAST_ROUNDS:
            note(f"{label}: left out, {runner.seconds:.1f} s per update")
            continue
        runners[members] = runner
    if not runners:
        return row
    slowest = max(runner.seconds for runner in runners.values())
    measure(list(runners.values()), settings.rounds_for(slowest), settings.block)
    alone = runners.get(0)
    for members, runner in runners.items():
        result: dict[str, Any] = {"seconds": spread(runner.times), "times": runner.times}
        if alone is not None and members:
            ratios = [t / members / a for t, a in zip(runner.times, alone.times, strict=True)]
            result["per_member"] = spread(ratios)
        row["members"][str(members)] = result
        say(f"{runner.entrant.name:14s} {1e3 * result['seconds']['median']:10.3f} ms")
    return row

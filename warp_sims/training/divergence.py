"""Finds where numbers stop being finite: in which update of a training run, in which world and step of a
rollout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..bridge.runtime.arrays import capturing
from ..kernels.agreement import SUMS
from ..kernels.flow import Flow
from ..systems import System

if TYPE_CHECKING:
    from .config import TrainConfig

RECORDED = ("loss", "norm", *SUMS)
"""What is recorded of every update. Of a flow with one gradient field the sums over a pair are NaN."""

FIELDS = {"base": "modified", "check": "regular"}
"""The two gradient fields of the combined flow, and their flows."""


class Place(NamedTuple):
    """The first number of a rollout that is not finite, in the order of time."""

    step: int
    """Of x_t or u_t."""
    control: bool
    """Whether it is of u_t, which comes after x_t."""
    world: int
    component: int
    value: float
    member: int | None = None

    def text(self, horizon: int, system: System) -> str:
        """Says where it is."""
        what = "control" if self.control else "state"
        of_member = "" if self.member is None else f" of member {self.member}"
        return (
            f"the first world that is not finite is world {self.world}{of_member}, in its {what} at step "
            f"{self.step} of {horizon} (component {self.component} is {self.value}){time_step(system)}"
        )


def locate(states: Tensor, controls: Tensor) -> Place | None:
    """Returns the first number of a trajectory that is not finite; None if all are.

    Args:
        states: (horizon + 1, nworld, state_size), for an ensemble (horizon + 1, members, nworld, state_size).
        controls: (horizon, nworld, control_size), the same.
    """
    found = []
    for control, x in ((False, states.detach()), (True, controls.detach())):
        bad = ~torch.isfinite(x)
        steps = bad.flatten(1).any(dim=1).nonzero()
        if not len(steps):
            continue
        t = int(steps[0])
        *member, world, component = bad[t].nonzero()[0].tolist()
        value = float(x[(t, *member, world, component)])
        found.append(Place(t, control, world, component, value, member[0] if member else None))
    return min(found, key=lambda place: place[:3], default=None)


def check_rollout(system: System, states: Tensor, controls: Tensor, loss: Tensor | None) -> None:
    """Raises FloatingPointError if a rollout has diverged; the message says in which world and step.

    Otherwise it reads only the last state and the loss, because a state that is not finite never becomes
    finite again.
    """
    if capturing(states.device):
        raise ValueError(
            "rollout: locate_divergence=True while a CUDA graph is captured, expected False: it reads "
            "numbers on the host; leave it out, or call it outside of the graph"
        )
    seen = states[-1].detach().sum()
    if loss is not None:
        seen = seen + loss.detach().sum()
    if math.isfinite(float(seen)):
        return
    remedy = "try a smaller time step, a shorter horizon, or weights that control less"
    place = locate(states, controls)
    if place is not None:
        where = place.text(controls.shape[0], system)
        raise FloatingPointError(f"rollout: {where}, expected finite states; {remedy}")
    if loss is not None and not bool(torch.isfinite(loss.detach()).all()):
        value = loss.detach().tolist()
        raise FloatingPointError(
            f"rollout: the loss is {value} though all states and controls are finite, expected a finite "
            f"number; {remedy}"
        )


def reason(row: Sequence[float], size: int, config: TrainConfig) -> str | None:
    """Says what is not finite of an update, in terms of `what` that `is` something; None where all is well.

    Args:
        row: What is `RECORDED` of it.
        size: Number of components of the gradient.
        config: The settings.
    """
    seen: dict[str, float] = dict(zip(RECORDED, row, strict=True))
    if not math.isfinite(seen["loss"]):
        return f"loss{{when}} is {seen['loss']}"
    norm = seen["norm"]
    combined = config.flow is Flow.COMBINED
    for field, flow in FIELDS.items() if combined else ():
        if size and seen[f"nonfinite_{field}"] >= size:
            return f"{flow} gradient ({field}){{when}} is NaN or infinite in all {size} components"
    if not combined and size and seen["nonfinite_base"] >= size:
        return f"gradient{{when}} is {norm}"
    # an infinity can be clipped by value, and by nothing else
    if math.isnan(norm) or (math.isinf(norm) and config.clip != "value"):
        return f"gradient{{when}} is {norm}"
    return None


def first_lost(
    rows: Sequence[Sequence[float]], size: int, config: TrainConfig, broken_off: bool
) -> tuple[int, str] | None:
    """Returns the first update of an epoch that ends the run, and why, see `reason`; None if none does.

    Args:
        rows: What is `RECORDED` of each update.
        size: Number of components of the gradient.
        config: The settings. If such updates are skipped, only an epoch in which all were skipped ends the
            run.
        broken_off: Whether the epoch ended early, by an error that may be a consequence.
    """
    reasons: list[str | None] = []
    for row in rows:
        if broken_off and math.isnan(row[0]) and math.isnan(row[1]):
            break  # not reached
        reasons.append(reason(row, size, config))
    first = next((i for i, why in enumerate(reasons) if why is not None), None)
    if first is None:
        return None
    what = str(reasons[first])
    if config.on_divergence == "skip" and not broken_off:
        if None in reasons:
            return None
        what += f", like every other update of the {len(rows)} of this epoch, all of them skipped"
    return first, what


def time_step(system: System) -> str:
    """Says what the time step of a system is, if it has one."""
    dt = getattr(system, "dt", None)
    return "" if dt is None else f"; the time step is dt={dt:g}"


def lost(contents: Any, name: str) -> str | None:
    """Returns the name of the first floating tensor in nested containers that is not finite, or None."""
    if isinstance(contents, dict):
        items = [(f"{name}.{key}" if name else str(key), value) for key, value in contents.items()]
    elif isinstance(contents, Tensor):
        return None if bool(torch.isfinite(contents).all()) else name
    else:
        return None
    return next((found for key, value in items if (found := lost(value, key)) is not None), None)

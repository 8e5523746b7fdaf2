"""Episodes inside a rollout: when worlds end, and where they begin again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bridge.autograd import episodes as _bridge
from .kernels.flow import as_int
from .plans import check_like
from .systems import System

__all__ = ["Resets", "checked_resets"]


@dataclasses.dataclass(frozen=True, eq=False)
class Resets:
    """When the worlds of a rollout end, and where they begin again.

        resets = ws.Resets(system.initial_states(64), done=lambda x: x[:, 0].abs() > 2.4, limit=200)
        out = ws.rollout(system, policy, x0, horizon=32, resets=resets, loss=None)
        resets = dataclasses.replace(resets, ages=out.ages)    # the next rollout goes on from out.states[-1]

    A world whose step is not finite ends in any case. Where a world ends with step t, `out.next_states[t]` is
    where the step led, `out.states[t + 1]` the fresh state, and no cotangent crosses from the one to the
    other.
    """

    fresh: Tensor
    """States with which worlds begin again: (nworld, state_size), or (horizon, nworld, state_size) for each
    step.
    """
    done: Callable[[Tensor], Tensor] | None = None
    """Which worlds end with a state: (nworld, state_size) to (nworld,), bool. By default `System.done`."""
    limit: int | None = None
    """Largest number of steps of an episode. A world that reaches it is truncated, not done."""
    ages: Tensor | None = None
    """Steps since each world began, at the start of the rollout, (nworld,) int64; by default 0."""


def checked_resets(call: str, system: System, x0: Tensor, horizon: int, resets: Any) -> _bridge.Resets:
    """The same as the bridge takes it.

    Raises:
        TypeError, ValueError: something does not fit; the message says what was expected.
    """
    if not isinstance(resets, Resets):
        raise TypeError(f"{call}: resets is of type {type(resets).__name__}, expected a warp_sims.Resets")
    fresh, what = resets.fresh, f"{call}: resets.fresh"
    if not isinstance(fresh, Tensor):
        raise TypeError(f"{what} is of type {type(fresh).__name__}, expected a tensor of states")
    shapes = (tuple(x0.shape), (horizon, *x0.shape))
    if tuple(fresh.shape) not in shapes:
        raise ValueError(
            f"{what} has shape {tuple(fresh.shape)}, expected (nworld, state_size) = {shapes[0]}, or "
            f"{shapes[1]} for states of each step"
        )
    check_like(fresh, x0, call, "resets.fresh")
    if fresh.requires_grad:
        raise ValueError(
            f"{what} requires a gradient, expected a tensor that does not: none is computed for it; pass "
            "fresh.detach()"
        )
    if not bool(torch.isfinite(fresh).all()):
        raise ValueError(f"{what} holds NaN or infinity, expected finite states")
    limit = 0 if resets.limit is None else as_int(resets.limit)
    if limit is None:
        raise TypeError(f"{call}: resets.limit is {resets.limit!r}, expected an int of at least 1 or None")
    if resets.limit is not None and limit < 1:
        raise ValueError(f"{call}: resets.limit is {limit}, expected at least 1 step or None")
    done = system.done if resets.done is None else resets.done
    if done is not None and not callable(done):
        raise TypeError(f"{call}: resets.done is {done!r}, expected a function of states or None")
    return _bridge.Resets(
        fresh if fresh.ndim == 3 else fresh.unsqueeze(0),
        None if done is None else _checked_done(call, done),
        limit,
        _checked_ages(call, resets.ages, x0),
    )


def _checked_ages(call: str, ages: Any, x0: Tensor) -> Tensor:
    if ages is None:
        return torch.zeros(x0.shape[0], dtype=torch.int64, device=x0.device)
    if not isinstance(ages, Tensor) or ages.dtype != torch.int64:
        kind = ages.dtype if isinstance(ages, Tensor) else type(ages).__name__
        raise TypeError(f"{call}: resets.ages is {kind}, expected a tensor of torch.int64 or None")
    if tuple(ages.shape) != (x0.shape[0],):
        raise ValueError(
            f"{call}: resets.ages has shape {tuple(ages.shape)}, expected (nworld,) = ({x0.shape[0]},)"
        )
    return ages.to(x0.device)


def _checked_done(call: str, done: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """The same, its answers checked."""

    def checked(x: Tensor) -> Tensor:
        with torch.no_grad():
            found = done(x.detach())
        if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != x.shape[:1]:
            given = (
                f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            )
            raise ValueError(
                f"{call}: resets.done returned {given}, expected a bool for every world, torch.bool "
                f"{tuple(x.shape[:1])}"
            )
        return found

    return checked

"""Estimators beside the flows: decay in units of time, clipped cotangents, ways to combine gradients."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels.flow import check_decay
from .systems import System

__all__ = ["Anneal", "Blend", "Combiner", "PerSecond", "clip_of", "decay_of", "project_conflicting"]

Combiner = Callable[[Tensor], Tensor]
"""A function that makes one gradient (components,) of two (2, components), base and check. The aggregators of
`torchjd` are such functions.
"""


@dataclasses.dataclass(frozen=True)
class PerSecond:
    """A decay in units of time, for `decay=`: the share of a cotangent that is left after a second of
    simulated time, which is `factor ** dt` at every step. A decay at rate alpha is exp(-alpha).
    """

    factor: float

    def __post_init__(self) -> None:
        check_decay(self.factor, "PerSecond")


def decay_of(call: str, system: System, decay: Any) -> float:
    """The factor at every step.

    Raises:
        TypeError, ValueError: the decay does not fit, or the system does not say how long a step is.
    """
    if not isinstance(decay, PerSecond):
        return check_decay(decay, call)
    dt = getattr(system, "dt", None)
    if isinstance(dt, bool) or not isinstance(dt, (int, float)) or not dt > 0:
        raise ValueError(
            f"{call}: decay is {decay!r}, but {type(system).__name__} does not say how long a step is (dt is "
            f"{dt!r}), expected a number a step"
        )
    return float(decay.factor**dt)


def clip_of(call: str, limit: Any) -> float:
    """The largest norm of a cotangent, without a bound for None.

    Raises:
        TypeError, ValueError: the limit is no finite number above 0.
    """
    if limit is None:
        return math.inf
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(f"{call}: clip_cotangent is {limit!r}, expected a number above 0 or None")
    if not 0.0 < limit < math.inf:
        raise ValueError(f"{call}: clip_cotangent is {limit!r}, expected a finite number above 0 or None")
    return float(limit)


def project_conflicting(pair: Tensor) -> Tensor:
    """Mean (components,) of two gradients (2, components). If their scalar product is negative, each first
    loses its projection on the other.

    Source: Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020. The sum there is a mean here,
    so that two equal gradients give themselves.
    """
    base, check = pair
    dot = torch.dot(base, check)
    if not bool(dot < 0.0):  # NaN neither
        return 0.5 * (base + check)
    one = base - dot / check.square().sum() * check
    other = check - dot / base.square().sum() * base
    return 0.5 * (one + other)


@dataclasses.dataclass
class Blend:
    """(1 - weight) base + weight check. The weight may change from update to update, for example from R to M
    over a training.
    """

    weight: float

    def __call__(self, pair: Tensor) -> Tensor:
        # a weight of 0 selects: 0 inf is NaN
        if self.weight in (0.0, 1.0):
            return pair[int(self.weight)].clone()
        return torch.lerp(pair[0], pair[1], self.weight)


@dataclasses.dataclass(frozen=True)
class Anneal:
    """A `Blend` for the `combiner` of a `TrainConfig`. Its weight goes from `start` to `end` in equal parts
    over `updates` updates and stays there: Anneal(1.0, 0.0, updates=2000) begins with R and ends with M.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """

    start: float
    end: float
    updates: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Anneal: {name} is {value!r}, expected a number from 0 (base) to 1 (check)")
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Anneal: {name} is {value!r}, expected a number from 0 (base) to 1 (check)")
        if isinstance(self.updates, bool) or not isinstance(self.updates, int):
            raise TypeError(f"Anneal: updates is {self.updates!r}, expected an int of at least 1")
        if self.updates < 1:
            raise ValueError(f"Anneal: updates is {self.updates}, expected at least 1")

    def at(self, update: int) -> Blend:
        """The combiner of an update, counted from 0."""
        done = min(update / self.updates, 1.0)
        return Blend((1.0 - done) * self.start + done * self.end)

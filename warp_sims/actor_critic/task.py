"""What a system must supply for episodes, so that an actor-critic can be trained on it."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..systems.system import System

_NEEDED = ("observe", "reward", "fallen", "episode_steps", "initial_states")


class Task(Protocol):
    """A system with episodes."""

    number: int
    state_size: int
    control_size: int
    episode_steps: int
    """Control steps after which an episode ends."""

    def observe(self, states: Tensor) -> Tensor:
        """What a policy sees (..., observations) of states (..., state_size)."""
        ...

    def reward(self, states: Tensor, controls: Tensor) -> Tensor:
        """Reward (...) of steps from states under controls in [-1, 1], differentiable."""
        ...

    def fallen(self, states: Tensor) -> Tensor:
        """Whether an episode ends with states (..., state_size)."""
        ...

    def initial_states(self, n: int, seed: int = 42, split: Any = "train", *, dtype: Any = ...) -> Tensor:
        """States (n, state_size) where episodes begin."""
        ...


def as_task(system: Any, call: str) -> Task:
    """Returns a system as a task.

    Raises:
        TypeError: it is no system.
        ValueError: it lacks what a task has; the message names it.
    """
    if not isinstance(system, System):
        raise TypeError(
            f"{call}: system is {system!r}, expected a ws.System with episodes such as ws.Hopper()"
        )
    lacking = [name for name in _NEEDED if not hasattr(system, name)]
    if lacking:
        raise ValueError(
            f"{call}: {type(system).__name__} has no {', '.join(lacking)}, expected a system with episodes "
            "such as ws.Hopper(); give it observe(states), reward(states, controls), fallen(states) "
            "and episode_steps"
        )
    return cast(Task, system)


def lost(states: Tensor) -> Tensor:
    """Whether states (..., state_size) hold NaN or infinity: then an episode ends in any case."""
    return ~torch.isfinite(states).all(-1)

"""The worlds of a run: their states, the ages of their episodes, and the rewards of these."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import ActorCriticConfig
from .task import Task

BEGIN, RESTARTS, NOISE, ACTOR, CRITIC = range(5)
"""What is drawn at random; each has a stream of its own in every update, so that a run can go on anywhere."""


def seed_of(config: ActorCriticConfig, stream: int, update: int = 0) -> int:
    """The seed of a stream in an update."""
    return int(np.random.SeedSequence((config.seed, stream, update)).generate_state(1)[0])


class Worlds:
    """Worlds that continue from update to update.

    Args:
        task: The system.
        config: The settings.
    """

    def __init__(self, task: Task, config: ActorCriticConfig) -> None:
        self._task, self._config = task, config
        n = config.worlds
        self.states = self._draw(BEGIN, 0, n)
        self.ages = torch.zeros(n, dtype=torch.int64, device=config.device)
        self.earned = torch.zeros(n, dtype=torch.float64)

    def _draw(self, stream: int, update: int, n: int) -> Tensor:
        seed, dtype = seed_of(self._config, stream, update), self._config.torch_dtype
        return self._task.initial_states(n, seed=seed, dtype=dtype).to(self._config.device)

    def noise(self, update: int) -> Tensor:
        """Standard normal noise (horizon, nworld, control_size) of an update."""
        config = self._config
        generator = torch.Generator().manual_seed(seed_of(config, NOISE, update))
        shape = (config.horizon, config.worlds, self._task.control_size)
        return torch.randn(shape, generator=generator, dtype=config.torch_dtype).to(config.device)

    def state(self) -> dict[str, Tensor]:
        """Copies of what has to be known to go on."""
        return {name: getattr(self, name).clone() for name in ("states", "ages", "earned")}

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes back to a state, which stays as it is."""
        for name, value in state.items():
            setattr(self, name, value.to(getattr(self, name).device).clone())

    def fresh(self, update: int) -> Tensor:
        """States (horizon, nworld, state_size) with which episodes begin that follow others in an update."""
        horizon, n = self._config.horizon, self._config.worlds
        return self._draw(RESTARTS, update, horizon * n).view(horizon, n, -1)

    def end(self, last: Tensor, ages: Tensor, rewards: Tensor, restarted: Tensor) -> list[float]:
        """Takes in an update; returns the returns of the episodes that ended in it.

        Args:
            last: (nworld, state_size), where the worlds are.
            ages: (nworld,), of their episodes.
            rewards: (horizon, nworld).
            restarted: (horizon, nworld), bool.
        """
        self.states, self.ages = last, ages
        finished: list[float] = []
        for reward, ended in zip(rewards.double().cpu(), restarted.cpu()):
            self.earned += reward
            finished += self.earned[ended].tolist()
            self.earned[ended] = 0.0
        return finished


def as_numbers(values: Any) -> list[float]:
    """Plain numbers of tensors of one element, read at once."""
    return torch.stack([torch.as_tensor(v).double().cpu() for v in values]).tolist()

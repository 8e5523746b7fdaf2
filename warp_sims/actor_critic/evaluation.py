"""Whole episodes without noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..bridge.autograd import operators
from .networks import Actor
from .task import Task, lost

LOOK = 50
"""Steps from one look whether any episode goes on to the next: it waits for the device."""


class Evaluation(NamedTuple):
    """What whole episodes came to, (worlds,) each."""

    returns: Tensor
    lengths: Tensor


@torch.no_grad()
def evaluate(task: Task, actor: Actor, x0: Tensor) -> Evaluation:
    """Returns of one episode from each state of x0 (worlds, state_size), controls without noise."""
    x = x0
    alive = torch.ones(x0.shape[0], dtype=torch.bool, device=x0.device)
    returns = torch.zeros(x0.shape[0], dtype=torch.float64, device=x0.device)
    lengths = torch.zeros_like(returns)
    for t in range(task.episode_steps):
        if t % LOOK == 0 and not bool(alive.any()):
            break
        u = actor(x)
        returns += torch.where(alive, task.reward(x, u), 0.0)
        lengths += alive
        arrivals = operators.simulate(task.number, x, u.unsqueeze(0), t == 0)[1]
        alive = alive & ~(task.fallen(arrivals) | lost(arrivals))
        x = torch.where(alive.unsqueeze(1), arrivals, x0)
    return Evaluation(returns, lengths)

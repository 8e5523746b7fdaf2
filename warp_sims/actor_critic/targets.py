"""The training targets of actor and critic.

A piece of a world's rollout ends at the horizon or with its episode. With r_t the reward of step t, y_t the
state that it leads to, and V' the target critic:

    value of an end    v_t = 0 where the episode failed,  V'(y_t) where time or the horizon ended it
    TD(lambda)         G_t = r_t + gamma v_t                                    at an end
                       G_t = r_t + gamma ((1 - lambda) V'(y_t) + lambda G_{t+1})   else
    actor              -(sum over pieces of sum_k gamma^k r_{t0+k} + gamma^K v)  per step of a world
    critic             mean of (V(x_t) - G_t)^2

Source: Xu et al., Accelerated Policy Learning with Parallel Differentiable Simulation, ICLR 2022.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ends(NamedTuple):
    """Where pieces end, (horizon, nworld), bool."""

    failed: Tensor
    """The episode failed behind the step."""
    restarted: Tensor
    """The episode ended after the step, by failure or by its time."""

    @property
    def ended(self) -> Tensor:
        """The piece ends: its episode does, or the horizon."""
        ended = self.restarted.clone()
        ended[-1] = True
        return ended


def td_lambda(rewards: Tensor, values: Tensor, ends: Ends, gamma: float, trace: float) -> Tensor:
    """Targets G (horizon, nworld) of the critic.

    Args:
        rewards: (horizon, nworld).
        values: (horizon, nworld), V' of the states behind the steps.
        ends: Of the pieces.
        gamma: Discount.
        trace: lambda.
    """
    values = torch.where(ends.failed, torch.zeros_like(values), values)
    ended = ends.ended
    targets = torch.empty_like(rewards)
    behind = values[-1]
    for t in reversed(range(rewards.shape[0])):
        behind = torch.where(ended[t], values[t], torch.lerp(values[t], behind, trace))
        behind = targets[t] = rewards[t] + gamma * behind
    return targets


def discounts(ends: Ends, gamma: float, dtype: torch.dtype) -> Tensor:
    """gamma^k (horizon, nworld), k the number of steps since the piece began."""
    factor = torch.ones(ends.restarted.shape, dtype=dtype, device=ends.restarted.device)
    for t in range(1, factor.shape[0]):
        factor[t] = torch.where(ends.restarted[t - 1], factor[0], gamma * factor[t - 1])
    return factor

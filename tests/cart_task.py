"""A task with short episodes, which fail and run out of time within a horizon of a few steps."""

import dataclasses

import torch

import warp_sims as ws


@dataclasses.dataclass(frozen=True)
class CartTask(ws.CartPole):
    """Keep calm: an episode fails where the pole turns faster than 2 rad/s."""

    poles: int = 1
    dt: float = 0.1
    episode_steps: int = 6

    def observe(self, states):
        return torch.cat(
            [states[..., 1:2], states[..., 2:3].sin(), states[..., 2:3].cos(), states[..., 3:]], -1
        )

    def reward(self, states, controls):
        return states[..., 2].cos() - states[..., 1] ** 2 - 0.1 * (controls**2).sum(-1)

    def fallen(self, states):
        return states[..., 3].abs() > 2.0

    def initial_states(self, n, seed=42, split="train", *, dtype=torch.float32):
        return 0.85 * super().initial_states(n, seed, split, dtype=dtype)

"""Actor and critic: perceptrons of ELU and layer normalisation on normalised observations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..policies.gaussian import GaussianPolicy
from .task import Task, as_task

SMALLEST = 1e-5
"""Added to the variance of an observation before it divides."""


class Normaliser(nn.Module):
    """Subtracts from observations their running mean and divides by their running standard deviation.

    Mean and variance are kept in float64 and merged batch by batch (Chan et al. 1979). They are no
    parameters: a call does not change them, `update` does.

    Args:
        size: Number of components of an observation.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        exact = torch.float64
        self.register_buffer("count", torch.zeros((), dtype=exact))
        self.register_buffer("mean", torch.zeros(size, dtype=exact))
        self.register_buffer("variance", torch.ones(size, dtype=exact))
        self.register_buffer("shift", torch.zeros(size, dtype=dtype))
        self.register_buffer("scale", torch.ones(size, dtype=dtype))

    count: Tensor
    mean: Tensor
    variance: Tensor
    shift: Tensor
    scale: Tensor

    def forward(self, observations: Tensor) -> Tensor:
        """Normalised observations, of the same shape (..., size)."""
        return (observations - self.shift) * self.scale

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Takes in observations (n, size)."""
        seen = observations.double()
        n, mean, variance = seen.shape[0], seen.mean(0), seen.var(0, correction=0)
        total = self.count + n
        apart = mean - self.mean
        # before the first batch the variance is 1, and counts for nothing
        self.variance.mul_(self.count).add_(variance * n).add_(
            apart.square() * (self.count * n / total)
        ).div_(total)
        self.mean.add_(apart * (n / total))
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.variance + SMALLEST).rsqrt())


def perceptron(sizes: Sequence[int], gain: float, seed: int, dtype: torch.dtype) -> nn.Sequential:
    """Linear layers with ELU and layer normalisation after each except the last; orthogonal weights, zero
    biases.

    Args:
        sizes: Sizes of input, hidden layers and output.
        gain: Of the weights of the last layer.
        seed: Of the weights.
        dtype: Of the weights.
    """
    layers: list[nn.Module] = []
    generator = torch.Generator().manual_seed(seed)
    for i, (before, behind) in enumerate(zip(sizes, sizes[1:])):
        last = i == len(sizes) - 2
        linear = nn.Linear(before, behind, dtype=torch.float64)
        with torch.no_grad():
            nn.init.orthogonal_(linear.weight, gain if last else math.sqrt(2.0), generator)
            linear.bias.zero_()
        layers.append(linear)
        if not last:
            layers += [nn.ELU(), nn.LayerNorm(behind, dtype=torch.float64)]
    return nn.Sequential(*layers).to(dtype)


class Actor(nn.Module):
    """Controls in [-1, 1] for states: tanh(mean(observation) + exp(log_std) noise).

    Without noise it gives tanh(mean(observation)), and is then a policy like any other.

    Args:
        system: A system with episodes, such as `ws.Hopper()`.
        hidden: Widths of the hidden layers.
        std: Standard deviation to start from.
        seed: Of the weights.
        dtype: Of the weights.
    """

    def __init__(
        self,
        system: Any,
        hidden: Sequence[int] = (128, 64, 32),
        std: float = math.exp(-1.0),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        task = as_task(system, "Actor")
        self._observe: Callable[[Tensor], Tensor] = task.observe
        size = observation_size(task)
        self.normaliser = Normaliser(size, dtype)
        mean = perceptron((size, *hidden, task.control_size), 0.01, seed, dtype)
        self.gaussian = GaussianPolicy(mean, task.control_size, std)

    def forward(self, states: Tensor, noise: Tensor | None = None) -> Tensor:
        """Controls (n, control_size) for states (n, state_size) and standard normal noise (n,
        control_size).
        """
        seen = self.normaliser(self._observe(states))
        return torch.tanh(self.gaussian.mean(seen) if noise is None else self.gaussian(seen, noise))


class Critic(nn.Module):
    """Values (n,) of normalised observations (n, size): estimates of the discounted rewards to come.

    Args:
        size: Number of components of an observation.
        hidden: Widths of the hidden layers.
        seed: Of the weights.
        dtype: Of the weights.
    """

    def __init__(
        self, size: int, hidden: Sequence[int] = (64, 64), seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.layers = perceptron((size, *hidden, 1), 1.0, seed, dtype)

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations).squeeze(-1)


def observation_size(task: Task) -> int:
    """Number of components of an observation."""
    return task.observe(torch.zeros(1, task.state_size)).shape[-1]

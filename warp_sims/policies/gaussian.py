"""A stochastic policy for rollouts that evaluate it twice: its noise comes from outside."""

import math

import torch
from torch import Tensor, nn

__all__ = ["GaussianPolicy"]


class GaussianPolicy(nn.Module):
    """Normally distributed controls, by reparametrisation: mean(x) + exp(log_std) noise.

        policy = ws.GaussianPolicy(ws.MLP(system.state_size, (64, 64), system.control_size))
        noise = policy.draw(horizon, x0)
        out = ws.rollout(system, policy, x0, horizon=horizon, inputs=noise)

    The noise is an input of the rollout, so that the policy is the same function when the backward pass
    evaluates it again; gradients reach mean and log_std.

    Args:
        mean: Module from states (n, state_size) to mean controls (n, control_size).
        control_size: Number of components of a control; by default that of `mean.out_features` of its last
            linear layer.
        std: Standard deviation to start from, above 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """

    def __init__(self, mean: nn.Module, control_size: int | None = None, std: float = 0.5) -> None:
        super().__init__()
        if not isinstance(mean, nn.Module):
            raise TypeError(
                f"GaussianPolicy: mean is of type {type(mean).__name__}, expected a torch.nn.Module"
            )
        if control_size is None:
            linear = [layer for layer in mean.modules() if isinstance(layer, nn.Linear)]
            if not linear:
                raise ValueError(
                    "GaussianPolicy: control_size is None, expected an int: mean has no linear layer"
                )
            control_size = linear[-1].out_features
        if isinstance(control_size, bool) or not isinstance(control_size, int):
            raise TypeError(f"GaussianPolicy: control_size is {control_size!r}, expected an int")
        if control_size < 1:
            raise ValueError(f"GaussianPolicy: control_size is {control_size}, expected at least 1")
        if isinstance(std, bool) or not isinstance(std, (int, float)):
            raise TypeError(f"GaussianPolicy: std is {std!r}, expected a number above 0")
        if not 0.0 < std < math.inf:
            raise ValueError(f"GaussianPolicy: std is {std!r}, expected a finite number above 0")
        like = next(mean.parameters(), torch.zeros(0))
        self.mean = mean
        self.log_std = nn.Parameter(like.detach().new_full((control_size,), math.log(std)))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Controls (n, control_size) for states (n, state_size) and standard normal noise (n,
        control_size).
        """
        if noise.shape != (x.shape[0], self.log_std.shape[0]):
            raise ValueError(
                f"GaussianPolicy: noise has shape {tuple(noise.shape)}, expected (n, control_size) = "
                f"({x.shape[0]}, {self.log_std.shape[0]}): give a rollout inputs=policy.draw(horizon, x0)"
            )
        return self.mean(x) + self.log_std.exp() * noise

    def draw(
        self, horizon: int, x0: Tensor, seed: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Standard normal noise (horizon, nworld, control_size) for a rollout from x0 (nworld, state_size).

        Of its dtype and on its device; from torch's own generator where there is neither a seed nor another.
        `ws.train` draws it for every update by itself.
        """
        if seed is not None:
            generator = torch.Generator(x0.device).manual_seed(seed)
        shape = (horizon, x0.shape[0], self.log_std.shape[0])
        return torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)

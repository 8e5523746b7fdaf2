"""The cart-pole training update in eager torch: autograd through the unrolled loop, closed edges detached.

The combined flow runs forward once and backward twice: a gate in the graph is closed for the first pass and
open for the second, which spares it the second rollout.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def step(
    x: Tensor, u: Tensor, *, dt: float, gravity: float, pole_mass: float, total_mass: float, length: float
) -> Tensor:
    """One time step of the cart-pole: states (n, s), forces (n, 1)."""
    pos, vel, th, thd = x[:, 0:1], x[:, 1:2], x[:, 2::2], x[:, 3::2]
    sin, cos = torch.sin(th), torch.cos(th)
    moment = pole_mass * length
    push = (u + moment * sin * thd**2) / total_mass
    thdd = (gravity * sin - cos * push) / (length * (4.0 / 3.0 - pole_mass * cos**2 / total_mass))
    acc = (u + moment * (sin * thd**2 - thdd * cos).sum(dim=1, keepdim=True)) / total_mass
    thd_next = thd + dt * thdd
    vel_next = vel + dt * acc
    poles = torch.stack((th + dt * thd_next, thd_next), dim=2).flatten(1)
    return torch.cat((pos + dt * vel_next, vel_next, poles), dim=1)


class _Valve:
    """Shared by all gates of one graph."""

    is_open = True


class _Gate(torch.autograd.Function):
    """Identity; its cotangent passes while the valve is open."""

    @staticmethod
    def forward(ctx, x: Tensor, valve: _Valve) -> Tensor:
        ctx.valve = valve
        return x.view_as(x)

    @staticmethod
    def backward(ctx, adj_x: Tensor) -> tuple[Tensor | None, None]:
        return adj_x if ctx.valve.is_open else None, None


class TorchEager:
    """One training problem and its update. The interface of all peers; see README.md.

    Args:
        system: Parameters of `step`: dt, gravity, pole_mass, total_mass, length.
        widths: Hidden layers.
        x0: Initial states, ``(n, s)``.
        weights: ``[W1 (out, in), b1, W2, b2, ...]``.
        horizon: Number of steps.
        flow: ``R``, ``M`` or ``C``.
        loss: ``"final"`` or ``"running"``.
        lr: Learning rate of Adam.
        dtype: ``"float32"`` or ``"float64"``.
    """

    def __init__(
        self,
        system: Mapping[str, float],
        widths: Sequence[int],
        x0: np.ndarray,
        weights: Sequence[np.ndarray],
        horizon: int,
        flow: str,
        loss: str,
        *,
        lr: float = 1e-3,
        dtype: str = "float32",
    ):
        if flow not in ("R", "M", "C") or loss not in ("final", "running"):
            raise ValueError(f"TorchEager: flow={flow!r}, loss={loss!r}")
        if [w.shape[0] for w in weights[0:-2:2]] != list(widths):
            raise ValueError(f"TorchEager: weights do not belong to widths {tuple(widths)}")
        self._system, self._horizon, self._flow, self._loss = dict(system), horizon, flow, loss
        dtype = getattr(torch, dtype)
        self._params = [torch.tensor(w, dtype=dtype, requires_grad=True) for w in weights]
        self._x0 = torch.tensor(x0, dtype=dtype)
        self._optimizer = torch.optim.Adam(self._params, lr=lr, fused=True)

    def update(self) -> float:
        """One training update in place; returns the loss before it."""
        loss, grads = self._value_and_grad()
        for parameter, gradient in zip(self._params, grads, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        return loss.item()

    def gradients(self) -> list[np.ndarray]:
        """Gradients at the present weights, in the layout of the weights given."""
        return [gradient.numpy() for gradient in self._value_and_grad()[1]]

    def weights(self) -> list[np.ndarray]:
        """Copies of the present weights."""
        return [parameter.detach().numpy().copy() for parameter in self._params]

    def _value_and_grad(self) -> tuple[Tensor, Sequence[Tensor]]:
        if self._flow != "C":
            loss = self._rollout_loss(torch.detach if self._flow == "M" else lambda x: x)
            return loss.detach(), torch.autograd.grad(loss, self._params)

        valve = _Valve()
        loss = self._rollout_loss(lambda x: _Gate.apply(x, valve))
        valve.is_open = False
        base = torch.autograd.grad(loss, self._params, retain_graph=True)
        valve.is_open = True
        check = torch.autograd.grad(loss, self._params)
        return loss.detach(), [
            torch.where((torch.sign(m) == torch.sign(r)) | torch.isnan(m), m, 0.0)
            for m, r in zip(base, check, strict=True)
        ]

    def _rollout_loss(self, network_edge) -> Tensor:
        x, states = self._x0, []
        for _ in range(self._horizon):
            x = step(x, self._policy(network_edge(x)), **self._system)
            states.append(x)
        reached = x if self._loss == "final" else torch.stack(states)
        return (1.0 - torch.cos(reached[..., 2::2])).mean()

    def _policy(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self._params[0:-2:2], self._params[1:-2:2], strict=True):
            x = torch.tanh(functional.linear(x, weight, bias))
        return functional.linear(x, *self._params[-2:])

"""A training update in eager torch: autograd through the unrolled loop, closed edges detached.

The combined flow runs forward once and backward twice: a gate in the graph is closed for the first pass and
open for the second, which spares it the second rollout.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .torch_problems import PROBLEMS, perceptron


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
        system: Parameters of the problem's step, see torch_problems.py.
        widths: Hidden layers; for quantum the channels of both convolutions.
        x0: Initial states, ``(n, s)``.
        weights: ``[W1 (out, in), b1, W2, b2, ...]``.
        horizon: Number of steps.
        flow: ``R``, ``M`` or ``C``.
        loss: ``"final"`` or ``"running"``.
        lr: Learning rate of Adam.
        dtype: ``"float32"`` or ``"float64"``.
        problem: One of `PROBLEMS`.
        control_cost: Weight of the mean squared control.
        device: ``"cpu"`` or ``"cuda"``.
        policy: Activation and norm of another perceptron than the published, ``"elu+layernorm"`` for
            example, or a module, whose parameters are those given.
    """

    policies = ("mlp", "module")

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Why it cannot run on a device, or None."""
        if device.startswith("cuda") and not torch.cuda.is_available():
            return "this torch finds no CUDA device"
        return None

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
        problem: str = "cartpole",
        control_cost: float = 0.0,
        device: str = "cpu",
        policy: str | torch.nn.Module | None = None,
    ):
        if flow not in ("R", "M", "C") or loss not in ("final", "running"):
            raise ValueError(f"{type(self).__name__}: flow={flow!r}, loss={loss!r}")
        own = isinstance(policy, torch.nn.Module)
        if not own and [w.shape[0] for w in weights[:-2] if w.ndim > 1] != list(widths):
            raise ValueError(f"{type(self).__name__}: weights do not belong to widths {tuple(widths)}")
        self._problem, self._control_cost = PROBLEMS[problem], control_cost
        self._system, self._horizon, self._flow, self._loss = dict(system), horizon, flow, loss
        place = {"dtype": getattr(torch, dtype), "device": device}
        if isinstance(policy, torch.nn.Module):
            policy = copy.deepcopy(policy).to(**place)
            self._params = list(policy.parameters())
            module = policy
            self._problem = self._problem._replace(policy=lambda params, x: module(x))
        else:
            self._params = [torch.tensor(w, requires_grad=True, **place) for w in weights]
            if policy is not None:
                self._problem = self._problem._replace(policy=perceptron(policy))
        self._x0 = torch.tensor(x0, **place)
        self._optimizer = torch.optim.Adam(self._params, lr=lr, fused=True)

    def update(self) -> float:
        """One training update in place; returns the loss before it."""
        loss, grads = self._value_and_grad()
        for parameter, gradient in zip(self._params, grads, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        return loss.item()

    def gradients(self) -> list[np.ndarray]:
        """Gradients of the latest update, in the layout of the weights given."""
        return [p.grad.cpu().numpy().copy() for p in self._params if p.grad is not None]

    def weights(self) -> list[np.ndarray]:
        """Copies of the present weights."""
        return [parameter.detach().cpu().numpy().copy() for parameter in self._params]

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

    def _advance(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Control and next state; `seen` is the state as the policy gets it."""
        u = self._problem.policy(self._params, seen)
        return u, self._problem.step(x, u, **self._system)

    def _rollout_loss(self, network_edge) -> Tensor:
        cost, running = self._problem.cost, self._problem.running
        x, states, controls = self._x0, [], []
        for _ in range(self._horizon):
            u, x = self._advance(x, network_edge(x))
            states.append(x)
            controls.append(u)
        reached = torch.stack(states if self._loss == "running" else states[-1:])
        costs = cost(reached, controls[0].shape[1], self._system).mean(1)
        loss = costs.mean() if running == "mean" else costs.sum()
        if self._control_cost:
            loss = loss + self._control_cost * torch.stack(controls).square().mean()
        return loss

"""A rollout whose worlds may begin anew behind any step, and its backward pass, step by step.

    u_t = policy(x_t, inputs_t),   y_t = step(x_t, u_t),   x_{t+1} = y_t, or a fresh state where a world
    restarts

No gradient crosses a restart. With G the direct cotangents of what the rollout gives, edges and decay as in
kernels/flow.py, and l_t the cotangent of x_t:

    l_y = G_y,t + l_{t+1}    where the world goes on,    G_y,t  where it restarted;   clipped, if asked for
    mu_t = (dS/du)^T l_y + G_u,t
    l_t = G_x,t + decay [physics open] (dS/dx)^T l_y + [network open] (dN/dx)^T mu_t

The policy is evaluated again at all states at once, and its Jacobians are taken there, as in torch_path.py;
the adjoint sweep takes one step a launch, because worlds restart at different steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..passes.foreign_torch import ordinary
from ..passes.spec import Spec
from ..runtime.tracing import span
from . import operators
from .torch_path import TorchPath

Restart = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(t, states where step t began, states where it led), both (nworld, state_size), to a mask (nworld,) of the
worlds that restart, and states (nworld, state_size) for them."""


class Restarted(NamedTuple):
    """What a rollout with restarts gives."""

    states: Tensor
    """(horizon, nworld, state_size) where each step began."""
    arrivals: Tensor
    """(horizon, nworld, state_size) where each step led, before a restart."""
    controls: Tensor
    """(horizon, nworld, control_size)."""
    restarted: Tensor
    """(horizon, nworld), bool: whether the world restarted behind the step."""
    last: Tensor
    """(nworld, state_size) with which the next rollout begins."""


@torch.no_grad()
def forward(
    spec: Spec, path: TorchPath, x0: Tensor, parameters: Sequence[Tensor], restart: Restart
) -> Restarted:
    """The rollout, step by step."""
    x = x0
    states, arrivals, controls, masks = [], [], [], []
    for t in range(spec.horizon):
        given = None if path.inputs is None else path.inputs[t]
        with span("policy"):
            u = path.policy(parameters, x, given)
        arrival = operators.simulate(spec.system, x, u.unsqueeze(0), t == 0)[1]
        mask, fresh = restart(t, x, arrival)
        states.append(x)
        arrivals.append(arrival)
        controls.append(u)
        masks.append(mask)
        x = torch.where(mask.unsqueeze(1), fresh, arrival)
    return Restarted(torch.stack(states), torch.stack(arrivals), torch.stack(controls), torch.stack(masks), x)


def backward(
    spec: Spec,
    path: TorchPath,
    run: Restarted,
    parameters: Sequence[Tensor],
    adj_states: Tensor,
    adj_arrivals: Tensor,
    adj_controls: Tensor,
    clip: float | None = None,
) -> Tensor:
    """Gradients (fields, parameters) of a rollout with restarts, fields not yet compared.

    Args:
        spec: Without a loss of the system's own.
        path: That of the forward pass.
        run: What that gave.
        parameters: Of the policy.
        adj_states, adj_arrivals, adj_controls: Direct cotangents, of the shapes of what they belong to.
        clip: Bound on the norm of the cotangent of a world's state where it enters a step; None: no bound.
    """
    horizon, nworld, m = run.controls.shape
    points = run.states.flatten(0, 1)
    given = None if path.inputs is None else path.inputs.flatten(0, 1)
    with span("policy_again"), torch.inference_mode(False), torch.enable_grad():
        q = tuple(ordinary(p).requires_grad_() for p in parameters)
        x = ordinary(points).requires_grad_(spec.network_open)
        u = path.policy(q, x, given)
    jac = None
    if spec.network_open:
        with span("policy_jacobians"):
            # one unit cotangent a control component: rows do not mix, so all points share a product
            columns = [torch.autograd.grad(u[:, c].sum(), x, retain_graph=True)[0] for c in range(m)]
            jac = torch.stack(columns, dim=1).view(horizon, nworld, m, points.shape[1])
    recomputed = u.detach().view_as(run.controls)
    operators.check_recomputed(recomputed, run.controls, operators.CONTROL_TOLERANCE[u.dtype], 0)
    mu = _sweep(spec, run, jac, adj_states, adj_arrivals, adj_controls, clip)
    fields = []
    for f, field in enumerate(mu):
        with span("policy_weight_grad"):
            own = torch.autograd.grad(
                u, q, field.flatten(0, 1), retain_graph=f + 1 < len(mu), materialize_grads=True
            )
        fields.append(torch.cat([g.reshape(-1) for g in own]))
    return torch.stack(fields)


def _sweep(
    spec: Spec,
    run: Restarted,
    jac: Tensor | None,
    adj_states: Tensor,
    adj_arrivals: Tensor,
    adj_controls: Tensor,
    clip: float | None,
) -> Tensor:
    """Cotangents of the controls (fields, horizon, nworld, control_size)."""
    horizon = run.controls.shape[0]
    mu: list[Tensor] = []
    behind = run.states.new_zeros((len(spec.schedules), *run.last.shape))
    none = torch.zeros_like(run.last)
    for t in reversed(range(horizon)):
        # a closed gate selects: what a world that restarted has behind it is not multiplied by 0
        goes_on = ~run.restarted[t].unsqueeze(1)
        behind = adj_arrivals[t] + torch.where(goes_on, behind, none)
        if clip is not None:
            behind = behind * (clip / behind.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        one = spec._replace(base=spec.base[t], check=spec.check[t : t + 1])
        at, behind, *_ = operators.adjoint(
            *one.arguments(),
            torch.stack([run.states[t], run.arrivals[t]]),
            run.controls[t : t + 1],
            None,
            0.0,
            None if jac is None else jac[t : t + 1],
            None,
            torch.stack([adj_states[t], none]),
            adj_controls[t : t + 1],
            0,
            behind,
        )
        mu.append(at[:, 0])
    return torch.stack(mu[::-1], dim=1)

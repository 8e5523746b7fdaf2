"""Simulators that are not Warp kernels: their open loop, their loss and the adjoint sweep through them.

A foreign simulator steps all worlds at once and can be linearised: a step is recorded, and the recording is
pulled back once for each gradient field. If its rows do not mix, one recording gives the Jacobians of many
points instead, and the adjoint sweep is one small product a step:

    [dS/dx dS/du]_t              at all points at once
    lam_{t+1} [dS/dx dS/du]_t    in the sweep, kernels/sweeps/linear_sweep.py

Shapes and arguments are those of sweeps.py, which does the same for systems with kernels. What is asked of a
simulator is in simulator.py.
"""

from __future__ import annotations

import math

import torch
import warp as wp
from torch import Tensor

from ...kernels.flow import NETWORK, PHYSICS, Flow
from ...kernels.sweeps.linear_sweep import make_linear_sweep
from ..runtime.arrays import WARP_DTYPE, constant, stream, warp_device
from ..runtime.launches import span
from .recomputed import furthest
from .simulator import Simulator, name_of, stepped
from .spec import Cotangents, Spec, pieces
from .sweeps import edge_masks

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference of recomputed and stored next states, relative to the largest state, that rounding may
cause.
"""
JACOBIAN_ELEMENTS = 1 << 22
"""Elements of the Jacobians that are held at once; with more, steps are taken in segments."""
JACOBIAN_WORK = 1 << 14
"""Elements of one step's Jacobians above which steps are recorded one by one: the overhead of a recording is
then small beside its work, of which Jacobians take state_size times as much.
"""


def clipped(adj: Tensor, limit: float) -> Tensor:
    """Cotangents (nworld, state_size), the norm of each at most the limit; a copy. What is not finite stays
    so.
    """
    if limit == math.inf:
        return adj.clone()
    norm = torch.linalg.vector_norm(adj, dim=1, keepdim=True)
    return torch.where((norm > limit) & (norm < torch.inf), adj * (limit / norm), adj)


def simulate(simulator: Simulator, x0: Tensor, controls: Tensor) -> Tensor:
    """States under given controls."""
    if not x0.shape[0]:
        return x0.new_empty((controls.shape[0] + 1, *x0.shape))
    states = [x0]
    with torch.no_grad():
        for u in controls.unbind():
            # a copy: what a step returns may be memory that it will write to again
            states.append(stepped(simulator, states[-1], u).clone())
    return torch.stack(states)


def loss(simulator: Simulator, spec: Spec, states: Tensor, controls: Tensor) -> Tensor:
    """The simulator's own loss, a scalar; 0 without worlds."""
    spec.weights.check(simulator.has_loss)
    (horizon, nworld, m), value = controls.shape, states.new_zeros(())
    if nworld == 0:
        return value
    final, running, control = spec.weights.per_world(nworld, horizon, m)
    with torch.no_grad():
        if running:
            value = value + running * simulator.cost(states[1:].flatten(0, 1)).sum()
        if final:
            value = value + final * simulator.cost(states[-1]).sum()
        if control:
            value = value + control * controls.square().sum()
    return value


def adjoint(
    simulator: Simulator,
    spec: Spec,
    states: Tensor,
    controls: Tensor,
    jac: Tensor | None,
    g: Cotangents,
    t0: int,
    carried: Tensor | None,
    loss_worlds: int,
) -> tuple[Tensor, Tensor]:
    """Cotangents of the controls (fields, steps, nworld, control_size) and of the first state (fields,
    nworld, state_size); see `sweeps.adjoint`. If physical parameters are appended to the controls, their
    cotangents are appended too.
    """
    steps, nworld, m = controls.shape
    own = simulator.control_size
    fields, n = len(spec.schedules), states.shape[2]
    if nworld == 0:
        return states.new_zeros((fields, *controls.shape)), states.new_zeros((fields, 0, n))
    driven = controls[:, :, :own]
    direct_x, direct_u = _direct(simulator, spec, states, driven, g, t0, carried is None, loss_worlds)
    if carried is not None:
        lam = carried.clone()
    elif direct_x is not None:
        lam = direct_x[steps].expand(fields, -1, -1).clone()
    else:
        lam = states.new_zeros((fields, nworld, n))
    mu = states.new_empty((fields, *controls.shape))
    elements = nworld * n * (n + m)
    # a clipped pullback is not linear, so it has no Jacobian
    if not simulator.rowwise or spec.clip < math.inf or elements > JACOBIAN_WORK:
        for t in range(steps - 1, -1, -1):
            x_next, pull = simulator.linearize(states[t], controls[t])
            _check_recomputed(simulator, x_next.unsqueeze(0), states[t + 1 : t + 2], t0 + t)
            # a pull may write into its cotangent
            pulled = [pull(clipped(adj, spec.clip)) for adj in lam.unbind()]
            through_x, through_u = (torch.stack(parts) for parts in zip(*pulled))
            mu[:, t] = through_u
            if direct_u is not None:
                mu[:, t, :, :own] += direct_u[t]
            for f, letters in enumerate(spec.schedules):
                edges = Flow(letters[t0 + t]).edges
                if spec.decay == 0.0:
                    edges &= ~PHYSICS
                direct = states.new_zeros((nworld, n)) if direct_x is None else direct_x[t]
                lam[f] = _leave(edges, spec.decay, direct, through_x[f], mu[f, t, :, :own], jac, t)
        return mu, lam
    for first, end in pieces(steps, max(1, min(steps, JACOBIAN_ELEMENTS // elements))):
        points, given = states[first:end].flatten(0, 1), controls[first:end].flatten(0, 1)
        x_next, both = simulator.jacobians(points, given)
        again = x_next.view(end - first, nworld, n)
        _check_recomputed(simulator, again, states[first + 1 : end + 1], t0 + first)
        sweep_jacobians(
            spec,
            both.reshape(end - first, nworld, n, n + m),
            None if jac is None else jac[first:end],
            None if direct_x is None else direct_x[first:end],
            None if direct_u is None else direct_u[first:end],
            t0 + first,
            lam,
            mu[:, first:end],
        )
    return mu, lam


def sweep_jacobians(
    spec: Spec,
    jac_step: Tensor,
    jac_policy: Tensor | None,
    direct_x: Tensor | None,
    direct_u: Tensor | None,
    t0: int,
    lam: Tensor,
    mu: Tensor,
) -> None:
    """Takes `lam` (fields, nworld, n) back over the steps whose Jacobians are given, and fills `mu`; see
    kernels/sweeps/linear_sweep.py.
    """
    (fields, nworld, _), like = lam.shape, lam
    device = warp_device(like.device)  # starts Warp, if nobody has
    edges = constant((spec.schedules, spec.decay == 0.0), edge_masks, like.device)

    def given(tensor: Tensor | None, axes: int) -> wp.array:
        tensor = like.new_empty((0,) * axes) if tensor is None else tensor.detach().contiguous()
        return wp.from_torch(tensor, requires_grad=False)

    written = [wp.from_torch(tensor, requires_grad=False) for tensor in (lam, mu, torch.empty_like(lam))]
    with stream(like.device), span("linear_sweep"):
        wp.launch(
            make_linear_sweep(WARP_DTYPE[like.dtype]),
            dim=(nworld, fields),
            inputs=[
                given(jac_step, 4),
                given(jac_policy, 4),
                given(direct_x, 3),
                given(direct_u, 3),
                wp.from_torch(edges),
                spec.decay,
                t0,
            ],
            outputs=written,
            device=device,
            record_tape=False,
        )


def _leave(
    edges: int, decay: float, direct: Tensor, through: Tensor, mu: Tensor, jac: Tensor | None, t: int
) -> Tensor:
    """Cotangent of x_t: a closed gate selects, it never multiplies (0 inf is NaN)."""
    lam = direct
    if edges & PHYSICS:
        lam = lam + decay * through
    if edges & NETWORK:
        assert jac is not None
        lam = torch.baddbmm(lam.unsqueeze(1), mu.unsqueeze(1), jac[t]).squeeze(1)
    return lam


def _direct(
    simulator: Simulator,
    spec: Spec,
    states: Tensor,
    controls: Tensor,
    g: Cotangents,
    t0: int,
    last: bool,
    loss_worlds: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Direct cotangents of states and controls. That of the last state is included only if the sweep begins
    there.
    """
    direct_x, direct_u = g.states, g.controls
    spec.weights.check(simulator.has_loss)
    if g.loss is None or not any(spec.weights):
        return direct_x, direct_u
    steps, nworld, m = controls.shape
    final, running, control = spec.weights.per_world(loss_worlds or nworld, spec.horizon, m)
    # a weight of zero selects: the gradient it would be multiplied by may be infinite
    on = g.loss != 0

    def weighted(weight: float, value: Tensor) -> Tensor:
        assert g.loss is not None
        return torch.where(on, g.loss * weight * value, 0.0)

    if control:
        own = weighted(2.0 * control, controls)
        direct_u = own if direct_u is None else direct_u + own
    if running or (final and last):
        direct_x = states.new_zeros(states.shape) if direct_x is None else direct_x.clone()
        first, end = int(t0 == 0), steps + int(last)
        if running and first < end:
            part = states[first:end]
            gradient = simulator.cost_gradient(part.flatten(0, 1)).view(part.shape)
            direct_x[first:end] += weighted(running, gradient)
        if final and last:
            direct_x[-1] += weighted(final, simulator.cost_gradient(states[-1]))
    return direct_x, direct_u


def _check_recomputed(simulator: Simulator, again: Tensor, stored: Tensor, t0: int) -> None:
    """Raises ValueError unless the step gives the stored next states (steps, nworld, state_size) again."""
    found = furthest(again, stored, TOLERANCE[stored.dtype])
    if found is None:
        return
    t, world, i = found
    raise ValueError(
        f"{name_of(simulator)}: at step {t0 + t}, world {world}, step gave component {i} of the next state "
        f"as {float(stored[t, world, i])!r} in the forward pass and {float(again[t, world, i])!r} when "
        "recomputed for the backward pass, expected the same: a step without random numbers, without state "
        "of its own, and row by row unless rowwise=False says otherwise"
    )

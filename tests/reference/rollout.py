"""The oracle for gradient flows: a rollout unrolled in torch, differentiated by autograd edge by edge.

    u_t     = policy(x_t)          network edge leaves x_t
    x_{t+1} = step(x_t, u_t)       physics edge leaves x_t

A closed edge is ``detach()``: nothing crosses it, whatever the cotangent, infinite ones included. The physics
edge may damp what crosses it by ``decay``. Nothing here is clever or fast: it is to be read and believed.

A step and a policy are any callables ``step(x, u)`` and ``policy(x)``; only an ``nn.Module`` has parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], Tensor]
Policy = Callable[[Tensor], Tensor]
StateLoss = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]


class Edges(NamedTuple):
    """Which of the two edges that leave a state let its cotangents pass."""

    physics: bool
    network: bool


FLOWS = {
    "R": Edges(physics=True, network=True),
    "M": Edges(physics=True, network=False),
    "N": Edges(physics=False, network=True),
    "S": Edges(physics=False, network=False),
}


class Gradients(NamedTuple):
    """What one backward pass gives; all of it under the chosen flow.

    Attributes:
        loss: The objective, a scalar.
        parameters: Gradient by parameter name, tied parameters once, frozen ones absent.
        x0: Gradient of the initial states, ``(n, state_size)``.
        controls: Total gradient of each control, ``(horizon, n, control_size)``: what the policy is asked to
            change. None for the combined flow, which compares parameters and initial states only.
    """

    loss: Tensor
    parameters: dict[str, Tensor]
    x0: Tensor
    controls: Tensor | None


class Direction(NamedTuple):
    """A direction in the space of all parameters and initial states."""

    parameters: dict[str, Tensor]
    x0: Tensor


# Schedules and objectives


def schedule(flow: str | Sequence[str], horizon: int, window: int | None = None) -> list[Edges]:
    """The edges that leave x_0 ... x_{horizon - 1}.

    Args:
        flow: One of ``R M N S``, or a sequence of ``horizon`` of them.
        horizon: Number of steps.
        window: Close both edges at t = window, 2 * window, ...
    """
    letters = list(flow) if len(flow) > 1 else [flow[0]] * horizon
    if len(letters) != horizon:
        raise ValueError(f"schedule: {len(letters)} flows given for {horizon} steps")
    edges = [FLOWS[letter] for letter in letters]
    if window is not None:
        edges = [FLOWS["S"] if t > 0 and t % window == 0 else edge for t, edge in enumerate(edges)]
    return edges


def final(loss: StateLoss) -> Objective:
    """Mean over worlds of the per-state loss of the last state."""
    return lambda states, controls: loss(states[-1]).mean()


def running(loss: StateLoss) -> Objective:
    """Mean over worlds and steps 1 ... T of the per-state loss."""
    return lambda states, controls: loss(states[1:].flatten(0, 1)).mean()


def weighted(
    adj_states: Tensor, adj_controls: Tensor, objective: Objective | None = None, adj_loss: float = 1.0
) -> Objective:
    """A loss that sends the given cotangents to every state and control, and those of another objective."""

    def total(states: Tensor, controls: Tensor) -> Tensor:
        value = (adj_states * states).sum() + (adj_controls * controls).sum()
        return value if objective is None else value + adj_loss * objective(states, controls)

    return total


# Gradients by autograd


class _Damp(torch.autograd.Function):
    """Identity whose backward multiplies by a constant."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, adj_x: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * adj_x, None


def _gate(x: Tensor, is_open: bool, factor: float = 1.0) -> Tensor:
    # Selects: a factor of 0 must close the edge, because 0 * inf would let a NaN through.
    if not is_open or factor == 0.0:
        return x.detach()
    return x if factor == 1.0 else _Damp.apply(x, factor)


def _unroll(
    step: Step, policy: Policy, x0: Tensor, edges: Sequence[Edges], decay: float
) -> tuple[list[Tensor], list[Tensor]]:
    states, controls = [x0], []
    for edge in edges:
        x = states[-1]
        u = policy(_gate(x, edge.network))
        states.append(step(_gate(x, edge.physics, decay), u))
        controls.append(u)
    return states, controls


def rollout(
    step: Step, policy: Policy, x0: Tensor, edges: Sequence[Edges], decay: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Unroll ``len(edges)`` steps from ``x0`` ``(n, s)``.

    Returns:
        States ``(T + 1, n, s)`` and controls ``(T, n, m)``, connected by autograd where the edges are open.
    """
    states, controls = _unroll(step, policy, x0, edges, decay)
    return torch.stack(states), torch.stack(controls)


def named_parameters(policy: Policy) -> dict[str, Tensor]:
    """The parameters that get gradients: tied ones once, frozen ones not."""
    if not isinstance(policy, nn.Module):
        return {}
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def gradients(
    step: Step,
    policy: Policy,
    x0: Tensor,
    flow: str | Sequence[str],
    horizon: int,
    objective: Objective,
    *,
    window: int | None = None,
    decay: float = 1.0,
) -> Gradients:
    """Gradients of ``objective(states, controls)`` under a flow.

    Args:
        step: Simulator, ``(n, s), (n, m) -> (n, s)``.
        policy: ``(n, s) -> (n, m)``.
        x0: Initial states, ``(n, s)``.
        flow: One of ``R M N S C``, or a sequence of ``horizon`` of the first four.
        horizon: Number of steps T.
        objective: Scalar of states ``(T + 1, n, s)`` and controls ``(T, n, m)``.
        window: Truncation window, see `schedule`.
        decay: Multiplies every cotangent that crosses a physics edge.
    """
    if flow == "C":
        base, check = (
            gradients(step, policy, x0, letter, horizon, objective, window=window, decay=decay)
            for letter in "MR"
        )
        parameters = {
            name: combine(base.parameters[name], check.parameters[name]) for name in base.parameters
        }
        return Gradients(base.loss, parameters, combine(base.x0, check.x0), None)

    def probed(x: Tensor) -> Tensor:
        u = policy(x)
        # Without parameters and behind a closed edge u is a constant; its gradient is wanted all the same.
        return u if u.requires_grad else u.detach().requires_grad_()

    x0 = x0.detach().requires_grad_()
    parameters = named_parameters(policy)
    states, controls = _unroll(step, probed, x0, schedule(flow, horizon, window), decay)
    value = objective(torch.stack(states), torch.stack(controls))
    inputs = [*parameters.values(), x0, *controls]
    found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    count = len(parameters)
    return Gradients(
        value.detach(),
        dict(zip(parameters, found[:count], strict=True)),
        found[count],
        torch.stack(found[count + 1 :]),
    )


def combine(base: Tensor, check: Tensor) -> Tensor:
    """Per component, base where it and check have the same sign (zero is a sign of its own), else 0.

    A NaN or an infinity in base stays: it must not look like a disagreement. One in check agrees with nothing
    and gives 0.
    """
    same = ((base > 0) == (check > 0)) & ((base < 0) == (check < 0)) & torch.isfinite(check)
    return torch.where(same | ~torch.isfinite(base), base, torch.zeros_like(base))


# Gradients by finite differences


def random_directions(policy: Policy, x0: Tensor, count: int, seed: int = 0) -> list[Direction]:
    """Directions with standard normal components for every parameter and initial state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    return [
        Direction({name: draw(p) for name, p in named_parameters(policy).items()}, draw(x0))
        for _ in range(count)
    ]


def along(result: Gradients, direction: Direction) -> Tensor:
    """Derivative along a direction that the gradients predict, a scalar."""
    by_parameter = [(result.parameters[name] * d).sum() for name, d in direction.parameters.items()]
    return sum(by_parameter, start=(result.x0 * direction.x0).sum())


def gradients_by_finite_differences(
    step: Step,
    policy: nn.Module,
    x0: Tensor,
    flow: str | Sequence[str],
    horizon: int,
    objective: Objective,
    directions: Sequence[Direction],
    *,
    window: int | None = None,
    decay: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """Central differences of the objective along directions; needs no derivative of anything.

    A flow other than R is not the gradient of the rollout, but it is the gradient of one whose closed edges
    read the nominal trajectory instead of the perturbed one, and whose damped edges read a point in between.
    That is what is evaluated here. Flow C is no gradient of anything and has no such form.

    Args:
        step: Simulator, as for `gradients`.
        policy: Policy, in float64.
        x0: Initial states, in float64.
        flow: One of ``R M N S``, or a sequence of ``horizon`` of them.
        horizon: Number of steps.
        objective: Scalar of states and controls.
        directions: What to perturb along.
        window: Truncation window, see `schedule`.
        decay: Damping of the physics edges.
        eps: Step of the differences.

    Returns:
        One derivative per direction, to be compared with `along`.
    """
    edges = schedule(flow, horizon, window)
    parameters = {name: p.detach() for name, p in named_parameters(policy).items()}

    def call(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(policy, dict(values), (x,))

    with torch.no_grad():
        nominal, _ = _unroll(step, policy, x0, edges, decay)

        def value(direction: Direction, h: float) -> Tensor:
            moved = {name: p + h * direction.parameters[name] for name, p in parameters.items()}
            states, controls = [x0 + h * direction.x0], []
            for x_frozen, edge in zip(nominal[:-1], edges, strict=True):
                x = states[-1]
                u = call(moved, x if edge.network else x_frozen)
                states.append(step(x_frozen + decay * (x - x_frozen) if edge.physics else x_frozen, u))
                controls.append(u)
            return objective(torch.stack(states), torch.stack(controls))

        return torch.stack([(value(d, eps) - value(d, -eps)) / (2.0 * eps) for d in directions])

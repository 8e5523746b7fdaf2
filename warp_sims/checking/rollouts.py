"""Whole rollouts under each flow, against finite differences.

The gradient of a flow is that of a rollout whose closed edges read the nominal trajectory x̄ instead of the
state. With N' the policy of changed parameters, and decay γ on what crosses a physics edge,

    u_t     = N'(x_t)          network edge open,       N'(x̄_t)             closed
    x_{t+1} = S(x̄_t + γ (x_t - x̄_t), u_t)   physics edge open,       S(x̄_t, u_t)         closed

This needs forward steps only, so no adjoint is used in the numbers that the engine's gradients are compared
with. The combined gradient is compared with the two gradients that it is made of.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..kernels.flow import NETWORK, PHYSICS, Flow
from ..policies.networks import MLP
from ..rollouts import rollout
from ..systems import System
from .compare import compare, exactly, settled
from .differences import differentiate
from .forms import Form
from .functions import DOUBLE, Points
from .report import Comparison

__all__ = ["check_rollouts"]

WORLDS, HORIZON, DECAY = 3, 5, 0.9
CONTROL_COST = 0.3
HIDDEN = (7, 5)
STATES = 6
"""Components of x0 that are moved one by one, at most; one direction moves all."""
SINGLE = 2e-3
"""Of gradients in float32 against float64, relative to each parameter's largest: a rollout of 5 steps."""


class _Evaluated(nn.Module):
    """A policy that torch evaluates: the same perceptron, by a function that runs in no sweep."""

    def __init__(self, inner: MLP) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.atleast_2d(self.inner(x))


class _Case(NamedTuple):
    """A rollout with all its numbers."""

    system: System
    policy: MLP
    x0: Tensor
    weights: Tensor
    """(horizon + 1, nworld, state_size) of all states, for an objective that every system has."""
    control_weights: Tensor

    @property
    def objectives(self) -> list[str]:
        """Names of what is differentiated."""
        own = ["final loss", "running loss"] if self.system.has_loss else []
        return [*own, "random combination of states and controls"]

    def to(self, dtype: torch.dtype) -> "_Case":
        """The same in another dtype."""
        policy = MLP(self.system.state_size, HIDDEN, self.system.control_size, dtype=dtype)
        policy.load_state_dict(self.policy.state_dict())
        tensors = (t.to(dtype) for t in (self.x0, self.weights, self.control_weights))
        return _Case(self.system, policy, *tensors)


def _make_case(system: System, points: Points, seed: int) -> _Case:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    policy = MLP(system.state_size, HIDDEN, system.control_size, dtype=torch.float64)
    scale = points.scale[: system.state_size]
    with torch.no_grad():
        for parameter in policy.parameters():
            # large enough that R and M differ in sign somewhere
            parameter.copy_(normal(*parameter.shape).float())
        policy[0].weight.div_(scale * system.state_size**0.5).copy_(policy[0].weight.float())
    worlds = torch.arange(WORLDS) * max(1, len(points.x) // WORLDS) % len(points.x)
    return _Case(
        system,
        policy,
        points.x[worlds],
        normal(HORIZON + 1, WORLDS, system.state_size).float().double() / scale.float().double(),
        normal(HORIZON, WORLDS, system.control_size).float().double(),
    )


class _Directions(NamedTuple):
    """Directions in the space of parameters and initial states, each with the name of what it moves."""

    names: list[str]
    parameters: dict[str, Tensor]
    """(directions, *shape)."""
    x0: Tensor
    """(directions, nworld, state_size)."""

    def along(self, gradients: dict[str, Tensor], x0: Tensor) -> Tensor:
        """Derivatives along all directions from a gradient."""
        total = (self.x0 * x0.double()).flatten(1).sum(1)
        for name, direction in self.parameters.items():
            total = total + (direction * gradients[name].double()).flatten(1).sum(1)
        return total


def _directions(case: _Case, length: Tensor) -> _Directions:
    draw = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    size = case.system.state_size
    named = dict(case.policy.named_parameters())
    moved = torch.linspace(0, size - 1, min(size, STATES)).round().long().tolist()
    names = [*named, *(f"x0[{i}]" for i in moved), "x0"]
    x0 = torch.zeros(len(names), *case.x0.shape, dtype=torch.float64)
    parameters = {name: torch.zeros(len(names), *q.shape, dtype=torch.float64) for name, q in named.items()}
    for d, name in enumerate(named):
        parameters[name][d] = normal(*named[name].shape)
    for d, i in enumerate(moved, len(named)):
        x0[d, :, i] = normal(WORLDS) * length[i]
    x0[-1] = normal(*case.x0.shape) * length
    return _Directions(names, parameters, x0)


def _differences(case: _Case, form: Form, flow: Flow, directions: _Directions, nominal: Tensor) -> Any:
    """Derivatives of all objectives along all directions, (1, objectives, directions), forward only."""
    physics, network = bool(flow.edges & PHYSICS), bool(flow.edges & NETWORK)
    named = {name: q.detach() for name, q in case.policy.named_parameters()}

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(case.policy, parameters, (x,))

    def objectives(lengths: Tensor) -> Tensor:
        count = lengths.shape[0]
        moved = {n: q + torch.tensordot(lengths, directions.parameters[n], 1) for n, q in named.items()}
        x = case.x0 + torch.tensordot(lengths, directions.x0, 1)
        states, controls, costs = [x], [], []
        for t in range(HORIZON):
            frozen = nominal[t].expand_as(x)
            u = vmap(call)(moved, x if network else frozen)
            read = frozen + DECAY * (x - frozen) if physics else frozen
            x = _step(form, read.flatten(0, 1), u.flatten(0, 1))[0].view_as(x)
            states.append(x)
            controls.append(u)
            if case.system.has_loss:
                cost = _step(form, x.flatten(0, 1), u.flatten(0, 1))[1]
                assert cost is not None
                costs.append(cost.view(count, WORLDS).mean(1))
        all_states, all_controls = torch.stack(states, 1), torch.stack(controls, 1)
        effort = CONTROL_COST * all_controls.square().flatten(1).mean(1)
        combination = (all_states * case.weights).flatten(1).sum(1)
        combination = combination + (all_controls * case.control_weights).flatten(1).sum(1)
        if not case.system.has_loss:
            return combination[:, None]
        run = torch.stack(costs).sum(0)
        run = run / HORIZON if case.system.running_reduction == "mean" else run
        return torch.stack([costs[-1] + effort, run + effort, combination], 1)

    zero = torch.zeros(1, len(directions.names), dtype=torch.float64)
    return differentiate(objectives, zero, torch.ones(len(directions.names), dtype=torch.float64))


def _step(form: Form, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None]:
    found = form.run(x, u, x[None], x[:, 0])
    return found.x_next, found.cost


def _gradients(
    case: _Case, policy: nn.Module, flow: Flow, objective: str, device: torch.device
) -> dict[str, Tensor]:
    """The engine's gradients by name, "x0" among them."""
    policy = copy.deepcopy(policy).to(device)
    x0 = case.x0.detach().clone().to(device).requires_grad_()
    own = objective.split()[0] if objective.endswith("loss") else None
    out = rollout(
        case.system,
        policy,
        x0,
        horizon=HORIZON,
        flow=flow,
        loss=own,
        control_cost=CONTROL_COST if own else 0.0,
        decay=DECAY,
    )
    if own:
        total = out.loss
    else:
        total = (out.states * case.weights.to(device)).sum() + (
            out.controls * case.control_weights.to(device)
        ).sum()
    assert total is not None
    named = dict(policy.named_parameters())
    found = torch.autograd.grad(total, [*named.values(), x0])
    return {
        name.removeprefix("inner."): g.detach().cpu() for name, g in zip([*named, "x0"], found, strict=True)
    }


def check_rollouts(system: System, form: Form, points: Points, seed: int) -> list[Comparison]:
    """Returns the comparisons of whole rollouts, the policy fused and evaluated by torch."""
    return list(_comparisons(_make_case(system, points, seed), form, points))


def _comparisons(case: _Case, form: Form, points: Points) -> Iterator[Comparison]:
    directions = _directions(case, points.length[: case.system.state_size])
    device = form.device
    paths: dict[str, Callable[[_Case], nn.Module]] = {
        "fused": lambda c: c.policy,
        "by torch": lambda c: _Evaluated(c.policy),
    }
    with torch.no_grad():
        states = [case.x0]
        for _ in range(HORIZON):
            states.append(_step(form, states[-1], case.policy(states[-1]))[0])
    nominal = torch.stack(states)
    found: dict[tuple[str, str], dict[str, dict[str, Tensor]]] = {}
    for flow in (Flow.REGULAR, Flow.MODIFIED, Flow.NETWORK, Flow.STOPPED):
        exact = _differences(case, form, flow, directions, nominal)
        usable = settled(exact, None, DOUBLE)
        for path, make in paths.items():
            gradients = {o: _gradients(case, make(case), flow, o, device) for o in case.objectives}
            found[path, flow.value] = gradients
            along = [directions.along(g, g["x0"]) for g in gradients.values()]
            yield compare(
                f"rollout {flow.value}, policy {path}",
                "float64",
                "finite differences",
                torch.stack(along)[None],
                exact.value,
                case.objectives,
                directions.names,
                tolerance=DOUBLE,
                usable=usable,
            )
    for path, make in paths.items():
        gradients = {o: _gradients(case, make(case), Flow.COMBINED, o, device) for o in case.objectives}
        failed, count = [], 0
        for objective, combined in gradients.items():
            for name, value in combined.items():
                regular, modified = (found[path, letter][objective][name] for letter in "RM")
                count += value.numel()
                if not _is_combined(value, modified, regular):
                    failed.append(f"{objective} by {name}")
        yield exactly(f"rollout C, policy {path}", "float64", "M where R has its sign", failed, count)
    yield from _single(case, found, paths["fused"], device)


def _is_combined(value: Tensor, modified: Tensor, regular: Tensor) -> bool:
    """Whether `value` is M where R has its sign and 0 elsewhere; where one of them is rounding, either will
    do.
    """
    expected = torch.where(torch.sign(modified) == torch.sign(regular), modified, 0.0)
    near = 1e-9 * max(float(modified.abs().max()), float(regular.abs().max()))
    close = (value - expected).abs() <= near
    unsure = (modified.abs() <= near) | (regular.abs() <= near)
    return bool((close | unsure).all())


def _single(
    case: _Case, found: Any, make: Callable[[_Case], nn.Module], device: torch.device
) -> Iterator[Comparison]:
    """Float32 against float64, and two runs of the same."""
    narrow = case.to(torch.float32)
    objective = case.objectives[0]
    for flow in (Flow.REGULAR, Flow.MODIFIED):
        once, again = (_gradients(narrow, make(narrow), flow, objective, device) for _ in range(2))
        failed = [
            f"{objective} by {name}"
            for name, expected in found["fused", flow.value][objective].items()
            if not bool(((once[name] - expected).abs() <= SINGLE * expected.abs().max()).all())
        ]
        count = sum(g.numel() for g in once.values())
        yield exactly(f"rollout {flow.value}, policy fused", "float32", "float64", failed, count)
        changed = [name for name in once if not torch.equal(once[name], again[name])]
        yield exactly(f"rollout {flow.value}, policy fused", "float32", "the same, run again", changed, count)

"""Rollouts to test: systems beside their torch reference, policies on both roads, random cotangents."""

from functools import partial
from typing import NamedTuple

import torch
from own_systems import Pendulum, Unicycle
from reference import cartpole, guidance, pendulum, quadrotor, quantum, unicycle
from reference import rollout as oracle
from torch import Tensor, nn

import warp_sims as ws
from warp_sims.policies.networks import fused_network

FLOWS = ("R", "M", "N", "S", "C")
ROADS = ("fused", "torch")
SEED = 2  # with it, M and R differ in sign in some 10% of the components of most cases


class Evaluated(nn.Module):
    """A policy that computes what a network does, by a function that runs in no sweep: torch evaluates it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.atleast_2d(self.net(x))


def on_road(road: str, net: nn.Module) -> nn.Module:
    """The network as a policy of the fused road, or of the one that torch evaluates."""
    return net if road == "fused" else Evaluated(net)


def make_net(system: ws.System, hidden=(9, 7), dtype=torch.float64, seed=SEED, gain=4.0) -> ws.MLP:
    """A perceptron with biases, and so strong a feedback that the flows disagree in sign here and there."""
    net = ws.MLP(system.state_size, hidden, system.control_size, dtype=dtype)
    net.reset_parameters(seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        net[-1].weight.mul_(gain)
    return net


def describe(*sizes: int) -> str:
    """The description of a perceptron with these sizes, from the states to the controls."""
    return fused_network(ws.MLP(sizes[0], sizes[1:-1], sizes[-1])).description


def make_states(system: ws.System, nworld: int, dtype=torch.float64, seed=SEED) -> Tensor:
    """Initial states with standard normal components."""
    draw = torch.Generator().manual_seed(seed + 1)
    return torch.randn(nworld, system.state_size, generator=draw, dtype=torch.float64).to(dtype)


class Cotangents(NamedTuple):
    """Cotangents of everything that a rollout returns."""

    states: Tensor
    controls: Tensor
    loss: Tensor


def make_cotangents(
    system: ws.System, horizon: int, nworld: int, dtype=torch.float64, seed=SEED
) -> Cotangents:
    """Standard normal cotangents of states, controls and loss."""
    draw = torch.Generator().manual_seed(seed + 2)
    shapes = (horizon + 1, nworld, system.state_size), (horizon, nworld, system.control_size), ()
    return Cotangents(*(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes))


def step_of(system: ws.System) -> oracle.Step:
    """The torch reference of a system's step."""
    if isinstance(system, ws.CartPole):
        numbers = {name: getattr(system, name) for name in ("dt", "gravity", "pole_mass", "total_mass")}
        return partial(cartpole.step, **numbers, length=system.pole_length)
    if isinstance(system, Pendulum):
        numbers = ("dt", "gravity", "mass", "length", "damping")
        return partial(pendulum.step, **{name: getattr(system, name) for name in numbers})
    if isinstance(system, ws.GuidanceByRepulsion):
        numbers = {name: value for name, value in vars(system).items() if isinstance(value, float)}
        return partial(guidance.step, **numbers)
    if isinstance(system, ws.Quadrotor):
        costs = ("velocity_cost", "rate_cost")
        return partial(
            quadrotor.step, **{k: v for k, v in vars(system).items() if k[0] != "_" and k not in costs}
        )
    if isinstance(system, ws.QuantumControl):
        return partial(quantum.step, dt=system.dt, length=system.length)
    assert isinstance(system, Unicycle)
    return partial(unicycle.step, dt=system.dt)


def cost_of(system: ws.System) -> oracle.StateLoss:
    """The torch reference of a system's cost of a state."""
    if isinstance(system, ws.GuidanceByRepulsion):
        return partial(guidance.loss, drivers=system.drivers)
    if isinstance(system, ws.Quadrotor):
        return partial(quadrotor.loss, velocity_cost=system.velocity_cost, rate_cost=system.rate_cost)
    if isinstance(system, ws.QuantumControl):
        return partial(quantum.loss, target=system.target)
    return {ws.CartPole: cartpole.loss, Pendulum: pendulum.loss}[type(system)]


def summed(loss: oracle.StateLoss) -> oracle.Objective:
    """Mean over worlds of the sum over steps 1 ... T of the per-state loss."""
    return lambda states, controls: loss(states[1:].flatten(0, 1)).sum() / states.shape[1]


def objective_of(system: ws.System, loss, control_cost=0.0) -> oracle.Objective:
    """The torch reference of `ws.rollout(..., loss=loss, control_cost=control_cost)`."""
    if loss is None:
        return lambda states, controls: states.new_zeros(())
    if callable(loss):
        value = loss
    else:
        running = summed if system.running_reduction == "sum" else oracle.running
        value = {"final": oracle.final, "running": running}[loss](cost_of(system))
    return lambda states, controls: value(states, controls) + control_cost * (controls**2).mean()


def gradients(
    system, policy, x0, horizon, flow, *, loss="final", control_cost=0.0, cotangents=None, **options
) -> dict[str, Tensor]:
    """Loss, gradients by parameter name, and the gradient of "x0", from one `backward()` of the engine.

    Names are those of the perceptron on either road.
    """
    x0 = x0.detach().requires_grad_()
    policy.zero_grad()
    out = ws.rollout(
        system, policy, x0, horizon=horizon, flow=flow, loss=loss, control_cost=control_cost, **options
    )
    expected_path = {ws.MLP: True, ws.WaveCNN: True, Evaluated: False}
    assert out.fused == expected_path.get(type(policy), out.fused)
    if cotangents is None:
        out.loss.backward()
    else:
        pairs = list(zip((out.states, out.controls, out.loss), cotangents, strict=True))
        outputs, adjoints = zip(*pairs[: 2 if loss is None else 3], strict=True)
        torch.autograd.backward(outputs, adjoints)
    found = {name.removeprefix("net."): p.grad for name, p in policy.named_parameters() if p.requires_grad}
    return found | {"x0": x0.grad} | ({} if out.loss is None else {"loss": out.loss.detach()})


def expected_gradients(
    system, policy, x0, horizon, flow, *, loss="final", control_cost=0.0, cotangents=None, **options
) -> dict[str, Tensor]:
    """What `gradients` should return, by the torch oracle."""
    objective = own = objective_of(system, loss, control_cost)
    if cotangents is not None:
        objective = oracle.weighted(cotangents.states, cotangents.controls, own, cotangents.loss)
    found = oracle.gradients(step_of(system), policy, x0, flow, horizon, objective, **options)
    parameters = {name.removeprefix("net."): gradient for name, gradient in found.parameters.items()}
    if loss is None:
        return parameters | {"x0": found.x0}
    with torch.no_grad():
        value = own(*oracle.rollout(step_of(system), policy, x0, oracle.schedule("R", horizon)))
    return parameters | {"x0": found.x0, "loss": value}


def derivatives_along(
    directions, system, policy, x0, horizon, flow, *, control_cost=0.0, **options
) -> tuple[Tensor, Tensor]:
    """Derivatives along directions: as the engine's gradients predict them, and by finite differences.

    Of a rollout with the running loss, and cotangents on states, controls and loss at once. The differences
    are those of a rollout whose closed edges read the nominal trajectory, and need no derivative of anything.
    """
    cotangents = make_cotangents(system, horizon, x0.shape[0])
    objective = oracle.weighted(
        cotangents.states, cotangents.controls, objective_of(system, "running", control_cost), cotangents.loss
    )
    asked = {"loss": "running", "control_cost": control_cost, "cotangents": cotangents}
    found = gradients(system, policy, x0, horizon, flow, **asked, **options)
    named = {name: found[name.removeprefix("net.")] for name, _ in policy.named_parameters()}
    result = oracle.Gradients(found["loss"], named, found["x0"], None)
    differences = oracle.gradients_by_finite_differences(
        step_of(system), policy, x0, flow, horizon, objective, directions, **options
    )
    return torch.stack([oracle.along(result, direction) for direction in directions]), differences


def error_of(actual: Tensor, expected) -> float:
    """Norm of the difference, relative to the norm of what is expected (absolute where that is zero)."""
    expected = torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = float(torch.linalg.vector_norm(expected))
    return float(torch.linalg.vector_norm(actual.detach().double() - expected)) / (scale or 1.0)


def assert_close(actual, expected, tolerance: float) -> None:
    """Compares tensors, or every tensor of two dictionaries, by `error_of`."""
    if not isinstance(actual, dict):
        actual, expected = {"": actual}, {"": expected}
    assert actual.keys() == expected.keys()
    errors = {name: error_of(actual[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors {wrong}, allowed {tolerance}"


def assert_step_and_vjp(system: ws.System, x: Tensor, u: Tensor, adj: Tensor, tolerance: float) -> None:
    """Compares a step, and what it makes of a cotangent of the next states, with the torch reference."""
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    actual, expected = ws.step(system, x, u), step_of(system)(x, u)
    assert_close(actual, expected.detach(), tolerance)
    for a, b in zip(torch.autograd.grad(actual, (x, u), adj), torch.autograd.grad(expected, (x, u), adj)):
        assert_close(a, b, tolerance)


def assert_all_differ(gradients_by_flow: list[Tensor]) -> None:
    """Where two flows agree, comparing each with its reference would prove little."""
    for i, a in enumerate(gradients_by_flow):
        for b in gradients_by_flow[:i]:
            assert torch.linalg.vector_norm(a - b) > 1e-3 * torch.linalg.vector_norm(b)

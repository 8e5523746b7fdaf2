"""Herding: the kernels against the torch oracle, finite differences, and what the equations promise.

The authors' numbers are in test_golden.py.
"""

import dataclasses

import pytest
import torch
from cases import (
    FLOWS,
    ROADS,
    assert_all_differ,
    assert_close,
    assert_step_and_vjp,
    cost_of,
    derivatives_along,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
    step_of,
)
from reference import rollout as oracle

import warp_sims as ws

# Relative to the norm of each tensor: rounding over up to 12 steps, with forces that grow as 1/d^2; measured
# 1e-14 in float64 and 2e-6 in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
# Central differences with steps of 1e-5: third derivatives, large where agents are close, and cancellation.
TOLERANCE_DIFFERENCES = 1e-6
HORIZON = 12
SIZES = [(1, 1), (1, 3), (3, 2)]
OTHER_NUMBERS = {
    "dt": 0.05,
    "driver_drag": 0.7,
    "driver_repulsion": 0.9,
    "evader_drag": 2.0,
    "evader_repulsion": 6.0,
    "flocking": 1.7,
    "flocking_length": 0.8,
    "softening": 0.3,
}


def herd(drivers, evaders, **numbers):
    """Every constant away from its default, so that none is mistaken for another."""
    return ws.GuidanceByRepulsion(drivers=drivers, evaders=evaders, **OTHER_NUMBERS | numbers)


def controls_of(system, nworld, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(nworld, system.control_size, generator=draw, dtype=torch.float64).to(dtype)


# One step


@pytest.mark.parametrize("sizes", [*SIZES, (2, 4)])
def test_step_and_its_vjp(sizes):
    system = herd(*sizes)
    x, adj = make_states(system, 17), make_states(system, 17, seed=5)
    assert_step_and_vjp(system, x, controls_of(system, 17), adj, TOLERANCE[x.dtype])


def test_finite_differences_of_a_step():
    system = herd(3, 2)
    x, u = make_states(system, 3).requires_grad_(), controls_of(system, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: ws.step(system, *args), (x, u))


def test_one_pair_by_hand():
    """One driver at the right of one evader: worked out on paper from the published constants."""
    system = ws.GuidanceByRepulsion(drivers=1, evaders=1, dt=1.0)
    x = torch.tensor([[0.9, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    u = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    # center (0.9, 0), perp (0, 0.9), d = 0.1 + 0.9 = 1
    driver = [0.9 + 2.0, 0.0, 2.0 + 2 * 0.9 - 1.0 * 2.0, 5 * 0.9]
    evader = [0.0, 3.0, -15 * 0.9, 3.0 - 4.0 * 3.0]
    assert_close(ws.step(system, x, u), torch.tensor([driver + evader], dtype=x.dtype), 1e-14)


def test_the_driver_turns_about_the_sum_of_the_evaders():
    """Not about their mean: so it is published."""
    system = ws.GuidanceByRepulsion(drivers=1, evaders=3, evader_repulsion=0.0, driver_drag=0.0, dt=1.0)
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, 4], x[0, 8] = 1.0, 3.0
    v = ws.step(system, x, torch.ones(1, 2, dtype=torch.float64))[0, 2:4]
    assert_close(v, torch.tensor([-4.0, -4.0]), 1e-14)


def test_cost_is_the_mean_square_of_the_evaders():
    system = herd(3, 2)
    x0 = make_states(system, 5)
    out = ws.rollout(system, make_net(system), x0, horizon=1, loss="final")
    evaders = out.states[1].view(5, 5, 4)[:, 3:, :2]
    assert_close(out.loss, evaders.square().mean().detach(), 1e-14)
    assert_close(out.loss, cost_of(system)(out.states[1]).mean().detach(), 1e-14)


# Where agents coincide, |r| has no derivative, r / d^2 has


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pair", [(0, 1), (3, 4), (2, 3), (0, 4)], ids=str)
def test_agents_that_coincide(pair, dtype):
    system = herd(3, 2)
    x = make_states(system, 3, dtype)
    x[:, 4 * pair[0] : 4 * pair[0] + 2] = x[:, 4 * pair[1] : 4 * pair[1] + 2]
    u, adj = controls_of(system, 3, dtype), make_states(system, 3, dtype, seed=5)
    x, u = x.requires_grad_(), u.requires_grad_()
    x_next = ws.step(system, x, u)
    found = torch.autograd.grad(x_next, (x, u), adj)
    assert all(tensor.isfinite().all() for tensor in (x_next, *found))

    reference = step_of(system)(x.double(), u.double())
    expected = torch.autograd.grad(reference, (x, u), adj.double())
    assert_close(x_next, reference.detach(), TOLERANCE[dtype])
    for a, b in zip(found, expected):
        assert_close(a, b, TOLERANCE[dtype])


def test_the_derivative_where_agents_coincide():
    """By differences: the force is r / softening^2 there, to first order."""
    system = herd(1, 1)
    x, adj = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    adj[0, 6] = 1.0  # of the evader's speed along x
    x.requires_grad_()
    u = torch.zeros(1, 2, dtype=torch.float64)
    (adj_x,) = torch.autograd.grad(ws.step(system, x, u), x, adj)
    slope = system.dt * system.evader_repulsion / system.softening**2
    assert_close(adj_x[0, [0, 4]], torch.tensor([-slope, slope], dtype=x.dtype), 1e-14)
    h = 1e-9
    ahead, behind = (ws.step(system, x.detach() + d * torch.eye(8)[4].double(), u)[0, 6] for d in (h, -h))
    # |r| enters as softening^-3 h
    assert_close((ahead - behind) / (2 * h), slope, 1e-7)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("flow", FLOWS)
def test_all_agents_in_one_place(flow, road):
    """They stay there, at first; nothing becomes NaN."""
    system = herd(3, 2)
    policy, x0 = on_road(road, make_net(system)), torch.zeros(2, system.state_size, dtype=torch.float64)
    options = {"loss": "running", "control_cost": 0.1}
    found = gradients(system, policy, x0, 5, flow, **options)
    assert_close(found, expected_gradients(system, policy, x0, 5, flow, **options), TOLERANCE[x0.dtype])
    assert all(tensor.isfinite().all() for tensor in found.values())


# Rollouts


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_the_oracles(sizes, flow, road):
    """Cotangents on states, controls and loss at once."""
    system = herd(*sizes)
    policy, x0 = on_road(road, make_net(system, gain=1.0)), make_states(system, 3)
    options = {"cotangents": make_cotangents(system, HORIZON, 3), "loss": "running", "control_cost": 0.7}
    actual = gradients(system, policy, x0, HORIZON, flow, **options)
    expected = expected_gradients(system, policy, x0, HORIZON, flow, **options)
    assert_close(actual, expected, TOLERANCE[x0.dtype])


def test_the_flows_differ():
    """Otherwise the comparison above would prove little."""
    system = herd(3, 2)
    policy, x0 = make_net(system, gain=1.0), make_states(system, 3)
    options = {"loss": "running", "control_cost": 0.7}
    found = [gradients(system, policy, x0, HORIZON, flow, **options)["0.weight"] for flow in FLOWS]
    assert_all_differ(found)


@pytest.mark.parametrize("flow, options", [("R", {}), ("M", {"decay": 0.5}), ("N", {"window": 5}), ("S", {})])
def test_finite_differences(flow, options):
    system = herd(3, 2)
    policy, x0 = make_net(system, gain=1.0), make_states(system, 3)
    directions = oracle.random_directions(policy, x0, 2)
    actual, expected = derivatives_along(
        directions, system, policy, x0, HORIZON, flow, control_cost=0.3, **options
    )
    assert_close(actual, expected, TOLERANCE_DIFFERENCES)


@pytest.mark.parametrize("flow", FLOWS)
def test_single_precision(flow):
    system = ws.GuidanceByRepulsion()
    net, x0 = make_net(system, dtype=torch.float32, gain=1.0), system.initial_states(5)
    actual = gradients(system, net, x0, HORIZON, flow, loss="running", control_cost=0.1)
    net, x0 = net.double(), x0.double()
    expected = expected_gradients(system, net, x0, HORIZON, flow, loss="running", control_cost=0.1)
    assert_close(actual, expected, TOLERANCE[torch.float32])


def test_stopped_sees_only_the_control_cost():
    """Positions move with the old velocity: within one step no control reaches an evader."""
    system, policy = herd(3, 2), make_net(herd(3, 2))
    x0 = make_states(system, 3)
    free = gradients(system, policy, x0, 5, "S", loss="running")
    assert not any(free[name].any() for name, _ in policy.named_parameters())
    priced = gradients(system, policy, x0, 5, "S", loss="running", control_cost=0.1)
    assert all(priced[name].any() for name, _ in policy.named_parameters())


# What is refused


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"drivers": 0}, ValueError, "drivers is 0, expected at least 1"),
        ({"evaders": -1}, ValueError, "evaders is -1, expected at least 1"),
        ({"drivers": 2.0}, TypeError, "drivers is 2.0 of type float, expected an int"),
        ({"evaders": True}, TypeError, "evaders is True of type bool"),
        ({"dt": 0}, ValueError, "dt is 0.0, expected a finite number above 0"),
        ({"dt": float("inf")}, ValueError, "dt is inf"),
        ({"softening": 0.0}, ValueError, "softening is 0.0, expected a finite number above 0"),
        ({"flocking": float("nan")}, ValueError, "flocking is nan, expected a finite number"),
        ({"evader_drag": "4"}, TypeError, "evader_drag is '4' of type str, expected a number"),
    ],
)
def test_bad_numbers(fields, error, message):
    with pytest.raises(error, match=f"^GuidanceByRepulsion: {message}"):
        ws.GuidanceByRepulsion(**fields)


def test_bad_input():
    system = ws.GuidanceByRepulsion(drivers=1, evaders=2)
    x0 = system.initial_states(3)
    with pytest.raises(ValueError, match=r"x0 has shape \(3, 12\), expected \(nworld, 24\) for Guidance"):
        ws.rollout(ws.GuidanceByRepulsion(), make_net(system), x0, horizon=2)
    with pytest.raises(ValueError, match="12 inputs to 1 outputs, expected 12 .state_size. to 2"):
        ws.rollout(system, ws.MLP(12, (4,), 1), x0, horizon=2)
    with pytest.raises(ValueError, match=r"u has shape \(3, 4\), expected .* = \(3, 2\)"):
        ws.step(system, x0, torch.zeros(3, 4))
    for options, message in (
        ({"n": -1}, "n is -1, expected at least 0"),
        ({"n": 2, "seed": -1}, "seed is -1"),
        ({"n": 2, "split": "dev"}, "split is 'dev', expected"),
    ):
        with pytest.raises(ValueError, match=f"^GuidanceByRepulsion.initial_states: {message}"):
            system.initial_states(**options)
    with pytest.raises(TypeError, match="n is 2.5 of type float, expected an int"):
        system.initial_states(2.5)


def test_equal_systems_are_one():
    assert ws.GuidanceByRepulsion() == ws.GuidanceByRepulsion(dt=4 / 60)
    assert hash(herd(2, 3)) == hash(herd(2, 3))
    assert dataclasses.replace(herd(2, 3), drivers=3).state_size == 24


def test_initial_states():
    system = ws.GuidanceByRepulsion(drivers=3, evaders=2)
    train, test = (
        system.initial_states(50, seed=7, split=split).view(50, 5, 4) for split in ("train", "test")
    )
    assert torch.equal(system.initial_states(50, seed=7).view(50, 5, 4), train)
    assert not torch.equal(train, test)
    for states in (train, test):
        distances = torch.linalg.vector_norm(states[:, :3, :2], dim=-1)
        assert ((distances >= 3 - 1e-6) & (distances <= 4 + 1e-6)).all()
        assert (states[:, 3, :2] - states[:, 4, :2]).abs().max() <= 1 + 1e-6
        assert not states[..., 2:].any()
    assert system.initial_states(0).shape == (0, 20)
    assert system.initial_states(2, dtype=torch.float64).dtype == torch.float64

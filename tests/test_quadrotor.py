"""The quadrotor: its step beside the reference, rollouts under every flow, and what physics says of it."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    FLOWS,
    ROADS,
    assert_close,
    assert_step_and_vjp,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    on_road,
    step_of,
)
from reference import quadrotor as reference
from test_parameters import expected_numbers, found_numbers, numbers_of

import warp_sims as ws

# Relative to the norm of each tensor: rounding over a step, and over 12 steps with feedback.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}
ROLLOUTS = {torch.float64: 1e-11, torch.float32: 2e-4}
QUAD = ws.Quadrotor()
OTHER = ws.Quadrotor(
    0.02, gravity=9.0, mass=1.3, inertia=0.02, inertia_z=0.05, drag=0.3, thrust=11.0, rate=2.0, gain=0.1,
    gain_z=0.03, velocity_cost=0.3, rate_cost=0.2,
)  # fmt: skip


def states(n, dtype=torch.float64):
    return QUAD.initial_states(n, seed=3, dtype=torch.float64).to(dtype)


def policy_of(dtype=torch.float64):
    return make_net(QUAD, dtype=dtype, gain=1.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("nworld", [1, 3, 17])
@pytest.mark.parametrize("system", [QUAD, OTHER], ids=["defaults", "others"])
def test_step(system, nworld, dtype):
    """Away from the unit quaternion, too, where nothing but the reference's formula is right."""
    draw = torch.Generator().manual_seed(nworld)
    x, u, adj = (torch.randn(nworld, k, generator=draw, dtype=torch.float64).to(dtype) for k in (13, 4, 13))
    assert_step_and_vjp(system, x, u, adj, TOLERANCE[dtype])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("options", [{}, {"decay": 0.8, "window": 5, "checkpoint_every": 4}], ids=str)
def test_rollouts(road, flow, options):
    policy, x0 = on_road(road, policy_of()), states(11)
    asked = {"loss": "running", "control_cost": 0.3, "cotangents": make_cotangents(QUAD, 12, 11)}
    actual = gradients(QUAD, policy, x0, 12, flow, **asked, **options)
    options = {k: v for k, v in options.items() if k != "checkpoint_every"}
    expected = expected_gradients(QUAD, policy, x0, 12, flow, **asked, **options)
    assert_close(actual, expected, ROLLOUTS[torch.float64])


@pytest.mark.parametrize("flow", "RM")
def test_single_precision(flow):
    asked = {"loss": "running", "control_cost": 0.3}
    actual = gradients(QUAD, policy_of(torch.float32), states(11, torch.float32), 12, flow, **asked)
    net = policy_of(torch.float32).double()
    expected = expected_gradients(QUAD, net, states(11, torch.float32).double(), 12, flow, **asked)
    assert_close(actual, expected, ROLLOUTS[torch.float32])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kind", ["one", "each"])
def test_parameters(kind, flow):
    names = ("dt", "gravity", "mass", "inertia", "inertia_z", "drag", "thrust")
    numbers, net, x0 = numbers_of(QUAD, names, kind), policy_of(), states(11)

    def loss(states, controls):
        return states[1:, :, :3].square().mean() + controls.square().mean() + states[-1].sin().sum()

    cotangents = [torch.ones((), dtype=torch.float64)]
    zero = make_cotangents(QUAD, 12, 11)
    cotangents = [0 * zero.states, 0 * zero.controls, *cotangents]
    found, _ = found_numbers(QUAD, net, x0, flow, loss, cotangents, numbers)
    expected = expected_numbers(reference.step, net, x0, flow, loss, numbers)
    assert_close(found, expected, ROLLOUTS[torch.float64])


def test_hover_stays_and_free_fall_falls():
    hover = torch.zeros(1, 13, dtype=torch.float64)
    hover[:, 6] = 1.0
    after = ws.simulate(QUAD, hover, torch.zeros(90, 1, 4, dtype=torch.float64))[-1]
    assert_close(after, hover, 1e-14)
    system = ws.Quadrotor(drag=0.0)
    falling = torch.zeros(30, 1, 4, dtype=torch.float64)
    falling[:, :, 0] = -1.0  # no thrust
    x = ws.simulate(system, hover, falling)[-1, 0]
    assert math.isclose(x[2], -0.5 * 9.81, rel_tol=1e-12) and math.isclose(x[5], -9.81, rel_tol=1e-12)


def test_drag_ends_in_a_terminal_velocity():
    x = torch.zeros(1, 13, dtype=torch.float64)
    x[:, 6] = 1.0
    falling = torch.zeros(900, 1, 4, dtype=torch.float64)
    falling[:, :, 0] = -1.0
    speed = ws.simulate(QUAD, x, falling)[-1, 0, 5]
    assert math.isclose(speed, -QUAD.mass * QUAD.gravity / QUAD.drag, rel_tol=1e-6)


def test_a_free_body_keeps_its_angular_momentum():
    """In the world, without the inner loop: the gyroscopic terms and the quaternion belong together."""
    system = ws.Quadrotor(dt=0.01, gain=0.0, gain_z=0.0)
    x0 = states(5)
    x0[:, 10:] *= 6
    found = ws.simulate(system, x0, torch.zeros(100, 5, 4, dtype=torch.float64))
    moments = torch.tensor([0.01, 0.01, 0.02], dtype=torch.float64)
    momentum = [reference.rotated(x[:, 6:10], moments * x[:, 10:]) for x in (found[0], found[-1])]
    assert_close(momentum[1], momentum[0], 1e-7)
    lengths = torch.linalg.vector_norm(found[..., 6:10], dim=-1)
    assert_close(lengths, torch.ones_like(lengths), 1e-14)


def test_fourth_order():
    """Half the time step, a sixteenth of the error."""
    x0, u = states(7), 0.5 * torch.ones(7, 4, dtype=torch.float64)

    def after(steps):
        return ws.simulate(ws.Quadrotor(dt=0.4 / steps), x0, u.expand(steps, 7, 4).contiguous())[-1]

    exact = after(512)
    errors = [float((after(steps) - exact).abs().max()) for steps in (8, 16, 32)]
    assert 12 < errors[0] / errors[1] < 20 and 12 < errors[1] / errors[2] < 20


def test_initial_states():
    x = QUAD.initial_states(1000, seed=1, dtype=torch.float64)
    other = QUAD.initial_states(1000, seed=1, split="test", dtype=torch.float64)
    assert not torch.equal(x, other) and torch.equal(x, QUAD.initial_states(1000, 1, dtype=torch.float64))
    assert_close(torch.linalg.vector_norm(x[:, 6:10], dim=1), torch.ones(1000), 1e-14)
    up = reference.rotated(x[:, 6:10], torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).expand(1000, 3))
    tilt = torch.acos(up[:, 2])
    assert 0.9 * math.pi / 6 < float(tilt.max()) <= math.pi / 6 + 1e-6
    assert 1.9 < float(x[:, :3].abs().max()) <= 2.0


def test_picture():
    """Level, the arms lie flat; tilted about y, one side is higher."""
    plt = pytest.importorskip("matplotlib.pyplot")
    for tilt in (0.0, 0.5):
        figure, axes = plt.subplots()
        state = np.zeros(13)
        state[6], state[8] = math.cos(tilt / 2), math.sin(tilt / 2)
        QUAD.draw(axes, state)
        ends = np.array([line.get_xydata()[-1] for line in axes.lines if len(line.get_xdata()) == 2])
        rotors = ends[np.abs(ends[:, 0]) > 0.1][:, 1]
        assert (np.ptp(rotors) > 0.1) == (tilt > 0)
        plt.close(figure)


@pytest.mark.parametrize(
    "given, words", [({"mass": 0.0}, "mass is 0.0, expected"), ({"dt": -1.0}, "dt is -1.0, expected")]
)
def test_what_does_not_fit(given, words):
    with pytest.raises(ValueError, match=f"Quadrotor: {words}"):
        ws.Quadrotor(**given)


def test_the_comparison_of_flows_trains():
    """A few updates of the script behind docs/quadrotor.md get better, and the step is the reference's."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "quadrotor_flows.py"))
    before = script["trained"]({"flow": "C"}, 60, 1e-2, 0, 0)
    after = script["trained"]({"flow": "C"}, 60, 1e-2, 0, 200)
    assert after.loss < 0.2 * before.loss
    assert step_of(QUAD)(states(2), torch.zeros(2, 4, dtype=torch.float64)).shape == (2, 13)

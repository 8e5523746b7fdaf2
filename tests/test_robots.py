"""Robots against golden numbers: MuJoCo's forward dynamics, the derivatives of a torch model and of
Pinocchio."""

import dataclasses

import numpy as np
import pytest
import torch
from golden_robots import CASES, NAMES, numbers, robot, state
from warp_sims.kernels.systems import articulated

import warp_sims as ws
from warp_sims.robots import geometry

# Relative to the largest component. Measured: 3e-13 (ball chain), elsewhere 1e-13 and below.
FORWARD = 1e-12
# Measured: 1e-13.
BACKWARD = 1e-10

QUICK = {
    ("hopper", "contact_linear"),
    ("hopper", "free"),
    ("ballchain", "contact_smooth"),
    ("ballchain", "implicit"),
    ("swimmer", "free"),
}
EVERY = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]


def assert_near(actual, expected, bound):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-300)
    assert np.isfinite(actual).all() and error <= bound, error


def test_every_model_is_there():
    assert len(NAMES) == 13 and len(CASES) == 46


@pytest.mark.parametrize("name, setting", EVERY)
def test_forward_dynamics_and_a_step(name, setting):
    golden = numbers(name)
    system = robot(golden, setting)
    x, u = state(golden, setting, system)
    nq = golden[f"{setting}_qpos"].shape[1]
    qacc, mass, bias = system.dynamics(x[:, :nq].numpy(), x[:, nq:].numpy(), u.numpy())
    assert_near(qacc, golden[f"{setting}_qacc"], FORWARD)
    if setting == "free":
        assert_near(qacc, golden["mujoco_qacc"], FORWARD)
        assert_near(mass, golden["M"], FORWARD)
        assert_near(bias, golden["bias"], FORWARD)
    after = ws.step(system, x, u)
    assert_near(after[:, :nq], golden[f"{setting}_q1"], FORWARD)
    assert_near(after[:, nq:], golden[f"{setting}_v1"], FORWARD)
    if f"{setting}_mujoco_q1" in golden:
        assert_near(after[:, :nq], golden[f"{setting}_mujoco_q1"], FORWARD)
        assert_near(after[:, nq:], golden[f"{setting}_mujoco_v1"], FORWARD)


@pytest.mark.parametrize("name, setting", EVERY)
def test_adjoint_of_a_step(name, setting):
    golden = numbers(name)
    system = robot(golden, setting)
    x, u = (t.requires_grad_() for t in state(golden, setting, system))
    w = torch.tensor(np.concatenate([golden["w_q1"], golden["w_v1"]], axis=1))
    adj_x, adj_u = torch.autograd.grad(ws.step(system, x, u), (x, u), w)
    nq = golden["w_q1"].shape[1]
    assert_near(adj_x[:, :nq], golden[f"{setting}_step_adj_q"], BACKWARD)
    assert_near(adj_x[:, nq:], golden[f"{setting}_step_adj_v"], BACKWARD)
    if golden[f"{setting}_ctrl"].shape[1]:
        assert_near(adj_u, golden[f"{setting}_step_adj_ctrl"], BACKWARD)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_adjoint_of_forward_dynamics(name):
    """From a step of 1 s, whose change of the velocities is the acceleration, with forces on the joints
    besides."""
    golden = numbers(name)
    system = robot(golden, "free", torque_controls=True, dt=1.0)
    x, _ = state(golden, "free", system)
    forces = [actuator.dof for actuator in system.model.actuators]
    u = torch.zeros(len(x), len(forces), dtype=torch.float64)
    if golden["free_ctrl"].shape[1]:
        for c, a in zip(golden["free_ctrl"].T, robot(golden, "free").model.actuators):
            bounds = (-np.inf if a.control_low is None else a.control_low, a.control_high)
            u[:, forces.index(a.dof)] += a.gear * a.gain * torch.tensor(c.clip(*bounds))
    x, u = x.requires_grad_(), u.requires_grad_()
    w = torch.cat([torch.zeros(golden["w_q1"].shape), torch.tensor(golden["w_qacc"])], dim=1).double()
    adj_x, adj_u = torch.autograd.grad(ws.step(system, x, u), (x, u), w)
    nq = golden["w_q1"].shape[1]
    assert_near(adj_x[:, :nq], golden["free_fd_adj_q"], BACKWARD)
    assert_near(adj_x[:, nq:] - w[:, nq:], golden["free_fd_adj_v"], BACKWARD)
    assert_near(adj_u, golden["free_fd_mu"][:, forces], BACKWARD)


@pytest.mark.parametrize("name", ["hopper", "ballchain"])
def test_numpy_pose_has_the_kernels_mass_matrix(name):
    """What pictures and the stability bound are made from."""
    golden = numbers(name)
    model = robot(golden, "free").model
    for qpos, expected in zip(golden["free_qpos"], golden["M"]):
        assert_near(geometry.mass_matrix(model, geometry.pose(model, qpos)), expected, FORWARD)


# The text, what is planted in its place, and the case that sees it. A test that passes with these tests
# nothing.
PLANTED = [
    ("forward", "add_force_cross(f, s.V[i], H);", "", "ballchain", "implicit"),
    ("forward", "add_motion_cross(a, s.V[PARENT[i]], sv);", "", "ballchain", "implicit"),
    ("adjoint", "sub_force_cross(gV, W, H);", "", "ballchain", "implicit"),
    ("adjoint", "sub_force_cross(z, A[before], g.gA[i]);", "", "ballchain", "implicit"),
    ("adjoint", "add_force_cross(gV, sv, g.gA[i]);", "", "ballchain", "implicit"),
    ("adjoint", "x[c] += s1 * rx[c] + a * rrx[c];", "x[c] += a * rrx[c];", "ballchain", "implicit"),
    ("adjoint", "const vec f = real(2) / (", "const vec f = real(2.002) / (", "ballchain", "implicit"),
    ("forces", "E[i][0] -= n[RADIUS] * sum[1];", "", "ballchain", "contact_smooth"),
    ("forces", "sub_cross(E[i], w, f);\n      _Pragma", "_Pragma", "hopper", "contact_linear"),
    ("forces", "along = g * x * r * r;", "along = g * x * r;", "ballchain", "contact_smooth"),
    ("forces", "real(2) * n[SQUARE + k]", "n[SQUARE + k]", "swimmer", "free"),
]


@pytest.mark.slow
@pytest.mark.parametrize("part, right, wrong, name, setting", PLANTED)
def test_a_planted_mistake_is_seen(part, right, wrong, name, setting, monkeypatch):
    """One line of the kernels' text changed: the golden numbers must disagree, forwards or backwards."""
    attribute = {"forward": "_FORWARD", "forces": "_FORCES", "adjoint": "_ADJOINT"}[part]
    text = getattr(articulated, attribute)
    assert text.count(right) == 1
    monkeypatch.setattr(articulated, attribute, text.replace(right, wrong))
    # functions of their own: a system is not compiled twice
    functions = articulated.make_functions.__wrapped__
    system = robot(numbers(name), setting)
    made = {}

    class Wrong(ws.Robot):
        def device_functions(self, dtype):
            if dtype not in made:
                made[dtype] = functions(self.structure, dtype)
            return made[dtype]

    golden = numbers(name)
    fields = {field.name: getattr(system, field.name) for field in dataclasses.fields(system)}
    wrong_system = Wrong(**fields)
    x, u = (t.requires_grad_() for t in state(golden, setting, wrong_system))
    w = torch.tensor(np.concatenate([golden["w_q1"], golden["w_v1"]], axis=1))
    after = ws.step(wrong_system, x, u)
    adj_x, adj_u = torch.autograd.grad(after, (x, u), w)
    found = torch.cat([after.detach(), adj_x, adj_u], dim=1).numpy()
    right_parts = [golden[f"{setting}_{k}"] for k in ("q1", "v1", "step_adj_q", "step_adj_v")]
    expected = np.concatenate(right_parts, axis=1)
    error = np.abs(found[:, : expected.shape[1]] - expected).max() / np.abs(expected).max()
    assert not error <= 1e-6

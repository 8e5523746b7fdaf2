"""The hopper against its specification, the pendulum of links against the cart-pole and energy, and the bound
of the time step against simulations.
"""

import dataclasses

import numpy as np
import pytest
import torch
from golden_robots import numbers
from warp_sims.kernels.systems.articulated_tables import HINGE, SLIDE

import warp_sims as ws
from warp_sims.robots.geometry import jacobian, pose
from warp_sims.robots.hopper import hopper_model
from warp_sims.robots.model import Actuator, Joint, Limit, Model, Sphere
from warp_sims.robots.shapes import Chain


def draws(n, size, seed=0):
    return np.random.RandomState(seed).uniform(-1, 1, (n, size))


def test_hopper_has_the_masses_of_its_capsules():
    """Those of the file that the geometry comes from, compiled by MuJoCo, but for the place of the foot."""
    golden = numbers("hopper")
    links = hopper_model().links[2:]
    np.testing.assert_allclose([link.mass for link in links], golden["model_body_mass"][1:], rtol=1e-8)
    for link, across in zip(links, golden["model_body_inertia"][1:, 0]):
        # about the hinge's axis, y
        assert link.inertia[2] == pytest.approx(across if link.body != "foot" else 0.10352308, rel=1e-6)


def test_hopper_moves_as_specified():
    """Accelerations from the specification's forces, point by point, on mass matrix and bias without them."""
    n = 80
    q = draws(n, 6) * [1.0, 0.3, 0.5, 1.0, 1.0, 1.0] - [0, 0.3, 0, 0.8, 0.8, 0]
    v, u = 2 * draws(n, 6, 1), 1.5 * draws(n, 3, 2)
    qacc, mass, _ = ws.Hopper().dynamics(q, v, u)
    model = hopper_model()
    bare = model._replace(spheres=(), limits=(), joints=tuple(Joint(1.0, 0.0) for _ in range(6)))
    _, bare_mass, bias = ws.Robot(bare).dynamics(q, v, u)
    np.testing.assert_allclose(mass, bare_mass, rtol=1e-14)
    ke, kd, kf, mu = 2e4, 2e3, 1e3, 0.9
    low, high = np.array([-2.61799, -2.61799, -0.785398]), np.array([0, 0, 0.785398])
    touching = slipping = 0
    for i in range(n):
        force = -10 * v[i] - bias[i]
        force[3:] += 200 * np.clip(u[i], -1, 1) - 2 * v[i, 3:]
        force[3:] += 1e3 * np.maximum(low - q[i, 3:], 0) - 1e3 * np.maximum(q[i, 3:] - high, 0)
        at = pose(model, q[i])
        for sphere in model.spheres:
            point = at.position[sphere.link] + at.turn[sphere.link] @ np.array(sphere.centre)
            c = point[2] - sphere.radius
            if c >= 0:
                continue
            j = jacobian(model, at, sphere.link, point - [0, 0, sphere.radius])
            velocity = j @ v[i]
            slip = np.linalg.norm(velocity[:2])
            normal = ke * -c + kd * -c * max(-velocity[2], 0)
            along = -velocity[:2] / slip * min(kf * slip, mu * ke * -c)
            touching, slipping = touching + 1, slipping + (kf * slip > mu * ke * -c)
            force += j.T @ [*along, normal]
        np.testing.assert_allclose(qacc[i], np.linalg.solve(mass[i], force), rtol=1e-10, atol=1e-9)
    assert touching > 20 and 5 < slipping < touching


def test_hopper_stands_on_its_foot_at_rest():
    hopper = ws.Hopper()
    at = pose(hopper.model, np.zeros(6))
    heights = [
        (at.position[s.link] + at.turn[s.link] @ np.array(s.centre))[2] - s.radius
        for s in hopper.model.spheres
    ]
    assert min(heights) == pytest.approx(0.04) and at.position[3][2] == pytest.approx(1.25)
    assert hopper.dt / hopper.substeps < hopper.dt_bound.seconds
    states = hopper.initial_states(2000, dtype=torch.float64)
    assert states.abs().max() <= 0.05 and states.std() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert not torch.equal(states, hopper.initial_states(2000, split="test", dtype=torch.float64))


def test_hopper_reward():
    hopper = ws.Hopper()
    states = torch.tensor(draws(400, 12), dtype=torch.float64)
    states[:, 1] *= 1.6
    controls = torch.tensor(draws(400, 3, 1))
    found = hopper.reward(states, controls)
    for x, u, reward in zip(states.tolist(), controls.tolist(), found.tolist()):
        delta = min(max(x[1] + 0.3, -1), 0.3)
        height = -200 * delta**2 if delta < 0 else delta
        angle = 1 - (x[2] / (np.pi / 6)) ** 2
        assert reward == pytest.approx(x[6] + height + angle - 0.1 * sum(c * c for c in u), rel=1e-12)
    assert torch.equal(hopper.fallen(states), states[:, 1] < -0.45)
    assert torch.equal(hopper.observe(states), states[:, 1:])


@pytest.mark.parametrize(
    "system", [ws.Hopper(substeps=1), ws.LinkedPendulum(links=3)], ids=["hopper", "links"]
)
def test_loss(system):
    """The loss of the kernels and its adjoint: for the hopper minus the reward without control."""
    x = torch.tensor(draws(30, system.state_size), dtype=torch.float64)
    x[:, 1] *= 1.6
    u = torch.zeros(1, 30, system.control_size, dtype=torch.float64)
    policy = torch.nn.Linear(system.state_size, system.control_size, dtype=torch.float64)
    with torch.no_grad():
        policy.weight.zero_(), policy.bias.zero_()
    x = x.requires_grad_()
    out = ws.rollout(system, policy, x, horizon=1, flow="M", loss="final")
    last = out.states[-1].detach().requires_grad_()
    if isinstance(system, ws.Hopper):
        expected = -system.reward(last, u[0]).mean()
    else:
        expected = (1 - last[:, 1:4].cumsum(1).cos().mean(1)).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    (adj_last,) = torch.autograd.grad(expected, last)
    (found,) = torch.autograd.grad(out.loss, x)
    again = ws.step(system, x, u[0])
    (wanted,) = torch.autograd.grad(again, x, adj_last)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_one_link_is_the_cart_pole():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    u = torch.randn(9, 1, generator=draw, dtype=torch.float64)
    order = [0, 2, 1, 3]
    expected = ws.step(ws.CartPole(poles=1), x[:, order].contiguous(), u)[:, order]
    torch.testing.assert_close(ws.step(ws.LinkedPendulum(links=1), x, u), expected, rtol=1e-13, atol=1e-13)


def test_links_keep_their_energy():
    """Without force and damping: kinetic energy from the positions of the rods, written down on their own."""
    system = ws.LinkedPendulum(links=3, dt=2e-5, link_mass=0.3, link_length=0.7)
    x = system.initial_states(1, dtype=torch.float64)
    states = ws.simulate(system, x, torch.zeros(20_000, 1, 1, dtype=torch.float64))[:, 0]

    def energy(s):
        q, v = s[:4].numpy(), s[4:].numpy()
        angle, rate = np.cumsum(q[1:]), np.cumsum(v[1:])
        m, length = system.link_mass, system.link_length
        place, speed = np.array([q[0], 0.0]), np.array([v[0], 0.0])
        total = system.cart_mass * v[0] ** 2 / 2
        for a, w in zip(angle, rate):
            along, across = np.array([np.sin(a), np.cos(a)]), np.array([np.cos(a), -np.sin(a)])
            centre, moving = place + along * length / 2, speed + across * w * length / 2
            total += m * moving @ moving / 2 + m * length**2 / 12 * w**2 / 2 + m * system.gravity * centre[1]
            place, speed = place + along * length, speed + across * w * length
        return total

    first = energy(states[0])
    moved = (states[:, 1:4] - states[0, 1:4]).abs().max()
    assert (
        moved > 0.5 and abs(energy(states[-1]) - first) < 1e-3 and abs(energy(states[10_000]) - first) < 1e-3
    )


def one_hinge(**numbers_of):
    """A rod of 1 kg on a hinge without gravity, with a limit or a foot."""
    chain = Chain()
    chain.add(
        "rod",
        "hinge",
        HINGE,
        (0.0, 1.0, 0.0),
        parent=0,
        offset=(0.0, 0.0, 0.0),
        mass=1.0,
        centre=(0.0, 0.0, -0.5),
        inertia=(1 / 12, 1 / 12, 0.0),
    )
    return Model(
        "rod", tuple(chain.links), (Joint(0.0, 0.0),), (Actuator(0, 1.0),), start=(0.0,), **numbers_of
    )


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("share, stays", [(0.97, True), (1.03, False)])
def test_the_bound_is_where_a_stiff_limit_explodes(share, stays, damping):
    """A rod pressed into its limit: an exactly linear spring, with the joint's damper."""
    model = one_hinge(limits=(Limit(1, -5.0, 0.0),), gravity=(0.0, 0.0, 0.0))
    model = model._replace(joints=(Joint(0.0, 20 * damping),))
    options = {"limit_stiffness": 900.0, "limit_damping": 0.0}
    bound = ws.Robot(model, dt=1e-3, **options).dt_bound
    assert "limit of joint 'hinge'" in bound.cause
    system = ws.Robot(model, dt=share * bound.seconds, check_stability=False, **options)
    x = torch.tensor([[0.3, 0.0]], dtype=torch.float64)
    u = torch.full((120, 1, 1), 270.0, dtype=torch.float64)  # at rest with 0.3 rad
    after = ws.simulate(system, x + torch.tensor([[1e-6, 0.0]]).double(), u)[:, 0, 0] - 0.3
    assert (after.abs().max() < 1e-4) == stays
    if not stays:
        with pytest.raises(ValueError, match="unstable"):
            dataclasses.replace(system, check_stability=True)


@pytest.mark.parametrize("share, stays", [(0.95, True), (1.05, False)])
def test_the_bound_is_where_friction_explodes(share, stays):
    """A block that slides on the ground slowly enough to stick: its speed decays, or turns over and grows."""
    chain = Chain()
    chain.add("block", "x", SLIDE, (1.0, 0.0, 0.0), parent=0, offset=(0.0, 0.0, -0.01))
    chain.add("block", "z", SLIDE, (0.0, 0.0, 1.0), parent=1, offset=(0.0, 0.0, 0.0), mass=2.0)
    foot = Sphere(2, chain.place(2, (0.0, 0.0, 0.0)), 0.0, 0.8)
    model = Model(
        "block",
        tuple(chain.links),
        (Joint(0.0, 0.0),) * 2,
        (Actuator(0, 1.0),),
        spheres=(foot,),
        start=(0.0, 0.0),
    )
    options = {"contact_stiffness": 2 * 9.81 / 0.01, "contact_damping": 0.0, "friction_stiffness": 1e3}
    bound = ws.Robot(model, dt=1e-3, **options).dt_bound
    assert "friction of 'block'" in bound.cause and bound.seconds == pytest.approx(2 * 2.0 / 1e3)
    system = ws.Robot(model, dt=share * bound.seconds, check_stability=False, **options)
    x = torch.tensor([[0.0, 0.0, 1e-6, 0.0]], dtype=torch.float64)
    speed = ws.simulate(system, x, torch.zeros(100, 1, 1, dtype=torch.float64))[:, 0, 2].abs()
    assert (speed[-1] < 1e-7) == stays


@pytest.mark.parametrize(
    "words", [["hopper", "--substeps", "2", "--loss", "running"], ["links", "--links", "1"]]
)
def test_registered_tasks_train_from_the_command_line(words, tmp_path):
    from warp_sims.cli import main

    sizes = [
        "--epochs",
        "1",
        "--samples",
        "4",
        "--batch",
        "4",
        "--horizon",
        "3",
        "--hidden",
        "8",
        "--no-progress",
    ]
    main(["train", *words, *sizes, "--out", str(tmp_path / "run")])
    config, _, log = ws.load_run(tmp_path / "run")
    assert type(config.system).__name__ in ("Hopper", "LinkedPendulum")
    assert np.isfinite(log["loss_test"]).all()

"""Half-cheetah and ant: numbers beside those of MuJoCo's compiler, rewards, starts, and that they train."""

import numpy as np
import pytest
import torch
from golden_robots import numbers, robot, state

import warp_sims as ws
from warp_sims.robots.geometry import pose

RUNNERS = {"half_cheetah": ws.HalfCheetah, "ant": ws.Ant}

# MuJoCo's compiler and ours integrate the same solids, each in its order.
TOLERANCE = 1e-12


@pytest.fixture(params=RUNNERS)
def name(request):
    return request.param


def test_moves_as_the_file_that_its_numbers_come_from(name):
    """As the compiled MJCF, which test_robots.py holds against MuJoCo: accelerations, mass matrix, bias."""
    golden, system = numbers(name), RUNNERS[name]()
    reference = robot(golden, "free")
    own = ws.Robot(system.model._replace(spheres=(), limits=()), dt=reference.dt, check_stability=False)
    given = golden["free_qpos"], golden["free_qvel"], golden["free_ctrl"]
    for found, wanted in zip(own.dynamics(*given), reference.dynamics(*given)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())
    x, u = state(golden, "free", reference)
    torch.testing.assert_close(ws.step(own, x, u), ws.step(reference, x, u), rtol=TOLERANCE, atol=TOLERANCE)


def points(model, q):
    """Where the contact spheres of a model are, with their radii, in the order of their places."""
    at = pose(model, q)
    rows = [
        [*(at.position[s.link] + at.turn[s.link] @ np.array(s.centre)), s.radius, s.friction]
        for s in model.spheres
    ]
    return np.array(sorted(np.round(rows, 9).tolist()))


def test_touches_where_the_file_does(name):
    """The ant without the inner ends of its bars, which are the outer ends of the bars before them."""
    golden, system = numbers(name), RUNNERS[name]()
    q = golden["free_qpos"][0]
    wanted = points(robot(golden, "contact_linear").model, q)
    found = points(system.model, q)
    friction = {"half_cheetah": 0.4, "ant": 1.0}[name]
    assert (found[:, 4] == friction).all()
    rows = {tuple(np.round(row[:4], 7)) for row in wanted}
    inner = 4 * (np.array_equal(found[:, 3].max(keepdims=True), [0.25]))
    assert {tuple(np.round(row[:4], 7)) for row in found} <= rows
    assert len({tuple(np.round(row[:4], 7)) for row in found}) >= len(rows) - inner


def test_limits_motors_and_springs_are_those_of_the_file(name):
    golden, system = numbers(name), RUNNERS[name]()
    reference = robot(golden, "contact_linear").model
    model = system.model
    for ours, theirs in ((model.limits, reference.limits), (model.springs, reference.springs)):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-12)
    np.testing.assert_allclose(
        [(a.dof, a.gear, a.control_low, a.control_high) for a in model.actuators],
        [(a.dof, a.gear, a.control_low, a.control_high) for a in reference.actuators],
    )
    np.testing.assert_allclose(np.array(model.joints), np.array(reference.joints))


def test_reward_observation_and_the_end_of_an_episode(name):
    system = RUNNERS[name]()
    n, m, nq = system.state_size, system.control_size, system.model.qpos_size
    x = torch.randn(40, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = 0.3 * torch.randn(40, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bonus, weight, unseen = {"half_cheetah": (0.0, 0.1, 1), "ant": (1.0, 0.5, 2)}[name]
    for row, control, reward in zip(x.tolist(), u.tolist(), system.reward(x, u).tolist()):
        assert reward == pytest.approx(row[nq] + bonus - weight * sum(c * c for c in control), rel=1e-12)
    assert torch.equal(system.observe(x), x[:, unseen:])
    fallen = (x[:, 2] < 0.2) | (x[:, 2] > 1.0) if name == "ant" else torch.zeros(40, dtype=torch.bool)
    assert torch.equal(system.fallen(x), fallen) and (name != "ant" or 0 < int(fallen.sum()) < 40)


def test_loss_is_minus_the_reward_without_control(name):
    system = RUNNERS[name](substeps=2)
    policy = torch.nn.Linear(system.state_size, system.control_size, dtype=torch.float64)
    with torch.no_grad():
        policy.weight.zero_(), policy.bias.zero_()
    x = system.initial_states(5, dtype=torch.float64).requires_grad_()
    out = ws.rollout(system, policy, x, horizon=1, flow="M", loss="final")
    last = out.states[-1].detach().requires_grad_()
    expected = -system.reward(last, out.controls[0].detach()).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    (adj_last,) = torch.autograd.grad(expected, last)
    (found,) = torch.autograd.grad(out.loss, x)
    (wanted,) = torch.autograd.grad(ws.step(system, x, out.controls[0].detach()), x, adj_last)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_starts_near_its_pose_and_stays_whole(name):
    system = RUNNERS[name]()
    nq, nv = system.model.qpos_size, len(system.model.joints)
    x0 = system.initial_states(400, dtype=torch.float64)
    q = x0[:, :nq] - torch.tensor(system.model.start, dtype=torch.float64)
    assert q.abs().max() < 0.21 and x0[:, nq:].std() == pytest.approx(0.1, rel=0.05)
    if name == "ant":
        torch.testing.assert_close(x0[:, 3:7].norm(dim=1), torch.ones(400, dtype=torch.float64))
    assert not torch.equal(x0, system.initial_states(400, split="test", dtype=torch.float64))
    assert system.dt / system.substeps < system.dt_bound.seconds
    bang = torch.randint(0, 2, (150, 64, system.control_size), generator=torch.Generator().manual_seed(2))
    states = ws.simulate(system, x0[:64].float(), 2.0 * bang - 1)
    assert bool(torch.isfinite(states).all()) and states[..., nq : nq + nv].abs().max() < 200
    rest = ws.simulate(system, x0[:64].float(), torch.zeros(100, 64, system.control_size))[-1]
    assert system.fallen(rest).sum() <= 1 and rest[:, nq:].square().mean() < 0.2


def test_trains_from_the_command_line(name, tmp_path):
    from warp_sims.cli import main

    words = ["train", "cheetah" if name == "half_cheetah" else "ant", "--algorithm", "shac", "--flow", "C"]
    words += ["--worlds", "4", "--horizon", "3", "--updates", "2", "--eval-worlds", "2", "--substeps", "8"]
    words += ["--actor-hidden", "6", "--critic-hidden", "6", "--no-progress", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    config, actor, log = ws.load_actor(tmp_path / "run")
    assert type(config.system) is RUNNERS[name] and log["update"][-1] == 2
    assert actor(config.system.initial_states(3)).shape == (3, config.system.control_size)
    assert main(["animate", str(tmp_path / "run"), "--horizon", "2"]) == 0

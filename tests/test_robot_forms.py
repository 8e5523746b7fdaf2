"""The forms of a robot's step against each other, its gradients against finite differences, its flows."""

import dataclasses
import functools

import pytest
import torch
from cases import FLOWS, assert_close, make_net
from golden_robots import numbers, robot
from reference import rollout as oracle
from warp_sims.bridge.passes import sweeps
from warp_sims.bridge.passes.spec import Cotangents, Spec
from warp_sims.bridge.runtime.registry import prepare
from warp_sims.kernels.sweeps.rollout import make_gpu_kernels, make_kernels

import warp_sims as ws
from warp_sims.robots.model import Pair

HORIZON = 3
# Another order of sums. Cotangents grow by 1 / (mass of a part) a step; measured 2e-13 and 3e-5 after 3
# steps.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-3}


def with_pairs(system):
    """Spheres on different links that touch each other, too."""
    spheres = system.model.spheres
    pairs = tuple(
        Pair(a.link, a.centre, 4.0 * a.radius, b.link, b.centre, 6.0 * b.radius, 0.7)
        for a, b in ((spheres[0], spheres[-1]), (spheres[1], spheres[-2]))
    )
    return dataclasses.replace(system, model=system.model._replace(pairs=pairs))


@functools.cache
def system(name):
    """Systems with every kind of joint and force, and several substeps: kept, and computed again."""
    if name == "hopper":
        return ws.Hopper(substeps=3)
    if name == "links":
        return ws.LinkedPendulum(links=2, damping=0.1, substeps=2)
    if name == "swimmer":
        return robot(numbers("swimmer"), "implicit")
    if name == "ballchain":
        return robot(numbers("ballchain"), "contact_smooth", dt=5e-4, substeps=2)
    return with_pairs(robot(numbers("ballchain"), "contact_linear", dt=5e-4, approach=name == "approach"))


SYSTEMS = ("hopper", "links", "swimmer", "ballchain", "pairs", "approach")
EVERY = [pytest.param(n, marks=[] if n in ("links", "pairs") else pytest.mark.slow) for n in SYSTEMS]


def states(name, nworld, dtype=torch.float64, seed=3):
    own = system(name)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(nworld, own.state_size, generator=draw, dtype=torch.float64)
    if name in ("hopper",):
        x = 0.3 * x - torch.tensor([0.0, 0.1] + [0.0] * 10)  # some points below the ground
    elif name not in ("links", "swimmer"):
        x[:, 2] = 0.2 + 0.1 * x[:, 2]  # some spheres below the ground, 5 to 30 cm
    u = torch.randn(HORIZON, nworld, own.control_size, generator=draw, dtype=torch.float64)
    return x.to(dtype), (0.5 * u).to(dtype)


def forms(own, dtype):
    """As a CPU runs it without a policy, and with one; one world by value, and in memory."""
    p = prepare(own.number, dtype, torch.device("cpu"))
    assert p.open_loop.worlds == 8 and p.kernels.worlds == 4
    kernels = [
        p.kernels,
        make_kernels(p.functions._replace(block=None), p.dtype, on_cpu=True),
        make_gpu_kernels(p.functions, p.dtype),
    ]
    return p, [dataclasses.replace(p, wide=None, kernels=k) for k in kernels]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", EVERY)
def test_forms_agree(name, dtype):
    own, nworld = system(name), 11
    wide, others = forms(own, dtype)
    x0, controls = states(name, nworld, dtype)
    draw = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    g = Cotangents(
        None, normal(HORIZON + 1, nworld, own.state_size), normal(HORIZON, nworld, own.control_size)
    )
    expected = sweeps.simulate(wide, x0, controls)
    assert expected.isfinite().all()
    for p in others:
        assert_close(sweeps.simulate(p, x0, controls), expected, TOLERANCE[dtype])
        for base, check in (("R", ""), ("R", "M"), ("N", "S")):
            back = Spec(0, base * HORIZON, check * HORIZON, 0.9, 0.0, 0.0, 0.2)
            jac = 0.1 * normal(HORIZON, nworld, own.control_size, own.state_size)
            found = sweeps.adjoint(p, back, expected, controls, jac, g)
            for a, b in zip(found, sweeps.adjoint(wide, back, expected, controls, jac, g)):
                assert_close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("name", EVERY)
def test_float32_follows_float64(name):
    own = system(name)
    results = []
    for dtype in (torch.float64, torch.float32):
        x, u = (t.requires_grad_() for t in states(name, 9, dtype))
        after = ws.simulate(own, x, u[:1])[-1]
        w = torch.randn(after.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
            dtype
        )
        results.append([after.detach(), *torch.autograd.grad(after, (x, u), w)])
    for exact, single in zip(*results):
        # measured 2e-6 to 4e-5, with the ball chain's stiff contact 4e-4
        assert_close(single.double(), exact, 2e-3 if name == "ballchain" else 2e-4)


@pytest.mark.parametrize("name", EVERY)
def test_finite_differences(name):
    own = system(name)
    x, u = states(name, 4)
    torch.autograd.gradcheck(
        lambda x, u: ws.simulate(own, x, u)[1:],
        (x.requires_grad_(), u[:1].contiguous().requires_grad_()),
        eps=3e-5,  # below, rounding of velocities of 100 is seen; the error goes as 1 / eps
        rtol=1e-5,
        atol=1e-4,
        nondet_tol=0.0,
    )


def test_worlds_do_not_touch():
    own = system("pairs")
    x, u = states("pairs", 11)
    clean = ws.simulate(own, x, u)
    u[1, 4] = torch.nan
    others = [w for w in range(11) if w != 4]
    found = ws.simulate(own, x, u)
    assert found[2:, 4].isnan().any() and torch.equal(found[:, others], clean[:, others])


def test_spheres_push_each_other_apart_equally():
    """The forces of a pair change no momentum: of free bodies whose spheres overlap, and slide."""
    model = ball_pair()
    own = ws.Robot(model, dt=1e-3, contact_stiffness=500.0, check_stability=False)
    x = torch.zeros(1, 26, dtype=torch.float64)
    x[0, 3] = x[0, 10] = 1.0
    x[0, 7] = 0.18  # 2 cm less than the sum of the radii
    x[0, 14 + 1], x[0, 20 + 3] = 0.4, 1.5
    u = torch.zeros(200, 1, own.control_size, dtype=torch.float64)
    after = ws.simulate(own, x, u)
    momentum = (after[..., 14:17] * 1.0 + after[..., 20:23] * 2.0)[:, 0]
    assert (momentum - momentum[0]).abs().max() < 1e-13
    v0, v1 = after[0, 0, 14:26], after[-1, 0, 14:26]
    assert v1[0] < -0.1 and v1[6] > 0.05 and (v1[3:6] - v0[3:6]).abs().max() > 1e-3
    # angular momentum about the origin; the bodies turn by their own inertia, 0.004 and 0.008
    turned = []
    for s in (after[0, 0], after[-1, 0]):
        total = torch.zeros(3, dtype=torch.float64)
        for k, (m, i) in enumerate(((1.0, 0.004), (2.0, 0.008))):
            w, v, r = s[3 + 7 * k], s[4 + 7 * k : 7 + 7 * k], s[17 + 6 * k : 20 + 6 * k]
            world = r + 2 * w * torch.linalg.cross(v, r) + 2 * torch.linalg.cross(v, torch.linalg.cross(v, r))
            total += m * torch.linalg.cross(s[7 * k : 3 + 7 * k], s[14 + 6 * k : 17 + 6 * k]) + i * world
        turned.append(total)
    assert (turned[1] - turned[0]).abs().max() < 1e-12 and turned[0].abs().max() > 5e-3


def ball_pair():
    """Two free spheres of 0.1 m, of 1 and 2 kg, without gravity; a torque on one makes it a robot."""
    from warp_sims.kernels.systems.articulated_tables import BALL, SLIDES

    from warp_sims.robots.model import Actuator, Joint, Link, Model

    unit, zero = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0)
    links = []
    for k, (m, i) in enumerate(((1.0, 0.004), (2.0, 0.008))):
        links.append(Link(f"{k}", "way", 0, SLIDES, unit, zero, 0.0, 0.0, zero, (0.0,) * 6))
        links.append(
            Link(f"{k}", "turn", 2 * k + 1, BALL, unit, zero, 0.0, m, zero, (i, i, i, 0.0, 0.0, 0.0))
        )
    return Model(
        name="pair",
        links=tuple(links),
        joints=(Joint(0.0, 0.0),) * 12,
        actuators=(Actuator(3, 1.0),),
        pairs=(Pair(2, zero, 0.1, 4, zero, 0.1, 0.5),),
        gravity=zero,
        start=(0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0) * 2,
    )


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("fused", [True, False])
def test_flows(flow, fused):
    """The sweeps against the oracle's recursion with the same step, whose adjoint other tests check."""
    own = system("links")
    net = make_net(own, gain=1.0)
    policy = net if fused else torch.nn.Sequential(*net)
    x0 = states("links", 3)[0]
    out = ws.rollout(own, policy, x0.clone().requires_grad_(), horizon=6, flow=flow, loss="running")
    out.loss.backward()

    def loss(x):
        angles = x[:, 1:3].cumsum(1)
        return 1 - angles.cos().mean(1)

    found = oracle.gradients(functools.partial(ws.step, own), net, x0, flow, 6, oracle.running(loss))
    for name, parameter in policy.named_parameters():
        assert_close(parameter.grad, found.parameters[name], 1e-10)


@pytest.mark.parametrize("flow", ["R", "C"])
def test_hopper_under_flows(flow):
    own = ws.Hopper(substeps=3)
    net = make_net(own, gain=0.1)
    x0 = own.initial_states(3, dtype=torch.float64)
    x0[:, 1] -= 0.05
    out = ws.rollout(own, net, x0, horizon=4, flow=flow, loss="running")
    out.loss.backward()

    def loss(x):
        return -own.reward(x, torch.zeros(len(x), 3, dtype=x.dtype))

    found = oracle.gradients(functools.partial(ws.step, own), net, x0, flow, 4, oracle.running(loss))
    for name, parameter in net.named_parameters():
        assert_close(parameter.grad, found.parameters[name], 1e-9)

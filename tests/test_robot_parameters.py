"""`parameters=` of robots: masses, centres, inertias, armatures, dampings and gears against finite
differences, step by step, and against autograd through such steps under the flows."""

import dataclasses
import functools

import pytest
import torch
from cases import make_net
from golden_robots import numbers, robot, state
from reference import rollout as oracle
from warp_sims.bridge.runtime.physical import parameter_values
from warp_sims.kernels.systems import articulated

import warp_sims as ws

CASES = [("hopper", "contact_smooth"), ("hopper", "contact_linear"), ("ballchain", "implicit")]
KINDS = ("armature", "damping", "gear", "mass", "centre", "inertia")
# Relative to the largest cotangent of the kind. Measured: 4e-11 at worst.
NUMBERS = 1e-9
# Relative to the norm of a number's gradient. Measured: 1e-14.
FLOW = 1e-11


@functools.cache
def case(name, setting, **options):
    """A robot in two substeps, its states, and controls that are not 0."""
    golden = numbers(name)
    system = robot(golden, setting, torque_controls=True, substeps=2, **options)
    x, u = state(golden, setting, system)
    draw = torch.Generator().manual_seed(3)
    return system, x[:6], 0.5 * torch.randn(u[:6].shape, generator=draw, dtype=torch.float64)


def own_numbers(system):
    own = dict(zip(system.parameter_names, parameter_values(system.number)))
    assert own == system.physical_parameters
    return own


def steps_of(system, x):
    """By how much to move each number: little beside what the joints move."""
    nq = system.model.qpos_size
    _, mass, _ = system.dynamics(
        x[:, :nq].numpy(), x[:, nq:].numpy(), torch.zeros(len(x), system.control_size)
    )
    inert = torch.tensor(mass).diagonal(dim1=1, dim2=2).amin(0)
    dofs = torch.stack((inert, inert), dim=1).flatten()
    scales = torch.tensor(system.parameter_scales, dtype=torch.float64)
    scales[: len(dofs)] = dofs
    own = torch.tensor(parameter_values(system.number), dtype=torch.float64).abs()
    return torch.where((own > 1e-12) & (own < scales), own, scales) * 0.02


def differences(system, x, u, w):
    """Cotangents (worlds, count) of all numbers through a step, of order 8; of several steps the one whose
    neighbour agrees best."""
    names, own = system.parameter_names, torch.tensor(parameter_values(system.number), dtype=torch.float64)
    coefficients = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
    offsets = torch.tensor([s * k for k in coefficients for s in (1, -1)], dtype=torch.float64)
    weights = torch.tensor([s * c for c in coefficients.values() for s in (1, -1)], dtype=torch.float64)
    count, worlds, sizes = len(names), len(x), steps_of(system, x)
    found = []
    for shrink in (1.0, 0.25, 0.0625, 1 / 64, 1 / 256):
        h = shrink * sizes
        moved = own.repeat(count, len(offsets), 1)
        moved += torch.diag(h)[:, None, :] * offsets[None, :, None]
        moved = moved.flatten(0, 1).repeat_interleave(worlds, dim=0)
        many = len(moved) // worlds
        given = {name: moved[:, i].contiguous() for i, name in enumerate(names)}
        after = ws.step(system, x.repeat(many, 1), u.repeat(many, 1), parameters=given)
        values = (after * w.repeat(many, 1)).sum(-1).view(count, len(offsets), worlds)
        found.append(torch.einsum("noi,o->in", values, weights) / h)
    apart = torch.stack([(a - b).abs().amax(0) for a, b in zip(found, found[1:])])
    best = apart.argmin(0)
    return torch.stack([found[1 + int(k)][:, i] for i, k in enumerate(best)], dim=1)


def pulled_back(system, x, u, w, **more):
    given = {
        name: torch.full((len(x),), value, dtype=x.dtype).requires_grad_()
        for name, value in own_numbers(system).items()
    }
    after = ws.step(system, x, u, parameters=given)
    return torch.stack(torch.autograd.grad(after, list(given.values()), w), dim=1)


def drawn(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def error(system, found, expected):
    """The worst difference, relative to the largest cotangent of its kind."""
    worst = 0.0
    for kind in KINDS:
        at = [i for i, name in enumerate(system.parameter_names) if name.startswith(kind)]
        size = expected[:, at].abs().max()
        assert size > 0
        worst = max(worst, float((found[:, at] - expected[:, at]).abs().max() / size))
    return worst


@pytest.mark.parametrize("name, setting", CASES)
def test_numbers_of_a_step(name, setting):
    system, x, u = case(name, setting)
    w = drawn(x)
    assert error(system, pulled_back(system, x, u, w), differences(system, x, u, w)) <= NUMBERS


def test_a_servo_with_limited_force():
    """Gears where they enter twice, on both sides of a limit of the force."""
    plain, x, u = case("hopper", "free", dt=0.1)  # so long a step that rounding is small beside a gear
    actuators = tuple(
        a._replace(bias_q=-3.0 - i, bias_v=-0.5, gear=1.2, force_low=-1.0, force_high=1.0)
        for i, a in enumerate(plain.model.actuators)
    )
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    system = ws.Robot(**{**fields, "model": plain.model._replace(actuators=actuators)})
    w = drawn(x)
    nq = system.model.qpos_size
    dofs = [a.dof for a in system.model.actuators]
    bias = torch.tensor([-3.0 - i for i in range(len(dofs))], dtype=x.dtype)
    force = u + 1.2 * (bias * x[:, :nq][:, dofs] - 0.5 * x[:, nq:][:, dofs])
    assert 0.1 < float((force.abs() < 1.0).double().mean()) < 0.9
    at = [i for i, name in enumerate(system.parameter_names) if name.startswith("gear")]
    found, expected = pulled_back(system, x, u, w)[:, at], differences(system, x, u, w)[:, at]
    assert float((found - expected).abs().max() / expected.abs().max()) <= NUMBERS


@pytest.mark.parametrize("flow", ["R", "M", "C"])
@pytest.mark.parametrize("name, setting", CASES[1:])
@pytest.mark.parametrize("kind", ["one", "mixed"])
def test_flows(name, setting, flow, kind):
    system, x0, _ = case(name, setting)
    net, horizon, draw = make_net(system, gain=1.0), 5, torch.Generator().manual_seed(5)
    given = {}
    body = system.model.links[-1].body
    joint = system.parameter_names[2 * len(system.model.joints) - 1].removeprefix("damping_of_")
    for i, number in enumerate(
        (f"mass_of_{body}", f"centre_x_of_{body}", f"inertia_zz_of_{body}", f"damping_of_{joint}",
         f"armature_of_{joint}", f"gear_of_{joint}")
    ):  # fmt: skip
        shape = (len(x0),) if kind == "mixed" and i % 2 == 0 else ()
        value = own_numbers(system)[number]
        q = (value or 0.01) * (1 + 0.1 * torch.rand(shape, generator=draw, dtype=torch.float64))
        given[number] = q.requires_grad_()

    def objective(states, controls):
        return states[1:].sin().mean() + (states[-1] * states[0].cos()).mean() + controls.square().mean()

    def expected(letter):
        if letter == "C":
            base, check = expected("M"), expected("R")
            return [oracle.combine(a, b) for a, b in zip(base, check)]
        edges = oracle.schedule(letter, horizon)
        step = functools.partial(ws.step, system, parameters=given)
        states, controls = oracle.rollout(step, net, x0, edges, 1.0)
        return torch.autograd.grad(objective(states, controls), list(given.values()))

    out = ws.rollout(system, net, x0, horizon=horizon, flow=flow, loss=objective, parameters=given)
    found = torch.autograd.grad(out.loss, list(given.values()))
    for name_, a, b in zip(given, found, expected(flow)):
        assert float((a - b).norm()) <= FLOW * float(b.norm()), name_
    if flow != "C":
        assert all(float(a.norm()) > 0 for a in found)


def test_the_robots_own_numbers_change_nothing():
    """The same words in the array: for all worlds together to the last bit."""
    system, x, u = case("hopper", "contact_linear")
    controls = u.repeat(4, 1, 1)
    plain = ws.simulate(system, x, controls)
    own = {name: torch.tensor(value, dtype=x.dtype) for name, value in own_numbers(system).items()}
    torch.testing.assert_close(
        ws.simulate(system, x, controls, parameters=own), plain, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(ws.simulate(system, x, controls), plain, rtol=0, atol=0)


@pytest.mark.parametrize("number", ["mass", "centre_x", "inertia_yy", "armature", "gear"])
def test_a_robot_that_is_made_with_other_numbers(number):
    """One value for all worlds is a robot whose model holds it; sums of masses follow."""
    system, x, u = case("hopper", "contact_linear")
    model = system.model
    link, links = model.links[-2], list(model.links)
    full = f"{number}_of_{link.joint if number in ('armature', 'gear') else link.body}"
    value = own_numbers(system)[full] * 1.3 + 0.01
    if number == "mass":
        links[-2] = link._replace(mass=value)
    elif number == "centre_x":
        links[-2] = link._replace(centre=(value, *link.centre[1:]))
    elif number == "inertia_yy":
        links[-2] = link._replace(inertia=(link.inertia[0], value, *link.inertia[2:]))
    joints, actuators = list(model.joints), list(model.actuators)
    if number == "armature":
        joints[-2] = joints[-2]._replace(armature=value)
    elif number == "gear":
        actuators[-2] = actuators[-2]._replace(gear=value)
    other = model._replace(links=tuple(links), joints=tuple(joints), actuators=tuple(actuators))
    fields = {f.name: getattr(system, f.name) for f in dataclasses.fields(system)}
    expected = ws.step(ws.Robot(**{**fields, "model": other}), x, u)
    found = ws.step(system, x, u, parameters={full: value})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if number != "inertia_yy":  # nothing turns about that axis in a plane
        assert float((found - ws.step(system, x, u)).abs().max()) > 1e-6


def test_other_names_are_refused():
    system, x, u = case("hopper", "contact_linear")
    with pytest.raises(ValueError, match="parameters has 'mass', expected.*mass_of_body 4"):
        ws.step(system, x, u, parameters={"mass": 1.0})


@pytest.mark.parametrize("loss", ["final", None])
def test_a_task_with_a_loss_of_its_own(loss):
    """A mass a world in float32, with the system's loss, which reads none of the numbers."""
    system = ws.LinkedPendulum(links=2)
    policy, x0 = ws.MLP(6, (8,), 1), system.initial_states(9)
    mass = torch.full((9,), 0.3, requires_grad=True)
    own = own_numbers(system)
    given = {"mass_of_link 2": mass}
    out = ws.rollout(system, policy, x0, horizon=6, flow="combined", loss=loss, parameters=given)
    assert own["mass_of_link 2"] == system.link_mass
    (out.loss if loss else out.states.square().mean()).backward()
    assert mass.grad is not None and mass.grad.isfinite().all() and bool((mass.grad != 0).any())


# What is planted in the text, and the case that sees it.
PLANTED = [
    ("*to++ += g.w[k] * s.qdd[k];", "*to++ += real(1.001) * g.w[k] * s.qdd[k];", "hopper", "contact_smooth"),
    ("(IMPLICIT ? s.v[k] + h * s.qdd[k] : s.v[k])", "s.v[k]", "ballchain", "implicit"),
    ("*to++ -= g.w[ACTUATOR_DOF[a]] * f;", "*to++ += g.w[ACTUATOR_DOF[a]] * f;", "hopper", "contact_smooth"),
    ("add_motion_cross(X, g.W[i], s.V[i]);", "add_motion_cross(X, s.V[i], g.W[i]);", "ballchain", "implicit"),
    ("add_cross(turn, bc, a);", "", "ballchain", "implicit"),
    ("add_cross(bc, b, c);", "", "ballchain", "implicit"),
    ("to[8] += al[0] * bl[2] + al[2] * bl[0];", "to[8] += al[0] * bl[2];", "ballchain", "implicit"),
    ("*to++ += g.w[k] * s.qdd[k];", "*to++ = g.w[k] * s.qdd[k];", "hopper", "contact_smooth"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("right, wrong, name, setting", PLANTED)
def test_a_planted_mistake_is_seen(right, wrong, name, setting, monkeypatch):
    text = articulated._NUMBERS
    assert text.count(right) == 1
    monkeypatch.setattr(articulated, "_NUMBERS", text.replace(right, wrong))
    made = {}

    class Wrong(ws.Robot):
        def device_functions(self, dtype):
            if dtype not in made:
                make = articulated.make_parameter_functions.__wrapped__
                own = make(self.structure, dtype, self.parameter_names)
                functions = articulated.make_functions(self.structure, dtype)
                made[dtype] = functions._replace(parameters=own)
            return made[dtype]

    system, x, u = case(name, setting)
    wrong_system = Wrong(**{f.name: getattr(system, f.name) for f in dataclasses.fields(system)})
    w = drawn(x)
    assert not error(system, pulled_back(wrong_system, x, u, w), differences(system, x, u, w)) <= 1e-6

"""The particle in a box: kernels against the torch oracle and against what quantum mechanics promises, and
the convolutional policy on its roads.

The authors' numbers are in test_golden.py.
"""

import math

import pytest
import torch
import warp as wp
from cases import (
    FLOWS,
    ROADS,
    Evaluated,
    assert_all_differ,
    assert_close,
    assert_step_and_vjp,
    derivatives_along,
    error_of,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
)
from reference import quantum
from reference import rollout as oracle
from warp_sims.bridge.autograd import operators
from warp_sims.bridge.passes import fused_backward, operations
from warp_sims.bridge.passes.spec import Cotangents, LossWeights, Spec
from warp_sims.bridge.passes.sweeps import adjoint
from warp_sims.bridge.runtime.registry import prepare
from warp_sims.kernels.policy.layout import layout

import warp_sims as ws

# Relative to the norm of each tensor. One step solves a system of condition below 100; measured over 12 steps
# 1e-14 in float64 and 3e-6 in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}
# Central differences with steps of 1e-5: third derivatives and cancellation.
TOLERANCE_DIFFERENCES = 1e-7
HORIZON = 12
POINTS = (4, 5, 7, 8, 33)


def box(points, **numbers):
    """Every constant away from its default, so that none is mistaken for another."""
    return ws.QuantumControl(points=points, **{"dt": 0.09, "length": 1.7, "target": 2} | numbers)


def fields_of(n, dtype=torch.float64, seed=0):
    return 5.0 * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def make_cnn(points, width=5, dtype=torch.float64, seed=2):
    """A convolutional policy with biases, and so strong a feedback that the flows disagree here and there."""
    net = ws.WaveCNN(points, width, dtype=dtype)
    net.reset_parameters(seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        net.out.weight.mul_(4.0)
    return net


def make_policy(points, kind, dtype=torch.float64):
    return make_cnn(points, dtype=dtype) if kind == "cnn" else make_net(box(points), dtype=dtype, gain=1.0)


KINDS = [(points, "mlp") for points in POINTS] + [(points, "cnn") for points in POINTS if points >= 7]


# One step


@pytest.mark.parametrize("points", [*POINTS, 32])
def test_step_and_its_vjp(points):
    system = box(points)
    x, adj = make_states(system, 17), make_states(system, 17, seed=5)
    assert_step_and_vjp(system, x, fields_of(17), adj, TOLERANCE[x.dtype])


def test_finite_differences_of_a_step():
    system = box(5)
    x, u = make_states(system, 3).requires_grad_(), fields_of(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: ws.step(system, *args), (x, u))


@pytest.mark.parametrize("points", [4, 33])
def test_eigenstates_turn_by_their_energy(points):
    """In the empty box: it keeps its shape, its phase turns by the Cayley transform of its energy."""
    system = box(points, target=1)
    for n in (1, 2, points):
        energy = 4 / system.dx**2 * math.sin(math.pi * n / (2 * (points + 1))) ** 2
        turn = (1 - 0.5j * system.dt * energy) / (1 + 0.5j * system.dt * energy)
        e = torch.from_numpy(system.eigenstate(n)).to(torch.complex128)
        x = torch.view_as_real(e).reshape(1, -1)
        x_next = ws.step(system, x, torch.zeros(1, 1, dtype=torch.float64))
        assert_close(x_next, torch.view_as_real(turn * e).reshape(1, -1), 1e-13)


@pytest.mark.parametrize(
    "points, dtype",
    [*((points, torch.float64) for points in POINTS), (8, torch.float32), (33, torch.float32)],
)
def test_norm_is_conserved(points, dtype):
    """Under any field, strong ones too, over a whole published rollout."""
    system = box(points)
    x0 = system.initial_states(3, dtype=dtype)
    controls = torch.cat([10.0**k * fields_of(3, dtype, seed=k)[None] for k in range(-2, 4)])
    controls = controls.repeat(22, 1, 1)[:128]
    norms = torch.linalg.vector_norm(ws.simulate(system, x0, controls), dim=-1)
    # a step rounds by one or two units in the last place, at worst always in the same direction
    assert (norms / norms[0] - 1).abs().max() <= 128 * 4 * torch.finfo(dtype).eps


def in_waves(x):
    return quantum.wave(x)


@pytest.mark.parametrize("points", POINTS)
def test_step_and_adjoint_are_unitary(points):
    """<K a, K b> = <a, b>, and <K a, b> = <a, K^H b> with K^H from the hand-written adjoint."""
    system = box(points)
    a, b = (make_states(system, 9, seed=seed) for seed in (3, 4))
    u = fields_of(9)

    def inner(x, y):
        return (in_waves(x).conj() * in_waves(y)).sum(1)

    ka, kb = ws.step(system, a, u), ws.step(system, b, u)
    assert_close(torch.view_as_real(inner(ka, kb)), torch.view_as_real(inner(a, b)), 1e-13)

    x = a.clone().requires_grad_()
    (khb,) = torch.autograd.grad(ws.step(system, x, u), x, b)
    assert_close(torch.view_as_real(inner(ka, b)), torch.view_as_real(inner(a, khb)), 1e-13)
    # K^H is the inverse of K: it undoes a step, and so keeps every norm too
    assert_close(ws.step(system, khb, u), b, 1e-13)


def test_cost_is_the_probability_to_be_elsewhere():
    system = ws.QuantumControl(points=9, target=3)
    e = torch.from_numpy(system.eigenstate(3)).to(torch.complex128)
    other = torch.from_numpy(system.eigenstate(1)).to(torch.complex128)
    waves = torch.stack([e, 1j * e, other, 0.6 * e + 0.8j * other])
    x0 = torch.view_as_real(waves).flatten(1)
    resting = ws.WaveCNN(9, 2, dtype=torch.float64)
    resting.reset_parameters(zero_last=True)
    for x, expected in zip(x0, (0.0, 0.0, 1.0, 1 - 0.36)):
        out = ws.rollout(system, resting, x[None], horizon=3, loss="final")
        assert float(out.loss.detach()) == pytest.approx(expected, abs=1e-12)
        # the running cost is the sum over the steps: so it is published
        out = ws.rollout(system, resting, x[None], horizon=3, loss="running")
        assert float(out.loss.detach()) == pytest.approx(3 * expected, abs=1e-12)


# Rollouts


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("points, kind", KINDS)
def test_gradients_are_the_oracles(points, kind, flow, road):
    """Cotangents on states, controls and loss at once."""
    system, policy = box(points), on_road(road, make_policy(points, kind))
    x0 = make_states(system, 3)
    options = {"cotangents": make_cotangents(system, HORIZON, 3), "loss": "running", "control_cost": 0.7}
    actual = gradients(system, policy, x0, HORIZON, flow, **options)
    expected = expected_gradients(system, policy, x0, HORIZON, flow, **options)
    assert_close(actual, expected, TOLERANCE[x0.dtype])


def test_the_flows_differ():
    """Otherwise the comparison above would prove little."""
    system, policy = box(8), make_cnn(8)
    x0 = make_states(system, 3)
    found = [gradients(system, policy, x0, HORIZON, flow, loss="running")["conv1.weight"] for flow in FLOWS]
    assert_all_differ(found)


@pytest.mark.parametrize("flow, options", [("R", {}), ("M", {"decay": 0.5}), ("N", {"window": 5}), ("S", {})])
def test_finite_differences(flow, options):
    system, policy = box(8), make_cnn(8)
    x0 = make_states(system, 3)
    directions = oracle.random_directions(policy, x0, 2)
    actual, expected = derivatives_along(directions, system, policy, x0, HORIZON, flow, **options)
    assert_close(actual, expected, TOLERANCE_DIFFERENCES)


@pytest.mark.parametrize("flow", FLOWS)
def test_single_precision(flow):
    system = ws.QuantumControl()
    net, x0 = make_cnn(32, dtype=torch.float32), system.initial_states(5)
    actual = gradients(system, net, x0, HORIZON, flow, loss="running")
    net, x0 = net.double(), x0.double()
    assert_close(
        actual, expected_gradients(system, net, x0, HORIZON, flow, loss="running"), TOLERANCE[torch.float32]
    )


# The convolutional policy


@pytest.mark.parametrize(
    "points, width, dtype",
    [
        (7, 1, torch.float64),
        (8, 16, torch.float64),
        (9, 17, torch.float64),
        (33, 60, torch.float64),
        (8, 3, torch.float32),
        (33, 60, torch.float32),
    ],
)
def test_cnn_fused_and_by_torch(points, width, dtype):
    """Points with (9, 33) and without a remainder of the strides; widths with and without padding."""
    system, net = box(points), make_cnn(points, width, dtype)
    for nworld in (1, 5):
        x0, c = make_states(system, nworld, dtype), make_cotangents(system, 4, nworld, dtype)
        for flow in "RMNS":
            one, other = (
                gradients(system, policy, x0, 4, flow, loss="final", cotangents=c)
                for policy in (net, Evaluated(net))
            )
            assert_close(one, other, TOLERANCE[dtype])


def test_cnn_is_the_published_one():
    """Positions before channels, windows of three points at every other point."""
    net = make_cnn(7, 2)
    x = make_states(box(7), 3)
    psi = x.view(3, 7, 2)
    h1 = torch.stack(
        [
            (psi[:, 2 * i : 2 * i + 3, None] * net.conv1.weight[:, 0].permute(1, 0, 2)).sum((1, 3))
            for i in range(3)
        ],
        1,
    )
    h1 = torch.tanh(h1 + net.conv1.bias)
    h2 = torch.tanh(torch.einsum("nkc,ock->no", h1, net.conv2.weight) + net.conv2.bias)
    assert_close(net(x), (h2 @ net.out.weight.T + net.out.bias).detach(), 1e-14)
    names = [(name, tuple(p.shape)) for name, p in ws.WaveCNN().named_parameters()]
    assert names == [
        ("conv1.weight", (60, 1, 3, 2)),
        ("conv1.bias", (60,)),
        ("conv2.weight", (60, 60, 3)),
        ("conv2.bias", (60,)),
        ("out.weight", (1, 420)),
        ("out.bias", (1,)),
    ]


def two_roads(system, net, nworld, flows, dtype):
    """Backward passes of a fused rollout: by the CPU kernels, and through torch as on a GPU."""
    horizon, base, check = 5, flows[0] * 5, flows[1] * 5 if len(flows) > 1 else ""
    description = ws.policies.networks.fused_network(net).description
    parameters = [p.detach() for p in net.parameters()]
    p = prepare(system.number, dtype, torch.device("cpu"))
    x0, c = make_states(system, nworld, dtype), make_cotangents(system, horizon, nworld, dtype)
    weights = LossWeights(0.0, 0.0, 0.4)
    back = Spec(system.number, base, check, 1.0, *weights)
    states, controls, _, hidden, packed = operators.fused_rollout(back, description, parameters, x0)
    g = Cotangents(c.loss, c.states, c.controls)
    kernels = fused_backward.backward(p, back, description, packed, hidden, states, controls, g)

    lay = layout(description, p.itemsize)
    rows = operations.Rows(lay, packed, hidden, horizon, nworld)
    d, jacobians = operations.linearize(rows, back.network_open)
    mu, adj_x0 = adjoint(p, back, states, controls, jacobians, g)
    grads = operations.weight_grad(rows, d, mu, torch.from_numpy(lay.unpack))
    return kernels, (grads, adj_x0)


def with_outputs(system, kind):
    """A policy with as many outputs as the system has controls."""
    if kind == "cnn":
        return make_cnn(system.points, 17)
    hidden = {"mlp": (9, 7), "deep": (5, 17, 16), "linear": ()}[kind]
    return make_net(system, hidden)


@pytest.mark.parametrize("flows", ["R", "M", "N", "MR"])
@pytest.mark.parametrize("nworld", [1, 6])
@pytest.mark.parametrize(
    "system, kind",
    [
        (box(8), "cnn"),
        (box(33), "cnn"),
        (box(8), "mlp"),
        (ws.GuidanceByRepulsion(drivers=3, evaders=2), "mlp"),
        (ws.GuidanceByRepulsion(drivers=3, evaders=2), "deep"),
        (ws.GuidanceByRepulsion(drivers=3, evaders=2), "linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{type(value).__name__}{value.state_size}",
)
def test_the_road_of_gpus(system, kind, nworld, flows):
    """The wide products through torch are those of the CPU kernels, for several controls too."""
    kernels, through_torch = two_roads(system, with_outputs(system, kind), nworld, flows, torch.float64)
    for one, other in zip(kernels, through_torch, strict=True):
        assert other.any() and one.any()
        assert_close(one, other, TOLERANCE[torch.float64])


# Pairs and tapes


SYSTEMS = {
    "guidance": (ws.GuidanceByRepulsion(drivers=3, evaders=2), lambda s: make_net(s, gain=1.0)),
    "quantum": (box(8), lambda s: make_cnn(8)),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_pair(name, road):
    system, make = SYSTEMS[name]
    policy, x0 = on_road(road, make(system)), make_states(system, 3)
    options = {"loss": "running", "control_cost": 0.2}
    pair = ws.gradient_pair(system, policy, x0, horizon=HORIZON, **options)
    for flow, found in (("M", pair.base), ("R", pair.check), ("C", pair.combine())):
        expected = expected_gradients(system, policy, x0, HORIZON, flow, **options)
        assert_close(pair.loss, expected.pop("loss"), TOLERANCE[x0.dtype])
        del expected["x0"]
        assert_close({n.removeprefix("net."): g for n, g in found.items()}, expected, TOLERANCE[x0.dtype])
    apart = [ws.gradient_pair(system, policy, part, horizon=HORIZON, **options) for part in x0.split(2)]
    assert_close((apart[0] + apart[1]).flat, pair.flat, TOLERANCE[x0.dtype])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_tape(name, road):
    system, make = SYSTEMS[name]
    policy, x0 = on_road(road, make(system)), make_states(system, 3)
    c = make_cotangents(system, HORIZON, 3)
    expected = gradients(system, policy, x0, HORIZON, "R", loss=None, cotangents=c)
    policy.zero_grad()
    start = wp.array(x0.numpy(), requires_grad=True, device="cpu")
    with wp.Tape() as tape:
        states, controls = ws.record_rollout(tape, system, policy, start, horizon=HORIZON, flow="R")
    states.grad.assign(c.states.numpy())
    controls.grad.assign(c.controls.numpy())
    tape.backward()
    found = {n.removeprefix("net."): p.grad for n, p in policy.named_parameters()}
    found["x0"] = torch.tensor(start.grad.numpy())
    assert_close(found, expected, TOLERANCE[x0.dtype])


# What is refused


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"points": 3}, ValueError, "points is 3, expected at least 4"),
        ({"points": 32.0}, TypeError, "points is 32.0 of type float, expected an int"),
        ({"target": 0}, ValueError, r"target is 0, expected 1 \(the ground state\) ... 32"),
        ({"points": 4, "target": 5}, ValueError, "target is 5, expected .* 4"),
        ({"target": True}, TypeError, "target is True of type bool"),
        ({"dt": 0.0}, ValueError, "dt is 0.0, expected a finite number above 0"),
        ({"length": -2}, ValueError, "length is -2.0, expected a finite number above 0"),
        ({"length": float("nan")}, ValueError, "length is nan"),
    ],
)
def test_bad_numbers(fields, error, message):
    with pytest.raises(error, match=f"^QuantumControl: {message}"):
        ws.QuantumControl(**fields)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"points": 6}, ValueError, "points is 6, expected at least 7"),
        ({"points": 7.0}, TypeError, "points is 7.0 of type float, expected an int"),
        ({"width": 0}, ValueError, "width is 0, expected at least 1"),
        ({"width": True}, TypeError, "width is True of type bool"),
    ],
)
def test_bad_cnn(arguments, error, message):
    with pytest.raises(error, match=f"^WaveCNN: {message}"):
        ws.WaveCNN(**arguments)


def test_bad_input():
    system = ws.QuantumControl(points=8)
    x0 = system.initial_states(3)
    with pytest.raises(
        ValueError, match=r"x0 has shape \(3, 16\), expected \(nworld, 64\) for QuantumControl"
    ):
        ws.rollout(ws.QuantumControl(), ws.WaveCNN(32), x0, horizon=2)
    with pytest.raises(ValueError, match="18 inputs to 1 outputs, expected 16 .state_size. to 1"):
        ws.rollout(system, ws.WaveCNN(9), x0, horizon=2)
    with pytest.raises(ValueError, match=r"u has shape \(3, 2\), expected .* = \(3, 1\)"):
        ws.step(system, x0, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="^QuantumControl.initial_states: split is 'dev'"):
        system.initial_states(3, split="dev")
    with pytest.raises(TypeError, match="^QuantumControl.initial_states: seed is '1' of type str"):
        system.initial_states(3, seed="1")


def test_initial_states():
    system = ws.QuantumControl(points=9)
    train, test = (system.initial_states(50, seed=7, split=split) for split in ("train", "test"))
    assert torch.equal(system.initial_states(50, seed=7), train)
    assert error_of(train, test) > 0.1
    lowest = torch.stack([torch.from_numpy(system.eigenstate(n)) for n in (1, 2)]).to(torch.complex128)
    for states in (train, test):
        shares = (in_waves(states.double()) @ lowest.T).abs() ** 2
        assert_close(shares.sum(1), torch.ones(50), 1e-6)
        assert shares[:, 0].min() < 0.1 and shares[:, 0].max() > 0.9
    assert system.initial_states(0).shape == (0, 18)

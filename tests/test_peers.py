"""The peers of `warp-sims bench` compute the same gradients and make the same updates."""

from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import expected_gradients
from reference import cartpole
from reference import rollout as oracle

import warp_sims as ws
from benchmarks.peers.torch_compiled import TorchCompiled
from benchmarks.peers.torch_eager import TorchEager
from benchmarks.peers.warp_tape import WarpTape
from warp_sims.bench.case import Case

for package in ("jax", "optax"):
    pytest.importorskip(package, reason=f"the JAX peer needs {package}")
jax_scan = import_module("benchmarks.peers.jax_scan")

GOLDEN = Path(__file__).parent / "golden"
SYSTEM = {"dt": 0.03, "gravity": 9.7, "pole_mass": 0.12, "total_mass": 1.3, "pole_length": 0.45}
HORIZON = 30
PEERS = {"torch": TorchEager} | {
    f"jax-{plan}": partial(jax_scan.JaxScan, plan=plan) for plan in jax_scan.PLANS
}
COMPILED = {"torch-compile": TorchCompiled, "warp-tape": WarpTape}

# Difference of gradients or weights, relative to the norm of each array. float64: sums in another order.
TOLERANCE_64 = 1e-10
# float32: five updates of Adam, whose ratio of moments amplifies the rounding of small gradient components.
TOLERANCE_32 = 1e-4


def problem(poles=2, widths=(9, 6), nworld=5, seed=0):
    random = np.random.default_rng(seed)
    sizes = [2 + 2 * poles, *widths, 1]
    weights = []
    for size, size_next in pairwise(sizes):
        weights += [
            random.normal(size=(size_next, size)) / np.sqrt(size),
            0.1 * random.normal(size=size_next),
        ]
    weights[-2] *= 4.0  # strong enough a feedback that C differs from M
    x0 = random.uniform(-1.0, 1.0, (nworld, sizes[0]))
    return SYSTEM, widths, x0, weights, HORIZON


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def first_gradients(peer, *arguments, **named):
    made = peer(*arguments, dtype="float64", **named)
    made.update()
    return made.gradients()


def oracle_gradients(system, widths, x0, weights, horizon, flow, loss):
    sizes = [x0.shape[1], *widths, 1]
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    policy = torch.nn.Sequential(*(module for layer in layers for module in (layer, torch.nn.Tanh())))[
        :-1
    ].double()
    with torch.no_grad():
        for parameter, array in zip(policy.parameters(), weights, strict=True):
            parameter.copy_(torch.tensor(array))
    objective = {"final": oracle.final, "running": oracle.running}[loss](cartpole.loss)
    numbers = {name.replace("pole_length", "length"): value for name, value in system.items()}
    step = partial(cartpole.step, **numbers)
    result = oracle.gradients(step, policy, torch.tensor(x0), flow, horizon, objective)
    return [gradient.numpy() for gradient in result.parameters.values()]


@pytest.mark.parametrize("flow, loss", [("R", "final"), ("M", "running"), ("C", "final"), ("C", "running")])
def test_peers_compute_the_gradients_of_the_oracle(flow, loss):
    arguments = problem()
    expected = oracle_gradients(*arguments, flow, loss)
    if flow == "C":
        assert 0 < sum(np.count_nonzero(array) for array in expected) < sum(array.size for array in expected)
    for peer in PEERS.values():
        assert_close(first_gradients(peer, *arguments, flow, loss), expected, TOLERANCE_64)


GUIDANCE = {
    "dt": 0.05,
    "driver_drag": 0.7,
    "driver_repulsion": 0.9,
    "evader_drag": 2.0,
    "evader_repulsion": 6.0,
    "flocking": 1.7,
    "flocking_length": 0.8,
    "softening": 0.3,
}
OTHERS = {
    "cartpole": (SYSTEM, ws.CartPole(poles=2, **SYSTEM), (9, 6)),
    "guidance": (GUIDANCE, ws.GuidanceByRepulsion(drivers=2, evaders=3, **GUIDANCE), (9, 6)),
    "quantum": (
        {"dt": 0.09, "length": 1.7, "target": 2},
        ws.QuantumControl(points=12, dt=0.09, length=1.7, target=2),
        (5, 5),
    ),
}


@pytest.mark.parametrize("loss, flow", [("running", "C"), ("final", "M")])
@pytest.mark.parametrize("name", OTHERS)
def test_peers_of_the_other_problems(name, loss, flow):
    check_peers(PEERS.values(), name, loss, flow)


@pytest.mark.parametrize("peer", ["torch", "jax-scan", "jax-remat"])
def test_agents_at_one_place_have_a_gradient(peer):
    """It happens in batches of thousands; the root of a distance of 0 has none of its own."""
    numbers, system, widths = OTHERS["guidance"]
    policy = ws.MLP(system.state_size, widths, system.control_size)
    policy.reset_parameters(seed=1)
    policy = policy.double()
    x0 = system.initial_states(3, dtype=torch.float64)
    x0[1, 12:14] = x0[1, 8:10]
    out = ws.rollout(system, policy, x0, horizon=6, flow="R", loss="running")
    out.loss.backward()
    arguments = (numbers, widths, x0.numpy(), [p.detach().numpy() for p in policy.parameters()])
    found = first_gradients(PEERS[peer], *arguments, 6, "R", "running", problem="guidance")
    assert_close(found, [p.grad.numpy() for p in policy.parameters()], TOLERANCE_64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "peer, flow", [("torch-compile", "C"), ("torch-compile", "M"), ("warp-tape", "R")], ids=str
)
@pytest.mark.parametrize("name", OTHERS)
def test_compiled_peers(name, peer, flow):
    reason = COMPILED[peer].unavailable("cpu")
    if reason:
        pytest.skip(reason)
    for loss in ("running", "final"):
        check_peers([COMPILED[peer]], name, loss, flow)


def check_peers(peers, name, loss, flow):
    numbers, system, widths = OTHERS[name]
    policy = (
        ws.WaveCNN(12, 5) if name == "quantum" else ws.MLP(system.state_size, widths, system.control_size)
    )
    policy.reset_parameters(seed=1)
    policy = policy.double()
    x0 = system.initial_states(5, dtype=torch.float64)
    expected = expected_gradients(system, policy, x0, 12, flow, loss=loss, control_cost=0.3)
    weights = {key: parameter.detach().numpy() for key, parameter in policy.named_parameters()}
    arguments = (numbers, widths, x0.numpy(), list(weights.values()), 12, flow, loss)
    for peer in peers:
        found = first_gradients(peer, *arguments, problem=name, control_cost=0.3)
        assert_close(found, [expected[key].numpy() for key in weights], TOLERANCE_64)


@pytest.mark.parametrize("flow", ["R", "C"])
@pytest.mark.parametrize(
    "kind", ["mlp:elu+layernorm", "mlp:gelu+rmsnorm", "mlp:softplus", "mlp:silu+layernorm", "mlp"]
)
def test_peers_of_other_perceptrons(kind, flow):
    case = Case("cartpole", flow, 5, widths=(9, 6), horizon=12, kind=kind)
    policy, system, x0 = case.policy(), case.system, case.system.initial_states(5, dtype=torch.float64)
    arguments = case.peer_arguments() | {"x0": x0.numpy()}
    policy = policy.double()
    expected = expected_gradients(system, policy, x0, 12, flow, loss=case.preset.loss)
    for peer in PEERS.values():
        found = first_gradients(peer, **arguments)
        assert_close(found, [expected[key].numpy() for key, _ in policy.named_parameters()], TOLERANCE_64)


def test_the_eager_peer_of_a_module():
    case = Case("cartpole", "R", 5, horizon=12, kind="composed_nets:attention")
    policy, x0 = case.policy().double(), case.system.initial_states(5, dtype=torch.float64)
    expected = expected_gradients(case.system, policy, x0, 12, "R", loss=case.preset.loss)
    found = first_gradients(TorchEager, **case.peer_arguments() | {"x0": x0.numpy()})
    assert_close(found, [expected[key].numpy() for key, _ in policy.named_parameters()], TOLERANCE_64)


@pytest.mark.parametrize("peer", PEERS)
def test_peers_compute_the_authors_gradients(peer):
    golden = np.load(GOLDEN / "cartpole_NC4_f64.npz")
    system = {
        "dt": float(golden["dt"]),
        "gravity": 9.8,
        "pole_mass": 0.1,
        "total_mass": 1.1,
        "pole_length": 0.5,
    }
    weights = [golden[f"big_w{i}"].T for i in range(6)]
    arguments = (system, (100, 100), golden["x0"].reshape(4, -1), weights, 100, "C", "final")
    expected = [golden[f"big_FINAL_grad_C_w{i}"].T for i in range(6)]
    assert_close(first_gradients(PEERS[peer], *arguments), expected, TOLERANCE_64)


@pytest.mark.parametrize("flow", ["R", "C"])
def test_peers_make_the_same_first_updates(flow):
    arguments = problem()
    first, *others = (peer(*arguments, flow, "final") for peer in PEERS.values())
    start = first.weights()
    losses = [first.update() for _ in range(5)]
    assert losses[-1] < losses[0]
    moved = [after - before for after, before in zip(first.weights(), start, strict=True)]
    for other in others:
        np.testing.assert_allclose([other.update() for _ in range(5)], losses, rtol=1e-5)
        assert_close(
            [after - before for after, before in zip(other.weights(), start, strict=True)],
            moved,
            TOLERANCE_32,
        )

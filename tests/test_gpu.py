"""The same numbers on a GPU as on a CPU and as the published program gave, on torch's streams, inside a CUDA
graph.

What needs neither a stream nor a graph runs on an emulated GPU too, which needs no more than a C++ compiler
(emulator/): a selection, and all of it with EMULATOR=whole.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import warp as wp
from emulator import library
from emulator.device import CPU, Emulator
from foreign_carts import jax_cart, tape_cart, torch_cart
from test_golden import CASES as GOLDEN_CASES
from test_golden import LETTERS, Problem, in_torch
from warp_sims.bridge.passes import fused
from warp_sims.bridge.runtime.graphs import Graph
from warp_sims.bridge.runtime.launches import Launch
from warp_sims.kernels.sweeps.resident import LATENCY_WORLDS, choose_plan

import warp_sims as ws
from warp_sims.cli import main
from warp_sims.policies.networks import fused_network

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EMULATED = pytest.mark.skipif(library.compiler() is None, reason="needs g++ or clang++")


def on_a_gpu(test):
    """A test of what only a GPU has."""
    for mark in CUDA:
        test = mark(test)
    return test


class Place(NamedTuple):
    """Where the kernels of a GPU run."""

    device: torch.device
    """Of the tensors."""
    kernels: Callable[[], contextlib.AbstractContextManager]
    """Context in which these kernels are launched on tensors of the device."""


EMULATOR = Emulator()
WHOLE = pytest.mark.whole_emulation


@pytest.fixture(autouse=True)
def products_in_float32(monkeypatch):
    """Torch's convolutions round to TF32 on a GPU unless told otherwise, a thousandth of their result."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=[pytest.param("cuda", marks=CUDA), pytest.param("emulated", marks=EMULATED)])
def place(request):
    """A GPU, and an emulated one."""
    if request.param == "cuda":
        return Place(torch.device("cuda", 0), contextlib.nullcontext)
    if request.node.get_closest_marker("whole_emulation") and not library.WHOLE:
        pytest.skip("emulated with EMULATOR=whole")
    return Place(CPU, EMULATOR.standing_in)


TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
"""Sums are taken in another order there, and a rollout of 50 steps amplifies rounding."""

CASES = {
    "cartpole": (ws.CartPole(poles=2), lambda s: ws.MLP(s.state_size, (33, 20), 1)),
    "guidance": (ws.GuidanceByRepulsion(2, 3), lambda s: ws.MLP(s.state_size, (24,), s.control_size)),
    "quantum": (ws.QuantumControl(points=16), lambda s: ws.WaveCNN(s.points, 12)),
}


class Evaluated(torch.nn.Module):
    """A policy that torch evaluates."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, x):
        return torch.atleast_2d(self.policy(x))  # which runs in no sweep


def gradients(system, policy, x0, flow):
    policy.zero_grad()
    x0 = x0.detach().requires_grad_()
    out = ws.rollout(system, policy, x0, horizon=50, flow=flow, loss="running", control_cost=0.1)
    out.loss.backward()
    return [out.states.detach(), out.loss.detach(), x0.grad, flat(policy)]


def flat(policy):
    """All weight gradients: rounding exceeds what is left of a single parameter where its terms cancel."""
    return torch.cat([p.grad.reshape(-1) for p in policy.parameters()])


@pytest.mark.parametrize("road", ["fused", "torch"])
@pytest.mark.parametrize("flow", ["R", "C", *(pytest.param(flow, marks=WHOLE) for flow in "MNS")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_as_on_a_cpu(case, dtype, flow, road, place):
    system, make = CASES[case]
    torch.manual_seed(0)
    policy = make(system).to(dtype)
    policy = policy if road == "fused" else Evaluated(policy)
    x0 = system.initial_states(17, dtype=dtype)
    expected = gradients(system, policy, x0, flow)
    # component by component a combined gradient may differ where a sign is rounding
    with place.kernels():
        actual = gradients(system, policy.to(place.device), x0.to(place.device), flow)
    for a, b in zip(actual, expected):
        assert a.device == place.device
        assert (a.cpu() - b).norm() <= TOLERANCE[dtype] * b.norm()


@pytest.mark.parametrize("flow", "RC")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_ensemble_as_on_a_cpu(case, dtype, flow, place):
    system, make = CASES[case]
    torch.manual_seed(0)
    ensemble = ws.Ensemble([make(system).to(dtype) for _ in range(3)])
    x0 = system.initial_states(3 * 17, dtype=dtype).view(3, 17, -1)

    def run(policy, x0):
        policy.zero_grad()
        x0 = x0.detach().requires_grad_()
        out = ws.rollout(system, policy, x0, horizon=50, flow=flow, loss="running", control_cost=0.1)
        out.loss.sum().backward()
        return [out.states.detach(), out.loss.detach(), x0.grad, flat(policy)]

    expected = run(ensemble, x0)
    with place.kernels():
        actual = run(ensemble.to(place.device), x0.to(place.device))
    for a, b in zip(actual, expected):
        assert a.device == place.device
        assert (a.cpu() - b).norm() <= TOLERANCE[dtype] * b.norm()


ROBOTS = {
    "links": (ws.LinkedPendulum(links=2), 1e-5),
    # contact amplifies rounding
    "hopper": (ws.Hopper(substeps=4), 1e-4),
}
"""With the tolerance of float32."""


@on_a_gpu
@pytest.mark.parametrize("road", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROBOTS)
def test_robots_as_on_a_cpu(name, dtype, road):
    system, tolerance = ROBOTS[name]
    tolerance = 1e-12 if dtype == torch.float64 else tolerance
    torch.manual_seed(0)
    policy = ws.MLP(system.state_size, (32, 32), system.control_size, dtype=dtype)
    policy = policy if road == "fused" else Evaluated(policy)
    x0 = system.initial_states(17, dtype=dtype)
    for flow in "RC":
        policy.cpu()
        expected = ten_steps(system, policy, x0, flow)
        actual = ten_steps(system, policy.cuda(), x0.cuda(), flow)
        for a, b in zip(actual, expected):
            assert (a.cpu() - b).norm() <= tolerance * b.norm()


def ten_steps(system, policy, x0, flow):
    policy.zero_grad()
    x0 = x0.detach().requires_grad_()
    out = ws.rollout(system, policy, x0, horizon=10, flow=flow)
    out.loss.backward()
    return [out.states.detach(), out.loss.detach(), x0.grad, flat(policy)]


@on_a_gpu
@pytest.mark.parametrize("flow", "RMSNC")
@pytest.mark.parametrize("kind", ["torch", "jax", "tape"])
def test_foreign_simulators_as_the_built_in_one(kind, flow):
    """On the device that they are written for."""
    cart, nworld = ws.CartPole(poles=2), 17
    policy = ws.MLP(cart.state_size, (33, 20), 1, dtype=torch.float64)
    x0 = cart.initial_states(nworld, dtype=torch.float64)
    expected = ten_steps(cart, policy, x0, flow)
    with contextlib.ExitStack() as stack:
        if kind == "jax":
            jax = pytest.importorskip("jax")
            # of a GPU's work autograd runs the backward pass in a thread of its own
            jax.config.update("jax_enable_x64", True)
            stack.callback(jax.config.update, "jax_enable_x64", False)
            system = jax_cart(cart)
        elif kind == "tape":
            stack.enter_context(wp.ScopedDevice("cuda:0"))
            system = tape_cart(cart, nworld)
        else:
            system = torch_cart(cart)
        actual = ten_steps(system, policy.cuda(), x0.cuda(), flow)
    for a, b in zip(actual, expected):
        assert a.device.type == "cuda"
        assert (a.cpu() - b).norm() <= 1e-12 * b.norm()


@on_a_gpu
def test_on_a_side_stream():
    system, make = CASES["cartpole"]
    policy = make(system).cuda()
    x0 = system.initial_states(64).cuda()
    expected = gradients(system, policy, x0, "C")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = gradients(system, policy, x0, "C")
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


GOLDEN = [(name, variant, label) for name, variant, labels in GOLDEN_CASES for label in labels]


@pytest.mark.parametrize("road", ["fused", pytest.param("torch", marks=WHOLE)])
@pytest.mark.parametrize(("name", "variant", "label"), GOLDEN)
def test_golden_gradients(name, variant, label, road, place):
    problem = Problem(name, variant, label, road)
    policy = problem.policy.to(place.device)
    for flow in problem.flows(label).keys() - {"C"}:
        policy.zero_grad()
        x0 = problem.x0.to(place.device)
        with place.kernels():
            ws.rollout(
                problem.system, policy, x0, horizon=problem.horizon, flow=flow, **problem.loss
            ).loss.backward()
        for i, parameter in enumerate(policy.parameters()):
            golden = in_torch(problem[f"{label}_grad_{LETTERS[flow]}_w{i}"])
            assert problem.is_close(parameter.grad.cpu(), golden), (flow, i)


@pytest.mark.parametrize(
    "nworld", [1, 5, LATENCY_WORLDS, LATENCY_WORLDS + 2, pytest.param(1001, marks=WHOLE)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_rollouts_of_any_number_of_worlds(case, dtype, nworld, place):
    system, make = CASES[case]
    torch.manual_seed(1)
    policy = make(system).to(dtype)
    x0 = system.initial_states(nworld, dtype=dtype)
    options = {"horizon": 20, "loss": "running", "control_cost": 0.1}
    with torch.no_grad():
        expected = ws.rollout(system, policy, x0, **options)
        with place.kernels():
            actual = ws.rollout(system, policy.to(place.device), x0.to(place.device), **options)
    for a, b in ((actual.states, expected.states), (actual.controls, expected.controls)):
        assert (a.cpu() - b).norm() <= TOLERANCE[dtype] * b.norm()
    assert abs(float(actual.loss) - float(expected.loss)) <= TOLERANCE[dtype] * abs(float(expected.loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forward_sweeps_agree(dtype, place, monkeypatch):
    """That with the weights in registers, and that for any width."""
    system = ws.CartPole(poles=4)
    policy = ws.MLP(system.state_size, (100, 100), system.control_size, dtype=dtype).to(place.device)
    assert choose_plan(fused_network(policy).description, dtype.itemsize, 301) is not None
    x0 = system.initial_states(301, dtype=dtype).to(place.device)
    with torch.no_grad(), place.kernels():
        resident = ws.rollout(system, policy, x0, horizon=20)
        monkeypatch.setattr(fused, "choose_plan", lambda *args: None)
        monkeypatch.setattr(fused, "_rollout", fused.Pool(fused._Rollout))
        streamed = ws.rollout(system, policy, x0, horizon=20)
    assert (resident.states - streamed.states).norm() <= TOLERANCE[dtype] * streamed.states.norm()
    assert (resident.loss - streamed.loss).abs() <= TOLERANCE[dtype] * streamed.loss.abs()


@pytest.mark.parametrize("case", CASES)
def test_one_sweep_forwards_and_one_backwards(case, place, monkeypatch):
    system, make = CASES[case]
    policy = make(system).to(place.device)
    x0 = system.initial_states(9).to(place.device)
    counts = Counter()
    launch = Launch.__call__

    def counted(self):
        counts[self.name] += 1
        return launch(self)

    monkeypatch.setattr(Launch, "__call__", counted)
    with place.kernels():
        gradients(system, policy, x0, "C")
    assert counts["resident_rollout"] == counts["adjoint"] == 1
    # one comparison of the weights' gradients, one of those of x0
    assert set(counts) == {"resident_rollout", "adjoint", "combine"} and counts["combine"] == 2


@on_a_gpu
@pytest.mark.parametrize("clip", ["none", "norm", "value"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("flow", ["R", "C"])
@pytest.mark.parametrize("case", CASES)
def test_a_graph_of_updates_gives_the_same_weights(case, flow, optimizer, clip):
    system, make = CASES[case]
    if case != "cartpole" and (optimizer, clip) != ("adam", "norm"):
        pytest.skip("optimizers and clipping know no system")
    results = []
    for graph in (False, True):
        torch.manual_seed(3)
        policy = make(system).cuda()
        # 20 samples: whole batches, and a rest with a graph of its own
        config = ws.TrainConfig(
            system=system,
            policy=policy,
            flow=flow,
            horizon=20,
            loss="running",
            samples=20,
            batch=8,
            epochs=5,
            optimizer=optimizer,
            clip=clip,
            clip_at=0.01,
            graph=graph,
        )
        results.append(ws.train(config, progress=False))
    eager, graphed = results
    for a, b in zip(eager.policy.parameters(), graphed.policy.parameters()):
        assert torch.equal(a, b)
    for name in ("loss_batch", "grad_norm", "cosine", "agreement", "loss_test"):
        assert eager.log[name].tobytes() == graphed.log[name].tobytes(), name


@on_a_gpu
def test_a_graph_of_a_policy_that_torch_evaluates():
    system, make = CASES["cartpole"]
    weights = []
    for graph in (False, True):
        torch.manual_seed(3)
        policy = Evaluated(make(system)).cuda()
        options = {"horizon": 10, "samples": 16, "batch": 8, "epochs": 4}
        ws.train(ws.TrainConfig(system=system, policy=policy, graph=graph, **options), progress=False)
        weights.append([p.detach().clone() for p in policy.parameters()])
    for a, b in zip(*weights):
        assert torch.equal(a, b)


@on_a_gpu
def test_a_graph_outlives_the_caches():
    """Other shapes push its prepared launches and tables out; the graph still holds them."""

    system, make = CASES["cartpole"]
    policy = make(system).cuda()
    x0 = system.initial_states(8).cuda()
    outputs = []

    def run():
        outputs[:] = gradients(system, policy, x0, "C")

    run()
    expected = [t.clone() for t in outputs]
    graph = Graph(run, x0.device)
    captured = list(outputs)
    for n in range(9, 40):
        gradients(system, policy, system.initial_states(n).cuda(), "C")
    torch.cuda.empty_cache()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected):
        assert torch.equal(a, b)


def test_open_loop_as_on_a_cpu(place):
    system = ws.QuantumControl(points=16)
    x0 = system.initial_states(5, dtype=torch.float64)
    u = torch.randn(30, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for device, kernels in ((CPU, contextlib.nullcontext), place):
        x, c = (t.detach().to(device).requires_grad_() for t in (x0, u))
        with kernels():
            ws.simulate(system, x, c)[1:].square()[..., ::3].sum().backward()
        found.append((x.grad.cpu(), c.grad.cpu()))
    for a, b in zip(*found):
        assert (a - b).norm() <= TOLERANCE[torch.float64] * a.norm()


@on_a_gpu
def test_devices_are_checked():
    system, make = CASES["cartpole"]
    policy = make(system)
    with pytest.raises(ValueError, match="expected cuda:0.*the device of x0"):
        ws.rollout(system, policy, system.initial_states(3).cuda(), horizon=2)
    count = torch.cuda.device_count()

    assert main(["train", "cartpole", "--device", f"cuda:{count}", "--epochs", "1"]) == 2
    bad = system.initial_states(3).cuda()
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError, match="world 1"):
        ws.rollout(system, policy.cuda(), bad, horizon=2)

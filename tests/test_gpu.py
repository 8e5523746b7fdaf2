"""The same numbers on a GPU as on a CPU and as the published program gave, on torch's streams, inside a CUDA
graph. Skipped without a GPU.
"""

from collections import Counter

import pytest
import torch
import warp as wp
from test_golden import CASES as GOLDEN_CASES
from test_golden import LETTERS, Problem, in_torch
from warp_sims.bridge.passes import fused
from warp_sims.bridge.runtime.graphs import Graph
from warp_sims.kernels.sweeps.resident import LATENCY_WORLDS, choose_plan

import warp_sims as ws
from warp_sims.cli import main
from warp_sims.policies import fused_network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

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
        return self.policy(x)


def gradients(system, policy, x0, flow):
    policy.zero_grad()
    x0 = x0.detach().requires_grad_()
    out = ws.rollout(system, policy, x0, horizon=50, flow=flow, loss="running", control_cost=0.1)
    out.loss.backward()
    return [out.states.detach(), out.loss.detach(), x0.grad, *(p.grad for p in policy.parameters())]


@pytest.mark.parametrize("road", ["fused", "torch"])
@pytest.mark.parametrize("flow", "RMNSC")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_as_on_a_cpu(case, dtype, flow, road):
    system, make = CASES[case]
    torch.manual_seed(0)
    policy = make(system).to(dtype)
    policy = policy if road == "fused" else Evaluated(policy)
    x0 = system.initial_states(17, dtype=dtype)
    expected = gradients(system, policy, x0, flow)
    # component by component a combined gradient may differ where a sign is rounding
    actual = gradients(system, policy.cuda(), x0.cuda(), flow)
    for a, b in zip(actual, expected):
        assert a.device.type == "cuda"
        assert (a.cpu() - b).norm() <= TOLERANCE[dtype] * (b.norm() + 1e-3)


@pytest.mark.parametrize("flow", "RC")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_ensemble_as_on_a_cpu(case, dtype, flow):
    system, make = CASES[case]
    torch.manual_seed(0)
    ensemble = ws.Ensemble([make(system).to(dtype) for _ in range(3)])
    x0 = system.initial_states(3 * 17, dtype=dtype).view(3, 17, -1)

    def run(policy, x0):
        policy.zero_grad()
        x0 = x0.detach().requires_grad_()
        out = ws.rollout(system, policy, x0, horizon=50, flow=flow, loss="running", control_cost=0.1)
        out.loss.sum().backward()
        return [out.states.detach(), out.loss.detach(), x0.grad, *(p.grad for p in policy.parameters())]

    expected = run(ensemble, x0)
    for a, b in zip(run(ensemble.cuda(), x0.cuda()), expected):
        assert a.device.type == "cuda"
        assert (a.cpu() - b).norm() <= TOLERANCE[dtype] * (b.norm() + 1e-3)


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


@pytest.mark.parametrize("road", ["fused", "torch"])
@pytest.mark.parametrize(("name", "variant", "label"), GOLDEN)
def test_golden_gradients(name, variant, label, road):
    problem = Problem(name, variant, label, road)
    policy = problem.policy.cuda()
    for flow in problem.flows(label).keys() - {"C"}:
        policy.zero_grad()
        x0 = problem.x0.cuda()
        ws.rollout(
            problem.system, policy, x0, horizon=problem.horizon, flow=flow, **problem.loss
        ).loss.backward()
        for i, parameter in enumerate(policy.parameters()):
            golden = in_torch(problem[f"{label}_grad_{LETTERS[flow]}_w{i}"])
            assert problem.is_close(parameter.grad.cpu(), golden), (flow, i)


@pytest.mark.parametrize("nworld", [1, 5, LATENCY_WORLDS, LATENCY_WORLDS + 2, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_rollouts_of_any_number_of_worlds(case, dtype, nworld):
    system, make = CASES[case]
    torch.manual_seed(1)
    policy = make(system).to(dtype)
    x0 = system.initial_states(nworld, dtype=dtype)
    options = {"horizon": 20, "loss": "running", "control_cost": 0.1}
    with torch.no_grad():
        expected = ws.rollout(system, policy, x0, **options)
        actual = ws.rollout(system, policy.cuda(), x0.cuda(), **options)
    for a, b in ((actual.states, expected.states), (actual.controls, expected.controls)):
        assert (a.cpu() - b).norm() <= TOLERANCE[dtype] * b.norm()
    assert abs(float(actual.loss) - float(expected.loss)) <= TOLERANCE[dtype] * abs(float(expected.loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forward_sweeps_agree(dtype, monkeypatch):
    """That with the weights in registers, and that for any width."""
    system = ws.CartPole(poles=4)
    policy = ws.MLP(system.state_size, (100, 100), system.control_size, dtype=dtype).cuda()
    assert choose_plan(fused_network(policy).description, dtype.itemsize, 301) is not None
    x0 = system.initial_states(301, dtype=dtype).cuda()
    with torch.no_grad():
        resident = ws.rollout(system, policy, x0, horizon=20)
        monkeypatch.setattr(fused, "choose_plan", lambda *args: None)
        monkeypatch.setattr(fused, "_rollout", fused.Pool(fused._Rollout))
        streamed = ws.rollout(system, policy, x0, horizon=20)
    assert (resident.states - streamed.states).norm() <= TOLERANCE[dtype] * streamed.states.norm()
    assert (resident.loss - streamed.loss).abs() <= TOLERANCE[dtype] * streamed.loss.abs()


@pytest.mark.parametrize("case", CASES)
def test_one_sweep_forwards_and_one_backwards(case, monkeypatch):
    system, make = CASES[case]
    policy = make(system).cuda()
    x0 = system.initial_states(9).cuda()
    gradients(system, policy, x0, "C")
    counts = Counter()
    replay = wp.Launch.launch

    def counted(self, *args, **kwargs):
        counts[self.kernel.func.__name__] += 1
        return replay(self, *args, **kwargs)

    monkeypatch.setattr(wp.Launch, "launch", counted)
    gradients(system, policy, x0, "C")
    assert counts["resident_rollout"] == counts["adjoint"] == 1
    # one comparison of the weights' gradients, one of those of x0
    assert set(counts) == {"resident_rollout", "adjoint", "_combine"} and counts["_combine"] == 2


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


def test_open_loop_on_a_gpu():
    system = ws.QuantumControl(points=16)
    x0 = system.initial_states(5, dtype=torch.float64)
    u = torch.randn(30, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        x, c = (t.to(device).requires_grad_() for t in (x0, u))
        ws.simulate(system, x, c)[1:].square()[..., ::3].sum().backward()
        found.append((x.grad.cpu(), c.grad.cpu()))
    for a, b in zip(*found):
        assert (a - b).norm() <= TOLERANCE[torch.float64] * a.norm()


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

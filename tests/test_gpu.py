"""The same numbers on a GPU as on a CPU, on torch's streams and inside a CUDA graph. Skipped without a
GPU.
"""

import pytest
import torch

import warp_sims as ws

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

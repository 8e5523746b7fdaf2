"""Steps in memory, which GPUs take for large states, on a CPU: against the block form, the torch reference
and the published program.
"""

import dataclasses

import pytest
import torch
from cases import (
    FLOWS,
    ROADS,
    assert_close,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
)
from test_golden import EVERY
from test_golden import test_rollout_and_gradients as check_golden_rollout
from test_golden import test_step_and_its_vjp as check_golden_step
from warp_sims.bridge.passes import sweeps
from warp_sims.bridge.passes.spec import Cotangents, LossWeights, Spec
from warp_sims.bridge.runtime import registry
from warp_sims.bridge.runtime.registry import prepare
from warp_sims.kernels.sweeps.fused_rollout import make_fused_rollout
from warp_sims.kernels.sweeps.rollout import make_gpu_kernels

import warp_sims as ws

HORIZON = 6
# One elimination in two orders, over 6 steps; measured 3e-15 and 1e-6.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
# Against the torch reference, which solves by another decomposition; as in test_quantum.py.
TOLERANCE_REFERENCE = 1e-12
POINTS = (4, 5, 7, 32, 33, 128)


def box(points):
    return ws.QuantumControl(points=points, dt=0.09, length=1.7, target=2)


def two_forms(system, dtype):
    p = prepare(system.number, dtype, torch.device("cpu"))
    return p, dataclasses.replace(p, kernels=make_gpu_kernels(p.functions, p.dtype))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Lets rollouts on a CPU take the kernels of large states on GPUs, but those of the resident sweep."""
    monkeypatch.setattr(registry, "_prepared", {})
    monkeypatch.setattr(
        registry,
        "make_kernels",
        lambda functions, dtype, on_cpu: make_gpu_kernels(functions, dtype),
    )

    monkeypatch.setattr(
        registry.Prepared, "fused_rollout", lambda p: make_fused_rollout(p.functions, p.dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("points", POINTS)
def test_as_the_block_form(points, dtype):
    """Random cotangents on every output, and every pair of flows in one sweep."""
    system, nworld = box(points), 5
    block, memory = two_forms(system, dtype)
    draw = torch.Generator().manual_seed(3)
    controls = 3.0 * torch.randn(HORIZON, nworld, 1, generator=draw, dtype=torch.float64).to(dtype)
    jac = 0.1 * torch.randn(HORIZON, nworld, 1, 2 * points, generator=draw, dtype=torch.float64).to(dtype)
    x0 = make_states(system, nworld, dtype)
    states = sweeps.simulate(block, x0, controls)
    assert_close(sweeps.simulate(memory, x0, controls), states, TOLERANCE[dtype])
    weights = LossWeights(0.7, 0.3, 0.2)
    losses = [sweeps.loss(p, states, controls, weights) for p in (memory, block)]
    assert_close(losses[0], losses[1], TOLERANCE[dtype])
    c = make_cotangents(system, HORIZON, nworld, dtype)
    g = Cotangents(c.loss, c.states, c.controls)
    for base in "RMNS":
        for check in ("", *"RMNS"):
            back = Spec(0, base * HORIZON, check * HORIZON, 0.9, *weights)
            found, expected = (sweeps.adjoint(p, back, states, controls, jac, g) for p in (memory, block))
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 4e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("points", [32, 128])
def test_as_exact_as_the_block_form(points, dtype, bound):
    """After 128 steps; measured 1e-14 and 6e-6. An elimination that subtracts what nearly cancels gives 1e-4
    for 128 points in float32. The same holds for the form by value.
    """
    system = ws.QuantumControl(points=points)
    p, memory = two_forms(system, dtype)
    by_value = dataclasses.replace(p, kernels=make_gpu_kernels(p.functions._replace(memory=None), p.dtype))
    x0 = system.initial_states(16)
    controls = 3.0 * torch.randn(128, 16, 1, generator=torch.Generator().manual_seed(1))
    exact = prepare(system.number, torch.float64, torch.device("cpu"))
    expected = sweeps.simulate(exact, x0.double(), controls.double())[-1]
    for form in (memory, by_value):
        assert_close(sweeps.simulate(form, x0.to(dtype), controls.to(dtype))[-1].double(), expected, bound)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("points", [4, 9, 32, 33])
def test_gradients_are_the_oracles(points, flow, road, as_on_a_gpu):
    system = box(points)
    policy, x0 = on_road(road, make_net(system, gain=1.0)), make_states(system, 3)
    options = {"cotangents": make_cotangents(system, 12, 3), "loss": "running", "control_cost": 0.7}
    actual = gradients(system, policy, x0, 12, flow, **options)
    assert prepare(system.number, x0.dtype, x0.device).kernels.worlds == 1
    assert_close(actual, expected_gradients(system, policy, x0, 12, flow, **options), TOLERANCE_REFERENCE)


@pytest.mark.parametrize("name", ["quantum_Nx32_f32", "quantum_Nx32_f64"])
def test_published_steps(name, as_on_a_gpu):
    check_golden_step(name)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name, variant, label", [case for case in EVERY if case[0].startswith("quantum")])
def test_published_gradients(name, variant, label, road, as_on_a_gpu):
    check_golden_rollout(name, variant, label, road)


def test_without_a_loss_in_memory():
    """Then that by value serves."""
    system = box(7)
    p, memory = two_forms(system, torch.float64)
    functions = p.functions._replace(memory=p.functions.memory._replace(loss=None, loss_vjp=None))
    other = dataclasses.replace(p, kernels=make_gpu_kernels(functions, p.dtype))
    x0, controls = make_states(system, 3), torch.ones(HORIZON, 3, 1, dtype=torch.float64)
    weights = LossWeights(0.7, 0.3, 0.2)
    states = sweeps.simulate(p, x0, controls)
    g = Cotangents(torch.ones((), dtype=torch.float64), None, None)
    found, expected = (
        (sweeps.loss(q, states, controls, weights), *sweeps.adjoint(q, back, states, controls, None, g))
        for q in (other, memory)
        for back in [Spec(0, "M" * HORIZON, "", 1.0, *weights)]
    )
    for a, b in zip(found, expected, strict=True):
        assert b.any()
        assert_close(a, b, TOLERANCE[torch.float64])

"""The sweeps of GPUs, a world a thread, beside those of CPUs, both on a CPU."""

import dataclasses

import pytest
import torch
from cases import assert_close, make_cotangents, make_states
from warp_sims.bridge.passes import sweeps
from warp_sims.bridge.passes.spec import Cotangents, Spec
from warp_sims.bridge.runtime.arrays import WARP_DTYPE
from warp_sims.bridge.runtime.registry import prepare
from warp_sims.kernels.sweeps.rollout import make_gpu_kernels
from warp_sims.kernels.systems.elements import is_large

import warp_sims as ws

SYSTEMS = {
    "cartpole": ws.CartPole(poles=3),
    "guidance": ws.GuidanceByRepulsion(drivers=2, evaders=3),
    "quantum": ws.QuantumControl(points=7),
    "quantum by value": ws.QuantumControl(points=7),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
"""The same sums, added in another order where compilers contract them: over 9 steps, some units in the last
place."""


def both(name, dtype):
    """A system on a CPU with its own kernels, and with those of a GPU."""
    p = prepare(SYSTEMS[name].number, dtype, torch.device("cpu"))
    functions = p.functions._replace(memory=None) if name.endswith("by value") else p.functions
    return p, dataclasses.replace(p, kernels=make_gpu_kernels(functions, WARP_DTYPE[dtype]))


@pytest.mark.parametrize("check", ["", "RRMMNNSSR"], ids=["one field", "two fields"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("outside", [True, False], ids=["all cotangents", "loss alone"])
def test_same_gradients(name, dtype, check, outside):
    horizon, nworld = 9, 5
    system, (p, q) = SYSTEMS[name], both(name, dtype)
    draw = torch.Generator().manual_seed(5)
    controls = torch.randn(horizon, nworld, system.control_size, generator=draw, dtype=dtype)
    jac = torch.randn(*controls.shape, system.state_size, generator=draw, dtype=dtype)
    states = sweeps.simulate(p, make_states(system, nworld, dtype), controls)
    cotangents = make_cotangents(system, horizon, nworld, dtype)
    g = Cotangents(cotangents.loss, *((cotangents.states, cotangents.controls) if outside else (None, None)))
    back = Spec(0, "RMNSRMNSM", check, 0.9, 0.7, 0.3, 0.2)
    expected = sweeps.adjoint(p, back, states, controls, jac, g)
    actual = sweeps.adjoint(q, back, states, controls, jac, g)
    for a, b in zip(actual, expected):
        assert_close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("flow", "MN")
def test_a_closed_gate_selects(flow):
    system = SYSTEMS["quantum"]
    p, q = both("quantum", torch.float64)
    controls = torch.zeros(3, 2, 1, dtype=torch.float64)
    states = sweeps.simulate(p, make_states(system, 2), controls)
    jac = torch.full((3, 2, 1, system.state_size), torch.inf, dtype=torch.float64)
    adj_states = torch.zeros_like(states)
    adj_states[2] = 1.0 if flow == "M" else torch.inf
    back = Spec(0, "SS" + flow if flow == "N" else "MMM", "", 1.0, 0.0, 0.0, 0.0)
    mu, adj_x0 = sweeps.adjoint(q, back, states, controls, jac, Cotangents(None, adj_states, None))
    if flow == "M":
        assert torch.isfinite(adj_x0).all() and torch.isfinite(mu).all(), "the network edge is closed"
    else:
        assert not adj_x0.any(), "both edges of the first steps are closed"


def test_which_states_are_large():
    assert not is_large(SYSTEMS["cartpole"].device_functions(WARP_DTYPE[torch.float64]).State)
    assert is_large(ws.QuantumControl(points=32).device_functions(WARP_DTYPE[torch.float32]).State)

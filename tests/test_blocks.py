"""The block form of a step, which CPUs run, against the form by value for one world, which GPUs run for
small states; test_memory_functions.py has that for large ones.

The other tests hold the block form against the torch references.
"""

import dataclasses
import functools

import pytest
import torch
import warp as wp
from cases import assert_close, gradients, make_cotangents, make_net, make_states
from own_systems import Pendulum, pendulum_functions
from warp_sims.bridge.passes import sweeps
from warp_sims.bridge.passes.spec import Cotangents, Spec
from warp_sims.bridge.runtime.registry import prepare
from warp_sims.kernels.policy.layout import BLOCK
from warp_sims.kernels.sweeps.rollout import make_kernels

import warp_sims as ws

SYSTEMS = [
    ws.CartPole(poles=1),
    ws.CartPole(poles=4),
    ws.CartPole(poles=6),
    ws.GuidanceByRepulsion(drivers=1, evaders=1),
    ws.GuidanceByRepulsion(drivers=3, evaders=2),
    ws.QuantumControl(points=4),
    ws.QuantumControl(points=9),
    ws.QuantumControl(points=32),
]
HORIZON = 7
# Other orders of sums and of the elimination, over 7 steps; measured 1e-14 and 6e-6.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}


def two_forms(system, dtype):
    p = prepare(system.number, dtype, torch.device("cpu"))
    assert p.kernels.worlds == BLOCK
    return p, dataclasses.replace(p, kernels=make_kernels(p.functions._replace(block=None), p.dtype, True))


def numbers(system, nworld, dtype):
    draw = torch.Generator().manual_seed(3)
    controls = torch.randn(HORIZON, nworld, system.control_size, generator=draw, dtype=torch.float64)
    c = make_cotangents(system, HORIZON, nworld, dtype)
    g = Cotangents(c.loss, c.states, c.controls)
    return make_states(system, nworld, dtype), controls.to(dtype), g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("nworld", [1, 3, 17])
@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_same_trajectories_and_gradients(system, nworld, dtype):
    block, one = two_forms(system, dtype)
    x0, controls, g = numbers(system, nworld, dtype)
    states = sweeps.simulate(block, x0, controls)
    assert_close(states, sweeps.simulate(one, x0, controls), TOLERANCE[dtype])

    draw = torch.Generator().manual_seed(4)
    jac = torch.randn(
        HORIZON, nworld, system.control_size, system.state_size, generator=draw, dtype=torch.float64
    ).to(dtype)
    for base, check in (("R", ""), ("R", "M"), ("N", "S")):
        back = Spec(0, base * HORIZON, check * HORIZON, 0.9, 0.7, 0.3, 0.2)
        found = sweeps.adjoint(block, back, states, controls, 0.1 * jac, g)
        for a, b in zip(found, sweeps.adjoint(one, back, states, controls, 0.1 * jac, g)):
            assert_close(a, b, TOLERANCE[dtype])


def test_worlds_do_not_touch():
    """A world that is not finite leaves the others of its block as they are."""
    for system in SYSTEMS:
        p, _ = two_forms(system, torch.float32)
        x0, controls, g = numbers(system, 5, torch.float32)
        back = Spec(0, "M" * HORIZON, "", 1.0, 1.0, 0.0, 0.0)
        clean = sweeps.simulate(p, x0, controls)
        clean_back = sweeps.adjoint(p, back, clean, controls, None, g)
        x0[2] = torch.nan
        states = sweeps.simulate(p, x0, controls)
        others = [0, 1, 3, 4]
        assert states[:, 2].isnan().any() and torch.equal(states[:, others], clean[:, others])
        for a, b in zip(sweeps.adjoint(p, back, states, controls, None, g), clean_back):
            assert torch.equal(a[..., others, :], b[..., others, :])


@functools.cache
def pendulum_in_blocks(dtype):
    """The pendulum with a block form in plain Warp: a user's system has what the built-in ones have."""
    functions = pendulum_functions(dtype)
    Params, State, Control, step, step_vjp = functions[:5]

    @wp.func
    def step_block(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Params,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
    ):
        for world in range(world0, world0 + worlds):
            states[t + 1, world] = step(states[t, world], controls[t, world], p)

    @wp.func
    def step_vjp_block(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Params,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
        adj: wp.array2d(dtype=State),
        adj_u: wp.array3d(dtype=Control),
    ):
        for f in range(adj_u.shape[0]):
            for world in range(world0, world0 + worlds):
                adj_x, adj_c = step_vjp(states[t, world], controls[t, world], p, adj[f, world])
                adj[f, world] = adj_x
                adj_u[f, t, world] = adj_c

    return functions._replace(block=ws.BlockFunctions(step_block, step_vjp_block))


@dataclasses.dataclass(frozen=True)
class PendulumInBlocks(Pendulum):
    def device_functions(self, dtype):
        return pendulum_in_blocks(dtype)


@pytest.mark.parametrize("flow", ["R", "M", "C"])
def test_own_system_in_blocks(flow):
    net = make_net(Pendulum())
    x0 = Pendulum().initial_states(7, dtype=torch.float64)
    found, expected = (
        gradients(system, net, x0, 9, flow, loss="running") for system in (PendulumInBlocks(), Pendulum())
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)

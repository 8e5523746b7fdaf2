"""Runs a system's functions alone: one step and its adjoint at many points, for `warp_sims.checking`.

The worlds of a kernel are independent points. For each it writes the next state, the cost, and the cotangents
pulled back from given ones. The form by value runs as a form in memory that forms.py makes of it. No rollout
runs these kernels. They contain nothing of a sweep, so a disagreement is an error in the system's own
functions.
"""

import functools
from typing import Any

import warp as wp

from ..policy.layout import BLOCK
from ..system import DeviceFunctions, MemoryFunctions
from .forms import sweep_kernel


@functools.cache
def make_lanes_probe(functions: DeviceFunctions) -> wp.Kernel:
    """Returns the kernel of the block form, a block of worlds a thread; for CPUs."""
    assert functions.block is not None
    Params, State, Control = functions.Params, functions.State, functions.Control
    step, step_vjp = functions.block.step, functions.block.step_vjp

    def lanes_probe(
        # In:
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        # In, out:
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld); row t is read, row t + 1 written
        adj: wp.array2d(dtype=State),  # (fields, nworld)
        # Out:
        adj_u: wp.array3d(dtype=Control),  # (fields, horizon, nworld); row t is written
    ):
        nworld = states.shape[1]
        world0 = wp.static(BLOCK) * wp.tid()
        worlds = wp.min(wp.static(BLOCK), nworld - world0)
        step(states, controls, p, t, nworld, world0, worlds)
        step_vjp(states, controls, p, t, nworld, world0, worlds, adj, adj_u)

    return sweep_kernel(lanes_probe)


@functools.cache
def make_memory_probe(functions: DeviceFunctions, form: MemoryFunctions, dtype: Any) -> wp.Kernel:
    """Returns the kernel of a form in memory, a world a thread."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    step, step_vjp, loss, loss_vjp = form
    has_loss, has_loss_vjp = loss is not None, loss_vjp is not None

    def memory_probe(
        # In:
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        adj_cost: wp.array(dtype=dtype),  # (nworld,)
        # In, out:
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld); row t is read, row t + 1 written
        adj: wp.array2d(dtype=State),  # (nworld, fields)
        adj_x_cost: wp.array2d(dtype=State),  # (nworld, fields); added to
        # Out:
        cost: wp.array(dtype=dtype),  # (nworld,)
        adj_u: wp.array2d(dtype=Control),  # (nworld, fields)
    ):
        world = wp.tid()
        step(states, controls, p, t, world)
        step_vjp(states, controls, p, t, world, adj[world], adj_u[world])
        if wp.static(has_loss):
            cost[world] = loss(states, p, t, world)
        if wp.static(has_loss_vjp):
            loss_vjp(states, p, t, world, adj_cost[world], adj_x_cost[world])

    return sweep_kernel(memory_probe)

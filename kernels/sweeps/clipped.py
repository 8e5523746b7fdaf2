"""Wraps a system: its adjoint clips the norm of the cotangent that arrives.

With lam the cotangents of flow.py and c the limit, every step pulls back

    ups_{t+1} = lam_{t+1} min(1, c / |lam_{t+1}|)

instead of lam_{t+1}, world by world, to the state, the control and the parameters of a policy. It is an
estimator, not a gradient. What is not finite stays so, because clipped it would look like a direction.

The functions are made from the system's own, in their forms by value, in lanes and in memory, so the sweeps
need no change. Their adjoints are written by hand.
"""

import functools
from typing import Any

import warp as wp

from ..system import BlockFunctions, DeviceFunctions, MemoryFunctions
from ..systems.elements import is_large


@functools.cache
def clipped(functions: DeviceFunctions, dtype: Any) -> DeviceFunctions:
    """Returns the functions of the same system with clipped cotangents; its `Params` hold those of the system
    as `base`, and the limit.
    """
    State, Control, Base = functions.State, functions.Control, functions.Params
    step, step_vjp, block, memory = functions.step, functions.step_vjp, functions.block, functions.memory
    loss, loss_vjp = functions.loss, functions.loss_vjp
    block_step = None if block is None else block.step
    block_step_vjp = None if block is None else block.step_vjp
    memory_step = None if memory is None else memory.step
    memory_step_vjp = None if memory is None else memory.step_vjp

    @wp.struct
    class Clipped:
        base: Base
        limit: dtype

    @wp.func
    def clip(lam: State, limit: dtype) -> State:
        norm = wp.length(lam)
        if norm > limit and norm < dtype(wp.inf):
            return (limit / norm) * lam
        return lam

    @wp.func
    def clipped_step(x: State, u: Control, p: Clipped) -> State:
        return step(x, u, p.base)

    @wp.func
    def clipped_step_vjp(x: State, u: Control, p: Clipped, adj_x_next: State):
        adj_x, adj_u = step_vjp(x, u, p.base, clip(adj_x_next, p.limit))
        return adj_x, adj_u

    @wp.func
    def step_in_lanes(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Clipped,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
    ):
        block_step(states, controls, p.base, t, nworld, world0, worlds)

    @wp.func
    def step_vjp_in_lanes(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Clipped,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
        adj: wp.array2d(dtype=State),
        adj_u: wp.array3d(dtype=Control),
    ):
        for f in range(adj.shape[0]):
            for r in range(worlds):
                adj[f, world0 + r] = clip(adj[f, world0 + r], p.limit)
        block_step_vjp(states, controls, p.base, t, nworld, world0, worlds, adj, adj_u)

    @wp.func
    def step_in_memory(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Clipped,
        t: int,
        world: int,
    ):
        memory_step(states, controls, p.base, t, world)

    @wp.func
    def step_vjp_in_memory(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Clipped,
        t: int,
        world: int,
        adj: wp.array(dtype=State),
        adj_u: wp.array(dtype=Control),
    ):
        for f in range(adj.shape[0]):
            adj[f] = clip(adj[f], p.limit)
        memory_step_vjp(states, controls, p.base, t, world, adj, adj_u)

    @wp.func
    def loss_of(x: State, p: Clipped) -> dtype:
        return loss(x, p.base)

    @wp.func
    def loss_vjp_of(x: State, p: Clipped, adj_loss: dtype) -> State:
        return loss_vjp(x, p.base, adj_loss)

    found = DeviceFunctions(Clipped, State, Control, clipped_step, clipped_step_vjp)
    if block is not None:
        found = found._replace(block=BlockFunctions(step_in_lanes, step_vjp_in_lanes))
    if memory is not None and is_large(State):
        found = found._replace(memory=MemoryFunctions(step_in_memory, step_vjp_in_memory))
    return found if loss is None else found._replace(loss=loss_of, loss_vjp=loss_vjp_of)

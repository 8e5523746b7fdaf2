"""Wraps a system: its physical parameters come as tensors, one set for all worlds, or one for each world.

With theta the parameters of a world and lam the cotangent of a state, as flow.py has it:

    x_{t+1}  = S(x_t, u_t, theta)
    dL/dtheta = sum_t (dS/dtheta)^T lam_{t+1}

theta enters only through the simulator, so its cotangents depend on the flow only through lam. The forms of a
step in lanes (CPU) and in memory (GPU) get the index of a world from the sweeps. The forms made here use this
index to find theta, and add to the sum in the backward pass. The sweeps need no change, and systems without
physical parameters run the same kernels as before.
"""

import functools
from typing import Any

import warp as wp

from ..system import BlockFunctions, DeviceFunctions, MemoryFunctions
from ..systems.elements import is_large
from .generated_vjp import is_generated, make_contraction, make_loss_vjp


def names_of(functions: DeviceFunctions) -> tuple[str, ...]:
    """Names of the numbers that a rollout of this system may be given."""
    if functions.parameters is not None:
        return functions.parameters.names
    dtype = functions.State._wp_scalar_type_
    return tuple(name for name, field in functions.Params.vars.items() if field.type is dtype)


def has_generated_vjp(functions: DeviceFunctions) -> bool:
    """Whether Warp generates the cotangents of these numbers."""
    return functions.parameters is None


@functools.cache
def with_values(functions: DeviceFunctions, dtype: Any) -> DeviceFunctions:
    """Returns the functions of the same system with its physical parameters by world.

    Its `Params` hold those of the system as `base`, those with the given numbers as `values` (1 or nworld,),
    and the sums of the cotangents of the numbers as `adj` (fields, nworld, count), which is empty if they are
    not wanted. It has no step by value, which would not know the world.
    """
    State, Control, Base = functions.State, functions.Control, functions.Params
    names = names_of(functions)
    count = len(names)
    Values = wp.types.vector(length=count, dtype=dtype)
    if functions.parameters is not None:
        Values = functions.parameters.Values
    step, step_vjp, contraction = functions.step, functions.step_vjp, make_contraction(functions)
    generated, generated_values = is_generated(step_vjp), has_generated_vjp(functions)
    values_vjp = None if functions.parameters is None else functions.parameters.step_vjp
    block, memory = (None, None) if generated else (functions.block, functions.memory)
    block_step = None if block is None else block.step
    block_step_vjp = None if block is None else block.step_vjp
    in_memory = memory is not None and is_large(State)
    by_value = not in_memory
    memory_step = None if memory is None else memory.step
    memory_step_vjp = None if memory is None else memory.step_vjp
    loss, loss_vjp = functions.loss, functions.loss_vjp

    @wp.struct
    class WithValues:
        base: Base
        values: wp.array(dtype=Base)
        adj: wp.array3d(dtype=dtype)

    collect = " ".join(
        f"*wp::address(adj, f, world, {i}) += adj_p.{name};"
        for i, name in enumerate(names if generated_values else ())
    )

    @wp.func_native(collect or ";")
    def add_fields(adj: wp.array3d(dtype=dtype), f: int, world: int, adj_p: Base): ...

    @wp.func
    def params_of(p: WithValues, world: int) -> Base:
        """The parameters of a world."""
        return p.values[world % p.values.shape[0]]

    @wp.func
    def add_values(adj: wp.array3d(dtype=dtype), f: int, world: int, found: Values):
        for i in range(wp.static(count)):
            adj[f, world, i] = adj[f, world, i] + found[i]

    @wp.func
    def step_in_lanes(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: WithValues,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
    ):
        if wp.static(block is not None):
            if p.values.shape[0] == 1:
                block_step(states, controls, params_of(p, 0), t, nworld, world0, worlds)
                return
        for r in range(worlds):
            world = world0 + r
            states[t + 1, world] = step(states[t, world], controls[t, world], params_of(p, world))

    # Warp emits a function that calls wp.grad behind those that call it: here only those do that kernels call

    @wp.func
    def step_vjp_in_lanes(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: WithValues,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
        adj: wp.array2d(dtype=State),
        adj_u: wp.array3d(dtype=Control),
    ):
        wanted = p.adj.shape[0] > 0
        together = False  # whether the system's own form in lanes pulls them all back
        if wp.static(block is not None):
            together = p.values.shape[0] == 1
        if wanted or not together:
            for r in range(worlds):
                world = world0 + r
                q = params_of(p, world)
                x = states[t, world]
                u = controls[t, world]
                for f in range(adj.shape[0]):
                    lam = adj[f, world]
                    if wp.static(generated or generated_values):
                        if wanted or wp.static(generated):
                            through_x, through_u, adj_p, adj_lam = wp.grad(contraction)(x, u, q, lam)
                            if wp.static(generated):
                                adj[f, world] = through_x
                                adj_u[f, t, world] = through_u
                            if wp.static(generated_values):
                                if wanted:
                                    add_fields(p.adj, f, world, adj_p)
                    if wp.static(not generated_values):
                        if wanted:
                            add_values(p.adj, f, world, values_vjp(x, u, q, lam))
                    if wp.static(not generated):
                        if not together:
                            own_x, own_u = step_vjp(x, u, q, lam)
                            adj[f, world] = own_x
                            adj_u[f, t, world] = own_u
        if wp.static(block is not None):
            if together:
                block_step_vjp(states, controls, params_of(p, 0), t, nworld, world0, worlds, adj, adj_u)

    @wp.func
    def step_in_memory(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: WithValues,
        t: int,
        world: int,
    ):
        if wp.static(in_memory):
            memory_step(states, controls, params_of(p, world), t, world)
        else:
            states[t + 1, world] = step(states[t, world], controls[t, world], params_of(p, world))

    @wp.func
    def step_vjp_in_memory(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: WithValues,
        t: int,
        world: int,
        adj: wp.array(dtype=State),
        adj_u: wp.array(dtype=Control),
    ):
        wanted = p.adj.shape[0] > 0
        q = params_of(p, world)
        if wanted or wp.static(by_value):
            x = states[t, world]
            u = controls[t, world]
            for f in range(adj.shape[0]):
                lam = adj[f]
                if wp.static(generated or generated_values):
                    if wanted or wp.static(generated):
                        through_x, through_u, adj_p, adj_lam = wp.grad(contraction)(x, u, q, lam)
                        if wp.static(generated):
                            adj[f] = through_x
                            adj_u[f] = through_u
                        if wp.static(generated_values):
                            if wanted:
                                add_fields(p.adj, f, world, adj_p)
                if wp.static(not generated_values):
                    if wanted:
                        add_values(p.adj, f, world, values_vjp(x, u, q, lam))
                if wp.static(by_value and not generated):
                    own_x, own_u = step_vjp(x, u, q, lam)
                    adj[f] = own_x
                    adj_u[f] = own_u
        if wp.static(in_memory):
            memory_step_vjp(states, controls, q, t, world, adj, adj_u)

    @wp.func
    def loss_of(x: State, p: WithValues) -> dtype:
        return loss(x, p.base)

    @wp.func
    def loss_vjp_of(x: State, p: WithValues, adj_loss: dtype) -> State:
        return loss_vjp(x, p.base, adj_loss)

    @wp.func
    def loss_vjp_in_memory(
        states: wp.array2d(dtype=State),
        p: WithValues,
        t: int,
        world: int,
        adj_loss: dtype,
        adj: wp.array(dtype=State),
    ):
        adj_x, adj_p = wp.grad(loss)(states[t, world], p.base)
        for f in range(adj.shape[0]):
            adj[f] = adj[f] + adj_loss * adj_x

    lanes = BlockFunctions(step_in_lanes, step_vjp_in_lanes)
    memory_forms = MemoryFunctions(step_in_memory, step_vjp_in_memory)
    if is_generated(loss_vjp):
        memory_forms = memory_forms._replace(loss_vjp=loss_vjp_in_memory)
    found = DeviceFunctions(WithValues, State, Control, None, block=lanes, memory=memory_forms)
    if loss is None:
        return found
    found = found._replace(loss=loss_of, loss_vjp=loss_vjp_of)
    return found._replace(loss_vjp=make_loss_vjp(found)) if is_generated(loss_vjp) else found

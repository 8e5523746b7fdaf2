"""The two forms in which sweeps take a step: a block of worlds a thread on a CPU, a world a thread on a GPU.

`system.BlockFunctions` and `system.MemoryFunctions` define these forms. If a system has no such form, it is
made here from the step by value. On a CPU whole vectors are fastest. A GPU takes small states whole too, and
large ones one component at a time (see systems/elements.py): inlined by value for both fields, the adjoint of
32 grid points in float64 spilled 10 KB a thread.

Warp emits a function that calls wp.grad after the functions that call it. So no function here calls a
generated adjoint by name; it calls wp.grad itself.
"""

import functools
from typing import Any

import warp as wp

from ..system import BlockFunctions, DeviceFunctions, MemoryFunctions
from ..systems.elements import is_large, rolled
from .generated_vjp import is_generated, make_contraction


def sweep_kernel(function: Any, **options: Any) -> wp.Kernel:
    """Returns a sweep as a kernel of a module of its own.

    Loops over poles, agents and grid points stay loops: unrolled, large adjoints take minutes to compile for
    a GPU.
    """
    return wp.kernel(
        function, module="unique", enable_backward=False, module_options={"max_unroll": 4}, **options
    )


@functools.cache
def block_form(functions: DeviceFunctions) -> BlockFunctions:
    """Returns a block form that takes the worlds of a block one after the other."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    step, step_vjp, contraction = functions.step, functions.step_vjp, make_contraction(functions)
    generated = is_generated(step_vjp)

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
        for world in range(world0, world0 + worlds):
            x = states[t, world]
            u = controls[t, world]
            for f in range(adj.shape[0]):
                if wp.static(generated):
                    adj_x, adj_c, adj_p, adj_lam = wp.grad(contraction)(x, u, p, adj[f, world])
                    adj[f, world] = adj_x
                    adj_u[f, t, world] = adj_c
                else:
                    through_x, through_u = step_vjp(x, u, p, adj[f, world])
                    adj[f, world] = through_x
                    adj_u[f, t, world] = through_u

    return BlockFunctions(step_block, step_vjp_block)


@functools.cache
def world_form(functions: DeviceFunctions, fields: int) -> MemoryFunctions:
    """Returns the form in memory for one world; it has a loss only if the system has one."""
    memory = functions.memory
    if memory is None:
        memory = MemoryFunctions(_make_step(functions), _make_step_vjp(functions, fields))
    if functions.loss is not None and memory.loss is None:
        memory = memory._replace(loss=_make_loss(functions))
    if functions.loss is not None and memory.loss_vjp is None:
        memory = memory._replace(loss_vjp=_make_loss_vjp(functions, fields))
    return memory


@functools.cache
def block_of_world(functions: DeviceFunctions) -> Any:
    """Returns the step in memory with the arguments of a block form, for blocks of one world."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    step = world_form(functions, 1).step

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
        step(states, controls, p, t, world0)

    return step_block


@functools.cache
def make_local(State: Any) -> tuple[Any, Any]:
    """Returns get(states, k, i) and put(states, k, i, value) for the components of a few states."""
    dtype = State._wp_scalar_type_

    @wp.func_native("return states.data[k].c[i];")
    def get(states: wp.array(dtype=State), k: int, i: int) -> dtype: ...

    @wp.func_native("states.data[k].c[i] = value;")
    def put(states: wp.array(dtype=State), k: int, i: int, value: dtype): ...

    return get, put


def _make_step(functions: DeviceFunctions) -> Any:
    Params, State, Control, step = functions.Params, functions.State, functions.Control, functions.step

    @wp.func
    def step_in_memory(
        states: wp.array2d(dtype=State), controls: wp.array2d(dtype=Control), p: Params, t: int, world: int
    ):
        states[t + 1, world] = step(states[t, world], controls[t, world], p)

    return step_in_memory


def _make_step_vjp(functions: DeviceFunctions, fields: int) -> Any:
    Params, State, Control = functions.Params, functions.State, functions.Control
    step_vjp, contraction = functions.step_vjp, make_contraction(functions)
    generated, large = is_generated(step_vjp), is_large(State)
    size, each_field = rolled(State._length_, State), rolled(fields, State)
    get, put = make_local(State)

    @wp.func
    def step_vjp_in_memory(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Params,
        t: int,
        world: int,
        adj: wp.array(dtype=State),
        adj_u: wp.array(dtype=Control),
    ):
        for f in range(each_field()):
            adj_x_next = State()
            if wp.static(large):
                for i in range(size()):
                    adj_x_next[i] = get(adj, f, i)
            else:
                adj_x_next = adj[f]
            adj_x = State()
            if wp.static(generated):
                through_x, through_u, adj_p, adj_lam = wp.grad(contraction)(
                    states[t, world], controls[t, world], p, adj_x_next
                )
                adj_x = through_x
                adj_u[f] = through_u
            else:
                own_x, own_u = step_vjp(states[t, world], controls[t, world], p, adj_x_next)
                adj_x = own_x
                adj_u[f] = own_u
            if wp.static(large):
                for i in range(size()):
                    put(adj, f, i, adj_x[i])
            else:
                adj[f] = adj_x

    return step_vjp_in_memory


def _make_loss(functions: DeviceFunctions) -> Any:
    Params, State, loss = functions.Params, functions.State, functions.loss

    @wp.func
    def loss_in_memory(states: wp.array2d(dtype=State), p: Params, t: int, world: int):
        return loss(states[t, world], p)

    return loss_in_memory


def _make_loss_vjp(functions: DeviceFunctions, fields: int) -> Any:
    Params, State, loss, loss_vjp = functions.Params, functions.State, functions.loss, functions.loss_vjp
    dtype, generated, large = State._wp_scalar_type_, is_generated(loss_vjp), is_large(State)
    size, each_field = rolled(State._length_, State), rolled(fields, State)
    get, put = make_local(State)

    @wp.func
    def loss_vjp_in_memory(
        states: wp.array2d(dtype=State),
        p: Params,
        t: int,
        world: int,
        adj_loss: dtype,
        adj: wp.array(dtype=State),
    ):
        adj_x = State()
        if wp.static(generated):
            through_x, adj_p = wp.grad(loss)(states[t, world], p)
            adj_x = adj_loss * through_x
        else:
            adj_x = loss_vjp(states[t, world], p, adj_loss)
        for f in range(each_field()):
            if wp.static(large):
                for i in range(size()):
                    put(adj, f, i, get(adj, f, i) + adj_x[i])
            else:
                adj[f] = adj[f] + adj_x

    return loss_vjp_in_memory

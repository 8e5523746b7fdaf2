"""The sweeps of large states on a GPU: the recursions of rollout.py with vectors in memory.

A thread still takes a world, but its vectors (the states, the cotangents of one or two fields, what the
step's adjoint returns) stay in memory and are read and written a component at a time. The step and its
adjoint are the system's functions in memory (`system.MemoryFunctions`), if it has them, else those by value;
the adjoint then stands in the code once, in a loop over the fields. Held in registers and inlined twice, the
same recursion spilled 10 KB a thread for 32 grid points in float64. Small states are better off in registers;
see `is_large`. A CPU, too, is better off with whole vectors, but computes the same here, and the tests use
that.
"""

import functools
from typing import Any

import warp as wp

from ..flow import NETWORK, PHYSICS
from ..system import DeviceFunctions
from ..systems.elements import is_large, make_elements, rolled, takes_memory
from .rollout import SystemKernels, make_loss, make_system_kernels


def make_cuda_system_kernels(functions: DeviceFunctions, dtype: Any) -> SystemKernels:
    """Returns the kernels of a system in the forms that a GPU takes."""
    streamed = is_large(functions.State) or takes_memory(functions)
    return (make_streamed_kernels if streamed else make_system_kernels)(functions, dtype)


@functools.cache
def make_streamed_kernels(functions: DeviceFunctions, dtype: Any) -> SystemKernels:
    """Returns the kernels of a system for large states."""
    one, two = (make_streamed_adjoint(functions, dtype, fields) for fields in (1, 2))
    if functions.memory is None:
        return make_system_kernels(functions, dtype)._replace(adjoint=(one, two))
    loss = make_loss(functions, dtype, in_memory=True)
    return SystemKernels(_make_streamed_simulate(functions), loss, (one, two), 1)


def _make_streamed_simulate(functions: DeviceFunctions) -> wp.Kernel:
    Params, State, Control = functions.Params, functions.State, functions.Control
    assert functions.memory is not None
    step = functions.memory.step
    begin = make_elements(State).begin

    def simulate(
        # In:
        x0: wp.array(dtype=State),  # (nworld,)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        horizon: int,
        first: int,  # world of the first thread
        # Out:
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
    ):
        world = first + wp.tid()
        begin(states, x0, world)
        for t in range(horizon):
            step(states, controls, p, t, world)

    return wp.kernel(simulate, module="unique", enable_backward=False, module_options={"max_unroll": 4})


@functools.cache
def _make_local(State: Any) -> tuple[Any, Any]:
    """Returns get(states, k, i) and put(states, k, i, value) for the components of a few states."""
    dtype = State._wp_scalar_type_

    @wp.func_native("return states.data[k].c[i];")
    def get(states: wp.array(dtype=State), k: int, i: int) -> dtype: ...

    @wp.func_native("states.data[k].c[i] = value;")
    def put(states: wp.array(dtype=State), k: int, i: int, value: dtype): ...

    return get, put


def _make_step_vjp(functions: DeviceFunctions, fields: int) -> Any:
    """Returns the adjoint of a step in memory, from that by value where the system has no other."""
    if functions.memory is not None:
        return functions.memory.step_vjp
    Params, State, Control = functions.Params, functions.State, functions.Control
    step_vjp = functions.step_vjp
    size, each_field = rolled(State._length_, State), rolled(fields, State)
    get, put = _make_local(State)

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
            for i in range(size()):
                adj_x_next[i] = get(adj, f, i)
            adj_x, adj_u_f = step_vjp(states[t, world], controls[t, world], p, adj_x_next)
            adj_u[f] = adj_u_f
            for i in range(size()):
                put(adj, f, i, adj_x[i])

    return step_vjp_in_memory


def _make_loss_vjp(functions: DeviceFunctions, dtype: Any, fields: int) -> Any:
    """Returns the adjoint of the loss in memory likewise; None without loss."""
    if functions.memory is not None and functions.memory.loss_vjp is not None:
        return functions.memory.loss_vjp
    if functions.loss_vjp is None:
        return None
    Params, State, loss_vjp = functions.Params, functions.State, functions.loss_vjp
    size, each_field = rolled(State._length_, State), rolled(fields, State)
    get, put = _make_local(State)

    @wp.func
    def loss_vjp_in_memory(
        states: wp.array2d(dtype=State),
        p: Params,
        t: int,
        world: int,
        adj_loss: dtype,
        adj: wp.array(dtype=State),
    ):
        adj_x = loss_vjp(states[t, world], p, adj_loss)
        for f in range(each_field()):
            for i in range(size()):
                put(adj, f, i, get(adj, f, i) + adj_x[i])

    return loss_vjp_in_memory


@functools.cache
def make_streamed_adjoint(functions: DeviceFunctions, dtype: Any, fields: int) -> wp.Kernel:
    """Returns the adjoint sweep for `fields` gradient fields, with the arguments of that of rollout.py."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    step_vjp, add_cost_vjp = _make_step_vjp(functions, fields), _make_loss_vjp(functions, dtype, fields)
    has_cost = add_cost_vjp is not None
    control_size = Control._length_

    # Vectors are written element by element: as values of their own, large ones would pass through registers.
    size, get, put, _ = make_elements(State)
    get_local, put_local = _make_local(State)
    each_field = rolled(fields, State)

    @wp.func_native("return wp::address(jac, t, world, c)->c[i];")
    def jacobian(jac: wp.array3d(dtype=State), t: int, world: int, c: int, i: int) -> dtype: ...

    @wp.func
    def leave(
        edges: int,
        decay: dtype,
        direct: dtype,
        through_physics: dtype,
        jac: wp.array3d(dtype=State),
        t: int,
        world: int,
        mu: Control,
        i: int,
    ) -> dtype:
        """Component i of the cotangent of x_t: a closed gate selects, it never multiplies (0 inf is NaN)."""
        lam = direct
        if edges & wp.static(PHYSICS):
            lam += decay * through_physics
        if edges & wp.static(NETWORK):
            for c in range(wp.static(control_size)):
                lam += mu[c] * jacobian(jac, t, world, c, i)
        return lam

    def adjoint(
        # In:
        states: wp.array2d(dtype=State),  # (steps + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (steps, nworld)
        jac: wp.array3d(
            dtype=State
        ),  # (steps, nworld, control_size) dN/dx; empty where no network edge is open
        p: Params,
        edges: wp.array2d(
            dtype=wp.int32
        ),  # (fields, horizon) edge masks, entry t for the edges that leave x_t
        decay: dtype,  # factor on what crosses a physics edge; a decay of 0 comes as a closed edge
        steps: int,  # steps of this sweep, the first of which is
        t0: int,  # this step of the rollout; see rollout.py
        carried: int,  # adj_x0 holds the cotangent of the last state, from a sweep over the steps behind it
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        adj_loss: wp.array(dtype=dtype),  # (members,), or empty
        adj_states: wp.array2d(dtype=State),  # (steps + 1, nworld), or empty
        adj_controls: wp.array2d(dtype=Control),  # (steps, nworld), or empty
        member_worlds: int,  # worlds that share a loss, see blocks.py
        first: int,
        # Out:
        mu: wp.array3d(dtype=Control),  # (fields, steps, nworld) cotangents of the controls
        adj_x0: wp.array2d(dtype=State),  # (fields, nworld) of the state of step t0
    ):
        world = first + wp.tid()
        has_loss = adj_loss.shape[0] > 0
        has_states = adj_states.shape[0] > 0
        has_controls = adj_controls.shape[0] > 0
        gl = dtype(0.0)
        if has_loss:
            gl = adj_loss[world / member_worlds]

        # cotangents of x_{t+1}, field by field
        lam = wp.zeros(shape=wp.static(fields), dtype=State)
        through_u = wp.zeros(shape=wp.static(fields), dtype=Control)
        for f in range(each_field()):
            for i in range(size()):
                value = dtype(0.0)
                if carried != 0:
                    value = get(adj_x0, f, world, i)
                elif has_states:
                    value = get(adj_states, steps, world, i)
                put_local(lam, f, i, value)
        if wp.static(has_cost):
            if has_loss and carried == 0 and w_final + w_running != dtype(0.0):
                add_cost_vjp(states, p, steps, world, gl * (w_final + w_running), lam)

        for s in range(steps):
            t = steps - 1 - s
            u = controls[t, world]

            direct_u = Control()
            if has_controls:
                direct_u = adj_controls[t, world]
            if has_loss and w_control != dtype(0.0):
                direct_u += (gl * w_control * dtype(2.0)) * u

            # lam becomes what crosses the physics edge, then all of the cotangents of x_t
            step_vjp(states, controls, p, t, world, lam, through_u)
            for f in range(each_field()):
                mu_t = direct_u + through_u[f]
                mu[f, t, world] = mu_t
                for i in range(size()):
                    direct_x = dtype(0.0)
                    if has_states:
                        direct_x = get(adj_states, t, world, i)
                    through_x = get_local(lam, f, i)
                    through_x = leave(edges[f, t0 + t], decay, direct_x, through_x, jac, t, world, mu_t, i)
                    put_local(lam, f, i, through_x)
            if wp.static(has_cost):
                if has_loss and t0 + t > 0 and w_running != dtype(0.0):
                    add_cost_vjp(states, p, t, world, gl * w_running, lam)

        for f in range(each_field()):
            for i in range(size()):
                put(adj_x0, f, world, i, get_local(lam, f, i))

    return wp.kernel(adjoint, module="unique", enable_backward=False, module_options={"max_unroll": 4})

"""The adjoint sweep of large states on a GPU: the recursion of rollout.py with vectors element by element.

A thread still takes a world, but its vectors (the states, the cotangents of one or two fields, what the
step's adjoint returns) stay in local memory and are read and written a component at a time, and the
step's adjoint stands in the code once, in a loop over the fields. Held in registers and inlined twice, the
same recursion spilled 10 KB a thread for 32 grid points in float64. Small states are better off in registers;
see `is_streamed`. A CPU, too, is better off with whole vectors, but computes the same here, and the tests
use that.
"""

import functools
from typing import Any

import warp as wp

from .elements import REGISTER_BYTES, make_elements, rolled
from .flow import NETWORK, PHYSICS
from .rollout import SystemKernels, make_system_kernels
from .system import DeviceFunctions


def is_streamed(functions: DeviceFunctions, itemsize: int) -> bool:
    """Whether a GPU takes this sweep for the states of a system."""
    return functions.State._length_ * itemsize > REGISTER_BYTES


def make_cuda_system_kernels(functions: DeviceFunctions, dtype: Any) -> SystemKernels:
    """Returns the kernels of a system in the forms that a GPU takes."""
    kernels = make_system_kernels(functions, dtype)
    if not is_streamed(functions, wp.types.type_size_in_bytes(dtype)):
        return kernels
    one, two = (make_streamed_adjoint(functions, dtype, fields) for fields in (1, 2))
    return kernels._replace(adjoint=(one, two))


@functools.cache
def make_streamed_adjoint(functions: DeviceFunctions, dtype: Any, fields: int) -> wp.Kernel:
    """Returns the adjoint sweep for `fields` gradient fields, with the arguments of that of rollout.py."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    step_vjp, cost_vjp = functions.step_vjp, functions.loss_vjp
    has_cost = cost_vjp is not None
    control_size = Control._length_

    # Vectors are written element by element: as values of their own, large ones would pass through registers.
    state_size = State._length_
    size, get, put = make_elements(State)
    Fields = wp.types.vector(length=fields * state_size, dtype=dtype)
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
        lam = Fields()
        cost_x = State()
        if wp.static(has_cost):
            if has_loss and w_final + w_running != dtype(0.0):
                cost_x = cost_vjp(states[steps, world], p, gl * (w_final + w_running))
        for i in range(size()):
            value = cost_x[i]
            if has_states:
                value += get(adj_states, steps, world, i)
            for f in range(wp.static(fields)):
                if carried != 0:
                    value = get(adj_x0, f, world, i)
                lam[f * wp.static(state_size) + i] = value

        for s in range(steps):
            t = steps - 1 - s
            u = controls[t, world]

            direct_u = Control()
            if has_controls:
                direct_u = adj_controls[t, world]
            if has_loss and w_control != dtype(0.0):
                direct_u += (gl * w_control * dtype(2.0)) * u
            direct_x = State()
            if has_states:
                for i in range(size()):
                    direct_x[i] = get(adj_states, t, world, i)
            if wp.static(has_cost):
                if has_loss and t0 + t > 0 and w_running != dtype(0.0):
                    cost_x = cost_vjp(states[t, world], p, gl * w_running)
                    for i in range(size()):
                        direct_x[i] += cost_x[i]

            for f in range(each_field()):
                adj_x_next = State()
                for i in range(size()):
                    adj_x_next[i] = lam[f * wp.static(state_size) + i]
                through_x, through_u = step_vjp(states[t, world], u, p, adj_x_next)
                mu_t = direct_u + through_u
                mu[f, t, world] = mu_t
                for i in range(size()):
                    lam[f * wp.static(state_size) + i] = leave(
                        edges[f, t0 + t], decay, direct_x[i], through_x[i], jac, t, world, mu_t, i
                    )

        for f in range(wp.static(fields)):
            for i in range(size()):
                put(adj_x0, f, world, i, lam[f * wp.static(state_size) + i])

    return wp.kernel(adjoint, module="unique", enable_backward=False, module_options={"max_unroll": 4})

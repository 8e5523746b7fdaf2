"""The adjoint sweep: the recursion of flow.py backwards in time, for one or two gradient fields at once.

    lam_T = dL/dx_T
    mu_t  = (dS/du)^T lam_{t+1} + dL/du_t
    lam_t = dL/dx_t + decay * [physics edge open] (dS/dx)^T lam_{t+1} + [network edge open] (dN/dx)^T mu_t

An estimator bounds what a step pulls back: with a limit c it takes, world by world,

    lam_{t+1} min(1, c / |lam_{t+1}|)

in place of lam_{t+1}, on the way to the state, the control and the parameters. What is not finite stays so,
because clipped it would look like a direction.

A rollout may be swept in segments, from the last to the first. The cotangent of a segment's last state then
comes from the sweep over the later steps.

`leave` computes the last line, in every sweep here. On a CPU a thread takes a block of worlds and keeps lam
in adj_x0 (`make_adjoint`). On a GPU a thread takes a world and keeps lam in its local memory
(`make_world_adjoint`).

(dN/dx)^T mu and the hidden cotangents of a policy depend only on mu. For one control they are mu times those
of a unit cotangent, which policy/network.py computes before the sweep, once for both gradient fields. For m
controls that would be m passes through the network. On a CPU the sweep then runs the policy's backward pass
itself, as soon as it knows mu: one pass a field.
"""

import functools
from typing import Any

import warp as wp

from ..flow import NETWORK, PHYSICS
from ..policy.functions import NetworkFunctions
from ..policy.layout import BLOCK
from ..system import BlockFunctions, DeviceFunctions
from ..systems.elements import is_large, make_elements, rolled
from .blocks import make_block_worlds
from .forms import make_local, sweep_kernel, world_form
from .generated_vjp import is_generated


@functools.cache
def make_leave(Value: Any, dtype: Any) -> Any:
    """Returns the device function that computes lam_t, or a component of it if `Value` is a scalar type."""

    # a closed gate selects, it never multiplies (0 inf is NaN); Warp's own branches copy vectors
    @wp.func_native(f"""
        auto lam = direct;
        if (edges & {PHYSICS}) lam = wp::add(lam, wp::mul(decay, through_physics));
        if (edges & {NETWORK}) lam = wp::add(lam, through_network);
        return lam;
    """)
    def leave(
        edges: int, decay: dtype, direct: Value, through_physics: Value, through_network: Value
    ) -> Value: ...

    return leave


@functools.cache
def _make_clipped(State: Any) -> Any:
    dtype = State._wp_scalar_type_

    @wp.func
    def clipped(lam: State, limit: dtype) -> State:
        norm = wp.length(lam)
        if norm > limit and norm < dtype(wp.inf):
            return (limit / norm) * lam
        return lam

    return clipped


@functools.cache
def _make_direct_control(Control: Any) -> Any:
    dtype = Control._wp_scalar_type_

    @wp.func
    def direct_control(
        controls: wp.array2d(dtype=Control),
        weight: dtype,  # of the squared control, doubled
        adj_controls: wp.array2d(dtype=Control),
        t: int,
        world: int,
    ) -> Control:
        """dL/du_t, the cotangent from outside the recursion."""
        direct = Control()
        if adj_controls.shape[0] > 0:
            direct = adj_controls[t, world]
        if weight != dtype(0.0):
            direct += weight * controls[t, world]
        return direct

    return direct_control


def _make_direct_state(functions: DeviceFunctions, dtype: Any) -> Any:
    Params, State, cost, cost_vjp = functions.Params, functions.State, functions.loss, functions.loss_vjp
    has_cost, generated = cost_vjp is not None, is_generated(cost_vjp)

    @wp.func
    def direct_state(
        states: wp.array2d(dtype=State),
        p: Params,
        weight: dtype,  # of the cost of x_t
        adj_states: wp.array2d(dtype=State),
        t: int,
        world: int,
    ) -> State:
        """dL/dx_t, the cotangent from outside the recursion."""
        direct = State()
        if adj_states.shape[0] > 0:
            direct = adj_states[t, world]
        if wp.static(has_cost):
            if weight != dtype(0.0):
                if wp.static(generated):
                    # called here, see forms.py
                    adj_x, adj_p = wp.grad(cost)(states[t, world], p)
                    direct += weight * adj_x
                else:
                    direct += cost_vjp(states[t, world], p, weight)
        return direct

    return direct_state


@functools.cache
def make_adjoint(
    functions: DeviceFunctions,
    dtype: Any,
    fields: int,
    form: BlockFunctions,
    size: int,
    policy: NetworkFunctions | None = None,
) -> wp.Kernel:
    """Returns the sweep for CPUs; a thread takes `size` worlds with this form of the system's step.

    `policy`: its backward pass runs in the sweep, and `size` is BLOCK.
    """
    Params, State, Control = functions.Params, functions.State, functions.Control
    state_size, control_size = State._length_, Control._length_
    step_vjp, block_worlds = form.step_vjp, make_block_worlds(size)
    direct_state = _make_direct_state(functions, dtype)
    direct_control = _make_direct_control(Control)
    leave, clipped = make_leave(State, dtype), _make_clipped(State)
    fused = policy is not None
    pull = policy.pull if policy else None

    def adjoint(
        # In:
        states: wp.array2d(dtype=State),  # (steps + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (steps, nworld)
        # (steps, nworld, control_size) dN/dx; empty where no network edge is open, or the sweep pulls itself
        jac: wp.array3d(dtype=State),
        p: Params,
        edges: wp.array2d(dtype=wp.int32),  # (fields, horizon) masks, entry t for the edges that leave x_t
        decay: dtype,  # factor on what crosses a physics edge; a decay of 0 comes as a closed edge
        clip: dtype,  # largest norm of the cotangent that a step pulls back, or infinity
        steps: int,  # steps of this sweep, the first of which is
        t0: int,  # this step of the rollout; trajectories, jac and mu begin there, edges at the first of all
        carried: int,  # adj_x0 holds the cotangent of the last state, from the sweep over the later steps
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        adj_loss: wp.array(dtype=dtype),  # (members,), or empty
        adj_states: wp.array2d(dtype=State),  # (steps + 1, nworld), or empty
        adj_controls: wp.array2d(dtype=Control),  # (steps, nworld), or empty
        member_worlds: int,  # worlds that share a loss and a policy, see blocks.py
        first: int,  # block of the first thread
        # In, of the policy whose backward pass runs here:
        params: wp.array2d(dtype=dtype),  # (members, layout.packed)
        table: wp.array(dtype=wp.int32),  # the layout's, flat
        operations: int,  # rows of the table
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),  # (blocks * hidden_steps * BLOCK, row)
        hidden_first: int,  # block with which hidden begins
        hidden_steps: int,  # steps that hidden has of a block
        # Out:
        mu: wp.array3d(dtype=Control),  # (fields, steps, nworld) cotangents of the controls
        adj_x0: wp.array2d(dtype=State),  # (fields, nworld) of the state of step t0; on the way those of x_t
        # Out, of the policy:
        flat_mu: wp.array(dtype=dtype),  # the same memory as mu
        d: wp.array(dtype=dtype),  # per block (fields, steps, BLOCK, row_adj) hidden cotangents
        pulled: wp.array2d(dtype=State),  # (fields, BLOCK) scratch of this launch
        flat_pulled: wp.array(dtype=dtype),  # the same memory as pulled
    ):
        index = wp.tid()
        block = first + index
        nworld = states.shape[1]
        member, world0, worlds = block_worlds(block, member_worlds)
        gl = dtype(0.0)
        if adj_loss.shape[0] > 0:
            gl = adj_loss[member]

        if carried == 0:
            for world in range(world0, world0 + worlds):
                lam = direct_state(states, p, gl * (w_final + w_running), adj_states, steps, world)
                for f in range(wp.static(fields)):
                    adj_x0[f, world] = lam

        for s in range(steps):
            t = steps - 1 - s
            w_state = gl * w_running
            if t0 + t == 0:
                w_state = dtype(0.0)

            # adj_x0 becomes what crosses the physics edge, then all of the cotangents of x_t
            if clip < dtype(wp.inf):
                for world in range(world0, world0 + worlds):
                    for f in range(wp.static(fields)):
                        adj_x0[f, world] = clipped(adj_x0[f, world], clip)
            step_vjp(states, controls, p, t, nworld, world0, worlds, adj_x0, mu)
            if adj_controls.shape[0] > 0 or gl * w_control != dtype(0.0):
                for world in range(world0, world0 + worlds):
                    direct_u = direct_control(controls, gl * w_control * dtype(2.0), adj_controls, t, world)
                    for f in range(wp.static(fields)):
                        mu[f, t, world] = direct_u + mu[f, t, world]

            if wp.static(fused):
                first_row = wp.int64(((block - hidden_first) * hidden_steps + t) * wp.static(BLOCK))
                for f in range(wp.static(fields)):
                    at = wp.int64(((index * wp.static(fields) + f) * steps + t) * wp.static(BLOCK))
                    point = wp.int64(f * mu.shape[1] + t) * wp.int64(nworld) + wp.int64(world0)
                    pull(
                        params[member],
                        table,
                        operations,
                        row,
                        row_adj,
                        hidden,
                        first_row * wp.int64(row),
                        wp.static(state_size),
                        worlds,
                        edges[f, t0 + t] & wp.static(NETWORK),
                        flat_mu,
                        point * wp.int64(wp.static(control_size)),
                        d,
                        at * wp.int64(row_adj),
                        flat_pulled,
                        wp.int64(f * wp.static(BLOCK * state_size)),
                        wp.static(state_size),
                    )

            for r in range(worlds):
                world = world0 + r
                direct_x = direct_state(states, p, w_state, adj_states, t, world)
                for f in range(wp.static(fields)):
                    edge = edges[f, t0 + t]
                    if wp.static(fused):
                        adj_x0[f, world] = leave(edge, decay, direct_x, adj_x0[f, world], pulled[f, r])
                    else:
                        through_network = State()
                        if edge & wp.static(NETWORK):
                            for c in range(wp.static(control_size)):
                                through_network += mu[f, t, world][c] * jac[t, world, c]
                        adj_x0[f, world] = leave(edge, decay, direct_x, adj_x0[f, world], through_network)

    if fused:
        adjoint.__name__ = "fused_adjoint"
    return sweep_kernel(adjoint)


@functools.cache
def make_world_adjoint(functions: DeviceFunctions, dtype: Any, fields: int) -> wp.Kernel:
    """Returns the sweep for GPUs, where a thread takes one world. Its arguments have the same names."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    form = world_form(functions, fields)
    step_vjp, add_cost_vjp = form.step_vjp, form.loss_vjp
    has_cost, large = add_cost_vjp is not None, is_large(State)
    leave, clipped = make_leave(dtype if large else State, dtype), _make_clipped(State)
    control_size = Control._length_
    direct_control = _make_direct_control(Control)

    # Vectors are written element by element: as values of their own, large ones would pass through registers.
    size, get, put, _ = make_elements(State)
    get_local, put_local = make_local(State)
    each_field = rolled(fields, State)

    @wp.func_native("return wp::address(jac, t, world, c)->c[i];")
    def jacobian(jac: wp.array3d(dtype=State), t: int, world: int, c: int, i: int) -> dtype: ...

    def adjoint(
        # In:
        states: wp.array2d(dtype=State),  # (steps + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (steps, nworld)
        jac: wp.array3d(dtype=State),  # (steps, nworld, control_size) dN/dx; empty where no edge is open
        p: Params,
        edges: wp.array2d(dtype=wp.int32),  # (fields, horizon)
        decay: dtype,
        clip: dtype,
        steps: int,
        t0: int,
        carried: int,
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        adj_loss: wp.array(dtype=dtype),  # (members,), or empty
        adj_states: wp.array2d(dtype=State),  # (steps + 1, nworld), or empty
        adj_controls: wp.array2d(dtype=Control),  # (steps, nworld), or empty
        member_worlds: int,
        first: int,
        # Out:
        mu: wp.array3d(dtype=Control),  # (fields, steps, nworld)
        adj_x0: wp.array2d(dtype=State),  # (fields, nworld)
    ):
        world = first + wp.tid()
        has_loss = adj_loss.shape[0] > 0
        has_states = adj_states.shape[0] > 0
        gl = dtype(0.0)
        if has_loss:
            gl = adj_loss[world / member_worlds]

        # cotangents of x_{t+1}, field by field
        lam = wp.zeros(shape=wp.static(fields), dtype=State)
        through_u = wp.zeros(shape=wp.static(fields), dtype=Control)
        for f in range(each_field()):
            if wp.static(large):
                for i in range(size()):
                    value = dtype(0.0)
                    if carried != 0:
                        value = get(adj_x0, f, world, i)
                    elif has_states:
                        value = get(adj_states, steps, world, i)
                    put_local(lam, f, i, value)
            else:
                if carried != 0:
                    lam[f] = adj_x0[f, world]
                elif has_states:
                    lam[f] = adj_states[steps, world]
        if wp.static(has_cost):
            if has_loss and carried == 0 and w_final + w_running != dtype(0.0):
                add_cost_vjp(states, p, steps, world, gl * (w_final + w_running), lam)

        for s in range(steps):
            t = steps - 1 - s
            direct_u = direct_control(controls, gl * w_control * dtype(2.0), adj_controls, t, world)

            # lam becomes what crosses the physics edge, then all of the cotangents of x_t
            if clip < dtype(wp.inf):
                for f in range(each_field()):
                    if wp.static(large):
                        square = dtype(0.0)
                        for i in range(size()):
                            square += get_local(lam, f, i) * get_local(lam, f, i)
                        norm = wp.sqrt(square)
                        if norm > clip and norm < dtype(wp.inf):
                            for i in range(size()):
                                put_local(lam, f, i, (clip / norm) * get_local(lam, f, i))
                    else:
                        lam[f] = clipped(lam[f], clip)
            step_vjp(states, controls, p, t, world, lam, through_u)
            for f in range(each_field()):
                edge = edges[f, t0 + t]
                mu_t = direct_u + through_u[f]
                mu[f, t, world] = mu_t
                if wp.static(large):
                    for i in range(size()):
                        direct = dtype(0.0)
                        if has_states:
                            direct = get(adj_states, t, world, i)
                        pulled = dtype(0.0)
                        if edge & wp.static(NETWORK):
                            for c in range(wp.static(control_size)):
                                pulled += mu_t[c] * jacobian(jac, t, world, c, i)
                        put_local(lam, f, i, leave(edge, decay, direct, get_local(lam, f, i), pulled))
                else:
                    direct_x = State()
                    if has_states:
                        direct_x = adj_states[t, world]
                    through_network = State()
                    if edge & wp.static(NETWORK):
                        for c in range(wp.static(control_size)):
                            through_network += mu_t[c] * jac[t, world, c]
                    lam[f] = leave(edge, decay, direct_x, lam[f], through_network)
            if wp.static(has_cost):
                if has_loss and t0 + t > 0 and w_running != dtype(0.0):
                    add_cost_vjp(states, p, t, world, gl * w_running, lam)

        for f in range(each_field()):
            if wp.static(large):
                for i in range(size()):
                    put(adj_x0, f, world, i, get_local(lam, f, i))
            else:
                adj_x0[f, world] = lam[f]

    return sweep_kernel(adjoint)

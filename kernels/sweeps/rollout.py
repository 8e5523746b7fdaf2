"""Sweeps of a whole rollout without a policy: one launch for all time steps, generic in the system.

Factories that turn a system's device functions into kernels. All trajectories have time first: states
(horizon + 1, nworld), controls (horizon, nworld), elements vectors of the system's sizes.

    simulate    x_{t+1} = S(x_t, u_t) for given controls
    loss        per-world loss of a trajectory
    adjoint     the recursion of flow.py backwards, for one or two gradient fields at once; over all
                steps, or over some: the cotangent of their last state comes from the steps behind

The loss of a rollout, with c the system's cost of a state; means and the like are in the weights:

    sum_world [ w_final c(x_T) + w_running sum_{t=1..T} c(x_t) + w_control sum_{t=0..T-1} |u_t|^2 ]
"""

import functools
from typing import Any, NamedTuple

import warp as wp

from ..flow import NETWORK, PHYSICS
from ..policy.layout import BLOCK
from ..system import BlockFunctions, DeviceFunctions
from .blocks import make_block_worlds
from .generated_vjp import is_generated

# Loops over poles, agents and grid points stay loops: unrolled, large adjoints take minutes to compile for a
# GPU.
_OPTIONS = {"max_unroll": 4}


class SystemKernels(NamedTuple):
    """Kernels of one system for one dtype."""

    simulate: wp.Kernel
    loss: wp.Kernel
    adjoint: tuple[wp.Kernel, wp.Kernel]
    """For one and for two gradient fields."""
    worlds: int
    """Worlds of one thread of `simulate` and `adjoint`: BLOCK where the system's block form is used, those
    of its wide form where that is."""


def sweep_kernel(function: Any) -> wp.Kernel:
    """Returns a sweep as a kernel of a module of its own."""
    return wp.kernel(function, module="unique", enable_backward=False, module_options=dict(_OPTIONS))


@functools.cache
def make_system_kernels(functions: DeviceFunctions, dtype: Any, block: bool = False) -> SystemKernels:
    """Returns the kernels of a system that need no policy.

    `block`: by the system's block form, if it has one; for CPUs only.
    """
    if block and functions.block is not None:
        return _make_block_kernels(functions, dtype, functions.block, BLOCK)
    adjoint = (_make_adjoint(functions, dtype, 1), _make_adjoint(functions, dtype, 2))
    return SystemKernels(_make_simulate(functions), make_loss(functions, dtype), adjoint, 1)


@functools.cache
def make_wide_kernels(functions: DeviceFunctions, dtype: Any) -> SystemKernels | None:
    """Returns the same kernels by the system's wide block form, for CPUs; None where it has none."""
    if functions.wide is None:
        return None
    return _make_block_kernels(functions, dtype, functions.wide, functions.wide_worlds)


def _make_block_kernels(
    functions: DeviceFunctions, dtype: Any, form: BlockFunctions, worlds: int
) -> SystemKernels:
    one, two = (_make_block_adjoint(functions, dtype, fields, form, worlds) for fields in (1, 2))
    simulate = _make_block_simulate(functions, form, worlds)
    return SystemKernels(simulate, make_loss(functions, dtype), (one, two), worlds)


def _make_simulate(functions: DeviceFunctions) -> wp.Kernel:
    Params, State, Control = functions.Params, functions.State, functions.Control
    step = functions.step

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
        x = x0[world]
        states[0, world] = x
        for t in range(horizon):
            x = step(x, controls[t, world], p)
            states[t + 1, world] = x

    return sweep_kernel(simulate)


def _make_block_simulate(functions: DeviceFunctions, form: BlockFunctions, size: int) -> wp.Kernel:
    Params, State, Control = functions.Params, functions.State, functions.Control
    step = form.step

    def simulate(
        # In:
        x0: wp.array(dtype=State),  # (nworld,)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        horizon: int,
        first: int,  # block of the first thread
        # Out:
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
    ):
        nworld = x0.shape[0]
        world0 = wp.static(size) * (first + wp.tid())
        worlds = wp.min(wp.static(size), nworld - world0)
        for r in range(worlds):
            states[0, world0 + r] = x0[world0 + r]
        for t in range(horizon):
            step(states, controls, p, t, nworld, world0, worlds)

    return sweep_kernel(simulate)


@functools.cache
def make_cost(functions: DeviceFunctions, dtype: Any, in_memory: bool) -> Any:
    """Returns cost(states, p, t, world), None without loss; `in_memory`: by the system's form in memory."""
    if in_memory and functions.memory is not None and functions.memory.loss is not None:
        return functions.memory.loss
    if functions.loss is None:
        return None
    Params, State, loss = functions.Params, functions.State, functions.loss

    @wp.func
    def cost(states: wp.array2d(dtype=State), p: Params, t: int, world: int) -> dtype:
        return loss(states[t, world], p)

    return cost


@functools.cache
def make_world_loss(functions: DeviceFunctions, dtype: Any, in_memory: bool) -> Any:
    """Returns the device function that gives one world's share of the loss."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    cost = make_cost(functions, dtype, in_memory)
    has_cost = cost is not None

    @wp.func
    def world_loss(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Params,
        horizon: int,
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        world: int,
    ) -> dtype:
        total = dtype(0.0)
        if wp.static(has_cost):
            if w_running != dtype(0.0):
                for t in range(horizon):
                    total += w_running * cost(states, p, t + 1, world)
            if w_final != dtype(0.0):
                total += w_final * cost(states, p, horizon, world)
        if w_control != dtype(0.0):
            effort = dtype(0.0)
            for t in range(horizon):
                effort += wp.dot(controls[t, world], controls[t, world])
            total += w_control * effort
        return total

    return world_loss


@functools.cache
def make_loss(functions: DeviceFunctions, dtype: Any, in_memory: bool = False) -> wp.Kernel:
    """Returns the kernel of the loss of a trajectory; `in_memory`: by the system's form in memory."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    world_loss_of = make_world_loss(functions, dtype, in_memory)

    def loss(
        # In:
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        horizon: int,
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        first: int,
        # Out:
        world_loss: wp.array(dtype=dtype),  # (nworld,)
    ):
        world = first + wp.tid()
        world_loss[world] = world_loss_of(states, controls, p, horizon, w_final, w_running, w_control, world)

    return sweep_kernel(loss)


@functools.cache
def make_edges(functions: DeviceFunctions, dtype: Any) -> tuple[Any, Any, Any]:
    """Returns the device functions of one step of the recursion around the system: what reaches x_t and u_t
    directly, and what leaves x_t.
    """
    Params, State, Control = functions.Params, functions.State, functions.Control
    cost, cost_vjp = functions.loss, functions.loss_vjp
    has_cost, generated = cost_vjp is not None, is_generated(cost_vjp)
    control_size = Control._length_

    @wp.func
    def leave(
        edges: int,
        decay: dtype,
        direct: State,
        through_physics: State,
        jac: wp.array3d(dtype=State),
        t: int,
        world: int,
        mu: Control,
    ) -> State:
        """Cotangent of x_t: a closed gate selects, it never multiplies (0 inf is NaN)."""
        lam = direct
        if edges & wp.static(PHYSICS):
            lam += decay * through_physics
        if edges & wp.static(NETWORK):
            for c in range(wp.static(control_size)):
                lam += mu[c] * jac[t, world, c]
        return lam

    @wp.func
    def direct_state(
        states: wp.array2d(dtype=State),
        p: Params,
        weight: dtype,  # of the cost of x_t
        adj_states: wp.array2d(dtype=State),
        t: int,
        world: int,
    ) -> State:
        """dL/dx_t: what arrives from outside the recursion."""
        direct = State()
        if adj_states.shape[0] > 0:
            direct = adj_states[t, world]
        if wp.static(has_cost):
            if weight != dtype(0.0):
                if wp.static(generated):
                    # Warp emits a function that calls wp.grad behind those that call it
                    adj_x, adj_p = wp.grad(cost)(states[t, world], p)
                    direct += weight * adj_x
                else:
                    direct += cost_vjp(states[t, world], p, weight)
        return direct

    @wp.func
    def direct_control(
        controls: wp.array2d(dtype=Control),
        weight: dtype,  # of the squared control, doubled
        adj_controls: wp.array2d(dtype=Control),
        t: int,
        world: int,
    ) -> Control:
        """dL/du_t likewise."""
        direct = Control()
        if adj_controls.shape[0] > 0:
            direct = adj_controls[t, world]
        if weight != dtype(0.0):
            direct += weight * controls[t, world]
        return direct

    return direct_state, direct_control, leave


def _make_adjoint(functions: DeviceFunctions, dtype: Any, fields: int) -> wp.Kernel:
    Params, State, Control = functions.Params, functions.State, functions.Control
    step_vjp = functions.step_vjp
    direct_state, direct_control, leave = make_edges(functions, dtype)

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
        t0: int,  # this step of the rollout; trajectories, jac and mu begin there, edges at the first of all
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
        gl = dtype(0.0)
        if adj_loss.shape[0] > 0:
            gl = adj_loss[world / member_worlds]

        lam = State()
        lam_check = State()
        if carried != 0:
            lam = adj_x0[0, world]
            if wp.static(fields == 2):
                lam_check = adj_x0[1, world]
        else:
            lam = direct_state(states, p, gl * (w_final + w_running), adj_states, steps, world)
            lam_check = lam

        for s in range(steps):
            t = steps - 1 - s
            x = states[t, world]
            u = controls[t, world]
            w_state = gl * w_running
            if t0 + t == 0:
                w_state = dtype(0.0)
            direct_x = direct_state(states, p, w_state, adj_states, t, world)
            direct_u = direct_control(controls, gl * w_control * dtype(2.0), adj_controls, t, world)

            through_x, through_u = step_vjp(x, u, p, lam)
            mu_t = direct_u + through_u
            mu[0, t, world] = mu_t
            lam = leave(edges[0, t0 + t], decay, direct_x, through_x, jac, t, world, mu_t)
            if wp.static(fields == 2):
                check_x, check_u = step_vjp(x, u, p, lam_check)
                mu_check = direct_u + check_u
                mu[1, t, world] = mu_check
                lam_check = leave(edges[1, t0 + t], decay, direct_x, check_x, jac, t, world, mu_check)

        adj_x0[0, world] = lam
        if wp.static(fields == 2):
            adj_x0[1, world] = lam_check

    return sweep_kernel(adjoint)


def _make_block_adjoint(
    functions: DeviceFunctions, dtype: Any, fields: int, form: BlockFunctions, size: int
) -> wp.Kernel:
    """Returns the adjoint sweep by a block form of a system; the cotangents of x_t lie in adj_x0."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    step_vjp = form.step_vjp
    block_worlds = make_block_worlds(size)
    direct_state, direct_control, leave = make_edges(functions, dtype)

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
        t0: int,  # this step of the rollout; trajectories, jac and mu begin there, edges at the first of all
        carried: int,  # adj_x0 holds the cotangent of the last state, from a sweep over the steps behind it
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        adj_loss: wp.array(dtype=dtype),  # (members,), or empty
        adj_states: wp.array2d(dtype=State),  # (steps + 1, nworld), or empty
        adj_controls: wp.array2d(dtype=Control),  # (steps, nworld), or empty
        member_worlds: int,  # worlds that share a loss, see blocks.py
        first: int,  # block of the first thread
        # Out:
        mu: wp.array3d(dtype=Control),  # (fields, steps, nworld) cotangents of the controls
        adj_x0: wp.array2d(dtype=State),  # (fields, nworld) of the state of step t0
    ):
        nworld = states.shape[1]
        member, world0, worlds = block_worlds(first + wp.tid(), member_worlds)
        gl = dtype(0.0)
        if adj_loss.shape[0] > 0:
            gl = adj_loss[member]

        if carried == 0:
            for r in range(worlds):
                lam = direct_state(states, p, gl * (w_final + w_running), adj_states, steps, world0 + r)
                for f in range(wp.static(fields)):
                    adj_x0[f, world0 + r] = lam

        for s in range(steps):
            t = steps - 1 - s
            w_state = gl * w_running
            if t0 + t == 0:
                w_state = dtype(0.0)
            step_vjp(states, controls, p, t, nworld, world0, worlds, adj_x0, mu)
            for r in range(worlds):
                world = world0 + r
                direct_x = direct_state(states, p, w_state, adj_states, t, world)
                direct_u = direct_control(controls, gl * w_control * dtype(2.0), adj_controls, t, world)
                for f in range(wp.static(fields)):
                    mu_t = direct_u + mu[f, t, world]
                    mu[f, t, world] = mu_t
                    adj_x0[f, world] = leave(
                        edges[f, t0 + t], decay, direct_x, adj_x0[f, world], jac, t, world, mu_t
                    )

    return sweep_kernel(adjoint)

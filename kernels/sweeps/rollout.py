"""Sweeps of a whole rollout without a policy, over all time steps and for any system.

The factories here turn a system's device functions into kernels. All trajectories have time first: states
(horizon + 1, nworld), controls (horizon, nworld). Elements are vectors of the system's sizes.

    simulate    x_{t+1} = S(x_t, u_t) for given controls
    loss        per-world loss of a trajectory
    adjoint     the recursion of flow.py backwards, see adjoint.py

The loss of a rollout, with c the system's cost of a state. The weights include the divisions of means:

    sum_world [ w_final c(x_T) + w_running sum_{t=1..T} c(x_t) + w_control sum_{t=0..T-1} |u_t|^2 ]
"""

import functools
from typing import Any, NamedTuple

import warp as wp

from ..policy.layout import BLOCK
from ..system import BlockFunctions, DeviceFunctions
from ..systems.elements import make_elements, takes_memory
from .adjoint import make_adjoint, make_world_adjoint
from .forms import block_form, block_of_world, sweep_kernel, world_form


class SystemKernels(NamedTuple):
    """Kernels of one system for one dtype."""

    simulate: wp.Kernel
    loss: wp.Kernel
    adjoint: tuple[wp.Kernel, wp.Kernel]
    """For one and for two gradient fields."""
    worlds: int
    """Worlds of one thread of `simulate` and `adjoint`."""


def make_kernels(functions: DeviceFunctions, dtype: Any, on_cpu: bool) -> SystemKernels:
    """Returns the kernels of a system that need no policy."""
    if not on_cpu:
        # only large states are taken a component at a time
        return make_gpu_kernels(
            functions if takes_memory(functions) else functions._replace(memory=None), dtype
        )
    if functions.block is None:
        return _make_cpu_kernels(functions, dtype, block_form(functions), 1)
    return _make_cpu_kernels(functions, dtype, functions.block, BLOCK)


def make_wide_kernels(functions: DeviceFunctions, dtype: Any) -> SystemKernels | None:
    """Returns the same kernels with the system's wide block form, for CPUs; None if it has none."""
    if functions.wide is None:
        return None
    return _make_cpu_kernels(functions, dtype, functions.wide, functions.wide_worlds)


@functools.cache
def _make_cpu_kernels(
    functions: DeviceFunctions, dtype: Any, form: BlockFunctions, worlds: int
) -> SystemKernels:
    one, two = (make_adjoint(functions, dtype, fields, form, worlds) for fields in (1, 2))
    simulate = _make_simulate(functions, form.step, worlds)
    return SystemKernels(simulate, make_loss(functions, dtype), (one, two), worlds)


@functools.cache
def make_gpu_kernels(functions: DeviceFunctions, dtype: Any) -> SystemKernels:
    """Returns the same kernels for GPUs, one world a thread, by the form in memory if the system has it."""
    one, two = (make_world_adjoint(functions, dtype, fields) for fields in (1, 2))
    simulate = _make_simulate(functions, block_of_world(functions), 1)
    return SystemKernels(simulate, make_loss(functions, dtype, in_memory=True), (one, two), 1)


def _make_simulate(functions: DeviceFunctions, step: Any, size: int) -> wp.Kernel:
    Params, State, Control = functions.Params, functions.State, functions.Control
    begin = make_elements(State).begin

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
            begin(states, x0, world0 + r)
        for t in range(horizon):
            step(states, controls, p, t, nworld, world0, worlds)

    return sweep_kernel(simulate)


def make_cost(functions: DeviceFunctions, in_memory: bool) -> Any:
    """Returns cost(states, p, t, world), None without a loss. `in_memory` selects the form in memory."""
    return world_form(functions if in_memory else functions._replace(memory=None), 1).loss


@functools.cache
def make_world_loss(functions: DeviceFunctions, dtype: Any, in_memory: bool) -> Any:
    """Returns the device function that gives one world's share of the loss."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    cost = make_cost(functions, in_memory)
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
    """Returns the kernel of the loss of a trajectory. `in_memory` selects the form in memory."""
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

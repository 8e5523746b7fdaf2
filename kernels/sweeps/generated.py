"""A system's forward functions with Warp's generated adjoints, to compare the hand-written ones with.

No rollout runs these. Warp 1.19 differentiates a loop correctly only if it is unrolled, or carries nothing
but arrays from turn to turn. That is why `max_unroll` is high and the sweep over time reads the trajectory
back from memory.
"""

import functools
from typing import NamedTuple

import warp as wp

from ..system import DeviceFunctions

MAX_UNROLL = 64
"""Longest loop that is unrolled. Longer ones stay loops, with adjoints that may be wrong."""


class GeneratedKernels(NamedTuple):
    """Kernels with generated adjoints for one system and dtype."""

    step: wp.Kernel
    simulate: wp.Kernel


@functools.cache
def make_generated_kernels(functions: DeviceFunctions) -> GeneratedKernels:
    """Returns the kernels of one step and of all steps."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    step = functions.step
    options = {"max_unroll": MAX_UNROLL}

    @wp.kernel(module="unique", enable_backward=True, module_options=dict(options))
    def generated_step(
        # In:
        x: wp.array(dtype=State),  # (nworld,)
        u: wp.array(dtype=Control),  # (nworld,)
        p: Params,
        # Out:
        x_next: wp.array(dtype=State),  # (nworld,)
    ):
        world = wp.tid()
        x_next[world] = step(x[world], u[world], p)

    @wp.kernel(module="unique", enable_backward=True, module_options=dict(options))
    def generated_simulate(
        # In:
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        horizon: int,
        # In, out:
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld), the first row given
    ):
        world = wp.tid()
        for t in range(horizon):
            states[t + 1, world] = step(states[t, world], controls[t, world], p)

    return GeneratedKernels(generated_step, generated_simulate)

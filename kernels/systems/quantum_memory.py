"""The particle in a box in memory: one world a GPU thread, for `DeviceFunctions.memory` of quantum.py, which
has the equations of the step.

The recurrence is that of quantum_block.py, for one world instead of a block in vector lanes:

    e_j = r_j + g_{j-1}      w_j = 1 / (1 + e_j)      g_j = e_j w_j      r_j = c x_j dx^2 - i kappa
    v_j = w_j (v_{j-1} - i kappa rhs_j)               z_j = v_j + w_j z_{j+1}

from g = 1 and v = 0 at the wall. A thread by itself waits for the division of every row. The elimination
therefore runs from both walls, two chains of half the length that do not wait for each other, and meets in
the middle row m, whose neighbours are z = v + w z_m:

    z_m = (v_{m-1} + v_{m+1} - i kappa rhs_m) / (r_m + g_{m-1} + g_{m+1})

Loops over rows stay loops, so that registers and compile time do not grow with the points. States and
cotangents are read and written in place, one component at a time. w and v are scratch of the thread in local
memory, where neighbouring threads have neighbouring addresses. In a trajectory these addresses are a state
apart: the 32 threads of a warp that read a component touch 32 cache lines, which hold the next components
too. Neither the elimination nor the substitution reads or writes anything in a trajectory twice.
"""

import functools
from typing import Any

import warp as wp

from ..native_text import fill, sections
from ..system import MemoryFunctions

_TEXT = sections(__file__)


@functools.cache
def make_memory_functions(points: int, dtype: Any, Params: Any, State: Any, Control: Any) -> MemoryFunctions:
    """Returns the functions in memory for `points` grid points and `dtype`."""
    words = {"POINTS": points}

    @wp.func_native(fill(_TEXT["prelude"] + _TEXT["step"], words, dtype))
    def step_in_memory(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        world: int,
    ): ...

    @wp.func_native(fill(_TEXT["prelude"] + _TEXT["step_vjp"], words, dtype))
    def step_vjp_in_memory(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        world: int,
        adj: wp.array(dtype=State),  # (fields,)
        adj_u: wp.array(dtype=Control),  # (fields,)
    ): ...

    @wp.func_native(fill(_TEXT["overlap"] + _TEXT["loss"], words, dtype))
    def loss_in_memory(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        p: Params,
        t: int,
        world: int,
    ) -> dtype: ...

    @wp.func_native(fill(_TEXT["overlap"] + _TEXT["loss_vjp"], words, dtype))
    def loss_vjp_in_memory(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        p: Params,
        t: int,
        world: int,
        adj_loss: dtype,
        adj: wp.array(dtype=State),  # (fields,)
    ): ...

    return MemoryFunctions(step_in_memory, step_vjp_in_memory, loss_in_memory, loss_vjp_in_memory)

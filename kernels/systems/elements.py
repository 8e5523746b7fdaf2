"""Access to state vectors one component at a time, for code that is compiled for a GPU.

If the CUDA compiler knows the bound of a loop over poles, agents or grid points, it unrolls the loop
completely and keeps its vectors in registers. What does not fit is spilled: 10 KB a thread for the adjoint of
32 grid points in float64. With a bound that the compiler cannot know, the loop stays a loop, and vectors stay
in local memory, laid out so that the accesses of a warp coalesce. A vector that is assigned as a whole or
passed to a function goes through registers even then, because Warp passes vectors by value. Hence `get` and
`put`.

On a CPU none of this matters: the bound is an ordinary constant.
"""

import functools
from typing import Any, NamedTuple

import warp as wp

REGISTER_BYTES = 128
"""Vectors up to this size are left to the compiler: an adjoint has some six of them alive, and a thread has
1020 bytes of registers."""


def is_large(State: Any) -> bool:
    """Whether a GPU keeps vectors of this type in memory."""
    itemsize = 8 if State._wp_scalar_type_ == wp.float64 else 4
    return State._length_ * itemsize > REGISTER_BYTES


def takes_memory(functions: Any) -> bool:
    """Whether a GPU runs the form in memory of a system's step: for large states, and if there is no other
    form.
    """
    return functions.memory is not None and (functions.step is None or is_large(functions.State))


@functools.cache
def rolled(bound: int, State: Any) -> Any:
    """Returns a device function without arguments that returns `bound`, for loops over parts of a `State`."""
    hide = 'asm volatile("" : "+r"(bound));' if is_large(State) else ""

    @wp.func_native(f"""
        int bound = {bound};
    #if defined(__CUDA_ARCH__)
        {hide}
    #endif
        return bound;
    """)
    def rolled_bound() -> int: ...

    return rolled_bound


class Elements(NamedTuple):
    """Access to the components of `State` vectors in trajectories, whose last axis is the world."""

    size: Any
    """size() -> int: components of a vector, as the bound of a loop."""
    get: Any
    """get(states, t, world, i): component i of states[t, world]."""
    put: Any
    """put(states, t, world, i, value) sets it."""
    begin: Any
    """begin(states, x0, world) copies x0[world] to states[0, world]."""


@functools.cache
def make_elements(State: Any) -> Elements:
    """Returns the device functions for a vector type."""
    dtype = State._wp_scalar_type_

    @wp.func_native("return wp::address(states, t, world)->c[i];")
    def get(states: wp.array2d(dtype=State), t: int, world: int, i: int) -> dtype: ...

    @wp.func_native("wp::address(states, t, world)->c[i] = value;")
    def put(states: wp.array2d(dtype=State), t: int, world: int, i: int, value: dtype): ...

    unroll = '_Pragma("unroll 4")' if is_large(State) else ""

    @wp.func_native(f"""
        const auto* from = wp::address(x0, world)->c;
        auto* to = wp::address(states, 0, world)->c;
        {unroll} for (int i = 0; i < {State._length_}; ++i) to[i] = from[i];
    """)
    def begin(states: wp.array2d(dtype=State), x0: wp.array(dtype=State), world: int): ...

    return Elements(rolled(State._length_, State), get, put, begin)

"""The toy problem of the paper's first figure: one step on a line, its loss, and their hand-written adjoints.

With position x, control u and target y:

    x' = x + u          adj_x += adj_x'     adj_u += adj_x'
    L  = 1/2 (x - y)^2  adj_x += (x - y) adj_L

State [x, i]: the second component takes no part and stays what it is, so that a policy may tell worlds apart.
Control [u].

Source: Schnell and Thuerey, ICLR 2024, figure 1.
"""

import functools
from typing import Any

import warp as wp

from ..system import DeviceFunctions


@functools.cache
def make_functions(dtype: Any) -> DeviceFunctions:
    """Returns the device functions of the toy problem for `dtype` (wp.float32 or wp.float64)."""
    State = wp.types.vector(length=2, dtype=dtype)
    Control = wp.types.vector(length=1, dtype=dtype)

    @wp.struct
    class ToyParams:
        target: dtype

    @wp.func
    def toy_step(x: State, u: Control, p: ToyParams) -> State:
        """State after one step."""
        return State(x[0] + u[0], x[1])

    @wp.func
    def toy_step_vjp(x: State, u: Control, p: ToyParams, adj_x_next: State):
        """Cotangents (adj_x, adj_u) of `toy_step`."""
        return adj_x_next, Control(adj_x_next[0])

    @wp.func
    def toy_loss(x: State, p: ToyParams) -> dtype:
        """Cost of one state, half the squared distance from the target."""
        off = x[0] - p.target
        return dtype(0.5) * off * off

    @wp.func
    def toy_loss_vjp(x: State, p: ToyParams, adj_loss: dtype) -> State:
        """Cotangent adj_x of `toy_loss`."""
        return State(adj_loss * (x[0] - p.target), dtype(0.0))

    return DeviceFunctions(ToyParams, State, Control, toy_step, toy_step_vjp, toy_loss, toy_loss_vjp)

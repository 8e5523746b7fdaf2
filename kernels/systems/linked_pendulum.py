"""The cost of a state of a pendulum of several links on a cart; its dynamics are those of articulated.py.

State [x, q_1, ..., q_n, and their rates] in m, rad, m/s, rad/s. q_1 is measured from upright, each other
angle from the link before it. With the angles theta_i = q_1 + ... + q_i of the links from upright

    cost = 1 - mean_i cos theta_i          adj_q_j = adj_cost mean_i [i >= j] sin theta_i
"""

import functools
from typing import Any

import warp as wp

from ..system import DeviceFunctions
from .articulated import make_functions as make_articulated_functions
from .articulated_tables import Structure


@functools.cache
def make_functions(structure: Structure, dtype: Any) -> DeviceFunctions:
    """Returns the device functions of a pendulum of `len(structure.kinds) - 1` links, with its loss."""
    functions = make_articulated_functions(structure, dtype)
    Params, State = functions.Params, functions.State
    links = len(structure.kinds) - 1

    @wp.func
    def linked_pendulum_loss(x: State, p: Params) -> dtype:
        theta = dtype(0.0)
        total = dtype(0.0)
        for i in range(links):
            theta += x[1 + i]
            total += wp.cos(theta)
        return dtype(1.0) - total / dtype(links)

    @wp.func
    def linked_pendulum_loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        theta = dtype(0.0)
        for i in range(links):
            theta += x[1 + i]
        adj = State()
        behind = dtype(0.0)
        for k in range(links):
            i = wp.static(links) - k
            behind += wp.sin(theta)
            adj[i] = adj_loss * behind / dtype(links)
            theta -= x[i]
        return adj

    return functions._replace(loss=linked_pendulum_loss, loss_vjp=linked_pendulum_loss_vjp)

"""The hopper's cost of a state; its dynamics are those of articulated.py.

State [q_x, q_z, pitch, thigh, leg, foot, and their rates] in m, rad, m/s, rad/s; q_z is 0 upright. The reward
of a step without the cost of its control:

    reward = v_x + height + angle         angle = 1 - (pitch / (pi / 6))^2
    delta  = clip(q_z + 0.3, -1, 0.3)     height = -200 delta^2 where delta < 0, else delta

The cost is -reward. Backwards, with g = adj_cost:

    adj_v_x = -g        adj_pitch = 2 g pitch / (pi / 6)^2
    adj_q_z = 400 g delta where -1 < delta < 0,  -g where 0 <= delta < 0.3,  else 0

Source: the hopper of Xu et al., ICLR 2022 (SHAC), with the numbers of Georgiev et al., ICML 2024 (AHAC).
"""

import functools
import math
from typing import Any

import warp as wp

from ..system import DeviceFunctions
from .articulated import make_functions as make_articulated_functions
from .articulated_tables import Structure

PITCH = math.pi / 6


@functools.cache
def make_functions(structure: Structure, dtype: Any) -> DeviceFunctions:
    """Returns the device functions of a hopper, with its loss."""
    functions = make_articulated_functions(structure, dtype)
    Params, State = functions.Params, functions.State
    speed = structure.qpos_size
    per_pitch = dtype(1.0 / PITCH)  # a constant of this type: inside, 1 / PITCH would be one of float32

    @wp.func
    def hopper_loss(x: State, p: Params) -> dtype:
        delta = wp.clamp(x[1] + dtype(0.3), dtype(-1.0), dtype(0.3))
        height = delta
        if delta < dtype(0.0):
            height = -dtype(200.0) * delta * delta
        pitch = x[2] * per_pitch
        return -(x[speed] + height + dtype(1.0) - pitch * pitch)

    @wp.func
    def hopper_loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        delta = x[1] + dtype(0.3)
        slope = dtype(0.0)
        if delta < dtype(0.3):
            slope = -dtype(1.0)
        if delta < dtype(0.0):
            slope = dtype(400.0) * delta
        if delta <= dtype(-1.0):
            slope = dtype(0.0)
        adj = State()
        adj[1] = adj_loss * slope
        adj[2] = dtype(2.0) * adj_loss * per_pitch * per_pitch * x[2]
        adj[speed] = -adj_loss
        return adj

    return functions._replace(loss=hopper_loss, loss_vjp=hopper_loss_vjp)

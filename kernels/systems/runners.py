"""The cost of a state of robots that are to run along x; their dynamics are those of articulated.py.

    reward = v_x + bonus            cost = -reward          backwards  adj_v_x = -adj_cost

v_x is the velocity [m/s] of the first coordinate, `bonus` the reward of a step that does not end the episode.
The cost of the controls is not included. Source: the rewards of gymnasium's HalfCheetah and Ant (MIT), with
the velocity of the state in place of the mean velocity of the step that leads to it.
"""

import functools
from typing import Any

import warp as wp

from ..system import DeviceFunctions
from .articulated import make_functions as make_articulated_functions
from .articulated_tables import Structure


@functools.cache
def make_functions(structure: Structure, dtype: Any, bonus: float) -> DeviceFunctions:
    """Returns the device functions of such a robot, with its loss."""
    functions = make_articulated_functions(structure, dtype)
    Params, State = functions.Params, functions.State
    speed = structure.qpos_size
    earned = dtype(bonus)

    @wp.func
    def runner_loss(x: State, p: Params) -> dtype:
        return -(x[speed] + earned)

    @wp.func
    def runner_loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        adj = State()
        adj[speed] = -adj_loss
        return adj

    return functions._replace(loss=runner_loss, loss_vjp=runner_loss_vjp)

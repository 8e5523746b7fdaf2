"""What a simulated system hands to the engine: a parameter struct and pure device functions for one dtype."""

from __future__ import annotations

from typing import Any, NamedTuple


class DeviceFunctions(NamedTuple):
    """Device functions of a system for one dtype, made once (cache the factory: the kernels are compiled per
    object).

    With `State` and `Control` vectors of the system's sizes and of that dtype, and `Params` a Warp struct:

        step(x: State, u: Control, p: Params) -> State
        step_vjp(x: State, u: Control, p: Params, adj_x_next: State) -> (State, Control)      cotangents of x
        and u loss(x: State, p: Params) -> dtype                                                    cost of
        one state loss_vjp(x: State, p: Params, adj_loss: dtype) -> State
        cotangent of x

    All are `@wp.func`s without side effects. `loss` and `loss_vjp` come together or not at all.
    """

    Params: Any
    State: Any
    Control: Any
    step: Any
    step_vjp: Any
    loss: Any = None
    loss_vjp: Any = None

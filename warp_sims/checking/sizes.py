"""Whether a system is what it says: sizes, types, parameters, and functions that belong together."""

from typing import Any

import numpy as np
import torch
import warp as wp

from ..bridge.runtime.contract import functions_of
from ..systems import System
from .compare import exactly
from .report import Comparison

__all__ = ["check_sizes"]


def check_sizes(system: System) -> list[Comparison]:
    """Compares what a system says with its device functions; nothing is compiled. Where one of these
    disagrees, a kernel would read or write beyond its arrays.
    """
    return [_check(system, dtype) for dtype in (wp.float64, wp.float32)]


def _check(system: System, dtype: Any) -> Comparison:
    failed: list[str] = []
    name = dtype.__name__
    functions = functions_of(system, dtype)
    for what, said, vector in (
        ("state_size", system.state_size, functions.State),
        ("control_size", system.control_size, functions.Control),
    ):
        length, scalar = vector._length_, vector._wp_scalar_type_
        kind = what.split("_")[0].capitalize()
        if isinstance(said, bool) or not isinstance(said, int) or said != length:
            failed.append(f"{what} is {said!r}, but the vector {kind} has {length} components")
        if scalar is not dtype:
            failed.append(f"{kind} is a vector of {scalar.__name__}, expected {name}, the dtype asked for")
    if functions_of(system, dtype) is not functions:
        failed.append(
            "device_functions returns another object each time: cache it, kernels are compiled per object"
        )
    if (functions.loss is None) != (functions.loss_vjp is None):
        given, missing = ("loss", "loss_vjp") if functions.loss_vjp is None else ("loss_vjp", "loss")
        failed.append(f"device_functions has {given} without {missing}: give both or neither")
    memory = functions.memory
    if memory is not None and (memory.loss is None) != (memory.loss_vjp is None):
        failed.append("the functions in memory have one of loss and loss_vjp: give both or neither")
    failed += _check_parameters(system, dtype, functions.Params)
    failed += _check_initial_states(system)
    return exactly("sizes", name, "the device functions", failed, 5)


def _check_initial_states(system: System) -> list[str]:
    count = 3
    try:
        states = system.initial_states(count)
    except NotImplementedError:  # it need not have any
        return []
    if not isinstance(states, torch.Tensor):
        return [f"initial_states returns a {type(states).__name__}, expected a tensor"]
    if tuple(states.shape) != (count, system.state_size):
        expected = (count, system.state_size)
        return [f"initial_states({count}) has shape {tuple(states.shape)}, expected {expected}"]
    return [] if bool(states.isfinite().all()) else ["initial_states has numbers that are not finite"]


def _check_parameters(system: System, dtype: Any, Params: Any) -> list[str]:
    try:
        params = system.parameters(dtype)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return [f"parameters({dtype.__name__}) failed: {' '.join(str(error).split())}"]
    if not isinstance(params, type(Params())):
        return [
            f"parameters returns a {type(params).__name__}, expected the struct Params of device_functions"
        ]
    failed = []
    for name, variable in params._cls.vars.items():
        kind, value = variable.type, getattr(params, name)
        if isinstance(kind, wp.array):
            if value is None or value.size == 0:
                failed.append(f"Params.{name} is an array without elements: fill it in parameters(dtype)")
            continue
        scalar = getattr(kind, "_wp_scalar_type_", kind)
        if scalar in (wp.float16, wp.float32, wp.float64) and scalar is not dtype:
            failed.append(
                f"Params.{name} is {scalar.__name__}, expected {dtype.__name__}, the dtype asked for"
            )
        length, given = getattr(kind, "_length_", None), getattr(system, name, None)
        if length is not None and isinstance(given, (list, tuple, np.ndarray)) and len(given) != length:
            failed.append(f"Params.{name} has {length} components, but the field of the system {len(given)}")
    return failed

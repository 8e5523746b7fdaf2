"""Whether what a system supplies fits together: asked once a dtype and device, before any kernel is made.

A kernel reads as many numbers as its vectors are long, whatever the tensors behind them hold: a size that
is wrong would read and write foreign memory. A missing adjoint would be a gradient of zero.
"""

import __future__

import ast
from types import TracebackType
from typing import Any

import warp as wp

from ...kernels.sweeps.generated_vjp import complete
from ...kernels.system import DeviceFunctions
from .launches import PREPARING


def functions_of(system: Any, dtype: Any) -> DeviceFunctions:
    """Device functions of a system for Warp's `dtype`.

    Raises:
        TypeError: the file that makes them turns annotations into text, or they are no `DeviceFunctions`.
    """
    name = type(system).__name__
    try:
        # one thread at a time: a cache of functools hands two that come first two objects
        with PREPARING:
            functions = system.device_functions(dtype)
    except NameError as error:
        if not _annotations_are_text(error.__traceback__):
            raise
        raise TypeError(
            f"{name}: its device functions are made in a file with `from __future__ import annotations`, "
            f"which turns types into text ({error}), expected types: Warp reads them; remove that line"
        ) from error
    if not isinstance(functions, DeviceFunctions):
        raise TypeError(
            f"{name}: device_functions returned {type(functions).__name__}, expected a "
            "warp_sims.DeviceFunctions(Params, State, Control, step, step_vjp, ...)"
        )
    return _with_adjoints(functions)


def has_generated_adjoint(system: Any, dtype: Any) -> bool:
    """Whether the adjoint of a system's step is left to Warp."""
    return system.device_functions(dtype).step_vjp is None


def _with_adjoints(functions: DeviceFunctions) -> DeviceFunctions:
    """The functions, with adjoints that Warp generates where there are none; as they are where they do not
    fit together, which `check_contract` says.
    """
    if functions.step_vjp is not None:
        return functions
    vectors = all(hasattr(v, "_wp_scalar_type_") for v in (functions.State, functions.Control))
    if not isinstance(functions.step, wp.Function) or not vectors:
        return functions
    if len(functions.step.input_types) != 3:
        return functions
    with PREPARING:
        return complete(functions)


def _annotations_are_text(frames: TracebackType | None) -> bool:
    while frames is not None:
        if frames.tb_frame.f_globals.get("annotations") is __future__.annotations:
            return True
        frames = frames.tb_next
    return False


def check_contract(system: Any, functions: DeviceFunctions, params: Any, dtype: Any) -> None:
    """Raises TypeError or ValueError unless sizes, device functions and parameters of a system fit together.

    `functions` and `params` are what the system gave for `dtype`.
    """
    name = type(system).__name__
    _check_vector(name, "state_size", system.state_size, "State", functions.State, dtype)
    _check_vector(name, "control_size", system.control_size, "Control", functions.Control, dtype)
    if functions_of(system, dtype) is not functions:
        raise TypeError(
            f"{name}: device_functions({dtype.__name__}) makes new functions at every call, expected the "
            "same object: kernels are compiled for each; cache the factory: decorate a function of the "
            "module with functools.cache and call it in device_functions"
        )
    _check_function(name, "step", functions.step, 3)
    _check_function(name, "step_vjp", functions.step_vjp, 4)
    _check_pair(name, functions.step_vjp)
    if (functions.loss is None) != (functions.loss_vjp is None):
        given, missing = ("loss", "loss_vjp") if functions.loss_vjp is None else ("loss_vjp", "loss")
        raise ValueError(
            f"{name}: its device functions have {given} without {missing}, expected both or neither: the "
            f"gradient of the loss would be zero; add {missing}, or leave {given} out and pass a callable "
            "loss"
        )
    if functions.loss is not None:
        _check_function(name, "loss", functions.loss, 2)
        _check_function(name, "loss_vjp", functions.loss_vjp, 3)
    for form in ("block", "memory", "wide"):
        given = getattr(functions, form)
        if given is not None and (given.step is None or given.step_vjp is None):
            raise ValueError(f"{name}: its {form} form lacks a step or a step_vjp, expected both")
    _check_params(name, functions.Params, params)


def _check_vector(name: str, field: str, size: Any, kind: str, vector: Any, dtype: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name}: {field} is {size!r} of type {type(size).__name__}, expected an int")
    length, scalar = getattr(vector, "_length_", None), getattr(vector, "_wp_scalar_type_", None)
    if length is None or scalar is None:
        raise TypeError(
            f"{name}: {kind} of its device functions is {vector!r}, expected a Warp vector type: "
            f"wp.types.vector(length={size}, dtype=dtype)"
        )
    if length != size:
        raise ValueError(
            f"{name}: {field} is {size}, but {kind} of its device functions is a vector of {length}, "
            f"expected the same; correct {field} or the length of {kind}"
        )
    if scalar is not dtype:
        raise TypeError(
            f"{name}: {kind} of its device functions holds {scalar.__name__} for {dtype.__name__}, expected "
            f"{dtype.__name__}: make it in the factory, with the dtype that it is given"
        )


def _check_function(name: str, role: str, function: Any, arguments: int) -> None:
    if not isinstance(function, wp.Function):
        remedy = "decorate it with @wp.func" if callable(function) else f"supply {role}"
        raise TypeError(
            f"{name}: {role} of its device functions is {function!r}, expected a Warp function; {remedy}"
        )
    if len(function.input_types) != arguments:
        raise TypeError(
            f"{name}: {role} of its device functions takes {len(function.input_types)} arguments "
            f"({', '.join(function.input_types)}), expected {arguments}; see warp_sims.DeviceFunctions"
        )


def _check_pair(name: str, step_vjp: Any) -> None:
    """Every return of a `step_vjp` that can be read gives two values."""
    if step_vjp.native_snippet is not None:
        return
    for node in ast.walk(step_vjp.adj.tree):
        if not isinstance(node, ast.Return):
            continue
        if isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            continue
        # a call may return what a function returns; a vector's constructor is one value
        if isinstance(node.value, ast.Call) and not _makes_vector(step_vjp, node.value):
            continue
        found = "nothing" if node.value is None else f"`{ast.unparse(node.value)}`"
        raise TypeError(
            f"{name}: step_vjp of its device functions returns {found}, expected two values, the cotangents "
            "of state and control: `return State(...), Control(...)`"
        )


def _makes_vector(function: Any, call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Name):
        return False
    free, cells = function.func.__code__.co_freevars, function.func.__closure__ or ()
    names = {**function.func.__globals__, **{n: c.cell_contents for n, c in zip(free, cells)}}
    return hasattr(names.get(call.func.id), "_wp_scalar_type_")


def _check_params(name: str, Params: Any, params: Any) -> None:
    if getattr(params, "_cls", None) is not Params:
        raise TypeError(
            f"{name}: parameters returned {type(params).__name__}, expected an instance of the Params "
            "struct of its device functions"
        )
    for field, variable in Params.vars.items():
        if not isinstance(variable.type, wp.array):
            continue
        value = getattr(params, field)
        if value is None:
            raise ValueError(
                f"{name}: array {field!r} of its Params struct is empty, expected numbers: a kernel would "
                "read at address 0; set it in parameters(dtype)"
            )

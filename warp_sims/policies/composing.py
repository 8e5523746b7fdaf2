"""From a torch module to a fused policy: what torch's modules, functions and methods become.

`compose` traces a module and translates every node. What it does not know, it names in `NotComposed`; the
module is then evaluated by torch. The operations are those of kernels/policy/description.py.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import convolving
from .convolving import stored, straight
from .translation import (
    Composition,
    Constant,
    Grammar,
    Leaves,
    NotComposed,
    Parameter,
    Translation,
    Value,
    first_line,
    number,
)

__all__ = ["MODULES", "compose"]


# Modules


def _linear(t: Translation, v: Value, weight: Tensor, bias: Tensor | None) -> Value:
    units, window = weight.shape
    if v.rows:
        return convolving.by_position(t, v, weight, bias)
    if window != v.width:
        raise NotComposed(f"a linear layer reads {window} inputs, expected {v.width}")
    words = t.parameter(weight, (units, window)), t.parameter(bias, (units,))
    return t.emit("linear", (v,), (str(units), *words), units)


def _norm(
    t: Translation, v: Value, kind: str, shape: Any, eps: float | None, *tensors: Tensor | None
) -> Value:
    if tuple(shape) != v.shape:
        raise NotComposed(f"a normalisation is over {tuple(shape)}, expected {v.shape}")
    small = torch.finfo(t.dtype).eps if eps is None else eps
    v = t.emit_alike("normalize", v, (kind, number(small)))
    if all(tensor is None for tensor in tensors):
        return v
    v = straight(t, v)
    words = tuple(t.parameter(tensor, v.shape) for tensor in tensors)
    return _affine(t, v, *(*words, "-")[:2])


def _activation(t: Translation, v: Any, kind: str, *numbers: float) -> Value:
    if not isinstance(v, Value):
        raise NotComposed(f"{kind} acts on something that does not depend on the states")
    return t.emit_alike(kind, v, tuple(number(n) for n in numbers))


def _leaky(t: Translation, v: Any, slope: float) -> Value:
    if slope < 0:
        raise NotComposed(f"a leaky ReLU has a negative slope, {slope}")
    return _activation(t, v, "leakyrelu", slope)


def _elu(t: Translation, v: Any, alpha: float) -> Value:
    if alpha <= 0:
        raise NotComposed(f"an ELU has alpha {alpha}, expected more than 0")
    return _activation(t, v, "elu", alpha)


def _gelu(t: Translation, v: Any, approximate: str) -> Value:
    return _activation(t, v, "gelutanh" if approximate == "tanh" else "gelu")


def _dropout(t: Translation, v: Value, m: Any, name: str) -> Value:
    if m.training and m.p > 0:
        raise NotComposed(f"{name} is a dropout in training mode")
    return v


MODULES: dict[type, Callable[[Translation, Value, Any, str], Value]] = {
    nn.Linear: lambda t, v, m, _: _linear(t, v, m.weight, m.bias),
    nn.LayerNorm: lambda t, v, m, _: _norm(t, v, "layer", m.normalized_shape, m.eps, m.weight, m.bias),
    nn.RMSNorm: lambda t, v, m, _: _norm(t, v, "rms", m.normalized_shape, m.eps, m.weight),
    nn.Tanh: lambda t, v, m, _: _activation(t, v, "tanh"),
    nn.ReLU: lambda t, v, m, _: _activation(t, v, "relu"),
    nn.LeakyReLU: lambda t, v, m, _: _leaky(t, v, m.negative_slope),
    nn.ELU: lambda t, v, m, _: _elu(t, v, m.alpha),
    nn.SiLU: lambda t, v, m, _: _activation(t, v, "silu"),
    nn.GELU: lambda t, v, m, _: _gelu(t, v, m.approximate),
    nn.Sigmoid: lambda t, v, m, _: _activation(t, v, "sigmoid"),
    nn.Softplus: lambda t, v, m, _: _activation(t, v, "softplus", m.beta, m.threshold),
    nn.Identity: lambda t, v, m, _: v,
    nn.Dropout: _dropout,
    **convolving.MODULES,
}
"""Modules of torch's that run fused, by their exact type."""


# Functions and methods


def _affine(t: Translation, v: Value, scale: str, shift: str) -> Value:
    return t.emit_alike("affine", v, (scale, shift))


def _acted_on(t: Translation, v: Value, operand: Any) -> Value:
    """A value as the operand that scales or shifts it has its components."""
    return straight(t, v) if isinstance(operand, Parameter) else v


def _add(t: Translation, a: Any, b: Any, alpha: float = 1) -> Value:
    if alpha != 1:
        raise NotComposed("an addition has an alpha")
    if not isinstance(a, Value):
        a, b = b, a
    if not isinstance(a, Value):
        raise NotComposed("a parameter is shifted before it acts on the states")
    a = _acted_on(t, a, b)
    word = t.vector(b, a)
    if word is not None:
        return _affine(t, a, "-", word)
    if a.shape != b.shape:
        raise NotComposed(f"values of shapes {a.shape} and {b.shape}, without the states, are added")
    b = stored(t, b, a.turned)
    # the later one first: it is more likely read by nobody else, and the sum takes its place
    found = t.emit("add", (a, b) if a.number > b.number else (b, a), (), a.width)
    return dataclasses.replace(a, number=found.number)


def _sub(t: Translation, a: Any, b: Any, alpha: float = 1) -> Value:
    if alpha != 1:
        raise NotComposed("a subtraction has an alpha")
    if isinstance(b, Value):
        return _add(t, _affine(t, b, "-1.0", "-"), a)
    word = t.vector(b, a, operator.neg)
    assert word is not None
    return _affine(t, a, "-", word)


def _mul(t: Translation, a: Any, b: Any) -> Value:
    if not isinstance(a, Value):
        a, b = b, a
    if not isinstance(a, Value):
        raise NotComposed("a parameter is scaled before it acts on the states")
    a = _acted_on(t, a, b)
    word = t.vector(b, a)
    if word is None:
        raise NotComposed("two values are multiplied")
    return _affine(t, a, word, "-")


def _div(t: Translation, a: Any, b: Any) -> Value:
    if not isinstance(a, Value):
        raise NotComposed("something is divided by a value")
    word = t.vector(b, a, lambda c: 1 / c)
    if word is None:
        raise NotComposed("something is divided by a value")
    return _affine(t, a, word, "-")


def _bound(operand: Any, missing: float) -> float:
    if operand is None:
        return missing
    found = operand.value() if isinstance(operand, Constant) else operand
    if isinstance(operand, Constant) or not isinstance(found, (int, float)):
        raise NotComposed("a clamp has a bound that is no number")
    return found


def _clamp(t: Translation, v: Any, min: Any = None, max: Any = None) -> Value:
    low, high = _bound(min, -1e38), _bound(max, 1e38)
    return _activation(t, v, "clamp", low, high)


def _along(t: Translation, v: Value, dim: Any) -> Value:
    """A value stored with the axis `dim` in front, of those behind the states."""
    axes = 1 + len(v.shape)
    if type(dim) is not int or not -axes <= dim < axes or dim % axes == 0:
        raise NotComposed("values are joined or split along something else than their components")
    return stored(t, v, dim % axes == 2) if v.rows else v


def _join(t: Translation, tensors: Any, dim: int = 0) -> Value:
    if not all(isinstance(v, Value) for v in tensors):
        raise NotComposed("a concatenation is of something else than values")
    values = tuple(_along(t, v, dim) for v in tensors)
    first = values[0]
    if len({(len(v.shape), v.rows and v.shape[0 if v.turned else 1]) for v in values}) > 1:
        raise NotComposed(f"values of shapes {[v.shape for v in values]}, without the states, are joined")
    if len(values) == 1:
        return first
    found = t.emit("join", values, (), sum(v.width for v in values))
    rows = first.rows if first.turned else sum(v.rows for v in values)
    return dataclasses.replace(found, rows=rows, turned=first.turned)


def _part(t: Translation, v: Value, first: int, count: int) -> Value:
    """Some of the axis that stands in front where v is stored."""
    if count < 1:
        raise NotComposed("a part of a value is empty")
    each = 1 if not v.rows else v.rows if v.turned else v.columns
    if count * each == v.width:
        return v
    found = t.emit("part", (v,), (str(first * each), str(count * each)), count * each)
    return dataclasses.replace(found, rows=v.rows if v.turned or not v.rows else count, turned=v.turned)


def _item(t: Translation, v: Any, index: Any) -> Any:
    if not isinstance(v, Value):
        return v[index] if isinstance(v, tuple) and isinstance(index, int) else _refuse_index()
    index = index if isinstance(index, tuple) else (index,)
    if index[0] is Ellipsis:
        index = (slice(None),) * (2 + len(v.shape) - len(index)) + index[1:]
    # all but one axis whole
    chosen_axes = [k for k, i in enumerate(index) if not isinstance(i, slice) or i != slice(None)]
    if len(index) > 1 + len(v.shape) or len(chosen_axes) > 1 or chosen_axes == [0]:
        _refuse_index()
    if not chosen_axes:
        return v
    axis = chosen_axes[0]
    columns, v = index[axis], _along(t, v, axis)
    places = range(v.shape[axis - 1])
    if type(columns) is int and v.rows and -len(places) <= columns < len(places):
        # the axis goes
        return dataclasses.replace(_part(t, v, places[columns], 1), rows=0, turned=False)
    if isinstance(columns, slice) and all(
        isinstance(e, (int, type(None))) for e in (columns.start, columns.stop, columns.step)
    ):
        chosen = list(places[columns])
    elif isinstance(columns, list) and all(
        type(i) is int and i in range(-len(places), len(places)) for i in columns
    ):
        chosen = [places[i] for i in columns]
    else:
        _refuse_index()
    runs: list[list[int]] = []
    for i in chosen:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    if not runs:
        _refuse_index()
    return _join(t, [_part(t, v, run[0], len(run)) for run in runs], axis)


def _refuse_index() -> Any:
    raise NotComposed("a value is indexed by something else than [:, a:b] or [:, [i, j, ...]]")


def _split(t: Translation, v: Value, size: Any, dim: int = 0) -> tuple[Value, ...]:
    v = _along(t, v, dim)
    length = v.shape[1 if v.turned else 0]
    if type(size) is int:
        size = [min(size, length - first) for first in range(0, length, size)]
    if sum(size) != length:
        raise NotComposed("the parts of a value are not all of it")
    return tuple(_part(t, v, sum(size[:k]), count) for k, count in enumerate(size))


def _chunk(t: Translation, v: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    v = _along(t, v, dim)
    return _split(t, v, -(-v.shape[1 if v.turned else 0] // chunks), dim)


def _function_linear(t: Translation, input: Value, weight: Any, bias: Any = None) -> Value:
    if not isinstance(weight, Parameter) or not isinstance(bias, (Parameter, type(None))):
        raise NotComposed("a linear layer has a weight or bias that is no parameter")
    return _linear(t, input, weight.tensor, None if bias is None else bias.tensor)


def _function_norm(kind: str) -> Callable[..., Value]:
    def norm(
        t: Translation,
        input: Value,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float | None = 1e-5 if kind == "layer" else None,
    ) -> Value:
        tensors = [None if q is None else q.tensor for q in (weight, bias)]
        return _norm(t, input, kind, normalized_shape, eps, *tensors)

    if kind == "layer":
        return norm

    def rms(
        t: Translation, input: Value, normalized_shape: Any, weight: Any = None, eps: Any = None
    ) -> Value:
        return norm(t, input, normalized_shape, weight, None, eps)

    return rms


def _same(t: Translation, v: Any, *_: Any, **__: Any) -> Any:
    return v


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "mul": _mul,
    "multiply": _mul,
    "truediv": _div,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "neg": lambda t, v: _affine(t, v, "-1.0", "-"),
    "tanh": lambda t, v: _activation(t, v, "tanh"),
    "sigmoid": lambda t, v: _activation(t, v, "sigmoid"),
    "sin": lambda t, v: _activation(t, v, "sin"),
    "cos": lambda t, v: _activation(t, v, "cos"),
    "relu": lambda t, v: _activation(t, v, "relu"),
    "leaky_relu": lambda t, v, negative_slope=0.01: _leaky(t, v, negative_slope),
    "elu": lambda t, v, alpha=1.0: _elu(t, v, alpha),
    "silu": lambda t, v: _activation(t, v, "silu"),
    "gelu": lambda t, v, approximate="none": _gelu(t, v, approximate),
    "softplus": lambda t, v, beta=1.0, threshold=20.0: _activation(t, v, "softplus", beta, threshold),
    "clamp": _clamp,
    "clip": _clamp,
    "cat": _join,
    "concat": _join,
    "concatenate": _join,
    "getitem": _item,
    "split": _split,
    "chunk": _chunk,
    "linear": _function_linear,
    "layer_norm": _function_norm("layer"),
    "rms_norm": _function_norm("rms"),
    "contiguous": _same,
    "clone": _same,
    **convolving.FUNCTIONS,
}
"""Functions and methods that run fused, by name."""

_TARGETS = {
    target: make
    for name, make in FUNCTIONS.items()
    for space in (operator, torch, functional)
    if name not in ("layer_norm", "rms_norm") or space is functional  # torch's own have other arguments
    for target in [getattr(space, name, None)]
    if target is not None
} | {getattr: convolving.attribute}


def compose(module: nn.Module, in_size: int) -> Composition:
    """Translates a module that maps (n, in_size) to controls, row by row.

    Raises:
        NotComposed: it does something that no operation here is.
    """
    try:
        graph = Leaves(MODULES).trace(module)
    except NotComposed:
        raise
    except Exception as error:  # whatever the module's own code raises on symbolic states
        raise NotComposed(f"torch.fx cannot trace it: {first_line(error)}") from error
    return Translation(module, in_size, Grammar(MODULES, _TARGETS, FUNCTIONS)).run(graph)

"""Values with two axes, (channels, positions), on their way to a fused policy: shapes and convolutions.

torch has channels first, the convolutions of kernels/policy/description.py have them last. A value
is therefore stored as it is or turned, and is turned over only where something reads it the other way.
"""

import dataclasses
from typing import Any

from torch import Tensor, nn

from .translation import BATCH, Constant, NotComposed, Parameter, Translation, Value

__all__ = ["attribute", "convolution", "padded", "reshaped", "straight", "stored", "transposed"]


def stored(t: Translation, v: Value, turned: bool) -> Value:
    """The same value, stored as it is or turned."""
    if v.turned == turned:
        return v
    if v.rows == 1 or v.columns == 1:
        return dataclasses.replace(v, turned=turned)
    found = t.emit("turn", (v,), (str(v.columns if v.turned else v.rows),), v.width)
    return dataclasses.replace(found, rows=v.rows, turned=turned)


def straight(t: Translation, v: Value) -> Value:
    """The same value, stored as torch has it."""
    return stored(t, v, False) if v.rows else v


# Shapes


def _size(n: Any) -> Any:
    found = n.value() if isinstance(n, Constant) else n
    if found is not BATCH and type(found) is not int:
        raise NotComposed(f"a shape has {type(found).__name__} in it, expected numbers")
    return found


def reshaped(t: Translation, v: Value, *shape: Any) -> Value:
    """`view` and `reshape`, with the worlds in front."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    first, *sizes = map(_size, shape)
    if not sizes or first not in (BATCH, -1) or (first == -1 and -1 in sizes):
        raise NotComposed("a value is given a shape that does not begin with the number of states")
    return _shaped(t, v, sizes)


def _shaped(t: Translation, v: Value, sizes: list[Any]) -> Value:
    if BATCH in sizes or len(sizes) > 2:
        raise NotComposed("a value is given a shape of more than two axes besides the states")
    known = 1
    for size in sizes:
        known *= 1 if size == -1 else size
    if sizes.count(-1) > 1 or known < 1 or v.width % known or (-1 not in sizes and known != v.width):
        raise NotComposed(f"a value of {v.width} components is given the shape {tuple(sizes)}")
    whole = [v.width // known if size == -1 else size for size in sizes]
    return dataclasses.replace(straight(t, v), rows=whole[0] if len(whole) == 2 else 0, turned=False)


def _axis(v: Value, dim: Any, axes: int) -> int:
    """An axis from 1, of `axes` with that of the states."""
    if type(dim) is not int or not -axes <= dim < axes or dim % axes == 0:
        raise NotComposed(f"axis {dim!r} of a value of shape (n, {', '.join(map(str, v.shape))}) is changed")
    return dim % axes


def flattened(t: Translation, v: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    """`flatten`."""
    axes = 1 + len(v.shape)
    first, last = _axis(v, start_dim, axes), _axis(v, end_dim, axes)
    return v if first == last else _shaped(t, v, [v.width])


def unflattened(t: Translation, v: Value, dim: int, sizes: Any) -> Value:
    """`unflatten`."""
    if v.rows or _axis(v, dim, 2) != 1:
        raise NotComposed("a value of more than one axis besides the states is unflattened")
    return _shaped(t, v, [_size(n) for n in sizes])


def unsqueezed(t: Translation, v: Value, dim: int) -> Value:
    """`unsqueeze`."""
    place = _axis(v, dim, 2 + len(v.shape))
    return _shaped(t, v, [*v.shape[: place - 1], 1, *v.shape[place - 1 :]])


def squeezed(t: Translation, v: Value, dim: int) -> Value:
    """`squeeze` of one axis."""
    place = _axis(v, dim, 1 + len(v.shape))
    if v.shape[place - 1] != 1:
        return v
    if not v.rows:
        raise NotComposed("the only axis of a value besides the states is squeezed")
    return _shaped(t, v, [v.width])


def transposed(t: Translation, v: Value, dim0: int = -1, dim1: int = -2) -> Value:
    """`transpose` of the two axes behind the states."""
    axes = {_axis(v, dim0, 3), _axis(v, dim1, 3)} if v.rows else set()
    if axes != {1, 2}:
        raise NotComposed("a value is transposed, but not its two axes besides the states")
    return dataclasses.replace(v, rows=v.columns, turned=not v.turned)


def permuted(t: Translation, v: Value, *dims: Any) -> Value:
    """`permute`."""
    order = list(dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)
    axes = 1 + len(v.shape)
    if [d % axes for d in order] == list(range(axes)):
        return v
    if not v.rows or [d % axes for d in order] != [0, 2, 1]:
        raise NotComposed("a value is permuted, but not its two axes besides the states")
    return transposed(t, v)


def size(t: Translation, v: Value, dim: int | None = None) -> Any:
    """`size`: the number of states is known to nobody."""
    found = (BATCH, *v.shape)
    return found if dim is None else found[dim]


def attribute(t: Translation, v: Any, name: str) -> Any:
    """`shape` and `mT`."""
    if isinstance(v, Value) and name == "shape":
        return size(t, v)
    if isinstance(v, Value) and name == "mT":
        return transposed(t, v)
    raise NotComposed(f"attribute {name!r} does not run fused")


# Convolutions


def _only(number: Any, name: str) -> Any:
    found = number[0] if isinstance(number, (tuple, list)) and len(number) == 1 else number
    if type(found) is not int and not (name == "padding" and isinstance(found, str)):
        raise NotComposed(f"a convolution has {name} {number!r}, expected a number")
    return found


def padded(t: Translation, v: Value, before: int, after: int, mode: str) -> Value:
    """A value with positions before and behind its own, channels last."""
    if not v.rows:
        raise NotComposed(f"a value of shape (n, {v.width}) is padded, expected (n, channels, length)")
    most = {"circular": v.columns, "reflect": v.columns - 1}.get(mode)
    if min(before, after) < 0 or (most is not None and max(before, after) > most):
        raise NotComposed(f"{v.columns} positions have ({before}, {after}) of {mode} padding around them")
    if before == after == 0:
        return stored(t, v, True)
    order = "last" if v.turned else "first"
    width = v.rows * (before + v.columns + after)
    found = t.emit("spread", (v,), (str(v.rows), str(before), str(after), mode, order), width)
    return dataclasses.replace(found, rows=v.rows, turned=True)


def convolution(
    t: Translation,
    v: Value,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    mode: str = "zeros",
) -> Value:
    """`Conv1d`, with any padding that torch has."""
    units, channels, kernel = weight.shape
    shape = ", ".join(map(str, v.shape))
    if groups != 1:
        raise NotComposed(f"a convolution has {groups} groups, expected 1")
    if _only(dilation, "dilation") != 1:
        raise NotComposed(f"a convolution has dilation {_only(dilation, 'dilation')}, expected 1")
    if v.rows != channels:
        raise NotComposed(
            f"a convolution reads a value of shape (n, {shape}), expected (n, {channels}, length)"
        )
    around, hop = _only(padding, "padding"), _only(stride, "stride")
    before = after = around
    if isinstance(around, str):
        before = (kernel - 1) // 2 if around == "same" else 0
        after = kernel - 1 - before if around == "same" else 0
    v = padded(t, v, before, after, mode)
    if v.columns < kernel:
        raise NotComposed(f"a convolution of {kernel} positions reads {v.columns}")
    positions = (v.columns - kernel) // hop + 1
    words = t.parameter(weight, (units, channels, kernel)), t.parameter(bias, (units,))
    sizes = (str(n) for n in (units, kernel, hop, channels))
    found = t.emit("conv", (v,), (*sizes, *words), units * positions)
    return dataclasses.replace(found, rows=units, turned=True)


def by_position(t: Translation, v: Value, weight: Tensor, bias: Tensor | None) -> Value:
    """`Linear` over the last of two axes: a convolution of one position, with the axes the other way."""
    units, window = weight.shape
    if v.columns != window:
        raise NotComposed(f"a linear layer reads {window} inputs, expected {v.columns}")
    v = straight(t, v)
    words = t.parameter(weight, (units, window)), t.parameter(bias, (units,))
    found = t.emit("conv", (v,), (str(units), "1", "1", str(window), *words), units * v.rows)
    return dataclasses.replace(found, rows=v.rows)


def function_convolution(
    t: Translation,
    input: Value,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """`functional.conv1d`."""
    if not isinstance(weight, Parameter) or not isinstance(bias, (Parameter, type(None))):
        raise NotComposed("a convolution has a weight or bias that is no parameter")
    shift = None if bias is None else bias.tensor
    return convolution(t, input, weight.tensor, shift, stride, padding, dilation, groups)


def function_padded(
    t: Translation, input: Value, pad: Any, mode: str = "constant", value: float | None = None
) -> Value:
    """`functional.pad` of the positions."""
    if len(pad) != 2 or value not in (None, 0):
        raise NotComposed("a value is padded along several axes, or with something else than zeros")
    return padded(t, input, _size(pad[0]), _size(pad[1]), "zeros" if mode == "constant" else mode)


MODULES: dict[type, Any] = {
    nn.Conv1d: lambda t, v, m, _: convolution(
        t, v, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode
    ),
    nn.ZeroPad1d: lambda t, v, m, _: padded(t, v, m.padding[0], m.padding[1], "zeros"),
    nn.CircularPad1d: lambda t, v, m, _: padded(t, v, m.padding[0], m.padding[1], "circular"),
    nn.ReplicationPad1d: lambda t, v, m, _: padded(t, v, m.padding[0], m.padding[1], "replicate"),
    nn.ReflectionPad1d: lambda t, v, m, _: padded(t, v, m.padding[0], m.padding[1], "reflect"),
    nn.Flatten: lambda t, v, m, _: flattened(t, v, m.start_dim, m.end_dim),
    nn.Unflatten: lambda t, v, m, _: unflattened(t, v, m.dim, m.unflattened_size),
}
"""Modules of torch's, see composing.py."""
FUNCTIONS: dict[str, Any] = {
    "conv1d": function_convolution,
    "pad": function_padded,
    "view": reshaped,
    "reshape": reshaped,
    "flatten": flattened,
    "unflatten": unflattened,
    "unsqueeze": unsqueezed,
    "squeeze": squeezed,
    "transpose": transposed,
    "swapaxes": transposed,
    "permute": permuted,
    "size": size,
}
"""Functions and methods, the same."""

"""From a torch module to a composed policy: the graph that torch.fx finds, as the operations that run fused.

`compose` traces a module and translates every node. What it does not know, it names in `NotComposed`; the
module is then evaluated by torch. The operations and the line they are written in are those of
kernels/policy/composed_layout.py.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional

__all__ = ["Composition", "NotComposed", "compose"]


class NotComposed(Exception):
    """Why a module is none of the operations that run fused."""


class Composition(NamedTuple):
    """A module as operations; its tensors by name, because they change from call to call."""

    description: str
    in_size: int
    out_size: int
    parameters: tuple[str, ...]
    """Names, in the order of the module's `named_parameters`."""
    constants: tuple[Callable[[], Tensor], ...]
    """What computes each constant vector from the module's buffers."""


@dataclasses.dataclass(frozen=True)
class _Constant:
    """What depends on no state: a number, or a function of buffers."""

    value: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter itself."""

    name: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of the composed policy."""

    number: int
    width: int


class _Leaves(fx.Tracer):
    """Takes torch's own modules as they are and looks into all others."""

    proxy_buffer_attributes = True  # what is computed of buffers is computed anew when they change

    def create_arg(self, a: Any) -> Any:
        """What a node is given: of tensors only those that are the module's own."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise NotComposed("it computes with a tensor that is none of its buffers")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or super().is_leaf_module(m, module_qualified_name)


def compose(module: nn.Module, in_size: int) -> Composition:
    """Translates a module that maps (n, in_size) to controls, row by row.

    Raises:
        NotComposed: it does something that no operation here is.
    """
    try:
        graph = _Leaves().trace(module)
    except NotComposed:
        raise
    except Exception as error:  # whatever the module's own code raises on symbolic states
        raise NotComposed(f"torch.fx cannot trace it: {_first_line(error)}") from error
    return _Translation(module, in_size).run(graph)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _number(value: float) -> str:
    return repr(float(value))


class _Translation:
    """One graph on its way to a description."""

    def __init__(self, module: nn.Module, in_size: int) -> None:
        self.module = module
        self.named = dict(module.named_parameters())
        first = next(iter(self.named.values()), None)
        if first is None:
            raise NotComposed("it has no parameters")
        self.dtype = first.dtype
        self.state = _Value(0, in_size)
        self.widths = [in_size]
        self.operations: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = []
        self.used: list[str] = []
        self.constants: list[Callable[[], Tensor]] = []

    def run(self, graph: fx.Graph) -> Composition:
        found: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "output":
                result = self.look_up(found, node.args[0])
                break
            found[node] = self.translate(node, found)
        else:
            raise NotComposed("it returns nothing")
        if not isinstance(result, _Value) or result.number == 0:
            raise NotComposed("its output is not a function of the states alone")
        return self.described(result)

    def look_up(self, found: dict[fx.Node, Any], argument: Any) -> Any:
        return map_arg(argument, lambda node: found[node])

    def translate(self, node: fx.Node, found: dict[fx.Node, Any]) -> Any:
        """A value, a constant, a parameter, or a tuple of values."""
        if node.op == "placeholder":
            if all(value is not self.state for value in found.values()):
                return self.state
            if node.args:
                return node.args[0]  # the default of a further argument
            raise NotComposed(f"it takes {node.target!r} besides the states")
        if node.op == "get_attr":
            return self.attribute(str(node.target))
        args = self.look_up(found, node.args)
        kwargs = dict(self.look_up(found, node.kwargs))
        if node.op == "call_module":
            part = self.module.get_submodule(str(node.target))
            make = MODULES.get(type(part))
            if make is None:
                raise NotComposed(f"{node.target} is a {type(part).__name__}, which does not run fused")
            before = node.all_input_nodes
            if getattr(part, "inplace", False) and any(
                b.op == "placeholder" or len(b.users) > 1 for b in before
            ):
                raise NotComposed(f"{node.target} changes a value in place that is read elsewhere")
            if len(args) != 1 or kwargs or not isinstance(args[0], _Value):
                raise NotComposed(f"{node.target} is called on something else than one value")
            return make(self, args[0], part, str(node.target))
        name = str(node.target) if node.op == "call_method" else _name(node.target)
        values = [a for a in _flat((args, tuple(kwargs.values()))) if isinstance(a, (_Value, _Parameter))]
        if not values:
            return self.constant(node, args, kwargs)
        known: dict[Any, Callable[..., Any]] = FUNCTIONS if node.op == "call_method" else _TARGETS
        make_function = known.get(node.target)
        if make_function is None or kwargs.pop("inplace", False):
            raise NotComposed(f"{name} does not run fused")
        try:
            return make_function(self, *args, **kwargs)
        except (TypeError, AttributeError) as error:
            raise NotComposed(f"{name} is called in a way that does not run fused ({error})") from error

    def attribute(self, name: str) -> Any:
        *path, last = name.split(".")
        owner = self.module.get_submodule(".".join(path))
        tensor = getattr(owner, last)
        if isinstance(tensor, nn.Parameter) or last in owner._parameters:
            return _Parameter(self.name_of(tensor), tensor)
        if not isinstance(tensor, Tensor):
            return tensor
        if tensor.requires_grad:
            raise NotComposed(f"{name} requires a gradient and is no parameter")
        return _Constant(lambda: getattr(owner, last))

    def name_of(self, tensor: Tensor) -> str:
        for name, parameter in self.named.items():
            if parameter is tensor:
                return name
        raise NotComposed("it reads a parameter that is not its own")

    def constant(self, node: fx.Node, args: Any, kwargs: Any) -> _Constant:
        """A function of constants: evaluated when the policy is packed, because buffers change."""
        target: Any = node.target

        def value() -> Any:
            now: Any = map_aggregate(args, _now), map_aggregate(kwargs, _now)
            if node.op == "call_method":
                return getattr(now[0][0], target)(*now[0][1:], **now[1])
            return target(*now[0], **now[1])

        name = _name(target)
        if node.op == "call_function" and (name in IMPURE or name.startswith("rand")):
            raise NotComposed(f"{name} does not run fused")
        return _Constant(value)

    def emit(self, kind: str, inputs: tuple[_Value, ...], arguments: tuple[str, ...], width: int) -> _Value:
        self.operations.append((kind, tuple(v.number for v in inputs), arguments))
        self.widths.append(width)
        return _Value(len(self.widths) - 1, width)

    def parameter(self, tensor: Tensor | None, shape: tuple[int, ...]) -> str:
        """The word of a parameter."""
        if tensor is None:
            return "-"
        if tuple(tensor.shape) != shape:
            raise NotComposed(f"a parameter has shape {tuple(tensor.shape)}, expected {shape}")
        name = self.name_of(tensor)
        if name in self.used:
            raise NotComposed(f"parameter {name!r} is used twice")
        self.used.append(name)
        return name

    def vector(self, operand: Any, width: int, change: Callable[[Any], Any] | None = None) -> str | None:
        """The word of a number, a constant or a parameter by which a value of this width is shifted or
        scaled; None of a value.
        """
        if isinstance(operand, _Value):
            return None
        if isinstance(operand, _Parameter):
            if change is not None:
                raise NotComposed(f"parameter {operand.name!r} is negated or divided by")
            return self.parameter(operand.tensor, (width,))
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return _number(operand if change is None else change(operand))
        if not isinstance(operand, _Constant):
            raise NotComposed(f"{type(operand).__name__} is no operand of something that runs fused")
        found = operand.value()
        if isinstance(found, (int, float)):
            return _number(found if change is None else change(found))
        if not isinstance(found, Tensor) or found.numel() not in (1, width) or found.shape[:-1].numel() != 1:
            raise NotComposed("a constant is no number and no vector of the width of what it acts on")
        if found.ndim and found.is_floating_point() and found.dtype != self.dtype:
            raise NotComposed(f"a constant is {found.dtype}, the parameters are {self.dtype}")

        def value() -> Tensor:
            now = operand.value() if change is None else change(operand.value())
            return now.detach().reshape(-1).expand(width)

        self.constants.append(value)
        return f"c{len(self.constants) - 1}"

    def described(self, result: _Value) -> Composition:
        """The operations that the result depends on, numbered anew."""
        needed = {result.number}
        for i in reversed(range(len(self.operations))):
            if i + 1 in needed:
                needed.update(self.operations[i][1])
        if 0 not in needed:
            raise NotComposed("its output does not depend on the states")
        numbers = {old: new for new, old in enumerate(sorted(needed))}
        words = [word for i, op in enumerate(self.operations) if i + 1 in needed for word in op[2]]
        names = [name for name in self.named if name in words]
        if len(names) < len(self.named):
            missing = next(name for name in self.named if name not in words)
            raise NotComposed(f"parameter {missing!r} does not act on the output")
        if any(q.dtype != self.dtype for q in self.named.values()):
            raise NotComposed("its parameters are of several types")
        written = {name: f"p{k}" for k, name in enumerate(names)}
        kept = [word for word in words if word in {f"c{k}" for k in range(len(self.constants))}]
        written |= {word: f"c{k}" for k, word in enumerate(kept)}
        lines = [str(self.widths[0])]
        for i, (kind, inputs, arguments) in enumerate(self.operations):
            if i + 1 in needed:
                own = [str(numbers[v]) for v in inputs] + [written.get(word, word) for word in arguments]
                lines.append(" ".join([kind, *own]))
        constants = tuple(self.constants[int(word[1:])] for word in kept)
        description = "composed:" + "|".join(lines)
        return Composition(description, self.widths[0], result.width, tuple(names), constants)


IMPURE = {"bernoulli", "normal", "dropout", "empty", "multinomial"}


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def _flat(argument: Any) -> list[Any]:
    if isinstance(argument, (tuple, list)):
        return [leaf for part in argument for leaf in _flat(part)]
    return [argument]


def _now(argument: Any) -> Any:
    return argument.value() if isinstance(argument, _Constant) else argument


# Modules


def _linear(t: _Translation, v: _Value, weight: Tensor, bias: Tensor | None) -> _Value:
    units, window = weight.shape
    if window != v.width:
        raise NotComposed(f"a linear layer reads {window} inputs, expected {v.width}")
    words = t.parameter(weight, (units, window)), t.parameter(bias, (units,))
    return t.emit("linear", (v,), (str(units), *words), units)


def _norm(
    t: _Translation, v: _Value, kind: str, shape: Any, eps: float | None, *tensors: Tensor | None
) -> _Value:
    if tuple(shape) != (v.width,):
        raise NotComposed(f"a normalisation is over {tuple(shape)}, expected ({v.width},)")
    small = torch.finfo(t.dtype).eps if eps is None else eps
    v = t.emit("normalize", (v,), (kind, _number(small)), v.width)
    if all(tensor is None for tensor in tensors):
        return v
    words = tuple(t.parameter(tensor, (v.width,)) for tensor in tensors)
    return t.emit("affine", (v,), (*words, "-")[:2], v.width)


def _activation(t: _Translation, v: Any, kind: str, *numbers: float) -> _Value:
    if not isinstance(v, _Value):
        raise NotComposed(f"{kind} acts on something that does not depend on the states")
    return t.emit(kind, (v,), tuple(_number(n) for n in numbers), v.width)


def _leaky(t: _Translation, v: Any, slope: float) -> _Value:
    if slope < 0:
        raise NotComposed(f"a leaky ReLU has a negative slope, {slope}")
    return _activation(t, v, "leakyrelu", slope)


def _elu(t: _Translation, v: Any, alpha: float) -> _Value:
    if alpha <= 0:
        raise NotComposed(f"an ELU has alpha {alpha}, expected more than 0")
    return _activation(t, v, "elu", alpha)


def _gelu(t: _Translation, v: Any, approximate: str) -> _Value:
    return _activation(t, v, "gelutanh" if approximate == "tanh" else "gelu")


def _dropout(t: _Translation, v: _Value, m: Any, name: str) -> _Value:
    if m.training and m.p > 0:
        raise NotComposed(f"{name} is a dropout in training mode")
    return v


MODULES: dict[type, Callable[[_Translation, _Value, Any, str], _Value]] = {
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
}
"""Modules of torch's that run fused, by their exact type."""


# Functions and methods


def _affine(t: _Translation, v: _Value, scale: str, shift: str) -> _Value:
    return t.emit("affine", (v,), (scale, shift), v.width)


def _add(t: _Translation, a: Any, b: Any, alpha: float = 1) -> _Value:
    if alpha != 1:
        raise NotComposed("an addition has an alpha")
    if not isinstance(a, _Value):
        a, b = b, a
    if not isinstance(a, _Value):
        raise NotComposed("a parameter is shifted before it acts on the states")
    word = t.vector(b, a.width)
    if word is not None:
        return _affine(t, a, "-", word)
    if a.width != b.width:
        raise NotComposed(f"values of {a.width} and {b.width} components are added")
    # the later one first: it is more likely read by nobody else, and the sum takes its place
    return t.emit("add", (a, b) if a.number > b.number else (b, a), (), a.width)


def _sub(t: _Translation, a: Any, b: Any, alpha: float = 1) -> _Value:
    if alpha != 1:
        raise NotComposed("a subtraction has an alpha")
    if isinstance(b, _Value):
        return _add(t, _affine(t, b, "-1.0", "-"), a)
    word = t.vector(b, a.width, operator.neg)
    assert word is not None
    return _affine(t, a, "-", word)


def _mul(t: _Translation, a: Any, b: Any) -> _Value:
    if not isinstance(a, _Value):
        a, b = b, a
    if not isinstance(a, _Value):
        raise NotComposed("a parameter is scaled before it acts on the states")
    word = t.vector(b, a.width)
    if word is None:
        raise NotComposed("two values are multiplied")
    return _affine(t, a, word, "-")


def _div(t: _Translation, a: Any, b: Any) -> _Value:
    if not isinstance(a, _Value):
        raise NotComposed("something is divided by a value")
    word = t.vector(b, a.width, lambda c: 1 / c)
    if word is None:
        raise NotComposed("something is divided by a value")
    return _affine(t, a, word, "-")


def _bound(operand: Any, missing: float) -> float:
    if operand is None:
        return missing
    found = operand.value() if isinstance(operand, _Constant) else operand
    if isinstance(operand, _Constant) or not isinstance(found, (int, float)):
        raise NotComposed("a clamp has a bound that is no number")
    return found


def _clamp(t: _Translation, v: Any, min: Any = None, max: Any = None) -> _Value:
    low, high = _bound(min, -1e38), _bound(max, 1e38)
    return _activation(t, v, "clamp", low, high)


def _join(t: _Translation, tensors: Any, dim: int = 0) -> _Value:
    if dim not in (1, -1) or not all(isinstance(v, _Value) for v in tensors):
        raise NotComposed("a concatenation is of something else than values, or not along their components")
    if len(tensors) == 1:
        return tensors[0]
    return t.emit("join", tuple(tensors), (), sum(v.width for v in tensors))


def _part(t: _Translation, v: _Value, first: int, count: int) -> _Value:
    if count < 1:
        raise NotComposed("a part of a value is empty")
    return v if count == v.width else t.emit("part", (v,), (str(first), str(count)), count)


def _item(t: _Translation, v: Any, index: Any) -> Any:
    if not isinstance(v, _Value):
        return v[index] if isinstance(v, tuple) and isinstance(index, int) else _refuse_index()
    if not isinstance(index, tuple) or len(index) != 2:
        _refuse_index()
    rows, columns = index
    if rows is not Ellipsis and rows != slice(None):
        _refuse_index()
    places = range(v.width)
    if isinstance(columns, slice) and all(
        isinstance(e, (int, type(None))) for e in (columns.start, columns.stop, columns.step)
    ):
        chosen = list(places[columns])
    elif isinstance(columns, list) and all(type(i) is int and -v.width <= i < v.width for i in columns):
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
    return _join(t, [_part(t, v, run[0], len(run)) for run in runs], -1)


def _refuse_index() -> Any:
    raise NotComposed("a value is indexed by something else than [:, a:b] or [:, [i, j, ...]]")


def _split(t: _Translation, v: _Value, size: Any, dim: int = 0) -> tuple[_Value, ...]:
    if dim not in (1, -1):
        raise NotComposed("a value is split, but not along its components")
    if type(size) is int:
        size = [min(size, v.width - first) for first in range(0, v.width, size)]
    if sum(size) != v.width:
        raise NotComposed("the parts of a value are not all of it")
    return tuple(_part(t, v, sum(size[:k]), count) for k, count in enumerate(size))


def _chunk(t: _Translation, v: _Value, chunks: int, dim: int = 0) -> tuple[_Value, ...]:
    return _split(t, v, -(-v.width // chunks), dim)


def _function_linear(t: _Translation, input: _Value, weight: Any, bias: Any = None) -> _Value:
    if not isinstance(weight, _Parameter) or not isinstance(bias, (_Parameter, type(None))):
        raise NotComposed("a linear layer has a weight or bias that is no parameter")
    return _linear(t, input, weight.tensor, None if bias is None else bias.tensor)


def _function_norm(kind: str) -> Callable[..., _Value]:
    def norm(
        t: _Translation,
        input: _Value,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float | None = 1e-5 if kind == "layer" else None,
    ) -> _Value:
        tensors = [None if q is None else q.tensor for q in (weight, bias)]
        return _norm(t, input, kind, normalized_shape, eps, *tensors)

    if kind == "layer":
        return norm

    def rms(
        t: _Translation, input: _Value, normalized_shape: Any, weight: Any = None, eps: Any = None
    ) -> _Value:
        return norm(t, input, normalized_shape, weight, None, eps)

    return rms


def _same(t: _Translation, v: Any, *_: Any, **__: Any) -> Any:
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
}
"""Functions and methods that run fused, by name."""

_TARGETS = {
    target: make
    for name, make in FUNCTIONS.items()
    for space in (operator, torch, functional)
    if name not in ("layer_norm", "rms_norm") or space is functional  # torch's own have other arguments
    for target in [getattr(space, name, None)]
    if target is not None
}

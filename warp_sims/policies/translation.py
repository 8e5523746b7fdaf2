"""A graph of torch.fx on its way to a fused policy: values, constants and parameters, node by node.

What a module or function becomes is said by a grammar, see composing.py; the operations and the line they are
written in are those of kernels/policy/description.py.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

__all__ = [
    "BATCH",
    "Composition",
    "Constant",
    "Grammar",
    "Leaves",
    "NotComposed",
    "Parameter",
    "Translation",
    "Value",
]


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
class Constant:
    """What depends on no state: a number, or a function of buffers."""

    value: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter itself."""

    name: str
    tensor: Tensor


class _Batch:
    """The number of states, which no policy knows."""


BATCH = _Batch()


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the fused policy: (n, width) in torch, or (n, rows, columns)."""

    number: int
    width: int
    rows: int = 0
    """0 of a value with one axis."""
    turned: bool = False
    """Whether the components of two axes stand as (columns, rows)."""

    @property
    def columns(self) -> int:
        """Of a value with two axes."""
        return self.width // self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the axis of the states."""
        return (self.rows, self.columns) if self.rows else (self.width,)


class Leaves(fx.Tracer):
    """Takes torch's own modules as they are and looks into all others.

    It traces copies of the modules whose calls come here. fx itself puts its call into `torch.nn.Module` for
    as long as it traces, and modules that other threads call meanwhile would go through it.
    """

    def __init__(self, modules: Collection[type]) -> None:
        super().__init__()
        self._modules_known = modules
        self._copies: dict[int, tuple[nn.Module, nn.Module, str]] = {}  # the original, its copy, its name
        self._attributes: dict[str, Any] = {}  # proxies of parameters and buffers that were asked for

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """The graph of a module's forward.

        Raises:
            NotComposed: the forward changes attributes.
        """
        self.root = self._copied(root, "")
        copies = list(self._copies.values())
        self.tensor_attrs = {
            value: f"{name}.{key}".lstrip(".")
            for _, copy, name in copies
            for key, value in copy.__dict__.items()
            if isinstance(value, Tensor)
        }
        self.graph = fx.Graph(tracer_cls=type(self))
        forward, arguments = self.create_args_for_root(type(root).forward, True, concrete_args)
        out = forward(*arguments)
        self.create_node("output", "output", (self.create_arg(out),), {})
        for original, copy, _ in copies:
            own, other = original.__dict__, copy.__dict__
            if own.keys() != other.keys() or any(own[k] is not other[k] for k in own if k != "_modules"):
                raise NotComposed("its forward changes its attributes")
        return self.graph

    def _copied(self, module: nn.Module, name: str) -> nn.Module:
        known = self._copies.get(id(module))
        if known is not None:
            return known[1]
        kind = type(module)

        def call(own: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.call_module(own, functools.partial(kind.forward, own), args, kwargs)

        def attribute(own: nn.Module, key: str) -> Any:
            return self.getattr(key, kind.__getattr__(own, key), self._attributes)

        own = {"__call__": call, "__getattr__": attribute, "__module__": kind.__module__}
        copy = object.__new__(type(kind.__name__, (kind,), own))
        copy.__dict__.update(module.__dict__)
        self._copies[id(module)] = module, copy, name
        copy.__dict__["_modules"] = {
            key: None if part is None else self._copied(part, f"{name}.{key}".lstrip("."))
            for key, part in module._modules.items()
        }
        return copy

    def path_of_module(self, mod: nn.Module) -> str:
        """The name of a copy."""
        return next(name for _, copy, name in self._copies.values() if copy is mod)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A node for torch's own modules, what its forward does for others."""
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return self.create_proxy("call_module", name, args, kwargs)
        return forward(*args, **kwargs)

    proxy_buffer_attributes = True  # what is computed of buffers is computed anew when they change

    def create_arg(self, a: Any) -> Any:
        """What a node is given: of tensors only those that are the module's own."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise NotComposed("it computes with a tensor that is none of its buffers")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__bases__[0] in self._modules_known or super().is_leaf_module(m, module_qualified_name)


def first_line(error: Exception) -> str:
    """Of its message."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def number(value: float) -> str:
    """The word of a number."""
    return repr(float(value))


class Grammar(NamedTuple):
    """What is known, each with what translates it, called with the translation and the arguments."""

    modules: Mapping[type, Callable[..., Value]]
    """By exact type; called with the value, the module and its name."""
    functions: Mapping[Any, Callable[..., Any]]
    methods: Mapping[str, Callable[..., Any]]


class Translation:
    """One graph on its way to a description."""

    def __init__(self, module: nn.Module, in_size: int, grammar: Grammar) -> None:
        self.module, self.grammar = module, grammar
        self.named = dict(module.named_parameters())
        first = next(iter(self.named.values()), None)
        if first is None:
            raise NotComposed("it has no parameters")
        self.dtype = first.dtype
        self.state = Value(0, in_size)
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
        if not isinstance(result, Value) or result.number == 0:
            raise NotComposed("its output is not a function of the states alone")
        if result.rows:
            raise NotComposed(
                f"its output has shape (n, {result.rows}, {result.columns}), expected (n, controls)"
            )
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
            make = self.grammar.modules.get(type(part))
            if make is None:
                raise NotComposed(f"{node.target} is a {type(part).__name__}, which does not run fused")
            before = node.all_input_nodes
            if getattr(part, "inplace", False) and any(
                b.op == "placeholder" or len(b.users) > 1 for b in before
            ):
                raise NotComposed(f"{node.target} changes a value in place that is read elsewhere")
            if len(args) != 1 or kwargs or not isinstance(args[0], Value):
                raise NotComposed(f"{node.target} is called on something else than one value")
            return make(self, args[0], part, str(node.target))
        name = str(node.target) if node.op == "call_method" else _name(node.target)
        values = [
            a for a in _flat((args, tuple(kwargs.values()))) if isinstance(a, (Value, Parameter, _Batch))
        ]
        if not values and node.target in _OF_SIZES and all(type(a) is int for a in args) and not kwargs:
            target: Any = node.target
            return target(*args)  # of sizes, which a trace has as numbers
        if not values:
            return self.constant(node, args, kwargs)
        is_method = node.op == "call_method"
        known: Mapping[Any, Callable[..., Any]] = (
            self.grammar.methods if is_method else self.grammar.functions
        )
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
            return Parameter(self.name_of(tensor), tensor)
        if not isinstance(tensor, Tensor):
            return tensor
        if tensor.requires_grad:
            raise NotComposed(f"{name} requires a gradient and is no parameter")
        return Constant(lambda: getattr(owner, last))

    def name_of(self, tensor: Tensor) -> str:
        for name, parameter in self.named.items():
            if parameter is tensor:
                return name
        raise NotComposed("it reads a parameter that is not its own")

    def constant(self, node: fx.Node, args: Any, kwargs: Any) -> Constant:
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
        return Constant(value)

    def emit_alike(self, kind: str, v: Value, arguments: tuple[str, ...]) -> Value:
        """An operation that takes every component for itself."""
        return dataclasses.replace(v, number=self.emit(kind, (v,), arguments, v.width).number)

    def emit(self, kind: str, inputs: tuple[Value, ...], arguments: tuple[str, ...], width: int) -> Value:
        self.operations.append((kind, tuple(v.number for v in inputs), arguments))
        self.widths.append(width)
        return Value(len(self.widths) - 1, width)

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

    def vector(self, operand: Any, v: Value, change: Callable[[Any], Any] | None = None) -> str | None:
        """The word of a number, a constant or a parameter by which a value is shifted or scaled; None of a
        value.
        """
        if isinstance(operand, Value):
            return None
        if isinstance(operand, Parameter):
            if change is not None:
                raise NotComposed(f"parameter {operand.name!r} is negated or divided by")
            return self.parameter(operand.tensor, v.shape)
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return number(operand if change is None else change(operand))
        if not isinstance(operand, Constant):
            raise NotComposed(f"{type(operand).__name__} is no operand of something that runs fused")
        found = operand.value()
        if isinstance(found, (int, float)):
            return number(found if change is None else change(found))
        if not isinstance(found, Tensor) or not _fits(found.shape, v.shape):
            raise NotComposed("a constant is no number and no tensor of the shape of what it acts on")
        if found.ndim and found.is_floating_point() and found.dtype != self.dtype:
            raise NotComposed(f"a constant is {found.dtype}, the parameters are {self.dtype}")

        def value() -> Tensor:
            now = operand.value() if change is None else change(operand.value())
            now = now.detach().reshape(now.shape[-len(v.shape) :]).expand(v.shape)
            return (now.mT if v.turned else now).reshape(-1)

        self.constants.append(value)
        return f"c{len(self.constants) - 1}"

    def described(self, result: Value) -> Composition:
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
        return Composition("|".join(lines), self.widths[0], result.width, tuple(names), constants)


_OF_SIZES = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg}
IMPURE = {"bernoulli", "normal", "dropout", "empty", "multinomial"}


def _fits(shape: Sequence[int], own: Sequence[int]) -> bool:
    """Whether a constant is the same for all states and leaves the shape of a value as it is."""
    whole = (1,) * (1 + len(own) - len(shape)) + tuple(shape)
    return len(whole) == 1 + len(own) and all(n in (1, k) for n, k in zip(whole, (1, *own)))


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def _flat(argument: Any) -> list[Any]:
    if isinstance(argument, (tuple, list)):
        return [leaf for part in argument for leaf in _flat(part)]
    return [argument]


def _now(argument: Any) -> Any:
    return argument.value() if isinstance(argument, Constant) else argument

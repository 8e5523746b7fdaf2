"""Which modules run fused: traced once for each state that a module is in, and tried before they are trusted.

What a module's forward does may depend on everything that its attributes say. A trace is therefore kept with
a record of these, and made anew where they have changed. Plain chains of torch's own modules hide nothing;
any other module is called once, on a few random rows, and what it gives must be what its operations give.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..bridge.passes.operations import evaluate
from ..bridge.runtime.compat import is_changed, transforming
from .composing import MODULES, compose
from .translation import Composition, NotComposed

__all__ = ["composition_of", "record_of", "tensors_of"]

_ROWS = 5
"""Rows on which a module is tried."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Accepted difference of a module and its operations, relative to the largest output."""
_OWN = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes that every module has, which are looked at one by one."""
_SIMPLE = (type(None), bool, int, float, str, bytes, torch.dtype)
"""Types whose values are compared as they are."""
_LONG = 100
"""Entries of a list or dictionary up to which a record holds them."""
_DEPTH = 4
"""Levels of attributes of attributes that a record holds."""

_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Composition | str]] = weakref.WeakKeyDictionary()
"""What has been found of a module, with the record it was found under."""


def composition_of(policy: nn.Module, in_size: int) -> Composition | str:
    """A module as operations that run fused, or why it is evaluated by torch."""
    modules = _modules_of(policy)
    for module in modules:
        if is_changed(module):
            return f"{type(module).__name__} has a hook or a forward of its own"
        if type(module).__call__ is not nn.Module.__call__:
            return f"{type(module).__name__} has a __call__ of its own"
    record = in_size, *map(_record, modules)
    known = _known.get(policy)
    if known is not None and known[0] == record:
        return known[1]
    if not _is_plain(policy) and transforming():
        return "it is called for the first time inside a transform of torch.func"
    kept = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in policy.modules()]
    found = _composed(policy, in_size)
    if record != (in_size, *record_of(policy)):
        # what it was traced with must not stay there
        for module, own, parameters, buffers in kept:
            module.__dict__.clear()
            module.__dict__.update(own)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        return "its forward changes its attributes"
    _known[policy] = record, found
    return found


def tensors_of(policy: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """Parameters by their names."""
    found = []
    for name in names:
        *path, last = name.split(".")
        owner: Any = policy
        for part in path:
            owner = owner._modules[part]
        found.append(owner._parameters[last])
    return found


def _composed(policy: nn.Module, in_size: int) -> Composition | str:
    names = [name for name, _ in policy.named_parameters(remove_duplicate=False)]
    if len(names) > len(dict(policy.named_parameters())):
        return "parameters are shared"
    if any(type(q) not in (nn.Parameter, Tensor) for q in policy.parameters()):
        return "a parameter is of a type of its own"
    try:
        found = compose(policy, in_size)
        if not _is_plain(policy):
            _try(policy, found)
    except NotComposed as reason:
        return str(reason)
    return found


def _is_plain(policy: nn.Module) -> bool:
    """Whether a module is a chain of torch's own, whose forward is known."""
    return all(
        type(m) in MODULES or type(m) is nn.Sequential or type(m).__module__ == "warp_sims.policies.networks"
        for m in policy.modules()
    )


def _try(policy: nn.Module, found: Composition) -> None:
    """Raises NotComposed unless a module gives what its operations give."""
    tensors = [q.detach() for q in tensors_of(policy, found.parameters)]
    first = tensors[0]
    if first.device.type == "meta":
        raise NotComposed("its parameters have no values")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, found.in_size, generator=generator, dtype=torch.float64, device="cpu")
    x = x.to(first.device, first.dtype)
    before = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    with (
        torch.no_grad(),
        torch.random.fork_rng([first.device] if first.device.type == "cuda" else []),
        torch.autocast(first.device.type, enabled=False),
    ):
        try:
            own = policy(x.clone())
        except Exception as error:
            raise NotComposed(f"it failed on states of shape {tuple(x.shape)}: {error}") from error
        ours = evaluate(found.description, tensors, [constant() for constant in found.constants], x)
    for name, buffer in policy.named_buffers():
        if not torch.equal(buffer, before[name]):
            with torch.no_grad():
                buffer.copy_(before[name])
            raise NotComposed(f"it writes its buffer {name!r}")
    if not isinstance(own, Tensor) or own.shape != ours.shape or own.dtype != ours.dtype:
        raise NotComposed("it gives something else than its graph")
    off = (own - ours).abs().max()
    if not bool(off <= _TOLERANCE.get(first.dtype, 1e-2) * (1 + ours.abs().max())):
        raise NotComposed(f"it gives other controls than its graph (by {float(off):.3g})")


def record_of(policy: nn.Module) -> Any:
    """What the forward of a module may depend on, without the values of its tensors: to be compared."""
    return tuple(map(_record, _modules_of(policy)))


def _modules_of(policy: nn.Module) -> list[nn.Module]:
    """A module and all its parts: `modules()`, in less time than the rest of a record takes."""
    found, last = [policy], 0
    while last < len(found):
        found += [part for part in found[last]._modules.values() if part is not None and part not in found]
        last += 1
    return found


def _record(module: nn.Module) -> Any:
    """The same of a module without its parts."""
    # lists, and no calls for what nearly all attributes are: this runs for every part at every rollout
    own = module.__dict__
    return (
        type(module),
        type(module).forward,
        _kinds(module._parameters),
        _kinds(module._buffers),
        tuple(module._modules),
        tuple(
            [
                (k, type(v), v) if type(v) in _SIMPLE else (k, _state(v, _DEPTH))
                for k, v in own.items()
                if k not in _OWN
            ]
        ),
    )


def _kinds(tensors: dict[str, Any]) -> Any:
    return tuple([(k, _kind(q)) for k, q in tensors.items()]) if tensors else ()


def _kind(tensor: Any) -> Any:
    return (tensor.shape, tensor.dtype) if isinstance(tensor, Tensor) else type(tensor)


def _state(value: Any, depth: int) -> Any:
    """Something to compare that changes with a value, however it is nested."""
    if isinstance(value, _SIMPLE):
        return type(value), value
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value) or depth == 0:
        return id(value)
    if isinstance(value, (list, tuple, dict)) and len(value) > _LONG:
        return id(value), len(value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_state(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return tuple((repr(k), _state(v, depth - 1)) for k, v in value.items())
    if hasattr(value, "__dict__"):
        return id(value), tuple((k, _state(v, depth - 1)) for k, v in vars(value).items())
    return id(value), repr(value)[:1000]

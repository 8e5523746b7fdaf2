"""Physical parameters of a rollout as users give them, checked."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..bridge.passes.physical import Physical
from ..bridge.passes.physical_check import names_in_loss
from ..bridge.passes.simulator import Simulator
from ..bridge.runtime.arrays import capturing
from ..bridge.runtime.compat import transforming
from ..bridge.runtime.physical import parameter_names, parameter_values
from . import System

__all__ = ["Parameters", "check_parameters"]

Parameters = Mapping[str, Tensor | float] | None
"""Physical parameters by name: a float or a tensor () for all worlds, or a tensor (nworld,)."""


def check_parameters(
    call: str, system: System, parameters: Any, x0: Tensor, members: int = 0, own_loss: bool = False
) -> tuple[Physical | None, tuple[Tensor, ...]]:
    """Returns given parameters as the bridge takes them, stacked for an ensemble of `members`; None for none.

    `own_loss`: whether the rollout has the system's own loss.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """
    if parameters is None:
        return None, ()
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"{call}: parameters is of type {type(parameters).__name__}, expected a dictionary of tensors by "
            'name such as {"pole_mass": mass}, or None'
        )
    if not parameters:
        return None, ()
    names = _names(system)
    for name in parameters:
        if name not in names:
            listed = ", ".join(names) or "none"
            raise ValueError(
                f"{call}: parameters has {name!r}, expected numbers of the physics of this "
                f"{type(system).__name__}: {listed}"
            )
    given = tuple(_checked(call, name, value, x0) for name, value in parameters.items())
    if own_loss and not isinstance(system, Simulator) and not torch.compiler.is_compiling():
        read = names_in_loss(system.number, x0.device).intersection(parameters)
        if read:
            raise ValueError(
                f"{call}: parameters has {sorted(read)[0]!r}, which the loss of {type(system).__name__} "
                "reads, expected numbers of the step alone: the loss takes those of the system; pass a "
                "callable loss"
            )
    # a tensor that is mapped over does not tell what it holds
    wanted = transforming() or any(q.requires_grad for q in given)
    columns = tuple(names.index(name) for name in parameters)
    if members:
        given = tuple(q.expand(members, *q.shape) for q in given)
    return Physical(tuple(parameters), columns, _values(system), wanted, members), given


def _names(system: System) -> tuple[str, ...]:
    if isinstance(system, Simulator):
        return tuple(system.parameter_names)
    return parameter_names(system.number)


def _values(system: System) -> tuple[float, ...]:
    if isinstance(system, Simulator):
        return tuple(system.parameter_values)
    return parameter_values(system.number)


def _checked(call: str, name: str, value: Any, x0: Tensor) -> Tensor:
    what = f"parameters[{name!r}]"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = x0.new_tensor(float(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{call}: {what} is of type {type(value).__name__}, expected a tensor or a number")
    nworld = x0.shape[-2]
    if tuple(value.shape) not in ((), (nworld,)):
        raise ValueError(
            f"{call}: {what} has shape {tuple(value.shape)}, expected () for all worlds or (nworld,) = "
            f"({nworld},), one a world"
        )
    if value.dtype != x0.dtype:
        raise TypeError(
            f"{call}: {what} is {value.dtype}, expected {x0.dtype}, the dtype of the states; convert one "
            "with .to()"
        )
    if value.device != x0.device:
        raise ValueError(
            f"{call}: {what} is on {value.device}, expected {x0.device}, the device of the states; move one "
            "with .to()"
        )
    # tracing a compiled graph, values are not known; while a CUDA graph is captured, they cannot be read
    if torch.compiler.is_compiling() or capturing(value.device) or value.numel() == 0:
        return value
    if not transforming() and not bool(torch.isfinite(value.detach()).all()):
        raise ValueError(f"{call}: {what} holds NaN or infinity, expected finite numbers")
    return value

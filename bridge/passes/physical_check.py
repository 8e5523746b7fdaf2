"""Checks the cotangents of physical parameters that Warp generated, and finds which parameters a system's
loss reads; in float64, before their first use.

An adjoint that is right for states and controls can still be wrong for the fields of a struct.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
import warp as wp
from torch import Tensor

from ...kernels.sweeps.physical import has_generated_vjp
from ..runtime.arrays import warp_device
from ..runtime.physical import WithValues, parameter_names, parameter_values, prepared_with
from ..runtime.registry import find, prepare
from . import sweeps
from .foreign_check import TOLERANCES, Source, compare, differences
from .generated_check import drawn_points, jacobians

SPREAD = 0.05
"""Of the numbers that are tried, relative to those of the system."""


def checked_with(
    number: int, values: Tensor, nworld: int, wanted: bool
) -> contextlib.AbstractContextManager[WithValues]:
    """`prepared_with`, behind `verify`."""
    verify(number, values.device)
    return prepared_with(number, values, nworld, wanted)


def verify(number: int, device: torch.device) -> None:
    """Raises ValueError if a generated cotangent of a parameter disagrees with finite differences."""
    _verify(number, device, id(warp_device(device)))


@functools.cache
def _verify(number: int, device: torch.device, _served: int) -> None:
    system: Any = find(number)
    p = prepare(number, torch.float64, device)
    if not has_generated_vjp(p.functions):
        return
    with torch.inference_mode(False), torch.no_grad():
        q = drawn_points(system, p)
        values = drawn_values(number, q)
        source = Source(
            f"{type(system).__name__}: the cotangents of its parameters that Warp generates are wrong",
            "Warp's adjoint",
            "Warp is right about straight code, branches and static loops of up to 4 turns; rewrite the "
            "step, or give its device functions parameters=warp_sims.ParameterFunctions(...), by hand",
            inputs=parameter_names(number),
        )
        given = pulled_back(number, q, values)
        tolerance = TOLERANCES[torch.float64]
        compare(source, given, differences(lambda v: stepped(number, q, v), values, tolerance), tolerance, 0)


def drawn_values(number: int, q: Tensor, seed: int = 1) -> Tensor:
    """Numbers near those of the system for every point, (points, count)."""
    own = q.new_tensor(parameter_values(number))
    draw = torch.Generator().manual_seed(seed)
    off = torch.randn(q.shape[0], own.shape[0], generator=draw, dtype=q.dtype).to(q.device)
    scales = getattr(find(number), "parameter_scales", (1.0,) * own.shape[0])
    return own + SPREAD * torch.where(own == 0.0, off.abs() * q.new_tensor(scales), own * off)


def stepped(number: int, q: Tensor, values: Tensor) -> Tensor:
    """Next states of points (points, state_size + control_size) by numbers (points, count)."""
    n = find(number).state_size
    with prepared_with(number, values, q.shape[0], False) as own:
        x, u = q[:, :n].contiguous(), q[:, n:].unsqueeze(0).contiguous()
        return sweeps.simulate(own.prepared, x, u)[1]


def pulled_back(number: int, q: Tensor, values: Tensor) -> Tensor:
    """Derivatives of the next state by the numbers (points, state_size, count), by the adjoint sweep."""
    points, n = q.shape[0], find(number).state_size
    with prepared_with(number, values.repeat(n, 1), n * points, True) as own:
        jacobians(number, own.prepared, q)  # which leaves these there
        return own.adjoint(1)[0].view(n, points, -1).transpose(0, 1)


@functools.cache
def names_in_loss(number: int, device: torch.device) -> frozenset[str]:
    """Names of the parameters that the system's own loss reads; the loss always takes the system's own
    values.
    """
    p = prepare(number, torch.float64, device)
    if p.functions.loss is None:
        return frozenset()
    own = p.functions.parameters
    numbers = dict(zip(parameter_names(number), parameter_values(number)))
    with torch.inference_mode(False), torch.no_grad():
        x = drawn_points(find(number), p)[:, : p.state_size].contiguous()

        def cost(changed: dict[str, float]) -> Tensor:
            params = p.functions.Params()
            params.assign(p.params)
            fields: dict[str, Any] = changed
            if own is not None and own.array:
                words = getattr(p.params, own.array).numpy().copy()
                for place, value in zip(own.places, changed.values()):
                    words[[*place[1:]]] += value - words[place[0]]
                    words[place[0]] = value
                fields = {own.array: wp.array(words, dtype=p.dtype, device=p.device)}
            elif own is not None and own.fields is not None:
                fields = own.fields(changed)
            for name, value in fields.items():
                setattr(params, name, value)
            return sweeps.costs(dataclasses.replace(p, params=params), x)

        before = cost(numbers)
        moved = {name: cost(numbers | {name: 1.1 * value + 0.1}) for name, value in numbers.items()}
        return frozenset(name for name, after in moved.items() if not torch.equal(after, before))

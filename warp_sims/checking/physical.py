"""The cotangents of a system's physical parameters by themselves."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..bridge.passes.physical_check import drawn_values, pulled_back, stepped, verify
from ..bridge.runtime.physical import parameter_names
from ..systems import System
from .compare import Tolerance, compare, names, settled
from .differences import Derivative, differentiate
from .report import Comparison

__all__ = ["check_parameters"]

MOST = 24
"""Points that are looked at, of those where the step is."""


def check_parameters(
    system: System, both: Tensor, device: torch.device, double: Tolerance
) -> Iterator[Comparison]:
    """Cotangents of all numbers of the physics against finite differences, in float64.

    Args:
        both: Points (points, state_size + control_size).
    """
    number, own = system.number, parameter_names(system.number)
    if not own:
        return
    verify(number, device)
    q = both[:: -(-both.shape[0] // MOST)].to(device)
    values = drawn_values(number, q)
    inputs = q.shape[1]

    def step(rows: Tensor) -> Tensor:
        rows = rows.to(device)
        return stepped(number, rows[:, :inputs].contiguous(), rows[:, inputs:].contiguous()).cpu()

    rows = torch.cat((q, values), dim=1).cpu()
    whole = differentiate(step, rows, rows.abs().amax(0).clamp(min=1e-3))
    expected = Derivative(*(part[:, :, inputs:] for part in whole))
    found = pulled_back(number, q, values).cpu()
    yield compare(
        "parameters_vjp by value",
        "float64",
        "finite differences",
        found,
        expected.value,
        names("x_next", q.shape[1] - system.control_size),
        list(own),
        double,
        usable=settled(expected, None, double),
    )

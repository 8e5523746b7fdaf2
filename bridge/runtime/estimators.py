"""Systems that differ from another system only in what their adjoint does with a cotangent."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...kernels.sweeps.clipped import clipped
from ...kernels.system import DeviceFunctions
from .contract import functions_of
from .registry import find, register


@dataclasses.dataclass(frozen=True)
class ClippedSystem:
    """A system with kernels, whose adjoint clips the norm of the cotangent of each step's next state."""

    number: int
    """Of the system itself."""
    limit: float

    @property
    def state_size(self) -> int:
        return find(self.number).state_size

    @property
    def control_size(self) -> int:
        return find(self.number).control_size

    @property
    def has_loss(self) -> bool:
        return find(self.number).has_loss

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return clipped(functions_of(find(self.number), dtype), dtype)

    def parameters(self, dtype: Any) -> Any:
        params = self.device_functions(dtype).Params()
        params.base, params.limit = find(self.number).parameters(dtype), self.limit
        return params


def with_clip(number: int, limit: float) -> int:
    """Returns the number of the clipped system; the same for the same limit."""
    return register(ClippedSystem(number, limit))

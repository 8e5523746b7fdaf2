"""Systems by number: torch operators carry numbers and strings, not objects.

Append-only: a number, once given, stands for the same system for the life of the process.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
import warp as wp

from ...kernels.sweeps.fused_adjoint import make_fused_adjoint
from ...kernels.sweeps.fused_rollout import make_fused_rollout
from ...kernels.sweeps.rollout import SystemKernels, make_system_kernels
from ...kernels.sweeps.streamed import make_cuda_system_kernels
from ...kernels.system import DeviceFunctions
from .arrays import WARP_DTYPE, warp_device
from .contract import check_contract, functions_of, is_generated
from .launches import PREPARING


class SystemLike(Protocol):
    """What the bridge needs of a system; `warp_sims.System` is one."""

    @property
    def state_size(self) -> int: ...
    @property
    def control_size(self) -> int: ...
    def device_functions(self, dtype: Any) -> DeviceFunctions: ...
    def parameters(self, dtype: Any) -> Any: ...


_systems: list[SystemLike] = []
_numbers: dict[Any, int] = {}


def register(system: SystemLike) -> int:
    """Returns the number of a system; equal systems share one."""
    number = _numbers.get(system)
    if number is None:
        number = _numbers[system] = len(_systems)
        _systems.append(system)
    return number


def find(number: int) -> SystemLike:
    """Returns the system that has this number."""
    return _systems[number]


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A system's kernels and parameters for one dtype and device. Compared by identity: `prepare` makes
    one of each.
    """

    torch_dtype: torch.dtype
    torch_device: torch.device
    state_size: int
    control_size: int
    dtype: Any
    """Warp's scalar type."""
    device: Any
    """Warp's device."""
    functions: DeviceFunctions
    params: Any
    """The filled struct."""
    kernels: SystemKernels

    @property
    def itemsize(self) -> int:
        """Bytes of a scalar."""
        return self.torch_dtype.itemsize

    @property
    def fused_rollout(self) -> wp.Kernel:
        """Forward sweep with the policy fused in."""
        return make_fused_rollout(self.functions, self.dtype, self.device.is_cpu)

    def fused_adjoint(self, fields: int) -> wp.Kernel:
        """Adjoint sweep with the policy fused in, for CPUs."""
        return make_fused_adjoint(self.functions, self.dtype, fields)


def prepare(number: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Returns what a launch for this system, dtype and device needs; the same object each time."""
    key = (number, dtype, device)
    found = _prepared.get(key)
    if found is None:
        with PREPARING:
            found = _prepared.get(key) or _prepare(*key)
            _verify(number, found)
            _prepared[key] = found
    return found


_verified: set[tuple[int, str]] = set()
"""Systems whose generated adjoints have been checked, by kind of device."""


def _verify(number: int, found: Prepared) -> None:
    """Raises ValueError unless adjoints that Warp generated are right."""
    system, key = find(number), (number, found.torch_device.type)
    if key in _verified or not is_generated(system, found.dtype):
        return
    from ..passes.generated_check import verify  # which needs what is here

    double = torch.float64
    verify(
        system, number, found if found.torch_dtype == double else _prepare(number, double, found.torch_device)
    )
    _verified.add(key)


_prepared: dict[tuple[int, torch.dtype, torch.device], Prepared] = {}


def _prepare(number: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    system = find(number)
    scalar = WARP_DTYPE[dtype]
    functions, params = functions_of(system, scalar), system.parameters(scalar)
    on = warp_device(device)
    check_contract(system, functions, params, scalar, on)
    # those for large states call adjoints from functions, behind which Warp emits generated ones
    cuda = device.type == "cuda" and not is_generated(system, scalar)
    return Prepared(
        dtype,
        device,
        system.state_size,
        system.control_size,
        scalar,
        on,
        functions,
        params,
        make_cuda_system_kernels(functions, scalar)
        if cuda
        else make_system_kernels(functions, scalar, device.type == "cpu"),
    )

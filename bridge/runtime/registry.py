"""Systems by number, because torch operators take numbers and strings, but no objects.

The list only grows: a number stands for the same system as long as the process lives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import warp as wp

from ...kernels.policy.functions import make_network_functions
from ...kernels.policy.layout import BLOCK
from ...kernels.sweeps.adjoint import make_adjoint
from ...kernels.sweeps.forms import block_form
from ...kernels.sweeps.fused_rollout import make_fused_rollout
from ...kernels.sweeps.rollout import SystemKernels, make_kernels, make_wide_kernels
from ...kernels.system import DeviceFunctions
from .arrays import WARP_DTYPE, warp_device
from .contract import check_contract, functions_of, has_generated_adjoint
from .launches import PREPARING


class SystemLike(Protocol):
    """What the bridge needs of a system; `warp_sims.System` is one."""

    @property
    def state_size(self) -> int: ...
    @property
    def control_size(self) -> int: ...
    @property
    def has_loss(self) -> bool: ...
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


@functools.cache
def has_loss(number: int) -> bool:
    """Whether the system that has this number has a loss of its own."""
    return find(number).has_loss


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
    wide: SystemKernels | None = None
    """The same for more worlds a thread, for sweeps without a policy on a CPU."""

    @property
    def open_loop(self) -> SystemKernels:
        """Kernels of the sweeps without a policy."""
        return self.wide or self.kernels

    @property
    def itemsize(self) -> int:
        """Bytes of a scalar."""
        return self.torch_dtype.itemsize

    def fused_rollout(self) -> wp.Kernel:
        """Forward sweep with the policy fused in."""
        return make_fused_rollout(self.functions, self.dtype, self.device.is_cpu)

    def fused_adjoint(self, fields: int) -> wp.Kernel:
        """Adjoint sweep with the policy's backward pass in it, for CPUs."""
        form = self.functions.block or block_form(self.functions)
        policy = make_network_functions(self.dtype)
        return make_adjoint(self.functions, self.dtype, fields, form, BLOCK, policy)


def prepare(number: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Returns what a launch for this system, dtype and device needs; the same object each time."""
    # by the identity of Warp's device, which has no hash
    key = (number, dtype, device, id(warp_device(device)))
    found = _prepared.get(key)
    if found is None:
        with PREPARING:
            found = _prepared.get(key) or _prepare(number, dtype, device)
            _verify(number, found)
            _prepared[key] = found
    return found


VERIFIERS: list[Callable[[Any, int, Prepared], None]] = []
"""Functions that compare generated adjoints with finite differences, see passes/generated_check.py."""

_verified: set[tuple[int, int]] = set()
"""Systems whose generated adjoints have been checked, by device."""


def _verify(number: int, found: Prepared) -> None:
    """Raises ValueError unless adjoints that Warp generated are right."""
    system, key = find(number), (number, id(found.device))
    if key in _verified or not has_generated_adjoint(system, found.dtype):
        return
    double = found
    if found.torch_dtype != torch.float64:
        double = _prepare(number, torch.float64, found.torch_device)
    (verify,) = VERIFIERS
    verify(system, number, double)
    _verified.add(key)


_prepared: dict[tuple[int, torch.dtype, torch.device, int], Prepared] = {}


def _prepare(number: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    system = find(number)
    scalar = WARP_DTYPE[dtype]
    on = warp_device(device)
    functions, params = functions_of(system, scalar), system.parameters(scalar)
    check_contract(system, functions, params, scalar)
    return Prepared(
        dtype,
        device,
        system.state_size,
        system.control_size,
        scalar,
        on,
        functions,
        params.to(wp.device_from_torch(device)),  # a struct may hold arrays
        make_kernels(functions, scalar, on.is_cpu),
        make_wide_kernels(functions, scalar) if on.is_cpu else None,
    )

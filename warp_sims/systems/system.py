"""The base class of all systems, and the checks of fields that the built-in systems share."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..bridge.runtime import registry as _numbers
from ..bridge.runtime.contract import functions_of
from ..kernels.system import BlockFunctions, DeviceFunctions, MemoryFunctions, ParameterFunctions

__all__ = ["BlockFunctions", "DeviceFunctions", "MemoryFunctions", "ParameterFunctions", "System"]


@dataclasses.dataclass(frozen=True)
class System(abc.ABC):
    """Base of every system, built in or your own: a frozen dataclass whose fields are the numbers of the
    physics.

    A subclass supplies

    - `state_size` and `control_size`, ints (class attributes or properties),
    - `device_functions(dtype)`: a `DeviceFunctions` with `step`, `step_vjp` and, for a loss of its own,
      `loss` and `loss_vjp`. Without `step_vjp` Warp generates the adjoints. Cache it (`functools.lru_cache`
      on a module-level factory): kernels are compiled once for each object it returns. Do not use `from
      __future__ import annotations` in that file, because Warp reads the annotations.
    - `initial_states(n, seed, split)`, if it is to be trained from the command line; or `sample_states`,
      whose arguments are checked already and whose array becomes a tensor of the right dtype.

    and may override `parameters` (by default every field of the Warp struct is filled from the dataclass
    field of that name), `running_reduction`, `draw(axes, state)`, `show_controls`, `done`, `train_defaults`
    and `bench_defaults`. A method `observe(states)`, in torch, says what a policy sees (`Observed`).

    The first call compiles the kernels, later ones load them from Warp's cache. `warp_sims.check(system)`
    says whether the adjoint is that of the step.
    """

    running_reduction: ClassVar[Literal["mean", "sum"]] = "mean"
    """How the running loss reduces the cost of the states x_1 ... x_T over time."""

    show_controls: ClassVar[bool] = False
    """Whether animations show the controls over time below the picture."""

    done: ClassVar[Callable[..., torch.Tensor] | None] = None
    """Which states end an episode: a function of states (nworld, state_size) that returns (nworld,), bool.
    None: no state does.
    """

    train_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Defaults of `warp-sims train` and `profile` for this system: some of `horizon`, `loss`, `control_cost`,
    `zero_last` and `policy` ("mlp" or "wavecnn"). Others are those of the cart-pole: 100 steps, the loss of
    the last state.
    """

    bench_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Settings of `warp-sims bench` for this system: some of `numbers` (fields of the system that differ from
    its defaults), `scaled` (name and values of the field that `--scaling` varies), `tolerance` (relative, of
    a gradient in float32, by default 2e-5), and `last_layer` (a factor on the last layer of the policy, by
    default 1).
    """

    _number: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise TypeError(
                    f"{type(self).__name__}: {field.name} is a tensor that requires a gradient, expected a "
                    "number: a system is fixed, the gradient would be dropped; pass float(value)"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{type(self).__name__}: {field.name} is {value!r}, expected a finite number"
                )
        # an operator of a compiled graph finds the system by this number
        self.number  # noqa: B018

    @property
    @abc.abstractmethod
    def state_size(self) -> int:
        """Number of components of a state."""

    @property
    @abc.abstractmethod
    def control_size(self) -> int:
        """Number of components of a control."""

    @abc.abstractmethod
    def device_functions(self, dtype: Any) -> DeviceFunctions:
        """Device functions for `dtype`, `warp.float32` or `warp.float64`."""

    def parameters(self, dtype: Any) -> Any:
        """The parameter struct, filled from the fields of the same names."""
        params = functions_of(self, dtype).Params()
        names = {field.name for field in dataclasses.fields(self)}
        for name in params._cls.vars:
            if name not in names:
                raise AttributeError(
                    f"{type(self).__name__}: its Params struct has a field {name!r} that the dataclass "
                    f"lacks; "
                    "add the field or override parameters(dtype)"
                )
            setattr(params, name, getattr(self, name))
        return params

    def initial_states(
        self,
        n: int,
        seed: int = 42,
        split: Literal["train", "test"] = "train",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns `n` initial states (n, state_size) of the training or the test set."""
        check_draw(f"{type(self).__name__}.initial_states", n, seed, split)
        return torch.as_tensor(self.sample_states(n, seed, split)).to(dtype)

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray | torch.Tensor:
        """Initial states (n, state_size), the same for the same seed; the arguments are checked."""
        raise NotImplementedError(
            f"{type(self).__name__} has no initial states of its own; define initial_states(self, n, "
            f"seed=42, split='train')"
        )

    @property
    def has_loss(self) -> bool:
        """Whether the system has a loss of its own, so that loss='final' and loss='running' exist."""
        import warp as wp

        return functions_of(self, wp.float32).loss is not None

    @property
    def number(self) -> int:
        """Number under which the torch operators find this system; equal systems share one."""
        number = self._number
        if number is None:
            number = _numbers.register(self)
            object.__setattr__(self, "_number", number)
        return number

    def __getstate__(self) -> dict[str, Any]:
        # the number belongs to this process
        return {k: v for k, v in self.__dict__.items() if k != "_number"}


def require(system: System, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{type(system).__name__}: {name} is {getattr(system, name)!r}, expected {expected}")


def require_positive(system: System, *names: str) -> None:
    for name in names:
        require(system, name, 0 < getattr(system, name) < math.inf, "a finite number above 0")


def require_nonnegative(system: System, *names: str) -> None:
    for name in names:
        require(system, name, 0 <= getattr(system, name) < math.inf, "a finite number of at least 0")


def require_one(system: System, *names: str) -> None:
    for name in names:
        require(system, name, getattr(system, name) >= 1, "at least 1")


def check_types(system: System) -> None:
    """Ints for int fields, True or False for bool ones, real numbers for float ones (stored as float)."""
    known = {"int": (int, "an int"), "float": ((int, float), "a number"), "bool": (bool, "True or False")}
    for field in dataclasses.fields(system):
        kind = field.type if isinstance(field.type, str) else field.type.__name__
        if kind not in known:
            continue
        value, (allowed, expected) = getattr(system, field.name), known[kind]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
            raise TypeError(
                f"{type(system).__name__}: {field.name} is {value!r} of type {type(value).__name__}, "
                f"expected {expected}"
            )
        if kind == "float":
            object.__setattr__(system, field.name, float(value))


def check_draw(call: str, n: int, seed: int, split: str) -> None:
    for name, value in (("n", n), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{call}: {name} is {value!r} of type {type(value).__name__}, expected an int")
    if n < 0:
        raise ValueError(f"{call}: n is {n}, expected at least 0")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{call}: seed is {seed}, expected 0 ... 2**32 - 1")
    if split not in ("train", "test"):
        raise ValueError(f'{call}: split is {split!r}, expected "train" or "test"')

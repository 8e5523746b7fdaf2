"""Simulated systems: what a user names, with its sizes, parameters and data sets; the physics itself is in kernels/."""

import abc
import dataclasses
import importlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from .bridge import registry as _numbers
from .kernels import cartpole as _cartpole
from .kernels.system import DeviceFunctions

__all__ = ["CartPole", "DeviceFunctions", "System", "registry", "resolve"]


@dataclasses.dataclass(frozen=True)
class System(abc.ABC):
    """Base of every system, built in or your own: a frozen dataclass whose fields are the numbers of the physics.

    A subclass supplies

    - `state_size` and `control_size`, ints (class attributes or properties),
    - `device_functions(dtype)`: a `DeviceFunctions` with `step`, `step_vjp` and, for losses of its own, `loss` and `loss_vjp`. Cache it
      (`functools.lru_cache` on a module-level factory): kernels are compiled once for each object it returns. Do not use
      `from __future__ import annotations` in that file, Warp reads the annotations.
    - `initial_states(n, seed, split)`, if it is to be trained from the command line.

    and may override `parameters` (by default every field of the Warp struct is filled from the dataclass field of that name),
    `running_reduction` and `draw`. The first call compiles the kernels, later ones load them from Warp's cache.
    """

    running_reduction: ClassVar[Literal["mean", "sum"]] = "mean"
    """How the running loss reduces the cost of the states x_1 ... x_T over time."""

    _number: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}: {field.name} is {value!r}, expected a finite number")
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
        params = self.device_functions(dtype).Params()
        names = {field.name for field in dataclasses.fields(self)}
        for name in params._cls.vars:
            if name not in names:
                raise AttributeError(
                    f"{type(self).__name__}: its Params struct has a field {name!r} that the dataclass lacks; "
                    "add the field or override parameters(dtype)"
                )
            setattr(params, name, getattr(self, name))
        return params

    def initial_states(
        self, n: int, seed: int = 42, split: Literal["train", "test"] = "train", *, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Returns `n` initial states (n, state_size) of the training or the test set."""
        raise NotImplementedError(
            f"{type(self).__name__} has no initial states of its own; define initial_states(self, n, seed=42, split='train')"
        )

    @property
    def has_loss(self) -> bool:
        """Whether the system has a loss of its own, so that loss='final' and loss='running' exist."""
        import warp as wp

        return self.device_functions(wp.float32).loss is not None

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


def _require(system: System, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{type(system).__name__}: {name} is {getattr(system, name)!r}, expected {expected}")


def _check_types(system: System) -> None:
    """Ints for int fields, real numbers for float fields (stored as float)."""
    for field in dataclasses.fields(system):
        value = getattr(system, field.name)
        whole = field.type in (int, "int")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise TypeError(
                f"{type(system).__name__}: {field.name} is {value!r} of type {type(value).__name__}, "
                f"expected {'an int' if whole else 'a number'}"
            )
        if not whole:
            object.__setattr__(system, field.name, float(value))


def _check_draw(call: str, n: int, seed: int, split: str) -> None:
    for name, value in (("n", n), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{call}: {name} is {value!r} of type {type(value).__name__}, expected an int")
    if n < 0:
        raise ValueError(f"{call}: n is {n}, expected at least 0")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{call}: seed is {seed}, expected 0 ... 2**32 - 1")
    if split not in ("train", "test"):
        raise ValueError(f'{call}: split is {split!r}, expected "train" or "test"')


@dataclasses.dataclass(frozen=True)
class CartPole(System):
    """A cart with any number of independent poles, pushed by a force; the task is to swing all poles up.

    State [x, v, q_1, w_1, q_2, w_2, ...]: cart position [m] and velocity [m/s], pole angles [rad] from upright and rates [rad/s].
    Control [force] in N. Cost of a state: 1 - mean cos q, 0 with every pole upright. Equations: kernels/cartpole.py.
    The defaults are the published values; the total mass is 1.1 kg whatever the number of poles.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    poles: int = 4
    """Number of poles, at least 1."""
    dt: float = 0.01
    """Time step [s]."""
    gravity: float = 9.8
    """Gravity [m/s^2]."""
    pole_mass: float = 0.1
    """Mass of a pole [kg]."""
    total_mass: float = 1.1
    """Mass of cart and pole [kg]."""
    pole_length: float = 0.5
    """Half the length of a pole [m]."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self, "poles", self.poles >= 1, "at least 1")
        for name in ("dt", "total_mass", "pole_length"):
            _require(self, name, getattr(self, name) > 0 and math.isfinite(getattr(self, name)), "a finite number above 0")
        _require(self, "pole_mass", 0 <= self.pole_mass < self.total_mass, f"at least 0 and below total_mass={self.total_mass}")
        super().__post_init__()

    @property
    def state_size(self) -> int:
        return 2 + 2 * self.poles

    @property
    def control_size(self) -> int:
        return 1

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _cartpole.make_functions(self.poles, dtype)

    def initial_states(
        self, n: int, seed: int = 42, split: Literal["train", "test"] = "train", *, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Returns initial states (n, state_size): poles hanging, x, v and w uniform in [-1, 1], q in pi +- pi/6.

        n = 256 and seed 42 give the published training and test sets, bit for bit in float32.
        """
        _check_draw("CartPole.initial_states", n, seed, split)
        random = np.random.RandomState(seed)
        shape = (n, 1 + self.poles, 2)
        draw = random.rand(*shape).astype(np.float32)
        if split == "test":
            draw = random.rand(*shape).astype(np.float32)
        states = 2 * draw - 1
        states[:, 1:, 0] = np.pi + states[:, 1:, 0] * np.pi / 6
        return torch.from_numpy(states.reshape(n, self.state_size)).to(dtype)


registry: Mapping[str, type[System]] = MappingProxyType({"cartpole": CartPole})
"""Systems by the name they have on the command line."""


def resolve(name: str) -> type[System]:
    """Returns the class of a system by its registered name or as `module:Class`.

    Raises:
        ValueError: no such system.
    """
    if name in registry:
        return registry[name]
    known = ", ".join(sorted(registry))
    if ":" not in name:
        raise ValueError(f"unknown system {name!r}, expected {known}, or module:Class for one of your own")
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"system {name!r}: {error}; expected module:Class with the module importable from here") from error
    if not (isinstance(found, type) and issubclass(found, System)):
        raise ValueError(f"system {name!r} is {found!r}, expected a class that derives from warp_sims.System")
    return found

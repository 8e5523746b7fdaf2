"""Simulated systems: what a user names, with its sizes, parameters and data sets; the physics itself is
in kernels/.
"""

import abc
import dataclasses
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from .bridge import registry as _numbers
from .kernels import cartpole as _cartpole
from .kernels import guidance as _guidance
from .kernels import quantum as _quantum
from .kernels.system import BlockFunctions, DeviceFunctions

__all__ = [
    "BlockFunctions",
    "CartPole",
    "DeviceFunctions",
    "GuidanceByRepulsion",
    "QuantumControl",
    "System",
    "registry",
    "resolve",
]


@dataclasses.dataclass(frozen=True)
class System(abc.ABC):
    """Base of every system, built in or your own: a frozen dataclass whose fields are the numbers of the
    physics.

    A subclass supplies

    - `state_size` and `control_size`, ints (class attributes or properties),
    - `device_functions(dtype)`: a `DeviceFunctions` with `step`, `step_vjp` and, for losses of its own,
      `loss` and `loss_vjp`. Cache it (`functools.lru_cache` on a module-level factory): kernels are compiled
      once for each object it returns. Do not use `from __future__ import annotations` in that file, Warp
      reads the annotations.
    - `initial_states(n, seed, split)`, if it is to be trained from the command line.

    and may override `parameters` (by default every field of the Warp struct is filled from the dataclass
    field of that name), `running_reduction`, `draw(axes, state)` and `show_controls`. The first call compiles
    the kernels, later ones load them from Warp's cache.
    """

    running_reduction: ClassVar[Literal["mean", "sum"]] = "mean"
    """How the running loss reduces the cost of the states x_1 ... x_T over time."""

    show_controls: ClassVar[bool] = False
    """Whether animations show the controls over time below the picture."""

    _number: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
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
        params = self.device_functions(dtype).Params()
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
        raise NotImplementedError(
            f"{type(self).__name__} has no initial states of its own; define initial_states(self, n, "
            f"seed=42, split='train')"
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

    State [x, v, q_1, w_1, q_2, w_2, ...]: cart position [m] and velocity [m/s], pole angles [rad] from
    upright and rates [rad/s]. Control [force] in N. Cost of a state: 1 - mean cos q, 0 with every pole
    upright. Equations: kernels/cartpole.py. The defaults are the published values; the total mass is 1.1 kg
    whatever the number of poles.

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
            _require(
                self,
                name,
                getattr(self, name) > 0 and math.isfinite(getattr(self, name)),
                "a finite number above 0",
            )
        _require(
            self,
            "pole_mass",
            0 <= self.pole_mass < self.total_mass,
            f"at least 0 and below total_mass={self.total_mass}",
        )
        super().__post_init__()

    @property
    def state_size(self) -> int:
        return 2 + 2 * self.poles

    @property
    def control_size(self) -> int:
        return 1

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _cartpole.make_functions(self.poles, dtype)

    def draw(self, axes: Any, state: np.ndarray) -> None:
        """Draws the cart on its rail and every pole in a colour of its own, upright up."""
        from .drawing import draw_cartpole

        draw_cartpole(axes, self, state)

    def initial_states(
        self,
        n: int,
        seed: int = 42,
        split: Literal["train", "test"] = "train",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns initial states (n, state_size): poles hanging, x, v and w uniform in [-1, 1], q in pi +-
        pi/6.

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


@dataclasses.dataclass(frozen=True)
class GuidanceByRepulsion(System):
    """Drivers herd evaders to the origin of the plane: evaders flee drivers, each driver steers around the
    herd.

    State per object, drivers first: [p_x, p_y, v_x, v_y] in m and m/s. Control per driver: [radial,
    orthogonal], the acceleration per distance [1/s^2] along and across the line from the herd to the driver.
    Cost of a state: mean squared evader coordinate [m^2].
    Equations: kernels/guidance.py. The defaults are the published values; distances in the forces are |r| +
    softening.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    drivers: int = 2
    """Number of drivers, at least 1."""
    evaders: int = 4
    """Number of evaders, at least 1."""
    dt: float = 4 / 60
    """Time step [s]."""
    driver_drag: float = 1.0
    """Drag of a driver [1/s]."""
    driver_repulsion: float = 0.2
    """Strength of the repulsion between drivers [m^2/s^2]."""
    evader_drag: float = 4.0
    """Drag of an evader [1/s]."""
    evader_repulsion: float = 15.0
    """Strength of the repulsion of an evader by a driver [m^2/s^2]."""
    flocking: float = 0.2
    """Strength of the force between evaders [m/s^2]."""
    flocking_length: float = 0.5
    """Distance at which the force between evaders changes sign [m]."""
    softening: float = 0.1
    """Added to every distance in a force [m]."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("drivers", "evaders"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("dt", "softening"):
            _require(
                self,
                name,
                getattr(self, name) > 0 and math.isfinite(getattr(self, name)),
                "a finite number above 0",
            )
        super().__post_init__()

    @property
    def state_size(self) -> int:
        return 4 * (self.drivers + self.evaders)

    @property
    def control_size(self) -> int:
        return 2 * self.drivers

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _guidance.make_functions(self.drivers, self.evaders, dtype)

    def draw(self, axes: Any, state: np.ndarray) -> None:
        """Draws drivers, evaders and their velocities in the plane, the target at the origin."""
        from .drawing import draw_guidance

        draw_guidance(axes, self, state)

    def initial_states(
        self,
        n: int,
        seed: int = 42,
        split: Literal["train", "test"] = "train",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns initial states (n, state_size) at rest: drivers at distance 3 ... 4, a herd of unit size
        centred at distance 1 ... 2.

        Training and test set are drawn at once. n = 256 and seed 42 give the published sets.
        """
        _check_draw("GuidanceByRepulsion.initial_states", n, seed, split)
        random = np.random.RandomState(seed)
        total = 2 * n

        def uniform() -> np.ndarray:
            return random.rand(total).astype(np.float32)

        def annulus(inner: float) -> np.ndarray:
            angle, radius = np.float32(2 * np.pi) * uniform(), uniform() + np.float32(inner)
            return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)

        states = np.zeros((total, self.drivers + self.evaders, 2, 2), dtype=np.float32)
        for i in range(self.drivers):
            states[:, i, 0] = annulus(3.0)
        center = annulus(1.0)
        for j in range(self.drivers, self.drivers + self.evaders):
            states[:, j, 0] = center + np.stack(
                [uniform() - np.float32(0.5), uniform() - np.float32(0.5)], axis=-1
            )
        part = states[:n] if split == "train" else states[n:]
        return torch.from_numpy(part.reshape(n, self.state_size)).to(dtype)


@dataclasses.dataclass(frozen=True)
class QuantumControl(System):
    """A quantum particle in a box, steered by the strength of a linear potential into an eigenstate of the
    empty box.

    State [Re psi_1, Im psi_1, Re psi_2, ...] at the inner grid points, sum |psi|^2 = 1. Control [field
    strength]. Cost of a state: 1 - |<e_target, psi>|^2; the running loss sums it over the steps. Units with
    hbar = 1, kinetic term without the factor 1/2.
    Equations: kernels/quantum.py. The defaults are the published values.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    running_reduction: ClassVar[Literal["mean", "sum"]] = "sum"
    show_controls: ClassVar[bool] = True

    points: int = 32
    """Inner grid points, at least 4."""
    dt: float = 0.0625
    """Time step."""
    target: int = 3
    """Eigenstate to reach, 1 (the ground state) ... points."""
    length: float = 2.0
    """Width of the box."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self, "points", self.points >= 4, "at least 4")
        _require(
            self,
            "target",
            1 <= self.target <= self.points,
            f"1 (the ground state) ... {self.points} (points)",
        )
        for name in ("dt", "length"):
            _require(
                self,
                name,
                getattr(self, name) > 0 and math.isfinite(getattr(self, name)),
                "a finite number above 0",
            )
        super().__post_init__()

    @property
    def state_size(self) -> int:
        return 2 * self.points

    @property
    def control_size(self) -> int:
        return 1

    @property
    def dx(self) -> float:
        """Distance of two grid points."""
        return self.length / (self.points + 1)

    def eigenstate(self, n: int) -> np.ndarray:
        """Eigenstate n of the empty box at the grid points, (points,), normalised to sum e^2 = 1; n = 1
        is the ground state.
        """
        e = np.sin(np.pi * n * np.arange(1, self.points + 1) / (self.points + 1))
        return e / np.sqrt(np.sum(e**2))

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _quantum.make_functions(self.points, dtype)

    def parameters(self, dtype: Any) -> Any:
        params = _quantum.make_params(self.points, dtype)()
        params.dt, params.dx = self.dt, self.dx
        params.kappa, params.field = 2 * self.dx**2 / self.dt, self.dx**3
        params.eigenstate = self.eigenstate(self.target).tolist()
        return params

    def draw(self, axes: Any, state: np.ndarray) -> None:
        """Draws the probability density of the particle, that of the target state behind it."""
        from .drawing import draw_quantum

        draw_quantum(axes, self, state)

    def initial_states(
        self,
        n: int,
        seed: int = 42,
        split: Literal["train", "test"] = "train",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns initial states (n, state_size): random superpositions of the two lowest eigenstates with
        random phases.

        Training and test set are drawn at once. n = 256 and seed 42 give the published sets, bit for bit
        in float32.
        """
        _check_draw("QuantumControl.initial_states", n, seed, split)
        lowest = np.stack([self.eigenstate(1), self.eigenstate(2)]).astype(np.float32)
        if self.points == 32:
            # Drawn with another library's sine: what it gave is shipped, not recomputed.
            with np.load(Path(__file__).parent / "data" / "quantum_initial_states.npz") as published:
                if (n, seed) == (256, 42):
                    return torch.from_numpy(published[split].reshape(n, self.state_size)).to(dtype)
                lowest = published["eigenstates"]
        random = np.random.RandomState(seed)
        # Rounded to float32 before anything is computed, as the published sets are.
        weights = [random.normal(size=(2 * n, 1)).astype(np.float32) for _ in lowest]
        phases = [random.uniform(0, 2 * np.pi, (2 * n, 1)).astype(np.float32) for _ in lowest]
        norm = np.sqrt(weights[0] ** 2 + weights[1] ** 2)
        first, second = (c * np.exp(1j * phase) / norm * e for c, phase, e in zip(weights, phases, lowest))
        psi = first + second
        part = psi[:n] if split == "train" else psi[n:]
        states = np.stack([part.real, part.imag], axis=-1).astype(np.float32)
        return torch.from_numpy(states.reshape(n, self.state_size)).to(dtype)


registry: Mapping[str, type[System]] = MappingProxyType(
    {"cartpole": CartPole, "guidance": GuidanceByRepulsion, "quantum": QuantumControl}
)
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
        raise ValueError(
            f"system {name!r}: {error}; expected module:Class with the module importable from here"
        ) from error
    if not (isinstance(found, type) and issubclass(found, System)):
        raise ValueError(f"system {name!r} is {found!r}, expected a class that derives from warp_sims.System")
    return found

"""Guidance by repulsion as users name it; the physics is in kernels/systems/guidance.py."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from ..kernels.system import DeviceFunctions
from ..kernels.systems import guidance as _guidance
from .system import System, check_types, require_one, require_positive

__all__ = ["GuidanceByRepulsion"]


@dataclasses.dataclass(frozen=True)
class GuidanceByRepulsion(System):
    """Drivers herd evaders to the origin of the plane: evaders flee drivers, each driver steers around the
    herd.

    State per object, drivers first: [p_x, p_y, v_x, v_y] in m and m/s. Control per driver: [radial,
    orthogonal], the acceleration per distance [1/s^2] along and across the line from the herd to the driver.
    Cost of a state: mean squared evader coordinate [m^2].
    Equations: kernels/systems/guidance.py. The defaults are the published values; distances in the forces are
    |r| + softening.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    train_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"horizon": 60, "loss": "running", "control_cost": 0.1}
    )
    # a full last layer drives the agents into collisions, where float32 keeps four digits
    bench_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"last_layer": 0.1})

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
        check_types(self)
        require_one(self, "drivers", "evaders")
        require_positive(self, "dt", "softening")
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
        from ..pictures.drawing import draw_guidance

        draw_guidance(axes, self, state)

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray:
        """Initial states (n, state_size) at rest: drivers at distance 3 ... 4, a herd of unit size
        centred at distance 1 ... 2.

        Training and test set are drawn at once. n = 256 and seed 42 give the published sets.
        """
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
        return part.reshape(n, self.state_size)

"""The quadrotor as users name it; the physics is in kernels/systems/quadrotor.py."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from ..kernels.system import DeviceFunctions
from ..kernels.systems import quadrotor as _quadrotor
from .system import System, check_types, require_positive

__all__ = ["Quadrotor"]


@dataclasses.dataclass(frozen=True)
class Quadrotor(System):
    """A quadrotor that is to fly to the origin and stay there: a rigid body under collective thrust, with an
    inner loop on body rates.

    State [p (3), v (3), q (4), o (3)]: position [m] and velocity [m/s] in the world, z up; unit quaternion
    (w, x, y, z) from body to world; body rates [rad/s]. Control [thrust, rates (3)], without units: 0 hovers;
    a thrust of 1 doubles the thrust, and a rate of 1 asks for `rate`. Controls are not bounded. Cost of a
    state: |p|^2 + velocity_cost |v|^2 + rate_cost |o|^2.

    Equations: kernels/systems/quadrotor.py. Mass, inertia, drag and the control rate are those of DiffAero's
    position control.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    show_controls: ClassVar[bool] = True
    train_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"horizon": 60, "loss": "running", "control_cost": 0.1}
    )

    dt: float = 1 / 30
    """Time step [s], for which controls are held."""
    gravity: float = 9.81
    """Gravity [m/s^2]."""
    mass: float = 1.0
    """Mass [kg]."""
    inertia: float = 0.01
    """Moment of inertia about the body's x and y axes [kg m^2]."""
    inertia_z: float = 0.02
    """The same about its z axis [kg m^2]."""
    drag: float = 0.6
    """Drag of the air, linear in the velocity [kg/s]."""
    thrust: float = 9.81
    """Thrust where the control is 0 [N]."""
    rate: float = 3.0
    """Body rate that a control of 1 asks for [rad/s]."""
    gain: float = 0.06
    """Gain of the inner loop about x and y [N m s/rad]."""
    gain_z: float = 0.05
    """Gain of the inner loop about z [N m s/rad]."""
    velocity_cost: float = 0.1
    """Weight of the squared velocity [s^2]."""
    rate_cost: float = 0.01
    """Weight of the squared body rates [m^2 s^2]."""

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "dt", "mass", "inertia", "inertia_z")
        super().__post_init__()

    @property
    def state_size(self) -> int:
        return 13

    @property
    def control_size(self) -> int:
        return 4

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _quadrotor.make_functions(dtype)

    def draw(self, axes: Any, state: np.ndarray) -> None:
        """Draws the quadrotor from the side, x to the right and z up, its thrust and the target."""
        from ..pictures.drawing import draw_quadrotor

        draw_quadrotor(axes, self, state)

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray:
        """Initial states (n, 13): positions uniform in a cube of 4 m about the origin, velocities in
        [-1, 1] m/s, any heading, tilted by up to 30 degrees, rates in [-0.5, 0.5] rad/s.
        """
        random = np.random.RandomState(seed)
        draw = random.rand(2, n, 12)[("train", "test").index(split)]
        heading, tilt, towards = 2 * np.pi * draw[:, 6], np.pi / 6 * draw[:, 7], 2 * np.pi * draw[:, 8]
        # a turn about z, then one about an axis in the plane
        c, s, sin = np.cos(heading / 2), np.sin(heading / 2), np.sin(tilt / 2)
        w, x, y = np.cos(tilt / 2), sin * np.cos(towards), sin * np.sin(towards)
        q = np.stack([w * c, x * c + y * s, y * c - x * s, w * s], axis=1)
        place, speed, turn = 4 * draw[:, :3] - 2, 2 * draw[:, 3:6] - 1, draw[:, 9:] - 0.5
        return np.concatenate([place, speed, q, turn], axis=1)

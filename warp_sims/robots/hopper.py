"""`ws.Hopper`: the hopper of the papers on differentiable simulation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..kernels.system import DeviceFunctions
from ..kernels.systems import hopper as _hopper
from ..kernels.systems.articulated_tables import HINGE, SLIDE
from .articulated import Articulated
from .model import Actuator, Geom, Joint, Limit, Model, Sphere
from .robot import check_settings
from .shapes import Chain, capsule_mass

__all__ = ["Hopper"]

DENSITY = 1000.0
ARMATURE = 1.0
TORQUE = 200.0
DAMPING, LIMIT_DAMPING = 2.0, 10.0  # of the hinges; always there and of every joint
FRICTION = 0.9
FALLEN = -0.45  # q_z below which an episode ends
NOISE = 0.05
UP, AHEAD = (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)
# name, sense of its hinge about y, height of the hinge from the one before it; radius, half length, axis and
# centre of its capsule; limits
PARTS = (
    ("torso", 1.0, 0.0, 0.05, 0.2, UP, (0.0, 0.0, 0.0), None),
    ("thigh", -1.0, -0.2, 0.05, 0.225, UP, (0.0, 0.0, -0.225), (-2.61799, 0.0)),
    ("leg", -1.0, -0.45, 0.04, 0.25, UP, (0.0, 0.0, -0.25), (-2.61799, 0.0)),
    ("foot", -1.0, -0.5, 0.06, 0.195, AHEAD, (0.06, 0.0, 0.0), (-0.785398, 0.785398)),
)


@functools.cache
def hopper_model() -> Model:
    """The hopper's numbers."""
    chain = Chain()
    chain.add("torso", "root x", SLIDE, (1.0, 0.0, 0.0), parent=0, offset=(0.0, 0.0, 1.25))
    link = chain.add("torso", "root z", SLIDE, (0.0, 0.0, 1.0), parent=1, offset=(0.0, 0.0, 0.0))
    spheres: list[Sphere] = []
    geoms: list[Geom] = []
    limits: list[Limit] = []
    for name, sense, height, radius, half, along, centre, limit in PARTS:
        mass, across, own = capsule_mass(radius, half, DENSITY)
        inertia = (own if along[0] else across, across, own if along[2] else across)
        joint = "root pitch" if name == "torso" else name
        link = chain.add(
            name,
            joint,
            HINGE,
            (0.0, sense, 0.0),
            parent=link,
            offset=(0.0, 0.0, height),
            mass=mass,
            centre=centre,
            inertia=inertia,
        )
        for sign in (1, -1):
            end = (centre[0] + sign * half * along[0], 0.0, centre[2] + sign * half * along[2])
            spheres.append(Sphere(link, chain.place(link, end), radius, FRICTION))
        geoms.append(
            Geom(link, "capsule", (radius, half, 0.0), chain.place(link, centre), chain.axes_of(link, along))
        )
        if limit is not None:
            limits.append(Limit(link, *limit))
    joints = [Joint(ARMATURE, LIMIT_DAMPING)] * 3 + [Joint(ARMATURE, DAMPING + LIMIT_DAMPING)] * 3
    return Model(
        name="hopper",
        links=tuple(chain.links),
        joints=tuple(joints),
        actuators=tuple(Actuator(dof, TORQUE, control_low=-1.0, control_high=1.0) for dof in (3, 4, 5)),
        limits=tuple(limits),
        spheres=tuple(spheres),
        geoms=tuple(geoms),
        start=(0.0,) * 6,
    )


@dataclasses.dataclass(frozen=True)
class Hopper(Articulated):
    """A planar robot with one leg that learns to hop forward: the task of the papers on SHAC and AHAC.

    State [q_x, q_z, pitch, thigh, leg, foot, and their rates] in m, rad, m/s, rad/s; q_z is 0 upright.
    Control: torques of thigh, leg and foot as shares of 200 N m, clipped to [-1, 1]; the papers' policies end
    in a tanh. Cost of a state: minus the reward of a step without the cost of its control, see
    kernels/systems/hopper.py; `reward` includes it.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    friction: ClassVar[Literal["linear"]] = "linear"
    approach: ClassVar[bool] = True
    implicit: ClassVar[bool] = False
    slip_speed: ClassVar[float] = 0.1  # of smooth friction, which this is not
    limit_damping: ClassVar[float] = 0.0  # in proportion to the way beyond; theirs is always there
    episode_steps: ClassVar[int] = 1000
    train_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"horizon": 32, "loss": "running"})
    """Control steps after which an episode ends."""
    control_weight: ClassVar[float] = 0.1
    """Weight of the squared control in the reward."""

    dt: float = 1 / 60
    """Control step [s]."""
    substeps: int = 16
    """Equal steps of the integrator in a control step."""
    contact_stiffness: float = 2e4
    """Normal force per depth [N/m]."""
    contact_damping: float = 0.1
    """Damping of the normal force of what comes nearer, in proportion to the depth [s/m]: AHAC's, SHAC's is
    0.05."""
    friction_stiffness: float = 1e3
    """Friction per slip speed below the bound of 0.9 times the undamped normal force [N s/m]."""
    limit_stiffness: float = 1e3
    """Torque of a joint limit per angle beyond it [N m/rad]."""

    def __post_init__(self) -> None:
        check_settings(self)
        super().__post_init__()

    @property
    def model(self) -> Model:
        """The hopper's numbers."""
        return hopper_model()

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return self._numbered(_hopper.make_functions(self.structure, dtype), dtype)

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray:
        """Initial states (n, 12), all components uniform in [-0.05, 0.05]."""
        random = np.random.RandomState((seed + (split == "test")) % 2**32)
        return random.uniform(-NOISE, NOISE, (n, 12))

    def observe(self, states: Tensor) -> Tensor:
        """What the papers' policies see (…, 11) of states (…, 12): all but q_x."""
        return states[..., 1:]

    def reward(self, states: Tensor, controls: Tensor) -> Tensor:
        """Reward (…) of steps from states (…, 12) under controls (…, 3), differentiable."""
        delta = (states[..., 1] + 0.3).clamp(-1.0, 0.3)
        height = torch.where(delta < 0, -200 * delta**2, delta)
        angle = 1 - (states[..., 2] / _hopper.PITCH) ** 2
        return states[..., 6] + height + angle - self.control_weight * (controls**2).sum(-1)

    def fallen(self, states: Tensor) -> Tensor:
        """Whether an episode ends with states (…, 12): the torso is 0.45 m below upright or deeper."""
        return states[..., 1] < FALLEN

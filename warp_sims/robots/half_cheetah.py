"""`ws.HalfCheetah`: a planar runner on two legs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.systems.articulated_tables import HINGE, SLIDE
from .build import Solid, together
from .model import Actuator, Geom, Joint, Limit, Model, Sphere, Spring
from .robot import check_settings
from .runners import Runner
from .shapes import Chain, Vector, capsule

__all__ = ["HalfCheetah"]

MASS = 14.0  # of all of it: the density follows
RADIUS = 0.046
FRICTION = 0.4
ARMATURE = 0.1
# body, the body before it, place of its hinge from the one before it; angle of its capsule about y from
# upright, centre, half length; range, stiffness and damping of the hinge, gear of its motor
LEGS = (
    ("back thigh", "torso", (-0.5, 0.0, 0.0),
     -3.8, (0.1, 0.0, -0.13), 0.145, (-0.52, 1.05), 240.0, 6.0, 120.0),
    ("back shin", "back thigh", (0.16, 0.0, -0.25),
     -2.03, (-0.14, 0.0, -0.07), 0.15, (-0.785, 0.785), 180.0, 4.5, 90.0),
    ("back foot", "back shin", (-0.28, 0.0, -0.14),
     -0.27, (0.03, 0.0, -0.097), 0.094, (-0.4, 0.785), 120.0, 3.0, 60.0),
    ("front thigh", "torso", (0.5, 0.0, 0.0),
     0.52, (-0.07, 0.0, -0.12), 0.133, (-1.0, 0.7), 180.0, 4.5, 120.0),
    ("front shin", "front thigh", (-0.14, 0.0, -0.24),
     -0.6, (0.065, 0.0, -0.09), 0.106, (-1.2, 0.87), 120.0, 3.0, 60.0),
    ("front foot", "front shin", (0.13, 0.0, -0.18),
     -0.6, (0.045, 0.0, -0.07), 0.07, (-0.5, 0.5), 60.0, 1.5, 30.0),
)  # fmt: skip
TORSO = (
    (math.pi / 2, (0.0, 0.0, 0.0), 0.5),
    (0.87, (0.6, 0.0, 0.1), 0.15),
)  # and head: angle, centre, half length


def _direction(angle: float) -> Vector:
    """Of a capsule's axis, turned about y from upright."""
    return (math.sin(angle), 0.0, math.cos(angle))


@functools.cache
def half_cheetah_model() -> Model:
    """The half-cheetah's numbers."""
    capsules: dict[str, list[tuple[float, Vector, float]]] = {"torso": list(TORSO)}
    capsules |= {name: [(angle, centre, half)] for name, _, _, angle, centre, half, *_ in LEGS}
    volume = sum(
        capsule(RADIUS, half, _direction(a), c, 1.0).mass for own in capsules.values() for a, c, half in own
    )

    def solid(name: str) -> Solid:
        return together(
            [capsule(RADIUS, half, _direction(a), c, MASS / volume) for a, c, half in capsules[name]]
        )

    chain = Chain()
    chain.add("torso", "root x", SLIDE, (1.0, 0.0, 0.0), parent=0, offset=(0.0, 0.0, 0.7))
    chain.add("torso", "root z", SLIDE, (0.0, 0.0, 1.0), parent=1, offset=(0.0, 0.0, 0.0))
    spheres: list[Sphere] = []
    geoms: list[Geom] = []

    def body(name: str, joint: str, parent: int, offset: Vector) -> int:
        own = solid(name)
        link = chain.add(
            name,
            joint,
            HINGE,
            (0.0, 1.0, 0.0),
            parent=parent,
            offset=offset,
            mass=own.mass,
            centre=own.centre,
            inertia=own.inertia,
        )
        for angle, centre, half in capsules[name]:
            along = _direction(angle)
            for sign in (1, -1):
                end = (centre[0] + sign * half * along[0], 0.0, centre[2] + sign * half * along[2])
                spheres.append(Sphere(link, chain.place(link, end), RADIUS, FRICTION))
            axes = chain.axes_of(link, along)
            geoms.append(Geom(link, "capsule", (RADIUS, half, 0.0), chain.place(link, centre), axes))
        return link

    links = {"torso": body("torso", "root pitch", 2, (0.0, 0.0, 0.0))}
    for name, before, place, *_ in LEGS:
        links[name] = body(name, name, links[before], place)
    return Model(
        name="half-cheetah",
        links=tuple(chain.links),
        joints=(Joint(0.0, 0.0),) * 3 + tuple(Joint(ARMATURE, leg[8]) for leg in LEGS),
        actuators=tuple(
            Actuator(3 + i, leg[9], control_low=-1.0, control_high=1.0) for i, leg in enumerate(LEGS)
        ),
        springs=tuple(Spring(links[leg[0]], leg[7], 0.0) for leg in LEGS),
        limits=tuple(Limit(links[leg[0]], *leg[6]) for leg in LEGS),
        spheres=tuple(spheres),
        geoms=tuple(geoms),
        start=(0.0,) * 9,
    )


@dataclasses.dataclass(frozen=True)
class HalfCheetah(Runner):
    """A planar robot with two legs that learns to run: gymnasium's HalfCheetah with springs for contact.

    State [x, z, pitch, three hinges of the back leg, three of the front leg, and their rates] in m, rad, m/s,
    rad/s. Control: torques of the six hinges as shares of 120, 90, 60, 120, 60, 30 N m, clipped to [-1, 1].
    Cost of a state: minus its speed along x, see kernels/systems/runners.py; `reward` includes the cost of
    the control. Episodes end only with their time.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    bonus: ClassVar[float] = 0.0
    control_weight: ClassVar[float] = 0.1
    unseen: ClassVar[int] = 1

    dt: float = 1 / 60
    """Control step [s]."""
    substeps: int = 6
    """Equal steps of the integrator in a control step."""
    contact_stiffness: float = 1e4
    """Normal force per depth [N/m]."""
    contact_damping: float = 0.1
    """Damping of the normal force of what comes nearer, in proportion to the depth [s/m]."""
    friction_stiffness: float = 300.0
    """Friction per slip speed below the bound of 0.4 times the undamped normal force [N s/m]."""
    limit_stiffness: float = 1e3
    """Torque of a joint limit per angle beyond it [N m/rad]."""

    def __post_init__(self) -> None:
        check_settings(self)
        super().__post_init__()

    @property
    def model(self) -> Model:
        """The half-cheetah's numbers."""
        return half_cheetah_model()

    def fallen(self, states: Tensor) -> Tensor:
        """Whether an episode ends with states (..., 18): none does."""
        return torch.zeros(states.shape[:-1], dtype=torch.bool, device=states.device)

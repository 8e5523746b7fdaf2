"""`ws.Ant`: a runner on four legs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

from torch import Tensor

from ..kernels.systems.articulated_tables import HINGE
from .build import Solid, together
from .model import Actuator, Geom, Joint, Limit, Model, Sphere
from .robot import check_settings
from .runners import Runner
from .shapes import Chain, Vector, ball, capsule

__all__ = ["Ant"]

DENSITY = 5.0
TORSO, RADIUS = 0.25, 0.08
FRICTION = 1.0
GEAR = 150.0
SHORT, LONG = 0.2, 0.4  # of a leg along x and along y: hip and thigh, shin
HEALTHY = (0.2, 1.0)  # height of the torso
# x and y of each leg, sign of x and of y of its ankle's axis, range of the ankle in degrees
LEGS = (
    ((1, 1), (-1, 1), (30, 70)),
    ((-1, 1), (1, 1), (-70, -30)),
    ((-1, -1), (-1, 1), (-70, -30)),
    ((1, -1), (1, 1), (30, 70)),
)
MOTORS = (3, 0, 1, 2)  # legs in the order of the controls, hip and ankle of each
HEIGHT, BENT = 0.75, 1.0  # where episodes begin: height [m], above the ground with all feet; ankles [rad]


def _bar(length: float, side: tuple[int, int]) -> tuple[Solid, Vector, float, Vector, Vector]:
    """A capsule from a joint outward, as far along x as along y; its axis, half length, centre and end."""
    root = math.sqrt(0.5)
    along = (root * side[0], root * side[1], 0.0)
    end = (length * side[0], length * side[1], 0.0)
    centre = (end[0] / 2, end[1] / 2, 0.0)
    half = length * math.sqrt(0.5)
    return capsule(RADIUS, half, along, centre, DENSITY), along, half, centre, end


@functools.cache
def ant_model() -> Model:
    """The ant's numbers."""
    chain = Chain()
    bars = [_bar(SHORT, side) for side, *_ in LEGS]
    torso = together([ball(TORSO, (0.0, 0.0, 0.0), DENSITY), *(bar[0] for bar in bars)])
    root = chain.float("torso", "root", torso)
    spheres = [Sphere(root, (0.0, 0.0, 0.0), TORSO, FRICTION)]
    geoms = [Geom(root, "sphere", (TORSO, 0.0, 0.0), (0.0, 0.0, 0.0), chain.axes_of(root, (0, 0, 1)))]

    def touch(link: int, bar: tuple[Solid, Vector, float, Vector, Vector]) -> None:
        """The bar's outer end touches, and all of it is drawn; its inner end is that of the bar before."""
        _, along, half, centre, end = bar
        spheres.append(Sphere(link, chain.place(link, end), RADIUS, FRICTION))
        axes = chain.axes_of(link, along)
        geoms.append(Geom(link, "capsule", (RADIUS, half, 0.0), chain.place(link, centre), axes))

    limits = []
    for i, (side, ankle, degrees) in enumerate(LEGS, 1):
        hip = bars[i - 1]
        touch(root, hip)
        parent, offset = root, hip[4]
        axis_of_ankle = (ankle[0] * math.sqrt(0.5), ankle[1] * math.sqrt(0.5), 0.0)
        for name, axis, length, span in (
            ("hip", (0.0, 0.0, 1.0), SHORT, (-30, 30)),
            ("ankle", axis_of_ankle, LONG, degrees),
        ):
            bar = _bar(length, side)
            parent = chain.add(
                f"leg {i}" if name == "hip" else f"foot {i}",
                f"{name} {i}",
                HINGE,
                axis,
                parent=parent,
                offset=offset,
                mass=bar[0].mass,
                centre=bar[0].centre,
                inertia=bar[0].inertia,
            )
            offset = bar[4]
            touch(parent, bar)
            limits.append(Limit(parent, math.radians(span[0]), math.radians(span[1])))
    motors = tuple(
        Actuator(6 + 2 * leg + joint, GEAR, control_low=-1.0, control_high=1.0)
        for leg in MOTORS
        for joint in (0, 1)
    )
    bent = [angle for _, _, span in LEGS for angle in (0.0, math.copysign(BENT, span[0]))]
    return Model(
        name="ant",
        links=tuple(chain.links),
        joints=(Joint(0.0, 0.0),) * 6 + (Joint(1.0, 1.0),) * 8,
        actuators=motors,
        limits=tuple(limits),
        spheres=tuple(spheres),
        geoms=tuple(geoms),
        start=(0.0, 0.0, HEIGHT, 1.0, 0.0, 0.0, 0.0, *bent),
    )


@dataclasses.dataclass(frozen=True)
class Ant(Runner):
    """A robot with four legs that learns to run: gymnasium's Ant with springs for contact.

    State [x, y, z, quaternion w x y z, hip and ankle of each leg, and velocities: of the torso in the world,
    its turning in its own frame, of the hinges] in m, rad, m/s, rad/s. Control: torques of hip and ankle of
    the legs 4, 1, 2, 3 as shares of 150 N m, clipped to [-1, 1]. Cost of a state: minus (its speed along x +
    1), see kernels/systems/runners.py; `reward` includes the cost of the control. An episode ends if the
    height of the torso leaves 0.2 to 1 m. The ant weighs 0.9 kg, so its contact is softer than that of the
    other robots.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    bonus: ClassVar[float] = 1.0
    control_weight: ClassVar[float] = 0.5
    unseen: ClassVar[int] = 2

    dt: float = 1 / 60
    """Control step [s]."""
    substeps: int = 6
    """Equal steps of the integrator in a control step."""
    contact_stiffness: float = 1e3
    """Normal force per depth [N/m]."""
    contact_damping: float = 0.3
    """Damping of the normal force of what comes nearer, in proportion to the depth [s/m]."""
    friction_stiffness: float = 30.0
    """Friction per slip speed below the bound of the undamped normal force [N s/m]."""
    limit_stiffness: float = 1e3
    """Torque of a joint limit per angle beyond it [N m/rad]."""

    def __post_init__(self) -> None:
        check_settings(self)
        super().__post_init__()

    @property
    def model(self) -> Model:
        """The ant's numbers."""
        return ant_model()

    def fallen(self, states: Tensor) -> Tensor:
        """Whether an episode ends with states (..., 29): the torso is lower than 0.2 m or higher than 1 m."""
        return (states[..., 2] < HEALTHY[0]) | (states[..., 2] > HEALTHY[1])

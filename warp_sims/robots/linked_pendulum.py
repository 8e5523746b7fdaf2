"""`ws.LinkedPendulum`: a pendulum of several links on a cart."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import numpy as np

from ..kernels.system import DeviceFunctions
from ..kernels.systems import linked_pendulum as _linked_pendulum
from ..kernels.systems.articulated_tables import HINGE, SLIDE
from ..systems.system import check_types, require_nonnegative, require_one, require_positive
from .articulated import Articulated
from .model import Actuator, Geom, Joint, Model
from .shapes import Chain

__all__ = ["LinkedPendulum"]


@dataclasses.dataclass(frozen=True)
class LinkedPendulum(Articulated):
    """A cart with a chain of links, pushed by a force; the task is to swing all links up and hold them.

    State [x, q_1, ..., q_n, v, w_1, ..., w_n]: cart position [m] and velocity [m/s], the angle [rad] of the
    first link from upright, of each other link from the one before it, and their rates [rad/s]. Control
    [force] in N. Cost of a state: 1 - mean cos of the links' angles from upright, 0 with every link upright.
    Links are thin rods. Equations: kernels/systems/articulated.py, and the cost in linked_pendulum.py there.
    With one link this is the cart-pole of `ws.CartPole(poles=1)` with its default masses and length.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    friction: ClassVar[Literal["linear"]] = "linear"
    approach: ClassVar[bool] = False
    contact_stiffness: ClassVar[float] = 1.0  # nothing touches
    contact_damping: ClassVar[float] = 0.0
    friction_stiffness: ClassVar[float] = 1.0
    slip_speed: ClassVar[float] = 1.0
    limit_stiffness: ClassVar[float] = 0.0
    limit_damping: ClassVar[float] = 0.0

    links: int = 2
    """Number of links, at least 1."""
    dt: float = 0.01
    """Time step [s]."""
    substeps: int = 1
    """Equal steps of the integrator in a time step."""
    gravity: float = 9.8
    """Gravity [m/s^2]."""
    cart_mass: float = 1.0
    """Mass of the cart [kg]."""
    link_mass: float = 0.1
    """Mass of a link [kg]."""
    link_length: float = 1.0
    """Length of a link [m]."""
    damping: float = 0.0
    """Damping of every hinge [N m s/rad]."""
    implicit: bool = False
    """Whether the damping acts on the velocity after a step."""

    def __post_init__(self) -> None:
        check_types(self)
        require_one(self, "links", "substeps")
        require_positive(self, "dt", "cart_mass", "link_mass", "link_length")
        require_nonnegative(self, "damping")
        super().__post_init__()

    @functools.cached_property
    def model(self) -> Model:
        """The pendulum's numbers."""
        chain = Chain()
        link = chain.add(
            "cart", "cart", SLIDE, (1.0, 0.0, 0.0), parent=0, offset=(0.0, 0.0, 0.0), mass=self.cart_mass
        )
        length, half = self.link_length, self.link_length / 2
        radius = 0.03 * length
        geoms = [
            Geom(
                link,
                "box",
                (0.25 * length, 0.1, 0.12 * length),
                (0.0, 0.0, 0.0),
                chain.axes_of(link, (0, 0, 1)),
            )
        ]
        for i in range(self.links):
            link = chain.add(
                f"link {i + 1}",
                f"hinge {i + 1}",
                HINGE,
                (0.0, 1.0, 0.0),
                parent=link,
                offset=(0.0, 0.0, length if i else 0.0),
                mass=self.link_mass,
                centre=(0.0, 0.0, half),
                inertia=(self.link_mass * length**2 / 12, self.link_mass * length**2 / 12, 0.0),
            )
            middle = chain.place(link, (0.0, 0.0, half))
            geoms.append(Geom(link, "capsule", (radius, half, 0.0), middle, chain.axes_of(link, (0, 0, 1))))
        return Model(
            name="pendulum",
            links=tuple(chain.links),
            joints=(Joint(0.0, 0.0), *[Joint(0.0, self.damping)] * self.links),
            actuators=(Actuator(0, 1.0),),
            geoms=tuple(geoms),
            gravity=(0.0, 0.0, -self.gravity),
            ground=-0.12 * length,
            start=(0.0,) * (1 + self.links),
        )

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return self._numbered(_linked_pendulum.make_functions(self.structure, dtype), dtype)

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray:
        """Initial states (n, state_size): links hanging, x, v and rates uniform in [-1, 1], the first
        angle in pi +- pi/6, the others in +- pi/6.
        """
        random = np.random.RandomState((seed + (split == "test")) % 2**32)
        states = random.uniform(-1, 1, (n, self.state_size))
        states[:, 1 : 1 + self.links] *= np.pi / 6
        states[:, 1] += np.pi
        return states

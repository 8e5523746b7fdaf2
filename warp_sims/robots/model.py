"""The numbers of an articulated robot, as nested tuples: hashable, and as they are in a run's config.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..kernels.systems.articulated_tables import ACTUATOR_NAMES as _ACTUATOR
from ..kernels.systems.articulated_tables import (
    BALL,
    HINGE,
    QPOS_SIZE,
    SLIDE,
    SLIDES,
    Structure,
    offsets,
)
from ..kernels.systems.articulated_tables import FLUID_NAMES as _FLUID

__all__ = ["Actuator", "Drag", "Geom", "Joint", "Limit", "Link", "Model", "Pair", "Sphere", "Spring"]

Vector = tuple[float, float, float]
Matrix = tuple[float, ...]
"""Nine numbers, row by row."""


class Link(NamedTuple):
    """A joint and what moves with it, in m and kg; see kernels/systems/articulated_tables.py."""

    body: str
    """Name of the body."""
    joint: str
    parent: int
    """Number of the link before it, 0 for the world; the first link is number 1."""
    kind: int
    turn: Matrix
    """Axes of this link in those of the link before it, as columns, at rest."""
    offset: Vector
    """Anchor of the joint in the frame of the link before it."""
    rest: float
    """Value of qpos at which the joint of a hinge or a slide does nothing [rad, m]."""
    mass: float
    centre: Vector
    inertia: tuple[float, float, float, float, float, float]
    """About the centre of mass, in the link's axes: xx, yy, zz, xy, xz, yz [kg m^2]."""


class Joint(NamedTuple):
    """What acts on a degree of freedom."""

    armature: float
    """Added to the diagonal of the mass matrix [kg, kg m^2]."""
    damping: float
    """[N s/m, N m s/rad]."""


class Spring(NamedTuple):
    link: int
    stiffness: float
    rest: float


class Limit(NamedTuple):
    link: int
    low: float
    high: float


class Actuator(NamedTuple):
    """Force gear (gain u + bias + bias_q gear q + bias_v gear v) on a degree of freedom; u and the force in
    brackets are clipped to their ranges, where these are not None.
    """

    dof: int
    gear: float
    gain: float = 1.0
    bias: float = 0.0
    bias_q: float = 0.0
    bias_v: float = 0.0
    control_low: float | None = None
    control_high: float | None = None
    force_low: float | None = None
    force_high: float | None = None


class Sphere(NamedTuple):
    """A sphere that touches: one, the end of a capsule, or the corner of a box (radius 0)."""

    link: int
    centre: Vector
    radius: float
    friction: float


class Pair(NamedTuple):
    """Two spheres that touch each other."""

    first: int
    first_centre: Vector
    first_radius: float
    second: int
    second_centre: Vector
    second_radius: float
    friction: float


class Drag(NamedTuple):
    """The box of a body's inertia in a fluid: forces -(linear + square |x|) x of each component of its
    spatial velocity about its centre, in its principal axes.
    """

    link: int
    centre: Vector
    axes: Matrix
    linear: tuple[float, ...]
    square: tuple[float, ...]


class Geom(NamedTuple):
    """A shape to draw: "sphere", "capsule", "cylinder", "box" or "ellipsoid", with MuJoCo's sizes."""

    link: int
    shape: str
    size: Vector
    centre: Vector
    axes: Matrix


class Model(NamedTuple):
    """An articulated robot."""

    name: str
    links: tuple[Link, ...]
    joints: tuple[Joint, ...]
    """One for each degree of freedom."""
    actuators: tuple[Actuator, ...]
    springs: tuple[Spring, ...] = ()
    limits: tuple[Limit, ...] = ()
    spheres: tuple[Sphere, ...] = ()
    """Those that touch the ground."""
    pairs: tuple[Pair, ...] = ()
    drags: tuple[Drag, ...] = ()
    geoms: tuple[Geom, ...] = ()
    gravity: Vector = (0.0, 0.0, -9.81)
    ground: float = 0.0
    """Height of the ground [m]."""
    start: tuple[float, ...] = ()
    """qpos at rest."""

    @property
    def origin(self) -> int:
        """Last link of the first body."""
        first = [link.body for link in self.links]
        return next((i for i, body in enumerate(first) if body != first[0]), len(first))

    def structure(self, **options: Any) -> Structure:
        """What the kernels are compiled for; `options` are those of `Structure` that are no part of a
        model."""
        unturned = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
        return Structure(
            kinds=tuple(link.kind for link in self.links),
            parents=tuple(link.parent for link in self.links),
            turned=tuple(link.turn != unturned for link in self.links),
            massive=tuple(link.mass > 0 for link in self.links),
            origin=self.origin,
            springs=tuple(spring.link for spring in self.springs),
            limits=tuple(limit.link for limit in self.limits),
            actuators=tuple(actuator.dof for actuator in self.actuators),
            affine=any(
                a.bias_q or a.bias_v or a.force_low is not None or a.force_high is not None
                for a in self.actuators
            ),
            points=tuple(sphere.link for sphere in self.spheres),
            pairs=tuple((pair.first, pair.second) for pair in self.pairs),
            fluid=tuple(drag.link for drag in self.drags),
            **options,
        )

    def numbers(self, structure: Structure, settings: Sequence[float]) -> np.ndarray:
        """The array that the kernels read; `settings` are the words of `GLOBAL_WORDS` but gravity and ground:
        DT, CONTACT_KE, CONTACT_KD, CONTACT_KF, CONTACT_VS, LIMIT_KE, LIMIT_KD.
        """
        subtree = [link.mass for link in self.links]
        for i in range(len(self.links) - 1, -1, -1):
            if self.links[i].parent:
                subtree[self.links[i].parent - 1] += subtree[i]
        words: list[float] = [settings[0], *self.gravity, *settings[1:], self.ground]
        for link, mass in zip(self.links, subtree):
            words += [*link.turn, *link.offset, link.rest, link.mass, *link.centre, *link.inertia, mass]
        for joint in self.joints:
            words += joint
        for spring in self.springs:
            words += spring[1:]
        for limit in self.limits:
            words += limit[1:]
        for a in self.actuators:
            ranges = [
                -math.inf if a.control_low is None else a.control_low,
                math.inf if a.control_high is None else a.control_high,
                -math.inf if a.force_low is None else a.force_low,
                math.inf if a.force_high is None else a.force_high,
            ]
            row = [a.gear, a.gain, a.bias, a.bias_q, a.bias_v, *ranges]
            assert len(row) == len(_ACTUATOR.split())
            words += row
        for sphere in self.spheres:
            words += [*sphere.centre, sphere.radius, sphere.friction]
        for pair in self.pairs:
            words += [
                *pair.first_centre,
                pair.first_radius,
                pair.friction,
                *pair.second_centre,
                pair.second_radius,
            ]
        for drag in self.drags:
            assert offsets(_FLUID)["LINEAR"] == 12
            words += [*drag.centre, *drag.axes, *drag.linear, *drag.square]
        assert len(words) == structure.words()["END"]
        return np.array(words, dtype=np.float64)

    @property
    def qpos_size(self) -> int:
        return sum(QPOS_SIZE[link.kind] for link in self.links)

    @property
    def total_mass(self) -> float:
        return sum(link.mass for link in self.links)


def as_model(value: Any) -> Model:
    """A model from its nested tuples, as a run's config.json gives them back."""
    if isinstance(value, Model) and all(isinstance(link, Link) for link in value.links):
        return value
    fields: list[Any] = list(value)
    kinds = (None, Link, Joint, Actuator, Spring, Limit, Sphere, Pair, Drag, Geom)
    for i, kind in enumerate(kinds):
        if kind is not None:
            fields[i] = tuple(kind(*row) for row in fields[i])
    return Model(*fields)


def number_names(model: Model) -> tuple[str, ...]:
    """Names of the numbers that a rollout may be given, in the order of `Structure.number_places`; of equal
    names the second has " 2" behind it, and so on.
    """
    axes = {HINGE: [""], SLIDE: [""], SLIDES: [" x", " y", " z"], BALL: [" x", " y", " z"]}
    dofs = [
        link.joint + (" turn" if link.kind == BALL and _is_free(model, link) else "") + axis
        for link in model.links
        for axis in axes[link.kind]
    ]
    found = [f"{kind}_of_{dof}" for dof in dofs for kind in ("armature", "damping")]
    found += [f"gear_of_{dofs[actuator.dof]}" for actuator in model.actuators]
    inertia = ("inertia_xx", "inertia_yy", "inertia_zz", "inertia_xy", "inertia_xz", "inertia_yz")
    kinds = ("mass", "centre_x", "centre_y", "centre_z", *inertia)
    found += [f"{kind}_of_{link.body}" for link in model.links if link.mass > 0 for kind in kinds]
    seen: dict[str, int] = {}
    names = []
    for name in found:
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return tuple(names)


def _is_free(model: Model, link: Link) -> bool:
    """Whether a ball is the second half of a free joint."""
    return link.parent > 0 and model.links[link.parent - 1].kind == SLIDES

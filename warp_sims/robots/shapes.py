"""Masses of simple solids, and models that are built without a file."""

from __future__ import annotations

import math

import numpy as np

from ..kernels.systems.articulated_tables import BALL, HINGE, SLIDE, SLIDES
from .build import Solid, axes_with_third, tuple_of
from .model import Link

Vector = tuple[float, float, float]


def capsule_mass(radius: float, half: float, density: float) -> tuple[float, float, float]:
    """Mass of a solid capsule, and its moments across and along its axis, about its centre [kg, kg m^2].

    Args:
        radius: [m].
        half: Half the length of the cylinder between the round ends [m].
        density: [kg/m^3].
    """
    cylinder = math.pi * radius**2 * 2 * half * density
    ball = 4 / 3 * math.pi * radius**3 * density
    along = cylinder * radius**2 / 2 + ball * 2 / 5 * radius**2
    across = cylinder * (radius**2 / 4 + half**2 / 3)
    across += ball * (2 / 5 * radius**2 + half**2 + 3 / 4 * radius * half)
    return cylinder + ball, across, along


def capsule(radius: float, half: float, along: Vector, centre: Vector, density: float) -> Solid:
    """A solid capsule; `along` is the direction of its axis, of length 1."""
    mass, across, own = capsule_mass(radius, half, density)
    line = np.outer(along, along)
    return Solid(mass, np.array(centre), across * (np.eye(3) - line) + own * line)


def ball(radius: float, centre: Vector, density: float) -> Solid:
    """A solid sphere."""
    mass = 4 / 3 * math.pi * radius**3 * density
    return Solid(mass, np.array(centre), 2 / 5 * mass * radius**2 * np.eye(3))


class Chain:
    """Links put together one by one, in frames whose axes are those of the world at rest."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self._axes = [np.eye(3)]

    def add(
        self,
        body: str,
        joint: str,
        kind: int,
        axis: Vector,
        *,
        parent: int,
        offset: Vector,
        mass: float = 0.0,
        centre: Vector | np.ndarray = (0.0, 0.0, 0.0),
        inertia: Vector | np.ndarray = (0.0, 0.0, 0.0),
    ) -> int:
        """Adds a hinge or a slide, and returns its number.

        Args:
            body, joint: Names.
            kind: HINGE or SLIDE.
            axis: Of the joint, of length 1.
            parent: Number of the link before it, 0 for the world.
            offset: From the anchor before it, or the world's origin.
            mass: Of what moves with the joint [kg].
            centre: Of mass, from the anchor.
            inertia: About the centre, of the x, y and z axis; or the whole matrix (3, 3).
        """
        assert kind in (HINGE, SLIDE)
        own = axes_with_third(np.array(axis, np.float64))
        matrix = np.diag(inertia) if np.ndim(inertia) == 1 else np.asarray(inertia)
        return self._add(body, joint, kind, own, parent, offset, Solid(mass, np.array(centre), matrix))

    def float(self, body: str, joint: str, solid: Solid) -> int:
        """Adds a body that moves freely, and returns the number of its link."""
        none = Solid(0.0, np.zeros(3), np.zeros((3, 3)))
        slides = self._add(body, joint, SLIDES, np.eye(3), 0, (0.0, 0.0, 0.0), none)
        return self._add(body, joint, BALL, np.eye(3), slides, (0.0, 0.0, 0.0), solid)

    def _add(
        self, body: str, joint: str, kind: int, own: np.ndarray, parent: int, offset: Vector, solid: Solid
    ) -> int:
        before = self._axes[parent]
        i = own.T @ solid.inertia @ own
        self.links.append(
            Link(
                body,
                joint,
                parent,
                kind,
                tuple_of(before.T @ own),
                tuple_of(before.T @ np.array(offset)),
                0.0,
                solid.mass,
                tuple_of(own.T @ solid.centre),
                tuple_of([i[0, 0], i[1, 1], i[2, 2], i[0, 1], i[0, 2], i[1, 2]]),
            )
        )
        self._axes.append(own)
        return len(self.links)

    def place(self, link: int, vector: Vector) -> Vector:
        """A vector of the world, at rest, in the frame of a link."""
        return tuple_of(self._axes[link].T @ np.array(vector))

    def axes_of(self, link: int, axis: Vector) -> tuple[float, ...]:
        """Axes of a shape on a link whose third axis is a direction of the world, at rest."""
        return tuple_of(self._axes[link].T @ axes_with_third(np.array(axis, np.float64)))

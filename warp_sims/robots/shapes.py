"""Masses of simple solids, and models written down without a file."""

from __future__ import annotations

import math

import numpy as np

from ..kernels.systems.articulated_tables import HINGE, SLIDE
from .build import axes_with_third, tuple_of
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
        centre: Vector = (0.0, 0.0, 0.0),
        inertia: Vector = (0.0, 0.0, 0.0),
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
            inertia: About the centre, of the x, y and z axis.
        """
        assert kind in (HINGE, SLIDE)
        before, own = self._axes[parent], axes_with_third(np.array(axis, np.float64))
        i = own.T @ np.diag(inertia) @ own
        self.links.append(
            Link(
                body,
                joint,
                parent,
                kind,
                tuple_of(before.T @ own),
                tuple_of(before.T @ np.array(offset)),
                0.0,
                mass,
                tuple_of(own.T @ np.array(centre)),
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

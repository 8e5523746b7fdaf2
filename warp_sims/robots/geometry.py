"""Poses, motion axes and mass matrix of one state of a robot, in NumPy: for pictures and for the stability
bound.

The kernels have their own (kernels/systems/articulated_forward.h); a test compares the two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..kernels.systems.articulated_tables import BALL, DOF_SIZE, HINGE, QPOS_SIZE, SLIDE, SLIDES
from .build import rotation
from .model import Model


class Pose(NamedTuple):
    """Where the links of a robot are, and how they may move. Link 0 is the world."""

    turn: list[np.ndarray]
    """(3, 3), axes of a link as columns."""
    position: list[np.ndarray]
    """(3,)."""
    axes: np.ndarray
    """(nv, 6) spatial axes [angular; linear] of the degrees of freedom, about the world's origin."""
    link: np.ndarray
    """(nv,) link of each degree of freedom."""


def pose(model: Model, qpos: np.ndarray) -> Pose:
    """Returns the pose of the robot at `qpos` (nq,)."""
    turn, position = [np.eye(3)], [np.zeros(3)]
    axes, links = [], []
    at = 0
    for i, link in enumerate(model.links):
        q = np.asarray(qpos[at : at + QPOS_SIZE[link.kind]], np.float64)
        at += len(q)
        r = turn[link.parent] @ np.reshape(link.turn, (3, 3))
        p = position[link.parent] + turn[link.parent] @ np.array(link.offset)
        if link.kind == HINGE:
            c, s = np.cos(q[0] - link.rest), np.sin(q[0] - link.rest)
            r = r @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        elif link.kind == SLIDE:
            p = p + r[:, 2] * (q[0] - link.rest)
        elif link.kind == SLIDES:
            p = q
        else:
            r = r @ rotation(q)
        own = np.eye(3) if link.kind == SLIDES else r
        for k in range(DOF_SIZE[link.kind]):
            axis = own[:, 2] if link.kind in (HINGE, SLIDE) else own[:, k]
            turns = link.kind in (HINGE, BALL)
            axes.append(np.concatenate([axis, np.cross(p, axis)] if turns else [np.zeros(3), axis]))
            links.append(i + 1)
        turn.append(r)
        position.append(p)
    return Pose(turn, position, np.array(axes), np.array(links))


def ancestors(model: Model, link: int) -> set[int]:
    """A link and those before it, without the world."""
    found = set()
    while link:
        found.add(link)
        link = model.links[link - 1].parent
    return found


def jacobian(model: Model, at: Pose, link: int, point: np.ndarray) -> np.ndarray:
    """(3, nv): velocity of a point of a link, given in the world."""
    above = np.isin(at.link, list(ancestors(model, link)))
    velocity = at.axes[:, 3:] + np.cross(at.axes[:, :3], point)
    return np.where(above[:, None], velocity, 0.0).T


def mass_matrix(model: Model, at: Pose) -> np.ndarray:
    """(nv, nv), with armature."""
    mass = np.diag([joint.armature for joint in model.joints])
    for i, link in enumerate(model.links, 1):
        if link.mass <= 0:
            continue
        r = at.turn[i]
        centre = at.position[i] + r @ np.array(link.centre)
        xx, yy, zz, xy, xz, yz = link.inertia
        inertia = r @ np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) @ r.T
        linear = jacobian(model, at, i, centre)
        above = np.isin(at.link, list(ancestors(model, i)))
        angular = np.where(above[:, None], at.axes[:, :3], 0.0).T
        mass = mass + link.mass * linear.T @ linear + angular.T @ inertia @ angular
    return mass


def random_qpos(model: Model, random: np.random.RandomState, reach: float) -> np.ndarray:
    """The rest pose with every joint moved at random by up to `reach` (rad, m), within its limits."""
    limits = {limit.link: (limit.low, limit.high) for limit in model.limits}
    parts = []
    at = 0
    for i, link in enumerate(model.links, 1):
        q = np.array(model.start[at : at + QPOS_SIZE[link.kind]], np.float64)
        at += len(q)
        if link.kind == BALL:
            # q o (a rotation by up to `reach`)
            w, v = q[0], q[1:]
            axis = random.uniform(-reach, reach, 3) / 2
            q = np.concatenate([[w - v @ axis], w * axis + v + np.cross(v, axis)])
            q /= np.linalg.norm(q)
        else:
            q = q + random.uniform(-reach, reach, len(q))
            if i in limits:
                q = np.clip(q, *limits[i])
        parts.append(q)
    return np.concatenate(parts)

"""The longest substep that the stiffnesses of a robot allow, computed from its masses.

Semi-implicit Euler v' = v - h (k x + c v) / m, x' = x + h v' is stable for

    k h^2 / m + 2 c h / m < 4

With 1 / m = j^T Mh^-1 j along a direction j, the bound is the least over what may act: contact of each sphere
along the normal (k = ke, c = kd times the robot's weight) and along the ground (c = kf, or mu weight / vs
where friction is smooth), limits, springs and servos of the joints, and damping that is not implicit. The
effective masses depend on the pose; the least of the rest pose and of poses drawn at random is taken. Forces
that act at once on several points of a body are not added up, so keep a margin.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..kernels.systems.articulated_tables import DOF_SIZE
from .geometry import jacobian, mass_matrix, pose, random_qpos
from .model import Model

POSES = 32
REACH = math.pi  # rad, m: how far from rest the poses are, within the joints' limits


class Bound(NamedTuple):
    """The longest stable substep, and what bounds it."""

    seconds: float
    cause: str


def longest(stiffness: float, damping: float, inverse_mass: float) -> float:
    """Longest step [s] for one spring and damper; infinite without."""
    k, c = float(stiffness * inverse_mass), float(damping * inverse_mass)
    if k <= 0:
        return 2 / c if c > 0 else math.inf
    return (math.sqrt(c * c + 4 * k) - c) / k


def stability_bound(
    model: Model,
    *,
    contact_stiffness: float,
    contact_damping: float,
    friction_stiffness: float,
    slip_speed: float,
    smooth: bool,
    limit_stiffness: float,
    implicit: bool,
) -> Bound:
    """Returns the longest stable substep of a robot; infinite seconds where nothing bounds it."""
    random = np.random.RandomState(0)
    start = np.array(model.start)
    poses = [start, *(random_qpos(model, random, REACH) for _ in range(POSES))]
    weight = model.total_mass * float(np.linalg.norm(model.gravity))
    dof_link = [i for i, link in enumerate(model.links, 1) for _ in range(DOF_SIZE[link.kind])]
    first_dof = {link: k for k, link in reversed(list(enumerate(dof_link)))}
    joint_stiffness = np.zeros(len(model.joints))
    joint_damping = np.array([0.0 if implicit else joint.damping for joint in model.joints])
    for spring in model.springs:
        joint_stiffness[first_dof[spring.link]] += spring.stiffness
    for actuator in model.actuators:
        joint_stiffness[actuator.dof] -= actuator.gear**2 * actuator.bias_q
        joint_damping[actuator.dof] -= actuator.gear**2 * actuator.bias_v

    found: dict[str, float] = {}

    def note(cause: str, seconds: float) -> None:
        found[cause] = min(found.get(cause, math.inf), seconds)

    for q in poses:
        at = pose(model, q)
        inverse = np.linalg.inv(mass_matrix(model, at))
        for sphere in model.spheres:
            point = at.position[sphere.link] + at.turn[sphere.link] @ np.array(sphere.centre)
            point = point - [0, 0, sphere.radius]
            j = jacobian(model, at, sphere.link, point)
            effective = j @ inverse @ j.T
            body = model.links[sphere.link - 1].body
            along = float(np.linalg.eigvalsh(effective[:2, :2])[-1])
            slope = sphere.friction * weight / slip_speed if smooth else friction_stiffness
            if sphere.friction > 0:
                note(f"friction of {body!r} on the ground", longest(0.0, slope, along))
            up = float(effective[2, 2])
            note(
                f"contact of {body!r} with the ground",
                longest(contact_stiffness, contact_damping * weight, up),
            )
        for pair in model.pairs:
            a, b = (
                at.position[link] + at.turn[link] @ np.array(centre)
                for link, centre in ((pair.first, pair.first_centre), (pair.second, pair.second_centre))
            )
            j = jacobian(model, at, pair.first, a) - jacobian(model, at, pair.second, b)
            most = float(np.linalg.eigvalsh(j @ inverse @ j.T)[-1])
            names = " and ".join(repr(model.links[link - 1].body) for link in (pair.first, pair.second))
            note(f"contact of {names}", longest(contact_stiffness, contact_damping * weight, most))
        for k, link in enumerate(dof_link):
            name = model.links[link - 1].joint
            note(
                f"spring, servo or damping of joint {name!r}",
                longest(joint_stiffness[k], joint_damping[k], inverse[k, k]),
            )
        for limit in model.limits:
            k = first_dof[limit.link]
            note(
                f"limit of joint {model.links[limit.link - 1].joint!r}",
                longest(limit_stiffness + joint_stiffness[k], joint_damping[k], inverse[k, k]),
            )
    cause = min(found, key=lambda name: found[name], default="nothing")
    return Bound(found.get(cause, math.inf), cause)

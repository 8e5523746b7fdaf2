"""A `Model` from the arrays that MuJoCo's compiler gives a model, by their names there (`body_pos`,
`jnt_axis`, ...).

Bodies without a joint are fused with the body they are welded to, and left out if that is the world. A body
with several joints becomes a chain of links. The axis of a hinge or slide becomes the third axis of its link,
so that a joint needs no product of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..kernels.systems.articulated_tables import BALL, DOF_SIZE, HINGE, SLIDE, SLIDES
from .model import Actuator, Drag, Joint, Limit, Link, Model, Spring

MJ_FREE, MJ_BALL, MJ_SLIDE, MJ_HINGE = range(4)


class Placed(NamedTuple):
    """Where a body's frame is: on a link, turned and shifted in the link's frame."""

    link: int
    turn: np.ndarray
    shift: np.ndarray


class Solid(NamedTuple):
    """A mass: [kg], centre [m], and inertia (3, 3) about the centre [kg m^2]."""

    mass: float
    centre: np.ndarray
    inertia: np.ndarray


def together(solids: Sequence[Solid]) -> Solid:
    """Solids welded to each other."""
    mass = sum(solid.mass for solid in solids)
    centre = np.sum([solid.mass * solid.centre for solid in solids], axis=0) / mass
    inertia = np.zeros((3, 3))
    for solid in solids:
        d = solid.centre - centre
        inertia += solid.inertia + solid.mass * (d @ d * np.eye(3) - np.outer(d, d))
    return Solid(mass, centre, inertia)


def rotation(quat: Any) -> np.ndarray:
    """Rotation matrix of a quaternion w, x, y, z of any length."""
    w, x, y, z = np.asarray(quat, np.float64) / np.linalg.norm(quat)
    return np.array(
        [
            [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
        ]
    )


def axes_with_third(axis: np.ndarray) -> np.ndarray:
    """A rotation whose third column is this unit vector, made of zeros and ones where that can be."""
    least = int(np.argmin(np.abs(axis)))
    if np.allclose(axis, [0, 0, 1], atol=0):
        return np.eye(3)
    second = np.cross(axis, np.eye(3)[least])
    second /= np.linalg.norm(second)
    return np.stack([np.cross(second, axis), second, axis], axis=1)


def tuple_of(values: Any) -> Any:
    """The numbers of an array, as a tuple of as many floats."""
    return tuple(float(v) for v in np.asarray(values, np.float64).ravel())


def first_column(values: Any) -> np.ndarray:
    """The linear term; some releases of MuJoCo have polynomials."""
    values = np.asarray(values, np.float64)
    return values.reshape(len(values), -1)[:, 0] if values.size else values.reshape(len(values))


def place_bodies(
    m: Any, names: dict[str, list[str]] | None = None
) -> tuple[list[dict[str, Any]], list[Placed]]:
    """Links without masses, as keywords, and where each body is."""
    names = names or {}
    links: list[dict[str, Any]] = []
    placed = [Placed(0, np.eye(3), np.zeros(3))]
    for b in range(1, len(m.body_parentid)):
        on = placed[int(m.body_parentid[b])]
        here = Placed(
            on.link, on.turn @ rotation(m.body_quat[b]), on.shift + on.turn @ np.asarray(m.body_pos[b])
        )
        for j in range(m.body_jntadr[b], m.body_jntadr[b] + m.body_jntnum[b]):
            kind = int(m.jnt_type[j])
            label = {
                "body": names["body"][b] if "body" in names else f"body {b}",
                "joint": names["joint"][j] if "joint" in names else f"joint {j}",
            }

            def add(label: Any, kind: int, parent: int, turn: Any, offset: Any, rest: float = 0.0) -> int:
                if np.allclose(turn, np.eye(3), rtol=0, atol=1e-15):
                    turn = np.eye(3)
                turn, offset = tuple_of(turn), tuple_of(offset)
                links.append(
                    {**label, "parent": parent, "kind": kind, "turn": turn, "offset": offset, "rest": rest}
                )
                return len(links)

            if kind == MJ_FREE:
                # qpos says where it is in the world, whatever its place in the file
                slides = add(label, SLIDES, 0, np.eye(3), np.zeros(3))
                here = Placed(add(label, BALL, slides, np.eye(3), np.zeros(3)), np.eye(3), np.zeros(3))
                continue
            anchor = np.asarray(m.jnt_pos[j], np.float64) if kind != MJ_SLIDE else np.zeros(3)
            if kind == MJ_BALL:
                own, rest = np.eye(3), 0.0
            else:
                own = axes_with_third(np.asarray(m.jnt_axis[j], np.float64))
                rest = float(m.qpos0[m.jnt_qposadr[j]])
            at = here.shift + here.turn @ anchor
            link = add(
                label,
                {MJ_BALL: BALL, MJ_SLIDE: SLIDE, MJ_HINGE: HINGE}[kind],
                here.link,
                here.turn @ own,
                at,
                rest,
            )
            here = Placed(link, own.T, -own.T @ anchor)
        placed.append(here)
    return links, placed


def _masses(m: Any, placed: list[Placed], links: int) -> list[Solid]:
    """Of all links: bodies fused."""
    parts: list[list[Solid]] = [[] for _ in range(links + 1)]
    for b, (link, turn, shift) in enumerate(placed):
        mass = float(m.body_mass[b])
        if mass <= 0 and not np.any(m.body_inertia[b]):
            continue
        axes = turn @ rotation(m.body_iquat[b])
        inertia = axes @ np.diag(np.asarray(m.body_inertia[b], np.float64)) @ axes.T
        parts[link].append(Solid(mass, shift + turn @ np.asarray(m.body_ipos[b], np.float64), inertia))
    none = Solid(0.0, np.zeros(3), np.zeros((3, 3)))
    return [together(own) if len(own) > 1 else (own or [none])[0] for own in parts[1:]]


def _drags(m: Any, placed: list[Placed], density: float, viscosity: float) -> tuple[Drag, ...]:
    """MuJoCo's inertia boxes in a fluid (its documentation, "Fluid forces")."""
    found = []
    for b, (link, turn, shift) in enumerate(placed):
        mass = float(m.body_mass[b])
        if link == 0 or mass <= 0 or not (density or viscosity):
            continue
        i = np.asarray(m.body_inertia[b], np.float64)
        box = np.sqrt(
            np.maximum(1e-15, [i[1] + i[2] - i[0], i[0] + i[2] - i[1], i[0] + i[1] - i[2]]) / mass * 6
        )
        d = box.mean()
        linear = [np.pi * d**3 * viscosity] * 3 + [3 * np.pi * d * viscosity] * 3
        square = [
            box[a] * (box[b_] ** 4 + box[c] ** 4) / 64 for a, b_, c in ((0, 1, 2), (1, 0, 2), (2, 0, 1))
        ]
        square += [0.5 * box[1] * box[2], 0.5 * box[0] * box[2], 0.5 * box[0] * box[1]]
        centre = shift + turn @ np.asarray(m.body_ipos[b], np.float64)
        axes = turn @ rotation(m.body_iquat[b])
        square = density * np.array(square)
        found.append(Drag(link, tuple_of(centre), tuple_of(axes), tuple_of(linear), tuple_of(square)))
    return tuple(found)


def _actuators(m: Any) -> tuple[Actuator, ...]:
    found = []
    force_limited = getattr(m, "actuator_forcelimited", None)
    for a in range(len(m.actuator_trnid)):
        dof = int(m.jnt_dofadr[int(m.actuator_trnid[a][0])])
        bias = tuple_of(m.actuator_biasprm[a][:3]) if int(m.actuator_biastype[a]) == 1 else (0.0, 0.0, 0.0)
        control: Any = tuple_of(m.actuator_ctrlrange[a]) if m.actuator_ctrllimited[a] else (None, None)
        limited = force_limited is not None and force_limited[a]
        force: Any = tuple_of(m.actuator_forcerange[a]) if limited else (None, None)
        gear, gain = float(m.actuator_gear[a][0]), float(m.actuator_gainprm[a][0])
        found.append(Actuator(dof, gear, gain, *bias, *control, *force))
    return tuple(found)


def torques(m: Any, first_dof: int = 0) -> tuple[Actuator, ...]:
    """A torque or force on every degree of freedom except those of free joints, in the range that the model
    gives.
    """
    found = []
    for j, kind in enumerate(m.jnt_type):
        if int(kind) == MJ_FREE:
            continue
        limited = getattr(m, "jnt_actfrclimited", None)
        own: Any = tuple_of(m.jnt_actfrcrange[j]) if limited is not None and limited[j] else (None, None)
        for k in range(3 if int(kind) == MJ_BALL else 1):
            found.append(Actuator(int(m.jnt_dofadr[j]) + k, 1.0, control_low=own[0], control_high=own[1]))
    return tuple(found)


def build_model(
    m: Any,
    *,
    name: str = "robot",
    gravity: Any,
    density: float = 0.0,
    viscosity: float = 0.0,
    actuators: tuple[Actuator, ...] | None = None,
    names: dict[str, list[str]] | None = None,
    **parts: Any,
) -> tuple[Model, list[Placed]]:
    """A model, and where each body is on its links.

    Args:
        m: Arrays as those of `mujoco.MjModel`.
        gravity: [m/s^2].
        density, viscosity: Of the fluid around it [kg/m^3, Pa s].
        actuators: In place of those of `m`.
        names: Of "body" and "joint".
        **parts: Further fields of `Model`.
    """
    rows, placed = place_bodies(m, names)
    masses = _masses(m, placed, len(rows))
    links = []
    for row, own in zip(rows, masses):
        i = own.inertia
        six = tuple_of([i[0, 0], i[1, 1], i[2, 2], i[0, 1], i[0, 2], i[1, 2]])
        links.append(Link(**row, mass=own.mass, centre=tuple_of(own.centre), inertia=six))
    dof_link = [i + 1 for i, link in enumerate(links) for _ in range(DOF_SIZE[link.kind])]
    armature, damping = (first_column(x) for x in (m.dof_armature, m.dof_damping))
    stiffness = first_column(m.jnt_stiffness)
    one = [j for j, kind in enumerate(m.jnt_type) if int(kind) in (MJ_SLIDE, MJ_HINGE)]
    link_of = {j: dof_link[int(m.jnt_dofadr[j])] for j in one}
    model = Model(
        name=name,
        links=tuple(links),
        joints=tuple(Joint(float(a), float(d)) for a, d in zip(armature, damping)),
        actuators=_actuators(m) if actuators is None else actuators,
        springs=tuple(
            Spring(link_of[j], float(stiffness[j]), float(m.qpos_spring[m.jnt_qposadr[j]]))
            for j in one
            if stiffness[j]
        ),
        limits=tuple(Limit(link_of[j], *tuple_of(m.jnt_range[j])) for j in one if m.jnt_limited[j]),
        drags=_drags(m, placed, density, viscosity),
        gravity=tuple_of(gravity),
        start=tuple_of(m.qpos0),
        **parts,
    )
    return model, placed

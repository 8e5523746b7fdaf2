"""Shapes of a compiled MJCF file, and which of them touch the ground or each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .build import Placed, rotation, tuple_of
from .model import Pair, Sphere

SHAPES = ("plane", "hfield", "sphere", "capsule", "ellipsoid", "cylinder", "box", "mesh", "sdf")


class Shape(NamedTuple):
    """A shape on a link, in the link's frame."""

    number: int
    name: str
    kind: str
    link: int
    centre: np.ndarray
    axes: np.ndarray
    size: np.ndarray


def read_shapes(m: Any, placed: list[Placed]) -> list[Shape]:
    """All shapes of a compiled file, on their links."""
    found = []
    for g in range(m.ngeom):
        link, turn, shift = placed[int(m.geom_bodyid[g])]
        centre = shift + turn @ np.asarray(m.geom_pos[g])
        axes = turn @ rotation(m.geom_quat[g])
        name = m.geom(g).name or f"number {g} of body {m.body(int(m.geom_bodyid[g])).name!r}"
        found.append(
            Shape(g, name, SHAPES[int(m.geom_type[g])], link, centre, axes, np.array(m.geom_size[g]))
        )
    return found


def _collide(m: Any, a: Shape, b: Shape) -> bool:
    """Whether MuJoCo's filters let two shapes touch."""
    first, second = a.number, b.number
    matched = (m.geom_contype[first] & m.geom_conaffinity[second]) | (
        m.geom_contype[second] & m.geom_conaffinity[first]
    )
    bodies = int(m.geom_bodyid[first]), int(m.geom_bodyid[second])
    if not matched or a.link == b.link:
        return False
    signature = {(bodies[0] << 16) + bodies[1], (bodies[1] << 16) + bodies[0]}
    if any(int(s) in signature for s in np.asarray(m.exclude_signature)):
        return False
    weld = [int(m.body_weldid[body]) for body in bodies]
    parents = [int(m.body_weldid[int(m.body_parentid[w])]) for w in weld]
    # a body and the one it hangs on do not collide, but for the world
    return not ((weld[0] and parents[1] == weld[0]) or (weld[1] and parents[0] == weld[1]))


def _friction(m: Any, a: int, b: int) -> float:
    """Of two shapes: that of higher priority, else the larger; none where both ask for a normal force."""
    if m.geom_priority[a] != m.geom_priority[b]:
        chosen = a if m.geom_priority[a] > m.geom_priority[b] else b
        return float(m.geom_friction[chosen][0]) if m.geom_condim[chosen] > 1 else 0.0
    if max(m.geom_condim[a], m.geom_condim[b]) == 1:
        return 0.0
    return float(max(m.geom_friction[a][0], m.geom_friction[b][0]))


def _corners(shape: Shape) -> list[tuple[np.ndarray, float]]:
    """Spheres that touch in place of a shape: itself, the ends of a capsule, the corners of a box."""
    if shape.kind == "sphere":
        return [(shape.centre, float(shape.size[0]))]
    if shape.kind == "capsule":
        way = shape.axes[:, 2] * shape.size[1]
        return [(shape.centre + way, float(shape.size[0])), (shape.centre - way, float(shape.size[0]))]
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return [(shape.centre + shape.axes @ (s * shape.size), 0.0) for s in signs]


def read_contacts(
    m: Any, call: str, shapes: list[Shape], contact: str, ground: float | None
) -> tuple[float, tuple[Sphere, ...], tuple[Pair, ...]]:
    """Height of the ground, the spheres that can touch it, and the pairs that can touch each other; see
    `from_mjcf`.

    Args:
        m: The compiled file.
        call: Name of the public call, for errors.
        shapes: All of the file.
        contact: "ground" or "all".
        ground: Height of a ground that the file does not have.
    """
    moving = [s for s in shapes if s.link]
    fixed = [s for s in shapes if not s.link]
    refused: list[str] = []
    spheres: list[Sphere] = []
    planes = [f for f in fixed if f.kind == "plane" and any(_collide(m, f, s) for s in moving)]
    if len(planes) > 1:
        refused.append(f"more than one ground: {', '.join(p.name for p in planes)}")
    if planes and not np.allclose(planes[0].axes[:, 2], [0, 0, 1], atol=1e-12):
        refused.append(f"plane {planes[0].name}, which is not horizontal")
    height = float(planes[0].centre[2]) if planes else ground or 0.0
    for s in moving:
        for f in fixed:
            if f.kind != "plane" and _collide(m, f, s):
                refused.append(
                    f"contact of geom {s.name} with geom {f.name}, which is fixed to the world and no plane"
                )
        on_ground = bool(planes) and _collide(m, planes[0], s)
        if not planes and ground is not None:
            on_ground = bool(m.geom_contype[s.number] | m.geom_conaffinity[s.number])
        if not on_ground:
            continue
        if s.kind not in ("sphere", "capsule", "box"):
            refused.append(f"geom {s.name}, a {s.kind} that touches the ground")
            continue
        friction = _friction(m, planes[0].number, s.number) if planes else float(m.geom_friction[s.number][0])
        spheres += [Sphere(s.link, tuple_of(c), r, friction) for c, r in _corners(s)]
    pairs: list[Pair] = []
    if contact == "all":
        for i, a in enumerate(moving):
            for b in moving[:i]:
                if not _collide(m, a, b):
                    continue
                if a.kind != "sphere" or b.kind != "sphere":
                    refused.append(f"contact of geom {a.name}, a {a.kind}, with geom {b.name}, a {b.kind}")
                    continue
                ends: Any = [e for s in (b, a) for e in (s.link, tuple_of(s.centre), float(s.size[0]))]
                pairs.append(Pair(*ends, friction=_friction(m, a.number, b.number)))
    if refused:
        raise ValueError(
            f"{call}: not supported: {'; '.join(refused)}. Take collision off these geoms (contype and "
            "conaffinity 0), or give contact='ground' for contact with the ground alone or contact='none'"
        )
    return height, tuple(spheres), tuple(pairs)

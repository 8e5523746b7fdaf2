"""Pictures of robots: shapes seen from the side, from a little above where a robot leaves the plane."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.systems.articulated_tables import BALL
from .geometry import pose
from .model import Model

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
TURN, TILT = 0.6, 0.35  # rad, of the view of a robot that moves in space


def draw_robot(axes: Any, model: Model, qpos: np.ndarray) -> None:
    """Draws a robot.

    Args:
        axes: Matplotlib axes, cleared.
        model: The robot's numbers.
        qpos: (nq,).
    """
    from matplotlib.patches import Circle, Polygon

    at = pose(model, qpos)
    in_space = any(link.kind == BALL for link in model.links)
    view = _view(in_space)
    marks = []  # centres and reach, for the limits of the picture
    for geom in model.geoms:
        r = at.turn[geom.link] @ np.reshape(geom.axes, (3, 3))
        centre = at.position[geom.link] + at.turn[geom.link] @ np.array(geom.centre)
        colour = COLOURS[geom.link % len(COLOURS)]
        middle, depth = view[:2] @ centre, float(view[2] @ centre)
        style = {
            "facecolor": colour,
            "edgecolor": "white",
            "linewidth": 0.8,
            "alpha": 0.9,
            "zorder": 10 + depth,
        }
        size = geom.size
        if geom.shape in ("capsule", "cylinder"):
            half = view[:2] @ (r[:, 2] * size[1])
            axes.add_patch(Polygon(_stadium(middle - half, middle + half, size[0]), closed=True, **style))
            marks.append((middle, size[0] + float(np.linalg.norm(half))))
        elif geom.shape == "box":
            corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * size
            flat = middle + corners @ r.T @ view[:2].T
            axes.add_patch(Polygon(_hull(flat), closed=True, **style))
            marks.append((middle, float(np.linalg.norm(size))))
        else:
            axes.add_patch(Circle(tuple(middle), size[0], **style))
            marks.append((middle, max(size)))
    if not marks:  # a robot without shapes: its joints
        for i, link in enumerate(model.links, 1):
            a, b = (view[:2] @ at.position[k] for k in (link.parent, i))
            if link.parent:
                axes.plot(*zip(a, b), color="0.3", linewidth=3)
            marks.append((b, 0.1))
    middle = np.array([m for m, _ in marks])
    reach = max(r for _, r in marks)
    centre = middle.mean(0)
    half = max(float(np.abs(middle - centre).max()) + reach, 0.5) * 1.25
    axes.axhspan(centre[1] - 10 * half, model.ground, color="0.93", zorder=0)
    axes.axhline(model.ground, color="0.6", linewidth=1.5, zorder=1)
    first = np.floor(centre[0] - 2 * half)
    for x in np.arange(first, centre[0] + 2 * half):  # a mark each metre, so that motion shows
        axes.plot(
            [x, x - 0.1 * half],
            [model.ground, model.ground - 0.08 * half],
            color="0.6",
            linewidth=1,
            zorder=1,
        )
    axes.set_xlim(centre[0] - half, centre[0] + half)
    axes.set_ylim(centre[1] - half, centre[1] + half)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.8")


def _view(in_space: bool) -> np.ndarray:
    """(3, 3): what is right, up and towards the viewer."""
    if not in_space:
        return np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    c, s, ct, st = np.cos(TURN), np.sin(TURN), np.cos(TILT), np.sin(TILT)
    return np.array([[c, s, 0], [-s * st, c * st, ct], [s * ct, -c * ct, st]])


def _stadium(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """Outline of a capsule in the plane."""
    way = b - a
    angle = np.arctan2(way[1], way[0]) if way.any() else 0.0
    turn = np.linspace(np.pi / 2, 3 * np.pi / 2, 12)
    ends = [(a, angle + turn), (b, angle + turn + np.pi)]
    return np.concatenate([end + radius * np.stack([np.cos(t), np.sin(t)], 1) for end, t in ends])


def _hull(points: np.ndarray) -> np.ndarray:
    """Convex hull of points in the plane, Andrew's monotone chain."""
    order = points[np.lexsort((points[:, 1], points[:, 0]))]

    def chain(rows: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for row in rows:
            while len(found) > 1:
                a, b = found[-1] - found[-2], row - found[-2]
                if a[0] * b[1] - a[1] * b[0] > 0:
                    break
                found.pop()
            found.append(row)
        return found[:-1]

    return np.array(chain(order) + chain(order[::-1]))

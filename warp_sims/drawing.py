"""Pictures of the built-in systems' states, one function per system: what `System.draw` is wired to."""

from __future__ import annotations

from typing import Any

import numpy as np

# Okabe and Ito's colours: told apart by colour-blind readers.
POLE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def draw_cartpole(axes: Any, system: Any, state: np.ndarray) -> None:
    """Draws a cart with its poles on a rail; angle 0 points up.

    Args:
        axes: Matplotlib axes, cleared.
        system: A `ws.CartPole`.
        state: One state, shape (state_size,): [x, v, q1, w1, q2, w2, ...] in m, m/s, rad, rad/s.
    """
    from matplotlib.patches import Circle, FancyBboxPatch
    from matplotlib.ticker import MultipleLocator

    x = float(state[0])
    angles = np.asarray(state[2::2], dtype=np.float64)
    length = 2.0 * system.pole_length  # the system's own length is that of half a pole
    width, height = 0.55 * length, 0.28 * length
    axle = 0.0
    rail = axle - height / 2 - 0.15 * length

    # The axis itself is the rail: its marks then fit whatever stretch of it is shown.
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_position(("data", rail))
    axes.spines["bottom"].set(color="0.55", linewidth=2.0)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MultipleLocator(1.0))
    axes.xaxis.set_major_formatter("{x:g} m")
    axes.tick_params(axis="x", color="0.55", labelcolor="0.45", labelsize=8)
    for side in (-1, 1):
        axes.add_patch(
            Circle((x + side * 0.3 * width, rail + 0.08 * length), 0.07 * length, color="0.25", zorder=2)
        )
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, axle - height / 2),
            width,
            height,
            boxstyle=f"round,pad=0,rounding_size={0.06 * length}",
            facecolor="0.82",
            edgecolor="0.25",
            linewidth=1.5,
            zorder=3,
        )
    )
    for i, angle in enumerate(angles):
        colour = POLE_COLOURS[i % len(POLE_COLOURS)]
        tip = x + length * np.sin(angle), axle + length * np.cos(angle)
        axes.plot(
            [x, tip[0]],
            [axle, tip[1]],
            color=colour,
            linewidth=5.0,
            solid_capstyle="round",
            alpha=0.9,
            zorder=4 + i,
        )
        axes.plot(*tip, marker="o", markersize=9, color=colour, markeredgecolor="white", zorder=4 + i)
    axes.plot(x, axle, marker="o", markersize=6, color="0.15", zorder=5 + len(angles))

    axes.set_xlim(x - 1.6 * length, x + 1.6 * length)
    axes.set_ylim(-1.15 * length, 1.15 * length)
    axes.set_aspect("equal")

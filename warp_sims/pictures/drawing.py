"""Pictures of the built-in systems' states, one function per system, which `System.draw` calls."""

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


DRIVER_COLOUR, EVADER_COLOUR, TARGET_COLOUR = "#D55E00", "#0072B2", "#009E73"
HERD_REACH = 4.4  # how far a picture shows the plane in every direction [m]; drivers start at 3 to 4
RINGS = (1.0, 2.0, 3.0, 4.0)  # distances from the target that are marked [m]
ARROW_SECONDS = 0.25  # how far ahead the arrow of a velocity points


def draw_guidance(axes: Any, system: Any, state: np.ndarray) -> None:
    """Draws drivers (triangles) and evaders (discs) in the plane, their velocities as arrows, and the target.

    A driver beyond the edge of the picture is pale at the edge; evaders are always in it.

    Args:
        axes: Matplotlib axes, cleared.
        system: A `ws.GuidanceByRepulsion`.
        state: One state, shape (state_size,): [px, py, vx, vy] of every driver, then of every evader.
    """
    objects = np.asarray(state, dtype=np.float64).reshape(-1, 4)
    positions, velocities = objects[:, :2], objects[:, 2:]
    drivers = np.arange(len(objects)) < system.drivers
    reach = max(HERD_REACH, 1.08 * float(np.abs(positions[~drivers]).max()))
    beyond = (np.abs(positions) > reach).any(axis=1)

    for radius in RINGS:
        axes.plot(*_circle(radius), color="0.88", linewidth=0.8, zorder=0)
    axes.plot(0.0, 0.0, marker="o", markersize=18, color=TARGET_COLOUR, alpha=0.25, zorder=1)
    axes.plot(0.0, 0.0, marker="+", markersize=12, markeredgewidth=2.0, color=TARGET_COLOUR, zorder=2)
    for chosen, colour, marker, size, name in (
        (~drivers, EVADER_COLOUR, "o", 9, "evader"),
        (drivers & ~beyond, DRIVER_COLOUR, "^", 11, "driver"),
    ):
        axes.quiver(
            *positions[chosen].T,
            *(ARROW_SECONDS * velocities[chosen]).T,
            angles="xy",
            scale_units="xy",
            scale=1.0,
            width=0.006,
            color=colour,
            alpha=0.6,
            zorder=3,
        )
        axes.plot(
            *positions[chosen].T,
            linestyle="none",
            marker=marker,
            markersize=size,
            color=colour,
            markeredgecolor="white",
            label=name,
            zorder=4,
        )
    edge = np.clip(positions[drivers & beyond], -0.97 * reach, 0.97 * reach)
    axes.plot(*edge.T, linestyle="none", marker="^", markersize=9, color=DRIVER_COLOUR, alpha=0.35, zorder=4)
    axes.plot([], [], linestyle="none", marker="+", markeredgewidth=2.0, color=TARGET_COLOUR, label="target")
    axes.legend(loc="upper right", frameon=False, fontsize=8, ncols=3, handletextpad=0.1, columnspacing=0.8)

    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.8")
    for radius in RINGS:
        axes.text(
            0.0, -radius, f"{radius:g} m", color="0.6", fontsize=7, ha="center", va="center", zorder=0.5
        )


def _circle(radius: float) -> np.ndarray:
    angle = np.linspace(0.0, 2.0 * np.pi, 100)
    return radius * np.stack([np.cos(angle), np.sin(angle)])


WAVE_COLOUR = "#0072B2"


def draw_quantum(axes: Any, system: Any, state: np.ndarray) -> None:
    """Draws the probability density of the particle over the box, with that of the target state behind it.

    Args:
        axes: Matplotlib axes, cleared.
        system: A `ws.QuantumControl`.
        state: One state, shape (state_size,): [Re psi_1, Im psi_1, Re psi_2, ...].
    """
    waves = np.asarray(state, dtype=np.float64).reshape(-1, 2)
    # Zero at the walls, and of integral 1 over the box: states are normalised to a sum of 1.
    x = system.dx * np.arange(system.points + 2)
    density, target = (
        np.pad(d, 1) / system.dx for d in ((waves**2).sum(1), system.eigenstate(system.target) ** 2)
    )
    axes.fill_between(x, target, color="0.85", linewidth=0.0, label=f"eigenstate {system.target}", zorder=1)
    axes.plot(x, target, color="0.7", linewidth=1.0, zorder=2)
    axes.fill_between(x, density, color=WAVE_COLOUR, alpha=0.25, linewidth=0.0, zorder=3)
    axes.plot(x, density, color=WAVE_COLOUR, linewidth=2.2, label=r"$|\psi|^2$", zorder=4)
    axes.legend(loc="upper right", frameon=False, fontsize=8, ncols=2)
    axes.set_xlim(0.0, system.length)
    # An eigenstate is 2 / length high; two of them together are up to twice that.
    axes.set_ylim(0.0, max(4.2 / system.length, 1.2 * float(density.max())))
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines["top"].set_visible(False)
    for side in ("left", "right"):
        axes.spines[side].set(color="0.25", linewidth=2.5)  # the walls
    axes.spines["bottom"].set_color("0.55")


QUADROTOR_REACH = 2.6  # how far a picture shows the plane in every direction [m]
ARM = 0.3  # drawn length of an arm [m], larger than life


def draw_quadrotor(axes: Any, system: Any, state: np.ndarray) -> None:
    """Draws a quadrotor from the side (x to the right, z up): arms, rotors, thrust, velocity, and the target.

    Args:
        axes: Matplotlib axes, cleared.
        system: A `ws.Quadrotor`.
        state: One state, shape (13,): position, velocity, quaternion (w, x, y, z), body rates.
    """
    px, _, pz, vx, _, vz, w, x, y, z = (float(k) for k in state[:10])
    # where the body's axes point, seen from the side
    forward = np.array([1 - 2 * (y * y + z * z), 2 * (x * z - w * y)])
    left = np.array([2 * (x * y - w * z), 2 * (y * z + w * x)])
    up = np.array([2 * (x * z + w * y), 1 - 2 * (x * x + y * y)])
    middle = np.array([px, pz])
    axes.plot(0, 0, marker="+", markersize=16, markeredgewidth=2, color=TARGET_COLOUR, zorder=1)
    axes.arrow(*middle, ARROW_SECONDS * vx, ARROW_SECONDS * vz, color="0.6", width=0.01, zorder=2)
    for i, (a, b) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1))):
        rotor = middle + ARM * (a * forward + b * left) / np.sqrt(2)
        axes.plot(*zip(middle, rotor), color="0.25", linewidth=3, zorder=3)
        disc = np.array([rotor - 0.4 * ARM * forward, rotor + 0.4 * ARM * forward]) + 0.06 * up
        axes.plot(disc[:, 0], disc[:, 1], color=POLE_COLOURS[0 if i < 2 else 1], linewidth=4, zorder=4)
    axes.plot(*zip(middle, middle + 0.5 * up), color=POLE_COLOURS[3], linewidth=1.5, zorder=2)
    axes.set_xlim(-QUADROTOR_REACH, QUADROTOR_REACH)
    axes.set_ylim(-QUADROTOR_REACH, QUADROTOR_REACH)
    axes.set_aspect("equal")
    axes.tick_params(labelsize=8, labelcolor="0.45", color="0.55")
    axes.set_ylabel("z [m]", fontsize=8)

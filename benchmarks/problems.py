"""What the benchmarks train: the published problems, in numbers and arrays that need no library but numpy."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Published:
    """A problem as it was published.

    Attributes:
        title: Of the page.
        system: Parameters of the peers' step.
        widths: Hidden layers; for quantum the channels of both convolutions.
        horizon: Steps of a rollout.
        loss: "final" or "running".
        control_cost: Weight of the mean squared control.
        controls: Number of controls.
        tolerance: Of a float32 gradient: its error over the norm of the float64 one.
    """

    title: str
    system: Mapping[str, float]
    widths: tuple[int, ...]
    horizon: int
    loss: str
    control_cost: float
    controls: int
    # Rounding over 60 or 100 steps gives 1e-6 (measured).
    tolerance: float = 2e-5


POLES, DRIVERS, EVADERS, POINTS = 4, 2, 4, 32
PUBLISHED = {
    "cartpole": Published(
        "the cart-pole (4 poles)",
        {"dt": 0.01, "gravity": 9.8, "pole_mass": 0.1, "total_mass": 1.1, "length": 0.5},
        (100, 100),
        100,
        "final",
        0.0,
        1,
    ),
    "guidance": Published(
        "guidance by repulsion (2 drivers, 4 evaders)",
        {
            "dt": 4 / 60,
            "driver_drag": 1.0,
            "driver_repulsion": 0.2,
            "evader_drag": 4.0,
            "evader_repulsion": 15.0,
            "flocking": 0.2,
            "flocking_length": 0.5,
            "softening": 0.1,
        },
        (100, 100),
        60,
        "running",
        0.1,
        4,
    ),
    "quantum": Published(
        "quantum control (32 grid points, target state 3)",
        {"dt": 0.0625, "length": 2.0, "target": 3},
        (60, 60),
        128,
        "running",
        0.0,
        1,
        # A wave of 128 steps turns by 80 rad and forgets no rounding: 1e-4 (measured, ours and peers).
        tolerance=1e-3,
    ),
}


@dataclass(frozen=True)
class Case:
    """What is trained: problem, hidden layers, number of worlds, flow, steps."""

    problem: str
    widths: tuple[int, ...]
    batch: int
    flow: str
    horizon: int

    @property
    def columns(self) -> dict[str, Any]:
        """What tells rows apart."""
        return {"network": "x".join(map(str, self.widths)), "batch": self.batch, "flow": self.flow}

    def arrays(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Initial states drawn as the published ones are, and Glorot-uniform weights in torch's layout."""
        random = np.random.default_rng(0)
        x0 = _initial_states(self.problem, self.batch, random).astype(np.float32)
        weights = []
        for shape in self._shapes(x0.shape[1]):
            limit = (6.0 / (np.prod(shape[2:]) * (shape[0] + shape[1]))) ** 0.5
            weights.append(random.uniform(-limit, limit, shape).astype(np.float32))
            weights.append(np.zeros(shape[0], np.float32))
        return x0, weights

    def _shapes(self, state_size: int) -> list[tuple[int, ...]]:
        if self.problem == "quantum":
            width = self.widths[0]
            positions = ((POINTS - 3) // 2 - 2) // 2 + 1
            return [(width, 1, 3, 2), (width, width, 3), (1, positions * width)]
        sizes = [state_size, *self.widths, PUBLISHED[self.problem].controls]
        return [(b, a) for a, b in pairwise(sizes)]

    def peer_arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """What a peer is built from."""
        published = PUBLISHED[self.problem]
        x0, weights = self.arrays()
        named = {"problem": self.problem, "control_cost": published.control_cost}
        return [published.system, self.widths, x0, weights, self.horizon, self.flow, published.loss], named


def _initial_states(problem: str, n: int, random: np.random.Generator) -> np.ndarray:
    if problem == "cartpole":
        # poles hanging, 30 degrees either way
        x0 = random.uniform(-1.0, 1.0, (n, 2 + 2 * POLES))
        x0[:, 2::2] = np.pi + x0[:, 2::2] * np.pi / 6
        return x0
    if problem == "guidance":
        x0 = np.zeros((n, DRIVERS + EVADERS, 2, 2))
        x0[:, :DRIVERS, 0] = _annulus(3.0, (n, DRIVERS), random)
        x0[:, DRIVERS:, 0] = _annulus(1.0, (n, 1), random) + random.uniform(-0.5, 0.5, (n, EVADERS, 2))
        return x0.reshape(n, -1)
    modes = (
        np.sin(np.pi * np.outer([1, 2], np.arange(1, POINTS + 1)) / (POINTS + 1))
        / (POINTS + 1) ** 0.5
        * 2**0.5
    )
    amplitudes = random.normal(size=(n, 2)) * np.exp(2j * np.pi * random.uniform(size=(n, 2)))
    psi = (amplitudes / np.linalg.norm(amplitudes, axis=1, keepdims=True)) @ modes
    return np.stack([psi.real, psi.imag], axis=-1).reshape(n, -1)


def _annulus(inner: float, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    angle, radius = 2 * np.pi * random.uniform(size=shape), inner + random.uniform(size=shape)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)

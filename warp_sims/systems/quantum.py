"""Quantum control as users name it; the physics is in kernels/systems/quantum.py."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np

from ..kernels.system import DeviceFunctions
from ..kernels.systems import quantum as _quantum
from .system import System, check_types, require, require_positive

__all__ = ["QuantumControl"]


@dataclasses.dataclass(frozen=True)
class QuantumControl(System):
    """A quantum particle in a box, steered by the strength of a linear potential into an eigenstate of the
    empty box.

    State [Re psi_1, Im psi_1, Re psi_2, ...] at the inner grid points, sum |psi|^2 = 1. Control [field
    strength]. Cost of a state: 1 - |<e_target, psi>|^2; the running loss sums it over the steps. Units with
    hbar = 1, kinetic term without the factor 1/2.
    Equations: kernels/systems/quantum.py. The defaults are the published values.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    running_reduction: ClassVar[Literal["mean", "sum"]] = "sum"
    show_controls: ClassVar[bool] = True

    train_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"horizon": 128, "loss": "running", "zero_last": False, "policy": "wavecnn"}
    )
    # a wave of 128 steps turns by 80 rad and forgets no rounding: gradients of float32 are off by 1e-4 (ours
    # and those of peers)
    bench_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"scaled": ("points", (16, 32, 64, 128)), "tolerance": 1e-3}
    )

    points: int = 32
    """Inner grid points, at least 4."""
    dt: float = 0.0625
    """Time step."""
    target: int = 3
    """Eigenstate to reach, 1 (the ground state) ... points."""
    length: float = 2.0
    """Width of the box."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "points", self.points >= 4, "at least 4")
        require(
            self,
            "target",
            1 <= self.target <= self.points,
            f"1 (the ground state) ... {self.points} (points)",
        )
        require_positive(self, "dt", "length")
        super().__post_init__()

    @property
    def state_size(self) -> int:
        return 2 * self.points

    @property
    def control_size(self) -> int:
        return 1

    @property
    def dx(self) -> float:
        """Distance of two grid points."""
        return self.length / (self.points + 1)

    def eigenstate(self, n: int) -> np.ndarray:
        """Eigenstate n of the empty box at the grid points, (points,), normalised to sum e^2 = 1; n = 1
        is the ground state.
        """
        e = np.sin(np.pi * n * np.arange(1, self.points + 1) / (self.points + 1))
        return e / np.sqrt(np.sum(e**2))

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _quantum.make_functions(self.points, dtype)

    def parameters(self, dtype: Any) -> Any:
        params = _quantum.make_params(self.points, dtype)()
        params.dt, params.dx = self.dt, self.dx
        params.kappa, params.field = 2 * self.dx**2 / self.dt, self.dx**3
        params.eigenstate = self.eigenstate(self.target).tolist()
        return params

    def draw(self, axes: Any, state: np.ndarray) -> None:
        """Draws the probability density of the particle, that of the target state behind it."""
        from ..pictures.drawing import draw_quantum

        draw_quantum(axes, self, state)

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray:
        """Initial states (n, state_size): random superpositions of the two lowest eigenstates with
        random phases.

        Training and test set are drawn at once. n = 256 and seed 42 give the published sets, bit for bit
        in float32.
        """
        lowest = np.stack([self.eigenstate(1), self.eigenstate(2)]).astype(np.float32)
        if self.points == 32:
            # Drawn with another library's sine: what it gave is shipped, not recomputed.
            with np.load(Path(__file__).parents[1] / "data" / "quantum_initial_states.npz") as published:
                if (n, seed) == (256, 42):
                    return published[split].reshape(n, self.state_size)
                lowest = published["eigenstates"]
        random = np.random.RandomState(seed)
        # Rounded to float32 before anything is computed, as the published sets are.
        weights = [random.normal(size=(2 * n, 1)).astype(np.float32) for _ in lowest]
        phases = [random.uniform(0, 2 * np.pi, (2 * n, 1)).astype(np.float32) for _ in lowest]
        norm = np.sqrt(weights[0] ** 2 + weights[1] ** 2)
        first, second = (c * np.exp(1j * phase) / norm * e for c, phase, e in zip(weights, phases, lowest))
        psi = first + second
        part = psi[:n] if split == "train" else psi[n:]
        states = np.stack([part.real, part.imag], axis=-1).astype(np.float32)
        return states.reshape(n, self.state_size)

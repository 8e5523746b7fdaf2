"""What all articulated systems share: from a model and its settings to device functions."""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np

from ..kernels import articulated as _articulated
from ..kernels.articulated_tables import Structure
from ..kernels.system import DeviceFunctions
from ..system import System
from .model import Model

__all__ = ["Articulated"]


class Articulated(System):
    """Base of `ws.Robot` and of the tasks built on it. A subclass has the attributes below, as dataclass fields or
    as properties; `kernels/articulated.py` has the equations.
    """

    model: Model
    dt: float
    substeps: int
    implicit: bool
    friction: Literal["smooth", "linear"]
    approach: bool
    contact_stiffness: float
    contact_damping: float
    friction_stiffness: float
    slip_speed: float
    limit_stiffness: float
    limit_damping: float

    @property
    def state_size(self) -> int:
        return self.model.qpos_size + len(self.model.joints)

    @property
    def control_size(self) -> int:
        return len(self.model.actuators)

    @functools.cached_property
    def structure(self) -> Structure:
        """What the kernels are compiled for."""
        return self.model.structure(
            substeps=self.substeps,
            implicit=self.implicit,
            smooth=self.friction == "smooth",
            approach=self.approach,
        )

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _articulated.make_functions(self.structure, dtype)

    def parameters(self, dtype: Any) -> Any:
        import warp as wp

        settings = (
            self.dt / self.substeps,
            self.contact_stiffness,
            self.contact_damping,
            self.friction_stiffness,
            self.slip_speed,
            self.limit_stiffness,
            self.limit_damping,
        )
        params = _articulated.make_params(dtype)()
        numbers = self.model.numbers(self.structure, settings)
        params.numbers = wp.array(numbers, dtype=dtype, device="cpu")
        return params

    def dynamics(
        self, qpos: np.ndarray, qvel: np.ndarray, ctrl: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a substep is made of, in float64 by the CPU kernels; not differentiable, and not made for speed.

        Args:
            qpos: (n, nq).
            qvel: (n, nv).
            ctrl: (n, control_size).

        Returns:
            Accelerations (n, nv); the mass matrix (n, nv, nv) with armature, and with `implicit` the damping of a
            substep; and the joint forces (n, nv) that gravity and velocity need (MuJoCo's `qfrc_bias`).

        Raises:
            ValueError: a shape does not fit.
        """
        import warp as wp

        n, nv = len(np.atleast_2d(qpos)), len(self.model.joints)
        given = {"qpos": qpos, "qvel": qvel, "ctrl": ctrl}
        sizes = {"qpos": self.model.qpos_size, "qvel": nv, "ctrl": self.control_size}
        inputs = []
        for name, value in given.items():
            array = np.ascontiguousarray(value, np.float64)
            if array.shape != (n, sizes[name]):
                raise ValueError(f"dynamics: {name} has shape {array.shape}, expected {(n, sizes[name])}")
            inputs.append(wp.array(array, dtype=wp.float64, device="cpu"))
        outputs = [wp.zeros(shape, dtype=wp.float64, device="cpu") for shape in ((n, nv), (n, nv, nv), (n, nv))]
        kernel = _articulated.make_inspect(self.structure, wp.float64)
        wp.launch(kernel, n, [*inputs, self.parameters(wp.float64)], outputs, device="cpu")
        qacc, mass, bias = (output.numpy() for output in outputs)
        return qacc, mass, bias

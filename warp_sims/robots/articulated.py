"""The base class of all articulated systems: makes device functions from a model and its settings."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np

from ..kernels.system import DeviceFunctions, ParameterFunctions
from ..kernels.systems import articulated as _articulated
from ..kernels.systems.articulated_tables import Structure
from ..systems.system import System
from .geometry import random_qpos
from .model import Model, number_names
from .stability import Bound, stability_bound

__all__ = ["Articulated"]


@functools.cache
def _with(functions: DeviceFunctions, own: ParameterFunctions) -> DeviceFunctions:
    return functions._replace(parameters=own)


class Articulated(System):
    """Base of `ws.Robot` and of the tasks built on it. A subclass has the attributes below, as dataclass
    fields or as properties; `ws.Robot` says what they are, kernels/systems/articulated.py has the equations.
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
        return self._numbered(_articulated.make_functions(self.structure, dtype), dtype)

    def _numbered(self, functions: DeviceFunctions, dtype: Any) -> DeviceFunctions:
        """The functions, with their physical parameters."""
        own = _articulated.make_parameter_functions(self.structure, dtype, self.parameter_names)
        return _with(functions, own)

    @functools.cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the physical parameters (`parameters=` of a rollout), see docs/robots.md."""
        return number_names(self.model)

    @functools.cached_property
    def physical_parameters(self) -> dict[str, float]:
        """The model's values of the physical parameters by name, in kg, m, kg m^2, N m s/rad or N s/m, and
        for gears N m or N a unit of force.
        """
        words = self.model.numbers(self.structure, (0.0,) * 7)
        return {
            name: float(words[place[0]])
            for name, place in zip(self.parameter_names, self.structure.number_places())
        }

    @functools.cached_property
    def parameter_scales(self) -> tuple[float, ...]:
        """By how much a parameter may differ if the robot's value is 0: a product of inertia by the link's
        inertia.
        """
        scales = [1.0] * (2 * len(self.model.joints) + len(self.model.actuators))
        for link in self.model.links:
            if link.mass > 0:
                moment = min(link.inertia[:3])
                scales += [1.0, *[0.1] * 3, *[moment] * 6]
        return tuple(scales)

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

    @functools.cached_property
    def dt_bound(self) -> Bound:
        """The longest stable substep [s] of this robot with these stiffnesses, and what bounds it; see
        stability.py. `dt / substeps` should stay below it.
        """
        return stability_bound(
            self.model,
            contact_stiffness=self.contact_stiffness,
            contact_damping=self.contact_damping,
            friction_stiffness=self.friction_stiffness,
            slip_speed=self.slip_speed,
            smooth=self.friction == "smooth",
            limit_stiffness=self.limit_stiffness,
            implicit=self.implicit,
        )

    def check_step(self) -> None:
        """Raises ValueError if the substep is longer than `dt_bound`."""
        bound, step = self.dt_bound, self.dt / self.substeps
        if step > bound.seconds:
            least = math.ceil(self.dt / bound.seconds)
            raise ValueError(
                f"{type(self).__name__}: a substep dt / substeps is {step:.3g} s, expected at most "
                f"{bound.seconds:.3g} s, beyond which the {bound.cause} is unstable; give "
                f"substeps={least} or more, smaller stiffnesses, or check_stability=False to simulate it all "
                "the same"
            )

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray:
        """Initial states (n, state_size): joints and velocities uniform within 0.05 of rest (rad, m,
        rad/s, m/s).
        """
        random = np.random.RandomState((seed + (split == "test")) % 2**32)
        nv = len(self.model.joints)
        rows = [
            np.concatenate([random_qpos(self.model, random, 0.05), random.uniform(-0.05, 0.05, nv)])
            for _ in range(n)
        ]
        return np.array(rows).reshape(n, self.state_size)

    def draw(self, axes: Any, state: np.ndarray) -> None:
        """Draws the robot's shapes from the side, on its ground."""
        from .picture import draw_robot

        draw_robot(axes, self.model, np.asarray(state, np.float64)[: self.model.qpos_size])

    def dynamics(
        self, qpos: np.ndarray, qvel: np.ndarray, ctrl: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Accelerations, mass matrix and bias of a substep, in float64 by the CPU kernels; neither
        differentiable nor fast.

        Args:
            qpos: (n, nq).
            qvel: (n, nv).
            ctrl: (n, control_size).

        Returns:
            Accelerations (n, nv); the mass matrix (n, nv, nv) with armature, and with `implicit` the damping
            of a substep; and the joint forces (n, nv) that would hold the accelerations at zero against
            gravity, velocity, contact and fluid.

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
        outputs = [
            wp.zeros(shape, dtype=wp.float64, device="cpu") for shape in ((n, nv), (n, nv, nv), (n, nv))
        ]
        kernel = _articulated.make_inspect(self.structure, wp.float64)
        wp.launch(kernel, n, [*inputs, self.parameters(wp.float64)], outputs, device="cpu")
        qacc, mass, bias = (output.numpy() for output in outputs)
        return qacc, mass, bias

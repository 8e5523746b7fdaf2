"""`ws.Robot`: robots read from files."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Literal

from ..kernels.systems.articulated_tables import DOF_SIZE
from ..systems.system import check_types, require, require_nonnegative, require_one, require_positive
from .articulated import Articulated
from .model import Model, as_model

__all__ = ["Robot"]


@dataclasses.dataclass(frozen=True)
class Robot(Articulated):
    """An articulated robot with contact, read from an MJCF or a URDF file.

        robot = ws.Robot.from_mjcf("hopper.xml")

    State [qpos, qvel] in MuJoCo's order, quaternions w, x, y, z. Control: the actuators' ctrl. A control step
    `dt` is `substeps` steps of semi-implicit Euler with the control held. Contact and joint limits are smooth
    springs, whose numbers are fields here. The numbers of MuJoCo's solver (solref, solimp, margin) belong to
    another model of contact and are not used. Equations: kernels/systems/articulated.py. What is read from a
    file, and what raises an error: docs/robots.md. A robot has no loss of its own: give `ws.rollout` and
    `ws.TrainConfig` a callable of (states, controls).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range, or the substep is longer than `dt_bound`.
    """

    model: Model
    """Masses, joints, actuators, contact points: nested tuples, made by `from_mjcf` and `from_urdf`."""
    dt: float = 0.01
    """Control step [s]."""
    substeps: int = 1
    """Equal steps of the integrator in a control step."""
    implicit: bool = False
    """Whether joint damping acts on the velocity after a substep, as in MuJoCo's Euler."""
    friction: Literal["smooth", "linear"] = "linear"
    """Friction mu N v / sqrt(|v|^2 + slip_speed^2), or min(friction_stiffness |v|, mu N) against v."""
    approach: bool = False
    """Whether contact damps approaching bodies only; friction is then bounded by the undamped force."""
    contact_stiffness: float = 2e4
    """Normal force per depth, ke [N/m]."""
    contact_damping: float = 0.05
    """Damping of the normal force in proportion to the depth, kd [s/m]."""
    friction_stiffness: float = 1e3
    """Friction per slip speed where friction is linear, kf [N s/m]."""
    slip_speed: float = 0.1
    """Speed below which smooth friction falls off, vs [m/s]."""
    limit_stiffness: float = 1e3
    """Force of a joint limit per way beyond it [N m/rad, N/m]; 0: none."""
    limit_damping: float = 0.05
    """Damping of the same in proportion to the way beyond [s/rad, s/m]."""
    check_stability: bool = True
    """Whether a substep longer than `dt_bound` raises ValueError."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_model(self.model))
        check_settings(self)
        if not self.model.actuators:
            raise ValueError(
                f"Robot: {self.model.name!r} has no actuator, expected at least one; read it with "
                "actuators='torques' for one on every joint"
            )
        check_masses(self.model)
        super().__post_init__()
        if self.check_stability:
            self.check_step()

    @classmethod
    def from_mjcf(
        cls,
        path: str | os.PathLike[str],
        *,
        dt: float | None = None,
        substeps: int | None = None,
        implicit: bool | None = None,
        contact: Literal["ground", "all", "none"] = "ground",
        limits: bool = True,
        actuators: Literal["model", "torques"] = "model",
        **settings: Any,
    ) -> Robot:
        """Reads an MJCF file. Needs the package `mujoco`, whose compiler reads it.

        Args:
            path: The file, or its text, which begins with "<".
            dt: Control step [s]. None: the file's time step.
            substeps: None: the least number that `dt_bound` allows.
            implicit: None: as in MuJoCo's Euler, so implicit unless the file says eulerdamp="disable".
            contact: "ground": spheres, capsules and boxes on a horizontal plane that is fixed to the world.
                "all": spheres on each other too; a file in which other pairs of bodies would collide raises
                an error. "none": no contact.
            limits: Whether joint limits act.
            actuators: "model": those of the file. "torques": a force on every degree of freedom except those
                of free joints.
            **settings: Further fields of `Robot`.

        Raises:
            ImportError: `mujoco` is missing; pip install "warp-sims[robots]".
            ValueError: the file holds something that is not supported, by its name.
        """
        from .mjcf import read_mjcf

        model, found = read_mjcf(path, contact=contact, limits=limits, actuators=actuators)
        return cls._from(model, found, dt, substeps, implicit, settings)

    @classmethod
    def from_urdf(
        cls,
        path: str | os.PathLike[str],
        *,
        dt: float = 0.01,
        substeps: int | None = None,
        implicit: bool = True,
        floating: bool = False,
        contact: Literal["ground", "all", "none"] = "ground",
        limits: bool = True,
        **settings: Any,
    ) -> Robot:
        """Reads a URDF file. Needs the package `mujoco`, whose compiler reads it.

        Controls are the forces on all joints, within the file's effort limits. Visual shapes are left out.

        Args:
            path: The file, or its text, which begins with "<".
            dt: Control step [s].
            substeps: None: the least number that `dt_bound` allows.
            implicit: Whether joint damping is implicit.
            floating: Whether the first link moves freely; else it is fixed to the world.
            contact: As for `from_mjcf`, with the ground at height 0.
            limits: Whether joint limits act.
            **settings: Further fields of `Robot`.

        Raises:
            ImportError: `mujoco` is missing; pip install "warp-sims[robots]".
            ValueError: the file holds something that is not supported, by its name.
        """
        from .mjcf import read_urdf

        model, found = read_urdf(path, floating=floating, contact=contact, limits=limits)
        return cls._from(model, found, dt, substeps, implicit, settings)

    @classmethod
    def _from(
        cls,
        model: Model,
        found: dict[str, Any],
        dt: float | None,
        substeps: int | None,
        implicit: bool | None,
        settings: dict[str, Any],
    ) -> Robot:
        settings = {**settings, "dt": found["dt"] if dt is None else dt}
        settings["implicit"] = found["implicit"] if implicit is None else implicit
        if substeps is None:
            probe = cls(model, **{**settings, "substeps": 1, "check_stability": False})
            bound = probe.dt_bound.seconds
            substeps = max(1, math.ceil(probe.dt / bound)) if math.isfinite(bound) else 1
        return cls(model, **{**settings, "substeps": substeps})


def check_settings(robot: Articulated) -> None:
    """Checks the fields that all articulated systems share."""
    check_types(robot)
    require_one(robot, "substeps")
    require_positive(robot, "dt", "contact_stiffness", "friction_stiffness", "slip_speed")
    require_nonnegative(robot, "contact_damping", "limit_stiffness", "limit_damping")
    require(robot, "friction", robot.friction in ("smooth", "linear"), "'smooth' or 'linear'")


def check_masses(model: Model) -> None:
    """Raises ValueError if a joint moves no mass: its acceleration would be infinite."""
    mass = [link.mass for link in model.links]
    for i in range(len(mass) - 1, -1, -1):
        if model.links[i].parent:
            mass[model.links[i].parent - 1] += mass[i]
    at = 0
    for link, below in zip(model.links, mass):
        armature = [joint.armature for joint in model.joints[at : at + DOF_SIZE[link.kind]]]
        at += DOF_SIZE[link.kind]
        if below <= 0 and min(armature) <= 0:
            raise ValueError(
                f"Robot: joint {link.joint!r} of body {link.body!r} moves no mass and has no armature, "
                "expected one of both; give the body or one below it a mass"
            )

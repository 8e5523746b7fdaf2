"""Reads MJCF and URDF files as a `Model`. MuJoCo compiles them; what the kernels do not simulate is found
here.

Everything that would move a robot and is not supported raises an error that names it; it is never left out
silently. Settings of MuJoCo's contact solver (solref, solimp, margin, gap, condim beyond friction or none)
have no counterpart here and are ignored.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .build import MJ_BALL, MJ_FREE, build_model, torques, tuple_of
from .contacts import read_contacts, read_shapes
from .model import Geom, Model

DRAWN = ("sphere", "capsule", "ellipsoid", "cylinder", "box")


def need_mujoco() -> Any:
    """Returns the module `mujoco`."""
    try:
        import mujoco
    except ImportError as error:
        raise ImportError('reading robots needs mujoco; pip install "warp-sims[robots]"') from error
    return mujoco


def read_mjcf(
    path: str | os.PathLike[str], *, contact: str, limits: bool, actuators: str
) -> tuple[Model, dict[str, Any]]:
    """A model, and the file's time step and integration of damping as {"dt", "implicit"}."""
    mujoco = need_mujoco()
    _check_choice("from_mjcf", "contact", contact, ("ground", "all", "none"))
    _check_choice("from_mjcf", "actuators", actuators, ("model", "torques"))
    text, name = _text(path)
    try:
        if _is_text(path):
            m = mujoco.MjModel.from_xml_string(text)
        else:  # finds the files that this one includes
            m = mujoco.MjModel.from_xml_path(os.fspath(path))
    except ValueError as error:
        raise ValueError(f"from_mjcf: MuJoCo cannot compile {_short(path)}: {error}") from error
    return _translate(mujoco, m, "from_mjcf", name, contact, limits, actuators == "torques")


def read_urdf(
    path: str | os.PathLike[str], *, floating: bool, contact: str, limits: bool
) -> tuple[Model, dict[str, Any]]:
    """The same of a URDF file, without its visual shapes and with a torque on every joint."""
    mujoco = need_mujoco()
    _check_choice("from_urdf", "contact", contact, ("ground", "all", "none"))
    text, name = _text(path)
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"from_urdf: {_short(path)} is no XML: {error}") from error
    if root.tag != "robot":
        raise ValueError(f"from_urdf: {_short(path)} begins with <{root.tag}>, expected <robot>, a URDF file")
    name = root.get("name", name)
    for joint in root.iter("joint"):
        if joint.find("mimic") is not None:
            raise ValueError(f"from_urdf: joint {joint.get('name')!r} has <mimic>, which is not supported")
    for link in root.iter("link"):
        for visual in link.findall("visual"):
            link.remove(visual)
        for shape in link.findall("collision"):
            geometry = shape.find("geometry")
            if contact == "none":
                link.remove(shape)
            elif geometry is not None and geometry.find("mesh") is not None:
                raise ValueError(
                    f"from_urdf: link {link.get('name')!r} collides as a mesh, which is not supported; give "
                    "spheres, cylinders with round ends or boxes in its place, or contact='none'"
                )
    for extension in root.findall("mujoco"):
        root.remove(extension)
    extension = ElementTree.SubElement(root, "mujoco")
    ElementTree.SubElement(
        extension,
        "compiler",
        fusestatic="false",
        discardvisual="false",
        strippath="false",
        balanceinertia="false",
    )
    try:
        spec = mujoco.MjSpec.from_string(ElementTree.tostring(root, encoding="unicode"))
        if floating:
            bodies = spec.worldbody.bodies
            if len(bodies) != 1:
                raise ValueError(f"the world holds {len(bodies)} bodies, expected one to float")
            bodies[0].add_freejoint()
        m = spec.compile()
    except ValueError as error:
        raise ValueError(f"from_urdf: MuJoCo cannot compile {_short(path)}: {error}") from error
    return _translate(mujoco, m, "from_urdf", name, contact, limits, True, ground=0.0)


def _check_choice(call: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{call}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def _text(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The text of a file, and a name for it."""
    if _is_text(path):
        return str(path), "robot"
    file = Path(path)
    try:
        return file.read_text(), file.stem
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error.strerror or error}); give the path of a file"
        ) from error


def _is_text(path: Any) -> bool:
    return isinstance(path, str) and path.lstrip().startswith("<")


def _short(path: Any) -> str:
    return "the given text" if _is_text(path) else os.fspath(path)


class _Refusals:
    """What a model holds that is not supported, collected so that one error names it all."""

    def __init__(self, mujoco: Any, m: Any) -> None:
        self.found: list[str] = []
        self._mujoco, self._m = mujoco, m

    def name(self, kind: str, i: int) -> str:
        given = self._mujoco.mj_id2name(self._m, getattr(self._mujoco.mjtObj, f"mjOBJ_{kind.upper()}"), i)
        return f"{kind} {given!r}" if given else f"{kind} number {i}"

    def any(self, kind: str, attribute: str, what: str) -> None:
        """Refuses elements of a kind whose numbers under this attribute, if MuJoCo has it, are not all
        zero."""
        values = getattr(self._m, attribute, None)
        if values is None:
            return
        values = np.asarray(values)
        for i in range(len(values)):
            if np.any(values[i] != 0):
                self.found.append(f"{what} of {self.name(kind, i)}")

    def whole(self, count: str, kind: str, what: str) -> None:
        """Refuses all elements of a kind."""
        for i in range(int(getattr(self._m, count, 0))):
            self.found.append(f"{what} ({self.name(kind, i)})" if kind else what)


def _refuse(mujoco: Any, m: Any, call: str, torque_controls: bool) -> None:
    r = _Refusals(mujoco, m)
    r.whole("neq", "equality", "equality constraint")
    r.whole("nflex", "flex", "flexible body")
    r.whole("npair", "pair", "contact pair")
    for i in range(m.ntendon):
        if _tendon_acts(mujoco, m, i):
            r.found.append(f"tendon ({r.name('tendon', i)})")
    if m.nplugin:
        r.found.append("plugins")
    for b in range(m.nbody):
        if m.body_mocapid[b] >= 0:
            r.found.append(f"mocap of {r.name('body', b)}")
    r.any("body", "body_gravcomp", "gravity compensation")
    for k in range(m.nv):
        if m.dof_frictionloss[k]:
            r.found.append(f"frictionloss of {r.name('joint', int(m.dof_jntid[k]))}")
    for j in range(m.njnt):
        label = r.name("joint", j)
        stiffness = np.ravel(np.asarray(m.jnt_stiffness)[j])
        if m.jnt_type[j] in (MJ_FREE, MJ_BALL) and stiffness.any():
            r.found.append(f"stiffness of {label}, a {'free' if m.jnt_type[j] == MJ_FREE else 'ball'} joint")
        if m.jnt_type[j] == MJ_BALL and m.jnt_limited[j]:
            r.found.append(f"range of {label}, a ball joint")
        for values, what in ((stiffness, "stiffness"), *_polynomials(m, j)):
            if len(values) > 1 and values[1:].any():
                r.found.append(f"polynomial {what} of {label}")
        if m.jnt_actfrclimited[j] and not torque_controls:
            r.found.append(f"actuatorfrcrange of {label}")
    r.any("joint", "jnt_actgravcomp", "actuatorgravcomp")
    if not torque_controls:
        _refuse_actuators(mujoco, m, r)
    if np.any(m.opt.wind):
        r.found.append("wind")
    if (m.opt.density or m.opt.viscosity) and np.any(np.asarray(m.geom_fluid)[:, 0]):
        r.found.append("fluid forces by the ellipsoid model")
    flags = mujoco.mjtDisableBit
    for what in ("actuation", "spring", "damper", "passive", "clampctrl"):
        bit = getattr(flags, f"mjDSBL_{what.upper()}", 0)  # releases differ in them
        if m.opt.disableflags & int(bit):
            r.found.append(f'option flag {what}="disable"')
    if r.found:
        raise ValueError(
            f"{call}: not supported: {'; '.join(r.found)}. Take it out of the file; docs/robots.md lists "
            "what is simulated"
        )


def _polynomials(m: Any, j: int) -> list[tuple[np.ndarray, str]]:
    """Higher terms of springs and dampers, under the names that releases of MuJoCo have for them."""
    k = int(m.jnt_dofadr[j])
    found = [(np.ravel(np.asarray(m.dof_damping)[k]), "damping")]
    for attribute, at, what in (("jnt_stiffnesspoly", j, "stiffness"), ("dof_dampingpoly", k, "damping")):
        values = getattr(m, attribute, None)
        if values is not None:
            found.append((np.concatenate([[0.0], np.ravel(np.asarray(values)[at])]), what))
    return found


def _refuse_actuators(mujoco: Any, m: Any, r: _Refusals) -> None:
    for a in range(m.nactuator if hasattr(m, "nactuator") else m.nu):
        label = r.name("actuator", a)
        joint = int(m.actuator_trntype[a]) == int(mujoco.mjtTrn.mjTRN_JOINT)
        if not joint:
            r.found.append(f"transmission of {label}, which is not a joint")
        elif int(m.jnt_type[int(m.actuator_trnid[a][0])]) in (MJ_FREE, MJ_BALL):
            r.found.append(f"transmission of {label} to a free or ball joint")
        if int(m.actuator_dyntype[a]):
            r.found.append(f"activation dynamics of {label}")
        if int(m.actuator_gaintype[a]):
            r.found.append(f"gain of {label}, which is not fixed")
        if int(m.actuator_biastype[a]) > 1:
            r.found.append(f"bias of {label}, which is neither none nor affine")
    for attribute, what in (
        ("actuator_delay", "delay"),
        ("actuator_armature", "armature"),
        ("actuator_damping", "damping"),
        ("actuator_dampingpoly", "damping"),
    ):
        r.any("actuator", attribute, what)


def _tendon_acts(mujoco: Any, m: Any, i: int) -> bool:
    """Whether a tendon has any force, limit or mass, or anything acts on it."""
    for name in (
        "stiffness",
        "damping",
        "stiffnesspoly",
        "dampingpoly",
        "frictionloss",
        "limited",
        "armature",
        "actfrclimited",
    ):
        values = getattr(m, f"tendon_{name}", None)
        if values is not None and np.any(np.asarray(values)[i] != 0):
            return True
    kind = int(mujoco.mjtTrn.mjTRN_TENDON)
    return any(int(t) == kind and int(ids[0]) == i for t, ids in zip(m.actuator_trntype, m.actuator_trnid))


def _translate(
    mujoco: Any,
    m: Any,
    call: str,
    name: str,
    contact: str,
    limits: bool,
    torque_controls: bool,
    ground: float | None = None,
) -> tuple[Model, dict[str, Any]]:
    _refuse(mujoco, m, call, torque_controls)
    flags = mujoco.mjtDisableBit
    off = int(m.opt.disableflags)
    names = {
        "body": [m.body(b).name or f"body {b}" for b in range(m.nbody)],
        "joint": [m.joint(j).name or f"{m.body(int(m.jnt_bodyid[j])).name} joint {j}" for j in range(m.njnt)],
    }
    if not m.njnt:
        raise ValueError(f"{call}: {name!r} has no joint, expected at least one")
    gravity = np.zeros(3) if off & int(flags.mjDSBL_GRAVITY) else np.asarray(m.opt.gravity)
    model, placed = build_model(
        m,
        name=name,
        gravity=gravity,
        density=float(m.opt.density),
        viscosity=float(m.opt.viscosity),
        actuators=torques(m) if torque_controls else None,
        names=names,
    )
    shapes = read_shapes(m, placed)
    model = model._replace(
        geoms=tuple(
            Geom(s.link, s.kind, tuple_of(s.size), tuple_of(s.centre), tuple_of(s.axes))
            for s in shapes
            if s.kind in DRAWN and s.link and not (s.kind == "sphere" and s.size[0] <= 0)
        )
    )
    if not limits or off & int(flags.mjDSBL_LIMIT):
        model = model._replace(limits=())
    if contact != "none" and not off & int(flags.mjDSBL_CONTACT):
        height, spheres, pairs = read_contacts(m, call, shapes, contact, ground)
        model = model._replace(ground=height, spheres=spheres, pairs=pairs)
    implicit = not off & int(flags.mjDSBL_EULERDAMP)
    return model, {"dt": float(m.opt.timestep), "implicit": implicit}

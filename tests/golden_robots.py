"""The robots of golden/articulated as systems, from the numbers that the files hold: without the package
`mujoco`."""

import types
from pathlib import Path

import numpy as np
import torch

import warp_sims as ws
from warp_sims.robots.build import build_model, torques
from warp_sims.robots.model import Sphere

FOLDER = Path(__file__).parent / "golden" / "articulated"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
SETTINGS = ("free", "implicit", "contact_linear", "contact_smooth")


def numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


CASES = [
    (name, setting)
    for name in NAMES
    for setting in SETTINGS
    if f"{setting}_qpos" in np.load(FOLDER / f"{name}.npz").files
]


def robot(golden: dict[str, np.ndarray], setting: str, *, torque_controls=False, **options) -> ws.Robot:
    """The robot of a file under a setting; with a force on every joint where it has no actuators or they are
    asked for.
    """
    m = types.SimpleNamespace(
        **{k.removeprefix("model_"): v for k, v in golden.items() if k.startswith("model_")}
    )
    forces = torque_controls or not len(m.actuator_trnid)
    model, placed = build_model(
        m,
        gravity=m.gravity,
        density=float(m.density),
        viscosity=float(m.viscosity),
        actuators=torques(m) if forces else None,
    )
    if setting.startswith("contact"):
        friction = float(golden["contact_mu"])
        spheres = []
        rows = zip(golden["contact_body"], golden["contact_point"], golden["contact_radius"])
        for body, point, radius in rows:
            link, turn, shift = placed[int(body)]
            spheres.append(Sphere(link, tuple(shift + turn @ point), float(radius), friction))
        model = model._replace(spheres=tuple(spheres))
        options = {
            "contact_stiffness": float(golden["contact_ke"]),
            "contact_damping": float(golden["contact_kd"]),
            "friction_stiffness": float(golden["contact_kf"]),
            "slip_speed": float(golden["contact_vs"]),
            "limit_stiffness": float(golden["limit_ke"]),
            "limit_damping": float(golden["limit_kd"]),
            "friction": setting.removeprefix("contact_"),
            **options,
        }
    else:
        model = model._replace(limits=())
    options = {"dt": float(golden["dt"]), **options}
    return ws.Robot(model, implicit=setting == "implicit", check_stability=False, **options)


def state(golden, setting, system, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """States and controls of a setting; controls 0 where the model has none of its own."""
    x = np.concatenate([golden[f"{setting}_qpos"], golden[f"{setting}_qvel"]], axis=1)
    u = golden[f"{setting}_ctrl"]
    if u.shape[1] != system.control_size:
        u = np.zeros((len(x), system.control_size))
    return torch.tensor(x, dtype=dtype), torch.tensor(u, dtype=dtype)

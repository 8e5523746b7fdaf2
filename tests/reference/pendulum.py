"""Torque-driven pendulum in plain torch: the smallest system with every kind of edge.

State ``[q, qd]`` in [rad, rad/s], angle 0 hanging; control ``[u]`` in [N m]. Mass m, length l, damping b:

    qdd     = (u - b qd - m g l sin q) / (m l^2)
    qd_next = qd + h qdd
    q_next  = q + h qd_next
"""

import torch
from torch import Tensor


def step(
    x: Tensor,
    u: Tensor,
    *,
    dt: float,
    gravity: float = 9.81,
    mass: float = 1.0,
    length: float = 1.0,
    damping: float = 0.1,
) -> Tensor:
    """One semi-implicit Euler step.

    Args:
        x: States, ``(n, 2)``.
        u: Torques [N m], ``(n, 1)``.
        dt: Time step [s].
        gravity: [m/s^2].
        mass: [kg].
        length: [m].
        damping: [N m s/rad].

    Returns:
        Next states, ``(n, 2)``.
    """
    q, qd = x[:, 0:1], x[:, 1:2]
    qdd = (u - damping * qd - mass * gravity * length * torch.sin(q)) / (mass * length**2)
    qd_next = qd + dt * qdd
    return torch.cat((q + dt * qd_next, qd_next), dim=1)


def loss(x: Tensor) -> Tensor:
    """Distance from upright (q = pi), ``1 + cos q``, one value per state: ``(n, 2) -> (n,)``."""
    return 1.0 + torch.cos(x[:, 0])

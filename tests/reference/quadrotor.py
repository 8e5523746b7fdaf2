"""Quadrotor with an inner loop on body rates in plain torch: the readable maths, and the kernels' oracle.

State ``[p, v, q, o]`` in [m], [m/s], unit quaternion (w, x, y, z) from body to world, body rates [rad/s];
control ``[c_0, c_1, c_2, c_3]``, thrust and the three rates asked for. With R(q) the rotation, J the inertia:

    p. = v                         v. = R(q) (0, 0, thrust (1 + c_0)) / mass - drag v / mass - (0, 0, gravity)
    q. = 1/2 q (0, o)              J o. = gain (rate c - o) - o x (J o)

then one step of Runge and Kutta's fourth order, and the quaternion divided by its length.
"""

import torch
from torch import Tensor


def rotated(q: Tensor, a: Tensor) -> Tensor:
    """Vectors ``(n, 3)`` turned by quaternions ``(n, 4)``; of one that is no unit, by the formula of one."""
    w, r = q[:, :1], q[:, 1:]
    t = 2.0 * torch.linalg.cross(r, a)
    return a + w * t + torch.linalg.cross(r, t)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Product of quaternions ``(n, 4)``."""
    w = a[:, :1] * b[:, :1] - (a[:, 1:] * b[:, 1:]).sum(1, keepdim=True)
    return torch.cat(
        (w, a[:, :1] * b[:, 1:] + b[:, :1] * a[:, 1:] + torch.linalg.cross(a[:, 1:], b[:, 1:])), 1
    )


def step(
    x: Tensor,
    u: Tensor,
    *,
    dt: float,
    gravity: float = 9.81,
    mass: float = 1.0,
    inertia: float = 0.01,
    inertia_z: float = 0.02,
    drag: float = 0.6,
    thrust: float = 9.81,
    rate: float = 3.0,
    gain: float = 0.06,
    gain_z: float = 0.05,
) -> Tensor:
    """One time step: states ``(n, 13)`` and controls ``(n, 4)`` to states ``(n, 13)``; numbers as in
    `warp_sims.Quadrotor`.
    """

    def vector(a, b, c) -> Tensor:
        return torch.stack([torch.as_tensor(k, dtype=x.dtype) for k in (a, b, c)])

    moments, gains = vector(inertia, inertia, inertia_z), vector(gain, gain, gain_z)
    zero = torch.zeros_like(x[:, :1])

    def rates(s: Tensor) -> Tensor:
        v, q, o = s[:, 3:6], s[:, 6:10], s[:, 10:]
        force = rotated(q, torch.cat((zero, zero, thrust * (1.0 + u[:, :1])), 1))
        acceleration = (force - drag * v) / mass - vector(0.0, 0.0, gravity)
        torque = gains * (rate * u[:, 1:] - o) - torch.linalg.cross(o, moments * o)
        return torch.cat((v, acceleration, 0.5 * product(q, torch.cat((zero, o), 1)), torque / moments), 1)

    k1 = rates(x)
    k2 = rates(x + 0.5 * dt * k1)
    k3 = rates(x + 0.5 * dt * k2)
    k4 = rates(x + dt * k3)
    y = x + dt / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    q = y[:, 6:10] / torch.linalg.vector_norm(y[:, 6:10], dim=1, keepdim=True)
    return torch.cat((y[:, :6], q, y[:, 10:]), 1)


def loss(x: Tensor, *, velocity_cost: float = 0.1, rate_cost: float = 0.01) -> Tensor:
    """Cost of states, ``(n, 13) -> (n,)``."""
    place, speed, turn = x[:, :3], x[:, 3:6], x[:, 10:]
    return (place**2).sum(1) + velocity_cost * (speed**2).sum(1) + rate_cost * (turn**2).sum(1)

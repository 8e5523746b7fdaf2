"""Cart with independent poles in plain torch: the readable maths, and the oracle for the kernels.

State ``[x, xd, th_1, thd_1, th_2, thd_2, ...]`` in [m, m/s, rad, rad/s], angle 0 upright; control ``[f]`` in
[N]. With pole mass m, total mass M (the same for any number of poles), half pole length l and gravity g:

    A_i     = (f + m l sin(th_i) thd_i^2) / M
    thdd_i  = (g sin th_i - cos(th_i) A_i) / (l (4/3 - m cos(th_i)^2 / M))
    xdd     = (f + m l sum_i [sin(th_i) thd_i^2 - thdd_i cos th_i]) / M

then semi-implicit Euler: rates first, positions with the new rates. The poles feel the force and themselves,
not each other; that is how the published system is defined ("Stabilizing Backpropagation Through Time to
Learn Complex Physics", Schnell and Thuerey, ICLR 2024).
"""

import torch
from torch import Tensor


def step(
    x: Tensor,
    u: Tensor,
    *,
    dt: float,
    gravity: float = 9.8,
    pole_mass: float = 0.1,
    total_mass: float = 1.1,
    length: float = 0.5,
) -> Tensor:
    """One time step.

    Args:
        x: States, ``(n, 2 + 2 * poles)``.
        u: Forces [N], ``(n, 1)``.
        dt: Time step [s].
        gravity: [m/s^2].
        pole_mass: Mass of one pole [kg].
        total_mass: Mass of the cart and one pole [kg].
        length: Half length of a pole [m].

    Returns:
        Next states, ``(n, 2 + 2 * poles)``.
    """
    pos, vel, th, thd = x[:, 0:1], x[:, 1:2], x[:, 2::2], x[:, 3::2]
    sin, cos = torch.sin(th), torch.cos(th)
    moment = pole_mass * length

    push = (u + moment * sin * thd**2) / total_mass
    thdd = (gravity * sin - cos * push) / (length * (4.0 / 3.0 - pole_mass * cos**2 / total_mass))
    acc = (u + moment * (sin * thd**2 - thdd * cos).sum(dim=1, keepdim=True)) / total_mass

    thd_next = thd + dt * thdd
    vel_next = vel + dt * acc
    poles = torch.stack((th + dt * thd_next, thd_next), dim=2).flatten(1)
    return torch.cat((pos + dt * vel_next, vel_next, poles), dim=1)


def loss(x: Tensor) -> Tensor:
    """Distance of the poles from upright, ``1 - mean_i cos th_i``, per state: ``(n, s) -> (n,)``."""
    return 1.0 - torch.cos(x[:, 2::2]).mean(dim=1)

"""Wheel on a plane in plain torch: a system with two controls, one of them multiplied by the state.

State ``[px, py, q]`` in [m, m, rad]; controls ``[v, w]``, speed [m/s] and turn rate [rad/s]; explicit Euler:

    px_next = px + h v cos q
    py_next = py + h v sin q
    q_next  = q + h w
"""

import torch
from torch import Tensor


def step(x: Tensor, u: Tensor, *, dt: float) -> Tensor:
    """One time step.

    Args:
        x: States, ``(n, 3)``.
        u: Controls, ``(n, 2)``.
        dt: Time step [s].

    Returns:
        Next states, ``(n, 3)``.
    """
    px, py, q = x.unbind(1)
    v, w = u.unbind(1)
    return torch.stack((px + dt * v * torch.cos(q), py + dt * v * torch.sin(q), q + dt * w), dim=1)

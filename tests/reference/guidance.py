"""Herding in plain torch: the readable maths, and the oracle for the kernels.

State per object, drivers first, ``[px, py, vx, vy]`` in [m, m/s]; control per driver ``[c_0, c_1]`` in
[1/s^2]. With r the vector between two agents, d = softening + |r| and perp(r) = (-r_y, r_x):

    center_i = x_i - sum_j x_j                                      driver i, evaders j
    a_i = c_0 center_i + c_1 perp(center_i) - driver_drag v_i
          + driver_repulsion sum_{k != i} (x_i - x_k) / d^2
    a_j = -evader_repulsion sum_i (x_i - x_j) / d^2 - evader_drag v_j
          + flocking sum_{k != j} (flocking_length / d^2 - 1 / d) (x_k - x_j)

then explicit Euler: positions with the old velocities. The driver turns about the sum of the evaders, not
their mean; that is how the published system is defined ("Stabilizing Backpropagation Through Time to Learn
Complex Physics", Schnell and Thuerey, ICLR 2024).
"""

import torch
from torch import Tensor


def step(
    x: Tensor,
    u: Tensor,
    *,
    dt: float,
    driver_drag: float = 1.0,
    driver_repulsion: float = 0.2,
    evader_drag: float = 4.0,
    evader_repulsion: float = 15.0,
    flocking: float = 0.2,
    flocking_length: float = 0.5,
    softening: float = 0.1,
) -> Tensor:
    """One time step.

    Args:
        x: States, ``(n, 4 * (drivers + evaders))``.
        u: Controls, ``(n, 2 * drivers)``; their number tells drivers from evaders.
        dt: Time step [s].
        driver_drag, evader_drag: [1/s].
        driver_repulsion, evader_repulsion: Strength of the repulsion between drivers, of evaders by drivers.
        flocking, flocking_length: Force between evaders, and the distance where it changes sign [m].
        softening: Added to every distance [m].

    Returns:
        Next states, of the shape of x.
    """
    drivers = u.shape[1] // 2
    objects = x.unflatten(1, (-1, 2, 2))
    pos, vel = objects[:, :, 0], objects[:, :, 1]
    driver, evader = pos[:, :drivers], pos[:, drivers:]

    def between(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (n, a, b, 2) from each of b to each of a, and softened distances (n, a, b, 1)."""
        r = a[:, :, None] - b[:, None, :]
        square = (r**2).sum(-1, keepdim=True)
        apart = square > 0
        # The root has no derivative at 0; there r / d^2 has none by |r| either.
        distance = torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
        return r, softening + distance

    center = driver - evader.sum(1, keepdim=True)
    perp = torch.stack((-center[..., 1], center[..., 0]), dim=-1)
    control = u.unflatten(1, (drivers, 2))
    acc_driver = control[..., :1] * center + control[..., 1:] * perp - driver_drag * vel[:, :drivers]
    r, d = between(driver, driver)
    acc_driver = acc_driver + driver_repulsion * (r / d**2).sum(2)

    r, d = between(evader, driver)
    acc_evader = evader_repulsion * (r / d**2).sum(2) - evader_drag * vel[:, drivers:]
    r, d = between(evader, evader)
    acc_evader = acc_evader - flocking * ((flocking_length / d**2 - 1 / d) * r).sum(2)

    acc = torch.cat((acc_driver, acc_evader), dim=1)
    return torch.stack((pos + dt * vel, vel + dt * acc), dim=2).flatten(1)


def loss(x: Tensor, *, drivers: int) -> Tensor:
    """Mean over evaders and axes of the squared position, per state: ``(n, s) -> (n,)``."""
    return (x.unflatten(1, (-1, 2, 2))[:, drivers:, 0] ** 2).mean((1, 2))

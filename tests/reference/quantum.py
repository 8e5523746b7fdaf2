"""A quantum particle in a box in plain torch: the readable maths, and the oracle for the kernels.

State ``[Re psi_1, Im psi_1, Re psi_2, ...]`` at N inner grid points x_j = j dx, dx = length / (N + 1);
control ``[c]``, the strength of a field. With h the time step (hbar = 1, no 1/2 in the kinetic term):

    H(c) = -d^2/dx^2 + c x
    (1 + i h/2 H) psi_next = (1 - i h/2 H) psi

Matrices are written out and solved as such, and every derivative is left to autograd.
"""

import math

import torch
from torch import Tensor


def hamiltonian(c: Tensor, points: int, length: float = 2.0) -> Tensor:
    """H(c) as matrices, ``(n, 1) -> (n, points, points)``."""
    dx = length / (points + 1)
    ones = torch.ones(points, dtype=c.dtype)
    second = (torch.diag(ones[1:], 1) + torch.diag(ones[1:], -1) - 2 * torch.diag(ones)) / dx**2
    grid = dx * torch.arange(1, points + 1, dtype=c.dtype)
    return -second + c[:, :, None] * torch.diag(grid)


def wave(x: Tensor) -> Tensor:
    """States as complex wave functions, ``(n, 2 * points) -> (n, points)``."""
    return torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous())


def step(x: Tensor, u: Tensor, *, dt: float, length: float = 2.0) -> Tensor:
    """One time step.

    Args:
        x: States, ``(n, 2 * points)``.
        u: Field strengths, ``(n, 1)``.
        dt: Time step.
        length: Width of the box.

    Returns:
        Next states, ``(n, 2 * points)``.
    """
    psi = wave(x)
    one = torch.eye(psi.shape[1], dtype=x.dtype)
    a = 0.5j * dt * hamiltonian(u, psi.shape[1], length)
    psi_next = torch.linalg.solve(one + a, ((one - a) @ psi[:, :, None])[:, :, 0])
    return torch.view_as_real(psi_next).flatten(1)


def loss(x: Tensor, *, target: int) -> Tensor:
    """``1 - |<e_n, psi>|^2`` per state, n = 1 the ground state: ``(n, s) -> (n,)``."""
    psi = wave(x)
    points = psi.shape[1]
    j = torch.arange(1, points + 1, dtype=x.dtype)
    e = torch.sin(math.pi * target * j / (points + 1))
    overlap = psi @ (e / torch.linalg.vector_norm(e)).to(psi.dtype)
    return 1 - torch.view_as_real(overlap).square().sum(-1)

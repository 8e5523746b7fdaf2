"""The problems of the benchmarks in eager torch: a step, the published policy and a cost each, for states
``(n, s)``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def cartpole_step(
    x: Tensor,
    u: Tensor,
    *,
    dt: float,
    gravity: float,
    pole_mass: float,
    total_mass: float,
    pole_length: float,
) -> Tensor:
    """Cart with independent poles, semi-implicit Euler."""
    pos, vel, th, thd = x[:, 0:1], x[:, 1:2], x[:, 2::2], x[:, 3::2]
    sin, cos = torch.sin(th), torch.cos(th)
    moment = pole_mass * pole_length
    push = (u + moment * sin * thd**2) / total_mass
    thdd = (gravity * sin - cos * push) / (pole_length * (4.0 / 3.0 - pole_mass * cos**2 / total_mass))
    acc = (u + moment * (sin * thd**2 - thdd * cos).sum(dim=1, keepdim=True)) / total_mass
    thd_next = thd + dt * thdd
    vel_next = vel + dt * acc
    poles = torch.stack((th + dt * thd_next, thd_next), dim=2).flatten(1)
    return torch.cat((pos + dt * vel_next, vel_next, poles), dim=1)


def cartpole_cost(x: Tensor, controls: int, system: dict[str, float]) -> Tensor:
    """1 - mean cosine, per state."""
    return (1.0 - torch.cos(x[..., 2::2])).mean(-1)


def _between(a: Tensor, b: Tensor, softening: float) -> tuple[Tensor, Tensor]:
    # Two agents may meet (one world of 16384 does it): the root of 0 has no derivative.
    r = a[:, :, None] - b[:, None]
    square = (r * r).sum(-1, keepdim=True)
    apart = square > 0.0
    return r, softening + torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)


def guidance_step(
    x: Tensor,
    u: Tensor,
    *,
    dt: float,
    driver_drag: float,
    driver_repulsion: float,
    evader_drag: float,
    evader_repulsion: float,
    flocking: float,
    flocking_length: float,
    softening: float,
) -> Tensor:
    """Drivers and evaders, explicit Euler; all pairs of a kind at once."""
    n, drivers = x.shape[0], u.shape[1] // 2
    objects = x.view(n, -1, 2, 2)
    pos, vel = objects[:, :, 0], objects[:, :, 1]
    driver, evader = pos[:, :drivers], pos[:, drivers:]
    center = driver - evader.sum(1, keepdim=True)
    perp = torch.stack((-center[..., 1], center[..., 0]), dim=-1)
    control = u.view(n, drivers, 2)
    r, d = _between(driver, driver, softening)
    push = driver_repulsion * (r / d**2).sum(2)
    acc_driver = control[..., :1] * center + control[..., 1:] * perp - driver_drag * vel[:, :drivers] + push
    r, d = _between(evader, driver, softening)
    acc_evader = evader_repulsion * (r / d**2).sum(2) - evader_drag * vel[:, drivers:]
    r, d = _between(evader, evader, softening)
    acc_evader = acc_evader - flocking * ((flocking_length / d**2 - 1 / d) * r).sum(2)
    acc = torch.cat((acc_driver, acc_evader), dim=1)
    return torch.stack((pos + dt * vel, vel + dt * acc), dim=2).flatten(1)


def guidance_cost(x: Tensor, controls: int, system: dict[str, float]) -> Tensor:
    """Mean squared coordinate of the evaders, per state."""
    return (x.unflatten(-1, (-1, 2, 2))[..., controls // 2 :, 0, :] ** 2).mean((-2, -1))


@functools.cache
def _quantum_constants(
    points: int, dt: float, length: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Grid, the imaginary part of the matrix without a control, and its real part."""
    place = {"dtype": dtype, "device": device}
    dx = length / (points + 1)
    beside = torch.full((points - 1,), -0.5 * dt / dx**2, **place)
    one = torch.eye(points, **place)
    constant = torch.diag(beside, 1) + torch.diag(beside, -1) + (dt / dx**2) * one
    return dx * torch.arange(1, points + 1, **place), constant, one


def quantum_step(x: Tensor, u: Tensor, *, dt: float, length: float, target: float) -> Tensor:
    """Crank-Nicolson by a dense solve (torch has no tridiagonal one): psi' = 2 M^-1 psi - psi."""
    psi = torch.view_as_complex(x.view(x.shape[0], -1, 2))
    points = psi.shape[1]
    grid, constant, one = _quantum_constants(points, dt, length, x.dtype, x.device)
    a = constant + torch.diag_embed(0.5 * dt * u * grid)
    matrix = torch.complex(one.expand_as(a), a)
    return torch.view_as_real(2 * torch.linalg.solve(matrix, psi) - psi).flatten(1)


def quantum_cost(x: Tensor, controls: int, system: dict[str, float]) -> Tensor:
    """1 - probability of the target state, per state."""
    points = x.shape[-1] // 2
    j = torch.arange(1, points + 1, dtype=x.dtype, device=x.device)
    e = torch.sin(math.pi * system["target"] * j / (points + 1))
    overlap = torch.einsum("...jr,j->...r", x.unflatten(-1, (points, 2)), e / torch.linalg.vector_norm(e))
    return 1.0 - (overlap**2).sum(-1)


def mlp(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """Tanh network; params is [W1 (out, in), b1, W2, ...]."""
    for weight, bias in zip(params[0:-2:2], params[1:-2:2], strict=True):
        x = torch.tanh(functional.linear(x, weight, bias))
    return functional.linear(x, *params[-2:])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
}


def perceptron(kind: str) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    """A perceptron by its activation and norm, `elu+layernorm` for example."""
    words = kind.split("+") if kind else []
    norm = next((word for word in words if word in ("layernorm", "rmsnorm")), None)
    activation = ACTIVATIONS[next((word for word in words if word in ACTIVATIONS), "tanh")]
    count = {None: 2, "rmsnorm": 3, "layernorm": 4}[norm]

    def policy(params: Sequence[Tensor], x: Tensor) -> Tensor:
        for i in range(0, len(params) - 2, count):
            x = functional.linear(x, *params[i : i + 2])
            if norm == "layernorm":
                x = functional.layer_norm(x, x.shape[-1:], *params[i + 2 : i + 4])
            elif norm == "rmsnorm":
                x = functional.rms_norm(x, x.shape[-1:], params[i + 2])
            x = activation(x)
        return functional.linear(x, *params[-2:])

    return policy


def wave_cnn(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """Two convolutions of stride 2, tanh, linear on the features as (position, channel)."""
    h = torch.tanh(functional.conv2d(x.view(x.shape[0], 1, -1, 2), *params[:2], stride=2)).squeeze(-1)
    h = torch.tanh(functional.conv1d(h, *params[2:4], stride=2))
    return functional.linear(h.transpose(1, 2).flatten(1), *params[4:])


class Problem(NamedTuple):
    """What a training update needs to know of a system."""

    step: Callable
    cost: Callable
    """Of states (..., s), number of controls, system; (...)."""
    running: str
    """How a running loss reduces over time: "mean" or "sum"."""
    policy: Callable


PROBLEMS = {
    "cartpole": Problem(cartpole_step, cartpole_cost, "mean", mlp),
    "guidance": Problem(guidance_step, guidance_cost, "mean", mlp),
    "quantum": Problem(quantum_step, quantum_cost, "sum", wave_cnn),
}

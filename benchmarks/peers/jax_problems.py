"""The problems of the benchmarks in JAX: a step, the published policy and a cost each, for states
``(n, s)``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


def cartpole_step(x, u, *, dt, gravity, pole_mass, total_mass, pole_length):
    """Cart with independent poles, semi-implicit Euler."""
    pos, vel, th, thd = x[:, 0:1], x[:, 1:2], x[:, 2::2], x[:, 3::2]
    sin, cos = jnp.sin(th), jnp.cos(th)
    moment = pole_mass * pole_length
    push = (u + moment * sin * thd**2) / total_mass
    thdd = (gravity * sin - cos * push) / (pole_length * (4.0 / 3.0 - pole_mass * cos**2 / total_mass))
    acc = (u + moment * jnp.sum(sin * thd**2 - thdd * cos, axis=1, keepdims=True)) / total_mass
    thd_next = thd + dt * thdd
    vel_next = vel + dt * acc
    poles = jnp.stack((th + dt * thd_next, thd_next), axis=2).reshape(x.shape[0], -1)
    return jnp.concatenate((pos + dt * vel_next, vel_next, poles), axis=1)


def cartpole_cost(x, controls, system):
    """1 - mean cosine, per state."""
    return jnp.mean(1.0 - jnp.cos(x[..., 2::2]), axis=-1)


def guidance_step(
    x,
    u,
    *,
    dt,
    driver_drag,
    driver_repulsion,
    evader_drag,
    evader_repulsion,
    flocking,
    flocking_length,
    softening,
):
    """Drivers and evaders, explicit Euler; all pairs of a kind at once."""
    n, drivers = x.shape[0], u.shape[1] // 2
    objects = x.reshape(n, -1, 2, 2)
    pos, vel = objects[:, :, 0], objects[:, :, 1]
    driver, evader = pos[:, :drivers], pos[:, drivers:]

    def between(a, b):
        # Two agents may meet (one world of 16384 does it): the root of 0 has no derivative.
        r = a[:, :, None] - b[:, None]
        square = jnp.sum(r * r, axis=-1, keepdims=True)
        apart = square > 0.0
        return r, softening + jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)

    center = driver - jnp.sum(evader, axis=1, keepdims=True)
    perp = jnp.stack((-center[..., 1], center[..., 0]), axis=-1)
    control = u.reshape(n, drivers, 2)
    r, d = between(driver, driver)
    push = driver_repulsion * jnp.sum(r / d**2, axis=2)
    acc_driver = control[..., :1] * center + control[..., 1:] * perp - driver_drag * vel[:, :drivers] + push
    r, d = between(evader, driver)
    acc_evader = evader_repulsion * jnp.sum(r / d**2, axis=2) - evader_drag * vel[:, drivers:]
    r, d = between(evader, evader)
    acc_evader = acc_evader - flocking * jnp.sum((flocking_length / d**2 - 1 / d) * r, axis=2)
    acc = jnp.concatenate((acc_driver, acc_evader), axis=1)
    return jnp.stack((pos + dt * vel, vel + dt * acc), axis=2).reshape(n, -1)


def guidance_cost(x, controls, system):
    """Mean squared coordinate of the evaders, per state."""
    evaders = x.reshape(*x.shape[:-1], -1, 2, 2)[..., controls // 2 :, 0, :]
    return jnp.mean(evaders**2, axis=(-2, -1))


def quantum_step(x, u, *, dt, length, target):
    """Crank-Nicolson with JAX's own tridiagonal solver: psi' = 2 M^-1 psi - psi, M = 1 + i dt/2 H."""
    n, points = x.shape[0], x.shape[1] // 2
    waves = x.reshape(n, points, 2)
    psi = jax.lax.complex(waves[..., 0], waves[..., 1])
    dx = length / (points + 1)
    off = -0.5 * dt / dx**2
    diagonal = 0.5 * dt * (2 / dx**2 + u * (dx * jnp.arange(1, points + 1, dtype=x.dtype)))
    beside = jnp.full(psi.shape, 1j * off, psi.dtype)
    half = jax.lax.linalg.tridiagonal_solve(
        beside.at[:, 0].set(0.0),
        jax.lax.complex(jnp.ones_like(diagonal), diagonal),
        beside.at[:, -1].set(0.0),
        psi[..., None],
    )[..., 0]
    psi = 2 * half - psi
    return jnp.stack((psi.real, psi.imag), axis=-1).reshape(n, -1)


def quantum_cost(x, controls, system):
    """1 - probability of the target state, per state."""
    points = x.shape[-1] // 2
    e = jnp.sin(jnp.pi * system["target"] * jnp.arange(1, points + 1, dtype=x.dtype) / (points + 1))
    overlap = jnp.einsum("...jr,j->...r", x.reshape(*x.shape[:-1], points, 2), e / jnp.linalg.norm(e))
    return 1.0 - jnp.sum(overlap**2, axis=-1)


def mlp(params, x):
    """Tanh network; params is a list of (kernel (in, out), bias)."""
    for kernel, bias in params[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = params[-1]
    return x @ kernel + bias


ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}


def perceptron(kind: str):
    """Policy, pack and unpack of a perceptron by its activation and norm, `elu+layernorm` for example.

    Normalisations are those of flax: the variance from the mean of squares, scale and factor as one.
    """
    words = kind.split("+") if kind else []
    norm = next((word for word in words if word in ("layernorm", "rmsnorm")), None)
    activation = ACTIVATIONS[next((word for word in words if word in ACTIVATIONS), "tanh")]

    def normalized(x, scale, shift=None):
        square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        if norm == "rmsnorm":
            return x * (jax.lax.rsqrt(square + jnp.finfo(x.dtype).eps) * scale)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + 1e-5)
        return (x - mean) * (factor * scale) + shift

    def policy(params, x):
        for kernel, bias, *vectors in params[:-1]:
            x = x @ kernel + bias
            x = activation(normalized(x, *vectors) if vectors else x)
        kernel, bias = params[-1]
        return x @ kernel + bias

    count = {None: 2, "rmsnorm": 3, "layernorm": 4}[norm]

    def pack(weights):
        layers = [weights[i : i + count] for i in range(0, len(weights) - 2, count)] + [weights[-2:]]
        return [(layer[0].T, *layer[1:]) for layer in layers]

    return policy, pack, unpack_mlp


def wave_cnn(params, x):
    """Two convolutions of stride 2 over windows of three points, tanh, linear.

    As products of windows that strided slices make: on a CPU several times as fast as XLA's convolutions.
    """
    h = x.reshape(x.shape[0], -1, 2)
    for kernel, bias in params[:-1]:
        count = 2 * ((h.shape[1] - 3) // 2) + 1
        windows = jnp.concatenate([h[:, k : k + count : 2] for k in range(3)], axis=-1)
        h = jnp.tanh(windows @ kernel + bias)
    kernel, bias = params[-1]
    return h.reshape(x.shape[0], -1) @ kernel + bias


def _pair(weights: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(weights[0::2], weights[1::2], strict=True))


def pack_mlp(weights: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """From torch's layout."""
    return [(w.T, b) for w, b in _pair(weights)]


def unpack_mlp(params) -> list[np.ndarray]:
    """To torch's layout."""
    return [np.array(array.T) for layer in params for array in layer]  # that of a vector is itself


def pack_cnn(weights: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """From torch's layout; kernels (window, out), windows (point, channel)."""
    conv1, conv2, out = _pair(weights)
    width = conv1[0].shape[0]
    return [
        (conv1[0].reshape(width, 6).T, conv1[1]),
        (conv2[0].transpose(2, 1, 0).reshape(-1, width), conv2[1]),
        (out[0].T, out[1]),
    ]


def unpack_cnn(params) -> list[np.ndarray]:
    """To torch's layout."""
    conv1, conv2, out = [tuple(np.array(array) for array in layer) for layer in params]
    width = conv1[1].size
    kernels = (
        conv1[0].T.reshape(width, 1, 3, 2),
        conv2[0].reshape(3, width, width).transpose(2, 1, 0),
        out[0].T,
    )
    return [
        array for kernel, layer in zip(kernels, params, strict=True) for array in (kernel, np.array(layer[1]))
    ]


class Problem(NamedTuple):
    """What a training update needs to know of a system."""

    step: Callable
    cost: Callable
    """Of states (..., s), number of controls, system; (...)."""
    running: str
    """How a running loss reduces over time: "mean" or "sum"."""
    policy: Callable
    pack: Callable
    unpack: Callable


PROBLEMS = {
    "cartpole": Problem(cartpole_step, cartpole_cost, "mean", mlp, pack_mlp, unpack_mlp),
    "guidance": Problem(guidance_step, guidance_cost, "mean", mlp, pack_mlp, unpack_mlp),
    "quantum": Problem(quantum_step, quantum_cost, "sum", wave_cnn, pack_cnn, unpack_cnn),
}

"""Systems as a user defines them, outside the package: a pendulum with a loss, a unicycle without.

The equations are those of reference/pendulum.py and reference/unicycle.py.
"""

import dataclasses
import functools
from typing import Any

import torch
import warp as wp

import warp_sims as ws


@functools.cache
def pendulum_functions(dtype: Any) -> ws.DeviceFunctions:
    """Device functions of the pendulum; see `Pendulum`.

    Reading the equations backwards, with adj_y the cotangent dL/dy and s all that reaches qd_next:

        s       = adj_qd_next + dt adj_q_next
        adj_q   = adj_q_next - dt s (gravity / length) cos q
        adj_qd  = s - dt s damping / (mass length^2)
        adj_u   = dt s / (mass length^2)
    """
    State = wp.types.vector(length=2, dtype=dtype)
    Control = wp.types.vector(length=1, dtype=dtype)

    @wp.struct
    class PendulumParams:
        dt: dtype
        gravity: dtype
        mass: dtype
        length: dtype
        damping: dtype

    @wp.func
    def pendulum_step(x: State, u: Control, p: PendulumParams) -> State:
        inertia = p.mass * p.length * p.length
        qdd = (u[0] - p.damping * x[1] - p.mass * p.gravity * p.length * wp.sin(x[0])) / inertia
        qd_next = x[1] + p.dt * qdd
        return State(x[0] + p.dt * qd_next, qd_next)

    @wp.func
    def pendulum_step_vjp(x: State, u: Control, p: PendulumParams, adj_x_next: State):
        inertia = p.mass * p.length * p.length
        s = adj_x_next[1] + p.dt * adj_x_next[0]
        adj_q = adj_x_next[0] - p.dt * s * p.gravity / p.length * wp.cos(x[0])
        adj_qd = s - p.dt * s * p.damping / inertia
        return State(adj_q, adj_qd), Control(p.dt * s / inertia)

    @wp.func
    def pendulum_loss(x: State, p: PendulumParams) -> dtype:
        return dtype(1.0) + wp.cos(x[0])

    @wp.func
    def pendulum_loss_vjp(x: State, p: PendulumParams, adj_loss: dtype) -> State:
        return State(-adj_loss * wp.sin(x[0]), dtype(0.0))

    return ws.DeviceFunctions(
        PendulumParams, State, Control, pendulum_step, pendulum_step_vjp, pendulum_loss, pendulum_loss_vjp
    )


@dataclasses.dataclass(frozen=True)
class Pendulum(ws.System):
    """Torque-driven pendulum, state [angle from hanging, rate]; the task is to swing it up."""

    dt: float = 0.05
    gravity: float = 9.81
    mass: float = 1.0
    length: float = 1.0
    damping: float = 0.1

    state_size = 2
    control_size = 1

    def device_functions(self, dtype: Any) -> ws.DeviceFunctions:
        return pendulum_functions(dtype)

    def initial_states(self, n, seed=42, split="train", *, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed + (split == "test"))
        return torch.rand(n, 2, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)


@functools.cache
def unicycle_functions(dtype: Any) -> ws.DeviceFunctions:
    """Device functions of the unicycle, a system without a loss; see `Unicycle`."""
    State = wp.types.vector(length=3, dtype=dtype)
    Control = wp.types.vector(length=2, dtype=dtype)

    @wp.struct
    class UnicycleParams:
        dt: dtype

    @wp.func
    def unicycle_step(x: State, u: Control, p: UnicycleParams) -> State:
        ahead = p.dt * u[0]
        return State(x[0] + ahead * wp.cos(x[2]), x[1] + ahead * wp.sin(x[2]), x[2] + p.dt * u[1])

    @wp.func
    def unicycle_step_vjp(x: State, u: Control, p: UnicycleParams, adj_x_next: State):
        s = wp.sin(x[2])
        c = wp.cos(x[2])
        adj_ahead = c * adj_x_next[0] + s * adj_x_next[1]
        adj_heading = adj_x_next[2] + p.dt * u[0] * (c * adj_x_next[1] - s * adj_x_next[0])
        return State(adj_x_next[0], adj_x_next[1], adj_heading), Control(
            p.dt * adj_ahead, p.dt * adj_x_next[2]
        )

    return ws.DeviceFunctions(UnicycleParams, State, Control, unicycle_step, unicycle_step_vjp)


@dataclasses.dataclass(frozen=True)
class Unicycle(ws.System):
    """Wheel on a plane, state [x, y, heading], controls [speed, turn rate]."""

    dt: float = 0.1

    state_size = 3
    control_size = 2

    def device_functions(self, dtype: Any) -> ws.DeviceFunctions:
        return unicycle_functions(dtype)


TERMS = 8
"""Terms that `Planted` can have wrong."""


@functools.cache
def planted_functions(term: int, dtype: Any, only_single: bool = False) -> ws.DeviceFunctions:
    """The pendulum with one term of its adjoints too large by 0.1%, in float32 alone if asked for."""
    wrong = 1.001 if not only_single or dtype is wp.float32 else 1.0
    a0, a1, a2, a3, a4, a5, a6, a7 = (wrong if k == term else 1.0 for k in range(TERMS))
    functions = pendulum_functions(dtype)
    State, Control, Params = functions.State, functions.Control, functions.Params

    @wp.func
    def step_vjp(x: State, u: Control, p: Params, adj_x_next: State):
        inertia = p.mass * p.length * p.length
        s = dtype(a0) * adj_x_next[1] + dtype(a1) * p.dt * adj_x_next[0]
        adj_q = dtype(a2) * adj_x_next[0] - dtype(a3) * p.dt * s * p.gravity / p.length * wp.cos(x[0])
        adj_qd = dtype(a4) * s - dtype(a5) * p.dt * s * p.damping / inertia
        return State(adj_q, adj_qd), Control(dtype(a6) * p.dt * s / inertia)

    @wp.func
    def loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        return State(-dtype(a7) * adj_loss * wp.sin(x[0]), dtype(0.0))

    return functions._replace(step_vjp=step_vjp, loss_vjp=loss_vjp)


@dataclasses.dataclass(frozen=True)
class Planted(Pendulum):
    """The pendulum with an error in term `term` of its adjoints, in float32 alone if `only_single`."""

    term: int = 0
    only_single: bool = False

    def device_functions(self, dtype):
        return planted_functions(self.term, dtype, self.only_single)

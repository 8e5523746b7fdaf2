"""A system of your own, whole: a torque-driven pendulum that learns to swing up.

    python examples/pendulum.py                                    # checks the adjoint, trains for a minute
    cd examples && warp-sims train pendulum:Pendulum --epochs 20   # the same from the command line

With angle q [rad] from hanging rest, rate qd [rad/s], torque u [N m], time step h [s]:

    qdd     = (u - b qd - m g l sin q) / (m l^2)        qd_next = qd + h qdd        q_next = q + h qd_next

Reading it backwards, with adj_y the cotangent dL/dy and s all that reaches qd_next:

    s = adj_qd_next + h adj_q_next
    adj_q = adj_q_next - h s (g / l) cos q        adj_qd = s - h s b / (m l^2)        adj_u = h s / (m l^2)

Do not use `from __future__ import annotations` in a file like this one: Warp reads the annotations.
"""

import dataclasses
import functools

import torch
import warp as wp

import warp_sims as ws


@functools.cache  # kernels are compiled once for each object this returns
def pendulum_functions(dtype) -> ws.DeviceFunctions:
    """Device functions for wp.float32 or wp.float64."""
    State = wp.types.vector(length=2, dtype=dtype)
    Control = wp.types.vector(length=1, dtype=dtype)

    @wp.struct
    class PendulumParams:  # filled from the dataclass fields of the same names
        dt: dtype
        gravity: dtype
        mass: dtype
        length: dtype
        damping: dtype

    @wp.func
    def step(x: State, u: Control, p: PendulumParams) -> State:
        inertia = p.mass * p.length * p.length
        qdd = (u[0] - p.damping * x[1] - p.mass * p.gravity * p.length * wp.sin(x[0])) / inertia
        qd_next = x[1] + p.dt * qdd
        return State(x[0] + p.dt * qd_next, qd_next)

    @wp.func
    def step_vjp(x: State, u: Control, p: PendulumParams, adj_x_next: State):
        inertia = p.mass * p.length * p.length
        s = adj_x_next[1] + p.dt * adj_x_next[0]
        adj_q = adj_x_next[0] - p.dt * s * p.gravity / p.length * wp.cos(x[0])
        adj_qd = s - p.dt * s * p.damping / inertia
        return State(adj_q, adj_qd), Control(p.dt * s / inertia)

    @wp.func
    def loss(x: State, p: PendulumParams) -> dtype:
        return dtype(1.0) + wp.cos(x[0])  # 0 upright, 2 hanging

    @wp.func
    def loss_vjp(x: State, p: PendulumParams, adj_loss: dtype) -> State:
        return State(-adj_loss * wp.sin(x[0]), dtype(0.0))

    return ws.DeviceFunctions(PendulumParams, State, Control, step, step_vjp, loss, loss_vjp)


@dataclasses.dataclass(frozen=True)
class Pendulum(ws.System):
    """State [angle from hanging rest [rad], rate [rad/s]], control [torque [N m]]."""

    dt: float = 0.05
    """Time step [s]."""
    gravity: float = 9.81
    """Gravity [m/s^2]."""
    mass: float = 1.0
    """Mass [kg]."""
    length: float = 1.0
    """Length [m]."""
    damping: float = 0.1
    """Damping [N m s/rad]."""

    state_size = 2
    control_size = 1

    def device_functions(self, dtype):
        return pendulum_functions(dtype)

    def initial_states(self, n, seed=42, split="train", *, dtype=torch.float32):
        """Near hanging rest: angle and rate uniform in [-1, 1]."""
        generator = torch.Generator().manual_seed(seed + (split == "test"))
        return (2 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1).to(dtype)


def main() -> None:
    system = Pendulum()
    report = ws.check(system)  # the adjoints against finite differences, float32 against float64, every flow
    print(report)
    if not report.agrees:
        raise SystemExit(1)

    policy = ws.MLP(system.state_size, (32, 32), system.control_size)
    policy.reset_parameters(seed=0)
    config = ws.TrainConfig(system=system, policy=policy, flow="combined", horizon=60, epochs=100, lr=3e-3)
    result = ws.train(config)
    print(
        f"test loss {result.log['loss_test'][0]:.3f} before, {result.log['loss_test'][-1]:.4f} after training"
    )


if __name__ == "__main__":
    main()

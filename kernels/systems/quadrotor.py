"""A quadrotor that flies to the origin: rigid body with a quaternion, inner loop on body rates, one
Runge-Kutta step of fourth order, loss, and their hand-written adjoints.

Position p [m] and velocity v [m/s] in the world, z up; unit quaternion q = (w, x, y, z) from body to world;
body rates o [rad/s] in the body. Controls c_0 (thrust) and c_1 ... c_3 (rates asked for), without units; time
step h [s], gravity g [m/s^2], mass m [kg], inertia (J, J, Z) [kg m^2], drag d [kg/s], thrust f [N] at c_0 = 0
and rates r [rad/s] asked for by 1, gains (k, k, l) [N m s/rad] of the inner loop:

    b   = (2 (x z + w y), 2 (y z - w x), 1 - 2 (x^2 + y^2))              body's z axis in the world
    p.  = v
    v.  = (f (1 + c_0) b - d v) / m - (0, 0, g)
    q.  = 1/2 q (0, o)                                                   product of quaternions
    o_1. = (k (r c_1 - o_1) - (Z - J) o_2 o_3) / J
    o_2. = (k (r c_2 - o_2) + (Z - J) o_3 o_1) / J
    o_3. = l (r c_3 - o_3) / Z

    k_1 = F(s)   k_2 = F(s + h/2 k_1)   k_3 = F(s + h/2 k_2)   k_4 = F(s + h k_3)
    s'  = s + h/6 (k_1 + 2 k_2 + 2 k_3 + k_4), its quaternion then divided by its length

Backwards, with a that of s before the division, and F' the transpose of dF at the points where k_i was taken:

    a_q = (adj_q' - q' (q' . adj_q')) / |q|
    s_4 = F'(h/6 a)     s_3 = F'(h/3 a + h s_4)     s_2 = F'(h/3 a + h/2 s_3)     s_1 = F'(h/6 a + h/2 s_2)
    adj_s = a + s_1 + s_2 + s_3 + s_4               controls and numbers of the physics: the sum over the four
    adj_h = a . (k_1 + 2 k_2 + 2 k_3 + k_4) / 6 + s_2 . k_1 / 2 + s_3 . k_2 / 2 + s_4 . k_3

State [p, v, q, o], control [c]. Cost of a state: |p|^2 + velocity_cost |v|^2 + rate_cost |o|^2.

Source: the rigid body of any textbook; mass, inertia, drag, rate and inner loop as in DiffAero's quadrotor
(Zhang et al., "DiffAero", 2025), whose thrust and rates are commands of a policy as here.
"""

import functools
from typing import Any

import warp as wp

from ..system import DeviceFunctions, ParameterFunctions

PARAMETERS = ("dt", "gravity", "mass", "inertia", "inertia_z", "drag", "thrust")
"""Numbers that a rollout may be given, the order of their cotangents."""


@functools.cache
def make_params(dtype: Any) -> Any:
    """Returns the Warp struct of the parameters for `dtype`, fields as in `warp_sims.Quadrotor`."""

    @wp.struct
    class QuadrotorParams:
        dt: dtype
        gravity: dtype
        mass: dtype
        inertia: dtype
        inertia_z: dtype
        drag: dtype
        thrust: dtype
        rate: dtype
        gain: dtype
        gain_z: dtype
        velocity_cost: dtype
        rate_cost: dtype

    return QuadrotorParams


@functools.cache
def make_functions(dtype: Any) -> DeviceFunctions:
    """Returns the device functions for `dtype` (wp.float32 or wp.float64)."""
    Params = make_params(dtype)
    State = wp.types.vector(length=13, dtype=dtype)
    Control = wp.types.vector(length=4, dtype=dtype)
    Values = wp.types.vector(length=len(PARAMETERS), dtype=dtype)
    Vec = wp.types.vector(length=3, dtype=dtype)

    @wp.func
    def up(s: State) -> Vec:
        """The body's z axis in the world."""
        return Vec(
            dtype(2.0) * (s[7] * s[9] + s[6] * s[8]),
            dtype(2.0) * (s[8] * s[9] - s[6] * s[7]),
            dtype(1.0) - dtype(2.0) * (s[7] * s[7] + s[8] * s[8]),
        )

    @wp.func
    def rates(s: State, u: Control, p: Params) -> State:
        """F, the time derivative of a state."""
        k = State()
        b = up(s)
        force = p.thrust * (dtype(1.0) + u[0])
        for i in range(3):
            k[i] = s[3 + i]
            k[3 + i] = (force * b[i] - p.drag * s[3 + i]) / p.mass
        k[5] = k[5] - p.gravity
        half = dtype(0.5)
        k[6] = half * (-s[7] * s[10] - s[8] * s[11] - s[9] * s[12])
        k[7] = half * (s[6] * s[10] + s[8] * s[12] - s[9] * s[11])
        k[8] = half * (s[6] * s[11] - s[7] * s[12] + s[9] * s[10])
        k[9] = half * (s[6] * s[12] + s[7] * s[11] - s[8] * s[10])
        skew = p.inertia_z - p.inertia
        k[10] = (p.gain * (p.rate * u[1] - s[10]) - skew * s[11] * s[12]) / p.inertia
        k[11] = (p.gain * (p.rate * u[2] - s[11]) + skew * s[12] * s[10]) / p.inertia
        k[12] = p.gain_z * (p.rate * u[3] - s[12]) / p.inertia_z
        return k

    @wp.func
    def rates_vjp(s: State, u: Control, p: Params, a: State):
        """Cotangents (adj_s, adj_u) of `rates`."""
        adj = State()
        b = up(s)
        force = p.thrust * (dtype(1.0) + u[0]) / p.mass
        adj_force = (b[0] * a[3] + b[1] * a[4] + b[2] * a[5]) / p.mass
        for i in range(3):
            adj[3 + i] = a[i] - p.drag / p.mass * a[3 + i]
        b0 = dtype(2.0) * force * a[3]
        b1 = dtype(2.0) * force * a[4]
        b2 = dtype(4.0) * force * a[5]
        q0 = dtype(0.5) * a[6]
        q1 = dtype(0.5) * a[7]
        q2 = dtype(0.5) * a[8]
        q3 = dtype(0.5) * a[9]
        adj[6] = s[8] * b0 - s[7] * b1 + q1 * s[10] + q2 * s[11] + q3 * s[12]
        adj[7] = s[9] * b0 - s[6] * b1 - s[7] * b2 - q0 * s[10] - q2 * s[12] + q3 * s[11]
        adj[8] = s[6] * b0 + s[9] * b1 - s[8] * b2 - q0 * s[11] + q1 * s[12] - q3 * s[10]
        adj[9] = s[7] * b0 + s[8] * b1 - q0 * s[12] - q1 * s[11] + q2 * s[10]
        skew = p.inertia_z - p.inertia
        c0 = a[10] / p.inertia
        c1 = a[11] / p.inertia
        c2 = a[12] / p.inertia_z
        adj[10] = -q0 * s[7] + q1 * s[6] + q2 * s[9] - q3 * s[8] - p.gain * c0 + skew * s[12] * c1
        adj[11] = -q0 * s[8] - q1 * s[9] + q2 * s[6] + q3 * s[7] - p.gain * c1 - skew * s[12] * c0
        adj[12] = (
            -q0 * s[9] + q1 * s[8] - q2 * s[7] + q3 * s[6]
            - p.gain_z * c2 - skew * s[11] * c0 + skew * s[10] * c1
        )  # fmt: skip
        asked = p.gain * p.rate
        return adj, Control(p.thrust * adj_force, asked * c0, asked * c1, p.gain_z * p.rate * c2)

    @wp.func
    def rates_parameters_vjp(s: State, u: Control, p: Params, k: State, a: State) -> Values:
        """Cotangents of `PARAMETERS` of `rates`, whose value is k; that of dt is 0."""
        b = up(s)
        inverse = dtype(1.0) / p.mass
        lifted = b[0] * a[3] + b[1] * a[4] + b[2] * a[5]
        slowed = s[3] * a[3] + s[4] * a[4] + s[5] * a[5]
        force = p.thrust * (dtype(1.0) + u[0])
        x = s[11] * s[12]
        y = s[12] * s[10]
        return Values(
            dtype(0.0),
            -a[5],
            -(force * lifted - p.drag * slowed) * inverse * inverse,
            (a[10] * (x - k[10]) - a[11] * (y + k[11])) / p.inertia,
            (a[11] * y - a[10] * x) / p.inertia - a[12] * k[12] / p.inertia_z,
            -slowed * inverse,
            (dtype(1.0) + u[0]) * lifted * inverse,
        )

    @wp.func
    def moved(s: State, u: Control, p: Params) -> State:
        """The next state before its quaternion is divided by its length."""
        half = dtype(0.5) * p.dt
        k1 = rates(s, u, p)
        k2 = rates(s + half * k1, u, p)
        k3 = rates(s + half * k2, u, p)
        k4 = rates(s + p.dt * k3, u, p)
        return s + p.dt / dtype(6.0) * (k1 + dtype(2.0) * (k2 + k3) + k4)

    @wp.func
    def length_of(s: State) -> dtype:
        """Of the quaternion."""
        return wp.sqrt(s[6] * s[6] + s[7] * s[7] + s[8] * s[8] + s[9] * s[9])

    @wp.func
    def quadrotor_step(x: State, u: Control, p: Params) -> State:
        """State after one time step."""
        x_next = moved(x, u, p)
        scale = dtype(1.0) / length_of(x_next)
        for i in range(6, 10):
            x_next[i] = scale * x_next[i]
        return x_next

    @wp.func
    def division_vjp(y: State, adj_x_next: State) -> State:
        """Cotangent a of what `moved` returns, y."""
        scale = dtype(1.0) / length_of(y)
        along = dtype(0.0)
        for i in range(6, 10):
            along += scale * y[i] * adj_x_next[i]
        a = adj_x_next
        for i in range(6, 10):
            a[i] = scale * (adj_x_next[i] - scale * y[i] * along)
        return a

    @wp.func
    def quadrotor_step_vjp(x: State, u: Control, p: Params, adj_x_next: State):
        """Cotangents (adj_x, adj_u) of `quadrotor_step`."""
        h = p.dt
        half = dtype(0.5) * h
        x2 = x + half * rates(x, u, p)
        x3 = x + half * rates(x2, u, p)
        x4 = x + h * rates(x3, u, p)
        a = division_vjp(moved(x, u, p), adj_x_next)
        s4, u4 = rates_vjp(x4, u, p, h / dtype(6.0) * a)
        s3, u3 = rates_vjp(x3, u, p, h / dtype(3.0) * a + h * s4)
        s2, u2 = rates_vjp(x2, u, p, h / dtype(3.0) * a + half * s3)
        s1, u1 = rates_vjp(x, u, p, h / dtype(6.0) * a + half * s2)
        return a + s1 + s2 + s3 + s4, u1 + u2 + u3 + u4

    @wp.func
    def quadrotor_parameters_vjp(x: State, u: Control, p: Params, adj_x_next: State) -> Values:
        """Cotangents of `PARAMETERS` of `quadrotor_step`."""
        h = p.dt
        half = dtype(0.5) * h
        k1 = rates(x, u, p)
        x2 = x + half * k1
        k2 = rates(x2, u, p)
        x3 = x + half * k2
        k3 = rates(x3, u, p)
        x4 = x + h * k3
        k4 = rates(x4, u, p)
        a = division_vjp(moved(x, u, p), adj_x_next)
        a4 = h / dtype(6.0) * a
        s4, u4 = rates_vjp(x4, u, p, a4)
        a3 = h / dtype(3.0) * a + h * s4
        s3, u3 = rates_vjp(x3, u, p, a3)
        a2 = h / dtype(3.0) * a + half * s3
        s2, u2 = rates_vjp(x2, u, p, a2)
        a1 = h / dtype(6.0) * a + half * s2
        adj = rates_parameters_vjp(x, u, p, k1, a1) + rates_parameters_vjp(x2, u, p, k2, a2)
        adj += rates_parameters_vjp(x3, u, p, k3, a3) + rates_parameters_vjp(x4, u, p, k4, a4)
        adj_dt = wp.dot(a, k1 + dtype(2.0) * (k2 + k3) + k4) / dtype(6.0) + wp.dot(s4, k3)
        adj[0] = adj_dt + dtype(0.5) * (wp.dot(s2, k1) + wp.dot(s3, k2))
        return adj

    @wp.func
    def quadrotor_loss(x: State, p: Params) -> dtype:
        """Cost of one state."""
        place = x[0] * x[0] + x[1] * x[1] + x[2] * x[2]
        speed = x[3] * x[3] + x[4] * x[4] + x[5] * x[5]
        turn = x[10] * x[10] + x[11] * x[11] + x[12] * x[12]
        return place + p.velocity_cost * speed + p.rate_cost * turn

    @wp.func
    def quadrotor_loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        """Cotangent adj_x of `quadrotor_loss`."""
        adj_x = State()
        twice = dtype(2.0) * adj_loss
        for i in range(3):
            adj_x[i] = twice * x[i]
            adj_x[3 + i] = twice * p.velocity_cost * x[3 + i]
            adj_x[10 + i] = twice * p.rate_cost * x[10 + i]
        return adj_x

    return DeviceFunctions(
        Params,
        State,
        Control,
        quadrotor_step,
        quadrotor_step_vjp,
        quadrotor_loss,
        quadrotor_loss_vjp,
        parameters=ParameterFunctions(PARAMETERS, Values, quadrotor_parameters_vjp),
    )

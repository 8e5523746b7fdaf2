"""Cart with any number of independent poles: one semi-implicit Euler step, its loss, and their hand-written
adjoints.

With cart position x [m], cart velocity v [m/s], pole angles q_i [rad] from upright, pole rates w_i [rad/s],
force f [N] on the cart, time step h [s], gravity g [m/s^2], pole mass m [kg], total mass M [kg], half pole
length l [m]:

    A_i  = (f + m l sin(q_i) w_i^2) / M
    D_i  = l (4/3 - m cos(q_i)^2 / M)
    wd_i = (g sin q_i - cos(q_i) A_i) / D_i
    vd   = (f + m l sum_i [sin(q_i) w_i^2 - wd_i cos q_i]) / M

    w_i' = w_i + h wd_i     q_i' = q_i + h w_i'     v' = v + h vd     x' = x + h v'

A_i knows pole i only, and M is the same for any number of poles: the published system, not an exact
multi-body one. Reading it backwards, with adj_y the cotangent dL/dy, and everything that reaches v' and w_i':

    s        = adj_v' + h adj_x'            adj_x += adj_x'     adj_v   += s       adj_vd    = h s
    s_i      = adj_w_i' + h adj_q_i'        adj_q += adj_q_i'   adj_w_i += s_i
    adj_wd_i = h s_i - (m l / M) cos(q_i) adj_vd

    aN = adj_wd_i / D_i     (numerator)     aD = -wd_i aN     (denominator)     aA = -cos(q_i) aN
    adj_f   += (adj_vd + sum_i aA) / M
    adj_sin  = g aN + (m l / M) w_i^2 (adj_vd + aA)
    adj_cos  = -A_i aN - (m l / M) wd_i adj_vd - (2 l m / M) cos(q_i) aD
    adj_w_i += 2 (m l / M) sin(q_i) w_i (adj_vd + aA)
    adj_q_i += cos(q_i) adj_sin - sin(q_i) adj_cos

and to the numbers of the physics, with P the sum in vd, e_i = 4/3 - m cos(q_i)^2 / M and c_i = cos q_i:

    adj_h += v' adj_x' + vd s + sum_i [w_i' adj_q_i' + wd_i s_i]      adj_g += sum_i sin(q_i) aN
    adj_m += l P adj_vd / M + sum_i [l sin(q_i) w_i^2 aA / M - l c_i^2 aD / M]
    adj_l += m P adj_vd / M + sum_i [m sin(q_i) w_i^2 aA / M + e_i aD]
    adj_M -= vd adj_vd / M + sum_i [A_i aA / M - l m c_i^2 aD / M^2]

State [x, v, q_1, w_1, q_2, w_2, ...], control [f]. Cost of a state: 1 - mean_i cos q_i.

Source: Schnell and Thuerey, ICLR 2024, section 4 (cart-pole), after Barto, Sutton and Anderson (1983).
"""

import functools
from typing import Any

import warp as wp

from ..system import DeviceFunctions, ParameterFunctions
from .cartpole_block import make_block_functions

PARAMETERS = ("dt", "gravity", "pole_mass", "total_mass", "pole_length")
"""Numbers that a rollout may be given, the order of their cotangents."""


@functools.cache
def make_params(dtype: Any) -> Any:
    """Returns the Warp struct of the cart-pole's parameters for `dtype`, fields as in
    `warp_sims.CartPole`.
    """

    @wp.struct
    class CartPoleParams:
        dt: dtype  # [s]
        gravity: dtype  # [m/s^2]
        pole_mass: dtype  # [kg]
        total_mass: dtype  # [kg]
        pole_length: dtype  # [m], half the pole

    return CartPoleParams


@functools.cache
def make_functions(poles: int, dtype: Any) -> DeviceFunctions:
    """Returns the device functions of a cart with `poles` poles for `dtype` (wp.float32 or wp.float64)."""
    Params = make_params(dtype)
    State = wp.types.vector(length=2 + 2 * poles, dtype=dtype)
    Control = wp.types.vector(length=1, dtype=dtype)
    Values = wp.types.vector(length=len(PARAMETERS), dtype=dtype)

    @wp.func
    def cartpole_step(x: State, u: Control, p: Params) -> State:
        """State after one time step."""
        f = u[0]
        ml = p.pole_mass * p.pole_length
        x_next = State()
        pull = dtype(0.0)
        for i in range(poles):
            q = x[2 + 2 * i]
            w = x[3 + 2 * i]
            s = wp.sin(q)
            c = wp.cos(q)
            a = (f + ml * s * w * w) / p.total_mass
            d = p.pole_length * (dtype(4.0) / dtype(3.0) - p.pole_mass * c * c / p.total_mass)
            wd = (p.gravity * s - c * a) / d
            pull += s * w * w - wd * c
            w_next = w + p.dt * wd
            x_next[3 + 2 * i] = w_next
            x_next[2 + 2 * i] = q + p.dt * w_next
        v_next = x[1] + p.dt * (f + ml * pull) / p.total_mass
        x_next[1] = v_next
        x_next[0] = x[0] + p.dt * v_next
        return x_next

    @wp.func
    def cartpole_step_vjp(x: State, u: Control, p: Params, adj_x_next: State):
        """Cotangents (adj_x, adj_u) of `cartpole_step`."""
        f = u[0]
        inv_total = dtype(1.0) / p.total_mass
        k = p.pole_mass * p.pole_length * inv_total
        adj_x = State()
        adj_v = adj_x_next[1] + p.dt * adj_x_next[0]
        adj_vd = p.dt * adj_v
        adj_x[0] = adj_x_next[0]
        adj_x[1] = adj_v
        adj_f = adj_vd
        for i in range(poles):
            q = x[2 + 2 * i]
            w = x[3 + 2 * i]
            s = wp.sin(q)
            c = wp.cos(q)
            a = f * inv_total + k * s * w * w
            d = p.pole_length * (dtype(4.0) / dtype(3.0) - p.pole_mass * c * c * inv_total)
            inv_d = dtype(1.0) / d
            wd = (p.gravity * s - c * a) * inv_d

            adj_w = adj_x_next[3 + 2 * i] + p.dt * adj_x_next[2 + 2 * i]
            adj_wd = p.dt * adj_w - k * c * adj_vd
            adj_num = adj_wd * inv_d
            adj_den = -wd * adj_num
            adj_a = -c * adj_num
            through = k * w * (adj_vd + adj_a)
            adj_s = p.gravity * adj_num + through * w
            adj_c = (
                -a * adj_num
                - k * wd * adj_vd
                - dtype(2.0) * p.pole_length * p.pole_mass * inv_total * c * adj_den
            )
            adj_f += adj_a
            adj_x[3 + 2 * i] = adj_w + dtype(2.0) * s * through
            adj_x[2 + 2 * i] = adj_x_next[2 + 2 * i] + c * adj_s - s * adj_c
        return adj_x, Control(adj_f * inv_total)

    @wp.func
    def cartpole_parameters_vjp(x: State, u: Control, p: Params, adj_x_next: State) -> Values:
        """Cotangents of `PARAMETERS` of `cartpole_step`."""
        f = u[0]
        inv_total = dtype(1.0) / p.total_mass
        ml = p.pole_mass * p.pole_length
        adj_v = adj_x_next[1] + p.dt * adj_x_next[0]
        adj_vd = p.dt * adj_v
        pull = dtype(0.0)
        adj_dt = dtype(0.0)
        adj_gravity = dtype(0.0)
        adj_pole = dtype(0.0)
        adj_total = dtype(0.0)
        adj_length = dtype(0.0)
        for i in range(poles):
            q = x[2 + 2 * i]
            w = x[3 + 2 * i]
            s = wp.sin(q)
            c = wp.cos(q)
            sww = s * w * w
            a = (f + ml * sww) * inv_total
            e = dtype(4.0) / dtype(3.0) - p.pole_mass * c * c * inv_total
            wd = (p.gravity * s - c * a) / (p.pole_length * e)
            pull += sww - wd * c

            adj_w = adj_x_next[3 + 2 * i] + p.dt * adj_x_next[2 + 2 * i]
            adj_num = (p.dt * adj_w - ml * inv_total * c * adj_vd) / (p.pole_length * e)
            adj_den = -wd * adj_num
            adj_a = -c * adj_num
            adj_dt += (w + p.dt * wd) * adj_x_next[2 + 2 * i] + wd * adj_w
            adj_gravity += s * adj_num
            adj_pole += p.pole_length * inv_total * (sww * adj_a - c * c * adj_den)
            adj_length += p.pole_mass * inv_total * sww * adj_a + e * adj_den
            adj_total += inv_total * (ml * c * c * inv_total * adj_den - a * adj_a)
        vd = (f + ml * pull) * inv_total
        adj_dt += (x[1] + p.dt * vd) * adj_x_next[0] + vd * adj_v
        adj_pole += p.pole_length * pull * inv_total * adj_vd
        adj_length += p.pole_mass * pull * inv_total * adj_vd
        adj_total -= vd * inv_total * adj_vd
        return Values(adj_dt, adj_gravity, adj_pole, adj_total, adj_length)

    @wp.func
    def cartpole_loss(x: State, p: Params) -> dtype:
        """Cost of one state, 1 - mean cos q: 0 with every pole upright, 2 with every pole hanging."""
        total = dtype(0.0)
        for i in range(poles):
            total += wp.cos(x[2 + 2 * i])
        return dtype(1.0) - total / dtype(poles)

    @wp.func
    def cartpole_loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        """Cotangent adj_x of `cartpole_loss`."""
        adj_x = State()
        for i in range(poles):
            adj_x[2 + 2 * i] = adj_loss * wp.sin(x[2 + 2 * i]) / dtype(poles)
        return adj_x

    return DeviceFunctions(
        Params,
        State,
        Control,
        cartpole_step,
        cartpole_step_vjp,
        cartpole_loss,
        cartpole_loss_vjp,
        make_block_functions(poles, dtype, Params, State, Control),
        parameters=ParameterFunctions(PARAMETERS, Values, cartpole_parameters_vjp),
    )

"""Guidance by repulsion: drivers herd evaders to the origin; explicit Euler step, loss, and their
hand-written adjoints.

Drivers i and evaders j are points in the plane with position x [m] and velocity v [m/s]; h [s] is the time
step. With r the vector between two agents, d = softening + |r|, perp(r) = (-r_y, r_x), and each driver's
control (c_0, c_1):

    center_i = x_i - sum_j x_j
    a_i      = c_0 center_i + c_1 perp(center_i) - driver_drag v_i
               + driver_repulsion sum_{k != i} (x_i - x_k) / d^2
    a_j      = -evader_repulsion sum_i (x_i - x_j) / d^2 - evader_drag v_j
               + flocking sum_{k != j} f(d) (x_k - x_j)
    f(d)     = flocking_length / d^2 - 1 / d

    x' = x + h v        v' = v + h a

A pair force g(d) r is differentiated as

    adj_r = g(d) adj + (r . adj) g'(d) r / |r|

whose second term is 0 where two agents coincide (its norm is at most |r| |adj| |g'|),
with g = 1/d^2, g' = -2/d^3 and f' = -2 flocking_length / d^3 + 1/d^2. Backwards, with b_a = h adj_v' the
cotangent of an acceleration:

    adj_x = adj_x' + pair terms + center terms          adj_v = adj_v' + h adj_x' - drag b_a
    adj_c0 = center_i . b_i        adj_c1 = perp(center_i) . b_i
    adj_center_i = c_0 b_i - c_1 perp(b_i)              to x_i with +1, to every x_j with -1

To the numbers of the physics, with r the vector of each pair force on an agent of acceleration cotangent b_a:

    adj_h += v . adj_x' + a . adj_v'        adj_drag -= v . b_a        adj_repulsion +-= r . b_a / d^2
    adj_flocking += f(d) r . b_a            adj_flocking_length += flocking r . b_a / d^2
    adj_softening += (strength) g'(d) r . b_a

State per object, drivers first: [p_x, p_y, v_x, v_y]; control per driver [c_0, c_1]. Cost of a state: mean
over evaders and axes of x_j^2.

Source: Schnell and Thuerey, ICLR 2024, section 4 (guidance by repulsion), after Ko and Zuazua (2020).
"""

import functools
from typing import Any

import warp as wp

from ..system import DeviceFunctions, ParameterFunctions
from .elements import rolled
from .guidance_block import make_block_functions

PARAMETERS = (
    "dt",
    "driver_drag",
    "driver_repulsion",
    "evader_drag",
    "evader_repulsion",
    "flocking",
    "flocking_length",
    "softening",
)
"""Numbers that a rollout may be given, the order of their cotangents."""


@functools.cache
def make_params(dtype: Any) -> Any:
    """Returns the Warp struct of the parameters for `dtype`, fields as in `warp_sims.GuidanceByRepulsion`."""

    @wp.struct
    class GuidanceParams:
        dt: dtype
        driver_drag: dtype
        driver_repulsion: dtype
        evader_drag: dtype
        evader_repulsion: dtype
        flocking: dtype
        flocking_length: dtype
        softening: dtype

    return GuidanceParams


@functools.cache
def make_functions(drivers: int, evaders: int, dtype: Any) -> DeviceFunctions:
    """Returns the device functions for these numbers of agents and `dtype` (wp.float32 or wp.float64)."""
    Params = make_params(dtype)
    objects = drivers + evaders
    State = wp.types.vector(length=4 * objects, dtype=dtype)
    Control = wp.types.vector(length=2 * drivers, dtype=dtype)
    Vec = wp.types.vector(length=2, dtype=dtype)
    Values = wp.types.vector(length=len(PARAMETERS), dtype=dtype)
    # In the adjoint, which a GPU has least registers for, vectors are read element by element: handed to a
    # function, they would be copied.
    count, driver_count = rolled(objects, State), rolled(drivers, State)

    @wp.func
    def position(x: State, i: int) -> Vec:
        return Vec(x[4 * i], x[4 * i + 1])

    @wp.func
    def velocity(x: State, i: int) -> Vec:
        return Vec(x[4 * i + 2], x[4 * i + 3])

    @wp.func
    def perp(r: Vec) -> Vec:
        return Vec(-r[1], r[0])

    @wp.func
    def repulsion(r: Vec, softening: dtype) -> Vec:
        """r / d^2."""
        d = softening + wp.length(r)
        return r / (d * d)

    @wp.func
    def repulsion_vjp(r: Vec, softening: dtype, adj: Vec) -> Vec:
        """Cotangent of r of `repulsion`."""
        n = wp.length(r)
        d = softening + n
        along = dtype(0.0)
        if n > dtype(0.0):
            along = dtype(-2.0) * wp.dot(r, adj) / (d * d * d * n)
        return adj / (d * d) + along * r

    @wp.func
    def attraction(r: Vec, softening: dtype, length: dtype) -> Vec:
        """f(d) r."""
        d = softening + wp.length(r)
        return (length / (d * d) - dtype(1.0) / d) * r

    @wp.func
    def attraction_vjp(r: Vec, softening: dtype, length: dtype, adj: Vec) -> Vec:
        """Cotangent of r of `attraction`."""
        n = wp.length(r)
        d = softening + n
        along = dtype(0.0)
        if n > dtype(0.0):
            along = wp.dot(r, adj) * (dtype(1.0) / (d * d) - dtype(2.0) * length / (d * d * d)) / n
        return (length / (d * d) - dtype(1.0) / d) * adj + along * r

    @wp.func
    def evader_sum(x: State) -> Vec:
        total = Vec()
        for j in range(drivers, objects):
            total += position(x, j)
        return total

    @wp.func
    def guidance_step(x: State, u: Control, p: Params) -> State:
        """State after one time step."""
        x_next = State()
        herd = evader_sum(x)
        for i in range(objects):
            xi = position(x, i)
            vi = velocity(x, i)
            a = Vec()
            if i < drivers:
                center = xi - herd
                a = u[2 * i] * center + u[2 * i + 1] * perp(center) - p.driver_drag * vi
                for k in range(drivers):
                    if k != i:
                        a += p.driver_repulsion * repulsion(xi - position(x, k), p.softening)
            else:
                a = -p.evader_drag * vi
                for k in range(drivers):
                    a -= p.evader_repulsion * repulsion(position(x, k) - xi, p.softening)
                for k in range(drivers, objects):
                    if k != i:
                        a += p.flocking * attraction(position(x, k) - xi, p.softening, p.flocking_length)
            x_next[4 * i] = xi[0] + p.dt * vi[0]
            x_next[4 * i + 1] = xi[1] + p.dt * vi[1]
            x_next[4 * i + 2] = vi[0] + p.dt * a[0]
            x_next[4 * i + 3] = vi[1] + p.dt * a[1]
        return x_next

    @wp.func
    def guidance_step_vjp(x: State, u: Control, p: Params, adj_x_next: State):
        """Cotangents (adj_x, adj_u) of `guidance_step`."""
        adj_x = State()
        adj_u = Control()
        herd = Vec()
        for j in range(drivers, objects):
            herd += Vec(x[4 * j], x[4 * j + 1])
        adj_herd = Vec()
        for i in range(count()):
            xi = Vec(x[4 * i], x[4 * i + 1])
            adj_xi_next = Vec(adj_x_next[4 * i], adj_x_next[4 * i + 1])
            adj_vi_next = Vec(adj_x_next[4 * i + 2], adj_x_next[4 * i + 3])
            adj_a = p.dt * adj_vi_next
            adj_xi = adj_xi_next
            drag = p.evader_drag
            if i < drivers:
                drag = p.driver_drag
                center = xi - herd
                adj_u[2 * i] = wp.dot(center, adj_a)
                adj_u[2 * i + 1] = wp.dot(perp(center), adj_a)
                adj_center = u[2 * i] * adj_a - u[2 * i + 1] * perp(adj_a)
                adj_xi += adj_center
                adj_herd -= adj_center
                # pairs of drivers: what pushes i pulls k
                for k in range(driver_count()):
                    if k != i:
                        r = xi - Vec(x[4 * k], x[4 * k + 1])
                        adj_vk = Vec(adj_x_next[4 * k + 2], adj_x_next[4 * k + 3])
                        adj_xi += repulsion_vjp(r, p.softening, p.driver_repulsion * (adj_a - p.dt * adj_vk))
                for j in range(drivers, count()):
                    r = xi - Vec(x[4 * j], x[4 * j + 1])
                    push = p.dt * Vec(adj_x_next[4 * j + 2], adj_x_next[4 * j + 3])
                    adj_xi -= p.evader_repulsion * repulsion_vjp(r, p.softening, push)
            else:
                for k in range(driver_count()):
                    r = Vec(x[4 * k], x[4 * k + 1]) - xi
                    adj_xi += p.evader_repulsion * repulsion_vjp(r, p.softening, adj_a)
                for k in range(drivers, count()):
                    if k != i:
                        r = Vec(x[4 * k], x[4 * k + 1]) - xi
                        adj_vk = Vec(adj_x_next[4 * k + 2], adj_x_next[4 * k + 3])
                        pull = p.flocking * (adj_a - p.dt * adj_vk)
                        adj_xi -= attraction_vjp(r, p.softening, p.flocking_length, pull)
            adj_vi = adj_vi_next + p.dt * adj_xi_next - drag * adj_a
            adj_x[4 * i] = adj_xi[0]
            adj_x[4 * i + 1] = adj_xi[1]
            adj_x[4 * i + 2] = adj_vi[0]
            adj_x[4 * i + 3] = adj_vi[1]
        for j in range(drivers, objects):
            adj_x[4 * j] += adj_herd[0]
            adj_x[4 * j + 1] += adj_herd[1]
        return adj_x, adj_u

    @wp.func
    def guidance_parameters_vjp(x: State, u: Control, p: Params, adj_x_next: State) -> Values:
        """Cotangents of `PARAMETERS` of `guidance_step`."""
        adj = Values()
        herd = evader_sum(x)
        for i in range(objects):
            xi = position(x, i)
            vi = velocity(x, i)
            adj_vi = Vec(adj_x_next[4 * i + 2], adj_x_next[4 * i + 3])
            adj_a = p.dt * adj_vi
            a = Vec()
            repelled = dtype(0.0)  # sum of r . adj_a / d^2
            softened = dtype(0.0)  # sum of r . adj_a / d^3
            for k in range(drivers):
                if k != i:
                    r = position(x, k) - xi
                    d = p.softening + wp.length(r)
                    a -= r / (d * d)
                    repelled -= wp.dot(r, adj_a) / (d * d)
                    softened -= wp.dot(r, adj_a) / (d * d * d)
            if i < drivers:
                center = xi - herd
                a = p.driver_repulsion * a + u[2 * i] * center + u[2 * i + 1] * perp(center)
                a -= p.driver_drag * vi
                adj[1] -= wp.dot(vi, adj_a)
                adj[2] += repelled
                adj[7] -= dtype(2.0) * p.driver_repulsion * softened
            else:
                a = p.evader_repulsion * a - p.evader_drag * vi
                adj[3] -= wp.dot(vi, adj_a)
                adj[4] += repelled
                adj[7] -= dtype(2.0) * p.evader_repulsion * softened
                for k in range(drivers, objects):
                    if k != i:
                        r = position(x, k) - xi
                        d = p.softening + wp.length(r)
                        along = wp.dot(r, adj_a)
                        slope = dtype(1.0) / (d * d) - dtype(2.0) * p.flocking_length / (d * d * d)
                        a += p.flocking * attraction(r, p.softening, p.flocking_length)
                        adj[5] += (p.flocking_length / (d * d) - dtype(1.0) / d) * along
                        adj[6] += p.flocking * along / (d * d)
                        adj[7] += p.flocking * slope * along
            adj[0] += wp.dot(vi, Vec(adj_x_next[4 * i], adj_x_next[4 * i + 1])) + wp.dot(a, adj_vi)
        return adj

    @wp.func
    def guidance_loss(x: State, p: Params) -> dtype:
        """Cost of one state: mean over evaders and axes of the squared position."""
        total = dtype(0.0)
        for j in range(drivers, objects):
            xj = position(x, j)
            total += wp.dot(xj, xj)
        return total / dtype(2 * evaders)

    @wp.func
    def guidance_loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        """Cotangent adj_x of `guidance_loss`."""
        adj_x = State()
        for j in range(drivers, objects):
            adj_x[4 * j] = adj_loss * x[4 * j] / dtype(evaders)
            adj_x[4 * j + 1] = adj_loss * x[4 * j + 1] / dtype(evaders)
        return adj_x

    return DeviceFunctions(
        Params,
        State,
        Control,
        guidance_step,
        guidance_step_vjp,
        guidance_loss,
        guidance_loss_vjp,
        make_block_functions(drivers, evaders, dtype, Params, State, Control),
        parameters=ParameterFunctions(PARAMETERS, Values, guidance_parameters_vjp),
    )

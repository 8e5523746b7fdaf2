"""A quantum particle in a box, steered by a linear potential: Crank-Nicolson step, loss, and their
hand-written adjoints.

The wave function psi lives on N grid points x_j = j dx (j = 1 ... N, dx = L / (N + 1)) between walls where it
vanishes; h is the time step and c the control, the strength of the field (units with hbar = 1, and the
kinetic term without the factor 1/2):

    H(c) = -d^2/dx^2 + c x        A = (h / 2) H(c)        (1 + i A) psi' = (1 - i A) psi

A is real, symmetric and tridiagonal: diagonal (h/2) (2 / dx^2 + c x_j), off the diagonal -h / (2 dx^2). With
M = 1 + i A and conj(M) = 1 - i A = 2 - M the step needs one solve and no product:

    psi' = 2 M^-1 psi - psi

The elimination is that of quantum_block.py, from one end. quantum_memory.py is the same for large states on
GPUs.

Both M and conj(M) are normal with |M z| >= |z|, so that the elimination needs no pivoting, and the step is
unitary. Backwards, with g = adj_psi' as a complex vector (adj_re + i adj_im) and y = conj(M)^-1 g:

    adj_psi = 2 y - g
    adj_c   = (h / 2) sum_j x_j Im( conj(y_j) (psi_j + psi'_j) ),        psi + psi' = 2 M^-1 psi

conj(M)^-1 g = conj(M^-1 conj(g)): both solves share one elimination of M.

To the numbers of the physics, because A M^-1 psi = i (M^-1 psi - psi) = i (psi' - psi) / 2, and A's kinetic
part goes with 1 / dx^2 and its potential with dx:

    adj_h  = (1 / h) Re sum_j conj(y_j) (psi'_j - psi_j)
    adj_dx = (1 / dx) [3 c adj_c - 2 h adj_h]           adj_L = adj_dx / (N + 1)

State [Re psi_1, Im psi_1, Re psi_2, ...], normalised to sum |psi_j|^2 = 1 (no dx); control [c]. Cost of a
state against eigenstate e_n(j) = sin(pi n j / (N + 1)) / norm, n = 1 the ground state: 1 - |<e_n, psi>|^2.

Source: Schnell and Thuerey, ICLR 2024, section 4 (quantum control).
"""

import functools
from typing import Any

import warp as wp

from ..system import DeviceFunctions, ParameterFunctions
from .elements import rolled
from .quantum_block import make_block_functions
from .quantum_memory import make_memory_functions

PARAMETERS = ("dt", "length")
"""Numbers that a rollout may be given, the order of their cotangents."""


@functools.cache
def make_params(points: int, dtype: Any) -> Any:
    """Returns the Warp struct of the parameters for `points` grid points and `dtype`."""
    Eigenstate = wp.types.vector(length=points, dtype=dtype)

    @wp.struct
    class QuantumParams:
        dt: dtype
        dx: dtype
        kappa: dtype  # 2 dx^2 / dt, rounded once: an error of the energies is one of every step
        field: dtype  # dx^3
        eigenstate: Eigenstate  # e_n at the grid points

    return QuantumParams


@functools.cache
def make_fields(points: int) -> Any:
    """Returns fields(numbers), the fields of the parameters for numbers by the names of `PARAMETERS`."""

    def fields(numbers: dict[str, Any]) -> dict[str, Any]:
        dt, dx = numbers["dt"], numbers["length"] / (points + 1)
        return {"dt": dt, "dx": dx, "kappa": 2 * dx * dx / dt, "field": dx * dx * dx}

    return fields


@functools.cache
def make_functions(points: int, dtype: Any) -> DeviceFunctions:
    """Returns the device functions for `points` grid points and `dtype` (wp.float32 or wp.float64)."""
    Params = make_params(points, dtype)
    State = wp.types.vector(length=2 * points, dtype=dtype)
    Control = wp.types.vector(length=1, dtype=dtype)
    Complex = wp.types.vector(length=2, dtype=dtype)
    Values = wp.types.vector(length=len(PARAMETERS), dtype=dtype)
    count = rolled(points, State)

    @wp.func
    def times(a: Complex, b: Complex) -> Complex:
        return Complex(a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0])

    @wp.func
    def reciprocal(a: Complex) -> Complex:
        s = dtype(1.0) / (a[0] * a[0] + a[1] * a[1])
        return Complex(a[0] * s, -a[1] * s)

    @wp.func
    def at(x: State, j: int) -> Complex:
        return Complex(x[2 * j], x[2 * j + 1])

    @wp.func
    def excess(j: int, c: dtype, before: Complex, p: Params) -> Complex:
        """e_j of the elimination in quantum_block.py, from e_{j-1} w_{j-1} (1 at the wall)."""
        return Complex(c * dtype(j + 1) * p.field + before[0], before[1] - p.kappa)

    @wp.func
    def with_right_side(v: Complex, right: Complex, p: Params) -> Complex:
        """v - i kappa right."""
        return Complex(v[0] + p.kappa * right[1], v[1] - p.kappa * right[0])

    # The state vectors below are read and written element by element and never handed on: a GPU thread keeps
    # them in memory, and a function of a vector would copy it through registers.

    @wp.func
    def quantum_step(x: State, u: Control, p: Params) -> State:
        """Wave function after one time step."""
        pivots = State()  # w_j
        x_next = State()  # first v_j, the right-hand sides after elimination
        before = Complex(dtype(1.0), dtype(0.0))
        z = Complex()
        for j in range(count()):
            e = excess(j, u[0], before, p)
            pivot = reciprocal(Complex(dtype(1.0) + e[0], e[1]))
            before = times(e, pivot)
            z = times(pivot, with_right_side(z, Complex(x[2 * j], x[2 * j + 1]), p))
            pivots[2 * j] = pivot[0]
            pivots[2 * j + 1] = pivot[1]
            x_next[2 * j] = z[0]
            x_next[2 * j + 1] = z[1]
        z = Complex()
        for k in range(count()):
            j = points - 1 - k
            z = Complex(x_next[2 * j], x_next[2 * j + 1]) + times(
                Complex(pivots[2 * j], pivots[2 * j + 1]), z
            )
            x_next[2 * j] = dtype(2.0) * z[0] - x[2 * j]
            x_next[2 * j + 1] = dtype(2.0) * z[1] - x[2 * j + 1]
        return x_next

    @wp.func
    def quantum_step_vjp(x: State, u: Control, p: Params, adj_x_next: State):
        """Cotangents (adj_x, adj_u) of `quantum_step`: both solves in one elimination."""
        pivots = State()
        halves = State()  # for M^-1 x = (psi + psi') / 2
        adj_x = State()  # for M^-1 conj(adj_x_next) = y, the conjugate of conj(M)^-1 adj_x_next
        before = Complex(dtype(1.0), dtype(0.0))
        half = Complex()
        y = Complex()
        for j in range(count()):
            e = excess(j, u[0], before, p)
            pivot = reciprocal(Complex(dtype(1.0) + e[0], e[1]))
            before = times(e, pivot)
            half = times(pivot, with_right_side(half, Complex(x[2 * j], x[2 * j + 1]), p))
            y = times(pivot, with_right_side(y, Complex(adj_x_next[2 * j], -adj_x_next[2 * j + 1]), p))
            pivots[2 * j] = pivot[0]
            pivots[2 * j + 1] = pivot[1]
            halves[2 * j] = half[0]
            halves[2 * j + 1] = half[1]
            adj_x[2 * j] = y[0]
            adj_x[2 * j + 1] = y[1]
        half = Complex()
        y = Complex()
        adj_c = dtype(0.0)
        for k in range(count()):
            j = points - 1 - k
            pivot = Complex(pivots[2 * j], pivots[2 * j + 1])
            half = Complex(halves[2 * j], halves[2 * j + 1]) + times(pivot, half)
            y = Complex(adj_x[2 * j], adj_x[2 * j + 1]) + times(pivot, y)
            adj_c += dtype(j + 1) * times(y, half)[1]
            adj_x[2 * j] = dtype(2.0) * y[0] - adj_x_next[2 * j]
            adj_x[2 * j + 1] = dtype(-2.0) * y[1] - adj_x_next[2 * j + 1]
        return adj_x, Control(p.dt * p.dx * adj_c)

    @wp.func
    def quantum_parameters_vjp(x: State, u: Control, p: Params, adj_x_next: State) -> Values:
        """Cotangents of `PARAMETERS` of `quantum_step`; y = (adj_psi + adj_psi') / 2."""
        x_next = quantum_step(x, u, p)
        adj_x, adj_u = quantum_step_vjp(x, u, p, adj_x_next)
        along = dtype(0.0)
        for j in range(2 * points):
            along += dtype(0.5) * (adj_x[j] + adj_x_next[j]) * (x_next[j] - x[j])
        adj_dx = (dtype(3.0) * u[0] * adj_u[0] - dtype(2.0) * along) / p.dx
        return Values(along / p.dt, adj_dx / dtype(points + 1))

    @wp.func
    def overlap(x: State, p: Params) -> Complex:
        """<e_n, psi>."""
        total = Complex()
        for j in range(points):
            total += p.eigenstate[j] * at(x, j)
        return total

    @wp.func
    def quantum_loss(x: State, p: Params) -> dtype:
        """Cost of one state, 1 - |<e_n, psi>|^2."""
        o = overlap(x, p)
        return dtype(1.0) - wp.dot(o, o)

    @wp.func
    def quantum_loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        """Cotangent adj_x of `quantum_loss`."""
        o = dtype(-2.0) * adj_loss * overlap(x, p)
        adj_x = State()
        for j in range(count()):
            adj_x[2 * j] = o[0] * p.eigenstate[j]
            adj_x[2 * j + 1] = o[1] * p.eigenstate[j]
        return adj_x

    return DeviceFunctions(
        Params,
        State,
        Control,
        quantum_step,
        quantum_step_vjp,
        quantum_loss,
        quantum_loss_vjp,
        make_block_functions(points, dtype, Params, State, Control),
        make_memory_functions(points, dtype, Params, State, Control),
        parameters=ParameterFunctions(PARAMETERS, Values, quantum_parameters_vjp, make_fields(points)),
    )

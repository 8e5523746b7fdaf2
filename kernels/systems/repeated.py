"""A system whose step is several steps of another system under the same control.

    x_{j+1} = S(x_j, u)        j = 0 ... k - 1, from x_0 = x to x' = x_k

Backwards, with the states in between computed again:

    adj_u = sum_j (dS/du)^T lam_{j+1}        lam_j = (dS/dx)^T lam_{j+1}        lam_k = adj_x'

and the numbers of the physics likewise. Gates, decay and clipping apply once for all k, at the state that the
policy sees.
"""

import functools

import warp as wp

from ..system import DeviceFunctions


@functools.cache
def repeated(functions: DeviceFunctions, times: int) -> DeviceFunctions:
    """Returns the functions of a system whose step is `times` steps of this one, which has a hand-written
    adjoint.
    """
    Params, State, Control = functions.Params, functions.State, functions.Control
    step, step_vjp, own = functions.step, functions.step_vjp, functions.parameters

    @wp.func
    def repeated_step(x: State, u: Control, p: Params) -> State:
        y = x
        for _ in range(times):
            y = step(y, u, p)
        return y

    @wp.func
    def state_before(x: State, u: Control, p: Params, j: int) -> State:
        """x_j."""
        y = x
        for _ in range(j):
            y = step(y, u, p)
        return y

    @wp.func
    def repeated_step_vjp(x: State, u: Control, p: Params, adj_x_next: State):
        lam = adj_x_next
        adj_u = Control()
        for s in range(times):
            through_x, through_u = step_vjp(state_before(x, u, p, times - 1 - s), u, p, lam)
            lam = through_x
            adj_u += through_u
        return lam, adj_u

    found = functions._replace(
        step=repeated_step, step_vjp=repeated_step_vjp, block=None, memory=None, wide=None, wide_worlds=0
    )
    if own is None:
        return found
    Values, values_vjp = own.Values, own.step_vjp

    @wp.func
    def repeated_values_vjp(x: State, u: Control, p: Params, adj_x_next: State) -> Values:
        lam = adj_x_next
        adj = Values()
        for s in range(times):
            y = state_before(x, u, p, times - 1 - s)
            adj += values_vjp(y, u, p, lam)
            through_x, through_u = step_vjp(y, u, p, lam)
            lam = through_x
        return adj

    return found._replace(parameters=own._replace(step_vjp=repeated_values_vjp))

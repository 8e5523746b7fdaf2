"""The adjoint sweep over given Jacobians of a simulator: the recursion of flow.py for sizes that are known at
launch. It is compiled once and serves every simulator.

    [through_x through_u] = lam_{t+1} [dS/dx dS/du]_t
    mu_t  = through_u + dL/du_t
    lam_t = dL/dx_t + decay * [physics edge open] through_x + [network edge open] mu_t dN/dx
"""

import functools
from typing import Any

import warp as wp

from ..flow import NETWORK
from .adjoint import make_leave
from .forms import sweep_kernel


@functools.cache
def make_linear_sweep(dtype: Any) -> wp.Kernel:
    """Returns the kernel for a scalar type, launched over (nworld, fields)."""
    leave = make_leave(dtype, dtype)

    def linear_sweep(
        # In:
        # (steps, nworld, n, n + m) dS/dx and dS/du; of the m inputs the first ones can be a policy's controls
        # and the others numbers of the physics, which nothing else reaches
        jac_step: wp.array4d(dtype=dtype),
        jac_policy: wp.array4d(dtype=dtype),  # (steps, nworld, m, n) dN/dx; empty where no edge is open
        adj_states: wp.array3d(dtype=dtype),  # (steps + 1, nworld, n) dL/dx, or empty
        adj_controls: wp.array3d(dtype=dtype),  # (steps, nworld, m) dL/du, or empty
        edges: wp.array2d(dtype=wp.int32),  # (fields, horizon); a decay of 0 comes as a closed edge
        decay: dtype,
        t0: int,  # step of the rollout with which the other arrays begin
        # In, out:
        lam: wp.array3d(dtype=dtype),  # (fields, nworld, n): of the state behind the steps; of the first one
        # Out:
        mu: wp.array4d(dtype=dtype),  # (fields, steps, nworld, m)
        # Scratch:
        through: wp.array3d(dtype=dtype),  # (fields, nworld, n)
    ):
        world, field = wp.tid()
        steps = jac_step.shape[0]
        n = jac_step.shape[2]
        m = jac_step.shape[3] - n
        for s in range(steps):
            t = steps - 1 - s
            for j in range(n):
                through[field, world, j] = dtype(0.0)
            for c in range(m):
                direct = dtype(0.0)
                if adj_controls.shape[0] > 0:
                    if c < adj_controls.shape[2]:
                        direct = adj_controls[t, world, c]
                mu[field, t, world, c] = direct
            for i in range(n):
                lam_i = lam[field, world, i]
                for j in range(n):
                    through[field, world, j] = through[field, world, j] + lam_i * jac_step[t, world, i, j]
                for c in range(m):
                    mu[field, t, world, c] = mu[field, t, world, c] + lam_i * jac_step[t, world, i, n + c]
            edge = edges[field, t0 + t]
            for j in range(n):
                direct = dtype(0.0)
                if adj_states.shape[0] > 0:
                    direct = adj_states[t, world, j]
                through_network = dtype(0.0)
                if edge & wp.static(NETWORK):
                    for c in range(jac_policy.shape[2]):
                        through_network += mu[field, t, world, c] * jac_policy[t, world, c, j]
                lam[field, world, j] = leave(edge, decay, direct, through[field, world, j], through_network)

    return sweep_kernel(linear_sweep)

"""Adjoint sweep with the policy's backward pass fused in, for policies with several controls on a CPU.

The recursion of flow.py needs (dN/dx)^T mu and the hidden cotangents of mu alone. For one control they are mu
times those of a unit cotangent, which network.py takes out of the sweep, once for both gradient fields. For
m controls that would be m passes through the network; here, where mu is known, it is one a field.
"""

import functools
from typing import Any

import warp as wp

from ..flow import NETWORK, PHYSICS
from ..policy.dense import make_network_functions
from ..policy.layout import BLOCK
from ..system import DeviceFunctions
from .blocks import block_worlds
from .rollout import make_edges, sweep_kernel


@functools.cache
def make_fused_adjoint(
    functions: DeviceFunctions, dtype: Any, fields: int, composed: bool = False
) -> wp.Kernel:
    """Returns the sweep for one or two gradient fields; launch with a thread per world block."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    state_size, control_size = State._length_, Control._length_
    step_vjp = functions.step_vjp
    blocked = functions.block is not None
    step_vjp_block = functions.block.step_vjp if functions.block else None
    direct_state, direct_control, _ = make_edges(functions, dtype)
    pull = make_network_functions(dtype, composed).pull

    # a closed gate selects, it never multiplies (0 inf is NaN)
    @wp.func_native(f"""
        for (int f = 0; f < {fields}; ++f) {{
          const int open = *wp::address(edges, f, at);
          for (int r = 0; r < worlds; ++r) {{
            auto* const lam = wp::address(adj_x0, f, world0 + r)->c;
            const auto* const through_network = wp::address(pulled, f, r)->c;
            for (int i = 0; i < {state_size}; ++i) {{
              const auto physics = (open & {PHYSICS}) ? decay * lam[i] : decay * 0;
              lam[i] = (open & {NETWORK}) ? physics + through_network[i] : physics;
            }}
          }}
        }}
    """)
    def leave_block(
        adj_x0: wp.array2d(dtype=State),
        pulled: wp.array2d(dtype=State),
        edges: wp.array2d(dtype=wp.int32),
        at: int,
        decay: dtype,
        world0: int,
        worlds: int,
    ): ...

    def fused_adjoint(
        # In:
        states: wp.array2d(dtype=State),  # (steps + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (steps, nworld)
        p: Params,
        edges: wp.array2d(dtype=wp.int32),  # (fields, horizon), see rollout.py
        decay: dtype,
        steps: int,
        t0: int,  # step of the rollout with which the arrays begin
        carried: int,  # adj_x0 holds the cotangent of the last state, see rollout.py
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        adj_loss: wp.array(dtype=dtype),  # (members,), or empty
        adj_states: wp.array2d(dtype=State),  # (steps + 1, nworld), or empty
        adj_controls: wp.array2d(dtype=Control),  # (steps, nworld), or empty
        member_worlds: int,  # worlds of one policy, see blocks.py
        params: wp.array2d(dtype=dtype),  # (members, layout.packed)
        table: wp.array(dtype=wp.int32),  # the layout's, flat
        layers: int,
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),  # (blocks * hidden_steps * BLOCK, row)
        hidden_first: int,  # block with which hidden begins
        hidden_steps: int,  # steps that hidden has of a block
        first: int,  # block of the first thread
        # Out:
        mu: wp.array3d(dtype=Control),  # (fields, steps, nworld) cotangents of the controls
        flat_mu: wp.array(dtype=dtype),  # the same memory as mu
        adj_x0: wp.array2d(dtype=State),  # (fields, nworld); holds the cotangents of x_t on the way
        d: wp.array(dtype=dtype),  # per block (fields, steps, BLOCK, row_adj) hidden cotangents
        pulled: wp.array2d(dtype=State),  # (fields, BLOCK) scratch of this launch
        flat_pulled: wp.array(dtype=dtype),  # the same memory as pulled
    ):
        index = wp.tid()
        block = first + index
        nworld = states.shape[1]
        member, world0, worlds = block_worlds(block, member_worlds)
        own_params = params[member]
        gl = dtype(0.0)
        if adj_loss.shape[0] > 0:
            gl = adj_loss[member]

        if carried == 0:
            for r in range(worlds):
                lam = direct_state(states, p, gl * (w_final + w_running), adj_states, steps, world0 + r)
                for f in range(wp.static(fields)):
                    adj_x0[f, world0 + r] = lam

        for s in range(steps):
            t = steps - 1 - s
            w_state = gl * w_running
            if t0 + t == 0:
                w_state = dtype(0.0)
            if wp.static(blocked):
                step_vjp_block(states, controls, p, t, nworld, world0, worlds, adj_x0, mu)
            else:
                for r in range(worlds):
                    for f in range(wp.static(fields)):
                        through_x, through_u = step_vjp(
                            states[t, world0 + r], controls[t, world0 + r], p, adj_x0[f, world0 + r]
                        )
                        adj_x0[f, world0 + r] = through_x
                        mu[f, t, world0 + r] = through_u
            if adj_controls.shape[0] > 0 or gl * w_control != dtype(0.0):
                for r in range(worlds):
                    direct_u = direct_control(
                        controls, gl * w_control * dtype(2.0), adj_controls, t, world0 + r
                    )
                    for f in range(wp.static(fields)):
                        mu[f, t, world0 + r] = direct_u + mu[f, t, world0 + r]

            first_row = wp.int64(((block - hidden_first) * hidden_steps + t) * wp.static(BLOCK))
            for f in range(wp.static(fields)):
                at = wp.int64(((index * wp.static(fields) + f) * steps + t) * wp.static(BLOCK))
                point = wp.int64(f * mu.shape[1] + t) * wp.int64(nworld) + wp.int64(world0)
                pull(
                    own_params,
                    table,
                    layers,
                    row,
                    row_adj,
                    hidden,
                    first_row * wp.int64(row),
                    wp.static(state_size),
                    worlds,
                    edges[f, t0 + t] & wp.static(NETWORK),
                    flat_mu,
                    point * wp.int64(wp.static(control_size)),
                    d,
                    at * wp.int64(row_adj),
                    flat_pulled,
                    wp.int64(f * wp.static(BLOCK * state_size)),
                    wp.static(state_size),
                )
            leave_block(adj_x0, pulled, edges, t0 + t, decay, world0, worlds)
            if adj_states.shape[0] > 0 or w_state != dtype(0.0):
                for r in range(worlds):
                    direct_x = direct_state(states, p, w_state, adj_states, t, world0 + r)
                    for f in range(wp.static(fields)):
                        adj_x0[f, world0 + r] = direct_x + adj_x0[f, world0 + r]

    return sweep_kernel(fused_adjoint)

"""Forward sweep with the policy fused in: u_t = N(x_t), x_{t+1} = S(x_t, u_t), one launch for all steps.

N runs on blocks of worlds, see policy/functions.py. Its activations are kept for the backward pass.
"""

import functools
from typing import Any

import warp as wp

from ..policy.functions import make_load_rows, make_network_functions
from ..policy.layout import BLOCK
from ..system import DeviceFunctions
from ..systems.elements import make_elements, takes_memory
from .blocks import group_worlds
from .forms import sweep_kernel
from .rollout import make_world_loss


@functools.cache
def make_fused_rollout(functions: DeviceFunctions, dtype: Any, block: bool = False) -> wp.Kernel:
    """Returns the forward sweep with a policy fused in; launch with dim=(blocks, lanes).

    `block`: the step is the system's block form, if it has one. For CPUs only, where lanes is 1.

    On a GPU a block of worlds is a block of threads (block_dim = lanes), so a barrier is reached by every
    thread of it.
    """
    Params, State, Control = functions.Params, functions.State, functions.Control
    step = functions.step
    blocked = block and functions.block is not None
    step_block = functions.block.step if functions.block else None
    in_memory = not block and takes_memory(functions)
    step_in_memory = functions.memory.step if functions.memory else None
    control_size = Control._length_
    begin, load_rows = make_elements(State).begin, make_load_rows(State)
    forward = make_network_functions(dtype).forward
    world_loss_of = make_world_loss(functions, dtype, in_memory)

    @wp.func_native("#if defined(__CUDA_ARCH__)\n__syncthreads();\n#endif\n")
    def barrier(): ...

    def fused_rollout(
        # In:
        x0: wp.array(dtype=State),  # (nworld,)
        p: Params,
        params: wp.array2d(dtype=dtype),  # (members, layout.packed) of the policies
        table: wp.array(dtype=wp.int32),  # the layout's, flat
        operations: int,  # rows of the table
        row: int,
        section: int,  # elements of the x section of a row
        horizon: int,
        kept: int,  # steps whose activations stay in hidden: horizon, or 1 where they will be recomputed
        nworld: int,
        member_worlds: int,  # worlds of one policy, see blocks.py
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        together: int,  # neighbouring blocks that one thread takes through together: 1 or 2, on a GPU 1
        first: int,  # such group of the first thread
        lanes: int,
        # Out:
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        flat_controls: wp.array(dtype=dtype),  # the same memory as controls
        hidden: wp.array2d(dtype=dtype),  # (blocks * kept * BLOCK, row)
        world_loss: wp.array(dtype=dtype),  # (nworld,)
    ):
        group, lane = wp.tid()
        member, block, world0, worlds = group_worlds(first + group, together, member_worlds)
        skip = (kept - 1) * wp.static(BLOCK)  # rows between those of two neighbouring blocks
        own_params = params[member]
        for r in range(lane, worlds, lanes):
            begin(states, x0, world0 + r)
        # lanes without a world read a state of another lane, too
        barrier()
        for t in range(horizon):
            first_row = (block * kept + t % kept) * wp.static(BLOCK)
            load_rows(states, t, world0, worlds, lane, lanes, hidden, first_row, skip, section)
            barrier()
            u0 = (wp.int64(t) * wp.int64(nworld) + wp.int64(world0)) * wp.int64(wp.static(control_size))
            forward(
                own_params,
                table,
                operations,
                row,
                hidden,
                wp.int64(first_row) * wp.int64(row),
                wp.int64(skip) * wp.int64(row),
                flat_controls,
                u0,
                worlds,
                lane,
                lanes,
            )
            barrier()
            if wp.static(blocked):
                for r in range(0, worlds, wp.static(BLOCK)):
                    own = wp.min(wp.static(BLOCK), worlds - r)
                    step_block(states, controls, p, t, nworld, world0 + r, own)
            elif wp.static(in_memory):
                for r in range(lane, worlds, lanes):
                    step_in_memory(states, controls, p, t, world0 + r)
            else:
                for r in range(lane, worlds, lanes):
                    world = world0 + r
                    states[t + 1, world] = step(states[t, world], controls[t, world], p)
            barrier()
        for r in range(lane, worlds, lanes):
            world = world0 + r
            world_loss[world] = world_loss_of(
                states, controls, p, horizon, w_final, w_running, w_control, world
            )

    return sweep_kernel(fused_rollout)

"""Wide kernels of a fused policy: everything of its backward pass that need not run in time order.

`linearize` runs before the adjoint sweep, `weight_grad` behind it, both over the points of a group of world
blocks that stays in cache: those of all time steps, or of a segment of them. `sum_partial` adds up what the
groups have found. `activate` gives the activations of a segment again, from its states, where the forward
sweep did not keep them: the same function on the same numbers, hence the same bits. No kernel here knows a
system. They run on CPUs; on a GPU the same products go through torch (see bridge/passes/operations.py).
"""

import functools
from typing import Any, NamedTuple

import warp as wp

from ..sweeps.blocks import block_worlds
from .functions import make_network_functions
from .layout import BLOCK, Layout
from .table import Column

CHUNK_BYTES = 1 << 15
"""Size of a weight product's chunk of one section: small enough that it stays in cache for all products
of the layer.
"""
CHUNK_PRODUCTS = 64
"""Products that a tile of a wide layer adds up in one chunk at least, so that its sums, which are read and
written for each, cost little beside them.
"""


def chunk_rows(lay: Layout, itemsize: int, steps: int) -> int:
    """Rows of a chunk, a multiple of BLOCK, for blocks of so many steps: as even as can be."""
    positions = max(lay.column(i, Column.POSITIONS) for i in range(lay.operations))
    least = max(4, CHUNK_PRODUCTS // (BLOCK * positions))
    most = max(least, min(32, CHUNK_BYTES // (lay.widest * itemsize * BLOCK)))
    chunks = (steps + most - 1) // most
    return (steps + chunks - 1) // chunks * BLOCK


SUM_CHUNK = 1024
"""Elements of a gradient, as laid out for the products, that one thread of `sum_partial` adds up."""


class NetworkKernels(NamedTuple):
    """Wide kernels of a fused policy for one dtype."""

    activate: wp.Kernel
    linearize: wp.Kernel
    weight_grad: wp.Kernel
    sum_partial: wp.Kernel


@functools.cache
def make_network_kernels(dtype: Any) -> NetworkKernels:
    """Returns the wide kernels for `dtype` (wp.float32 or wp.float64)."""
    functions = make_network_functions(dtype)
    native_forward = functions.forward
    native_linearize, native_weight_grad = functions.linearize, functions.weight_grad

    @wp.kernel(module="unique", enable_backward=False)
    def network_activate(
        # In:
        params: wp.array2d(dtype=dtype),  # (members, layout.packed)
        table: wp.array(dtype=wp.int32),  # the layout's, flat
        operations: int,  # rows of the table
        row: int,
        section: int,  # elements of the x section of a row
        states: wp.array3d(dtype=dtype),  # (steps + 1, nworld, state_size)
        steps: int,
        member_worlds: int,  # worlds of one policy, see blocks.py
        first: int,  # block of the first thread
        # Out:
        controls: wp.array(dtype=dtype),  # (BLOCK * control_size,) scratch of this launch
        hidden: wp.array2d(dtype=dtype),  # per block (steps * BLOCK, row), as the forward sweep has it
    ):
        index = wp.tid()
        member, world0, worlds = block_worlds(first + index, member_worlds)
        own_params = params[member]
        state_size = states.shape[2]
        for t in range(steps):
            first_row = (index * steps + t) * wp.static(BLOCK)
            for r in range(wp.static(BLOCK)):
                world = world0 + wp.min(r, worlds - 1)
                for i in range(state_size):
                    hidden[first_row + r, i] = states[t, world, i]
                for i in range(state_size, section):
                    hidden[first_row + r, i] = dtype(0.0)
            native_forward(
                own_params,
                table,
                operations,
                row,
                hidden,
                wp.int64(first_row) * wp.int64(row),
                wp.int64(0),
                controls,
                wp.int64(0),
                worlds,
                0,
                1,
            )

    @wp.kernel(module="unique", enable_backward=False)
    def network_linearize(
        # In:
        params: wp.array2d(dtype=dtype),  # (members, layout.packed)
        table: wp.array(dtype=wp.int32),  # the layout's, flat
        operations: int,  # rows of the table
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),  # (blocks * hidden_steps * BLOCK, row)
        hidden_first: int,  # block with which hidden begins
        hidden_steps: int,  # steps that hidden has of a block
        steps: int,
        nworld: int,
        member_worlds: int,  # worlds of one policy, see blocks.py
        state_size: int,
        control_size: int,
        want_jac: int,
        first: int,  # block of the first thread
        d_first: wp.int64,  # first element of the group's hidden cotangents
        # Out:
        d: wp.array(dtype=dtype),  # per block (control_size, steps, BLOCK, row_adj), for unit cotangents
        jac: wp.array(dtype=dtype),  # (steps, nworld, control_size, state_size), or empty
    ):
        index = wp.tid()
        block = first + index
        member, world0, worlds = block_worlds(block, member_worlds)
        own_params = params[member]
        first_row = wp.int64((block - hidden_first) * hidden_steps * wp.static(BLOCK))
        for c in range(control_size):
            at = wp.int64((index * control_size + c) * steps * wp.static(BLOCK))
            native_linearize(
                own_params,
                table,
                operations,
                row,
                row_adj,
                hidden,
                first_row * wp.int64(row),
                state_size,
                c,
                worlds,
                steps,
                want_jac,
                d,
                d_first + at * wp.int64(row_adj),
                jac,
                wp.int64(world0 * control_size + c) * wp.int64(state_size),
                wp.int64(nworld) * wp.int64(control_size * state_size),
                control_size * state_size,
            )

    @wp.func_native("""
        auto* const sum = wp::address(grads, slot, 0, 0);
        for (int i = 0; i < grads.shape[1] * grads.shape[2]; ++i) sum[i] = 0;
    """)
    def clear(grads: wp.array3d(dtype=dtype), slot: int): ...

    @wp.func_native(_GATHER_MU)
    def gather_mu(
        mu: wp.array4d(dtype=dtype),
        row0: int,
        count: int,
        world0: int,
        worlds: int,
        fields: int,
        mu_rows: wp.array(dtype=dtype),
        mu_field: int,
    ): ...

    @wp.kernel(module="unique", enable_backward=False)
    def network_weight_grad(
        # In:
        table: wp.array(dtype=wp.int32),
        operations: int,  # rows of the table
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),  # (blocks * hidden_steps * BLOCK, row)
        hidden_first: int,  # block with which hidden begins
        hidden_steps: int,  # steps that hidden has of a block
        d: wp.array(dtype=dtype),  # as network_linearize leaves it
        mu: wp.array4d(dtype=dtype),  # (fields, steps, nworld, control_size)
        fields: int,
        scaled: int,  # d is per block (fields, steps, BLOCK, row_adj), as fused_adjoint leaves it
        steps: int,
        member_worlds: int,
        control_size: int,
        chunk: int,  # rows of a chunk
        first: int,  # first block of the group, which lies within a member
        blocks: int,  # blocks of the group
        d_first: wp.int64,
        slot: int,
        fresh: int,  # the slot begins with zeros
        # Out:
        mu_rows: wp.array(dtype=dtype),  # (fields * chunk * control_size,) scratch of this launch
        scratch: wp.array(dtype=dtype),  # (widest section * chunk,) scratch of this launch
        grads: wp.array3d(dtype=dtype),  # (slots, fields, layout.grads), accumulated
    ):
        if fresh != 0:
            clear(grads, slot)
        rows = steps * wp.static(BLOCK)
        mu_field = chunk * control_size
        components = control_size
        if scaled != 0:
            components = fields
        for index in range(blocks):
            block = first + index
            _, world0, worlds = block_worlds(block, member_worlds)
            for row0 in range(0, rows, chunk):
                count = wp.min(chunk, rows - row0)
                gather_mu(mu, row0, count, world0, worlds, fields, mu_rows, mu_field)
                at = wp.int64(index * components * rows + row0)
                native_weight_grad(
                    table,
                    operations,
                    row,
                    row_adj,
                    hidden,
                    wp.int64((block - hidden_first) * hidden_steps * wp.static(BLOCK) + row0) * wp.int64(row),
                    count,
                    d,
                    d_first + at * wp.int64(row_adj),
                    rows * row_adj,
                    mu_rows,
                    mu_field,
                    fields,
                    scaled,
                    scratch,
                    grads,
                    wp.int64(slot * grads.shape[1]) * wp.int64(grads.shape[2]),
                    grads.shape[2],
                )

    @wp.func_native(_SUM_PARTIAL.replace("REAL", "float" if dtype == wp.float32 else "double"))
    def native_sum(
        partial: wp.array4d(dtype=dtype),
        member: int,
        field: int,
        begin: int,
        count: int,
        parameter: wp.array(dtype=wp.int32),
        grads: wp.array3d(dtype=dtype),
        grads_member: int,
    ): ...

    @wp.kernel(module="unique", enable_backward=False)
    def network_sum_partial(
        # In:
        partial: wp.array4d(dtype=dtype),  # (members of a wave, slots, fields, layout.grads)
        parameter: wp.array(dtype=wp.int32),  # (layout.grads,) which one an element belongs to, -1 for none
        first_member: int,  # of the wave
        first: int,  # chunk of the first thread
        # Out:
        grads: wp.array3d(dtype=dtype),  # (fields, members, parameters)
    ):
        size = partial.shape[3]
        chunks = (size + wp.static(SUM_CHUNK - 1)) / wp.static(SUM_CHUNK)
        item = (first + wp.tid()) / chunks
        begin = (first + wp.tid() - item * chunks) * wp.static(SUM_CHUNK)
        count = wp.min(wp.static(SUM_CHUNK), size - begin)
        member = item / partial.shape[2]
        field = item - member * partial.shape[2]
        native_sum(partial, member, field, begin, count, parameter, grads, first_member + member)

    return NetworkKernels(network_activate, network_linearize, network_weight_grad, network_sum_partial)


# zero where no world is
_GATHER_MU = f"""
  const int controls = mu.shape[3], present = worlds * controls;
  for (int f = 0; f < fields; ++f)
    for (int r = 0; r < count; r += {BLOCK}) {{
      const auto* const from = wp::address(mu, f, (row0 + r) / {BLOCK}, world0, 0);
      auto* const to = mu_rows.data + f * mu_field + r * controls;
      for (int i = 0; i < {BLOCK} * controls; ++i) to[i] = i < present ? from[i] : 0;
    }}
"""

# slot after slot: the order of a sum depends on no shape and no number of threads
_SUM_PARTIAL = f"""
  REAL sum[{SUM_CHUNK}];
  for (int slot = 0; slot < partial.shape[1]; ++slot) {{
    const REAL* const part = wp::address(partial, member, slot, field, begin);
    if (slot == 0) for (int i = 0; i < count; ++i) sum[i] = part[i];
    else for (int i = 0; i < count; ++i) sum[i] += part[i];
  }}
  REAL* const out = wp::address(grads, field, grads_member, 0);
  for (int i = 0; i < count; ++i) {{
    const int k = parameter.data[begin + i];
    if (k >= 0) out[k] = sum[i];
  }}
"""

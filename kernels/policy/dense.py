"""Policies as stacks of dense layers, on blocks of worlds, in native snippets: forward, input Jacobian,
weight products.

One block is BLOCK worlds at one time step. Three device functions, generic in the layers (read at run time
from the layout's table), one source for float32 and float64:

    forward      a_0 = x;  a_l = tanh(W_l a_{l-1} + b_l);  u = W_o a_L + b_o
    linearize    d_L = W_o[c] * (1 - a_L^2);  d_{l-1} = (W_l^T d_l) * (1 - a_{l-1}^2);  J[c] = W_1^T d_1
    pull         the same for d_L = sum_c mu_c W_o[c] (1 - a_L^2): once, however many controls there are
    weight_grad  adj_W_l += sum_rows (sum_c mu_c d_l^c) a_{l-1}^T  and likewise for b_l, W_o, b_o

`linearize` is the backward pass of the policy for a unit cotangent of control c. It does not depend on the
cotangents of the rollout, so it is taken out of the adjoint sweep; `weight_grad` scales its rows by them.

What they do, and how, is in dense.h. Layers may be convolutions, see layout.py, which also says where
everything lies. The functions of composed policies, whose table is that of composed_layout.py, have the same
arguments and the text of composed.py.
"""

import functools
from typing import Any, NamedTuple

import warp as wp

from ..native_text import sections
from ..systems.elements import is_large
from .composed import Texts, composed_texts
from .layout import BLOCK
from .native_tiles import PRELUDE, TANH, fill

_TEXT = sections(__file__)


@functools.cache
def make_load_rows(State: Any) -> Any:
    """Returns the device function that writes the x sections of one or two blocks' rows from a trajectory."""
    dtype, large = State._wp_scalar_type_, is_large(State)
    unroll = '_Pragma("unroll 4")' if large else ""

    # rows without a world repeat the last one: finite, and ignored by everything that reads them
    @wp.func_native(f"""
        for (int r = lane; r < (worlds > {BLOCK} ? {2 * BLOCK} : {BLOCK}); r += lanes) {{
          const auto* from = wp::address(states, t, world0 + (r < worlds ? r : worlds - 1))->c;
          auto* to = wp::address(hidden, first_row + r + (r < {BLOCK} ? 0 : skip), 0);
          {unroll} for (int i = 0; i < {State._length_}; ++i) to[i] = from[i];
          for (int i = {State._length_}; i < section; ++i) to[i] = 0;
        }}
    """)
    def load_rows(
        states: wp.array2d(dtype=State),
        t: int,
        world0: int,
        worlds: int,
        lane: int,
        lanes: int,
        hidden: wp.array2d(dtype=dtype),
        first_row: int,
        skip: int,  # rows between those of a block and of a second one, if worlds are more than its own
        section: int,
    ): ...

    return load_rows


class NetworkFunctions(NamedTuple):
    """Device functions of a policy for one dtype."""

    forward: Any
    linearize: Any
    pull: Any
    weight_grad: Any


def _texts(dtype: Any) -> Texts:
    """The texts of the device functions of dense layers."""
    layer, linearize = PRELUDE + _TEXT["layer"], _TEXT["linearize"]
    before = PRELUDE + "#if !defined(__CUDA_ARCH__)\n" + TANH + "#endif\n" + _TEXT["layer"]
    return Texts(
        fill(before + _TEXT["forward"], dtype),
        fill(layer + _TEXT["unit_seed"] + linearize, dtype),
        fill(layer + _TEXT["pull_seed"] + linearize, dtype),
        fill(layer + _TEXT["weight_grad"], dtype),
    )


@functools.cache
def make_network_functions(dtype: Any, composed: bool = False) -> NetworkFunctions:
    """Returns the device functions for `dtype` (wp.float32 or wp.float64), of dense layers or of a composed
    policy.
    """
    texts = composed_texts(dtype) if composed else _texts(dtype)

    @wp.func_native(texts.forward)
    def network_forward(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        layers: int,
        row: int,
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,  # first element of the block's rows; their x sections are filled
        gap: wp.int64,  # elements between its rows and those of a second block, see load_rows
        controls: wp.array(dtype=dtype),
        u0: wp.int64,  # first element of the block's controls
        worlds: int,  # worlds of the blocks that exist
        lane: int,
        lanes: int,
    ): ...

    @wp.func_native(texts.linearize)
    def network_linearize(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        layers: int,
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,
        state_size: int,
        component: int,  # the control whose cotangent is 1
        worlds: int,
        points: int,  # steps, whose rows lie behind one another
        want_jac: int,
        d: wp.array(dtype=dtype),
        d0: wp.int64,
        jac: wp.array(dtype=dtype),
        j0: wp.int64,
        jt: wp.int64,  # elements between the Jacobians of two steps
        jr: int,  # the same for two worlds
    ): ...

    @wp.func_native(texts.pull)
    def network_pull(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        layers: int,
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,
        state_size: int,
        worlds: int,
        want_jac: int,
        mu: wp.array(dtype=dtype),
        mu0: wp.int64,  # first element of the block's control cotangents
        d: wp.array(dtype=dtype),
        d0: wp.int64,
        jac: wp.array(dtype=dtype),  # (dN/dx)^T mu of the block's worlds
        j0: wp.int64,
        jr: int,
    ): ...

    @wp.func_native(texts.weight_grad)
    def network_weight_grad(
        table: wp.array(dtype=wp.int32),
        layers: int,
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,
        nrows: int,
        d: wp.array(dtype=dtype),
        d0: wp.int64,
        d_component: int,  # elements between the rows of two control components, or of two fields
        mu: wp.array(
            dtype=dtype
        ),  # control cotangents of the chunk's rows, (fields, rows, m), zero where no world is
        mu_field: int,
        fields: int,
        scaled: int,  # d holds the hidden cotangents of each field, not those of unit cotangents
        scratch: wp.array(dtype=dtype),  # (widest section * rows of a chunk,)
        grads: wp.array3d(dtype=dtype),
        g0: wp.int64,
        g_field: int,
    ): ...

    return NetworkFunctions(network_forward, network_linearize, network_pull, network_weight_grad)

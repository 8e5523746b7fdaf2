"""Device functions of a fused policy on blocks of worlds, in native snippets: forward pass, input Jacobian,
weight products.

One block is BLOCK worlds at one time step. A policy is a table of operations f_1 ... f_n (table.py), with
values a_i, and d_i the cotangent of a_i:

    forward      a_0 = x;  a_i = f_i(a_j, ...);  u = a_n
    linearize    d_n = e_c;  d_j += (df_i / da_j)^T d_i, from the last operation to the first;  J[c] = d_0
    pull         the same for d_n = mu: once, however many controls there are
    weight_grad  adj_p += sum_rows (df_i / dp)^T (sum_c mu_c d_i^c) for weights, biases, scales and shifts p

`linearize` is the backward pass of the policy for a unit cotangent of control c. It does not depend on the
cotangents of the rollout, so it is taken out of the adjoint sweep; `weight_grad` scales its rows by them.

The functions read the operations at run time: one kernel serves all policies, one source float32 and float64.
What they do, and how, is in forward.h and backward.h.
"""

import functools
import math
from typing import Any, NamedTuple

import warp as wp

from ..native_text import fill, sections
from ..systems.elements import is_large
from ..systems.lanes import sincos
from .layout import BLOCK

_TEXT = sections(__file__, "tiles", "activations", "forward", "backward")


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


def _constants(single: bool) -> dict[str, str]:
    """Words of the native texts and their values."""
    # sum_{k >= 2} r^(k-2) / k!, highest power first, cut where the remainder is below half a unit in the last
    # place
    last = 7 if single else 14
    terms = [f"q = WS_FMA(q, r, (vec)(real({1.0 / math.factorial(k)!r})));" for k in range(last - 1, 1, -1)]
    return {
        "SERIES_LAST": repr(1.0 / math.factorial(last)),
        "SERIES": "\n    ".join(terms),
        "LIMIT": "9.1" if single else "20.0",
        "LN2_HI": "0.693359375" if single else "0.693147180369123816490",
        "LN2_LO": "-2.12194440054690581e-4" if single else "1.90821492927058770002e-10",
        "INT": "int" if single else "long long",
        "EXPONENT_BIAS": "127" if single else "1023",
        "MANTISSA": "23" if single else "52",
        "HIGHEST": "88.0" if single else "709.0",  # 2^n is a number
        "LOWEST": "-87.3" if single else "-708.0",
        "LOG_TERMS": "8" if single else "17",
        "BLOCK": str(BLOCK),
    }


def _text(dtype: Any, *names: str) -> str:
    """Native text for `dtype`, of these sections."""
    cpu = "#if !defined(__CUDA_ARCH__)\n  enum { L = VL };\n" + sincos(dtype) + "#endif\n"
    before = _TEXT["prelude"] + _TEXT["table"]
    if names != ("weight_grad",):
        before += cpu + _TEXT["vectors"]
    text = before + "".join(_TEXT[name] for name in names)
    text = text.replace("WS_VALUES", _TEXT["values"]).replace("WS_SLOPES", _TEXT["slopes"])
    return fill(text, _constants(dtype == wp.float32), dtype)


@functools.cache
def make_network_functions(dtype: Any) -> NetworkFunctions:
    """Returns the device functions for `dtype` (wp.float32 or wp.float64)."""

    @wp.func_native(_text(dtype, "forward"))
    def network_forward(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        operations: int,
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

    @wp.func_native(_text(dtype, "unit_seed", "linearize"))
    def network_linearize(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        operations: int,
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

    @wp.func_native(_text(dtype, "pull_seed", "linearize"))
    def network_pull(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        operations: int,
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

    @wp.func_native(_text(dtype, "weight_grad"))
    def network_weight_grad(
        table: wp.array(dtype=wp.int32),
        operations: int,
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

"""The particle in a box on a CPU: a block of worlds in vector lanes, for `DeviceFunctions.block` of
quantum.py, which has the equations of the step.

Divided by i b with b = h / (2 dx^2), the rows of M = 1 + i A read

    -z_{j-1} + (2 + r_j) z_j - z_{j+1} = -i kappa rhs_j        r_j = c x_j dx^2 - i kappa,  kappa = 1 / b

and the pivots of the elimination 1 + e_j, with w_j = 1 / (1 + e_j) and v_j = w_j y_j:

    e_j = r_j + e_{j-1} w_{j-1}      y_j = -i kappa rhs_j + v_{j-1}      z_j = v_j + w_j z_{j+1}

from e_0 w_0 = 1 and v_0 = 0 at the wall. Nothing is subtracted that nearly cancels, as it is in the diagonal
1 + i A_jj with A_jj much above 1 (float32: 128 steps are six times as accurate). The elimination runs from
both walls at once and meets in the middle, rows a and b:

    z_a = ((1 + e_b) y_a + y_b) / (e_a + e_b + e_a e_b)        and likewise z_b

A vector holds one grid point of every world of the block, from both ends: one chain of half the length serves
2 BLOCK eliminations. Backwards, both gradient fields share the pivots, and psi + psi' is the sum of two
stored states:

    y = M^-1 conj(g)      adj_psi = 2 conj(y) - g      adj_c = (h / 2) sum_j x_j Im(y_j (psi_j + psi'_j))
"""

import functools
from typing import Any

from ..native_text import sections
from ..system import BlockFunctions
from .native_block import native_block

_TEXT = sections(__file__)


@functools.cache
def make_block_functions(points: int, dtype: Any, Params: Any, State: Any, Control: Any) -> BlockFunctions:
    """Returns the block form of the step and its adjoint for `points` grid points and `dtype`."""
    words = {"POINTS": points}
    return native_block(
        _TEXT["prelude"] + _TEXT["step"],
        _TEXT["prelude"] + _TEXT["step_vjp"],
        words,
        dtype,
        Params,
        State,
        Control,
    )

"""Guidance by repulsion on a CPU: the worlds of a block in vector lanes, for `DeviceFunctions.block` of
guidance.py, which has the equations.

A pair is visited once and pushes both its agents. Backwards a pair force F = s g(d) r has, with n = |r|,

    adj_r = s g(d) adj_F + s (g'(d) / n) (r . adj_F) r

The two factors depend on the state alone: both gradient fields share them, and they share one division.
"""

import functools
from typing import Any

from ..native_text import sections
from ..system import BlockFunctions
from .native_block import native_block

_TEXT = sections(__file__)


@functools.cache
def make_block_functions(
    drivers: int, evaders: int, dtype: Any, Params: Any, State: Any, Control: Any
) -> BlockFunctions:
    """Returns the block form of the step and its adjoint for these numbers of agents and `dtype`."""
    words = {"DRIVERS": drivers, "EVADERS": evaders}
    return native_block(
        _TEXT["prelude"] + _TEXT["step"],
        _TEXT["prelude"] + _TEXT["step_vjp"],
        words,
        dtype,
        Params,
        State,
        Control,
    )

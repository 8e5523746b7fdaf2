"""The cart-pole on a CPU: poles and worlds of a block in vector lanes, for `DeviceFunctions.block` of
cartpole.py, which has the equations.

A vector holds four poles of every world of the block; lane 4 w + i holds pole i of world w. Sine and cosine
are computed for all of them at once. In the backward pass both gradient fields share everything that depends
on the state.
"""

import functools
from typing import Any

from ..native_text import sections
from ..system import BlockFunctions
from .lanes import sincos
from .native_block import native_block

_TEXT = sections(__file__)


@functools.cache
def make_block_functions(poles: int, dtype: Any, Params: Any, State: Any, Control: Any) -> BlockFunctions:
    """Returns the block form of the step and its adjoint for `poles` poles and `dtype`."""
    words = {"SINCOS": sincos(dtype), "POLES": poles}
    return native_block(
        _TEXT["prelude"] + _TEXT["step"],
        _TEXT["prelude"] + _TEXT["step_vjp"],
        words,
        dtype,
        Params,
        State,
        Control,
    )

"""Makes block forms (`system.BlockFunctions`) from native texts, for all systems."""

from collections.abc import Mapping
from typing import Any

import warp as wp

from ..native_text import fill
from ..policy.layout import BLOCK
from ..system import BlockFunctions


def native_block(
    step: str, step_vjp: str, words: Mapping[str, Any], dtype: Any, Params: Any, State: Any, Control: Any
) -> BlockFunctions:
    """Returns the block form whose bodies are these texts, for CPUs.

    Both texts are filled (see `fill`), with BLOCK for the worlds of a block. Cache the result, because
    kernels are compiled for each object.
    """
    words = {**words, "BLOCK": BLOCK}

    @wp.func_native(fill(step, words, dtype))
    def step_block(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
    ): ...

    @wp.func_native(fill(step_vjp, words, dtype))
    def step_vjp_block(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
        adj: wp.array2d(dtype=State),  # (fields, nworld)
        adj_u: wp.array3d(dtype=Control),  # (fields, horizon, nworld)
    ): ...

    return BlockFunctions(step_block, step_vjp_block)

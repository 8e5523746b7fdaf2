"""Block forms of a step (`system.BlockFunctions`) from native texts: what those of all systems share."""

from collections.abc import Mapping
from typing import Any

import warp as wp

from .layout import BLOCK
from .system import BlockFunctions


def native_block(
    step: str, step_vjp: str, words: Mapping[str, Any], dtype: Any, Params: Any, State: Any, Control: Any
) -> BlockFunctions:
    """Returns the block form whose bodies are these texts, for CPUs.

    In both texts REAL is replaced by the scalar type, BLOCK by the worlds of a block, and every key of
    `words` by its value. Cache what is made: kernels are compiled per object.
    """

    def fill(text: str) -> str:
        real = "float" if dtype == wp.float32 else "double"
        for word, value in {**words, "REAL": real, "BLOCK": BLOCK}.items():
            text = text.replace(word, str(value))
        return text

    @wp.func_native(fill(step))
    def step_block(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
    ): ...

    @wp.func_native(fill(step_vjp))
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

"""Compares what a backward pass recomputes with what the forward pass stored."""

import torch
from torch import Tensor

from ..runtime.arrays import capturing


def furthest(again: Tensor, stored: Tensor, tolerance: float) -> tuple[int, int, int] | None:
    """Step, world and component where recomputed numbers (steps, nworld, size) differ most from the stored
    ones; None if rounding explains all differences, or if a graph is captured and no value can be read.

    Args:
        tolerance: Largest difference that rounding may cause, relative to 1 plus the largest stored number.
    """
    if capturing(stored.device) or torch.equal(again, stored):
        return None
    finite = stored[torch.isfinite(stored)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if torch.allclose(again, stored, rtol=0.0, atol=tolerance * (1.0 + largest), equal_nan=True):
        return None
    off = (again - stored).abs()
    # inf - inf is NaN, and no difference
    off = torch.where((again == stored) | (again.isnan() & stored.isnan()), 0.0, off)
    off = torch.where(off.isnan(), torch.inf, off)
    t, world, i = (int(k) for k in torch.unravel_index(off.argmax(), off.shape))
    return t, world, i

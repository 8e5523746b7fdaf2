"""Compares numbers, and names the output and the input where they differ."""

from typing import NamedTuple

import torch
from torch import Tensor

from .differences import Derivative
from .report import Comparison, Disagreement

__all__ = ["Tolerance", "compare", "exactly", "names", "settled"]


class Tolerance(NamedTuple):
    """What a difference is allowed to be."""

    relative: float
    """Times the largest expected value of this output and input over all points, ..."""
    floor: float
    """... plus this times the largest value of the output or of the input: what rounding leaves of a sum of
    terms as large as that.
    """


def names(letter: str, count: int) -> list[str]:
    """x[0], x[1], ..."""
    return [f"{letter}[{i}]" for i in range(count)]


def compare(
    what: str,
    dtype: str,
    against: str,
    found: Tensor,
    expected: Tensor,
    outputs: list[str],
    inputs: list[str],
    tolerance: Tolerance,
    *,
    share: Tensor | None = None,
    usable: Tensor | None = None,
) -> Comparison:
    """Compares numbers (points, outputs, inputs). A number that is not finite disagrees with a finite one.

    Args:
        share: (outputs, inputs) that is subtracted before sizes are taken, such as the identity of a small
            step.
        usable: Which numbers to compare; others are left out, and counted.
    """
    relative, floor = tolerance
    size, large = _sizes(expected, share, usable)
    unit = size + (floor / relative) * large
    unit = torch.where(unit > 0.0, unit, torch.finfo(torch.float64).tiny)
    off = (found - expected).abs() / unit
    off = torch.where(torch.isfinite(found), off, torch.inf)
    kept = torch.isfinite(expected) if usable is None else usable & torch.isfinite(expected)
    off = torch.where(kept, off, 0.0)
    worst, where = off.max(0)
    disagreements = []
    for o, i in (worst > relative).nonzero().tolist():
        at = int(where[o, i])
        disagreements.append(
            Disagreement(
                outputs[o], inputs[i], float(found[at, o, i]), float(expected[at, o, i]), float(worst[o, i])
            )
        )
    unchecked = [f"{outputs[o]} by {inputs[i]}" for o, i in (~kept.any(0)).nonzero().tolist()]
    return Comparison(
        what,
        dtype,
        against,
        int(kept.sum()),
        int((~kept).sum()),
        float(worst.max()) if worst.numel() else 0.0,
        relative,
        tuple(disagreements),
        tuple(unchecked),
    )


def _sizes(expected: Tensor, share: Tensor | None, usable: Tensor | None) -> tuple[Tensor, Tensor]:
    good = torch.isfinite(expected) if usable is None else usable & torch.isfinite(expected)
    values = torch.where(good, expected, 0.0)
    whole = values.abs().amax(0)
    large = torch.maximum(whole.amax(0, keepdim=True), whole.amax(1, keepdim=True)).expand_as(whole)
    size = whole if share is None else torch.where(good, values - share, 0.0).abs().amax(0)
    return size, large


def settled(found: Derivative, share: Tensor | None, tolerance: Tolerance) -> Tensor:
    """Which finite differences can be compared with this tolerance: their error is below half of what is
    allowed, and one-sided ones agree as closely.
    """
    size, large = _sizes(found.value, share, torch.isfinite(found.error))
    allowed = tolerance.relative * size + tolerance.floor * large
    return (found.error <= 0.5 * allowed) & (found.jump <= allowed)


def exactly(what: str, dtype: str, against: str, failed: list[str], compared: int) -> Comparison:
    """A comparison that either holds or does not; `failed` says for what it does not."""
    return Comparison(
        what,
        dtype,
        against,
        compared,
        0,
        0.0,
        0.0,
        tuple(Disagreement(name, "", None, None, None) for name in failed),
    )

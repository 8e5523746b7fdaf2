"""Derivatives by finite differences, at several step lengths, with an estimate of their error.

Central differences at step lengths h, h/2, h/4, ... have errors in even powers of h, which Neville's scheme
removes one after the other:

    D(h) = (f(x + h e) - f(x - h e)) / (2 h)        T_k0 = D(h / 2^k)
    T_km = T_k,m-1 + (T_k,m-1 - T_k-1,m-1) / (4^m - 1)

The error of T_km is estimated by its distance from both neighbours it was made of, and that with the smallest
estimate is taken: long steps cost accuracy where f bends, short ones where it rounds. Source: Ridders,
Advances in Engineering Software 4 (1982) 75.

Where f has a kink, one-sided derivatives differ. Their difference at step length h is

    G(h) = (f(x + h e) - 2 f(x) + f(x - h e)) / h

with an error in odd powers of h, which are removed likewise. What is left tends to 0 where f is smooth.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Derivative", "differentiate"]

LEVELS = 10
LONGEST = 2.0**-4
"""Longest step length, in units of each input's scale; the shortest is 2^-13."""
_NUMBERS = 1 << 23
"""Outputs that are computed at once, at most, where one input has fewer."""
_ODD = 4
"""Powers h, h^3, ... that are removed from a difference of one-sided derivatives."""
_ROUNDING = 16 * torch.finfo(torch.float64).eps


class Derivative(NamedTuple):
    """All derivatives at some points, (points, outputs, inputs) each."""

    value: Tensor
    error: Tensor
    """Estimate of the error of `value`; infinite where f is not finite."""
    jump: Tensor
    """By how much the one-sided derivatives differ."""


def differentiate(f: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor) -> Derivative:
    """Differentiates f at every row of x by every input.

    Args:
        f: Maps (n, inputs) to (n, outputs), row by row, in float64.
        x: Points (points, inputs).
        scale: (inputs,) over which lengths f changes, roughly.
    """
    outputs = f(x[:1]).shape[1]
    together = max(1, _NUMBERS // (2 * LEVELS * max(outputs, x.shape[1])))
    found = []
    for point in x:
        parts = [_at_point(f, point, scale, some) for some in torch.arange(x.shape[1]).split(together)]
        found.append([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])
    return Derivative(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _at_point(f: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor, some: Tensor) -> Derivative:
    """By the inputs `some`, (outputs, some)."""
    lengths = scale[some] * LONGEST * 0.5 ** torch.arange(LEVELS, dtype=torch.float64)[:, None]
    moves = x.new_zeros(LEVELS, some.shape[0], x.shape[0])
    moves[:, torch.arange(some.shape[0]), some] = lengths
    points = torch.cat([x[None], (x + moves).flatten(0, 1), (x - moves).flatten(0, 1)])
    # what was really taken after rounding
    width = ((x + moves) - (x - moves)).sum(2)[..., None]
    values = f(points)
    here = values[0]
    above, below = values[1:].unflatten(0, (2, LEVELS, some.shape[0]))
    rounding = _ROUNDING * torch.maximum(above.abs(), below.abs()) / width

    table = (above - below) / width  # (levels, some, outputs)
    best, error = table[0], torch.full_like(table[0], torch.inf)
    for m in range(1, LEVELS):
        finer = table[1:] + (table[1:] - table[:-1]) / (4.0**m - 1.0)
        distance = torch.maximum((finer - table[1:]).abs(), (finer - table[:-1]).abs()) + rounding[m:]
        for candidate, estimate in zip(finer, distance, strict=True):
            better = estimate < error
            best, error = torch.where(better, candidate, best), torch.where(better, estimate, error)
        table = finer

    bend = (above - 2.0 * here + below) / (0.5 * width)
    jump = torch.full_like(best, torch.inf)
    for m in range(1, _ODD + 1):
        power = 2.0 ** (2 * m - 1)
        bend = (power * bend[1:] - bend[:-1]) / (power - 1.0)
        left = (bend.abs() - 4.0 * rounding[m:]).clamp_min(0.0)
        jump = torch.minimum(jump, torch.where(left.isnan(), torch.inf, left).amin(0))
    finite = torch.isfinite(best) & torch.isfinite(error)
    return Derivative(
        torch.where(finite, best, 0.0).T,
        torch.where(finite, error, torch.inf).T,
        torch.where(finite, jump, torch.inf).T,
    )

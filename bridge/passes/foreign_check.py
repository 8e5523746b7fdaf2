"""Checks a foreign simulator once for each dtype and kind of device, at its first use.

A simulator that detaches or overwrites something silently gives a wrong gradient. So its pullback is compared
with central differences at the first states it is given, as float64 copies if it takes them. Near a kink the
right length of the difference varies, so several lengths are tried and the best counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .simulator import Simulator, name_of, stepped

ROWS = 4
"""Number of states at which gradients are checked if rows do not mix. If they may, the first world is
checked, by its own inputs and by those of the second.
"""


class Tolerance(NamedTuple):
    """What a derivative may be off by, relative to itself and to the largest of its output."""

    own: float
    row: float
    lengths: tuple[float, ...]
    """Of the differences, relative to the input but at least absolute."""
    rounding: float
    """Units in the last place of what the differences are taken of."""


class Source(NamedTuple):
    """The words that an error uses for a wrong derivative."""

    head: str
    """Whose it is, and what it is of."""
    by: str
    """What computed it."""
    remedy: str
    output: str = ""
    """What is differentiated, where it is not a component of the next state."""
    inputs: tuple[str, ...] = ()
    """Names of further inputs, after states and controls."""


TOLERANCES = {
    torch.float64: Tolerance(1e-5, 1e-6, (1e-4, 1e-5, 1e-6, 1e-7), 16.0),
    # a difference of float32 is no better than some 1e-3: eps / length against length squared
    torch.float32: Tolerance(5e-3, 2e-3, (3e-2, 1e-2, 3e-3, 1e-3), 8.0),
}


def verify(simulator: Simulator, x: Tensor, u: Tensor) -> None:
    """Raises TypeError or ValueError unless step and gradients of a simulator are right.

    Args:
        x, u: First states (nworld, state_size) and controls (nworld, control_size) it is to be used on.
    """
    key = (x.dtype, x.device.type, u.shape[1])  # with and without numbers of the physics
    if key in simulator.verified or not x.shape[0]:
        return
    with torch.inference_mode(False), torch.no_grad():
        x, u = x.clone(), u.clone()
        _check_repeats(simulator, x, u)
        simulator.first_use(x, u)
        if simulator.rowwise:
            x, u = x[:ROWS], u[:ROWS]
            _check_rows(simulator, x, u)
        if simulator.checks_gradient:
            _check_gradient(simulator, *_in_double(simulator, x, u))
        if simulator.has_loss:
            _check_cost(simulator, x)
    simulator.verified.add(key)


def _in_double(simulator: Simulator, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64 if the simulator takes it."""
    if x.dtype == torch.float64:
        return x, u
    try:
        stepped(simulator, x.double(), u.double())
    except Exception:  # a step may raise anything for numbers that it is not made for
        return x, u
    return x.double(), u.double()


def _check_repeats(simulator: Simulator, x: Tensor, u: Tensor) -> None:
    once, again = stepped(simulator, x, u).clone(), stepped(simulator, x, u)
    if not torch.allclose(once, again, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"{name_of(simulator)}: step gave other next states for the same states and controls (by "
            f"{float((once - again).abs().max()):.3g}), expected the same: no random numbers, no state of "
            "its own; what a step remembers belongs into the state, noise into the controls"
        )


def _check_rows(simulator: Simulator, x: Tensor, u: Tensor) -> None:
    alone = stepped(simulator, x, u).clone()
    others = 1.1 * x.flip(0) + 0.05, 1.1 * u.flip(0) + 0.05
    mixed = stepped(simulator, torch.cat((x, others[0])), torch.cat((u, others[1])))[: x.shape[0]]
    if not torch.allclose(alone, mixed, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"{name_of(simulator)}: a row's next state changed with the other rows of the batch (by "
            f"{float((alone - mixed).abs().max()):.3g}), expected rows that do not mix; if worlds are to act "
            "on each other, say rowwise=False"
        )


def _check_cost(simulator: Simulator, x: Tensor) -> None:
    value = simulator.cost(x)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name_of(simulator)}: loss returned {type(value).__name__}, expected a tensor (nworld,)"
        )
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"{name_of(simulator)}: loss returned shape {tuple(value.shape)} for states of shape "
            f"{tuple(x.shape)}, expected {tuple(x.shape[:1])}: the cost of every state, which the engine "
            "averages"
        )
    if value.dtype != x.dtype:
        raise TypeError(f"{name_of(simulator)}: loss returned {value.dtype}, expected {x.dtype}")
    if x.shape[0] > 1 and not torch.allclose(simulator.cost(x[:1]), value[:1], rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{name_of(simulator)}: a row's cost changed with the other rows, expected the cost of every "
            "state by itself"
        )
    if simulator.checks_gradient:
        gradient, tolerance = simulator.cost_gradient(x).unsqueeze(1), TOLERANCES[x.dtype]
        found = differences(lambda q: simulator.cost(q).unsqueeze(1), x, tolerance)
        source = _source(simulator, "loss")._replace(output="the cost")
        compare(source, gradient, found, tolerance, x.shape[1])


def _check_gradient(simulator: Simulator, x: Tensor, u: Tensor) -> None:
    """Compares [dS/dx dS/du] with differences: of each row where rows do not mix, else of the first world by
    the inputs of the first and of the second.
    """
    tolerance, n = TOLERANCES[x.dtype], x.shape[1]
    given = u.shape[1] > simulator.control_size
    source = _source(simulator, "step", simulator.parameter_names if given else ())
    if simulator.rowwise:
        _, both = simulator.jacobians(x, u)
        found = differences(lambda q: stepped(simulator, q[:, :n], q[:, n:]), torch.cat((x, u), 1), tolerance)
        compare(source, both, found, tolerance, n)
        return
    for world in range(min(2, x.shape[0])):
        _, pull = simulator.linearize(x, u)
        rows = []
        for i in range(n):
            unit = torch.zeros_like(x)
            unit[0, i] = 1.0
            adj_x, adj_u = pull(unit)
            rows.append(torch.cat((adj_x[world], adj_u[world])))

        def first(q: Tensor, world: int = world) -> Tensor:
            given_x, given_u = x.clone(), u.clone()
            given_x[world], given_u[world] = q[0, :n], q[0, n:]
            return stepped(simulator, given_x, given_u)[:1].clone()

        found = differences(first, torch.cat((x[world], u[world])).unsqueeze(0), tolerance)
        compare(source, torch.stack(rows).unsqueeze(0), found, tolerance, n)


def _source(simulator: Simulator, role: str, inputs: tuple[str, ...] = ()) -> Source:
    return Source(
        f"{name_of(simulator)}: the gradient of {role} is wrong",
        "the simulator",
        "look for detach(), stop_gradient, numpy, values written over or arrays without gradients on the "
        "way, or say check=False if the gradient is meant to differ",
        inputs=inputs,
    )


def differences(
    function: Callable[[Tensor], Tensor], q: Tensor, tolerance: Tolerance
) -> Iterator[tuple[Tensor, Tensor]]:
    """Jacobians (rows, outputs, inputs) by central differences of several lengths, and their rounding."""
    eps = torch.finfo(q.dtype).eps
    for length in tolerance.lengths:
        columns, rounding = [], []
        for j in range(q.shape[1]):
            h = length * (1.0 + q[:, j].abs())
            up, down = q.clone(), q.clone()
            up[:, j] += h
            down[:, j] -= h
            # what the inputs really differ by
            width = (up[:, j] - down[:, j]).unsqueeze(1)
            above, below = function(up).clone(), function(down)
            columns.append((above - below) / width)
            rounding.append(tolerance.rounding * eps * torch.maximum(above.abs(), below.abs()) / width)
        yield torch.stack(columns, dim=2), torch.stack(rounding, dim=2)


def compare(
    source: Source,
    given: Tensor,
    differences: Iterator[tuple[Tensor, Tensor]],
    tolerance: Tolerance,
    state_size: int,
) -> None:
    """Raises ValueError if a derivative (rows, outputs, inputs) agrees with the differences of none of the
    lengths.
    """
    wrong, best = torch.ones_like(given, dtype=torch.bool), torch.full_like(given, torch.nan)
    excess = torch.full_like(given, torch.inf)
    for found, rounding in differences:
        finite = torch.isfinite(found)
        largest = torch.where(finite, found.abs(), 0.0).amax(dim=2, keepdim=True)
        allowed = tolerance.own * found.abs() + tolerance.row * largest + rounding
        error = torch.where(given.isnan(), torch.inf, (found - given).abs())
        # a difference that leaves the domain of the step says nothing
        wrong &= finite & (error > allowed)
        closer = finite & ((error - allowed < excess) | best.isnan())
        excess, best = torch.where(closer, error - allowed, excess), torch.where(closer, found, best)
        if not bool(wrong.any()):
            return
    worst = torch.where(wrong, (best - given).abs() / (1e-300 + best.abs()), -1.0)
    worst = torch.where(worst.isnan(), torch.inf, worst)
    row, i, j = (int(k) for k in torch.unravel_index(worst.argmax(), worst.shape))
    by = f"x[{j}]" if j < state_size else f"u[{j - state_size}]"
    if source.inputs and j >= given.shape[2] - len(source.inputs):
        by = source.inputs[j - given.shape[2]]
    raise ValueError(
        f"{source.head}: d {source.output or f'x_next[{i}]'} / d {by} is {float(given[row, i, j]):.6g} by "
        f"{source.by} and {float(best[row, i, j]):.6g} by finite differences, expected the same "
        f"({int(wrong.sum())} of {wrong.numel()} derivatives differ); {source.remedy}"
    )

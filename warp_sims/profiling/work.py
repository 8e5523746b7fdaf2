"""Operations and bytes of a rollout, counted from sizes, for the rates of kernels.

Operations are those of matrix products over the true weights and worlds; a multiplication and an addition
count as two. Padding, biases, tanh, the physics and other elementwise work are left out, so rates are not too
high. Per point (a world at a step), with F the products of one forward evaluation of the policy, P those that
pull a cotangent of the controls back to the first hidden layer, and P0 those from there to the state:

    forward             F
    hidden cotangents   P + P0, a control component in a linearisation, a field in a fused adjoint sweep;
                        P0 only where a network edge is open
    weight gradients    F a field

Two things are done but not needed. A linearisation pulls back a cotangent for each control component, where
one for each field would do. And recomputation counts as done, never as needed.

Bytes are those of the arrays that a kernel reads and writes, each counted once. On a CPU many arrays lie in
cache, so a kernel can exceed the rate of a large copy.
"""

import math
from typing import NamedTuple

import numpy as np

from ..bridge.passes.fused_backward import division
from ..kernels.flow import network_open
from ..kernels.policy.layout import BLOCK, Layout
from ..kernels.policy.table import Column

__all__ = ["Problem", "Work", "needed_operations", "work_of"]


class Work(NamedTuple):
    """What all launches of one kernel in one pass do."""

    operations: int | None
    """None where they are not counted: physics, elementwise work."""
    bytes: int | None


class Problem(NamedTuple):
    """A rollout as far as its work depends on it."""

    nworld: int
    horizon: int
    state_size: int
    control_size: int
    itemsize: int
    layout: Layout | None
    """Of a fused policy, else None."""
    parameters: int
    """Components of the gradient."""

    @property
    def points(self) -> int:
        """Worlds times steps."""
        return self.nworld * self.horizon


class _Products(NamedTuple):
    """Operations at one point."""

    forward: int
    pull_hidden: int
    """Through all layers but the first."""
    pull_state: int
    """Through the layer that reads the state."""


def _products(lay: Layout) -> _Products:
    """Of the true weights at all positions."""
    each = []
    for i in lay.linear:
        units, pitch = lay.column(i, Column.UNITS), lay.column(i, Column.PITCH_WINDOW)
        first = lay.column(i, Column.BACKWARD)
        weights = int(np.count_nonzero(lay.pack[first : first + units * pitch]))
        each.append(2 * weights * lay.column(i, Column.POSITIONS))
    return _Products(sum(each), sum(each[1:]), each[0])


def needed_operations(problem: Problem, base: str, check: str) -> tuple[int, int] | None:
    """Operations that the mathematics needs forwards and backwards, None without a fused policy.

    Args:
        problem: The rollout.
        base, check: Flow letters of the steps of both fields, `check` empty for one field.
    """
    if problem.layout is None:
        return None
    products = _products(problem.layout)
    fields = [letters for letters in (base, check) if letters]
    pulls = min(problem.control_size, len(fields))
    to_states = min(pulls, sum(network_open(letters) for letters in fields))
    backward = pulls * products.pull_hidden + to_states * products.pull_state
    backward += len(fields) * products.forward
    return problem.points * products.forward, problem.points * backward


def work_of(kernel: str, problem: Problem, base: str, check: str) -> Work:
    """What the launches of a kernel do in one pass, by the name of its function; others are not counted."""
    b, horizon, n, m = problem.nworld, problem.horizon, problem.state_size, problem.control_size
    fields = 2 if check else 1
    any_open = network_open(base + check)
    states, controls, jac = (horizon + 1) * b * n, horizon * b * m, horizon * b * m * n * any_open
    lay = problem.layout
    operations, elements = None, None
    if kernel == "simulate":
        # a policy that torch evaluates stands between two launches of one step, which each read a state and
        # write it and the next
        elements = controls + 3 * horizon * b * n
    elif kernel == "loss":
        elements = states + controls + b
    elif kernel == "adjoint":
        elements = states + controls + jac + fields * (controls + b * n)
    elif kernel == "combine":
        elements = 3 * problem.parameters
    elif kernel == "pack_parameters" and lay is not None:
        elements = problem.parameters + lay.packed
    elif lay is not None:
        products = _products(lay)
        rows = math.ceil(b / BLOCK) * BLOCK * horizon
        hidden, adjoints = rows * lay.row, rows * lay.row_adj
        activations = hidden - rows * lay.column(0, Column.SECTION)
        if kernel in ("fused_rollout", "resident_rollout"):
            operations = products.forward
            elements = lay.packed + states + controls + hidden + b
        elif kernel in ("network_linearize", "linearize"):
            to_state = products.pull_state if any_open else 0
            operations = m * (products.pull_hidden + to_state)
            # tanh' is read off the activations
            elements = lay.packed + activations + m * adjoints + jac
        elif kernel == "fused_adjoint":
            to_states = sum(network_open(letters) for letters in (base, check))
            operations = fields * products.pull_hidden
            operations += to_states * products.pull_state
            elements = lay.packed + activations + states + controls
            elements += fields * (controls + b * n + adjoints)
        elif kernel in ("network_weight_grad", "weight_grad"):
            operations = fields * products.forward
            # with several controls a CPU has the cotangents of the fields, else they are of unit controls
            kept = fields if kernel == "network_weight_grad" and m > 1 else m
            elements = hidden + kept * adjoints + fields * (controls + lay.grads)
        elif kernel == "network_sum_partial":
            step = BLOCK * lay.row * problem.itemsize
            _, _, sums = division(math.ceil(b / BLOCK), horizon, step, 0)
            elements = fields * (sums * lay.grads + problem.parameters)
    return Work(
        None if operations is None else operations * problem.points,
        None if elements is None else elements * problem.itemsize,
    )

"""The operations of a fused policy in torch: what they mean, and the wide products that GPUs take.

`evaluate` computes a policy from its description, see kernels/policy/description.py. `linearize` and
`weight_grad` compute on the stored rows of a forward sweep what kernels/policy/backward.h does on CPUs; tests
compare them. For an ensemble every tensor has the members in front, and the products are batched over these.

Every tensor here is as large as the activations of a layer, and an H100 needs a quarter of the time of a
product to read and write one. So a product or an activation passes over none twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.policy.description import ACTIVATIONS, parse
from ...kernels.policy.layout import BLOCK, Layout
from ...kernels.policy.table import (
    ACTIVATION,
    ADD,
    AFFINE,
    CLEAR,
    COPY,
    GATHER,
    LINEAR,
    NORMALIZE,
    Column,
)
from ..runtime.arrays import constant
from ..runtime.launches import span

VALUES: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leakyrelu": lambda x, slope: functional.leaky_relu(x, slope),
    "elu": lambda x, alpha: functional.elu(x, alpha),
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelutanh": lambda x: functional.gelu(x, approximate="tanh"),
    "softplus": lambda x, beta, threshold: functional.softplus(x, beta, threshold),
    "sin": torch.sin,
    "cos": torch.cos,
    "clamp": lambda x, low, high: torch.clamp(x, low, high),
}
"""Activations in torch."""


def evaluate(network: str, parameters: Sequence[Tensor], constants: Sequence[Tensor], x: Tensor) -> Tensor:
    """Controls (n, control_size) of states x (n, state_size) by a description."""
    _, operations = parse(network)
    values = [x]

    def vector(word: str, missing: float) -> Tensor | float:
        if word == "-":
            return missing
        if word[0] in "pc":
            return (parameters if word[0] == "p" else constants)[int(word[1:])].flatten()
        found = [float(part) for part in word.split(",")]
        return x.new_tensor(found) if len(found) > 1 else found[0]

    for op in operations:
        v, words = values[op.inputs[0]], op.arguments
        if op.kind == "linear":
            bias = None if words[2] == "-" else parameters[int(words[2][1:])]
            out = functional.linear(v, parameters[int(words[1][1:])], bias)
        elif op.kind == "conv":
            bias = None if words[5] == "-" else parameters[int(words[5][1:])]
            v = v.unflatten(-1, (-1, int(words[3]))).mT
            weight = parameters[int(words[4][1:])].view(int(words[0]), int(words[3]), int(words[1]))
            out = functional.conv1d(v, weight, bias, int(words[2])).mT.flatten(1)
        elif op.kind == "turn":
            out = v.unflatten(-1, (int(words[0]), -1)).mT.flatten(1)
        elif op.kind == "spread":
            channels, around = int(words[0]), (int(words[1]), int(words[2]))
            v = v.unflatten(-1, (channels, -1) if words[4] == "first" else (-1, channels))
            mode = "constant" if words[3] == "zeros" else words[3]
            out = functional.pad(v if words[4] == "first" else v.mT, around, mode).mT.flatten(1)
        elif op.kind == "normalize" and words[0] == "layer":
            out = functional.layer_norm(v, (op.width,), eps=float(words[1]))
        elif op.kind == "normalize":
            out = functional.rms_norm(v, (op.width,), eps=float(words[1]))
        elif op.kind == "affine":
            out = v * vector(words[0], 1.0) + vector(words[1], 0.0)
        elif op.kind == "add":
            out = v + values[op.inputs[1]]
        elif op.kind == "part":
            first, count = map(int, words)
            out = v[..., first : first + count]
        elif op.kind == "join":
            out = torch.cat([values[i] for i in op.inputs], -1)
        else:
            out = VALUES[op.kind](v, *map(float, words))
        values.append(out)
    return values[-1]


aten: Any = torch.ops.aten

PULLS: dict[str, Callable[..., Tensor]] = {
    "tanh": aten.tanh_backward.grad_input,
    "relu": lambda d, y, **into: aten.threshold_backward.grad_input(d, y, 0, **into),
    "leakyrelu": lambda d, y, slope, **into: aten.leaky_relu_backward.grad_input(d, y, slope, True, **into),
    "elu": lambda d, y, alpha, **into: aten.elu_backward.grad_input(d, alpha, 1, 1, True, y, **into),
    "sigmoid": aten.sigmoid_backward.grad_input,
    "silu": aten.silu_backward.grad_input,
    "gelu": aten.gelu_backward.grad_input,
    "gelutanh": lambda d, x, **into: aten.gelu_backward.grad_input(d, x, approximate="tanh", **into),
    "softplus": aten.softplus_backward.grad_input,
    "sin": lambda d, x, grad_input: torch.mul(d, torch.cos(x), out=grad_input),
    "cos": lambda d, x, grad_input: torch.mul(d, -torch.sin(x), out=grad_input),
    "clamp": lambda d, x, low, high, grad_input: torch.mul(d, (x >= low) & (x <= high), out=grad_input),
}
"""VJPs of the activations, of the output where it gives the derivative (`ACTIVATIONS`), else of the input."""


class Rows(NamedTuple):
    """The stored rows of a fused rollout."""

    layout: Layout
    packed: Tensor
    hidden: Tensor
    """(blocks * horizon * BLOCK, layout.row), of each member for an ensemble."""
    horizon: int
    nworld: int
    """Worlds of a member."""

    def steps(self, t0: int, t1: int) -> "Rows":
        """The rows of the steps t0 ... t1 - 1; a copy unless these are all."""
        if (t0, t1) == (0, self.horizon):
            return self
        by_step = self.hidden.unflatten(-2, (-1, self.horizon, BLOCK))[..., t0:t1, :, :]
        return self._replace(hidden=by_step.flatten(-4, -2), horizon=t1 - t0)

    def to_points(self, rows: Tensor) -> Tensor:
        """(rows, k) to (horizon, nworld, k); for an ensemble the member axis comes after the horizon."""
        blocks = rows.shape[-2] // (self.horizon * BLOCK)
        points = rows.unflatten(-2, (blocks, self.horizon, BLOCK)).movedim(-3, 0)
        return points.flatten(-3, -2)[..., : self.nworld, :]

    def to_rows(self, points: Tensor) -> Tensor:
        """(horizon, nworld, k) to (rows, k), zero in rows without a world."""
        blocks = self.hidden.shape[-2] // (self.horizon * BLOCK)
        padded = functional.pad(points, (0, 0, 0, blocks * BLOCK - self.nworld))
        return padded.unflatten(-2, (blocks, BLOCK)).movedim(0, -3).flatten(-4, -2)


def bounded_steps(rows: Rows, want_jac: bool, nbytes: int) -> int:
    """Steps, at least one, whose linearisation and products hold about `nbytes`."""
    lay, points = rows.layout, rows.hidden[..., 0].numel() // rows.horizon
    point = lay.control_size * (lay.row_adj + (lay.state_size if want_jac else 0)) + lay.row_adj
    return max(1, min(rows.horizon, nbytes // (points * point * rows.hidden.element_size())))


def _reading(key: tuple[bytes, int]) -> np.ndarray:
    """(2, n) components of an input and of the output that is gathered from it: of each the k-th reading."""
    places, k = np.frombuffer(key[0], dtype=np.int32), key[1]
    found = [np.flatnonzero(places == source)[k : k + 1] for source in range(places.max() + 1)]
    where = np.concatenate(found)
    return np.stack([places[where], where]).astype(np.int64)


class _Table:
    """A layout's table and what it names, of all rows at once."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.lay = rows, rows.layout

    def of(self, i: int, column: int) -> int:
        return self.lay.column(i, column)

    def value(self, i: int, column: int, width: int | None = None) -> Tensor:
        """A section of the activations."""
        first = self.of(i, column)
        return self.rows.hidden[..., first : first + (self.of(i, Column.UNITS) if width is None else width)]

    def vector(self, i: int, column: int) -> Tensor:
        """A scale or shift, (..., 1, units)."""
        first = self.of(i, column)
        return self.rows.packed[..., None, first : first + self.of(i, Column.UNITS)]

    def matrix(self, i: int) -> Tensor:
        """(..., units, window)."""
        units, pitch, first = (self.of(i, c) for c in (Column.UNITS, Column.PITCH_WINDOW, Column.BACKWARD))
        matrix = self.rows.packed[..., first : first + units * pitch].unflatten(-1, (units, pitch))
        return matrix[..., : self.of(i, Column.WINDOW)]

    def spans(self, i: int) -> list[tuple[slice, slice]]:
        """Per position of a linear operation: what it reads of its input, and what it writes."""
        e = Column
        window, hop, units, step = (self.of(i, c) for c in (e.WINDOW, e.HOP, e.UNITS, e.STEP))
        return [
            (slice(k * hop, k * hop + window), slice(k * step, k * step + units))
            for k in range(self.of(i, Column.POSITIONS))
        ]

    def gathered(self, i: int) -> list[tuple[Tensor, Tensor]]:
        """Components of the input and those of the output that come from them, one after the other: none of
        the input twice in an entry, so that sums have one order.
        """
        first, device = self.of(i, Column.SECOND), self.rows.hidden.device
        places = self.lay.table.ravel()[first : first + self.of(i, Column.UNITS)]
        times, key = int(np.bincount(places[places >= 0]).max()), places.tobytes()
        both = [constant((key, k), _reading, device) for k in range(times)]
        return [(one[0], one[1]) for one in both]

    def numbers(self, i: int, count: int) -> list[float]:
        """Of an operation."""
        first = self.of(i, Column.NUMBERS)
        return self.lay.numbers[self.lay.pack[first : first + count]].tolist()


def _pull(t: _Table, i: int, d: Tensor, want_jac: bool) -> None:
    """Takes the cotangents (rows, row_adj) through one operation, in place."""
    e = Column
    kind, units = t.of(i, e.KIND), t.of(i, e.UNITS)
    if not want_jac and not t.of(i, e.INNER):
        return
    last, first = t.of(i, e.ADJ_OUTPUT), t.of(i, e.ADJ_INPUT)
    out = d[..., last : last + units]
    if kind == CLEAR:
        out.zero_()
        return
    if kind == GATHER:
        for source, target in t.gathered(i):
            d.index_add_(-1, first + source, out.index_select(-1, target))
        return
    if kind == LINEAR and t.of(i, e.ADDS):
        with span("product"):
            for read, written in t.spans(i):
                found = d[..., last + written.start : last + written.stop] @ t.matrix(i)
                d[..., first + read.start : first + read.stop].add_(found)
        return
    target = d[..., first : first + (t.of(i, e.WINDOW) if kind == LINEAR else units)]
    into = torch.empty_like(target) if t.of(i, e.ADDS) & 1 else target
    if kind == LINEAR:
        with span("product"):
            torch.matmul(out, t.matrix(i), out=into)
    elif kind == NORMALIZE:
        y, factor = t.value(i, e.OUTPUT), t.value(i, e.SECOND, 1)
        found = out - y * (out * y).mean(-1, keepdim=True)
        if t.of(i, e.CENTERED):
            found -= out.mean(-1, keepdim=True)
        torch.mul(found, factor, out=into)
    elif kind == AFFINE:
        torch.mul(out, t.vector(i, e.BACKWARD), out=into)
    elif kind in (ADD, COPY):
        into = out
    else:
        name, known = list(ACTIVATIONS.items())[kind - ACTIVATION]
        read = t.value(i, e.OUTPUT if known.by_output else e.INPUT)
        PULLS[name](out, read, *t.numbers(i, known.numbers), grad_input=into)
    if t.of(i, e.ADDS) & 1:
        target.add_(into)
    elif into is out and first != last:
        target.copy_(out)
    if kind == ADD:
        second = d[..., t.of(i, e.ADJ_SECOND) : t.of(i, e.ADJ_SECOND) + units]
        second.copy_(second + out if t.of(i, e.ADDS) & 2 else out)


def linearize(rows: Rows, want_jac: bool) -> tuple[list[Tensor], Tensor | None]:
    """Cotangents for a unit cotangent of each control, [control] (rows, row_adj), and dN/dx.

    Returns:
        The cotangents, and the Jacobians (horizon, nworld, control_size, state_size) if wanted.
    """
    t, lay = _Table(rows), rows.layout
    cotangents, jacobian = [], []
    result, state = t.of(0, Column.ADJ_RESULT), t.of(0, Column.ADJ_STATE)
    for c in range(lay.control_size):
        d = rows.hidden.new_empty((*rows.hidden.shape[:-1], lay.row_adj))
        d[..., result : result + lay.control_size] = 0.0
        d[..., result + c] = 1.0
        for i in reversed(range(lay.operations)):
            _pull(t, i, d, want_jac)
        cotangents.append(d)
        if want_jac:
            jacobian.append(rows.to_points(d[..., state : state + lay.state_size]))
    return cotangents, torch.stack(jacobian, dim=-2).contiguous() if want_jac else None


def _scaled(m: Tensor, d: list[Tensor], columns: slice) -> Tensor:
    """Some cotangents for the control cotangents m (rows, control_size)."""
    total = m[..., :1] * d[0][..., columns]
    for c in range(1, m.shape[-1]):
        total.addcmul_(m[..., c : c + 1], d[c][..., columns])
    return total


def weight_grad(rows: Rows, d: list[Tensor], mu: Tensor, unpack: Tensor) -> Tensor:
    """Gradients (fields, parameters) from the control cotangents mu (fields, horizon, nworld,
    control_size); (fields, members, parameters) of an ensemble.
    """
    e, t, lay = Column, _Table(rows), rows.layout
    packed = mu.new_zeros((mu.shape[0], *rows.packed.shape[:-1], lay.grads))
    for f, field in enumerate(mu):
        m = rows.to_rows(field)
        for i in range(lay.operations):
            linear, units = t.of(i, e.KIND) == LINEAR, t.of(i, e.UNITS)
            if not linear and not t.of(i, e.TRAINED):
                continue
            matrix, bias, first = t.of(i, e.BACKWARD), t.of(i, e.BIAS), t.of(i, e.ADJ_OUTPUT)
            last = first + units + t.of(i, e.STEP) * (t.of(i, e.POSITIONS) - 1)
            cotangent = _scaled(m, d, slice(first, last))
            if linear:
                window, pitch = t.of(i, e.WINDOW), t.of(i, e.PITCH_WINDOW)
                grad = packed[f, ..., matrix : matrix + units * pitch].unflatten(-1, (units, pitch))
                column = t.of(i, e.INPUT)
                with span("product"):
                    for read, written in t.spans(i):
                        inputs = rows.hidden[..., column + read.start : column + read.stop]
                        grad[..., :window].add_(cotangent[..., written].mT @ inputs)
                        packed[f, ..., bias : bias + units].add_(cotangent[..., written].sum(-2))
                continue
            if t.of(i, e.TRAINED) & 1:
                packed[f, ..., matrix : matrix + units].add_((cotangent * t.value(i, e.INPUT)).sum(-2))
            if t.of(i, e.TRAINED) & 2:
                packed[f, ..., bias : bias + units].add_(cotangent.sum(-2))
    return packed.index_select(-1, unpack)

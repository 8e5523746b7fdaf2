"""Composed policies in torch: the meaning of their operations, and the wide products that GPUs take.

`evaluate` computes a policy from its description, see kernels/policy/composed_description.py. `linearize` and
`weight_grad` compute on the stored rows of a forward sweep what kernels/policy/composed.h does. For composed
policies they replace those of wide.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.policy.composed_description import ACTIVATIONS, parse
from ...kernels.policy.composed_layout import (
    ACTIVATION,
    ADD,
    AFFINE,
    CLEAR,
    COPY,
    GATHER,
    LINEAR,
    NORMALIZE,
    Entry,
)
from ..runtime.arrays import constant
from ..runtime.launches import span
from .wide import Rows

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


SLOPES: dict[str, Callable[..., Tensor]] = {
    "tanh": lambda y: 1 - y * y,
    "relu": lambda y: (y > 0).to(y.dtype),
    "leakyrelu": lambda y, slope: torch.where(y > 0, 1.0, slope),
    "elu": lambda y, alpha: torch.where(y > 0, 1.0, y + alpha),
    "sigmoid": lambda y: y * (1 - y),
    "silu": lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))),
    "gelu": lambda x: (
        0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (0.5 / torch.pi) ** 0.5
    ),
    "gelutanh": lambda x: _gelu_tanh_slope(x),
    "softplus": lambda x, beta, threshold: torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x)),
    "sin": torch.cos,
    "cos": lambda x: -torch.sin(x),
    "clamp": lambda x, low, high: ((x >= low) & (x <= high)).to(x.dtype),
}
"""Derivatives of the activations, of the output where it gives them (`ACTIVATIONS`), else of the input."""


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    factor = (2 / torch.pi) ** 0.5
    t = torch.tanh(factor * x * (1 + 0.044715 * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * factor * (1 + 0.134145 * x * x)


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
        return self.rows.hidden[..., first : first + (self.of(i, Entry.UNITS) if width is None else width)]

    def vector(self, i: int, column: int) -> Tensor:
        """A scale or shift, (..., 1, units)."""
        first = self.of(i, column)
        return self.rows.packed[..., None, first : first + self.of(i, Entry.UNITS)]

    def matrix(self, i: int) -> Tensor:
        """(..., units, window)."""
        units, pitch, first = (self.of(i, c) for c in (Entry.UNITS, Entry.PITCH_WINDOW, Entry.BACKWARD))
        matrix = self.rows.packed[..., first : first + units * pitch].unflatten(-1, (units, pitch))
        return matrix[..., : self.of(i, Entry.WINDOW)]

    def spans(self, i: int) -> list[tuple[slice, slice]]:
        """Per position of a linear operation: what it reads of its input, and what it writes."""
        window, hop, units = (self.of(i, c) for c in (Entry.WINDOW, Entry.HOP, Entry.UNITS))
        return [
            (slice(k * hop, k * hop + window), slice(k * units, (k + 1) * units))
            for k in range(self.of(i, Entry.POSITIONS))
        ]

    def gathered(self, i: int) -> list[tuple[Tensor, Tensor]]:
        """Components of the input and those of the output that come from them, one after the other: none of
        the input twice in an entry, so that sums have one order.
        """
        first, device = self.of(i, Entry.SECOND), self.rows.hidden.device
        places = self.lay.table.ravel()[first : first + self.of(i, Entry.UNITS)]
        times, key = int(np.bincount(places[places >= 0]).max()), places.tobytes()
        both = [constant((key, k), _reading, device) for k in range(times)]
        return [(one[0], one[1]) for one in both]

    def numbers(self, i: int, count: int) -> list[Tensor]:
        """Of an operation, (..., 1, 1) each."""
        first = self.of(i, Entry.NUMBERS)
        return [self.rows.packed[..., None, first + k : first + k + 1] for k in range(count)]


def _pull(t: _Table, i: int, d: Tensor, want_jac: bool) -> None:
    """Takes the cotangents (rows, row_adj) through one operation, in place."""
    e = Entry
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
    if kind == LINEAR and t.of(i, e.POSITIONS) > 1:
        with span("product"):
            for read, written in t.spans(i):
                found = d[..., last + written.start : last + written.stop] @ t.matrix(i)
                d[..., first + read.start : first + read.stop].add_(found)
        return
    if kind == LINEAR:
        units = t.of(i, e.WINDOW)
        with span("product"):
            found = out @ t.matrix(i)
    elif kind == NORMALIZE:
        y, factor = t.value(i, e.OUTPUT), t.value(i, e.SECOND, 1)
        found = out - y * (out * y).mean(-1, keepdim=True)
        if t.of(i, e.CENTERED):
            found = found - out.mean(-1, keepdim=True)
        found = found * factor
    elif kind == AFFINE:
        found = out * t.vector(i, e.BACKWARD)
    elif kind in (ADD, COPY):
        found = out.clone()
    else:
        name, known = list(ACTIVATIONS.items())[kind - ACTIVATION]
        read = t.value(i, e.OUTPUT if known.by_output else e.INPUT)
        found = out * SLOPES[name](read, *t.numbers(i, known.numbers))
    target = d[..., first : first + units]
    if kind != ADD or t.of(i, e.ADJ_INPUT) != t.of(i, e.ADJ_OUTPUT):
        target.copy_(target + found if t.of(i, e.ADDS) & 1 else found)
    if kind == ADD:
        second = d[..., t.of(i, e.ADJ_SECOND) : t.of(i, e.ADJ_SECOND) + units]
        second.copy_(second + found if t.of(i, e.ADDS) & 2 else found)


def linearize(rows: Rows, want_jac: bool) -> tuple[list[Tensor], Tensor | None]:
    """Cotangents for a unit cotangent of each control, [control] (rows, row_adj), and dN/dx.

    Returns:
        The cotangents, and the Jacobians (horizon, nworld, control_size, state_size) if wanted.
    """
    t, lay = _Table(rows), rows.layout
    cotangents, jacobian = [], []
    result, state = t.of(0, Entry.ADJ_RESULT), t.of(0, Entry.ADJ_STATE)
    for c in range(lay.control_size):
        d = rows.hidden.new_zeros((*rows.hidden.shape[:-1], lay.row_adj))
        d[..., result + c] = 1.0
        for i in reversed(range(lay.layers)):
            _pull(t, i, d, want_jac)
        cotangents.append(d)
        if want_jac:
            jacobian.append(rows.to_points(d[..., state : state + lay.state_size]))
    return cotangents, torch.stack(jacobian, dim=-2).contiguous() if want_jac else None


def weight_grad(rows: Rows, d: list[Tensor], mu: Tensor, unpack: Tensor) -> Tensor:
    """Gradients (fields, parameters) from the control cotangents mu (fields, horizon, nworld,
    control_size); (fields, members, parameters) of an ensemble.
    """
    e, t, lay = Entry, _Table(rows), rows.layout
    packed = mu.new_zeros((mu.shape[0], *rows.packed.shape[:-1], lay.grads))
    for f, field in enumerate(mu):
        m = rows.to_rows(field)
        for i in range(lay.layers):
            kind, units = t.of(i, e.KIND), t.of(i, e.UNITS)
            trained = 3 if kind == LINEAR else t.of(i, e.TRAINED)
            if not trained:
                continue
            first, last = t.of(i, e.ADJ_OUTPUT), t.of(i, e.ADJ_OUTPUT) + units * t.of(i, e.POSITIONS)
            cotangent = torch.stack([m[..., c : c + 1] * d[c][..., first:last] for c in range(len(d))])
            cotangent = cotangent.sum(0)
            matrix, bias = t.of(i, e.BACKWARD), t.of(i, e.BIAS)
            if kind == LINEAR:
                window, pitch = t.of(i, e.WINDOW), t.of(i, e.PITCH_WINDOW)
                grad = packed[f, ..., matrix : matrix + units * pitch].unflatten(-1, (units, pitch))
                column = t.of(i, e.INPUT)
                with span("product"):
                    for read, written in t.spans(i):
                        inputs = rows.hidden[..., column + read.start : column + read.stop]
                        grad[..., :window] += cotangent[..., written].mT @ inputs
                        packed[f, ..., bias : bias + units] += cotangent[..., written].sum(-2)
            elif trained & 1:
                packed[f, ..., matrix : matrix + units] += (cotangent * t.value(i, e.INPUT)).sum(-2)
            if kind != LINEAR and trained & 2:
                packed[f, ..., bias : bias + units] += cotangent.sum(-2)
    return packed.index_select(-1, unpack)

"""The wide products of a fused policy through torch, for GPUs; tests compare the CPU kernels with them.

Rows are those of the forward sweep, (blocks, horizon, BLOCK) flattened; see kernels/policy/dense.py for the
equations and the layout. For an ensemble every tensor has the members in front of them, and the products are
batched over these.
"""

from typing import NamedTuple

import torch

from ...kernels.policy.layout import BLOCK, Column, Layout
from ..runtime.launches import span


class Rows(NamedTuple):
    """The stored rows of a fused rollout."""

    layout: Layout
    packed: torch.Tensor
    hidden: torch.Tensor
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

    def section(self, layer: int) -> torch.Tensor:
        """Input section of a layer at all rows, (rows, section)."""
        first = self.layout.column(layer, Column.INPUT)
        return self.hidden[..., first : first + self.layout.column(layer, Column.SECTION)]

    def weight(self, layer: int) -> torch.Tensor:
        """Matrix of a layer, (units, window)."""
        units, pitch = self.layout.column(layer, Column.UNITS), self.layout.column(layer, Column.PITCH_WINDOW)
        first = self.layout.column(layer, Column.BACKWARD)
        matrix = self.packed[..., first : first + units * pitch].unflatten(-1, (units, pitch))
        return matrix[..., : self.window(layer)]

    def window(self, layer: int) -> int:
        """Elements that a layer reads at one position."""
        return self.layout.column(layer, Column.WINDOW)

    def spans(self, layer: int) -> list[tuple[slice, slice]]:
        """Per position of a layer: what it reads of its input section, and what it writes of the next."""
        hop, pitch, units = (
            self.layout.column(layer, c) for c in (Column.HOP, Column.PITCH_UNITS, Column.UNITS)
        )
        return [
            (slice(i * hop, i * hop + self.window(layer)), slice(i * pitch, i * pitch + units))
            for i in range(self.layout.column(layer, Column.POSITIONS))
        ]

    def to_points(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, k) to (horizon, nworld, k); for an ensemble the member axis comes after the horizon."""
        blocks = rows.shape[-2] // (self.horizon * BLOCK)
        points = rows.unflatten(-2, (blocks, self.horizon, BLOCK)).movedim(-3, 0)
        return points.flatten(-3, -2)[..., : self.nworld, :]

    def to_rows(self, points: torch.Tensor) -> torch.Tensor:
        """(horizon, nworld, k) to (rows, k), zero in rows without a world."""
        blocks = self.hidden.shape[-2] // (self.horizon * BLOCK)
        padded = torch.nn.functional.pad(points, (0, 0, 0, blocks * BLOCK - self.nworld))
        return padded.unflatten(-2, (blocks, BLOCK)).movedim(0, -3).flatten(-4, -2)


def bounded_steps(rows: Rows, want_jac: bool, nbytes: int) -> int:
    """Steps, at least one, whose linearisation and products hold about `nbytes`."""
    lay, points = rows.layout, rows.hidden[..., 0].numel() // rows.horizon
    point = lay.control_size * (lay.row_adj + (lay.state_size if want_jac else 0)) + lay.row_adj
    return max(1, min(rows.horizon, nbytes // (points * point * rows.hidden.element_size())))


def _pull(rows: Rows, layer: int, d: torch.Tensor) -> torch.Tensor:
    """Cotangent of what a layer reads from that of its units before the activation."""
    w, spans = rows.weight(layer), rows.spans(layer)
    if len(spans) == 1:
        with span("product"):
            return d[..., spans[0][1]] @ w
    y = torch.zeros_like(rows.section(layer))
    with span("product"):
        for read, written in spans:
            y[..., read].add_(d[..., written] @ w)
    return y


def linearize(rows: Rows, want_jac: bool) -> tuple[list[list[torch.Tensor]], torch.Tensor | None]:
    """Hidden cotangents for a unit cotangent of each control, [control][layer] (rows, units), and dN/dx.

    Every tensor here is as large as the activations of a layer, and an H100 needs a quarter of the time of a
    product to read and write one. So no operation passes over a tensor twice.

    Returns:
        The hidden cotangents, and the Jacobians (horizon, nworld, control_size, state_size) if wanted.
    """
    lay = rows.layout
    last = lay.layers - 1
    hidden_cotangents, jacobian = [], []
    for c in range(lay.control_size):
        ds: list[torch.Tensor] = []
        d = rows.weight(last)[..., c : c + 1, :].expand(*rows.hidden.shape[:-1], -1)
        for layer in range(last, 0, -1):
            if layer < last:
                d = _pull(rows, layer, d)
            # d (1 - y^2) in one pass
            d = torch.ops.aten.tanh_backward(d, rows.section(layer)[..., : d.shape[-1]])
            ds.append(d)
        if want_jac:
            at_input = _pull(rows, 0, d) if last else d
            jacobian.append(rows.to_points(at_input[..., : lay.state_size]))
        hidden_cotangents.append(ds[::-1])
    return hidden_cotangents, torch.stack(jacobian, dim=-2).contiguous() if want_jac else None


def _scaled(m: torch.Tensor, d: list[list[torch.Tensor]], layer: int) -> torch.Tensor:
    """Hidden cotangents of the control cotangents m (rows, control_size)."""
    total = m[..., :1] * d[0][layer]
    for c in range(1, m.shape[-1]):
        total.addcmul_(m[..., c : c + 1], d[c][layer])
    return total


def weight_grad(
    rows: Rows, d: list[list[torch.Tensor]], mu: torch.Tensor, unpack: torch.Tensor
) -> torch.Tensor:
    """Gradients (fields, parameters) from the control cotangents mu (fields, horizon, nworld,
    control_size); (fields, members, parameters) of an ensemble.
    """
    lay = rows.layout
    packed = mu.new_zeros((mu.shape[0], *rows.packed.shape[:-1], lay.grads))
    for f, field in enumerate(mu):
        m = rows.to_rows(field)
        for layer in range(lay.layers):
            units, pitch = lay.column(layer, Column.UNITS), lay.column(layer, Column.PITCH_WINDOW)
            matrix, bias = lay.column(layer, Column.BACKWARD), lay.column(layer, Column.BIAS)
            cotangent = m if layer == lay.layers - 1 else _scaled(m, d, layer)
            grad = packed[f, ..., matrix : matrix + units * pitch].unflatten(-1, (units, pitch))
            inputs, window = rows.section(layer), rows.window(layer)
            with span("product"):
                for read, written in rows.spans(layer):
                    grad[..., :window].add_(cotangent[..., written].mT @ inputs[..., read])
                    packed[f, ..., bias : bias + units].add_(cotangent[..., written].sum(-2))
    return packed.index_select(-1, unpack)

"""The wide products of a perceptron through torch: the road of GPUs, and the check of the CPU kernels.

Rows are those of the forward sweep, (blocks, horizon, BLOCK) flattened; see kernels/dense.py for the equations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.dense import BLOCK, MlpLayout


class Rows(NamedTuple):
    """The stored rows of a fused rollout."""

    layout: MlpLayout
    packed: torch.Tensor
    hidden: torch.Tensor
    """(blocks * horizon * BLOCK, layout.row)."""
    horizon: int
    nworld: int

    def activations(self, layer: int) -> torch.Tensor:
        """Input of a layer at all rows, (rows, n_in)."""
        n_in, column = int(self.layout.table[layer, 0]), int(self.layout.table[layer, 7])
        return self.hidden[:, column : column + n_in]

    def weight(self, layer: int) -> torch.Tensor:
        """Matrix of a layer, (n_out, n_in)."""
        n_in, n_out, pitch = (int(v) for v in self.layout.table[layer, :3])
        start = int(self.layout.table[layer, 6])
        return self.packed[start : start + n_out * pitch].view(n_out, pitch)[:, :n_in]

    def to_points(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, k) to (horizon, nworld, k)."""
        blocks = self.hidden.shape[0] // (self.horizon * BLOCK)
        points = rows.view(blocks, self.horizon, BLOCK, -1).transpose(0, 1)
        return points.reshape(self.horizon, blocks * BLOCK, -1)[:, : self.nworld]

    def to_rows(self, points: torch.Tensor) -> torch.Tensor:
        """(horizon, nworld, k) to (rows, k), zero where no world is."""
        blocks = self.hidden.shape[0] // (self.horizon * BLOCK)
        padded = torch.nn.functional.pad(points, (0, 0, 0, blocks * BLOCK - self.nworld))
        return padded.view(self.horizon, blocks, BLOCK, -1).transpose(0, 1).reshape(self.hidden.shape[0], -1)


def linearize(rows: Rows, want_jac: bool) -> tuple[list[list[torch.Tensor]], torch.Tensor | None]:
    """Hidden cotangents for a unit cotangent of each control, [control][layer] (rows, width), and dN/dx.

    Returns:
        The hidden cotangents, and the Jacobians (horizon, nworld, control_size, state_size) if wanted.
    """
    layers = len(rows.layout.sizes) - 1
    hidden_cotangents, jacobian = [], []
    for c in range(rows.layout.sizes[-1]):
        w = rows.weight(layers - 1)[c]
        ds: list[torch.Tensor] = []
        if layers == 1:
            at_input = w.expand(rows.hidden.shape[0], -1)
        else:
            d = w * (1 - rows.activations(layers - 1) ** 2)
            ds.append(d)
            for layer in range(layers - 2, 0, -1):
                d = (d @ rows.weight(layer)) * (1 - rows.activations(layer) ** 2)
                ds.append(d)
            at_input = d @ rows.weight(0) if want_jac else None
        hidden_cotangents.append(ds[::-1])
        if want_jac and at_input is not None:
            jacobian.append(rows.to_points(at_input.contiguous()))
    return hidden_cotangents, torch.stack(jacobian, dim=2).contiguous() if want_jac else None


def weight_grad(rows: Rows, d: list[list[torch.Tensor]], mu: torch.Tensor) -> torch.Tensor:
    """Gradients (fields, parameters) from the control cotangents mu (fields, horizon, nworld, control_size)."""
    layers = len(rows.layout.sizes) - 1
    fields = []
    for field in mu:
        m = rows.to_rows(field)
        parts: list[torch.Tensor] = []
        for layer in range(layers):
            if layer == layers - 1:
                cotangent = m
            else:
                cotangent = sum(m[:, c : c + 1] * d[c][layer] for c in range(m.shape[1]))
            parts += [(cotangent.T @ rows.activations(layer)).reshape(-1), cotangent.sum(0)]
        fields.append(torch.cat(parts))
    return torch.stack(fields)

"""Physical parameters of a rollout: as a table for the kernels, and their gradients from the cotangents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Physical(NamedTuple):
    """Which physical parameters a rollout is given, and the values of the others."""

    names: tuple[str, ...]
    """Of those given."""
    columns: tuple[int, ...]
    """Their places in the table."""
    numbers: tuple[float, ...]
    """The system's own values, for parameters that are not given."""
    wanted: bool
    """Whether somebody asks for a gradient."""
    members: int = 0
    """Members of an ensemble, which are given the same numbers; 0 without an ensemble."""

    def _by_world(self, q: Tensor) -> bool:
        return q.ndim > (1 if self.members else 0)

    def table(self, given: Sequence[Tensor]) -> Tensor:
        """Makes the table of all numbers, (1 or nworld, count), of tensors () or (nworld,), which are stacked
        for an ensemble.
        """
        rows = next((q.shape[-1] for q in given if self._by_world(q)), 1)
        table = given[0].new_tensor(self.numbers).repeat(rows, 1)
        for column, q in zip(self.columns, given):
            table[:, column] = q.detach()[0] if self.members else q.detach()
        return table

    def split(self, parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """Splits parameters into the policy's own and the table of the physical ones, which come last."""
        own = len(parameters) - len(self.names)
        return parameters[:own], self.table(parameters[own:])

    def gradients(self, adj: Tensor, given: Sequence[Tensor]) -> Tensor:
        """Flat gradients (fields, numbers), (fields, members, numbers) of an ensemble, of cotangents (fields,
        worlds of all members, count): of one number for all worlds the sum over them.
        """
        adj = adj.unflatten(1, (self.members or 1, -1))
        parts = []
        for column, q in zip(self.columns, given):
            own = adj[..., column]
            parts.append(own if self._by_world(q) else own.sum(-1, keepdim=True))
        flat = torch.cat(parts, dim=-1)
        return flat if self.members else flat[:, 0]


def with_physical(physical: Physical, grads: Tensor, adj: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Appends the gradients of the physical parameters to the flat gradients of the policy's parameters;
    zeros if they are not wanted.
    """
    given = parameters[len(parameters) - len(physical.names) :]
    if physical.wanted:
        return torch.cat((grads, physical.gradients(adj, given)), dim=-1)
    numbers = sum(q.numel() // (physical.members or 1) for q in given)
    return torch.cat((grads, grads.new_zeros((*grads.shape[:-1], numbers))), dim=-1)

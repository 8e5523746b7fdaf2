"""Training updates as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..bridge.runtime.graphs import Graph

__all__ = ["GraphedUpdate"]

WARM_UP = 2
"""Updates of a batch size that run as they are before one is recorded: what is made on first use (modules,
moments of the optimizer, workspaces of the products) must be there, and torch's own allocations must have
settled.
"""

Update = Callable[[torch.Tensor, torch.Tensor], None]


class GraphedUpdate:
    """An update that is recorded as a CUDA graph, one for each batch size, and then replayed.

    Args:
        update: (initial states (nworld, state_size), record (rows,)) -> None: changes the weights in place,
            writes what is to be logged into the record, reads nothing on the host.
    """

    def __init__(self, update: Update) -> None:
        self._update = update
        self._recorded: dict[int, tuple[Graph, torch.Tensor, torch.Tensor]] = {}
        self._seen: dict[int, int] = {}

    def __call__(self, x0: torch.Tensor, record: torch.Tensor) -> None:
        """Makes one update."""
        size = x0.shape[0]
        seen = self._seen[size] = self._seen.get(size, 0) + 1
        if seen <= WARM_UP:
            self._update(x0, record)
            return
        if size not in self._recorded:
            self._recorded[size] = self._capture(x0, record)
        graph, inputs, outputs = self._recorded[size]
        inputs.copy_(x0)
        graph.replay()
        record.copy_(outputs)

    def _capture(self, x0: torch.Tensor, record: torch.Tensor) -> tuple[Graph, torch.Tensor, torch.Tensor]:
        inputs, outputs = x0.clone(), torch.full_like(record, torch.nan).contiguous()
        return Graph(lambda: self._update(inputs, outputs), x0.device), inputs, outputs

"""Foreign simulators whose cotangents are clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from .foreign import Pull, Simulator, foreign
from .foreign_check import verify


class ClippedSimulator(Simulator):
    """A simulator whose pullback clips the norm of each world's cotangent, see kernels/sweeps/clipped.py."""

    checks_gradient = False

    def __init__(self, number: int, limit: float) -> None:
        own = foreign(number)
        assert own is not None
        self.own, self.limit, self._key, self.verified = own, limit, (number, limit), set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClippedSimulator) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def state_size(self) -> int:
        return self.own.state_size

    @property
    def control_size(self) -> int:
        return self.own.control_size

    @property
    def rowwise(self) -> bool:
        """Clipped, a pullback is not linear: no Jacobian stands for it."""
        return False

    @property
    def worlds_apart(self) -> bool:
        return self.own.worlds_apart

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return self.own.parameter_names

    @property
    def parameter_values(self) -> tuple[float, ...]:
        return self.own.parameter_values

    @property
    def has_loss(self) -> bool:
        return self.own.has_loss

    def first_use(self, x: Tensor, u: Tensor) -> None:
        verify(self.own, x, u)

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        return self.own.advance(x, u)

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Pull]:
        x_next, pull = self.own.linearize(x, u)

        def clipped(adj: Tensor) -> tuple[Tensor, Tensor]:
            norm = torch.linalg.vector_norm(adj, dim=1, keepdim=True)
            # what is not finite stays so
            over = (norm > self.limit) & (norm < torch.inf)
            return pull(torch.where(over, adj * (self.limit / norm), adj))

        return x_next, clipped

    def cost(self, x: Tensor) -> Tensor:
        return self.own.cost(x)

    def cost_gradient(self, x: Tensor) -> Tensor:
        return self.own.cost_gradient(x)

"""One description of a rollout, from the public call to the launch, and what its passes hand on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...kernels.flow import network_open

BY_SIZE, NONE_KEPT = -1, -2
"""Segments of a fused rollout that its size decides: activations are kept up to a bound, or in no case."""


class LossWeights(NamedTuple):
    """Weights of the system's own loss, before the division by the number of worlds."""

    final: float
    """Of the cost of x_T."""
    running: float
    """Of the cost of each of x_1 ... x_T."""
    control: float
    """Of the mean squared control."""

    def per_world(self, nworld: int, horizon: int, control_size: int) -> tuple[float, float, float]:
        """Factors on the per-world sums that the kernels take."""
        return self.final / nworld, self.running / nworld, self.control / (nworld * horizon * control_size)

    def arguments(self, nworld: int, horizon: int, control_size: int) -> dict[str, float]:
        """The same by their names in the kernels."""
        names = ("w_final", "w_running", "w_control")
        return dict(zip(names, self.per_world(nworld, horizon, control_size)))


class Spec(NamedTuple):
    """Everything of a rollout that is no tensor."""

    system: int
    """Number of the system, see registry.py."""
    base: str
    """One flow letter a step: the edges that leave x_t."""
    check: str = ""
    """The same for the second gradient field of a combined gradient; empty where there is one field."""
    decay: float = 1.0
    """Factor on what crosses a physics edge."""
    final: float = 0.0
    running: float = 0.0
    control: float = 0.0
    """Loss weights, see `LossWeights`."""
    segment: int = 0
    """Steps whose activations are recomputed at once in the backward pass; 0 where they are kept, or, of a
    policy that torch evaluates, where all steps go at once; BY_SIZE or NONE_KEPT. See segments.py.
    """

    @property
    def horizon(self) -> int:
        """Number of steps."""
        return len(self.base)

    @property
    def weights(self) -> LossWeights:
        """Of the system's own loss."""
        return LossWeights(self.final, self.running, self.control)

    @property
    def schedules(self) -> tuple[str, ...]:
        """Of each gradient field."""
        return (self.base, self.check) if self.check else (self.base,)

    @property
    def network_open(self) -> bool:
        """Whether any field crosses a network edge at any step."""
        return network_open(self.base + self.check)

    def arguments(self) -> tuple[int, str, float, float, float, float, int]:
        """The same as a torch operator takes it, which knows no objects; `described` gives it back.

        Numbers stay numbers: in a graph that is compiled for several of them they are symbols.
        """
        flows = f"{self.base} {self.check}"
        return self.system, flows, self.decay, self.final, self.running, self.control, self.segment


def described(
    system: int, flows: str, decay: float, final: float, running: float, control: float, segment: int
) -> Spec:
    """The description that a `Spec.arguments` stands for."""
    base, check = flows.split(" ")
    return Spec(system, base, check, decay, final, running, control, segment)


class Saved(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    states: torch.Tensor
    """(horizon + 1, nworld, state_size), with (members, nworld) for nworld of an ensemble, as below."""
    controls: torch.Tensor
    """(horizon, nworld, control_size)."""
    kept: tuple[torch.Tensor, ...] = ()
    """What the path keeps besides, for itself alone."""


class Cotangents(NamedTuple):
    """Cotangents of a rollout's outputs; None where nothing arrived."""

    loss: torch.Tensor | None
    states: torch.Tensor | None
    controls: torch.Tensor | None

    def dense(self) -> Cotangents:
        """The same in memory that holds the values as they are."""
        return Cotangents(*(None if t is None else t.resolve_neg().contiguous() for t in self))

    def steps(self, t0: int, t1: int) -> Cotangents:
        """Those of the steps t0 ... t1 - 1 and of the state behind them."""
        return Cotangents(
            self.loss,
            None if self.states is None else self.states[t0 : t1 + 1],
            None if self.controls is None else self.controls[t0:t1],
        )

    def worlds(self, part: slice) -> Cotangents:
        """Those of some worlds."""
        return Cotangents(
            self.loss,
            None if self.states is None else self.states[:, part],
            None if self.controls is None else self.controls[:, part],
        )

"""The description of a rollout, from the public call to the launch, and what its passes hand on.

The hidden activations of a policy depend only on the states and the weights, and the states are kept anyway
because they are outputs. A rollout that does not keep its activations recomputes them in segments of time
steps, from the last to the first. The adjoint sweep carries the cotangent of the state from each segment to
the one before it. On a CPU nothing is simulated again, because the activations of the points of a segment do
not depend on one another. On a GPU the forward sweep runs again over the segment, so the activations have the
same bits in every form of the sweep: one forward and one adjoint launch a segment.

All decisions here follow from shapes, so that a traced graph knows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...kernels.flow import network_open
from ...kernels.policy.layout import BLOCK, layout

BY_SIZE, NONE_KEPT = -1, -2
"""Values of `Spec.segment` for which the size of a fused rollout decides: activations are kept up to a bound,
or never.
"""


class LossWeights(NamedTuple):
    """Weights of the system's own loss, before the division by the number of worlds."""

    final: float
    """Of the cost of x_T."""
    running: float
    """Of the cost of each of x_1 ... x_T."""
    control: float
    """Of the mean squared control."""

    def check(self, has_loss: bool) -> None:
        """Raises ValueError if a system without a loss of its own is asked for it."""
        if not has_loss and (self.final or self.running):
            raise ValueError(
                "loss: this system has no loss of its own; pass a callable of (states, controls) or None"
            )

    def per_world(self, nworld: int, horizon: int, control_size: int) -> tuple[float, float, float]:
        """Factors on the per-world sums that the kernels take."""
        return self.final / nworld, self.running / nworld, self.control / (nworld * horizon * control_size)

    def arguments(self, nworld: int, horizon: int, control_size: int) -> dict[str, float]:
        """The same by their names in the kernels."""
        names = ("w_final", "w_running", "w_control")
        return dict(zip(names, self.per_world(nworld, horizon, control_size)))


class Spec(NamedTuple):
    """Everything that describes a rollout and is not a tensor."""

    system: int
    """Number of the system, see registry.py."""
    base: str
    """One flow letter for each step t, for the edges that leave x_t."""
    check: str = ""
    """The same for the second field of a combined gradient; empty if there is one field."""
    decay: float = 1.0
    """Factor on what crosses a physics edge."""
    final: float = 0.0
    running: float = 0.0
    control: float = 0.0
    """Loss weights, see `LossWeights`."""
    segment: int = 0
    """Steps whose activations the backward pass recomputes together. 0 if activations are kept or, on the
    torch path, if all steps are taken at once. Or BY_SIZE or NONE_KEPT.
    """
    clip: float = math.inf
    """Largest norm of the cotangent that a step pulls back, in every world."""

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

    def arguments(self) -> tuple[int, str, float, float, float, float, int, float]:
        """Returns the description as arguments of a torch operator, which takes no objects; `described`
        reverses this.

        Numbers stay numbers, because a graph that is compiled for several values makes symbols of them.
        """
        flows = f"{self.base} {self.check}"
        final, running, control = self.weights
        return self.system, flows, self.decay, final, running, control, self.segment, self.clip


def described(
    system: int,
    flows: str,
    decay: float,
    final: float,
    running: float,
    control: float,
    segment: int,
    clip: float,
) -> Spec:
    """Returns the description from the arguments that `Spec.arguments` gave."""
    base, check = flows.split(" ")
    return Spec(system, base, check, decay, final, running, control, segment, clip)


class Saved(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    states: torch.Tensor
    """(horizon + 1, nworld, state_size); for an ensemble (members, nworld) replaces nworld, here and below.
    """
    controls: torch.Tensor
    """(horizon, nworld, control_size)."""
    kept: tuple[torch.Tensor, ...] = ()
    """Further tensors that only the path reads."""


class Cotangents(NamedTuple):
    """Cotangents of a rollout's outputs; None where nothing arrived."""

    loss: torch.Tensor | None
    states: torch.Tensor | None
    controls: torch.Tensor | None

    def dense(self) -> Cotangents:
        """The same in contiguous memory, without lazy negation."""
        return Cotangents(*(None if t is None else t.resolve_neg().contiguous() for t in self))

    def steps(self, t0: int, t1: int) -> Cotangents:
        """Those of the steps t0 ... t1 - 1 and of the state after them."""
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


# Segments

STORED_BYTES = {"cpu": 1 << 30, "cuda": 1 << 32}
"""Bytes of activations up to which a rollout keeps them, by device."""
SEGMENT_BYTES = {"cpu": 1 << 20, "cuda": 1 << 30}
"""Bytes of activations that are recomputed together, at least one step: on a CPU those of a thread, which
then stay in cache; on a GPU those of all worlds.
"""
POINT_ELEMENTS = 1 << 25
"""Estimated elements that a policy on the torch path may hold at once."""

CACHED_ROWS = 1 << 12
"""Rows that a policy on the torch path takes at once on a CPU. With more rows, the pages of fresh memory cost
as much as the arithmetic (twice as long for 25 600 rows of 2 x 100 units).
"""
MANY_WORLDS = 192
"""Number of worlds from which the backward pass of such a policy takes steps one by one on a CPU. Autograd's
cost for a step is then less than that of a second evaluation and a second pull.
"""
RECORDED = 3
"""About how many tensors autograd keeps of a layer: before a norm, before and after an activation."""


def blocks_of(nworld: int) -> int:
    """World blocks of `nworld` worlds of one policy."""
    return (nworld + BLOCK - 1) // BLOCK


def hidden_shape(x0: torch.Tensor, horizon: int, row: int, segment: int) -> tuple[int, ...]:
    """Shape of the stored activations, (blocks * horizon * BLOCK, row), with a member axis before it for an
    ensemble. It has no rows if the activations are recomputed.
    """
    blocks = 0 if segment else blocks_of(x0.shape[-2])
    return (*x0.shape[:-2], blocks * horizon * BLOCK, row)


def pieces(horizon: int, segment: int) -> list[tuple[int, int]]:
    """First and last step (exclusive) of the segments, in the order of the backward pass."""
    return [(t, min(t + segment, horizon)) for t in range(0, horizon, segment)][::-1]


def fused_segment(network: str, x0: torch.Tensor, horizon: int, keep: bool = True) -> int:
    """Steps of a segment of a fused rollout; 0 if all activations are kept. Without `keep` they never are."""
    size, device = x0.element_size(), x0.device.type
    blocks = x0.shape[:-2].numel() * blocks_of(x0.shape[-2])
    step = BLOCK * layout(network, size).row * size
    if keep and blocks * step * horizon <= STORED_BYTES[device]:
        return 0
    if device == "cpu":
        return cpu_steps(step, horizon)
    return _even(horizon, SEGMENT_BYTES[device] // (max(blocks, 1) * step))


def with_segment(spec: Spec, network: str, x0: torch.Tensor) -> Spec:
    """Returns the description of a fused rollout; if its segment depends on the size, with that segment."""
    if spec.segment >= 0:
        return spec
    return spec._replace(segment=fused_segment(network, x0, spec.horizon, spec.segment == BY_SIZE))


def cpu_steps(step: int, horizon: int, whole: int = 0) -> int:
    """Steps of a segment on a CPU, of `step` bytes each; all steps if they take at most `whole` bytes."""
    return horizon if step * horizon <= whole else _even(horizon, SEGMENT_BYTES["cpu"] // step)


def torch_segment(
    parameters: Sequence[torch.Tensor], x0: torch.Tensor, control_size: int, jacobians: bool, horizon: int
) -> int:
    """Steps of a segment of a rollout whose policy torch evaluates.

    The memory that a policy takes for a row is estimated: its inputs and outputs, a unit for every row of a
    weight or entry of a bias, and the Jacobian.
    """
    state_size = x0.shape[-1]
    row = state_size + control_size + sum(q.shape[0] for q in parameters if q.ndim)
    if jacobians:
        row += control_size * state_size
    return _even(horizon, POINT_ELEMENTS // (max(x0.shape[-2], 1) * row))


def recordings_bytes(parameters: Sequence[torch.Tensor], x0: torch.Tensor, horizon: int) -> int:
    """Estimated bytes of autograd's recordings of all forward steps."""
    row = RECORDED * sum(q.shape[0] for q in parameters if q.ndim > 1)
    return horizon * x0.shape[0] * row * x0.element_size()


def _even(horizon: int, most: int) -> int:
    """The shortest segment that needs no more segments than one of `most` steps."""
    count = -(-horizon // max(1, min(most, horizon)))
    return -(-horizon // count)

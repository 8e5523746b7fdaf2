"""What `warp-sims bench` measures: one training update of a problem, its numbers and its truth.

`gradient_pair` computes the truth in float64 on the CPU. Ours in float32 must agree with it, and so must
every peer; peers share no code with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from ..gradients import GradientPair, gradient_pair
from ..kernels.policy.layout import layout
from ..named import own_policy, perceptron_options
from ..options import HIDDEN, Preset, preset_of
from ..policies.networks import MLP, WaveCNN, fused_network
from ..profiling import work
from ..profiling.work import Problem
from ..systems import System, resolve

FLOWS = {"R": "regular", "M": "modified", "C": "combined"}
PUBLISHED = ("cartpole", "guidance", "quantum")
"""Problems that are measured where none is named, and that the peers of the repository know."""

COUNTS = ("poles", "drivers", "evaders", "points")
"""Numbers of a system that a peer reads off the sizes of its arrays."""

# Of a float32 gradient, its error over the norm of the float64 one. Rounding over 60 or 100 steps gives 1e-6
# (measured); systems that amplify it say so in their bench_defaults.
TOLERANCE = 2e-5

# Components below this share of their array's size have no sign in float32; C may then keep or drop them.
UNDECIDED = 1e-3

_REFERENCE_WORLDS = 1024
"""Worlds of the float64 reference at a time: its memory stays bounded."""

CHANNELS = 60
"""Of a `WaveCNN`, unless widths are given."""


class Benched(NamedTuple):
    """How a system is measured, see `System.bench_defaults`."""

    numbers: Mapping[str, Any] = MappingProxyType({})
    scaled: tuple[str, tuple[int, ...]] = ("", ())
    tolerance: float = TOLERANCE
    last_layer: float = 1.0


@functools.cache
def benched(problem: str) -> Benched:
    """Returns how the named system is measured.

    Raises:
        ValueError: there is no such system, or its `bench_defaults` has something that is none.
    """
    given = resolve(problem).bench_defaults
    for name in given:
        if name not in Benched._fields:
            raise ValueError(
                f"system {problem!r}: bench_defaults has {name!r}, expected some of "
                f"{', '.join(Benched._fields)}"
            )
    return Benched(**given)


@dataclasses.dataclass(frozen=True)
class Case:
    """One training update: forward, backward, comparison for C, Adam; in float32 unless said otherwise.

    Attributes:
        problem: Name of a system, or `module:Class`.
        flow: R, M or C.
        batch: Number of worlds.
        device: As torch names it, `cpu` or `cuda`.
        widths: Hidden layers; for quantum the channels of both convolutions, which are equal.
        horizon: Number of steps.
        size: Poles or grid points where they are not the published ones, else 0.
        kind: Policy where it is not the published one: `mlp:elu+layernorm` and the like with these widths, or
            `module:name`.
    """

    problem: str
    flow: str
    batch: int
    device: str = "cpu"
    widths: tuple[int, ...] = ()
    horizon: int = 0
    size: int = 0
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.widths:
            object.__setattr__(self, "widths", published_widths(self.problem))
        if not self.horizon:
            object.__setattr__(self, "horizon", self.preset.horizon)

    @property
    def preset(self) -> Preset:
        """The horizon and loss that the system is trained with."""
        return preset_of(self.problem)

    @property
    def system(self) -> System:
        """The simulated system."""
        own = benched(self.problem)
        changed = {own.scaled[0]: self.size} if self.size else {}
        return resolve(self.problem)(**{**own.numbers, **changed})

    @property
    def network(self) -> str:
        """The policy as it is written in tables."""
        return network_name(self.widths, self.kind)

    def policy(self) -> torch.nn.Module:
        """The controller, Glorot-uniform with a fixed seed: with the published zero output layers M is R."""
        system = self.system
        if self.kind and not is_perceptron(self.kind):
            torch.manual_seed(1)
            return own_policy(self.kind, system)
        own: dict[str, Any] = perceptron_options(self.kind)
        policy = (
            WaveCNN(system.state_size // 2, self.widths[0])
            if self.convolutional
            else MLP(system.state_size, self.widths, system.control_size, **own)
        )
        policy.reset_parameters(seed=1)
        with torch.no_grad():
            list(policy.parameters())[-2].mul_(benched(self.problem).last_layer)
        return policy

    @property
    def convolutional(self) -> bool:
        """Whether the policy is a `WaveCNN`."""
        return not self.kind and self.preset.policy == "wavecnn"

    def peer_arguments(self) -> dict[str, Any]:
        """What a peer is built from: numbers and numpy arrays, no object of this package."""
        system = self.system
        own: dict[str, Any] = {}
        if is_perceptron(self.kind):
            own = {"policy": self.kind.partition(":")[2]}
        elif self.kind:
            own = {"policy": self.policy()}
        return own | {
            "problem": self.problem,
            "system": {k: v for k, v in dataclasses.asdict(system).items() if k not in COUNTS},
            "widths": self.widths,
            "x0": system.initial_states(self.batch).numpy(),
            "weights": [p.detach().numpy() for p in self.policy().parameters()],
            "horizon": self.horizon,
            "flow": self.flow,
            "loss": self.preset.loss,
            "control_cost": self.preset.control_cost,
            "device": self.device,
        }

    def rollout_options(self) -> dict[str, Any]:
        """The options of `rollout` and `gradient_pair`."""
        return {
            "horizon": self.horizon,
            "loss": self.preset.loss,
            "control_cost": self.preset.control_cost,
        }


def is_perceptron(kind: str) -> bool:
    """Whether a kind of policy is an `MLP` with options."""
    return kind.partition(":")[0] == "mlp"


def network_name(widths: Sequence[int], kind: str) -> str:
    """Hidden layers, and what the policy is besides, as they are written in tables."""
    sizes = "x".join(map(str, widths))
    if not kind:
        return sizes
    return f"{sizes} {kind.partition(':')[2] or 'tanh'}" if is_perceptron(kind) else kind


def published_widths(problem: str) -> tuple[int, ...]:
    """Hidden layers of the published controllers, or channels of both convolutions."""
    return (CHANNELS, CHANNELS) if preset_of(problem).policy == "wavecnn" else HIDDEN


# Truth


class Reference(NamedTuple):
    """Loss, and the gradients of M and R by parameter, in float64."""

    loss: float
    base: list[np.ndarray]
    check: list[np.ndarray]


class Errors(NamedTuple):
    """Relative errors; infinite where a value is not finite, and where C decided otherwise."""

    loss: float
    gradient: float

    def within(self, case: Case) -> bool:
        """Whether the contestant computes the same numbers."""
        tolerance = benched(case.problem).tolerance
        return max(self) <= tolerance * max(1.0, case.horizon / case.preset.horizon)


@functools.lru_cache(maxsize=1)  # the rows of all flows follow one another
def _reference(case: Case) -> Reference:
    policy = case.policy().double()
    pair: GradientPair | None = None
    for x0 in case.system.initial_states(case.batch, dtype=torch.float64).split(_REFERENCE_WORLDS):
        part = gradient_pair(case.system, policy, x0, **case.rollout_options())
        pair = part if pair is None else pair + part
    assert pair is not None  # a case has at least one world
    base, check = ([gradient.numpy() for gradient in side.values()] for side in (pair.base, pair.check))
    return Reference(pair.loss.item(), base, check)


def reference(case: Case) -> Reference:
    """Loss and gradients of a case in float64, whatever its flow and device."""
    return _reference(dataclasses.replace(case, flow="R", device="cpu"))


def errors(case: Case, loss: float, gradients: Sequence[np.ndarray], truth: Reference) -> Errors:
    """Compares the loss and the gradients of a contestant with the truth."""
    found = abs(loss - truth.loss) / abs(truth.loss)
    return Errors(found if math.isfinite(found) else math.inf, gradient_error(gradients, case.flow, truth))


def gradient_error(found: Sequence[np.ndarray], flow: str, truth: Reference) -> float:
    """Relative error of a gradient.

    Where a component of M or R is too small to have a sign in float32, C may hold M or 0. All other decisions
    are checked one by one, because few and small components differ between M and C.
    """
    error = size = 0.0
    for g, m, r in zip(found, truth.base, truth.check, strict=True):
        if g.shape != m.shape:
            return math.inf
        if flow == "C":
            expected = np.where(np.sign(m) == np.sign(r), m, 0.0)
            decided = (abs(m) > UNDECIDED * _rms(m)) & (abs(r) > UNDECIDED * _rms(r))
            if np.any(decided & ((g == 0.0) != (expected == 0.0))):
                return math.inf
            difference = np.where(decided, g - expected, np.minimum(abs(g), abs(g - m)))
        else:
            expected = m if flow == "M" else r
            difference = g - expected
        error += float((difference**2).sum())
        size += float((expected**2).sum())
    ratio = (error / size) ** 0.5
    return ratio if math.isfinite(ratio) else math.inf


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt((array**2).mean()))


# Work


def needed_operations(case: Case) -> int:
    """Floating-point operations of an update that the mathematics needs; recomputation is not counted.

    Those of the network's matrix products, a multiplication and an addition two: one forward evaluation, one
    product of activations and cotangents per gradient field (C has two), and cotangents pulled back through
    the layers, to the states too where the network edge is open. A field's cotangents of all units are linear
    in the controls' ones: no more are pulled than there are controls. The simulator, activation functions and
    Adam are left out, so that a share of the ceiling is never flattered. 0 of a policy that torch evaluates.
    """
    policy, system = case.policy(), case.system
    network = fused_network(policy, system.state_size)
    if network is None:
        return 0
    problem = Problem(
        case.batch,
        case.horizon,
        system.state_size,
        system.control_size,
        4,
        layout(network.description, 4),
        sum(p.numel() for p in policy.parameters()),
    )
    base, check = ("M", "R") if case.flow == "C" else (case.flow, "")
    return sum(work.needed_operations(problem, base, check) or ())


def needed_bytes(case: Case) -> int:
    """Bytes of a stored trajectory, written once and read once: states, controls, activations in float32."""
    system = case.system
    if case.convolutional:
        first, second = _positions(system.state_size // 2)
        hidden = case.widths[0] * first + case.widths[1] * second
    else:
        hidden = sum(case.widths)
    return 2 * 4 * case.batch * case.horizon * (system.state_size + system.control_size + hidden)


def _positions(points: int) -> tuple[int, int]:
    """Output positions of both convolutions: windows of three, stride two."""
    first = (points - 3) // 2 + 1
    return first, (first - 3) // 2 + 1

"""Rollouts on both roads: what a GPU would launch, emulated, and what a CPU launches."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from cases import make_cotangents, make_net, make_states
from composed_nets import convolved, everything, with_norms
from own_systems import Pendulum, Unicycle
from torch import Tensor
from warp_sims.bridge.passes import fused, fused_backward, sweeps
from warp_sims.bridge.passes.spec import Cotangents, LossWeights, Spec
from warp_sims.bridge.runtime import registry
from warp_sims.bridge.runtime.launches import Pool

import warp_sims as ws
from warp_sims.policies.networks import fused_network

from .device import CPU, ORDERS, Emulator

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
"""Relative to the norm of each tensor. Sums are taken in another order, tanh is another function, and
up to 100 steps amplify both."""

WEIGHTS = LossWeights(1.0, 0.5, 0.1)
NO_COST = LossWeights(0.0, 0.0, 0.1)


def _wavecnn(system: ws.QuantumControl, channels: int) -> ws.WaveCNN:
    net = ws.WaveCNN(system.points, channels)
    net.reset_parameters(seed=3)
    return net


def _mlp(*widths: int, gain: float = 1.0) -> Callable[[ws.System, int], torch.nn.Module]:
    return lambda system, seed: make_net(system, widths, seed=seed, gain=gain)


def _composed(make: Callable[..., torch.nn.Module]) -> Callable[[ws.System, int], torch.nn.Module]:
    return lambda system, seed: make(system.state_size, system.control_size, seed)


class Problem(NamedTuple):
    """A system and how its policy is made."""

    system: ws.System
    policy: Callable[[ws.System, int], torch.nn.Module]
    """Of a system and a seed."""


PROBLEMS = {
    "cartpole": Problem(ws.CartPole(poles=4), _mlp(100, 100)),
    "odd widths": Problem(ws.CartPole(poles=1), _mlp(33, 20, 7)),
    "wide": Problem(ws.CartPole(poles=2), _mlp(300)),
    "linear": Problem(ws.CartPole(poles=2), _mlp()),
    "guidance": Problem(ws.GuidanceByRepulsion(2, 4), _mlp(50)),
    "large herd": Problem(ws.GuidanceByRepulsion(3, 7), _mlp(24, 9)),
    "quantum": Problem(ws.QuantumControl(points=32), lambda s, seed: _wavecnn(s, 60)),
    "odd points": Problem(ws.QuantumControl(points=17), lambda s, seed: _wavecnn(s, 7)),
    "quantum, perceptron": Problem(ws.QuantumControl(points=9), _mlp(13)),
    "hopper": Problem(ws.Hopper(substeps=4), _mlp(16)),
    "links": Problem(ws.LinkedPendulum(links=2), _mlp(9, 7)),
    "composed": Problem(ws.CartPole(poles=2), _composed(with_norms)),
    "everything composed": Problem(ws.CartPole(poles=1), _composed(everything)),
    "composed herd": Problem(ws.GuidanceByRepulsion(2, 4), _composed(everything)),
    "convolutions": Problem(ws.CartPole(poles=2), _composed(convolved)),
    "convolved herd": Problem(ws.GuidanceByRepulsion(2, 4), _composed(convolved)),
    "own system": Problem(Pendulum(), _mlp(21)),
    "own system, no loss": Problem(Unicycle(), _mlp(5, 40)),
}

FORMS = ("as chosen", "worlds share a block", "any network")
"""Forward sweeps: what `choose_plan` gives (up to 256 worlds a world a block), that of many worlds, and the
one for networks that do not fit the registers."""


@contextlib.contextmanager
def fresh_launches() -> Iterator[pytest.MonkeyPatch]:
    """Forgets prepared launches, which know neither the form of a sweep nor changes of its text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_rollout", Pool(fused._Rollout))
        for name in ("_Simulate", "_Loss", "_Adjoint", "_Combine"):
            patch.setattr(sweeps, name.lower(), Pool(getattr(sweeps, name)))
        yield patch


@contextlib.contextmanager
def form_of_sweep(form: str) -> Iterator[None]:
    """Lets rollouts take one of `FORMS`."""
    choose = fused.choose_plan
    plans = {
        FORMS[0]: choose,
        FORMS[1]: lambda network, itemsize, nworld: choose(network, itemsize, 4096),
        FORMS[2]: lambda *_: None,
    }
    with fresh_launches() as patch:
        patch.setattr(fused, "choose_plan", plans[form])
        # what is not written shows
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


class Case:
    """A problem at one size."""

    def __init__(
        self, problem: str | Problem, dtype: torch.dtype, nworld: int = 5, horizon: int = 3, members: int = 0
    ) -> None:
        self.horizon = horizon
        self.system, make = PROBLEMS[problem] if isinstance(problem, str) else problem
        nets = [make(self.system, seed).to(dtype) for seed in range(max(members, 1))]
        found = [fused_network(net, self.system.state_size) for net in nets]
        self.network = found[0].description
        each = [[*f.parameters.values(), *f.constants] for f in found]
        parameters = [torch.stack(p) if members else p[0] for p in zip(*each)]
        self.packed = fused.pack(self.network, parameters, (members,) if members else ())
        scale = 0.5 if isinstance(self.system, ws.QuantumControl) else 1.0
        count = max(members, 1) * nworld
        x0 = scale * make_states(self.system, count, dtype)
        if isinstance(self.system, ws.Hopper):  # random joints would be far beyond their limits
            x0 = self.system.initial_states(count, dtype=dtype) + 0.05 * x0
        self.x0 = x0.view(*((members, nworld) if members else (nworld,)), -1)
        self.dtype = dtype
        self.has_cost = self.system.device_functions(registry.WARP_DTYPE[dtype]).loss is not None

    @property
    def weights(self) -> LossWeights:
        return WEIGHTS if self.has_cost else NO_COST

    def cotangents(self) -> Cotangents:
        """Standard normal ones of everything that a rollout returns."""
        draw = torch.Generator().manual_seed(7)
        rows, world = self.x0.shape[:-1], (self.horizon, *self.x0.shape[:-1])
        shapes = rows[:-1], (self.horizon + 1, *self.x0.shape), (*world, self.system.control_size)
        return Cotangents(
            *(torch.randn(s, generator=draw, dtype=torch.float64).to(self.dtype) for s in shapes)
        )

    def run(self, base: str = "R", check: str = "M", decay: float = 0.9, segment: int = 0) -> list[Tensor]:
        """States, controls, loss, activations, gradients and cotangents of x0, on what stands for the CPU.

        `base` and `check` are flows, or schedules of as many steps as the rollout has.
        """
        p = registry.prepare(registry.register(self.system), self.dtype, CPU)
        schedules = (f if len(f) == self.horizon else f * self.horizon for f in (base, check))
        spec = Spec(0, *schedules, decay, *self.weights, segment)
        found = fused.rollout(p, self.network, self.packed, self.x0, self.horizon, self.weights, segment)
        states, controls, loss, hidden = found
        grads, adj_x0 = fused_backward.backward(
            p, spec, self.network, self.packed, hidden, states, controls, self.cotangents()
        )
        return [states, controls, loss, hidden, grads, adj_x0]


def open_loop(
    p: registry.Prepared, system: ws.System, nworld: int, horizon: int, check: str, outside: bool
) -> list[Tensor]:
    """States, loss, cotangents of the controls and of x0 of a rollout under given controls.

    With a `check` the adjoint sweep has two fields; `outside`: cotangents of states and controls, too.
    """
    dtype = p.torch_dtype
    draw = torch.Generator().manual_seed(5)
    controls = torch.randn(horizon, nworld, system.control_size, generator=draw, dtype=torch.float64).to(
        dtype
    )
    jac = 0.1 * torch.randn(*controls.shape, system.state_size, generator=draw, dtype=torch.float64).to(dtype)
    states = sweeps.simulate(p, 0.5 * make_states(system, nworld, dtype), controls)
    weights = LossWeights(0.7, 0.3, 0.2) if p.functions.loss else LossWeights(0.0, 0.0, 0.2)
    c = make_cotangents(system, horizon, nworld, dtype)
    g = Cotangents(c.loss, *((c.states, c.controls) if outside else (None, None)))
    spec = Spec(0, ("RMNS" * horizon)[:horizon], check and ("SRMN" * horizon)[:horizon], 0.9, *weights)
    mu, adj_x0 = sweeps.adjoint(p, spec, states, controls, jac, g)
    return [states, sweeps.loss(p, states, controls, weights), mu, adj_x0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to that of what is expected."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / (torch.linalg.vector_norm(expected.double()) or 1.0))


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of states, controls, loss, gradients and cotangents of x0; activations lie in memory in other orders of
    rows than their own only in paddings, and are left out."""
    pairs = enumerate(zip(found, expected, strict=True))
    return [relative_error(a, b) for i, (a, b) in pairs if i != 3]


def assert_as_on_a_cpu(found: list[Tensor], expected: list[Tensor]) -> None:
    """Within `TOLERANCE`, and without a NaN among the activations that nothing else shows."""
    errors = relative_errors(found, expected)
    assert max(errors) <= TOLERANCE[found[0].dtype], errors
    assert torch.isfinite(found[3]).all()


def in_every_order(emulator: Emulator, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `run` gives, after it has given the same bits in all orders of lanes."""
    first = None
    for name, emulator.order in ORDERS.items():
        found = run()
        assert first is None or all(map(torch.equal, found, first)), f"{name} order of lanes"
        first = first or found
    emulator.order = 0
    return first

"""Compares Warp's generated adjoints of the same forward pass with the hand-written ones: time and error."""

import copy
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import warp as wp
from torch import Tensor, nn

from ..bridge.runtime.arrays import stream
from ..bridge.runtime.registry import prepare
from ..kernels.sweeps.generated import MAX_UNROLL, make_generated_kernels
from ..rollouts import rollout, simulate
from ..systems import System
from .ceilings import wait
from .result import AgainstRow, spread
from .verdict import GeneratedStep, array_of, decide

__all__ = ["compare_with_generated"]


class _Way(NamedTuple):
    """One way to a gradient: `forward` returns the call that runs backward, and that the gradient, flat."""

    what: str
    name: str
    launches: int | None
    forward: Callable[[], Callable[[], Tensor]]


def compare_with_generated(
    system: System, policy: nn.Module, x0: Tensor, horizon: int, repeats: int
) -> tuple[list[AgainstRow], list[str]]:
    """Times hand-written and generated adjoints, and measures the errors of both. Finite differences decide
    which of them is the reference.

    The gradients are those of a fixed random combination of all states. In open loop they are by the controls
    and x0, with the policy by its parameters (flow R, the only flow that a generated adjoint has).

    Returns:
        The rows, and what is to be said about them.
    """
    draw = torch.Generator().manual_seed(0)
    shape = (horizon, x0.shape[0], system.control_size)
    controls = torch.randn(shape, generator=draw, dtype=torch.float64).to(x0)
    weights = torch.randn((horizon + 1, *x0.shape), generator=draw, dtype=torch.float64).to(x0)
    ways = [
        *_open_loop(system, x0, controls, weights),
        *_closed_loop(system, policy, x0, horizon, weights),
    ]
    double = [t.double() for t in (x0, controls, weights)]
    wide = copy.deepcopy(policy).double()
    verdict = decide(system, x0.device)
    right = [
        *_open_loop(system, *double),
        *_closed_loop(system, wide, double[0], horizon, double[2]),
    ]
    # the first way of each kind is by hand, the second a step at a time by the generated adjoint
    exact = {}
    for what in ("simulate", "rollout"):
        known = [way for way in right if way.what == what]
        exact[what] = known[0 if verdict.trusted == "hand-written" else 1].forward()()
    times = {way: ([], []) for way in ways}
    errors = {}
    for way in ways:
        gradient = way.forward()()  # compiles
        errors[way] = _error(gradient, exact[way.what])
    for i in range(repeats):
        for way in [*ways[i % len(ways) :], *ways[: i % len(ways)]]:
            for kept, seconds in zip(times[way], _time(way, x0.device), strict=True):
                kept.append(seconds)
    rows = [
        AgainstRow(way.what, way.name, spread(forward), spread(backward), way.launches, errors[way])
        for way, (forward, backward) in times.items()
    ]
    return rows, [
        *verdict.notes(),
        f"errors are relative to the {verdict.trusted} adjoints in float64; of generated ones, loops of up "
        f"to {MAX_UNROLL} turns are unrolled",
    ]


def _time(way: _Way, device: torch.device) -> tuple[float, float]:
    wait(device)
    start = time.perf_counter()
    backward = way.forward()
    wait(device)
    between = time.perf_counter()
    backward()
    wait(device)
    return between - start, time.perf_counter() - between


def _error(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.double() - expected)
    return float(difference / torch.linalg.vector_norm(expected))


# Open loop


def _by_hand(system: System, x0: Tensor, controls: Tensor, weights: Tensor) -> _Way:
    leaves = [x0.detach().requires_grad_(), controls.detach().requires_grad_()]

    def forward() -> Callable[[], Tensor]:
        states = simulate(system, leaves[0], leaves[1])
        return lambda: _flat(torch.autograd.grad(states, leaves, weights))

    return _Way("simulate", "hand-written", 1, forward)


def _open_loop(system: System, x0: Tensor, controls: Tensor, weights: Tensor) -> list[_Way]:
    p = prepare(system.number, x0.dtype, x0.device)
    kernels = make_generated_kernels(p.functions)
    horizon, nworld = controls.shape[:2]
    states = torch.empty_like(weights)
    states[0] = x0
    adjoints = torch.empty_like(weights), torch.empty_like(controls)
    x, adj_x = (array_of(t, p.functions.State) for t in (states, adjoints[0]))
    u, adj_u = (array_of(t, p.functions.Control) for t in (controls, adjoints[1]))
    x.grad, u.grad = adj_x, adj_u

    def seed() -> None:
        adjoints[0].copy_(weights)
        adjoints[1].zero_()

    def gradient() -> Tensor:
        return _flat([adjoints[0][0], adjoints[1]])

    def step_by_step() -> Callable[[], Tensor]:
        with stream(x0.device), wp.Tape() as tape:
            for t in range(horizon):
                wp.launch(
                    kernels.step, nworld, inputs=[x[t], u[t], p.params], outputs=[x[t + 1]], device=p.device
                )
        return lambda: backward(tape)

    def at_once() -> Callable[[], Tensor]:
        with stream(x0.device), wp.Tape() as tape:
            wp.launch(kernels.simulate, nworld, inputs=[u, p.params, horizon], outputs=[x], device=p.device)
        return lambda: backward(tape)

    def backward(tape: wp.Tape) -> Tensor:
        seed()
        with stream(x0.device):
            tape.backward()
        return gradient()

    return [
        _by_hand(system, x0, controls, weights),
        _Way("simulate", "generated, a tape step by step", horizon, step_by_step),
        _Way("simulate", "generated, one launch", 1, at_once),
    ]


# With the policy


def _policy_by_hand(system: System, policy: nn.Module, x0: Tensor, horizon: int, weights: Tensor) -> _Way:
    parameters = list(policy.parameters())

    def forward() -> Callable[[], Tensor]:
        out = rollout(system, policy, x0, horizon=horizon, flow="R", loss=None)
        return lambda: _flat(torch.autograd.grad(out.states, parameters, weights))

    return _Way("rollout", "hand-written", None, forward)


def _closed_loop(system: System, policy: nn.Module, x0: Tensor, horizon: int, weights: Tensor) -> list[_Way]:
    p = prepare(system.number, x0.dtype, x0.device)
    parameters = list(policy.parameters())

    def forward() -> Callable[[], Tensor]:
        x, states = x0, [x0]
        for _ in range(horizon):
            x = GeneratedStep.apply(x, policy(x), p)
            states.append(x)
        all_states = torch.stack(states)
        return lambda: _flat(torch.autograd.grad(all_states, parameters, weights))

    return [
        _policy_by_hand(system, policy, x0, horizon, weights),
        _Way("rollout", "generated step, policy by torch", None, forward),
    ]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])

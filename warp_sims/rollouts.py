"""Rollouts as torch operations: the public calls and what they return."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bridge.autograd import rollout as _bridge
from .bridge.autograd.episodes import EpisodePath, Trajectory
from .bridge.autograd.episodes import Resets as EpisodeResets
from .bridge.autograd.torch_path import TorchPath
from .bridge.runtime import arrays
from .bridge.runtime.compat import transforming
from .episodes import Resets, checked_resets
from .estimators import PerSecond
from .kernels.flow import Flow, schedule
from .plans import (
    Loss,
    Plan,
    check_horizon,
    check_like,
    check_states,
    check_system,
    custom_loss_value,
    make_plan,
)
from .systems import System
from .systems.parameters import Parameters, check_parameters
from .systems.repeated import repeat
from .training.divergence import check_rollout

__all__ = ["Rollout", "empty_cache", "rollout", "simulate", "step"]


class Rollout(NamedTuple):
    """What a rollout gives: trajectories and loss, all differentiable under the flow that was asked for."""

    states: Tensor
    """(horizon + 1, nworld, state_size), (horizon + 1, members, nworld, state_size) of an `Ensemble`;
    states[0] is x0.
    """
    controls: Tensor
    """(horizon, nworld, control_size), (horizon, members, nworld, control_size) of an `Ensemble`."""
    loss: Tensor | None
    """Scalar, (members,) of an `Ensemble`; None if loss=None."""
    fused: bool
    """Whether the policy ran inside the sweep; False where torch evaluated it."""
    path: str = "fused"
    """How the policy was evaluated: "fused", or "torch: ..." with the reason why it is not."""
    next_states: Tensor | None = None
    """With `resets` the states that the steps led to, (horizon, nworld, state_size); else None, like the
    fields below. If a world ended with step t, states[t + 1] is a fresh state.
    """
    done: Tensor | None = None
    """(horizon, nworld) bool: worlds that ended with the step."""
    truncated: Tensor | None = None
    """(horizon, nworld) bool: worlds that reached the limit of steps."""
    ages: Tensor | None = None
    """(nworld,) int64: steps since each world began, at the end of the rollout."""


def rollout(
    system: System,
    policy: nn.Module,
    x0: Tensor,
    *,
    horizon: int,
    flow: str | Flow | Sequence[str | Flow] = "combined",
    loss: Loss = "final",
    control_cost: float = 0.0,
    window: int | None = None,
    decay: float | PerSecond = 1.0,
    checkpoint_every: int | None = None,
    locate_divergence: bool = False,
    inputs: Tensor | None = None,
    parameters: Parameters = None,
    resets: Resets | None = None,
    clip_cotangent: float | None = None,
    every: int = 1,
) -> Rollout:
    """Unrolls policy and simulator, differentiably, under a gradient flow.

        u_t = policy(x_t),  x_{t+1} = step(x_t, u_t)        t = 0 ... horizon - 1

    Args:
        system: The simulated system.
        policy: Maps states (n, state_size) to controls (n, control_size), row by row and deterministically. A
            module of linear layers, activations, norms and the like runs inside the sweep, see `explain`.
            Torch evaluates any other module, step by step in the forward pass. Every member of a
            `warp_sims.Ensemble` runs as it would alone.
        x0: Initial states (nworld, state_size), float32 or float64, on the device of the simulation. For an
            ensemble (members, nworld, state_size), or (nworld, state_size) for all members.
        horizon: Number of steps, at least 1.
        flow: Which edges the backward pass crosses: "regular", "modified", "network", "stopped", "combined",
            a letter R M N S C, a `Flow`, or a list of one for each step (not combined), whose entry t gates
            both edges that leave x_t.
        loss: "final" or "running" (the system's own), a callable of (states, controls) that returns a scalar
            tensor, or None. Each member of an ensemble has a loss of its own; a callable is called with the
            trajectories of one member after the other.
        control_cost: Weight of the mean squared control, which is added to the loss.
        window: Truncation: closes both edges at t = window, 2 window, ...
        decay: Factor in [0, 1] on what crosses a physics edge; 0 closes the edge. `PerSecond(factor)` is a
            decay in units of time, for systems with a field `dt`.
        checkpoint_every: At least 1. The backward pass recomputes the hidden activations of so many steps at
            once, from the states, which are kept anyway. Memory for activations then grows neither with the
            horizon nor, on a CPU, with the number of worlds. For a fused policy, trajectories and the
            cotangent of x0 stay the same to the last bit; weight gradients are summed in another order. By
            default activations are kept up to 1 GiB (4 GiB on a GPU). Beyond that they are recomputed, in
            segments whose length depends on the size. On the torch path the length of a segment bounds the
            memory of the backward pass; by default it is chosen by size.
        locate_divergence: Raise FloatingPointError if the rollout is not finite. The error names the first
            world and step that are not, and the system's time step. The host reads the last state and the
            loss, and the whole trajectory only if those are not finite.
        inputs: (horizon, nworld, k), dtype and device of x0: a second argument of the policy, as policy(x,
            inputs[t]), such as references, time or noise. Torch evaluates the policy. `inputs` get no
            gradient.
        parameters: Physical parameters by name, `{"pole_mass": mass}`: a float or a tensor () for all worlds,
            or a tensor (nworld,) with one for each world; dtype and device of x0. Numbers that are not named
            are the system's own. The tensors get gradients under the flow; "combined" compares them by
            component. The system's own loss reads the system's own numbers.
        resets: When worlds end and where they begin again, for several episodes in one horizon; see `Resets`.
            Losses then see x0 and `next_states`, the states that the steps led to. Torch evaluates the
            policy.
        clip_cotangent: Largest Euclidean norm of the cotangent that a step pulls back, in every world, for
            both fields of "combined". A longer cotangent is scaled down to it. What is not finite stays so.
        every: Number of simulator steps for which a control is held, see `repeat`. Horizon and states are
            those that the policy sees.

    Returns:
        `Rollout(states, controls, loss, fused, path)`, and more with `resets`. One `backward()` gives the
        gradient of every policy parameter and of x0. The cotangents that arrive in it are summed before
        anything is compared. For "combined" two separate `backward()` calls add two comparisons, and C(a) +
        C(b) is not C(a + b): for micro-batches and processes use `gradient_pair`. For an ensemble,
        `out.loss.sum().backward()` gives each member the gradient it would have alone. If the members share
        x0, its gradient is the sum of theirs, each compared before the sum.

    Initial states are checked for NaN and infinity, except while a CUDA graph is captured. Under autocast a
    fused policy runs in the dtype of x0, and any other as torch runs it. A half-precision x0 becomes float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a value, shape or device that does not fit; the message says which was
            expected.
        FloatingPointError: with `locate_divergence`, a state, a control or the loss is NaN or infinite.
    """
    if every != 1:
        system = repeat(system, every)
    horizon = check_horizon(horizon, "rollout", system, x0)
    base, check = schedule(flow, horizon, window)
    plan = make_plan(
        "rollout",
        system,
        policy,
        x0,
        horizon,
        base,
        check,
        decay,
        loss,
        control_cost,
        checkpoint_every,
        keep=_differentiated(),
        inputs=inputs,
        physics=parameters,
        stepwise=resets is not None,
        clip=clip_cotangent,
    )
    if resets is not None:
        return _with_episodes(plan, system, checked_resets("rollout", system, plan.x0, horizon, resets))
    states, controls, value, *_ = _bridge.rollout(plan.x0, plan.spec, plan.path, *plan.parameters)
    if plan.custom_loss is not None:
        value = custom_loss_value("rollout", plan, states, controls) + value
    if locate_divergence:
        check_rollout(system, states, controls, value if plan.has_loss else None)
    path = "fused" if plan.fused else f"torch: {plan.reason}"
    return Rollout(states, controls, value if plan.has_loss else None, plan.fused, path)


def _with_episodes(plan: Plan, system: System, resets: EpisodeResets) -> Rollout:
    assert isinstance(plan.path, TorchPath)
    path = EpisodePath(plan.path, resets)
    found = Trajectory(*_bridge.rollout(plan.x0, plan.spec, path, *plan.parameters))
    value: Tensor | None = found.loss
    if plan.custom_loss is not None:
        whole = torch.cat((found.states[:1], found.next_states))
        value = custom_loss_value("rollout", plan, whole, found.controls) + found.loss
    return Rollout(
        found.states,
        found.controls,
        value if plan.has_loss else None,
        False,
        f"torch: {plan.reason}",
        found.next_states,
        found.done,
        found.truncated,
        found.ages,
    )


def simulate(system: System, x0: Tensor, controls: Tensor, *, parameters: Parameters = None) -> Tensor:
    """Simulates under given controls (open loop), differentiable in x0, controls and physical parameters.

    Args:
        system: The simulated system.
        x0: Initial states (nworld, state_size), float32 or float64.
        controls: (horizon, nworld, control_size), dtype and device of x0.
        parameters: As in `rollout`.

    Returns:
        States (horizon + 1, nworld, state_size), the first of them x0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """
    check_system(system, "simulate")
    x0 = check_states(system, x0, "simulate", "x0")
    if not isinstance(controls, Tensor):
        raise TypeError(f"simulate: controls is of type {type(controls).__name__}, expected a tensor")
    if (
        controls.ndim != 3
        or controls.shape[0] < 1
        or tuple(controls.shape[1:]) != (x0.shape[0], system.control_size)
    ):
        raise ValueError(
            f"simulate: controls has shape {tuple(controls.shape)}, expected (horizon, nworld, control_size) "
            f"= "
            f"(at least 1, {x0.shape[0]}, {system.control_size}), time first"
        )
    check_like(controls, x0, "simulate", "controls")
    return _simulated("simulate", system, x0, controls, parameters)


def _simulated(call: str, system: System, x0: Tensor, controls: Tensor, parameters: Parameters) -> Tensor:
    if parameters is None:
        return _bridge.simulate(x0, controls, system.number)
    physical, given = check_parameters(call, system, parameters, x0)
    return _bridge.simulate(x0, controls, system.number, physical, *given)


def step(system: System, x: Tensor, u: Tensor, *, parameters: Parameters = None) -> Tensor:
    """One time step, differentiable in state, control and physical parameters.

    Args:
        system: The simulated system.
        x: States (nworld, state_size), float32 or float64.
        u: Controls (nworld, control_size), dtype and device of x.
        parameters: As in `rollout`.

    Returns:
        Next states (nworld, state_size).

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """
    check_system(system, "step")
    x = check_states(system, x, "step", "x")
    if not isinstance(u, Tensor):
        raise TypeError(f"step: u is of type {type(u).__name__}, expected a tensor")
    if tuple(u.shape) != (x.shape[0], system.control_size):
        raise ValueError(
            f"step: u has shape {tuple(u.shape)}, expected (nworld, control_size) = ({x.shape[0]}, "
            f"{system.control_size})"
        )
    check_like(u, x, "step", "u")
    return _simulated("step", system, x, u.unsqueeze(0), parameters)[1]


def empty_cache() -> None:
    """Gives the memory of earlier large rollouts back to the system.

    On a CPU up to 1.25 GiB stays with the process for the next rollout, because first writes to fresh memory
    cost as much as the arithmetic of a rollout. On a GPU torch manages the memory:
    `torch.cuda.empty_cache()`.
    """
    arrays.RESERVE.clear()


def _differentiated() -> bool:
    """Whether a backward pass can follow; tracing or transforming, that is not known."""
    known = not (torch.compiler.is_compiling() or transforming())
    return torch.is_grad_enabled() if known else True

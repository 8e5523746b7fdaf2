"""Rollouts as torch operations: the public calls and what they return."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bridge.autograd import rollout as _bridge
from .bridge.autograd.episodes import EpisodePath, Trajectory, episodes
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
    """Scalar, (members,) of an `Ensemble`; None where loss=None."""
    fused: bool
    """Whether the policy ran inside the sweep; False where torch evaluated it."""
    path: str = "fused"
    """How the policy was evaluated: "fused", or "torch: ..." with the reason why it is not."""
    next_states: Tensor | None = None
    """With `resets`, where the steps led, (horizon, nworld, state_size), as the following; else None. Where a
    world ended with step t, states[t + 1] is a fresh state.
    """
    done: Tensor | None = None
    """(horizon, nworld) bool: worlds that ended with the step."""
    truncated: Tensor | None = None
    """(horizon, nworld) bool: worlds that had lived for as long as they may."""
    ages: Tensor | None = None
    """(nworld,) int64: steps that worlds have lived in the end."""


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
        policy: Maps states (n, state_size) to controls (n, control_size), row by row and deterministically.
            What torch.fx resolves into linear layers, activations, norms and the like runs inside the sweep,
            see `explain`; any other module is evaluated by torch, step by step only in the forward pass. Of a
            `warp_sims.Ensemble` every member runs as it would alone.
        x0: Initial states (nworld, state_size), float32 or float64, on the device the simulation is to run
            on. For an ensemble (members, nworld, state_size), or (nworld, state_size) for all members.
        horizon: Number of steps, at least 1.
        flow: Which edges the backward pass crosses: "regular", "modified", "network", "stopped", "combined",
            a letter R M N S C, a `Flow`, or a list of one per step (not combined); entry t gates both edges
            that leave x_t.
        loss: "final" or "running" (the system's own), a callable of (states, controls) returning a scalar
            tensor, or None. Members of an ensemble have each their own; a callable is called with the
            trajectories of one member after the other.
        control_cost: Weight of the mean squared control added to the loss.
        window: Truncation: closes both edges at t = window, 2 window, ...
        decay: Factor in [0, 1] on what crosses a physics edge; 0 selects like a closed gate. A
            `PerSecond(factor)` is one in units of time, for systems with a field `dt`.
        checkpoint_every: Steps whose hidden activations the backward pass computes again at once, from the
            states, which are kept anyway; at least 1. Memory for activations then grows neither with the
            horizon nor, on a CPU, with the number of worlds. Of a fused policy, trajectories and the
            cotangent of x0 stay the same to the last bit; weight gradients are summed in another order. By
            default activations are kept up to 1 GiB (4 GiB on a GPU) and recomputed beyond, in segments whose
            length follows from the size; a policy that torch evaluates keeps none between the passes, and
            its backward pass takes segments where all steps at once would be large.
        locate_divergence: Raise FloatingPointError where the rollout is not finite, with the first world and
            step that are not and the system's time step. It reads the last state and the loss on the host,
            and the whole trajectory only where those are not finite.
        inputs: (horizon, nworld, k), dtype and device of x0: what the policy is given beside the states, as
            policy(x, inputs[t]): references, time, noise. Torch evaluates the policy; no gradient is
            computed for it.
        parameters: Numbers of the physics by name, `{"pole_mass": mass}`: one for all worlds, () or a float,
            or one a world, (nworld,); dtype and device of x0. What is not named is the system's own. They
            have gradients as the policy has: through the physics, by the cotangents of the flow, for
            "combined" compared by component. The system's own loss reads the system's own numbers.
        resets: When worlds end and where they begin again, see `Resets`: several episodes in one horizon.
            Losses then see x0 and `next_states`, where the steps led. Torch evaluates the policy.
        clip_cotangent: Largest Euclidean norm of what a step is given to pull back, in every world; of both
            fields of "combined". What is above is scaled down to it, what is not finite stays so.
        every: Steps of the simulator for which a control is held, see `repeat`. Horizon and states are those
            that the policy sees.

    Returns:
        `Rollout(states, controls, loss, fused, path)`, more with `resets`. One `backward()` gives the
        gradient of every policy parameter and of x0. The cotangents that arrive in it are summed before
        anything is compared. For "combined" two separate `backward()` calls add two comparisons, and
        C(a) + C(b) is not C(a + b): for micro-batches and processes use `gradient_pair`. Of an ensemble,
        `out.loss.sum().backward()` gives each member the gradient it would have alone; where the members
        share x0, its gradient is the sum of theirs, each compared before.

    Initial states are checked for NaN and infinity on the device, except while a CUDA graph is captured.
    Under autocast a fused policy runs in the dtype of x0, any other as torch runs it; a half-precision x0 is
    taken to float32.

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
    found = Trajectory(*episodes(plan.x0, plan.spec, path, *plan.parameters))
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
    """Simulates under given controls (open loop), differentiable in both, and in numbers of the physics.

    Args:
        system: The simulated system.
        x0: Initial states (nworld, state_size), float32 or float64.
        controls: (horizon, nworld, control_size), dtype and device of x0.
        parameters: As of `rollout`.

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
    """One time step, differentiable in state, control and numbers of the physics.

    Args:
        system: The simulated system.
        x: States (nworld, state_size), float32 or float64.
        u: Controls (nworld, control_size), dtype and device of x.
        parameters: As of `rollout`.

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
    """Gives memory of large rollouts that nobody refers to any more back to the system.

    On a CPU up to 1.25 GiB of it stays with the process for the next rollout, whose first writes would
    otherwise cost as much as its arithmetic. Memory on a GPU is torch's: `torch.cuda.empty_cache()`.
    """
    arrays.RESERVE.clear()


def _differentiated() -> bool:
    """Whether a backward pass can follow; tracing or transforming, that is not known."""
    known = not (torch.compiler.is_compiling() or transforming())
    return torch.is_grad_enabled() if known else True

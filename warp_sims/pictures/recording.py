"""A rollout on a Warp tape, for programs whose loss and other kernels are in Warp."""

from collections.abc import Sequence

import torch
import warp as wp
from torch import Tensor, nn

from ..bridge.autograd.tape import record
from ..bridge.runtime.arrays import tensor_of
from ..kernels.flow import Flow, schedule
from ..plans import check_horizon, make_plan
from ..policies.ensembles import Ensemble
from ..systems import System

__all__ = ["record_rollout"]


def record_rollout(
    tape: wp.Tape,
    system: System,
    policy: nn.Module,
    x0: wp.array | Tensor,
    *,
    horizon: int,
    flow: str | Flow | Sequence[str | Flow] = "regular",
    window: int | None = None,
    decay: float = 1.0,
    checkpoint_every: int | None = None,
    inputs: wp.array | Tensor | None = None,
) -> tuple[wp.array, wp.array]:
    """Runs a rollout and records its hand-written backward pass on a tape.

        with wp.Tape() as tape:
            states, controls = ws.record_rollout(tape, system, policy, x0, horizon=100, flow="modified")
            wp.launch(my_loss, dim=nworld, inputs=[states, controls], outputs=[loss])
        tape.backward(loss)

    Args:
        tape: The tape that records.
        x0: Initial states (nworld, state_size), a Warp array or a tensor, float32 or float64. A Warp array
            with `requires_grad=True` gets its cotangent in `.grad`.
        system, policy, horizon, flow, window, decay, checkpoint_every: As in `rollout`, but not flow
            "combined".
        inputs: (horizon, nworld, k), as in `rollout`; a tensor or a Warp array of three dimensions, which
            gets no cotangent.

    Returns:
        States (horizon + 1, nworld, state_size) and controls (horizon, nworld, control_size) as Warp arrays
        with `.grad`. The tape's backward pass adds to `.grad` of the policy's (torch) parameters, as torch's
        would; `tape.zero()` clears the arrays, `policy.zero_grad()` the parameters.

    Raises:
        TypeError, ValueError: an argument does not fit, or the flow is "combined".
    """
    call = "record_rollout"
    if not isinstance(tape, wp.Tape):
        raise TypeError(f"{call}: tape is of type {type(tape).__name__}, expected a warp.Tape")
    if isinstance(policy, Ensemble):
        raise TypeError(
            f"{call}: policy is an Ensemble, expected a single policy: Warp arrays here have one axis of "
            f"worlds; record its members() one by one"
        )
    array = None
    if isinstance(x0, wp.array):
        if x0.dtype not in (wp.float32, wp.float64) or x0.ndim != 2:
            raise TypeError(
                f"{call}: x0 is a Warp array of {x0.ndim} dimensions and dtype {x0.dtype.__name__}, expected "
                f"2 dimensions of float32 or float64"
            )
        array = x0 if x0.requires_grad else None
        x0 = tensor_of(x0)
    if isinstance(inputs, wp.array):
        if inputs.requires_grad:
            raise ValueError(
                f"{call}: inputs is a Warp array with requires_grad=True, expected one without: no cotangent "
                "is computed for it; make what is to be learned a parameter of the policy"
            )
        inputs = tensor_of(inputs)
    horizon = check_horizon(horizon, call, system, x0)
    base, check = schedule(flow, horizon, window, call)
    if check:
        raise ValueError(
            f"{call}: flow is 'combined', expected 'regular', 'modified', 'network' or 'stopped': on a tape "
            f"gradients add up, the comparison "
            "does not; use gradient_pair"
        )
    with torch.no_grad():
        given = system, policy, x0, horizon, base, "", decay, None, 0.0, checkpoint_every
        plan = make_plan(call, *given, inputs=inputs)
    return record(tape, plan.spec, plan.path, plan.parameters, plan.x0.detach(), array)

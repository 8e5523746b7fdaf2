"""The launches of a rollout recorded on a Warp tape: `tape.backward()` runs the hand-written adjoints."""

from collections.abc import Sequence

import torch
import warp as wp
from torch import Tensor

from . import operators
from .arrays import array_of, grad_of
from .autograd import Spec, split
from .evaluated import Policy, torch_backward, torch_forward
from .fused_backward import backward as fused_backward
from .registry import prepare
from .sweeps import Backward, Cotangents, LossWeights

_NO_LOSS = LossWeights(0.0, 0.0, 0.0)


def record(
    tape: wp.Tape,
    spec: Spec,
    network: str | None,
    policy: Policy,
    parameters: Sequence[Tensor],
    x0: Tensor,
    x0_array: wp.array | None,
) -> tuple[wp.array, wp.array]:
    """Runs the forward pass and records the backward pass; returns states and controls as arrays with
    `.grad`.

    Cotangents accumulate into `x0_array.grad`, if there is one, and into `.grad` of the parameters.
    """
    with torch.no_grad():
        values = [q.detach() for q in parameters]
        hidden = packed = None
        if network is None:
            states, controls, _ = torch_forward(policy, spec, x0, values)
        else:
            states, controls, _, hidden, packed = operators.fused_rollout(
                spec.system, network, values, x0, spec.horizon, 0.0, 0.0, 0.0, spec.segment
            )
    states_array, controls_array = array_of(states), array_of(controls)

    def backward() -> None:
        g = Cotangents(None, grad_of(states_array), grad_of(controls_array))
        with torch.no_grad():
            if hidden is None or packed is None or network is None:
                grads, adj_x0 = torch_backward(policy, spec, states, controls, values, *g)
            else:
                p = prepare(spec.system, states.dtype, states.device)
                back = Backward(spec.base, "", spec.decay, _NO_LOSS)
                grads, adj_x0 = fused_backward(
                    p, back, network, packed, hidden, states, controls, g, spec.segment
                )
            if x0_array is not None:
                grad_of(x0_array).view(adj_x0[0].shape).add_(adj_x0[0])
            for parameter, grad in zip(parameters, split(grads[0], parameters)):
                if parameter.requires_grad:
                    parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad

    arrays = [states_array, controls_array] + ([] if x0_array is None else [x0_array])
    tape.record_func(backward, arrays)
    return states_array, controls_array

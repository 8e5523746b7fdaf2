"""The launches of a rollout recorded on a Warp tape: `tape.backward()` runs the hand-written adjoints."""

from collections.abc import Sequence

import torch
import warp as wp
from torch import Tensor

from ..passes.spec import Cotangents, Spec
from ..runtime.arrays import array_of, grad_of
from .rollout import Path, split


def record(
    tape: wp.Tape,
    spec: Spec,
    path: Path,
    parameters: Sequence[Tensor],
    x0: Tensor,
    x0_array: wp.array | None,
) -> tuple[wp.array, wp.array]:
    """Runs the forward pass and records the backward pass; returns states and controls as arrays with
    `.grad`.

    Cotangents accumulate into `x0_array.grad`, if there is one, and into `.grad` of the parameters.
    """
    values = [q.detach() for q in parameters]
    with torch.no_grad():
        saved, _ = path.forward(spec, x0, values)
    states, controls = array_of(saved.states), array_of(saved.controls)

    def backward() -> None:
        g = Cotangents(None, grad_of(states), grad_of(controls))
        with torch.no_grad():
            grads, adj_x0 = path.backward(spec, saved, values, g)
            if x0_array is not None:
                grad_of(x0_array).view(adj_x0[0].shape).add_(adj_x0[0])
            for parameter, grad in zip(parameters, split(grads[0], parameters)):
                if parameter.requires_grad:
                    parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad

    arrays = [states, controls] + ([] if x0_array is None else [x0_array])
    tape.record_func(backward, arrays)
    return states, controls

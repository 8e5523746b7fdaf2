"""A whole rollout as one differentiable torch operation, the policy fused into the sweep, and the open loop.

It returns (states, controls, loss) and differentiates all three: the cotangents that arrive in one backward
pass go into one adjoint sweep, and for a combined gradient are summed before anything is compared. Backwards,
nothing of the network runs step by step: its Jacobians are taken at all points at once before the sweep, its
weight gradients behind it. evaluated.py has the same with the policy evaluated by torch.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels.flow import Flow
from . import operators
from .autograd import BackwardPass, Spec, combined, differentiable, split, x0_is_wanted


class FusedBackward(BackwardPass):
    """Backward pass of `FusedRollout`: the (combined) flat gradient and the cotangent of x0."""

    @staticmethod
    def forward(
        spec: Spec,
        wants_x0: bool,
        network: str,
        packed: Tensor,
        hidden: Tensor,
        states: Tensor,
        controls: Tensor,
        adj_loss: Tensor | None,
        adj_states: Tensor | None,
        adj_controls: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        grads, adj_x0 = operators.fused_backward(
            spec.system,
            network,
            spec.base,
            spec.check,
            spec.decay,
            spec.final,
            spec.running,
            spec.control,
            packed,
            hidden,
            states,
            controls,
            adj_loss,
            adj_states,
            adj_controls,
            spec.segment,
        )
        two = spec.check != ""
        return combined(grads, two), combined(adj_x0, two, wants_x0)


_fused_backward = differentiable(FusedBackward, backward_pass=True)


class FusedRollout(torch.autograd.Function):
    """Rollout with the policy fused into the sweep: (x0, spec, network, *parameters) -> states, controls,
    loss, (internals).
    """

    @staticmethod
    def forward(x0: Tensor, spec: Spec, network: str, *parameters: Tensor) -> tuple[Tensor, ...]:
        return operators.fused_rollout(
            spec.system,
            network,
            list(parameters),
            x0,
            spec.horizon,
            spec.final,
            spec.running,
            spec.control,
            spec.segment,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.spec, ctx.network, *parameters = inputs
        states, controls, _, hidden, packed = output
        # the parameters are not read again, but a change between forward and backward must not go unseen
        ctx.save_for_backward(states, controls, hidden, packed, *parameters)
        ctx.mark_non_differentiable(hidden, packed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, adj_states: Any, adj_controls: Any, adj_loss: Any, _hidden: Any, _packed: Any
    ) -> Any:
        states, controls, hidden, packed, *parameters = ctx.saved_tensors
        flat, adj_x0 = _fused_backward(
            ctx.spec,
            x0_is_wanted(ctx),
            ctx.network,
            packed,
            hidden,
            states,
            controls,
            adj_loss,
            adj_states,
            adj_controls,
        )
        return adj_x0, None, None, *split(flat, parameters)


class SimulateBackward(BackwardPass):
    """Backward pass of `Simulate`."""

    @staticmethod
    def forward(system: int, states: Tensor, controls: Tensor, adj_states: Tensor) -> tuple[Tensor, Tensor]:
        schedule = Flow.MODIFIED.value * controls.shape[0]
        mu, adj_x0 = operators.adjoint(
            system,
            schedule,
            "",
            1.0,
            0.0,
            0.0,
            0.0,
            states,
            controls,
            None,
            0.0,
            None,
            None,
            adj_states,
            None,
        )
        return mu[0], adj_x0[0]


_simulate_backward = differentiable(SimulateBackward, backward_pass=True)


class Simulate(torch.autograd.Function):
    """Open loop: (x0, controls, system) -> states. Without a policy only the physics edges exist."""

    @staticmethod
    def forward(x0: Tensor, controls: Tensor, system: int) -> Tensor:
        return operators.simulate(system, x0, controls, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, controls, ctx.system = inputs
        ctx.save_for_backward(output, controls)

    @staticmethod
    def backward(ctx: Any, adj_states: Any) -> Any:
        states, controls = ctx.saved_tensors
        adj_controls, adj_x0 = _simulate_backward(ctx.system, states, controls, adj_states)
        return adj_x0, adj_controls, None


fused_rollout = differentiable(FusedRollout)
"""(x0, spec, network, *parameters) -> states, controls, loss, and two tensors that only the backward pass
reads.
"""
simulate = differentiable(Simulate)
"""(x0, controls, number of the system) -> states."""

"""The fused path: a rollout whose policy runs inside the sweeps. Torch computes no single time step.

The network's Jacobians are taken at all points at once before the adjoint sweep, and its weight gradients
after it; see passes/fused.py and passes/fused_backward.py. torch_path.py is the path of policies that torch
evaluates.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..passes.physical import Physical, with_physical
from ..passes.spec import Cotangents, Saved, Spec
from . import operators


class FusedPath(NamedTuple):
    """The path of a rollout whose policy the sweeps reproduce exactly."""

    network: str
    """Description of the policy, see kernels/policy/layout.py."""
    constants: tuple[Tensor, ...] = ()
    """Vectors that the policy has besides its parameters."""
    physical: Physical | None = None
    """Physical parameters, which come after the policy's parameters."""

    kept_outputs = 0

    def forward(self, spec: Spec, x0: Tensor, parameters: Sequence[Tensor]) -> tuple[Saved, Tensor]:
        """Returns what the backward pass needs, and the loss. x0 is (nworld, state_size), for an ensemble
        (members, nworld, state_size).
        """
        policy, values = self.physical.split(parameters) if self.physical else (parameters, None)
        inputs = [*policy, *self.constants]
        out = operators.fused_rollout(spec, self.network, inputs, x0, values)
        states, controls, loss, hidden, packed = out
        return Saved(states, controls, (hidden, packed)), loss

    def backward(
        self, spec: Spec, saved: Saved, parameters: Sequence[Tensor], g: Cotangents
    ) -> tuple[Tensor, Tensor]:
        """Returns gradients (fields, parameters) and cotangents of x0 (fields, nworld, state_size); the
        fields are not compared yet. For an ensemble both have a member axis after the fields.
        """
        hidden, packed = saved.kept
        given = self.network, packed, hidden, saved.states, saved.controls
        if self.physical is None:
            return operators.fused_backward(spec, *given, *g)[:2]
        _, values = self.physical.split(parameters)
        wanted = self.physical.wanted
        grads, adj_x0, adj = operators.fused_backward(spec, *given, *g, values, wanted)
        return with_physical(self.physical, grads, adj, parameters), adj_x0

"""What all differentiable rollouts share: what describes them, and Functions that refuse what they cannot."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch._utils import _unflatten_dense_tensors

from ..kernels.flow import network_open
from . import operators

_NO_SECOND = (
    "second derivatives through a rollout are not implemented: the adjoint kernels have no adjoint of their "
    "own; "
    "compute the outer derivative by finite differences, or detach() the inner gradient"
)
_NO_FORWARD = (
    "forward-mode derivatives (jvp, jacfwd, dual numbers) through a rollout are not implemented: the flows "
    "are defined on the "
    "backward pass; use reverse mode (backward, torch.func.grad, torch.autograd.grad)"
)


class Spec(NamedTuple):
    """Everything of a rollout that is no tensor."""

    system: int
    """Number of the system, see registry.py."""
    horizon: int
    base: str
    """Flow letter of each step."""
    check: str
    """The same for the second field of a combined gradient, else empty."""
    decay: float
    final: float
    running: float
    control: float
    """Loss weights, see sweeps.LossWeights."""
    segment: int = 0
    """Steps whose activations are recomputed at once in the backward pass; 0 where they are kept, or, of a
    policy that torch evaluates, where all steps go at once. See segments.py.
    """

    @property
    def network_open(self) -> bool:
        """Whether any field crosses a network edge at any step."""
        return network_open(self.base + self.check)


class BackwardPass(torch.autograd.Function):
    """A backward pass: differentiating it again is an error, never zero."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(_NO_SECOND)


def differentiable(
    function: type[torch.autograd.Function], backward_pass: bool = False
) -> Callable[..., Any]:
    """Returns `function.apply`, with forward-mode derivatives an error that says so.

    torch.compile refuses a Function that has a `jvp`, so the error is a subclass, left out where a graph is
    traced.
    """

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD)

    plain = function.forward
    reverse_only = type(function.__name__, (function,), {"jvp": staticmethod(jvp)})
    # what Function.apply comes to without transforms, less its inspection of the signature of forward at
    # every call
    direct: Any = super(torch.autograd.Function, reverse_only).apply  # pyright: ignore[reportAttributeAccessIssue]

    def apply(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            # compiled graphs refuse second derivatives themselves
            return plain(*args) if backward_pass else function.apply(*args)
        # a pullback may be called when the transform that wrapped its tensors is over
        args = unwrap_dead_wrappers(args)
        if backward_pass and not torch.is_grad_enabled():
            # nobody can differentiate this again
            return plain(*args)
        if torch._C._are_functorch_transforms_active():
            return reverse_only.apply(*args)
        return direct(*args)

    return apply


def x0_is_wanted(ctx: Any) -> bool:
    """Whether somebody reads the cotangent of x0; tracing a compiled graph, that is not known."""
    return torch.compiler.is_compiling() or ctx.needs_input_grad[0]


def combined(fields: Tensor, two: bool, wanted: bool = True) -> Tensor:
    """One gradient of one or two fields, (fields, ...); the comparison is left out where nobody reads it."""
    if not two or not wanted:
        return fields[0]
    one, _ = operators.combine(fields[0].reshape(-1), fields[1].reshape(-1), False)
    return one.view(fields.shape[1:])


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cuts a flat gradient, (members, parameters) of an ensemble, into tensors shaped like the parameters."""
    if flat.ndim == 1 and not torch.compiler.is_compiling():
        return list(_unflatten_dense_tensors(flat, like))  # the same, by one call
    members = flat.shape[:-1].numel()
    sizes = [q.numel() // members for q in like]
    return [part.view(q.shape) for part, q in zip(flat.split(sizes, dim=-1), like)]

"""A rollout as one differentiable torch operation, and the open loop.

It returns (states, controls, loss) and differentiates all three. The cotangents that arrive in one backward
pass go into one adjoint sweep; for a combined gradient they are summed before anything is compared. A path
says what the passes compute: fused_path.py, torch_path.py or episodes.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.flow import Flow
from ..passes.physical import Physical
from ..passes.spec import Cotangents, Saved, Spec
from ..runtime.compat import batching, transforming, unflatten_dense_tensors, unwrap_dead_wrappers
from . import operators
from .mapping import Rule, one_by_one, pulled_back, refused, simulated

_NO_SECOND = (
    "second derivatives through a rollout are not implemented: the adjoint kernels have no adjoint of their "
    "own; "
    "compute the outer derivative by finite differences, or detach() the inner gradient"
)
_NO_FORWARD = (
    "forward-mode derivatives (jvp, jacfwd, dual numbers) through a rollout are not implemented: the flows "
    "are defined on the "
    "backward pass; use reverse mode (backward, torch.func.grad, torch.func.jacrev), or "
    "warp_sims.linearize for the Jacobians of a step"
)


class Path(Protocol):
    """How a rollout is computed: its two passes."""

    kept_outputs: int
    """How many of the kept tensors, the first ones, are outputs too; `backward` takes their cotangents last.
    """

    def forward(self, spec: Spec, x0: Tensor, parameters: Sequence[Tensor]) -> tuple[Saved, Tensor]: ...
    @property
    def backward(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """(spec, saved, parameters, cotangents, *those of kept outputs) -> gradients (fields, parameters),
        cotangents of x0 (fields, nworld, state_size).
        """
        ...


class BackwardPass(torch.autograd.Function):
    """A backward pass: differentiating it again is an error, never zero."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(_NO_SECOND)


def differentiable(
    function: type[torch.autograd.Function],
    backward_pass: bool = False,
    mapping: Callable[[Callable[..., Any]], Rule] | None = None,
) -> Callable[..., Any]:
    """Returns `function.apply`, with forward-mode derivatives an error that says so.

    `mapping` makes the rule for `torch.func.vmap` of the returned function. Without it vmap is an error too.

    torch.compile refuses a Function that has a `jvp`. So the error is in a subclass, which is not used while
    a graph is traced.
    """

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD)

    plain = function.forward
    members = {"jvp": staticmethod(jvp), "vmap": staticmethod(refused)}
    reverse_only: Any = type(function.__name__, (function,), members)
    # what Function.apply comes to without transforms, less its inspection of the signature of forward at
    # every call
    direct: Any = super(torch.autograd.Function, reverse_only).apply  # pyright: ignore[reportAttributeAccessIssue]

    def apply(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            # compiled graphs refuse second derivatives themselves
            return plain(*args) if backward_pass else function.apply(*args)
        # a pullback may be called after the transform that wrapped its tensors has ended
        args = unwrap_dead_wrappers(args)
        if transforming():
            return reverse_only.apply(*args)
        if backward_pass and not torch.is_grad_enabled():
            # nobody can differentiate this again
            return plain(*args)
        return direct(*args)

    if mapping is not None:
        reverse_only.vmap = staticmethod(mapping(apply))
    return apply


def x0_is_wanted(ctx: Any) -> bool:
    """Whether the cotangent of x0 is read; yes while a graph is traced, which cannot know."""
    return torch.compiler.is_compiling() or ctx.needs_input_grad[0]


def combined(fields: Tensor, two: bool, wanted: bool = True) -> Tensor:
    """Makes one gradient of one or two fields, (fields, ...). Without `wanted` nothing is compared."""
    if not two or not wanted:
        return fields[0]
    one, _ = operators.combine(fields[0].reshape(-1), fields[1].reshape(-1), False)
    return one.view(fields.shape[1:])


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cuts a flat gradient, (members, parameters) of an ensemble, into tensors shaped like the parameters."""
    if flat.ndim == 1 and not (torch.compiler.is_compiling() or transforming() or batching()):
        return list(unflatten_dense_tensors(flat, like))  # the same, by one call
    members = flat.shape[:-1].numel()
    sizes = [q.numel() // members for q in like]
    return [part.view(q.shape) for part, q in zip(flat.split(sizes, dim=-1), like)]


class RolloutBackward(BackwardPass):
    """Backward pass of `Rollout`: the (combined) flat gradient and the cotangent of x0."""

    @staticmethod
    def forward(
        spec: Spec,
        path: Path,
        wants_x0: bool,
        kept: int,
        states: Tensor,
        controls: Tensor,
        adj_loss: Tensor | None,
        adj_states: Tensor | None,
        adj_controls: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        saved, g = Saved(states, controls, tensors[:kept]), Cotangents(adj_loss, adj_states, adj_controls)
        first = kept + path.kept_outputs
        grads, adj_x0 = path.backward(spec, saved, tensors[first:], g, *tensors[kept:first])
        two = spec.check != ""
        return combined(grads, two), combined(adj_x0, two, wants_x0)


_rollout_backward = differentiable(RolloutBackward, backward_pass=True, mapping=one_by_one)


class Rollout(torch.autograd.Function):
    """(x0, spec, path, *parameters) -> states, controls, loss, and what the path keeps."""

    @staticmethod
    def forward(x0: Tensor, spec: Spec, path: Path, *parameters: Tensor) -> tuple[Tensor, ...]:
        saved, loss = path.forward(spec, x0, parameters)
        return saved.states, saved.controls, loss, *saved.kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.spec, ctx.path, *parameters = inputs
        states, controls, _, *kept = output
        ctx.kept = len(kept)
        # not every path reads the parameters again, but torch must notice a change between the passes
        ctx.save_for_backward(states, controls, *kept, *parameters)
        ctx.mark_non_differentiable(*kept[ctx.path.kept_outputs :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, adj_states: Any, adj_controls: Any, adj_loss: Any, *adj_kept: Any) -> Any:
        states, controls, *tensors = ctx.saved_tensors
        kept, parameters = tensors[: ctx.kept], tensors[ctx.kept :]
        flat, adj_x0 = _rollout_backward(
            ctx.spec,
            ctx.path,
            x0_is_wanted(ctx),
            ctx.kept,
            states,
            controls,
            adj_loss,
            adj_states,
            adj_controls,
            *kept,
            *adj_kept[: ctx.path.kept_outputs],
            *parameters,
        )
        return adj_x0, None, None, *split(flat, parameters)


class SimulateBackward(BackwardPass):
    """Backward pass of `Simulate`: cotangents of the controls, of x0 and of the numbers, flat."""

    @staticmethod
    def forward(
        system: int,
        physical: Physical | None,
        states: Tensor,
        controls: Tensor,
        adj_states: Tensor,
        *given: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = Spec(system, Flow.MODIFIED.value * controls.shape[0])
        values = None if physical is None else physical.table(given)
        wanted = physical is not None and physical.wanted
        sweep = states, controls, None, 0.0, None, None, adj_states, None, 0, None, 0, values, wanted
        mu, adj_x0, adj = operators.adjoint(spec, *sweep)
        flat = adj if physical is None or not wanted else physical.gradients(adj, given)[0]
        return mu[0], adj_x0[0], flat


_simulate_backward = differentiable(SimulateBackward, backward_pass=True, mapping=pulled_back)


class Simulate(torch.autograd.Function):
    """Open loop: (x0, controls, system, physical, *numbers) -> states. Without a policy there are only
    physics edges.
    """

    @staticmethod
    def forward(
        x0: Tensor, controls: Tensor, system: int, physical: Physical | None = None, *given: Tensor
    ) -> Tensor:
        values = None if physical is None else physical.table(given)
        return operators.simulate(system, x0, controls, True, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, controls, ctx.system, *more = inputs
        ctx.physical, given = (more[0], more[1:]) if more else (None, ())
        ctx.inputs = len(inputs)
        ctx.save_for_backward(output, controls, *given)

    @staticmethod
    def backward(ctx: Any, adj_states: Any) -> Any:
        states, controls, *given = ctx.saved_tensors
        adj_controls, adj_x0, flat = _simulate_backward(
            ctx.system, ctx.physical, states, controls, adj_states, *given
        )
        found: list[Any] = [None] * len(given)
        if ctx.physical is not None and ctx.physical.wanted:
            found = split(flat, given)
        return (adj_x0, adj_controls, None, None, *found)[: ctx.inputs]


rollout = differentiable(Rollout)
"""(x0, spec, path, *parameters) -> states, controls, loss, and what the path keeps."""
simulate = differentiable(Simulate, mapping=simulated)
"""(x0, controls, number of the system, physical, *numbers) -> states; the last two can be left out."""

"""A whole rollout as one differentiable torch operation, with the policy fused into the sweep or evaluated by
torch.

Both return (states, controls, loss) and differentiate all three: the cotangents that arrive in one backward
pass go into one adjoint sweep, and for a combined gradient are summed before anything is compared. Backwards,
nothing of the network runs
step by step: its Jacobians are taken at all points at once before the sweep, its weight gradients behind it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch._utils import _unflatten_dense_tensors
from torch.func import functional_call, vjp

from ..kernels.flow import NETWORK, Flow
from . import operators
from .segments import pieces
from .sweeps import Cotangents
from .tracing import span

JACOBIAN_ELEMENTS = 1 << 26
"""Elements of the policy's Jacobians held at once on the torch road; worlds go through in blocks where those
of a segment are more.
"""

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
        return any(Flow(letter).edges & NETWORK for letter in set(self.base + self.check))


class _BackwardPass(torch.autograd.Function):
    """A backward pass: differentiating it again is an error, never zero."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(_NO_SECOND)


def _apply(function: type[torch.autograd.Function], backward_pass: bool = False) -> Callable[..., Any]:
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


def _wants_x0(ctx: Any) -> bool:
    """Whether somebody reads the cotangent of x0; tracing a compiled graph, that is not known."""
    return torch.compiler.is_compiling() or ctx.needs_input_grad[0]


def _combined(fields: Tensor, two: bool, wanted: bool = True) -> Tensor:
    """One gradient of one or two fields, (fields, ...); the comparison is left out where nobody reads it."""
    if not two or not wanted:
        return fields[0]
    combined, _ = operators.combine(fields[0].reshape(-1), fields[1].reshape(-1), False)
    return combined.view(fields.shape[1:])


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cuts a flat gradient, (members, parameters) of an ensemble, into tensors shaped like the parameters."""
    if flat.ndim == 1 and not torch.compiler.is_compiling():
        return list(_unflatten_dense_tensors(flat, like))  # the same, by one call
    members = flat.shape[:-1].numel()
    sizes = [q.numel() // members for q in like]
    return [part.view(q.shape) for part, q in zip(flat.split(sizes, dim=-1), like)]


class FusedBackward(_BackwardPass):
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
        return _combined(grads, two), _combined(adj_x0, two, wants_x0)


_fused_backward = _apply(FusedBackward, backward_pass=True)


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
            _wants_x0(ctx),
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


class Policy(NamedTuple):
    """A policy that torch evaluates: the module, the names of its parameters, and the autocast it ran
    under.
    """

    module: torch.nn.Module
    names: tuple[str, ...]
    autocast: torch.dtype | None

    def __call__(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        with torch.autocast(
            x.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        ):
            u = functional_call(self.module, dict(zip(self.names, parameters)), (x,))
        return u.to(x.dtype)

    @property
    def tolerance(self) -> float | None:
        """Accepted difference of recomputed controls under autocast: a few units in the last place of its
        type.
        """
        return None if self.autocast is None else 16.0 * torch.finfo(self.autocast).eps


def torch_forward(
    policy: Policy, spec: Spec, x0: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """States, controls and loss, the policy evaluated by torch step by step."""
    x, states, controls = x0, [x0], []
    for t in range(spec.horizon):
        with span("policy"):
            u = policy(parameters, x)
        x = operators.simulate(spec.system, x, u.unsqueeze(0), t == 0)[1]
        controls.append(u)
        states.append(x)
    all_states, all_controls = torch.stack(states), torch.stack(controls)
    loss = operators.loss(spec.system, all_states, all_controls, spec.final, spec.running, spec.control)
    return all_states, all_controls, loss


def torch_backward(
    policy: Policy,
    spec: Spec,
    states: Tensor,
    controls: Tensor,
    parameters: Sequence[Tensor],
    adj_loss: Tensor | None,
    adj_states: Tensor | None,
    adj_controls: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients (fields, parameters) and cotangents of x0 (fields, nworld, state_size), fields not yet
    compared.
    """
    horizon, nworld, m = controls.shape
    n = states.shape[2]
    per_world = max(1, (spec.segment or horizon) * m * n)
    block = max(1, JACOBIAN_ELEMENTS // per_world) if spec.network_open else nworld
    share = list(range(0, nworld, max(block, 1))) or [0]
    grads, adj_x0 = [], []
    for first in share:
        part = slice(first, min(first + block, nworld)) if len(share) > 1 else slice(None)
        # the weights of the built-in loss divide by the worlds of the whole rollout
        scale = nworld / max(controls[:, part].shape[1], 1)
        g, a = _torch_backward_block(
            policy,
            spec
            if len(share) == 1
            else spec._replace(
                final=spec.final / scale, running=spec.running / scale, control=spec.control / scale
            ),
            states[:, part],
            controls[:, part],
            parameters,
            adj_loss,
            None if adj_states is None else adj_states[:, part],
            None if adj_controls is None else adj_controls[:, part],
        )
        grads.append(g)
        adj_x0.append(a)
    if len(grads) == 1:
        return grads[0], adj_x0[0]
    return torch.stack(grads).sum(0), torch.cat(adj_x0, dim=1)


def _torch_backward_block(
    policy: Policy,
    spec: Spec,
    states: Tensor,
    controls: Tensor,
    parameters: Sequence[Tensor],
    adj_loss: Tensor | None,
    adj_states: Tensor | None,
    adj_controls: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Those of some worlds, over one segment of steps after the other."""
    horizon = controls.shape[0]
    pairs = Cotangents(None, adj_states, adj_controls)
    grads = adj_x0 = None
    for t0, t1 in pieces(horizon, spec.segment or horizon):
        own, adj_x0 = _torch_backward_segment(
            policy,
            spec,
            states[t0 : t1 + 1],
            controls[t0:t1],
            parameters,
            pairs.steps(t0, t1)._replace(loss=adj_loss),
            t0,
            adj_x0,
        )
        grads = own if grads is None else grads + own
    assert grads is not None and adj_x0 is not None
    return grads, adj_x0


def _torch_backward_segment(
    policy: Policy,
    spec: Spec,
    states: Tensor,
    controls: Tensor,
    parameters: Sequence[Tensor],
    g: Cotangents,
    t0: int,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the steps from `t0` on, as many as there are controls, and the cotangents of state t0."""
    steps, nworld, m = controls.shape
    points = states[:-1].reshape(steps * nworld, states.shape[2])
    with span("policy_again"):
        recomputed, pull, *_ = vjp(lambda q: policy(q, points), tuple(parameters))
    jac = None
    if spec.network_open:
        with span("policy_jacobians"):
            _, pull_x, *_ = vjp(lambda x: policy(parameters, x), points)
            # one unit cotangent a control component: rows do not mix, so all points share a product
            columns = []
            for c in range(m):
                unit = torch.zeros_like(recomputed)
                unit[:, c] = 1.0
                columns.append(pull_x(unit)[0])
            jac = torch.stack(columns, dim=1).view(steps, nworld, m, states.shape[2])
    tolerance = policy.tolerance or operators.CONTROL_TOLERANCE[states.dtype]
    mu, adj_x0 = operators.adjoint(
        spec.system,
        spec.base,
        spec.check,
        spec.decay,
        spec.final,
        spec.running,
        spec.control,
        states,
        controls,
        recomputed.view(steps, nworld, m),
        tolerance,
        jac,
        *g,
        t0,
        carried,
    )
    fields = []
    for f in range(mu.shape[0]):
        with span("policy_weight_grad"):
            (field,) = pull(mu[f].reshape(steps * nworld, m))
        fields.append(
            torch.cat([g.reshape(-1).to(states.dtype) for g in field]) if field else mu.new_zeros(0)
        )
    return torch.stack(fields), adj_x0


class TorchBackward(_BackwardPass):
    """Backward pass of `TorchRollout`."""

    @staticmethod
    def forward(
        policy: Policy,
        spec: Spec,
        wants_x0: bool,
        states: Tensor,
        controls: Tensor,
        adj_loss: Tensor | None,
        adj_states: Tensor | None,
        adj_controls: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        grads, adj_x0 = torch_backward(
            policy, spec, states, controls, parameters, adj_loss, adj_states, adj_controls
        )
        two = spec.check != ""
        return _combined(grads, two), _combined(adj_x0, two, wants_x0)


_torch_backward_pass = _apply(TorchBackward, backward_pass=True)


class TorchRollout(torch.autograd.Function):
    """Rollout with the policy evaluated by torch: (x0, spec, policy, *parameters) -> states, controls,
    loss.
    """

    @staticmethod
    def forward(x0: Tensor, spec: Spec, policy: Policy, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch_forward(policy, spec, x0, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.spec, ctx.policy, *parameters = inputs
        states, controls, _ = output
        ctx.save_for_backward(states, controls, *parameters)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, adj_states: Any, adj_controls: Any, adj_loss: Any) -> Any:
        states, controls, *parameters = ctx.saved_tensors
        flat, adj_x0 = _torch_backward_pass(
            ctx.policy,
            ctx.spec,
            _wants_x0(ctx),
            states,
            controls,
            adj_loss,
            adj_states,
            adj_controls,
            *parameters,
        )
        return adj_x0, None, None, *split(flat, parameters)


class SimulateBackward(_BackwardPass):
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


_simulate_backward = _apply(SimulateBackward, backward_pass=True)


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


fused_rollout = _apply(FusedRollout)
"""(x0, spec, network, *parameters) -> states, controls, loss, and two tensors that only the backward pass
reads.
"""
torch_rollout = _apply(TorchRollout)
"""(x0, spec, policy, *parameters) -> states, controls, loss."""
simulate = _apply(Simulate)
"""(x0, controls, number of the system) -> states."""

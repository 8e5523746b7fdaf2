"""A whole rollout as one differentiable torch operation, the policy evaluated by torch: any module.

Forwards it is evaluated step by step. Backwards it is not: it is evaluated again for all stored states at
once, its Jacobians are taken there before the adjoint sweep, and its weight gradients behind it. Where that
would be large it happens in blocks of worlds and segments of time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vjp

from . import operators
from .autograd import BackwardPass, Spec, combined, differentiable, split, x0_is_wanted
from .segments import pieces
from .sweeps import Cotangents
from .tracing import span

JACOBIAN_ELEMENTS = 1 << 26
"""Elements of the policy's Jacobians held at once on the torch road; worlds go through in blocks where those
of a segment are more.
"""


def places(module: torch.nn.Module, buffers: bool = False) -> dict[str, tuple[str, ...]]:
    """Where each parameter (or buffer) of a module stands: the names of all its places, by the first of them,
    which is its name in `named_parameters`.

    A tied parameter has several places. A module that is registered under several names counts once:
    `functional_call` would leave the substitutes of the first name in it when it is done with the second.
    """
    found: dict[int, list[str]] = {}
    for prefix, part in module.named_modules():
        own = part.named_buffers if buffers else part.named_parameters
        for name, tensor in own(prefix, recurse=False, remove_duplicate=False):
            found.setdefault(id(tensor), []).append(name)
    return {names[0]: tuple(names) for names in found.values()}


def call_with(module: torch.nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Any:
    """Calls a module with tensors in the places of its parameters and buffers, and leaves it as it was."""
    return functional_call(module, tensors, (x,), tie_weights=False)


class Policy(NamedTuple):
    """A policy that torch evaluates: the module, the places of its parameters, and the autocast it ran
    under.
    """

    module: torch.nn.Module
    places: tuple[tuple[str, ...], ...]
    """Names of the places of each parameter, see `places`."""
    autocast: torch.dtype | None

    def __call__(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        with torch.autocast(
            x.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        ):
            u = call_with(self.module, self.substitutes(parameters), x)
        return u.to(x.dtype)

    def substitutes(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors in the order of the parameters, by the names of all places they take."""
        return {name: q for names, q in zip(self.places, parameters) for name in names}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, as `named_parameters` gives them."""
        return tuple(names[0] for names in self.places)

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
            u = _control(policy, parameters, x0.clone() if t == 0 else x, t)
        x = operators.simulate(spec.system, x, u.unsqueeze(0), t == 0)[1]
        controls.append(u)
        states.append(x)
    all_states, all_controls = torch.stack(states), torch.stack(controls)
    loss = operators.loss(spec.system, all_states, all_controls, spec.final, spec.running, spec.control)
    return all_states, all_controls, loss


def _control(policy: Policy, parameters: Sequence[Tensor], x: Tensor, t: int) -> Tensor:
    """What the policy answers to the states of step t, which it must leave as they are."""
    if torch.compiler.is_compiling() or x.is_inference():
        return policy(parameters, x)
    version = x._version
    u = policy(parameters, x)
    if x._version != version:
        raise ValueError(
            f"policy: it changed its input in place at step {t}, expected the states as they are: they are "
            "simulated from and read again in the backward pass; work on x.clone()"
        )
    return u


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


class TorchBackward(BackwardPass):
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
        return combined(grads, two), combined(adj_x0, two, wants_x0)


_torch_backward_pass = differentiable(TorchBackward, backward_pass=True)


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
            x0_is_wanted(ctx),
            states,
            controls,
            adj_loss,
            adj_states,
            adj_controls,
            *parameters,
        )
        return adj_x0, None, None, *split(flat, parameters)


torch_rollout = differentiable(TorchRollout)
"""(x0, spec, policy, *parameters) -> states, controls, loss."""

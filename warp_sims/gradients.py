"""Two gradients of one rollout and their comparison, explicitly: for micro-batches and for several
processes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .bridge.autograd import operators
from .bridge.passes.spec import Cotangents
from .estimators import Combiner, PerSecond
from .kernels.flow import Flow, schedule
from .plans import Loss, Plan, check_horizon, custom_loss_value, make_plan
from .systems import System
from .systems.parameters import Parameters
from .training.processes import agreed_worlds, reduced_mean

__all__ = ["GradientPair", "gradient_pair"]


@dataclasses.dataclass(frozen=True, eq=False)
class GradientPair:
    """A base and a check gradient of the same loss, averaged over `worlds` worlds, not yet compared.

    The comparison is not additive: C(a) + C(b) is not C(a + b). Add pairs (`+`, `all_reduce`) first, then
    `combine`. For an `Ensemble`, gradients are stacked like its parameters, and each scalar named here is one
    for each member, (members,).
    """

    loss: Tensor
    """Scalar."""
    worlds: int
    """Number of worlds (of a member) of the means; the weight of this pair in a sum."""
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    flat: Tensor
    """(2, components): base and check, all parameters one after the other in the order of `names`; (2,
    members, components) for an ensemble.
    """
    physical: tuple[str, ...] = ()
    """Those of the names that are physical parameters, not parameters of the policy."""

    @property
    def base(self) -> dict[str, Tensor]:
        """Base gradient by parameter name."""
        return self._named(self.flat[0])

    @property
    def check(self) -> dict[str, Tensor]:
        """Check gradient by parameter name."""
        return self._named(self.flat[1])

    @property
    def cosine(self) -> Tensor:
        """Cosine of the flattened gradients, scalar; NaN if one of them is zero."""
        dot, base, check = self.sums[..., :3].unbind(-1)
        return dot / (base.sqrt() * check.sqrt())

    @property
    def agreement(self) -> Tensor:
        """Share of equal signs among the components where either gradient is nonzero, scalar; NaN if all
        are zero.
        """
        return self.sums[..., 3] / self.sums[..., 4]

    @property
    def nonfinite(self) -> Tensor:
        """Number of components where either gradient is NaN or infinite, scalar int64."""
        return self.sums[..., 5].long()

    @property
    def nonfinite_fields(self) -> tuple[Tensor, Tensor]:
        """Numbers of NaN and infinite components of base and check, scalars int64."""
        return self.sums[..., 6].long(), self.sums[..., 7].long()

    @property
    def zeros(self) -> Tensor:
        """Share of zeros among the components of `combine()`, scalar; NaN if there are none."""
        return (self.flat.shape[-1] - self.sums[..., 8]) / self.flat.shape[-1]

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Euclidean norms of base and check, scalars."""
        return self.sums[..., 1].sqrt(), self.sums[..., 2].sqrt()

    def combine(
        self, keep: Literal["base", "check"] = "base", *, combiner: Combiner | None = None
    ) -> dict[str, Tensor]:
        """Per component the kept gradient where the signs agree, else 0; by parameter name.

        sign(0) = sign(0). A NaN or an infinity in the kept gradient stays as it is. In the other gradient it
        gives 0, because the sign of an overflow means nothing. `nonfinite` counts both.

        Args:
            combiner: Another way to make one gradient of two: takes (2, components) to (components,), of an
                ensemble each member's by itself. `project_conflicting`, `Blend(weight)`, or an aggregator of
                `torchjd`.

        Raises:
            ValueError: `keep` is neither "base" (the published rule) nor "check", or `combiner` returns
                another shape.
        """
        if keep not in ("base", "check"):
            raise ValueError(f'GradientPair.combine: keep is {keep!r}, expected "base" or "check"')
        if combiner is not None:
            return self._named(self._combined_by(combiner))
        # a copy: optimizers and clipping change gradients in place, and the pair keeps its own
        return self._named(self._compared(keep == "check")[0].clone())

    def _combined_by(self, combiner: Combiner) -> Tensor:
        if self.flat.ndim == 3:
            return torch.stack([self._member(combiner, pair) for pair in self.flat.unbind(1)])
        return self._member(combiner, self.flat)

    def _member(self, combiner: Combiner, pair: Tensor) -> Tensor:
        found = combiner(pair.clone())
        if not isinstance(found, Tensor) or found.shape != pair.shape[1:]:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"GradientPair.combine: combiner returned {given} for gradients of shape "
                f"{tuple(pair.shape)}, expected {tuple(pair.shape[1:])}"
            )
        return found

    def assign(
        self,
        policy: nn.Module,
        keep: Literal["base", "check"] = "base",
        *,
        combiner: Combiner | None = None,
    ) -> None:
        """Puts the combined gradient into the `.grad` of the policy's parameters, and replaces what is there.
        Gradients of physical parameters are not assigned; take them from `combine`, which has the same
        arguments.

        Raises:
            ValueError: the policy lacks a parameter of this pair, or has it with another shape.
        """
        parameters = dict(policy.named_parameters())
        for name, shape in zip(self.names, self.shapes):
            if name in self.physical:
                continue
            if name not in parameters or parameters[name].shape != shape:
                found = tuple(parameters[name].shape) if name in parameters else "none"
                raise ValueError(
                    f"GradientPair.assign: parameter {name!r} has shape {found} in this policy, expected "
                    f"{tuple(shape)}; "
                    "assign to the policy that the pair was computed for"
                )
        for name, grad in self.combine(keep, combiner=combiner).items():
            if name not in self.physical:
                parameters[name].grad = grad

    def __add__(self, other: "GradientPair") -> "GradientPair":
        """The pair of the worlds of both: that of `gradient_pair` for the concatenated worlds."""
        if not isinstance(other, GradientPair):
            return NotImplemented
        if self.names != other.names or self.shapes != other.shapes:
            raise ValueError(
                "GradientPair: cannot add pairs of different policies; expected the same parameter names and "
                "shapes"
            )
        worlds = self.worlds + other.worlds
        a, b = (self.worlds / worlds, other.worlds / worlds) if worlds else (0.5, 0.5)
        # a pair without worlds has no say, whatever its numbers are
        if not self.worlds or not other.worlds:
            return self if self.worlds else other
        return dataclasses.replace(
            self, loss=a * self.loss + b * other.loss, worlds=worlds, flat=a * self.flat + b * other.flat
        )

    def all_reduce(self, group: "torch.distributed.ProcessGroup | None" = None) -> "GradientPair":
        """The pair of the worlds of all processes of a `torch.distributed` group: one reduction of one flat
        buffer, after a small exchange that finds out whether all have the same parameters.

        Raises:
            RuntimeError: `torch.distributed` is not initialised.
            ValueError: The pair of another process has other names, shapes or dtypes, or another order of
                parameters. It is raised in every process.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise RuntimeError(
                "GradientPair.all_reduce: torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first"
            )
        parts = [("loss", self.loss.shape, self.loss.dtype)]
        parts += [(name, shape, self.flat.dtype) for name, shape in zip(self.names, self.shapes)]
        worlds = agreed_worlds("GradientPair.all_reduce", parts, self.worlds, self.flat.device, group)
        return self.reduced(self.worlds, worlds, group)

    def reduced(
        self, worlds: int, total: int, group: "torch.distributed.ProcessGroup | None" = None
    ) -> "GradientPair":
        """The pair of all processes, of which it is known that they have `total` worlds together and the same
        parameters; this one has the weight of `worlds`.
        """
        flat, loss = reduced_mean([self.flat, self.loss.detach()], worlds, total, group)
        return dataclasses.replace(self, loss=loss, worlds=total, flat=flat)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        members = flat.shape[:-1].numel()
        parts = flat.split([shape.numel() // members for shape in self.shapes], dim=-1)
        # contiguous where members are stacked: optimizers are quicker with gradients laid out like parameters
        return {n: q.reshape(shape).contiguous() for n, shape, q in zip(self.names, self.shapes, parts)}

    @property
    def sums(self) -> Tensor:
        """What `kernels.agreement.SUMS` names, (sums,) or (members, sums), float64."""
        return self._compared(False)[1]

    def _compared(self, keep_check: bool) -> tuple[Tensor, Tensor]:
        """Combined gradient and sums from one pass, kept: training logs read several of them."""
        key = f"_compared_{keep_check}"
        if key not in self.__dict__:
            object.__setattr__(self, key, operators.combine(self.flat[0], self.flat[1], keep_check))
        return self.__dict__[key]


def gradient_pair(
    system: System,
    policy: nn.Module,
    x0: Tensor,
    *,
    horizon: int,
    base: str | Flow | Sequence[str | Flow] = "modified",
    check: str | Flow | Sequence[str | Flow] = "regular",
    loss: Loss = "final",
    control_cost: float = 0.0,
    window: int | None = None,
    decay: float | PerSecond = 1.0,
    checkpoint_every: int | None = None,
    inputs: Tensor | None = None,
    parameters: Parameters = None,
    clip_cotangent: float | None = None,
) -> GradientPair:
    """Two gradients of one rollout, not yet compared, from one forward sweep and one adjoint sweep that
    carries both.

    Args:
        base, check: Flows of the two fields, names, letters or lists of one per step (not "combined").
        system, policy, x0, horizon, loss, control_cost, window, decay, checkpoint_every, inputs, parameters,
        clip_cotangent: As in `rollout`. A callable loss should be a mean over worlds, or pairs do not add up
            to the pair of all worlds; nor do they where `parameters` holds one number a world that requires a
            gradient, or cotangents are clipped.

    Returns:
        `GradientPair` over the trainable parameters of the policy, and those of `parameters` that require a
        gradient.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """
    call = "gradient_pair"
    horizon = check_horizon(horizon, call, system, x0)
    base_letters = _one_field(call, "base", base, horizon, window)
    check_letters = _one_field(call, "check", check, horizon, window)
    if loss is None:
        raise ValueError(
            f'{call}: loss is None, expected "final", "running" or a callable of (states, controls)'
        )
    plan = make_plan(
        call,
        system,
        policy,
        x0.detach() if isinstance(x0, Tensor) else x0,
        horizon,
        base_letters,
        check_letters,
        decay,
        loss,
        control_cost,
        checkpoint_every,
        inputs=inputs,
        physics=parameters,
        clip=clip_cotangent,
    )
    named = dict(policy.named_parameters())
    numbers = () if parameters is None else tuple(parameters.values())
    trainable = [named[name].requires_grad for name in plan.names]
    trainable += [isinstance(q, Tensor) and q.requires_grad for q in numbers]
    every = plan.names + plan.physical
    # inference mode would keep a callable loss from being differentiated: its gradients would come out zero
    with torch.inference_mode(False), torch.no_grad():
        value, grads = _pair(plan, call)
        if not all(trainable):
            members = grads.shape[1:-1].numel()
            parts = grads.split([q.numel() // members for q in plan.parameters], dim=-1)
            kept = [part for part, wanted in zip(parts, trainable) if wanted]
            grads = torch.cat(kept, dim=-1) if kept else grads[..., :0]
    names = tuple(n for n, wanted in zip(every, trainable) if wanted)
    shapes = tuple(q.shape for q, wanted in zip(plan.parameters, trainable) if wanted)
    return GradientPair(value, plan.x0.shape[-2], names, shapes, grads, plan.physical)


def _one_field(
    call: str, name: str, flow: str | Flow | Sequence[str | Flow], horizon: int, window: int | None
) -> str:
    one, second = schedule(flow, horizon, window, call)
    if second:
        raise ValueError(
            f"{call}: {name} is 'combined', expected 'regular', 'modified', 'network' or 'stopped': "
            "it is the pair that is combined"
        )
    return one


def _pair(plan: Plan, call: str) -> tuple[Tensor, Tensor]:
    """Loss and the two flat gradients (2, components) over all parameters."""
    parameters = [q.detach() for q in plan.parameters]
    saved, value = plan.path.forward(plan.spec, plan.x0, parameters)
    states, controls = saved.states, saved.controls
    adj_states = adj_controls = None
    if plan.custom_loss is not None:
        with torch.enable_grad():
            leaves = [states.detach().requires_grad_(), controls.detach().requires_grad_()]
            own = custom_loss_value(call, plan, *leaves)
            if own.requires_grad:
                adj_states, adj_controls = torch.autograd.grad(
                    own, leaves, torch.ones_like(own), allow_unused=True
                )
        value = value + own.detach()
    # one for each member of an ensemble
    adj_loss = torch.ones(states.shape[1:-2], dtype=states.dtype, device=states.device)
    g = Cotangents(adj_loss, adj_states, adj_controls)
    grads, _ = plan.path.backward(plan.spec, saved, parameters, g)
    return value, grads

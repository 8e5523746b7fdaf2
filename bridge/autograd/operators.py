"""The sweeps as torch operators. torch.compile does not look into them; it traces them by shapes. Checks that
need values are here.

None has an autograd formula: rollout.py puts them into autograd Functions (a formula registered here would
make forward-mode derivatives silently zero).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ...kernels.agreement import NSTATS
from ...kernels.policy.layout import layout
from ..passes import foreign, foreign_check, fused, sweeps
from ..passes import generated_check as generated_check  # which checks what registry prepares
from ..passes import physical_check as physical_check  # likewise
from ..passes.fused_backward import backward
from ..passes.spec import Cotangents, Spec, described, with_segment
from ..runtime.arrays import capturing
from ..runtime.compat import batching, dispatch_mode, transforming
from ..runtime.launches import span
from ..runtime.physical import prepared_with
from ..runtime.registry import prepare

CONTROL_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference of recomputed and stored controls, relative to the largest control, that rounding may
cause: batches of different sizes are summed in different orders, and a policy amplifies this.
"""


_SPEC = 7
"""Arguments that describe the rollout, in front of all others: `Spec.arguments`."""

_PLAIN = frozenset({Tensor, torch.nn.Parameter, list, tuple, int, float, str, bool, type(None)})
"""Types of arguments that do not need the dispatcher. Subclasses of Tensor may have no memory of their own.
"""


def watched(*args: Any) -> bool:
    """Whether a call with these arguments has to go through the dispatcher."""
    return (
        any(type(a) not in _PLAIN for a in args)
        or any(type(q) not in _PLAIN for a in args if type(a) is list for q in a)
        or torch.compiler.is_compiling()
        or dispatch_mode() is not None
        or transforming()
        or batching()
    )


class _Operator:
    """A torch operator that is called without the dispatcher if nothing needs it, because the dispatcher
    takes longer than a launch.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self._body = body
        self._operator = custom_op(name, body, mutates_args=())
        self.register_fake = self._operator.register_fake

    def __call__(self, *args: Any) -> Any:
        return self._operator(*args) if watched(*args) else self._body(*args)


def _operator(name: str) -> Callable[[Callable[..., Any]], _Operator]:
    return lambda body: _Operator(f"warp_sims::{name}", body)


def _dense(x: Tensor) -> Tensor:
    """Memory that holds the values as they are: contiguous, no lazy negation."""
    return x.resolve_neg().contiguous()


def check_finite(x0: Tensor) -> None:
    """Raises ValueError if an initial state is NaN or infinite."""
    if x0.numel() == 0 or capturing(x0.device):
        return
    # usually one reduction: if the sum is finite, so are its terms; it may overflow although they are finite
    if math.isfinite(float(x0.detach().sum())):
        return
    finite = torch.isfinite(x0)
    if not bool(finite.all()):
        # (member,) world
        bad = torch.nonzero(~finite.all(dim=-1)).tolist()
        names = [" of member ".join(str(i) for i in reversed(where)) for where in bad[:8]]
        shown = ", ".join(names) + (", ..." if len(bad) > 8 else "")
        raise ValueError(
            f"x0: {len(bad)} of {x0.shape[:-1].numel()} worlds hold NaN or infinity (world {shown}; world "
            f"{names[0]} is {x0[tuple(bad[0])].tolist()}), expected finite initial states; remove or repair "
            f"these rows"
        )


@_operator("simulate")
def simulate(system: int, x0: Tensor, controls: Tensor, check: bool, values: Tensor | None = None) -> Tensor:
    """States (horizon + 1, nworld, state_size) under given controls. `values` (1 or nworld, count) are
    physical parameters, here and in all that follows.
    """
    if check:
        check_finite(x0)
    simulator = foreign.foreign(system)
    if simulator is not None:
        controls = foreign.with_values(simulator, controls, values)
        if check:
            foreign_check.verify(simulator, x0, controls[0])
        return foreign.simulate(simulator, x0, controls)
    if values is None or not x0.shape[0]:
        return sweeps.simulate(prepare(system, x0.dtype, x0.device), _dense(x0), _dense(controls))
    with prepared_with(system, values, x0.shape[0], False) as own:
        return sweeps.simulate(own.prepared, _dense(x0), _dense(controls))


@simulate.register_fake
def _(system: int, x0: Tensor, controls: Tensor, check: bool, values: Tensor | None = None) -> Tensor:
    return x0.new_empty((controls.shape[0] + 1, *x0.shape))


@_operator("loss")
def loss(
    system: int,
    flows: str,
    decay: float,
    final: float,
    running: float,
    control: float,
    segment: int,
    states: Tensor,
    controls: Tensor,
) -> Tensor:
    """Built-in loss of a trajectory, a scalar."""
    own = described(system, flows, decay, final, running, control, segment)
    simulator = foreign.foreign(own.system)
    if simulator is not None:
        return foreign.loss(simulator, own, states, controls)
    p = prepare(own.system, states.dtype, states.device)
    return sweeps.loss(p, _dense(states), _dense(controls), own.weights)


@loss.register_fake
def _(*arguments: Any) -> Tensor:
    states, _ = arguments[_SPEC:]
    return states.new_empty(())


def costs(system: int, x: Tensor) -> Tensor:
    """The system's own cost of states (nworld, state_size), one a world; nothing is differentiated."""
    simulator = foreign.foreign(system)
    with torch.no_grad():
        if simulator is not None:
            return simulator.cost(x)
        return sweeps.costs(prepare(system, x.dtype, x.device), _dense(x))


@_operator("fused_rollout")
def fused_rollout(
    system: int,
    flows: str,
    decay: float,
    final: float,
    running: float,
    control: float,
    segment: int,
    network: str,
    parameters: list[Tensor],
    x0: Tensor,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fused forward sweep: states, controls, loss, hidden activations, packed parameters.

    With x0 (members, nworld, state_size) the parameters are stacked, and everything has a member axis. If the
    description has a segment, the activations are not kept: they have no rows.
    """
    check_finite(x0)
    own = with_segment(described(system, flows, decay, final, running, control, segment), network, x0)
    p = prepare(own.system, x0.dtype, x0.device)
    with span("pack_parameters"):
        packed = fused.pack(network, parameters, x0.shape[:-2])
    shape = own.horizon, own.weights, own.segment
    if values is None or not x0.numel():
        return *fused.rollout(p, network, packed, _dense(x0), *shape), packed
    with prepared_with(own.system, values, x0.shape[:-1].numel(), False) as w:
        return *fused.rollout(w.prepared, network, packed, _dense(x0), *shape), packed


@fused_rollout.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    network, _, x0 = arguments[_SPEC : _SPEC + 3]
    own = with_segment(described(*arguments[:_SPEC]), network, x0)
    lay = layout(network, x0.element_size())
    return (
        x0.new_empty((own.horizon + 1, *x0.shape)),
        x0.new_empty((own.horizon, *x0.shape[:-1], lay.control_size)),
        x0.new_empty(x0.shape[:-2]),
        x0.new_empty(fused.hidden_shape(x0, own.horizon, lay.row, own.segment)),
        x0.new_empty((*x0.shape[:-2], lay.packed)),
    )


@_operator("fused_backward")
def fused_backward(
    system: int,
    flows: str,
    decay: float,
    final: float,
    running: float,
    control: float,
    segment: int,
    network: str,
    packed: Tensor,
    hidden: Tensor,
    states: Tensor,
    controls: Tensor,
    adj_loss: Tensor | None,
    adj_states: Tensor | None,
    adj_controls: Tensor | None,
    values: Tensor | None = None,
    wanted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass of a fused rollout: gradients (fields, parameters), cotangents of x0 (fields, nworld,
    state_size) and, if `wanted`, of the physical parameters (fields, nworld, count). For an ensemble the
    first two have a member axis after the fields.
    """
    own = described(system, flows, decay, final, running, control, segment)
    if segment < 0:
        own = with_segment(own, network, states[0])
    g = Cotangents(adj_loss, adj_states, adj_controls)
    given = network, packed, hidden, states, controls, g
    if values is None or not states.numel():
        p = prepare(own.system, states.dtype, states.device)
        return *backward(p, own, *given), _no_adjoint(own, states, values, wanted)
    with prepared_with(own.system, values, states.shape[1:-1].numel(), wanted) as w:
        return *backward(w.prepared, own, *given), w.adjoint(len(own.schedules))


@fused_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    network, _, _, states = arguments[_SPEC : _SPEC + 4]
    values, wanted = _given(arguments[_SPEC + 8 :])
    own = described(*arguments[:_SPEC])
    fields = len(own.schedules)
    parameters = layout(network, states.element_size()).unpack.size
    grads = states.new_empty((fields, *states.shape[1:-2], parameters))
    adj_values = _no_adjoint(own, states, values, wanted)
    return grads, states.new_empty((fields, *states.shape[1:])), adj_values


def _given(last: tuple[Any, ...]) -> tuple[Tensor | None, bool]:
    """The last arguments of an operator, which can be left out."""
    return (last[0], last[1] if len(last) > 1 else False) if last else (None, False)


def _no_adjoint(spec: Spec, states: Tensor, values: Tensor | None, wanted: bool) -> Tensor:
    """Zero cotangents of the physical parameters."""
    if values is None or not wanted:
        return states.new_empty((0, 0, 0))
    return states.new_zeros((len(spec.schedules), states.shape[1:-1].numel(), values.shape[1]))


@_operator("adjoint")
def adjoint(
    system: int,
    flows: str,
    decay: float,
    final: float,
    running: float,
    control: float,
    segment: int,
    states: Tensor,
    controls: Tensor,
    recomputed: Tensor | None,
    tolerance: float,
    jac: Tensor | None,
    adj_loss: Tensor | None,
    adj_states: Tensor | None,
    adj_controls: Tensor | None,
    t0: int = 0,
    carried: Tensor | None = None,
    loss_worlds: int = 0,
    values: Tensor | None = None,
    wanted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint sweep: cotangents of the controls (fields, steps, nworld, control_size), of x0 (fields, nworld,
    state_size) and, if `wanted`, of the physical parameters (fields, nworld, count).

    `recomputed` are the controls that the policy gives for all stored states at once; they must agree with
    the stored ones. For a segment of a rollout, everything except the schedules begins at its step `t0`, and
    `carried` is the cotangent of its last state, from the sweep over the later steps. The loss is a mean over
    `loss_worlds` worlds; 0 means those of the trajectory.
    """
    if recomputed is not None:
        check_recomputed(recomputed, controls, tolerance, t0)
    own = described(system, flows, decay, final, running, control, segment)
    g = Cotangents(adj_loss, adj_states, adj_controls)
    simulator = foreign.foreign(own.system)
    if simulator is not None:
        m, more = controls.shape[-1], foreign.with_values(simulator, controls, values)
        sweep = own, states, more, jac, g, t0, carried, loss_worlds
        mu, adj_x0 = foreign.adjoint(simulator, *sweep)
        if values is None or not wanted:
            return mu[..., :m], adj_x0, _no_adjoint(own, states, values, wanted)
        return mu[..., :m].contiguous(), adj_x0, mu[..., m:].sum(1)
    jac = None if jac is None else jac.contiguous()
    sweep = own, _dense(states), _dense(controls), jac, g, t0, carried, loss_worlds
    if values is None or not states.numel():
        p = prepare(own.system, states.dtype, states.device)
        return *sweeps.adjoint(p, *sweep), _no_adjoint(own, states, values, wanted)
    with prepared_with(own.system, values, states.shape[1:-1].numel(), wanted) as w:
        return *sweeps.adjoint(w.prepared, *sweep), w.adjoint(len(own.schedules))


@adjoint.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    states, controls = arguments[_SPEC : _SPEC + 2]
    values, wanted = _given(arguments[_SPEC + 11 :])
    own = described(*arguments[:_SPEC])
    adj_x0 = states.new_empty((len(own.schedules), *states.shape[1:]))
    mu = states.new_empty((len(own.schedules), *controls.shape))
    return mu, adj_x0, _no_adjoint(own, states, values, wanted)


def check_recomputed(recomputed: Tensor, controls: Tensor, tolerance: float, t0: int) -> None:
    """Raises ValueError if recomputed controls (steps, nworld, control_size) of the steps from `t0` on differ
    from those that the rollout stored.
    """
    if controls.numel() == 0 or capturing(controls.device):
        return
    if torch.allclose(
        recomputed, controls, rtol=0.0, atol=tolerance * (1.0 + _largest(controls)), equal_nan=True
    ):
        return
    off = (recomputed - controls).abs()
    off = torch.where(off.isnan(), torch.inf, off)
    t, world, c = (int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    raise ValueError(
        f"policy: for the state of step {t0 + t}, world {world} it gave control "
        f"{float(controls[t, world, c])!r} in the forward pass and "
        f"{float(recomputed[t, world, c])!r} when recomputed with all steps in one batch; expected a policy "
        f"that acts row by row and "
        "deterministically (no batch normalisation in training mode, no dropout, no state of its own); call "
        "policy.eval() or remove "
        "what mixes rows or draws random numbers"
    )


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


@_operator("combine")
def combine(base: Tensor, check: Tensor, keep_check: bool) -> tuple[Tensor, Tensor]:
    """Component-wise comparison of two gradients (components,) or (members, components): the combined one,
    and the sums named in kernels/agreement.py, (sums,) or (members, sums).
    """
    return sweeps.combine(base.contiguous(), check.contiguous(), keep_check)


@combine.register_fake
def _(base: Tensor, check: Tensor, keep_check: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base), base.new_empty((*base.shape[:-1], NSTATS), dtype=torch.float64)

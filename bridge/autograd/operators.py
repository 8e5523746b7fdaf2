"""The sweeps as torch operators. torch.compile does not look into them; it traces them by shapes. Checks that
need values are here.

None has an autograd formula: rollout.py puts them into autograd Functions (a formula registered here would
make forward-mode derivatives silently zero).
"""

import inspect
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
from ..passes.fused_backward import backward
from ..passes.physical_check import checked_with
from ..passes.recomputed import furthest
from ..passes.simulator import simulator_of, with_values
from ..passes.spec import Cotangents, Spec, described, with_segment
from ..runtime.arrays import capturing
from ..runtime.compat import batching, dispatch_mode, transforming
from ..runtime.launches import span
from ..runtime.registry import prepare

CONTROL_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference of recomputed and stored controls, relative to the largest control, that rounding may
cause: batches of different sizes are summed in different orders, and a policy amplifies this.
"""


_PLAIN = frozenset({Tensor, torch.nn.Parameter, Spec, list, tuple, int, float, str, bool, type(None)})
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
    takes longer than a launch. Where its body takes a `Spec`, the dispatcher is given `Spec.arguments`.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self._body, self._signature = body, inspect.signature(body)
        self._operator = custom_op(name, _flat(body, self._signature), mutates_args=())

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Registers what gives the shapes of the outputs; it takes the body's arguments by name."""

        def named(*args: Any) -> Any:
            bound = self._signature.bind(*args)
            bound.apply_defaults()
            return fake(**bound.arguments)

        self._operator.register_fake(_flat(named, self._signature))

    def __call__(self, first: Any, *args: Any) -> Any:
        if not watched(first, *args):
            return self._body(first, *args)
        return self._operator(*(first.arguments() if isinstance(first, Spec) else (first,)), *args)


def _flat(body: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """The same function with the arguments of a torch operator: `Spec.arguments` in place of a `Spec`."""
    first, *others = signature.parameters.values()
    if first.annotation is not Spec:
        return body
    own = inspect.signature(described).parameters.values()

    def flat(*args: Any) -> Any:
        return body(described(*args[: len(own)]), *args[len(own) :])

    vars(flat)["__signature__"] = signature.replace(parameters=[*own, *others])
    return flat


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
    simulator = simulator_of(system)
    if simulator is not None:
        controls = with_values(simulator, controls, values)
        if check:
            foreign_check.verify(simulator, x0, controls[0])
        return foreign.simulate(simulator, x0, controls)
    if values is None or not x0.shape[0]:
        return sweeps.simulate(prepare(system, x0.dtype, x0.device), _dense(x0), _dense(controls))
    with checked_with(system, values, x0.shape[0], False) as own:
        return sweeps.simulate(own.prepared, _dense(x0), _dense(controls))


@simulate.register_fake
def _(x0: Tensor, controls: Tensor, **_: Any) -> Tensor:
    return x0.new_empty((controls.shape[0] + 1, *x0.shape))


@_operator("loss")
def loss(spec: Spec, states: Tensor, controls: Tensor) -> Tensor:
    """Built-in loss of a trajectory, a scalar."""
    simulator = simulator_of(spec.system)
    if simulator is not None:
        return foreign.loss(simulator, spec, states, controls)
    p = prepare(spec.system, states.dtype, states.device)
    return sweeps.loss(p, _dense(states), _dense(controls), spec.weights)


@loss.register_fake
def _(states: Tensor, **_: Any) -> Tensor:
    return states.new_empty(())


def costs(system: int, x: Tensor) -> Tensor:
    """The system's own cost of states (nworld, state_size), one a world; nothing is differentiated."""
    simulator = simulator_of(system)
    with torch.no_grad():
        if simulator is not None:
            return simulator.cost(x)
        return sweeps.costs(prepare(system, x.dtype, x.device), _dense(x))


def cost_gradients(system: int, x: Tensor) -> Tensor:
    """Gradient of the system's own cost of each of the states (nworld, state_size) by that state."""
    simulator = simulator_of(system)
    if simulator is not None:
        return simulator.cost_gradient(x)
    return sweeps.cost_gradients(prepare(system, x.dtype, x.device), system, x)


@_operator("fused_rollout")
def fused_rollout(
    spec: Spec, network: str, parameters: list[Tensor], x0: Tensor, values: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fused forward sweep: states, controls, loss, hidden activations, packed parameters.

    With x0 (members, nworld, state_size) the parameters are stacked, and everything has a member axis. If the
    description has a segment, the activations are not kept: they have no rows.
    """
    check_finite(x0)
    own = with_segment(spec, network, x0)
    p = prepare(own.system, x0.dtype, x0.device)
    with span("pack_parameters"):
        packed = fused.pack(network, parameters, x0.shape[:-2])
    shape = own.horizon, own.weights, own.segment
    if values is None or not x0.numel():
        return *fused.rollout(p, network, packed, _dense(x0), *shape), packed
    with checked_with(own.system, values, x0.shape[:-1].numel(), False) as w:
        return *fused.rollout(w.prepared, network, packed, _dense(x0), *shape), packed


@fused_rollout.register_fake
def _(spec: Spec, network: str, x0: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    own = with_segment(spec, network, x0)
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
    spec: Spec,
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
    if spec.segment < 0:
        spec = with_segment(spec, network, states[0])
    g = Cotangents(adj_loss, adj_states, adj_controls)
    return _backwards(backward, spec, states, values, wanted, network, packed, hidden, states, controls, g)


@fused_backward.register_fake
def _(
    spec: Spec, network: str, states: Tensor, values: Tensor | None, wanted: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    fields = len(spec.schedules)
    parameters = layout(network, states.element_size()).unpack.size
    grads = states.new_empty((fields, *states.shape[1:-2], parameters))
    adj_x0 = states.new_empty((fields, *states.shape[1:]))
    return grads, adj_x0, _no_adjoint(spec, states, values, wanted)


def _backwards(
    run: Callable[..., tuple[Tensor, Tensor]],
    spec: Spec,
    states: Tensor,
    values: Tensor | None,
    wanted: bool,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward pass or sweep gives under physical parameters, and their cotangents."""
    if values is None or not states.numel():
        p = prepare(spec.system, states.dtype, states.device)
        return *run(p, spec, *given), _no_adjoint(spec, states, values, wanted)
    with checked_with(spec.system, values, states.shape[1:-1].numel(), wanted) as w:
        return *run(w.prepared, spec, *given), w.adjoint(len(spec.schedules))


def _no_adjoint(spec: Spec, states: Tensor, values: Tensor | None, wanted: bool) -> Tensor:
    """Zero cotangents of the physical parameters."""
    if values is None or not wanted:
        return states.new_empty((0, 0, 0))
    return states.new_zeros((len(spec.schedules), states.shape[1:-1].numel(), values.shape[1]))


@_operator("adjoint")
def adjoint(
    spec: Spec,
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
    g = Cotangents(adj_loss, adj_states, adj_controls)
    simulator = simulator_of(spec.system)
    if simulator is not None:
        m, more = controls.shape[-1], with_values(simulator, controls, values)
        mu, adj_x0 = foreign.adjoint(simulator, spec, states, more, jac, g, t0, carried, loss_worlds)
        if values is None or not wanted:
            return mu[..., :m], adj_x0, _no_adjoint(spec, states, values, wanted)
        return mu[..., :m].contiguous(), adj_x0, mu[..., m:].sum(1)
    jac = None if jac is None else jac.contiguous()
    sweep = _dense(states), _dense(controls), jac, g, t0, carried, loss_worlds
    return _backwards(sweeps.adjoint, spec, states, values, wanted, *sweep)


@adjoint.register_fake
def _(
    spec: Spec, states: Tensor, controls: Tensor, values: Tensor | None, wanted: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    adj_x0 = states.new_empty((len(spec.schedules), *states.shape[1:]))
    mu = states.new_empty((len(spec.schedules), *controls.shape))
    return mu, adj_x0, _no_adjoint(spec, states, values, wanted)


def check_recomputed(recomputed: Tensor, controls: Tensor, tolerance: float, t0: int) -> None:
    """Raises ValueError if recomputed controls (steps, nworld, control_size) of the steps from `t0` on differ
    from those that the rollout stored.
    """
    found = furthest(recomputed, controls, tolerance)
    if found is None:
        return
    t, world, c = found
    raise ValueError(
        f"policy: for the state of step {t0 + t}, world {world} it gave control "
        f"{float(controls[t, world, c])!r} in the forward pass and "
        f"{float(recomputed[t, world, c])!r} when recomputed with all steps in one batch; expected a policy "
        f"that acts row by row and "
        "deterministically (no batch normalisation in training mode, no dropout, no state of its own); call "
        "policy.eval() or remove "
        "what mixes rows or draws random numbers"
    )


@_operator("combine")
def combine(base: Tensor, check: Tensor, keep_check: bool) -> tuple[Tensor, Tensor]:
    """Component-wise comparison of two gradients (components,) or (members, components): the combined one,
    and the sums named in kernels/agreement.py, (sums,) or (members, sums).
    """
    return sweeps.combine(base.contiguous(), check.contiguous(), keep_check)


@combine.register_fake
def _(base: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base), base.new_empty((*base.shape[:-1], NSTATS), dtype=torch.float64)

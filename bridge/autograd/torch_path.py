"""A rollout whose policy torch evaluates: any module.

Forwards it is evaluated step by step. Backwards it is not: it is evaluated again for all stored states at
once, its Jacobians are taken there before the adjoint sweep, and its weight gradients behind it. Where that
would be large it happens in blocks of worlds and segments of time. With so many worlds that a step keeps a
CPU busy, autograd's recordings of the forward steps are kept instead, and go back with the sweep step by
step: no second evaluation, and one pull where Jacobians would be one and the weights another.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vjp

from ...kernels.flow import NETWORK, Flow
from ..passes import sweeps
from ..passes.foreign_torch import ordinary, recording
from ..passes.operations import evaluate
from ..passes.physical import Physical, with_physical
from ..passes.simulator import simulator_of, stepped, with_values
from ..passes.spec import Cotangents, Saved, Spec, pieces
from ..runtime.arrays import empty
from ..runtime.launches import span
from ..runtime.registry import prepare
from . import operators

JACOBIAN_ELEMENTS = 1 << 26
"""Elements of the policy's Jacobians held at once on the torch path; worlds go through in blocks where those
of a segment are more.
"""


CLOSED = str.maketrans("RN", "MS")
"""Flows with their network edges closed."""


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


def call_with(
    module: torch.nn.Module, tensors: dict[str, Tensor], x: Tensor, given: Tensor | None = None
) -> Any:
    """Calls a module, on states and what it is given beside them, with tensors in the places of its
    parameters and buffers, and leaves it as it was.
    """
    arguments = (x,) if given is None else (x, given)
    return functional_call(module, tensors, arguments, tie_weights=False)


def recording_here() -> bool:
    """Whether autograd would record an evaluation, were it allowed to."""
    with torch.inference_mode(False), torch.enable_grad():
        return recording()


def leaves(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same numbers, for autograd to record evaluations with that are nobody else's."""
    with torch.inference_mode(False):
        return tuple(ordinary(p).requires_grad_() for p in parameters)


class _Recording(NamedTuple):
    """One evaluation of the policy, recorded by autograd."""

    controls: Tensor
    states: Tensor
    parameters: tuple[Tensor, ...]

    def pull(self, adj: Tensor, of: tuple[Tensor, ...], last: bool = False) -> tuple[Tensor, ...]:
        """Cotangents of some of its tensors for one of the controls. The last pull frees what was recorded:
        later ones find its memory, still in the cache.
        """
        if not of or not self.controls.requires_grad:  # nothing of the policy depends on these
            return tuple(map(torch.zeros_like, of))
        return torch.autograd.grad(self.controls, of, adj, retain_graph=not last, materialize_grads=True)


class TorchPath(NamedTuple):
    """The way of a rollout whose policy torch evaluates: the module, and the autocast it ran under."""

    module: torch.nn.Module
    places: tuple[tuple[str, ...], ...]
    """Names of the places of each parameter, see `places`."""
    autocast: torch.dtype | None
    whole: bool = False
    """Whether the worlds of the simulator cannot go through one part after the other."""
    network: str = ""
    """The module's operations, where these are known: then no parameters are put into it at every step."""
    constants: tuple[Tensor, ...] = ()
    """Vectors that these operations take besides."""
    inputs: Tensor | None = None
    """(horizon, nworld, k) that the policy is given beside the states."""
    physical: Physical | None = None
    """Numbers of the physics that stand behind the policy's parameters."""
    by_steps: bool = False
    """Whether the steps go back one by one."""
    recorded: list[_Recording | None] | None = None
    """Where the forward steps are then kept for the backward pass; None where they are evaluated again, as
    the steps are that a backward pass has used.
    """

    kept_outputs = 0

    def policy(
        self, parameters: Sequence[Tensor], x: Tensor, given: Tensor | None = None, own: bool = False
    ) -> Tensor:
        """Controls (n, control_size) for states (n, state_size), with these parameters in place, which are
        the module's `own` or substitutes.
        """
        if self.autocast is None and not torch.is_autocast_enabled(x.device.type):
            return self._evaluate(parameters, x, given, own).to(x.dtype)
        with torch.autocast(
            x.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        ):
            u = self._evaluate(parameters, x, given, own)
        return u.to(x.dtype)

    def _evaluate(self, parameters: Sequence[Tensor], x: Tensor, given: Tensor | None, own: bool) -> Tensor:
        if self.network:
            return evaluate(self.network, parameters, self.constants, x)
        if own:
            return self.module(x) if given is None else self.module(x, given)
        return call_with(self.module, self.substitutes(parameters), x, given)

    def _owns(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the module's own parameters: then it is called as it is, without substitutes."""
        for names, q in zip(self.places, parameters):
            for name in names:
                *path, last = name.split(".")
                owner: Any = self.module
                for part in path:
                    owner = owner._modules[part]
                if owner._parameters.get(last) is not q:
                    return False
        return True

    def _record(self, parameters: tuple[Tensor, ...], points: Tensor, given: Tensor | None) -> _Recording:
        """An evaluation at points (n, state_size) with `leaves` of the parameters."""
        with torch.inference_mode(False), torch.enable_grad():
            x = ordinary(points).requires_grad_()
            return _Recording(self.policy(parameters, x, given), x, parameters)

    def substitutes(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors in the order of the parameters, by the names of all places they take."""
        return {name: q for names, q in zip(self.places, parameters) for name in names}

    @property
    def tolerance(self) -> float | None:
        """Accepted difference of recomputed controls under autocast: a few units in the last place of its
        type.
        """
        return None if self.autocast is None else 16.0 * torch.finfo(self.autocast).eps

    def forward(self, spec: Spec, x0: Tensor, parameters: Sequence[Tensor]) -> tuple[Saved, Tensor]:
        """What the backward pass needs, and the loss; the policy is evaluated step by step."""
        plain = simulator_of(spec.system) is None and self.physical is None
        if plain and not operators.watched(x0, list(parameters)):
            return self._forward_in_place(spec, x0, parameters)
        x, states, controls = x0, [x0], []
        parameters, values = self.physical.split(parameters) if self.physical else (parameters, None)
        simulator = None if operators.watched(x0, list(parameters)) else simulator_of(spec.system)
        for t in range(spec.horizon):
            with span("policy"):
                u = self.control(parameters, x0.clone() if t == 0 else x, t)
            if simulator is None or t == 0 or not x0.shape[0]:
                x = operators.simulate(spec.system, x, u.unsqueeze(0), t == 0, values)[1]
            else:
                given = with_values(simulator, u.unsqueeze(0), values)[0]
                x = stepped(simulator, x, given).clone()  # it may write there again
            controls.append(u)
            states.append(x)
        saved = Saved(torch.stack(states), torch.stack(controls))
        return saved, operators.loss(spec, *saved[:2])

    def _forward_in_place(self, spec: Spec, x0: Tensor, parameters: Sequence[Tensor]) -> tuple[Saved, Tensor]:
        """The same, with what torch's operators cost at every step spared: the trajectory is written where it
        will stand, and a module with its own parameters is called as it is.
        """
        operators.check_finite(x0)
        p = prepare(spec.system, x0.dtype, x0.device)
        saved = Saved(
            empty(x0, spec.horizon + 1, *x0.shape), empty(x0, spec.horizon, x0.shape[0], p.control_size)
        )
        saved.states[0].copy_(x0)
        own = self._owns(parameters)
        kept = self.recorded if recording_here() else None
        q = () if kept is None else leaves(parameters)
        with sweeps.advancing(p, saved.states, saved.controls) as advance:
            for t, (x, u) in enumerate(zip(saved.states[:-1].unbind(), saved.controls.unbind())):
                with span("policy"):
                    if kept is None:
                        u.copy_(self.control(parameters, x, t, own))
                    else:
                        given = None if self.inputs is None else self.inputs[t]
                        step = self._record(q, x, given)
                        kept.append(step)
                        u.copy_(step.controls.detach())
                advance(t)
        return saved, operators.loss(spec, *saved[:2])

    def control(self, parameters: Sequence[Tensor], x: Tensor, t: int, own: bool = False) -> Tensor:
        """What the policy answers to the states of step t, which it must leave as they are."""
        given = None if self.inputs is None else self.inputs[t]
        if torch.compiler.is_compiling() or x.is_inference():
            return self.policy(parameters, x, given, own)
        version = x._version
        u = self.policy(parameters, x, given, own)
        if x._version != version:
            raise ValueError(
                f"policy: it changed its input in place at step {t}, expected the states as they are: they "
                "are simulated from and read again in the backward pass; work on x.clone()"
            )
        return u

    def backward(
        self, spec: Spec, saved: Saved, parameters: Sequence[Tensor], g: Cotangents
    ) -> tuple[Tensor, Tensor]:
        """Gradients (fields, parameters) and cotangents of x0 (fields, nworld, state_size), fields not yet
        compared: in blocks of worlds whose Jacobians of a segment are not too large.
        """
        watched = operators.watched(saved.states, list(parameters))
        if self.by_steps and self.physical is None and not watched and recording_here():
            return self._steps_back(spec, saved, parameters, g)
        if self.physical is None:
            return self._pull(spec, saved, parameters, None, g)[:2]
        policy, values = self.physical.split(parameters)
        grads, adj_x0, adj = self._pull(spec, saved, policy, values, g)
        return with_physical(self.physical, grads, adj, parameters), adj_x0

    def _pull(
        self,
        spec: Spec,
        saved: Saved,
        parameters: Sequence[Tensor],
        values: Tensor | None,
        g: Cotangents,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the policy's parameters, and the cotangents of the numbers of the physics (fields,
        nworld, count).
        """
        horizon, nworld, m = saved.controls.shape
        per_world = max(1, (spec.segment or horizon) * m * saved.states.shape[2])
        block = max(1, JACOBIAN_ELEMENTS // per_world) if spec.network_open else max(nworld, 1)
        if block >= nworld or self.whole:
            return self._some_worlds(spec, saved, parameters, values, g, nworld)
        found = []
        for first in range(0, nworld, block):
            part = slice(first, min(first + block, nworld))
            some = Saved(saved.states[:, part], saved.controls[:, part])
            path = self if self.inputs is None else self._replace(inputs=self.inputs[:, part])
            row = values if values is None or values.shape[0] == 1 else values[part]
            found.append(path._some_worlds(spec, some, parameters, row, g.worlds(part), nworld))
        grads, adj_x0, adj_values = zip(*found)
        return torch.stack(grads).sum(0), torch.cat(adj_x0, dim=1), torch.cat(adj_values, dim=1)

    def _steps_back(
        self, spec: Spec, saved: Saved, parameters: Sequence[Tensor], g: Cotangents
    ) -> tuple[Tensor, Tensor]:
        """The same, one step after the other: the sweep, with the network edges closed, then what crosses
        them, with the weight gradients from the same pull.
        """
        physics = spec._replace(base=spec.base.translate(CLOSED), check=spec.check.translate(CLOSED))
        horizon, nworld, _ = saved.controls.shape
        recorded = self.recorded if self.recorded and len(self.recorded) == horizon else [None] * horizon
        q = leaves(parameters)
        tolerance = self.tolerance or operators.CONTROL_TOLERANCE[saved.states.dtype]
        grads: list[list[Tensor]] = [[] for _ in spec.schedules]
        adj_x0 = None
        for t in reversed(range(horizon)):
            states, controls = saved.states[t : t + 2], saved.controls[t : t + 1]
            own, again = recorded[t], None
            if own is None:
                with span("policy_again"):
                    given = None if self.inputs is None else self.inputs[t]
                    own = self._record(q, saved.states[t], given)
                    again = own.controls.detach().unsqueeze(0)
            recorded[t] = None
            sweep = states, controls, again, tolerance, None, *g.steps(t, t + 1), t, adj_x0, nworld
            mu, adj_x0, _ = operators.adjoint(physics, *sweep)
            for f, schedule in enumerate(spec.schedules):
                is_open = Flow(schedule[t]).edges & NETWORK
                with span("policy_weight_grad"):
                    of = (own.states, *own.parameters) if is_open else own.parameters
                    found = own.pull(mu[f, 0], of, last=f == len(grads) - 1)
                if is_open:
                    adj_x0[f] += found[0]
                    found = found[1:]
                if grads[f]:
                    for total, one in zip(grads[f], found, strict=True):
                        total += one
                else:
                    grads[f] = [one.clone() for one in found]
        assert adj_x0 is not None
        flat = [[q.reshape(-1).to(saved.states.dtype) for q in field] for field in grads]
        empty_one = saved.states.new_zeros(0)
        return torch.stack([torch.cat(field) if field else empty_one for field in flat]), adj_x0

    def _some_worlds(
        self,
        spec: Spec,
        saved: Saved,
        parameters: Sequence[Tensor],
        values: Tensor | None,
        g: Cotangents,
        loss_worlds: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of some of the `loss_worlds` worlds over which the loss is a mean, over one segment of steps
        after the other.
        """
        tolerance = self.tolerance or operators.CONTROL_TOLERANCE[saved.states.dtype]
        wanted = self.physical is not None and self.physical.wanted

        # a function, so that nothing of a segment is left when the next one is linearised
        def segment(t0: int, t1: int, carried: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            states, controls = saved.states[t0 : t1 + 1], saved.controls[t0:t1]
            recomputed, pull, jac = self.linearised(spec, parameters, states[:-1].flatten(0, 1), t1 - t0, t0)
            sweep = states, controls, recomputed, tolerance, jac, *g.steps(t0, t1), t0, carried, loss_worlds
            mu, adj_x0, adj = operators.adjoint(spec, *sweep, values, wanted)
            return weight_gradients(pull, mu), adj_x0, adj

        (t0, t1), *earlier = pieces(spec.horizon, spec.segment or spec.horizon)
        grads, adj_x0, adj_values = segment(t0, t1, None)
        for t0, t1 in earlier:
            own, adj_x0, adj = segment(t0, t1, adj_x0)
            grads, adj_values = grads + own, adj_values + adj
        return grads, adj_x0, adj_values

    def linearised(
        self, spec: Spec, parameters: Sequence[Tensor], points: Tensor, steps: int, t0: int
    ) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]], Tensor | None]:
        """Of the policy at the points (steps * nworld, state_size) of the steps from `t0` on: controls
        (steps, nworld, control_size), the pullback to the parameters, and dN/dx, None where no network edge
        is open.
        """
        nworld, size = points.shape[0] // steps, points.shape[1]
        given = None if self.inputs is None else self.inputs[t0 : t0 + steps].flatten(0, 1)
        once = not operators.watched(points, list(parameters)) and recording_here()
        # all are there for `pull`: a traced graph refuses a variable of it that has no value
        own: Any = None
        pull_q: Any = None
        pull_x: Any = None
        with span("policy_again"):
            if once:
                own = self._record(leaves(parameters), points, given)
                recomputed = own.controls.detach()
            else:
                recomputed, pull_q, *_ = vjp(lambda q: self.policy(q, points, given), tuple(parameters))
        m, jac = recomputed.shape[1], None
        if spec.network_open:
            with span("policy_jacobians"):
                if not once:
                    _, pull_x, *_ = vjp(lambda x: self.policy(parameters, x, given), points)
                # one unit cotangent a control component: rows do not mix, so all points share a product
                columns = []
                for c in range(m):
                    unit = torch.zeros_like(recomputed)
                    unit[:, c] = 1.0
                    columns.append((own.pull(unit, (own.states,)) if once else pull_x(unit))[0])
                jac = torch.stack(columns, dim=1).view(steps, nworld, m, size)

        def pull(adj: Tensor) -> Sequence[Tensor]:
            return own.pull(adj, own.parameters) if once else pull_q(adj)[0]

        return recomputed.view(steps, nworld, m), pull, jac


def weight_gradients(pull: Callable[[Tensor], Sequence[Tensor]], mu: Tensor) -> Tensor:
    """Flat gradients of the parameters (fields, parameters) of the cotangents of the controls (fields, steps,
    nworld, control_size).
    """
    fields = []
    for f in range(mu.shape[0]):
        with span("policy_weight_grad"):
            field = pull(mu[f].flatten(0, 1))
        fields.append(torch.cat([g.reshape(-1).to(mu.dtype) for g in field]) if field else mu.new_zeros(0))
    return torch.stack(fields)

"""Launches the sweeps on tensors: allocates outputs, picks kernels, spreads CPU work over threads.

No autograd here; operators.py makes torch operators of these and tape.py records them on a Warp tape.
Shapes: x0 (nworld, state_size), states (horizon + 1, nworld, state_size), controls (horizon, nworld,
control_size). Of an ensemble of policies the worlds have two axes, (members, worlds of a member): the kernels
see them as one, member after member.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import warp as wp

from ...kernels.agreement import CHUNK, GPU_CHUNK, NSTATS, chunks, make_combine
from ...kernels.flow import PHYSICS, Flow
from ..runtime.arrays import WARP_DTYPE, constant, empty, stream, warp_device
from ..runtime.launches import Launch, Pool, array
from ..runtime.registry import Prepared
from ..runtime.team import Team, shares
from .spec import Cotangents, LossWeights, Spec

WORLD_STEPS_PER_THREAD = 256
"""Below this, a second thread costs a sweep without a policy more than it gains (some 5 to 10 us)."""
CHUNKS_PER_THREAD = 8
"""The same for the comparison of two gradients."""


def edge_masks(key: tuple[tuple[str, ...], bool]) -> np.ndarray:
    """Edge masks (fields, horizon) of schedules."""
    schedules, closed_physics = key
    masks = np.array([[Flow(letter).edges for letter in schedule] for schedule in schedules], dtype=np.int32)
    # a decay of 0 selects like a closed gate: 0 inf would be NaN
    return masks & ~PHYSICS if closed_physics else masks


def check_has_loss(p: Prepared, weights: LossWeights) -> None:
    weights.check(p.functions.loss is not None)


def _launches(
    p: Prepared,
    kernel: wp.Kernel,
    threads: int,
    steps: int,
    values: dict[str, Any],
    worlds: int = 1,
) -> list[Launch]:
    """Launches over some steps that share the threads, each of which has up to `worlds` worlds."""
    least = -(-WORLD_STEPS_PER_THREAD // (steps * worlds))
    parts = shares(threads, least) if p.device.is_cpu else [range(threads)]
    return [Launch(kernel, len(part), values | {"first": part.start}, p.device) for part in parts]


def _threads(p: Prepared, members: int, nworld: int) -> int:
    """Number of threads for the worlds of all members, which take a block each (a block lies within a member)
    or a world each.
    """
    return members * -(-(nworld // members) // p.open_loop.worlds)


_ROW = 1024


def total(world_loss: torch.Tensor) -> torch.Tensor:
    """Sum over worlds, for each member of an ensemble. It is the same for every number of threads and
    members; a plain sum is not, because torch splits long sums by threads and orders them by shape.
    """
    if world_loss.ndim > 1:
        return torch.stack([total(member) for member in world_loss])
    if world_loss.numel() <= 16 * _ROW:
        return world_loss.sum()
    whole = world_loss.numel() // _ROW * _ROW
    return world_loss[:whole].view(-1, _ROW).sum(1).sum() + world_loss[whole:].sum()


class _Simulate:
    """Prepared open-loop sweep."""

    def __init__(self, p: Prepared, horizon: int, nworld: int, threads: int) -> None:
        n, m, size = p.state_size, p.control_size, p.itemsize
        self.x0 = array(size, nworld, n, components=1)
        self.controls = array(size, horizon, nworld, m, components=1)
        self.states = array(size, horizon + 1, nworld, n, components=1)
        values = {"x0": self.x0, "controls": self.controls, "states": self.states}
        values |= {"p": p.params, "horizon": horizon}
        over = _threads(p, 1, nworld)
        self.run = Team(_launches(p, p.open_loop.simulate, over, horizon, values, p.open_loop.worlds))


_simulate = Pool(_Simulate)


def simulate(p: Prepared, x0: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """States under given controls."""
    horizon, nworld = controls.shape[0], x0.shape[0]
    states = empty(x0, horizon + 1, nworld, p.state_size)
    if nworld:
        with _simulate.borrow(p, horizon, nworld, torch.get_num_threads()) as sweep, stream(x0.device):
            sweep.x0.data, sweep.controls.data = x0.data_ptr(), controls.data_ptr()
            sweep.states.data = states.data_ptr()
            sweep.run()
    return states


@contextlib.contextmanager
def advancing(p: Prepared, states: torch.Tensor, controls: torch.Tensor) -> Iterator[Callable[[int], None]]:
    """Lends a function that simulates step t of a trajectory in place, from states[t] to states[t + 1] under
    controls[t]: the open-loop sweep over one step, prepared once for all of them.
    """
    nworld = controls.shape[1]
    if not nworld:
        yield lambda t: None
        return
    with _simulate.borrow(p, 1, nworld, torch.get_num_threads()) as sweep, stream(states.device):
        x0, u0 = states.data_ptr(), controls.data_ptr()
        state, control = (t.stride(0) * t.element_size() for t in (states, controls))

        def advance(t: int) -> None:
            # its first state is already in place
            sweep.x0.data = sweep.states.data = x0 + t * state
            sweep.controls.data = u0 + t * control
            sweep.run()

        yield advance


class _Loss:
    """Prepared loss of a trajectory."""

    def __init__(
        self,
        p: Prepared,
        horizon: int,
        members: int,
        member_worlds: int,
        weights: LossWeights,
        threads: int,
    ) -> None:
        nworld = members * member_worlds
        self.states = array(p.itemsize, horizon + 1, nworld, p.state_size, components=1)
        self.controls = array(p.itemsize, horizon, nworld, p.control_size, components=1)
        self.world_loss = array(p.itemsize, nworld)
        values = {"states": self.states, "controls": self.controls, "world_loss": self.world_loss}
        values |= {"p": p.params, "horizon": horizon}
        values |= weights.arguments(member_worlds, horizon, p.control_size)
        self.run = Team(_launches(p, p.kernels.loss, nworld, horizon, values))


_loss = Pool(_Loss)


def loss(p: Prepared, states: torch.Tensor, controls: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """The built-in loss, a scalar, one of each member for an ensemble; 0 without worlds."""
    check_has_loss(p, weights)
    if members_of(controls.shape[1:])[1] == 0 or not any(weights):
        return states.new_zeros(states.shape[1:-2])
    return total(_world_loss(p, states, controls, weights))


def costs(p: Prepared, x: torch.Tensor) -> torch.Tensor:
    """Cost of states (nworld, state_size), one a world (nworld,)."""
    check_has_loss(p, LossWeights(1.0, 0.0, 0.0))
    if not x.shape[0]:
        return x.new_zeros(0)
    still = x.new_zeros((1, x.shape[0], p.control_size))
    # a weight is divided by the number of worlds
    return _world_loss(p, torch.stack((x, x)), still, LossWeights(float(x.shape[0]), 0.0, 0.0))


def _world_loss(
    p: Prepared, states: torch.Tensor, controls: torch.Tensor, weights: LossWeights
) -> torch.Tensor:
    """What each world adds to the loss."""
    horizon, (members, nworld) = controls.shape[0], members_of(controls.shape[1:])
    world_loss = states.new_empty(states.shape[1:-1])
    key = (p, horizon, members, nworld, weights, torch.get_num_threads())
    with _loss.borrow(*key) as sweep, stream(states.device):
        sweep.states.data, sweep.controls.data = states.data_ptr(), controls.data_ptr()
        sweep.world_loss.data = world_loss.data_ptr()
        sweep.run()
    return world_loss


class Shape(NamedTuple):
    """What the arguments of an adjoint sweep depend on besides addresses."""

    steps: int
    """Of the sweep: of the whole rollout or of a segment."""
    members: int
    nworld: int
    """Of all members."""
    jac: bool
    adj_loss: bool
    adj_states: bool
    adj_controls: bool
    loss_worlds: int = 0
    """Worlds over which the loss is a mean, if these are more than the worlds of a member here."""


class AdjointArguments:
    """What the adjoint kernels take, except the first world of a launch."""

    def __init__(self, p: Prepared, spec: Spec, shape: Shape) -> None:
        steps, nworld, n, m, size = shape.steps, shape.nworld, p.state_size, p.control_size, p.itemsize
        fields, horizon = len(spec.schedules), spec.horizon
        self.kernel = p.kernels.adjoint[fields - 1]
        self.edges = constant((spec.schedules, spec.decay == 0.0), edge_masks, p.torch_device)
        edges = array(4, fields, horizon)
        edges.data = self.edges.data_ptr()
        self.states = array(size, steps + 1, nworld, n, components=1)
        self.controls = array(size, steps, nworld, m, components=1)
        self.jac = array(size, *((steps, nworld, m) if shape.jac else (0, 0, 0)), n, components=1)
        self.adj_loss = array(size, shape.members if shape.adj_loss else 0)
        self.adj_states = array(size, *((steps + 1, nworld) if shape.adj_states else (0, 0)), n, components=1)
        self.adj_controls = array(size, *((steps, nworld) if shape.adj_controls else (0, 0)), m, components=1)
        self.mu = array(size, fields, steps, nworld, m, components=1)
        self.adj_x0 = array(size, fields, nworld, n, components=1)
        self.values: dict[str, Any] = {
            "states": self.states,
            "controls": self.controls,
            "jac": self.jac,
            "p": p.params,
            "edges": edges,
            "decay": spec.decay,
            "clip": spec.clip,
            "steps": steps,
            "t0": 0,
            "carried": 0,
            "adj_loss": self.adj_loss,
            "adj_states": self.adj_states,
            "adj_controls": self.adj_controls,
            "member_worlds": nworld // shape.members,
            "mu": self.mu,
            "adj_x0": self.adj_x0,
            # of a policy whose backward pass runs in the sweep, see fused_backward.py
            **dict.fromkeys(("operations", "row", "row_adj", "hidden_first", "hidden_steps"), 0),
            **dict.fromkeys(("params", "hidden"), array(size, 0, 0)),
            **dict.fromkeys(("flat_mu", "d", "flat_pulled"), array(size, 0)),
            "table": array(4, 0),
            "pulled": array(size, 0, 0, n, components=1),
        }
        self.values |= spec.weights.arguments(shape.loss_worlds or nworld // shape.members, horizon, m)
        self._trajectories: list[tuple[Any, int, int]] = []

    def point(self, states: torch.Tensor, controls: torch.Tensor, g: Cotangents) -> None:
        """Sets the addresses of the inputs, all dense; they must live until the launch has been made."""
        self.adj_loss.data = 0 if g.loss is None else g.loss.data_ptr()
        pairs = (
            (self.states, states),
            (self.controls, controls),
            (self.adj_states, g.states),
            (self.adj_controls, g.controls),
        )
        self._trajectories = [
            (target, t.data_ptr(), t.stride(0) * t.element_size()) for target, t in pairs if t is not None
        ]
        self.seek(0)

    def seek(self, t0: int) -> None:
        """Lets the trajectories begin at this step of those that `point` was given."""
        for target, first, step in self._trajectories:
            target.data = first + t0 * step


def shape_of(controls: torch.Tensor, jac: bool, g: Cotangents) -> Shape:
    """The shape of an adjoint sweep over a trajectory."""
    members, nworld = members_of(controls.shape[1:])
    return Shape(controls.shape[0], members, members * nworld, jac, *(t is not None for t in g))


def members_of(shape: torch.Size) -> tuple[int, int]:
    """Members, and worlds of each, of a shape (nworld, size) or (members, nworld, size)."""
    return (1, shape[0]) if len(shape) == 2 else (shape[0], shape[1])


class _Adjoint:
    """Prepared adjoint sweep over all worlds."""

    def __init__(self, p: Prepared, spec: Spec, shape: Shape, threads: int) -> None:
        self.arguments = a = AdjointArguments(p, spec, shape)
        over = _threads(p, shape.members, shape.nworld)
        kernel = p.open_loop.adjoint[len(spec.schedules) - 1]
        self.launches = _launches(p, kernel, over, shape.steps, a.values, p.open_loop.worlds)
        self.run = Team(self.launches)
        self._place = (0, 0)

    def place(self, t0: int, carried: bool) -> None:
        """Sets the step of the rollout at which the sweep's trajectories begin, and whether the sweep
        continues another one.
        """
        if self._place != (t0, int(carried)):
            self._place = (t0, int(carried))
            for launch in self.launches:
                launch.put("t0", t0)
                launch.put("carried", int(carried))


_adjoint = Pool(_Adjoint)


def adjoint(
    p: Prepared,
    spec: Spec,
    states: torch.Tensor,
    controls: torch.Tensor,
    jac: torch.Tensor | None,
    g: Cotangents,
    t0: int = 0,
    carried: torch.Tensor | None = None,
    loss_worlds: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoint sweep: cotangents of the controls (fields, steps, nworld, control_size) and of the first state
    (fields, nworld, state_size), with two axes of worlds for an ensemble.

    `jac` is dN/dx (steps, nworld, control_size, state_size), None if no network edge is open. For a segment
    of a rollout the trajectories begin at its step `t0`, and `carried` is the cotangent of its last state,
    from the sweep over the later steps. The loss is a mean over `loss_worlds` worlds; 0 means those of a
    member.
    """
    fields = len(spec.schedules)
    mu = empty(states, fields, *controls.shape)
    adj_x0 = states.new_empty((fields, *states.shape[1:])) if carried is None else carried.clone()
    shape = shape_of(controls, jac is not None, g)._replace(loss_worlds=loss_worlds)
    if shape.nworld:
        with (
            _adjoint.borrow(p, spec, shape, torch.get_num_threads()) as sweep,
            stream(states.device),
        ):
            a = sweep.arguments
            g = g.dense()
            a.point(states, controls, g)
            sweep.place(t0, carried is not None)
            a.jac.data = 0 if jac is None else jac.data_ptr()
            a.mu.data, a.adj_x0.data = mu.data_ptr(), adj_x0.data_ptr()
            sweep.run()
    return mu, adj_x0


def cost_gradients(p: Prepared, system: int, x: torch.Tensor) -> torch.Tensor:
    """Gradient of the cost of each of the states (nworld, state_size) by that state."""
    states, still = torch.stack((x, x)), x.new_zeros((1, x.shape[0], p.control_size))
    # with closed edges only the running cost of a later segment's first state gives it a cotangent
    spec = Spec(system, "SS", running=float(x.shape[0]))
    g, carried = Cotangents(x.new_ones(()), None, None), x.new_zeros((1, *x.shape))
    return adjoint(p, spec, states, still, None, g, 1, carried, x.shape[0])[1][0]


class _Combine:
    """Prepared comparison of two flat gradients."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        members: int,
        size: int,
        keep_check: bool,
        _threads: int,
        _served: int,
    ) -> None:
        served = warp_device(device)
        itemsize, chunk = dtype.itemsize, CHUNK if served.is_cpu else GPU_CHUNK
        self.chunks = chunks(size, chunk)
        threads = members * self.chunks
        self.base, self.check, self.combined = (array(itemsize, members, size) for _ in range(3))
        self.stats = array(8, threads, NSTATS)
        values = {"base": self.base, "check": self.check, "size": size, "chunk": chunk}
        values |= {"keep_check": int(keep_check), "combined": self.combined, "stats": self.stats}
        kernel = make_combine(WARP_DTYPE[dtype], in_lanes=served.is_cpu)
        parts = shares(threads, CHUNKS_PER_THREAD) if served.is_cpu else [range(threads)]
        launches = [Launch(kernel, len(part), values | {"first": part.start}, served) for part in parts]
        self.run = Team(launches)


_combine = Pool(_Combine)


def combine(base: torch.Tensor, check: torch.Tensor, keep_check: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Component-wise comparison of two gradients (components,) or (members, components): the combined one
    and the sums of `agreement.NSTATS`, of each member.
    """
    size = base.shape[-1]
    combined = torch.empty_like(base)
    if not base.numel():
        return combined, base.new_zeros((*base.shape[:-1], NSTATS), dtype=torch.float64)
    key = (base.dtype, base.device, base.numel() // size, size, keep_check)
    served = id(warp_device(base.device))
    with _combine.borrow(*key, torch.get_num_threads(), served) as c, stream(base.device):
        stats = base.new_empty((*base.shape[:-1], c.chunks, NSTATS), dtype=torch.float64)
        c.base.data, c.check.data = base.data_ptr(), check.data_ptr()
        c.combined.data, c.stats.data = combined.data_ptr(), stats.data_ptr()
        c.run()
    return combined, stats.sum(-2)

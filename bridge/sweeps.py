"""Launches of the sweeps over tensors: allocates outputs, picks kernels, spreads CPU work over threads.

No autograd here; operators.py makes torch operators of these and tape.py records them on a Warp tape.
Shapes: x0 (nworld, state_size), states (horizon + 1, nworld, state_size), controls (horizon, nworld, control_size).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import warp as wp

from ..kernels.agreement import NSTATS, chunks, make_combine
from ..kernels.dense import BLOCK, Column, layout
from ..kernels.flow import NETWORK, PHYSICS, Flow
from ..kernels.network import chunk_rows, make_network_kernels
from . import wide
from .arrays import WARP_DTYPE, constant, empty, stream, warp_device
from .launches import Launch, Pool, array, in_parallel, shares
from .registry import Prepared

GPU_LANES = 128
"""Threads of a GPU block in the fused forward sweep."""
GROUP = 8
"""World blocks that go through linearisation, sweep and weight products together, so that their rows stay in cache."""
GROUP_BYTES = 1 << 22
"""Bound on the activations of a group; one block is taken even if it is larger."""
SLOTS = 8
"""Partial sums of the weight gradients: fixed, so that results do not depend on the number of threads."""
WORLDS_PER_THREAD = 64
"""Below this, a second thread costs a sweep without a policy more than it brings."""


class LossWeights(NamedTuple):
    """Weights of the built-in loss, before the division by the number of worlds."""

    final: float
    """Of the cost of x_T."""
    running: float
    """Of the cost of each of x_1 ... x_T."""
    control: float
    """Of the mean squared control."""

    def per_world(self, nworld: int, horizon: int, control_size: int) -> tuple[float, float, float]:
        """Factors on the per-world sums that the kernels take."""
        return self.final / nworld, self.running / nworld, self.control / (nworld * horizon * control_size)


class Backward(NamedTuple):
    """What the backward pass of a rollout is told besides its trajectory."""

    base: str
    """One flow letter a step: the edges that leave x_t."""
    check: str
    """The same for the second gradient field; empty where there is one field."""
    decay: float
    """Factor on what crosses a physics edge."""
    weights: LossWeights

    @property
    def schedules(self) -> tuple[str, ...]:
        return (self.base, self.check) if self.check else (self.base,)

    @property
    def network_open(self) -> bool:
        """Whether any field crosses a network edge at any step."""
        return any(Flow(letter).edges & NETWORK for letter in set(self.base + self.check))


class Cotangents(NamedTuple):
    """Cotangents of a rollout's outputs; None where nothing arrived."""

    loss: torch.Tensor | None
    states: torch.Tensor | None
    controls: torch.Tensor | None


def _edge_masks(key: tuple[tuple[str, ...], bool]) -> np.ndarray:
    schedules, closed_physics = key
    masks = np.array([[Flow(letter).edges for letter in schedule] for schedule in schedules], dtype=np.int32)
    # a decay of 0 selects like a closed gate: 0 inf would be NaN
    return masks & ~PHYSICS if closed_physics else masks


def _check_has_loss(p: Prepared, weights: LossWeights) -> None:
    if p.functions.loss is None and (weights.final or weights.running):
        raise ValueError("loss: this system has no loss of its own; pass a callable of (states, controls) or None")


def _world_parts(p: Prepared, nworld: int) -> list[range]:
    return shares(nworld, WORLDS_PER_THREAD) if p.device.is_cpu else [range(nworld)]


def _launches(p: Prepared, kernel: wp.Kernel, parts: list[range], before: list[Any], after: list[Any]) -> list[Launch]:
    """One launch a part, a thread per world; the part's first world stands between the arguments `before` and `after`."""
    return [Launch(kernel, len(part), [*before, part.start, *after], p.device) for part in parts]


class _Simulate:
    """Prepared open-loop sweep."""

    def __init__(self, p: Prepared, horizon: int, nworld: int, threads: int) -> None:
        n, m, size = p.state_size, p.control_size, p.itemsize
        self.x0 = array(size, nworld, n, components=1)
        self.controls = array(size, horizon, nworld, m, components=1)
        self.states = array(size, horizon + 1, nworld, n, components=1)
        before = [self.x0, self.controls, p.params, horizon]
        self.launches = _launches(p, p.kernels.simulate, _world_parts(p, nworld), before, [self.states])


_simulate = Pool(_Simulate)


def simulate(p: Prepared, x0: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """States under given controls."""
    horizon, nworld = controls.shape[0], x0.shape[0]
    states = empty(x0, horizon + 1, nworld, p.state_size)
    if nworld:
        with _simulate.borrow(p, horizon, nworld, torch.get_num_threads()) as sweep, stream(x0.device):
            sweep.x0.data, sweep.controls.data = x0.data_ptr(), controls.data_ptr()
            sweep.states.data = states.data_ptr()
            in_parallel(sweep.launches)
    return states


class _Loss:
    """Prepared loss of a trajectory."""

    def __init__(self, p: Prepared, horizon: int, nworld: int, weights: LossWeights, threads: int) -> None:
        self.states = array(p.itemsize, horizon + 1, nworld, p.state_size, components=1)
        self.controls = array(p.itemsize, horizon, nworld, p.control_size, components=1)
        self.world_loss = array(p.itemsize, nworld)
        factors = weights.per_world(nworld, horizon, p.control_size)
        before = [self.states, self.controls, p.params, horizon, *factors]
        self.launches = _launches(p, p.kernels.loss, _world_parts(p, nworld), before, [self.world_loss])


_loss = Pool(_Loss)


def loss(p: Prepared, states: torch.Tensor, controls: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """The built-in loss, a scalar; 0 without worlds."""
    horizon, nworld = controls.shape[0], controls.shape[1]
    _check_has_loss(p, weights)
    if nworld == 0 or not any(weights):
        return states.new_zeros(())
    world_loss = states.new_empty(nworld)
    with _loss.borrow(p, horizon, nworld, weights, torch.get_num_threads()) as sweep, stream(states.device):
        sweep.states.data, sweep.controls.data = states.data_ptr(), controls.data_ptr()
        sweep.world_loss.data = world_loss.data_ptr()
        in_parallel(sweep.launches)
    return world_loss.sum()


def pack(network: str, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The policy's parameters as the kernels read them."""
    first = parameters[0]
    index = constant((network, first.element_size()), _pack_index, first.device)
    zero = constant(first.dtype, _zero, first.device)
    return torch.cat([zero, *(q.detach().reshape(-1) for q in parameters)]).index_select(0, index)


def _zero(dtype: torch.dtype) -> np.ndarray:
    return torch.zeros(1, dtype=dtype).numpy()


def _pack_index(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).pack


def _unpack_index(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).unpack


def _table(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).table.ravel()


def blocks_of(nworld: int) -> int:
    """World blocks of `nworld` worlds."""
    return (nworld + BLOCK - 1) // BLOCK


def _fixed(tensor: torch.Tensor) -> Any:
    """Descriptor of a kept tensor with one axis."""
    descriptor = array(tensor.element_size(), tensor.numel())
    descriptor.data = tensor.data_ptr()
    return descriptor


class _FusedRollout:
    """Prepared forward sweep with the policy fused in."""

    def __init__(self, p: Prepared, network: str, horizon: int, nworld: int, weights: LossWeights, threads: int) -> None:
        n, m, size = p.state_size, p.control_size, p.itemsize
        lay = layout(network, size)
        blocks = blocks_of(nworld)
        self.x0 = array(size, nworld, n, components=1)
        self.packed = array(size, lay.packed)
        self.table = constant((network, size), _table, p.torch_device)
        self.states = array(size, horizon + 1, nworld, n, components=1)
        self.controls = array(size, horizon, nworld, m, components=1)
        self.flat_controls = array(size, horizon * nworld * m)
        self.hidden = array(size, blocks * horizon * BLOCK, lay.row)
        self.world_loss = array(size, nworld)
        lanes = 1 if p.device.is_cpu else GPU_LANES
        before = [self.x0, p.params, self.packed, _fixed(self.table), lay.layers, lay.row, lay.column(0, Column.SECTION)]
        before += [horizon, nworld, *weights.per_world(nworld, horizon, m)]
        after = [lanes, self.states, self.controls, self.flat_controls, self.hidden, self.world_loss]
        parts = shares(blocks) if p.device.is_cpu else [range(blocks)]
        self.launches = [
            Launch(p.fused_rollout, (len(part), lanes), [*before, part.start, *after], p.device, block_dim=lanes)
            for part in parts
        ]


_fused_rollout = Pool(_FusedRollout)


def fused_rollout(
    p: Prepared, network: str, packed: torch.Tensor, x0: torch.Tensor, horizon: int, weights: LossWeights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fused forward sweep: states, controls, loss and hidden activations (blocks * horizon * BLOCK, row)."""
    _check_has_loss(p, weights)
    nworld = x0.shape[0]
    states = empty(x0, horizon + 1, nworld, p.state_size)
    controls = empty(x0, horizon, nworld, p.control_size)
    hidden = empty(x0, blocks_of(nworld) * horizon * BLOCK, layout(network, p.itemsize).row)
    if nworld == 0:
        return states, controls, x0.new_zeros(()), hidden
    world_loss = x0.new_empty(nworld)
    key = (p, network, horizon, nworld, weights, torch.get_num_threads())
    with _fused_rollout.borrow(*key) as sweep, stream(x0.device):
        sweep.x0.data, sweep.packed.data = x0.data_ptr(), packed.data_ptr()
        sweep.states.data, sweep.hidden.data = states.data_ptr(), hidden.data_ptr()
        sweep.controls.data = sweep.flat_controls.data = controls.data_ptr()
        sweep.world_loss.data = world_loss.data_ptr()
        in_parallel(sweep.launches)
    return states, controls, world_loss.sum(), hidden


class _Shape(NamedTuple):
    """What the arguments of an adjoint sweep depend on besides addresses."""

    horizon: int
    nworld: int
    jac: bool
    adj_loss: bool
    adj_states: bool
    adj_controls: bool


class _AdjointArguments:
    """Arguments of the adjoint kernel around the first world of a launch."""

    def __init__(self, p: Prepared, back: Backward, shape: _Shape) -> None:
        horizon, nworld, n, m, size = shape.horizon, shape.nworld, p.state_size, p.control_size, p.itemsize
        fields = len(back.schedules)
        self.kernel = p.kernels.adjoint[fields - 1]
        self.edges = constant((back.schedules, back.decay == 0.0), _edge_masks, p.torch_device)
        edges = array(4, fields, horizon)
        edges.data = self.edges.data_ptr()
        self.states = array(size, horizon + 1, nworld, n, components=1)
        self.controls = array(size, horizon, nworld, m, components=1)
        self.jac = array(size, *((horizon, nworld, m) if shape.jac else (0, 0, 0)), n, components=1)
        self.adj_loss = array(size, 1 if shape.adj_loss else 0)
        self.adj_states = array(size, *((horizon + 1, nworld) if shape.adj_states else (0, 0)), n, components=1)
        self.adj_controls = array(size, *((horizon, nworld) if shape.adj_controls else (0, 0)), m, components=1)
        self.mu = array(size, fields, horizon, nworld, m, components=1)
        self.adj_x0 = array(size, fields, nworld, n, components=1)
        self.before = [self.states, self.controls, self.jac, p.params, edges, back.decay, horizon]
        self.before += [*back.weights.per_world(nworld, horizon, m), self.adj_loss, self.adj_states, self.adj_controls]
        self.after = [self.mu, self.adj_x0]

    def point(self, states: torch.Tensor, controls: torch.Tensor, g: Cotangents) -> list[torch.Tensor]:
        """Sets the addresses of the inputs; the returned tensors must live until the launch has been made."""
        alive = [t.contiguous() for t in g if t is not None]
        rest = iter(alive)
        for target, t in ((self.adj_loss, g.loss), (self.adj_states, g.states), (self.adj_controls, g.controls)):
            target.data = 0 if t is None else next(rest).data_ptr()
        self.states.data, self.controls.data = states.data_ptr(), controls.data_ptr()
        return alive


def _shape_of(controls: torch.Tensor, jac: bool, g: Cotangents) -> _Shape:
    return _Shape(controls.shape[0], controls.shape[1], jac, *(t is not None for t in g))


class _Adjoint:
    """Prepared adjoint sweep over all worlds."""

    def __init__(self, p: Prepared, back: Backward, shape: _Shape, threads: int) -> None:
        self.arguments = a = _AdjointArguments(p, back, shape)
        self.launches = _launches(p, a.kernel, _world_parts(p, shape.nworld), a.before, a.after)


_adjoint = Pool(_Adjoint)


def adjoint(
    p: Prepared, back: Backward, states: torch.Tensor, controls: torch.Tensor, jac: torch.Tensor | None, g: Cotangents
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoint sweep: cotangents of the controls (fields, horizon, nworld, control_size) and of x0 (fields, nworld, state_size).

    `jac` is dN/dx (horizon, nworld, control_size, state_size), None where no network edge is open.
    """
    fields = len(back.schedules)
    mu = empty(states, fields, *controls.shape)
    adj_x0 = states.new_empty((fields, *states.shape[1:]))
    if controls.shape[1]:
        key = (p, back, _shape_of(controls, jac is not None, g), torch.get_num_threads())
        with _adjoint.borrow(*key) as sweep, stream(states.device):
            a = sweep.arguments
            alive = a.point(states, controls, g)
            a.jac.data = 0 if jac is None else jac.data_ptr()
            a.mu.data, a.adj_x0.data = mu.data_ptr(), adj_x0.data_ptr()
            in_parallel(sweep.launches)
            del alive
    return mu, adj_x0


def fused_backward(
    p: Prepared,
    back: Backward,
    network: str,
    packed: torch.Tensor,
    hidden: torch.Tensor,
    states: torch.Tensor,
    controls: torch.Tensor,
    g: Cotangents,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of a fused rollout: gradients (fields, parameters) and cotangents of x0 (fields, nworld, state_size)."""
    horizon, nworld = controls.shape[0], controls.shape[1]
    fields = len(back.schedules)
    lay = layout(network, p.itemsize)
    if nworld == 0:
        return states.new_zeros((fields, lay.unpack.size)), states.new_zeros((fields, 0, p.state_size))
    if not p.device.is_cpu:
        rows = wide.Rows(lay, packed, hidden, horizon, nworld)
        d, jac = wide.linearize(rows, back.network_open)
        mu, adj_x0 = adjoint(p, back, states, controls, jac, g)
        unpack = constant((network, p.itemsize), _unpack_index, states.device)
        return wide.weight_grad(rows, d, mu, unpack), adj_x0
    grads = states.new_empty((fields, lay.unpack.size))
    adj_x0 = states.new_empty((fields, nworld, p.state_size))
    key = (p, back, network, _shape_of(controls, back.network_open, g), torch.get_num_threads())
    with _fused_backward.borrow(*key) as sweep:
        sweep(packed, hidden, states, controls, g, grads, adj_x0)
    return grads, adj_x0


class _FusedBackward:
    """Prepared backward pass of a fused rollout on a CPU.

    World blocks go through in groups, each linearised, swept and multiplied while its rows are in cache. A group adds to one of a fixed
    number of partial sums, and a thread owns whole partial sums: the result does not depend on the number of threads.
    """

    def __init__(self, p: Prepared, back: Backward, network: str, shape: _Shape, threads: int) -> None:
        horizon, nworld, n, m, size = shape.horizon, shape.nworld, p.state_size, p.control_size, p.itemsize
        fields = len(back.schedules)
        lay = layout(network, size)
        kernels = make_network_kernels(p.dtype)
        blocks = blocks_of(nworld)
        like = torch.empty(0, dtype=p.torch_dtype)

        most = max(1, min(GROUP, GROUP_BYTES // (horizon * BLOCK * lay.row * size)))
        # at least as many groups as partial sums, so that all threads have work
        group = max(1, min(most, blocks // SLOTS))
        groups = (blocks + group - 1) // group
        slots = min(SLOTS, groups)
        parts = shares(slots)
        chunk = chunk_rows(lay.widest, size)

        self.arguments = a = _AdjointArguments(p, back, shape)
        self.packed, self.hidden = array(size, lay.packed), array(size, blocks * horizon * BLOCK, lay.row)
        self.grads = array(size, fields, lay.unpack.size)
        # scratch of this object, never seen outside
        group_d = group * m * horizon * BLOCK * lay.row_adj
        self.mu = empty(like, fields, horizon, nworld, m)
        self.jac = empty(like, *((horizon, nworld, m, n) if shape.jac else (0, 0, 0, n)))
        self.partial = empty(like, slots, fields, lay.grads)
        a.mu.data, a.jac.data = self.mu.data_ptr(), self.jac.data_ptr()
        partial = array(size, slots, fields, lay.grads)
        partial.data = self.partial.data_ptr()
        scalar_mu = array(size, fields, horizon, nworld, m)
        scalar_mu.data = self.mu.data_ptr()
        self.table = constant((network, size), _table, p.torch_device)
        self.unpack = constant((network, size), _unpack_index, p.torch_device)
        unpack = array(4, lay.unpack.size)
        unpack.data = self.unpack.data_ptr()
        common = [lay.layers, lay.row, lay.row_adj, self.hidden]
        self.scratch: list[torch.Tensor] = []

        def task(part: range) -> Callable[[], None]:
            d = empty(like, group_d)
            mu_rows = empty(like, fields * chunk * m)
            scaled = empty(like, chunk * lay.widest)
            self.scratch += [d, mu_rows, scaled]
            first_linearize = 11
            linearize = Launch(
                kernels.linearize,
                1,
                [self.packed, _fixed(self.table), *common, horizon, nworld, n, m, int(shape.jac), 0, 0]
                + [_fixed(d), _fixed(self.jac.view(-1))],
                p.device,
            )
            first_sweep = len(a.before)
            sweep = Launch(a.kernel, 1, [*a.before, 0, *a.after], p.device)
            first_multiply = 12
            multiply = Launch(
                kernels.weight_grad,
                1,
                [_fixed(self.table), *common, _fixed(d), scalar_mu, fields, horizon, nworld, m, chunk, 0, 0, 0, 0]
                + [_fixed(mu_rows), _fixed(scaled), partial],
                p.device,
            )

            def run() -> None:
                for slot in part:
                    for first in range(slot * group, blocks, slots * group):
                        count, world = min(group, blocks - first), first * BLOCK
                        linearize.put(first_linearize, first)
                        linearize.resize(count)
                        linearize()
                        sweep.put(first_sweep, world)
                        sweep.resize(min(count * BLOCK, nworld - world))
                        sweep()
                        multiply.put(first_multiply, first)
                        multiply.put(first_multiply + 1, count)
                        multiply.put(first_multiply + 3, slot)
                        multiply()

            return run

        self.tasks = [task(part) for part in parts]
        self.reduce = Launch(kernels.reduce, (fields, lay.unpack.size), [partial, unpack, self.grads], p.device)

    def __call__(
        self,
        packed: torch.Tensor,
        hidden: torch.Tensor,
        states: torch.Tensor,
        controls: torch.Tensor,
        g: Cotangents,
        grads: torch.Tensor,
        adj_x0: torch.Tensor,
    ) -> None:
        """Runs the backward pass; writes grads and adj_x0."""
        alive = self.arguments.point(states, controls, g)
        self.arguments.adj_x0.data = adj_x0.data_ptr()
        self.packed.data, self.hidden.data, self.grads.data = packed.data_ptr(), hidden.data_ptr(), grads.data_ptr()
        self.partial.zero_()
        in_parallel(self.tasks)
        self.reduce()
        del alive


_fused_backward = Pool(_FusedBackward)


class _Combine:
    """Prepared comparison of two flat gradients."""

    def __init__(self, dtype: torch.dtype, device: torch.device, size: int, keep_check: bool) -> None:
        itemsize = dtype.itemsize
        self.base, self.check, self.combined = (array(itemsize, size) for _ in range(3))
        self.stats = array(8, chunks(size), NSTATS)
        args = [self.base, self.check, size, int(keep_check), self.combined, self.stats]
        self.launch = Launch(make_combine(WARP_DTYPE[dtype]), chunks(size), args, warp_device(device))


_combine = Pool(_Combine)


def combine(base: torch.Tensor, check: torch.Tensor, keep_check: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Component-wise comparison of two flat gradients: the combined one and the sums of `agreement.NSTATS`."""
    size = base.numel()
    combined = torch.empty_like(base)
    stats = torch.empty((chunks(size), NSTATS), dtype=torch.float64, device=base.device)
    if size:
        with _combine.borrow(base.dtype, base.device, size, keep_check) as c, stream(base.device):
            c.base.data, c.check.data = base.data_ptr(), check.data_ptr()
            c.combined.data, c.stats.data = combined.data_ptr(), stats.data_ptr()
            c.launch()
    return combined, stats.sum(0)

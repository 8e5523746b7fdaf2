"""The sweeps of a rollout whose policy is fused into them: one launch forwards; backwards linearisation,
sweep and products.

Like sweeps.py, this allocates outputs, picks kernels and spreads CPU work over threads, and knows no
autograd.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..kernels.layout import BLOCK, Column, Layout, layout
from ..kernels.network import chunk_rows, make_network_kernels
from ..kernels.resident import choose_plan, make_resident_rollout
from . import wide
from .arrays import constant, empty, stream
from .launches import Launch, Pool, array, in_parallel, shares
from .registry import Prepared
from .sweeps import (
    AdjointArguments,
    Backward,
    Cotangents,
    LossWeights,
    Shape,
    adjoint,
    check_has_loss,
    members_of,
    shape_of,
    total,
)
from .tracing import span

GPU_LANES = 128
"""Threads of a GPU block in the forward sweep of a policy whose weights do not fit the registers."""
GROUP = 4
"""World blocks that go through linearisation, sweep and weight products together, so that their rows stay
in cache.
"""
GROUP_BYTES = 1 << 22
"""Bound on the activations of a group; one block is taken even if it is larger."""
SLOTS = 8
"""Partial sums of a member's weight gradients: fixed, so that results do not depend on the number of
threads.
"""
PARTIAL_BYTES = 1 << 22
"""Bound on the partial sums that are open at once, those of some members; more go through where the threads
would lack work.
"""

THREAD_PRODUCTS = 1 << 22
"""Multiply-adds of one pass over a world block from which a thread is worth its start for this block alone
(some 60 us); below, it takes two.
"""


def pack(network: str, parameters: Sequence[torch.Tensor], members: tuple[int, ...] = ()) -> torch.Tensor:
    """The policy's parameters as the kernels read them, (packed,); (*members, packed) of stacked ones."""
    first = parameters[0]
    index = constant((network, first.element_size()), _pack_index, first.device)
    zero = constant(first.dtype, _zero, first.device)
    if members:
        zero = zero.expand(*members, 1)
    flat = torch.cat([zero, *(q.detach().reshape(*members, -1) for q in parameters)], dim=-1)
    return flat.index_select(-1, index)


def _zero(dtype: torch.dtype) -> np.ndarray:
    return torch.zeros(1, dtype=dtype, device="cpu").numpy()


def _pack_index(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).pack


def _unpack_index(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).unpack


def _table(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).table.ravel()


def blocks_of(nworld: int) -> int:
    """World blocks of `nworld` worlds of one policy."""
    return (nworld + BLOCK - 1) // BLOCK


def hidden_shape(x0: torch.Tensor, horizon: int, row: int) -> tuple[int, ...]:
    """Shape of the stored activations, (blocks * horizon * BLOCK, row), of each member for an ensemble."""
    return (*x0.shape[:-2], blocks_of(x0.shape[-2]) * horizon * BLOCK, row)


def _blocks_per_thread(lay: Layout, horizon: int) -> int:
    """World blocks below which another thread costs more than it brings."""
    columns = (Column.POSITIONS, Column.PITCH_UNITS, Column.WINDOW)
    products = sum(math.prod(lay.column(i, c) for c in columns) for i in range(lay.layers))
    return 1 if horizon * BLOCK * products >= THREAD_PRODUCTS else 2


def _fixed(tensor: torch.Tensor) -> Any:
    """Descriptor of a kept tensor with one axis."""
    descriptor = array(tensor.element_size(), tensor.numel())
    descriptor.data = tensor.data_ptr()
    return descriptor


class _Rollout:
    """Prepared forward sweep with the policy fused in."""

    def __init__(
        self,
        p: Prepared,
        network: str,
        horizon: int,
        members: int,
        member_worlds: int,
        weights: LossWeights,
        threads: int,
    ) -> None:
        n, m, size = p.state_size, p.control_size, p.itemsize
        lay = layout(network, size)
        nworld, blocks = members * member_worlds, members * blocks_of(member_worlds)
        self.x0 = array(size, nworld, n, components=1)
        self.packed = array(size, members, lay.packed)
        self.table = constant((network, size), _table, p.torch_device)
        self.states = array(size, horizon + 1, nworld, n, components=1)
        self.controls = array(size, horizon, nworld, m, components=1)
        self.flat_controls = array(size, horizon * nworld * m)
        self.hidden = array(size, blocks * horizon * BLOCK, lay.row)
        self.world_loss = array(size, nworld)
        sizes = [horizon, nworld, member_worlds, *weights.per_world(member_worlds, horizon, m)]
        plan = None if p.device.is_cpu else choose_plan(network, size, nworld)
        if plan is not None:
            args = [self.x0, p.params, self.packed, *sizes]
            args += [self.states, self.controls, self.hidden, self.world_loss]
            kernel = make_resident_rollout(p.functions, p.dtype, plan)
            dim = members * plan.blocks(member_worlds), plan.threads
            self.launches = [Launch(kernel, dim, args, p.device, block_dim=plan.threads)]
            return
        lanes = 1 if p.device.is_cpu else GPU_LANES
        before = [self.x0, p.params, self.packed, _fixed(self.table), lay.layers, lay.row]
        before += [lay.column(0, Column.SECTION), *sizes]
        after = [lanes, self.states, self.controls, self.flat_controls, self.hidden, self.world_loss]
        parts = shares(blocks, _blocks_per_thread(lay, horizon)) if p.device.is_cpu else [range(blocks)]
        self.launches = [
            Launch(
                p.fused_rollout, (len(part), lanes), [*before, part.start, *after], p.device, block_dim=lanes
            )
            for part in parts
        ]


_rollout = Pool(_Rollout)


def rollout(
    p: Prepared, network: str, packed: torch.Tensor, x0: torch.Tensor, horizon: int, weights: LossWeights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fused forward sweep: states, controls, loss and hidden activations, see `hidden_shape`.

    With x0 (members, nworld, state_size) and packed (members, packed), every member drives its own worlds and
    has its own loss.
    """
    check_has_loss(p, weights)
    states = empty(x0, horizon + 1, *x0.shape)
    controls = empty(x0, horizon, *x0.shape[:-1], p.control_size)
    hidden = empty(x0, *hidden_shape(x0, horizon, layout(network, p.itemsize).row))
    if x0.shape[-2] == 0:
        return states, controls, x0.new_zeros(x0.shape[:-2]), hidden
    world_loss = x0.new_empty(x0.shape[:-1])
    key = (p, network, horizon, *members_of(x0.shape), weights, torch.get_num_threads())
    with _rollout.borrow(*key) as sweep, stream(x0.device):
        sweep.x0.data, sweep.packed.data = x0.data_ptr(), packed.data_ptr()
        sweep.states.data, sweep.hidden.data = states.data_ptr(), hidden.data_ptr()
        sweep.controls.data = sweep.flat_controls.data = controls.data_ptr()
        sweep.world_loss.data = world_loss.data_ptr()
        in_parallel(sweep.launches)
    return states, controls, total(world_loss), hidden


def backward(
    p: Prepared,
    back: Backward,
    network: str,
    packed: torch.Tensor,
    hidden: torch.Tensor,
    states: torch.Tensor,
    controls: torch.Tensor,
    g: Cotangents,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of a fused rollout: gradients (fields, parameters) and cotangents of x0 (fields,
    nworld, state_size).

    Those of an ensemble are (fields, members, parameters) and (fields, members, nworld, state_size).
    """
    fields = len(back.schedules)
    lay = layout(network, p.itemsize)
    grads = states.new_empty((fields, *states.shape[1:-2], lay.unpack.size))
    adj_x0 = states.new_empty((fields, *states.shape[1:]))
    if states.shape[-2] == 0:
        return grads.zero_(), adj_x0
    if not p.device.is_cpu:
        rows = wide.Rows(lay, packed, hidden, controls.shape[0], controls.shape[-2])
        with span("linearize"):
            d, jac = wide.linearize(rows, back.network_open)
        mu, adj_x0 = adjoint(p, back, states, controls, jac, g)
        unpack = constant((network, p.itemsize), _unpack_index, states.device)
        with span("weight_grad"):
            return wide.weight_grad(rows, d, mu, unpack), adj_x0
    key = (p, back, network, shape_of(controls, back.network_open, g), torch.get_num_threads())
    with _backward.borrow(*key) as sweep:
        sweep(packed, hidden, states, controls, g, grads, adj_x0)
    return grads, adj_x0


class _Backward:
    """Prepared backward pass of a fused rollout on a CPU.

    World blocks go through in groups, each linearised, swept and multiplied while its rows are in cache. A
    group lies within a member and adds to one of a fixed number of partial sums of that member, and a thread
    owns whole partial sums: the result depends neither on the number of threads nor on the other members.
    Members go through in waves that bound the memory of the partial sums.

    With one control the policy is linearised before the sweep; with several, its backward pass runs in the
    sweep (kernels/fused_adjoint.py), and no Jacobian is kept.
    """

    def __init__(self, p: Prepared, back: Backward, network: str, shape: Shape, threads: int) -> None:
        horizon, nworld, n, m, size = shape.horizon, shape.nworld, p.state_size, p.control_size, p.itemsize
        fields, member_worlds = len(back.schedules), shape.nworld // shape.members
        lay = layout(network, size)
        kernels = make_network_kernels(p.dtype)
        blocks = blocks_of(member_worlds)
        like = torch.empty(0, dtype=p.torch_dtype, device=p.torch_device)

        most = max(1, min(GROUP, GROUP_BYTES // (horizon * BLOCK * lay.row * size)))
        # at least as many groups as partial sums, so that all threads have work
        group = max(1, min(most, blocks // SLOTS))
        groups = (blocks + group - 1) // group
        slots = min(SLOTS, groups)
        least = _blocks_per_thread(lay, horizon)
        waves = _waves(shape.members, slots, slots * fields * lay.grads * size, threads)
        chunk = chunk_rows(lay.widest, size)

        several = m > 1
        shape = shape._replace(jac=shape.jac and not several)
        self.arguments = a = AdjointArguments(p, back, shape)
        self.packed = array(size, shape.members, lay.packed)
        self.hidden = array(size, shape.members * blocks * horizon * BLOCK, lay.row)
        # scratch of this object, never seen outside
        group_d = group * (fields if several else m) * horizon * BLOCK * lay.row_adj
        self.mu = empty(like, fields, horizon, nworld, m)
        self.jac = empty(like, *((horizon, nworld, m, n) if shape.jac else (0, 0, 0, n)))
        self.partial = empty(like, len(waves[0]), slots, fields, lay.grads)
        a.mu.data, a.jac.data = self.mu.data_ptr(), self.jac.data_ptr()
        partial = array(size, len(waves[0]) * slots, fields, lay.grads)
        partial.data = self.partial.data_ptr()
        scalar_mu = array(size, fields, horizon, nworld, m)
        scalar_mu.data = self.mu.data_ptr()
        self.table = constant((network, size), _table, p.torch_device)
        self.unpack = constant((network, size), _unpack_index, p.torch_device)
        common = [lay.layers, lay.row, lay.row_adj, self.hidden]
        self.scratch: list[torch.Tensor] = []

        def worker() -> Callable[[int, range], None]:
            d = empty(like, group_d)
            mu_rows = empty(like, fields * chunk * m)
            scaled = empty(like, chunk * lay.widest)
            self.scratch += [d, mu_rows, scaled]
            # launch, index of its argument `first`, whether it counts in blocks instead of worlds
            passes: list[tuple[Launch, int, bool]]
            pulled = empty(like, fields, BLOCK, n)
            self.scratch.append(pulled)
            if several:
                network = [self.packed, _fixed(self.table), *common]
                states_of_block = array(size, fields, BLOCK, n, components=1)
                states_of_block.data = pulled.data_ptr()
                after = [a.mu, _fixed(self.mu.view(-1)), a.adj_x0, _fixed(d), states_of_block]
                after.append(_fixed(pulled.view(-1)))
                before = [*a.before[:2], *a.before[3:], *network]
                sweep = Launch(p.fused_adjoint(fields), 1, [*before, 0, *after], p.device)
                passes = [(sweep, len(before), True)]
            else:
                network = [self.packed, _fixed(self.table), *common, horizon, nworld, member_worlds, n, m]
                network.append(int(shape.jac))
                linearize = Launch(
                    kernels.linearize, 1, [*network, 0, 0, _fixed(d), _fixed(self.jac.view(-1))], p.device
                )
                sweep = Launch(a.kernel, 1, [*a.before, 0, *a.after], p.device)
                passes = [(linearize, len(network), True), (sweep, len(a.before), p.kernels.worlds > 1)]
            first_multiply = 13
            multiply = Launch(
                kernels.weight_grad,
                1,
                [
                    _fixed(self.table),
                    *common,
                    _fixed(d),
                    scalar_mu,
                    fields,
                    int(several),
                    horizon,
                    member_worlds,
                    m,
                    chunk,
                    0,
                    0,
                    0,
                    0,
                ]
                + [_fixed(mu_rows), _fixed(scaled), partial],
                p.device,
            )

            def run(first_member: int, part: range) -> None:
                for item in part:
                    member, slot = first_member + item // slots, item % slots
                    for first in range(slot * group, blocks, slots * group):
                        count, world = min(group, blocks - first), first * BLOCK
                        present = min(count * BLOCK, member_worlds - world)
                        block, world = member * blocks + first, member * member_worlds + world
                        for launch, argument, by_block in passes:
                            launch.put(argument, block if by_block else world)
                            launch.resize(count if by_block else present)
                            launch()
                        multiply.put(first_multiply, block)
                        multiply.put(first_multiply + 1, count)
                        multiply.put(first_multiply + 3, item)
                        multiply()

            return run

        workers = [worker() for _ in shares(len(waves[0]) * slots, least)]
        self.waves: list[tuple[range, list[Callable[[], None]]]] = []
        for wave in waves:
            parts = shares(len(wave) * slots, least)
            tasks = [functools.partial(work, wave.start, part) for work, part in zip(workers, parts)]
            self.waves.append((wave, tasks))
        self.partials = self.partial.unbind(0)
        scratch = [self.mu, self.jac, self.partial, *self.scratch]
        self.nbytes = sum(t.numel() * t.element_size() for t in scratch)

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
        self.packed.data, self.hidden.data = packed.data_ptr(), hidden.data_ptr()
        own_grads = [grads] if grads.ndim == 2 else grads.unbind(1)
        for wave, tasks in self.waves:
            self.partial.zero_()
            in_parallel(tasks)
            with span("sum_gradients"):
                self._sum(own_grads[wave.start : wave.stop])
        del alive

    def _sum(self, own_grads: Sequence[torch.Tensor]) -> None:
        """Sums the partial sums of every member of a wave."""
        # one by one: torch orders a sum by its shape, and a member's is to be the one it has alone
        for partial, own in zip(self.partials, own_grads):
            if own.is_contiguous():
                torch.index_select(partial.sum(0), 1, self.unpack, out=own)
            else:  # index_select itself takes thirty times as long to write a strided output
                own.copy_(torch.index_select(partial.sum(0), 1, self.unpack))


def _waves(members: int, slots: int, member_bytes: int, threads: int) -> list[range]:
    """Members whose partial sums are open at once: the longest wave first, all as even as can be and with
    work for all threads.
    """
    most = max(PARTIAL_BYTES // member_bytes, 2 * threads // slots, 1)
    count = (members + most - 1) // most
    bounds = [members * i // count for i in range(count, -1, -1)]
    return [range(a, b) for a, b in zip(bounds[1:], bounds[:-1])]


_backward = Pool(_Backward)

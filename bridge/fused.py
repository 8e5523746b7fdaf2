"""The sweeps of a rollout whose policy is fused into them: one launch forwards; backwards linearisation,
sweep and products.

Like sweeps.py, this allocates outputs, picks kernels and spreads CPU work over threads, and knows no
autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..kernels.layout import BLOCK, Column, layout
from ..kernels.network import chunk_rows, make_network_kernels
from ..kernels.resident import make_plan, make_resident_rollout
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
    shape_of,
    total,
)

GPU_LANES = 128
"""Threads of a GPU block in the forward sweep of a policy whose weights do not fit the registers."""
GROUP = 4
"""World blocks that go through linearisation, sweep and weight products together, so that their rows stay
in cache.
"""
GROUP_BYTES = 1 << 22
"""Bound on the activations of a group; one block is taken even if it is larger."""
SLOTS = 8
"""Partial sums of the weight gradients: fixed, so that results do not depend on the number of threads."""


def pack(network: str, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The policy's parameters as the kernels read them."""
    first = parameters[0]
    index = constant((network, first.element_size()), _pack_index, first.device)
    zero = constant(first.dtype, _zero, first.device)
    return torch.cat([zero, *(q.detach().reshape(-1) for q in parameters)]).index_select(0, index)


def _zero(dtype: torch.dtype) -> np.ndarray:
    return torch.zeros(1, dtype=dtype, device="cpu").numpy()


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


class _Rollout:
    """Prepared forward sweep with the policy fused in."""

    def __init__(
        self, p: Prepared, network: str, horizon: int, nworld: int, weights: LossWeights, threads: int
    ) -> None:
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
        sizes = [horizon, nworld, *weights.per_world(nworld, horizon, m)]
        plan = None if p.device.is_cpu else make_plan(network, size, nworld)
        if plan is not None:
            args = [self.x0, p.params, self.packed, *sizes]
            args += [self.states, self.controls, self.hidden, self.world_loss]
            kernel = make_resident_rollout(p.functions, p.dtype, plan)
            dim = plan.blocks(nworld), plan.threads
            self.launches = [Launch(kernel, dim, args, p.device, block_dim=plan.threads)]
            return
        lanes = 1 if p.device.is_cpu else GPU_LANES
        before = [self.x0, p.params, self.packed, _fixed(self.table), lay.layers, lay.row]
        before += [lay.column(0, Column.SECTION), *sizes]
        after = [lanes, self.states, self.controls, self.flat_controls, self.hidden, self.world_loss]
        parts = shares(blocks, 2) if p.device.is_cpu else [range(blocks)]
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
    """Fused forward sweep: states, controls, loss and hidden activations (blocks * horizon * BLOCK, row)."""
    check_has_loss(p, weights)
    nworld = x0.shape[0]
    states = empty(x0, horizon + 1, nworld, p.state_size)
    controls = empty(x0, horizon, nworld, p.control_size)
    hidden = empty(x0, blocks_of(nworld) * horizon * BLOCK, layout(network, p.itemsize).row)
    if nworld == 0:
        return states, controls, x0.new_zeros(()), hidden
    world_loss = x0.new_empty(nworld)
    key = (p, network, horizon, nworld, weights, torch.get_num_threads())
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
    """
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
    key = (p, back, network, shape_of(controls, back.network_open, g), torch.get_num_threads())
    with _backward.borrow(*key) as sweep:
        sweep(packed, hidden, states, controls, g, grads, adj_x0)
    return grads, adj_x0


class _Backward:
    """Prepared backward pass of a fused rollout on a CPU.

    World blocks go through in groups, each linearised, swept and multiplied while its rows are in cache. A
    group adds to one of a fixed
    number of partial sums, and a thread owns whole partial sums: the result does not depend on the number of
        threads.
    """

    def __init__(self, p: Prepared, back: Backward, network: str, shape: Shape, threads: int) -> None:
        horizon, nworld, n, m, size = shape.horizon, shape.nworld, p.state_size, p.control_size, p.itemsize
        fields = len(back.schedules)
        lay = layout(network, size)
        kernels = make_network_kernels(p.dtype)
        blocks = blocks_of(nworld)
        like = torch.empty(0, dtype=p.torch_dtype, device=p.torch_device)

        most = max(1, min(GROUP, GROUP_BYTES // (horizon * BLOCK * lay.row * size)))
        # at least as many groups as partial sums, so that all threads have work
        group = max(1, min(most, blocks // SLOTS))
        groups = (blocks + group - 1) // group
        slots = min(SLOTS, groups)
        parts = shares(slots, 2)
        chunk = chunk_rows(lay.widest, size)

        self.arguments = a = AdjointArguments(p, back, shape)
        self.packed, self.hidden = array(size, lay.packed), array(size, blocks * horizon * BLOCK, lay.row)
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
                [
                    _fixed(self.table),
                    *common,
                    _fixed(d),
                    scalar_mu,
                    fields,
                    horizon,
                    nworld,
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
        self.partial.zero_()
        in_parallel(self.tasks)
        torch.index_select(self.partial.sum(0), 1, self.unpack, out=grads)
        del alive


_backward = Pool(_Backward)

"""The forward pass of a rollout whose policy is fused into the sweep; fused_backward.py has the backward
pass.

Like sweeps.py, this file allocates outputs, picks kernels and spreads CPU work over threads. It knows no
autograd.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...kernels.policy.layout import BLOCK, Layout, layout
from ...kernels.policy.table import Column
from ...kernels.sweeps.resident import choose_plan, make_resident_rollout
from ..runtime.arrays import constant, empty, stream
from ..runtime.launches import Launch, Pool, array
from ..runtime.registry import Prepared
from ..runtime.team import Team, shares
from .spec import LossWeights, blocks_of, hidden_shape, pieces
from .sweeps import check_has_loss, loss, members_of, total

GPU_LANES = 128
"""Threads of a GPU block in the forward sweep of a policy whose weights do not fit the registers."""
THREAD_PRODUCTS = 1 << 18
"""Multiply-adds of a thread in one pass through the policy, below which a second thread costs more than it
gains (some 6 us).
"""


def pack(network: str, parameters: Sequence[torch.Tensor], members: tuple[int, ...] = ()) -> torch.Tensor:
    """Returns the policy's parameters as the kernels read them, (packed,), or (*members, packed) for stacked
    ones.
    """
    first = parameters[0]
    index = constant((network, first.element_size()), _pack_index, first.device)
    numbers = constant((network, first.dtype), _numbers, first.device)
    if members:
        numbers = numbers.expand(*members, -1)
    flat = torch.cat([numbers, *(q.detach().reshape(*members, -1) for q in parameters)], dim=-1)
    return flat.index_select(-1, index)


def _numbers(key: tuple[str, torch.dtype]) -> np.ndarray:
    network, dtype = key
    return torch.tensor(layout(network, dtype.itemsize).numbers, dtype=dtype, device="cpu").numpy()


def _pack_index(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).pack


def table(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).table.ravel()


def blocks_per_thread(lay: Layout, horizon: int) -> int:
    """World blocks below which another thread costs more than it brings."""
    columns = (Column.POSITIONS, Column.PITCH_UNITS, Column.WINDOW)
    products = sum(math.prod(lay.column(i, c) for c in columns) for i in lay.linear)
    return -(-THREAD_PRODUCTS // (horizon * BLOCK * products))


def fixed(tensor: torch.Tensor) -> Any:
    """Descriptor of a kept tensor with one axis."""
    descriptor = array(tensor.element_size(), tensor.numel())
    descriptor.data = tensor.data_ptr()
    return descriptor


def _groups(members: int, blocks: int, least: int) -> tuple[list[range], int]:
    """Returns the groups of neighbouring blocks of a member for each thread, and the number of blocks in a
    group.

    Two blocks share every weight that is loaded. Groups of two are taken unless a thread then has more work.
    """
    alone = shares(members * blocks, least)
    pairs = shares(members * -(-blocks // 2), -(-least // 2))
    if blocks > 1 and 2 * len(pairs[0]) <= 1.1 * len(alone[0]):
        return pairs, 2
    return alone, 1


class _Rollout:
    """Prepared forward sweep with the policy fused in."""

    def __init__(
        self,
        p: Prepared,
        network: str,
        horizon: int,
        kept: int,
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
        self.table = constant((network, size), table, p.torch_device)
        self.states = array(size, horizon + 1, nworld, n, components=1)
        self.controls = array(size, horizon, nworld, m, components=1)
        self.flat_controls = array(size, horizon * nworld * m)
        self.hidden = array(size, blocks * kept * BLOCK, lay.row)
        self.world_loss = array(size, nworld)
        values: dict[str, Any] = {
            "x0": self.x0,
            "p": p.params,
            "params": self.packed,
            "horizon": horizon,
            "nworld": nworld,
            "member_worlds": member_worlds,
            "states": self.states,
            "controls": self.controls,
            "hidden": self.hidden,
            "world_loss": self.world_loss,
        }
        values |= weights.arguments(member_worlds, horizon, m)
        plan = None if p.device.is_cpu else choose_plan(network, size, nworld)
        if plan is not None:
            kernel = make_resident_rollout(p.functions, p.dtype, plan)
            dim = members * plan.blocks(member_worlds), plan.threads
            self.run = Team([Launch(kernel, dim, values, p.device, block_dim=plan.threads)])
            return
        lanes = 1 if p.device.is_cpu else GPU_LANES
        parts, together = [range(blocks)], 1
        if p.device.is_cpu:
            parts, together = _groups(members, blocks // members, blocks_per_thread(lay, horizon))
        values |= {"table": fixed(self.table), "operations": lay.operations, "row": lay.row}
        values |= {"section": lay.column(0, Column.SECTION), "kept": kept, "together": together}
        values |= {"lanes": lanes, "flat_controls": self.flat_controls}
        kernel = p.fused_rollout()
        launches = [
            Launch(kernel, (len(part), lanes), values | {"first": part.start}, p.device, lanes)
            for part in parts
        ]
        self.run = Team(launches)


_rollout = Pool(_Rollout)


def rollout(
    p: Prepared,
    network: str,
    packed: torch.Tensor,
    x0: torch.Tensor,
    horizon: int,
    weights: LossWeights,
    segment: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fused forward sweep: states, controls, loss and hidden activations, see `hidden_shape`.

    With x0 (members, nworld, state_size) and packed (members, packed), every member drives its own worlds and
    has its own loss. With a `segment` the activations are scratch. On a CPU they are those of one step. On a
    GPU they are those of one segment, because the sweep then runs in segments of so many steps.
    """
    check_has_loss(p, weights)
    states = empty(x0, horizon + 1, *x0.shape)
    controls = empty(x0, horizon, *x0.shape[:-1], p.control_size)
    row = layout(network, p.itemsize).row
    hidden = empty(x0, *hidden_shape(x0, horizon, row, segment))
    if x0.shape[-2] == 0:
        return states, controls, x0.new_zeros(x0.shape[:-2]), hidden
    world_loss = x0.new_empty(x0.shape[:-1])
    if not segment:
        _sweep(p, network, packed, x0, weights, states, controls, hidden, world_loss)
        return states, controls, total(world_loss), hidden
    cut, kept = _cut(p, horizon, segment)
    scratch = empty(x0, *hidden_shape(x0, kept, row, 0))
    whole = weights if len(cut) == 1 else LossWeights(0.0, 0.0, 0.0)
    for t0, t1 in cut:
        part = x0 if t0 == 0 else states[t0]
        _sweep(p, network, packed, part, whole, states[t0 : t1 + 1], controls[t0:t1], scratch, world_loss)
    value = total(world_loss) if len(cut) == 1 else loss(p, states, controls, weights)
    return states, controls, value, hidden


def _cut(p: Prepared, horizon: int, segment: int) -> tuple[list[tuple[int, int]], int]:
    """Returns the pieces in which a sweep without kept activations runs, and for how many steps it holds
    activations.
    """
    if p.device.is_cpu:
        return [(0, horizon)], 1
    return pieces(horizon, segment)[::-1], min(segment, horizon)


def activations(p: Prepared, network: str, packed: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Hidden activations of a segment of a rollout, from its states (steps + 1, nworld, state_size). The
    forward sweep computes them again, so they have the same bits. For GPUs; see fused_backward.py for CPUs.
    """
    steps = states.shape[0] - 1
    return rollout(p, network, packed, states[0], steps, LossWeights(0.0, 0.0, 0.0))[3]


def _sweep(
    p: Prepared,
    network: str,
    packed: torch.Tensor,
    x0: torch.Tensor,
    weights: LossWeights,
    states: torch.Tensor,
    controls: torch.Tensor,
    hidden: torch.Tensor,
    world_loss: torch.Tensor,
) -> None:
    """Runs the sweep over all steps of `controls`. `hidden` has room for at least one step."""
    horizon, lay = controls.shape[0], layout(network, p.itemsize)
    members, member_worlds = members_of(x0.shape)
    kept = min(horizon, hidden.numel() // (members * blocks_of(member_worlds) * BLOCK * lay.row))
    key = (p, network, horizon, kept, members, member_worlds, weights, torch.get_num_threads())
    with _rollout.borrow(*key) as sweep, stream(x0.device):
        sweep.x0.data, sweep.packed.data = x0.data_ptr(), packed.data_ptr()
        sweep.states.data, sweep.hidden.data = states.data_ptr(), hidden.data_ptr()
        sweep.controls.data = sweep.flat_controls.data = controls.data_ptr()
        sweep.world_loss.data = world_loss.data_ptr()
        sweep.run()

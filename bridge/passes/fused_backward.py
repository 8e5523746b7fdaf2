"""The backward pass of a rollout whose policy is fused into it: linearisation, sweep and products.

It takes all time steps at once if the forward sweep kept its activations, else one segment after the other,
from the last to the first; see spec.py. Like sweeps.py, this file allocates outputs, picks kernels and
spreads CPU work over threads. It knows no autograd.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ...kernels.policy.layout import BLOCK, layout
from ...kernels.policy.network import SUM_CHUNK, chunk_rows, make_network_kernels
from ...kernels.policy.table import Column
from ..runtime.arrays import constant, empty
from ..runtime.launches import Launch, Pool, array, span
from ..runtime.registry import Prepared
from ..runtime.team import Program, Step, Task, Team, shares
from .fused import activations, blocks_per_thread, fixed, table
from .operations import Rows, bounded_steps, linearize, weight_grad
from .spec import SEGMENT_BYTES, Cotangents, Spec, blocks_of, cpu_steps, pieces
from .sweeps import AdjointArguments, Shape, adjoint, shape_of

GROUP = 2
"""World blocks of a group, which is linearised, swept and multiplied before the next group, so that its rows
stay in cache; more if a segment is short.
"""
GROUP_BYTES = 1 << 22
"""Bytes of activations of a block up to which all its steps are taken at once. More are cut into segments,
whether they are recomputed or not.
"""
SLOTS = 8
"""Number of partial sums of a member's weight gradients. It is fixed, so that results do not depend on the
number of threads.
"""
PARTIAL_BYTES = 1 << 22
"""Bound on the bytes of the partial sums that are held at once, those of some members; it is exceeded if
threads would have no work.
"""

PROGRAM_GROUPS = 2048
"""Number of groups up to which a thread's launches are prepared as a program. With more groups the time of
Python between launches does not matter.
"""
SUM_CHUNKS_PER_THREAD = 8
"""Chunks of `kernels.policy.network.SUM_CHUNK` elements below which a second thread costs the sum more than
it gains.
"""


def _unpack_index(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).unpack


def _parameter_index(key: tuple[str, int]) -> np.ndarray:
    # pack counts from the numbers in front; the gradients are laid out as its first part
    lay = layout(*key)
    index = lay.pack[: lay.grads] - lay.numbers.size
    return np.maximum(index, -1).astype(np.int32)


def backward(
    p: Prepared,
    spec: Spec,
    network: str,
    packed: torch.Tensor,
    hidden: torch.Tensor,
    states: torch.Tensor,
    controls: torch.Tensor,
    g: Cotangents,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of a fused rollout: gradients (fields, parameters) and cotangents of x0 (fields,
    nworld, state_size).

    For an ensemble they are (fields, members, parameters) and (fields, members, nworld, state_size). If the
    description has a segment, the activations are recomputed, so many steps at once, and `hidden` is not
    read.
    """
    fields = len(spec.schedules)
    grads = states.new_empty((fields, *states.shape[1:-2], layout(network, p.itemsize).unpack.size))
    adj_x0 = states.new_empty((fields, *states.shape[1:]))
    if states.shape[-2] == 0:
        return grads.zero_(), adj_x0
    if not p.device.is_cpu:
        return wide_backward(p, spec, network, packed, hidden, states, controls, g)
    shape = shape_of(controls, spec.network_open, g)
    segment = min(spec.segment, shape.steps)
    with _backward.borrow(p, spec, network, shape, segment, torch.get_num_threads()) as sweep:
        sweep(packed, hidden, states, controls, g, grads, adj_x0)
    return grads, adj_x0


def wide_backward(
    p: Prepared,
    spec: Spec,
    network: str,
    packed: torch.Tensor,
    hidden: torch.Tensor,
    states: torch.Tensor,
    controls: torch.Tensor,
    g: Cotangents,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with torch's matrix products, in segments that bound their memory; for GPUs."""
    lay = layout(network, p.itemsize)
    horizon, nworld = controls.shape[0], controls.shape[-2]
    unpack = constant((network, p.itemsize), _unpack_index, states.device)
    kept = Rows(lay, packed, hidden, horizon, nworld)
    steps = spec.segment or bounded_steps(kept, spec.network_open, SEGMENT_BYTES["cuda"])
    grads = adj_x0 = None
    for t0, t1 in pieces(horizon, steps):
        part = states[t0 : t1 + 1]
        rows = kept.steps(t0, t1)
        if spec.segment:
            rows = Rows(lay, packed, activations(p, network, packed, part), t1 - t0, nworld)
        with span("linearize"):
            d, jac = linearize(rows, spec.network_open)
        mu, adj_x0 = adjoint(p, spec, part, controls[t0:t1], jac, g.steps(t0, t1), t0, adj_x0)
        with span("weight_grad"):
            own = weight_grad(rows, d, mu, unpack)
        grads = own if grads is None else grads.add_(own)
    assert grads is not None and adj_x0 is not None
    return grads, adj_x0


class _Pass:
    """A prepared launch over some world blocks, or over their worlds."""

    def __init__(self, p: Prepared, kernel: Any, values: dict[str, Any], by_block: bool) -> None:
        self._launch = Launch(kernel, 1, {"first": 0} | values, p.device)
        self._by_block = by_block

    def put(self, **values: int) -> None:
        """Sets these arguments, except those that the kernel does not have."""
        for name, value in self._own(values).items():
            self._launch.put(name, value)

    def step(self, block: int, blocks: int, world: int, worlds: int, /, **values: int) -> Step:
        """A launch over the blocks, or over the worlds that these hold."""
        first, dim = (block, blocks) if self._by_block else (world, worlds)
        return Step(self._launch, dim, self._own({"first": first, **values}))

    def _own(self, values: dict[str, int]) -> dict[str, int]:
        return {name: value for name, value in values.items() if self._launch.takes(name)}


class _Group:
    """The launches of one thread and their scratch, for a group of world blocks at a time.

    With one control the policy is linearised before the sweep; with several, its backward pass runs in the
    sweep (kernels/sweeps/adjoint.py), and no Jacobian is kept.
    """

    def __init__(self, whole: "_Backward", p: Prepared, spec: Spec, network: str, shape: Shape) -> None:
        n, m, size, steps = p.state_size, p.control_size, p.itemsize, shape.steps
        fields, several, nworld = len(spec.schedules), m > 1, shape.nworld
        lay = layout(network, size)
        kernels = make_network_kernels(p.dtype)
        like, group, self._member_worlds = whole.mu, whole.group, nworld // shape.members
        chunk = chunk_rows(lay, size, steps)
        recomputed = whole.recomputed

        d = empty(like, group * (fields if several else m) * steps * BLOCK * lay.row_adj)
        mu_rows, scaled = empty(like, fields * chunk * m), empty(like, chunk * lay.widest)
        pulled, unused = empty(like, fields, BLOCK, n), empty(like, BLOCK * m)
        rows = empty(like, group * steps * BLOCK * lay.row if recomputed else 0)
        self.scratch = [d, mu_rows, scaled, pulled, unused, rows]

        self._arguments = a = AdjointArguments(p, spec, shape)
        a.mu.data, a.jac.data = whole.mu.data_ptr(), whole.jac.data_ptr()
        self._packed = array(size, shape.members, lay.packed)
        self._hidden = array(size, rows.numel() // lay.row if recomputed else whole.rows, lay.row)
        self._hidden.data = rows.data_ptr()
        self._states = array(size, steps + 1, nworld, n)
        scalar_mu = array(size, fields, steps, nworld, m)
        scalar_mu.data = whole.mu.data_ptr()
        policy: dict[str, Any] = {
            "params": self._packed,
            "table": fixed(whole.table),
            "operations": lay.operations,
            "row": lay.row,
            "row_adj": lay.row_adj,
            "hidden": self._hidden,
            "hidden_first": 0,
            "hidden_steps": steps if recomputed else spec.horizon,
            "steps": steps,
            "member_worlds": self._member_worlds,
            "state_size": n,
            "control_size": m,
            "d": fixed(d),
        }

        self._passes: list[_Pass] = []
        if recomputed:
            section = lay.column(0, Column.SECTION)
            values = policy | {"section": section, "states": self._states, "controls": fixed(unused)}
            self._passes.append(_Pass(p, kernels.activate, values, True))
        if several:
            states_of_block = array(size, fields, BLOCK, n, components=1)
            states_of_block.data = pulled.data_ptr()
            values = a.values | policy | {"flat_mu": fixed(whole.mu.view(-1))}
            values |= {"pulled": states_of_block, "flat_pulled": fixed(pulled.view(-1))}
            self._passes.append(_Pass(p, p.fused_adjoint(fields), values, True))
        else:
            values = {"nworld": nworld, "want_jac": int(shape.jac), "d_first": 0}
            values |= policy | {"jac": fixed(whole.jac.view(-1))}
            self._passes.append(_Pass(p, kernels.linearize, values, True))
            self._passes.append(_Pass(p, a.kernel, a.values, p.kernels.worlds > 1))
        values = policy | {"mu": scalar_mu, "fields": fields, "scaled": int(several), "chunk": chunk}
        values |= {"mu_rows": fixed(mu_rows), "scratch": fixed(scaled), "grads": whole.sums}
        values |= dict.fromkeys(("blocks", "d_first", "slot", "fresh"), 0)
        self._products = _Pass(p, kernels.weight_grad, values, True)
        self._all = [*self._passes, self._products]
        self._recomputed, self.pieces = recomputed, pieces(spec.horizon, steps)
        self._at = -1
        self._first_state = self._first_row = 0
        self._step = BLOCK * lay.row * size

    def point(
        self,
        packed: torch.Tensor,
        hidden: torch.Tensor,
        states: torch.Tensor,
        controls: torch.Tensor,
        g: Cotangents,
        adj_x0: torch.Tensor,
    ) -> None:
        """Sets the addresses of the inputs, all dense, and of adj_x0, and seeks the last steps."""
        self._arguments.point(states, controls, g)
        self._arguments.adj_x0.data, self._packed.data = adj_x0.data_ptr(), packed.data_ptr()
        self._first_state, self._first_row = states.data_ptr(), hidden.data_ptr()
        self.seek(*self.pieces[0])

    def seek(self, t0: int, t1: int) -> None:
        """Sets the launches to the steps t0 ... t1 - 1."""
        self._arguments.seek(t0)
        if self._recomputed:
            self._states.data = self._first_state + t0 * self._states.strides[0]
        else:
            self._hidden.data = self._first_row + t0 * self._step
        if self._at != t0:
            self._at = t0
            values = {"steps": t1 - t0, "t0": t0, "carried": int(t1 < self.pieces[0][1])}
            if self._recomputed:
                values["hidden_steps"] = t1 - t0
            for one in self._all:
                one.put(**values)

    def steps(self, block: int, blocks: int, world: int, slot: int, fresh: bool) -> list[Step]:
        """The launches that take a group of blocks of a member, whose first world is `world`, back through
        the steps; `fresh`: the first of a partial sum.
        """
        worlds = min(blocks * BLOCK, self._member_worlds - world % self._member_worlds)
        hidden_first = {"hidden_first": block} if self._recomputed else {}
        passes = [one.step(block, blocks, world, worlds, **hidden_first) for one in self._passes]
        products = self._products.step(
            block, 1, world, worlds, blocks=blocks, slot=slot, fresh=int(fresh), **hidden_first
        )
        return [*passes, products]


class _Backward:
    """Prepared backward pass of a fused rollout on a CPU.

    World blocks are taken in groups. Each group is linearised, swept and multiplied while its rows are in
    cache. A group lies within a member and adds to one of a fixed number of partial sums of that member. A
    thread owns whole partial sums, so the result depends neither on the number of threads nor on the other
    members. Members are taken in waves, which bounds the memory of the partial sums.

    If there are segments, each group goes through all of them before the next group begins. So the recomputed
    activations are those of one group and one segment, however many worlds and steps there are.
    """

    def __init__(
        self, p: Prepared, spec: Spec, network: str, shape: Shape, segment: int, threads: int
    ) -> None:
        horizon, size, fields = shape.steps, p.itemsize, len(spec.schedules)
        lay = layout(network, size)
        blocks = blocks_of(shape.nworld // shape.members)
        steps, group, slots = division(blocks, horizon, BLOCK * lay.row * size, segment)
        shape = shape._replace(steps=steps, jac=shape.jac and p.control_size == 1)
        like = torch.empty(0, dtype=p.torch_dtype, device=p.torch_device)
        least = blocks_per_thread(lay, horizon)
        waves = _waves(shape.members, slots, slots * fields * lay.grads * size, threads)

        self.recomputed, self.group, self.rows = segment > 0, group, shape.members * blocks * horizon * BLOCK
        # scratch of this object, never seen outside
        self.mu = empty(like, fields, shape.steps, shape.nworld, p.control_size)
        self.jac = empty(
            like, *((shape.steps, shape.nworld) if shape.jac else (0, 0)), p.control_size, p.state_size
        )
        self.partial = empty(like, len(waves[0]), slots, fields, lay.grads)
        self.sums = array(size, len(waves[0]) * slots, fields, lay.grads)
        self.sums.data = self.partial.data_ptr()
        self.table = constant((network, size), table, p.torch_device)
        member_worlds = shape.nworld // shape.members

        def visits(wave: range, part: range) -> Iterator[tuple[int, int, int, int, bool]]:
            """Arguments of `_Group.steps` for the groups of some partial sums of a wave."""
            for item in part:
                member, slot = wave.start + item // slots, item % slots
                for first in range(slot * group, blocks, slots * group):
                    count, world = min(group, blocks - first), member * member_worlds + first * BLOCK
                    yield member * blocks + first, count, world, item, first == slot * group

        def task(go: _Group, wave: range, part: range) -> Task:
            groups = -(-blocks // (slots * group)) * len(part)
            if len(go.pieces) == 1 and groups <= PROGRAM_GROUPS:
                return Program([step for visit in visits(wave, part) for step in go.steps(*visit)])
            return functools.partial(_through_pieces, go, lambda: visits(wave, part))

        self.groups = [_Group(self, p, spec, network, shape) for _ in shares(len(waves[0]) * slots, least)]
        self.parameter = constant((network, size), _parameter_index, p.torch_device)
        self.grads = array(size, fields, shape.members, lay.unpack.size)
        sum_partial, chunks = make_network_kernels(p.dtype).sum_partial, -(-lay.grads // SUM_CHUNK)
        partial = array(size, *self.partial.shape)
        partial.data = self.partial.data_ptr()
        self.waves: list[tuple[Team, Team]] = []
        for wave in waves:
            parts = shares(len(wave) * slots, least)
            tasks = [task(go, wave, part) for go, part in zip(self.groups, parts)]
            values = {"partial": partial, "parameter": fixed(self.parameter), "grads": self.grads}
            values |= {"first_member": wave.start}
            sums = [
                Launch(sum_partial, len(part), values | {"first": part.start}, p.device)
                for part in shares(len(wave) * fields * chunks, SUM_CHUNKS_PER_THREAD)
            ]
            self.waves.append((Team(tasks), Team(sums)))
        scratch = [self.mu, self.jac, self.partial, *(t for go in self.groups for t in go.scratch)]
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
        g = g.dense()
        for go in self.groups:
            go.point(packed, hidden, states, controls, g, adj_x0)
        self.grads.data = grads.data_ptr()
        for tasks, sums in self.waves:
            tasks()
            sums()


def _through_pieces(go: _Group, visits: Callable[[], Iterator[tuple[int, int, int, int, bool]]]) -> None:
    """Takes one group after the other backwards through all segments."""
    for block, blocks, world, slot, fresh in visits():
        for piece in go.pieces:
            go.seek(*piece)
            for step in go.steps(block, blocks, world, slot, fresh and piece == go.pieces[0]):
                step()


def division(blocks: int, horizon: int, step: int, segment: int) -> tuple[int, int, int]:
    """Returns how many steps are taken at once, how many world blocks a group has, and how many partial sums
    there are; `blocks` are the world blocks of a member, `step` the bytes of activations of a block and step.
    """
    steps = segment or cpu_steps(step, horizon, GROUP_BYTES)
    most = max(1, SEGMENT_BYTES["cpu"] // (steps * step))
    if steps == horizon:
        most = min(GROUP, max(1, GROUP_BYTES // (steps * step)))
    # at least as many groups as partial sums, so that all threads have work
    group = max(1, min(most, blocks // SLOTS))
    return steps, group, min(SLOTS, (blocks + group - 1) // group)


def _waves(members: int, slots: int, member_bytes: int, threads: int) -> list[range]:
    """Splits the members into waves, whose partial sums are held at once: the longest wave first, of lengths
    as equal as possible, with work for all threads.
    """
    most = max(PARTIAL_BYTES // member_bytes, 2 * threads // slots, 1)
    count = (members + most - 1) // most
    bounds = [members * i // count for i in range(count, -1, -1)]
    return [range(a, b) for a, b in zip(bounds[1:], bounds[:-1])]


_backward = Pool(_Backward)

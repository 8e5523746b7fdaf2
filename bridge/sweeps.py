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
from ..kernels.dense import BLOCK, Column, Layout, layout
from ..kernels.flow import NETWORK, PHYSICS, Flow
from ..kernels.network import chunk_rows, make_network_kernels
from . import wide
from .arrays import constant, empty, in_parallel, shares, stream, view, warp_device
from .registry import Prepared

GPU_LANES = 128
"""Threads of a GPU block in the fused forward sweep."""
GROUP = 4
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


def _launch(kernel: wp.Kernel, dim: Any, args: Sequence[Any], device: Any, block_dim: int = 256) -> None:
    wp.launch(kernel, dim=dim, inputs=list(args), device=device, record_tape=False, block_dim=block_dim)


def _over_worlds(p: Prepared, kernel: wp.Kernel, nworld: int, before: list[Any], after: list[Any]) -> None:
    """Launches one thread per world; `first` stands between the arguments `before` and `after`."""
    if p.device.is_cpu:
        parts = shares(nworld, WORLDS_PER_THREAD)
        if len(parts) > 1:
            commands = [
                wp.launch(
                    kernel,
                    dim=len(part),
                    inputs=[*before, part.start, *after],
                    device=p.device,
                    record_cmd=True,
                    record_tape=False,
                )
                for part in parts
            ]
            in_parallel([command.launch for command in commands])
            return
    _launch(kernel, nworld, [*before, 0, *after], p.device)


def simulate(p: Prepared, x0: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """States under given controls."""
    horizon, nworld = controls.shape[0], x0.shape[0]
    states = empty(x0, horizon + 1, nworld, p.state_size)
    if nworld:
        with stream(x0.device):
            _over_worlds(
                p,
                p.kernels.simulate,
                nworld,
                [view(x0, 1), view(controls, 1), p.params, horizon],
                [view(states, 1)],
            )
    return states


def _check_has_loss(p: Prepared, weights: LossWeights) -> None:
    if p.functions.loss is None and (weights.final or weights.running):
        raise ValueError("loss: this system has no loss of its own; pass a callable of (states, controls) or None")


def loss(p: Prepared, states: torch.Tensor, controls: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """The built-in loss, a scalar; 0 without worlds."""
    horizon, nworld = controls.shape[0], controls.shape[1]
    _check_has_loss(p, weights)
    if nworld == 0 or not any(weights):
        return states.new_zeros(())
    world_loss = states.new_empty(nworld)
    with stream(states.device):
        _over_worlds(
            p,
            p.kernels.loss,
            nworld,
            [
                view(states, 1),
                view(controls, 1),
                p.params,
                horizon,
                *weights.per_world(nworld, horizon, p.control_size),
            ],
            [view(world_loss)],
        )
    return world_loss.sum()


def pack(network: str, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The policy's parameters as the kernels read them."""
    first = parameters[0]
    lay = layout(network, first.element_size())
    index = constant((network, first.element_size()), _pack_index, first.device)
    flat = torch.cat([first.new_zeros(1), *(q.detach().reshape(-1) for q in parameters)])
    assert flat.numel() == lay.unpack.size + 1
    return flat.index_select(0, index)


def _pack_index(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).pack


def _unpack_index(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).unpack


def _table(key: tuple[str, int]) -> np.ndarray:
    return layout(*key).table.ravel()


def blocks_of(nworld: int) -> int:
    """World blocks of `nworld` worlds."""
    return (nworld + BLOCK - 1) // BLOCK


def fused_rollout(
    p: Prepared, network: str, packed: torch.Tensor, x0: torch.Tensor, horizon: int, weights: LossWeights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fused forward sweep: states, controls, loss and hidden activations (blocks * horizon * BLOCK, row)."""
    _check_has_loss(p, weights)
    nworld = x0.shape[0]
    lay = layout(network, x0.element_size())
    states = empty(x0, horizon + 1, nworld, p.state_size)
    controls = empty(x0, horizon, nworld, p.control_size)
    hidden = empty(x0, blocks_of(nworld) * horizon * BLOCK, lay.row)
    if nworld == 0:
        return states, controls, x0.new_zeros(()), hidden
    world_loss = x0.new_empty(nworld)
    table = constant((network, x0.element_size()), _table, x0.device)
    blocks = blocks_of(nworld)
    lanes = 1 if p.device.is_cpu else GPU_LANES
    before = [
        view(x0, 1),
        p.params,
        view(packed),
        view(table),
        lay.layers,
        lay.row,
        lay.column(0, Column.SECTION),
        horizon,
        nworld,
        *weights.per_world(nworld, horizon, p.control_size),
    ]
    after = [lanes, view(states, 1), view(controls, 1), view(controls.view(-1)), view(hidden), view(world_loss)]
    kernel = p.fused_rollout
    with stream(x0.device):
        parts = shares(blocks) if p.device.is_cpu else [range(blocks)]
        if len(parts) > 1:
            commands = [
                wp.launch(
                    kernel,
                    dim=(len(part), lanes),
                    inputs=[*before, part.start, *after],
                    device=p.device,
                    record_cmd=True,
                    record_tape=False,
                )
                for part in parts
            ]
            in_parallel([command.launch for command in commands])
        else:
            _launch(kernel, (blocks, lanes), [*before, 0, *after], p.device, block_dim=lanes)
    return states, controls, world_loss.sum(), hidden


class _Sweep(NamedTuple):
    """Arguments of the adjoint kernel around `first`, its outputs, and what must stay alive until it ran."""

    kernel: wp.Kernel
    before: list[Any]
    after: list[Any]
    mu: torch.Tensor
    adj_x0: torch.Tensor
    alive: list[torch.Tensor]


def _sweep(
    p: Prepared, back: Backward, states: torch.Tensor, controls: torch.Tensor, jac: torch.Tensor, g: Cotangents
) -> _Sweep:
    horizon, nworld = controls.shape[0], controls.shape[1]
    fields = len(back.schedules)
    mu = empty(states, fields, horizon, nworld, p.control_size)
    adj_x0 = states.new_empty((fields, nworld, p.state_size))
    edges = constant((back.schedules, back.decay == 0.0), _edge_masks, states.device)
    adj_loss = states.new_empty(0) if g.loss is None else g.loss.reshape(1).contiguous()
    adj_states = states.new_empty((0, 0, p.state_size)) if g.states is None else g.states.contiguous()
    adj_controls = states.new_empty((0, 0, p.control_size)) if g.controls is None else g.controls.contiguous()
    before = [
        view(states, 1),
        view(controls, 1),
        view(jac, 1),
        p.params,
        view(edges),
        back.decay,
        horizon,
        *back.weights.per_world(nworld, horizon, p.control_size),
        view(adj_loss),
        view(adj_states, 1),
        view(adj_controls, 1),
    ]
    after = [view(mu, 1), view(adj_x0, 1)]
    return _Sweep(
        p.kernels.adjoint[fields - 1], before, after, mu, adj_x0, [adj_loss, adj_states, adj_controls, jac, edges]
    )


def adjoint(
    p: Prepared, back: Backward, states: torch.Tensor, controls: torch.Tensor, jac: torch.Tensor | None, g: Cotangents
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoint sweep: cotangents of the controls (fields, horizon, nworld, control_size) and of x0 (fields, nworld, state_size).

    `jac` is dN/dx (horizon, nworld, control_size, state_size), None where no network edge is open.
    """
    nworld = controls.shape[1]
    if jac is None:
        jac = states.new_empty((0, 0, 0, p.state_size))
    if nworld == 0:
        fields = len(back.schedules)
        return states.new_empty((fields, *controls.shape)), states.new_empty((fields, 0, p.state_size))
    with stream(states.device):
        s = _sweep(p, back, states, controls, jac, g)
        _over_worlds(p, s.kernel, nworld, s.before, s.after)
    return s.mu, s.adj_x0


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
    lay = layout(network, states.element_size())
    if nworld == 0:
        return states.new_zeros((fields, lay.unpack.size)), states.new_zeros((fields, 0, p.state_size))
    if not p.device.is_cpu:
        rows = wide.Rows(lay, packed, hidden, horizon, nworld)
        d, jac = wide.linearize(rows, back.network_open)
        mu, adj_x0 = adjoint(p, back, states, controls, jac, g)
        unpack = constant((network, states.element_size()), _unpack_index, states.device)
        return wide.weight_grad(rows, d, mu, unpack), adj_x0
    return _fused_backward_cpu(p, back, network, lay, packed, hidden, states, controls, g)


def _fused_backward_cpu(
    p: Prepared,
    back: Backward,
    network: str,
    lay: Layout,
    packed: torch.Tensor,
    hidden: torch.Tensor,
    states: torch.Tensor,
    controls: torch.Tensor,
    g: Cotangents,
) -> tuple[torch.Tensor, torch.Tensor]:
    horizon, nworld = controls.shape[0], controls.shape[1]
    fields, layers, m = len(back.schedules), lay.layers, p.control_size
    blocks = blocks_of(nworld)
    group_size = max(1, min(GROUP, GROUP_BYTES // (horizon * BLOCK * lay.row * states.element_size())))
    groups = (blocks + group_size - 1) // group_size
    slots = min(SLOTS, groups)
    kernels = make_network_kernels(p.dtype)

    points = (horizon, nworld, m) if back.network_open else (0, 0, 0)
    jac = empty(states, *points, p.state_size)
    group_d = min(group_size, blocks) * m * horizon * BLOCK * lay.row_adj
    parts = shares(slots)
    d = empty(states, len(parts) * group_d)
    chunk = chunk_rows(lay.widest, states.element_size())
    mu_rows = states.new_empty((len(parts), fields * chunk * m))
    scratch = states.new_empty((len(parts), chunk * lay.widest))
    partial = states.new_zeros((slots, fields, lay.grads))
    table = constant((network, states.element_size()), _table, states.device)
    s = _sweep(p, back, states, controls, jac, g)

    def command(kernel: wp.Kernel, args: list[Any]) -> Any:
        return wp.launch(kernel, dim=1, inputs=args, device=p.device, record_cmd=True, record_tape=False)

    shared = [layers, lay.row, lay.row_adj, view(hidden)]

    def task(thread: int, part: range) -> Callable[[], None]:
        """Takes the slots of `part`, group by group: linearise, sweep, multiply, while the group's rows are in cache."""
        linearize = command(
            kernels.linearize,
            [view(packed), view(table), *shared, horizon, nworld, p.state_size, m, int(back.network_open)]
            + [0, thread * group_d, view(d), view(jac.view(-1))],
        )
        sweep = command(s.kernel, [*s.before, 0, *s.after])
        multiply = command(
            kernels.weight_grad,
            [view(table), *shared, view(d), view(s.mu), fields, horizon, nworld, m, chunk]
            + [0, 0, thread * group_d, 0]
            + [view(mu_rows[thread]), view(scratch[thread]), view(partial)],
        )
        first_linearize, first_sweep, first_multiply = 11, len(s.before), 12

        def run() -> None:
            for slot in part:
                for group in range(slot, groups, slots):
                    first = group * group_size
                    count = min(group_size, blocks - first)
                    world = first * BLOCK
                    linearize.set_param_at_index(first_linearize, first)
                    linearize.set_dim(count)
                    linearize.launch()
                    sweep.set_param_at_index(first_sweep, world)
                    sweep.set_dim(min(count * BLOCK, nworld - world))
                    sweep.launch()
                    multiply.set_param_at_index(first_multiply, first)
                    multiply.set_param_at_index(first_multiply + 1, count)
                    multiply.set_param_at_index(first_multiply + 3, slot)
                    multiply.launch()

        return run

    in_parallel([task(i, part) for i, part in enumerate(parts)])
    grads = states.new_empty((fields, lay.unpack.size))
    unpack = constant((network, states.element_size()), _unpack_index, states.device)
    _launch(kernels.reduce, (fields, lay.unpack.size), [view(partial), view(unpack), view(grads)], p.device)
    return grads, s.adj_x0


def combine(base: torch.Tensor, check: torch.Tensor, keep_check: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Component-wise comparison of two flat gradients: the combined one and the sums of `agreement.NSTATS`."""
    size = base.numel()
    combined = torch.empty_like(base)
    stats = torch.empty((chunks(size), NSTATS), dtype=torch.float64, device=base.device)
    if size:
        scalar = {torch.float32: wp.float32, torch.float64: wp.float64}[base.dtype]
        with stream(base.device):
            _launch(
                make_combine(scalar),
                chunks(size),
                [view(base), view(check), size, int(keep_check), view(combined), view(stats)],
                warp_device(base.device),
            )
    return combined, stats.sum(0)

"""Rules for `torch.func.vmap`, and with it `jacrev`. In the open loop the mapped axis is folded into the
worlds. Of a rollout, whose worlds are its batch already, only cotangents are mapped, one after the other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..passes.physical import Physical
from ..passes.simulator import simulator_of

_NO_MAP = (
    "torch.func.vmap over a rollout is not implemented: its worlds are the batch; put the mapped axis into "
    "the worlds of x0, policies into a warp_sims.Ensemble, or loop; warp_sims.step, warp_sims.simulate and "
    "the cotangents of a rollout (jacrev) can be mapped"
)

Rule = Callable[..., tuple[Any, Any]]
"""What torch asks for: (info, in_dims, *arguments) -> outputs, out_dims."""


def refused(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """The rule of a function that is not mapped."""
    raise NotImplementedError(_NO_MAP)


def one_by_one(call: Callable[..., Any]) -> Rule:
    """The rule that calls the function once for every index of the mapped axis."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        found = []
        for b in range(info.batch_size):
            found.append(call(*(a.select(d, b) if isinstance(d, int) else a for a, d in zip(args, in_dims))))
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        outputs = tuple(torch.stack(q) for q in zip(*found, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def simulated(call: Callable[..., Any]) -> Rule:
    """The rule of `Simulate`: the mapped axis becomes worlds."""

    def rule(
        info: Any,
        in_dims: Any,
        x0: Tensor,
        controls: Tensor,
        system: int,
        physical: Physical | None = None,
        *given: Tensor,
    ) -> tuple[Any, Any]:
        if not _foldable(system):
            return one_by_one(call)(info, in_dims, x0, controls, system, physical, *given)
        size = info.batch_size
        x0, controls = _folded(x0, in_dims[0], size, 0), _folded(controls, in_dims[1], size, 1)
        nworld = x0.shape[0] // size
        # one number for everything stays one
        given = tuple(q if q.ndim == 0 else _by_world(q, d, size, nworld) for q, d in zip(given, in_dims[4:]))
        return call(x0, controls, system, physical, *given).unflatten(1, (size, nworld)), 1

    return rule


def pulled_back(call: Callable[..., Any]) -> Rule:
    """The rule of `SimulateBackward`, for maps over its cotangents or over everything."""

    def rule(
        info: Any,
        in_dims: Any,
        system: int,
        physical: Physical | None,
        states: Tensor,
        controls: Tensor,
        adj_states: Tensor,
        *given: Tensor,
    ) -> tuple[Any, Any]:
        if not _foldable(system):
            args = system, physical, states, controls, adj_states, *given
            return one_by_one(call)(info, in_dims, *args)
        size, wanted = info.batch_size, physical is not None and physical.wanted
        along = (states, controls, adj_states)
        folded = [_folded(q, d, size, 1) for q, d in zip(along, in_dims[2:5])]
        nworld = folded[0].shape[1] // size
        # cotangents of a number differ from place to place, so that each world is given its own
        numbers = [_by_world(q, d, size, nworld) for q, d in zip(given, in_dims[5:])]
        adj_controls, adj_x0, flat = call(system, physical, *folded, *numbers)
        if wanted:
            parts = flat.unflatten(0, (len(given), size, nworld)).unbind(0)
            whole = (q.ndim == (0 if d is None else 1) for q, d in zip(given, in_dims[5:]))
            flat = torch.cat([q.sum(1, keepdim=True) if one else q for q, one in zip(parts, whole)], dim=1)
        outputs = adj_controls.unflatten(1, (size, nworld)), adj_x0.unflatten(0, (size, nworld)), flat
        return outputs, (1, 0, 0 if wanted else None)

    return rule


def _foldable(system: int) -> bool:
    """Whether a system takes any number of worlds, and its worlds do not act on each other."""
    simulator = simulator_of(system)
    return simulator is None or simulator.rowwise


def _moved(q: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """Moves the mapped axis to `axis`; without a mapped axis, copies the tensor along it."""
    if dim is not None:
        return q.movedim(dim, axis)
    return q.unsqueeze(axis).expand(*q.shape[:axis], size, *q.shape[axis:])


def _folded(q: Tensor, dim: int | None, size: int, worlds: int) -> Tensor:
    """Makes the mapped axis the slow part of the axis `worlds`."""
    return _moved(q, dim, size, worlds).flatten(worlds, worlds + 1)


def _by_world(q: Tensor, dim: int | None, size: int, nworld: int) -> Tensor:
    """Repeats a physical parameter, one for all worlds or one a world, for each of the folded worlds."""
    q = _moved(q, dim, size, 0)
    return (q.unsqueeze(1) if q.ndim == 1 else q).expand(size, nworld).reshape(-1)

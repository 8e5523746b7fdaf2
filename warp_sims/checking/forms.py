"""A system's step and loss at many points, by each form that it has."""

from typing import Any, NamedTuple

import torch
import warp as wp
from torch import Tensor

from ..bridge.runtime.arrays import WARP_DTYPE, stream, warp_device
from ..bridge.runtime.launches import PREPARING
from ..kernels.policy.layout import BLOCK
from ..kernels.sweeps.forms import world_form
from ..kernels.sweeps.probes import make_lanes_probe, make_memory_probe
from ..systems import DeviceFunctions, MemoryFunctions, System

__all__ = ["BY_VALUE", "IN_LANES", "IN_MEMORY", "Form", "Outputs", "forms_of"]

BY_VALUE, IN_LANES, IN_MEMORY = "by value", "in lanes", "in memory"

_STEPS, _T = 3, 1
"""The step is the second of three: a form that ignores which one it is asked for shows."""


class Outputs(NamedTuple):
    """What one form gives for n points and one or two cotangents each."""

    x_next: Tensor
    """(n, state_size)."""
    adj_x: Tensor
    """(fields, n, state_size)."""
    adj_u: Tensor
    """(fields, n, control_size)."""
    cost: Tensor | None
    """(n,); None where the form has no loss."""
    adj_x_cost: Tensor | None
    """(fields, n, state_size); None where the form has no adjoint of the loss."""
    astray: tuple[str, ...]
    """Names of what was written that is not an output."""


class Form(NamedTuple):
    """One form of a system's functions, for one dtype and device."""

    name: str
    functions: DeviceFunctions
    params: Any
    dtype: torch.dtype
    device: torch.device

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def sizes(self) -> tuple[int, int]:
        """Length of a state and of a control."""
        return self.functions.State._length_, self.functions.Control._length_

    def run(self, x: Tensor, u: Tensor, adj_x_next: Tensor, adj_cost: Tensor) -> Outputs:
        """Runs step, loss and both adjoints. Outputs are filled with NaN before.

        Args:
            x: States (n, state_size).
            u: Controls (n, control_size).
            adj_x_next: Cotangents of the next states (fields, n, state_size), one or two fields.
            adj_cost: Cotangents of the costs (n,).
        """
        run = {BY_VALUE: self._by_value, IN_LANES: self._in_lanes, IN_MEMORY: self._in_memory}[self.name]
        place = {"dtype": self.dtype, "device": self.device}
        given = (t.detach().to(**place).contiguous() for t in (x, u, adj_x_next, adj_cost))
        with stream(self.device):
            found = run(*given)
        tensors = {
            name: t.to("cpu", torch.float64) for name, t in found._asdict().items() if torch.is_tensor(t)
        }
        return found._replace(**tensors)

    def _launch(self, kernel: wp.Kernel, dim: int, *arguments: Any) -> None:
        with PREPARING:
            wp.launch(kernel, dim, inputs=arguments, device=warp_device(self.device), record_tape=False)

    def _arrays(self, kind: str, *tensors: Tensor) -> list[wp.array]:
        functions = self.functions
        dtype = {"x": functions.State, "u": functions.Control, "1": WARP_DTYPE[self.dtype]}[kind]
        with PREPARING:
            return [wp.from_torch(t, dtype=dtype, requires_grad=False) for t in tensors]

    def _by_value(self, x: Tensor, u: Tensor, adj: Tensor, adj_cost: Tensor) -> Outputs:
        form = world_form(self.functions._replace(memory=None), 1)
        parts = [self._through(form, x, u, one, adj_cost) for one in adj.split(1)]
        names = ("adj_x", "adj_u") + (("adj_x_cost",) if form.loss_vjp else ())
        return parts[0]._replace(**{name: torch.cat([getattr(q, name) for q in parts]) for name in names})

    def _trajectory(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        states = x.new_full((_STEPS + 1, *x.shape), torch.nan)
        controls = u.new_full((_STEPS, *u.shape), torch.nan)
        states[_T], controls[_T] = x, u
        return states, controls

    def _in_lanes(self, x: Tensor, u: Tensor, adj: Tensor, adj_cost: Tensor) -> Outputs:
        states, controls = self._trajectory(x, u)
        adj_x = adj.clone()
        adj_u = u.new_full((adj.shape[0], *controls.shape), torch.nan)
        blocks = (x.shape[0] + BLOCK - 1) // BLOCK
        xs, us = self._arrays("x", states, adj_x), self._arrays("u", controls, adj_u)
        self._launch(make_lanes_probe(self.functions), blocks, us[0], self.params, _T, xs[0], xs[1], us[1])
        astray = _changed(states, controls, x, u)
        if not adj_u[:, [t for t in range(_STEPS) if t != _T]].isnan().all():
            astray.append("adj_u of another step")
        return Outputs(states[_T + 1], adj_x, adj_u[:, _T], None, None, tuple(astray))

    def _in_memory(self, x: Tensor, u: Tensor, adj: Tensor, adj_cost: Tensor) -> Outputs:
        assert self.functions.memory is not None
        return self._through(self.functions.memory, x, u, adj, adj_cost)

    def _through(
        self, memory: MemoryFunctions, x: Tensor, u: Tensor, adj: Tensor, adj_cost: Tensor
    ) -> Outputs:
        states, controls = self._trajectory(x, u)
        adj_x = adj.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        adj_u = u.new_full((x.shape[0], adj.shape[0], u.shape[1]), torch.nan)
        # the adjoint of the loss adds to what is there, which is small so that its rounding is
        before = 2.0**-10 * adj_x
        adj_x_cost, cost = before.clone(), torch.full_like(adj_cost, torch.nan)
        xs, us = self._arrays("x", states, adj_x, adj_x_cost), self._arrays("u", controls, adj_u)
        costs = self._arrays("1", adj_cost, cost)
        self._launch(
            make_memory_probe(self.functions, memory, WARP_DTYPE[self.dtype]), x.shape[0],
            us[0], self.params, _T, costs[0], xs[0], xs[1], xs[2], costs[1], us[1],
        )  # fmt: skip
        return Outputs(
            states[_T + 1],
            adj_x.transpose(0, 1),
            adj_u.transpose(0, 1),
            None if memory.loss is None else cost,
            None if memory.loss_vjp is None else (adj_x_cost - before).transpose(0, 1),
            tuple(_changed(states, controls, x, u)),
        )


def _changed(states: Tensor, controls: Tensor, x: Tensor, u: Tensor) -> list[str]:
    """Names of what a step was given to read, or had nothing to do with, and changed."""
    others = [t for t in range(_STEPS + 1) if t not in (_T, _T + 1)]
    return [
        name
        for name, kept in (
            ("the state it reads", _same(states[_T], x)),
            ("the state of another step", bool(states[others].isnan().all())),
            ("the control it reads", _same(controls[_T], u)),
        )
        if not kept
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def forms_of(
    system: System, functions: DeviceFunctions, dtype: torch.dtype, device: torch.device
) -> list[Form]:
    """Returns the forms that a system has and that `device` can run, first that by value."""
    warp_device(device)  # starts Warp's runtime, which arrays need
    names = [BY_VALUE]
    if functions.block is not None and device.type == "cpu":
        names.append(IN_LANES)
    if functions.memory is not None:
        names.append(IN_MEMORY)
    params = system.parameters(WARP_DTYPE[dtype])
    return [Form(name, functions, params, dtype, device) for name in names]

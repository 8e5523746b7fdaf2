"""Simulators that are not Warp kernels: what the bridge needs of them, and what it checks at every step."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.registry import find

Pull = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes the cotangent of the next states (nworld, state_size) to those of states and controls."""


class Simulator(abc.ABC):
    """What the bridge needs of a foreign simulator; `warp_sims.ForeignSystem` is one."""

    verified: set[Any]
    """Kinds of states whose gradients have been checked."""
    checks_gradient: bool
    """Whether its gradients are checked before the first use."""
    rowwise: bool
    """Whether it takes any number of rows at once, and no row changes with another."""
    parameter_names: tuple[str, ...]
    """Names of the physical parameters that a rollout may be given. They come as further columns of the
    controls, after control_size.
    """
    parameter_values: tuple[float, ...]
    """Their values if none are given; the controls then have no further columns."""

    @property
    @abc.abstractmethod
    def state_size(self) -> int: ...

    @property
    @abc.abstractmethod
    def control_size(self) -> int: ...

    @property
    def worlds_apart(self) -> bool:
        """Whether no world changes with another, even if the number of worlds is fixed."""
        return self.rowwise

    @property
    @abc.abstractmethod
    def has_loss(self) -> bool: ...

    @abc.abstractmethod
    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """Next states (n, state_size) of states and controls (n, control_size)."""

    @abc.abstractmethod
    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Pull]:
        """The next states and the pullback, which may be called several times before the next call of
        `linearize`.
        """

    @abc.abstractmethod
    def cost(self, x: Tensor) -> Tensor:
        """Cost of states (n, state_size), one a row (n,)."""

    @abc.abstractmethod
    def cost_gradient(self, x: Tensor) -> Tensor:
        """Gradient of each row's cost by that row, (n, state_size)."""

    def first_use(self, x: Tensor, u: Tensor) -> None:  # noqa: B027
        """Raises TypeError or ValueError for mistakes that only this kind of simulator can make; called
        before its first use.
        """

    def jacobians(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Next states, and [dS/dx dS/du] (n, state_size, state_size + control_size); only for simulators
        whose rows do not mix.
        """
        x_next, pull = self.linearize(x, u)
        rows = []
        for i in range(self.state_size):
            unit = torch.zeros_like(x)
            unit[:, i] = 1.0
            rows.append(torch.cat(pull(unit), dim=1))
        return x_next, torch.stack(rows, dim=1)


def simulator_of(number: int) -> Simulator | None:
    """The foreign simulator that has this number; None where it is a system with kernels."""
    system = find(number)
    return system if isinstance(system, Simulator) else None


def with_values(simulator: Simulator, controls: Tensor, values: Tensor | None) -> Tensor:
    """Appends physical parameters (1 or nworld, count) to controls (steps, nworld, control_size), as further
    columns.
    """
    if values is None:
        return controls
    steps, nworld, _ = controls.shape
    return torch.cat((controls, values.expand(steps, nworld, -1)), dim=2)


def name_of(simulator: Any) -> str:
    """What errors call a simulator."""
    return type(simulator).__name__


def stepped(simulator: Simulator, x: Tensor, u: Tensor) -> Tensor:
    """One step forwards, its output and its inputs checked."""
    before = None if x.is_inference() or u.is_inference() else (x._version, u._version)
    x_next = simulator.advance(x, u)
    check_output(simulator, x_next, x)
    if before is not None and (x._version, u._version) != before:
        raise ValueError(
            f"{name_of(simulator)}: step changed its inputs in place, expected states and controls as they "
            "are: they are read again in the backward pass; work on x.clone()"
        )
    return x_next


def check_output(simulator: Any, x_next: Any, x: Tensor) -> None:
    """Raises TypeError or ValueError unless next states are like the states."""
    name = name_of(simulator)
    if not isinstance(x_next, Tensor):
        raise TypeError(
            f"{name}: step returned {type(x_next).__name__}, expected a tensor of shape {tuple(x.shape)}"
        )
    if x_next.shape != x.shape:
        raise ValueError(
            f"{name}: step returned shape {tuple(x_next.shape)} for states of shape {tuple(x.shape)}, "
            f"expected the same: (nworld, state_size)"
        )
    if x_next.dtype != x.dtype:
        raise TypeError(
            f"{name}: step returned {x_next.dtype} for states of {x.dtype}, expected the same; make its "
            "constants with dtype=x.dtype"
        )
    if x_next.device != x.device:
        raise ValueError(
            f"{name}: step returned states on {x_next.device}, expected {x.device}, where it was given them; "
            "make its constants with device=x.device"
        )

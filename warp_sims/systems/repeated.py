"""A control that is held for several steps: one step of the policy is several steps of the simulator."""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..bridge.passes.simulator import Pull, Simulator
from ..bridge.runtime.contract import functions_of
from ..kernels.flow import as_int
from ..kernels.system import DeviceFunctions
from ..kernels.systems import repeated as _repeated
from .foreign import ForeignSystem, foreign_system
from .system import System

__all__ = ["Repeated", "RepeatedSimulator", "repeat"]


def repeat(system: System, times: int) -> System:
    """Returns the system whose step is `times` steps of this one under the same control.

        slow = ws.repeat(ws.CartPole(dt=0.005), 4)    # the policy acts every 0.02 s

    Gates, windows and decay apply at the states that the policy sees. The backward pass recomputes each state
    in between from the first one. So nothing more is kept, and the work grows with the square of `times`. The
    form of a step in vector lanes is not used.

    Args:
        system: Any system with an adjoint written by hand, or a foreign one.
        times: At least 1.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """
    if not isinstance(system, System):
        hint = "; make an instance of it" if isinstance(system, type) else ""
        raise TypeError(f"repeat: system is {system!r}, expected a warp_sims.System{hint}")
    count = as_int(times)
    if count is None or count < 1:
        raise ValueError(f"repeat: times is {times!r}, expected an int of at least 1")
    if count == 1:
        return system
    return RepeatedSimulator(system, count) if isinstance(system, ForeignSystem) else Repeated(system, count)


@dataclasses.dataclass(frozen=True)
class Repeated(System):
    """A system with kernels whose control is held; made by `repeat`."""

    system: System
    times: int

    @property
    def state_size(self) -> int:
        return self.system.state_size

    @property
    def control_size(self) -> int:
        return self.system.control_size

    @property
    def dt(self) -> float | None:
        """Time of one step [s] as the policy sees it, if the system says how long its own is."""
        own = getattr(self.system, "dt", None)
        return None if own is None else self.times * own

    @property
    def done(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.system.done

    @property
    def running_reduction(self) -> Literal["mean", "sum"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.system.running_reduction

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        if self.system.device_functions(dtype).step_vjp is None:
            raise ValueError(
                f"repeat: the adjoint of {type(self.system).__name__} is generated, expected a step_vjp "
                "written by hand: Warp's adjoints of loops are not to be trusted"
            )
        return _repeated.repeated(functions_of(self.system, dtype), self.times)

    def parameters(self, dtype: Any) -> Any:
        return self.system.parameters(dtype)

    def __getattr__(self, name: str) -> Any:
        # numbers of the physics, by their names
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.system, name)

    def initial_states(
        self,
        n: int,
        seed: int = 42,
        split: Literal["train", "test"] = "train",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Those of the system."""
        return self.system.initial_states(n, seed, split, dtype=dtype)

    def draw(self, axes: Any, state: np.ndarray) -> None:
        """Draws the system's state."""
        drawing: Any = self.system
        drawing.draw(axes, state)


@foreign_system
class RepeatedSimulator(ForeignSystem):
    """A foreign simulator whose control is held; made by `repeat`."""

    _own: Any = dataclasses.field(init=False)
    _times: int = dataclasses.field(init=False)

    def __init__(self, system: ForeignSystem, times: int) -> None:
        self._set(_own=system, _times=times)
        super().__init__(
            state_size=system.state_size,
            control_size=system.control_size,
            loss=system.cost if system.has_loss else None,
            rowwise=system.rowwise,
            check=system.checks_gradient,
            initial_states=lambda n, seed, split: system.initial_states(n, seed, split),
            parameters=dict(zip(system.parameter_names, system.parameter_values)),
        )

    @property
    def worlds_apart(self) -> bool:
        own: Simulator = self._own
        return own.worlds_apart

    def cost_gradient(self, x: Tensor) -> Tensor:
        return self._own.cost_gradient(x)

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """Next states (n, state_size)."""
        for _ in range(self._times):
            x = self._own.advance(x, u).clone()  # it may write there again
        return x

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Pull]:
        """Next states, and the pullback: each step is recorded again, from the last to the first."""
        states = [x]
        for _ in range(self._times):
            states.append(self._own.advance(states[-1], u).clone())

        def pull(adj: Tensor) -> tuple[Tensor, Tensor]:
            adj_u = torch.zeros_like(u)
            for before in reversed(states[:-1]):
                _, own = self._own.linearize(before, u)
                adj, through_u = own(adj)
                adj_u = adj_u + through_u
            return adj, adj_u

        return states[-1], pull

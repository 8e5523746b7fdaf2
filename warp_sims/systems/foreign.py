"""Systems whose simulators are not Warp kernels: a torch function, a JAX function, launches on a Warp tape,
or anything else that can be linearised.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import warp as wp
from torch import Tensor

from ..arguments import check_count
from ..bridge.passes.foreign_jax import JaxSimulator
from ..bridge.passes.foreign_tape import TapeStep
from ..bridge.passes.foreign_torch import TorchSimulator, exact, gradient
from ..bridge.passes.simulator import Pull, Simulator
from ..kernels.system import DeviceFunctions
from .foreign_steps import check_numbers, check_step, with_columns
from .system import System

__all__ = ["ForeignSystem", "JaxSystem", "TapeSystem", "TorchSystem"]

Draw = Callable[..., Tensor]


def foreign_system(cls: type) -> Any:
    """Makes a frozen class with a constructor of its own. It is compared by identity, because it consists of
    functions.
    """
    return dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)(cls)


@foreign_system
class ForeignSystem(System, Simulator):
    """Base of the systems below, and of your own for another simulator: a subclass supplies `advance` and
    `linearize`.

        advance(x, u) -> x_next
            next states (nworld, state_size) of states and controls (nworld, control_size), all worlds at once
        linearize(x, u) -> x_next, pull
            the same and the pullback: pull(adj_x_next) -> adj_x, adj_u; called once for each gradient field,
            before the next call of advance or linearize

    Args:
        state_size, control_size: Numbers of components.
        loss: Cost of states in torch, (n, state_size) to (n,), for loss="final" and loss="running" (its mean
            over the steps).
        rowwise: Whether a call takes any number of rows, and no row changes with another.
        check: Whether gradients are compared with finite differences at the first states of each dtype. False
            for gradients that are meant to differ from those of the step.
        initial_states: (n, seed, split) to (n, state_size), for `train`.
        parameters: Physical parameters by name, with their values, which a rollout may replace. advance and
            linearize then find them after the controls, as further columns in this order. Without given
            parameters there are no further columns.

    A system is compared by identity, and the process keeps it: make it once.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """

    _sizes: tuple[int, int] = dataclasses.field(init=False)
    _loss: Callable[[Any], Any] | None = dataclasses.field(init=False)
    _draw: Draw | None = dataclasses.field(init=False)

    def __init__(
        self,
        *,
        state_size: int,
        control_size: int,
        loss: Callable[[Any], Any] | None = None,
        rowwise: bool = True,
        check: bool = True,
        initial_states: Draw | None = None,
        parameters: Mapping[str, float] | None = None,
    ) -> None:
        name = type(self).__name__
        check_count(name, "state_size", state_size)
        check_count(name, "control_size", control_size)
        for field, value in (("rowwise", rowwise), ("check", check)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: {field} is {value!r}, expected True or False")
        for field, value in (("loss", loss), ("initial_states", initial_states)):
            if value is not None and not callable(value):
                raise TypeError(f"{name}: {field} is {value!r}, expected a function or None")
        numbers = check_numbers(name, parameters)
        self._set(
            _sizes=(state_size, control_size),
            _loss=loss,
            rowwise=rowwise,
            _draw=initial_states,
            parameter_names=tuple(numbers),
            parameter_values=tuple(numbers.values()),
            checks_gradient=check,
            verified=set(),
        )
        self.number  # noqa: B018  # known to the operators from now on

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(state_size={self.state_size}, control_size={self.control_size})"

    @property
    def state_size(self) -> int:
        return self._sizes[0]

    @property
    def control_size(self) -> int:
        return self._sizes[1]

    @property
    def has_loss(self) -> bool:
        return self._loss is not None

    def cost(self, x: Tensor) -> Tensor:
        """Cost of states (n, state_size), one a row (n,)."""
        assert self._loss is not None
        with exact(x):
            return self._loss(x)

    def cost_gradient(self, x: Tensor) -> Tensor:
        """Gradient of each row's cost by that row, (n, state_size)."""
        assert self._loss is not None
        return gradient(self._loss, x)

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        """Raises TypeError: there are none."""
        raise TypeError(
            f"{type(self).__name__}: it has no device functions, expected a system with kernels here; "
            "rollout, simulate, step, gradient_pair, linearize and train take it, what looks at kernels "
            "(check, profile, bench) does not"
        )

    def sample_states(self, n: int, seed: int, split: str) -> Tensor:
        """Initial states (n, state_size) of the function that the system was given."""
        name = type(self).__name__
        if self._draw is None:
            raise NotImplementedError(
                f"{name} has no initial states of its own; give it initial_states=(n, seed, split) -> states"
            )
        states = self._draw(n, seed, split)
        if not isinstance(states, Tensor) or tuple(states.shape) != (n, self.state_size):
            given = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(
                f"{name}: initial_states returned {given}, expected a tensor ({n}, {self.state_size})"
            )
        return states.detach()


@foreign_system
class TorchSystem(ForeignSystem, TorchSimulator):
    """A simulator written in torch.

        system = ws.TorchSystem(step, state_size=4, control_size=1, loss=cost)

    Args:
        step: (x, u) to the next states: tensors (n, state_size) and (n, control_size) to (n, state_size), of
            the same dtype and device. Any function of its arguments that torch differentiates; it draws no
            random numbers, keeps no state and does not change its inputs.
        rowwise: Whether rows do not mix. Jacobians are then taken at all points of a trajectory at once.
            False lets worlds act on each other: each step is recorded alone, which takes longer.
        parameters: Physical parameters by name, with their values, which a rollout may replace. The step
            takes them by name, `step(x, u, mass=..., length=...)`, each a tensor (n, 1).
        state_size, control_size, loss, check, initial_states: As of `ForeignSystem`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected. The first use
            tries the step and its gradient in the same way.
    """

    _step: Callable[..., Any] = dataclasses.field(init=False)

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        *,
        state_size: int,
        control_size: int,
        loss: Callable[[Tensor], Tensor] | None = None,
        rowwise: bool = True,
        check: bool = True,
        initial_states: Draw | None = None,
        parameters: Mapping[str, float] | None = None,
    ) -> None:
        check_step(self, step)
        self._set(_step=with_columns(step, control_size, parameters))
        super().__init__(
            state_size=state_size,
            control_size=control_size,
            loss=loss,
            rowwise=rowwise,
            check=check,
            initial_states=initial_states,
            parameters=parameters,
        )


@foreign_system
class JaxSystem(JaxSimulator, ForeignSystem):
    """A simulator written in JAX, which works on the memory of the tensors.

        system = ws.JaxSystem(step, state_size=4, control_size=1, loss=cost)

    Args:
        step: (x, u) to the next states: JAX arrays (n, state_size) and (n, control_size) to (n, state_size),
            of the same dtype; any function that `jax.vjp` differentiates, of its arguments alone.
        loss: Cost of states in JAX, (n, state_size) to (n,).
        jit: Whether the step is compiled; False for a step that `jax.jit` cannot compile.
        parameters: As of `TorchSystem`, each a JAX array (n, 1).
        state_size, control_size, rowwise, check, initial_states: As of `ForeignSystem`.

    float64 needs `jax.config.update("jax_enable_x64", True)`, without which JAX rounds it to float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected. The first use
            tries the step and its gradient in the same way.
    """

    _step: Callable[..., Any] = dataclasses.field(init=False)
    _jit: bool = dataclasses.field(init=False)

    def __init__(
        self,
        step: Callable[[Any, Any], Any],
        *,
        state_size: int,
        control_size: int,
        loss: Callable[[Any], Any] | None = None,
        rowwise: bool = True,
        jit: bool = True,
        check: bool = True,
        initial_states: Draw | None = None,
        parameters: Mapping[str, float] | None = None,
    ) -> None:
        check_step(self, step)
        if not isinstance(jit, bool):
            raise TypeError(f"{type(self).__name__}: jit is {jit!r}, expected True or False")
        self._set(_step=with_columns(step, control_size, parameters), _jit=jit)
        ForeignSystem.__init__(
            self,
            state_size=state_size,
            control_size=control_size,
            loss=loss,
            rowwise=rowwise,
            check=check,
            initial_states=initial_states,
            parameters=parameters,
        )


@foreign_system
class TapeSystem(ForeignSystem):
    """A simulator that launches Warp kernels on arrays of its own, with the adjoints that Warp generates.

        system = ws.TapeSystem(
            launch, inputs=[q, qd], controls=[f], outputs=[q_next, qd_next], state_size=4, control_size=1
        )

    Each step writes states and controls into the arrays, launches and reads the outputs. The backward pass
    records it on a tape of its own and pulls back once for each gradient field. The engine clears gradients
    between pulls.

    Args:
        launch: Launches the kernels of one step, from `inputs` and `controls` to `outputs`. It does not
            change the first two. Everything that it keeps from step to step must be part of the state. All
            arrays in between need `requires_grad=True`.
        inputs: Arrays that make up the state, in the order of its components: an array of nworld * k numbers,
            world after world, holds k components of each. All arrays here have one scalar type.
        controls: Arrays that make up the control in the same way.
        outputs: Arrays of the next state, as `inputs`.
        parameters: Physical parameters by name, arrays with one number for every world, which a rollout may
            replace. Otherwise they keep the numbers that they hold now.
        load: (x, u), called after the copies and before `launch`, outside the tape, to set or reset other
            things.
        state_size, control_size, loss, check, initial_states: As of `ForeignSystem`; the loss in torch.

    The arrays fix the number of worlds, the dtype and the device. Worlds may act on each other. Only one
    thread at a time may use a system, because all threads would write to the same arrays.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected. The first use
            tries the launches and their gradient in the same way.
    """

    _tape: TapeStep = dataclasses.field(init=False)

    def __init__(
        self,
        launch: Callable[[], None],
        *,
        inputs: Sequence[wp.array],
        controls: Sequence[wp.array],
        outputs: Sequence[wp.array],
        state_size: int,
        control_size: int,
        load: Callable[[Tensor, Tensor], None] | None = None,
        loss: Callable[[Tensor], Tensor] | None = None,
        check: bool = True,
        initial_states: Draw | None = None,
        parameters: Mapping[str, wp.array] | None = None,
    ) -> None:
        name = type(self).__name__
        for role, value in (("launch", launch), ("load", load)):
            if not callable(value) and not (role == "load" and value is None):
                raise TypeError(f"{name}: {role} is {value!r}, expected a function")
        tape = TapeStep(
            name, state_size, control_size, load, launch, inputs, controls, outputs, parameters or {}
        )
        super().__init__(
            state_size=state_size,
            control_size=control_size,
            loss=loss,
            rowwise=False,
            check=check,
            initial_states=initial_states,
            parameters=tape.numbers,
        )
        self._set(_tape=tape)

    @property
    def nworld(self) -> int:
        """Worlds that the arrays hold."""
        return self._tape.nworld

    @property
    def worlds_apart(self) -> bool:
        """`linearize` assumes so, because kernels that let worlds act on each other are rare."""
        return True

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """Next states (nworld, state_size)."""
        return self._tape.advance(x, u)

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Pull]:
        """Next states and the pullback, which holds until the next step."""
        return self._tape.linearize(x, u)

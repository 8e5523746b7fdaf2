"""Derivatives of a step that launches Warp kernels, recorded on a tape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import warp as wp
from torch import Tensor

from ..runtime.arrays import grad_of, stream, tensor_of
from ..runtime.compat import off_tape
from .simulator import Pull


class TapeStep:
    """A step of Warp launches, and the arrays that it reads and writes.

    Raises:
        TypeError, ValueError: the arrays do not hold the states and controls of a number of worlds.
    """

    def __init__(
        self,
        name: str,
        state_size: int,
        control_size: int,
        load: Callable[[Tensor, Tensor], None] | None,
        launch: Callable[[], None],
        inputs: Sequence[wp.array],
        controls: Sequence[wp.array],
        outputs: Sequence[wp.array],
        parameters: Mapping[str, wp.array],
    ) -> None:
        self.name, self.load, self.launch = name, load, launch
        self.inputs, self.controls, self.outputs = tuple(inputs), tuple(controls), tuple(outputs)
        self.parameters = tuple(parameters.values())
        self.dtype = _check_arrays(name, self.inputs + self.controls + self.outputs + self.parameters)
        self.nworld = _worlds(name, "inputs", self.inputs, state_size)
        for what, arrays, size in (
            ("controls", self.controls, control_size),
            ("outputs", self.outputs, state_size),
        ):
            worlds = _worlds(name, what, arrays, size)
            if worlds != self.nworld:
                raise ValueError(
                    f"{name}: {what} hold {worlds} worlds of {size} numbers, inputs {self.nworld} of "
                    f"{state_size}, expected the same number of worlds"
                )
        self.numbers = {key: _number(name, key, a, self.nworld) for key, a in parameters.items()}
        """What they hold now."""
        self._control_size, self._own = control_size, [tensor_of(a).clone() for a in self.parameters]
        self._recording = 0

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """Next states."""
        with stream(x.device), off_tape():
            self._put(x, u)
            self.launch()
            return self._read()

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Pull]:
        """Next states and the pullback. The pullback holds until the next recording, which overwrites the
        arrays.
        """
        with stream(x.device), off_tape():
            self._put(x, u)
            with wp.Tape() as tape:
                self.launch()
            self._check_inputs(x, u)
            x_next, number, driven = self._read(), self._recording, self._driven(u)

        def pull(adj: Tensor) -> tuple[Tensor, Tensor]:
            if number != self._recording:
                raise ValueError(
                    f"{self.name}: a pullback was called after another step had overwritten the arrays it "
                    "reads, expected it before the next step or linearize; pull first, or give each its own "
                    "arrays"
                )
            with stream(x.device), off_tape():
                # what launches on other tapes, or the pull before this one, have left
                _clear(tape, (*self.inputs, *driven, *self.outputs))
                _split(adj, [grad_of(a) for a in self.outputs], self.nworld)
                tape.backward()
                found = tuple(
                    _joined([grad_of(a) for a in arrays], self.nworld) for arrays in (self.inputs, driven)
                )
                _clear(tape, (*self.inputs, *driven, *self.outputs))
            return found[0], found[1]

        return x_next, pull

    def _put(self, x: Tensor, u: Tensor) -> None:
        self._check_given(x)
        self._recording += 1
        x, u = x.detach(), u.detach()
        _split(x, [tensor_of(a) for a in self.inputs], self.nworld)
        _split(u, [tensor_of(a) for a in self._driven(u)], self.nworld)
        if u.shape[1] == self._control_size:
            for array, number in zip(self.parameters, self._own):
                tensor_of(array).copy_(number)
        if self.load is not None:
            self.load(x, u[:, : self._control_size])

    def _driven(self, u: Tensor) -> tuple[wp.array, ...]:
        """The arrays that these controls are written into, with those of the parameters if the controls
        include them.
        """
        return self.controls if u.shape[1] == self._control_size else self.controls + self.parameters

    def _read(self) -> Tensor:
        return _joined([tensor_of(a) for a in self.outputs], self.nworld)

    def _check_given(self, x: Tensor) -> None:
        if x.shape[0] != self.nworld:
            raise ValueError(
                f"{self.name}: given {x.shape[0]} worlds, expected {self.nworld}, for which its arrays were "
                "made; make a system for each number of worlds"
            )
        if x.dtype != self.dtype:
            raise TypeError(
                f"{self.name}: the states are {x.dtype}, expected {self.dtype}, which its arrays hold; "
                "convert the states, or make arrays of that type"
            )
        device = wp.device_to_torch(self.inputs[0].device)
        if x.device != torch.device(device):
            raise ValueError(
                f"{self.name}: the states are on {x.device}, expected {device}, where its arrays are"
            )

    def _check_inputs(self, x: Tensor, u: Tensor) -> None:
        for what, given, arrays in (("inputs", x, self.inputs), ("controls", u, self._driven(u))):
            held = _joined([tensor_of(a) for a in arrays], self.nworld)
            # another's NaN is no change
            if not bool(((held == given) | (held != held)).all()):
                raise ValueError(
                    f"{self.name}: launch changed its {what}, expected them as they were loaded: the tape "
                    "reads them again; write to other arrays (of Newton: two states), and let load write "
                    "nothing into inputs and controls"
                )


def _check_arrays(name: str, arrays: Sequence[Any]) -> torch.dtype:
    dtypes = set()
    for array in arrays:
        if not isinstance(array, wp.array):
            raise TypeError(
                f"{name}: {array!r} of type {type(array).__name__} among inputs, controls and outputs, "
                "expected Warp arrays"
            )
        if not array.is_contiguous:
            raise ValueError(f"{name}: an array of shape {array.shape} is not contiguous, expected one")
        if not array.requires_grad:
            raise ValueError(
                f"{name}: an array of shape {array.shape} has no gradient, expected requires_grad=True of "
                "inputs, controls, outputs and of all that is written in between"
            )
        dtypes.add(tensor_of(array).dtype)
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        raise TypeError(
            f"{name}: its arrays hold {sorted(map(str, dtypes))}, expected all float32 or all float64"
        )
    return dtypes.pop()


def _worlds(name: str, what: str, arrays: Sequence[wp.array], size: int) -> int:
    numbers = [tensor_of(a).numel() for a in arrays]
    worlds = sum(numbers) // size
    if worlds == 0 or worlds * size != sum(numbers) or any(k % worlds for k in numbers):
        raise ValueError(
            f"{name}: {what} hold {' + '.join(map(str, numbers)) or 'no'} numbers, expected {size} for each "
            "of some worlds, every array the same share of each world, world after world"
        )
    return worlds


def _number(name: str, key: str, array: wp.array, nworld: int) -> float:
    """The number of the physics that an array holds, the same for every world."""
    held = tensor_of(array).reshape(-1)
    if held.numel() != nworld:
        raise ValueError(
            f"{name}: parameters[{key!r}] holds {held.numel()} numbers, expected {nworld}, one a world"
        )
    return float(held[0])


def _split(values: Tensor, targets: Sequence[Tensor], nworld: int) -> None:
    """Writes columns of (nworld, size) into the arrays, in their order."""
    first = 0
    for target in targets:
        width = target.numel() // nworld
        target.view(nworld, width).copy_(values[:, first : first + width])
        first += width


def _joined(arrays: Sequence[Tensor], nworld: int) -> Tensor:
    """Copies of the arrays as columns, (nworld, size)."""
    return torch.cat([a.reshape(nworld, -1) for a in arrays], dim=1)


def _clear(tape: wp.Tape, arrays: Sequence[wp.array]) -> None:
    """Zeroes the gradients of all arrays that the launches of a tape name."""
    tape.zero()
    for launch in tape.launches:
        if not callable(launch):
            arrays = (*arrays, *(a for group in launch[3:5] for a in group if isinstance(a, wp.array)))
    for grad in {a.ptr: a.grad for a in arrays if a.requires_grad and a.size}.values():
        if grad is not None:
            grad.zero_()

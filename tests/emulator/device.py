"""An emulated GPU as a device of `bridge`: it records launches of GPU kernels and runs them on a CPU."""

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import warp as wp
from warp._src.context import _build_launch_bounds_from_tuple, pack_arg
from warp._src.types import array_t
from warp_sims.bridge.runtime import arrays

from . import library

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
"""Orders in which the lanes of a block, and the blocks, run between two barriers."""
CPU = torch.device("cpu")

EXECUTED: Counter[tuple[str, int]] = Counter()
"""Launches of this process by kernel, its name with a hash, and order."""


class Emulator:
    """Stands for a Warp device in `bridge`: not a CPU, so that the forms of a GPU are launched."""

    is_cpu, is_cuda, is_capturing = False, True, False

    def __init__(self) -> None:
        self.order = 0
        """Of the next launches, one of `ORDERS`."""
        self.seed = 0
        self.skip: Callable[[str], int] = lambda text: 0
        """Gives the line of a barrier of a kernel's text that the next launches pass over."""
        self.edit: Callable[[str], str] = lambda text: text
        """Changes the text of kernels that are recorded from now on."""
        self.recorded: list[Replay] | None = None
        """Launches with copies of their arguments, to be run again under a sanitizer; None: not kept."""

    @contextlib.contextmanager
    def standing_in(self, device: torch.device = CPU) -> Iterator["Emulator"]:
        """Lets `bridge` launch on this emulator what it would on `device`."""
        before = arrays.warp_device(device)
        arrays.DEVICES[device] = self
        try:
            yield self
        finally:
            arrays.DEVICES[device] = before

    def record_launch(
        self,
        kernel: wp.Kernel,
        dim: Any,
        inputs: Sequence[Any],
        block_dim: int = 256,
        **_: Any,  # what Warp's devices are told besides
    ) -> "Command":
        """Records a launch, as `wp.launch` does on Warp's devices."""
        return Command(self, kernel, dim, inputs, block_dim)


class Replay:
    """A launch with copies of all that it reads, for replay.py."""

    def __init__(self, command: "Command") -> None:
        self.command = command
        self.name: str = command.kernel.func.__name__.strip("_")
        self.blocks, self.threads = command.blocks, command.block_dim
        self.arguments = [_copied(value) for value in command.params]


def _copied(value: Any) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """An argument, and the arrays in it: where it holds their address, the address, and their memory."""
    return bytes(value), list(_arrays(value, 0))


def _arrays(value: Any, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """Arrays of an argument, which is one or a struct that has some."""
    if isinstance(value, array_t):
        if value.data and value.ndim:
            memory = ctypes.string_at(value.data, value.shape[0] * value.strides[0])
            yield offset + array_t.data.offset, value.data, memory
    elif isinstance(value, ctypes.Structure):
        for name, *_ in value._fields_:
            yield from _arrays(getattr(value, name), offset + getattr(type(value), name).offset)


class Command:
    """A recorded launch, with what `bridge.launches.Launch` uses of Warp's."""

    adjoint = False

    def __init__(
        self, device: Emulator, kernel: wp.Kernel, dim: Any, inputs: Sequence[Any], block_dim: int
    ) -> None:
        self.kernel, self.device, self.block_dim = kernel, device, block_dim
        text, self.entry = library.cuda_source(kernel, block_dim)
        self.text = device.edit(text)
        self._library = library.build(self.text, self.entry)
        # what descriptors and structures pack is kept, as they point to it
        self._inputs = list(inputs)
        if len(kernel.adj.args) != len(inputs):
            raise TypeError(f"{self.entry}: {len(inputs)} arguments, expected {len(kernel.adj.args)}")
        self.params: list[Any] = [None]
        self.params += [pack_arg(kernel, a.type, a.label, v, "cpu") for a, v in zip(kernel.adj.args, inputs)]
        self.set_dim(dim)

    @property
    def blocks(self) -> int:
        """Of the grid."""
        return -(-self.bounds.size // self.block_dim)

    def set_dim(self, dim: Any) -> None:
        dim = (dim,) if isinstance(dim, int) else tuple(dim)
        self.params[0] = self.bounds = _build_launch_bounds_from_tuple(dim, self.kernel.adj.kernel_dim)

    def set_param_at_index(self, index: int, value: Any) -> None:
        a = self.kernel.adj.args[index]
        self.params[index + 1] = pack_arg(self.kernel, a.type, a.label, value, "cpu")

    def launch(self) -> None:
        device = self.device
        if device.recorded is not None:
            device.recorded.append(Replay(self))
        EXECUTED[self.entry, device.order] += 1
        addresses = [ctypes.addressof(x) for x in self.params]
        place = self.blocks, self.block_dim, device.order, device.seed, device.skip(self.text)
        library.run(self._library, addresses, *place)

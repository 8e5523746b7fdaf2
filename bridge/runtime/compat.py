"""Everything that uses private interfaces of Warp and torch, checked with Warp 1.19 and torch 2.11 to 2.13.
Every item says what it gains, and what happens without it.
"""

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import warp as wp
from torch._functorch.utils import unwrap_dead_wrappers
from torch._utils import _unflatten_dense_tensors as unflatten_dense_tensors
from torch.utils._python_dispatch import _get_current_dispatch_mode as dispatch_mode

__all__ = [
    "DIRECT_CALLS",
    "DirectCall",
    "OpenMP",
    "address",
    "array_descriptor",
    "batching",
    "dispatch_mode",
    "is_changed",
    "off_tape",
    "openmp",
    "transforming",
    "unflatten_dense_tensors",
    "unwrap_dead_wrappers",
]

# unwrap_dead_wrappers: a pullback may be called with tensors of a transform of torch.func that has ended;
# without this function torch refuses them. torch's own autograd functions use it. dispatch_mode: whether a
# mode watches torch's operators, so that ours must go through the dispatcher. unflatten_dense_tensors: splits
# a flat gradient into tensors like the parameters in one call, where views take many.


def transforming() -> bool:
    """Whether a transform of torch.func runs, so that values cannot be read; private to torch."""
    return torch._C._are_functorch_transforms_active()


def is_changed(module: torch.nn.Module) -> bool:
    """Whether a module has hooks or a forward of its own, so that it may differ from its class."""
    return "forward" in module.__dict__ or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_BATCHES: Any = torch._C._parse_dispatch_key("VmapMode")
batching: Callable[[], bool] = functools.partial(torch._C._dispatch_tls_is_dispatch_key_included, _BATCHES)
"""Whether torch takes a batch of cotangents through one backward pass (`is_grads_batched`). It does this
operator by operator, with an older mechanism than `torch.func`. Every call of an operator asks.
"""


@contextlib.contextmanager
def off_tape() -> Iterator[None]:
    """In this context nothing is recorded on a user's tape, and a tape of our own can be opened.

    Warp keeps the open tape in its runtime, which is private, and refuses a second one.
    """
    runtime: Any = importlib.import_module("warp._src.context").runtime
    before, runtime.tape = runtime.tape, None
    try:
        yield
    finally:
        runtime.tape = before


@functools.cache
def array_descriptor() -> Any:
    """The type of Warp's array descriptors; asked for late, because asking starts Warp's runtime."""
    return type(wp.from_torch(torch.empty(1, device="cpu"), return_ctype=True))


DIRECT_CALLS = "1.19."
"""Versions of Warp whose CPU launches are called as `DirectCall`; with other versions Warp's Python launches.
"""


class DirectCall:
    """A recorded launch on a CPU, called as Warp calls it. Warp makes a structure of all arguments at every
    call and looks up its type; here that is done once. It takes longer than a short kernel: 10 us of 13.
    """

    def __init__(self, command: Any) -> None:
        labels = [a.label for a in command.kernel.adj.args]
        values = command.params[1 : 1 + len(labels)]
        structure = type("Arguments", (ctypes.Structure,), {"_fields_": [*zip(labels, map(type, values))]})
        self._arguments = structure(*values)
        self._arrays = [(n, v) for n, v in zip(labels, values) if isinstance(v, array_descriptor())]
        self._bounds, self._kernel = command.bounds, command.hooks.forward
        self._command = command
        self._references = ctypes.byref(command.bounds), ctypes.byref(self._arguments)

    def __call__(self) -> None:
        self.refresh()
        self._kernel(*self._references)

    def refresh(self) -> None:
        """Copies the present addresses from the descriptors."""
        if self._command.device.is_capturing:
            self._command.launch()  # which says that addresses of torch's cannot be recorded
        arguments = self._arguments
        for name, descriptor in self._arrays:
            setattr(arguments, name, descriptor)

    def addresses(self) -> tuple[int, int, int]:
        """Of the kernel, its launch bounds and its arguments."""
        return address(self._kernel), ctypes.addressof(self._bounds), ctypes.addressof(self._arguments)

    def addresses_of_dim(self) -> list[int]:
        """Addresses of the number of threads of a launch with one axis; the lower 4 bytes of each."""
        bounds, base = type(self._bounds), ctypes.addressof(self._bounds)
        return [base + bounds.shape.offset, base + bounds.size.offset]

    def address_of(self, name: str) -> int:
        """Of an integer argument."""
        return ctypes.addressof(self._arguments) + getattr(type(self._arguments), name).offset

    def resize(self, dim: int) -> None:
        self._bounds.shape[0] = self._bounds.size = dim

    def put(self, name: str, value: int) -> None:
        setattr(self._arguments, name, value)

    @staticmethod
    def possible(command: Any) -> bool:
        """Whether a launch can be called in this way, which Warp does not promise to keep."""
        if not wp.__version__.startswith(DIRECT_CALLS) or not command.device.is_cpu or command.adjoint:
            return False
        return command.block_dim == 1 and command.bounds.coord_mult == 1


def address(function: Any) -> int:
    """Of a function of C."""
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value is not None
    return value


class OpenMP(NamedTuple):
    """Addresses of functions of an OpenMP runtime."""

    start: int
    """Runs a function on all threads of a team: (function, its argument, threads, flags)."""
    number: int
    """Returns the number of the calling thread in its team."""


@functools.cache
def openmp() -> OpenMP | None:
    """Returns the GNU OpenMP runtime that torch includes on Linux. Elsewhere it returns None, and teams use
    Python threads.

    Its threads spin for some milliseconds after every parallel operation of torch. Threads of our own would
    have to wait for a core all that time, because these threads hold it.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            return OpenMP(address(library.GOMP_parallel), address(library.omp_get_thread_num))
    return None

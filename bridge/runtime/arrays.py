"""Tensors and Warp's devices, streams and arrays: the one place where memory of the two meets.

Kernels read and write memory that torch owns, by address; nothing of torch's `.grad` is ever adopted by Warp.
"""

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import warp as wp

_LARGE = 1 << 22
"""Tensors of at least so many bytes on a CPU have memory that is kept, see `Reserve`."""

_LINE = 64
"""Bytes of a cache line."""

T = TypeVar("T")

WARP_DTYPE = {torch.float32: wp.float32, torch.float64: wp.float64}


def tensor_of(array: wp.array) -> torch.Tensor:
    """Zero-copy tensor over a Warp array, vector components as the last axis."""
    return wp.to_torch(array, requires_grad=False)


def grad_of(array: wp.array) -> torch.Tensor:
    """Zero-copy tensor over the gradient of a Warp array that requires one."""
    grad: Any = array.grad
    return tensor_of(grad)


def array_of(tensor: torch.Tensor) -> wp.array:
    """Zero-copy Warp array over a tensor, with a gradient of its own."""
    array = wp.from_torch(tensor.detach(), requires_grad=False)
    array.requires_grad = True
    return array


class _Block:
    """Memory of one large tensor. Compared by identity."""

    __slots__ = ("bytes",)

    def __init__(self, nbytes: int) -> None:
        # numpy asks for huge pages, and begins a little behind the first: vectors would straddle cache lines
        room = np.empty(nbytes + _LINE, dtype=np.uint8)
        first = -room.ctypes.data % _LINE
        self.bytes = room[first : first + nbytes]


class Reserve:
    """Keeps the memory of large tensors that are not referred to any more, for the next tensor of the same
    size.

    The first write to fresh memory costs time, because the system finds and clears its pages, and an update
    writes most of its memory only once. For 98 MB that took 48 ms with small pages and 8 ms with huge ones,
    which not every machine has. The rest of the update took 40 ms.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        """Bytes kept."""
        self.idle: list[_Block] = []

    def take(self, nbytes: int) -> np.ndarray:
        """Returns uninitialised bytes. They come back when the last reference to them is gone."""
        block = self._find(nbytes) or _Block(nbytes)
        view = block.bytes[:]
        # not at exit, when there is nothing to keep it for
        weakref.finalize(view, self._give, block).atexit = False
        return view

    def clear(self) -> None:
        """Gives idle memory back to the system."""
        self.idle.clear()

    # A finalizer runs in any thread and between any two operations, so there is no lock here: each step is
    # one operation on a list.

    def _find(self, nbytes: int) -> _Block | None:
        for block in reversed(self.idle.copy()):
            if block.bytes.nbytes == nbytes:
                with contextlib.suppress(ValueError):  # another thread was faster
                    self.idle.remove(block)
                    return block
        return None

    def _give(self, block: _Block) -> None:
        self.idle.append(block)
        while sum(idle.bytes.nbytes for idle in self.idle.copy()) > self.most:
            with contextlib.suppress(IndexError):
                self.idle.pop(0)


RESERVE = Reserve(5 << 28)
"""The reserve of this process. It has room for the activations that a rollout may keep (`spec.STORED_BYTES`)
and its other tensors.
"""


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised tensor with dtype and device of `like`. On a CPU the memory of large tensors is kept for
    the next one of their size.
    """
    nbytes = like.element_size() * math.prod(shape)
    if like.device.type != "cpu" or nbytes < _LARGE:
        return like.new_empty(shape)
    return torch.from_numpy(RESERVE.take(nbytes)).view(like.dtype).view(shape)


def stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which Warp launches on torch's current stream of `device`."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return wp.ScopedStream(warp_stream(torch.cuda.current_stream(device)), sync_enter=False)


@functools.cache
def warp_stream(stream: torch.cuda.Stream) -> wp.Stream:
    """Returns Warp's object for a torch stream, always the same one. Warp forgets a stream, and a capture on
    it, when any of its objects for that stream is destroyed. Torch has a few dozen streams, which are never
    destroyed.
    """
    return wp.stream_from_torch(stream)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that the host must not read from the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def cache_errors() -> Iterator[None]:
    """Adds to an error what to do if Warp cannot write or read its cache of compiled kernels."""
    try:
        yield
    except Exception as error:
        damaged = isinstance(error, ValueError) and "JSON" in type(error).__name__
        # Warp raises plain exceptions where a binary does not load
        if not (isinstance(error, OSError) or damaged or "Failed to load" in str(error)):
            raise
        raise RuntimeError(
            f"the cache of compiled kernels in {wp.config.kernel_cache_dir} cannot be used "
            f"({type(error).__name__}: {error}), expected a folder to write to with whole files; remove the "
            "cache folder, or name another in the environment variable WARP_CACHE_PATH, and start again"
        ) from error


DEVICES: dict[torch.device, Any] = {}
"""Warp's devices by torch devices, as they are asked for. The device decides which forms of the kernels are
launched. A test can replace a device, for example by an emulated GPU.
"""


def warp_device(device: torch.device) -> Any:
    """Warp's device for torch's."""
    found = DEVICES.get(device)
    if found is None:
        with cache_errors():
            wp.init()  # device_from_torch needs the runtime, which is otherwise started by the first launch
        found = DEVICES[device] = wp.device_from_torch(device)
    return found


_keepers = threading.local()


@contextlib.contextmanager
def keeping(alive: list[Any]) -> Iterator[None]:
    """Puts what this thread takes from a cache into `alive`, because a graph that is being captured will read
    it again.
    """
    before = getattr(_keepers, "alive", None)
    _keepers.alive = alive
    try:
        yield
    finally:
        _keepers.alive = before


def keep(item: T) -> T:
    """Returns `item`, and puts it into the list of a surrounding `keeping`."""
    alive = getattr(_keepers, "alive", None)
    if alive is not None:
        alive.append(item)
    return item


def constant(key: Any, make: Callable[[Any], np.ndarray], device: torch.device) -> torch.Tensor:
    """Tensor of `make(key)` on `device`, kept; for tables that depend only on sizes and schedules."""
    return keep(_constant(key, make, device))


@functools.lru_cache(maxsize=256)
def _constant(key: Any, make: Callable[[Any], np.ndarray], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(make(key))).to(device)

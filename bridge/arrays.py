"""Tensors and Warp's devices, streams and arrays: the one place where memory of the two meets.

Kernels read and write memory that torch owns, by address; nothing of torch's `.grad` is ever adopted by Warp.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import warp as wp

_HUGE = 1 << 22

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


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised tensor with dtype and device of `like`.

    Large ones on a CPU come from numpy, which asks for huge pages: a trajectory is written once, and with
        small pages the
    faults of fresh memory cost more than the simulation that fills it (48 ms against 8 ms for 98 MB here).
    """
    if like.device.type != "cpu" or like.element_size() * math.prod(shape) < _HUGE:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, dtype=np.float32 if like.dtype == torch.float32 else np.float64))


def stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which Warp launches on torch's current stream of `device`."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(device)), sync_enter=False)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that the host must not read from the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def warp_device(device: torch.device) -> Any:
    """Warp's device for torch's."""
    wp.init()  # device_from_torch needs the runtime, which is otherwise started by the first launch
    return wp.device_from_torch(device)


_keepers = threading.local()


@contextlib.contextmanager
def keeping(alive: list[Any]) -> Iterator[None]:
    """Puts what this thread takes from a cache into `alive`: a graph that is being captured will read it
    again.
    """
    before = getattr(_keepers, "alive", None)
    _keepers.alive = alive
    try:
        yield
    finally:
        _keepers.alive = before


def keep(item: T) -> T:
    """Returns `item`, which is put into the list of a surrounding `keeping`."""
    alive = getattr(_keepers, "alive", None)
    if alive is not None:
        alive.append(item)
    return item


def constant(key: Any, make: Callable[[Any], np.ndarray], device: torch.device) -> torch.Tensor:
    """Tensor of `make(key)` on `device`, kept: tables that depend on sizes and schedules alone."""
    return keep(_constant(key, make, device))


@functools.lru_cache(maxsize=256)
def _constant(key: Any, make: Callable[[Any], np.ndarray], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(make(key))).to(device)

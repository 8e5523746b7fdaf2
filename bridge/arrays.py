"""Tensors as Warp arrays, on torch's current stream: the one place where the two meet.

Kernels read and write memory that torch owns. Everything that reaches a kernel passes through `view`, detached and contiguous,
so no `.grad` of torch's is ever adopted by Warp.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import warp as wp

_HUGE = 1 << 22
wp.init()  # device_from_torch and from_torch need the runtime, which is otherwise started by the first launch
_ARRAY = type(wp.from_torch(torch.empty(1), return_ctype=True))
WARP_DTYPE = {torch.float32: wp.float32, torch.float64: wp.float64}


def view(tensor: torch.Tensor, components: int = 0) -> Any:
    """Launch argument for a contiguous tensor; with `components`, the last axes hold one vector and are no axes of the array.

    Written out instead of `wp.from_torch(..., return_ctype=True)`, which takes twice as long and is called forty times a rollout.
    """
    shape = tensor.shape[: tensor.ndim - components]
    strides = [step * tensor.element_size() for step in tensor.stride()]
    return _ARRAY(data=tensor.data_ptr(), ndim=len(shape), shape=shape, strides=strides)


def tensor_of(array: wp.array) -> torch.Tensor:
    """Zero-copy tensor over a Warp array, vector components as the last axis."""
    return wp.to_torch(array, requires_grad=False)


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised tensor with dtype and device of `like`.

    Large ones on a CPU come from numpy, which asks for huge pages: a trajectory is written once, and with small pages the
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


@functools.lru_cache(maxsize=None)
def warp_device(device: torch.device) -> Any:
    """Warp's device for torch's."""
    return wp.device_from_torch(device)


@functools.lru_cache(maxsize=256)
def constant(key: Any, make: Callable[[Any], np.ndarray], device: torch.device) -> torch.Tensor:
    """Tensor of `make(key)` on `device`, kept: tables that depend on sizes and schedules alone."""
    return torch.from_numpy(np.ascontiguousarray(make(key))).to(device)


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    # keyed by process: threads do not survive a fork
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="warp-sims")


def in_parallel(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs the tasks at once, the first on this thread. Warp's CPU kernels are serial and leave the GIL free."""
    futures = [_pool(os.getpid()).submit(task) for task in tasks[1:]]
    try:
        tasks[0]()
    finally:
        for future in futures:
            future.result()


def shares(count: int, least: int = 1) -> list[range]:
    """Splits `count` items over torch's threads, at least `least` a thread; results must not depend on the split."""
    threads = max(1, min(torch.get_num_threads(), count // least))
    bounds = [count * i // threads for i in range(threads + 1)]
    return [range(a, b) for a, b in zip(bounds[:-1], bounds[1:])]

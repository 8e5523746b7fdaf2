"""CUDA graphs of torch's and Warp's work together: recorded once, replayed with one call.

A graph holds addresses. Memory that torch allocates during the capture belongs to the graph's own pool. A
`Graph` keeps everything alive that existed before (prepared launches with their scratch and modules, tables),
even if the caches forget it.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import warp as wp

from . import arrays


@contextlib.contextmanager
def nothing_is_collected() -> Iterator[None]:
    """In this context Python's garbage collector is off. It could destroy an unused graph during the capture
    of another, and CUDA then ends that capture. On an H100 this happened to one of 32 captures in a process
    that made many.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graph:
    """Everything that a function launches on one CUDA device, recorded.

    Args:
        function: What is recorded. It runs once, on the host only: nothing is computed, and it must not read
            from the device. Call it once beforehand, so that everything it does on first use (compiling,
            loading, filling caches) is done. Its tensors must keep their addresses.
        device: The device.

    Raises:
        RuntimeError: something in the function cannot be captured; torch's message says what.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._alive: list[Any] = [function]
        with torch.cuda.device(device), nothing_is_collected():
            # one of torch's own: a capture cannot take place on the default stream
            stream = torch.cuda.Stream(device)
            with torch.cuda.graph(self._graph, stream=stream), arrays.keeping(self._alive):
                # Warp is told of the capture that torch has begun, and leaves its end to torch
                warp_stream = arrays.warp_stream(stream)
                wp.capture_begin(stream=warp_stream, force_module_load=False, external=True)
                try:
                    function()
                finally:
                    wp.capture_end(stream=warp_stream)

    def replay(self) -> None:
        """Runs the recorded work, on torch's current stream."""
        self._graph.replay()

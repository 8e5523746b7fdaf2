"""CUDA graphs of torch's and Warp's work together: recorded once, replayed with one call.

A graph holds addresses. Memory that torch allocates during the capture belongs to the graph's own pool; what
existed before (prepared launches with their scratch and modules, tables) is kept alive by the graph here,
even when the caches that it came from forget it.
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
    """Python destroys no garbage in here. A graph that nobody holds any more, in a cycle of references, would
    be destroyed in the middle of the capture of another, and CUDA ends that one then: on an H100, one of 32
    captures in a process that made many.
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
            from the device. All that it does on first use (compiling, loading, filling caches) must have been
            done, so call it beforehand. It must work on tensors that stay where they are.
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
        """Does it again, on torch's current stream."""
        self._graph.replay()

"""CUDA graphs of torch's and Warp's work together: recorded once, replayed with one call.

A graph holds addresses. Memory that torch allocates during the capture belongs to the graph's own pool; what
existed before (prepared launches with their scratch and modules, tables) is kept alive by the graph here,
even when the caches that it came from forget it.
"""

from collections.abc import Callable
from typing import Any

import torch
import warp as wp

from . import arrays


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
        with torch.cuda.device(device):
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

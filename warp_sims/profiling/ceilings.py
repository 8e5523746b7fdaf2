"""Measured rates of a machine, with which the rates of kernels are compared.

The arithmetic rate is that of a large matrix product by torch, which calls the vendor's library (MKL, cuBLAS)
on all of torch's threads. The byte rate is that of a large copy that fits no cache. Both are the best of many
repeats. They are not the peak of the processor, so a kernel can exceed them. Measure them in the same run as
the rates that they are compared with, because the speed of machines drifts.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Ceilings", "copy_rate", "matrix_product_rate", "measure_ceilings"]

# Large enough for the full rate, small enough for tens of repeats in half a second.
_PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


class Ceilings(NamedTuple):
    """Measured ceilings of one device and dtype."""

    flops: float
    """Floating-point operations per second of a large matrix product; multiplication and addition are two."""
    bytes: float
    """Bytes per second of a large copy, each byte counted twice: once read, once written."""


def measure_ceilings(
    device: torch.device | str, dtype: torch.dtype = torch.float32, seconds: float = 0.5
) -> Ceilings:
    """Measures both ceilings, for about `seconds` each."""
    return Ceilings(matrix_product_rate(device, dtype, seconds), copy_rate(device, seconds))


def matrix_product_rate(
    device: torch.device | str, dtype: torch.dtype = torch.float32, seconds: float = 0.5
) -> float:
    """Floating-point operations per second of a large square matrix product, the best of some `seconds`.

    On a GPU float32 is computed as `torch.get_float32_matmul_precision` says, by default not in TF32.
    """
    device = torch.device(device)
    n = _PRODUCT_SIZE[device.type]
    # not zeros or ones: the power that numbers take decides on the clock of some processors
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(n, n, dtype=dtype, device=device, generator=draw) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds)


def copy_rate(device: torch.device | str, seconds: float = 0.5) -> float:
    """Bytes per second of a large copy, read and write counted both, the best of some `seconds`."""
    device = torch.device(device)
    source = torch.ones(_COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return 2.0 * _COPY_BYTES[device.type] / _best(lambda: target.copy_(source), device, seconds)


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the repeats that fit into `seconds`, at least three."""
    work()
    best, end, repeats = float("inf"), time.perf_counter() + seconds, 0
    while repeats < 3 or time.perf_counter() < end:
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        best = min(best, time.perf_counter() - start)
        repeats += 1
    return best


def wait(device: torch.device) -> None:
    """Waits for what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Component-wise comparison of two gradients of the same parameters, on device.

With a base gradient b (the paper: modified, M) and a check gradient c (regular, R), the combined gradient is

    C_i = b_i  where sign(b_i) = sign(c_i),  else 0          with sign(0) = sign(0)

A NaN or an infinity in the base stays as it is: a diverged simulation must not look like a disagreement. A
NaN or an infinity in the check gives 0, because the sign of an overflow means nothing. Components that are
not finite are counted, for each gradient and for both together. The same pass gives the sums for the norms,
the cosine and the shares of agreeing signs and of zeros. They are taken in float64, chunk by chunk in a fixed
order, so they are deterministic. For an ensemble, each member has its own sums.

Source of the rule: Schnell and Thuerey, ICLR 2024, section 3 ("gradient combination").
"""

import functools
from typing import Any

import warp as wp

from .native_text import sections

_TEXT = sections(__file__)

CHUNK = 512
"""Components that one thread of a CPU compares."""
GPU_CHUNK = 16
"""And of a GPU, which has threads for all of them at once."""

SUMS = (
    "dot",  # b.c
    "base_sq",  # |b|^2
    "check_sq",  # |c|^2
    "equal",  # equal signs of finite components where either is nonzero
    "nonzero",  # either is nonzero
    "nonfinite",  # either is NaN or infinite
    "nonfinite_base",
    "nonfinite_check",
    "kept",  # components of the result that are not zero
)
"""What is summed over each chunk."""

NSTATS = len(SUMS)


def chunks(size: int, chunk: int) -> int:
    """Number of threads that a comparison of `size` components takes, for each member, `chunk` a thread."""
    return (size + chunk - 1) // chunk


@functools.cache
def make_combine(dtype: Any, in_lanes: bool = False) -> wp.Kernel:
    """Returns the comparison kernel for `dtype`, for `members * chunks(size, chunk)` threads in all.

    `in_lanes` selects the form for CPUs: the results are the same, except for the order of the sums.
    """
    compare = _make_compare_lanes(dtype) if in_lanes else _make_compare(dtype)

    def _combine(
        # In:
        base: wp.array2d(dtype=dtype),  # (members, size)
        check: wp.array2d(dtype=dtype),  # (members, size)
        size: int,
        chunk: int,  # components of a thread
        keep_check: int,  # 0: the base survives where the signs agree, 1: the check
        first: int,  # chunk of the first thread
        # Out:
        combined: wp.array2d(dtype=dtype),  # (members, size)
        stats: wp.array2d(dtype=wp.float64),  # (members * chunks, NSTATS)
    ):
        index = first + wp.tid()
        member_chunks = (size + chunk - 1) / chunk
        member = index / member_chunks
        begin = (index - member * member_chunks) * chunk
        count = wp.min(chunk, size - begin)
        compare(base, check, member, begin, count, keep_check, combined, stats, index)

    return wp.kernel(_combine, module="unique", enable_backward=False)


def _make_compare(dtype: Any) -> Any:
    """For GPUs: each thread takes its components one after the other."""

    @wp.func
    def sign(x: dtype) -> wp.int32:
        s = wp.int32(0)
        if x > dtype(0.0):
            s = 1
        elif x < dtype(0.0):
            s = -1
        return s

    @wp.func
    def compare(
        base: wp.array2d(dtype=dtype),
        check: wp.array2d(dtype=dtype),
        member: int,
        begin: int,
        count: int,
        keep_check: int,
        combined: wp.array2d(dtype=dtype),
        stats: wp.array2d(dtype=wp.float64),
        chunk: int,
    ):
        dot = wp.float64(0.0)
        base_sq = wp.float64(0.0)
        check_sq = wp.float64(0.0)
        equal = wp.int32(0)
        nonzero = wp.int32(0)
        nonfinite = wp.int32(0)
        nonfinite_base = wp.int32(0)
        nonfinite_check = wp.int32(0)
        survived = wp.int32(0)
        for i in range(begin, begin + count):
            b = base[member, i]
            c = check[member, i]
            kept = b
            other = c
            if keep_check != 0:
                kept = c
                other = b
            agree = sign(b) == sign(c) and wp.isfinite(other)
            result = wp.where(agree or not wp.isfinite(kept), kept, dtype(0.0))
            combined[member, i] = result
            if not wp.isfinite(b):
                nonfinite_base += 1
            if not wp.isfinite(c):
                nonfinite_check += 1
            if not wp.isfinite(b) or not wp.isfinite(c):
                nonfinite += 1
            if b != dtype(0.0) or c != dtype(0.0):
                nonzero += 1
                if agree and wp.isfinite(kept):
                    equal += 1
            if result != dtype(0.0):
                survived += 1
            dot += wp.float64(b) * wp.float64(c)
            base_sq += wp.float64(b) * wp.float64(b)
            check_sq += wp.float64(c) * wp.float64(c)
        stats[chunk, 0] = dot
        stats[chunk, 1] = base_sq
        stats[chunk, 2] = check_sq
        stats[chunk, 3] = wp.float64(equal)
        stats[chunk, 4] = wp.float64(nonzero)
        stats[chunk, 5] = wp.float64(nonfinite)
        stats[chunk, 6] = wp.float64(nonfinite_base)
        stats[chunk, 7] = wp.float64(nonfinite_check)
        stats[chunk, 8] = wp.float64(survived)

    return compare


def _make_compare_lanes(dtype: Any) -> Any:
    """For CPUs: in vector lanes and without branches, which a processor cannot predict for gradients."""
    real, largest = ("float", "FLT_MAX") if dtype == wp.float32 else ("double", "DBL_MAX")
    text = _TEXT["lanes"].replace("REAL", real).replace("LARGEST", largest)

    @wp.func_native(text)
    def compare(
        base: wp.array2d(dtype=dtype),
        check: wp.array2d(dtype=dtype),
        member: int,
        begin: int,
        count: int,
        keep_check: int,
        combined: wp.array2d(dtype=dtype),
        stats: wp.array2d(dtype=wp.float64),
        chunk: int,
    ): ...

    return compare

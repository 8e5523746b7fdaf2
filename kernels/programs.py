"""Runs prepared launches on a CPU, one after the other and on several threads, without Python in between.

On a CPU a Warp kernel is a function of two addresses: that of its launch bounds and that of its arguments. A
`Call` is one such call, with the integers to store into bounds and arguments before it. A `Program` is a list
of calls. A `Job` is a list of programs; each thread takes the next program until none is left.
"""

import ctypes
from ctypes import c_int64, c_void_p

import warp as wp

from .native_text import sections


class Store(ctypes.Structure):
    """An integer of 4 bytes."""

    _fields_ = (("at", c_void_p), ("value", c_int64))


class Call(ctypes.Structure):
    """A launch. The thread that made it writes its number, and begin and end [ns of the monotonic clock]."""

    _fields_ = (
        ("kernel", c_void_p),
        ("bounds", c_void_p),
        ("arguments", c_void_p),
        ("stores", ctypes.POINTER(Store)),
        ("count", c_int64),  # of stores
        ("thread", c_int64),
        ("begin", c_int64),
        ("end", c_int64),
    )


class Program(ctypes.Structure):
    """Launches one after the other."""

    _fields_ = (("calls", ctypes.POINTER(Call)), ("count", c_int64))


class Job(ctypes.Structure):
    """Programs for a team of threads. `taken` and `cpu_time` must be 0 before it runs."""

    _fields_ = (
        ("programs", ctypes.POINTER(Program)),
        ("count", c_int64),  # of programs
        ("taken", c_int64),  # programs that threads have begun
        ("cpu_time", c_int64),  # of all threads, added up [ns]
        ("read_clock", c_void_p),  # clock_gettime
        (
            "number",
            c_void_p,
        ),  # returns the number of the calling thread in its team; None where there is none
        ("monotonic", c_int64),  # identifiers of the two clocks
        ("cpu", c_int64),
    )


@wp.func_native("#if !defined(__CUDA_ARCH__)\n" + sections(__file__)["run"] + "#endif\n")
def native_run(job: wp.int64, team: wp.int64, threads: int): ...


@wp.kernel(module="unique", enable_backward=False)
def run_job(
    job: wp.int64,  # address of a `Job`
    team: wp.int64,  # address of GOMP_parallel, which starts threads; not read with one thread
    threads: int,
):
    native_run(job, team, threads)

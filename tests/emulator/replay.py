"""Runs a recorded launch again in a process of its own under a sanitizer: `check` returns what that says.

Every array, one in a struct too, comes as memory of its own and of its size, so that an access beside it is
seen; arrays that lay at one address share it.
"""

import ctypes
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence

RUNTIMES = {"bounds": ("asan", "ubsan"), "races": ("tsan",)}


def check(launch, mode: str, order: int = 0, skip: int = 0) -> str:
    """Runs a `device.Replay` in a mode of `library.MODES`; empty if nothing was found.

    Args:
        launch: What was recorded.
        mode: "bounds" (AddressSanitizer, UBSan) or "races" (ThreadSanitizer).
        order: See `library.run`.
        skip: Line of a barrier that is passed over.
    """
    from . import library

    cxx = library.compiler()
    built = library.build(launch.command.text, launch.command.entry, mode)
    place = launch.blocks, launch.threads, order, skip
    preloaded = [library.runtime(cxx, name) for name in RUNTIMES[mode]]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(preloaded),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66:halt_on_error=0",
    }
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickle.dumps((str(built), launch.arguments, *place)))
        file.flush()
        call = [*_without_randomised_addresses(), sys.executable, "-S", __file__, file.name]
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
    said = "\n".join(line for line in done.stderr.splitlines() if "support makecontext" not in line).strip()
    return said or (f"exit status {done.returncode}" if done.returncode else "")


@functools.cache
def _without_randomised_addresses() -> Sequence[str]:
    # ThreadSanitizer refuses some layouts of memory that newer kernels draw; some containers forbid to ask
    call = ("setarch", "-R")
    try:
        asked = subprocess.run([*call, "true"], capture_output=True)
    except FileNotFoundError:
        return ()
    return call if asked.returncode == 0 else ()


def _replay(path: str) -> None:
    with open(path, "rb") as file:
        library, arguments, blocks, threads, order, skip = pickle.load(file)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    largest: dict[int, bytes] = {}
    for _, arrays in arguments:
        for _, address, memory in arrays:
            if len(memory) >= len(largest.get(address, b"")):
                largest[address] = memory
    places = {}
    for address, memory in largest.items():
        places[address] = libc.malloc(len(memory))
        ctypes.memmove(places[address], memory, len(memory))
    keep, addresses = [], []
    for raw, arrays in arguments:
        argument = ctypes.create_string_buffer(raw, len(raw))
        for offset, address, _ in arrays:
            ctypes.memmove(ctypes.byref(argument, offset), ctypes.byref(ctypes.c_uint64(places[address])), 8)
        keep.append(argument)
        addresses.append(ctypes.addressof(argument))
    code = ctypes.CDLL(library)
    code.emulated_message.restype = ctypes.c_char_p
    pointers = (ctypes.c_void_p * len(addresses))(*addresses)
    if code.emulated_run(pointers, blocks, threads, order, 0, skip):
        sys.exit(code.emulated_message().decode())


if __name__ == "__main__":
    _replay(sys.argv[1])

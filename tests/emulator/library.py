"""From a kernel to a shared library: the text that Warp would hand to NVRTC, compiled for the host.

    text, entry = cuda_source(kernel, block_dim)
    library = build(text, entry, mode)              compiled behind cuda_on_host.h, linked to blocks.cpp
    run(library, addresses, blocks, threads, …)     the arguments of a CUDA launch

Compiled libraries are kept by content: the text, the header, blocks.cpp, Warp's version, the compiler and its
flags. The folder is `EMULATOR_CACHE`, by default cuda-on-host in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import warp as wp
from warp._src.codegen import cuda_kernel_forward_name
from warp_sims.bridge.runtime.launches import PREPARING

HERE = Path(__file__).parent
MODES = {
    "plain": ["-O1"],
    "bounds": [
        *("-O1", "-g", "-fno-omit-frame-pointer", "-DEMULATED_BOUNDS", "-fsanitize=address,undefined"),
        # without "strict", an array at the end of a struct, such as a vector's, has no bounds
        *("-fsanitize=bounds-strict", "-fno-sanitize=vptr", "-fsanitize-recover=undefined"),
    ],
    "races": ["-O1", "-g", "-DEMULATED_RACES", "-fsanitize=thread"],
}
"""Compiler flags: without a sanitizer; AddressSanitizer and UBSan; ThreadSanitizer."""
COMMON = ["-std=c++17", "-fPIC", "-w", "-ffp-contract=off"]
ARCH = 90
"""sm_90: the branches of the text that are compiled."""


@functools.cache
def compiler() -> str | None:
    """Path of the C++ compiler: CXX, g++ or clang++ (15 or newer); None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


@functools.cache
def has_sanitizers() -> bool:
    """Whether the compiler is GCC and brings the shared runtimes of its sanitizers."""
    found = compiler()
    return (
        found is not None
        and _is_gcc()
        and all(Path(runtime(found, name)).is_absolute() for name in ("asan", "ubsan", "tsan"))
    )


def runtime(cxx: str, name: str) -> str:
    """Path of a sanitizer's shared library; its bare name where there is none."""
    return subprocess.check_output([cxx, f"-print-file-name=lib{name}.so"], text=True).strip()


@functools.cache
def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("EMULATOR_CACHE") or Path(home) / "cuda-on-host")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cuda_source(kernel: wp.Kernel, block_dim: int) -> tuple[str, str]:
    """The text that Warp compiles for a GPU, and the name of the kernel in it."""
    wp.init()
    module: Any = kernel.module
    with PREPARING:
        module.get_module_hash(block_dim)
        options = module.resolve_options(wp.config, block_dim=block_dim) | {"output_arch": ARCH}
        text = module._run_codegen(options, is_cpu=False)[0]
    # where a native text stands in the sources; the number of lines stays
    return re.sub(r"^// /.*$", "//", text, flags=re.M), cuda_kernel_forward_name(kernel)


def barriers(text: str) -> tuple[str, list[int]]:
    """Numbers the barriers of a text: returns it with marked calls of functions that are a barrier, and the
    lines of all barriers.

    A barrier is known to the emulator by the line of its `__syncthreads`. A device function of Python that is
    nothing but a barrier has one such line for all its calls, so these are known by the lines of the calls.
    """
    alone = r"^static CUDA_CALLABLE void (\w+)\(\s*\)\s*\{(?:\s|#.*)*__syncthreads\(\);(?:\s|#.*)*\}"
    names = re.findall(alone, text, flags=re.M)
    lines, found = text.split("\n"), []
    for i, line in enumerate(lines):
        call = line.strip().removesuffix("();")
        if line.strip() == f"{call}();" and call in names:
            lines[i] = f"emulated::place->call = __LINE__; {call}();"
            found.append(i + 1)
        elif line.strip() in ("WS_SYNC();", "__syncthreads();") and not _in_one_of(names, lines, i):
            found.append(i + 1)
    return "\n".join(lines), found


def _in_one_of(names: Sequence[str], lines: Sequence[str], i: int) -> bool:
    head = next((line for line in reversed(lines[:i]) if line.startswith("static CUDA_CALLABLE")), "")
    return any(f" {name}(" in head for name in names)


def _compile(source: Path, out: Path, flags: Sequence[str]) -> None:
    """Compiles into a file of its own first: another process may be about the same."""
    cxx = compiler()
    assert cxx is not None, "needs g++ or clang++"
    with tempfile.NamedTemporaryFile(dir=out.parent, suffix=out.suffix, delete=False) as file:
        part = Path(file.name)
    done = subprocess.run(
        [cxx, *COMMON, *flags[:-1], str(source), flags[-1], "-o", str(part)], capture_output=True, text=True
    )
    if done.returncode:
        part.unlink()
        raise RuntimeError(f"{source}: {done.stderr[:4000]}")
    part.replace(out)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@functools.cache
def _version() -> str:
    return subprocess.check_output([str(compiler()), "--version"], text=True).splitlines()[0]


@functools.cache
def _blocks() -> Path:
    source = HERE / "blocks.cpp"
    out = cache_folder() / f"blocks-{_digest(source.read_text(), _version(), *COMMON)}.o"
    if not out.exists():
        _compile(source, out, ["-O2", "-c"])
    return out


@functools.cache
def _header(mode: str) -> Path:
    """Folder of the header, compiled for g++: Warp's headers are half of the time that a kernel takes."""
    source = HERE / "cuda_on_host.h"
    key = _digest(source.read_text(), wp.__version__, _version(), *COMMON, *MODES[mode])
    folder = cache_folder() / f"header-{key}"
    folder.mkdir(exist_ok=True)
    header, compiled = folder / source.name, folder / f"{source.name}.gch"
    if not header.exists():
        header.write_text(source.read_text())
    if _is_gcc() and not compiled.exists():
        _compile(header, compiled, ["-x", "c++-header", *MODES[mode], f"-I{_native()}", "-c"])
    return folder


def _is_gcc() -> bool:
    return "clang" not in _version()


def _native() -> Path:
    """Warp's headers."""
    return Path(wp.__file__).parent / "native"


@functools.cache
def build(text: str, entry: str, mode: str = "plain") -> Path:
    """The shared library of a kernel in one of `MODES`."""
    blocks, header = _blocks(), _header(mode)
    text = barriers(text)[0]
    whole = f'#include "cuda_on_host.h"\n#line 1\n{text}\nEMULATED_KERNEL({entry})\n'
    key = _digest(whole, header.name, blocks.name)
    source = cache_folder() / f"{key}-{mode}.cpp"
    out = source.with_suffix(".so")
    if not out.exists():
        source.write_text(whole)
        _compile(source, out, [*MODES[mode], f"-I{header}", f"-I{_native()}", "-shared", str(blocks)])
    return out


@functools.cache
def _load(library: Path) -> Any:
    code = ctypes.CDLL(str(library))
    code.emulated_message.restype = ctypes.c_char_p
    return code


def run(
    library: Path,
    addresses: Sequence[int],
    blocks: int,
    threads: int,
    order: int = 0,
    seed: int = 0,
    skip: int = 0,
) -> None:
    """Runs a kernel with the addresses of its arguments.

    Args:
        library: From `build`.
        addresses: Of the launch bounds and of each argument.
        blocks: Of the grid.
        threads: Of a block.
        order: 0 lanes and blocks as they are numbered, 1 backwards, 2 shuffled by `seed`.
        seed: Of the order.
        skip: Line of a barrier that all lanes pass over, from `barriers`; 0 for none.

    Raises:
        RuntimeError: a block stands still, or lanes exchange what they must not; the message says which.
    """
    code = _load(library)
    pointers = (ctypes.c_void_p * len(addresses))(*addresses)
    if code.emulated_run(pointers, blocks, threads, order, seed, skip):
        raise RuntimeError(code.emulated_message().decode())


WHOLE = os.environ.get("EMULATOR") == "whole"
"""Whether the tests take all cases, as `make test-emulator` does, instead of a selection."""

"""Registers, shared memory and spills of a kernel on a GPU. They are found by compiling, without a GPU.

Warp compiles to PTX (it includes NVRTC). NVIDIA's `ptxas` compiles PTX to machine code, and says with `-v`
what each kernel uses. `ptxas` is searched on the PATH, below CUDA_HOME, and in the Python packages that
include it (nvidia-cuda-nvcc, triton).
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import warp as wp

from ..bridge.runtime.launches import PREPARING
from ..kernels.sweeps.fused_rollout import make_fused_rollout
from ..kernels.sweeps.resident import choose_plan, make_resident_rollout
from ..kernels.system import DeviceFunctions

__all__ = ["Resources", "compile_ptx", "cuda_rollout", "device_resources", "find_ptxas"]

NO_PTXAS = "no ptxas found; pip install nvidia-cuda-nvcc brings one"


def cuda_rollout(functions: DeviceFunctions, dtype: Any, network: str, nworld: int) -> wp.Kernel:
    """Returns the forward sweep that a GPU takes with a network, see `policies.networks.fused_network`."""
    itemsize = wp.types.type_size_in_bytes(dtype)
    plan = choose_plan(network, itemsize, nworld)
    if plan is not None:
        return make_resident_rollout(functions, dtype, plan)
    return make_fused_rollout(functions, dtype)


class Resources(NamedTuple):
    """What one kernel takes on one architecture."""

    arch: int
    """90 for sm_90."""
    registers: int
    """Per thread."""
    shared_bytes: int
    """Per block, static and dynamic."""
    stack_bytes: int
    """Per thread; the slow path of sin and cos alone takes 32, so judge by spills."""
    spill_stores: int
    """Bytes per thread, with those of functions that were not inlined."""
    spill_loads: int
    """Bytes per thread, likewise."""
    ptx_seconds: float
    """Compiling to PTX, cold."""
    ptxas_seconds: float
    """Compiling the PTX to machine code."""


def device_resources(kernel: wp.Kernel, arch: int = 90, *, backward: bool = False) -> Resources | None:
    """Compiles a kernel's module for `sm_<arch>` and reads what the kernel takes; no GPU is needed.

    Args:
        kernel: A kernel, not generic; in a module of its own, or its neighbours count in the compile times.
        arch: Compute capability, 80 for sm_80.
        backward: Whether to report the generated adjoint of the kernel, which must have one.

    Returns:
        The resources, None without `ptxas` (see `find_ptxas`).

    Raises:
        RuntimeError: the compilers failed; the message holds what they said.
    """
    ptxas = find_ptxas()
    if ptxas is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ptx = compile_ptx(kernel, arch, Path(folder))
        ptx_seconds = time.perf_counter() - start
        start = time.perf_counter()
        said = _assemble(ptxas, ptx, arch)
        ptxas_seconds = time.perf_counter() - start
        entry = f"{kernel.get_mangled_name()}_cuda_kernel_{'backward' if backward else 'forward'}"
        dynamic = sum(json.loads(meta.read_text()).get(f"{entry}_smem_bytes", 0) for meta in _metas(ptx))
    registers, shared, stack, stores, loads = _usage(said, entry)
    return Resources(arch, registers, shared + dynamic, stack, stores, loads, ptx_seconds, ptxas_seconds)


def compile_ptx(kernel: wp.Kernel, arch: int, folder: Path) -> Path:
    """Compiles a kernel's module to PTX in an empty folder and returns the file."""
    with PREPARING:
        wp.compile_aot_module(kernel.module, arch=arch, module_dir=str(folder), use_ptx=True)
    (ptx,) = folder.glob("*.ptx")
    return ptx


def find_ptxas() -> str | None:
    """Returns the path of a `ptxas`, or None."""
    places = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for package, below in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            places += sorted(Path(root).glob(below), reverse=True)
    return shutil.which("ptxas") or shutil.which("ptxas", path=os.pathsep.join(map(str, places)))


def _metas(ptx: Path) -> list[Path]:
    return list(ptx.parent.glob("*.meta"))


def _assemble(ptxas: str, ptx: Path, arch: int) -> str:
    """Returns what `ptxas -v` says of a file."""
    command = [ptxas, "-v", f"-arch=sm_{arch}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
    # NVRTC ends the file with a zero byte
    text = ptx.read_bytes().rstrip(b"\0")
    ptx.write_bytes(text)
    done = subprocess.run(command, capture_output=True, text=True)
    older = re.search(r"Unsupported \.version .*current version is '([\d.]+)'", done.stderr)
    if done.returncode != 0 and older:
        # an older ptxas knows the language that these kernels are written in, if not its newest number
        version = f".version {older.group(1)}".encode()
        ptx.write_bytes(re.sub(rb"^\.version \d+\.\d+", version, text, flags=re.MULTILINE))
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stderr


def _usage(said: str, entry: str) -> tuple[int, int, int, int, int]:
    """Registers, shared bytes, stack, spill stores and spill loads of an entry, from what `ptxas -v` said."""
    entries = set(re.findall(r"Compiling entry function '(\w+)'", said))
    registers = shared = stack = stores = loads = 0
    parts = re.split(r"Function properties for ", said)[1:]
    for part in parts:
        name = re.match(r"\S+", part)
        if name is None or (name.group() in entries and name.group() != entry):
            continue
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if frame:
            stack += int(frame.group(1))
            stores += int(frame.group(2))
            loads += int(frame.group(3))
        if name.group() == entry:
            used = re.search(r"Used (\d+) registers", part)
            if used is None:
                raise RuntimeError(f"ptxas -v named no registers of {entry}: {said.strip()}")
            registers = int(used.group(1))
            static = re.search(r"(\d+) bytes smem", part)
            shared = int(static.group(1)) if static else 0
    if not registers:
        raise RuntimeError(f"ptxas -v did not mention {entry}: {said.strip()}")
    return registers, shared, stack, stores, loads

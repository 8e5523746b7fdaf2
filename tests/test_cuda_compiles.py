"""Every kernel compiles for sm_80 and sm_90, on machines without a GPU too; the cart-pole's without
spills.
"""

import re
import shutil
import subprocess

import pytest
import warp as wp
from warp_sims.kernels.agreement import make_combine
from warp_sims.kernels.rollout import make_fused_rollout, make_system_kernels

import warp_sims as ws

SYSTEMS = {
    "cartpole": ws.CartPole(poles=4),
    "guidance": ws.GuidanceByRepulsion(drivers=2, evaders=4),
    "quantum": ws.QuantumControl(points=32),
}


def kernels_of(system, dtype):
    functions = system.device_functions(dtype)
    kernels = make_system_kernels(functions, dtype)
    return {
        "fused_rollout": make_fused_rollout(functions, dtype),
        "simulate": kernels.simulate,
        "loss": kernels.loss,
        "adjoint of one field": kernels.adjoint[0],
        "adjoint of two fields": kernels.adjoint[1],
    }


def compile_for(kernel, arch, folder):
    """PTX of a kernel's module."""
    wp.compile_aot_module(kernel.module, arch=arch, module_dir=str(folder), use_ptx=True)
    (ptx,) = folder.glob("*.ptx")
    return ptx


def spilled_bytes(ptx, arch):
    """Spill stores of each function in the module, or None without a ptxas that understands it."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        return None
    command = [ptxas, "-v", f"-arch=sm_{arch}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
    # PTX that ends with a zero byte and names a newer version than ptxas knows is otherwise the same language
    text = ptx.read_bytes().rstrip(b"\0")
    ptx.write_bytes(text)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and "Unsupported .version" in done.stderr:
        ptx.write_bytes(re.sub(rb"^\.version \d+\.\d+", b".version 9.0", text, flags=re.MULTILINE))
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [wp.float32, wp.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("system", SYSTEMS.values(), ids=list(SYSTEMS))
def test_compiles(system, dtype, arch, tmp_path):
    for i, (name, kernel) in enumerate(kernels_of(system, dtype).items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        ptx = compile_for(kernel, arch, folder)
        assert f".target sm_{arch}".encode() in ptx.read_bytes()
        spills = spilled_bytes(ptx, arch)
        # the larger states of the other two systems spill some bytes around their pair and elimination loops
        if spills is not None and isinstance(system, ws.CartPole):
            assert max(spills) == 0, f"{name}: spill stores {spills}"


@pytest.mark.parametrize("dtype", [wp.float32, wp.float64], ids=["float32", "float64"])
def test_comparison_compiles(dtype, tmp_path):
    assert b".entry" in compile_for(make_combine(dtype), 90, tmp_path).read_bytes()

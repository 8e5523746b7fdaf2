"""Every kernel compiles for sm_80 and sm_90, on machines without a GPU too; the cart-pole's without
spills.
"""

import pytest
import warp as wp
from warp_sims.kernels.agreement import make_combine
from warp_sims.kernels.rollout import make_fused_rollout, make_system_kernels

import warp_sims as ws
from warp_sims.resources import compile_ptx, device_resources, find_ptxas

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


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [wp.float32, wp.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("system", SYSTEMS.values(), ids=list(SYSTEMS))
def test_compiles(system, dtype, arch, tmp_path):
    for i, (name, kernel) in enumerate(kernels_of(system, dtype).items()):
        found = device_resources(kernel, arch)
        if found is None:
            folder = tmp_path / str(i)
            folder.mkdir()
            assert f".target sm_{arch}".encode() in compile_ptx(kernel, arch, folder).read_bytes()
        # the larger states of the other two systems spill some bytes around their pair and elimination loops
        elif isinstance(system, ws.CartPole):
            assert found.spill_stores == 0, f"{name}: {found}"


@pytest.mark.parametrize("dtype", [wp.float32, wp.float64], ids=["float32", "float64"])
def test_comparison_compiles(dtype, tmp_path):
    assert b".entry" in compile_ptx(make_combine(dtype), 90, tmp_path).read_bytes()


@pytest.mark.skipif(find_ptxas() is None, reason="no ptxas")
def test_resources():
    """Of a kernel with few numbers in a thread, of its adjoint, and of one with more than registers."""

    def make(size):
        Values = wp.types.vector(length=size, dtype=float)

        @wp.kernel(module="unique", module_options={"max_unroll": 1024})
        def crowded(x: wp.array(dtype=Values), y: wp.array(dtype=Values)):
            value = x[wp.tid()]
            for _ in range(2):
                value = wp.sin(value[size - 1]) * value + value
            y[wp.tid()] = value

        return crowded

    few, many = (device_resources(make(size), 90) for size in (8, 300))
    adjoint = device_resources(make(8), 90, backward=True)
    assert few.arch == 90 and 8 < few.registers < adjoint.registers < 255 == many.registers
    assert few.spill_stores == 0 and many.spill_stores > 4 * 45 and many.spill_loads > 0
    assert min(few.ptx_seconds, few.ptxas_seconds) > 0

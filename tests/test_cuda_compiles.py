"""Every kernel compiles for sm_80 and sm_90, on machines without a GPU too, and spills no register, but for
the bytes named here. `python -m benchmarks.device_resources` prints the table.
"""

import pytest
import warp as wp
from warp_sims.kernels.agreement import make_combine

from benchmarks.device_resources import SYSTEMS, kernels_of
from warp_sims.profiling.resources import compile_ptx, device_resources, find_ptxas

SPILLED = {
    # Handed to the step's adjoint by value, x and the cotangent of 64 components pass through 128 registers
    # each, 255 in all. 4500 and 10500 bytes where all vectors were registers.
    ("quantum", "float64", "adjoint, one field"): 680,
    ("quantum", "float64", "adjoint, two fields"): 680,
    # On sm_80 alone: the step beside 102 registers of weights.
    ("quantum", "float32", "rollout, a world a block"): 8,
    ("quantum", "float32", "rollout, worlds share a block"): 8,
}
"""Bytes of spill stores allowed: what was measured, with ptxas 13.0, rounded up to 8."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_compiles(system, dtype, arch, tmp_path):
    for i, (name, kernel) in enumerate(kernels_of(system, dtype).items()):
        found = device_resources(kernel, arch)
        if found is None:
            folder = tmp_path / str(i)
            folder.mkdir()
            assert f".target sm_{arch}".encode() in compile_ptx(kernel, arch, folder).read_bytes()
            continue
        print(f"{system} {dtype} {name}: {found}")
        assert found.spill_stores <= SPILLED.get((system, dtype, name), 0), f"{name}: {found}"
        assert found.shared_bytes <= 48 << 10, f"{name}: {found}"


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

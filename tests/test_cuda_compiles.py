"""Every kernel compiles for sm_80 and sm_90, on machines without a GPU too, and spills no register but where
`SPILLED` says so.

`python -m benchmarks.device_resources` prints the table.
"""

import pytest
import warp as wp
from golden_robots import numbers, robot
from warp_sims.kernels.agreement import make_combine

import warp_sims as ws
from benchmarks.device_resources import SYSTEMS, kernels_of
from warp_sims.profiling.resources import compile_ptx, device_resources, find_ptxas

SPILLED = {
    # Up to seven registers of 255: four layers keep their weights in registers beside the robot's step, in
    # float64. Once a step, against some thousand accesses to local memory that the step makes anyway.
    ("hopper", "float64", "rollout, a world a block"): 16,
    ("hopper", "float64", "rollout, worlds share a block"): 32,
    # In float64 alone: four points of Runge and Kutta, 26 registers each, and the cotangents of two fields or
    # the weights of layers beside them. float32, in which policies are trained, spills none.
    ("quadrotor", "float64", "adjoint, one field"): 96,
    ("quadrotor", "float64", "adjoint, two fields"): 600,
    ("quadrotor", "float64", "rollout, a world a block"): 320,
    ("quadrotor", "float64", "rollout, worlds share a block"): 320,
}
"""Bytes that a kernel may spill, where it is known why and what it costs."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_compiles(system, dtype, arch, tmp_path):
    for i, (name, kernel) in enumerate(kernels_of(*SYSTEMS[system], dtype).items()):
        found = device_resources(kernel, arch)
        if found is None:
            folder = tmp_path / str(i)
            folder.mkdir()
            assert f".target sm_{arch}".encode() in compile_ptx(kernel, arch, folder).read_bytes()
            continue
        print(f"{system} {dtype} {name}: {found}")
        assert found.spill_stores <= SPILLED.get((system, dtype, name), 0), f"{name}: {found}"
        assert found.shared_bytes <= 48 << 10, f"{name}: {found}"


@pytest.mark.slow
@pytest.mark.skipif(find_ptxas() is None, reason="no ptxas")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("points", [17, 128])
def test_any_number_of_points(points, dtype):
    """Loops over grid points stay loops: spills nowhere, and no compile time that grows with them."""
    system, policy = ws.QuantumControl(points=points), ws.WaveCNN(points)
    for name, kernel in kernels_of(system, policy, dtype).items():
        found = device_resources(kernel, 90)
        assert found.spill_stores == 0, f"{name}: {found}"


@pytest.mark.slow
@pytest.mark.skipif(find_ptxas() is None, reason="no ptxas")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["ballchain", "ant"])
def test_robots(name, dtype):
    """All kinds of joints, contact and limits: the functions in memory for large states, those by value
    else."""
    system = robot(numbers(name), "contact_smooth")
    policy = ws.MLP(system.state_size, (64,), system.control_size)
    for what, kernel in kernels_of(system, policy, dtype).items():
        found = device_resources(kernel, 90)
        assert found.spill_stores == 0, f"{what}: {found}"


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

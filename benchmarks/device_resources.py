"""What every kernel takes of a GPU: registers, shared memory, stack, spills and compile times, without one.

    python -m benchmarks.device_resources [--arch 80 90] [--json FILE]

Needs `ptxas` (pip install nvidia-cuda-nvcc brings one). The kernels are those that the published settings
launch on a GPU: the sweeps of each system, forwards with the published network, and the comparison.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import warp as wp
from warp_sims.kernels.agreement import make_combine
from warp_sims.kernels.sweeps.fused_rollout import make_fused_rollout
from warp_sims.kernels.sweeps.resident import choose_plan, make_resident_rollout
from warp_sims.kernels.sweeps.rollout import make_kernels

import warp_sims as ws
from warp_sims.policies.networks import fused_network
from warp_sims.profiling.resources import device_resources, find_ptxas

SYSTEMS = {
    "cartpole": (ws.CartPole(poles=4), ws.MLP(10)),
    "quadrotor": (ws.Quadrotor(), ws.MLP(13, out_size=4)),
    "guidance": (ws.GuidanceByRepulsion(drivers=2, evaders=4), ws.MLP(24, out_size=4)),
    "quantum": (ws.QuantumControl(points=32), ws.WaveCNN()),
    "hopper": (ws.Hopper(), ws.MLP(12, (128, 64, 32), 3)),
    "links": (ws.LinkedPendulum(links=3), ws.MLP(8)),
}
BATCHES = {"a world a block": 8, "worlds share a block": 4096}
DTYPES = {"float32": wp.float32, "float64": wp.float64}


def kernels_of(system: ws.System, policy: torch.nn.Module, dtype: str) -> dict[str, wp.Kernel]:
    """The kernels that a system with this policy launches on a GPU, by what they are."""
    scalar, itemsize = DTYPES[dtype], 4 if dtype == "float32" else 8
    functions = system.device_functions(scalar)
    kernels = make_kernels(functions, scalar, on_cpu=False)
    found = {
        "simulate": kernels.simulate,
        "loss": kernels.loss,
        "adjoint, one field": kernels.adjoint[0],
        "adjoint, two fields": kernels.adjoint[1],
        "rollout, any policy": make_fused_rollout(functions, scalar),
    }
    network = fused_network(policy)
    assert network is not None
    for what, nworld in BATCHES.items():
        plan = choose_plan(network.description, itemsize, nworld)
        if plan is not None:
            found[f"rollout, {what}"] = make_resident_rollout(functions, scalar, plan)
    return found


def rows(archs: list[int]) -> list[dict[str, Any]]:
    """One row for each kernel and architecture."""
    kernels = [
        (s, d, what, k) for s in SYSTEMS for d in DTYPES for what, k in kernels_of(*SYSTEMS[s], d).items()
    ]
    kernels += [("all", d, "comparison", make_combine(DTYPES[d])) for d in DTYPES]
    found = []
    for system, dtype, what, kernel in kernels:
        for arch in archs:
            resources = device_resources(kernel, arch)
            assert resources is not None
            found.append({"system": system, "dtype": dtype, "kernel": what} | resources._asdict())
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], metavar="N", help="90 for sm_90")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args()
    if find_ptxas() is None:
        sys.exit("no ptxas found; pip install nvidia-cuda-nvcc brings one")
    wp.config.log_level = wp.LOG_ERROR
    table = rows(options.arch)
    print(
        f"{'system':9} {'dtype':8} {'kernel':29} {'sm':>3} {'registers':>9} {'shared':>7} {'stack':>6} "
        f"{'spilled':>8} {'compile s':>9}"
    )
    for r in table:
        print(
            f"{r['system']:9} {r['dtype']:8} {r['kernel']:29} {r['arch']:3} {r['registers']:9} "
            f"{r['shared_bytes']:7} {r['stack_bytes']:6} {r['spill_stores']:8} "
            f"{r['ptx_seconds'] + r['ptxas_seconds']:9.1f}"
        )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

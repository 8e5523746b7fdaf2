"""Which networks the forward sweep that keeps weights in registers takes, and how.

The sweep itself is executed in emulator/.
"""

import pytest
from warp_sims.kernels.policy.layout import BLOCK, Column
from warp_sims.kernels.sweeps.resident import REGISTERS, make_plan


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("nworld", [1, 256, 257, 4096])
def test_plans_fit(nworld, itemsize):
    for network in ("mlp:10,100,100,1", "mlp:24,100,100,4", "wavecnn:64,60,1", "mlp:4,9,7,1"):
        plan = make_plan(network, itemsize, nworld)
        assert plan is not None, network
        assert BLOCK % plan.worlds == 0
        assert plan.blocks(nworld) * plan.worlds >= nworld
        assert plan.weights * itemsize <= 4 * REGISTERS[plan.threads]
        for i, layer in enumerate(plan.hidden):
            window, section = (plan.layout.column(i, c) for c in (Column.WINDOW, Column.SECTION))
            last = (plan.layout.column(i, Column.POSITIONS) - 1) * plan.layout.column(i, Column.HOP)
            assert layer.split * plan.layout.column(i, Column.UNITS) <= plan.threads
            assert window <= layer.split * layer.count
            assert last + layer.split * layer.count <= section


@pytest.mark.parametrize("network", ["mlp:4,1", "mlp:10,600,1", "mlp:10,400,400,1", "wavecnn:1024,200,1"])
def test_no_plan_for_what_does_not_fit(network):
    assert make_plan(network, 8, 64) is None

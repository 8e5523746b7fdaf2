"""Which networks the forward sweep that keeps weights in registers takes, and how.

The sweep itself is executed in emulator/.
"""

import pytest
from cases import describe
from warp_sims.kernels.policy.layout import BLOCK
from warp_sims.kernels.policy.table import Column
from warp_sims.kernels.sweeps.resident import REGISTERS, make_plan

import warp_sims as ws
from warp_sims.policies.networks import fused_network


def convolutional(points, width):
    return fused_network(ws.WaveCNN(points, width)).description


TAKEN = [describe(10, 100, 100, 1), describe(24, 100, 100, 4), convolutional(32, 60), describe(4, 9, 7, 1)]
OTHERS = {
    "linear": describe(4, 1),
    "more units than threads": describe(10, 600, 1),
    "more weights than registers": describe(10, 400, 400, 1),
    "more channels": convolutional(512, 200),
    "another activation": "4|linear 0 9 p0 p1|elu 1 1.0|linear 2 1 p2 p3",
    "an activation at its end": "4|linear 0 9 p0 p1|tanh 1|linear 2 1 p2 p3|tanh 3",
}


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("nworld", [1, 256, 257, 4096])
def test_plans_fit(nworld, itemsize):
    for network in TAKEN:
        plan = make_plan(network, itemsize, nworld)
        assert plan is not None, network
        assert BLOCK % plan.worlds == 0
        assert plan.blocks(nworld) * plan.worlds >= nworld
        assert plan.weights * itemsize <= 4 * REGISTERS[plan.threads]
        for i, layer in zip(plan.layout.linear, plan.hidden):
            section = plan.layout.column(i, Column.OUTPUT) - plan.layout.column(i, Column.INPUT)
            last = (plan.layout.column(i, Column.POSITIONS) - 1) * plan.layout.column(i, Column.HOP)
            assert layer.split * plan.layout.column(i, Column.UNITS) <= plan.threads
            assert plan.layout.column(i, Column.WINDOW) <= layer.split * layer.count
            assert last + layer.split * layer.count <= section


@pytest.mark.parametrize("what", OTHERS)
def test_no_plan_for_what_does_not_fit(what):
    assert make_plan(OTHERS[what], 8, 64) is None

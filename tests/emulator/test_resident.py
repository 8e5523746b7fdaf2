"""The policy within the sweep that keeps its weights in registers, against the module it is made from."""

import pytest
import torch
from cases import assert_close, make_net, make_states
from warp_sims.bridge.passes import fused
from warp_sims.bridge.passes.spec import LossWeights
from warp_sims.bridge.runtime import registry
from warp_sims.kernels.sweeps.resident import make_plan

import warp_sims as ws
from warp_sims.policies.networks import fused_network

from .device import CPU
from .problems import FORMS, form_of_sweep, in_every_order

TOLERANCE = {dtype: 100 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
"""Sums of up to 450 terms are taken in another order, and a single output may be a difference of them."""

POLICIES = {
    "cartpole": (ws.CartPole(poles=4), (100, 100)),
    "odd widths": (ws.CartPole(poles=1), (33, 20, 7)),
    "several controls": (ws.GuidanceByRepulsion(2, 4), (50,)),
    "wavecnn": (ws.QuantumControl(points=32), None),
}


@pytest.mark.parametrize("blocks_of", [8, 4096], ids=["a world a block", "several worlds a block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", POLICIES)
def test_text_is_the_policy(case, dtype, blocks_of, emulator, monkeypatch):
    """Also in float64 for large states, for which `choose_plan` takes another sweep."""
    system, widths = POLICIES[case]
    if widths is None:
        net = ws.WaveCNN(system.points, 60).to(dtype)
        net.reset_parameters(seed=3)
    else:
        net = make_net(system, widths, dtype, gain=1.0)
    description = fused_network(net).description
    plan = make_plan(description, dtype.itemsize, blocks_of)
    assert plan is not None and (plan.worlds > 1) == (blocks_of > 256)
    packed = fused.pack(description, list(net.parameters()))
    x0 = make_states(system, 6, dtype)
    with emulator.standing_in(), form_of_sweep(FORMS[0]):
        monkeypatch.setattr(fused, "choose_plan", lambda *_: plan)
        p = registry.prepare(system.number, dtype, CPU)
        states, controls, _, hidden = in_every_order(
            emulator, lambda: fused.rollout(p, description, packed, x0, 2, LossWeights(0.0, 0.0, 0.0))
        )
    # the second step finds in shared memory what the first has left there
    with torch.no_grad():
        assert_close(controls, net(states[:-1].flatten(0, 1)).view_as(controls), TOLERANCE[dtype])
    assert torch.isfinite(hidden).all()
    rows = hidden.view(2, 2, 4, -1).movedim(1, 0).flatten(1, 2)
    assert torch.equal(rows[:, :6, : system.state_size], states[:-1])
    assert not rows[:, 6:, : system.state_size].any(), "rows without a world are zero"

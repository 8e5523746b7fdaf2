"""The forward sweep that keeps the weights in registers, its text run on a CPU lane by lane.

What stands between two barriers must not depend on the order of the lanes: both orders are run, and must
agree to the last bit. Registers and shared memory are arrays here.
"""

import pytest
import torch
import warp as wp
from cases import assert_close, make_net, make_states
from warp_sims.bridge.passes.fused import pack
from warp_sims.kernels.policy.layout import BLOCK, Column
from warp_sims.kernels.sweeps.resident import REGISTERS, load_text, make_plan, policy_text

import warp_sims as ws
from warp_sims.policies import fused_network

SERIAL = """
  #define WS_SHARED static
  #define WS_SYNC()
  #define WS_EACH_LANE for (int turn_ = 0; turn_ < THREADS; ++turn_) { \\
    const int lane = backwards ? THREADS - 1 - turn_ : turn_;
  #define WS_END }
  #define WS_KEPT(type, name, size) type name[THREADS][size]
  #define WS_MINE(name) name[lane]
  #define WS_WEIGHT(i) weights.data[lane * KEPT + (i)]
  #define WS_STATE(i) x.data[lane * STATE + (i)]
  #define owner (lane < WORLDS)
  #define WS_EXCHANGE(name, size, most) \\
    for (int bit = 1; bit < (most); bit *= 2) \\
      for (int r = 0; r < (size); ++r) { \\
        real before_[THREADS]; \\
        for (int i = 0; i < THREADS; ++i) before_[i] = name[i][r]; \\
        for (int i = 0; i < THREADS; ++i) name[i][r] += before_[i ^ bit]; }
"""

TOLERANCE = {dtype: 100 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
"""Sums of up to 450 terms are taken in another order, and a single output may be a difference of them."""

POLICIES = {
    "cartpole": (ws.CartPole(poles=4), (100, 100)),
    "odd widths": (ws.CartPole(poles=1), (33, 20, 7)),
    "several controls": (ws.GuidanceByRepulsion(2, 4), (50,)),
    "wavecnn": (ws.QuantumControl(points=32), None),
}


def serial_kernel(plan, dtype):
    """A kernel that evaluates the policy twice with one thread, as a block of `plan.threads` would."""

    @wp.func_native(f"  enum {{ KEPT = {plan.weights} }};\n{SERIAL}{load_text(plan)}")
    def load(params: wp.array(dtype=dtype), backwards: int, weights: wp.array(dtype=dtype)): ...

    copy = "  for (int i = 0; i < WORLDS * CONTROLS; ++i) controls.data[i] = us[i];\n"

    @wp.func_native(f"  enum {{ KEPT = {plan.weights} }};\n{SERIAL}{policy_text(plan)}{copy}")
    def policy(
        params: wp.array(dtype=dtype),
        x: wp.array(dtype=dtype),
        fresh: int,
        backwards: int,
        weights: wp.array(dtype=dtype),
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,
        controls: wp.array(dtype=dtype),
    ): ...

    @wp.kernel(module="unique", enable_backward=False)
    def run(
        params: wp.array(dtype=dtype),
        x_before: wp.array(dtype=dtype),
        x: wp.array(dtype=dtype),
        backwards: int,
        weights: wp.array(dtype=dtype),
        hidden: wp.array2d(dtype=dtype),
        controls: wp.array(dtype=dtype),
    ):
        load(params, backwards, weights)
        # what the first evaluation leaves in shared memory must not show in the second
        policy(params, x_before, 1, backwards, weights, hidden, wp.int64(0), controls)
        policy(params, x, 0, backwards, weights, hidden, wp.int64(0), controls)

    return run


def evaluate(plan, packed, before, x, backwards):
    wp.init()
    dtype = wp.float32 if plan.itemsize == 4 else wp.float64
    like = packed.new_empty
    weights = like(plan.threads * plan.weights).fill_(torch.nan)
    hidden = like(plan.worlds, plan.layout.row).fill_(torch.nan)
    controls = like(plan.worlds * plan.layout.control_size).fill_(torch.nan)
    arrays = [wp.from_torch(t) for t in (packed, before.reshape(-1), x.reshape(-1))]
    out = [wp.from_torch(t) for t in (weights, hidden, controls)]
    wp.launch(serial_kernel(plan, dtype), dim=1, inputs=[*arrays, backwards, *out], device="cpu")
    return hidden, controls.view(plan.worlds, -1)


@pytest.mark.parametrize("nworld", [8, 4096], ids=["a world a block", "several worlds a block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", POLICIES)
def test_text_is_the_policy(case, dtype, nworld):
    system, widths = POLICIES[case]
    if widths is None:
        net = ws.WaveCNN(system.points, 60).to(dtype)
        net.reset_parameters(seed=3)
    else:
        net = make_net(system, widths, dtype, gain=1.0)
    description = fused_network(net).description
    plan = make_plan(description, dtype.itemsize, nworld)
    assert plan is not None
    packed = pack(description, list(net.parameters()))
    x = make_states(system, plan.worlds, dtype)
    before = 3.0 * x + 1.0
    hidden, controls = evaluate(plan, packed, before, x, backwards=0)
    with torch.no_grad():
        expected = net(x)
    assert_close(controls, expected, TOLERANCE[dtype])
    assert torch.isfinite(hidden).all()
    assert torch.equal(hidden[:, : system.state_size], x)
    again = evaluate(plan, packed, before, x, backwards=1)
    assert torch.equal(again[0], hidden)
    assert torch.equal(again[1], controls)


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

"""Rollouts that recompute activations in the backward pass: the same numbers, in memory that does not grow
with the activations of all steps.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warp as wp
from cases import (
    FLOWS,
    ROADS,
    Evaluated,
    assert_close,
    describe,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
)
from warp_sims.bridge.autograd import operators
from warp_sims.bridge.passes import fused, fused_backward, sweeps
from warp_sims.bridge.passes import spec as segments
from warp_sims.bridge.passes.spec import Cotangents, LossWeights, Spec
from warp_sims.bridge.runtime.registry import prepare
from warp_sims.bridge.runtime.team import Program
from warp_sims.kernels.policy.layout import layout

import warp_sims as ws

# Of all weight gradients together, relative to their norm: they are summed in another order, and where terms
# cancel in a single parameter that shows in it alone.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}

CART = ws.CartPole(poles=2, dt=0.05)
HERD = ws.GuidanceByRepulsion(drivers=2, evaders=2)
BOX = ws.QuantumControl(points=8)
HORIZON = 11
SCHEDULE = list("RMNSRRMMNNS")
DTYPES = [torch.float32, torch.float64]


def make_policy(system, dtype, seed=0):
    if system is not BOX:
        return make_net(system, dtype=dtype, seed=seed)
    net = ws.WaveCNN(8, 5, dtype=dtype)
    net.reset_parameters(seed=seed)
    return net


def weights_of(found):
    """All weight gradients behind one another."""
    named = [y.reshape(-1) for name, y in found.items() if name not in ("x0", "loss")]
    return torch.cat(named)


def assert_same(found, expected, dtype, exact=True):
    """Loss and cotangents to the last bit, weight gradients to rounding."""
    if exact:
        assert torch.equal(found["x0"], expected["x0"])
    assert torch.equal(found["loss"], expected["loss"])
    assert weights_of(expected).any()
    assert_close(weights_of(found), weights_of(expected), TOLERANCE[dtype])


OPTIONS = {
    "final": {"loss": "final"},
    "running": {"loss": "running", "control_cost": 0.3},
    "decay": {"loss": "running", "decay": 0.7, "control_cost": 0.3},
    "decay-0": {"loss": "final", "decay": 0.0},
    "window": {"loss": "running", "window": 3},
    "own-loss": {"loss": lambda states, controls: states[1:].sin().mean() + controls.square().mean()},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flow", ["R", "M", "N", "S"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("system", [CART, HERD, BOX], ids=["cart", "herd", "box"])
def test_fused(system, options, flow, dtype):
    """Random cotangents on every output; segments of one step, of some with a rest, of more than all."""
    policy, x0 = make_policy(system, dtype), 0.5 * make_states(system, 5, dtype)
    options = {"cotangents": make_cotangents(system, HORIZON, 5, dtype)} | options
    expected = gradients(system, policy, x0, HORIZON, flow, **options)
    for every in (1, 4, HORIZON, 3 * HORIZON):
        found = gradients(system, policy, x0, HORIZON, flow, checkpoint_every=every, **options)
        assert_same(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("system", [CART, HERD, BOX], ids=["cart", "herd", "box"])
@pytest.mark.parametrize("nworld", [1, 17, 70])
def test_combined(system, nworld, dtype):
    """Both fields before their comparison, which sees the sign of rounding where a component cancels."""
    policy, x0 = make_policy(system, dtype), 0.5 * make_states(system, nworld, dtype)
    options = {"horizon": HORIZON, "loss": "running", "control_cost": 0.1, "window": 4}
    expected = ws.gradient_pair(system, policy, x0, **options)
    for every in (1, 4, HORIZON):
        pair = ws.gradient_pair(system, policy, x0, checkpoint_every=every, **options)
        assert torch.equal(pair.loss, expected.loss)
        for field, like in zip(pair.flat, expected.flat):
            assert_close(field, like, TOLERANCE[dtype])
    found = [
        gradients(system, policy, x0, HORIZON, "C", loss="running", checkpoint_every=every)["x0"]
        for every in (None, 1, 4)
    ]
    assert found[0].any() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("every", [1, 4, HORIZON])
@pytest.mark.parametrize("road", ROADS)
def test_schedules_and_closed_edges(road, every):
    """A schedule has the edges of its own steps in every segment, and closed ones select: no 0 inf."""
    policy, x0 = on_road(road, make_policy(CART, torch.float64)), make_states(CART, 5)
    plain = gradients(CART, policy, x0, HORIZON, SCHEDULE, loss="running", decay=0.9)
    found = gradients(CART, policy, x0, HORIZON, SCHEDULE, loss="running", decay=0.9, checkpoint_every=every)
    assert_same(found, plain, torch.float64, exact=road == "fused")
    assert_close(found["x0"], plain["x0"], TOLERANCE[torch.float64])

    x0 = x0.requires_grad_()
    out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow="S", loss=None, checkpoint_every=every)
    adj = torch.zeros_like(out.states)
    adj[HORIZON // 2] = torch.inf
    (adj_x0,) = torch.autograd.grad(out.states, x0, adj)
    assert not adj_x0.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flow", ["R", "M", "N", "S"])
@pytest.mark.parametrize("system", [CART, HERD, BOX], ids=["cart", "herd", "box"])
def test_policies_that_torch_evaluates(system, flow, dtype):
    """Torch's products of another size round in another way, so the states' cotangents are the same to the
    last bit only where nothing of the network reaches them.
    """
    policy, x0 = Evaluated(make_policy(system, dtype)), 0.5 * make_states(system, 5, dtype)
    cotangents = make_cotangents(system, HORIZON, 5, dtype)
    options = {"loss": "running", "control_cost": 0.3, "cotangents": cotangents, "decay": 0.9}
    expected = gradients(system, policy, x0, HORIZON, flow, **options)
    for every in (1, 4, HORIZON, 3 * HORIZON):
        found = gradients(system, policy, x0, HORIZON, flow, checkpoint_every=every, **options)
        assert_same(found, expected, dtype, exact=flow in "MS" or every >= HORIZON)
        assert_close(found["x0"], expected["x0"], TOLERANCE[dtype])


def test_a_policy_that_torch_evaluates_sees_a_segment_at_a_time():
    rows = []
    policy = Evaluated(make_net(CART))
    policy.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[0]))
    out = ws.rollout(CART, policy, make_states(CART, 3), horizon=HORIZON, checkpoint_every=4)
    rows.clear()
    out.loss.backward()
    # once for parameters and states; from the last segment, the short one
    assert rows == [9, 12, 12]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("system", [CART, HERD, BOX], ids=["cart", "herd", "box"])
def test_ensembles(system, every, flow):
    """Members as they are alone, to the last bit, and as they are with kept activations."""
    nets = [make_policy(system, torch.float32, seed) for seed in range(3)]
    x0 = 0.5 * make_states(system, 15, torch.float32).view(3, 5, -1)
    options = {"horizon": HORIZON, "flow": flow, "loss": "running", "control_cost": 0.2}
    options["checkpoint_every"] = every

    def run(policy, x0):
        x0 = x0.detach().requires_grad_()
        policy.zero_grad()
        out = ws.rollout(system, policy, x0, **options)
        out.loss.sum().backward()
        return {"loss": out.loss.detach(), "x0": x0.grad} | {n: q.grad for n, q in policy.named_parameters()}

    together = run(ws.Ensemble(nets), x0)
    for k, net in enumerate(nets):
        alone = run(net, x0[k])
        assert all(torch.equal(together[name][k], y) for name, y in alone.items())
        if flow != "C":
            expected = gradients(system, net, x0[k], HORIZON, flow, loss="running", control_cost=0.2)
            assert_same(alone, expected, torch.float32)


def test_threads_change_no_bit(threads):
    policy, x0, found = make_policy(CART, torch.float32), make_states(CART, 70, torch.float32), []
    for count in (1, 2, 5):
        threads(count)
        found.append(gradients(CART, policy, x0, HORIZON, "C", loss="running", checkpoint_every=3))
    for other in found[1:]:
        assert all(torch.equal(other[name], y) for name, y in found[0].items())


@pytest.mark.parametrize("every", [None, 4])
def test_two_at_once_and_one_twice(every):
    """Segments leave nothing behind that the next backward pass would read."""
    policy, x0 = make_policy(CART, torch.float64), make_states(CART, 5)
    other = make_states(CART, 5, seed=9)
    outs = [
        ws.rollout(CART, policy, x, horizon=HORIZON, flow="R", loss="running", checkpoint_every=every)
        for x in (x0, other)
    ]
    parameters = list(policy.parameters())
    first = [torch.autograd.grad(out.loss, parameters, retain_graph=True) for out in outs]
    again = [torch.autograd.grad(out.loss, parameters) for out in reversed(outs)][::-1]
    for a, b in zip(first, again):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(first[0][0], first[1][0])


# How a rollout is cut


def test_pieces():
    for horizon in range(1, 9):
        for segment in range(1, 11):
            cut = segments.pieces(horizon, segment)
            assert [t for t0, t1 in cut[::-1] for t in range(t0, t1)] == list(range(horizon))
            assert all(0 < t1 - t0 <= segment for t0, t1 in cut)


def test_the_default_follows_from_the_size(monkeypatch):
    network, x0 = describe(6, 100, 100, 1), torch.zeros(64, 6)
    row = layout(network, 4).row
    step = 64 * row * 4
    assert segments.fused_segment(network, x0, 100) == 0
    monkeypatch.setitem(segments.STORED_BYTES, "cpu", 100 * step)
    assert segments.fused_segment(network, x0, 100) == 0
    cut = segments.fused_segment(network, x0, 10_000)
    # a thread has the rows of one block at least
    assert 1 <= cut < 10_000 and cut * step // 16 <= segments.SEGMENT_BYTES["cpu"]
    assert segments.fused_segment(network, x0.expand(2, 64, 6), 100) > 0
    # without a backward pass nothing is kept
    assert segments.fused_segment(network, x0, 100, keep=False) > 0
    assert segments.torch_segment([torch.empty(100, 6)], x0, 1, True, 100) == 100
    many = segments.torch_segment([torch.empty(100, 6)], x0, 50, True, 100_000)
    assert many >= 1 and many * 64 * 50 * 6 <= segments.POINT_ELEMENTS


def kept_bytes(out):
    """What the backward pass of a rollout holds besides states, controls and parameters."""
    saved = out.loss.grad_fn.saved_tensors
    return saved[2].numel() * saved[2].element_size()


def test_what_is_kept(monkeypatch):
    policy, x0 = make_policy(CART, torch.float32), make_states(CART, 5, torch.float32)

    def run(**options):
        return ws.rollout(CART, policy, x0, horizon=HORIZON, **options)

    assert kept_bytes(run()) > 0
    assert kept_bytes(run(checkpoint_every=HORIZON)) == 0
    monkeypatch.setitem(segments.STORED_BYTES, "cpu", 0)
    assert kept_bytes(run()) == 0
    with torch.no_grad():
        plain, recomputed = run(), run(checkpoint_every=2)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], recomputed[:3]))


def test_kept_activations_in_segments(monkeypatch):
    """A long horizon whose activations are kept is cut as well, so that a group stays in cache."""
    for system in (CART, HERD):
        policy, x0 = make_policy(system, torch.float64), 0.5 * make_states(system, 17)
        options = {"loss": "running", "cotangents": make_cotangents(system, HORIZON, 17)}
        expected = gradients(system, policy, x0, HORIZON, "R", **options)
        with monkeypatch.context() as patch:
            patch.setattr(fused_backward, "GROUP_BYTES", 0)
            patch.setitem(segments.SEGMENT_BYTES, "cpu", 3000)
            patch.setattr(fused_backward, "_backward", fused_backward.Pool(fused_backward._Backward))
            found = gradients(system, policy, x0, HORIZON, "R", **options)
            ((key, made),) = fused_backward._backward._idle.items()
            assert len(made[0].groups[0].pieces) > 2
        assert_same(found, expected, torch.float64)


@pytest.mark.parametrize("flow", ["R", "C"])
def test_groups_without_a_program(flow, threads, monkeypatch):
    """So many groups that their launches are not written down beforehand: the same bits."""
    policy, x0 = make_policy(CART, torch.float32), make_states(CART, 70, torch.float32)
    threads(2)
    found = []
    for groups in (0, fused_backward.PROGRAM_GROUPS):
        monkeypatch.setattr(fused_backward, "PROGRAM_GROUPS", groups)
        monkeypatch.setattr(fused_backward, "_backward", fused_backward.Pool(fused_backward._Backward))
        found.append(gradients(CART, policy, x0, HORIZON, flow, loss="running"))
        ((_, made),) = fused_backward._backward._idle.items()
        assert all(isinstance(t, Program) == (groups > 0) for t in made[0].waves[0][0].tasks)
    assert all(torch.equal(found[0][name], y) for name, y in found[1].items())


@pytest.mark.parametrize("every", [1, 4, HORIZON])
@pytest.mark.parametrize("system", [CART, HERD, BOX], ids=["cart", "herd", "box"])
def test_the_road_of_gpus(system, every, monkeypatch):
    """Forward sweeps and torch's products in segments, as on a GPU, against the CPU's kernels."""
    policy, x0 = make_policy(system, torch.float64), 0.5 * make_states(system, 10).view(2, 5, -1)
    ensemble = ws.Ensemble([policy, make_policy(system, torch.float64, seed=1)])
    network = ws.policies.networks.fused_network(policy).description
    weights = LossWeights(0.3, 0.6, 0.4)
    p = prepare(system.number, torch.float64, torch.device("cpu"))
    spec = Spec(system.number, "M" * HORIZON, "R" * HORIZON, 0.9, *weights)
    args = (network, list(ensemble.parameters()), x0)
    states, controls, loss, hidden, packed = operators.fused_rollout(spec, *args)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_cut", lambda p, t, k: (segments.pieces(t, k)[::-1], k))
        again = operators.fused_rollout(spec._replace(segment=every), *args)
    for one, other in zip(again[:3], (states, controls, loss)):
        assert torch.equal(one, other)
    assert again[3].shape == (2, 0, hidden.shape[-1])

    draw = torch.Generator().manual_seed(0)
    g = Cotangents(*(torch.randn(y.shape, generator=draw, dtype=y.dtype) for y in (loss, states, controls)))
    expected = fused_backward.backward(p, spec, network, packed, hidden, states, controls, g)
    common = (network, packed, again[3], states, controls, g)
    found = fused_backward.wide_backward(p, spec._replace(segment=every), *common)
    for one, other in zip(found, expected):
        assert_close(one, other, TOLERANCE[torch.float64])
    # kept activations, products in pieces that are bounded
    with monkeypatch.context() as patch:
        patch.setitem(segments.SEGMENT_BYTES, "cuda", 1)
        found = fused_backward.wide_backward(p, spec, network, packed, hidden, states, controls, g)
    for one, other in zip(found, expected):
        assert_close(one, other, TOLERANCE[torch.float64])


# Memory


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
import warp_sims as ws
from cases import on_road
torch.set_num_threads(1)
system, net = ws.CartPole(poles=2, dt=1e-4), ws.MLP(6, (64, 64), 1)
policy, x0 = on_road({road!r}, net), system.initial_states({nworld})
def run(horizon, every):
    out = ws.rollout(system, policy, x0, horizon=horizon, loss="running", checkpoint_every=every)
    out.loss.backward()
    return out
for every in (1, None):
    run(2, every)
def memory(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # what compiling took is no peak any more
before = memory("VmRSS")
out = run({horizon}, {every})
peak = memory("VmHWM")
assert all(q.grad.isfinite().all() and q.grad.any() for q in net.parameters())
print(peak - before)
"""


def peak_of(road, horizon, nworld, every):
    """Growth of a fresh process's memory [bytes] over a rollout and its backward pass."""
    tests = str(Path(__file__).parent)
    text = CHILD.format(tests=tests, road=road, horizon=horizon, nworld=nworld, every=every)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, cwd=Path(tests).parent
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_ten_thousand_steps():
    """Trajectories and what is as large as they are, with a segment on top, against all activations."""
    horizon, nworld = 10_000, 64
    activations = horizon * nworld * (16 + 64 + 64) * 4  # sections of a row padded to 64 bytes
    trajectories = horizon * nworld * (6 + 1) * 4
    kept, recomputed = (peak_of("fused", horizon, nworld, every) for every in (None, 100))
    assert kept > activations
    assert recomputed < 2 * trajectories + (16 << 20) < 0.2 * activations


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_policy_that_torch_evaluates():
    horizon, nworld = 300, 256
    activations = horizon * nworld * (64 + 64) * 4  # of each step autograd keeps what is behind each tanh
    all_at_once, in_segments = (peak_of("torch", horizon, nworld, every) for every in (None, 10))
    assert all_at_once > activations
    assert in_segments < 0.3 * all_at_once


# Transforms, tapes, bad input


@pytest.mark.parametrize("every", [None, 4])
def test_compiled(every):
    """The default follows from the shapes, which a tracer knows."""
    policy, x0 = make_policy(CART, torch.float32), make_states(CART, 5, torch.float32)

    def loss(x0):
        return ws.rollout(CART, policy, x0, horizon=HORIZON, flow="R", checkpoint_every=every).loss

    eager = torch.autograd.grad(loss(x0), list(policy.parameters()))
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(graph(x0), list(policy.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))


@pytest.mark.parametrize("road", ROADS)
def test_functional(road):
    policy, x0 = on_road(road, make_policy(CART, torch.float64)), make_states(CART, 5)

    def loss(x0):
        return ws.rollout(CART, policy, x0, horizon=HORIZON, flow="C", checkpoint_every=4).loss

    x = x0.clone().requires_grad_()
    loss(x).backward()
    with torch.no_grad():
        assert torch.equal(torch.func.grad(loss)(x0), x.grad)


@pytest.mark.parametrize("road", ROADS)
def test_recorded(road):
    policy, x0 = on_road(road, make_policy(CART, torch.float64)), make_states(CART, 5)
    cotangents = make_cotangents(CART, HORIZON, 5)
    found = []
    for every in (None, 4):
        policy.zero_grad()
        start = wp.from_torch(x0.clone(), requires_grad=True)
        tape = wp.Tape()
        states, controls = ws.record_rollout(
            tape, CART, policy, start, horizon=HORIZON, flow="R", checkpoint_every=every
        )
        tape.backward(
            grads={states: wp.from_torch(cotangents.states), controls: wp.from_torch(cotangents.controls)}
        )
        parameters = torch.cat([q.grad.reshape(-1) for q in policy.parameters()])
        found.append((wp.to_torch(start.grad).clone(), parameters))
    assert_close(found[1][0], found[0][0], TOLERANCE[torch.float64])
    assert_close(found[1][1], found[0][1], TOLERANCE[torch.float64])


@pytest.mark.parametrize("call", ["rollout", "gradient_pair", "record_rollout"])
@pytest.mark.parametrize(
    "value, error",
    [(0, ValueError), (-3, ValueError), (2.0, TypeError), ("4", TypeError), (True, TypeError)],
)
def test_bad_input(call, value, error):
    policy, x0 = make_policy(CART, torch.float64), make_states(CART, 5)
    first = (wp.Tape(),) if call == "record_rollout" else ()
    with pytest.raises(error, match=f"{call}: checkpoint_every is {value!r}.* at least 1.*leave it out"):
        getattr(ws, call)(*first, CART, policy, x0, horizon=HORIZON, checkpoint_every=value)


@pytest.mark.parametrize("road", ROADS)
def test_no_worlds(road):
    policy, x0 = on_road(road, make_policy(CART, torch.float64)), make_states(CART, 0)
    found = gradients(CART, policy, x0, HORIZON, "C", checkpoint_every=4)
    assert found["x0"].shape == (0, 6) and found["loss"] == 0
    assert not weights_of(found).any()


def test_a_loss_of_segments():
    """On a GPU the loss is taken behind the last segment, by the kernel that takes it of any trajectory."""
    p = prepare(CART.number, torch.float64, torch.device("cpu"))
    states, controls = make_states(CART, 24).view(4, 2, 3, 6), torch.randn(3, 2, 3, 1, dtype=torch.float64)
    weights = LossWeights(0.3, 0.6, 0.4)
    both = sweeps.loss(p, states, controls, weights)
    for k in range(2):
        alone = sweeps.loss(p, states[:, k].contiguous(), controls[:, k].contiguous(), weights)
        assert torch.equal(both[k], alone)

"""Rollouts and gradients of ensembles: every member as it would be alone, to the last bit, and nothing of one
in another.

The class itself, transforms and what is refused are in test_ensemble_class.py.
"""

import pytest
import torch
from cases import FLOWS, assert_close, make_net, make_states
from ensemble_cases import CART, CASES, HORIZON, TOLERANCE, assert_same_bits, backward_of, make, member_of
from warp_sims.bridge.autograd import operators
from warp_sims.bridge.passes import fused_backward, operations
from warp_sims.bridge.passes.spec import Cotangents, LossWeights, Spec
from warp_sims.bridge.passes.sweeps import adjoint
from warp_sims.bridge.runtime.launches import Pool
from warp_sims.bridge.runtime.registry import prepare
from warp_sims.kernels.policy.layout import layout

import warp_sims as ws

SCHEDULE = ["R", "M", "N", "S", "R", "M", "N"]


def assert_as_alone(system, nets, x0, **options):
    """Every member against the same policy on its own, for random cotangents on every output."""
    draw = torch.Generator().manual_seed(5)
    nworld, dtype = x0.shape[-2], x0.dtype
    shapes = [(HORIZON + 1, len(nets), nworld, system.state_size)]
    shapes += [(HORIZON, len(nets), nworld, system.control_size), (len(nets),)]
    if options.get("loss", "") is None:
        shapes.pop()
    cotangents = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes]
    found = backward_of(system, ws.Ensemble(nets), x0, cotangents, **options)
    alone = []
    for k, net in enumerate(nets):
        own = [c[:, k] if c.ndim > 1 else c[k] for c in cotangents]
        alone.append(backward_of(system, net, x0 if x0.ndim == 2 else x0[k], own, **options))
    if x0.ndim == 2:
        shared = found.pop("x0")
        assert torch.equal(shared, torch.stack([a.pop("x0") for a in alone]).sum(0))
    for k, expected in enumerate(alone):
        assert_same_bits(member_of(found, k), expected)
    return found


# Members as they are alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("case", CASES)
def test_as_alone(case, flow, dtype):
    assert_as_alone(*make(case, dtype=dtype), flow=flow, control_cost=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "final"},
        {"loss": "running", "decay": 0.7},
        {"loss": "final", "decay": 0.0, "control_cost": 0.2},
        {"loss": "running", "window": 3},
        {"loss": "final", "flow": SCHEDULE, "window": 2, "decay": 0.9, "control_cost": 0.2},
        {"loss": None},
        {"loss": lambda states, controls: states[1:].sin().mean() + controls.square().mean()},
    ],
    ids=["final", "decay", "decay-0", "window", "schedule", "no-loss", "own-loss"],
)
def test_options_as_alone(options, dtype):
    assert_as_alone(*make(dtype=dtype), **options)
    system, nets, x0 = make("herd", members=2, dtype=dtype)
    assert_as_alone(system, nets, x0[0], **options)


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("nworld", [1, 4, 9, 70])  # a short block, a whole one, both, groups of blocks
def test_sizes_as_alone(members, nworld):
    assert_as_alone(*make(members=members, nworld=nworld, dtype=torch.float32))


@pytest.mark.parametrize("flow", FLOWS)
def test_shared_states(flow):
    """The gradient of shared states is the sum of the members' own, each compared before."""
    system, nets, x0 = make()
    shared = assert_as_alone(system, nets, x0[0], flow=flow)
    repeated = assert_as_alone(system, nets, x0[:1].expand(3, -1, -1), flow=flow)
    repeated.pop("x0")
    assert_same_bits(shared, repeated)


def test_losses_of_many_worlds_as_alone():
    """Sums that are long enough for torch to order them in several ways."""
    system, _, _ = make()
    nets = [make_net(CART, (3,), torch.float32, seed) for seed in range(2)]
    x0 = make_states(system, 40_003, torch.float32)
    out = ws.rollout(system, ws.Ensemble(nets), x0, horizon=1)
    assert torch.equal(out.loss, torch.stack([ws.rollout(system, n, x0, horizon=1).loss for n in nets]))


@pytest.mark.parametrize("partial_bytes", [1, 1 << 22], ids=["waves", "one-wave"])
@pytest.mark.parametrize("nworld", [3, 17, 70])
def test_threads_and_waves_change_no_bit(nworld, partial_bytes, threads, monkeypatch):
    monkeypatch.setattr(fused_backward, "PARTIAL_BYTES", partial_bytes)
    monkeypatch.setattr(fused_backward, "_backward", Pool(fused_backward._Backward))
    system, nets, x0 = make(members=5, nworld=nworld, dtype=torch.float32)
    found = []
    for count in (1, 2, 7):
        threads(count)
        found.append(assert_as_alone(system, nets, x0))
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_waves():
    for members in range(1, 12):
        for slots in (1, 3, 8):
            for threads in (1, 2, 16):
                waves = fused_backward._waves(members, slots, fused_backward.PARTIAL_BYTES // 3 + 1, threads)
                assert sorted(k for wave in waves for k in wave) == list(range(members))
                assert len(waves[0]) == max(len(wave) for wave in waves) <= max(2, 2 * threads // slots)


def test_work_is_shared_by_threads(threads):
    """Members with one slot of gradients each still keep two threads busy."""
    threads(2)
    system, nets, x0 = make(members=4, nworld=8)
    made = []
    pool = Pool(lambda *key: made.append(fused_backward._Backward(*key)) or made[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_backward, "_backward", pool)
        assert_as_alone(system, nets, x0)
    ((team, _),) = made[0].waves
    products = [[s for s in task.steps if s.launch.name == "network_weight_grad"] for task in team.tasks]
    assert [len(steps) for steps in products] == [4, 4]


@pytest.mark.parametrize("flow", FLOWS)
def test_a_diverged_member_harms_no_other(flow):
    system, nets, x0 = make()
    with torch.no_grad():
        nets[1][-1].weight.fill_(float("nan"))
    found = assert_as_alone(system, nets, x0, flow=flow)
    assert found["loss"].isnan().tolist() == [False, True, False]
    assert found["0.weight"][[0, 2]].isfinite().all() and found["0.weight"][1].isnan().any()


def test_no_worlds():
    system, nets, x0 = make(nworld=0)
    found = assert_as_alone(system, nets, x0)
    assert torch.equal(found["loss"], torch.zeros(3, dtype=torch.float64))
    assert not found["0.weight"].any()


def test_frozen_parameters_have_no_gradient():
    system, nets, x0 = make()
    for net in nets:
        net[0].requires_grad_(False)
    ensemble = ws.Ensemble(nets)
    assert_as_alone(system, nets, x0)
    backward_of(system, ensemble, x0)
    assert dict(ensemble.named_parameters())["0.weight"].grad is None
    pair = ws.gradient_pair(system, ensemble, x0, horizon=HORIZON)
    alone = ws.gradient_pair(system, nets[2], x0[2], horizon=HORIZON)
    assert_same_bits(member_of(pair.base, 2), alone.base)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_road_of_gpus(case, flow, dtype):
    """Batched products through torch against the CPU's kernels."""
    system, nets, x0 = make(case, nworld=6, dtype=dtype)
    network = ws.policies.networks.fused_network(nets[0]).description
    stacked = list(ws.Ensemble(nets).parameters())
    weights = LossWeights(0.3, 0.0 if flow == "S" else 0.6, 0.4)
    p = prepare(system.number, dtype, torch.device("cpu"))
    base, check = ("M", "R") if flow == "C" else (flow, "")
    back = Spec(system.number, base * HORIZON, check * HORIZON, 0.9, *weights)
    states, controls, loss, hidden, packed = operators.fused_rollout(back, network, stacked, x0)
    draw = torch.Generator().manual_seed(0)
    g = Cotangents(*(torch.randn(y.shape, generator=draw, dtype=dtype) for y in (loss, states, controls)))
    expected = fused_backward.backward(p, back, network, packed, hidden, states, controls, g)

    lay = layout(network, p.itemsize)
    rows = operations.Rows(lay, packed, hidden, HORIZON, x0.shape[1])
    d, jac = operations.linearize(rows, back.network_open)
    mu, adj_x0 = adjoint(p, back, states, controls, jac, g)
    grads = operations.weight_grad(rows, d, mu, torch.from_numpy(lay.unpack))
    assert_close(grads, expected[0], TOLERANCE[dtype])
    assert_close(adj_x0, expected[1], TOLERANCE[dtype])


# The explicit pair


@pytest.mark.parametrize("loss", ["final", lambda states, controls: states[-1].square().mean()])
@pytest.mark.parametrize("shared", [False, True])
def test_pair_as_alone(loss, shared):
    system, nets, x0 = make(nworld=6)
    ensemble = ws.Ensemble(nets)
    options = {"horizon": HORIZON, "loss": loss, "control_cost": 0.1}
    pair = ws.gradient_pair(system, ensemble, x0[0] if shared else x0, **options)
    summed = None
    for part in x0.split(4, dim=1):
        own = ws.gradient_pair(system, ensemble, part[0] if shared else part, **options)
        summed = own if summed is None else summed + own
    assert pair.worlds == summed.worlds == 6
    assert_close(summed.flat, pair.flat, TOLERANCE[torch.float64])
    pair.assign(ensemble)
    for k, net in enumerate(nets):
        alone = ws.gradient_pair(system, net, x0[0 if shared else k], **options)
        for keep in ("base", "check"):
            assert_same_bits(member_of(pair.combine(keep), k), alone.combine(keep))
        assert_same_bits(member_of(pair.base, k) | {"loss": pair.loss[k]}, alone.base | {"loss": alone.loss})
        assert_same_bits(member_of(pair.check, k), alone.check)
        for name in ("cosine", "agreement", "nonfinite"):
            assert getattr(pair, name).shape == (3,)
            torch.testing.assert_close(getattr(pair, name)[k], getattr(alone, name), rtol=1e-14, atol=0)
        torch.testing.assert_close([n[k] for n in pair.norms], list(alone.norms), rtol=1e-14, atol=0)
        alone.assign(net)
        grads = {name: p.grad for name, p in ensemble.named_parameters()}
        assert_same_bits(member_of(grads, k), {name: p.grad for name, p in net.named_parameters()})


def test_pair_counts_by_member():
    """Members disagree and overflow on their own; more components than one thread of the comparison takes."""
    system, nets, x0 = make(members=3, dtype=torch.float32)
    nets = [make_net(CART, (40, 30), torch.float32, seed) for seed in range(3)]
    with torch.no_grad():
        nets[2][0].bias[0] = float("inf")
        nets[2][2].bias[0] = float("nan")
    pair = ws.gradient_pair(system, ws.Ensemble(nets), x0, horizon=HORIZON)
    alone = [ws.gradient_pair(system, net, x, horizon=HORIZON) for net, x in zip(nets, x0)]
    assert pair.nonfinite.tolist() == [int(p.nonfinite) for p in alone]
    assert pair.nonfinite[:2].tolist() == [0, 0] and pair.nonfinite[2] > 0
    torch.testing.assert_close(pair.agreement, torch.stack([p.agreement for p in alone]), equal_nan=True)
    assert len({float(p.agreement) for p in alone}) == 3


def test_pair_over_processes():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        system, nets, x0 = make()
        pair = ws.gradient_pair(system, ws.Ensemble(nets), x0, horizon=HORIZON)
        reduced = pair.all_reduce()
    finally:
        torch.distributed.destroy_process_group()
    assert reduced.worlds == 5 and reduced.loss.shape == (3,)
    assert_close(reduced.flat, pair.flat, TOLERANCE[torch.float64])
    assert_close(reduced.loss, pair.loss, TOLERANCE[torch.float64])

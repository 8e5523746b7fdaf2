"""Ensembles: every member as it would be alone, to the last bit, and nothing of one in another."""

import copy
import pickle

import pytest
import torch
from cases import FLOWS, Evaluated, assert_close, gradients, make_net, make_states
from warp_sims.bridge import fused_backward, operators, wide
from warp_sims.bridge.launches import Pool
from warp_sims.bridge.registry import prepare
from warp_sims.bridge.sweeps import Backward, Cotangents, LossWeights, adjoint
from warp_sims.kernels.layout import layout

import warp_sims as ws

# Relative to the norm of each tensor, where torch's own batched products take the place of single ones, which
# sum in another order; everything else here is equal to the last bit.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

CART = ws.CartPole(poles=2, dt=0.05)
HERD = ws.GuidanceByRepulsion(drivers=2, evaders=2)
BOX = ws.QuantumControl(points=8)
HORIZON = 7
SCHEDULE = ["R", "M", "N", "S", "R", "M", "N"]


def make_cnn(seed, dtype):
    net = ws.WaveCNN(8, 5, dtype=dtype)
    net.reset_parameters(seed=seed)
    with torch.no_grad():
        net.out.weight.mul_(4.0)
    return net


CASES = {
    "cart": (CART, lambda seed, dtype: make_net(CART, dtype=dtype, seed=seed)),
    "linear": (CART, lambda seed, dtype: make_net(CART, (), dtype=dtype, seed=seed, gain=1.0)),
    "herd": (HERD, lambda seed, dtype: make_net(HERD, (17,), dtype=dtype, seed=seed)),
    "box": (BOX, make_cnn),
}


def make(case="cart", members=3, nworld=5, dtype=torch.float64):
    """A system, the members of an ensemble, and worlds for each of them."""
    system, policy = CASES[case]
    nets = [policy(seed, dtype) for seed in range(members)]
    states = make_states(system, members * nworld, dtype) * (0.5 if system is BOX else 1.0)
    return system, nets, states.view(members, nworld, system.state_size)


def backward_of(system, policy, x0, cotangents=None, **options):
    """Everything that a rollout computes, by name, from one backward pass with these cotangents."""
    policy.zero_grad()
    x0 = x0.detach().requires_grad_()
    out = ws.rollout(system, policy, x0, **{"horizon": HORIZON, "loss": "running"} | options)
    outputs = [y for y in (out.states, out.controls, out.loss) if y is not None]
    torch.autograd.backward(outputs, cotangents or [torch.ones_like(y) for y in outputs])
    found = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    return found | {"x0": x0.grad} | dict(zip(("states", "controls", "loss"), (y.detach() for y in outputs)))


def member_of(found, k):
    """The share of a member; trajectories have time first."""
    return {name: y[:, k] if name in ("states", "controls") else y[k] for name, y in found.items()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, y in expected.items():
        assert actual[name].shape == y.shape and actual[name].dtype == y.dtype, name
        torch.testing.assert_close(
            actual[name], y, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: n + m
        )


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


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
    ((tasks, _),) = made[0].waves
    assert [len(task.args[-1]) for task in tasks] == [4, 4]


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
    network = ws.policies.fused_network(nets[0]).description
    stacked = list(ws.Ensemble(nets).parameters())
    weights = LossWeights(0.3, 0.0 if flow == "S" else 0.6, 0.4)
    p = prepare(system.number, dtype, torch.device("cpu"))
    states, controls, loss, hidden, packed = operators.fused_rollout(
        system.number, network, stacked, x0, HORIZON, *weights
    )
    base, check = ("M", "R") if flow == "C" else (flow, "")
    back = Backward(base * HORIZON, check * HORIZON, 0.9, weights)
    draw = torch.Generator().manual_seed(0)
    g = Cotangents(*(torch.randn(y.shape, generator=draw, dtype=dtype) for y in (loss, states, controls)))
    expected = fused_backward.backward(p, back, network, packed, hidden, states, controls, g)

    lay = layout(network, p.itemsize)
    rows = wide.Rows(lay, packed, hidden, HORIZON, x0.shape[1])
    d, jac = wide.linearize(rows, back.network_open)
    mu, adj_x0 = adjoint(p, back, states, controls, jac, g)
    grads = wide.weight_grad(rows, d, mu, torch.from_numpy(lay.unpack))
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


# The module


@pytest.mark.parametrize("case", CASES)
def test_controls_of_an_ensemble(case):
    _, nets, x = make(case)
    ensemble = ws.Ensemble(nets)
    expected = torch.stack([net(own) for net, own in zip(nets, x)])
    assert_close(ensemble(x), expected, TOLERANCE[torch.float64])
    assert_close(ensemble(x[0]), torch.stack([net(x[0]) for net in nets]), TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", CASES)
def test_members_come_back(case):
    _, nets, _ = make(case)
    ensemble = ws.Ensemble(nets)
    assert len(ensemble) == len(nets) == len(ensemble.members())
    assert list(ensemble.state_dict()) == list(nets[0].state_dict())
    for k, (net, member) in enumerate(zip(nets, ensemble)):
        assert type(member) is type(net)
        assert_same_bits(member.state_dict(), net.state_dict())
        assert_same_bits(ensemble[k - len(nets)].state_dict(), net.state_dict())
        assert ws.policies.fused_network(member) is not None
    tail = ensemble[1:]
    assert isinstance(tail, ws.Ensemble) and len(tail) == 2
    assert_same_bits(tail[0].state_dict(), nets[1].state_dict())


def test_copies_share_nothing():
    _, nets, _ = make()
    ensemble = ws.Ensemble(nets)
    before = {name: q.clone() for name, q in ensemble.state_dict().items()}
    with torch.no_grad():
        for policy in (*nets, *ensemble.members(), ensemble[:2]):
            for parameter in policy.parameters():
                parameter.zero_()
    assert_same_bits(ensemble.state_dict(), before)


def test_copies_of_an_ensemble():
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)
    fresh = ws.Ensemble([ws.MLP(6, (9, 7), 1) for _ in nets]).double()
    fresh.load_state_dict(ensemble.state_dict())
    expected = backward_of(system, ensemble, x0)
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble)), fresh):
        assert_same_bits(backward_of(system, other, x0), expected)
    assert ensemble.float()[0][0].weight.dtype == torch.float32


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_one_optimizer_is_many(optimizer):
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)
    together = optimizer(ensemble.parameters(), lr=1e-2)
    alone = [optimizer(net.parameters(), lr=1e-2) for net in nets]
    for _ in range(5):
        together.zero_grad()
        ws.rollout(system, ensemble, x0, horizon=HORIZON).loss.sum().backward()
        together.step()
        for net, own, x in zip(nets, alone, x0):
            own.zero_grad()
            ws.rollout(system, net, x, horizon=HORIZON).loss.backward()
            own.step()
    for member, net in zip(ensemble, nets):
        assert_close(member.state_dict(), net.state_dict(), TOLERANCE[torch.float64])


# Transforms


class Runner(torch.nn.Module):
    """A module that rolls its policy out."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, x0):
        return ws.rollout(CART, self.policy, x0, horizon=HORIZON).loss.sum()


def test_functional_gradients():
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)
    runner = Runner(ensemble)

    def loss(parameters, x):
        return torch.func.functional_call(runner, {f"policy.{n}": q for n, q in parameters.items()}, (x,))

    parameters = {name: q.detach() for name, q in ensemble.named_parameters()}
    actual, adj_x0 = torch.func.grad(loss, argnums=(0, 1))(parameters, x0)
    for k, net in enumerate(nets):
        alone = gradients(system, net, x0[k], HORIZON, "C")
        alone.pop("loss")
        assert_same_bits(member_of(actual | {"x0": adj_x0}, k), alone)


@pytest.mark.parametrize("flow", FLOWS)
def test_compiled(flow):
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)

    def loss(x):
        out = ws.rollout(system, ensemble, x, horizon=HORIZON, flow=flow)
        return (out.loss * torch.arange(1.0, 4.0)).sum() + out.states.sin().sum()

    torch._dynamo.reset()
    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        ensemble.zero_grad()
        x = x0.clone().requires_grad_()
        value = run(x)
        value.backward()
        found.append({n: p.grad for n, p in ensemble.named_parameters()} | {"x0": x.grad, "": value.detach()})
    assert_close(found[1], found[0], TOLERANCE[torch.float64])


def test_autocast():
    """A fused policy runs in the dtype of x0."""
    system, nets, x0 = make(dtype=torch.float32)
    ensemble = ws.Ensemble(nets).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ws.rollout(system, ensemble, x0, horizon=HORIZON)
    expected = ws.rollout(system, copy.deepcopy(ensemble).float(), x0, horizon=HORIZON)
    assert torch.equal(out.states, expected.states) and out.loss.dtype == torch.float32


def test_second_derivatives_raise():
    system, nets, x0 = make()
    x0.requires_grad_()
    value = ws.rollout(system, ws.Ensemble(nets), x0, horizon=HORIZON).loss.sum()
    (gradient,) = torch.autograd.grad(value, x0, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.square().sum().backward()


# What does not fit


class Own(ws.MLP):
    """A subclass may compute anything."""


@pytest.mark.parametrize(
    "policies, error, message",
    [
        (list, ValueError, "policies is empty, expected at least one"),
        (lambda: make_net(CART), TypeError, "policies is of type MLP, expected a list"),
        (lambda: iter([make_net(CART)]), TypeError, "expected a list of policies"),
        (lambda: [make_net(CART), 3], TypeError, "policy 1 is of type int"),
        (lambda: [Evaluated(make_net(CART))], TypeError, "policy 0 is of type Evaluated, expected a plain"),
        (lambda: [Own(6, (9,), 1)], TypeError, "policy 0 is of type Own"),
        (
            lambda: [ws.WaveCNN(8), ws.MLP(16, (9,), 1)],
            TypeError,
            "policy 1 is of type MLP, expected WaveCNN",
        ),
        (
            lambda: [make_net(CART), make_net(CART, (9, 8))],
            ValueError,
            "sizes mlp:6,9,8,1, expected mlp:6,9,7",
        ),
        (lambda: [ws.WaveCNN(8, 4), ws.WaveCNN(8, 5)], ValueError, "policy 1 has sizes wavecnn:16,5,1"),
        (
            lambda: [make_net(CART), make_net(CART).float()],
            TypeError,
            "is torch.float32, expected torch.float64",
        ),
        (lambda: [make_net(CART), make_net(CART).to("meta")], ValueError, "is on meta, expected cpu"),
        (
            lambda: [make_net(CART), make_net(CART).requires_grad_(False)],
            ValueError,
            "requires_grad=False, expected True like policy 0; freeze it in all",
        ),
    ],
)
def test_members_that_do_not_fit(policies, error, message):
    with pytest.raises(error, match=message):
        ws.Ensemble(policies())


def test_a_hooked_member():
    nets = [make_net(CART), make_net(CART)]
    nets[1].register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match="policy 1 is a changed MLP"):
        ws.Ensemble(nets)


@pytest.mark.parametrize("shape", [(2, 5, 6), (4, 5, 6), (3, 5, 7), (5, 7), (3, 1, 5, 6), (6,)])
def test_states_that_do_not_fit(shape):
    system, nets, _ = make()
    ensemble, x0 = ws.Ensemble(nets), torch.zeros(shape, dtype=torch.float64)
    for call in (ws.rollout, ws.gradient_pair):
        with pytest.raises(ValueError, match=r"expected \(nworld, 6\) or \(3, nworld, 6\)"):
            call(system, ensemble, x0, horizon=HORIZON)
    if shape != (3, 1, 5, 6) and shape[-1] == 6 and len(shape) == 3:
        with pytest.raises(ValueError, match=r"expected \(n, in_size\) or \(3, n, in_size\)"):
            ensemble(x0)


def test_stacked_states_of_a_single_policy():
    system, nets, x0 = make()
    with pytest.raises(ValueError, match=r"expected \(nworld, 6\) for CartPole"):
        ws.rollout(system, nets[0], x0, horizon=HORIZON)


def test_states_that_are_not_finite():
    system, nets, x0 = make()
    x0[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of 15 worlds hold NaN or infinity .world 2 of member 1"):
        ws.rollout(system, ws.Ensemble(nets), x0, horizon=HORIZON)


def test_types_and_sizes_that_do_not_fit():
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)
    with pytest.raises(TypeError, match="parameter '0.weight' is torch.float64, expected torch.float32"):
        ws.rollout(system, ensemble, x0.float(), horizon=HORIZON)
    with pytest.raises(ValueError, match="policy maps 6 inputs to 1 outputs, expected 10"):
        ws.rollout(ws.CartPole(poles=4), ensemble, torch.zeros(5, 10, dtype=x0.dtype), horizon=HORIZON)
    with pytest.raises(ValueError, match="loss returned a tensor of shape"):
        ws.rollout(system, ensemble, x0, horizon=HORIZON, loss=lambda x, u: x.mean((0, 1)))


class Louder(ws.Ensemble):
    """A subclass may compute anything."""


def hooked(nets):
    ensemble = ws.Ensemble(nets)
    ensemble.register_forward_hook(lambda *args: None)
    return ensemble


def replaced(nets):
    ensemble = ws.Ensemble(nets)
    ensemble.get_submodule("0").weight = torch.nn.Parameter(torch.zeros(2, 9, 6, dtype=torch.float64))
    return ensemble


def parametrized(nets):
    ensemble = ws.Ensemble(nets)
    torch.nn.utils.parametrizations.weight_norm(ensemble.get_submodule("0"))
    return ensemble


@pytest.mark.parametrize("change", [Louder, hooked, replaced, parametrized])
def test_changed_ensembles(change):
    system, nets, x0 = make()
    for call in (ws.rollout, ws.gradient_pair):
        with pytest.raises(TypeError, match=rf"{call.__name__}: policy is a changed Ensemble .* members\(\)"):
            call(system, change(nets), x0, horizon=HORIZON)


def test_ensembles_on_a_tape():
    wp = pytest.importorskip("warp")
    system, nets, x0 = make()
    with wp.Tape() as tape, pytest.raises(TypeError, match=r"policy is an Ensemble.*members\(\)"):
        ws.record_rollout(tape, system, ws.Ensemble(nets), x0[0], horizon=HORIZON)


@pytest.mark.parametrize(
    "index, error", [(3, IndexError), (-4, IndexError), ("0", TypeError), (True, TypeError)]
)
def test_index_that_does_not_fit(index, error):
    with pytest.raises(error, match="Ensemble: index"):
        ws.Ensemble(make()[1])[index]

"""Estimators beside the flows: clipped cotangents, decay per second, other combinations of two gradients."""

import dataclasses

import pytest
import torch
from cases import (
    FLOWS,
    ROADS,
    assert_close,
    cost_of,
    make_cotangents,
    make_net,
    make_states,
    objective_of,
    on_road,
    step_of,
)
from foreign_carts import tape_cart, torch_cart
from own_systems import Unicycle
from reference import rollout as oracle

import warp_sims as ws

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}
HORIZON, WORLDS = 12, 11
CART = ws.CartPole(poles=2, dt=0.05)
SYSTEMS = [CART, ws.GuidanceByRepulsion(2, 2), ws.QuantumControl(points=12), ws.Quadrotor(), Unicycle()]


class Clip(torch.autograd.Function):
    """Identity whose backward pass scales rows down to a norm."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx, adj):
        norm = adj.norm(dim=1, keepdim=True)
        return torch.where(norm > ctx.limit, adj * (ctx.limit / norm), adj), None


def own_loss(states, controls):
    return states[1:].square().mean() + (states[:-1, :, 0] * states[1:, :, 1]).mean()


def states_of(system, dtype=torch.float64):
    if isinstance(system, ws.Quadrotor):
        return system.initial_states(WORLDS, dtype=dtype)
    return 0.5 * make_states(system, WORLDS, dtype)


def compared(system, policy, flow, limit, *, step=None, loss=own_loss, dtype=torch.float64, **options):
    """One backward pass of the engine with cotangents on everything, and that of the oracle."""
    x0, c = states_of(system, dtype).requires_grad_(), make_cotangents(system, HORIZON, WORLDS, dtype)
    policy.zero_grad()
    out = ws.rollout(
        system, policy, x0, horizon=HORIZON, flow=flow, loss=loss, clip_cotangent=limit, **options
    )
    torch.autograd.backward((out.states, out.controls, out.loss), tuple(c))
    found = [x0.grad, *(q.grad for q in policy.parameters())]

    step = step or step_of(system)
    value = loss if callable(loss) else oracle.running(cost_of(CART))
    objective = oracle.weighted(c.states.double(), c.controls.double(), value, c.loss.double())
    options.pop("checkpoint_every", None)
    expected = oracle.gradients(
        lambda x, u: Clip.apply(step(x, u), limit), policy.double(), x0.detach().double(), flow, HORIZON,
        objective, **options,
    )  # fmt: skip
    for a, b in zip(found, [expected.x0, *expected.parameters.values()], strict=True):
        assert_close(a, b, TOLERANCE[dtype])
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: type(s).__name__)
def test_clipped_cotangents(system, road, flow):
    """Some are clipped, and some are not: the limit is near what they are."""
    policy = on_road(road, make_net(system, gain=1.0))
    once = compared(system, policy, flow, 2.0)
    assert float((once - compared(system, policy, flow, 1e9)).abs().max()) > 0.01 * float(once.abs().max())


@pytest.mark.parametrize("options", [{"decay": 0.7, "window": 5}, {"checkpoint_every": 5}], ids=str)
@pytest.mark.parametrize("flow", "RC")
def test_with_other_options(flow, options):
    compared(CART, make_net(CART), flow, 2.0, **options)
    compared(CART, make_net(CART), flow, 2.0, loss="running", **options)


def test_single_precision():
    for flow in "RM":
        compared(CART, make_net(CART, dtype=torch.float32, gain=1.0), flow, 2.0, dtype=torch.float32)


@pytest.mark.parametrize("flow", "RC")
@pytest.mark.parametrize("kind", ["torch", "tape"])
def test_foreign_systems(kind, flow):
    system = torch_cart(CART) if kind == "torch" else tape_cart(CART, WORLDS)
    compared(system, make_net(CART), flow, 2.0, step=step_of(CART))


def test_a_wrong_gradient_of_a_clipped_simulator_is_refused():
    system = ws.TorchSystem(lambda x, u: x.detach() + u, state_size=1, control_size=1)
    net, x0 = ws.MLP(1, (3,), 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="the gradient of step is wrong"):
        ws.rollout(system, net, x0, horizon=2, loss=None, clip_cotangent=1.0)


def test_what_is_not_finite_stays_so():
    x0 = make_states(CART, 3)
    net = make_net(CART)
    for value in (torch.nan, torch.inf):
        out = ws.rollout(CART, net, x0, horizon=3, flow="M", loss=None, clip_cotangent=1.0)
        net.zero_grad()
        adj = torch.zeros_like(out.states)
        adj[3, 1, 1] = value
        out.states.backward(adj)
        assert not torch.isfinite(net[0].weight.grad).all()


def test_decay_per_second():
    x0, found = make_states(CART, 3), {}
    for name, decay in (("step", 0.3**CART.dt), ("second", ws.PerSecond(0.3))):
        net = make_net(CART)
        ws.rollout(CART, net, x0, horizon=9, flow="M", loss="running", decay=decay).loss.backward()
        pair = ws.gradient_pair(CART, net, x0, horizon=9, loss="running", decay=decay)
        found[name] = [*(q.grad for q in net.parameters()), pair.flat]
    assert all(torch.equal(a, b) for a, b in zip(found["step"], found["second"], strict=True))
    # half the time step, as much a second
    fine = ws.CartPole(poles=2, dt=0.025)
    assert ws.PerSecond(0.3).factor ** (2 * fine.dt) == pytest.approx(0.3**CART.dt)
    with pytest.raises(ValueError, match="TorchSystem does not say how long a step is"):
        ws.rollout(torch_cart(CART), make_net(CART), x0, horizon=2, decay=ws.PerSecond(0.5))
    with pytest.raises(ValueError, match="PerSecond: decay is 1.5"):
        ws.PerSecond(1.5)


def pair_of(system=CART):
    return ws.gradient_pair(system, make_net(system), make_states(system, 5), horizon=HORIZON, loss="running")


def flat(named):
    return torch.cat([g.flatten() for g in named.values()])


def test_combiners():
    pair = pair_of()
    base, check = pair.flat
    for weight in (0.0, 0.3, 1.0):
        found = flat(pair.combine(combiner=ws.Blend(weight)))
        assert_close(found, (1 - weight) * base + weight * check, 1e-14)
    assert torch.equal(flat(pair.combine(combiner=lambda q: q[1])), check)
    # as the published combination, written as a combiner
    again = pair.combine(combiner=lambda q: oracle.combine(q[0], q[1]))
    assert torch.equal(flat(again), flat(pair.combine()))
    policy = make_net(CART)
    pair.assign(policy, combiner=ws.Blend(0.5))
    assert_close(torch.cat([q.grad.flatten() for q in policy.parameters()]), 0.5 * (base + check), 1e-14)
    with pytest.raises(ValueError, match=r"combiner returned \(\) for gradients of shape \(2, "):
        pair.combine(combiner=lambda q: q.sum())


def test_projection_of_conflicting_gradients():
    """Along neither does the result lead backwards; without a conflict it is the mean."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        pair = torch.randn(2, 9, generator=draw, dtype=torch.float64)
        found = ws.project_conflicting(pair)
        if torch.dot(*pair) >= 0:
            assert_close(found, pair.mean(0), 1e-14)
        else:
            parts = [q - torch.dot(q, o) / torch.dot(o, o) * o for q, o in (pair, pair.flip(0))]
            assert_close(found, 0.5 * (parts[0] + parts[1]), 1e-13)
            assert all(torch.dot(found, q) > -1e-12 for q in pair)
    assert ws.project_conflicting(torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_aggregators_of_torchjd(dtype):
    aggregation = pytest.importorskip("torchjd.aggregation")
    policy, x0 = make_net(CART, dtype=dtype), make_states(CART, WORLDS, dtype)
    pair = ws.gradient_pair(CART, policy, x0, horizon=HORIZON, loss=own_loss)
    base, check = pair.flat
    # gradients that point against each other
    pair = dataclasses.replace(pair, flat=torch.stack((base, check - 2.0 * base)))
    assert torch.dot(*pair.flat) < 0.0
    halved = {name: 0.5 * grad for name, grad in pair.combine(combiner=aggregation.PCGrad()).items()}
    assert_close(halved, pair.combine(combiner=ws.project_conflicting), TOLERANCE[dtype])
    assert_close(
        pair.combine(combiner=aggregation.Mean()), pair.combine(combiner=ws.Blend(0.5)), TOLERANCE[dtype]
    )
    pair.assign(policy, combiner=aggregation.MGDA())
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in policy.parameters())


def test_combiners_of_an_ensemble():
    nets = [make_net(CART, seed=seed) for seed in (1, 2)]
    options = {"horizon": HORIZON, "loss": "running"}
    x0 = make_states(CART, 5)
    both = ws.gradient_pair(CART, ws.Ensemble(nets), x0, **options).combine(combiner=ws.project_conflicting)
    for i, net in enumerate(nets):
        alone = ws.gradient_pair(CART, net, x0, **options).combine(combiner=ws.project_conflicting)
        for a, b in zip(both.values(), alone.values(), strict=True):
            assert_close(a[i], b, 1e-11)


def test_regular_to_modified_over_a_training():
    """Annealing: a weight that changes from update to update."""
    policy, x0 = make_net(CART, gain=0.1), make_states(CART, 8)
    optimizer, blend = torch.optim.Adam(policy.parameters(), lr=1e-2), ws.Blend(1.0)
    losses = []
    for update in range(30):
        blend.weight = 1.0 - update / 29
        pair = ws.gradient_pair(CART, policy, x0, horizon=20, loss="running", clip_cotangent=10.0)
        pair.assign(policy, combiner=blend)
        optimizer.step()
        losses.append(float(pair.loss))
    assert losses[-1] < losses[0]
    assert objective_of(CART, "running") is not None


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"clip_cotangent": 0.0}, ValueError, "clip_cotangent is 0.0, expected a finite number above 0"),
        ({"clip_cotangent": "1"}, TypeError, "clip_cotangent is '1'"),
        ({"decay": "half"}, TypeError, "decay is 'half'"),
    ],
)
def test_what_does_not_fit(options, error, words):
    given = {"system": CART} | options
    system = given.pop("system")
    with pytest.raises(error, match=f"rollout: {words}|rollout: .*{words}"):
        ws.rollout(system, make_net(system), make_states(system, 3), horizon=3, **given)

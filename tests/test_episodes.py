"""`resets=`: worlds that end and begin again inside a rollout, against autograd through the loop."""

import dataclasses

import pytest
import torch
from cases import FLOWS, SEED, assert_close, cost_of, make_cotangents, make_net, make_states, on_road, step_of
from foreign_carts import tape_cart, torch_cart
from own_systems import Pendulum, Unicycle
from reference import rollout as oracle

import warp_sims as ws

TOLERANCE = 1e-11
HORIZON, WORLDS = 13, 11
CART = ws.CartPole(poles=2, dt=0.05)
WAVE = ws.QuantumControl(points=4)


def far(x):
    """Some worlds now and then: for the cart those that are fast."""
    return x[:, 1].abs() > 1.5


def fresh_of(system):
    draw = torch.Generator().manual_seed(SEED + 9)
    return 0.5 * torch.randn(HORIZON, WORLDS, system.state_size, generator=draw, dtype=torch.float64)


def unrolled(step, policy, x0, edges, decay, fresh, done, limit, ages):
    """states, next_states, controls and ends by torch, closed where edges are and where worlds end."""
    states, led, controls, ends, age = [x0], [], [], [], ages
    for t, edge in enumerate(edges):
        x = states[-1]
        u = policy(x if edge.network else x.detach())
        y = step(oracle._gate(x, edge.physics, decay), u)
        age = age + 1
        over = done(y)
        over = over | (age >= limit) if limit else over
        age = torch.where(over, 0, age)
        states.append(torch.where(over[:, None], fresh[t], y))
        led.append(y)
        controls.append(u)
        ends.append(over)
    return torch.stack(states), torch.stack(led), torch.stack(controls), torch.stack(ends)


def own_loss(states, controls):
    return states[1:].square().mean() + (states[:-1, :, 0] * states[1:, :, 1]).mean()


def compared(system, policy, flow, loss, *, step=None, cost=None, limit=None, ages=None, **options):
    """One backward pass with cotangents on all outputs at once."""
    step = step or step_of(system)
    draw = torch.Generator().manual_seed(SEED)
    x0, fresh = make_states(CART if system.state_size == 6 else system, WORLDS), fresh_of(system)
    c = make_cotangents(system, HORIZON, WORLDS)
    adj_next = torch.randn(HORIZON, *x0.shape, generator=draw, dtype=torch.float64)
    resets = ws.Resets(fresh, done=far, limit=limit, ages=ages)
    start = x0.clone().requires_grad_()
    out = ws.rollout(system, policy, start, horizon=HORIZON, flow=flow, loss=loss, resets=resets, **options)
    parameters = [q for q in policy.parameters() if q.requires_grad]
    outputs = [(out.states, c.states), (out.controls, c.controls), (out.next_states, adj_next)]
    if loss is not None:
        outputs.append((out.loss, c.loss))
    tensors, adjoints = zip(*outputs)
    found = torch.autograd.grad(tensors, [*parameters, start], adjoints)

    def expected(letter):
        edges = oracle.schedule(letter, HORIZON, options.get("window"))
        begin = x0.clone().requires_grad_()
        living = torch.zeros(WORLDS, dtype=torch.int64) if ages is None else ages
        states, led, controls, ends = unrolled(
            step, policy, begin, edges, options.get("decay", 1.0), fresh, far, limit, living
        )
        whole = torch.cat((begin[None], led))
        total = (states * c.states).sum() + (controls * c.controls).sum() + (led * adj_next).sum()
        if loss is not None:
            value = {"final": oracle.final, "running": oracle.running}.get(loss, lambda _: loss)
            value = value(cost) if isinstance(loss, str) else loss
            value = value(whole, controls) + options.get("control_cost", 0.0) * controls.square().mean()
            total = total + c.loss * value
            assert_close(out.loss, value.detach(), 1e-12)
        assert torch.equal(out.done | out.truncated, ends)
        for a, b in ((out.states, states), (out.next_states, led), (out.controls, controls)):
            assert_close(a, b.detach(), 1e-11)
        return torch.autograd.grad(total, [*parameters, begin])

    if flow == "C":
        expected = [oracle.combine(a, b) for a, b in zip(expected("M"), expected("R"))]
    else:
        expected = expected(flow)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, TOLERANCE)
    return out


WAYS = {
    "plain": {},
    "decay and window": {"decay": 0.7, "window": 5},
    "segments": {"checkpoint_every": 4},
    "control cost": {"control_cost": 0.3},
    "limit": {"limit": 4},
    "ages": {"limit": 6, "ages": torch.arange(WORLDS) % 6},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ["fused", "torch"])
def test_gradients(road, flow, way):
    out = compared(CART, on_road(road, make_net(CART)), flow, own_loss, **WAYS[way])
    assert 3 <= int(out.done.sum()) < 100
    assert bool(out.truncated.any()) == ("limit" in WAYS[way])


@pytest.mark.parametrize("flow", "RMC")
@pytest.mark.parametrize("loss", ["final", "running", None])
def test_losses_see_where_the_steps_led(loss, flow):
    compared(CART, make_net(CART), flow, loss, cost=cost_of(CART))


@pytest.mark.parametrize("flow", "RC")
@pytest.mark.parametrize("system", [Pendulum(), Unicycle(), WAVE], ids=lambda s: type(s).__name__)
def test_other_systems(system, flow):
    """Of the wave, whose form in lanes reads where a step led, too."""
    compared(system, make_net(system, gain=1.0), flow, own_loss)


@pytest.mark.parametrize("flow", "RC")
@pytest.mark.parametrize("kind", ["torch", "rows mix", "tape"])
def test_foreign_systems(kind, flow):
    system = {
        "torch": lambda: torch_cart(CART),
        "rows mix": lambda: torch_cart(CART, rowwise=False),
        "tape": lambda: tape_cart(CART, WORLDS),
    }[kind]()
    for loss in (own_loss, "running"):
        compared(system, make_net(CART), flow, loss, step=step_of(CART), cost=cost_of(CART))


def test_without_an_end_it_is_the_ordinary_rollout():
    net, x0 = make_net(CART), make_states(CART, WORLDS)
    resets = ws.Resets(fresh_of(CART))
    found = {}
    for name, options in (("episodes", {"resets": resets}), ("plain", {})):
        net.zero_grad()
        out = ws.rollout(CART, net, x0, horizon=HORIZON, loss="running", control_cost=0.1, **options)
        out.loss.backward()
        found[name] = [out.states.detach(), out.loss.detach(), *(q.grad for q in net.parameters())]
    for a, b in zip(found["episodes"], found["plain"], strict=True):
        assert_close(a, b, 1e-12)


@dataclasses.dataclass(frozen=True)
class Fragile(Pendulum):
    def done(self, x):
        return x[:, 0] > 1.0


def test_an_end_of_the_system_and_ages_that_go_on():
    """Two rollouts one behind the other are one of twice the length."""
    system = Fragile()
    net, x0 = make_net(system), make_states(system, WORLDS)
    resets = ws.Resets(torch.zeros(WORLDS, 2, dtype=torch.float64), limit=5)
    whole = ws.rollout(system, net, x0, horizon=14, loss=None, resets=resets)
    first = ws.rollout(system, net, x0, horizon=7, loss=None, resets=resets)
    second = ws.rollout(
        system, net, first.states[-1], horizon=7, loss=None,
        resets=dataclasses.replace(resets, ages=first.ages),
    )  # fmt: skip
    assert bool(whole.done.any()) and bool(whole.truncated.any())
    for name in ("done", "truncated", "next_states"):
        both = torch.cat((getattr(first, name), getattr(second, name)))
        assert torch.equal(both, getattr(whole, name)), name
    assert torch.equal(second.ages, whole.ages) and torch.equal(second.states[-1], whole.states[-1])


def exploding(x, u):
    """One that overflows beyond 2, with an infinite derivative there."""
    return torch.cat((x[:, :1] + 0.1 * x[:, 1:], x[:, 1:] + 0.1 * u + torch.exp(1e3 * (x[:, :1] - 2.0))), 1)


def test_worlds_that_diverge_and_are_masked_leave_the_others_alone():
    system = ws.TorchSystem(exploding, state_size=2, control_size=1)
    x0 = torch.tensor([[0.1, 0.2], [1.9, 9.0], [0.3, -0.1]], dtype=torch.float64)
    net = ws.MLP(2, (7,), 1, dtype=torch.float64)
    net.reset_parameters(seed=1)
    fresh = torch.zeros(3, 2, dtype=torch.float64)

    def masked(states, controls):
        finite = torch.isfinite(states).all(-1, keepdim=True)
        return torch.where(finite, states, 0.0).square().sum()

    for flow in FLOWS:
        net.zero_grad()
        out = ws.rollout(system, net, x0, horizon=8, flow=flow, loss=masked, resets=ws.Resets(fresh))
        assert out.done.sum() >= 1 and not torch.isfinite(out.next_states).all()
        out.loss.backward()
        found = torch.cat([q.grad.flatten() for q in net.parameters()])
        assert bool(torch.isfinite(found).all()) and bool((found != 0).any())
    # every other step's share is as it would be: the diverged step alone is left out
    net.zero_grad()
    out = ws.rollout(system, net, x0, horizon=8, flow="M", loss=masked, resets=ws.Resets(fresh))
    out.loss.backward()
    found = [q.grad.clone() for q in net.parameters()]
    x, total = x0, 0.0
    lost = ~torch.isfinite(out.next_states).all(-1)
    total = masked(x, None)
    for t in range(8):
        safe = torch.where(lost[t][:, None], 0.0, x)
        y = exploding(safe, net(safe.detach()))
        total = total + torch.where(lost[t][:, None], 0.0, y).square().sum()
        over = out.done[t][:, None]
        x = torch.where(over, fresh, y)
    for a, b in zip(found, torch.autograd.grad(total, list(net.parameters())), strict=True):
        assert_close(a, b, 1e-12)


def test_what_is_not_masked_is_nan():
    system = ws.TorchSystem(exploding, state_size=2, control_size=1)
    x0 = torch.tensor([[0.1, 0.2], [1.9, 9.0]], dtype=torch.float64)
    net = ws.MLP(2, (7,), 1, dtype=torch.float64)
    out = ws.rollout(system, net, x0, horizon=8, flow="R", loss=None, resets=ws.Resets(torch.zeros_like(x0)))
    out.next_states.sum().backward()
    assert all(bool(q.grad.isnan().any()) for q in net.parameters())


def test_numbers_of_the_physics():
    net, x0, fresh = make_net(CART), make_states(CART, WORLDS), fresh_of(CART)
    masses = torch.full((WORLDS,), 0.2, dtype=torch.float64, requires_grad=True)
    out = ws.rollout(
        CART, net, x0, horizon=HORIZON, flow="R", loss=own_loss,
        resets=ws.Resets(fresh, done=far), parameters={"pole_mass": masses},
    )  # fmt: skip
    (found,) = torch.autograd.grad(out.loss, masses)
    eps = 1e-6
    for world in (0, 4):
        values = []
        for sign in (1, -1):
            moved = masses.detach().clone()
            moved[world] += sign * eps
            again = ws.rollout(
                CART, net, x0, horizon=HORIZON, loss=own_loss,
                resets=ws.Resets(fresh, done=far), parameters={"pole_mass": moved},
            )  # fmt: skip
            assert torch.equal(again.done, out.done)
            values.append(again.loss.detach())
        assert_close(found[world], (values[0] - values[1]) / (2 * eps), 1e-6)


@pytest.mark.parametrize(
    "resets, error, words",
    [
        (3, TypeError, "resets is of type int, expected a warp_sims.Resets"),
        (ws.Resets(torch.zeros(3, 6)), ValueError, r"resets.fresh has shape \(3, 6\), expected"),
        (ws.Resets(torch.zeros(WORLDS, 6)), TypeError, "resets.fresh is torch.float32"),
        (ws.Resets(torch.full((WORLDS, 6), torch.nan).double()), ValueError, "holds NaN"),
        (ws.Resets(torch.zeros(WORLDS, 6).double(), done=torch.sin), ValueError, "returned torch.float64"),
        (ws.Resets(torch.zeros(WORLDS, 6).double(), done=3), TypeError, "resets.done is 3"),
        (ws.Resets(torch.zeros(WORLDS, 6).double(), limit=0), ValueError, "limit is 0, expected at least 1"),
        (ws.Resets(torch.zeros(WORLDS, 6).double(), limit=1.5), TypeError, "limit is 1.5"),
        (ws.Resets(torch.zeros(WORLDS, 6).double(), ages=torch.zeros(2)), TypeError, "ages is torch.float32"),
    ],
)  # fmt: skip
def test_what_does_not_fit(resets, error, words):
    net, x0 = make_net(CART), make_states(CART, WORLDS)
    with pytest.raises(error, match=f"rollout: .*{words}"):
        ws.rollout(CART, net, x0, horizon=3, resets=resets)


def test_an_ensemble_is_refused():
    net, x0 = ws.Ensemble([make_net(CART)]), make_states(CART, WORLDS)
    with pytest.raises(ValueError, match="resets for an Ensemble"):
        ws.rollout(CART, net, x0, horizon=3, resets=ws.Resets(x0))

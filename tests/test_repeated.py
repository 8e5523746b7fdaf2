"""`ws.repeat`: a control that is held for several steps, against the step applied as often."""

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
    on_road,
    step_of,
)
from foreign_carts import tape_cart, torch_cart
from own_systems import Pendulum, Unicycle
from reference import rollout as oracle
from test_generated_adjoints import Bare
from test_parameters import cart_step, expected_numbers, found_numbers, numbers_of

import warp_sims as ws

TOLERANCE = 1e-11
CART = ws.CartPole(poles=2, dt=0.02)
HORIZON, WORLDS, TIMES = 12, 11, 3


def held(step, times=TIMES):
    def several(x, u, **numbers):
        for _ in range(times):
            x = step(x, u, **numbers)
        return x

    return several


def own_loss(states, controls):
    return states[1:].square().mean() + (states[:-1, :, 0] * states[1:, :, 1]).mean()


def compared(own, policy, flow, *, step, loss=own_loss, **options):
    system = ws.repeat(own, TIMES)
    x0, c = make_states(own, WORLDS).requires_grad_(), make_cotangents(own, HORIZON, WORLDS)
    policy.zero_grad()
    out = ws.rollout(system, policy, x0, horizon=HORIZON, flow=flow, loss=loss, **options)
    torch.autograd.backward((out.states, out.controls, out.loss), tuple(c))
    value = loss if callable(loss) else oracle.running(cost_of(CART))
    objective = oracle.weighted(c.states, c.controls, value, c.loss)
    options.pop("checkpoint_every", None)
    expected = oracle.gradients(held(step), policy, x0.detach(), flow, HORIZON, objective, **options)
    found = [x0.grad, *(q.grad for q in policy.parameters())]
    for a, b in zip(found, [expected.x0, *expected.parameters.values()], strict=True):
        assert_close(a, b, TOLERANCE)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    "own", [CART, Pendulum(), Unicycle(), ws.QuantumControl(points=5)], ids=lambda s: type(s).__name__
)
def test_gradients(own, road, flow):
    compared(own, on_road(road, make_net(own, gain=1.0)), flow, step=step_of(own))


@pytest.mark.parametrize("flow", "RC")
def test_options_apply_where_the_policy_looks(flow):
    options = {"decay": 0.7, "window": 5, "checkpoint_every": 4}
    compared(CART, make_net(CART), flow, step=step_of(CART), loss="running", **options)


@pytest.mark.parametrize("flow", "RC")
@pytest.mark.parametrize("kind", ["torch", "rows mix", "tape"])
def test_foreign_systems(kind, flow):
    own = tape_cart(CART, WORLDS) if kind == "tape" else torch_cart(CART, rowwise=kind == "torch")
    compared(own, make_net(CART), flow, step=step_of(CART), loss="running")


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kind", ["one", "each"])
def test_parameters(kind, flow):
    numbers, net = numbers_of(CART, ("dt", "pole_mass", "pole_length"), kind), make_net(CART, gain=1.0)
    c, x0 = make_cotangents(CART, HORIZON, WORLDS), make_states(CART, WORLDS)
    found, _ = found_numbers(ws.repeat(CART, TIMES), net, x0, flow, own_loss, c, numbers)
    objective = oracle.weighted(c.states, c.controls, own_loss, c.loss)

    def step(x, u, **given):
        return held(lambda x, u, **q: cart_step(x, u, **q))(x, u, **given)

    expected = expected_numbers(step, net, x0, flow, objective, numbers)
    assert_close(found, expected, TOLERANCE)


def test_as_many_small_steps():
    x0, u = make_states(CART, 3), make_cotangents(CART, 4, 3).controls
    slow = ws.simulate(ws.repeat(CART, 5), x0, u)
    assert_close(slow, ws.simulate(CART, x0, u.repeat_interleave(5, 0))[::5], 1e-13)
    assert ws.repeat(CART, 1) is CART and ws.repeat(CART, 5) == ws.repeat(CART, 5)
    assert ws.repeat(CART, 5).dt == pytest.approx(0.1)
    assert torch.equal(ws.repeat(CART, 5).initial_states(4), CART.initial_states(4))


def test_the_whole_check_passes():
    assert ws.check(ws.repeat(ws.CartPole(poles=1), 3)).agrees


@pytest.mark.parametrize(
    "system, times, error, words",
    [
        (CART, 0, ValueError, "times is 0, expected an int of at least 1"),
        (CART, 1.5, ValueError, "times is 1.5"),
        (ws.CartPole, 2, TypeError, "make an instance of it"),
    ],
)
def test_what_does_not_fit(system, times, error, words):
    with pytest.raises(error, match=f"repeat: .*{words}"):
        ws.repeat(system, times)


def test_generated_adjoints_are_refused():
    with pytest.raises(ValueError, match="repeat: the adjoint of Bare is generated"):
        ws.step(ws.repeat(Bare(), 2), torch.ones(1, 2), torch.ones(1, 1))


def test_every_of_a_rollout():
    net, x0 = make_net(CART), make_states(CART, 4)
    found = ws.rollout(CART, net, x0, horizon=5, every=TIMES)
    expected = ws.rollout(ws.repeat(CART, TIMES), net, x0, horizon=5)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3]))
    with pytest.raises(ValueError, match="repeat: times is 0"):
        ws.rollout(CART, net, x0, horizon=5, every=0)

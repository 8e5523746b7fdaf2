"""What the gates promise: exact zeros, infinities that stay where they are, rollouts that chain."""

import functools

import pytest
import torch
from cases import (
    ROADS,
    Evaluated,
    assert_close,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
)

import warp_sims as ws

# Relative to the norm of each tensor, between two ways through the same kernels that sum in another order.
TOLERANCE = {torch.float64: 1e-13}

CART = ws.CartPole(poles=2, dt=0.05)
HORIZON = 12


def test_nothing_crosses_a_closed_edge():
    """Exact zeros where every way back to x_0 crosses a closed edge."""
    x0 = make_states(CART, 3).requires_grad_()
    adj_state, adj_control = (c[-1] for c in make_cotangents(CART, HORIZON, 3)[:2])
    closing = [
        ("S", {}),
        (["S"] + ["R"] * 11, {}),
        (["R"] * 11 + ["S"], {}),
        ("R", {"window": 5}),
        ("C", {"window": 11}),
        ("M", {"decay": 0.0}),
        (["M"] * 6 + ["N"] * 6, {"decay": 0.0}),
    ]
    for road in ROADS:
        for flow, options in closing:
            policy = on_road(road, make_net(CART))
            out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow, loss=None, **options)
            out_of_reach = (out.states[-1] * adj_state).sum() + (out.controls[-1] * adj_control).sum()
            (adj_x0,) = torch.autograd.grad(out_of_reach, x0, retain_graph=True)
            assert torch.count_nonzero(adj_x0) == 0, (road, flow, options)
            # and what leaves x_0 itself does arrive
            (adj_x0,) = torch.autograd.grad(out.states[0].sum(), x0)
            assert torch.equal(adj_x0, torch.ones_like(x0))


def test_a_closed_physics_edge_alone():
    """Nothing but the network's share is left: none in the components that the network does not see."""
    net, x0 = make_net(CART), make_states(CART, 3).requires_grad_()
    with torch.no_grad():
        net[0].weight[:, [1, 4]] = 0.0
    for policy in (net, Evaluated(net)):
        out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow="N", loss=None)
        (adj_x0,) = torch.autograd.grad((out.states[-1] ** 2).sum(), x0)
        assert torch.count_nonzero(adj_x0[:, [1, 4]]) == 0
        assert torch.count_nonzero(adj_x0[:, [0, 2, 3, 5]]) == 12


def test_a_closed_network_edge_alone():
    """Nothing but the physics' share is left: the poles do not know where the cart is and how fast."""
    net, x0 = make_net(CART), make_states(CART, 3).requires_grad_()
    for policy in (net, Evaluated(net)):
        out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow="M", loss="running")
        (adj_x0,) = torch.autograd.grad(out.loss, x0)
        assert torch.count_nonzero(adj_x0[:, :2]) == 0
        assert torch.count_nonzero(adj_x0[:, 2:]) == 12


def test_stopped_sees_one_step():
    """The gradient of a loss of the last state is that of a rollout of one step from the state before."""
    net, x0 = make_net(CART), make_states(CART, 3)
    long = gradients(CART, net, x0, HORIZON, "S")
    last = ws.rollout(CART, net, x0, horizon=HORIZON).states[-2].detach()
    short = gradients(CART, net, last, 1, "S")
    del long["x0"], short["x0"]
    assert_close(long, short, TOLERANCE[x0.dtype])


@pytest.mark.parametrize(
    "flow, options",
    [
        ("S", {}),
        ("R", {"window": 6}),
        ("C", {"window": 6}),
        ("M", {"decay": 0.0}),
        (["R"] * 6 + list("SRRRRR"), {}),
    ],
)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("what", [torch.inf, -torch.inf, torch.nan])
def test_a_closed_edge_stops_infinity(what, road, flow, options):
    """It selects, it does not multiply: 0 inf would be NaN."""
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, 3).requires_grad_()
    cotangents = make_cotangents(CART, HORIZON, 3)
    found = []
    for last in (0.0, what):
        out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow, loss=None, **options)
        adj_states = cotangents.states.clone()
        adj_states[-1] = last
        (adj_x0,) = torch.autograd.grad(out.states, x0, adj_states)
        found.append(adj_x0)
    assert found[0].isfinite().all() and torch.count_nonzero(found[0])
    assert torch.equal(*found)


def test_an_open_edge_lets_infinity_through():
    net, x0 = make_net(CART), make_states(CART, 3).requires_grad_()
    out = ws.rollout(CART, net, x0, horizon=HORIZON, flow="R", loss=None)
    (adj_x0,) = torch.autograd.grad(out.states[-1].sum(), x0, torch.tensor(torch.inf, dtype=x0.dtype))
    assert not adj_x0.isfinite().any()


def test_decay_is_a_factor_and_its_ends_are_gates():
    net, x0 = make_net(CART), make_states(CART, 3)
    cotangents = make_cotangents(CART, HORIZON, 3)
    run = functools.partial(gradients, CART, net, x0, HORIZON, cotangents=cotangents)
    for open_flow, closed_flow in (("R", "N"), ("M", "S")):
        plain, none = run(open_flow), run(closed_flow)
        for name, gradient in run(open_flow, decay=1.0).items():
            assert torch.equal(gradient, plain[name])
        for name, gradient in run(open_flow, decay=0.0).items():
            assert torch.equal(gradient, none[name])


@pytest.mark.parametrize("flow", ["R", "M", "N", "S"])
@pytest.mark.parametrize("road", ROADS)
def test_short_rollouts_chain(road, flow):
    """Two of them equal one long one; C does not chain, because its comparison is not additive."""
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, 3)
    cotangents = make_cotangents(CART, HORIZON, 3)
    expected = gradients(CART, policy, x0, HORIZON, flow, loss=None, cotangents=cotangents)

    first = 5
    policy.zero_grad()
    x0 = x0.requires_grad_()
    begin = ws.rollout(CART, policy, x0, horizon=first, flow=flow, loss=None)
    end = ws.rollout(CART, policy, begin.states[-1], horizon=HORIZON - first, flow=flow, loss=None)
    states, controls = torch.cat((begin.states, end.states[1:])), torch.cat((begin.controls, end.controls))
    torch.autograd.backward((states, controls), cotangents[:2])
    actual = {name.removeprefix("net."): p.grad for name, p in policy.named_parameters()} | {"x0": x0.grad}
    assert_close(actual, expected, TOLERANCE[x0.dtype])


# Threads


@pytest.mark.parametrize("nworld", [3, 17, 257])
def test_threads_change_no_bit(nworld, threads):
    net, x0 = make_net(CART, (33,), torch.float32), make_states(CART, nworld, torch.float32)
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(gradients(CART, net, x0, HORIZON, "C", loss="running"))
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


def test_threads_change_no_bit_of_a_large_sum(threads):
    """The loss is a sum over worlds; a few, so that equality is no luck."""
    net = make_net(CART, (3,), torch.float32)
    for seed in range(5):
        x0 = make_states(CART, 100_003, torch.float32, seed)
        losses = []
        for count in (1, 2, 3, 7):
            threads(count)
            losses.append(ws.rollout(CART, net, x0, horizon=1).loss.item())
        assert len(set(losses)) == 1, losses

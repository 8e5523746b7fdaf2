"""The chain of trust for gradients.

finite differences -> torch oracle -> hand-written adjoints (float64, float32) <-> Warp's generated ones
"""

import functools

import pytest
import torch
import warp as wp
from cases import (
    FLOWS,
    ROADS,
    Evaluated,
    assert_close,
    derivatives_along,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
)
from own_systems import Pendulum, Unicycle
from reference import rollout as oracle
from warp_sims.bridge.autograd import torch_path

import warp_sims as ws

# Relative to the norm of each tensor. Both sides round at every step, and the feedback amplifies it:
# over up to 100 steps, measured 1e-13 in float64 and 1e-5 in float32.
TOLERANCE = {torch.float64: 2e-12, torch.float32: 1e-4}
# Central differences with steps of 1e-5: third derivatives and cancellation.
TOLERANCE_DIFFERENCES = 1e-7

CART = ws.CartPole(poles=2, dt=0.05)
HORIZON = 12
# Every way of closing and damping the edges, alone and together.
WAYS = {
    "regular": ("R", {}),
    "modified": ("M", {}),
    "network": ("N", {}),
    "stopped": ("S", {}),
    "combined": ("C", {}),
    "schedule": (list("RMNSSNMRRMNS"), {}),
    "alternating": (list("MN") * 6, {}),
    "regular in windows": ("R", {"window": 5}),
    "modified in windows": ("M", {"window": 4}),
    "network in windows of one step": ("N", {"window": 1}),
    "combined in windows": ("C", {"window": 4}),
    "one window": ("R", {"window": 12}),
    "regular damped": ("R", {"decay": 0.5}),
    "modified damped": ("M", {"decay": 0.5}),
    "network damped": ("N", {"decay": 0.5}),
    "combined damped": ("C", {"decay": 0.5}),
    "combined without physics": ("C", {"decay": 0.0}),
    "regular without physics": ("R", {"decay": 0.0}),
    "damped schedule in windows": (list("RRRMMMRRRNNN"), {"decay": 0.5, "window": 4}),
}
NO_COMPARISON = [name for name, (flow, _) in WAYS.items() if flow != "C"]


def own_loss(states, controls):
    return (states[1:, :, 0] * states[:-1, :, 1]).mean() + controls.sin().sum(0).square().mean()


# Finite differences


@pytest.mark.parametrize("name", NO_COMPARISON)
@pytest.mark.parametrize("road", ROADS)
def test_finite_differences(name, road):
    """Of a rollout whose closed edges read the nominal trajectory: needs no derivative of anything."""
    flow, options = WAYS[name]
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, 3)
    directions = oracle.random_directions(policy, x0, 2)
    # Parameters and x0 apart as well: a total that is right may hide two errors.
    directions += [d._replace(parameters={k: 0 * v for k, v in d.parameters.items()}) for d in directions[:1]]
    actual, expected = derivatives_along(directions, CART, policy, x0, HORIZON, flow, **options)
    assert_close(actual, expected, TOLERANCE_DIFFERENCES)


@pytest.mark.parametrize("system", [CART, Pendulum(), Unicycle()], ids=lambda s: type(s).__name__)
def test_finite_differences_in_open_loop(system):
    x0 = make_states(system, 3).requires_grad_()
    controls = make_cotangents(system, 4, 3).controls.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: ws.step(system, *args), (x0, controls[0]))
    assert torch.autograd.gradcheck(lambda *args: ws.simulate(system, *args), (x0, controls))


# The oracle, in float64


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("road", ROADS)
def test_every_way_of_closing_edges(name, road):
    """Cotangents on states, controls and loss at once."""
    flow, options = WAYS[name]
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, 3)
    everything = {"cotangents": make_cotangents(CART, HORIZON, 3), "loss": "running", "control_cost": 0.7}
    options = everything | options
    actual = gradients(CART, policy, x0, HORIZON, flow, **options)
    assert_close(actual, expected_gradients(CART, policy, x0, HORIZON, flow, **options), TOLERANCE[x0.dtype])


def test_the_ways_differ():
    """Otherwise the comparisons above would prove little."""
    net, x0 = make_net(CART), make_states(CART, 3)
    cotangents = make_cotangents(CART, HORIZON, 3)
    same = {("regular", "one window"), ("network", "regular without physics"), ("network", "network damped")}
    same |= {("network damped", "regular without physics")}
    found = {}
    for name, (flow, options) in WAYS.items():
        tensors = gradients(CART, net, x0, HORIZON, flow, cotangents=cotangents, **options)
        found[name] = torch.cat([t.flatten() for t in tensors.values()])
    for a in found:
        for b in found:
            if a != b:
                distance = torch.linalg.vector_norm(found[a] - found[b]) / torch.linalg.vector_norm(found[a])
                assert (distance < 1e-12) if (a, b) in same or (b, a) in same else (distance > 1e-4), (a, b)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    "loss, control_cost", [("final", 0.0), ("final", 0.3), ("running", 0.0), (own_loss, 0.0), (own_loss, 0.3)]
)
def test_losses(flow, road, loss, control_cost):
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, 3)
    for cotangents in (None, make_cotangents(CART, HORIZON, 3)):
        options = {"loss": loss, "control_cost": control_cost, "cotangents": cotangents}
        actual = gradients(CART, policy, x0, HORIZON, flow, **options)
        expected = expected_gradients(CART, policy, x0, HORIZON, flow, **options)
        assert_close(actual, expected, TOLERANCE[x0.dtype])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ROADS)
def test_without_a_loss(flow, road):
    """Cotangents of all outputs, and of each of them alone."""
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, 3)
    both = make_cotangents(CART, HORIZON, 3)
    for cotangents in (
        both,
        both._replace(states=torch.zeros_like(both.states)),
        both._replace(controls=torch.zeros_like(both.controls)),
    ):
        options = {"loss": None, "cotangents": cotangents}
        actual = gradients(CART, policy, x0, HORIZON, flow, **options)
        assert_close(
            actual, expected_gradients(CART, policy, x0, HORIZON, flow, **options), TOLERANCE[x0.dtype]
        )

        # what did not arrive is as good as zero
        alone = [c if c.any() else None for c in (cotangents.states, cotangents.controls)]
        x0.requires_grad_().grad = None
        policy.zero_grad()
        out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow, loss=None)
        assert out.loss is None
        kept = [(output, c) for output, c in zip(out[:2], alone, strict=True) if c is not None]
        torch.autograd.backward(*zip(*kept, strict=True))
        assert_close(x0.grad, actual["x0"], TOLERANCE[x0.dtype])
        x0 = x0.detach()


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    "nworld, horizon", [(1, 1), (1, 2), (3, 1), (3, 2), (17, 1), (17, 2), (1, 100), (17, 100)]
)
def test_sizes(nworld, horizon, road, flow):
    system = ws.CartPole(poles=2)
    policy, x0 = on_road(road, make_net(system)), make_states(system, nworld)
    options = {"loss": "running", "cotangents": make_cotangents(system, horizon, nworld)}
    actual = gradients(system, policy, x0, horizon, flow, **options)
    assert_close(
        actual, expected_gradients(system, policy, x0, horizon, flow, **options), TOLERANCE[x0.dtype]
    )


@pytest.mark.parametrize("flow", ["R", "C"])
@pytest.mark.parametrize(
    "hidden",
    [(), (1,), (7,), (33,), (100,), (1, 1), (7, 33), (33, 7), (100, 1), (33, 100, 7), (64, 16, 8)],
    ids=str,
)
def test_depths_and_widths(hidden, flow):
    for nworld in (3, 17):
        net, x0 = make_net(CART, hidden), make_states(CART, nworld)
        options = {"loss": "running", "cotangents": make_cotangents(CART, 4, nworld)}
        actual = gradients(CART, net, x0, 4, flow, **options)
        assert_close(actual, expected_gradients(CART, net, x0, 4, flow, **options), TOLERANCE[x0.dtype])


@pytest.mark.parametrize("poles", [1, 2, 3, 4, 5, 6, 7, 8])
def test_poles(poles):
    """Every number in the system differs from its default."""
    system = ws.CartPole(poles, dt=0.03, gravity=9.0, pole_mass=0.15, total_mass=1.3, pole_length=0.4)
    net, x0 = make_net(system), make_states(system, 3)
    options = {"loss": "running", "cotangents": make_cotangents(system, 5, 3)}
    for flow in "RC":
        actual = gradients(system, net, x0, 5, flow, **options)
        assert_close(actual, expected_gradients(system, net, x0, 5, flow, **options), TOLERANCE[x0.dtype])


@pytest.mark.parametrize(
    "name", ["regular", "modified", "network", "stopped", "combined", "damped schedule in windows"]
)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("system", [Pendulum(), Unicycle()], ids=lambda s: type(s).__name__)
def test_other_systems(system, road, name):
    """A user's own systems; the unicycle has two controls."""
    flow, options = WAYS[name]
    for hidden in ((), (5,), (9, 7)):
        policy, x0 = on_road(road, make_net(system, hidden)), make_states(system, 11)
        options = options | {"loss": own_loss, "cotangents": make_cotangents(system, HORIZON, 11)}
        actual = gradients(system, policy, x0, HORIZON, flow, **options)
        expected = expected_gradients(system, policy, x0, HORIZON, flow, **options)
        assert_close(actual, expected, TOLERANCE[x0.dtype])


@pytest.mark.parametrize("flow", FLOWS)
def test_tied_parameters_count_once(flow):
    """They are one component of the gradient, compared once for C."""
    net = make_net(CART, (6, 6, 6))
    net[4].weight = net[2].weight
    x0, cotangents = make_states(CART, 3), make_cotangents(CART, HORIZON, 3)
    out = ws.rollout(CART, net, x0, horizon=HORIZON, flow=flow, loss="running")
    torch.autograd.backward((out.states, out.controls, out.loss), cotangents)
    expected = expected_gradients(CART, net, x0, HORIZON, flow, loss="running", cotangents=cotangents)
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert not out.fused and "4.weight" not in found
    assert_close(found, {name: expected[name] for name in found}, TOLERANCE[x0.dtype])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("block", [1, 4, 17])
@pytest.mark.parametrize(
    "system, loss", [(Unicycle(), own_loss), (CART, own_loss), (CART, "final"), (CART, "running")], ids=str
)
def test_jacobians_in_blocks_of_worlds(system, loss, block, flow, monkeypatch):
    """A policy that torch evaluates, with Jacobians too large to be held at once."""
    policy, x0 = Evaluated(make_net(system)), make_states(system, 17)
    options = {"loss": loss, "control_cost": 0.5, "cotangents": make_cotangents(system, HORIZON, 17)}
    expected = gradients(system, policy, x0, HORIZON, flow, **options)
    elements = HORIZON * system.state_size * system.control_size
    monkeypatch.setattr(torch_path, "JACOBIAN_ELEMENTS", block * elements)
    assert_close(gradients(system, policy, x0, HORIZON, flow, **options), expected, TOLERANCE[x0.dtype])


# float32


@pytest.mark.parametrize("name", NO_COMPARISON)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    "system, horizon", [(CART, HORIZON), (ws.CartPole(poles=1), 100), (Unicycle(), HORIZON)]
)
def test_single_precision(system, horizon, road, name):
    """Against the oracle in float64, from the same rounded numbers."""
    flow, options = WAYS[name]
    if isinstance(flow, list) and horizon != HORIZON:
        flow = (flow * horizon)[:horizon]
    net, x0 = make_net(system, dtype=torch.float32), make_states(system, 3, torch.float32)
    cotangents = make_cotangents(system, horizon, 3, torch.float32)
    actual = gradients(
        system, on_road(road, net), x0, horizon, flow, loss=own_loss, cotangents=cotangents, **options
    )
    wide = type(cotangents)(*(c.double() for c in cotangents))
    expected = expected_gradients(
        system, net.double(), x0.double(), horizon, flow, loss=own_loss, cotangents=wide, **options
    )
    assert_close(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("road", ROADS)
def test_combined_in_single_precision(road):
    """The comparison is exact, whatever the rounding of the two gradients that it compares."""
    policy, x0 = on_road(road, make_net(CART, dtype=torch.float32)), make_states(CART, 3, torch.float32)
    found = {flow: gradients(CART, policy, x0, HORIZON, flow, loss="running") for flow in "RMC"}
    pair = ws.gradient_pair(CART, policy, x0, horizon=HORIZON, loss="running")
    for name in pair.base:
        ours = name.removeprefix("net.")
        assert_close(pair.base[name], found["M"][ours], TOLERANCE[torch.float32])
        assert_close(pair.check[name], found["R"][ours], TOLERANCE[torch.float32])
        assert torch.equal(found["C"][ours], oracle.combine(pair.base[name], pair.check[name]))


# Warp's generated adjoints


@functools.cache
def both_adjoints(system):
    """A kernel of step and loss, which Warp differentiates, and a kernel of the hand-written adjoints."""
    functions = system.device_functions(wp.float64)
    Params, State, Control = functions.Params, functions.State, functions.Control
    step, step_vjp, cost, cost_vjp = functions.step, functions.step_vjp, functions.loss, functions.loss_vjp
    has_cost = cost is not None

    # Warp 1.19 differentiates unrolled loops only: two poles are unrolled.
    @wp.kernel(module="unique", enable_backward=True, module_options={"max_unroll": 16})
    def forward(
        x: wp.array(dtype=State),
        u: wp.array(dtype=Control),
        p: Params,
        x_next: wp.array(dtype=State),
        costs: wp.array(dtype=wp.float64),
    ):
        i = wp.tid()
        x_next[i] = step(x[i], u[i], p)
        if wp.static(has_cost):
            costs[i] = cost(x[i], p)

    @wp.kernel(module="unique", enable_backward=False)
    def by_hand(
        x: wp.array(dtype=State),
        u: wp.array(dtype=Control),
        p: Params,
        adj_x_next: wp.array(dtype=State),
        adj_costs: wp.array(dtype=wp.float64),
        adj_x: wp.array(dtype=State),
        adj_u: wp.array(dtype=Control),
    ):
        i = wp.tid()
        through_x, through_u = step_vjp(x[i], u[i], p, adj_x_next[i])
        if wp.static(has_cost):
            through_x += cost_vjp(x[i], p, adj_costs[i])
        adj_x[i] = through_x
        adj_u[i] = through_u

    return forward, by_hand


@pytest.mark.parametrize("system", [ws.CartPole(1), CART, Pendulum(), Unicycle()], ids=str)
def test_generated_adjoints(system):
    """Of the very device functions that the sweeps call: step, and the loss where there is one."""
    functions = system.device_functions(wp.float64)
    forward, by_hand = both_adjoints(system)
    n = 17
    random = make_cotangents(system, 1, n)

    def array(tensor, dtype):
        return wp.array(tensor.numpy(), dtype=dtype, requires_grad=True, device="cpu")

    x, u = array(make_states(system, n), functions.State), array(random.controls[0], functions.Control)
    x_next, costs = array(random.states[0], functions.State), array(random.states[0, :, 0], wp.float64)
    adj_x_next, adj_costs = (
        array(random.states[1], functions.State),
        array(random.states[1, :, 0], wp.float64),
    )
    inputs = [x, u, system.parameters(wp.float64)]
    with wp.Tape() as tape:
        wp.launch(forward, dim=n, inputs=inputs, outputs=[x_next, costs], device="cpu")
    wp.copy(x_next.grad, adj_x_next)
    wp.copy(costs.grad, adj_costs)
    tape.backward()

    adj_x, adj_u = wp.full_like(x, torch.nan), wp.full_like(u, torch.nan)
    inputs += [adj_x_next, adj_costs]
    wp.launch(by_hand, dim=n, inputs=inputs, outputs=[adj_x, adj_u], device="cpu")
    for actual, expected in ((adj_x, x.grad), (adj_u, u.grad)):
        assert_close(torch.tensor(actual.numpy()), torch.tensor(expected.numpy()), TOLERANCE[torch.float64])

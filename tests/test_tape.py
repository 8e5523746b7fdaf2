"""Rollouts recorded on a Warp tape, against the same rollouts as torch operations."""

import pytest
import torch
import warp as wp
from cases import ROADS, assert_close, gradients, make_cotangents, make_net, make_states, on_road
from own_systems import Unicycle

import warp_sims as ws

# Relative to the norm of each tensor. The same kernels run; gradients that add up do so in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

CART = ws.CartPole(poles=2, dt=0.05)
HORIZON = 7
WORLDS = 3


def array_of(tensor, requires_grad=True):
    return wp.array(tensor.numpy(), requires_grad=requires_grad, device="cpu")


def tensor_of(array):
    return torch.tensor(array.numpy())


def grads_of(policy, x0):
    return {name.removeprefix("net."): p.grad for name, p in policy.named_parameters()} | {
        "x0": tensor_of(x0.grad)
    }


@wp.kernel
def weighted_square(
    states: wp.array3d(dtype=wp.float64),
    controls: wp.array3d(dtype=wp.float64),
    loss: wp.array(dtype=wp.float64),
):
    """Sum over steps and worlds of state[2]^2 x[0] and the cubed control."""
    t, i = wp.tid()
    u = controls[t, i, 0]
    x = states[t + 1, i, 2] * states[t + 1, i, 2] * states[t + 1, i, 0]
    wp.atomic_add(loss, 0, x + u * u * u)


def same_in_torch(states, controls):
    return (states[1:, :, 2].square() * states[1:, :, 0]).sum() + controls.pow(3).sum()


@pytest.mark.parametrize(
    "flow, options",
    [
        ("regular", {}),
        ("M", {}),
        (ws.Flow.NETWORK, {}),
        ("stopped", {}),
        (list("RMNSRMN"), {"window": 3, "decay": 0.5}),
        ("modified", {"decay": 0.0}),
    ],
)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("system", [CART, Unicycle()], ids=lambda s: type(s).__name__)
def test_cotangents_of_states_and_controls(system, road, flow, options):
    for dtype in (torch.float64, torch.float32):
        policy = on_road(road, make_net(system, dtype=dtype))
        x0, c = make_states(system, WORLDS, dtype), make_cotangents(system, HORIZON, WORLDS, dtype)
        expected = gradients(system, policy, x0, HORIZON, flow, loss=None, cotangents=c, **options)
        trajectory = ws.rollout(system, policy, x0, horizon=HORIZON, flow=flow, loss=None, **options)

        policy.zero_grad()
        start = array_of(x0)
        with wp.Tape() as tape:
            states, controls = ws.record_rollout(
                tape, system, policy, start, horizon=HORIZON, flow=flow, **options
            )
        assert torch.equal(tensor_of(states), trajectory.states.detach())
        assert torch.equal(tensor_of(controls), trajectory.controls.detach())
        states.grad.assign(c.states.numpy())
        controls.grad.assign(c.controls.numpy())
        tape.backward()
        assert_close(grads_of(policy, start), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("flow", ["R", "M", "N", "S"])
@pytest.mark.parametrize("road", ROADS)
def test_a_loss_of_warps_own(road, flow):
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, WORLDS)
    expected = gradients(CART, policy, x0, HORIZON, flow, loss=same_in_torch)
    policy.zero_grad()
    start, loss = array_of(x0), wp.zeros(1, dtype=wp.float64, requires_grad=True, device="cpu")
    with wp.Tape() as tape:
        states, controls = ws.record_rollout(tape, CART, policy, start, horizon=HORIZON, flow=flow)
        wp.launch(
            weighted_square,
            dim=(HORIZON, WORLDS),
            inputs=[states, controls],
            outputs=[loss],
            device="cpu",
        )
    tape.backward(loss)
    assert_close(grads_of(policy, start) | {"loss": tensor_of(loss)[0]}, expected, TOLERANCE[x0.dtype])


@pytest.mark.parametrize("road", ROADS)
def test_something_before_the_rollout(road):
    """The cotangent of x0 goes on to what made x0."""
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, WORLDS)
    c = make_cotangents(CART, HORIZON, WORLDS)
    expected = gradients(CART, policy, 3.0 * x0, HORIZON, "R", loss=None, cotangents=c)

    before, start = array_of(x0), array_of(torch.zeros_like(x0))
    with wp.Tape() as tape:
        wp.launch(triple, dim=x0.shape, inputs=[before], outputs=[start], device="cpu")
        states, controls = ws.record_rollout(tape, CART, policy, start, horizon=HORIZON, flow="R")
    states.grad.assign(c.states.numpy())
    controls.grad.assign(c.controls.numpy())
    tape.backward()
    assert_close(tensor_of(before.grad), 3.0 * expected["x0"], TOLERANCE[x0.dtype])


@wp.kernel
def triple(x: wp.array2d(dtype=wp.float64), y: wp.array2d(dtype=wp.float64)):
    i, j = wp.tid()
    y[i, j] = wp.float64(3.0) * x[i, j]


@pytest.mark.parametrize("road", ROADS)
def test_gradients_accumulate_until_they_are_cleared(road):
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, WORLDS)
    c = make_cotangents(CART, HORIZON, WORLDS)
    once = gradients(CART, policy, x0, HORIZON, "M", loss=None, cotangents=c)
    twice = {name: 2.0 * gradient for name, gradient in once.items()}

    policy.zero_grad()
    start = array_of(x0)
    with wp.Tape() as tape:
        states, controls = ws.record_rollout(tape, CART, policy, start, horizon=HORIZON, flow="M")

    def backward():
        states.grad.assign(c.states.numpy())
        controls.grad.assign(c.controls.numpy())
        tape.backward()

    backward()
    backward()
    assert_close(grads_of(policy, start), twice, TOLERANCE[x0.dtype])
    tape.zero()
    for array in (states, controls, start):
        assert not array.grad.numpy().any()
    policy.zero_grad()
    backward()
    assert_close(grads_of(policy, start), once, TOLERANCE[x0.dtype])


def test_two_rollouts_on_one_tape():
    nets, x0 = [make_net(CART, seed=seed) for seed in (3, 4)], make_states(CART, WORLDS)
    c = make_cotangents(CART, HORIZON, WORLDS)
    expected = [gradients(CART, net, x0, HORIZON, "R", loss=None, cotangents=c) for net in nets]
    starts = [array_of(x0) for _ in nets]
    for net in nets:
        net.zero_grad()
    with wp.Tape() as tape:
        recorded = [
            ws.record_rollout(tape, CART, net, start, horizon=HORIZON, flow="R")
            for net, start in zip(nets, starts, strict=True)
        ]
    for states, controls in recorded:
        states.grad.assign(c.states.numpy())
        controls.grad.assign(c.controls.numpy())
    tape.backward()
    for net, start, one in zip(nets, starts, expected, strict=True):
        assert_close(grads_of(net, start), one, TOLERANCE[x0.dtype])


@pytest.mark.parametrize("road", ROADS)
def test_frozen_parameters_and_x0_without_gradient(road):
    policy, x0 = on_road(road, make_net(CART)), make_states(CART, WORLDS)
    frozen = next(policy.parameters()).requires_grad_(False)
    for start in (x0, array_of(x0, requires_grad=False)):
        with wp.Tape() as tape:
            states, _ = ws.record_rollout(tape, CART, policy, start, horizon=HORIZON)
        states.grad.fill_(1.0)
        tape.backward()
        assert frozen.grad is None
        assert all(p.grad is not None for p in policy.parameters() if p is not frozen)


def test_a_strided_x0():
    net, x0 = make_net(CART), make_states(CART, 2 * WORLDS)
    c = make_cotangents(CART, HORIZON, WORLDS)
    expected = gradients(CART, net, x0[::2], HORIZON, "R", loss=None, cotangents=c)
    whole = array_of(x0)
    with wp.Tape() as tape:
        states, controls = ws.record_rollout(tape, CART, net, whole[::2], horizon=HORIZON, flow="R")
    states.grad.assign(c.states.numpy())
    controls.grad.assign(c.controls.numpy())
    tape.backward()
    found = tensor_of(whole.grad)
    assert_close(found[::2], expected["x0"], TOLERANCE[x0.dtype])
    assert not found[1::2].any()


def test_combined_is_refused():
    net, x0 = make_net(CART), array_of(make_states(CART, WORLDS))
    for flow in ("combined", "C", ws.Flow.COMBINED):
        tape = wp.Tape()
        with pytest.raises(ValueError, match="record_rollout: flow is 'combined'.*use gradient_pair"):
            ws.record_rollout(tape, CART, net, x0, horizon=HORIZON, flow=flow)
        assert not tape.launches


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tape": None}, TypeError, "tape is of type NoneType, expected a warp.Tape"),
        ({"x0": wp.zeros((3, 6), dtype=wp.float16, device="cpu")}, TypeError, "float16.*float32 or float64"),
        ({"x0": wp.zeros(3, dtype=wp.float32, device="cpu")}, TypeError, "1 dimensions.*expected 2"),
        ({"x0": wp.zeros((3, 5), dtype=wp.float64, device="cpu")}, ValueError, r"shape \(3, 5\), expected"),
        ({"x0": wp.zeros((3, 6), dtype=wp.float32, device="cpu")}, TypeError, "parameter.*float64.*float32"),
        ({"x0": [[0.0] * 6]}, TypeError, "x0 is of type list, expected a tensor"),
        ({"horizon": 0}, ValueError, "horizon is 0, expected at least 1"),
        ({"decay": 2.0}, ValueError, r"decay is 2.0, expected a number in \[0, 1\]"),
        ({"window": 0}, ValueError, "window is 0, expected at least 1"),
        ({"policy": make_net(Unicycle())}, ValueError, "3 inputs to 2 outputs, expected 6"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"tape": wp.Tape(), "system": CART, "policy": make_net(CART), "horizon": HORIZON}
    arguments |= {"x0": array_of(make_states(CART, WORLDS))} | change
    with pytest.raises(error, match=message):
        ws.record_rollout(**arguments)

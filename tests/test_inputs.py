"""`inputs=`: what a policy is given beside the states, and the stochastic policy that is made of it."""

import pytest
import torch
import warp as wp
from cases import assert_close, cost_of, make_net, make_states, step_of
from foreign_carts import torch_cart
from torch import nn

import warp_sims as ws

CART = ws.CartPole(poles=1)
HORIZON, WORLDS = 7, 5
TOLERANCE = 1e-12


class Tracker(nn.Module):
    """Controls from states and a reference of two numbers."""

    def __init__(self):
        super().__init__()
        self.net = make_net(CART, gain=1.0)
        self.gain = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def forward(self, x, reference):
        return torch.tanh(self.net(x)) + (reference * self.gain * x[:, :2]).sum(1, keepdim=True)


def by_loop(policy, x0, inputs, flow):
    """Gradients of the final loss, by autograd through the loop."""
    x = x0
    for given in inputs:
        x = step_of(CART)(x, policy(x if flow == "R" else x.detach(), given))
    parameters = dict(policy.named_parameters())
    found = torch.autograd.grad(cost_of(CART)(x).mean(), list(parameters.values()))
    return dict(zip(parameters, found))


def by_rollout(system, policy, x0, inputs, flow, **options):
    policy.zero_grad()
    out = ws.rollout(system, policy, x0, horizon=HORIZON, flow=flow, inputs=inputs, **options)
    assert not out.fused
    out.loss.backward()
    return {name: p.grad for name, p in policy.named_parameters()}


def references():
    return torch.randn(HORIZON, WORLDS, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("system", [CART, torch_cart(CART)], ids=["warp", "torch"])
@pytest.mark.parametrize("flow", "RM")
@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 3}], ids=["plain", "segments"])
def test_gradients(system, flow, options):
    policy, x0, inputs = Tracker(), make_states(CART, WORLDS), references()
    expected = by_loop(policy, x0, inputs, flow)
    assert_close(by_rollout(system, policy, x0, inputs, flow, **options), expected, TOLERANCE)


@pytest.mark.parametrize("system", [CART, torch_cart(CART)], ids=["warp", "torch"])
def test_blocks_of_worlds(system, monkeypatch):
    """Each world's own inputs and share of the loss, where worlds go through in blocks."""
    from warp_sims.bridge.autograd import torch_path

    policy, x0, inputs = Tracker(), make_states(CART, WORLDS), references()
    monkeypatch.setattr(torch_path, "JACOBIAN_ELEMENTS", 2 * HORIZON * 4)
    assert_close(by_rollout(system, policy, x0, inputs, "R"), by_loop(policy, x0, inputs, "R"), TOLERANCE)


def test_gradient_pair():
    policy, x0, inputs = Tracker(), make_states(CART, WORLDS), references()
    pair = ws.gradient_pair(CART, policy, x0, horizon=HORIZON, inputs=inputs)
    assert_close(pair.base, by_loop(policy, x0, inputs, "M"), TOLERANCE)
    assert_close(pair.check, by_loop(policy, x0, inputs, "R"), TOLERANCE)


def test_gaussian_policy():
    policy, x0 = ws.GaussianPolicy(make_net(CART), std=0.3), make_states(CART, WORLDS)
    noise = policy.draw(HORIZON, x0, seed=3)
    assert torch.equal(noise, policy.draw(HORIZON, x0, seed=3))
    assert noise.dtype == torch.float64 and noise.shape == (HORIZON, WORLDS, 1)
    for flow in "RM":
        found = by_rollout(CART, policy, x0, noise, flow)
        assert found["log_std"].abs().min() > 0
        assert_close(found, by_loop(policy, x0, noise, flow), TOLERANCE)
    out = ws.rollout(CART, policy, x0, horizon=HORIZON, inputs=noise)
    first = policy.mean(x0) + 0.3 * noise[0]
    assert_close(out.controls[0].detach(), first.detach(), TOLERANCE)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda w: w[1:],
            ValueError,
            r"inputs has shape \(6, 5, 2\), expected \(horizon, nworld, k\) = \(7, 5, any\)",
        ),
        (lambda w: w.float(), TypeError, r"inputs is torch\.float32"),
        (lambda w: w.requires_grad_(), ValueError, "inputs requires a gradient"),
        (lambda w: w.numpy(), TypeError, "inputs is of type ndarray"),
        (lambda w: w[..., :1].repeat(1, 1, 3), ValueError, "policy failed"),
    ],
)
def test_bad_inputs(change, error, words):
    with pytest.raises(error, match=words):
        ws.rollout(CART, Tracker(), make_states(CART, WORLDS), horizon=HORIZON, inputs=change(references()))


def test_bad_arguments_of_the_gaussian_policy():
    for arguments, error, words in (
        ((lambda x: x,), TypeError, "mean is of type function"),
        ((make_net(CART), 0), ValueError, "control_size is 0"),
        ((make_net(CART), None, -1.0), ValueError, "std is -1.0"),
        ((nn.Tanh(),), ValueError, "no linear layer"),
    ):
        with pytest.raises(error, match=words):
            ws.GaussianPolicy(*arguments)
    with pytest.raises(ValueError, match="noise has shape"):
        ws.GaussianPolicy(make_net(CART))(make_states(CART, 2), torch.zeros(2, 3))


@wp.kernel
def sum_of_squares(states: wp.array3d(dtype=wp.float64), loss: wp.array(dtype=wp.float64)):
    t, i, j = wp.tid()
    wp.atomic_add(loss, 0, states[t, i, j] * states[t, i, j])


@pytest.mark.parametrize("system", [CART, torch_cart(CART)], ids=["warp", "torch"])
@pytest.mark.parametrize("flow", "RM")
def test_recorded_on_a_tape(system, flow):
    policy, x0, inputs = Tracker(), make_states(CART, WORLDS), references()
    out = ws.rollout(system, policy, x0, horizon=HORIZON, flow=flow, loss=None, inputs=inputs)
    out.states.square().sum().backward()
    expected = {name: p.grad for name, p in policy.named_parameters()}
    for given in (inputs, wp.array(inputs.numpy(), device="cpu")):
        policy.zero_grad()
        loss = wp.zeros(1, dtype=wp.float64, requires_grad=True, device="cpu")
        with wp.Tape() as tape:
            states, _ = ws.record_rollout(tape, system, policy, x0, horizon=HORIZON, flow=flow, inputs=given)
            wp.launch(sum_of_squares, dim=states.shape, inputs=[states, loss], device="cpu")
        tape.backward(loss)
        assert_close({name: p.grad for name, p in policy.named_parameters()}, expected, TOLERANCE)


def test_who_takes_none_says_so():
    policy, x0 = ws.GaussianPolicy(make_net(CART)), make_states(CART, WORLDS)
    with pytest.raises(ValueError, match="what it takes beside the states is given as inputs="):
        ws.rollout(CART, policy, x0, horizon=HORIZON)
    noise = policy.draw(HORIZON, x0)
    with pytest.raises(ValueError, match="inputs for an Ensemble"):
        ws.rollout(CART, ws.Ensemble([policy.mean]), x0, horizon=HORIZON, inputs=noise)
    array = wp.array(noise.numpy(), requires_grad=True, device="cpu")
    with pytest.raises(ValueError, match="inputs is a Warp array with requires_grad=True"):
        ws.record_rollout(wp.Tape(), CART, policy, x0, horizon=HORIZON, inputs=array)

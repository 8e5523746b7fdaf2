"""Policies: the perceptron as a torch module, and which policies run inside the sweeps."""

import copy
import math
import pickle

import pytest
import torch
from cases import (
    Evaluated,
    assert_close,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

import warp_sims as ws

# Relative to the norm of each tensor: torch and the sweep sum products in another order, over 5 steps.
TOLERANCE = {torch.float64: 1e-13}

CART = ws.CartPole(poles=2, dt=0.05)
HORIZON = 5


# The perceptron as a module


def test_mlp_is_a_sequential():
    net = ws.MLP(6, (5, 4), 2)
    assert isinstance(net, nn.Sequential)
    assert [type(m) for m in net] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    keys = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    shapes = [(5, 6), (5,), (4, 5), (4,), (2, 4), (2,)]
    assert list(net.state_dict()) == keys == [name for name, _ in net.named_parameters()]
    assert [tuple(p.shape) for p in net.parameters()] == shapes
    x = torch.randn(3, 6)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(x), plain(x))


def test_mlp_without_hidden_layers_is_linear():
    net = ws.MLP(6, (), 1)
    assert [type(m) for m in net] == [nn.Linear] and list(net.state_dict()) == ["0.weight", "0.bias"]


def test_mlp_dtype_and_default_sizes():
    assert [m.out_features for m in ws.MLP(6) if isinstance(m, nn.Linear)] == [100, 100, 1]
    assert {p.dtype for p in ws.MLP(6, dtype=torch.float64).parameters()} == {torch.float64}
    assert {p.device.type for p in ws.MLP(6, device="meta").parameters()} == {"meta"}


def test_reset_parameters():
    net = ws.MLP(200, (300,), 100)
    net.reset_parameters(seed=3)
    first = copy.deepcopy(net.state_dict())
    for linear in (net[0], net[2]):
        limit = math.sqrt(6.0 / (linear.in_features + linear.out_features))
        weight = linear.weight.detach()
        assert weight.abs().max() <= limit and weight.max() > 0.99 * limit and weight.min() < -0.99 * limit
        # the variance of a uniform distribution, within some 5 standard errors
        assert weight.square().mean().item() == pytest.approx(limit**2 / 3, rel=0.03)
        assert not linear.bias.any()
    net.reset_parameters(seed=4)
    assert not torch.equal(net[0].weight, first["0.weight"])
    random = torch.get_rng_state()
    net.reset_parameters(seed=3, zero_last=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(net[0].weight, first["0.weight"]) and not net[2].weight.any()
    wide = ws.MLP(200, (300,), 100, dtype=torch.float64)
    wide.reset_parameters(seed=3)
    assert torch.equal(wide[2].weight.float(), first["2.weight"])


def test_slices_and_copies_of_an_mlp():
    net = make_net(CART)
    assert type(net[:2]) is nn.Sequential and net[:2][0] is net[0] and net[-1] is net[4]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin) is ws.MLP
        assert_close(dict(twin.named_parameters()), dict(net.named_parameters()), 0.0)


# Which run inside the sweeps


class Subclass(ws.MLP):
    """Computes something else."""

    def forward(self, x):
        return 0.5 * super().forward(x)


def edited(edit):
    net = make_net(CART, (6, 6))
    edit(net)
    return net


def replace(name, module):
    return lambda net: setattr(net, name, module.double())


def with_subclass():
    net = Subclass(6, (6, 6), 1, dtype=torch.float64)
    net.load_state_dict(make_net(CART, (6, 6)).state_dict())
    return net


STILL_FUSED = {
    "nothing": lambda net: None,
    "frozen": lambda net: net[0].requires_grad_(False),
    "eval": lambda net: net.eval(),
    "a buffer": lambda net: net.register_buffer("mean", torch.ones(1)),
    "an attribute": lambda net: setattr(net, "name", "policy"),
    "weights of another layout": lambda net: setattr(
        net[2], "weight", nn.Parameter(net[2].weight.detach().T.contiguous().T)
    ),
    "a ReLU": replace("1", nn.ReLU()),
    "no bias": replace("2", nn.Linear(6, 6, bias=False)),
    "a layer norm": lambda net: net.insert(1, nn.LayerNorm(6).double()),
    "one tanh less": lambda net: net.__delitem__(1),
    "a tanh at the end": lambda net: net.append(nn.Tanh()),
}
NO_LONGER_FUSED = {
    "a hook": lambda net: net.register_forward_hook(lambda module, args, output: 0.5 * output),
    "a hook before": lambda net: net.register_forward_pre_hook(lambda module, args: (0.5 * args[0],)),
    "a hook of a layer": lambda net: net[1].register_forward_hook(lambda module, args, output: 0.5 * output),
    "a weight norm": lambda net: parametrizations.weight_norm(net[2]),
    "an orthogonal weight": lambda net: parametrizations.orthogonal(net[2]),
    "a pruned weight": lambda net: prune.l1_unstructured(net[2], "weight", 0.4),
    "tied weights": lambda net: setattr(net[2], "weight", net[0].weight),
    "one layer twice": lambda net: setattr(net, "2", net[0]),
    "another forward": lambda net: setattr(net, "forward", lambda x: -x[:, 1:2] + 0.0 * net[0].bias.sum()),
    "another forward of a layer": lambda net: setattr(net[1], "forward", torch.sigmoid),
}
EITHER = {
    "a parameter more": lambda net: setattr(net, "scale", nn.Parameter(torch.ones(3, dtype=torch.float64))),
    "a parameter more in a layer": lambda net: setattr(
        net[0], "scale", nn.Parameter(torch.ones(3, dtype=torch.float64))
    ),
    "a layer more": lambda net: net.extend([nn.Tanh(), nn.Linear(1, 1).double()]),
    "a weight that is no parameter": lambda net: (
        delattr(net[2], "weight"),
        setattr(net[2], "weight", torch.ones(6, 6, dtype=torch.float64)),
    ),
}
CASES = [(name, edit, True) for name, edit in STILL_FUSED.items()]
CASES += [(name, edit, False) for name, edit in NO_LONGER_FUSED.items()]
CASES += [(name, edit, None) for name, edit in EITHER.items()]


@pytest.mark.parametrize("edit, fused", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_roads(edit, fused):
    """Whatever was done to a perceptron, a rollout does what the module does."""
    net = edited(edit)
    same_as_the_module(net, fused)


def test_a_subclass_is_what_its_forward_says():
    same_as_the_module(with_subclass(), True)


def same_as_the_module(net, fused):
    x0 = make_states(CART, 3)
    with torch.no_grad():
        out = ws.rollout(CART, net, x0, horizon=HORIZON)
        assert fused is None or out.fused == fused
        expected = net(out.states[:-1].flatten(0, 1)).view_as(out.controls)
        assert_close(out.controls, expected, TOLERANCE[x0.dtype])
    for flow in "RC":
        found = []
        for policy in (net, Evaluated(net)):
            net.zero_grad()
            out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow, loss="running")
            out.loss.backward()
            # what plays no part has no gradient, or zero
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
            found.append(torch.cat([g.flatten() for g in grads]))
        assert_close(*found, TOLERANCE[x0.dtype])


@pytest.mark.parametrize(
    "system, policy",
    [
        (CART, ws.MLP(6, (5,), 1)),
        (ws.QuantumControl(points=9), ws.WaveCNN(points=9, width=4)),
        (CART, Evaluated(ws.MLP(6, (5,), 1))),
    ],
)
def test_a_rollout_draws_no_random_numbers(system, policy):
    x0 = make_states(system, 3, torch.float32)
    random = torch.get_rng_state()
    ws.rollout(system, policy, x0, horizon=HORIZON).loss.backward()
    ws.gradient_pair(system, policy, x0, horizon=HORIZON)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("shape", [(6, 5), (60, 6), (5, 5), (1, 6), (6,)])
def test_a_weight_that_does_not_fit_its_layer(shape):
    """Torch itself says so; nothing may be made of it."""
    net = ws.MLP(6, (5,), 1)
    net[0].weight = nn.Parameter(torch.randn(shape))
    x0 = make_states(CART, 3, torch.float32)
    with pytest.raises((RuntimeError, ValueError, TypeError)), torch.no_grad():
        ws.rollout(CART, net, x0, horizon=HORIZON)


# What torch evaluates


class Scaled(nn.Module):
    """Holds numbers of several kinds besides its weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1, dtype=torch.float64)
        self.power = nn.Parameter(torch.tensor([2]), requires_grad=False)
        self.register_buffer("scale", torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(self.linear(self.scale * x)) ** self.power


class Constant(nn.Module):
    """One control for all, which the states have no part in."""

    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))

    def forward(self, x):
        return self.u.expand(x.shape[0], -1)


class Feedback(nn.Module):
    """A law without parameters."""

    def forward(self, x):
        return -2.0 * x[:, 3:4] - x[:, 1:2]


def residual():
    body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6))
    return nn.Sequential(body, nn.Dropout(0.5), nn.Linear(6, 1)).double().eval()


@pytest.mark.parametrize("flow", ["R", "M", "N", "S", "C"])
@pytest.mark.parametrize("make", [Scaled, Constant, Feedback, residual])
def test_modules_of_any_kind(make, flow):
    torch.manual_seed(0)
    policy, x0 = make(), make_states(CART, 3)
    cotangents = make_cotangents(CART, HORIZON, 3)
    actual = gradients(CART, policy, x0, HORIZON, flow, loss="running", cotangents=cotangents)
    expected = expected_gradients(CART, policy, x0, HORIZON, flow, loss="running", cotangents=cotangents)
    assert_close(actual, expected, TOLERANCE[x0.dtype])


class Counting(nn.Module):
    """A policy with a state of its own, that a call changes; the controls do not show it at once."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) + torch.clamp(self.calls - 100.0, min=0.0)


def test_a_policy_with_a_state_of_its_own():
    """Refused at once or in the backward pass, by an error that says what is expected."""
    policy, x0 = Counting(), make_states(CART, 3)
    with pytest.raises(ValueError, match="state of its own|deterministic"):
        ws.rollout(CART, policy, x0, horizon=HORIZON).loss.backward()

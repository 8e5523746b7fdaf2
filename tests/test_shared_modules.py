"""Layers and parameters that a policy has in several places: trained once, by the sum of their gradients."""

import copy

import pytest
import torch
from cases import FLOWS, assert_close, cost_of, make_states, step_of
from reference import rollout as oracle
from torch import nn

import warp_sims as ws

CART = ws.CartPole(poles=1)


def shared_layer():
    a = nn.Linear(4, 4)
    return nn.Sequential(a, nn.Tanh(), a, nn.Tanh(), nn.Linear(4, 1))


class Alias(nn.Module):
    """A second name for a layer, used or not, is a second way to it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.first = self.net[0]

    def forward(self, x):
        return self.net(x)


class Tied(nn.Module):
    """One parameter under three names, in two modules."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.again = self.inner.weight
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.outer(torch.tanh(self.inner(x))))
        return self.last(h @ self.again)


def changed_mlp():
    """An MLP whose layers were replaced by one of them."""
    net = ws.MLP(4, (4, 4), 1)
    net[2] = net[0]
    return net


POLICIES = {"layer": shared_layer, "alias": Alias, "tied": Tied, "mlp": changed_mlp}


def make(kind):
    torch.manual_seed(0)
    return POLICIES[kind]().double()


def identities(policy):
    return [(name, id(q), type(q)) for name, q in policy.named_parameters(remove_duplicate=False)]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kind", POLICIES)
def test_gradients(kind, flow):
    policy, x0 = make(kind), make_states(CART, 5)
    before = identities(policy)
    with torch.no_grad():
        policy[-1].weight.mul_(4.0) if isinstance(policy, nn.Sequential) else None
    objective = oracle.final(cost_of(CART))
    expected = oracle.gradients(step_of(CART), policy, x0, flow, 12, objective).parameters
    out = ws.rollout(CART, policy, x0, horizon=12, flow=flow)
    assert not out.fused
    out.loss.backward()
    assert identities(policy) == before
    assert_close({n: q.grad for n, q in policy.named_parameters()}, expected, 1e-10)
    assert all(float(q.grad.abs().max()) > 0 for q in policy.parameters() if q.shape != (4,))


@pytest.mark.parametrize("kind", POLICIES)
def test_every_call_leaves_the_module_as_it_was(kind):
    policy, x0 = make(kind), make_states(CART, 5)
    before, states = identities(policy), copy.deepcopy(policy.state_dict())
    for flow in FLOWS:
        ws.rollout(CART, policy, x0, horizon=3, flow=flow).loss.backward()
    pair = ws.gradient_pair(CART, policy, x0, horizon=3)
    pair.assign(policy)
    with pytest.raises(ValueError, match="policy failed"):
        ws.rollout(ws.CartPole(poles=2), policy, make_states(ws.CartPole(poles=2), 5), horizon=3)
    assert identities(policy) == before
    copy.deepcopy(policy).load_state_dict(states)


def test_a_shared_layer_is_trained(tmp_path):
    policy = make("layer").float()
    before = policy[0].weight.detach().clone()
    config = ws.TrainConfig(system=CART, policy=policy, horizon=5, samples=8, batch=4, epochs=2, loss="final")
    ws.train(config, out=tmp_path / "run")
    assert float((policy[0].weight.detach() - before).abs().max()) > 1e-4


class Counting(nn.Module):
    """A buffer in two places, which the policy reads."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("scale", self.norm.scale)
        self.alias = self.norm
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return self.out(x * self.scale * self.alias.scale)


def test_shared_buffers_stay():
    policy = Counting()
    buffer = policy.scale
    ws.rollout(CART, policy, make_states(CART, 5, torch.float32), horizon=3).loss.backward()
    assert policy.scale is buffer and policy.norm.scale is buffer and policy.alias is policy.norm

"""Policies of observations: fused with what a system lets them observe, as a module that does both."""

import dataclasses

import pytest
import torch
from cases import assert_close
from torch import nn

import warp_sims as ws


@dataclasses.dataclass(frozen=True)
class SeenCart(ws.CartPole):
    """A cart-pole of which a policy sees no position, angles by sine and cosine, and scaled rates."""

    def observe(self, states):
        angles, rates = states[..., 2::2], states[..., 3::2]
        return torch.cat((states[..., 1:2], torch.sin(angles), torch.cos(angles), 0.1 * rates), dim=-1)


class Whole(nn.Module):
    """The same in one forward, which torch evaluates: `atleast_2d` runs in no sweep."""

    def __init__(self, system, policy):
        super().__init__()
        self.system, self.policy = system, policy

    def forward(self, x):
        return torch.atleast_2d(self.policy(self.system.observe(x)))


def network(sees, controls):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(sees, 20), nn.ELU(), nn.LayerNorm(20), nn.Linear(20, controls)).double()


def results(system, policy, x0, flow):
    policy.zero_grad()
    x0 = x0.clone().requires_grad_()
    out = ws.rollout(system, policy, x0, horizon=12, flow=flow, loss="running", control_cost=0.1)
    out.loss.backward()
    return out, [out.states.detach(), out.loss.detach(), x0.grad, *(p.grad for p in policy.parameters())]


@pytest.mark.parametrize("flow", "RMSNC")
@pytest.mark.parametrize(
    "system, sees", [(SeenCart(poles=2), 7), (ws.Hopper(substeps=2), 11)], ids=["cart", "hopper"]
)
def test_as_a_module_that_torch_evaluates(system, sees, flow):
    net = network(sees, system.control_size)
    x0 = system.initial_states(5, dtype=torch.float64)
    out, found = results(system, ws.Observed(system, net), x0, flow)
    other, expected = results(system, Whole(system, net), x0, flow)
    assert out.fused and not other.fused
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-10)


def test_a_system_without_observations():
    with pytest.raises(
        TypeError, match=r"CartPole has no observe, expected a method observe\(self, states\)"
    ):
        ws.Observed(ws.CartPole(), nn.Linear(4, 1))
    with pytest.raises(TypeError, match="expected a torch.nn.Module of observations"):
        ws.Observed(SeenCart(), torch.tanh)


def test_observations_of_another_size():
    system = SeenCart(poles=2)
    with pytest.raises(ValueError, match="policy"):
        ws.rollout(system, ws.Observed(system, nn.Linear(3, 1)), system.initial_states(2), horizon=2)

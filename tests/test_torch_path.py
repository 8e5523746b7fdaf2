"""Policies that torch evaluates: how often it does, and that many worlds, whose steps go back one by one,
have the gradients of few.
"""

import pytest
import torch
from cases import (
    FLOWS,
    Evaluated,
    assert_close,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
)
from torch import nn
from warp_sims.bridge.autograd.torch_path import TorchPath

import warp_sims as ws
from warp_sims import plans

CART = ws.CartPole(poles=2, dt=0.05)
HERD = ws.GuidanceByRepulsion(drivers=2, evaders=2)
HORIZON = 6
TOLERANCE = 2e-12  # as in test_gradients.py


class Counted(Evaluated):
    """Counts the rows of its calls, where no attribute of it tells."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.rows = lambda: _ROWS

    def forward(self, x):
        if isinstance(x, torch.Tensor):  # and no symbol of a trace
            self.rows().append(x.shape[0])
        return super().forward(x)


_ROWS: list[int] = []


def few(monkeypatch, worlds=3):
    """Lets so many worlds be many."""
    monkeypatch.setattr(plans, "MANY_WORLDS", worlds)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("system", [CART, HERD], ids=["one control", "several controls"])
@pytest.mark.parametrize("options", [{}, {"decay": 0.6, "window": 4}, {"decay": 0.0}], ids=repr)
@pytest.mark.parametrize("flow", [*FLOWS, list("RMNSRM")], ids=str)
def test_steps_that_go_back_one_by_one(flow, options, system, kept, monkeypatch):
    few(monkeypatch)
    monkeypatch.setitem(plans.STORED_BYTES, "cpu", 1 << 30 if kept else 0)
    stepped = []
    back = TorchPath._steps_back
    monkeypatch.setattr(TorchPath, "_steps_back", lambda *args: stepped.append(1) or back(*args))
    policy, x0 = Evaluated(make_net(system)), 0.5 * make_states(system, 5)
    arguments = system, policy, x0, HORIZON, flow
    asked = {"loss": "running", "control_cost": 0.3, "cotangents": make_cotangents(system, HORIZON, 5)}
    found = gradients(*arguments, **asked, **options)
    assert stepped
    assert_close(found, expected_gradients(*arguments, **asked, **options), TOLERANCE)


def test_two_backward_passes_through_steps_that_are_kept(monkeypatch):
    few(monkeypatch)
    policy, x0 = Evaluated(make_net(CART)), make_states(CART, 4)
    out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow="R")
    first = torch.autograd.grad(out.loss, list(policy.parameters()), retain_graph=True)
    second = torch.autograd.grad(out.loss, list(policy.parameters()))
    assert_close(dict(enumerate(second)), dict(enumerate(first)), 0.0)


def test_a_change_of_weights_between_the_passes_is_seen(monkeypatch):
    few(monkeypatch)
    policy, x0 = Evaluated(make_net(CART)), make_states(CART, 4)
    out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow="R")
    with torch.no_grad():
        policy.net[0].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("flow", ["R", "M"])
def test_how_often_torch_evaluates_a_policy(flow, monkeypatch):
    """Tried once for a shape; then a step at a time, and all steps at once in the backward pass."""
    policy, x0 = Counted(make_net(CART)), make_states(CART, 5)
    for first in (True, False):
        _ROWS.clear()
        out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow)
        out.loss.backward()
        tried = [] if not first else [n for n in _ROWS if n in (4, 8)]
        assert bool(tried) == first
        assert [n for n in _ROWS if n not in tried][-HORIZON - 1 :] == [5] * HORIZON + [5 * HORIZON]
        assert first or len(_ROWS) == HORIZON + 1
    few(monkeypatch)
    _ROWS.clear()
    ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow).loss.backward()
    assert _ROWS == [5] * HORIZON


def test_a_policy_that_changed_is_tried_again():
    policy, x0 = nn.Sequential(make_net(CART), nn.Dropout(0.5)).eval(), make_states(CART, 5)
    wrapped = Evaluated(policy)
    ws.rollout(CART, wrapped, x0, horizon=2)
    policy.train()
    with pytest.raises(ValueError, match="deterministic"):
        ws.rollout(CART, wrapped, x0, horizon=2)

"""A model of Newton's as a system, where newton is installed: examples/newton_pendulum.py."""

import runpy
from pathlib import Path

import pytest
import torch
from cases import Evaluated, make_net

import warp_sims as ws

pytest.importorskip("newton")
EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "newton_pendulum.py"))


def test_gradient_of_a_rollout():
    """Against central differences along the gradient, in float32."""
    system, net = EXAMPLE["make_system"](3), make_net(ws.CartPole(poles=1), dtype=torch.float32, gain=1.0)
    policy = Evaluated(net)
    x0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(x):
        return ws.rollout(system, policy, x, horizon=5, flow="R", loss="running").loss

    (gradient,) = torch.autograd.grad(loss(x0), x0)
    along = gradient / gradient.norm()
    with torch.no_grad():
        difference = (loss(x0 + 1e-2 * along) - loss(x0 - 1e-2 * along)) / 2e-2
    # rounding of a difference of float32, and its length squared
    assert abs(float(difference / gradient.norm()) - 1.0) < 2e-3


def test_one_solver_for_all_substeps_is_refused():
    system = EXAMPLE["make_system"](2, one_solver=True)
    with pytest.raises(ValueError, match=r"TapeSystem: the gradient of step is wrong: d x_next\[\d\]"):
        ws.step(system, torch.ones(2, 4), torch.ones(2, 1))


def test_it_learns():
    losses = EXAMPLE["main"](updates=6)
    assert losses[-1] < 0.7 * losses[0]

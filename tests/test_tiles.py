"""Register tiles of the dense layers on a CPU: a row has the same numbers whichever tile it goes through.

Two neighbouring blocks of worlds go through the forward sweep together where there are two, and two steps
through the linearisation; the last ones alone. A sum that was taken in another order there would make a world
depend on its neighbours and on the number of threads.
"""

import pytest
import torch
from cases import make_cotangents, make_net, make_states

import warp_sims as ws

# padded to 1, 2, 3, 5, 7 or 9 vectors of 16 float32, and to 1 to 18 of 8 float64
WIDTHS = [(16,), (32, 8), (40, 24), (80,), (100, 100), (144, 16)]
HORIZON, NWORLD = 5, 13


def numbers(system, net, x0, cotangents, **options):
    """States, controls and the cotangent of x0."""
    x0 = x0.clone().requires_grad_()
    out = ws.rollout(system, net, x0, horizon=HORIZON, loss=None, **options)
    torch.autograd.backward([out.states, out.controls], list(cotangents))
    return out.states.detach(), out.controls.detach(), x0.grad[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", WIDTHS, ids=repr)
@pytest.mark.parametrize("system", [ws.CartPole(poles=2), ws.GuidanceByRepulsion(drivers=2)], ids=repr)
def test_a_world_is_as_it_is_alone(system, widths, dtype):
    net, x0 = make_net(system, widths, dtype), make_states(system, NWORLD, dtype)
    c = make_cotangents(system, HORIZON, NWORLD, dtype)
    together = numbers(system, net, x0, (c.states, c.controls))
    for k in range(NWORLD):
        own = slice(k, k + 1)
        alone = numbers(system, net, x0[own], (c.states[:, own], c.controls[:, own]))
        for found, expected in zip(together, alone, strict=True):
            assert torch.equal(found[:, own], expected), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", WIDTHS, ids=repr)
def test_a_step_is_as_it_is_alone(widths, dtype):
    system = ws.CartPole(poles=2)
    net, x0 = make_net(system, widths, dtype), make_states(system, NWORLD, dtype)
    c = make_cotangents(system, HORIZON, NWORLD, dtype)
    together = numbers(system, net, x0, (c.states, c.controls))
    alone = numbers(system, net, x0, (c.states, c.controls), checkpoint_every=1)
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found, expected)

"""`ws.linearize`: Jacobians of one step, of built-in and foreign systems."""

import pytest
import torch
from cases import assert_close, make_cotangents, make_states, step_of
from foreign_carts import tape_cart, torch_cart
from own_systems import Pendulum, Unicycle

import warp_sims as ws

CART = ws.CartPole(poles=2)
SYSTEMS = {
    "cartpole": CART,
    "guidance": ws.GuidanceByRepulsion(drivers=2, evaders=1),
    "quantum": ws.QuantumControl(points=5),
    "pendulum": Pendulum(),
    "unicycle": Unicycle(),
}
TOLERANCE = 1e-12
"""Of float64, the same derivative in another order; a linear solve in the quantum system."""


def expected(system, x, u):
    """By torch's Jacobian of the reference, point by point."""
    step = step_of(system)
    both = [
        torch.autograd.functional.jacobian(lambda a, b: step(a[None], b[None])[0], (x[i], u[i]))
        for i in range(x.shape[0])
    ]
    return tuple(torch.stack(parts) for parts in zip(*both))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("points", [1, 17])
def test_built_in_and_own_systems(name, points):
    system = SYSTEMS[name]
    x, u = make_states(system, points), make_cotangents(system, 1, points).controls[0]
    found = ws.linearize(system, x, u)
    assert [tuple(q.shape[1:]) for q in found] == [
        (system.state_size, system.state_size),
        (system.state_size, system.control_size),
    ]
    for a, b in zip(found, expected(system, x, u)):
        assert_close(a, b, TOLERANCE)


@pytest.mark.parametrize("kind", ["torch", "tape"])
def test_foreign_systems(kind):
    x, u = make_states(CART, 3), make_cotangents(CART, 1, 3).controls[0]
    system = torch_cart(CART) if kind == "torch" else tape_cart(CART, 3)
    for a, b in zip(ws.linearize(system, x, u), expected(CART, x, u)):
        assert_close(a, b, TOLERANCE)
    with torch.inference_mode():
        again = ws.linearize(system, x.clone(), u.clone())
    assert_close(again[0], expected(CART, x, u)[0], TOLERANCE)


def test_no_points():
    a, b = ws.linearize(CART, make_states(CART, 0), torch.zeros(0, 1, dtype=torch.float64))
    assert a.shape == (0, 6, 6) and b.shape == (0, 6, 1)


def test_bad_input():
    x, u = make_states(CART, 3), torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"linearize: u has shape \(2, 1\)"):
        ws.linearize(CART, x, u[:2])
    with pytest.raises(TypeError, match=r"linearize: u is torch\.float32"):
        ws.linearize(CART, x, u.float())
    with pytest.raises(ValueError, match="act on each other"):
        ws.linearize(torch_cart(CART, rowwise=False), x, u)


def test_the_examples_controller_swings_up():
    """Iterative LQR on these Jacobians, from hanging to upright."""
    import runpy
    from pathlib import Path

    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "ilqr.py"))
    states, controls, costs = example["solve"](ws.CartPole(poles=1, dt=0.02))
    assert costs[-1] < 0.15 * costs[0]
    assert all(b <= a for a, b in zip(costs, costs[1:]))
    assert torch.cos(states[-20:, 2]).min() > 0.99
    assert torch.isfinite(controls).all()

"""`parameters=` of foreign simulators: the same cart-pole as any kind of system has the same gradients."""

import functools

import pytest
import torch
from cases import FLOWS, assert_close, make_cotangents, make_net, make_states
from foreign_carts import jax_cart, tape_cart, torch_cart
from reference import cartpole
from test_parameters import CART, HORIZON, WAYS, WORLDS, found_numbers, numbers_of

import warp_sims as ws

TOLERANCE = 1e-13
"""Of float64: the same equations in another order, over 12 steps; 3e-15 was seen."""
NUMBERS = {"gravity": 9.8, "pole_mass": 0.1, "total_mass": 1.1, "pole_length": 0.5}


def torch_step(x, u, *, pole_length, **numbers):
    return cartpole.step(x, u, dt=CART.dt, length=pole_length, **numbers)


@functools.cache
def foreign_carts():
    sizes = {"state_size": 6, "control_size": 1, "loss": cartpole.loss, "parameters": NUMBERS}
    return {
        "torch": ws.TorchSystem(torch_step, **sizes),
        "torch, rows mixing": ws.TorchSystem(torch_step, rowwise=False, **sizes),
        "jax": jax_cart(CART, parameters=NUMBERS),
        "tape": tape_cart(CART, WORLDS, parameters=NUMBERS),
    }


@pytest.fixture
def wide_jax(request):
    """JAX in float64, for this test."""
    if request.getfixturevalue("kind") != "jax":
        yield
        return
    with pytest.importorskip("jax").enable_x64(True):
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["torch", "torch, rows mixing", "jax", "tape"])
def test_foreign_systems(kind, way, wide_jax):
    """The same cart-pole as any kind of system has the same gradients."""
    system, names = foreign_carts()[kind], ("gravity", "pole_mass", "pole_length")
    for flow in FLOWS:
        for shapes in ("one", "each"):
            numbers = numbers_of(CART, names, shapes)
            cotangents, net = make_cotangents(CART, HORIZON, WORLDS), make_net(CART, gain=1.0)
            given = make_states(CART, WORLDS), flow, "running", cotangents, numbers
            expected, expected_net = found_numbers(CART, net, *given, **WAYS[way])
            found, found_net = found_numbers(system, net, *given, **WAYS[way])
            assert_close(found, expected, TOLERANCE)
            for a, b in zip(found_net, expected_net):
                assert_close(a, b, TOLERANCE)


def test_a_foreign_system_without_given_numbers_has_its_own():
    for kind, system in foreign_carts().items():
        if kind == "jax":
            continue
        x, u = make_states(CART, WORLDS), make_cotangents(CART, 1, WORLDS).controls[0]
        ws.step(system, x, u, parameters={"pole_mass": 0.3})
        assert_close(ws.step(system, x, u), ws.step(CART, x, u), TOLERANCE)


def test_a_wrong_foreign_cotangent_is_named():
    def step(x, u, *, mass):
        return x + 0.1 * (u - x / mass.detach())

    system = ws.TorchSystem(step, state_size=1, control_size=1, parameters={"mass": 2.0})
    x = torch.ones(3, 1, dtype=torch.float64)
    ws.step(system, x, x)
    with pytest.raises(ValueError, match=r"d x_next\[0\] / d mass is 0 by the simulator"):
        ws.step(system, x, x, parameters={"mass": torch.tensor(1.5, dtype=torch.float64)})


def test_foreign_numbers_are_checked():
    with pytest.raises(TypeError, match=r"parameters\['mass'\] is 'heavy'"):
        ws.TorchSystem(torch_step, state_size=6, control_size=1, parameters={"mass": "heavy"})
    system = torch_cart(CART)
    with pytest.raises(ValueError, match="TorchSystem: none"):
        ws.step(system, make_states(CART, 3), make_states(CART, 3)[:, :1], parameters={"mass": 1.0})

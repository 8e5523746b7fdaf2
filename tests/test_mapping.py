"""`torch.func.vmap` and `jacrev` over the open loop, and over the cotangents of a rollout."""

import pytest
import torch
from cases import assert_close, make_net, make_states
from foreign_carts import tape_cart, torch_cart
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import warp_sims as ws

CART = ws.CartPole(poles=1)
TOLERANCE = 1e-13
WORLDS, HORIZON, SIZE = 5, 3, 2


def both_worlds_in_one(x, u):
    """Worlds that act on each other."""
    return torch.cat((x[:, :1] + 0.1 * x[:, 1:].mean() * u, x[:, 1:] + 0.1 * u), dim=1)


MIXED = ws.TorchSystem(both_worlds_in_one, state_size=2, control_size=1, rowwise=False)
SYSTEMS = pytest.mark.parametrize("system", [CART, torch_cart(CART), MIXED], ids=["warp", "torch", "mixed"])


def given(system, *front):
    """States and controls with axes in front of those of the worlds."""
    seeded = torch.Generator().manual_seed(5)
    x = 0.3 * torch.randn(*front, WORLDS, system.state_size, generator=seeded, dtype=torch.float64)
    u = torch.randn(*front, WORLDS, system.control_size, generator=seeded, dtype=torch.float64)
    return x, u


def jacobian(function, x):
    """Row by row, without torch.func."""
    x = x.detach().requires_grad_()
    y = function(x)
    rows = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in y.reshape(-1)]
    return torch.stack(rows).view(*y.shape, *x.shape)


def test_fixed_numbers_of_worlds():
    """The arrays of a tape hold as many worlds as they hold."""
    system = tape_cart(CART, WORLDS)
    x, u = given(system, SIZE)
    expected = torch.stack([ws.step(CART, *pair) for pair in zip(x, u)])
    assert_close(vmap(lambda x, u: ws.step(system, x, u))(x, u), expected, TOLERANCE)
    wanted = jacrev(lambda x: ws.step(CART, x, u[0]))(x[0])
    assert_close(jacrev(lambda x: ws.step(system, x, u[0]))(x[0]), wanted, TOLERANCE)


@SYSTEMS
def test_mapped_steps(system):
    x, u = given(system, SIZE)
    expected = torch.stack([ws.step(system, *pair) for pair in zip(x, u)])
    assert_close(vmap(lambda x, u: ws.step(system, x, u))(x, u), expected, TOLERANCE)
    assert_close(vmap(lambda x: ws.step(system, x, u[0]))(x)[1], ws.step(system, x[1], u[0]), TOLERANCE)
    assert_close(vmap(lambda u: ws.step(system, x[0], u))(u)[1], ws.step(system, x[0], u[1]), TOLERANCE)
    last = vmap(lambda x, u: ws.step(system, x, u), in_dims=(2, 1), out_dims=2)
    assert_close(last(x.movedim(0, 2), u.movedim(0, 1)), expected.movedim(0, 2), TOLERANCE)


@SYSTEMS
def test_mapped_trajectories(system):
    x, _ = given(system, SIZE)
    _, u = given(system, SIZE, HORIZON)
    expected = torch.stack([ws.simulate(system, *pair) for pair in zip(x, u)])
    assert_close(vmap(lambda x, u: ws.simulate(system, x, u))(x, u), expected, TOLERANCE)
    twice = vmap(vmap(lambda x, u: ws.simulate(system, x, u), in_dims=(None, 0)), in_dims=(0, None))(x, u)
    assert_close(twice[1, 0], ws.simulate(system, x[1], u[0]), TOLERANCE)


@SYSTEMS
def test_jacobians(system):
    x, u = given(system)
    _, many = given(system, HORIZON)
    for function, at in (
        (lambda x: ws.step(system, x, u), x),
        (lambda u: ws.step(system, x, u), u),
        (lambda u: ws.simulate(system, x, u), many),
    ):
        assert_close(jacrev(function)(at), jacobian(function, at), TOLERANCE)
        batched = torch.autograd.functional.jacobian(function, at, vectorize=True)
        assert_close(batched, jacobian(function, at), TOLERANCE)


@pytest.mark.parametrize("system", [CART, torch_cart(CART)], ids=["warp", "torch"])
def test_jacobians_of_one_world_mapped_over_worlds(system):
    x, u = given(system)
    a, b = vmap(jacrev(lambda x, u: ws.step(system, x[None], u[None])[0], argnums=(0, 1)))(x, u)
    assert_close(torch.cat((a, b), 2), torch.cat(ws.linearize(system, x, u), 2), TOLERANCE)


@SYSTEMS
def test_mapped_gradients(system):
    x, u = given(system, SIZE)

    def value(x, u):
        return ws.step(system, x, u).sin().sum()

    expected = torch.stack([grad(value)(*pair) for pair in zip(x, u)])
    assert_close(vmap(grad(value))(x, u), expected, TOLERANCE)
    outside = grad(lambda x: vmap(value)(x, u).sum())(x)
    assert_close(outside, expected, TOLERANCE)


def masses(shape):
    seeded = torch.Generator().manual_seed(6)
    return 0.1 + 0.1 * torch.rand(shape, generator=seeded, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (WORLDS,)], ids=["one", "one-a-world"])
def test_numbers_of_the_physics(shape):
    x, u = given(CART)
    length = torch.tensor(0.45, dtype=torch.float64)

    def next_states(mass, x=x, u=u, length=length):
        return ws.step(CART, x, u, parameters={"pole_mass": mass, "pole_length": length})

    mass = masses(shape)
    assert_close(jacrev(next_states)(mass), jacobian(next_states, mass), TOLERANCE)
    by_length = jacrev(lambda length: next_states(mass, length=length))(length)
    assert_close(by_length, jacobian(lambda q: next_states(mass, length=q), length), TOLERANCE)
    many = masses((SIZE, *shape))
    expected = torch.stack([next_states(m) for m in many])
    assert_close(vmap(next_states)(many), expected, TOLERANCE)

    def value(mass, x):
        return next_states(mass, x=x).sin().sum()

    more = given(CART, SIZE)[0]
    expected = torch.stack([grad(value)(*pair) for pair in zip(many, more)])
    assert_close(vmap(grad(value))(many, more), expected, TOLERANCE)
    assert_close(grad(lambda m: vmap(value)(m, more).sum())(many), expected, TOLERANCE)
    shared = grad(lambda m: vmap(value, in_dims=(None, 0))(m, more).sum())(mass)
    assert_close(shared, sum(grad(value)(mass, one) for one in more), TOLERANCE)


@pytest.mark.parametrize("flow", ["R", "M", "C"])
@pytest.mark.parametrize("resets", [False, True], ids=["plain", "resets"])
def test_cotangents_of_a_rollout(flow, resets):
    """Each row compared by itself, as by one backward pass a row."""
    policy, x0 = make_net(CART), make_states(CART, WORLDS)
    ends = ws.Resets(make_states(CART, WORLDS), limit=2) if resets else None

    def states(x0):
        return ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow, loss=None, resets=ends).states

    assert_close(jacrev(states)(x0), jacobian(states, x0), TOLERANCE)


def test_what_is_not_mapped_says_so():
    policy, x, (x0, u) = make_net(CART), given(CART, SIZE)[0], given(CART)
    with pytest.raises(NotImplementedError, match="Ensemble"):
        vmap(lambda x: ws.rollout(CART, policy, x, horizon=HORIZON).loss)(x)
    for transform in (jacfwd, hessian):
        with pytest.raises(NotImplementedError, match=r"jacrev\), or warp_sims.linearize"):
            transform(lambda x: ws.step(CART, x, u).sum())(x0)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        jacrev(jacrev(lambda x: ws.step(CART, x, u).sum()))(x0)

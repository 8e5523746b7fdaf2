"""Ensembles to test, and their members: what is one's own of all that a rollout computes."""

import torch
from cases import make_net, make_states
from composed_nets import filled, with_norms

import warp_sims as ws

# Relative to the norm of each tensor, where torch's own batched products take the place of single ones, which
# sum in another order; everything else here is equal to the last bit.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

CART = ws.CartPole(poles=2, dt=0.05)
HERD = ws.GuidanceByRepulsion(drivers=2, evaders=2)
BOX = ws.QuantumControl(points=8)
HORIZON = 7


def make_cnn(seed, dtype):
    net = ws.WaveCNN(8, 5, dtype=dtype)
    net.reset_parameters(seed=seed)
    with torch.no_grad():
        net.out.weight.mul_(4.0)
    return net


def make_bounded(seed, dtype):
    sizes = HERD.state_size, (17, 9), HERD.control_size
    return filled(ws.MLP(*sizes, activation="gelu", norm="rms", bound=(-0.5, 1.0)), seed, dtype)


CASES = {
    "cart": (CART, lambda seed, dtype: make_net(CART, dtype=dtype, seed=seed)),
    "linear": (CART, lambda seed, dtype: make_net(CART, (), dtype=dtype, seed=seed, gain=1.0)),
    "herd": (HERD, lambda seed, dtype: make_net(HERD, (17,), dtype=dtype, seed=seed)),
    "box": (BOX, make_cnn),
    "composed": (CART, lambda seed, dtype: with_norms(6, 1, seed).to(dtype)),
    "composed herd": (HERD, make_bounded),
}


def make(case="cart", members=3, nworld=5, dtype=torch.float64):
    """A system, the members of an ensemble, and worlds for each of them."""
    system, policy = CASES[case]
    nets = [policy(seed, dtype) for seed in range(members)]
    states = make_states(system, members * nworld, dtype) * (0.5 if system is BOX else 1.0)
    return system, nets, states.view(members, nworld, system.state_size)


def backward_of(system, policy, x0, cotangents=None, **options):
    """Everything that a rollout computes, by name, from one backward pass with these cotangents."""
    policy.zero_grad()
    x0 = x0.detach().requires_grad_()
    out = ws.rollout(system, policy, x0, **{"horizon": HORIZON, "loss": "running"} | options)
    outputs = [y for y in (out.states, out.controls, out.loss) if y is not None]
    torch.autograd.backward(outputs, cotangents or [torch.ones_like(y) for y in outputs])
    found = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    return found | {"x0": x0.grad} | dict(zip(("states", "controls", "loss"), (y.detach() for y in outputs)))


def member_of(found, k):
    """The share of a member; trajectories have time first."""
    return {name: y[:, k] if name in ("states", "controls") else y[k] for name, y in found.items()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, y in expected.items():
        assert actual[name].shape == y.shape and actual[name].dtype == y.dtype, name
        torch.testing.assert_close(
            actual[name], y, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: n + m
        )

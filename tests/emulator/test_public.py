"""What users call, by the kernels of a GPU: pairs of gradients, tapes, transforms, policies of torch's."""

import pytest
import torch
import warp as wp
from cases import Evaluated, assert_close, make_net, make_states
from test_generated_adjoints import Bare

import warp_sims as ws

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
"""As in problems.py."""

CART = ws.CartPole(poles=2)
HERD = ws.GuidanceByRepulsion(drivers=2, evaders=2)
HORIZON, WORLDS = 6, 5


def on_both(emulator, run):
    """What `run` gives with the kernels of a CPU, and with those of a GPU."""
    expected = run()
    with emulator.standing_in():
        return run(), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("system", [CART, HERD], ids=["cart", "herd"])
def test_gradient_pair(system, dtype, emulator):
    """Both fields, their loss and what is counted; two halves add up to the whole."""
    net, x0 = make_net(system, dtype=dtype), make_states(system, WORLDS, dtype)
    options = {"horizon": HORIZON, "loss": "running", "control_cost": 0.2, "window": 4}

    def run():
        whole = ws.gradient_pair(system, net, x0, **options)
        halves = ws.gradient_pair(system, net, x0[:2], **options) + ws.gradient_pair(
            system, net, x0[2:], **options
        )
        for a, b in zip(halves.flat, whole.flat):
            assert_close(a, b, TOLERANCE[dtype])
        return {"loss": whole.loss, "cosine": whole.cosine, **dict(zip(("base", "check"), whole.flat))}

    found, expected = on_both(emulator, run)
    assert_close(found, expected, TOLERANCE[dtype])


def test_tape(emulator):
    net, x0 = make_net(CART), make_states(CART, WORLDS)

    def run():
        net.zero_grad()
        start = wp.from_torch(x0.clone(), requires_grad=True)
        with wp.Tape() as tape:
            states, controls = ws.record_rollout(tape, CART, net, start, horizon=HORIZON, flow="M")
        wp.to_torch(states.grad).fill_(1.0)
        wp.to_torch(controls.grad).fill_(0.5)
        tape.backward()
        found = {name: p.grad.clone() for name, p in net.named_parameters()}
        return found | {"x0": wp.to_torch(start.grad).clone(), "states": wp.to_torch(states).clone()}

    found, expected = on_both(emulator, run)
    assert_close(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("flow", ["R", "M", "C"])
def test_policies_that_torch_evaluates(flow, emulator):
    policy, x0 = Evaluated(make_net(HERD)), make_states(HERD, WORLDS)

    def run():
        policy.zero_grad()
        start = x0.clone().requires_grad_()
        out = ws.rollout(HERD, policy, start, horizon=HORIZON, flow=flow, loss="running", control_cost=0.1)
        out.loss.backward()
        assert not out.fused
        weights = torch.cat([p.grad.reshape(-1) for p in policy.parameters()])
        return {"loss": out.loss.detach(), "x0": start.grad, "weights": weights}

    found, expected = on_both(emulator, run)
    assert_close(found, expected, TOLERANCE[torch.float64])


def test_gradient_of_a_function(emulator):
    """torch.func.grad through the open loop, with respect to states and controls."""
    u = torch.randn(
        HORIZON, 3, 2 * HERD.drivers, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def cost(x, u):
        return ws.simulate(HERD, x, u)[-1].square().sum()

    x0 = make_states(HERD, 3)
    found, expected = on_both(emulator, lambda: torch.func.grad(cost, argnums=(0, 1))(x0, u))
    for a, b in zip(found, expected, strict=True):
        assert b.any()
        assert_close(a, b, TOLERANCE[torch.float64])


@pytest.mark.parametrize("members", [0, 2])
def test_no_worlds(members, emulator):
    """Nothing is launched, and what is returned is zero."""
    nets = [make_net(CART, seed=seed) for seed in range(max(members, 1))]
    policy = ws.Ensemble(nets) if members else nets[0]
    x0 = torch.empty((members, 0, CART.state_size) if members else (0, CART.state_size), dtype=torch.float64)
    with emulator.standing_in():
        out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow="C", loss="final")
        out.loss.sum().backward()
    assert not out.loss.any() and all(not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "system, names",
    [
        (CART, ("pole_mass", "dt")),
        (HERD, ("softening", "evader_drag")),
        (ws.QuantumControl(points=8), ("length", "dt")),
        (Bare(), ("mass", "damping")),
    ],
    ids=["cart", "herd", "wave", "generated"],
)
def test_parameters(system, names, dtype, emulator):
    """Numbers of the physics, one for all worlds and one a world, with a fused policy and one of torch's."""
    net, x0 = make_net(system, dtype=dtype), make_states(system, WORLDS, dtype)
    draw = torch.Generator().manual_seed(3)
    factors = [1 + 0.1 * torch.rand(shape, generator=draw) for shape in ((), (WORLDS,))]
    values = [getattr(system, name) * factor for name, factor in zip(names, factors)]

    def run():
        given = {n: v.to(dtype).requires_grad_() for n, v in zip(names, values)}
        found = {}
        for policy in (net, Evaluated(net)):
            for flow in "RC":
                out = ws.rollout(system, policy, x0, horizon=HORIZON, flow=flow, decay=0.9, parameters=given)
                grads = torch.autograd.grad(out.loss, list(given.values()))
                found |= {f"{name} {flow} {out.fused}": g for name, g in zip(names, grads)}
                found[f"states {flow} {out.fused}"] = out.states.detach()
        return found

    found, expected = on_both(emulator, run)
    # those of a wave are sums of large terms of both signs, of a condition of some 50
    wave = dtype == torch.float32 and isinstance(system, ws.QuantumControl)
    assert_close(found, expected, 1e-3 if wave else TOLERANCE[dtype])


@pytest.mark.parametrize("system", [ws.Hopper(substeps=2), ws.HalfCheetah()], ids=["hopper", "cheetah"])
def test_parameters_of_robots(system, emulator):
    """In registers, and in memory, where the cheetah is large; each world has its own array of words."""
    net, x0 = make_net(system, gain=1.0), system.initial_states(5, dtype=torch.float64)
    body, joint = system.model.links[-1].body, system.model.links[-1].joint
    names = (f"mass_of_{body}", f"damping_of_{joint}", f"gear_of_{joint}")
    factors = [1.1, torch.linspace(0.9, 1.2, 5, dtype=torch.float64), 0.8]

    def run():
        given = {
            n: torch.as_tensor(system.physical_parameters[n] * f, dtype=torch.float64).requires_grad_()
            for n, f in zip(names, factors)
        }
        out = ws.rollout(system, net, x0, horizon=3, flow="C", loss="running", parameters=given)
        grads = torch.autograd.grad(out.loss, list(given.values()))
        return dict(zip(names, grads)) | {"states": out.states.detach()}

    found, expected = on_both(emulator, run)
    assert_close(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("system", [CART, ws.QuantumControl(points=12)], ids=["cart", "wave"])
def test_clipped_cotangents(system, emulator):
    """In registers, and in memory, where the wave is large."""
    net, x0 = make_net(system), make_states(system, WORLDS)

    def run():
        found = {}
        for flow in "RC":
            net.zero_grad()
            out = ws.rollout(system, net, x0, horizon=HORIZON, flow=flow, loss="running", clip_cotangent=0.02)
            out.loss.backward()
            found |= {f"{name} {flow}": p.grad.clone() for name, p in net.named_parameters()}
        return found

    found, expected = on_both(emulator, run)
    assert_close(found, expected, TOLERANCE[torch.float64])
    net.zero_grad()
    ws.rollout(system, net, x0, horizon=HORIZON, flow="R", loss="running").loss.backward()
    for name, p in net.named_parameters():  # something was clipped
        assert (p.grad - expected[f"{name} R"]).norm() > 1e-3 * p.grad.norm()

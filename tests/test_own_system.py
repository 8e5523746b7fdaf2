"""A system of a user's own, defined outside the package, takes every road that a built-in one takes."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import warp as wp
from cases import (
    FLOWS,
    ROADS,
    assert_close,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
    step_of,
)
from own_systems import Pendulum, Unicycle, pendulum_functions
from reference import rollout as oracle

import warp_sims as ws
from warp_sims import systems

# Relative to the norm of each tensor: both sides round at every step, measured 1e-14 and 2e-6.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}
HORIZON = 30


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("loss", ["final", "running"])
def test_rollout(road, loss, flow):
    system = Pendulum(dt=0.04, gravity=9.0, mass=0.7, length=1.2, damping=0.3)
    policy, x0 = on_road(road, make_net(system)), make_states(system, 11)
    options = {"loss": loss, "control_cost": 0.01, "cotangents": make_cotangents(system, HORIZON, 11)}
    actual = gradients(system, policy, x0, HORIZON, flow, **options)
    assert_close(
        actual, expected_gradients(system, policy, x0, HORIZON, flow, **options), TOLERANCE[x0.dtype]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trajectories(dtype):
    system = Pendulum()
    net, x0 = make_net(system, dtype=dtype), system.initial_states(5, dtype=dtype)
    states, controls = oracle.rollout(step_of(system), net, x0, oracle.schedule("R", HORIZON))
    out = ws.rollout(system, net, x0, horizon=HORIZON)
    assert_close(out.states, states, TOLERANCE[dtype])
    assert_close(out.controls, controls, TOLERANCE[dtype])
    assert_close(ws.simulate(system, x0, controls.detach()), states, TOLERANCE[dtype])
    assert_close(ws.step(system, x0, controls[0].detach()), states[1], TOLERANCE[dtype])


def test_every_call_takes_it():
    system = Pendulum()
    net, x0 = make_net(system), make_states(system, 3)
    pair = ws.gradient_pair(system, net, x0, horizon=HORIZON)
    assert_close(
        pair.base["0.weight"], gradients(system, net, x0, HORIZON, "M")["0.weight"], TOLERANCE[x0.dtype]
    )
    net.zero_grad()
    with wp.Tape() as tape:
        states, _ = ws.record_rollout(tape, system, net, x0, horizon=HORIZON)
    states.grad.fill_(1.0)
    tape.backward()
    assert all(p.grad.any() for p in net.parameters())


def test_training():
    """A swing-up within reach: the loss falls, and the policy that comes back is the one that was given."""
    system = Pendulum(dt=0.1)
    policy = ws.MLP(system.state_size, (16,), system.control_size)
    policy.reset_parameters(seed=0, zero_last=True)
    config = ws.TrainConfig(
        system=system,
        policy=policy,
        flow="combined",
        horizon=20,
        loss="running",
        samples=16,
        batch=8,
        epochs=20,
        lr=0.02,
        clip="norm",
    )
    result = ws.train(config, progress=False)
    assert result.policy is policy
    losses = result.log["loss_train"]
    assert len(losses) == 21 and np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]
    x0 = system.initial_states(16, seed=config.seed)
    out = ws.rollout(system, policy, x0, horizon=20, loss="running")
    assert out.loss.item() == pytest.approx(losses[-1], rel=1e-5)


# Naming


def test_names():
    assert systems.resolve("own_systems:Pendulum") is Pendulum
    assert systems.resolve("cartpole") is ws.CartPole


@pytest.mark.parametrize(
    "name, reason",
    [
        ("pendulum", "unknown system 'pendulum', expected .*cartpole.*, or module:Class"),
        ("", "unknown system ''"),
        ("no_such_module:Pendulum", "no_such_module.*expected module:Class"),
        ("own_systems:NoSuchClass", "NoSuchClass.*expected module:Class"),
        ("own_systems:pendulum_functions", "expected a class that derives from warp_sims.System"),
        ("collections:OrderedDict", "expected a class that derives from warp_sims.System"),
        (":Pendulum", "':Pendulum'.*expected module:Class"),
        ("own_systems:", "'own_systems:'.*expected module:Class"),
    ],
)
def test_unknown_names(name, reason):
    with pytest.raises(ValueError, match=reason):
        systems.resolve(name)


# What a system may lack, and what it must not


def test_a_system_without_a_loss():
    system = Unicycle()
    net, x0 = make_net(system), make_states(system, 3)
    assert not system.has_loss and Pendulum().has_loss
    for policy in (net, on_road("torch", net)):
        for loss in ("final", "running"):
            for call in (ws.rollout, ws.gradient_pair):
                with pytest.raises(ValueError, match="Unicycle has no loss of its own; pass a callable"):
                    call(system, policy, x0, horizon=3, loss=loss)
        # a loss that is not the system's is no matter
        cost = {"loss": lambda states, controls: states[-1].square().mean(), "control_cost": 0.5}
        actual = gradients(system, policy, x0, HORIZON, "C", **cost)
        expected = expected_gradients(system, policy, x0, HORIZON, "C", **cost)
        assert_close(actual, expected, TOLERANCE[x0.dtype])


def test_a_system_without_initial_states():
    with pytest.raises(NotImplementedError, match="Unicycle has no initial states.*define initial_states"):
        Unicycle().initial_states(3)


@dataclasses.dataclass(frozen=True)
class Lacking(ws.System):
    """A pendulum that has no damping."""

    dt: float = 0.05
    gravity: float = 9.81
    mass: float = 1.0
    length: float = 1.0

    state_size = 2
    control_size = 1

    def device_functions(self, dtype: Any) -> ws.DeviceFunctions:
        return pendulum_functions(dtype)


def test_a_parameter_that_the_dataclass_lacks():
    system = Lacking()
    for call in (
        lambda: ws.rollout(system, make_net(system), make_states(system, 3), horizon=3),
        lambda: ws.step(system, make_states(system, 3), make_cotangents(system, 1, 3).controls[0]),
    ):
        with pytest.raises((AttributeError, TypeError, ValueError), match="Lacking.*'damping'.*lacks"):
            call()


class Undamped(Lacking):
    """Fills the struct itself."""

    def parameters(self, dtype: Any) -> Any:
        params = self.device_functions(dtype).Params()
        params.dt, params.gravity, params.mass, params.length, params.damping = 0.05, 9.81, 1.0, 1.0, 0.0
        return params


def test_a_system_that_fills_its_parameters_itself():
    x, u = make_states(Pendulum(), 3), make_cotangents(Pendulum(), 1, 3).controls[0]
    assert torch.equal(ws.step(Undamped(), x, u), ws.step(Pendulum(damping=0.0), x, u))


def test_an_abstract_system():
    with pytest.raises(TypeError, match="abstract"):
        ws.System()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_that_are_no_numbers(value):
    with pytest.raises(ValueError, match="Pendulum: length is .*(nan|inf), expected a finite number"):
        Pendulum(length=value)


# Identity


def test_device_functions_are_made_once():
    """Kernels are compiled for each object that a system hands out; other numbers need no other kernels."""
    one, other = Pendulum(), Pendulum(gravity=3.0)
    assert one.device_functions(wp.float64) is other.device_functions(wp.float64)
    assert one.device_functions(wp.float64) is not one.device_functions(wp.float32)
    two, slow, three = (
        s.device_functions(wp.float32) for s in (ws.CartPole(2), ws.CartPole(2, dt=0.1), ws.CartPole(3))
    )
    assert two is slow and two is not three


def test_other_numbers_are_other_systems():
    """Nothing that one system prepared is used for another."""
    x, u = make_states(Pendulum(), 3), make_cotangents(Pendulum(), 1, 3).controls[0]
    for _ in range(2):
        for gravity in (1.0, 2.0, 3.0):
            system = Pendulum(gravity=gravity)
            assert_close(ws.step(system, x, u), step_of(system)(x, u), TOLERANCE[x.dtype])


def test_a_subclass_with_other_physics():
    """Equal numbers do not make systems equal."""

    class Backwards(Pendulum):
        def parameters(self, dtype: Any) -> Any:
            params = super().parameters(dtype)
            params.gravity = -self.gravity
            return params

    x, u = make_states(Pendulum(), 3), make_cotangents(Pendulum(), 1, 3).controls[0]
    for system, gravity in ((Pendulum(), 9.81), (Backwards(), -9.81)):
        assert_close(ws.step(system, x, u), step_of(Pendulum(gravity=gravity))(x, u), TOLERANCE[x.dtype])


def test_copies():
    system = Pendulum(gravity=2.0)
    x, u = make_states(system, 3), make_cotangents(system, 1, 3).controls[0]
    expected = ws.step(system, x, u)
    for twin in (pickle.loads(pickle.dumps(system)), dataclasses.replace(system)):
        assert twin == system and hash(twin) == hash(system)
        assert torch.equal(ws.step(twin, x, u), expected)
    changed = dataclasses.replace(system, gravity=3.0)
    assert_close(ws.step(changed, x, u), step_of(changed)(x, u), TOLERANCE[x.dtype])

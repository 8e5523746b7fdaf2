"""A system whose parts do not fit together is refused before any kernel is made."""

import dataclasses
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
import warp as wp
from own_systems import Pendulum, pendulum_functions

import warp_sims as ws


def make_system(functions, state_size=2, control_size=1, cached=True, parameters=None, cls_name="Wrong"):
    """A pendulum with other device functions, sizes or parameters."""
    factory = functools.cache(functions) if cached else functions

    @dataclasses.dataclass(frozen=True)
    class Wrong(Pendulum):
        def device_functions(self, dtype):
            return factory(dtype)

    Wrong.state_size, Wrong.control_size = state_size, control_size
    if parameters is not None:
        Wrong.parameters = parameters
    return Wrong()


def changed(**fields):
    return lambda dtype: pendulum_functions(dtype)._replace(**fields)


def rolled(system, loss=None):
    n, m = int(system.state_size), int(system.control_size)
    return ws.rollout(system, ws.MLP(n, (3,), m), torch.zeros(4, n), horizon=3, loss=loss)


@pytest.fixture
def no_kernel(monkeypatch):
    """A kernel that is made fails the test."""

    def fail(*args, **kwargs):
        pytest.fail("a kernel was made")

    monkeypatch.setattr(wp, "launch", fail)


def one_value(dtype):
    f = pendulum_functions(dtype)
    State, Control, Params = f.State, f.Control, f.Params

    @wp.func
    def step_vjp(x: State, u: Control, p: Params, adj: State):
        return State(adj[0], adj[1])

    return f._replace(step_vjp=step_vjp)


def other_scalar(dtype):
    return pendulum_functions({wp.float32: wp.float64, wp.float64: wp.float32}[dtype])


@pytest.mark.parametrize(
    ("system", "error", "message"),
    [
        (
            make_system(pendulum_functions, state_size=1),
            ValueError,
            "state_size is 1, but State .* vector of 2",
        ),
        (
            make_system(pendulum_functions, state_size=3),
            ValueError,
            "state_size is 3, but State .* vector of 2",
        ),
        (
            make_system(pendulum_functions, control_size=2),
            ValueError,
            "control_size is 2, but Control .* of 1",
        ),
        (make_system(pendulum_functions, state_size=2.0), TypeError, "state_size is 2.0 of type float"),
        (make_system(other_scalar), TypeError, "State .* holds float64 for float32"),
        (make_system(changed(State=2)), TypeError, "State .* is 2, expected a Warp vector type"),
        (make_system(changed(step=len)), TypeError, "step .* decorate it with @wp.func"),
        (make_system(changed(step=None)), TypeError, "step .* is None, .* supply step"),
        (make_system(changed(step_vjp=1)), TypeError, "step_vjp .* is 1, .* supply step_vjp"),
        (make_system(changed(step_vjp=None, step=len)), TypeError, "step .* decorate it with @wp.func"),
        (make_system(changed(loss_vjp=None)), ValueError, "loss without loss_vjp, expected both or neither"),
        (make_system(changed(loss=None)), ValueError, "loss_vjp without loss, expected both or neither"),
        (make_system(one_value), TypeError, "step_vjp .* returns `State.*`, expected two values"),
        (
            make_system(lambda dtype: pendulum_functions.__wrapped__(dtype), cached=False),
            TypeError,
            "makes new functions at every call, .* functools.cache",
        ),
        (make_system(lambda dtype: None), TypeError, "device_functions returned NoneType"),
        (
            make_system(pendulum_functions, parameters=lambda self, dtype: None),
            TypeError,
            "parameters returned NoneType",
        ),
    ],
)
def test_refused(system, error, message, no_kernel):
    with pytest.raises(error, match=message):
        rolled(system, loss=None)
    with pytest.raises(error, match=message):
        ws.step(system, torch.zeros(4, int(system.state_size)), torch.zeros(4, int(system.control_size)))


def test_arguments_are_counted(no_kernel):
    with pytest.raises(TypeError, match="step .* takes 4 arguments .*, expected 3"):
        rolled(make_system(lambda dtype: changed(step=pendulum_functions(dtype).step_vjp)(dtype)))


def with_array(dtype):
    f = pendulum_functions(dtype)
    State, Control = f.State, f.Control

    @wp.struct
    class ArrayParams:
        table: wp.array(dtype=dtype)

    @wp.func
    def step(x: State, u: Control, p: ArrayParams) -> State:
        return State(x[0] * p.table[0], x[1] + u[0])

    @wp.func
    def step_vjp(x: State, u: Control, p: ArrayParams, adj: State):
        return State(adj[0] * p.table[0], adj[1]), Control(adj[1])

    return ws.DeviceFunctions(ArrayParams, State, Control, step, step_vjp)


def test_an_array_that_was_never_set(no_kernel):
    def empty(self, dtype):
        return self.device_functions(dtype).Params()

    with pytest.raises(ValueError, match="array 'table' of its Params struct is empty"):
        rolled(make_system(with_array, parameters=empty))


def test_an_array_of_the_right_kind():
    def filled(self, dtype):
        params = self.device_functions(dtype).Params()
        params.table = wp.array(np.array([2.0]), dtype=dtype, device="cpu")
        return params

    system = make_system(with_array, parameters=filled)
    assert ws.step(system, torch.ones(3, 2), torch.ones(3, 1)).tolist() == [[2.0, 2.0]] * 3


FUTURE = """
from __future__ import annotations
import dataclasses, functools, torch, warp as wp, warp_sims as ws

@functools.cache
def factory(dtype):
    State, Control = wp.types.vector(length=1, dtype=dtype), wp.types.vector(length=1, dtype=dtype)

    @wp.struct
    class Params:
        dt: dtype

    @wp.func
    def step(x: State, u: Control, p: Params) -> State:
        return State(x[0] + p.dt * u[0])

    @wp.func
    def step_vjp(x: State, u: Control, p: Params, adj: State):
        return State(adj[0]), Control(p.dt * adj[0])

    return ws.DeviceFunctions(Params, State, Control, step, step_vjp)

@dataclasses.dataclass(frozen=True)
class Drift(ws.System):
    dt: float = 0.1
    state_size = control_size = 1
    def device_functions(self, dtype):
        return factory(dtype)

ws.step(Drift(), torch.ones(2, 1), torch.ones(2, 1))
"""


def test_annotations_as_text(tmp_path):
    (tmp_path / "drift.py").write_text(FUTURE)
    environment = {"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "drift.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "TypeError: Drift: its device functions are made in a file with"
    )


def test_a_parameter_that_requires_a_gradient():
    for make in (lambda q: Pendulum(length=q), lambda q: ws.CartPole(pole_length=q)):
        with pytest.raises(TypeError, match="length is .*"):
            make(torch.tensor(0.5, requires_grad=True))

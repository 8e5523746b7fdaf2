"""Systems without a `step_vjp`: Warp generates it, and where it generates a wrong one, it is refused."""

import dataclasses
import functools

import pytest
import torch
import warp as wp
from cases import FLOWS, ROADS, assert_close, gradients, make_net, make_states, on_road
from own_systems import Pendulum, pendulum_functions

import warp_sims as ws

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
"""Of gradients over 6 steps: the same derivative in another order."""


@functools.cache
def bare(dtype, with_loss_vjp):
    """The pendulum's functions less its adjoints."""
    functions = pendulum_functions(dtype)
    return functions._replace(step_vjp=None, loss_vjp=functions.loss_vjp if with_loss_vjp else None)


@dataclasses.dataclass(frozen=True)
class Bare(Pendulum):
    with_loss_vjp: bool = False

    def device_functions(self, dtype):
        return bare(dtype, self.with_loss_vjp)


@functools.cache
def bare_cart(poles, dtype):
    """The cart-pole's functions less its adjoints and its form for CPUs."""
    functions = ws.CartPole(poles=poles).device_functions(dtype)
    return functions._replace(step_vjp=None, loss_vjp=None, block=None)


@dataclasses.dataclass(frozen=True)
class BareCart(ws.CartPole):
    def device_functions(self, dtype):
        return bare_cart(self.poles, dtype)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "pair", [(Pendulum(), Bare()), (ws.CartPole(poles=2), BareCart(poles=2))], ids=["pendulum", "cart"]
)
def test_gradients(road, dtype, pair):
    hand, generated = pair
    net, x0 = make_net(hand, dtype=dtype), make_states(hand, 3, dtype)
    for flow in FLOWS if dtype == torch.float64 else "RMNS":
        asked = {"loss": "running", "control_cost": 0.1, "decay": 0.9}
        expected = gradients(hand, on_road(road, net), x0, 6, flow, **asked)
        assert_close(
            gradients(generated, on_road(road, net), x0, 6, flow, **asked), expected, TOLERANCE[dtype]
        )


def test_the_whole_check_passes():
    assert ws.check(Bare(with_loss_vjp=True)).agrees


MISTAKES = ("written twice", "sum over a long loop", "dynamic loop", "break")


@functools.cache
def wrong(mistake, dtype):
    """Steps whose generated adjoints are wrong in Warp 1.19, and what is the same to the eye."""
    State = wp.types.vector(length=2, dtype=dtype)
    Control = wp.types.vector(length=1, dtype=dtype)

    @wp.struct
    class Params:
        turns: int

    @wp.func
    def twice(x: State, u: Control, p: Params) -> State:
        y = State()
        y[0] = x[0] * x[0]
        y[1] = x[1] + y[0] * y[0]
        y[0] = wp.sin(y[0]) + u[0]
        return y

    @wp.func
    def long_loop(x: State, u: Control, p: Params) -> State:
        s = x[0]
        for _ in range(9):
            s = s + dtype(0.1) * wp.sin(s) * x[1]
        return State(s, x[1] + u[0])

    @wp.func
    def dynamic_loop(x: State, u: Control, p: Params) -> State:
        s = x[0]
        for _ in range(p.turns):
            s = s + dtype(0.1) * wp.sin(s) * x[1]
        return State(s, x[1] + u[0])

    @wp.func
    def breaks(x: State, u: Control, p: Params) -> State:
        s = x[0]
        for i in range(12):
            s = s + dtype(0.1) * wp.sin(s)
            if i == 3:
                break
        return State(s, x[1] + u[0])

    step = dict(zip(MISTAKES, (twice, long_loop, dynamic_loop, breaks)))[mistake]
    return ws.DeviceFunctions(Params, State, Control, step)


@dataclasses.dataclass(frozen=True)
class Wrong(ws.System):
    mistake: str = ""
    turns: int = 3

    state_size = 2
    control_size = 1

    def device_functions(self, dtype):
        return wrong(self.mistake, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_one_is_refused(mistake, dtype):
    system = Wrong(mistake)
    for _ in range(2):  # not only the first time
        with pytest.raises(
            ValueError, match=r"Wrong: .* d x_next\[\d\] / d [xu]\[\d\] is .* by Warp's adjoint"
        ):
            ws.step(system, torch.ones(1, 2, dtype=dtype), torch.ones(1, 1, dtype=dtype))


def test_nothing_is_refused_that_is_right(monkeypatch):
    """A hand-written adjoint is not asked for; the command `check` does that."""
    from warp_sims.bridge.runtime import registry

    def never(*args):
        raise AssertionError

    monkeypatch.setattr(registry, "VERIFIERS", [never])
    ws.step(Pendulum(mass=1.25), torch.ones(1, 2), torch.ones(1, 1))
    with pytest.raises(AssertionError):
        ws.step(Bare(mass=1.25), torch.ones(1, 2), torch.ones(1, 1))

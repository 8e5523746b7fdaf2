"""Bad input is refused by value, with what was expected, before a kernel runs, and nothing has changed."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import warp as wp
from cases import Evaluated, make_net, make_states
from own_systems import Unicycle
from torch import nn
from warp_sims.bridge.runtime.compat import DirectCall
from warp_sims.bridge.runtime.team import _Job

import warp_sims as ws
from warp_sims import plans

CART = ws.CartPole(poles=2)
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def no_launch(monkeypatch):
    """A kernel that runs fails the test."""

    def fail(*args, **kwargs):
        pytest.fail("a kernel was launched")

    monkeypatch.setattr(wp, "launch", fail)
    monkeypatch.setattr(wp.Launch, "launch", fail)
    monkeypatch.setattr(DirectCall, "__call__", fail)
    monkeypatch.setattr(_Job, "__call__", fail)


class Returning(nn.Module):
    """A policy that returns whatever a function makes of its states."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(6, 1)

    def forward(self, x):
        return self.function(x)


def with_value(value, world=2, component=3):
    x0 = make_states(CART, 5, torch.float32)
    x0[world, component] = value
    return x0


def mlp(dtype=torch.float32, **sizes):
    return ws.MLP(*sizes.values(), dtype=dtype)


ROLLOUT = [
    # system
    ({"system": "cartpole"}, TypeError, "system is 'cartpole', expected a warp_sims.System such as CartPole"),
    ({"system": ws.CartPole}, TypeError, "system is <class .*CartPole.*make an instance"),
    ({"system": None}, TypeError, "system is None, expected a warp_sims.System"),
    # states
    ({"x0": [[0.0] * 6]}, TypeError, "x0 is of type list, expected a tensor.*torch.as_tensor"),
    ({"x0": torch.zeros(5, 6).numpy()}, TypeError, "x0 is of type ndarray, expected a tensor"),
    ({"x0": torch.zeros(6)}, ValueError, r"x0 has shape \(6,\), expected \(nworld, 6\) for CartPole"),
    ({"x0": torch.zeros(())}, ValueError, r"x0 has shape \(\), expected \(nworld, 6\)"),
    ({"x0": torch.zeros(2, 3, 6)}, ValueError, r"x0 has shape \(2, 3, 6\), expected \(nworld, 6\)"),
    ({"x0": torch.zeros(5, 5)}, ValueError, r"x0 has shape \(5, 5\), expected \(nworld, 6\)"),
    ({"x0": torch.zeros(6, 5)}, ValueError, r"x0 has shape \(6, 5\), expected \(nworld, 6\)"),
    (
        {"x0": torch.zeros(5, 6, dtype=torch.int64)},
        TypeError,
        r"x0 is torch.int64, expected .*float32.*\.float",
    ),
    ({"x0": torch.zeros(5, 6, dtype=torch.bool)}, TypeError, "x0 is torch.bool, expected torch.float32"),
    (
        {"x0": torch.zeros(5, 6, dtype=torch.float16)},
        TypeError,
        "x0 is torch.float16, expected torch.float32",
    ),
    ({"x0": torch.zeros(5, 6, dtype=torch.bfloat16)}, TypeError, "x0 is torch.bfloat16, expected"),
    ({"x0": torch.zeros(5, 6, dtype=torch.complex64)}, TypeError, "x0 is torch.complex64, expected"),
    (
        {"x0": torch.zeros(5, 6, device="meta")},
        ValueError,
        r"x0 is on meta, expected a CPU or a CUDA.*\.to\(",
    ),
    ({"x0": torch.zeros(5, 6).to_sparse()}, (TypeError, ValueError), "x0 .*sparse.*expected"),
    ({"x0": with_value(NAN)}, ValueError, "x0: 1 of 5 worlds .*world 2.*nan.*expected finite"),
    ({"x0": with_value(INF, 0)}, ValueError, "x0: 1 of 5 worlds .*world 0.*inf.*expected finite"),
    ({"x0": with_value(-INF, 4, 5)}, ValueError, "x0: 1 of 5 worlds .*world 4.*inf.*expected finite"),
    ({"x0": torch.full((5, 6), NAN)}, ValueError, "x0: 5 of 5 worlds .*world 0, 1, 2, 3, 4"),
    (
        {"x0": torch.full((500, 6), INF)},
        ValueError,
        r"x0: 500 of 500 worlds .*0, 1, 2, 3, 4, 5, 6, 7, \.\.\.",
    ),
    # horizon
    ({"horizon": 0}, ValueError, "horizon is 0, expected at least 1"),
    ({"horizon": -3}, ValueError, "horizon is -3, expected at least 1"),
    ({"horizon": 2.0}, TypeError, "horizon is 2.0 of type float, expected an int"),
    ({"horizon": True}, TypeError, "horizon is True of type bool, expected an int"),
    ({"horizon": None}, TypeError, "horizon is None of type NoneType, expected an int"),
    ({"horizon": "3"}, TypeError, "horizon is '3' of type str, expected an int"),
    # window, decay
    ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ({"window": -1}, ValueError, "window is -1, expected at least 1"),
    ({"window": 1.5}, TypeError, "window is 1.5 of type float, expected an int"),
    ({"window": False}, TypeError, "window is False of type bool, expected an int"),
    ({"decay": -0.01}, ValueError, r"decay is -0.01, expected a number in \[0, 1\]"),
    ({"decay": 1.01}, ValueError, r"decay is 1.01, expected a number in \[0, 1\]"),
    ({"decay": NAN}, ValueError, r"decay is nan, expected a number in \[0, 1\]"),
    ({"decay": INF}, ValueError, r"decay is inf, expected a number in \[0, 1\]"),
    ({"decay": "0.5"}, TypeError, r"decay is '0.5' of type str, expected a number in \[0, 1\]"),
    ({"decay": None}, TypeError, "decay is None of type NoneType, expected a number"),
    # loss
    ({"loss": "last"}, ValueError, 'loss is \'last\', expected "final", "running", a callable.*None'),
    ({"loss": "FINAL"}, ValueError, "loss is 'FINAL', expected \"final\""),
    ({"loss": 1.0}, TypeError, 'loss is 1.0, expected "final", "running", a callable.*None'),
    ({"control_cost": -1.0}, ValueError, "control_cost is -1.0, expected a finite number of at least 0"),
    ({"control_cost": NAN}, ValueError, "control_cost is nan, expected a finite number of at least 0"),
    ({"control_cost": INF}, ValueError, "control_cost is inf, expected a finite number of at least 0"),
    ({"control_cost": "1"}, TypeError, "control_cost is '1' of type str, expected a number"),
    # policy
    (
        {"policy": lambda x: x[:, :1]},
        TypeError,
        "policy is of type function, expected a torch.nn.Module.*wrap",
    ),
    ({"policy": ws.MLP}, TypeError, "policy is of type type, expected a torch.nn.Module"),
    (
        {"policy": mlp(n=6, h=(5,), m=2)},
        ValueError,
        "6 inputs to 2 outputs, expected 6 .*to 1 .*for CartPole",
    ),
    (
        {"policy": mlp(n=5, h=(5,), m=1)},
        ValueError,
        "5 inputs to 1 outputs, expected 6 .*to 1 .*for CartPole",
    ),
    (
        {"policy": mlp(torch.float64, n=6, h=(5,), m=1)},
        TypeError,
        "'0.weight' is torch.float64, expected .*float32",
    ),
    (
        {"policy": mlp(torch.bfloat16, n=6, h=(), m=1)},
        TypeError,
        "'0.weight' is torch.bfloat16, expected .*float32",
    ),
    ({"policy": mlp(n=6, h=(5,), m=1).to("meta")}, ValueError, "'0.weight' is on meta, expected cpu"),
    ({"policy": nn.Linear(6, 1, device="meta")}, ValueError, "'weight' is on meta, expected cpu"),
    ({"policy": nn.Linear(6, 1).double()}, TypeError, "'weight' is torch.float64, expected torch.float32"),
    (
        {"policy": Returning(lambda x: x[:, :2])},
        ValueError,
        r"policy returned shape \(\d, 2\) for \d states, expected \(\d, 1\)",
    ),
    ({"policy": nn.Linear(6, 2)}, ValueError, r"policy maps 6 inputs to 2 outputs, expected 6 .* to 1"),
    ({"policy": nn.Linear(5, 1)}, (TypeError, ValueError), "policy.*expected"),
    (
        {"policy": nn.Flatten(0)},
        ValueError,
        r"policy returned shape \(\d+,\) for \d states, expected \(\d, 1\)",
    ),
    (
        {"policy": Returning(lambda x: x[0, :1])},
        ValueError,
        r"policy returned shape \(1,\) .*expected \(\d, 1\)",
    ),
    ({"policy": Returning(lambda x: (x[:, :1],))}, TypeError, "policy returned tuple, expected a tensor"),
    ({"policy": Returning(lambda x: None)}, TypeError, "policy returned NoneType, expected a tensor"),
    ({"policy": Returning(lambda x: x[:, :1].long())}, TypeError, "policy returned torch.int64, expected"),
    ({"policy": Returning(lambda x: x[:, :1] - x.mean())}, ValueError, "policy is not row by row.*eval"),
    (
        {"policy": Returning(lambda x: torch.randn(len(x), 1))},
        ValueError,
        "policy is not deterministic.*eval",
    ),
    (
        {"policy": nn.Sequential(nn.LazyLinear(1))},
        ValueError,
        "'0.weight' has no shape yet, expected initialised",
    ),
]
# What only some calls take.
FLOW = [
    ({"flow": "modifed"}, ValueError, '\'modifed\', expected "regular", "modified".*"C"'),
    ({"flow": "RM"}, ValueError, "'RM', expected \"regular\""),
    ({"flow": ""}, ValueError, "'', expected \"regular\""),
    ({"flow": 1}, TypeError, "flow is 1 of type int, expected a name, a letter, a Flow or a list"),
    ({"flow": None}, TypeError, "flow is None of type NoneType, expected a name"),
    ({"flow": ["R", "M"]}, ValueError, "flow is a list of 2 entries, expected one per step, horizon=4"),
    ({"flow": []}, ValueError, "flow is a list of 0 entries, expected one per step, horizon=4"),
    ({"flow": ["R"] * 5}, ValueError, "flow is a list of 5 entries, expected one per step, horizon=4"),
    ({"flow": ["R", "M", "X", "N"]}, ValueError, "'X', expected \"regular\""),
    ({"flow": ["R", "M", 2, "N"]}, TypeError, '2 of type int, expected "regular"'),
    ({"flow": ["R", "C", "M", "N"]}, ValueError, "'combined' at step 1, expected .*'stopped'.*gradient_pair"),
    ({"loss": None, "control_cost": 0.5}, ValueError, "control_cost is 0.5 with loss=None, expected 0"),
]
PAIR = [
    ({"base": "combined"}, ValueError, "base is 'combined', expected .*'stopped'"),
    ({"check": "C"}, ValueError, "check is 'combined', expected .*'stopped'"),
    ({"base": "x"}, ValueError, "'x', expected \"regular\""),
    ({"check": ["R"]}, ValueError, "flow is a list of 1 entries, expected one per step, horizon=4"),
    ({"loss": None}, ValueError, 'loss is None, expected "final", "running" or a callable'),
]


def arguments(change):
    return {
        "system": CART,
        "policy": make_net(CART, dtype=torch.float32),
        "x0": make_states(CART, 5, torch.float32),
        "horizon": 4,
    } | change


def label(case):
    name, value = next(iter(case[0].items()))
    # without addresses: all processes that share the tests must name them alike
    return re.sub(r"\W+", " ", re.sub(r" at 0x\w+", "", f"{name} {value}"))[:50].strip()


def table(cases):
    return pytest.mark.parametrize("change, error, message", cases, ids=map(label, cases))


def refuses(call, change, error, message):
    """The call raises, and parameters, their gradients, x0 and torch's random numbers are what they were."""
    given = arguments(change)
    policy = given["policy"] if isinstance(given["policy"], nn.Module) else nn.Module()
    kept = [p for p in policy.parameters() if not nn.parameter.is_lazy(p)]
    for p in kept:
        p.grad = torch.full_like(p, 0.5)
    before = [p.detach().clone() for p in kept]
    x0 = given["x0"].clone() if isinstance(given["x0"], torch.Tensor) else None
    random = torch.get_rng_state()
    with pytest.raises(error, match=re.compile(message, re.DOTALL)) as caught:
        call(**given)
    # what torch or a smaller part finds names itself
    assert call.__name__ in str(caught.value) or message.startswith(("x0: ", "'", "2 of type"))
    assert torch.equal(torch.get_rng_state(), random)
    for p, old in zip(kept, before, strict=True):
        assert p.device.type == "meta" or (torch.equal(p, old) and bool((p.grad == 0.5).all()))
    if x0 is not None and x0.device.type != "meta" and not x0.is_sparse:
        assert torch.equal(x0.nan_to_num(), given["x0"].nan_to_num())


@table(ROLLOUT + FLOW)
def test_rollout(change, error, message, no_launch):
    refuses(ws.rollout, change, error, message)


@table(ROLLOUT + PAIR)
def test_gradient_pair(change, error, message, no_launch):
    refuses(ws.gradient_pair, change, error, message)


@table([case for case in ROLLOUT if "x0" in case[0]])
def test_rollout_of_a_policy_that_torch_evaluates(change, error, message, no_launch):
    policy = Evaluated(make_net(CART, dtype=torch.float32))
    refuses(ws.rollout, {"policy": policy} | change, error, message)


@pytest.mark.parametrize("call", [ws.rollout, ws.gradient_pair])
def test_losses_that_are_no_scalar(call):
    for loss, error, message in (
        (
            lambda states, controls: states[-1, :, 0],
            ValueError,
            r"loss returned .*shape \(5,\), expected a scalar",
        ),
        (lambda states, controls: states[-1].sum()[None], ValueError, r"shape \(1,\), expected a scalar"),
        (lambda states, controls: 1.0, TypeError, "loss returned float, expected a scalar tensor"),
        (lambda states, controls: None, TypeError, "loss returned NoneType, expected a scalar tensor"),
    ):
        refuses(call, {"loss": loss}, error, message)


@pytest.mark.parametrize("call", [ws.rollout, ws.gradient_pair])
def test_a_loss_that_the_system_lacks(call, no_launch):
    change = {"system": Unicycle(), "policy": make_net(Unicycle()), "x0": make_states(Unicycle(), 5)}
    for loss in ("final", "running"):
        refuses(call, change | {"loss": loss}, ValueError, f"loss is '{loss}', but Unicycle has no loss")


# Open loop

X, U = torch.zeros(5, 6), torch.zeros(4, 5, 1)


@pytest.mark.parametrize(
    "x0, controls, error, message",
    [
        (X, [[0.0]], TypeError, "controls is of type list, expected a tensor"),
        (
            X,
            U[0],
            ValueError,
            r"controls has shape \(5, 1\), expected \(horizon, nworld, control_size\) .*5, 1\)",
        ),
        (X, U[:0], ValueError, r"controls has shape \(0, 5, 1\), expected .*at least 1, 5, 1"),
        (X, U[:, :3], ValueError, r"controls has shape \(4, 3, 1\), expected .*5, 1"),
        (X, torch.zeros(4, 5, 2), ValueError, r"controls has shape \(4, 5, 2\), expected .*5, 1"),
        (X, torch.zeros(5, 4, 1), ValueError, r"controls has shape \(5, 4, 1\), expected .*time first"),
        (X, U.double(), TypeError, "controls is torch.float64, expected torch.float32"),
        (X, U.long(), TypeError, "controls is torch.int64, expected torch.float32"),
        (X, U.to("meta"), ValueError, "controls is on meta, expected cpu"),
        (X[:, :5], U, ValueError, r"x0 has shape \(5, 5\), expected \(nworld, 6\)"),
        (X.long(), U, TypeError, "x0 is torch.int64, expected torch.float32"),
        (X.to("meta"), U, ValueError, "x0 is on meta, expected a CPU or a CUDA device"),
        (with_value(NAN), U, ValueError, "1 of 5 worlds .*world 2.*expected finite"),
    ],
)
def test_simulate(x0, controls, error, message, no_launch):
    with pytest.raises(error, match=message):
        ws.simulate(CART, x0, controls)


@pytest.mark.parametrize(
    "x, u, error, message",
    [
        (X, 0.0, TypeError, "u is of type float, expected a tensor"),
        (X, U[0, :, 0], ValueError, r"u has shape \(5,\), expected \(nworld, control_size\) = \(5, 1\)"),
        (X, U[0, :3], ValueError, r"u has shape \(3, 1\), expected .*\(5, 1\)"),
        (X, U, ValueError, r"u has shape \(4, 5, 1\), expected .*\(5, 1\)"),
        (X, U[0].double(), TypeError, "u is torch.float64, expected torch.float32"),
        (X, U[0].to("meta"), ValueError, "u is on meta, expected cpu"),
        (X[0], U[0], ValueError, r"x has shape \(6,\), expected \(nworld, 6\)"),
        (X.half(), U[0].half(), TypeError, "x is torch.float16, expected torch.float32"),
        (with_value(INF), U[0], ValueError, "1 of 5 worlds .*world 2.*expected finite"),
    ],
)
def test_step(x, u, error, message, no_launch):
    with pytest.raises(error, match=message):
        ws.step(CART, x, u)


def test_open_loop_of_no_system(no_launch):
    with pytest.raises(TypeError, match="simulate: system is <class .*make an instance"):
        ws.simulate(ws.CartPole, X, U)
    with pytest.raises(TypeError, match="step: system is None, expected a warp_sims.System"):
        ws.step(None, X, U[0])


# Systems


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"poles": 0}, ValueError, "CartPole: poles is 0, expected at least 1"),
        ({"poles": -2}, ValueError, "CartPole: poles is -2, expected at least 1"),
        ({"poles": 2.0}, TypeError, "CartPole: poles is 2.0 of type float, expected an int"),
        ({"poles": "2"}, TypeError, "CartPole: poles is '2' of type str, expected an int"),
        ({"poles": True}, TypeError, "CartPole: poles is True of type bool, expected an int"),
        ({"dt": 0.0}, ValueError, "CartPole: dt is 0.0, expected a finite number above 0"),
        ({"dt": -0.01}, ValueError, "CartPole: dt is -0.01, expected a finite number above 0"),
        ({"dt": NAN}, ValueError, "CartPole: dt is nan, expected a finite number above 0"),
        ({"dt": INF}, ValueError, "CartPole: dt is inf, expected a finite number above 0"),
        ({"dt": "0.01"}, TypeError, "CartPole: dt is '0.01' of type str, expected a number"),
        ({"dt": None}, TypeError, "CartPole: dt is None of type NoneType, expected a number"),
        ({"gravity": NAN}, ValueError, "CartPole: gravity is nan, expected a finite number"),
        ({"gravity": -INF}, ValueError, "CartPole: gravity is -inf, expected a finite number"),
        ({"total_mass": 0.0}, ValueError, "CartPole: total_mass is 0.0, expected a finite number above 0"),
        ({"total_mass": NAN}, ValueError, "CartPole: total_mass is nan, expected a finite number above 0"),
        ({"pole_mass": 1.1}, ValueError, "CartPole: pole_mass is 1.1, expected .*below total_mass=1.1"),
        ({"pole_mass": -0.1}, ValueError, "CartPole: pole_mass is -0.1, expected at least 0"),
        ({"pole_mass": NAN}, ValueError, "CartPole: pole_mass is nan, expected at least 0"),
        ({"pole_length": 0.0}, ValueError, "CartPole: pole_length is 0.0, expected a finite number above 0"),
        ({"pole_length": INF}, ValueError, "CartPole: pole_length is inf, expected a finite number above 0"),
        ({"pole": 2}, TypeError, "unexpected keyword argument 'pole'"),
    ],
    ids=str,
)
def test_cartpole(fields, error, message):
    with pytest.raises(error, match=message):
        ws.CartPole(**fields)


def test_systems_do_not_change():
    with pytest.raises(AttributeError, match="cannot assign to field 'dt'"):
        CART.dt = 0.1


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"n": -1}, ValueError, "n is -1, expected at least 0"),
        ({"n": 2.0}, TypeError, "n is 2.0 of type float, expected an int"),
        ({"n": 3, "seed": -1}, ValueError, "seed is -1, expected 0"),
        ({"n": 3, "seed": 2**32}, ValueError, "seed is 4294967296, expected 0"),
        ({"n": 3, "seed": None}, TypeError, "seed is None of type NoneType, expected an int"),
        ({"n": 3, "split": "validation"}, ValueError, 'split is \'validation\', expected "train" or "test"'),
    ],
)
def test_initial_states(options, error, message):
    with pytest.raises(error, match=message):
        CART.initial_states(**options)


# Policies


@pytest.mark.parametrize(
    "sizes, error, message",
    [
        ((6, (0,), 1), ValueError, r"size 0 in \(6, 0, 1\), expected sizes of at least 1"),
        ((0, (5,), 1), ValueError, r"size 0 in \(0, 5, 1\), expected sizes of at least 1"),
        ((6, (5, -1), 1), ValueError, r"size -1 in \(6, 5, -1, 1\), expected sizes of at least 1"),
        ((6, (5,), 0), ValueError, "size 0 .*expected sizes of at least 1"),
        ((6, 5, 1), TypeError, r"hidden is 5, expected a sequence of widths such as \(100, 100\)"),
        ((6, None, 1), TypeError, "hidden is None, expected a sequence of widths"),
        ((6, (5.0,), 1), TypeError, "size 5.0 is of type float, expected an int"),
        ((6.0, (5,), 1), TypeError, "size 6.0 is of type float, expected an int"),
        ((6, (5,), True), TypeError, "size True is of type bool, expected an int"),
        ((6, "55", 1), TypeError, "expected"),
    ],
    ids=str,
)
def test_mlp(sizes, error, message):
    with pytest.raises(error, match=f"MLP: .*{message}"):
        ws.MLP(*sizes)


@pytest.mark.parametrize("call", [ws.rollout, ws.gradient_pair])
@pytest.mark.parametrize(
    ("horizon", "worlds", "message"),
    [
        (10**12, 3, "horizon is 1000000000000 with 3 worlds of 1 controls, expected at most"),
        (10**7, 50_000, "horizon is 10000000 with 50000 worlds of 1 controls, expected at most"),
        (
            2 * 10**9,
            1,
            "horizon is 2000000000 with 1 worlds: states and controls take .* GiB, expected at most",
        ),
    ],
)
def test_a_horizon_that_does_not_fit(call, horizon, worlds, message, no_launch, monkeypatch):
    monkeypatch.setattr(plans, "_memory", lambda device: 2**35)
    with pytest.raises(ValueError, match=message):
        call(CART, make_net(CART), torch.zeros(worlds, 6).double(), horizon=horizon)


def test_whole_numbers_of_other_libraries():
    net, x0 = make_net(CART), make_states(CART, 3)
    expected = ws.rollout(CART, net, x0, horizon=4, window=2, checkpoint_every=3).states
    for whole in (np.int64, np.int32, np.uint8, torch.tensor):
        out = ws.rollout(CART, net, x0, horizon=whole(4), window=whole(2), checkpoint_every=whole(3))
        assert torch.equal(out.states, expected)
    for wrong in (4.0, np.float64(4), np.bool_(True), True, "4", None, torch.tensor(4.0)):
        with pytest.raises(TypeError, match="horizon is"):
            ws.rollout(CART, net, x0, horizon=wrong)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_policy_that_changes_its_input(gradient):
    """The states are the user's: refused, and x0 as it was."""
    policy = Returning(lambda x: x.mul_(2.0)[:, :1]).double()
    x0 = make_states(CART, 3)
    before = x0.clone()
    with pytest.raises(ValueError, match="policy.* chang.* its input in place.*x.clone"):
        if gradient:
            torch.func.grad(lambda x: ws.rollout(CART, policy, x, horizon=3).loss)(x0)
        else:
            ws.rollout(CART, policy, x0, horizon=3)
    assert torch.equal(x0, before)


def test_a_policy_that_changes_its_input_later():
    def late(x):
        return (x.mul_(2.0) if float(x.abs().max()) > 5.0 else x)[:, :1]

    x0 = make_states(CART, 9)
    before = x0.clone()
    with pytest.raises(ValueError, match="changed its input in place at step"):
        ws.rollout(CART, Returning(late).double(), x0, horizon=200)
    assert torch.equal(x0, before)

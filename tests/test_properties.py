"""Random calls: whatever is valid agrees with autograd through a float64 unroll, whatever is not is refused.

`WARP_SIMS_EXAMPLES` is the number of examples of each property (60 by default); docs/reliability.md says how
many were tried.
"""

import os

import pytest
import torch
from cases import Evaluated, describe, expected_gradients, gradients, make_cotangents, make_net, make_states
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_systems import Pendulum, Unicycle
from torch import nn
from warp_sims.bridge.autograd import operators
from warp_sims.bridge.passes.spec import Spec

import warp_sims as ws

EXAMPLES = int(os.environ.get("WARP_SIMS_EXAMPLES", "60"))
random_calls = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

SYSTEMS = [
    ws.CartPole(poles=1),
    ws.CartPole(poles=2, dt=0.03, pole_mass=0.3),
    ws.GuidanceByRepulsion(drivers=1, evaders=2),
    ws.QuantumControl(points=6),
    Pendulum(length=0.7),
    Unicycle(),
]
DTYPES = [torch.float32, torch.float64]


class Wide(nn.Module):
    """A policy of what the sweeps do not fuse: a norm, a skip, features; with one frozen parameter."""

    def __init__(self, net):
        super().__init__()
        n = net[0].in_features
        self.norm = nn.LayerNorm(n, dtype=net[0].weight.dtype)
        self.net = net
        self.gain = nn.Parameter(torch.ones((), dtype=net[0].weight.dtype), requires_grad=False)

    def forward(self, x):
        return self.gain * self.net(torch.sin(x) + 0.1 * self.norm(x)) + 0.1 * x[:, :1]


def viewed(x, how):
    """The same values in other memory: strides, offsets, copies of one row."""
    if how == "transposed":
        return x.T.contiguous().T
    if how == "sliced":
        padded = torch.full((2 * x.shape[0] + 1, x.shape[1] + 3), float("nan"), dtype=x.dtype)
        padded[1::2, 2:-1] = x
        return padded[1::2, 2:-1]
    if how == "expanded" and x.shape[0]:
        return x[:1].expand_as(x)
    if how == "negated":
        return torch._neg_view(-x)
    return x


@st.composite
def calls(draw, dtypes=DTYPES, flows="RMNSC"):
    """Arguments of a valid rollout."""
    system = draw(st.sampled_from(SYSTEMS))
    dtype, horizon = draw(st.sampled_from(dtypes)), draw(st.integers(1, 9))
    hidden = draw(st.lists(st.integers(1, 11), max_size=3))
    flow = draw(
        st.one_of(
            st.sampled_from(flows),
            st.lists(st.sampled_from("RMNS"), min_size=horizon, max_size=horizon).map(tuple),
        )
    )
    options = {
        "decay": draw(st.sampled_from([1.0, 1.0, 0.0, 0.3, 0.97])),
        "window": draw(st.one_of(st.none(), st.integers(1, 12))),
    }
    loss = draw(st.sampled_from(["final", "running", None]))
    if isinstance(system, Unicycle):
        loss = None
    return {
        "system": system,
        "net": make_net(system, tuple(hidden), dtype, seed=draw(st.integers(0, 50)), gain=2.0),
        "road": draw(st.sampled_from(["fused", "torch", "wide"])),
        "x0": viewed(
            0.7 * make_states(system, draw(st.integers(1, 19)), dtype, seed=draw(st.integers(0, 50))),
            draw(st.sampled_from(["", "transposed", "sliced", "expanded", "negated"])),
        ),
        "horizon": horizon,
        "flow": flow,
        "loss": loss,
        "control_cost": 0.0 if loss is None else draw(st.sampled_from([0.0, 0.5])),
        "options": options,
        "checkpoint_every": draw(st.one_of(st.none(), st.integers(1, 12))),
        "cotangents": loss is None or draw(st.booleans()),
    }


def compared(call, tolerance):
    """Gradients of a call against the oracle in float64, and that no input has changed."""
    system, net, x0, horizon = call["system"], call["net"], call["x0"], call["horizon"]
    policy = {"fused": lambda q: q, "torch": Evaluated, "wide": Wide}[call["road"]](net)
    before, weights = x0.clone(), [q.detach().clone() for q in policy.parameters()]
    flow = call["flow"] if isinstance(call["flow"], str) else list(call["flow"])
    given = make_cotangents(system, horizon, x0.shape[0], x0.dtype) if call["cotangents"] else None
    asked = {"loss": call["loss"], "control_cost": call["control_cost"], **call["options"]}
    found = gradients(
        system,
        policy,
        x0,
        horizon,
        flow,
        cotangents=given,
        checkpoint_every=call["checkpoint_every"],
        **asked,
    )
    assert torch.equal(x0, before), "x0 has changed"
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), weights)), "a weight has changed"
    policy.zero_grad()
    exact = None if given is None else type(given)(*(g.double() for g in given))
    expected = expected_gradients(
        system,
        policy.double(),
        x0.double().clone(memory_format=torch.contiguous_format),
        horizon,
        flow,
        cotangents=exact,
        **asked,
    )
    scale = max(float(torch.linalg.vector_norm(g)) for g in expected.values()) + 1e-30
    for name, value in expected.items():
        off = float(torch.linalg.vector_norm(found[name].double() - value))
        assert off <= tolerance * scale, f"{name}: off by {off / scale:.2g} of the largest gradient"


@random_calls
@given(calls(dtypes=[torch.float64]))
def test_valid_calls_in_double_precision(call):
    compared(call, 1e-9)


@random_calls
@given(calls(dtypes=[torch.float32], flows="RMNS"))
def test_valid_calls_in_single_precision(call):
    """Not C, whose signs may differ where a component is rounding."""
    compared(call, 2e-3)


NAN, INF = float("nan"), float("inf")
CART, NET = SYSTEMS[0], make_net(SYSTEMS[0], (3,))
X0 = make_states(CART, 4)
JUNK = st.sampled_from(
    [
        # no tensors
        None, True, False, 0, 1, -1, 3, 10**12, 2.5, 0.0, -0.0, NAN, INF, -INF, "", "C", "R", "final", b"R",
        "running", "combined", [], ["R"], ["R", "M"], ["C", "C"], [1, 2], (), {}, {"a": 1}, object, object(),
        len, print, lambda *a: None, lambda states, controls: states.mean(), lambda states, controls: states,
        lambda states, controls: 1.0,
        # systems and modules
        CART, ws.CartPole, ws.CartPole(poles=3), NET, nn.Linear(4, 1), nn.Linear(3, 1), nn.Identity(),
        nn.Linear(4, 1).double(), nn.Linear(4, 2).double(), nn.LazyLinear(1), nn.Linear(4, 1, device="meta"),
        # tensors
        X0, X0.float(), X0.half(), X0.bfloat16(), X0.long(), X0 > 0, X0.to(torch.complex128), X0[:0], X0[0],
        X0[:, :3], X0[None], X0 * NAN, X0 * INF, X0.to("meta"), X0.to_sparse(), X0.numpy(), X0.tolist(),
        X0[:, :1], X0[:, :1].expand(2, 4, 1), X0[None, :, :1], torch.tensor(3), torch.tensor(2.0), X0.T,
        X0.T.contiguous().T, torch.zeros(3, 4, 1).double(), torch.zeros(0, 4, 1).double(),
        torch.zeros(2, 0, 1).double(), X0[:1].expand(4, 4),
    ]
)  # fmt: skip
ROLLOUT = {
    "system": CART, "policy": NET, "x0": X0, "horizon": 3, "flow": "C", "loss": "final", "control_cost": 0.0,
    "window": None, "decay": 1.0, "checkpoint_every": None,
}  # fmt: skip
PAIR = {k: v for k, v in ROLLOUT.items() if k != "flow"} | {"base": "modified", "check": "regular"}
CALLS = {
    "rollout": (ws.rollout, ROLLOUT),
    "gradient_pair": (ws.gradient_pair, PAIR),
    "simulate": (ws.simulate, {"system": CART, "x0": X0, "controls": torch.zeros(3, 4, 1).double()}),
    "step": (ws.step, {"system": CART, "x": X0, "u": torch.zeros(4, 1).double()}),
}


@pytest.mark.parametrize("name", CALLS)
@random_calls
@given(data=st.data())
def test_invalid_calls(name, data):
    """One or two arguments are replaced by anything: only TypeError and ValueError may come of it."""
    call, arguments = CALLS[name]
    wrong = data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=2, unique=True))
    changed = arguments | {key: data.draw(JUNK, label=key) for key in wrong}
    before = X0.clone()
    try:
        out = call(**changed)
        if isinstance(out, ws.Rollout) and out.loss is not None and out.loss.requires_grad:
            out.loss.sum().backward()
    except (TypeError, ValueError) as error:
        assert len(str(error)) > 20, "an error that says nothing"
    assert torch.equal(X0, before)


def operator_samples():
    """Arguments of every operator that are valid, and small."""
    cart, x0 = CART.number, make_states(CART, 3)
    parameters = [q.detach() for q in make_net(CART, (5,)).parameters()]
    network = describe(4, 5, 1)
    controls = torch.zeros(2, 3, 1).double()
    states = operators.simulate(cart, x0, controls, True)
    spec = Spec(cart, "MM", "RR", 0.9, 1.0, 0.0, 0.1)
    states, controls, _, hidden, packed = operators.fused_rollout(spec, network, parameters, x0)
    one, jac = torch.ones((), dtype=torch.float64), torch.zeros(2, 3, 1, 4).double()
    arrived = (one, torch.ones_like(states), None)
    return {
        "simulate": (cart, x0, controls, True),
        "loss": (*spec.arguments(), states, controls),
        "fused_rollout": (*spec.arguments(), network, parameters, x0),
        "fused_backward": (*spec.arguments(), network, packed, hidden, states, controls, *arrived),
        "adjoint": (*spec.arguments(), states, controls, controls, 1e-9, jac, *arrived, 0, None, 0),
        "combine": (torch.randn(7).double(), torch.randn(7).double(), False),
    }


@pytest.mark.parametrize(
    "name", ["simulate", "loss", "fused_rollout", "fused_backward", "adjoint", "combine"]
)
def test_operators(name):
    """Schema, tracing with shapes alone, and compiled graphs agree with the operator."""
    found = torch.library.opcheck(getattr(operators, name)._operator, operator_samples()[name])
    assert set(found.values()) == {"SUCCESS"}

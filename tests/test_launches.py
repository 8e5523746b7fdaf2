"""How many kernels run, and which policies are refused before any does."""

from collections import Counter, OrderedDict

import pytest
import torch
import warp as wp
from cases import (
    FLOWS,
    Evaluated,
    gradients,
    make_net,
    make_states,
)
from torch import nn
from warp_sims.bridge.passes import fused, fused_backward, sweeps
from warp_sims.bridge.runtime import compat, tracing
from warp_sims.bridge.runtime.compat import DIRECT_CALLS, DirectCall
from warp_sims.bridge.runtime.launches import Launch
from warp_sims.bridge.runtime.team import _Job
from warp_sims.kernels import programs
from warp_sims.kernels.agreement import make_combine

import warp_sims as ws

CART = ws.CartPole(poles=2, dt=0.05)
HORIZON = 7
WORLDS = 5


@pytest.fixture
def x0():
    return make_states(CART, WORLDS)


def run(policy, x0, flow="C", **options):
    return ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow, **{"loss": "running"} | options)


# Launches


@pytest.fixture
def launches(monkeypatch):
    """Counts the kernels that run, by the name of their function: those that Warp launches, those called past
    it, and those that a program makes, as its threads record them.
    """
    counts = Counter()
    launch, replay, call, started = wp.launch, wp.Launch.launch, DirectCall.__call__, _Job.__call__

    def name(kernel):
        return kernel.func.__name__.strip("_")

    def counted_launch(kernel, *args, **kwargs):
        if not kwargs.get("record_cmd"):
            counts[name(kernel)] += 1
        return launch(kernel, *args, **kwargs)

    def counted_replay(self, *args, **kwargs):
        counts[name(self.kernel)] += 1
        return replay(self, *args, **kwargs)

    def counted_call(self):
        if self._command.kernel is not programs.run_job:
            counts[name(self._command.kernel)] += 1
        call(self)

    def counted_job(self):
        with tracing.trace(torch.device("cpu")) as tracer:
            started(self)
        counts.update(event.name for event in tracer.events())

    monkeypatch.setattr(wp, "launch", counted_launch)
    monkeypatch.setattr(wp.Launch, "launch", counted_replay)
    monkeypatch.setattr(DirectCall, "__call__", counted_call)
    monkeypatch.setattr(_Job, "__call__", counted_job)
    return counts


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("horizon", [1, 100])
def test_launches_of_a_fused_rollout(launches, flow, horizon):
    net, x0 = make_net(CART), make_states(CART, 3)
    gradients(CART, net, x0, horizon, flow)  # compiles, prepares
    launches.clear()
    gradients(CART, net, x0, horizon, flow)
    assert launches["fused_rollout"] == 1
    assert launches["adjoint"] == 1
    # one field of parameters and one of x0 are compared
    assert launches["combine"] == (2 if flow == "C" else 0)
    wide = {"network_linearize": 1, "network_weight_grad": 1, "network_sum_partial": 1}
    assert all(launches[name] == count for name, count in wide.items())
    assert launches.total() == 2 + launches["combine"] + sum(wide.values()), launches


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("horizon", [1, 100])
def test_launches_of_a_policy_that_torch_evaluates(launches, flow, horizon):
    """Step by step forwards, where the policy stands between two steps; one sweep backwards."""
    policy, x0 = Evaluated(make_net(CART)), make_states(CART, 3)
    calls = []
    policy.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    gradients(CART, policy, x0, horizon, flow)
    launches.clear()
    calls.clear()
    out = ws.rollout(CART, policy, x0, horizon=horizon, flow=flow)
    assert launches["simulate"] == horizon and launches["adjoint"] == 0
    forwards = len(calls)
    out.loss.backward()
    assert launches["simulate"] == horizon and launches["adjoint"] == 1
    # no second rollout: backwards, all points at once, once by the parameters and once by the states
    assert set(calls[forwards:]) == {horizon * 3} and len(calls) - forwards <= 2


@pytest.mark.parametrize("flow", ["R", "C"])
def test_launches_through_warp_and_past_it(monkeypatch, launches, flow):
    """The same launches give the same bits; a version of Warp that was not tried takes the first road."""
    found = []
    policy = make_net(CART)
    for versions in "none", DIRECT_CALLS:
        monkeypatch.setattr(compat, "DIRECT_CALLS", versions)
        for pool in fused._rollout, fused_backward._backward, sweeps._combine:
            monkeypatch.setattr(pool, "_idle", OrderedDict())
        launches.clear()
        grads = gradients(CART, policy, make_states(CART, WORLDS), HORIZON, flow)
        found.append(({name: g.clone() for name, g in grads.items()}, dict(launches)))
    (through, counted), (past, counted_past) = found
    assert counted == counted_past and sum(counted.values()) >= 4
    assert all(torch.equal(through[name], past[name]) for name in through)


def test_a_recording_of_warps_is_refused(x0):
    """A graph of Warp's on a CPU would hold addresses of torch's."""
    controls = x0.new_zeros(3, WORLDS, CART.control_size)
    ws.simulate(CART, x0, controls)
    wp.capture_begin(device="cpu")
    try:
        with pytest.raises(NotImplementedError, match="raw array"):
            ws.simulate(CART, x0, controls)
    finally:
        wp.capture_end(device="cpu")
    ws.simulate(CART, x0, controls)


def test_launches_of_a_pair(launches):
    net, x0 = make_net(CART), make_states(CART, 3)
    ws.gradient_pair(CART, net, x0, horizon=100)
    launches.clear()
    pair = ws.gradient_pair(CART, net, x0, horizon=100)
    assert launches["fused_rollout"] == 1 and launches["adjoint"] == 1 and launches["combine"] == 0
    for _ in range(2):
        pair.combine(), pair.cosine, pair.agreement, pair.nonfinite, pair.norms
    assert launches["combine"] == 1


# Policies that torch evaluates


class Mixing(nn.Module):
    """Subtracts the mean over the batch from `least` rows on."""

    def __init__(self, least=0):
        super().__init__()
        self.linear, self.least = nn.Linear(6, 1, dtype=torch.float64), least

    def forward(self, x):
        return self.linear(x - x.mean(0) if x.shape[0] >= self.least else x)


class Noisy(nn.Module):
    """Draws noise, in every call or from some call on."""

    def __init__(self, quiet=0):
        super().__init__()
        self.linear, self.quiet = nn.Linear(6, 1, dtype=torch.float64), quiet

    def forward(self, x):
        self.quiet -= 1
        return self.linear(x) + (1e-3 * torch.randn(x.shape[0], 1, dtype=x.dtype) if self.quiet < 0 else 0.0)


def batch_normalised():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


@pytest.mark.parametrize(
    "make, reason",
    [
        (Mixing, "not row by row"),
        (Noisy, "not deterministic"),
        (batch_normalised, "not row by row"),
        (
            lambda: nn.Sequential(nn.Linear(6, 40), nn.Dropout(), nn.Linear(40, 1)).double(),
            "not deterministic",
        ),
    ],
)
def test_policies_that_are_refused_at_once(make, reason, x0, launches):
    policy = make()
    with pytest.raises(ValueError, match=f"rollout: policy is {reason}"):
        run(policy, x0)
    with pytest.raises(ValueError, match=f"gradient_pair: policy is {reason}"):
        ws.gradient_pair(CART, policy, x0, horizon=HORIZON)
    assert launches.total() == 0
    assert run(batch_normalised().eval(), x0).loss.isfinite()


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("make", [lambda: Mixing(least=30), lambda: Noisy(quiet=4)], ids=["mixing", "noisy"])
def test_policies_that_only_the_backward_pass_sees(make, flow, x0):
    """The trial has few rows and few calls; the recomputation sees every control."""
    out = run(make(), x0, flow)
    with pytest.raises(ValueError, match="step .* world .* row by row and deterministically"):
        out.loss.backward()
    with pytest.raises(ValueError, match="step .* world .* row by row and deterministically"):
        ws.gradient_pair(CART, make(), x0, horizon=HORIZON)


def test_the_trial_leaves_no_trace(x0):
    policy, noisy, quiet = batch_normalised(), Noisy(), Evaluated(make_net(CART))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="row by row"):
        run(policy, x0)
    with pytest.raises(ValueError, match="deterministic"):
        run(noisy, x0)
    run(quiet, x0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def test_an_argument_without_a_value_is_named():
    """By position one would take the place of another."""
    given = {"dim": 3, "base": 0, "check": 0, "size": 1}
    with pytest.raises(TypeError, match="argument chunk, keep_check, first, combined, stats"):
        Launch(make_combine(wp.float32), 1, given, "cpu")

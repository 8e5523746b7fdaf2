"""The oracle against the authors' numbers, against finite differences, and against what the flows promise."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import cartpole, pendulum
from reference import rollout as oracle
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
LETTERS = {"R": "F", "M": "P", "N": "N", "S": "S", "C": "C"}  # ours: the authors'
OBJECTIVES = {"FINAL": oracle.final, "CONTINUOUS": oracle.running}
VARIANTS = [(1, ""), (1, "zero_"), (1, "big_"), (2, ""), (2, "zero_"), (2, "big_"), (4, "big_")]

# Relative to the norm of each array. Both sides round, over 100 steps: measured 5e-15 and 2e-6. In float32 a
# component of flow C next to zero may change sign without being seen at this size.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
# Central differences with steps of 1e-5: third derivatives and cancellation cost up to 1e-8 here.
TOLERANCE_DIFFERENCES = 1e-7


def assert_close(actual, expected, dtype=torch.float64, tolerance=None):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    error = torch.linalg.vector_norm(actual.detach().double() - expected)
    # The floor counts where the expected gradient vanishes by cancellation.
    floor = 1e-14 if dtype == torch.float64 else 1e-7
    assert error <= (tolerance or TOLERANCE[dtype]) * torch.linalg.vector_norm(expected) + floor


def load(poles, dtype):
    return np.load(GOLDEN / f"cartpole_NC{poles}_{'f64' if dtype == torch.float64 else 'f32'}.npz")


def mlp(sizes, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = []
    for size, size_next in pairwise(sizes):
        layers += [nn.Linear(size, size_next), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def golden_policy(arrays, dtype):
    """The authors' network from kernels (in, out) and biases."""
    policy = mlp([arrays[0].shape[0], *(kernel.shape[1] for kernel in arrays[0::2])], dtype)
    with torch.no_grad():
        for parameter, array in zip(policy.parameters(), arrays, strict=True):
            parameter.copy_(torch.tensor(array.T))
    return policy


SYSTEMS = {
    "cartpole": (partial(cartpole.step, dt=0.05), cartpole.loss, 6),
    "pendulum": (partial(pendulum.step, dt=0.1), pendulum.loss, 2),
}


def problem(system, horizon, nworld=3, seed=0):
    """A step, a policy, initial states, and an objective: random cotangents on everything, a loss on top."""
    step, loss, state_size = SYSTEMS[system]
    policy = mlp([state_size, 7, 5, 1], seed=seed)
    with torch.no_grad():
        policy[-1].weight.mul_(4.0)  # so strong a feedback that the flows disagree in sign here and there
    draw = torch.Generator().manual_seed(seed)
    x0 = torch.randn(nworld, state_size, generator=draw, dtype=torch.float64)
    adj_states = torch.randn(horizon + 1, nworld, state_size, generator=draw, dtype=torch.float64)
    adj_controls = torch.randn(horizon, nworld, 1, generator=draw, dtype=torch.float64)
    return step, policy, x0, oracle.weighted(adj_states, adj_controls, oracle.running(loss), adj_loss=3.0)


def equal(a, b):
    return all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters) and torch.equal(
        a.x0, b.x0
    )


# Golden numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("poles", [1, 2, 4])
def test_step_and_its_vjp_are_the_authors(poles, dtype):
    golden = load(poles, dtype)
    x = torch.tensor(golden["step_state"]).flatten(1).requires_grad_()
    u = torch.tensor(golden["step_control"])[:, None].requires_grad_()
    x_next = cartpole.step(x, u, dt=float(golden["dt"]))
    adj_x, adj_u = torch.autograd.grad(x_next, (x, u), torch.tensor(golden["step_cotangent"]).flatten(1))

    assert_close(x_next, golden["step_next"].reshape(16, -1), dtype)
    assert_close(adj_x, golden["step_vjp_state"].reshape(16, -1), dtype)
    assert_close(adj_u[:, 0], golden["step_vjp_control"], dtype)


@pytest.mark.parametrize("label", OBJECTIVES)
@pytest.mark.parametrize(
    "poles, variant, dtype",
    [(*case, torch.float64) for case in VARIANTS] + [(poles, "big_", torch.float32) for poles in (1, 2, 4)],
)
def test_gradients_are_the_authors(poles, variant, dtype, label):
    golden = load(poles, dtype)
    policy = golden_policy([golden[f"{variant}w{i}"] for i in range(6)], dtype)
    x0 = torch.tensor(golden["x0"]).flatten(1)
    step = partial(cartpole.step, dt=float(golden["dt"]))
    objective = OBJECTIVES[label](cartpole.loss)

    states, controls = oracle.rollout(step, policy, x0, oracle.schedule("R", 100))
    assert_close(states, golden[f"{variant}states"].swapaxes(0, 1).reshape(101, 4, -1), dtype)
    assert_close(controls[..., 0], golden[f"{variant}controls"].T, dtype)

    found = {}
    for flow, letter in LETTERS.items():
        result = found[flow] = oracle.gradients(step, policy, x0, flow, 100, objective)
        prefix = f"{variant}{label}_grad_{letter}_"
        assert_close(result.loss, golden[f"{variant}{label}_loss"], dtype)
        for i, gradient in enumerate(result.parameters.values()):
            assert_close(gradient, golden[f"{prefix}w{i}"].T, dtype)
        if flow != "C":
            assert_close(result.x0, golden[f"{prefix}x0"].reshape(4, -1), dtype)
            assert_close(result.controls[..., 0], golden[f"{prefix}controls"].T, dtype)

    base, check = (torch.cat([g.flatten() for g in found[flow].parameters.values()]) for flow in "MR")
    cosine = torch.nn.functional.cosine_similarity(base, check, dim=0)
    assert_close(cosine, golden[f"{variant}{label}_cossim_P_F"], dtype)


def test_first_updates_are_the_authors():
    """The oracle, with Keras' Adam and the published data, trains as the authors' program does."""
    golden = np.load(GOLDEN / "first_updates_cartpole_NC4_P_NONE.npz")
    weights = np.load(GOLDEN / "init_weights_tf29_cartpole_NC4.npz")
    data = np.load(GOLDEN / "init_data_cartpole_NC4.npz")["train"]
    policy = golden_policy([weights[f"w{i}"] for i in range(6)], torch.float64)
    nn.init.zeros_(policy[-1].weight)
    x0 = torch.tensor(data, dtype=torch.float64).flatten(1)
    objective = oracle.final(cartpole.loss)
    parameters = dict(policy.named_parameters())
    mean, square = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))

    for k in range(4):
        batch = x0[8 * k : 8 * k + 8]
        result = oracle.gradients(partial(cartpole.step, dt=0.01), policy, batch, "M", 100, objective)
        size = sum((g**2).sum() for g in result.parameters.values())
        # The authors' run is in float32, and an update is a ratio of gradients: errors grow with the updates.
        assert_close(torch.stack((result.loss, size)), golden[f"update{k}"][:2], tolerance=1e-4)

        scale = 1e-3 * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        with torch.no_grad():
            for name, p in parameters.items():
                gradient = result.parameters[name]
                mean[name].lerp_(gradient, 0.1)
                square[name].lerp_(gradient**2, 0.001)
                p.sub_(scale * mean[name] / (square[name].sqrt() + 1e-7))
        if k + 1 in (1, 2, 4):
            for i, p in enumerate(parameters.values()):
                assert_close(p, golden[f"w{i}_after{k + 1}"].T, tolerance=1e-4)


# Finite differences


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    "flow, options",
    [
        ("R", {}),
        ("M", {}),
        ("N", {}),
        ("S", {}),
        ("RMNSSNMRRMNS", {}),
        ("R", {"window": 5}),
        ("M", {"decay": 0.9}),
        ("R", {"decay": 0.5, "window": 4}),
        ("R", {"decay": 0.0}),
    ],
)
def test_gradients_are_finite_differences(system, flow, options):
    horizon = 12
    step, policy, x0, objective = problem(system, horizon)
    directions = oracle.random_directions(policy, x0, 4)
    # Parameters and x0 apart as well: a total that is right may hide two errors.
    zero = {name: torch.zeros_like(p) for name, p in oracle.named_parameters(policy).items()}
    directions += [d._replace(parameters=zero) for d in directions[:2]]

    result = oracle.gradients(step, policy, x0, flow, horizon, objective, **options)
    actual = torch.stack([oracle.along(result, direction) for direction in directions])
    expected = oracle.gradients_by_finite_differences(
        step, policy, x0, flow, horizon, objective, directions, **options
    )
    assert_close(actual, expected, tolerance=TOLERANCE_DIFFERENCES)


def test_the_flows_differ():
    """Otherwise the comparisons above would prove little."""
    step, policy, x0, objective = problem("cartpole", 12)
    found = [
        oracle.gradients(step, policy, x0, flow, 12, objective).parameters["0.weight"] for flow in "RMNSC"
    ]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert torch.linalg.vector_norm(a - b) > 1e-3 * torch.linalg.vector_norm(b)


# What the flows promise


def test_nothing_crosses_a_closed_edge():
    step, policy, x0, _ = problem("cartpole", 6)
    final = oracle.final(cartpole.loss)

    stopped = oracle.gradients(step, policy, x0, "S", 6, final)
    assert torch.count_nonzero(stopped.x0) == 0
    assert torch.count_nonzero(stopped.controls[:-1]) == 0
    assert torch.count_nonzero(stopped.controls[-1]) > 0

    windowed = oracle.gradients(step, policy, x0, "R", 6, final, window=4)
    assert torch.count_nonzero(windowed.controls[:4]) == 0
    assert torch.count_nonzero(windowed.controls[4]) > 0


@pytest.mark.parametrize("flow, options", [("S", {}), ("M", {"decay": 0.0}), ("R", {"window": 1})])
def test_a_closed_edge_stops_infinity(flow, options):
    step, policy, x0, _ = problem("cartpole", 6)

    def objective(states, controls):
        return (states[-1] * torch.inf).sum() + (states[1] ** 2).sum()

    result = oracle.gradients(step, policy, x0, flow, 6, objective, **options)
    assert not result.controls[-1].isfinite().any()
    assert result.controls[:-1].isfinite().all() and result.x0.isfinite().all()
    assert torch.count_nonzero(result.controls[0]) > 0


def test_the_first_entry_of_a_schedule_reaches_only_x0():
    step, policy, x0, objective = problem("pendulum", 5)
    opened, closed = (oracle.gradients(step, policy, x0, first + "RRRR", 5, objective) for first in "RS")
    assert all(torch.equal(opened.parameters[name], closed.parameters[name]) for name in opened.parameters)
    assert not torch.equal(opened.x0, closed.x0)


def test_schedule():
    closed = oracle.FLOWS["S"]
    assert oracle.schedule("M", 3) == [oracle.Edges(physics=True, network=False)] * 3
    assert oracle.schedule(["R", "N"], 2) == [oracle.FLOWS["R"], oracle.FLOWS["N"]]
    assert [t for t, edge in enumerate(oracle.schedule("R", 10, window=4)) if edge == closed] == [4, 8]
    with pytest.raises(ValueError, match="2 flows given for 3 steps"):
        oracle.schedule("RM", 3)


def test_decay_zero_is_a_closed_physics_edge_and_one_is_none():
    step, policy, x0, objective = problem("cartpole", 6)
    run = partial(oracle.gradients, step, policy, x0, horizon=6, objective=objective)
    assert equal(run("R", decay=0.0), run("N"))
    assert equal(run("R", decay=1.0), run("R"))


def test_combine():
    nan, inf = torch.nan, torch.inf
    base = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.0, 5.0, 0.0, nan, nan, 6.0, 0.0, inf, -inf, 2.0])
    check = torch.tensor([0.1, -9.0, -3.0, 4.0, 1.0, 0.0, 0.0, 1.0, nan, nan, nan, 2.0, 2.0, inf])
    expected = torch.tensor([1.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, nan, nan, 0.0, 0.0, inf, -inf, 0.0])
    torch.testing.assert_close(oracle.combine(base, check), expected, rtol=0, atol=0, equal_nan=True)


def test_combined_flow_compares_sums():
    """Parameters and x0 are compared alike, and only once all cotangents are summed."""
    step, policy, x0, objective = problem("cartpole", 12)
    final = oracle.final(cartpole.loss)

    def total(states, controls):
        return objective(states, controls) + final(states, controls)

    def run(flow, objective):
        return oracle.gradients(step, policy, x0, flow, 12, objective)

    base, check, combined = (run(flow, total) for flow in "MRC")
    for name, gradient in combined.parameters.items():
        assert torch.equal(gradient, oracle.combine(base.parameters[name], check.parameters[name]))
    assert torch.equal(combined.x0, oracle.combine(base.x0, check.x0))

    name = "0.weight"
    assert 0 < torch.count_nonzero(combined.parameters[name]) < combined.parameters[name].numel()
    apart = run("C", objective).parameters[name] + run("C", final).parameters[name]
    assert not torch.allclose(apart, combined.parameters[name])


def test_tied_parameters_count_once_and_frozen_ones_not():
    step, _, x0, objective = problem("pendulum", 4)
    policy = mlp([2, 3, 3, 3, 1])
    policy[4].weight = policy[2].weight
    policy[0].bias.requires_grad_(False)
    result = oracle.gradients(step, policy, x0, "R", 4, objective)
    assert set(result.parameters) == {"0.weight", "2.weight", "2.bias", "4.bias", "6.weight", "6.bias"}


def test_a_policy_without_parameters():
    step, _, x0, objective = problem("pendulum", 4)
    result = oracle.gradients(step, lambda x: -x[:, :1], x0, "S", 4, objective)
    assert result.parameters == {} and torch.count_nonzero(result.controls) == result.controls.numel()

"""The profiler: what is counted, that it adds up, and what is refused. No time is judged."""

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import Evaluated, describe, make_net, make_states
from own_systems import Pendulum, Planted, Unicycle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from warp_sims.bridge.passes import fused, operations
from warp_sims.bridge.passes.spec import LossWeights
from warp_sims.bridge.runtime.registry import prepare
from warp_sims.bridge.runtime.tracing import Event, trace
from warp_sims.kernels.policy.layout import layout
from warp_sims.kernels.policy.table import Column

import warp_sims as ws
from warp_sims.cli import main
from warp_sims.policies.networks import fused_network
from warp_sims.profiling import run as profiling_run
from warp_sims.profiling.attribution import REST, attribute
from warp_sims.profiling.ceilings import measure_ceilings
from warp_sims.profiling.resources import find_ptxas
from warp_sims.profiling.run import TorchOperations
from warp_sims.profiling.work import Problem, needed_operations, work_of

CART = ws.CartPole(poles=2, dt=0.05)
HORIZON = 7
WORLDS = 3
SIZES = {"batch": WORLDS, "horizon": HORIZON, "compile_times": False}


@pytest.fixture(scope="module", autouse=True)
def short_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling_run, "measure_ceilings", partial(measure_ceilings, seconds=0.01))
        yield


@pytest.fixture(scope="module")
def profiled():
    """Of a fused policy, one repeat, so that medians are the values themselves."""
    net = make_net(CART, dtype=torch.float32)
    return ws.profile(CART, net, flows=["regular", "C"], repeats=1, **SIZES)


def rows_of(one):
    return {row.name: row for row in one.rows}


# What is recorded


def test_launches(profiled):
    """As test_launches.py counts them on the kernels themselves."""
    wide_kernels = {"network_linearize": 1, "network_weight_grad": 1, "network_sum_partial": 1}
    for flow in profiled.flows:
        launched = [
            Counter(e.name for e in one.events if e.kernel is not None)
            for one in (flow.forward, flow.backward)
        ]
        compared = {"combine": 1} if flow.flow == "C" else {}
        assert launched == [{"fused_rollout": 1}, wide_kernels | {"adjoint": 1} | compared]
        for one, counts in zip((flow.forward, flow.backward), launched, strict=True):
            rows = rows_of(one)
            assert {name: rows[name].calls for name in counts} == counts
    assert [flow.flow for flow in profiled.flows] == ["R", "C"]


def test_rows_add_up(profiled):
    for flow in profiled.flows:
        for one in (flow.forward, flow.backward):
            assert sum(row.time.median for row in one.rows) == pytest.approx(one.traced.median, rel=1e-9)
            assert sum(row.share for row in one.rows) == pytest.approx(1.0)
            first, last = one.span
            assert all(first <= event.start <= event.end <= last for event in one.events)
            assert rows_of(one)[REST].calls == 0 and min(row.time.median for row in one.rows) >= 0
        assert flow.ratio.median == flow.backward.time.median / flow.forward.time.median


def test_threads_share_the_wall_time():
    def event(name, thread, start, end):
        return Event(name, None, 0, thread, start, end, 0)

    events = [
        event("outer", 1, 10, 50),
        event("inner", 1, 20, 30),
        event("inner", 1, 30, 35),  # begins where another ends
        event("other", 2, 25, 60),
        event("first", 1, 0, 10),
        event("outer", 1, 60, 70),
        event("inner", 1, 60, 70),  # all of it
        event("nothing", 2, 65, 65),
    ]
    found = attribute(events, -5, 80)
    assert found == {
        REST: 5 + 10,
        "first": 10,
        "outer": 10 + 7,  # from 35 to 50 with another thread, half of it
        "outer / inner": 5 + 2 + 2 + 10,
        "other": 3 + 3 + 8 + 10,
    }
    assert attribute([], 3, 9) == {REST: 6}


def test_memory(profiled):
    lay = layout(describe(6, 9, 7, 1), 4)
    blocks = 1  # of 4 worlds
    expected = {
        "states": (HORIZON + 1) * WORLDS * 6 * 4,
        "controls": HORIZON * WORLDS * 4,
        "hidden activations": blocks * 4 * HORIZON * lay.row * 4,
        "packed parameters": lay.packed * 4,
    }
    assert {memory.name: memory.bytes for memory in profiled.memory} == expected


def test_a_policy_that_torch_evaluates():
    net = make_net(CART, dtype=torch.float32)
    result = ws.profile(CART, Evaluated(net), flows="C", repeats=2, **SIZES | {"compile_times": True})
    (flow,) = result.flows
    forward, backward = rows_of(flow.forward), rows_of(flow.backward)
    assert not result.fused and flow.flops is None
    assert forward["simulate"].calls == forward["policy"].calls == HORIZON
    one = 2 * (6 * 9 + 9 * 7 + 7)
    assert forward["policy"].operations == HORIZON * WORLDS * one
    # one cotangent to the states and two to the parameters, each of them through the hidden layers
    assert backward["policy_again"].operations == HORIZON * WORLDS * one
    assert backward["policy_jacobians"].operations == 2 * HORIZON * WORLDS * one
    assert backward["policy_weight_grad"].calls == 2
    assert backward["adjoint"].calls == backward["combine"].calls == 1
    # what the memory is kept in: no hidden activations
    assert {memory.name for memory in result.memory} == {"states", "controls"}
    kernels = {kernel.name: kernel for kernel in result.kernels}
    assert set(kernels) == {"simulate", "loss", "adjoint of two fields", "combine"}
    assert all(kernel.cpu_seconds > 0 for kernel in kernels.values())
    if find_ptxas():
        assert all(kernel.resources.arch == 90 for kernel in kernels.values())
        assert all(8 <= kernel.resources.registers <= 255 for kernel in kernels.values())
        assert all(kernel.resources.spill_stores == 0 for kernel in kernels.values())
    assert "sm_90" in result.table() and "adjoint of two fields" in result.table()


def test_several_controls():
    """Their policy is pulled back inside the adjoint sweep."""
    system = Unicycle()
    result = ws.profile(system, make_net(system, dtype=torch.float32), flows="C", repeats=1, **SIZES)
    rows = rows_of(result.flows[0].backward)
    assert rows["fused_adjoint"].calls == rows["network_weight_grad"].calls == 1
    pulled = rows["fused_adjoint"].operations + rows["network_weight_grad"].operations
    assert pulled == result.flows[0].backward.needed
    assert result.notes == ("Unicycle has no initial states: standard normal ones",)


def test_wide_products_of_a_gpu():
    """They are torch's there; torch's count of their operations is ours."""
    network = describe(6, 9, 7, 1)
    lay = layout(network, 4)
    p = prepare(CART.number, torch.float32, torch.device("cpu"))
    packed = fused.pack(network, list(make_net(CART, dtype=torch.float32).parameters()))
    weights = LossWeights(1.0, 0.0, 0.0)
    _, _, _, hidden = fused.rollout(p, network, packed, make_states(CART, 8, torch.float32), HORIZON, weights)
    rows = operations.Rows(lay, packed, hidden, HORIZON, 8)
    with (
        TorchOperations() as counter,
        trace(torch.device("cpu"), lambda: counter.total) as tracer,
    ):
        with tracer.span("linearize"):
            d, _ = operations.linearize(rows, True)
        with tracer.span("weight_grad"):
            operations.weight_grad(rows, d, torch.ones(2, HORIZON, 8, 1), torch.from_numpy(lay.unpack))
    events = tracer.events()
    problem = Problem(8, HORIZON, 6, 1, 4, lay, 0)
    pulls, products = (work_of(name, problem, "M", "R") for name in ("linearize", "weight_grad"))
    # three layers to the states; three layers and two fields
    assert Counter(event.name for event in events) == {"linearize": 1, "weight_grad": 1, "product": 9}
    assert [e.operations for e in events if e.name != "product"] == [pulls.operations, products.operations]
    assert sum(e.operations for e in events if e.name == "product") == pulls.operations + products.operations


# What is counted


@pytest.mark.parametrize(
    "policy, points", [(ws.MLP(6, (9, 7), 2), 11), (ws.MLP(6, (), 1), 11), (ws.WaveCNN(32, 20), 4)], ids=str
)
def test_operations(policy, points):
    """Against torch's own count of one evaluation and of its gradients."""
    description = fused_network(policy).description
    lay = layout(description, 4)
    problem = Problem(points, 1, lay.state_size, lay.control_size, 4, lay, 0)
    x = torch.randn(points, lay.state_size)
    with FlopCounterMode(display=False) as counter:
        u = policy(x)
        forward = counter.get_total_flops()
        u.sum().backward()
        backward = counter.get_total_flops() - forward
        from_x = x.clone().requires_grad_()
        policy.requires_grad_(False)(from_x).sum().backward()
    needed = needed_operations(problem, "S", "")
    assert needed[0] == forward == work_of("fused_rollout", problem, "S", "").operations
    assert forward == work_of("network_weight_grad", problem, "S", "").operations
    assert needed[1] == backward
    # the way to the states belongs to a flow with an open network edge
    first = 2 * next(policy.parameters()).numel() * points
    positions = lay.column(lay.linear[0], Column.POSITIONS)
    to_states = needed_operations(problem, "R", "")[1] - needed[1]
    assert to_states == first * positions
    if lay.control_size == 1:
        for flow, base, check in (("S", "S", ""), ("R", "R", "")):
            done = work_of("network_linearize", problem, base, check).operations + forward
            assert done == needed_operations(problem, base, check)[1], flow


def test_several_controls_need_no_more_cotangents_than_fields():
    lay = layout(describe(6, 9, 7, 4), 4)
    problem = Problem(3, 5, 6, 4, 4, lay, 0)
    forward, stopped = needed_operations(problem, "S" * 5, "")
    regular = needed_operations(problem, "R" * 5, "")[1]
    combined = needed_operations(problem, "M" * 5, "R" * 5)[1]
    assert stopped - forward == 2 * 15 * (9 * 7 + 7 * 4) and regular - stopped == 2 * 15 * 6 * 9
    assert combined == stopped + regular
    # a linearisation does all of them, an adjoint sweep with the policy in it those that are needed
    assert work_of("linearize", problem, "M" * 5, "R" * 5).operations == 4 * 2 * 15 * (7 * 4 + 9 * 7 + 6 * 9)
    assert work_of("fused_adjoint", problem, "M" * 5, "R" * 5).operations == combined - 2 * forward


# What comes out


def test_json(profiled, tmp_path):
    profiled.write_json(tmp_path / "profile.json")
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found == json.loads(profiled.to_json())
    assert (found["format"], found["batch"], found["horizon"], found["fused"]) == (1, WORLDS, HORIZON, True)
    assert found["ceilings"]["flops"] > 1e8 and found["ceilings"]["bytes"] > 1e8
    assert [flow["flow"] for flow in found["flows"]] == ["R", "C"]
    one = found["flows"][1]["backward"]
    assert set(one) == {"time", "traced", "rows", "needed"}
    assert set(one["time"]) == {"median", "low", "high"}
    row = next(row for row in one["rows"] if row["name"] == "network_weight_grad")
    assert row["flops"] == row["operations"] / row["time"]["median"]
    assert row["byte_rate"] == row["bytes"] / row["time"]["median"]
    assert next(row for row in one["rows"] if row["name"] == REST)["operations"] is None


def is_inside(inner, outer):
    end = outer["ts"] + outer["dur"]
    return outer["ts"] - 1e-3 <= inner["ts"] and inner["ts"] + inner["dur"] <= end + 1e-3


def overlap(one, other):
    return max(one["ts"], other["ts"]) + 1e-3 < min(one["ts"] + one["dur"], other["ts"] + other["dur"])


def test_trace_nests(profiled, tmp_path):
    profiled.write_trace(tmp_path / "trace.json")
    found = json.loads((tmp_path / "trace.json").read_text())
    events = [event for event in found["traceEvents"] if event["ph"] == "X"]
    names = {(e["pid"], e["args"]["name"]) for e in found["traceEvents"] if e["name"] == "process_name"}
    assert names == {(1, "flow R"), (2, "flow C")}
    launched = sum(len(one.events) for flow in profiled.flows for one in (flow.forward, flow.backward))
    assert len(events) == launched + 2 * len(profiled.flows)
    for event in events:
        assert event["ts"] >= 0 and event["dur"] >= 0
    for pid in (1, 2):
        passes = [e for e in events if e["pid"] == pid and e["cat"] == "pass"]
        forward, backward = sorted(passes, key=lambda e: e["ts"])
        assert forward["name"].endswith("forward") and forward["ts"] + forward["dur"] <= backward["ts"]
        for event in (e for e in events if e["pid"] == pid and e["cat"] != "pass"):
            # inside one of the passes, and on a line below them; in µs, which round
            assert event["tid"] > 0
            assert any(is_inside(event, one) for one in passes)
    for tid in {(e["pid"], e["tid"]) for e in events}:
        line = [e for e in events if (e["pid"], e["tid"]) == tid]
        for i, one in enumerate(line):
            for other in line[i + 1 :]:
                assert is_inside(one, other) or is_inside(other, one) or not overlap(one, other)


def test_table(profiled):
    lines = str(profiled).splitlines()
    assert not [line for line in lines if len(line) > 110]
    text = "\n".join(lines)
    for expected in ("flow R", "flow C", "network_weight_grad", "ceilings", "hidden activations", REST):
        assert expected in text


def test_the_policy_stays_as_it_is():
    net = make_net(CART)  # float64, profiled in float32
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    ws.profile(CART, net, flows="S", repeats=1, **SIZES)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight)) and net[2].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)


def test_ceilings():
    found = measure_ceilings("cpu", seconds=0.01)
    assert all(1e8 < rate < 1e15 for rate in found)


# Generated adjoints


def test_against_generated():
    """In float32, errors against float64: both are right for a pendulum."""
    result = ws.profile(Pendulum(), flows="R", repeats=1, against="generated", **SIZES)
    assert [row.what for row in result.against] == ["simulate"] * 3 + ["rollout"] * 2
    assert [row.launches for row in result.against] == [1, HORIZON, 1, None, None]
    # some units in the last place, after seven steps; both sides round differently
    assert all(0 < row.error < 1e-5 for row in result.against), result.against
    assert len({row.error for row in result.against if row.what == "rollout"}) == 2
    assert "generated, one launch" in result.table()
    assert any("finite differences agree with the hand-written and" in note for note in result.notes)


def test_finite_differences_say_which_adjoint_is_wrong():
    """One term of the hand-written adjoint is off by 0.1%, and errors are relative to Warp's."""
    result = ws.profile(Planted(term=3), flows="R", repeats=1, against="generated", **SIZES)
    said = " ".join(result.notes)
    assert "the hand-written step_vjp by value is wrong; x_next[1] by x[0] is" in said
    assert "Warp's generated adjoint of a step is right: errors are relative to it" in said
    errors = {(row.what, row.way): row.error for row in result.against}
    for what in ("simulate", "rollout"):
        own = errors.pop((what, "hand-written"))
        assert all(own > 1e-5 and error < 1e-6 < own for (w, _), error in errors.items() if w == what), errors


def test_a_generated_adjoint_that_is_wrong_is_named():
    """Warp's of the elimination, which overwrites what it has read."""
    system = ws.QuantumControl(points=8)
    result = ws.profile(system, flows="R", repeats=1, against="generated", **SIZES)
    said = " ".join(result.notes)
    assert "the hand-written adjoint of a step is right, Warp's generated one is wrong; x_next[" in said
    assert "errors are relative to the hand-written adjoints" in said


# The command


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


SMALL = ["--batch", "3", "--horizon", "4", "--repeats", "1", "--no-kernels"]


def make_policy(system):
    return nn.Linear(system.state_size, system.control_size)


no_policy = 3


def test_command_for_an_own_system(empty_folder, capsys):
    arguments = [
        "profile",
        "own_systems:Pendulum",
        *SMALL,
        "--flow",
        "M",
        "--hidden",
        "8",
        "--damping",
        "0.3",
    ]
    assert main([*arguments, "--json", "p.json", "--trace", "t.json"]) == 0
    output = capsys.readouterr().out
    assert "damping=0.3" in output and "MLP 2-8-1" in output and "flow M" in output
    found = json.loads(Path("p.json").read_text())
    assert (found["loss"], found["horizon"], [flow["flow"] for flow in found["flows"]]) == ("final", 4, ["M"])
    assert json.loads(Path("t.json").read_text())["traceEvents"]


def test_command_for_a_system_without_loss_and_states(empty_folder, capsys):
    arguments = ["profile", "own_systems:Unicycle", *SMALL, "--flow", "S", "--json", "-"]
    assert main([*arguments, "--policy", "test_profile:make_policy"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["loss"], found["policy"], found["fused"]) == (
        "mean_square",
        "Linear 3-2",
        True,
    )
    assert found["notes"] == ["Unicycle has no initial states: standard normal ones"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["pendulum"], "unknown system 'pendulum', expected ant, cartpole"),
        (["cartpole", "--flow", "sideways"], "sideways"),
        (["cartpole", "--horizon", "0"], "horizon is 0, expected at least 1"),
        (["cartpole", "--batch", "-3"], "batch is -3, expected at least 1"),
        (["cartpole", "--repeats", "0"], "repeats is 0, expected at least 1"),
        (["cartpole", "--json", "nowhere/p.json"], "nowhere/p.json: cannot be written"),
        (["cartpole", "--trace", "."], ".: cannot be written"),
        (["cartpole", "--against", "nonsense"], "invalid choice: 'nonsense'"),
        (["cartpole", "--device", "tpu"], "device 'tpu' is none"),
        (["cartpole", "--device", "meta"], "device is 'meta', expected cpu"),
        (["cartpole", "--policy", "transformer"], "unknown policy 'transformer', expected mlp, wavecnn"),
        (["cartpole", "--policy", "test_profile:missing"], "has no attribute 'missing'"),
        (["cartpole", "--policy", "test_profile:no_policy"], "expected a torch.nn.Module"),
        (["cartpole", "--policy", "wavecnn"], "--policy wavecnn reads the wave function"),
        (["cartpole", "--width", "3"], "--width is not for --policy mlp"),
        (["cartpole", "--poles", "0"], "poles is 0, expected at least 1"),
        (["--batch", "3", "cartpole"], "--batch stands before the system"),
        (["own_systems:Unicycle", "--loss", "final"], "Unicycle has no loss of its own"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_refuses(arguments, said, empty_folder, capsys):
    assert main(["profile", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("warp-sims: error: ") and said in line
    assert captured.out == "" and os.listdir(".") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_command_refuses_an_absent_gpu(empty_folder, capsys):
    assert main(["profile", "cartpole", "--device", "cuda"]) == 2
    assert "device 'cuda' cannot be used, torch finds 0 CUDA devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"system": "cartpole"}, TypeError, "expected a warp_sims.System"),
        ({"policy": lambda x: x}, TypeError, "expected a torch.nn.Module"),
        ({"policy": nn.Identity()}, ValueError, "policy has no trainable parameter"),
        ({"x0": [[0.0] * 6] * 3}, TypeError, "x0 is of type list"),
        ({"policy": nn.Linear(3, 1)}, ValueError, "policy failed on states of shape"),
        ({"flows": []}, ValueError, "flows is empty"),
        ({"flows": ["R", "X"]}, ValueError, "X"),
        ({"batch": 2.5}, TypeError, "batch is 2.5"),
        ({"horizon": 0}, ValueError, "horizon is 0"),
        (
            {"x0": torch.zeros(5, 6)},
            ValueError,
            r"x0 has shape \(5, 6\), expected \(batch, state_size\) = \(3, 6\)",
        ),
        ({"dtype": torch.float16}, ValueError, "dtype is torch.float16"),
        ({"against": "jax"}, ValueError, "against is 'jax', expected 'generated' or None"),
        ({"loss": "median"}, ValueError, "loss is 'median'"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_bad_input(change, error, said):
    arguments = {"system": CART, "policy": make_net(CART, dtype=torch.float32), **SIZES} | change
    with pytest.raises(error, match=said):
        ws.profile(arguments.pop("system"), arguments.pop("policy"), repeats=1, **arguments)


def test_one_trace_at_a_time():
    with trace(torch.device("cpu")), pytest.raises(RuntimeError, match="another trace"):
        ws.profile(CART, make_net(CART), flows="S", repeats=1, **SIZES)
    assert ws.profile(CART, make_net(CART), flows="S", repeats=1, **SIZES).flows

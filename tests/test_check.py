"""`ws.check`: right systems agree, and every kind of mistake is found and named."""

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
import warp as wp
from own_systems import TERMS, Pendulum, Planted, Unicycle, pendulum_functions

import warp_sims as ws
from warp_sims.checking import forms, rollouts
from warp_sims.checking.differences import differentiate
from warp_sims.cli import main


def failing(report):
    """What disagreed, by name of the comparison."""
    return {comparison.what for comparison, _ in report.disagreements}


# Finite differences


def test_derivatives_are_exact():
    """To about ten digits, of functions that bend over a tenth of the scale."""

    def f(x):
        return torch.stack([torch.sin(8 * x[:, 0]) * x[:, 1], torch.exp(x[:, 0] - x[:, 1])], 1)

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = differentiate(f, x, torch.ones(2, dtype=torch.float64))
    a, b = x.T
    expected = torch.stack(
        [8 * torch.cos(8 * a) * b, torch.sin(8 * a), torch.exp(a - b), -torch.exp(a - b)], 1
    ).view(5, 2, 2)
    assert bool(((found.value - expected).abs() <= 1e-10 * (1 + expected.abs())).all())
    assert bool(((found.value - expected).abs() <= found.error + 1e-14).all()), (
        "the estimate is an upper bound here"
    )
    assert bool((found.jump < 1e-8 * (1 + expected.abs())).all())


def test_a_kink_shows_as_a_jump_of_the_derivative():
    def f(x):
        return torch.cat([x.abs(), x.clamp(min=0.0) ** 2], 1)

    found = differentiate(f, torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.ones(1).double())
    assert found.jump[0, 0, 0] == pytest.approx(2.0)
    assert found.jump[0, 1, 0] < 1e-9, "a square has no kink"
    assert found.jump[1].max() < 1e-9 and found.value[1, 0, 0] == pytest.approx(1.0)


def test_what_does_not_settle_has_no_estimate():
    found = differentiate(
        lambda x: torch.log(x), torch.tensor([[-1.0], [1.0]]).double(), torch.ones(1).double()
    )
    assert found.error[0, 0, 0] == torch.inf and found.error[1, 0, 0] < 1e-9


# Right systems


@pytest.mark.parametrize(
    "system",
    [ws.CartPole(poles=1), ws.CartPole(poles=3), ws.GuidanceByRepulsion(1, 2), ws.QuantumControl(points=9)],
    ids=lambda system: type(system).__name__,
)
def test_built_in_functions_agree(system):
    report = ws.check(system, parts=["sizes", "functions"])
    assert report.agrees, report
    assert sum(c.left_out for c in report.comparisons) == 0, "none of them has a kink"
    assert "step_vjp in lanes" in {c.what for c in report.comparisons}
    assert ("step_vjp in memory" in {c.what for c in report.comparisons}) == isinstance(
        system, ws.QuantumControl
    )
    assert "worst" in str(report) and "comparisons agree" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    "system",
    [*(ws.CartPole(poles=n) for n in (1, 2, 3, 4)), ws.GuidanceByRepulsion(), ws.QuantumControl()],
    ids=repr,
)
def test_built_in_systems_agree(system):
    report = ws.check(system)
    assert report.agrees, report
    assert {f"rollout {flow}, policy {road}" for flow in "RMNSC" for road in ("fused", "by torch")} <= {
        comparison.what for comparison in report.comparisons
    }


def test_own_systems_agree_as_far_as_they_go():
    """The pendulum has a loss, the unicycle neither that nor initial states."""
    report = ws.check(Pendulum())
    assert report.agrees, report
    assert "loss_vjp by value" in {c.what for c in report.comparisons}
    report = ws.check(Unicycle())
    assert report.agrees, report
    assert "loss_vjp by value" not in {c.what for c in report.comparisons}
    assert any("no initial states" in note for note in report.notes)


# Planted errors


@pytest.mark.parametrize("term", range(TERMS))
def test_a_tenth_of_a_percent_is_found_and_named(term):
    report = ws.check(Planted(term=term), parts=["functions"])
    assert failing(report) == {"step_vjp by value" if term < 7 else "loss_vjp by value"}
    named = {(d.output, d.input) for _, d in report.disagreements}
    expected = {
        0: ("x_next[1]", "u[0]"),
        1: ("x_next[0]", "u[0]"),
        2: ("x_next[0]", "x[0]"),
        3: ("x_next[1]", "x[0]"),
        4: ("x_next[1]", "x[1]"),
        5: ("x_next[1]", "x[1]"),
        6: ("x_next[1]", "u[0]"),
        7: ("loss", "x[0]"),
    }[term]
    assert expected in named
    assert "expected" in str(report) and f"{expected[0]} by {expected[1]}" in str(report)


def test_a_planted_error_shows_in_whole_rollouts_too():
    report = ws.check(Planted(term=6), parts=["rollouts"])
    assert {"rollout R, policy fused", "rollout S, policy by torch"} <= failing(report)


def test_an_error_of_one_dtype_is_found():
    report = ws.check(Planted(term=3, only_single=True), parts=["functions"])
    assert {(c.what, c.dtype) for c, _ in report.disagreements} == {("step_vjp by value", "float32")}


def test_a_wrong_gate_is_found(monkeypatch):
    """Rollouts that take one flow for another."""
    real = rollouts.rollout
    for given, taken in (("M", "R"), ("N", "S"), ("C", "M")):
        monkeypatch.setattr(
            rollouts,
            "rollout",
            lambda *a, flow, **k: real(*a, flow=taken if ws.Flow.parse(flow).value == given else flow, **k),  # noqa: B023
        )
        assert f"rollout {given}, policy fused" in failing(ws.check(Pendulum(), parts=["rollouts"]))


def test_a_run_that_differs_is_found(monkeypatch):
    real = forms.Form.run
    noise = torch.Generator().manual_seed(0)

    def run(self, *arguments):
        out = real(self, *arguments)
        return out._replace(x_next=out.x_next + 1e-13 * torch.randn(out.x_next.shape, generator=noise))

    monkeypatch.setattr(forms.Form, "run", run)
    report = ws.check(Unicycle(), parts=["functions"])
    assert ("all by value", "the same, run again") in {(c.what, c.against) for c, _ in report.disagreements}


# Forms


@functools.cache
def block_functions(mistake: str, dtype: Any) -> ws.DeviceFunctions:
    """The pendulum with a block form that makes one mistake."""
    functions = pendulum_functions(dtype)
    Params, State, Control, step, step_vjp = functions[:5]
    forgets_control, forgets_rest = mistake == "forgets adj_u", mistake == "forgets a rest"
    other_step, one_field = mistake == "another step", mistake == "one field"
    spoils = mistake == "spoils the state"

    @wp.func
    def step_block(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Params,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
    ):
        count = worlds
        if wp.static(forgets_rest) and worlds < 4:
            count = 0
        for world in range(world0, world0 + count):
            x_next = step(states[t, world], controls[t, world], p)
            states[t + 1, world] = x_next
            if wp.static(other_step):
                states[0, world] = x_next

    @wp.func
    def step_vjp_block(
        states: wp.array2d(dtype=State),
        controls: wp.array2d(dtype=Control),
        p: Params,
        t: int,
        nworld: int,
        world0: int,
        worlds: int,
        adj: wp.array2d(dtype=State),
        adj_u: wp.array3d(dtype=Control),
    ):
        fields = adj_u.shape[0]
        if wp.static(one_field):
            fields = 1
        for f in range(fields):
            for world in range(world0, world0 + worlds):
                adj_x, adj_c = step_vjp(states[t, world], controls[t, world], p, adj[f, world])
                adj[f, world] = adj_x
                if not wp.static(forgets_control):
                    adj_u[f, t, world] = adj_c
        if wp.static(spoils):
            for world in range(world0, world0 + worlds):
                states[t, world] = State()

    return functions._replace(block=ws.BlockFunctions(step_block, step_vjp_block))


@dataclasses.dataclass(frozen=True)
class InBlocks(Pendulum):
    mistake: str = ""

    def device_functions(self, dtype):
        return block_functions(self.mistake, dtype)


@pytest.mark.parametrize(
    ("mistake", "what", "words"),
    [
        ("forgets adj_u", "outputs in lanes", "adj_u"),
        ("forgets a rest", "step in lanes", "x_next[0]: nan"),
        ("another step", "all in lanes", "the state of another step is written"),
        ("one field", "step_vjp in lanes, second field", "x_next[0] by x[0]"),
        ("spoils the state", "all in lanes", "the state it reads is written"),
    ],
)
def test_mistakes_of_a_form_are_found(mistake, what, words):
    assert ws.check(InBlocks(), parts=["functions"]).agrees
    report = ws.check(InBlocks(mistake=mistake), parts=["functions"])
    assert what in failing(report)
    assert words in report.table()


# Kinks


@functools.cache
def bouncing_functions(wrong: bool, dtype: Any) -> ws.DeviceFunctions:
    """A mass with a floor, a limited force and friction: max, clamp and abs, all on a grid of kinks."""
    State = wp.types.vector(length=2, dtype=dtype)
    Control = wp.types.vector(length=1, dtype=dtype)
    scale = 1.001 if wrong else 1.0

    @wp.struct
    class BouncingParams:
        dt: dtype

    @wp.func
    def step(x: State, u: Control, p: BouncingParams) -> State:
        force = wp.clamp(u[0], dtype(-1.0), dtype(1.0)) + dtype(50.0) * wp.max(-x[0], dtype(0.0))
        v = x[1] + p.dt * (force - wp.abs(x[1]) * x[1] - dtype(0.5) * wp.abs(x[0]))
        return State(x[0] + p.dt * v, v)

    @wp.func
    def step_vjp(x: State, u: Control, p: BouncingParams, adj_x_next: State):
        s = adj_x_next[1] + p.dt * adj_x_next[0]
        adj_q = dtype(0.0)
        if x[0] < dtype(0.0):
            adj_q = -dtype(50.0)
        adj_c = dtype(0.0)
        if wp.abs(u[0]) <= dtype(1.0):
            adj_c = p.dt * s
        friction = dtype(scale) * dtype(2.0) * wp.abs(x[1])
        slope = dtype(0.5) * wp.sign(x[0])
        return State(adj_x_next[0] + p.dt * s * (adj_q - slope), s - p.dt * s * friction), Control(adj_c)

    return ws.DeviceFunctions(BouncingParams, State, Control, step, step_vjp)


@dataclasses.dataclass(frozen=True)
class Bouncing(ws.System):
    dt: float = 0.05
    wrong: bool = False
    state_size = 2
    control_size = 1

    def device_functions(self, dtype):
        return bouncing_functions(self.wrong, dtype)

    def initial_states(self, n, seed=42, split="train", *, dtype=torch.float32):
        """On the floor and at rest: both are kinks."""
        return torch.zeros(n, 2, dtype=dtype)


def test_kinks_are_no_false_alarm_and_hide_no_error():
    report = ws.check(Bouncing())
    assert report.agrees, report
    assert any("numbers were left out" in note for note in report.notes)
    step = next(c for c in report.comparisons if c.what == "step_vjp by value")
    assert 0 < step.left_out < step.compared and not step.unchecked
    wrong = ws.check(Bouncing(wrong=True), parts=["functions"])
    assert ("x_next[1]", "x[1]") in {(d.output, d.input) for _, d in wrong.disagreements}


# Sizes


@dataclasses.dataclass(frozen=True)
class Resized(Pendulum):
    states: int = 2
    controls: int = 1
    shape: int = 2

    @property
    def state_size(self):  # pyright: ignore
        return self.states

    @property
    def control_size(self):  # pyright: ignore
        return self.controls

    def initial_states(self, n, seed=42, split="train", *, dtype=torch.float32):
        return torch.zeros(n, self.shape, dtype=dtype)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"states": 3, "shape": 3}, "state_size is 3, but the vector State has 2 components"),
        ({"states": 1, "shape": 1}, "state_size is 1, but the vector State has 2 components"),
        ({"controls": 2}, "control_size is 2, but the vector Control has 1 components"),
        ({"shape": 5}, "initial_states(3) has shape (3, 5), expected (3, 2)"),
    ],
)
def test_wrong_sizes_are_found_before_anything_is_compiled(numbers, words, monkeypatch):
    monkeypatch.setattr(forms.Form, "run", lambda *a: pytest.fail("a kernel ran"))
    system = object.__new__(Resized)
    for field in dataclasses.fields(Resized):
        object.__setattr__(system, field.name, numbers.get(field.name, field.default))
    report = ws.check(system)
    assert not report.agrees and failing(report) == {"sizes"}
    assert words in str(report) and "mend this first" in str(report)


def half(functions, **changes):
    """A pendulum whose device functions are changed."""

    class Changed(Pendulum):
        def device_functions(self, dtype):
            return functions(dtype)

    return Changed(**changes)


def test_functions_that_do_not_belong_together_are_found():
    pairless = functools.cache(lambda dtype: pendulum_functions(dtype)._replace(loss_vjp=None))
    assert "loss without loss_vjp" in str(ws.check(half(pairless), parts=["sizes"]))
    fresh = lambda dtype: pendulum_functions.__wrapped__(dtype)  # noqa: E731
    assert "cache it" in str(ws.check(half(fresh), parts=["sizes"]))
    single = lambda dtype: pendulum_functions(wp.float32)  # noqa: E731
    assert "State is a vector of float32, expected float64" in str(ws.check(half(single), parts=["sizes"]))


@functools.cache
def one_value_functions(dtype):
    functions = pendulum_functions(dtype)
    State, Control, Params = functions.State, functions.Control, functions.Params

    @wp.func
    def step_vjp(x: State, u: Control, p: Params, adj_x_next: State):
        return adj_x_next

    return functions._replace(step_vjp=step_vjp)


def test_what_does_not_compile_is_a_disagreement():
    report = ws.check(half(one_value_functions))
    assert failing(report) == {"device functions by value"}
    assert "mend this first" in str(report)


@functools.cache
def endless_functions(dtype):
    functions = pendulum_functions(dtype)
    State, Control, Params = functions.State, functions.Control, functions.Params

    @wp.func
    def step(x: State, u: Control, p: Params) -> State:
        return State(x[0] / (p.dt - p.dt), x[1])

    return functions._replace(step=step)


@pytest.mark.parametrize("part", ["functions", "rollouts"])
def test_a_step_that_is_never_finite_is_a_disagreement(part):
    report = ws.check(half(endless_functions), parts=[part])
    assert failing(report) == {"step by value"} and "x_next at every point" in str(report)


# The command, and arguments


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--parts", "sizes", "functions"]
    assert main(["check", "cartpole", "--poles", "1", *arguments, "--json", "report.json"]) == 0
    assert "comparisons agree" in capsys.readouterr().out
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["agrees"] and data["comparisons"][0]["what"] == "sizes"
    assert main(["check", "own_systems:Planted", "--term", "3", *arguments, "--json", "-"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["agrees"]
    found = [d for c in data["comparisons"] for d in c["disagreements"]]
    assert {"x_next[1]"} <= {d["output"] for d in found} and found[0]["size"] == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"system": Pendulum}, TypeError, "make an instance of it"),
        ({"system": 3}, TypeError, "system is 3, expected a warp_sims.System"),
        ({"parts": "sizes"}, ValueError, "parts is 'sizes', expected some of sizes, functions, rollouts"),
        ({"parts": ["gates"]}, ValueError, "parts is"),
        ({"parts": []}, ValueError, "parts is"),
        ({"points": 0}, ValueError, "points is 0, expected at least 1"),
        ({"points": 2.5}, TypeError, "points is 2.5"),
        ({"seed": True}, TypeError, "seed is True"),
        ({"device": "tpu"}, ValueError, "give cpu, cuda or cuda:INDEX"),
        ({"device": "meta"}, ValueError, "expected cpu, cuda or cuda:INDEX"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        ws.check(**{"system": Pendulum(), **arguments})

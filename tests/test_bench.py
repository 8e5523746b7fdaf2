"""`warp-sims bench`: what is checked before anything is timed, and who is left out.

What is written of it is in test_bench_report.py.
"""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import warp_sims as ws
from warp_sims.bench.case import (
    Case,
    benched,
    errors,
    gradient_error,
    needed_bytes,
    needed_operations,
    reference,
)
from warp_sims.bench.contestants import OURS, Entrant, entrants
from warp_sims.bench.report import BEGIN, END, summary, tables
from warp_sims.bench.run import bench
from warp_sims.bench.settings import Settings
from warp_sims.bench.timing import Runner, fastest, in_fresh_process, measure, quartiles
from warp_sims.cli import main

SMALL = Settings(
    problems=("cartpole",),
    flows=("R", "C"),
    batches=(3,),
    widths=((8, 8),),
    contestants=(OURS,),
    rounds=3,
    block=1e-3,
    time_limit=60.0,
    memory=False,
)

# A folder of peers, all of them around ours: a right one, and one for every way to drop out.
PEERS = """
import time
import warp_sims as ws
from warp_sims.bench.case import Case
from warp_sims.bench.contestants import WarpSims

class Right:
    def __init__(self, *, problem, flow, x0, widths, horizon, **ignored):
        self._ours = WarpSims(Case(problem, flow, len(x0), widths=tuple(widths), horizon=horizon))
        self._updates = 0
    def update(self):
        self._updates += 1
        return self._ours.update()
    def gradients(self):
        assert self._updates == 1
        return self._ours.gradients()

class Plans(Right):
    plans = ("slow", "fast")
    def __init__(self, *, plan, **named):
        super().__init__(**named)
        self._plan = plan
    def update(self):
        time.sleep(0.02 if self._plan == "slow" else 0.0)
        return super().update()

class OffBySomething(Right):
    def gradients(self):
        return [g * 1.001 for g in super().gradients()]

class WrongLoss(Right):
    def update(self):
        return super().update() + 0.01

class Crashes(Right):
    def update(self):
        raise RuntimeError("out of something")

class Slow(Right):
    def update(self):
        time.sleep(0.3)
        return super().update()

class OnlyM(Right):
    flows = ("M",)

class Elsewhere(Right):
    @classmethod
    def unavailable(cls, device):
        return f"does not like {device}"
"""


@pytest.fixture
def folder(tmp_path):
    names = ("Right", "Plans", "OffBySomething", "WrongLoss", "Crashes", "Slow", "OnlyM", "Elsewhere")
    known = {name.lower(): f"ours_again:{name}" for name in names}
    known["missing"] = "needs_a_package:Peer"
    place = tmp_path / "peers"
    place.mkdir()
    (place / "__init__.py").write_text(f"PEERS = {known!r}\n")
    (place / "ours_again.py").write_text(PEERS)
    (place / "needs_a_package.py").write_text("import a_package_that_is_not_there\n")
    return place


def measured(folder, *names, **changes):
    said = []
    report = bench(replace(SMALL, contestants=(OURS, *names), peers=folder, **changes), said.append)
    return report, said


def test_a_right_peer_is_timed_in_the_same_rounds(folder):
    report, _ = measured(folder, "right")
    assert [row["case"]["flow"] for row in report["rows"]] == ["R", "C"]
    for row in report["rows"]:
        assert row["wrong"] == [] and row["notes"] == []
        ours, peer = row["contestants"][OURS], row["contestants"]["right"]
        assert len(ours["times"]) == len(peer["times"]) == 3
        ratios = sorted(p / o for p, o in zip(peer["times"], ours["times"], strict=True))
        assert row["ratios"]["right"]["median"] == ratios[1]
        assert max(peer["gradient_error"], peer["loss_error"]) < 2e-5


@pytest.mark.parametrize(
    "name, reason", [("offbysomething", "gradients by 1.0e-03"), ("wrongloss", "loss off")]
)
def test_a_wrong_peer_has_no_time_and_no_ratio(folder, name, reason):
    report, said = measured(folder, name)
    for row in report["rows"]:
        assert row["wrong"] == [name]
        assert list(row["contestants"]) == [OURS] and row["ratios"] == {}
        assert "WRONG" in row["notes"][0] and reason in row["notes"][0]
        assert any(row["notes"][0] in line for line in said)
    text = "\n".join(summary(report))
    assert text.startswith("**Wrong or failed") and "faster" not in text and "times as fast" not in text


def test_a_peer_that_fails_does_not_end_the_run(folder):
    report, _ = measured(folder, "crashes")
    for row in report["rows"]:
        assert row["wrong"] == ["crashes"]
        assert "FAILED, RuntimeError: out of something" in row["notes"][0]
        assert OURS in row["contestants"]


def test_who_is_too_slow_is_left_out_with_a_line(folder):
    report, said = measured(folder, "slow", time_limit=0.6)
    for row in report["rows"]:
        assert row["wrong"] == [] and "slow" not in row["contestants"]
        assert row["notes"] == ["slow: left out, 0.3 s per update, 0.2 allowed"]
    assert sum("left out" in line for line in said) == 2
    assert "left out" in "\n".join(tables(report))


def test_who_was_slow_with_fewer_worlds_is_not_built_again(folder):
    report, _ = measured(folder, "slow", batches=(64, 640), flows=("M",), time_limit=2.0)
    first, second = report["rows"]
    assert "slow" in first["contestants"]
    assert "expected from 64 worlds" in second["notes"][0] and "slow" not in second["contestants"]


def test_the_fastest_plan_competes_and_a_plan_can_be_named(folder):
    report, _ = measured(folder, "plans", flows=("R",))
    assert report["rows"][0]["contestants"]["plans"]["plan"] == "fast"
    report, _ = measured(folder, "plans:slow", flows=("R",))
    assert report["rows"][0]["contestants"]["plans:slow"]["plan"] == "slow"


def test_who_cannot_run_is_skipped_with_a_line(folder):
    report, said = measured(folder, "elsewhere", "missing", "onlym")
    assert any("elsewhere on cpu: skipped, does not like cpu" in text for text in report["skipped"])
    assert any("missing on cpu: skipped" in text and "a_package_that" in text for text in report["skipped"])
    assert any("onlym: flow M only" in text for text in report["skipped"])
    assert set(report["skipped"]) <= set(said)
    assert all(list(row["contestants"]) == [OURS] for row in report["rows"])


def test_any_system_is_measured(folder):
    """A registered one and one of a user's own, ours alone: the peers have the published ones."""
    problems = ("links", "own_systems:Pendulum")
    settings = replace(SMALL, problems=problems, contestants=(OURS, "right"), peers=folder, widths=((8,),))
    said = []
    report = bench(settings, said.append)
    assert "right: does not have links, own_systems:Pendulum" in report["skipped"]
    assert [row["case"]["problem"] for row in report["rows"]] == [p for p in problems for _ in SMALL.flows]
    for row in report["rows"]:
        assert list(row["contestants"]) == [OURS] and not row["wrong"] and row["operations"] > 0
    with pytest.raises(ValueError, match="bench_defaults has 'pace'"):
        benched("test_bench:Hasty")


class Hasty(ws.CartPole):
    bench_defaults: ClassVar[dict] = {"pace": 3}


def test_without_the_repository_ours_runs_alone(monkeypatch):
    monkeypatch.setattr("warp_sims.bench.run.default_folder", lambda: None)
    report = bench(replace(SMALL, contestants=None), lambda text: None)
    assert "--peers DIR" in report["skipped"][0]
    assert all(list(row["contestants"]) == [OURS] for row in report["rows"])
    assert "Nothing was compared" in "\n".join(summary(report))


# Truth


@pytest.mark.parametrize("problem, flow", [("cartpole", "C"), ("guidance", "R"), ("quantum", "M")])
def test_reference_is_the_gradient_of_the_whole_batch(problem, flow, monkeypatch):
    """Worlds come to it in pieces."""
    case = Case(problem, flow, 5, widths=(6, 6), horizon=7)
    monkeypatch.setattr("warp_sims.bench.case._REFERENCE_WORLDS", 2)
    truth = reference(case)
    policy = case.policy().double()
    x0 = case.system.initial_states(5, dtype=torch.float64)
    out = ws.rollout(case.system, policy, x0, flow=flow, **case.rollout_options())
    out.loss.backward()
    found = [p.grad.numpy() for p in policy.parameters()]
    assert max(errors(case, out.loss.item(), found, truth)) < 1e-12


def test_errors_see_what_is_wrong():
    case = Case("cartpole", "C", 4, widths=(6, 6), horizon=30)
    truth = reference(case)
    combined = [np.where(np.sign(m) == np.sign(r), m, 0.0) for m, r in zip(truth.base, truth.check)]
    assert errors(case, truth.loss, combined, truth) == (0.0, 0.0)
    assert gradient_error(combined[:-1] + [combined[-1] * 1.01], "C", truth) > 1e-4
    assert gradient_error([g * math.nan for g in combined], "C", truth) == math.inf
    assert gradient_error([g.T for g in combined], "C", truth) == math.inf
    assert errors(case, math.nan, combined, truth).loss == math.inf
    # one component, decided the other way, however small its share of the whole
    wrong = [g.copy() for g in combined]
    layer = next(i for i, g in enumerate(wrong) if (g != 0).any())
    place = np.unravel_index(np.argmax(np.abs(wrong[layer])), wrong[layer].shape)
    wrong[layer][place] = 0.0
    assert gradient_error(wrong, "C", truth) == math.inf


def test_gradients_of_m_and_r_differ_in_every_case():
    """Else a peer that confuses them would pass."""
    for problem in ("cartpole", "guidance", "quantum"):
        truth = reference(Case(problem, "R", 8))
        assert gradient_error(truth.base, "R", truth) > 1e-2


def test_needed_operations_of_a_small_network_by_hand():
    # 10 -> 3 -> 2 -> 1, five worlds, seven steps; two operations a weight
    first, second, last = 2 * 30, 2 * 6, 2 * 2
    forward = weights = first + second + last
    expected = {
        "M": forward + weights + last + second,
        "R": forward + weights + last + second + first,
        "C": forward
        + 2 * weights
        + last
        + second
        + first,  # one control: both fields are multiples of one pull
    }
    for flow, operations in expected.items():
        case = Case("cartpole", flow, 5, widths=(3, 2), horizon=7)
        assert needed_operations(case) == 35 * operations
        assert needed_bytes(case) == 2 * 4 * 35 * (10 + 1 + 3 + 2)


def test_needed_operations_of_convolutions_by_hand():
    # 32 points: 15 positions of 6 inputs, 7 of 3 x 4, 7 x 4 into one control
    first, second, last = 2 * 6 * 4 * 15, 2 * 12 * 4 * 7, 2 * 28
    case = Case("quantum", "R", 2, widths=(4, 4), horizon=3)
    assert needed_operations(case) == 6 * 3 * (first + second + last)
    assert needed_bytes(case) == 2 * 4 * 6 * (64 + 1 + 4 * 15 + 4 * 7)


# Timing


class Counting:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def update(self):
        self.log.append(self.name)
        return 0.0


def test_contestants_take_turns_and_who_begins_changes():
    log = []
    # slow enough that a turn is one update without one before it
    runners = [Runner(Entrant(name), "", Counting(log, name), seconds=1.0) for name in "abc"]
    measure(runners, 4, 1e-3)
    assert "".join(log) == "abcbcacababc"
    assert all(len(runner.times) == 4 for runner in runners)
    log.clear()
    measure([Runner(Entrant("a"), "", Counting(log, "a"), seconds=1e-3)], 2, 3e-3)
    assert len(log) == 2 * (1 + 3)
    assert fastest(runners[:1], 1e-3) is runners[0]
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")
def test_first_call_and_memory_come_from_fresh_processes(folder):
    case = Case("cartpole", "R", 64, widths=(8, 8), horizon=50)
    found = in_fresh_process(Entrant(OURS), case, "", 600)
    assert found["first_call_s"] > found["first_call_cached_s"] > 0
    trajectory = needed_bytes(case) / 2 / 2**20
    assert found["peak_mib"] >= found["peak_updates_mib"] > trajectory
    (crashing,) = entrants(["crashes"], folder)
    with pytest.raises(RuntimeError, match="out of something"):
        in_fresh_process(crashing, case, "", 600)


# Command line


def command(*arguments):
    small = ["--batch", "3", "--flows", "R", "--widths", "8x8", "--rounds", "3", "--no-memory"]
    return ["bench", "cartpole", *small, *arguments]


def test_command_writes_json_and_a_page_that_keeps_its_prose(folder, tmp_path, capsys):
    page_file, report_file = tmp_path / "RESULTS.md", tmp_path / "bench.json"
    page_file.write_text(f"# Mine\n\nBefore.\n\n{BEGIN}\nold figures\n{END}\n\nAfter.\n")
    files = ["--markdown", str(page_file), "--json", str(report_file)]
    arguments = command("--peers", str(folder), "--contestants", OURS, "right", "wrongloss", *files)
    assert main(arguments) == 1, "a contestant is wrong"
    text = page_file.read_text()
    assert text.startswith("# Mine\n\nBefore.\n") and text.endswith("\n\nAfter.\n")
    assert "old figures" not in text and "WRONG" in text and "matrix product" in text
    report = json.loads(report_file.read_text())
    assert report["rows"][0]["contestants"].keys() == {OURS, "right"}
    assert report["ceilings"]["cpu"]["flops"] > 1e8
    assert str(folder) not in report_file.read_text().replace(report["command"], "")
    capsys.readouterr()
    assert main(command("--contestants", OURS, "--against-report", str(report_file))) == 0
    assert "then / now" in capsys.readouterr().out


def test_scaling_takes_sizes_and_flows_in_turns(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules["warp_sims.bench.settings"].SCALES, "horizon", (5, 10))
    order = []
    turn = sys.modules["warp_sims.bench.timing"].turn

    def recorded(runner, block, warm):
        order.append(id(runner))
        assert warm  # the turn before was of another size
        return turn(runner, block, warm)

    monkeypatch.setattr("warp_sims.bench.timing.turn", recorded)
    arguments = command("--scaling", "horizon", "--flows", "R", "C", "--json", str(tmp_path / "bench.json"))
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    cases = [(row["case"]["horizon"], row["case"]["flow"]) for row in rows]
    assert cases == [(5, "R"), (5, "C"), (10, "R"), (10, "C")]
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) >= 3 and all(set(r) == set(order) and len(set(r)) == 4 for r in rounds)

    out = capsys.readouterr().out
    line = next(text for text in out.splitlines() if "| C " in text and "| 10 " in text)
    unit, exponent, of_regular = (float(cell.split()[0]) for cell in line.split("|")[-4:-1])
    times = {case: row["contestants"]["warp-sims"]["times"] for case, row in zip(cases, rows, strict=True)}
    growth = [ten / five for ten, five in zip(times[10, "C"], times[5, "C"], strict=True)]
    assert unit == pytest.approx(statistics.median(growth) / 2, rel=0.01)
    assert exponent == pytest.approx(math.log2(statistics.median(growth)), rel=0.01, abs=0.01)
    pairs = zip(times[10, "C"], times[10, "R"], strict=True)
    assert of_regular == pytest.approx(statistics.median(c / r for c, r in pairs), rel=0.01)


def test_ensembles_stand_beside_one_policy_alone(capsys, tmp_path):
    arguments = command("--ensemble", "1", "3", "--json", str(tmp_path / "bench.json"))
    assert main(arguments) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["ensembles"]
    assert list(row["members"]) == ["0", "1", "3"] and row["wrong"] == []
    three, alone = row["members"]["3"], row["members"]["0"]
    ratios = sorted(t / 3 / a for t, a in zip(three["times"], alone["times"], strict=True))
    assert three["per_member"]["median"] == pytest.approx(ratios[1])
    assert "per member / alone" in capsys.readouterr().out


def test_an_ensemble_whose_member_is_wrong_is_not_timed(monkeypatch):
    together = sys.modules["warp_sims.bench.ensemble"].Together
    original = together.gradients
    monkeypatch.setattr(together, "gradients", lambda self: [1.001 * g for g in original(self)])
    report = bench(replace(SMALL, ensemble=(2,)), lambda text: None)
    for row in report["ensembles"]:
        assert row["wrong"] == ["2 together"] and list(row["members"]) == ["0"]


def test_scaling_of_poles_changes_the_system():
    settings = replace(SMALL, problems=("cartpole", "quantum"), scaling="poles")
    assert [case.system.poles for case in settings.cases()] == [1, 1, 2, 2, 4, 4, 8, 8]


BAD = {
    "unknown system": (["bench", "pendulum"], "'pendulum'"),
    "unknown flow": (["bench", "--flows", "N"], "'N'"),
    "no worlds": (["bench", "--batch", "0"], "batch holds 0"),
    "no rounds": (["bench", "--rounds", "0"], "rounds holds 0"),
    "no time": (["bench", "--time-limit", "0"], "time_limit is 0"),
    "endless": (["bench", "--time-limit", "inf"], "time_limit is inf"),
    "widths of words": (["bench", "--widths", "wide"], "'wide'"),
    "width of zero": (["bench", "--widths", "0x8"], "widths holds 0"),
    "convolutions of two widths": (["bench", "quantum", "--widths", "8x6"], "8x6"),
    "unknown contestant": (["bench", "--contestants", "tensorflow"], "tensorflow"),
    "unknown plan": (["bench", "--contestants", "jax:best"], "jax:best"),
    "plan of ours": (["bench", "--contestants", "warp-sims:fast"], "warp-sims:fast"),
    "unknown device": (["bench", "--device", "tpu"], "'tpu'"),
    "another device": (["bench", "--device", "meta"], "'meta'"),
    "unknown scaling": (["bench", "--scaling", "batch"], "batch"),
    "scaling of what is not there": (["bench", "guidance", "--scaling", "poles"], "poles"),
    "ensemble of none": (["bench", "--ensemble", "0"], "ensemble holds 0"),
    "scaling of worlds that are given": (
        ["bench", "--scaling", "worlds", "--batch", "8"],
        "leave --batch out",
    ),
    "two measurements": (["bench", "--ensemble", "2", "--scaling", "horizon"], "give one of them"),
    "no peers": (["bench", "--peers", "nowhere"], "nowhere"),
    "no report": (["bench", "--against-report", "nowhere.json"], "nowhere.json"),
    "no such folder": (["bench", "--json", "no/such/folder.json"], "no/such"),
    "page without markers": (["bench", "--markdown", "page.md"], BEGIN),
    "not a report": (["bench", "--against-report", "page.md"], "page.md"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line_before_anything_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text("# Mine\n")
    monkeypatch.setattr("warp_sims.bench.run.run_rows", lambda *args: pytest.fail("something was measured"))
    arguments, part = BAD[name]
    if "jax:best" in arguments:
        pytest.importorskip("jax")
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warp-sims: error: ") and part in line
    assert Path("page.md").read_text() == "# Mine\n"


def test_help_of_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "warp_sims", "bench", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--flows", "--batch", "--device", "--contestants", "--time-limit", "--scaling", "--json"):
        assert option in done.stdout

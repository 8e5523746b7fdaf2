"""The paper's experiments: the matrix of runs, stopping and going on. The report is in test_report.py."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import warp_sims as ws
from warp_sims.cli import main
from warp_sims.reproduction import run as run_module
from warp_sims.reproduction.progress import Board, duration
from warp_sims.reproduction.report import collect, write_report
from warp_sims.reproduction.run import TOGETHER, is_finished, reproduce, take
from warp_sims.reproduction.worker import run
from warp_sims.training.published import SETTINGS, Job, Scale, make_jobs
from warp_sims.training.runs import read_checkpoint, read_log

ROOT = Path(__file__).parents[1]
TINY = Scale(epochs=2, horizon=6, samples=16)  # guidance: a control reaches an evader in the fourth step
FEW = Job("cartpole", "poles1", "modified", "none", 0)


def program(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "warp_sims", "reproduce", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def rows(folder):
    try:
        return len(read_log(folder)["epoch"])
    except (OSError, ValueError):
        return 0


def without_seconds(log):
    return {name: values for name, values in log.items() if name != "seconds"}


def assert_same_log(a, b):
    for name, values in without_seconds(a).items():
        # the file holds nine digits
        np.testing.assert_allclose(values, b[name], rtol=1e-8, err_msg=name)


# The matrix


def test_the_matrix_is_the_published_one():
    jobs = make_jobs(SETTINGS, seeds=1, clips=("none", "value", "norm"))
    counts = {p: sum(job.problem == p for job in jobs) for p in SETTINGS}
    assert counts == {"cartpole": 48, "guidance": 48, "quantum": 36}
    assert len({job.label for job in jobs}) == len(jobs)
    configs = {(j.problem, j.setting): j.config(Scale()) for j in jobs if j.clip == "value"}
    assert [c.system.poles for (p, _), c in configs.items() if p == "cartpole"] == [1, 2, 3, 4]
    assert [c.control_cost for (p, _), c in configs.items() if p == "guidance"] == [1, 0.1, 0.01, 0.001]
    assert [c.system.target for (p, _), c in configs.items() if p == "quantum"] == [3, 4, 5]
    numbers = {"cartpole": (100, "final", 0.01), "guidance": (60, "running", 4 / 60)}
    numbers["quantum"] = (128, "running", 0.0625)
    for (problem, _), config in configs.items():
        assert (config.horizon, config.loss, config.system.dt) == numbers[problem]
        assert (config.samples, config.batch, config.epochs, config.seed) == (256, 8, 1000, 42)
        assert (config.optimizer, config.lr, config.clip, config.clip_at) == ("adam", 1e-3, "value", 1.0)
    guidance = configs["guidance", "cost0.1"].system
    assert (guidance.drivers, guidance.evaders) == (2, 4)


@pytest.mark.parametrize("problem", SETTINGS)
def test_a_seed_draws_the_weights_alone(problem):
    setting = next(iter(SETTINGS[problem].values()))
    policies = [setting.policy(seed) for seed in (0, 1, 0)]
    first, second, again = (torch.cat([p.flatten() for p in policy.parameters()]) for policy in policies)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    # the quantum script zeroes a bias only
    last = list(policies[0].parameters())[-2]
    assert bool((last == 0).all()) == (problem != "quantum")
    kind = ws.WaveCNN if problem == "quantum" else ws.MLP
    assert type(policies[0]) is kind


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["cartpole", "--costs", "0.1"], "--costs is for guidance"),
        (["--poles", "5"], "poles holds 5"),
        (["--flows", "N"], "flows holds network"),
        (["--flows", "X"], "flow: got 'X'"),
        (["--seeds", "0"], "seeds=0"),
        (["--epochs", "0"], "epochs=0"),
        (["--jobs", "0"], "jobs=0"),
        (["--report-only", "--out", "missing"], "holds no reproduce.json"),
    ],
)
def test_what_is_refused(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not list(tmp_path.iterdir())


# Stopping and going on


@pytest.mark.parametrize("flow", ["combined", "regular"])
@pytest.mark.parametrize("stop_after", [1, 2, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, flow, stop_after):
    """Rows of the log three epochs apart, checkpoints two: a stop may fall between either."""

    def config():
        system = ws.CartPole(poles=1)
        policy = ws.MLP(system.state_size, (8,), 1)
        policy.reset_parameters(seed=0)
        # steps that overshoot: the best epoch is not the last
        settings = {"horizon": 20, "samples": 8, "batch": 4, "epochs": 8, "lr": 0.3}
        return ws.TrainConfig(
            system=system, policy=policy, flow=flow, log_every=3, checkpoint_every=2, **settings
        )

    whole = ws.train(config(), tmp_path / "whole", progress=False)
    stopped = ws.training.train.TrainingRun(config(), tmp_path / "parts")
    stopped.begin()
    for _ in range(stop_after):
        stopped.run_epoch()
    # The process is gone: what was written stays as it is.
    shutil.copytree(tmp_path / "parts", tmp_path / "killed")
    with open(tmp_path / "killed" / "log.csv", "a") as log:
        log.write("9,0.")
    resumed = ws.train(config(), tmp_path / "killed", resume=True, progress=False)
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters()):
        assert torch.equal(a, b)
    assert_same_log(whole.log, resumed.log)
    assert_same_log(read_log(tmp_path / "whole"), read_log(tmp_path / "killed"))
    assert (np.diff(resumed.log["seconds"]) >= 0).all()
    for name in ("first", "last", "best"):
        a, b = (read_checkpoint(tmp_path / run, name) for run in ("whole", "killed"))
        assert a["epoch"] == b["epoch"]
        for key, value in a["policy"].items():
            assert torch.equal(value, b["policy"][key])
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "killed").iterdir())


def test_a_finished_run_is_resumed_as_it_is(tmp_path):
    job, folder = FEW, FEW.folder(tmp_path)
    first = ws.train(job.config(TINY), folder, progress=False)
    text = (folder / "log.csv").read_bytes()
    again = ws.train(job.config(TINY), folder, resume=True, progress=False)
    assert (folder / "log.csv").read_bytes() == text
    for a, b in zip(first.policy.parameters(), again.policy.parameters()):
        assert torch.equal(a, b)


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    ws.train(FEW.config(TINY), tmp_path / "run", progress=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for other, named in (
        (Scale(1, 6, 16), "epochs=2, now epochs=1.*more epochs"),
        (Scale(2, 4, 16), "horizon=6"),
    ):
        with pytest.raises(ValueError, match=named):
            ws.train(FEW.config(other), tmp_path / "run", resume=True, progress=False)
    with pytest.raises(ValueError, match="poles"):
        job = Job("cartpole", "poles2", "modified", "none", 0)
        ws.train(job.config(TINY), tmp_path / "run", resume=True, progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    "left", [[], ["config.json.partial"], ["config.json"], ["config.json", "log.csv", "checkpoint_first.pt"]]
)
def test_a_run_killed_at_its_beginning_begins_anew(tmp_path, left):
    ws.train(FEW.config(TINY), tmp_path / "whole", progress=False)
    folder = FEW.folder(tmp_path)
    folder.mkdir(parents=True)
    for name in left:
        shutil.copy(tmp_path / "whole" / name.removesuffix(".partial"), folder / name)
    run([FEW], TINY, tmp_path, lambda message: None)
    assert_same_log(read_log(folder), read_log(tmp_path / "whole"))
    assert is_finished(tmp_path, FEW)


def test_a_run_that_diverges_is_finished(tmp_path, monkeypatch):
    def diverges(self):
        raise FloatingPointError("train: loss in epoch 0, update 3 of 4, is nan, expected a finite number; …")

    run_module.open_folder(tmp_path, TINY)
    run([FEW], TINY, tmp_path, lambda message: None)
    with monkeypatch.context() as patch:
        patch.setattr("warp_sims.training.train.TrainingRun.run_epoch", diverges)
        run([dataclasses.replace(FEW, seed=1)], TINY, tmp_path, lambda message: None)
    first, second = collect(tmp_path)
    assert (first.status, first.epochs) == ("finished", 2)
    assert (second.status, second.epochs) == ("diverged", 0)
    assert second.outcome["diverged"] == "loss in epoch 0, update 3 of 4, is nan"
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "1 diverged" in page


def test_seeds_are_done_together_and_written_as_each_ends(tmp_path, monkeypatch):
    """One is finished already but for its outcome, one diverges, two train together."""
    jobs = [dataclasses.replace(FEW, seed=seed) for seed in range(4)]
    ws.train(jobs[0].config(TINY), jobs[0].folder(tmp_path), progress=False)
    text = (jobs[0].folder(tmp_path) / "log.csv").read_bytes()
    original = Job.config

    def config(job, scale):
        made = original(job, scale)
        if job.seed == 2:
            with torch.no_grad():
                made.policy[-1].bias.fill_(1e6)  # a force whose gradient overflows
        return made

    monkeypatch.setattr(Job, "config", config)
    said = []

    def report(message):
        said.append(message)
        if "finished" in message:
            assert is_finished(tmp_path, jobs[message["run"]])
            assert (jobs[message["run"]].folder(tmp_path) / "curves.png").is_file()

    run(jobs, TINY, tmp_path, report)
    assert [m["run"] for m in said if "finished" in m] == [0, 2, 1, 3]
    outcomes = [json.loads((job.folder(tmp_path) / "outcome.json").read_text()) for job in jobs]
    assert [o["epochs"] for o in outcomes] == [2, 2, 0, 2]
    why = "gradient in epoch 0, update 0 of 2, is nan"
    assert [o["diverged"] for o in outcomes] == [None, None, why, None]
    assert (jobs[0].folder(tmp_path) / "log.csv").read_bytes() == text
    for k in (1, 3):
        alone = ws.train(jobs[k].config(TINY), progress=False)
        assert_same_log(read_log(jobs[k].folder(tmp_path)), alone.log)


def seeds_of(taken):
    assert len({dataclasses.replace(job, seed=0) for job in taken}) == 1
    return [job.seed for job in taken]


def test_how_runs_are_shared_among_processes(tmp_path):
    def board(jobs, workers):
        return Board(jobs, jobs, tmp_path, Scale(epochs=100), workers, False)

    def everything(waiting, shown, workers):
        parts = [seeds_of(take(waiting, shown, idle)) for idle in range(workers, 0, -1)]
        while waiting:
            parts.append(seeds_of(take(waiting, shown)))
        return parts

    # many settings: as many seeds as pay, the first of each setting first, over the whole matrix
    jobs = make_jobs(["cartpole"], seeds=6, flows="RC")
    waiting = list(jobs)
    first = [take(waiting, board(jobs, 2)) for _ in range(3)]
    assert [seeds_of(taken) for taken in first] == [[0, 1, 2, 3]] * 3
    assert [taken[0] for taken in first] == jobs[:3]
    assert len(waiting) == len(jobs) - 3 * TOGETHER
    # one setting: each process has its share
    one = make_jobs(["cartpole"], seeds=4, flows="R", poles=[1])
    assert everything(list(one), board(one, 1), 1) == [[0, 1, 2, 3]]
    assert everything(list(one), board(one, 2), 2) == [[0, 1], [2, 3]]
    assert everything(list(one), board(one, 3), 3) == [[0], [1], [2], [3]]
    assert everything(list(one), board(one, 4), 4) == [[0], [1], [2], [3]]
    # the last setting is shared by a process that is free and one that soon will be
    three = make_jobs(["cartpole"], seeds=4, flows="R", poles=[1, 2, 3])
    shown, waiting = board(three, 2), list(three)
    begun = [take(waiting, shown, idle) for idle in (2, 1)]
    assert [len(taken) for taken in begun] == [4, 4]
    for job in begun[0]:
        shown.finished(job)
    for job in begun[1]:
        shown.epoch(job, {"epochs": 90, "loss": 1.0, "seconds": 1.0})
    assert seeds_of(take(waiting, shown)) == [0, 1]
    for job in begun[1]:
        shown.finished(job)
    assert seeds_of(take(waiting, shown)) == [2, 3]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_matrix_goes_on_where_it_was(tmp_path, stop):
    arguments = ["cartpole", "--poles", "1", "--flows", "S", "M", "--seeds", "2", "--epochs", "25"]
    arguments += ["--jobs", "1", "--out", str(tmp_path / "out")]
    jobs = make_jobs(["cartpole"], seeds=2, poles=[1], flows=["S", "M"])
    first, second = [j for j in jobs if j.flow == "modified"], [j for j in jobs if j.flow == "stopped"]
    folders = [job.folder(tmp_path / "out") for job in second]
    process = program(*arguments)
    # The seeds of the first flow are finished, those of the second past their checkpoints after ten epochs.
    wait_for(lambda: all(rows(folder) > 14 for folder in folders), process)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert all(is_finished(tmp_path / "out", job) for job in first)
    assert not any(is_finished(tmp_path / "out", job) for job in second)

    def written():
        files = [p for job in first for p in job.folder(tmp_path / "out").iterdir()]
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    finished = written()
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "goes on where it was" in errors
        assert "Traceback" not in errors
        assert all(read_checkpoint(folder)["epoch"] >= 13 for folder in folders)
    process = program(*arguments)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "2 of 4 runs are finished" in output
    assert written() == finished
    torch.set_num_threads(1)
    for job, folder in zip(second, folders):
        assert_same_log(read_log(folder), ws.train(job.config(Scale(25)), progress=False).log)


@pytest.mark.skipif(os.name != "posix", reason="file locks of POSIX")
def test_two_processes_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "STOP_SECONDS", 0.2)
    run_module.open_folder(tmp_path / "out", TINY)
    with (
        run_module._locked(tmp_path / "out"),
        pytest.raises(BlockingIOError, match="another `warp-sims reproduce` works on"),
    ):
        reproduce([FEW], tmp_path / "out", scale=TINY, progress=False)
    assert not FEW.folder(tmp_path / "out").exists()


def test_a_folder_keeps_its_scale(tmp_path, capsys):
    run_module.open_folder(tmp_path / "out", Scale(epochs=7))
    assert main(["reproduce", "cartpole", "--epochs", "8", "--out", str(tmp_path / "out")]) == 2
    assert "begun with epochs=7, now epochs=8; give --epochs 7" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert main(["reproduce", "cartpole", "--out", str(other)]) == 2
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_time_left_is_that_of_the_epochs_measured(tmp_path):
    jobs = [
        Job("cartpole", "poles1", flow, "none", seed) for flow in ("regular", "combined") for seed in (0, 1)
    ]
    board = Board(jobs, jobs[1:], tmp_path, Scale(epochs=100), 2, False)
    board.epoch(jobs[1], {"epochs": 60, "loss": 1.0, "seconds": 2.0})
    board.epoch(jobs[2], {"epochs": 0, "loss": 1.0, "seconds": 4.0})
    # 40 epochs of 2 s, 200 of 4 s, and a second for each of three runs, on two processes
    assert board.seconds_left() == pytest.approx((40 * 2 + 200 * 4 + 3) / 2)
    board.finished(jobs[1])
    board.finished(jobs[3])
    assert board.seconds_left() == pytest.approx(100 * 4 + 1)
    assert [duration(s) for s in (5, 150, 12_000)] == ["5 s", "2 min", "3 h 20 min"]

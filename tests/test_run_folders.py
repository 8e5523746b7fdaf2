"""What stands in a run folder: whole, of one run, written by one process; else refused and left alone."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import warp_sims as ws
from warp_sims.cli import main
from warp_sims.training import durable
from warp_sims.training.resuming import resumed_config
from warp_sims.training.run_lock import LOCK, RunLock
from warp_sims.training.runs import LOG_HEADER, PREVIOUS, read_checkpoint, read_log
from warp_sims.training.train import TrainingRun

SYSTEM = ws.CartPole(poles=1)
OLD_HEADER = "epoch,loss_batch,loss_train,loss_test,grad_norm,cosine,agreement,seconds"


def config(policy=None, **settings):
    if policy is None:
        policy = ws.MLP(SYSTEM.state_size, (8,), 1)
        policy.reset_parameters(seed=0)
    settings = {"horizon": 5, "samples": 8, "batch": 4, "epochs": 8, "checkpoint_every": 2} | settings
    return ws.TrainConfig(system=SYSTEM, policy=policy, **settings)


def stopped(folder, epochs=5, **settings):
    """A run that was killed after so many epochs."""
    run = TrainingRun(config(**settings), folder.parent / "running")
    run.begin()
    for _ in range(epochs):
        run.run_epoch()
    shutil.copytree(folder.parent / "running", folder)
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != LOCK}


def resume(folder, **settings):
    return ws.train(config(**settings), folder, resume=True, progress=False)


def assert_refused(folder, *words, **settings):
    before = contents(folder)
    with pytest.raises(ValueError) as error:
        resume(folder, **settings)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    assert contents(folder) == before, "a refusal changes nothing"


# What does not fit together


@pytest.mark.parametrize("missing", ["checkpoint_best.pt", "log.csv"])
def test_a_missing_file_is_no_reason_to_begin_anew(tmp_path, missing):
    folder = stopped(tmp_path / "run")
    (folder / missing).unlink()
    assert_refused(folder, f"{missing} is missing", "put it back", "--overwrite")


def test_a_missing_last_checkpoint(tmp_path):
    folder = stopped(tmp_path / "run")
    (folder / "checkpoint_last.pt").unlink()
    assert_refused(
        folder, "got to epoch 4", "checkpoint_last.pt is missing", "checkpoint_previous.pt is whole"
    )
    # what the message says helps
    (folder / "checkpoint_previous.pt").rename(folder / "checkpoint_last.pt")
    weights = resume(folder).policy.state_dict()
    whole = ws.train(config(), progress=False).policy.state_dict()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_a_damaged_last_checkpoint_names_the_one_before(tmp_path):
    folder = stopped(tmp_path / "run", epochs=6)
    data = bytearray((folder / "checkpoint_last.pt").read_bytes())
    place = data.index(read_checkpoint(folder)["policy"]["0.bias"].numpy().tobytes())
    data[place] ^= 1  # one bit of one weight
    (folder / "checkpoint_last.pt").write_bytes(data)
    assert_refused(folder, "checkpoint_last.pt cannot be read", "checkpoint_previous.pt is whole, of epoch 3")
    with pytest.raises(ValueError, match="cannot be read"):
        ws.load_run(folder)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_log_behind_its_checkpoint(tmp_path, rows):
    folder = stopped(tmp_path / "run")
    lines = (folder / "log.csv").read_text().splitlines(keepends=True)
    (folder / "log.csv").write_text("".join(lines[: 1 + rows]))
    assert_refused(folder, "checkpoint_last.pt is of epoch 3", f"the first of epoch {rows - 1}")


def test_a_log_with_a_row_missing_between(tmp_path):
    folder = stopped(tmp_path / "run")
    lines = (folder / "log.csv").read_text().splitlines(keepends=True)
    (folder / "log.csv").write_text("".join(lines[:3] + lines[4:]))
    assert_refused(folder, "lacks 1 of the rows", "the first of epoch 1")


def test_checkpoints_of_another_run(tmp_path):
    folder = stopped(tmp_path / "run")
    best = read_checkpoint(folder, "best")
    torch.save(best | {"epoch": 0 if best["epoch"] != 0 else 1}, folder / "checkpoint_best.pt")
    assert_refused(folder, "checkpoint_best.pt is of epoch", "the lowest test loss is in another one")
    torch.save(best, folder / "checkpoint_best.pt")
    wide = ws.MLP(SYSTEM.state_size, (9,), 1)
    ws.train(config(wide, epochs=4), tmp_path / "wide", progress=False)
    for name in ("last", "best"):
        shutil.copy(tmp_path / "wide" / f"checkpoint_{name}.pt", folder)
    assert_refused(folder, "holds 0.bias as float32 of shape (9,), expected float32 of shape (8,)")


def test_weights_that_are_not_finite_are_not_resumed(tmp_path):
    folder = stopped(tmp_path / "run")
    last = read_checkpoint(folder)
    last["policy"]["0.weight"][0, 0] = math.nan
    torch.save(last, folder / "checkpoint_last.pt")
    assert_refused(folder, "holds NaN or infinity in 0.weight")


# How files are written


def test_every_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """fsync of the file, the move, fsync of the folder; and the log before the checkpoint."""
    said = []
    fsync, replace = os.fsync, os.replace

    def name_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def synced(descriptor):
        said.append(("fsync", name_of(descriptor)))
        fsync(descriptor)

    def moved(a, b):
        said.append(("replace", os.path.basename(a), os.path.basename(b)))
        replace(a, b)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("asks Linux for the names of open files")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    ws.train(config(epochs=4), tmp_path / "run", progress=False)
    moves = [entry for entry in said if entry[0] == "replace"]
    written = {entry[2] for entry in moves}
    assert written == {
        "config.json",
        "log.csv",
        *(f"checkpoint_{name}.pt" for name in ("first", "best", "last", PREVIOUS)),
    }
    for i, entry in enumerate(said):
        if entry[0] == "replace" and entry[2] != "checkpoint_previous.pt":  # a second name of a whole file
            assert said[i - 1] == ("fsync", entry[1]), "the file first"
            assert said[i + 1] == ("fsync", "run"), "then the folder"
        if entry[0] == "replace" and entry[2] == "checkpoint_last.pt":
            before = [e[1] for e in said[:i] if e[0] == "fsync"]
            assert "log.csv" in before[-4:]
    assert len({entry[1] for entry in moves}) == len(moves), "no temporary name twice"
    assert all(f".{os.getpid()}-" in entry[1] for entry in moves)


def test_a_failed_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    durable.replace_file(file, lambda f: f.write(b"old"))

    def fails(opened):
        opened.write(b"half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        durable.replace_file(file, fails)
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_disk_that_is_full_costs_no_checkpoint(tmp_path, monkeypatch):
    run = TrainingRun(config(), tmp_path / "run")
    with pytest.raises(OSError, match="no space"), run:
        run.run_epoch()
        run.run_epoch()

        def full(contents, file):
            raise OSError("no space left on device")

        monkeypatch.setattr(torch, "save", full)
        run.run_epoch()
        run.run_epoch()
    assert read_checkpoint(tmp_path / "run")["epoch"] == 1
    monkeypatch.undo()
    assert resume(tmp_path / "run").log["epoch"][-1] == 7


# Two processes


def test_a_folder_in_use_is_refused_with_its_holder(tmp_path):
    with TrainingRun(config(), tmp_path / "run") as run:
        run.run_epoch()
        before = contents(tmp_path / "run")
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(BlockingIOError) as error:
                ws.train(config(), tmp_path / "run", progress=False, **options)
            assert f"in use by process {os.getpid()} on " in str(error.value)
            assert " since 20" in str(error.value) and "another folder" in str(error.value)
        assert contents(tmp_path / "run") == before
        while not run.done:
            run.run_epoch()
    assert not (tmp_path / "run" / LOCK).exists()
    assert read_log(tmp_path / "run")["epoch"].tolist() == [-1, *range(8)]


HOLD = """
import sys, time
from pathlib import Path
from warp_sims.training.resuming import resumed_config
from warp_sims.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_process_holds_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"):
                RunLock(tmp_path)
        finally:
            holder.kill()
    lock = RunLock(tmp_path)
    lock.release()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_where_there_are_no_locks_the_file_is_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    lock = RunLock(tmp_path)
    with pytest.raises(BlockingIOError, match=f"if that process is gone, remove .*{LOCK}"):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ctrl_c_says_how_to_go_on_and_that_helps(tmp_path):
    words = ["train", "cartpole", "--poles", "1", "--hidden", "8", "--horizon", "5", "--samples", "8"]
    words += ["--epochs", "100000", "--no-progress", "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "warp_sims", *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "run" / "checkpoint_previous.pt").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert f"to go on: warp-sims train --resume {tmp_path / 'run'}" in errors
    reached = read_checkpoint(tmp_path / "run")["epoch"]
    with TrainingRun(resumed_config(tmp_path / "run"), tmp_path / "run", resume=True) as run:
        assert run.epoch == reached


# Going on


def test_a_finished_run_is_continued(tmp_path):
    whole = ws.train(config(epochs=7), tmp_path / "whole", progress=False)
    ws.train(config(epochs=3), tmp_path / "run", progress=False)
    more = resume(tmp_path / "run", epochs=7)
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, more.policy.state_dict()[name])
    logs = [read_log(tmp_path / name) for name in ("whole", "run")]
    for name, values in logs[0].items():
        if name != "seconds":
            np.testing.assert_array_equal(values, logs[1][name], err_msg=name)
    assert ws.load_run(tmp_path / "run")[0].epochs == 7
    assert_refused(tmp_path / "run", "epochs=7, now epochs=3", "more epochs would continue it", epochs=3)


@pytest.mark.parametrize(
    "more", [[], ["--decay", "0.3/s", "--clip-cotangent", "0.05"]], ids=["plain", "estimator"]
)
def test_resuming_from_the_command_line(more, tmp_path, capsys):
    words = ["train", "cartpole", "--poles", "1", "--hidden", "8", "--horizon", "5", "--samples", "8"]
    words += ["--no-progress", *more]
    assert main([*words, "--epochs", "5", "--out", str(tmp_path / "whole")]) == 0
    assert main([*words, "--epochs", "2", "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "5", "--no-progress"]) == 0
    capsys.readouterr()
    logs = [read_log(tmp_path / name) for name in ("whole", "run")]
    for name in logs[0]:
        if name != "seconds":
            np.testing.assert_array_equal(logs[0][name], logs[1][name], err_msg=name)
    made = ws.load_run(tmp_path / "run")[0]
    expected = (ws.PerSecond(0.3), 0.05) if more else (1.0, None)
    assert (made.decay, made.clip_cotangent) == expected
    for words, said in (
        (["--resume", str(tmp_path / "run"), "--lr", "0.1"], "--lr"),
        (["--resume", str(tmp_path / "run"), "--epochs", "3", "--no-progress"], "now epochs=3"),
        (["--resume", str(tmp_path / "nothing")], "nothing does not exist"),
        (["cartpole", "--resume", str(tmp_path / "run")], "cartpole"),
    ):
        assert main(["train", *words]) == 2
        errors = capsys.readouterr().err
        assert said in errors.splitlines()[-1], errors


def test_a_run_of_an_earlier_version(tmp_path):
    """It lacks a setting, two columns of its log, and two rows of what its last checkpoint remembers."""
    whole = ws.train(config(log_every=4), progress=False)
    folder = stopped(tmp_path / "run", epochs=6, log_every=4)
    written = json.loads((folder / "config.json").read_text())
    del written["training"]["on_divergence"], written["training"]["decay"], written["system"]["fields"]["dt"]
    (folder / "config.json").write_text(json.dumps(written))
    lines = [line.rsplit(",", 2)[0] for line in (folder / "log.csv").read_text().splitlines()]
    assert lines[0] == OLD_HEADER
    (folder / "log.csv").write_text("".join(line + "\n" for line in lines))
    last = read_checkpoint(folder)
    assert len(last["records"]) == 2
    last["records"] = [record[:4] for record in last["records"]]
    torch.save(last, folder / "checkpoint_last.pt")
    loaded, _, log = ws.load_run(folder)
    assert loaded.on_divergence == "stop" and np.isnan(log["zeros"]).all()
    resumed = resume(folder, log_every=4)
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name])
    assert (folder / "log.csv").read_text().startswith(LOG_HEADER + "\n")
    for name in ("loss_batch", "loss_train", "loss_test", "grad_norm", "cosine", "agreement"):
        np.testing.assert_allclose(whole.log[name], resumed.log[name], rtol=1e-8, err_msg=name)
    assert_refused(
        folder, "on_divergence='stop', now on_divergence='skip'", log_every=4, on_divergence="skip"
    )


def test_a_setting_of_a_later_version_is_named(tmp_path):
    ws.train(config(epochs=1), tmp_path / "run", progress=False)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    written["training"]["annealing"] = 0.5
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"annealing=0.5, which this version of warp-sims does not know"):
        ws.load_run(tmp_path / "run")
    assert_refused(tmp_path / "run", "annealing=0.5", epochs=1)


# Damage

MUTATIONS = int(os.environ.get("WARP_SIMS_MUTATIONS", "400"))


def mutated_json(data, draw):
    """One value of nested JSON removed, renamed, or replaced by something else."""
    data = json.loads(json.dumps(data))
    places = []

    def collect(inside):
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        for key in keys:
            places.append((inside, key))
            if isinstance(inside[key], (dict, list)):
                collect(inside[key])

    collect(data)
    inside, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[f"{key}_"] = inside.pop(key)
    else:
        inside[key] = draw.choice(
            [None, True, -1, 0, 3, 10**30, 1e308, -0.5, "", "x", "os:getcwd", [], [1, "a"], {}, {"a": 1}]
        )
    return json.dumps(data).encode()


def mutated_bytes(data, draw):
    """Bits flipped, a part cut out, doubled, or overwritten."""
    data = bytearray(data)
    a = draw.randrange(len(data))
    b = min(len(data), a + draw.choice([1, 2, 7, 100, len(data)]))
    kind = draw.randrange(4)
    if kind == 0:
        data[a] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[a:b]
    elif kind == 2:
        data[a:a] = data[a:b]
    else:
        data[a:b] = draw.randbytes(b - a)
    return bytes(data)


def test_mutated_files_are_refused_in_one_line(tmp_path):
    """Either everything is as it was, or TypeError or ValueError (FileExistsError for what is no run any
    more) says in one line what to do; and never is a weight another one.
    """
    whole = stopped(tmp_path / "whole", epochs=6)
    weights = {name: read_checkpoint(whole, name)["policy"] for name in ("last", "best")}
    written = json.loads((whole / "config.json").read_text())
    names = ("config.json", "config.json", "log.csv", "checkpoint_last.pt", "checkpoint_best.pt")
    draw = random.Random(0)
    refused = 0
    for i in range(MUTATIONS):
        folder = tmp_path / "mutated"
        shutil.copytree(whole, folder)
        name = names[i % len(names)]
        original = (folder / name).read_bytes()
        spoiled = mutated_json(written, draw) if i % len(names) == 0 else mutated_bytes(original, draw)
        (folder / name).write_bytes(spoiled)
        before = contents(folder)

        def load(folder=folder, what=f"mutation {i} of {name}: another weight"):
            for which in ("last", "best"):
                _, policy, _ = ws.load_run(folder, checkpoint=which)
                for key, value in policy.state_dict().items():
                    assert torch.equal(value, weights[which][key]), what

        def go_on(folder=folder):
            with TrainingRun(config(), folder, resume=True) as run:
                assert run.epoch == 5

        for action in (load, go_on):
            try:
                action()
            except (TypeError, ValueError, FileExistsError) as error:
                refused += 1
                words = str(error)
                assert "\n" not in words and any(w in words for w in ("give", "put", "expected", "update")), (
                    words
                )
                assert contents(folder) == before
        shutil.rmtree(folder)
    assert refused > MUTATIONS // 2

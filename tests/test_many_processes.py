"""Training in several processes beside training in one: the same up to rounding, and nothing hangs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import distributed_training as cases
import numpy as np
import pytest
import torch

import warp_sims as ws
from warp_sims.training.runs import read_checkpoint, read_log

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch has no gloo here",
)

TOLERANCE = 1e-10
"""Relative, in double precision: sums over worlds in another order, through a few steps of the optimizer."""

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(sys.path),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def together(action, count, folder, may_fail=False):
    """Does something in so many processes; returns their exit codes and what they said."""
    command = [sys.executable, str(Path(cases.__file__)), action]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(folder)],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert may_fail or codes == [0] * count, "\n".join(said)[-4000:]
    return codes, said


@pytest.fixture(scope="module")
def alone():
    """What one process does, without a group."""
    results = {}
    for case in cases.CASES:
        result = ws.train(cases.config(case), progress=False)
        results[case] = result.policy.state_dict(), result.log
    return results


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_processes_are_one(count, alone, tmp_path):
    """Shares are uneven, and for three processes one is empty."""
    together("train", count, tmp_path)
    for case, (weights, log) in alone.items():
        for rank in range(count):
            found, found_log = torch.load(tmp_path / f"{case}_{rank}.pt", weights_only=False)
            first, first_log = torch.load(tmp_path / f"{case}_0.pt", weights_only=False)
            for name, value in weights.items():
                assert torch.equal(found[name], first[name]), "to the last bit in every process"
                torch.testing.assert_close(found[name], value, rtol=TOLERANCE, atol=TOLERANCE)
            for name, values in log.items():
                if name != "seconds":
                    np.testing.assert_array_equal(found_log[name], first_log[name], err_msg=f"{case} {name}")
                    np.testing.assert_allclose(found_log[name], values, rtol=1e-8, err_msg=f"{case} {name}")
        assert (tmp_path / case / "checkpoint_last.pt").exists()
        assert not (tmp_path / case / "run.lock").exists()
        assert len(read_log(tmp_path / case)["epoch"]) == 4, "one process logs"


def test_what_differs_is_named_in_every_process(tmp_path):
    together("refuse", 2, tmp_path)
    said = [torch.load(tmp_path / f"said_{rank}.pt") for rank in range(2)]
    expected = (
        "ValueError: train: process 1 has lr='0.1', expected '0.2' like process 0",
        "FileExistsError: folder",
        "ValueError: train_together: 2 configs in a group of 2 processes",
        "ValueError: GradientPair.all_reduce: part 1 of process 1 is '0.weight' of shape (9, 4) and float32, "
        "expected '0.weight' of shape (8, 4) and float32",
        "ValueError: GradientPair.all_reduce: part 0 of process 1 is 'loss' of shape () and float64",
        "ValueError: GradientPair.all_reduce: process 1 has its parameters in the order ['0.bias', ",
        str(2**24 + 1),
    )
    for words in said:
        for found, start in zip(words, expected, strict=True):
            assert found.startswith(start), found
    assert said[0] == said[1]
    assert os.listdir(tmp_path / "taken") == ["thesis.tex"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_a_process_that_dies_ends_the_job_and_it_resumes(tmp_path):
    """Also with another number of processes."""
    started = time.monotonic()
    codes, said = together("die", 3, tmp_path, may_fail=True)
    assert time.monotonic() - started < 60, "nobody waits for the end of a timeout"
    assert codes[-1] == -9 and codes[0] > 0 and codes[1] > 0, said
    assert read_checkpoint(tmp_path / "run")["epoch"] == 1
    together("resume", 2, tmp_path)
    whole = ws.train(cases.config("combined", epochs=6), progress=False).policy.state_dict()
    resumed = [torch.load(tmp_path / f"resumed_{rank}.pt") for rank in range(2)]
    for name, value in whole.items():
        assert torch.equal(resumed[0][name], resumed[1][name])
        torch.testing.assert_close(resumed[0][name], value, rtol=TOLERANCE, atol=TOLERANCE)
    assert read_log(tmp_path / "run")["epoch"].tolist() == [-1, *range(6)]


def test_a_world_that_diverges_is_named_in_every_process(tmp_path):
    together("diverge", 2, tmp_path)
    said = [torch.load(tmp_path / f"diverged_{rank}.pt") for rank in range(2)]
    for words in said:
        # sample 11 of 14 is world 3 of the third batch of 4
        assert "in epoch 0, update 2 of 4, is" in words
        assert "world 3, in its" in words and "dt=0.01" in words
    assert said[0].split("; the run")[0] == said[1]


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command line in three processes, and in one; then resumed in two."""
    words = ["train", "cartpole", "--poles", "1", "--hidden", "8", "--horizon", "5", "--samples", "8"]
    words += ["--dtype", "float64", "--no-progress", "--lr", "0.01"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

    def run(*command):
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run(sys.executable, "-m", "warp_sims", *words, "--epochs", "4", "--out", str(tmp_path / "one"))
    program = ["-m", "warp_sims"]
    said = run(*torchrun, "3", *program, *words, "--epochs", "2", "--out", str(tmp_path / "several"))
    assert said.count("test loss") == 1, "one process speaks"
    resumed = ["train", "--resume", str(tmp_path / "several"), "--epochs", "4", "--no-progress"]
    run(*torchrun, "2", *program, *resumed)
    one, several = (read_checkpoint(tmp_path / name)["policy"] for name in ("one", "several"))
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, rtol=TOLERANCE, atol=TOLERANCE)
    assert read_log(tmp_path / "several")["epoch"].tolist() == [-1, 0, 1, 2, 3]

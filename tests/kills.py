"""Training that is killed again and again, beside a training that is not: `python tests/kills.py [KILLS]`.

A child process trains into a folder and is ended by SIGKILL; the next one resumes it. Half of the kills fall
on an operation on files (before it, after it, or with half of a checkpoint written; one position after the
other), the others on a time drawn at random. When a run is through, its weights, its log and its checkpoints
are compared with those of a run that nobody killed, bit for bit, and the next run begins.

Children are forked from a process that has trained once, on one thread: one that starts anew takes seconds to
import and to load kernels, and a hundredth of them to train.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import warp_sims as ws
from warp_sims.training import durable
from warp_sims.training.runs import read_checkpoint, read_log

OPERATIONS = ("open", "fsync", "replace", "link", "unlink")
"""Operations on files that a kill may precede or follow."""


def config() -> ws.TrainConfig:
    """A run of 12 epochs whose best is not its last, with rows and checkpoints epochs apart."""
    system = ws.CartPole(poles=1)
    policy = ws.MLP(system.state_size, (8,), 1)
    policy.reset_parameters(seed=0)
    settings = {"horizon": 10, "samples": 8, "batch": 4, "epochs": 12, "lr": 0.3}
    return ws.TrainConfig(system=system, policy=policy, log_every=2, checkpoint_every=3, **settings)


def train(folder: Path) -> None:
    """Trains in this process, to the end."""
    torch.set_num_threads(1)
    ws.train(config(), folder, resume=True, progress=False)


def in_child(action: Callable[[], None], seconds: float | None = None) -> int:
    """Does something in a forked process, killed after so many seconds; returns the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)  # what Warp says as it loads
            action()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a training failed; what it said stands above")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_at(folder: Path, count: int, after: bool) -> None:
    """Trains, and kills itself at its `count`-th operation on files."""
    left = [count]

    def dying(operation: Callable) -> Callable:
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*arguments, **options)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, dying(getattr(os, name)))
    durable.__dict__["open"] = dying(open)
    save = torch.save

    def half_saved(contents, file):
        left[0] -= 1
        if left[0] == 0:
            whole = io.BytesIO()
            save(contents, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(contents, file)

    torch.save = half_saved
    train(folder)


def assert_same(whole: Path, killed: Path) -> None:
    """Weights, optimizer, log and checkpoints, bit for bit; only times may differ."""
    for name in ("first", "last", "best"):
        assert_equal(read_checkpoint(whole, name), read_checkpoint(killed, name), name)
    logs = [read_log(folder) for folder in (whole, killed)]
    for log in logs:
        log.pop("seconds")
    for name, values in logs[0].items():
        assert values.tobytes() == logs[1][name].tobytes(), f"column {name}"
    assert (whole / "config.json").read_bytes() == (killed / "config.json").read_bytes()
    left = [p.name for p in killed.iterdir() if p.name.endswith((".partial", ".lock"))]
    assert not left, left


def assert_equal(a: object, b: object, name: str) -> None:
    """Nested containers of tensors, bit for bit."""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key, value in a.items():
            assert_equal(value, b[key], f"{name}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{name}[{i}]")
    else:
        assert a == b, name


def kill(kills: int, folder: Path, seed: int = 0) -> tuple[int, int]:
    """Kills so many trainings; returns how many kills there were, and how many runs came through them."""
    draw = random.Random(seed)
    # the picture comes after all else, and would take most of the time
    ws.training.train.TrainingRun._draw_curves = lambda self, path: None  # type: ignore[method-assign]
    train(folder / "warm")
    started = time.monotonic()
    in_child(lambda: train(folder / "whole"))
    seconds = time.monotonic() - started
    done = runs = position = 0
    while done < kills:
        target = folder / f"run{runs}"
        for turn in range(40):
            if turn % 2 == 0:
                # a little further each time, so that every operation has its turn in one run or another
                position = position % 60 + 1
                after = draw.random() < 0.5
                ended = in_child(lambda: killed_at(target, position, after))  # noqa: B023
            else:
                ended = in_child(lambda: train(target), draw.uniform(0.0, 1.3 * seconds))  # noqa: B023
            done += ended == signal.SIGKILL
            if done >= kills:
                break
        assert in_child(lambda: train(target)) == 0  # noqa: B023
        assert_same(folder / "whole", target)
        runs += 1
    return done, runs


def main() -> None:
    """Prints the numbers."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done, runs = kill(kills, Path(folder))
    print(
        f"{done} trainings ended by SIGKILL, {runs} runs resumed to their ends: weights, optimizer, log and "
        f"checkpoints are those of the uninterrupted run, bit for bit ({time.monotonic() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()

"""One of several processes that train together: `python distributed_training.py CASE RANK COUNT FOLDER`."""

from __future__ import annotations

import copy
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from cases import Evaluated

import warp_sims as ws
from warp_sims.training.updates import Updates

SYSTEM = ws.CartPole(poles=1)
SAMPLES, BATCH = 14, 4
"""Batches of 4, 4, 4 and 2: for 3 processes shares of 2, 1 and 1 worlds, in the end of 1, 1 and 0."""


def own_loss(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """It cannot do with no worlds at all."""
    if states.shape[1] == 0:
        raise ZeroDivisionError("a mean over no worlds")
    return states[-1].square().mean() + controls.sin().mean()


CASES: dict[str, dict[str, Any]] = {
    "combined": {"flow": "combined"},
    "regular": {"flow": "regular", "loss": own_loss, "clip": "norm", "clip_at": 0.01},
    "modified": {"flow": "modified", "loss": "running", "optimizer": "sgd", "momentum": 0.9, "lr": 0.1},
    "network": {"flow": "network", "control_cost": 0.1},
    "stopped": {"flow": "stopped", "control_cost": 0.1},
    "evaluated": {"flow": "combined"},
    "noise": {"flow": "combined", "combiner": ws.Anneal(1.0, 0.0, updates=9)},
}


def config(case: str, seed: int = 0, **settings: Any) -> ws.TrainConfig:
    """Three epochs in double precision, so that rounding is far below what could be wrong."""
    net = ws.MLP(SYSTEM.state_size, (8,), 1)
    net.reset_parameters(seed=seed)
    net.double()
    policy = {"evaluated": Evaluated, "noise": ws.GaussianPolicy}.get(case, lambda own: own)(net)
    sizes = {"horizon": 8, "samples": SAMPLES, "batch": BATCH, "epochs": 3, "lr": 1e-2}
    return ws.TrainConfig(system=SYSTEM, policy=policy, **(sizes | CASES.get(case, {}) | settings))


def train_cases(rank: int, folder: Path) -> None:
    """Every case, beginning with weights of one's own: those of the first process are taken."""
    for case in CASES:
        result = ws.train(config(case, seed=rank), folder / case, progress=False)
        torch.save((result.policy.state_dict(), result.log), folder / f"{case}_{rank}.pt")


def refuse(rank: int, folder: Path) -> None:
    """What differs between the processes is named in each of them, and nothing hangs."""
    last = rank == torch.distributed.get_world_size() - 1
    said = []

    def refused(action: Any) -> None:
        try:
            action()
        except (ValueError, FileExistsError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")

    refused(lambda: ws.train(config("combined", lr=0.1 if last else 0.2), progress=False))
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "thesis.tex").write_text("precious")
    refused(lambda: ws.train(config("combined"), folder / "taken", progress=False))
    configs = [config("combined", seed=k) for k in range(2)]
    refused(lambda: ws.train_together(configs, progress=False))
    # pairs of gradients: another architecture, another dtype, another order of parameters
    x0 = SYSTEM.initial_states(4)
    nets = [ws.MLP(SYSTEM.state_size, sizes, 1) for sizes in ((8,), (9,))]

    def pair_of(net: torch.nn.Module, dtype: torch.dtype = torch.float32) -> ws.GradientPair:
        return ws.gradient_pair(SYSTEM, copy.deepcopy(net).to(dtype), x0.to(dtype), horizon=4)

    def reordered() -> ws.GradientPair:
        pair = pair_of(nets[0])
        order = [1, 0, 2, 3]
        parts = pair.flat.split([s.numel() for s in pair.shapes], dim=-1)
        return ws.GradientPair(
            pair.loss,
            pair.worlds,
            tuple(pair.names[i] for i in order),
            tuple(pair.shapes[i] for i in order),
            torch.cat([parts[i] for i in order], dim=-1),
        )

    refused(lambda: pair_of(nets[1] if last else nets[0]).all_reduce())
    refused(lambda: pair_of(nets[0], torch.float64 if last else torch.float32).all_reduce())
    refused(lambda: (reordered() if last else pair_of(nets[0])).all_reduce())
    # worlds are counted as integers: as floats of single precision they would be 2 ** 24
    pair = pair_of(nets[0])
    many = ws.GradientPair(pair.loss, 2**24 + 1 if last else 0, pair.names, pair.shapes, pair.flat)
    said.append(str(many.all_reduce().worlds))
    torch.save(said, folder / f"said_{rank}.pt")


def die(rank: int, folder: Path) -> None:
    """The last process is killed in the middle of an epoch."""
    original, last = Updates.update, rank == torch.distributed.get_world_size() - 1
    updates = []

    def update(self: Updates, x0: torch.Tensor, record: torch.Tensor) -> None:
        updates.append(0)
        if last and len(updates) == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, x0, record)

    Updates.update = update  # type: ignore[method-assign]
    ws.train(config("combined", epochs=6, checkpoint_every=1), folder / "run", progress=False)


def diverge(rank: int, folder: Path) -> None:
    """A world of the last process is not finite; every process says which one it is."""

    class Spoiled(ws.CartPole):
        def initial_states(self, n: int, seed: int = 42, split: str = "train") -> torch.Tensor:
            x0 = torch.zeros(n, self.state_size, dtype=torch.float64)
            if split == "train":
                x0[SAMPLES - 3, 3] = 1e200
            return x0

    spoiled = config("regular", loss="running", on_divergence="stop")
    spoiled = ws.TrainConfig(Spoiled(poles=1), spoiled.policy, **spoiled.settings())
    # else the evaluation before training would find it
    Updates.evaluate = lambda self: [1.0, 1.0]  # type: ignore[method-assign]
    said = ""
    try:
        ws.train(spoiled, folder / "diverged", progress=False)
    except FloatingPointError as error:
        said = str(error)
    torch.save(said, folder / f"diverged_{rank}.pt")


def resume(rank: int, folder: Path) -> None:
    """Goes on with the run that `die` left."""
    run = ws.train(
        config("combined", epochs=6, checkpoint_every=1), folder / "run", resume=True, progress=False
    )
    torch.save(run.policy.state_dict(), folder / f"resumed_{rank}.pt")


def main(action: str, rank: int, count: int, folder: Path) -> None:
    """Joins the others and acts."""
    store = f"file://{folder}/store_{action}_{count}"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    actions = {
        "train": train_cases,
        "refuse": refuse,
        "die": die,
        "resume": resume,
        "diverge": diverge,
    }
    actions[action](rank, folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

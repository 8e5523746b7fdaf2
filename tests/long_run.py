"""Memory over many updates: `python tests/long_run.py [UPDATES]`."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import warp_sims as ws
from warp_sims.training.train import TrainingRun

WARM_UP = 0.2
"""Share of the updates before memory is looked at: allocators take a while to settle."""


def resident() -> float:
    """Returns the memory of this process in MB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(updates: int, folder: Path, flow: str) -> tuple[float, float]:
    """Trains for so many updates, with log and checkpoints; returns the memory in MB after the warm-up, and
    by how much more it is at the end.
    """
    system = ws.CartPole(poles=1)
    policy = ws.MLP(system.state_size, (32, 32), 1)
    policy.reset_parameters(seed=0)
    sizes = {"horizon": 20, "samples": 256, "batch": 8, "lr": 1e-5}
    epochs = updates // 32
    config = ws.TrainConfig(system=system, policy=policy, flow=flow, epochs=epochs, **sizes)
    early = 0.0
    with TrainingRun(config, folder) as run:
        while not run.done:
            run.run_epoch()
            if run.epoch == int(WARM_UP * epochs):
                gc.collect()
                early = resident()
        gc.collect()
        late = resident()
    return early, late - early


def main() -> None:
    """Prints the numbers."""
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    torch.set_num_threads(1)
    for flow in ("combined", "regular"):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            early, more = growth(updates, Path(folder) / "run", flow)
        print(
            f"{flow}: {updates} updates in {time.monotonic() - started:.0f} s, {early:.1f} MB after "
            f"{WARM_UP:.0%} of them, {more:+.2f} MB at the end"
        )


if __name__ == "__main__":
    main()

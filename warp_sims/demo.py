"""The demonstration: one cart-pole controller trained with several flows, epoch by epoch in turn."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .kernels.flow import Flow
from .pictures.animation import animate
from .pictures.plots import plot_curves
from .policies.networks import MLP
from .progress import Bars
from .systems import CartPole
from .training.config import TrainConfig
from .training.train import TrainingRun

DEMO_EPOCHS = 500


def run_demo(
    out: str | os.PathLike[str],
    *,
    flows: Sequence[str | Flow] = ("regular", "combined"),
    poles: int = 4,
    epochs: int = DEMO_EPOCHS,
    progress: bool = True,
) -> tuple[Path, Path]:
    """Trains a cart-pole controller with each flow, from the same weights on the same data, and draws both.

    Args:
        out: The folder for a run folder per flow, the picture of the curves and the animation. An earlier
            demonstration there is replaced.
        flows: The flows to compare.
        poles: Number of poles.
        epochs: Epochs for each flow.
        progress: Show a progress bar per flow.

    Returns:
        The picture of the test losses, and the animation of the controllers from the same initial state.
    """
    system = CartPole(poles=poles)
    names = [Flow.parse(flow).name.lower() for flow in flows]
    folders = {name: Path(out) / name for name in names}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_thread())
        runs: dict[str, TrainingRun] = {}
        for name, folder in folders.items():
            policy = MLP(system.state_size, (100, 100), system.control_size)
            policy.reset_parameters(seed=42, zero_last=True)
            config = TrainConfig(system=system, policy=policy, flow=name, epochs=epochs)
            runs[name] = stack.enter_context(TrainingRun(config, folder, overwrite=True))
        bars = stack.enter_context(Bars(progress))
        shown = {name: bars.add(name, epochs, run.test_loss) for name, run in runs.items()}
        for epoch in range(epochs):
            for name, run in runs.items():
                run.run_epoch()
                bars.update(shown[name], epoch + 1, run.test_loss)
    logs = {name: run.result().log for name, run in runs.items()}
    curves = plot_curves(logs, Path(out) / "curves.png")
    animation = animate(folders, Path(out) / "animation.gif")
    return curves, animation


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sets torch to one thread.

    With batches of 8 a second thread gains little. If another program uses the cores, the two threads wait
    for each other, and an epoch takes 350 ms instead of 65.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Trains several runs that differ only in the initial weights, in one batch of work."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from ..policies.ensembles import Ensemble
from ..progress import Bars
from .config import TrainConfig
from .processes import Processes
from .train import TrainingRun, TrainResult
from .updates import Updates

State = dict[str, Any]  # of an optimizer


def train_together(
    configs: Sequence[TrainConfig],
    outs: Sequence[str | os.PathLike[str]] | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> list[TrainResult]:
    """Trains several policies in place, each as `train` would, in one batch of work.

        configs = [ws.TrainConfig(system=system, policy=make_policy(seed)) for seed in range(4)]
        results = ws.train_together(configs, [f"runs/seed{seed}" for seed in range(4)])

    Every run has the weights, the log and the folder that it would have alone, on a CPU to the last bit. Only
    `seconds` in its log are those of all of them, and the mean cosine may differ in its last bits. A run
    whose loss becomes NaN or infinite ends, and the others continue.

    Args:
        configs: The runs. They differ only in the weights of their policies, of which an `Ensemble` must be
            possible (several `MLP` or `WaveCNN` of one size). Policies with inputs may be any modules; their
            runs take their epochs one after the other, which saves no time.
        outs: A run folder for each of them. None: nothing is written.
        overwrite: As for `train`, for every run.
        resume: As for `train`, for every run. Runs with fewer epochs than the others catch up first.
        progress: Show a progress bar for each, where the package rich is installed.

    Returns:
        What `train` returns, for each run; `diverged` says which of them ended early.

    Raises:
        FileExistsError: One of `outs` exists.
        OSError: One of `outs` cannot be written; found before training.
        FloatingPointError: A loss before training is NaN or infinite.
        TypeError: A policy cannot be trained together with others.
        ValueError: The runs differ in something else, or a run to be resumed has other settings.
    """
    with (
        TrainingTogether(configs, outs, overwrite=overwrite, resume=resume) as together,
        Bars(progress) as bars,
    ):
        numbers = {
            run: bars.add(f"{run.label} {k}", run.config.epochs, run.test_loss, run.epoch + 1)
            for k, run in enumerate(together.runs)
        }
        while together.active:
            for run in together.run_epoch():
                bars.update(numbers[run], run.epoch + 1, run.test_loss)
    return [run.result() for run in together.runs]


class TrainingTogether:
    """Several training runs, epoch by epoch. Used as a context manager, like `TrainingRun`.

    Its constructor makes all checks that can fail, before it changes anything in a folder.

    Args:
        configs: As for `train_together`.
        outs: As for `train_together`.
        overwrite: As for `train_together`.
        resume: As for `train_together`.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        outs: Sequence[str | os.PathLike[str]] | None = None,
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        configs = _check_alike(configs)
        folders = [None] * len(configs) if outs is None else _check_outs(outs, len(configs))
        self.runs: list[TrainingRun] = []
        self._group: _Group | None = None
        self._stack = contextlib.ExitStack()
        try:
            for config, out in zip(configs, folders, strict=True):
                self.runs.append(TrainingRun(config, out, overwrite=overwrite, resume=resume))
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> TrainingTogether:
        with contextlib.ExitStack() as stack:
            try:
                for run in self.runs:
                    stack.enter_context(run)
            except BaseException:
                self._discard()
                raise
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _discard(self) -> None:
        for run in reversed(self.runs):
            run.discard()

    @property
    def active(self) -> list[TrainingRun]:
        """The runs that have epochs to go and have not diverged."""
        return [run for run in self.runs if not run.done and run.diverged is None]

    def run_epoch(self) -> list[TrainingRun]:
        """Runs an epoch of those active runs that have made the fewest epochs, and returns them.

        So runs that stopped at different epochs catch up and train together. A run that diverges is not
        active any more. A run that ends is written and closed.
        """
        behind = min(run.epoch for run in self.active)
        runs = [run for run in self.active if run.epoch == behind]
        if self._group is None or self._group.runs != runs:
            self._group = _Group(runs) if len(runs) > 1 and not _given_inputs(runs) else None
        if self._group is None:
            for run in runs:
                with _may_diverge(run):
                    run.run_epoch()
        elif not self._group.run_epoch():
            self._group = None
        for run in runs:
            if run.done or run.diverged is not None:
                run.close()
        return runs


class _Group:
    """Runs at the same epoch, stacked. Between two epochs each of them is as if it had been alone."""

    def __init__(self, runs: list[TrainingRun]) -> None:
        self.runs = runs
        self._ensemble = Ensemble([run.config.policy for run in runs])
        self._updates = Updates(runs[0].config, self._ensemble)
        states = [run.updates.optimizer.state_dict() for run in runs]
        self._updates.load_optimizer(_stacked(states))

    def run_epoch(self) -> bool:
        """Runs an epoch, in which members may diverge; returns whether the group can go on as it is."""
        record = self._updates.new_record()
        try:
            self._updates.run(record, self.runs[0].epoch + 1)
        except Exception as error:
            # As for a run alone: what was raised may be the consequence of a loss that was not finite. The
            # others then repeat their epoch without it.
            for run, own in zip(self.runs, record, strict=True):
                with _may_diverge(run):
                    run.check_finite(own, error)
            if all(run.diverged is None for run in self.runs):
                raise
            for run in self.runs:
                run.return_to_snapshot()
            return False
        self._hand_back()
        # On a CPU 256 states of one run fill a core, and the trajectories of several leave its cache: to
        # evaluate four together takes 1.0 to 1.4 times as long (cart-pole, guidance), up to 1.7 (quantum).
        together = self.runs[0].logs_next and self._updates.device.type != "cpu"
        losses = self._updates.evaluate() if together else [None] * len(self.runs)
        for run, own, pair in zip(self.runs, record, losses, strict=True):
            with _may_diverge(run):
                run.end_epoch(own.clone(), pair)  # a checkpoint may hold it: without the others
        return all(run.diverged is None for run in self.runs)

    @torch.no_grad()
    def _hand_back(self) -> None:
        """Gives each run its weights and the state of its optimizer."""
        stacked = list(self._ensemble.parameters())
        state = self._updates.optimizer.state_dict()
        for k, run in enumerate(self.runs):
            for parameter, values in zip(run.config.policy.parameters(), stacked, strict=True):
                parameter.copy_(values[k])
            run.updates.load_optimizer(_member(state, k))


def _given_inputs(runs: Sequence[TrainingRun]) -> bool:
    """Whether policies take inputs beside the states. The sweeps do not give these to stacked policies, so
    each then takes its epoch alone.
    """
    return any(run.config.draws is not None for run in runs)


@contextlib.contextmanager
def _may_diverge(run: TrainingRun) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        run.diverged = error


def _stacked(states: list[State]) -> State:
    """Returns the optimizer state of stacked parameters. Values that are not tensors like the parameter, such
    as the count of steps, are the same for all members, because they have made the same number of updates.
    """
    first = states[0]
    state = {
        i: {
            name: torch.stack([s["state"][i][name] for s in states])
            if _by_component(value)
            else copy.deepcopy(value)
            for name, value in values.items()
        }
        for i, values in first["state"].items()
    }
    return {"state": state, "param_groups": first["param_groups"]}


def _member(stacked: State, k: int) -> State:
    """Returns the optimizer state of one member, which shares nothing with the others."""
    state = {
        i: {
            name: value[k].clone() if _by_component(value) else copy.deepcopy(value)
            for name, value in values.items()
        }
        for i, values in stacked["state"].items()
    }
    return {"state": state, "param_groups": stacked["param_groups"]}


def _by_component(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _check_alike(configs: Any) -> list[TrainConfig]:
    call = "train_together"
    if isinstance(configs, TrainConfig) or not isinstance(configs, Sequence):
        raise TypeError(f"{call}: configs is a {type(configs).__name__}, expected a list of ws.TrainConfig")
    if not configs:
        raise ValueError(f"{call}: configs is empty, expected at least one ws.TrainConfig")
    for k, config in enumerate(configs):
        if not isinstance(config, TrainConfig):
            raise TypeError(f"{call}: config {k} is a {type(config).__name__}, expected a ws.TrainConfig")
        first = configs[0]
        ours = {"system": config.system} | config.settings()
        for name, expected in ({"system": first.system} | first.settings()).items():
            if ours[name] != expected:
                raise ValueError(
                    f"{call}: config {k} has {name}={ours[name]!r}, expected {expected!r} like config 0: "
                    "only the weights may differ; train it on its own"
                )
        if any(config.policy is other.policy for other in configs[:k]):
            raise ValueError(
                f"{call}: the policy of config {k} is that of another config, expected one of its own; give "
                "copy.deepcopy(policy)"
            )
    if len(configs) > 1:
        if first.on_divergence == "skip":
            raise ValueError(
                f"{call}: on_divergence='skip' with {len(configs)} configs, expected 'stop': all take the "
                "same steps; train each on its own"
            )
        processes = Processes()
        if processes.several:
            raise ValueError(
                f"{call}: {len(configs)} configs in a group of {processes.count} processes, expected one; "
                "train each on its own, or outside of the group"
            )
        if all(config.draws is None for config in configs):
            Ensemble([config.policy for config in configs])
    return list(configs)


def _check_outs(outs: Any, count: int) -> list[str | os.PathLike[str]]:
    if isinstance(outs, (str, os.PathLike)) or not isinstance(outs, Sequence):
        raise TypeError(f"train_together: outs is a {type(outs).__name__}, expected a list of folders")
    if len(outs) != count or len({os.path.realpath(out) for out in outs}) != count:
        raise ValueError(
            f"train_together: outs holds {list(map(str, outs))}, expected {count} different folders, one for "
            "each config"
        )
    return list(outs)

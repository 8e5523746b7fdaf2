"""Trains a policy through a simulator: the loop, and what it writes."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..kernels.flow import Flow
from ..progress import Bars
from . import run_config
from .config import TrainConfig
from .divergence import first_lost, time_step
from .interruption import uninterrupted
from .meeting import meet
from .processes import Processes
from .resuming import Stopped, check_fits, go_on, read_stopped
from .runs import Log, Row, RunFolder, as_log
from .updates import Updates, means, summary


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What `ws.train` and `ws.train_together` return.

    Attributes:
        policy: The trained policy, the same module that was given.
        log: One array per column: epoch (-1 is before training), loss_batch (mean over the updates, before
            each), loss_train, loss_test (after the epoch), grad_norm (root of the mean squared norm, before
            clipping), cosine and agreement of the two gradients that C compares (NaN for other flows),
            seconds since training began, nonfinite (how many components of the gradients were NaN or
            infinite, in all updates since the row before), zeros (share of zeros in the combined gradient,
            mean over the updates; NaN for other flows).
        path: The run folder; None where none was asked for, and in all but the first of several processes.
        diverged: Of `train_together`: the error that ended this run before its last epoch, because its loss
            became NaN or infinite. `train` raises it instead.
    """

    policy: torch.nn.Module
    log: Log
    path: Path | None
    diverged: FloatingPointError | None = None


def train(
    config: TrainConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Trains `config.policy` in place, from its present weights.

    In a process group of `torch.distributed` every process takes its share of the worlds of each batch, and
    all end with the same weights: those of one process up to rounding. All start from the weights of the
    first process, and only the first one logs and saves. A loss of your own must be a mean over worlds.

    With a folder, config.json, log.csv, checkpoints and a picture of the curves are written there, and they
    stay usable when the run is interrupted (KeyboardInterrupt is raised again afterwards).

    Args:
        config: What is trained, on what and how.
        out: The run folder, which must not exist yet (an empty folder will do). None: nothing is written.
        overwrite: Replace the run at `out`. It is not changed before the new one has begun.
        resume: Continue the run at `out` from its last checkpoint, instead of the policy's present weights;
            begin a new run if there is none. More `epochs` than the run had continue it to these.
        progress: Show a progress bar, where the package rich is installed.

    Returns:
        The policy, the log and the folder.

    Raises:
        FileExistsError: `out` exists.
        BlockingIOError: Another process writes the run at `out`; the message names it.
        OSError: `out` cannot be written; found before training.
        FloatingPointError: A loss, a gradient or a weight became NaN or infinite, or all of one gradient
            field did. The message says where; the policy has the weights of the last finished epoch again,
            and the folder holds the run up to there.
        ValueError: The run to be resumed has other settings, its files do not fit together, or the processes
            of a group do not do the same.
    """
    with (
        TrainingRun(config, out, overwrite=overwrite, resume=resume) as run,
        Bars(progress and run.processes.first) as bars,
    ):
        bar = bars.add(run.label, config.epochs, run.test_loss, run.epoch + 1)
        while not run.done:
            run.run_epoch()
            bars.update(bar, run.epoch + 1, run.test_loss)
    return run.result()


class TrainingRun:
    """A training run, epoch by epoch. Used as a context manager; leaving it writes what is to be kept.

    Its constructor makes all checks that can fail. The folder is changed only on entering.

    Args:
        config: As for `train`.
        out: As for `train`.
        overwrite: As for `train`.
        resume: As for `train`.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        if not isinstance(config, TrainConfig):
            raise TypeError(f"train: config is a {type(config).__name__}, expected a ws.TrainConfig")
        self.config = config
        self.label = _flow_name(config)
        self.epoch = -1
        self.diverged: FloatingPointError | None = None
        self._board: Any = None
        self._rows: list[Row] = []
        self._records: list[torch.Tensor] = []
        self._folder: RunFolder | None = None
        self._closed = False
        if config.tensorboard and out is None:
            raise ValueError("train: tensorboard=True writes into the run folder; give out='runs/name'")
        self._writer = _summary_writer() if config.tensorboard else None
        self._stopped: Stopped | None = None
        self._opened: RunFolder | None = None
        self.processes = Processes()
        if self.processes.several:
            meet(config, self.processes)
        try:
            self.processes.in_first(lambda: self._open(out, overwrite, resume), config.device)
            self.updates = Updates(config, config.policy)
            self._stopped = self.processes.from_first(self._stopped, config.device)
            if self._stopped is not None:
                check_fits(config, self._stopped, out or "")
            self._losses = self._finite(self.updates.evaluate(), "before training")
            self.updates.rehearse()
        except BaseException as error:
            self.discard()
            if isinstance(error, KeyboardInterrupt):
                print("training interrupted before it began; nothing was written", file=sys.stderr)
            raise

    def _open(self, out: str | os.PathLike[str] | None, overwrite: bool, resume: bool) -> None:
        """Locks the folder, so that no other process writes what is then read."""
        if out is not None:
            self._opened = RunFolder(out, overwrite or resume)
            self._stopped = read_stopped(out, self.config) if resume else None

    def discard(self) -> None:
        """Undoes the making of the folder, because the run does not begin."""
        if self._opened is not None:
            self._opened.discard()

    def begin(self) -> None:
        """Begins the run in its folder, or continues the one there."""
        stopped = self._stopped
        try:
            if stopped is not None:
                self._restore(stopped)
            else:
                self._snapshot = self._best = self._take_snapshot(-1)
            self.processes.in_first(self._begin_folder, self.config.device)
        except BaseException:
            self.discard()
            raise
        if stopped is not None:
            self._started = time.perf_counter() - self._rows[-1]["seconds"]
            return
        self._started = time.perf_counter()
        if self._folder is not None:
            for name in ("first", "best", "last"):
                self._folder.save_checkpoint(name, self._snapshot)
        self._log_row(self._losses, {})

    def _begin_folder(self) -> None:
        stopped, folder = self._stopped, self._opened
        if folder is None:
            return
        if stopped is None:
            folder.begin(run_config.to_json(self.config))
        else:
            folder.resume(stopped.rows, stopped.epochs, stopped.settings)
        self._folder = folder
        if self._writer is not None:
            self._board = self._writer(str(folder.path))

    def __enter__(self) -> TrainingRun:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt) and not self._closed
        self.close()
        if interrupted and self.processes.first:
            where = f"; the run so far is in {self.path}" if self.path else ""
            finished = self._snapshot["epoch"]
            after = f"after epoch {finished}" if finished >= 0 else "in the first epoch"
            print(f"training interrupted {after}{where}", file=sys.stderr)
            if self.path:
                print(f"to go on: {go_on(self.config, self.path)}", file=sys.stderr)

    def close(self) -> None:
        """Writes what is to be kept, once."""
        if self._closed:
            return
        self._closed = True
        try:
            self._write_checkpoints()
            if self._board is not None:
                self._board.close()
            if self._folder is not None:
                self._draw_curves(self._folder.path)
        finally:
            if self._folder is not None:
                self._folder.close()

    @property
    def done(self) -> bool:
        """Whether all epochs have run."""
        return self.epoch + 1 >= self.config.epochs

    @property
    def path(self) -> Path | None:
        """The run folder."""
        return None if self._folder is None else self._folder.path

    @property
    def test_loss(self) -> float:
        """The test loss of the last row of the log."""
        return self._rows[-1]["loss_test"] if self._rows else math.nan

    def result(self) -> TrainResult:
        """Returns what `train` returns."""
        return TrainResult(self.config.policy, as_log(self._rows), self.path, self.diverged)

    def run_epoch(self) -> None:
        """Runs one pass over the training set, then logs and checkpoints where they are due."""
        record = self.updates.new_record()
        try:
            self.updates.run(record, self.epoch + 1)
        except Exception as error:
            # What was raised may be the consequence of a loss that was not finite: that is then reported.
            self.check_finite(record, error)
            raise
        self.end_epoch(record)

    def end_epoch(self, record: torch.Tensor, losses: list[float] | None = None) -> None:
        """Takes in an epoch whose updates have been made, then logs and checkpoints where they are due.

        Args:
            record: (RECORDED, updates), what is `divergence.RECORDED` of each.
            losses: Train and test loss after it, where they are known already.
        """
        self.check_finite(record)
        epoch = self.epoch + 1
        self._check_weights(f"after epoch {epoch}")
        found = None
        if self.logs_next:
            found = self._finite(losses or self.updates.evaluate(), f"after epoch {epoch}")
        with uninterrupted():
            self.epoch = epoch
            self._records.append(summary(record, self.updates.size))
            logged = list(self._records)
            if found is not None:
                self._records.clear()
            self._snapshot = self._take_snapshot(epoch)
            if found is not None:
                self._log_row(found, means(logged))
        if (epoch + 1) % self.config.checkpoint_every == 0:
            self._write_checkpoints()

    @property
    def logs_next(self) -> bool:
        """Whether the next epoch ends with a row of the log."""
        count = self.epoch + 2
        return count % self.config.log_every == 0 or count == self.config.epochs

    def return_to_snapshot(self) -> None:
        """Goes back to the end of the last finished epoch."""
        self.updates.load(self._snapshot)

    def _restore(self, stopped: Stopped) -> None:
        """Goes back to where a stopped run was."""
        self.epoch = stopped.last["epoch"]
        self.updates.load(stopped.last)
        self._records = [record.to(self.updates.device) for record in stopped.last.get("records", [])]
        self._rows = stopped.rows
        self._snapshot, self._best = self._take_snapshot(self.epoch), stopped.best

    def check_finite(self, record: torch.Tensor, error: Exception | None = None) -> None:
        """Raises FloatingPointError at the first update of the next epoch whose loss or gradient is not
        finite, or one of whose gradient fields has no finite component. If such updates are skipped, it
        raises only if all were skipped.
        """
        found = first_lost(record.T.tolist(), self.updates.size, self.config, error is not None)
        if found is None:
            return
        update, what = found
        when = f" in epoch {self.epoch + 1}, update {update} of {record.shape[1]},"
        where = "" if error is not None and self.processes.several else self._place(update)
        raise self._divergence(what.format(when=when), where) from error

    def _place(self, update: int) -> str:
        """Says where the rollout of an update of this epoch is first not finite. For this the epoch is
        repeated up to there.
        """
        try:
            self.return_to_snapshot()
            self.updates.run(self.updates.new_record(), self.epoch + 1, update)
            place = self.updates.locate(update, self.epoch + 1)
        except Exception:  # a policy or a loss of the user's own that raises, or does not repeat itself
            return ""
        if place is None:
            return "; all states and controls of it are finite" + time_step(self.config.system)
        return f"; {place.text(self.config.horizon, self.config.system)}"

    def _check_weights(self, when: str) -> None:
        """Raises FloatingPointError if weights or moments of the optimizer are not finite."""
        name = self.updates.lost()
        if name is not None:
            raise self._divergence(f"{name} {when} holds NaN or infinity", "")

    def _finite(self, losses: list[float], when: str) -> tuple[float, float]:
        """Returns train and test loss, both finite."""
        for name, loss in zip(("train", "test"), losses, strict=True):
            if not math.isfinite(loss):
                raise self._divergence(f"{name} loss {when} is {loss}", time_step(self.config.system))
        return losses[0], losses[1]

    def _divergence(self, what: str, where: str) -> FloatingPointError:
        """Returns the error that ends the run, and puts the last finite weights back."""
        kept = ""
        if hasattr(self, "_snapshot"):
            self.return_to_snapshot()
            epoch = self._snapshot["epoch"]
            after = f"from after epoch {epoch}" if epoch >= 0 else "from before training"
            kept = f"; the policy has its weights {after} again"
        folder = f"; the run up to there is in {self.path}" if self.path else ""
        return FloatingPointError(
            f"train: {what}, expected a finite number{where}; try a smaller lr (now {self.config.lr:g}), "
            f"clip='norm', a shorter horizon, or on_divergence='skip'{kept}{folder}"
        )

    def _log_row(self, losses: tuple[float, float], of_updates: dict[str, float]) -> None:
        row: Row = {
            "epoch": self.epoch,
            "loss_batch": math.nan,
            "loss_train": losses[0],
            "loss_test": losses[1],
            "grad_norm": math.nan,
            "cosine": math.nan,
            "agreement": math.nan,
            "seconds": time.perf_counter() - self._started if of_updates else 0.0,
            "nonfinite": math.nan,
            "zeros": math.nan,
        } | of_updates
        if row["loss_test"] <= min((r["loss_test"] for r in self._rows), default=math.inf):
            self._best = self._snapshot
        self._rows.append(row)
        if self._folder is not None:
            self._folder.append(row)
        if self._board is not None:
            for name, value in row.items():
                if name != "epoch" and not math.isnan(value):
                    self._board.add_scalar(name, value, self.epoch)

    def _take_snapshot(self, epoch: int) -> dict[str, Any]:
        """Returns the state after a finished epoch, which an interruption in the next one must not touch."""
        snapshot = {"epoch": epoch, **self.updates.state()}
        if self._records:  # of the epochs since the last row of the log, which the next row is a mean of
            snapshot["records"] = list(self._records)
        return snapshot

    def _write_checkpoints(self) -> None:
        if self._folder is not None:
            # The last one last: what is resumed from it repeats the epochs behind it, a best one among them.
            self._folder.save_checkpoint("best", self._best)
            self._folder.save_checkpoint("last", self._snapshot)

    def _draw_curves(self, path: Path) -> None:
        try:
            from ..pictures.plots import plot_curves

            plot_curves({self.label: as_log(self._rows)}, path / "curves.png")
        except (ImportError, OSError) as error:
            warnings.warn(f"no picture of the curves was drawn: {error}", stacklevel=2)


def _flow_name(config: TrainConfig) -> str:
    return config.flow.name.lower() if isinstance(config.flow, Flow) else "schedule"


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'tensorboard=True needs TensorBoard; pip install "warp-sims[tensorboard]"'
        ) from error
    return SummaryWriter

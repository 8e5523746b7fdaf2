"""Training a policy through a simulator: the loop, and what is written while it runs."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from .flows import Flow
from .progress import Bars
from .runs import Log, Row, RunFolder, Stopped, as_log, read_stopped
from .train_config import TrainConfig
from .updates import Updates


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What `ws.train` and `ws.train_together` return.

    Attributes:
        policy: The trained policy, the very module that was given.
        log: One array per column: epoch (-1 is before training), loss_batch (mean over the updates, before
            each), loss_train, loss_test (after the epoch), grad_norm (root of the mean squared norm, before
            clipping), cosine and agreement of the two gradients that C compares (NaN for other flows),
            seconds since training began.
        path: The run folder; None where none was asked for.
        diverged: Of `train_together`: what ended this run before its last epoch, where its loss became NaN or
            infinite. `train` raises it instead.
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

    With a folder, config.json, log.csv, checkpoints and a picture of the curves are written there, and they
    stay usable when the run is interrupted (KeyboardInterrupt is raised again afterwards).

    Args:
        config: What is trained, on what and how.
        out: The run folder, which must not exist yet (an empty folder will do). None: nothing is written.
        overwrite: Replace the run that stands at `out`. It is left alone until the new one has begun.
        resume: Go on with the run that stands at `out`, from its last checkpoint instead of the policy's
            present weights; begin it where there is none, or no checkpoint yet.
        progress: Show a progress bar, where the package rich is installed.

    Returns:
        The policy, the log and the folder.

    Raises:
        FileExistsError: `out` exists.
        OSError: `out` cannot be written; found before training.
        FloatingPointError: The loss became NaN or infinite. The folder holds the run up to there.
        ValueError: The run to be resumed has other settings.
    """
    with TrainingRun(config, out, overwrite=overwrite, resume=resume) as run, Bars(progress) as bars:
        bar = bars.add(run.label, config.epochs, run.test_loss, run.epoch + 1)
        while not run.done:
            run.run_epoch()
            bars.update(bar, run.epoch + 1, run.test_loss)
    return run.result()


class TrainingRun:
    """A training run, epoch by epoch. Used as a context manager; leaving it writes what is to be kept.

    All that can be refused is refused while it is made, before anything that stands in the folder is touched;
    that is done on entering.

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
        self._stopped = read_stopped(out, config) if resume and out is not None else None
        self._opened = None if out is None else RunFolder(out, overwrite or resume)
        try:
            self.updates = Updates(config, config.policy)
            self._losses = self._finite(self.updates.evaluate(), "before training")
            self.updates.rehearse()
        except BaseException as error:
            self.discard()
            if isinstance(error, KeyboardInterrupt):
                print("training interrupted before it began; nothing was written", file=sys.stderr)
            raise

    def discard(self) -> None:
        """Takes back the making of the folder: the run does not begin."""
        if self._opened is not None:
            self._opened.discard()

    def begin(self) -> None:
        """Begins the run in its folder, or goes on with the one that stands there."""
        folder, stopped = self._opened, self._stopped
        try:
            if folder is not None and stopped is None:
                folder.begin(self.config)
            elif folder is not None and stopped is not None:
                self._restore(stopped)
                folder.resume(stopped.rows)
        except BaseException:
            self.discard()
            raise
        self._folder = folder
        if self._writer is not None and folder is not None:
            self._board = self._writer(str(folder.path))
        if stopped is not None:
            self._started = time.perf_counter() - self._rows[-1]["seconds"]
            return
        self._started = time.perf_counter()
        self._snapshot = self._best = self._take_snapshot(-1)
        if folder is not None:
            folder.save_checkpoint("first", self._snapshot)
        self._log_row(self._losses, {})

    def __enter__(self) -> TrainingRun:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt) and not self._closed
        self.close()
        if interrupted:
            where = f"; the run so far is in {self.path}" if self.path else ""
            finished = self._snapshot["epoch"]
            after = f"after epoch {finished}" if finished >= 0 else "in the first epoch"
            print(f"training interrupted {after}{where}", file=sys.stderr)

    def close(self) -> None:
        """Writes what is to be kept, once."""
        if self._closed:
            return
        self._write_checkpoints()
        if self._folder is not None:
            self._folder.close()
            if self._board is not None:
                self._board.close()
            self._draw_curves(self._folder.path)
        self._closed = True

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
            self.updates.run(record)
        except Exception as error:
            # What was raised may be the consequence of a loss that was not finite: that is then reported.
            self.check_finite(record, error)
            raise
        self.end_epoch(record)

    def end_epoch(self, record: torch.Tensor, losses: list[float] | None = None) -> None:
        """Takes in an epoch whose updates have been made, then logs and checkpoints where they are due.

        Args:
            record: (4, updates), what is `updates.RECORDED` of each.
            losses: Train and test loss after it, where they are known already.
        """
        self.check_finite(record)
        epoch = self.epoch + 1
        found = None
        if self.logs_next:
            found = self._finite(losses or self.updates.evaluate(), f"after epoch {epoch}")
        with _uninterrupted():
            self.epoch = epoch
            self._records.append(record)
            logged = torch.cat(self._records, dim=1)
            if found is not None:
                self._records.clear()
            self._snapshot = self._take_snapshot(epoch)
            if found is not None:
                loss, norm, cosine, agreement = logged
                means = {"loss_batch": loss.mean(), "grad_norm": norm.square().mean().sqrt()}
                means |= {"cosine": cosine.nanmean(), "agreement": agreement.nanmean()}
                self._log_row(found, {name: float(value) for name, value in means.items()})
        if (epoch + 1) % self.config.checkpoint_every == 0:
            self._write_checkpoints()

    @property
    def logs_next(self) -> bool:
        """Whether the next epoch ends with a row of the log."""
        count = self.epoch + 2
        return count % self.config.log_every == 0 or count == self.config.epochs

    def return_to_snapshot(self) -> None:
        """Goes back to the end of the last finished epoch."""
        self.config.policy.load_state_dict(self._snapshot["policy"])
        self.updates.load_optimizer(copy.deepcopy(self._snapshot["optimizer"]))

    def _restore(self, stopped: Stopped) -> None:
        """Goes back to where a stopped run was."""
        self.epoch = stopped.last["epoch"]
        self.config.policy.load_state_dict(stopped.last["policy"])
        self.updates.load_optimizer(stopped.last["optimizer"])
        self._records = [record.to(self.updates.device) for record in stopped.last.get("records", [])]
        self._rows = stopped.rows
        self._snapshot, self._best = self._take_snapshot(self.epoch), stopped.best

    def check_finite(self, record: torch.Tensor, error: Exception | None = None) -> None:
        """Raises at the first update of the next epoch whose loss is not finite, or whose gradient holds a
        NaN.
        """
        for i, (loss, norm) in enumerate(record[:2].T.tolist()):
            if error is not None and math.isnan(loss) and math.isnan(norm):
                return  # not reached
            if not math.isfinite(loss) or math.isnan(norm):
                what = "gradient" if math.isfinite(loss) else "loss"
                value = norm if math.isfinite(loss) else loss
                text = self._not_finite(
                    f"{what} in epoch {self.epoch + 1}, update {i} of {record.shape[1]}, is {value}"
                )
                raise FloatingPointError(text) from error

    def _finite(self, losses: list[float], when: str) -> tuple[float, float]:
        """Returns train and test loss, both finite."""
        for name, loss in zip(("train", "test"), losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(self._not_finite(f"{name} loss {when} is {loss}"))
        return losses[0], losses[1]

    def _not_finite(self, what: str) -> str:
        where = f"; the run up to there is in {self.path}" if self.path else ""
        return (
            f"train: {what}, expected a finite number; try a smaller lr (now {self.config.lr:g}), "
            f"clip='norm', or a shorter horizon{where}"
        )

    def _log_row(self, losses: tuple[float, float], means: dict[str, float]) -> None:
        row: Row = {
            "epoch": self.epoch,
            "loss_batch": math.nan,
            "loss_train": losses[0],
            "loss_test": losses[1],
            "grad_norm": math.nan,
            "cosine": math.nan,
            "agreement": math.nan,
            "seconds": time.perf_counter() - self._started if means else 0.0,
        } | means
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
        snapshot = {
            "epoch": epoch,
            "policy": {
                name: value.detach().clone() for name, value in self.config.policy.state_dict().items()
            },
            "optimizer": copy.deepcopy(self.updates.optimizer.state_dict()),
        }
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
            from .plots import plot_curves

            plot_curves({self.label: as_log(self._rows)}, path / "curves.png")
        except (ImportError, OSError) as error:
            warnings.warn(f"no picture of the curves was drawn: {error}", stacklevel=2)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait for the end of a short block, so that the log and the last checkpoint agree."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[0])


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

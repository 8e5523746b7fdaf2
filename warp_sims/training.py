"""Training a policy through a simulator: the loop, and what is written while it runs."""

from __future__ import annotations

import copy
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

from .flows import Flow
from .gradients import gradient_pair
from .graphed import GraphedUpdate
from .optimizers import ON_HOST, make_optimizer
from .progress import Bars
from .rollouts import Rollout, rollout
from .runs import Log, Row, RunFolder, Stopped, as_log, read_stopped
from .train_config import TrainConfig

RECORDED = ("loss", "norm", "cosine", "agreement")  # of every update


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What `ws.train` returns.

    Attributes:
        policy: The trained policy, the very module that was given.
        log: One array per column: epoch (-1 is before training), loss_batch (mean over the updates, before
            each), loss_train, loss_test (after the epoch), grad_norm (root of the mean squared norm, before
            clipping), cosine and agreement of the two gradients that C compares (NaN for other flows),
            seconds since training began.
        path: The run folder; None where none was asked for.
    """

    policy: torch.nn.Module
    log: Log
    path: Path | None


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

    All that can be refused is refused while it is made, before anything that stands in the folder is touched.

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
        self._board: Any = None
        self._rows: list[Row] = []
        self._folder: RunFolder | None = None
        if config.tensorboard and out is None:
            raise ValueError("train: tensorboard=True writes into the run folder; give out='runs/name'")
        writer = _summary_writer() if config.tensorboard else None
        stopped = read_stopped(out, config) if resume and out is not None else None
        folder = None if out is None else RunFolder(out, overwrite or resume)
        try:
            losses = self._prepare()
            if folder is not None and stopped is None:
                folder.begin(config)
            elif folder is not None and stopped is not None:
                self._restore(stopped)
                folder.resume(stopped.rows)
        except BaseException as error:
            if folder is not None:
                folder.discard()
            if isinstance(error, KeyboardInterrupt):
                print("training interrupted before it began; nothing was written", file=sys.stderr)
            raise
        self._folder = folder
        if writer is not None and folder is not None:
            self._board = writer(str(folder.path))
        if stopped is not None:
            self._started = time.perf_counter() - self._rows[-1]["seconds"]
            return
        self._started = time.perf_counter()
        self._snapshot = self._best = self._take_snapshot(-1)
        if folder is not None:
            folder.save_checkpoint("first", self._snapshot)
        self._log_row(losses, {})

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write_checkpoints()
        if self._folder is not None:
            self._folder.close()
            if self._board is not None:
                self._board.close()
            self._draw_curves(self._folder.path)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            where = f"; the run so far is in {self.path}" if self.path else ""
            finished = self._snapshot["epoch"]
            after = f"after epoch {finished}" if finished >= 0 else "in the first epoch"
            print(f"training interrupted {after}{where}", file=sys.stderr)

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
        return TrainResult(self.config.policy, as_log(self._rows), self.path)

    def run_epoch(self) -> None:
        """Runs one pass over the training set, then logs and checkpoints where they are due."""
        epoch = self.epoch + 1
        updates = self._train_states.split(self.config.batch)
        # Filled on the device, read once an epoch: to read a number per update is to wait for the device.
        record = torch.full((len(RECORDED), len(updates)), math.nan, dtype=torch.float64, device=self._device)
        try:
            for i, x0 in enumerate(updates):
                self._step(x0, record[:, i])
        except Exception as error:
            # What was raised may be the consequence of a loss that was not finite: that is then reported.
            self._check_finite(epoch, record, error)
            raise
        self._check_finite(epoch, record)
        logs = (epoch + 1) % self.config.log_every == 0 or epoch + 1 == self.config.epochs
        losses = self._evaluate(f"after epoch {epoch}") if logs else None
        self.epoch = epoch
        self._records.append(record)
        logged = torch.cat(self._records, dim=1)
        if losses is not None:
            self._records.clear()
        self._snapshot = self._take_snapshot(epoch)
        if losses is not None:
            loss, norm, cosine, agreement = logged
            means = {"loss_batch": loss.mean(), "grad_norm": norm.square().mean().sqrt()}
            means |= {"cosine": cosine.nanmean(), "agreement": agreement.nanmean()}
            self._log_row(losses, {name: float(value) for name, value in means.items()})
        if (epoch + 1) % self.config.checkpoint_every == 0:
            self._write_checkpoints()

    def _prepare(self) -> tuple[float, float]:
        """Sets up all that training needs, and returns train and test loss before it."""
        config = self.config
        self._device = torch.device(str(config.device))
        self._options: dict[str, Any] = {
            "horizon": config.horizon,
            "loss": config.loss,
            "control_cost": config.control_cost,
            "window": config.window,
            "decay": config.decay,
        }
        self._train_states, self._test_states = (
            config.system.initial_states(config.samples, seed=config.seed, split=split).to(
                self._device, config.torch_dtype
            )
            for split in ("train", "test")
        )
        self._records: list[torch.Tensor] = []
        self._parameters = [p for p in config.policy.parameters() if p.requires_grad]
        # On a GPU always, so that a run takes the same steps with and without a graph.
        capturable = self._device.type == "cuda" and config.optimizer not in ON_HOST
        self._optimizer = make_optimizer(
            config.optimizer,
            self._parameters,
            lr=config.lr,
            momentum=config.momentum,
            capturable=capturable,
        )
        self._step = GraphedUpdate(self._update) if config.graph else self._update
        # Loss and gradient once, for nothing: what they refuse is refused before a folder is touched, and
        # compiling is not counted as time of the first epoch.
        losses = self._evaluate("before training")
        self._gradient(self._train_states[: config.batch])
        self._optimizer.zero_grad(set_to_none=True)
        return losses

    def _restore(self, stopped: Stopped) -> None:
        """Goes back to where a stopped run was."""
        self.epoch = stopped.last["epoch"]
        self.config.policy.load_state_dict(stopped.last["policy"])
        self._optimizer.load_state_dict(stopped.last["optimizer"])
        self._records = [record.to(self._device) for record in stopped.last.get("records", [])]
        self._rows = stopped.rows
        self._snapshot, self._best = self._take_snapshot(self.epoch), stopped.best

    def _gradient(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Fills the gradients of the parameters; returns loss, cosine and agreement."""
        config = self.config
        if config.flow is Flow.COMBINED:
            pair = gradient_pair(config.system, config.policy, x0, **self._options)
            pair.assign(config.policy)
            return pair.loss.detach(), pair.cosine, pair.agreement
        self._optimizer.zero_grad(set_to_none=True)
        loss = _loss(rollout(config.system, config.policy, x0, flow=config.flow, **self._options))
        loss.backward()
        return loss.detach(), None, None

    def _update(self, x0: torch.Tensor, record: torch.Tensor) -> None:
        config = self.config
        loss, cosine, agreement = self._gradient(x0)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        record[0], record[1] = loss, norm
        if cosine is not None and agreement is not None:
            record[2], record[3] = cosine, agreement
        if config.clip == "norm":
            torch.nn.utils.clip_grads_with_norm_(self._parameters, config.clip_at, norm)
        elif config.clip == "value":
            torch.nn.utils.clip_grad_value_(self._parameters, config.clip_at)
        self._optimizer.step()

    @torch.no_grad()
    def _evaluate(self, when: str) -> tuple[float, float]:
        """Returns train and test loss, both finite."""
        # The loss is the same for every flow; a flow matters backwards only.
        options = {name: self._options[name] for name in ("horizon", "loss", "control_cost")}
        train_loss, test_loss = torch.stack(
            [
                _loss(rollout(self.config.system, self.config.policy, x0, flow=Flow.REGULAR, **options))
                for x0 in (self._train_states, self._test_states)
            ]
        ).tolist()
        for name, loss in (("train", train_loss), ("test", test_loss)):
            if not math.isfinite(loss):
                raise FloatingPointError(self._not_finite(f"{name} loss {when} is {loss}"))
        return train_loss, test_loss

    def _check_finite(self, epoch: int, record: torch.Tensor, error: Exception | None = None) -> None:
        """Raises at the first update whose loss is not finite, or whose gradient holds a NaN."""
        for i, (loss, norm) in enumerate(record[:2].T.tolist()):
            if error is not None and math.isnan(loss) and math.isnan(norm):
                return  # not reached
            if not math.isfinite(loss) or math.isnan(norm):
                what = "gradient" if math.isfinite(loss) else "loss"
                value = norm if math.isfinite(loss) else loss
                text = self._not_finite(
                    f"{what} in epoch {epoch}, update {i} of {record.shape[1]}, is {value}"
                )
                raise FloatingPointError(text) from error

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
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
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


def _loss(out: Rollout) -> torch.Tensor:
    assert out.loss is not None, "TrainConfig refuses loss=None"
    return out.loss


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

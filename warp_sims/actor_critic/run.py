"""The loop of an actor-critic run, and what is written while it runs."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..progress import Bars
from ..training.interruption import uninterrupted
from ..training.resuming import Stopped
from ..training.runs import Log, Row, RunFolder, as_log
from .config import ActorCriticConfig
from .evaluation import evaluate
from .folder import COLUMNS, best_of, finite, is_evaluated, is_logged, read_stopped, to_json
from .networks import Actor, Critic
from .updates import Updates
from .worlds import as_numbers

MEANS = ("actor_loss", "critic_loss", "grad_norm", "cosine", "agreement")
"""Columns of the log that are means over the updates since the row before."""


@dataclass(frozen=True, eq=False)
class ActorCriticResult:
    """What `ws.train_actor_critic` returns.

    Attributes:
        actor: The trained actor: a policy of states, without noise unless some is given.
        critic: The trained critic, of normalised observations.
        log: One array per column: update (how many there have been), seconds since training began, steps
            (control steps of all worlds together), return_eval and length_eval (means over whole episodes
            without noise; NaN where none ran), return_train (mean over the episodes that ended since the row
            before, with noise) and how many episodes that were; means over the updates since the row before
            of actor_loss, critic_loss, grad_norm (before clipping), cosine and agreement of the gradients
            that C compares; skipped (updates whose gradient was not finite, which left the actor as it was);
            std, the mean deviation of the noise.
        path: The run folder; None where none was asked for.
        finished: Whether all updates have run; False if the time limit came first.
    """

    actor: Actor
    critic: Critic
    log: Log
    path: Path | None
    finished: bool


def train_actor_critic(
    config: ActorCriticConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    time_limit: float | None = None,
    progress: bool = True,
) -> ActorCriticResult:
    """Trains an actor and a critic over short horizons: SHAC (Xu et al., ICLR 2022) under any flow.

    Every update simulates all worlds for `horizon` steps under the noisy actor. Episodes end and begin within
    these steps, and no gradient crosses such an end. Where the steps or an episode end, the critic's value
    stands for the rewards to come.

    Args:
        config: What is trained, on what and how.
        out: The run folder, which must not exist yet. None: nothing is written.
        overwrite: Replace the run at `out`.
        resume: Continue the run at `out`, to the last bit as if it had not stopped; begin a new one if there
            is none.
        time_limit: Seconds after which the run stops, at the end of an update; `resume` continues it. None:
            no limit.
        progress: Show a progress bar, where the package rich is installed.

    Raises:
        FileExistsError: `out` exists.
        BlockingIOError: Another process writes the run at `out`.
        FloatingPointError: No gradient of `log_every` updates in a row was finite.
        ValueError: The run to be resumed has other settings, or its files do not fit together.
    """
    if not isinstance(config, ActorCriticConfig):
        raise TypeError(
            f"train_actor_critic: config is a {type(config).__name__}, expected a ws.ActorCriticConfig"
        )
    if time_limit is not None and not (isinstance(time_limit, (int, float)) and time_limit > 0):
        raise ValueError(f"train_actor_critic: time_limit={time_limit!r}, expected seconds above 0, or None")
    began = time.perf_counter()
    with _Run(config, out, overwrite, resume) as run, Bars(progress, "updates  return") as bars:
        bar = bars.add(run.label, config.updates, run.last_return, run.updates.update)
        while run.updates.update < config.updates:
            run.run_update()
            bars.update(bar, run.updates.update, run.last_return)
            if time_limit is not None and time.perf_counter() - began >= time_limit:
                break
    return run.result()


class _Run:
    """A run, update by update. Used as a context manager; leaving it writes what is to be kept."""

    def __init__(
        self, config: ActorCriticConfig, out: str | os.PathLike[str] | None, overwrite: bool, resume: bool
    ) -> None:
        self.config = config
        self.label = config.flow.name.lower()  # type: ignore[union-attr]
        self._rows: list[Row] = []
        self._records: list[dict[str, float]] = []
        self._finished: list[float] = []
        self._folder = None if out is None else RunFolder(out, overwrite or resume, COLUMNS)
        try:
            stopped = read_stopped(out, config) if resume and out is not None else None
            self.updates = Updates(config)
            self._x0 = config.system.initial_states(
                config.eval_worlds, seed=config.seed, split="test", dtype=config.torch_dtype
            ).to(config.device)
            self._begin(stopped)
        except BaseException:
            if self._folder is not None:
                self._folder.discard()
            raise

    def _begin(self, stopped: Stopped | None) -> None:
        if stopped is None:
            self._started = time.perf_counter()
            self._best = self._last = self._snapshot()
            if self._folder is not None:
                self._folder.begin(to_json(self.config))
            self._log_row()
            self._last = self._snapshot()
            if self._folder is not None:
                self._folder.save_checkpoint("first", self._last)
            return
        self.updates.load(
            {**stopped.last, "actor": stopped.last["policy"], "optimizers": stopped.last["optimizer"]}
        )
        self._records, self._finished = stopped.last["records"], stopped.last["finished"]
        self._rows, self._last, self._best = stopped.rows, stopped.last, stopped.best
        self._started = time.perf_counter() - stopped.last["seconds"]
        if self._folder is not None:
            self._folder.resume(stopped.rows, stopped.epochs, None)

    def __enter__(self) -> _Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is None:
            return
        try:
            self._write()
        finally:
            self._folder.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            print(
                f"training interrupted behind update {self._last['epoch']}; to go on: warp-sims train "
                f"--resume {self._folder.path}",
                file=sys.stderr,
            )

    @property
    def last_return(self) -> float:
        """Of the last evaluation."""
        found = [row["return_eval"] for row in self._rows if not math.isnan(row["return_eval"])]
        return found[-1] if found else math.nan

    def result(self) -> ActorCriticResult:
        """Returns what `train_actor_critic` returns."""
        path = None if self._folder is None else self._folder.path
        done = self.updates.update >= self.config.updates
        return ActorCriticResult(
            self.updates.actor, self.updates.critic, as_log(self._rows, COLUMNS), path, done
        )

    def run_update(self) -> None:
        """Makes an update, then logs and checkpoints where they are due."""
        found, finished = self.updates.run()
        record = dict(zip(found, as_numbers(found.values())))
        with uninterrupted():
            self._records.append(record)
            self._finished += finished
            if is_logged(self.updates.update, self.config):
                self._log_row()
            self._last = self._snapshot()
            if self._rows[-1]["update"] == self.updates.update and self._is_best():
                self._best = self._last
        if self.updates.update % self.config.checkpoint_every == 0:
            self._write()

    def _is_best(self) -> bool:
        return self._rows[-1]["return_eval"] >= best_of(self._rows)

    def _log_row(self) -> None:
        config, update = self.config, self.updates.update
        skipped = sum(record["skipped"] for record in self._records)
        if self._records and skipped == len(self._records):
            raise FloatingPointError(
                f"train_actor_critic: no gradient of updates {update - len(self._records)} to {update - 1} "
                "was finite; try smaller learning rates, a shorter horizon, flow='modified' or step_clip=1.0"
            )
        row: Row = {
            "update": update,
            "seconds": time.perf_counter() - self._started,
            "steps": update * config.horizon * config.worlds,
            "return_eval": math.nan,
            "length_eval": math.nan,
            "return_train": _mean(self._finished),
            "episodes": len(self._finished),
            **{name: _mean([record[name] for record in self._records]) for name in MEANS},
            "skipped": skipped,
            "std": float(self.updates.actor.gaussian.log_std.detach().exp().mean()),
        }
        if is_evaluated(update, config):
            found = evaluate(self.updates.task, self.updates.actor, self._x0)
            row["return_eval"], row["length_eval"] = as_numbers([found.returns.mean(), found.lengths.mean()])
        self._records, self._finished = [], []
        self._rows.append(row)
        if self._folder is not None:
            self._folder.append(row)

    def _snapshot(self) -> dict[str, Any]:
        """The state behind an update, as a checkpoint holds it."""
        state = self.updates.state()
        actor, optimizers = state.pop("actor"), state.pop("optimizers")
        seconds = time.perf_counter() - self._started
        more = {"epoch": self.updates.update, "policy": actor, "optimizer": optimizers, "seconds": seconds}
        return {**state, **more, "records": list(self._records), "finished": list(self._finished)}

    def _write(self) -> None:
        if self._folder is not None and finite(self._last["policy"]):
            self._folder.save_checkpoint("best", self._best)
            self._folder.save_checkpoint("last", self._last)


def _mean(values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan

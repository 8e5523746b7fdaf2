"""What a run folder of an actor-critic holds, and whether what stands there fits together.

The files are those of `runs.py`. A checkpoint's `epoch` is the number of updates behind it; `policy` is the
actor, `optimizer` the optimizers of both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..systems import System
from ..training import run_config
from ..training.provenance import versions
from ..training.resuming import ANEW, Stopped, differences, other_setting, rows_until
from ..training.runs import (
    ACTOR_CRITIC,
    Log,
    Row,
    checkpoint_name,
    is_run,
    read_checkpoint,
    read_config,
    read_log,
)
from .config import ActorCriticConfig
from .networks import Actor

COLUMNS = (
    "update",
    "seconds",
    "steps",
    "return_eval",
    "length_eval",
    "return_train",
    "episodes",
    "actor_loss",
    "critic_loss",
    "grad_norm",
    "cosine",
    "agreement",
    "skipped",
    "std",
)

MOVABLE = ("device",)
"""Settings that a run may be resumed with another value of; numbers may then differ by rounding."""


def to_json(config: ActorCriticConfig) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "format": ACTOR_CRITIC,
        "system": run_config.system_json(config.system),
        "policy": {},
        "training": json.loads(json.dumps(config.settings())),
        "versions": versions(),
    }


def from_json(data: Mapping[str, Any], system: System | None = None, **changes: Any) -> ActorCriticConfig:
    """The settings that `to_json` wrote, with changes; a system given takes the place of what is written."""
    settings: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in data["training"].items()
    }
    return ActorCriticConfig(
        run_config.build_system(data) if system is None else system, **(settings | changes)
    )


def read_stopped(path: str | os.PathLike[str], config: ActorCriticConfig) -> Stopped | None:
    """Returns where the run at `path` stopped, None where it got to no checkpoint or no run stands there.

    Raises:
        ValueError: The run that stands there has other settings than `config`, or a file is missing or
            damaged.
    """
    if not is_run(path):
        return None
    folder = Path(path)
    _check_settings(folder, config)
    if not (folder / checkpoint_name("last")).exists():
        if (folder / checkpoint_name("best")).exists():
            raise ValueError(
                f"run folder {path} cannot be resumed: {checkpoint_name('last')} is missing; {ANEW}"
            )
        return None
    last, best = read_checkpoint(folder, "last"), read_checkpoint(folder, "best")
    log = read_log(folder, COLUMNS)
    rows = rows_until(log, last["epoch"])
    due = [u for u in range(last["epoch"] + 1) if is_logged(u, config)]
    if [row["update"] for row in rows] != due:
        raise ValueError(
            f"run folder {path} cannot be resumed: log.csv has not the rows up to update {last['epoch']}, of "
            f"which {checkpoint_name('last')} is; put the whole log back, {ANEW}"
        )
    return Stopped(last, best, rows)


def is_logged(update: int, config: ActorCriticConfig) -> bool:
    """Whether the log has a row behind so many updates."""
    return update % config.log_every == 0 or is_evaluated(update, config)


def is_evaluated(update: int, config: ActorCriticConfig) -> bool:
    """Whether an evaluation follows so many updates."""
    return update % config.eval_every == 0 or update == config.updates


def _check_settings(folder: Path, config: ActorCriticConfig) -> None:
    asked, standing = json.loads(json.dumps(to_json(config))), read_config(folder, ACTOR_CRITIC)
    for part in ("system", "training"):
        for name, was, now in differences(asked[part], standing[part]):
            if name not in MOVABLE:
                raise other_setting(folder, part, name, was, now)


def load_actor(
    path: str | os.PathLike[str], *, checkpoint: str = "last", system: System | None = None
) -> tuple[ActorCriticConfig, Actor, Log]:
    """Reads a run folder that `ws.train_actor_critic` wrote.

    Args:
        path: The run folder.
        checkpoint: "last", "best" (highest return of an evaluation) or "first".
        system: Takes the place of the system in config.json; needed where its class cannot be imported.

    Returns:
        The settings (on the CPU), the actor, which is a policy without noise, and the log as one array per
        column.
    """
    config = from_json(read_config(path, ACTOR_CRITIC), system, device="cpu")
    actor = Actor(config.system, config.actor_hidden, config.std, dtype=config.torch_dtype)
    weights = read_checkpoint(path, checkpoint)["policy"]
    try:
        actor.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit its settings ({error}); {ANEW}") from error
    return config, actor, read_log(path, COLUMNS)


def best_of(rows: list[Row]) -> float:
    """The highest return of an evaluation so far."""
    found = [row["return_eval"] for row in rows if not math.isnan(row["return_eval"])]
    return max(found, default=-math.inf)


def finite(values: Mapping[str, Any]) -> bool:
    """Whether all tensors of a mapping are finite."""
    return all(bool(torch.isfinite(v).all()) for v in values.values() if isinstance(v, torch.Tensor))

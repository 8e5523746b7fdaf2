"""A run that stopped: whether the files in its folder fit together, and what the run needs to continue."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import run_config
from .config import TrainConfig
from .runs import PREVIOUS, Log, Row, checkpoint_name, is_run, read_checkpoint, read_config, read_log

ANEW = "or begin anew with overwrite=True (--overwrite)"


@dataclass(frozen=True)
class Stopped:
    """A run that stopped after a finished epoch, and what it needs to continue."""

    last: dict[str, Any]
    """Contents of the last checkpoint."""
    best: dict[str, Any]
    rows: list[Row]
    """The log up to the last checkpoint."""
    settings: dict[str, Any] | None = None
    """What config.json shall hold from now on; None where it is to stay."""

    @property
    def epochs(self) -> dict[str, int]:
        """Epochs of the checkpoints, by name."""
        return {"last": self.last["epoch"], "best": self.best["epoch"]}


def read_stopped(path: str | os.PathLike[str], config: TrainConfig) -> Stopped | None:
    """Returns where the run at `path` stopped; None if it has no checkpoint, or if there is no run.

    If the run lacks a setting that a later version added, the default is taken. If `config` has more epochs
    than the run, it is continued.

    Raises:
        ValueError: The run has other settings than `config`, or its files do not fit together: a checkpoint
            or the log is missing, damaged, or of another epoch or another run. Nothing is changed then.
    """
    if not is_run(path):
        return None
    folder = Path(path)
    settings = _settings(folder, config)
    last_file, best_file = (folder / checkpoint_name(name) for name in ("last", "best"))
    if not last_file.exists():
        _refuse_what_has_no_checkpoint(folder, config)
        return None
    try:
        last = read_checkpoint(folder, "last")
    except ValueError as error:
        raise ValueError(f"{error}{_previous(folder)}") from error
    for file in (best_file, folder / "log.csv"):
        if not file.exists():
            raise ValueError(
                f"run folder {path} cannot be resumed: {last_file.name} is of epoch {last['epoch']}, but "
                f"{file.name} is missing; put it back, {ANEW}"
            )
    best, log = read_checkpoint(folder, "best"), read_log(folder)
    _check_log(folder, log, last["epoch"], config)
    _check_best(folder, log, best["epoch"], last["epoch"])
    return Stopped(last, best, rows_until(log, last["epoch"]), settings)


def rows_until(log: Log, last: int) -> list[Row]:
    """The rows of a log up to a checkpoint; it may be ahead of that, never behind."""
    return [dict(zip(log, values)) for values in zip(*log.values()) if values[0] <= last]


def differences(asked: Any, standing: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two settings: its name, what it was, what it is now."""
    for name in sorted(asked.keys() | standing.keys()):
        was, now = standing.get(name), asked.get(name)
        if was != now:
            yield name, was, now


def other_setting(folder: Path, part: str, name: str, was: Any, now: Any, more: str = "") -> ValueError:
    """The error of a run that was begun with another setting."""
    return ValueError(
        f"run folder {folder} was begun with {part} {name}={was!r}, now {name}={now!r}; give the settings it "
        f"was begun with, or another folder{more}"
    )


def go_on(config: TrainConfig, path: str | os.PathLike[str]) -> str:
    """Says how a run is resumed."""
    written = run_config.to_json(config)
    functions = [written["training"][name] for name in ("loss", "combiner", "inputs")]
    named = (
        written["system"]["class"]
        and written["system"]["fields"] is not None
        and written["policy"]["class"]
        and written["policy"]["arguments"] is not None
        and all(not isinstance(f, dict) or f.get("callable", True) for f in functions)
    )
    if named:
        return f"warp-sims train --resume {shlex.quote(os.fspath(path))}"
    return f"ws.train(config, out={os.fspath(path)!r}, resume=True)"


def resumed_config(
    path: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    device: str | None = None,
    policy: torch.nn.Module | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    combiner: Callable[..., torch.Tensor] | None = None,
    inputs: Callable[..., torch.Tensor] | None = None,
) -> TrainConfig:
    """Returns the settings of the run at `path`, to continue it.

    Args:
        path: The run folder.
        epochs: Number of epochs in all. None: that of the run.
        device: The device to continue on. None: that of the run.
        policy, loss, combiner, inputs: The run's own, where its config.json does not say how they are made.
    """
    data = read_config(path)
    config = run_config.from_json(data, policy=policy, loss=loss, combiner=combiner, inputs=inputs)
    where = device or data["training"].get("device") or "cpu"
    try:
        config.policy.to(where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device {where!r} cannot be used ({error}); give cpu, cuda or cuda:INDEX"
        ) from error
    changes: dict[str, Any] = {"device": where, "graph": data["training"].get("graph", False)}
    if epochs is not None:
        changes["epochs"] = epochs
    return dataclasses.replace(config, **changes)


def _settings(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Compares the settings; returns the new contents of config.json, None where they are the old ones."""
    # Through JSON, which knows no tuples. Versions may differ: they are not of the user's choosing.
    asked = json.loads(json.dumps(run_config.to_json(config)))
    standing = read_config(folder)
    defaults = {
        "training": {f.name: f.default for f in dataclasses.fields(TrainConfig)},
        "fields": {f.name: f.default for f in dataclasses.fields(config.system)},
        "arguments": {p.name: p.default for p in inspect.signature(type(config.policy)).parameters.values()},
    }
    changed = False
    for part in run_config.PARTS:
        ours, theirs = asked[part], _completed(standing[part], asked[part], defaults.get(part, {}))
        for inner in ("fields", "arguments"):
            if isinstance(ours.get(inner), dict) and isinstance(theirs.get(inner), dict):
                theirs[inner] = _completed(theirs[inner], ours[inner], defaults[inner])
        for name, was, now in differences(ours, theirs):
            if name == "graph":  # it changes no number of a run
                continue
            if not (part == "training" and name == "epochs" and _is_less(was, now)):
                remedy = "; more epochs would continue it" if name == "epochs" else ""
                raise other_setting(folder, part, name, was, now, remedy)
            changed = True
    return standing | {"training": standing["training"] | {"epochs": config.epochs}} if changed else None


def _completed(
    standing: Mapping[str, Any], asked: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the standing settings with the default of each that was added later."""
    added = {
        name: json.loads(json.dumps(defaults[name]))
        for name in asked.keys() - standing.keys()
        if isinstance(defaults.get(name), (bool, int, float, str, tuple, list, type(None)))
        and name in defaults
    }
    return dict(standing) | added


def _is_less(was: Any, now: Any) -> bool:
    return isinstance(was, int) and isinstance(now, int) and was < now


def _refuse_what_has_no_checkpoint(folder: Path, config: TrainConfig) -> None:
    """Raises ValueError if the log shows that the run must have had a checkpoint."""
    found = [-1]
    for name in ("best", PREVIOUS):
        if (folder / checkpoint_name(name)).exists():
            found.append(read_checkpoint(folder, name)["epoch"])
    if (folder / "log.csv").exists():
        found += read_log(folder)["epoch"].tolist()
    if max(found) >= config.checkpoint_every:
        raise ValueError(
            f"run folder {folder} cannot be resumed: it got to epoch {max(found)}, but "
            f"{checkpoint_name('last')} is missing; put it back, {ANEW}{_previous(folder)}"
        )


def _previous(folder: Path) -> str:
    """Says how to use the checkpoint before the last one, if there is one."""
    try:
        epoch = read_checkpoint(folder, PREVIOUS)["epoch"]
    except (OSError, ValueError):
        return ""
    previous, last = checkpoint_name(PREVIOUS), checkpoint_name("last")
    return f"; {previous} is whole, of epoch {epoch}: to go on from there, rename it to {last}"


def _check_log(folder: Path, log: Log, last: int, config: TrainConfig) -> None:
    """Raises ValueError if the log ends before the checkpoint or lacks a row."""
    present = set(log["epoch"].tolist())
    due = [-1, *(e for e in range(last + 1) if (e + 1) % config.log_every == 0)]
    lacking = [epoch for epoch in due if epoch not in present]
    if lacking:
        raise ValueError(
            f"run folder {folder} cannot be resumed: {checkpoint_name('last')} is of epoch {last}, but "
            f"log.csv lacks {len(lacking)} of the rows up to it, the first of epoch {lacking[0]}; put the "
            f"whole log back, {ANEW}"
        )


def _check_best(folder: Path, log: Log, best: int, last: int) -> None:
    """Raises ValueError unless the best checkpoint is of the epoch that the log says.

    It may be of a later epoch than the last checkpoint, which is written after it. The epochs between them
    are repeated.
    """
    losses = dict(zip(log["epoch"].tolist(), log["loss_test"].tolist()))
    lowest = min((loss for epoch, loss in losses.items() if epoch <= last), default=float("nan"))
    if best not in losses or (best <= last and not losses[best] <= lowest):
        raise ValueError(
            f"run folder {folder} cannot be resumed: {checkpoint_name('best')} is of epoch {best}, but by "
            f"log.csv the lowest test loss is in another one; put the checkpoint of this run back, {ANEW}"
        )


def check_fits(config: TrainConfig, stopped: Stopped, folder: str | os.PathLike[str]) -> None:
    """Raises ValueError unless the weights and the optimizer of both checkpoints fit the policy."""
    state = config.policy.state_dict()
    shapes = [tuple(p.shape) for p in config.policy.parameters() if p.requires_grad]
    for name, contents in (("last", stopped.last), ("best", stopped.best)):
        where = f"{checkpoint_name(name)} in {folder}"
        remedy = f"put the checkpoint of this run back, {ANEW}"
        weights = contents["policy"]
        for key in sorted(state.keys() | weights.keys()):
            ours, theirs = _kind(state.get(key)), _kind(weights.get(key))
            if ours != theirs:
                raise ValueError(f"{where} holds {key} as {theirs}, expected {ours}; {remedy}")
            if isinstance(state[key], torch.Tensor) and not bool(torch.isfinite(weights[key]).all()):
                raise ValueError(f"{where} holds NaN or infinity in {key}, expected finite weights; {remedy}")
        for i, values in _optimizer_state(contents, where).items():
            for key, value in values.items():
                tensor = isinstance(value, torch.Tensor) and value.ndim > 0
                if tensor and (i >= len(shapes) or tuple(value.shape) != shapes[i]):
                    raise ValueError(f"{where} holds {key} of parameter {i} in another shape; {remedy}")


def _optimizer_state(contents: Mapping[str, Any], where: str) -> dict[int, Mapping[str, Any]]:
    state = contents["optimizer"].get("state")
    whole = isinstance(state, Mapping) and all(
        isinstance(i, int) and isinstance(values, Mapping) for i, values in state.items()
    )
    if not whole or not isinstance(contents["optimizer"].get("param_groups"), list):
        raise ValueError(
            f"{where} holds no state of an optimizer; put the checkpoint of this run back, {ANEW}"
        )
    return dict(state)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return "nothing" if value is None else type(value).__name__

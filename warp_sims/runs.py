"""The folder of a training run: what is written where, and how it is read back.

config.json           settings, system, policy, versions
log.csv               one row per logged epoch, the first before training (epoch -1)
curves.png            the log as a picture
checkpoint_first.pt   weights and optimizer state before training
checkpoint_last.pt    the same after the last finished epoch
checkpoint_best.pt    the same at the lowest test loss
events.out.*          TensorBoard, on request
outcome.json          how the run ended, in a matrix of runs (`warp-sims reproduce`)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import run_config
from .systems import System
from .train_config import TrainConfig

LOG_COLUMNS = (
    "epoch",
    "loss_batch",
    "loss_train",
    "loss_test",
    "grad_norm",
    "cosine",
    "agreement",
    "seconds",
)
LOG_HEADER = ",".join(LOG_COLUMNS)
CHECKPOINTS = ("first", "last", "best")
OUTCOME = "outcome.json"
PARTIAL = ".partial"  # what is being written, and moved to its place when it is whole

Row = dict[str, float]
Log = dict[str, np.ndarray]


class RunFolder:
    """Writes one run.

    Until `begin`, nothing that stands in the folder is touched, and `discard` undoes the making.

    Args:
        path: The folder, made with its parents where missing.
        overwrite: Whether a run that stands there may be replaced. Only files that a run writes are removed.

    Raises:
        FileExistsError: Something stands there, and it is no run or `overwrite` is False.
        OSError: The folder cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.path = Path(path)
        self._made: list[Path] = []
        self._log: Any = None
        self._check_free(overwrite)
        try:
            self._make()
        except OSError as error:
            self.discard()
            raise type(error)(
                f"run folder {self.path} cannot be written ({error.strerror or error}); give a folder that "
                "can be written"
            ) from error

    def _check_free(self, overwrite: bool) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise FileExistsError(f"run folder {self.path} exists and is no folder; give another name")
        try:
            # A process that was killed in the middle of a writing leaves a part of a file.
            empty = all(entry.suffix == PARTIAL for entry in self.path.iterdir())
        except OSError as error:
            raise type(error)(
                f"run folder {self.path} cannot be read ({error.strerror}); give another name"
            ) from error
        if empty:
            return
        if not is_run(self.path):
            raise FileExistsError(
                f"folder {self.path} exists and holds no run of warp-sims; give another name"
            )
        if not overwrite:
            raise FileExistsError(
                f"run folder {self.path} exists; give another name, or replace it with overwrite=True "
                "(--overwrite)"
            )

    def _make(self) -> None:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)
        # Asking for permissions is no proof (root, read-only mounts, full disks); a file is.
        with tempfile.TemporaryFile(dir=self.path) as probe:
            probe.write(b"warp-sims")

    def discard(self) -> None:
        """Removes the folders that were made, where they are still empty: the run did not start."""
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def begin(self, config: TrainConfig) -> None:
        """Removes the run that stands there, if any, and writes config.json and the header of the log."""
        # config.json is replaced, not removed: whenever this is stopped, it is known for a run's folder.
        for name in ("log.csv", "curves.png", OUTCOME, *map(checkpoint_name, CHECKPOINTS)):
            (self.path / name).unlink(missing_ok=True)
        for left in (*self.path.glob("events.out.tfevents.*"), *self.path.glob("animation.*")):
            left.unlink()
        write_json(self.path / "config.json", run_config.to_json(config))
        # "x": of two runs at once, one gives way
        self._log = open(self.path / "log.csv", "x", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._log.write(LOG_HEADER + "\n")
        self._log.flush()

    def resume(self, rows: list[Row]) -> None:
        """Keeps the run that stands there, with these rows of its log, and appends to it."""
        partial = self.path / ("log.csv" + PARTIAL)
        partial.write_text(
            "".join(line + "\n" for line in (LOG_HEADER, *map(_line, rows))), encoding="utf-8", newline="\n"
        )
        os.replace(partial, self.path / "log.csv")
        self._log = open(self.path / "log.csv", "a", encoding="utf-8", newline="\n")  # noqa: SIM115

    def append(self, row: Row) -> None:
        """Appends a row to the log, at once on disk: NaN is an empty field."""
        self._log.write(_line(row) + "\n")
        self._log.flush()

    def save_checkpoint(self, name: str, contents: Mapping[str, Any]) -> None:
        """Replaces a checkpoint in one move: whoever stops the process finds the old one or the new one."""
        target = self.path / checkpoint_name(name)
        partial = target.with_suffix(PARTIAL)
        torch.save(dict(contents), partial)
        os.replace(partial, target)

    def close(self) -> None:
        """Closes the log."""
        if self._log is not None:
            self._log.close()


@dataclass(frozen=True)
class Stopped:
    """A run that stopped after a finished epoch, and what it needs to go on."""

    last: dict[str, Any]
    """Contents of the last checkpoint."""
    best: dict[str, Any]
    rows: list[Row]
    """The log up to the last checkpoint."""


def read_stopped(path: str | os.PathLike[str], config: TrainConfig) -> Stopped | None:
    """Returns where the run at `path` stopped, None where it got to no checkpoint or no run stands there.

    Raises:
        ValueError: The run that stands there has other settings than `config`.
    """
    if not is_run(path):
        return None
    # Through JSON, which knows no tuples. Versions may differ: they are not of the user's choosing.
    asked = json.loads(json.dumps(run_config.to_json(config)))
    standing = read_config(path)
    for part in ("system", "policy", "training"):
        for name in asked[part].keys() | standing.get(part, {}).keys():
            was, now = standing.get(part, {}).get(name), asked[part].get(name)
            # a graph changes no number of a run
            if was != now and name != "graph":
                raise ValueError(
                    f"run folder {path} was begun with {part} {name}={was!r}, now {name}={now!r}; give the "
                    "settings it was begun with, or another folder"
                )
    try:
        last, best, log = read_checkpoint(path, "last"), read_checkpoint(path, "best"), read_log(path)
    except FileNotFoundError:
        return None
    # The log may be ahead of the checkpoint, never behind it.
    rows = [dict(zip(log, values)) for values in zip(*log.values()) if values[0] <= last["epoch"]]
    return Stopped(last, best, rows)


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Writes a JSON file in one move: it is there as a whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def checkpoint_name(name: str) -> str:
    """Returns the file name of a checkpoint, one of `CHECKPOINTS`."""
    return f"checkpoint_{name}.pt"


def is_run(path: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds a run that this package wrote."""
    try:
        read_config(path)
    except (OSError, ValueError):
        return False
    return True


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the contents of a run's config.json."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"run folder {path} does not exist or is no folder; give a folder that training wrote"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"folder {path} holds no config.json; give a folder that training wrote"
        ) from None
    except OSError as error:
        raise type(error)(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); give a folder that training wrote") from error
    if not isinstance(data, dict) or data.get("format") != run_config.FORMAT:
        raise ValueError(
            f"{file} is not of the format {run_config.FORMAT!r}; give a folder that training wrote"
        )
    return data


def read_log(path: str | os.PathLike[str]) -> Log:
    """Returns a run's log: one array per column, the epoch as integers, empty fields as NaN."""
    file = Path(path) / "log.csv"
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise type(error)(
            f"{file} cannot be read ({error.strerror}); give a folder that training wrote"
        ) from error
    if not lines or lines[0].rstrip("\n") != LOG_HEADER:
        raise ValueError(f"{file} does not begin with {LOG_HEADER!r}; give a folder that training wrote")
    # A line without its end is one that a killed process did not finish.
    fields = [line.rstrip("\n").split(",") for line in lines[1:] if line.endswith("\n")]
    try:
        rows = [
            {name: float(v) if v else math.nan for name, v in zip(LOG_COLUMNS, f, strict=True)}
            for f in fields
        ]
    except ValueError as error:
        raise ValueError(f"{file} holds a row that cannot be read ({error})") from error
    return as_log(rows)


def as_log(rows: list[Row]) -> Log:
    """Returns rows as one array per column."""
    return {
        name: np.array([row[name] for row in rows], dtype=np.int64 if name == "epoch" else np.float64)
        for name in LOG_COLUMNS
    }


def read_checkpoint(path: str | os.PathLike[str], name: str = "last") -> dict[str, Any]:
    """Returns a run's checkpoint, one of `CHECKPOINTS`: epoch, policy and optimizer state."""
    if name not in CHECKPOINTS:
        raise ValueError(f"checkpoint={name!r}, expected one of {', '.join(map(repr, CHECKPOINTS))}")
    file = Path(path) / checkpoint_name(name)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"folder {path} holds no {file.name}; its training did not get as far"
        ) from None
    except Exception as error:  # torch.load raises whatever the unpickler and the archive reader do
        raise ValueError(f"{file} cannot be read as a checkpoint ({error})") from error


def load_run(
    path: str | os.PathLike[str],
    *,
    checkpoint: str = "last",
    system: System | None = None,
    policy: torch.nn.Module | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
) -> tuple[TrainConfig, torch.nn.Module, Log]:
    """Reads a run folder that `ws.train` wrote.

    A run of a user's own classes imports them by name, so load only folders whose origin you trust.

    Args:
        path: The run folder.
        checkpoint: "last" (after the last finished epoch), "best" (lowest test loss) or "first" (before
            training).
        system: Takes the place of the system in config.json; needed where its class cannot be imported.
        policy: Takes the weights; needed where config.json cannot say how the policy was made.
        loss: Takes the place of a callable loss that cannot be imported.

    Returns:
        The settings, the policy with the checkpoint's weights (on the CPU, unless given), and the log as one
        array per column.
    """
    data = read_config(path)
    log = read_log(path)
    weights = read_checkpoint(path, checkpoint)["policy"]
    config = run_config.from_json(data, system=system, policy=policy, loss=loss)
    try:
        config.policy.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the weights in {path} do not fit the policy ({reason}); give the policy it was"
        ) from error
    return config, config.policy, log


def _line(row: Row) -> str:
    return ",".join(_field(name, row[name]) for name in LOG_COLUMNS)


def _field(name: str, value: float) -> str:
    if name == "epoch":
        return str(int(value))
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if name == "seconds" else f"{value:.9g}"

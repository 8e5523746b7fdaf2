"""The folder of a training run: what is written where, and how it is read back.

config.json           settings, system, policy, versions
log.csv               one row per logged epoch, the first before training (epoch -1)
curves.png            the log as a picture
checkpoint_first.pt   weights and optimizer state before training
checkpoint_last.pt    the same after the last finished epoch
checkpoint_previous.pt  what checkpoint_last.pt was before it was replaced
checkpoint_best.pt    the same at the lowest test loss
events.out.*          TensorBoard, on request
run.lock              who writes here, while somebody does
outcome.json          how the run ended, in a matrix of runs (`warp-sims reproduce`)
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..systems import System
from . import run_config
from .config import TrainConfig
from .durable import PARTIAL, keep_as, remove_partial, replace_file, write_json
from .run_lock import LOCK, RunLock

LOG_COLUMNS = (
    "epoch",
    "loss_batch",
    "loss_train",
    "loss_test",
    "grad_norm",
    "cosine",
    "agreement",
    "seconds",
    "nonfinite",
    "zeros",
)
LOG_HEADER = ",".join(LOG_COLUMNS)
OLDER_HEADERS = (",".join(LOG_COLUMNS[:8]),)
"""Headers of logs that earlier versions wrote; columns that they lack are read as NaN."""
CHECKPOINTS = ("first", "last", "best")
PREVIOUS = "previous"
OUTCOME = "outcome.json"
ACTOR_CRITIC = "warp-sims actor-critic 1"
"""Format of the runs of `ws.train_actor_critic`, whose log has columns of its own."""
FORMATS = (run_config.FORMAT, ACTOR_CRITIC)

Row = dict[str, float]
Log = dict[str, np.ndarray]


class RunFolder:
    """Writes one run, and keeps other processes away from its folder until it is closed or discarded.

    Until `begin`, no file in the folder is changed, and `discard` undoes what was made.

    Args:
        path: The folder, made with its parents where missing.
        overwrite: Whether an existing run may be replaced. Only files that a run writes are removed.
        columns: Columns of its log; the first one counts epochs or updates.

    Raises:
        FileExistsError: The folder is not empty, and it is not a run or `overwrite` is False.
        BlockingIOError: Another process writes a run there; the message names it.
        OSError: The folder cannot be made or written.
    """

    def __init__(
        self, path: str | os.PathLike[str], overwrite: bool = False, columns: Sequence[str] = LOG_COLUMNS
    ) -> None:
        self.path = Path(path)
        self._columns = tuple(columns)
        self._made: list[Path] = []
        self._log: Any = None
        self._lock: RunLock | None = None
        self._saved: dict[str, int] = {}  # epochs of the checkpoints that stand there
        self._check_free(overwrite)
        try:
            self._make()
            self._lock = RunLock(self.path)
            self._check_free(overwrite)  # it may have been taken in between
        except (BlockingIOError, FileExistsError):
            self.discard()
            raise
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
            empty = all(entry.suffix == PARTIAL or entry.name == LOCK for entry in self.path.iterdir())
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
        """Gives the lock back and removes the folders that were made, if they are still empty, because the
        run did not start.
        """
        self._release()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Removes an existing run, and writes config.json and the header of the log."""
        # config.json is replaced, not removed: whenever this is stopped, it is known for a run's folder.
        for name in ("log.csv", "curves.png", OUTCOME, *map(checkpoint_name, (*CHECKPOINTS, PREVIOUS))):
            (self.path / name).unlink(missing_ok=True)
        for left in (*self.path.glob("events.out.tfevents.*"), *self.path.glob("animation.*")):
            left.unlink()
        remove_partial(self.path)
        write_json(self.path / "config.json", settings)
        self._open_log([])

    def resume(self, rows: list[Row], epochs: dict[str, int], settings: Mapping[str, Any] | None) -> None:
        """Keeps the existing run, with these rows of its log, and appends to it.

        Args:
            rows: The log up to the last checkpoint.
            epochs: Those of the checkpoints that stand there, by name.
            settings: What config.json shall hold from now on; None where it is to stay.
        """
        remove_partial(self.path)
        if settings is not None:
            write_json(self.path / "config.json", settings)
        self._saved = dict(epochs)
        self._open_log(rows)

    def _open_log(self, rows: list[Row]) -> None:
        lines = (",".join(self._columns), *(_line(row, self._columns) for row in rows))
        text = "".join(line + "\n" for line in lines)
        replace_file(self.path / "log.csv", lambda file: file.write(text.encode()))
        self._log = open(self.path / "log.csv", "a", encoding="utf-8", newline="\n")  # noqa: SIM115

    def append(self, row: Row) -> None:
        """Appends a row to the log, at once in the file: NaN is an empty field."""
        self._log.write(_line(row, self._columns) + "\n")
        self._log.flush()

    def save_checkpoint(self, name: str, contents: Mapping[str, Any]) -> None:
        """Replaces a checkpoint in one move, when the new one and the log up to it are completely on disk.

        If the checkpoint of this epoch exists, it is not written again. The last checkpoint before stays as
        `PREVIOUS`.
        """
        epoch = contents["epoch"]
        if self._saved.get(name) == epoch:
            return
        target = self.path / checkpoint_name(name)
        if name == "last":
            os.fsync(self._log.fileno())  # never behind its checkpoint
            if self._saved.get(name, -1) >= 0:
                keep_as(target, self.path / checkpoint_name(PREVIOUS))
        replace_file(target, lambda file: torch.save(dict(contents), file))
        self._saved[name] = epoch

    def close(self) -> None:
        """Closes the log, and lets other processes in."""
        try:
            if self._log is not None:
                self._log.close()
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def checkpoint_name(name: str) -> str:
    """Returns the file name of a checkpoint, one of `CHECKPOINTS`."""
    return f"checkpoint_{name}.pt"


def is_run(path: str | os.PathLike[str], *formats: str) -> bool:
    """Returns whether a folder holds a run that this package wrote, of one of these formats if given."""
    for layout in formats or FORMATS:
        with contextlib.suppress(OSError, ValueError):
            read_config(path, layout)
            return True
    return False


def read_config(path: str | os.PathLike[str], layout: str = run_config.FORMAT) -> dict[str, Any]:
    """Returns the contents of a run's config.json, which must be of this format."""
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); give a folder that training wrote") from error
    if not isinstance(data, dict) or data.get("format") != layout:
        raise ValueError(f"{file} is not of the format {layout!r}; give a folder that training wrote")
    for part in run_config.PARTS:
        if not isinstance(data.get(part), dict):
            raise ValueError(f"{file} holds no {part!r}; give a folder that training wrote")
    return data


def read_log(path: str | os.PathLike[str], expected: Sequence[str] = LOG_COLUMNS) -> Log:
    """Returns a run's log: one array per column, the first (epochs) as integers, empty fields as NaN.

    Columns that an earlier version did not write are NaN.
    """
    file = Path(path) / "log.csv"
    remedy = "give a folder that training wrote"
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise type(error)(f"{file} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no text ({error}); {remedy}") from error
    header = lines[0].rstrip("\n") if lines else ""
    counter, first = expected[0], ",".join(expected)
    if header not in (first, *(OLDER_HEADERS if first == LOG_HEADER else ())):
        raise ValueError(f"{file} does not begin with {first!r}; {remedy}")
    columns = header.split(",")
    # A line without its end is one that a killed process did not finish.
    fields = [line.rstrip("\n").split(",") for line in lines[1:] if line.endswith("\n")]
    lacking = dict.fromkeys(expected, math.nan)
    try:
        rows = [
            lacking | {name: float(v) if v else math.nan for name, v in zip(columns, f, strict=True)}
            for f in fields
        ]
    except ValueError as error:
        raise ValueError(f"{file} holds a row that cannot be read ({error}); {remedy}") from error
    epochs = [row[counter] for row in rows]
    wrong = [e for e in epochs if not (math.isfinite(e) and e == int(e))]
    if wrong or any(b <= a for a, b in zip(epochs, epochs[1:])):
        raise ValueError(
            f"{file} holds the {counter}s {epochs[:8]}, expected ascending whole numbers from -1 on; {remedy}"
        )
    return as_log(rows, expected)


def as_log(rows: list[Row], columns: Sequence[str] = LOG_COLUMNS) -> Log:
    """Returns rows as one array per column, the first of integers."""
    return {
        name: np.array([row[name] for row in rows], dtype=np.int64 if name == columns[0] else np.float64)
        for name in columns
    }


def read_checkpoint(path: str | os.PathLike[str], name: str = "last") -> dict[str, Any]:
    """Returns a run's checkpoint, one of `CHECKPOINTS`: epoch, policy and optimizer state."""
    if name not in (*CHECKPOINTS, PREVIOUS):
        raise ValueError(f"checkpoint={name!r}, expected one of {', '.join(map(repr, CHECKPOINTS))}")
    file = Path(path) / checkpoint_name(name)
    remedy = "give a folder that training wrote, or another of its checkpoints"
    try:
        # torch.load compares no sums: a changed bit would be another weight, and where the archive's own
        # tables are damaged, memory that nobody wrote. What it reads is therefore packed anew.
        whole = io.BytesIO()
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(whole, "w") as copy:
            for part in archive.infolist():
                copy.writestr(part.filename, archive.read(part))  # which compares its sum
        whole.seek(0)
        contents = torch.load(whole, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"folder {path} holds no {file.name}; its training did not get as far"
        ) from None
    except Exception as error:  # whatever the unpickler and the archive readers raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as a checkpoint ({reason}); {remedy}") from error
    kinds = {"epoch": int, "policy": Mapping, "optimizer": Mapping}
    if not isinstance(contents, Mapping) or any(
        not isinstance(contents.get(part), kind) for part, kind in kinds.items()
    ):
        raise ValueError(f"{file} lacks one of {', '.join(kinds)}; {remedy}")
    return dict(contents)


def load_run(
    path: str | os.PathLike[str],
    *,
    checkpoint: str = "last",
    system: System | None = None,
    policy: torch.nn.Module | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    combiner: Callable[..., torch.Tensor] | None = None,
    inputs: Callable[..., torch.Tensor] | None = None,
) -> tuple[TrainConfig, torch.nn.Module, Log]:
    """Reads a run folder that `ws.train` wrote.

    A run of a user's own classes imports them by name, so load only folders whose origin you trust.

    Args:
        path: The run folder.
        checkpoint: "last" (after the last finished epoch), "best" (lowest test loss) or "first" (before
            training).
        system: Replaces the system in config.json; needed if its class cannot be imported.
        policy: A module that gets the weights; needed if config.json cannot say how the policy was made.
        loss, combiner, inputs: Replace functions that cannot be imported.

    Returns:
        The settings, the policy with the checkpoint's weights (on the CPU, unless given), and the log as one
        array per column.
    """
    if is_run(path, ACTOR_CRITIC):
        raise ValueError(f"{path} is a run of train_actor_critic; read it with ws.load_actor")
    data = read_config(path)
    log = read_log(path)
    weights = read_checkpoint(path, checkpoint)["policy"]
    config = run_config.from_json(
        data, system=system, policy=policy, loss=loss, combiner=combiner, inputs=inputs
    )
    try:
        config.policy.load_state_dict(weights)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the weights in {path} do not fit the policy ({reason}); give the policy it was"
        ) from error
    return config, config.policy, log


def _line(row: Row, columns: Sequence[str]) -> str:
    return ",".join(
        str(int(row[name])) if i == 0 else _field(name, row[name]) for i, name in enumerate(columns)
    )


def _field(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if name == "seconds" else f"{value:.9g}"

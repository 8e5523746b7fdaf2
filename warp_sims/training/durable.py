"""Writes files that are complete or not there at all, whatever stops the process or the machine."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"
"""Ending of what is being written, and moved to its place when it is whole and on disk."""


def replace_file(target: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replaces a file in one move: if the process or the machine stops, the old file or the new one is there.

    Args:
        target: The file.
        write: Writes the contents into the open file that it is given.
    """
    partial = _partial(target)
    try:
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one move."""
    text = json.dumps(contents, indent=2) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def keep_as(source: Path, target: Path) -> None:
    """Gives a file a second name in one move, so that it is kept when the first name is replaced."""
    partial = _partial(target)
    try:
        try:
            os.link(source, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Brings the names of the files in a folder to disk."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Removes the partial files of processes that were killed while they wrote."""
    for left in folder.glob("*" + PARTIAL):
        left.unlink(missing_ok=True)


def _partial(target: Path) -> Path:
    """Returns a name that no other process and no other thread takes."""
    return target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")

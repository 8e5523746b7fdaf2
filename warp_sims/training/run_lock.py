"""The lock on a run folder: a second process that would write the same run gets an error."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

LOCK = "run.lock"


class RunLock:
    """A lock on a folder, held until `release` or until the process is gone, however it ends.

    Args:
        folder: The folder, which exists.

    Raises:
        BlockingIOError: Another process (or another run of this one) holds it; the message names it.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: IO[str] | None = None
        self._alone = False
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            self._file = self._create_alone()
        else:
            while self._file is None:
                file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                    raise BlockingIOError(self._refusal()) from None
                except OSError:  # a file system without locks
                    file.close()
                    self.path.unlink(missing_ok=True)
                    self._file = self._create_alone()
                    break
                # The holder before removes the file as it lets go: what was locked may be no longer there.
                if self._is_at_path(file):
                    self._file = file
                else:
                    file.close()
        self._say_who(self._file)

    def release(self) -> None:
        """Gives the lock back, once."""
        file, self._file = self._file, None
        if file is None:
            return
        if self._alone:
            file.close()
            self.path.unlink(missing_ok=True)
            return
        if self._is_at_path(file):  # while it is locked
            with contextlib.suppress(OSError):
                self.path.unlink()
        file.close()

    def _create_alone(self) -> IO[str]:
        """The file itself is the lock: one that a killed process left has to be removed by hand."""
        self._alone = True
        try:
            return open(self.path, "x", encoding="utf-8")
        except FileExistsError:
            raise BlockingIOError(f"{self._refusal()}; if that process is gone, remove {self.path}") from None

    def _is_at_path(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except OSError:
            return False

    def _say_who(self, file: IO[str]) -> None:
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
        file.flush()

    def _refusal(self) -> str:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            holder = f"process {held['pid']} on {held['host']} since {held['since']}"
        except (OSError, ValueError, LookupError, TypeError):  # not written yet, or just removed
            holder = "another process"
        return f"run folder {self.path.parent} is in use by {holder}; wait for it, or give another folder"

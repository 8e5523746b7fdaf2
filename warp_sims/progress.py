"""Progress bars, where rich is installed; silence where it is not."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any


class Bars:
    """One bar per run, shown at once. Used as a context manager.

    Args:
        show: Whether to show anything. Without the package rich nothing is shown either.
        text: What stands between the count and the number that `update` is given.
    """

    def __init__(self, show: bool = True, text: str = "epochs  test loss") -> None:
        self._progress: Any = None
        if not show:
            return
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(text + " {task.fields[loss]}"),
            TimeRemainingColumn(),
            refresh_per_second=4,
        )

    def __enter__(self) -> Bars:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def add(self, label: str, total: int, loss: float, completed: int = 0) -> int:
        """Adds a bar of `total` epochs, of which some may be done, and returns its number."""
        if self._progress is None:
            return 0
        return self._progress.add_task(label, total=total, completed=completed, loss=_loss(loss))

    def update(self, bar: int, completed: int, loss: float) -> None:
        """Shows that `completed` epochs are done, and the last test loss."""
        if self._progress is not None:
            self._progress.update(bar, completed=completed, loss=_loss(loss))


def _loss(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3e}"

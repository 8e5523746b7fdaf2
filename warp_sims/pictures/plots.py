"""Pictures of training: loss curves of one run, or of several side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..training.runs import Log

TRAILING_EPOCHS = 30
# Okabe and Ito's colours: told apart by colour-blind readers, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def need_matplotlib() -> Any:
    """Returns `matplotlib.figure.Figure`, which needs no display; says what to install if missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib; pip install "warp-sims[cli]"') from error
    return Figure


def plot_curves(logs: Mapping[str, Log], path: str | os.PathLike[str]) -> Path:
    """Draws the loss over the epochs: trailing means of 30 epochs in full colour, the values faint.

    One log is drawn with its train and test loss and its gradient norm, and for C the cosine of the two
    gradients; several are drawn with their test losses in one picture, and their gradient norms below.

    Args:
        logs: Logs by the name that the legend shows.
        path: The picture to write; its suffix says the format.
    """
    # A mean over 30 epochs hides a short run: there it covers a tenth.
    longest = max(len(log["epoch"]) and int(log["epoch"][-1]) + 1 for log in logs.values())
    width = min(TRAILING_EPOCHS, max(1, longest // 10))
    figure_class = need_matplotlib()
    from matplotlib.ticker import LogFormatterMathtext

    figure = figure_class(figsize=(8.0, 6.4), dpi=110, layout="constrained")
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    if len(logs) == 1:
        ((name, log),) = logs.items()
        _curve(loss_axes, log, "loss_train", COLOURS[0], "train loss", width)
        _curve(loss_axes, log, "loss_test", COLOURS[1], "test loss", width)
        loss_axes.set_title(f"flow {name}", loc="left")
        loss_axes.set_ylabel("loss")
        _curve(norm_axes, log, "grad_norm", COLOURS[2], "gradient norm", width)
        handles, labels = norm_axes.get_legend_handles_labels()
        if np.isfinite(log["cosine"]).any():
            cosine_axes = norm_axes.twinx()
            _curve(cosine_axes, log, "cosine", COLOURS[3], "cosine of the two gradients (right)", width)
            cosine_axes.set_ylim(-1.05, 1.05)
            cosine_axes.set_ylabel("cosine")
            more = cosine_axes.get_legend_handles_labels()
            handles, labels = handles + more[0], labels + more[1]
        # Above the panel: with two axes in it there is no free corner.
        norm_axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize="small"
        )
    else:
        for i, (name, log) in enumerate(logs.items()):
            colour = COLOURS[i % len(COLOURS)]
            _curve(loss_axes, log, "loss_test", colour, name, width)
            _curve(norm_axes, log, "grad_norm", colour, name, width)
        loss_axes.set_ylabel("test loss")
    loss_axes.legend(frameon=False)
    norm_axes.set_ylabel("gradient norm")
    norm_axes.set_xlabel("epoch")
    for axes in (loss_axes, norm_axes):
        if _has_positive(axes):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(LogFormatterMathtext(minor_thresholds=(1.2, 0.5)))
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    loss_axes.text(
        1.0,
        1.01,
        f"trailing mean of {width} epochs; faint: each epoch" if width > 1 else "",
        transform=loss_axes.transAxes,
        ha="right",
        va="bottom",
        fontsize="small",
        color="0.4",
    )
    figure.savefig(path)
    return Path(path)


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of each value and the `width` - 1 before it, padded with the first.

    NaN takes no part, so a gap neither spreads nor counts.
    """
    if not len(values):
        return values
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    finite = np.isfinite(windows)
    counts = finite.sum(axis=1)
    sums = np.where(finite, windows, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _curve(axes: Any, log: Log, column: str, colour: str, label: str, width: int) -> None:
    shown = np.isfinite(log[column])
    epochs, values = log["epoch"][shown], log[column][shown]
    if not len(epochs):
        return
    # Rows may stand some epochs apart; the mean is over epochs, so it takes fewer of them.
    spacing = max(1, round((epochs[-1] - epochs[0]) / max(1, len(epochs) - 1)))
    axes.plot(epochs, values, color=colour, alpha=0.3, linewidth=0.8)
    means = trailing_mean(values, max(1, width // spacing))
    axes.plot(epochs, means, color=colour, linewidth=1.8, label=label)


def _has_positive(axes: Any) -> bool:
    return any((np.asarray(line.get_ydata()) > 0).any() for line in axes.get_lines())

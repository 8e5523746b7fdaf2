"""The pictures of the report: curves over seeds, and the two studies in the plane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures.plots import COLOURS, TRAILING_EPOCHS, need_matplotlib, trailing_mean
from ..training.published import FLOWS, SETTINGS
from ..training.runs import Log
from .toy import EXTENT, Descent, Landscape, grid, landscape

Logs = Mapping[tuple[str, str], Sequence[Log]]
"""Logs of all seeds by setting and flow."""

FLOW_COLOURS = {"regular": COLOURS[0], "modified": COLOURS[4], "stopped": COLOURS[3], "combined": COLOURS[2]}
FLOW_LABELS = {flow.name.lower(): f"{flow.value}: {flow.name.lower()}" for flow in FLOWS}
DPI = 130


def smoothing(epochs: int) -> int:
    """Returns the epochs that a trailing mean covers: 30, and a tenth of a shorter run."""
    return min(TRAILING_EPOCHS, max(1, epochs // 10))


def curves(problem: str, logs: Logs, column: str, label: str, epochs: int, path: Path) -> None:
    """Draws a column of the log over the epochs by flow, a panel per setting: median and range over seeds."""
    names = [name for name in SETTINGS[problem] if any(setting == name for setting, _ in logs)]
    figure, panels = _panels(len(names))
    for name, axes in zip(names, panels):
        for flow, colour in FLOW_COLOURS.items():
            if (name, flow) in logs:
                _band(axes, logs[name, flow], column, epochs, colour, FLOW_LABELS[flow])
        axes.set_title(SETTINGS[problem][name].title, loc="left", fontsize="medium")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        _log_axis(axes)
    _save(figure, panels, path)


def cosines(problem: str, logs: Logs, epochs: int, path: Path) -> bool:
    """Draws the cosine of M and R that C sees, a line per setting; returns whether there was any."""
    names = [name for name in SETTINGS[problem] if (name, "combined") in logs]
    figure, (axes,) = _panels(1)
    for name, colour in zip(names, COLOURS):
        _band(axes, logs[name, "combined"], "cosine", epochs, colour, SETTINGS[problem][name].title)
    if not axes.get_lines():
        return False
    axes.set_ylim(-1.05, 1.05)
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("cosine of M and R")
    _save(figure, [axes], path)
    return True


def _panels(count: int) -> tuple[Any, list[Any]]:
    columns = 1 if count == 1 else 2
    rows = math.ceil(count / columns)
    height = 0.6 + 2.5 * rows + (0.9 if count == 1 else 0.0)
    figure = need_matplotlib()(figsize=(8.0, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in panels[count:]:
        spare.remove()
    for axes in panels[:count]:
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def _band(axes: Any, logs: Sequence[Log], column: str, epochs: int, colour: str, label: str) -> None:
    """Median over seeds with the range from least to most, of each seed's trailing mean."""
    # By epoch, the first of them -1; a run that ended early has no say behind its end.
    table = np.full((len(logs), epochs + 1), math.nan)
    for row, log in zip(table, logs):
        row[log["epoch"] + 1] = trailing_mean(log[column], smoothing(epochs))
    shown = np.isfinite(table).any(axis=0)
    if not shown.any():
        return
    table, at = table[:, shown], np.flatnonzero(shown) - 1
    axes.plot(at, np.nanmedian(table, axis=0), color=colour, linewidth=1.6, label=label)
    if len(logs) > 1:
        low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
        axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext

    shown = np.concatenate([np.asarray(line.get_ydata()) for line in axes.get_lines()] or [np.zeros(0)])
    shown = shown[shown > 0]
    if not len(shown):
        return
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(LogFormatterMathtext(minor_thresholds=(1.2, 0.5)))
    if shown.max() < 10 * shown.min():
        # Powers of ten do not tell such values apart.
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.tick_params(axis="y", which="both", labelsize="small")


def _save(figure: Any, panels: Sequence[Any], path: Path) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper center",
        ncols=max(1, len(entries)),
        frameon=False,
    )
    figure.savefig(path)


def draw_landscape(path: Path) -> None:
    """Draws the toy problem: the loss over the plane of parameters, and where R, M and C lead downhill."""
    figure = need_matplotlib()(figsize=(8.0, 2.9), dpi=DPI, layout="constrained")
    from matplotlib.colors import LogNorm

    count = 161
    loss = landscape(*grid(count)).loss.reshape(count, count)
    fields = landscape(*grid(17))
    panels = figure.subplots(1, 3, sharey=True)
    image = None
    # Behind the range the loss grows to 1e14; what matters lies around its valleys.
    norm = LogNorm(1e-3, 1e6, clip=True)
    shown = (("R", fields.regular), ("M", fields.modified), ("C", fields.combined))
    for axes, (letter, field) in zip(panels, shown):
        image = axes.imshow(
            loss,
            origin="lower",
            extent=(-EXTENT, EXTENT) * 2,
            norm=norm,
            cmap="YlGnBu",
            interpolation="bilinear",
        )
        _arrows(axes, fields, field)
        axes.set_title(f"flow {letter}", loc="left", fontsize="medium")
        axes.set_xlabel(r"$\theta_1$")
        axes.set_xlim(-EXTENT, EXTENT)
        axes.set_ylim(-EXTENT, EXTENT)
    panels[0].set_ylabel(r"$\theta_2$")
    figure.colorbar(image, ax=panels, label="loss", extend="both", shrink=0.85, pad=0.02)
    figure.savefig(path)


def _arrows(axes: Any, fields: Landscape, field: np.ndarray) -> None:
    length = np.linalg.norm(field, axis=1)
    moves = length > 0
    direction = -field[moves] / length[moves, None]
    at = fields.points[moves].T
    axes.quiver(
        *at, *direction.T, color="#B2182B", pivot="mid", angles="xy", scale_units="xy", scale=2.2, width=0.007
    )
    axes.plot(*fields.points[~moves].T, ".", color="#B2182B", markersize=2.5)


def draw_rotation(alone: Descent, combined: Descent, path: Path) -> None:
    """Draws the two descents of the rotation study: their ways in the plane, and their losses."""
    figure = need_matplotlib()(figsize=(8.0, 3.5), dpi=DPI, layout="constrained")
    plane, losses = figure.subplots(1, 2)
    axis = np.linspace(-4.8, 4.8, 161)
    p, q = np.meshgrid(axis, axis)
    plane.contour(p, q, p**2 + q**2, levels=[1, 4, 9, 16, 25], colors="0.85", linewidths=0.8)
    for descent, label, colour in (
        (alone, "the turning field alone", COLOURS[1]),
        (combined, "combined with the gradient", COLOURS[2]),
    ):
        plane.plot(*descent.points.T, color=colour, linewidth=1.4)
        plane.plot(*descent.points[-1], "o", color=colour, markersize=5)
        losses.plot(descent.loss, color=colour, linewidth=1.6, label=f"{label}: {descent.loss[-1]:.2g}")
    plane.plot(*alone.points[0], "s", color="0.2", markersize=5)
    plane.set_aspect("equal")
    plane.set_xlabel(r"$\theta_1$")
    plane.set_ylabel(r"$\theta_2$")
    losses.set_yscale("log")
    losses.set_xlabel("step")
    losses.set_ylabel("loss")
    losses.legend(frameon=False, fontsize="small")
    for axes in (plane, losses):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)

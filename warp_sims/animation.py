"""Animations of controlled systems, as GIF or MP4."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .flows import Flow
from .plots import COLOURS, need_matplotlib
from .rollouts import rollout
from .runs import load_run, read_config
from .systems import System

PANEL_PIXELS = 480
TITLE_PIXELS = 36
AXES_WIDTH = 0.92  # of a panel
DPI = 100
HOLD_SECONDS = 1.0  # how long the last picture stays
FIXED_VIEW = 1.8  # how much wider than one frame's view a picture may be before it follows the system instead
FORMATS = (".gif", ".mp4")
View = tuple[tuple[float, float], tuple[float, float]]  # limits of x, of y
Source = Any  # a run folder, a tensor of states, or a mapping of either; spelled out in `animate`


@dataclass(frozen=True, eq=False)
class _Panel:
    title: str
    system: Any
    states: np.ndarray  # (frames, state_size)


def animate(
    source: Source,
    out: str | os.PathLike[str] | None = None,
    *,
    system: System | None = None,
    policy: torch.nn.Module | None = None,
    world: int = 0,
    horizon: int | None = None,
    checkpoint: str = "best",
    fps: float = 25.0,
) -> Path:
    """Draws a controlled system over time.

    A system that has a method `draw(axes, state)` is drawn by it, any other as curves of its state
    components.

    Args:
        source: A run folder, whose controller is let loose on a test state; or states of shape (steps + 1,
            nworld, state_size) or (steps + 1, state_size), as a rollout returns them, with `system`. A
            mapping from titles to these is drawn side by side.
        out: The file to write, `.gif` or `.mp4`. None: `animation.gif` in the run folder.
        system: The system of states, or of a run whose system cannot be imported.
        policy: The policy of a run whose config.json cannot say how it was made.
        world: Which test state, or which world of the states.
        horizon: Steps of a run's rollout. None: as many as it was trained with.
        checkpoint: A run's weights: "best", "last" or "first".
        fps: Pictures per second of the animation; each is one time step.

    Returns:
        The file.
    """
    sources = dict(source) if isinstance(source, Mapping) else {"": source}
    if not sources:
        raise ValueError("animate: source is empty, expected a run folder or states")
    if out is None:
        first = next(iter(sources.values()))
        if isinstance(first, (torch.Tensor, np.ndarray)):
            raise ValueError("animate: states have no folder of their own; give out='animation.gif'")
        out = Path(first) / "animation.gif"
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"animate: out={str(path)!r} ends in {path.suffix!r}, expected .gif or .mp4")
    if not fps > 0:
        raise ValueError(f"animate: fps={fps!r}, expected a number above 0")
    panels = [
        _states_panel(title, part, system, world)
        if isinstance(part, (torch.Tensor, np.ndarray))
        else _run_panel(title, part, system, policy, world, horizon, checkpoint)
        for title, part in sources.items()
    ]
    _write(path, _frames(panels), fps)
    return path


def _states_panel(title: str, states: torch.Tensor | np.ndarray, system: System | None, world: int) -> _Panel:
    if system is None:
        raise ValueError("animate: states were given without their system; give it as system=…")
    array = states.detach().cpu().numpy() if isinstance(states, torch.Tensor) else states
    if array.ndim == 2:
        array = array[:, None]
    if array.ndim != 3 or array.shape[2] != system.state_size or not array.shape[0]:
        raise ValueError(
            f"animate: states have shape {tuple(states.shape)}, expected (steps + 1, nworld, "
            f"{system.state_size}) or (steps + 1, {system.state_size}); give out.states of a rollout"
        )
    if not 0 <= world < array.shape[1]:
        raise ValueError(f"animate: world={world}, expected 0 to {array.shape[1] - 1}")
    array = array[:, world]
    if not np.isfinite(array).all():
        step = int(np.argmin(np.isfinite(array).all(axis=1)))
        raise ValueError(f"animate: the state of step {step} is not finite; give finite states")
    return _Panel(title, system, array)


def _run_panel(
    title: str,
    path: str | os.PathLike[str],
    system: System | None,
    policy: torch.nn.Module | None,
    world: int,
    horizon: int | None,
    checkpoint: str,
) -> _Panel:
    read_config(path)  # says what is wrong with the folder before anything is built
    config, policy, _ = load_run(path, checkpoint=checkpoint, system=system, policy=policy, loss=_no_loss)
    if not 0 <= world < config.samples:
        raise ValueError(
            f"animate: world={world}, expected one of the run's {config.samples} test states, from 0"
        )
    x0 = config.system.initial_states(config.samples, seed=config.seed, split="test")[world : world + 1]
    x0 = x0.to(dtype=config.torch_dtype, device=str(config.device))
    with torch.no_grad():
        states = rollout(
            config.system, policy, x0, horizon=horizon or config.horizon, flow=Flow.REGULAR, loss=None
        ).states
    name = config.flow.name.lower() if isinstance(config.flow, Flow) else "schedule"
    return _states_panel(title or f"flow {name}", states, config.system, 0)


def _no_loss(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """Stands in for a run's own loss, which an animation does not need."""
    return states.new_zeros(())


def _frames(panels: list[_Panel]) -> Iterator[np.ndarray]:
    """Yields one picture (height, width, 3) per step."""
    figure_class = need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    scratch = figure_class().subplots()
    views = [_views(scratch, panel) if hasattr(panel.system, "draw") else None for panel in panels]
    shape = max(0.75 if view is None else _height_by_width(view[0]) for view in views)
    width, height = PANEL_PIXELS * len(panels), _video_size(PANEL_PIXELS * shape * AXES_WIDTH + TITLE_PIXELS)
    figure = figure_class(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    all_axes = [
        figure.add_axes(
            (
                (i + (1 - AXES_WIDTH) / 2) / len(panels),
                0.01,
                AXES_WIDTH / len(panels),
                0.98 - TITLE_PIXELS / height,
            )
        )
        for i in range(len(panels))
    ]
    for axes, panel, view in zip(all_axes, panels, views, strict=True):
        if view is None:
            axes.set_position(
                (
                    axes.get_position().x0 + 0.08 / len(panels),
                    0.13,
                    axes.get_position().width - 0.08 / len(panels),
                    0.76,
                )
            )
            _draw_curves(axes, panel)
    for step in range(max(len(panel.states) for panel in panels)):
        for axes, panel, view in zip(all_axes, panels, views, strict=True):
            at = min(step, len(panel.states) - 1)
            if view is None:
                axes.get_lines()[-1].set_xdata([at * _dt(panel)] * 2)
            else:
                axes.clear()
                panel.system.draw(axes, panel.states[at])
                axes.set_xlim(*view[at][0])
                axes.set_ylim(*view[at][1])
            axes.set_title(f"{panel.title}   t = {at * _dt(panel):.2f} s".strip(), fontsize=12)
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _views(axes: Any, panel: _Panel) -> list[View]:
    """Returns the limits of each frame: those that hold all frames, or each its own if that were wide."""
    views: list[View] = []
    for state in panel.states:
        axes.clear()
        panel.system.draw(axes, state)
        views.append((axes.get_xlim(), axes.get_ylim()))
    corners = np.array(views)
    low, high = corners[:, :, 0].min(axis=0), corners[:, :, 1].max(axis=0)
    sizes = (corners[:, :, 1] - corners[:, :, 0]).max(axis=0)
    if (high - low > FIXED_VIEW * sizes).any():
        return views
    return [((low[0], high[0]), (low[1], high[1]))] * len(views)


def _height_by_width(view: View) -> float:
    (left, right), (bottom, top) = view
    return min(1.5, (top - bottom) / (right - left))


def _video_size(pixels: float) -> int:
    """Returns the next size that 16 divides, which video codecs want."""
    return 16 * math.ceil(pixels / 16)


def _draw_curves(axes: Any, panel: _Panel) -> None:
    times = np.arange(len(panel.states)) * _dt(panel)
    count = panel.states.shape[1]
    for i, colour in zip(range(count), itertools.cycle(COLOURS)):
        axes.plot(times, panel.states[:, i], color=colour, linewidth=1.4, label=f"state {i}")
    if count <= len(COLOURS):
        axes.legend(frameon=False, fontsize="small")
    axes.set_xlabel("time [s]")
    axes.grid(True, color="0.9")
    axes.axvline(0.0, color="0.3", linewidth=1.2)


def _dt(panel: _Panel) -> float:
    return float(getattr(panel.system, "dt", 1.0))


def _write(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    try:
        import imageio.v2 as imageio
    except ImportError as error:
        raise ImportError('animations need imageio; pip install "warp-sims[cli]"') from error
    partial = path.with_name(f".partial-{path.name}")
    try:
        if path.suffix.lower() == ".gif":
            writer: Any = imageio.get_writer(partial, mode="I", duration=1000.0 / fps, loop=0)
        else:
            writer = imageio.get_writer(partial, fps=fps, codec="libx264", quality=8)
        with writer:
            for frame in frames:
                writer.append_data(frame)
            for _ in range(round(fps * HOLD_SECONDS)):
                writer.append_data(frame)
        os.replace(partial, path)
    except OSError as error:
        raise type(error)(
            f"animate: {path} cannot be written ({error.strerror or error}); give another out"
        ) from error
    finally:
        partial.unlink(missing_ok=True)

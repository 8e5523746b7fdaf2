"""Animations of controlled systems, as GIF or MP4."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..actor_critic.folder import load_actor
from ..kernels.flow import Flow
from ..rollouts import Rollout, rollout
from ..systems import System
from ..training.inputs import draw_inputs
from ..training.runs import ACTOR_CRITIC, is_run, load_run, read_config
from .plots import COLOURS, need_matplotlib

PANEL_PIXELS = 480
TITLE_PIXELS = 36
CONTROL_PIXELS = 96  # of the strip that shows controls
AXES_WIDTH = 0.92  # of a panel
DPI = 100
HOLD_SECONDS = 1.0  # how long the last picture stays
FREE_SHAPE = 0.62  # height by width of a picture whose axes have no common scale
FIXED_VIEW = 1.8  # how much wider than one frame's view a picture may be before it follows the system instead
FORMATS = (".gif", ".mp4")
EPISODE_STEPS = 240  # steps of an episode that are drawn, unless more are asked for
View = tuple[tuple[float, float], tuple[float, float]]  # limits of x, of y
Source = Any  # a run folder, a rollout, a tensor of states, or a mapping of these; spelled out in `animate`


@dataclass(frozen=True, eq=False)
class _Panel:
    title: str
    system: Any
    states: np.ndarray  # (frames, state_size)
    controls: np.ndarray | None = None  # (frames - 1, control_size), where they are to be shown


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

    A system with a method `draw(axes, state)` draws itself; any other is drawn as curves of its state
    components. If the system's `show_controls` is true, the controls over time are below.

    Args:
        source: A run folder, whose controller starts from a test state; or, with `system`, what `ws.rollout`
            returned, or states of shape (steps + 1, nworld, state_size) or (steps + 1, state_size). A mapping
            from titles to these is drawn side by side.
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
        if isinstance(first, (torch.Tensor, np.ndarray, Rollout)):
            raise ValueError("animate: states have no folder of their own; give out='animation.gif'")
        out = Path(first) / "animation.gif"
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"animate: out={str(path)!r} ends in {path.suffix!r}, expected .gif or .mp4")
    if not fps > 0:
        raise ValueError(f"animate: fps={fps!r}, expected a number above 0")
    panels = [
        _states_panel(title, part, system, world)
        if isinstance(part, (torch.Tensor, np.ndarray, Rollout))
        else _run_panel(title, part, system, policy, world, horizon, checkpoint)
        for title, part in sources.items()
    ]
    _write(path, _frames(panels), fps)
    return path


def _states_panel(
    title: str, source: torch.Tensor | np.ndarray | Rollout, system: System | None, world: int
) -> _Panel:
    if system is None:
        raise ValueError("animate: states were given without their system; give it as system=…")
    states, controls = (source.states, source.controls) if isinstance(source, Rollout) else (source, None)
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
    if controls is None or not getattr(system, "show_controls", False):
        return _Panel(title, system, array)
    return _Panel(title, system, array, controls.detach().cpu().numpy()[:, world])


def _run_panel(
    title: str,
    path: str | os.PathLike[str],
    system: System | None,
    policy: torch.nn.Module | None,
    world: int,
    horizon: int | None,
    checkpoint: str,
) -> _Panel:
    if policy is None and is_run(path, ACTOR_CRITIC):
        return _actor_panel(title, path, system, world, horizon, checkpoint)
    read_config(path)  # says what is wrong with the folder before anything is built
    config, policy, _ = load_run(
        path, checkpoint=checkpoint, system=system, policy=policy, loss=_no_loss, combiner=_no_loss
    )
    if not 0 <= world < config.samples:
        raise ValueError(
            f"animate: world={world}, expected one of the run's {config.samples} test states, from 0"
        )
    x0 = config.system.initial_states(config.samples, seed=config.seed, split="test")[world : world + 1]
    x0 = x0.to(dtype=config.torch_dtype, device=str(config.device))
    with torch.no_grad():
        out = rollout(
            config.system,
            policy,
            x0,
            horizon=horizon or config.horizon,
            flow=Flow.REGULAR,
            loss=None,
            inputs=draw_inputs(config, x0, "animation", horizon),
        )
    name = config.flow.name.lower() if isinstance(config.flow, Flow) else "schedule"
    return _states_panel(title or f"flow {name}", out, config.system, 0)


def _actor_panel(
    title: str,
    path: str | os.PathLike[str],
    system: System | None,
    world: int,
    horizon: int | None,
    checkpoint: str,
) -> _Panel:
    """The actor of `ws.train_actor_critic`, without noise, in an episode of the evaluation."""
    config, actor, _ = load_actor(path, checkpoint=checkpoint, system=system)
    if not 0 <= world < config.eval_worlds:
        raise ValueError(
            f"animate: world={world}, expected one of the {config.eval_worlds} episodes of an evaluation"
        )
    x0 = config.system.initial_states(
        config.eval_worlds, seed=config.seed, split="test", dtype=config.torch_dtype
    )[world : world + 1]
    steps = horizon or min(config.system.episode_steps, EPISODE_STEPS)
    with torch.no_grad():
        out = rollout(config.system, actor, x0, horizon=steps, flow=Flow.REGULAR, loss=None)
    return _states_panel(title or f"flow {config.settings()['flow']}", out, config.system, 0)


def _no_loss(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """Replaces a run's own loss, which an animation does not need."""
    return states.new_zeros(())


def _frames(panels: list[_Panel]) -> Iterator[np.ndarray]:
    """Yields one picture (height, width, 3) per step."""
    figure_class = need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    views, shapes = zip(*(_views(figure_class().subplots(), panel) for panel in panels), strict=True)
    strip = CONTROL_PIXELS if any(panel.controls is not None for panel in panels) else 0
    width = PANEL_PIXELS * len(panels)
    height = _video_size(PANEL_PIXELS * max(shapes) * AXES_WIDTH + TITLE_PIXELS + strip)
    figure = figure_class(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    all_axes = [
        figure.add_axes(
            (
                (i + (1 - AXES_WIDTH) / 2) / len(panels),
                0.01 + strip / height,
                AXES_WIDTH / len(panels),
                0.98 - (TITLE_PIXELS + strip) / height,
            )
        )
        for i in range(len(panels))
    ]
    cursors = [
        _add_controls(figure, axes, panel, height) for axes, panel in zip(all_axes, panels, strict=True)
    ]
    for axes, panel, view in zip(all_axes, panels, views, strict=True):
        if view is None:
            axes.set_position(
                (
                    axes.get_position().x0 + 0.08 / len(panels),
                    0.13 + strip / height,
                    axes.get_position().width - 0.08 / len(panels),
                    0.76 - strip / height,
                )
            )
            _draw_curves(axes, panel)
    for step in range(max(len(panel.states) for panel in panels)):
        for axes, panel, view, show in zip(all_axes, panels, views, cursors, strict=True):
            at = min(step, len(panel.states) - 1)
            show(at)
            if view is None:
                axes.get_lines()[-1].set_xdata([at * _dt(panel)] * 2)
            else:
                axes.clear()
                panel.system.draw(axes, panel.states[at])
                axes.set_xlim(*view[at][0])
                axes.set_ylim(*view[at][1])
            axes.set_title(f"{panel.title}   t = {at * _dt(panel):.2f}".strip(), fontsize=12)
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _views(axes: Any, panel: _Panel) -> tuple[list[View] | None, float]:
    """Returns the limits of each frame and the height of the picture by its width.

    The limits are those that hold all frames, or each frame's own if these were wide; None where the system
    has no drawing.
    """
    if not hasattr(panel.system, "draw"):
        return None, 0.75
    views: list[View] = []
    for state in panel.states:
        axes.clear()
        panel.system.draw(axes, state)
        views.append((axes.get_xlim(), axes.get_ylim()))
    corners = np.array(views)
    low, high = corners[:, :, 0].min(axis=0), corners[:, :, 1].max(axis=0)
    sizes = (corners[:, :, 1] - corners[:, :, 0]).max(axis=0)
    if not (high - low > FIXED_VIEW * sizes).any():
        views = [((low[0], high[0]), (low[1], high[1]))] * len(views)
    return views, FREE_SHAPE if axes.get_aspect() == "auto" else _height_by_width(views[0])


def _height_by_width(view: View) -> float:
    (left, right), (bottom, top) = view
    return min(1.5, (top - bottom) / (right - left))


def _add_controls(figure: Any, above: Any, panel: _Panel, height: int) -> Callable[[int], None]:
    """Adds the controls over time below a picture, and returns what moves them on to a step."""
    if panel.controls is None:
        return lambda step: None
    box = above.get_position()
    bottom, top = (pixels / height for pixels in (30, CONTROL_PIXELS - 14))
    axes = figure.add_axes((box.x0 + 0.06 * box.width, bottom, 0.94 * box.width, top - bottom))
    # A control holds for a whole step: the last one is drawn up to its end.
    held = np.concatenate([panel.controls, panel.controls[-1:]])
    times = np.arange(len(held)) * _dt(panel)
    lines = []
    for control, colour in zip(held.T, itertools.cycle(COLOURS)):
        axes.step(times, control, where="post", color="0.85", linewidth=1.0)
        lines += axes.step(times[:1], control[:1], where="post", color=colour, linewidth=1.6)
    axes.set_xlim(0.0, times[-1])
    axes.set_xlabel("time", fontsize=8, color="0.35", labelpad=1)
    axes.set_title("control", fontsize=8, color="0.35", loc="left", pad=2)
    axes.tick_params(color="0.55", labelcolor="0.45", labelsize=7)
    axes.locator_params(axis="y", nbins=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

    def show(step: int) -> None:
        for line, control in zip(lines, held.T, strict=True):
            line.set_data(times[: step + 1], control[: step + 1])

    return show


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

"""Animations: what is drawn, how many pictures, and what is refused."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import warp_sims as ws

pytest.importorskip("matplotlib")
imageio = pytest.importorskip("imageio.v2")

from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from warp_sims.pictures.drawing import (  # noqa: E402
    DRIVER_COLOUR,
    EVADER_COLOUR,
    POLE_COLOURS,
    WAVE_COLOUR,
)
from warp_sims.pictures.plots import plot_curves, trailing_mean  # noqa: E402
from warp_sims.training.runs import LOG_COLUMNS  # noqa: E402

SYSTEM = ws.CartPole(poles=2)


def swing(steps=4, nworld=2):
    """States in which the first pole goes from hanging to upright, and the second stays level."""
    states = torch.zeros(steps + 1, nworld, SYSTEM.state_size)
    states[:, :, 2] = torch.linspace(math.pi, 0.0, steps + 1)[:, None]
    states[:, :, 4] = math.pi / 2
    return states


@pytest.fixture
def run(tmp_path):
    system = ws.CartPole(poles=1)
    policy = ws.MLP(system.state_size, (8,), system.control_size)
    policy.reset_parameters(seed=0)
    config = ws.TrainConfig(
        system=system, policy=policy, flow="modified", horizon=5, samples=8, batch=4, epochs=1
    )
    return ws.train(config, tmp_path / "run", progress=False).path


def pole_lines(axes, colour):
    return [line.get_xydata() for line in axes.get_lines() if line.get_color() == colour]


def test_angle_zero_is_up_and_positive_leans_right():
    axes = Figure().subplots()
    state = np.array([0.3, 0.0, 0.0, 1.0, math.pi / 2, 1.0], dtype=np.float32)
    SYSTEM.draw(axes, state)
    (upright, tip), (right, _) = pole_lines(axes, POLE_COLOURS[0]), pole_lines(axes, POLE_COLOURS[1])
    # a pole is twice `pole_length`, which is half of one
    np.testing.assert_allclose(upright[1] - upright[0], [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(tip[0], [0.3, 1.0], atol=1e-6)
    np.testing.assert_allclose(right[1] - right[0], [1.0, 0.0], atol=1e-6)
    assert axes.get_aspect() == 1.0


def test_gif_has_a_picture_per_state_and_every_pole_in_its_colour(tmp_path):
    path = ws.animate(swing(), tmp_path / "swing.gif", system=SYSTEM, fps=10)
    assert path == tmp_path / "swing.gif"
    frames = imageio.mimread(path)
    # five states; the last one stays for a second, as one picture or as several
    assert 5 <= len(frames) <= 15
    assert frames[0].shape[0] % 16 == 0
    assert frames[0].shape[1] == 480
    for frame in (frames[0], frames[4]):
        for colour in POLE_COLOURS[:2]:
            distance = np.abs(frame[:, :, :3] / 255.0 - to_rgb(colour)).max(axis=2)
            assert (distance < 0.15).sum() > 100, "a pole covers some hundred pixels"
    first, last = (
        np.abs(f[:, :, :3] / 255.0 - to_rgb(POLE_COLOURS[0])).max(axis=2) < 0.15
        for f in (frames[0], frames[4])
    )
    assert np.argwhere(first)[:, 0].mean() > np.argwhere(last)[:, 0].mean() + 50, "the first pole went up"


def test_a_run_is_drawn_into_its_folder(run):
    path = ws.animate(run)
    assert path == run / "animation.gif"
    assert len(imageio.mimread(path)) >= 6
    assert not list(run.glob(".partial*"))


def test_mp4_and_side_by_side(run, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    path = ws.animate({"left": run, "right": str(run)}, tmp_path / "both.mp4", fps=5, horizon=3)
    frames = imageio.mimread(path)
    assert len(frames) == 4 + 5
    assert frames[0].shape[1] == 2 * 480


def test_horizon_and_world_choose_what_is_drawn(run, tmp_path):
    def last_picture(**options):
        return imageio.mimread(ws.animate(run, tmp_path / "a.gif", fps=1, **options))[-1].astype(int)

    base = last_picture(horizon=1)
    assert np.abs(base - last_picture(horizon=1)).max() == 0
    assert np.abs(base - last_picture(horizon=1, world=3)).max() > 100


@dataclasses.dataclass(frozen=True)
class Undrawn:
    """Only what an animation asks of a system."""

    state_size: int = 3
    dt: float = 0.5


def test_a_system_without_a_drawing_is_shown_as_curves(tmp_path):
    states = np.stack([np.arange(4.0), np.arange(4.0) ** 2, np.ones(4)], axis=1)
    path = ws.animate(states, tmp_path / "curves.gif", system=Undrawn(), fps=1)
    frames = [f.astype(int) for f in imageio.mimread(path)]
    assert len(frames) >= 4
    assert np.abs(frames[0] - frames[2]).max() > 100, "a line marks the time"


@pytest.mark.parametrize(
    ("source", "options", "kind", "words"),
    [
        (swing(), {"out": "a.gif"}, ValueError, "system="),
        (swing(), {"system": SYSTEM}, ValueError, "out="),
        (swing(), {"system": SYSTEM, "out": "a.avi"}, ValueError, "expected .gif or .mp4"),
        (swing(), {"system": SYSTEM, "out": "a.gif", "world": 2}, ValueError, "world=2, expected 0 to 1"),
        (swing(), {"system": SYSTEM, "out": "a.gif", "fps": 0}, ValueError, "fps=0"),
        (
            swing()[..., :4],
            {"system": SYSTEM, "out": "a.gif"},
            ValueError,
            "(5, 2, 4), expected (steps + 1, nworld, 6)",
        ),
        (swing() * math.nan, {"system": SYSTEM, "out": "a.gif"}, ValueError, "step 0 is not finite"),
        ({}, {"out": "a.gif"}, ValueError, "empty"),
        ("missing", {}, FileNotFoundError, "missing does not exist"),
    ],
)
def test_wrong_input_is_named_and_writes_nothing(source, options, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as error:
        ws.animate(source, **options)
    assert words in str(error.value)
    assert list(Path().iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        ws.animate(swing(), tmp_path / "missing" / "a.gif", system=SYSTEM)


def test_trailing_mean_is_padded_with_the_first_value_and_leaves_gaps_out():
    np.testing.assert_allclose(trailing_mean(np.array([2.0, 4.0, 9.0]), 2), [2.0, 3.0, 6.5])
    np.testing.assert_allclose(trailing_mean(np.array([2.0, 4.0, 9.0]), 3), [2.0, 8 / 3, 5.0])
    np.testing.assert_allclose(trailing_mean(np.array([2.0, math.nan, 9.0]), 2), [2.0, 2.0, 9.0])
    assert trailing_mean(np.array([]), 30).size == 0


@pytest.mark.parametrize("names", [("regular",), ("regular", "combined")])
def test_curves_are_drawn_for_one_run_and_for_several(names, tmp_path):
    epochs = np.arange(-1, 60)
    columns = {name: (i + 1) * np.exp(-epochs / 20.0) for i, name in enumerate(LOG_COLUMNS)} | {
        "epoch": epochs
    }
    columns["grad_norm"] = np.where(epochs < 0, math.nan, columns["grad_norm"])
    logs = {name: columns | {"loss_test": (i + 1) * columns["loss_test"]} for i, name in enumerate(names)}
    path = plot_curves(logs, tmp_path / "curves.png")
    picture = imageio.imread(path)
    blue = np.abs(picture[:, :, :3] / 255.0 - to_rgb("#0072B2")).max(axis=2) < 0.05
    assert blue.sum() > 500, "the first curve is there in full colour"
    assert path.read_bytes()[:4] == b"\x89PNG"


def pixels_of(picture, colour):
    """How many pixels have a colour."""
    return int((np.abs(picture[:, :, :3] / 255.0 - to_rgb(colour)).max(axis=2) < 0.15).sum())


def test_a_herd_is_drawn_in_the_plane(tmp_path):
    system = ws.GuidanceByRepulsion(drivers=2, evaders=3)
    axes = Figure().subplots()
    state = system.initial_states(1)[0].numpy()
    system.draw(axes, state)
    drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    np.testing.assert_allclose(drawn["driver"], state.reshape(-1, 4)[:2, :2], atol=1e-6)
    np.testing.assert_allclose(drawn["evader"], state.reshape(-1, 4)[2:, :2], atol=1e-6)
    limits = axes.get_xlim()
    axes.clear()
    state[:2] = 30.0, -1.0  # a driver that runs away stays at the edge, the view where it is
    system.draw(axes, state)
    assert axes.get_xlim() == limits == (-axes.get_xlim()[1], axes.get_xlim()[1])
    drawn = [line.get_xydata() for line in axes.get_lines() if line.get_label() == "driver"]
    assert len(drawn[0]) == 1

    out = ws.rollout(system, ws.MLP(20, (4,), 4), system.initial_states(2), horizon=3, loss=None)
    frames = imageio.mimread(ws.animate(out, tmp_path / "herd.gif", system=system, fps=5))
    assert frames[0].shape[0] == frames[0].shape[1] == 480
    for colour in (DRIVER_COLOUR, EVADER_COLOUR):
        assert all(pixels_of(frame, colour) > 100 for frame in frames)


def test_a_wave_is_drawn_above_the_controls(tmp_path):
    system = ws.QuantumControl(points=9, target=2)
    axes = Figure().subplots()
    e = system.eigenstate(2)
    system.draw(axes, np.stack([0.6 * e, 0.8 * e], axis=1).ravel())
    target, density = (line.get_xydata() for line in axes.get_lines())
    np.testing.assert_allclose(target, density, atol=1e-12)
    assert density[:, 1].sum() * system.dx == pytest.approx(1.0), "a probability"
    assert density[[0, -1]].tolist() == [[0.0, 0.0], [system.length, 0.0]], "the walls"

    policy = ws.WaveCNN(9, 4)
    out = ws.rollout(system, policy, system.initial_states(2), horizon=6, loss=None)
    with_strip = imageio.mimread(ws.animate(out, tmp_path / "wave.gif", system=system, fps=5))
    without = imageio.mimread(ws.animate(out.states, tmp_path / "plain.gif", system=system, fps=5))
    assert with_strip[0].shape[0] > without[0].shape[0]
    strip = with_strip[0].shape[0] - without[0].shape[0]
    shown = [pixels_of(frame[-strip:], WAVE_COLOUR) for frame in with_strip]
    assert shown[0] < shown[3] < shown[6], "the controls grow with time"
    other = imageio.mimread(ws.animate(out, tmp_path / "other.gif", system=system, world=1, fps=5))
    assert np.abs(other[3].astype(int) - with_strip[3]).max() > 100

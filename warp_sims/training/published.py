"""The experiments of the paper: every setting of the published scripts, and the runs that they make.

Source: Schnell and Thuerey, "Stabilizing Backpropagation Through Time to Learn Complex Physics", ICLR 2024,
and the scripts published with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.flow import Flow
from ..policies.networks import MLP, WaveCNN
from ..systems import CartPole, GuidanceByRepulsion, QuantumControl, System
from .config import CLIPS, TrainConfig

EPOCHS = 1000
FLOWS = (Flow.REGULAR, Flow.MODIFIED, Flow.STOPPED, Flow.COMBINED)
POLES = (1, 2, 3, 4)
COSTS = (1.0, 0.1, 0.01, 0.001)
TARGETS = (3, 4, 5)


@dataclass(frozen=True)
class Setting:
    """One panel of a figure: a problem with the numbers that the paper varies."""

    problem: str
    name: str
    """Of its folder."""
    title: str
    """Of its panel."""
    system: System
    horizon: int
    loss: str
    control_cost: float
    zero_last: bool
    """Whether the controller starts at zero. The quantum script zeroes a bias that is zero already: it does
    not.
    """

    def policy(self, seed: int) -> MLP | WaveCNN:
        """Returns the published controller with the initial weights of a seed."""
        policy = (
            WaveCNN(self.system.points, 60)
            if isinstance(self.system, QuantumControl)
            else MLP(self.system.state_size, (100, 100), self.system.control_size)
        )
        policy.reset_parameters(seed=seed, zero_last=self.zero_last)
        return policy


def _settings() -> dict[str, dict[str, Setting]]:
    made = [
        Setting(
            "cartpole", f"poles{n}", f"{n} pole{'s' * (n > 1)}", CartPole(poles=n), 100, "final", 0.0, True
        )
        for n in POLES
    ]
    made += [
        Setting(
            "guidance", f"cost{c:g}", f"control cost {c:g}", GuidanceByRepulsion(), 60, "running", c, True
        )
        for c in COSTS
    ]
    made += [
        Setting(
            "quantum", f"target{n}", f"target state {n}", QuantumControl(target=n), 128, "running", 0.0, False
        )
        for n in TARGETS
    ]
    return {p: {s.name: s for s in made if s.problem == p} for p in ("cartpole", "guidance", "quantum")}


SETTINGS = _settings()
"""By problem and name."""


@dataclass(frozen=True)
class Scale:
    """How much of an experiment is run. All runs of one folder share it."""

    epochs: int = EPOCHS
    horizon: int | None = None
    """None: the published one. The command line leaves this and `samples` alone."""
    samples: int | None = None


@dataclass(frozen=True)
class Job:
    """One run of the matrix: a setting, a flow, a clip and a seed of the initial weights."""

    problem: str
    setting: str
    flow: str
    """Its name in lower case."""
    clip: str
    seed: int

    @property
    def label(self) -> str:
        """What progress and errors call it; its folder too."""
        return f"{self.problem}/{self.setting}/{self.flow}_{self.clip}/seed{self.seed}"

    def folder(self, out: Path) -> Path:
        """The run folder below `out`."""
        return out.joinpath(*self.label.split("/"))

    def config(self, scale: Scale) -> TrainConfig:
        """Returns what is trained: the published settings, and the published data whatever the seed."""
        setting = SETTINGS[self.problem][self.setting]
        return TrainConfig(
            system=setting.system,
            policy=setting.policy(self.seed),
            flow=self.flow,
            horizon=scale.horizon or setting.horizon,
            loss=setting.loss,
            control_cost=setting.control_cost,
            samples=scale.samples or 256,
            batch=8,
            epochs=scale.epochs,
            optimizer="adam",
            lr=1e-3,
            clip=self.clip,
            clip_at=1.0,
            seed=42,
        )


def make_jobs(
    problems: Iterable[str],
    *,
    seeds: int,
    flows: Sequence[str | Flow] = FLOWS,
    clips: Sequence[str] = ("none",),
    poles: Sequence[int] = POLES,
    costs: Sequence[float] = COSTS,
    targets: Sequence[int] = TARGETS,
) -> list[Job]:
    """Returns the runs of a selection, seed by seed, so that all settings have a first run early.

    Raises:
        ValueError: The selection has something that the published scripts do not have, or it is empty.
    """
    if seeds < 1:
        raise ValueError(f"reproduce: seeds={seeds}, expected at least 1")
    chosen = {
        "cartpole": {f"poles{n}" for n in _known("poles", poles, POLES)},
        "guidance": {f"cost{c:g}" for c in _known("costs", costs, COSTS)},
        "quantum": {f"target{n}" for n in _known("targets", targets, TARGETS)},
    }
    parsed = [Flow.parse(flow) for flow in flows]
    letters = _known("flows", [f.name.lower() for f in parsed], [f.name.lower() for f in FLOWS])
    clips = _known("clips", clips, CLIPS)
    wanted = _known("problems", list(problems), list(SETTINGS))
    return [
        Job(problem, name, flow, clip, seed)
        for seed in range(seeds)
        for clip in clips
        for problem in wanted
        for name in SETTINGS[problem]
        if name in chosen[problem]
        for flow in letters
    ]


def _known(what: str, asked: Sequence[Any], known: Sequence[Any]) -> list[Any]:
    """Returns what is asked for in the order of what is known."""
    for value in asked:
        if value not in known:
            shown = ", ".join(map(str, known))
            raise ValueError(
                f"reproduce: {what} holds {value}, which was not published; expected some of {shown}"
            )
    if not asked:
        raise ValueError(f"reproduce: {what} is empty, expected at least one")
    return [value for value in known if value in asked]


def facts(setting: Setting, scale: Scale) -> list[tuple[str, str]]:
    """Returns the exact settings of a panel as name and value, for the report."""
    config = Job(setting.problem, setting.name, "regular", "none", 0).config(scale)
    names = ("horizon", "loss", "control_cost", "samples", "batch", "epochs", "optimizer", "lr")
    return [
        ("system", repr(setting.system)),
        ("controller", _controller(config.policy)),
        (
            "output layer starts",
            "at zero" if setting.zero_last else "Glorot-uniform, as the layers before it",
        ),
        *((name, str(getattr(config, name))) for name in names),
    ]


def _controller(policy: torch.nn.Module) -> str:
    parameters = sum(p.numel() for p in policy.parameters())
    if isinstance(policy, WaveCNN):
        return f"WaveCNN(points={policy.points}, width={policy.width}), {parameters} parameters"
    return f"MLP of two hidden layers of 100 tanh units, {parameters} parameters"

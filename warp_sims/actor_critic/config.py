"""The settings of an actor-critic run, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.flow import Flow, check_decay, schedule
from ..training.checks import real, whole
from .task import as_task

CALL = "ActorCriticConfig"
ALGORITHMS = ("shac",)


@dataclass(frozen=True, eq=False)
class ActorCriticConfig:
    """What is trained, on what and how. The defaults are SHAC's for the hopper, with AHAC's smaller networks.

    Attributes:
        system: A `ws.System` with episodes such as `ws.Hopper()`: it has observe(states), reward(states,
            controls), fallen(states) and episode_steps, and takes controls in [-1, 1].
        flow: Backward flow of the actor's gradient: a name, a letter or a `ws.Flow`; "regular" is SHAC.
        decay: Factor in [0, 1] on what crosses the physics edge backwards.
        window: Truncation window in steps. None: no truncation within the horizon.
        step_clip: Bound on the norm of the cotangent of a world's state, wherever it enters a step. None: no
            bound.
        worlds: Number of worlds; they continue from update to update.
        horizon: Steps of an update.
        updates: Number of updates.
        actor_hidden: Widths of the actor's hidden layers; SHAC's are 400 200 100.
        critic_hidden: Widths of the critic's hidden layers; SHAC's are 400 200 100.
        actor_lr: Learning rate of the actor in the first update.
        critic_lr: Learning rate of the critic in the first update.
        last_lr: Learning rate of both in the last update; they fall to it in equal steps.
        betas: Decay rates of Adam's moments.
        clip_at: Bound of the norm of either gradient.
        std: Standard deviation of the noise in the first update; it is learned.
        gamma: Discount factor of a step.
        trace: lambda of the critic's targets.
        critic_passes: Number of times that the critic is trained on the steps of an update.
        critic_batches: Number of mini-batches in each of these.
        target_keep: Share of its old weights that the target critic keeps after an update; the rest is the
            critic's.
        seed: Of weights, initial states and noise.
        device: "cpu", "cuda" or "cuda:INDEX".
        dtype: "float32" or "float64".
        log_every: Updates from one row of the log to the next.
        eval_every: Updates from one evaluation to the next; there is always one after the last update.
        eval_worlds: Number of whole episodes, without noise, in an evaluation.
        checkpoint_every: Updates from one writing of the checkpoints to the next.
    """

    system: Any
    flow: Flow | str = "regular"
    decay: float = 1.0
    window: int | None = None
    step_clip: float | None = None
    worlds: int = 1024
    horizon: int = 32
    updates: int = 500
    actor_hidden: tuple[int, ...] = (128, 64, 32)
    critic_hidden: tuple[int, ...] = (64, 64)
    actor_lr: float = 2e-3
    critic_lr: float = 5e-4
    last_lr: float = 1e-5
    betas: tuple[float, float] = (0.7, 0.95)
    clip_at: float = 1.0
    std: float = math.exp(-1.0)
    gamma: float = 0.99
    trace: float = 0.95
    critic_passes: int = 16
    critic_batches: int = 4
    target_keep: float = 0.99
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    log_every: int = 5
    eval_every: int = 25
    eval_worlds: int = 64
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        as_task(self.system, CALL)
        counts = (
            "worlds",
            "horizon",
            "updates",
            "critic_passes",
            "critic_batches",
            "log_every",
            "eval_every",
            "eval_worlds",
            "checkpoint_every",
        )
        for name in counts:
            self._set(name, whole(CALL, name, getattr(self, name), 1))
        self._set("seed", whole(CALL, "seed", self.seed, 0))
        for name in ("actor_hidden", "critic_hidden"):
            widths = getattr(self, name)
            if isinstance(widths, (str, bytes)) or not hasattr(widths, "__iter__"):
                raise TypeError(f"{CALL}: {name}={widths!r}, expected widths such as (128, 64, 32)")
            self._set(name, tuple(whole(CALL, name, width, 1) for width in widths))
        for name in ("actor_lr", "critic_lr", "last_lr", "clip_at", "std"):
            self._set(name, real(CALL, name, getattr(self, name), 0.0, math.inf, above=True))
        for name in ("gamma", "trace", "target_keep"):
            self._set(name, real(CALL, name, getattr(self, name), 0.0, 1.0))
        if self.step_clip is not None:
            self._set("step_clip", real(CALL, "step_clip", self.step_clip, 0.0, math.inf, above=True))
        betas = tuple(self.betas)
        if len(betas) != 2:
            raise ValueError(f"{CALL}: betas={self.betas!r}, expected two numbers")
        self._set("betas", tuple(real(CALL, "betas", beta, 0.0, 1.0) for beta in betas))
        self._set("decay", check_decay(self.decay, CALL))
        if not isinstance(self.flow, str):
            raise TypeError(f"{CALL}: flow={self.flow!r}, expected a name, a letter or a ws.Flow")
        schedule(self.flow, self.horizon, self.window, CALL)
        self._set("flow", Flow.parse(self.flow))
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"{CALL}: dtype={self.dtype!r}, expected 'float32' or 'float64'")
        if self.worlds * self.horizon < self.critic_batches:
            raise ValueError(
                f"{CALL}: critic_batches={self.critic_batches}, expected at most worlds * horizon = "
                f"{self.worlds * self.horizon}"
            )
        try:
            where = torch.zeros(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{CALL}: device={self.device!r} cannot be used ({error}); give cpu, cuda or cuda:INDEX"
            ) from error
        self._set("device", str(where))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the run as torch's own."""
        return torch.float32 if self.dtype == "float32" else torch.float64

    def settings(self) -> dict[str, Any]:
        """Every field but the system, as JSON holds them."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "system"}
        assert isinstance(self.flow, Flow)
        return found | {"flow": self.flow.name.lower()}

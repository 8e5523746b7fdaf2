"""The settings of one training run, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..estimators import Anneal, Combiner, PerSecond, clip_of, decay_of
from ..kernels.flow import MOST_STEPS, Flow, schedule
from ..policies.ensembles import Ensemble
from ..policies.gaussian import GaussianPolicy
from ..systems import System
from .checks import real, whole
from .optimizers import ON_HOST, OPTIMIZERS

CLIPS = ("none", "value", "norm")
LOSSES = ("final", "running")
ON_DIVERGENCE = ("stop", "skip")


@dataclass(frozen=True, eq=False)
class TrainConfig:
    """What is trained, on what and how. The defaults are the published settings of the cart-pole.

    Attributes:
        system: The simulator, a `ws.System`.
        policy: The controller, any `torch.nn.Module` from (n, state_size) to (n, control_size).
        flow: Backward flow: a name, a letter, a `ws.Flow`, or a list of one per step (not C).
        horizon: Steps of one rollout.
        loss: "final", "running", or a callable of (states, controls) that returns a scalar tensor.
        control_cost: Weight of the mean squared control that is added to the loss.
        window: Truncation window in steps: both edges closed at every multiple of it. None: no truncation.
        decay: Factor in [0, 1] on what crosses the physics edge backwards, or a `PerSecond`.
        clip_cotangent: Largest norm of the cotangent that a step pulls back, in every world. None: no bound.
        combiner: For flow "combined": another way to make one gradient of M and R, see
            `GradientPair.combine`; `Anneal` blends them with a weight that changes over the updates. None:
            the published one.
        inputs: A function (x0, horizon, generator) -> (horizon, nworld, k) for a second argument of the
            policy, such as references or noise. It is called for every update and every evaluation. The
            generator depends only on `seed` and the number of the update, for evaluations only on `seed`.
            None: no inputs; a `GaussianPolicy` gets its noise.
        samples: Number of initial states in the training set, and as many in the test set.
        batch: Initial states of one update. Batches are taken in order and never shuffled.
        epochs: Passes over the training set.
        optimizer: "adam" (as Keras takes its steps, see `optimizers.KerasAdam`), "sgd", "adagrad", "adadelta"
            or "rmsprop".
        lr: Learning rate.
        momentum: Momentum of "sgd"; 0.8, 0.9 and 0.95 are the published ones.
        clip: "none", "value" (every component to [-clip_at, clip_at]) or "norm" (of all components together).
            It acts on the final gradient, for C on the combined one.
        clip_at: Bound of the clip.
        on_divergence: What happens at an update whose loss or gradient is not finite, or one of whose two
            fields (flow "combined") is NaN or infinite in all components. "stop" ends the run with an error
            that names the update, and restores the last finite weights. "skip" leaves weights and optimizer
            unchanged and takes the next batch; an epoch in which every update was skipped ends the run.
        seed: Seed of the initial states; 42 gives the published data sets.
        dtype: "float32" or "float64"; it must be that of the policy's parameters. None: that dtype.
        device: The device of the run; it must be that of the policy's parameters. None: that device.
        log_every: Epochs from one row of the log to the next. Train and test loss are evaluated for each row.
        checkpoint_every: Epochs between two writings of the checkpoints. They are also written at the end and
            after an interruption. So a killed process loses at most so many epochs.
        tensorboard: Write TensorBoard events into the run folder.
        graph: Record an update as a CUDA graph (forward, backward, comparison, clipping and optimizer) and
            replay it, so that the host makes one call an update. Needs a CUDA device. Weights are the same as
            without it, to the last bit. A policy or loss of your own must do the same on the host in every
            call.
    """

    system: System
    policy: torch.nn.Module
    flow: Flow | str | Sequence[Flow | str] = "combined"
    horizon: int = 100
    loss: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "final"
    control_cost: float = 0.0
    window: int | None = None
    decay: float | PerSecond = 1.0
    clip_cotangent: float | None = None
    combiner: Combiner | Anneal | None = None
    inputs: Callable[[torch.Tensor, int, torch.Generator], torch.Tensor] | None = None
    samples: int = 256
    batch: int = 8
    epochs: int = 1000
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    clip: str = "none"
    clip_at: float = 1.0
    on_divergence: str = "stop"
    seed: int = 42
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    log_every: int = 1
    checkpoint_every: int = 10
    tensorboard: bool = False
    graph: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.system, System):
            raise TypeError(
                f"TrainConfig: system={self.system!r} is a {type(self.system).__name__}, expected a "
                "ws.System; give for example ws.CartPole(poles=4)"
            )
        if not isinstance(self.policy, torch.nn.Module):
            raise TypeError(
                f"TrainConfig: policy is a {type(self.policy).__name__}, expected a torch.nn.Module; give "
                "for example ws.MLP(system.state_size, (100, 100), system.control_size)"
            )
        if isinstance(self.policy, Ensemble):
            raise TypeError(
                "TrainConfig: policy is an Ensemble, expected the policy of one run; give a TrainConfig for "
                "each of its members() to ws.train_together"
            )
        for name in ("horizon", "samples", "batch", "epochs", "log_every", "checkpoint_every"):
            self._set(name, whole("TrainConfig", name, getattr(self, name), 1))
        self._set("seed", whole("TrainConfig", "seed", self.seed, 0))
        if self.batch > self.samples:
            raise ValueError(
                f"TrainConfig: batch={self.batch} is larger than samples={self.samples}; give a batch of at "
                "most that many initial states, or more samples"
            )
        for name, low, high in (
            ("control_cost", 0.0, math.inf),
            ("momentum", 0.0, 1.0),
            ("lr", 0.0, math.inf),
            ("clip_at", 0.0, math.inf),
        ):
            above = name in ("lr", "clip_at")
            self._set(name, real("TrainConfig", name, getattr(self, name), low, high, above=above))
        step_decay = decay_of("TrainConfig", self.system, self.decay)
        self._set("decay", self.decay if isinstance(self.decay, PerSecond) else step_decay)
        clip_of("TrainConfig", self.clip_cotangent)
        if self.clip_cotangent is not None:
            self._set("clip_cotangent", float(self.clip_cotangent))
        self._check_choice("optimizer", OPTIMIZERS)
        self._check_choice("clip", CLIPS)
        self._check_choice("on_divergence", ON_DIVERGENCE)
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"TrainConfig: momentum={self.momentum} with optimizer={self.optimizer!r}, expected 0; "
                "momentum is for optimizer='sgd'"
            )
        if not callable(self.loss):
            self._check_choice("loss", LOSSES, instead="or a callable of (states, controls)")
        if not isinstance(self.tensorboard, bool):
            raise TypeError(f"TrainConfig: tensorboard={self.tensorboard!r}, expected True or False")
        if not isinstance(self.graph, bool):
            raise TypeError(f"TrainConfig: graph={self.graph!r}, expected True or False")
        self._set("flow", self._checked_flow())
        self._check_combiner()
        if self.inputs is not None and not callable(self.inputs):
            raise TypeError(
                f"TrainConfig: inputs={self.inputs!r}, expected a function of (x0, horizon, generator) or "
                "None"
            )
        self._check_parameters()
        if self.graph:
            self._check_graph()

    @property
    def draws(self) -> Callable[[torch.Tensor, int, torch.Generator], torch.Tensor] | None:
        """The function that draws the inputs of an update; None if the policy takes none."""
        policy = self.policy
        if self.inputs is None and isinstance(policy, GaussianPolicy):
            return lambda x0, horizon, generator: policy.draw(horizon, x0, generator=generator)
        return self.inputs

    def combiner_at(self, update: int) -> Combiner | None:
        """The combiner of an update, counted from 0."""
        return self.combiner.at(update) if isinstance(self.combiner, Anneal) else self.combiner

    def _check_combiner(self) -> None:
        if self.combiner is None:
            return
        if not isinstance(self.combiner, Anneal) and not callable(self.combiner):
            raise TypeError(
                f"TrainConfig: combiner={self.combiner!r}, expected a function of two gradients (2, "
                "components), such as ws.project_conflicting or ws.Anneal(1.0, 0.0, updates=2000), or None"
            )
        if self.flow is not Flow.COMBINED:
            raise ValueError(
                f"TrainConfig: combiner={self.combiner!r} with flow={self.flow!r}, expected flow='combined', "
                "which has two gradients"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_choice(self, name: str, choices: tuple[str, ...], instead: str = "") -> None:
        value = getattr(self, name)
        if value not in choices:
            expected = ", ".join(repr(c) for c in choices)
            kind = ValueError if isinstance(value, str) else TypeError
            raise kind(
                f"TrainConfig: {name}={value!r}, expected one of {expected}"
                + (f", {instead}" if instead else "")
            )

    def _checked_flow(self) -> Flow | tuple[Flow, ...]:
        if self.horizon > MOST_STEPS:
            raise ValueError(
                f"TrainConfig: horizon is {self.horizon}, expected at most {MOST_STEPS} steps, the range of "
                "a kernel's indices"
            )
        schedule(self.flow, self.horizon, self.window, "TrainConfig")
        return Flow.parse(self.flow) if isinstance(self.flow, str) else tuple(map(Flow.parse, self.flow))

    def _check_parameters(self) -> None:
        """Settles dtype and device by the policy's parameters."""
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                "TrainConfig: the policy has no parameter that requires a gradient, expected at least one; "
                "give a policy with parameters, or unfreeze them with requires_grad_()"
            )
        dtype, device = trained[0].dtype, trained[0].device
        wanted = dtype if self.dtype is None else _dtype(self.dtype)
        if dtype not in (torch.float32, torch.float64) or wanted != dtype:
            expected = "float32 or float64" if wanted == dtype else _dtype_name(wanted)
            raise ValueError(
                f"TrainConfig: the policy's parameters are {_dtype_name(dtype)}, expected {expected}; "
                "convert them with policy.float() or policy.double()"
            )
        self._set("dtype", _dtype_name(dtype))
        if self.device is not None:
            asked = torch.device(self.device)
            if asked.type != device.type or asked.index not in (None, device.index):
                raise ValueError(
                    f"TrainConfig: device={str(asked)!r} but the policy is on {str(device)!r}, expected the "
                    f"same; move it with policy.to({str(asked)!r})"
                )
        self._set("device", str(device))

    def _check_graph(self) -> None:
        if torch.device(str(self.device)).type != "cuda":
            raise ValueError(
                f"TrainConfig: graph=True with the policy on {str(self.device)!r}, but graphs need CUDA; "
                "move it with policy.to('cuda'), or leave graph=False"
            )
        for name, value in (("combiner", self.combiner), ("inputs", self.draws)):
            if value is not None:
                raise ValueError(
                    f"TrainConfig: graph=True with {name}={value!r}, which the host calls at every update; "
                    "leave graph=False"
                )
        if self.optimizer in ON_HOST:
            raise ValueError(
                f"TrainConfig: graph=True with optimizer={self.optimizer!r}, which counts its steps on the "
                "host; give optimizer='adam', 'sgd', 'adadelta' or 'rmsprop', or leave graph=False"
            )
        if self.on_divergence == "skip":
            raise ValueError(
                "TrainConfig: graph=True with on_divergence='skip', which reads every update on the host; "
                "give on_divergence='stop', or leave graph=False"
            )

    def settings(self) -> dict[str, Any]:
        """Returns every field but the system and the policy."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("system", "policy")]
        return {name: getattr(self, name) for name in names}

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the run as torch's own."""
        return _dtype(cast(str, self.dtype))


def _dtype(value: str | torch.dtype) -> torch.dtype:
    known = {"float32": torch.float32, "float64": torch.float64}
    if isinstance(value, torch.dtype):
        if value in known.values():
            return value
    elif value in known:
        return known[value]
    raise ValueError(f"TrainConfig: dtype={value!r}, expected 'float32' or 'float64'")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

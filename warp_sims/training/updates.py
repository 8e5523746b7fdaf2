"""The computation of a training run: updates and losses of a policy, or of the members of an ensemble."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ..gradients import gradient_pair
from ..kernels.flow import Flow
from ..policies.ensembles import Ensemble
from ..rollouts import Rollout, rollout
from .config import TrainConfig
from .divergence import RECORDED, Place, locate, lost, reason
from .graphed import GraphedUpdate
from .inputs import draw_inputs
from .optimizers import ON_HOST, make_optimizer
from .processes import Processes

SUMMARY = ("loss", "norm", "cosine", "agreement", "nonfinite", "zeros")
"""What rows of the log are made of, of every update."""

_NONFINITE = slice(RECORDED.index("nonfinite"), RECORDED.index("nonfinite_base") + 1)
"""The two counts of a flow with one field: of the field, and of any."""


def summary(record: torch.Tensor, size: int) -> torch.Tensor:
    """Returns (6, updates), `SUMMARY` of updates of which (RECORDED, updates) was recorded.

    Args:
        record: Of one policy.
        size: Number of components of its gradient.
    """
    seen = dict(zip(RECORDED, record, strict=True))
    cosine = seen["dot"] / (seen["base_sq"].sqrt() * seen["check_sq"].sqrt())
    agreement = seen["equal"] / seen["nonzero"]
    zeros = (size - seen["kept"]) / size
    return torch.stack([seen["loss"], seen["norm"], cosine, agreement, seen["nonfinite"], zeros])


def means(summaries: list[torch.Tensor]) -> dict[str, float]:
    """Returns what a row of the log says of the updates since the row before, from their summaries.

    The count of non-finite components includes all updates. Everything else ignores skipped updates.
    """
    # those of an earlier version, in the checkpoint of a run that goes on, have fewer rows
    whole = [torch.cat([s, s.new_full((len(SUMMARY) - len(s), s.shape[1]), math.nan)]) for s in summaries]
    loss, norm, cosine, agreement, nonfinite, zeros = torch.cat(whole, dim=1)
    taken = torch.isfinite(loss) & ~torch.isnan(norm)
    if not bool(taken.all()):
        loss, norm = loss[taken], norm[taken]
    values = {
        "loss_batch": loss.mean(),
        "grad_norm": norm.square().mean().sqrt(),
        "cosine": cosine.nanmean(),
        "agreement": agreement.nanmean(),
        "nonfinite": nonfinite.nansum(),
        "zeros": zeros.nanmean(),
    }
    return {name: float(value) for name, value in values.items()}


class Updates:
    """What training computes: updates and losses of one policy, or of all members of an ensemble at once.

    Args:
        config: The settings, those of every member.
        policy: What is trained.
    """

    def __init__(self, config: TrainConfig, policy: torch.nn.Module) -> None:
        self.config = config
        self.policy = policy
        self.processes = Processes()
        self.device = torch.device(str(config.device))
        self._members = (len(policy),) if isinstance(policy, Ensemble) else ()
        self._options: dict[str, Any] = {
            "horizon": config.horizon,
            "loss": config.loss,
            "control_cost": config.control_cost,
            "window": config.window,
            "decay": config.decay,
            "clip_cotangent": config.clip_cotangent,
        }
        self._train_states, self._test_states = (
            config.system.initial_states(config.samples, seed=config.seed, split=split).to(
                self.device, config.torch_dtype
            )
            for split in ("train", "test")
        )
        self._parameters = [p for p in policy.parameters() if p.requires_grad]
        members = self._members[0] if self._members else 1
        self.size = sum(p.numel() for p in self._parameters) // members
        # On a GPU always, so that a run takes the same steps with and without a graph.
        capturable = self.device.type == "cuda" and config.optimizer not in ON_HOST
        self.optimizer = make_optimizer(
            config.optimizer,
            self._parameters,
            lr=config.lr,
            momentum=config.momentum,
            capturable=capturable,
        )
        self._number = 0
        """Of the update that is made, from the first of the run on."""
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self.step = GraphedUpdate(self.update) if self.config.graph else self.update

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Sets the state of the optimizer. It then has other tensors, while graphs hold the old ones."""
        self.optimizer.load_state_dict(state)
        self._forget_graphs()

    def state(self) -> dict[str, Any]:
        """Returns copies of the weights and of the optimizer's state, which share nothing with them."""
        weights = self.policy.state_dict()
        return {
            "policy": {
                name: value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
                for name, value in weights.items()
            },
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to a state, which stays as it is."""
        self.policy.load_state_dict(state["policy"])
        self.load_optimizer(copy.deepcopy(state["optimizer"]))

    def lost(self) -> str | None:
        """Returns the name of the first weight or moment of the optimizer that holds NaN or infinity."""
        state = self.optimizer.state_dict()["state"]
        return lost(dict(self.policy.state_dict()), "") or lost(state, "optimizer")

    def rehearse(self) -> None:
        """Computes a gradient and drops it, so that errors arise before a folder is changed, and compiling
        does not count as time of the first epoch.
        """
        self._gradient(self._train_states[: self.config.batch])
        self.optimizer.zero_grad(set_to_none=True)

    def new_record(self) -> torch.Tensor:
        """Returns what `run` fills: (RECORDED, updates), of an ensemble with a member axis before, NaN."""
        # Filled on the device, read once an epoch: to read a number per update is to wait for the device.
        shape = (*self._members, len(RECORDED), math.ceil(self.config.samples / self.config.batch))
        return torch.full(shape, math.nan, dtype=torch.float64, device=self.device)

    def run(self, record: torch.Tensor, epoch: int, count: int | None = None) -> None:
        """Makes the updates of an epoch, or the first of them, and records them."""
        batches = self._train_states.split(self.config.batch)
        for i, x0 in enumerate(batches[:count]):
            self._number = epoch * len(batches) + i
            self.step(x0, record[..., i])

    def locate(self, update: int, epoch: int) -> Place | None:
        """Returns where the rollout of an update of an epoch is first not finite under the present weights,
        in terms of the worlds of its whole batch; None where it is finite.
        """
        batches = self._train_states.split(self.config.batch)
        self._number = epoch * len(batches) + update
        x0, worlds = self.processes.share(batches[update])
        given = self._inputs(batches[update], f"update {self._number}")
        with torch.no_grad():
            out = rollout(
                self.config.system, self.policy, x0, horizon=self.config.horizon, loss=None, inputs=given
            )
        place = locate(out.states, out.controls) if worlds else None
        each = self.processes.gather((place, worlds))
        found, before = [], 0
        for other, count in each:
            found += [] if other is None else [other._replace(world=other.world + before)]
            before += count
        return min(found, key=lambda other: other[:3], default=None)

    @torch.no_grad()
    def evaluate(self) -> Any:
        """Returns train and test loss; of an ensemble a pair of each member."""
        # The loss is the same for every flow; a flow matters backwards only.
        options = {name: self._options[name] for name in ("horizon", "loss", "control_cost")}
        losses = []
        for split, states in (("train", self._train_states), ("test", self._test_states)):
            x0, worlds = self.processes.share(states)
            given = self._inputs(states, f"evaluation {split}")
            out = rollout(self.config.system, self.policy, x0, flow=Flow.REGULAR, inputs=given, **options)
            losses += self.processes.mean([_loss(out)], worlds, states.shape[0])
        return torch.stack(losses, dim=-1).tolist()

    def _inputs(self, x0: torch.Tensor, what: str) -> torch.Tensor | None:
        """The inputs of this process's share of the worlds."""
        given = draw_inputs(self.config, x0, what)
        return None if given is None else self.processes.share(given.transpose(0, 1))[0].transpose(0, 1)

    def _gradient(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Fills the gradients of the parameters; returns the loss, and the sums of a comparison."""
        config, total = self.config, x0.shape[-2]
        given = self._inputs(x0, f"update {self._number}")
        x0, worlds = self.processes.share(x0)
        if config.flow is Flow.COMBINED:
            pair = gradient_pair(config.system, self.policy, x0, inputs=given, **self._options)
            if self.processes.several:
                pair = pair.reduced(worlds, total)
            pair.assign(self.policy, combiner=config.combiner_at(self._number))
            return pair.loss.detach(), pair.sums
        self.optimizer.zero_grad(set_to_none=True)
        out = rollout(config.system, self.policy, x0, flow=config.flow, inputs=given, **self._options)
        loss = _loss(out)
        loss.backward(torch.ones_like(loss))
        loss = loss.detach()
        if self.processes.several:
            loss, *gradients = self.processes.mean([loss, *self._gradients()], worlds, total)
            for p, gradient in zip(
                [p for p in self._parameters if p.grad is not None], gradients, strict=True
            ):
                p.grad = gradient
        return loss, None

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def update(self, x0: torch.Tensor, record: torch.Tensor) -> None:
        """Makes one update from the states (nworld, state_size), and records it."""
        config = self.config
        loss, sums = self._gradient(x0)
        gradients = self._gradients()
        norm = self._norm(gradients)
        record[..., 0], record[..., 1] = loss, norm
        if sums is not None:
            record[..., 2:] = sums
        else:
            self._count(gradients, norm, record)
        if config.on_divergence == "skip" and reason(record.tolist(), self.size, config) is not None:
            return
        if config.clip == "norm":
            self._clip_norm(gradients, norm)
        elif config.clip == "value":
            torch.nn.utils.clip_grad_value_(self._parameters, config.clip_at)
        self.optimizer.step()

    def _count(self, gradients: list[torch.Tensor], norm: torch.Tensor, record: torch.Tensor) -> None:
        """Records how many components of the one gradient are not finite."""
        if self.device.type == "cpu" and math.isfinite(float(norm.sum())):
            record[..., _NONFINITE] = 0.0  # or the norm would not be finite
            return
        flat = torch.cat([g.reshape(*self._members, -1) for g in gradients], dim=-1)
        nonfinite = flat.shape[-1] - torch.isfinite(flat).sum(dim=-1, keepdim=True)
        record[..., _NONFINITE] = nonfinite.to(record.dtype)

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        norm = torch.nn.utils.get_total_norm
        if not self._members:
            return norm(gradients)
        return torch.stack([norm([g[k] for g in gradients]) for k in range(*self._members)])

    def _clip_norm(self, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        if not self._members:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_at, norm)
            return
        factor = (self.config.clip_at / (norm + 1e-6)).clamp(max=1.0)  # as torch does it
        for g in gradients:
            g.mul_(factor.view(-1, *(1,) * (g.ndim - 1)))


def _loss(out: Rollout) -> torch.Tensor:
    assert out.loss is not None, "TrainConfig refuses loss=None"
    return out.loss

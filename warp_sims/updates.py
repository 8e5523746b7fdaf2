"""The computing of a training run: updates and losses of a policy, or of the members of an ensemble."""

from __future__ import annotations

import math
from typing import Any

import torch

from .ensembles import Ensemble
from .flows import Flow
from .gradients import gradient_pair
from .graphed import GraphedUpdate
from .optimizers import ON_HOST, make_optimizer
from .rollouts import Rollout, rollout
from .train_config import TrainConfig

RECORDED = ("loss", "norm", "cosine", "agreement")  # of every update


class Updates:
    """What training computes: updates and losses of one policy, or of all members of an ensemble at once.

    Args:
        config: The settings, those of every member.
        policy: What is trained.
    """

    def __init__(self, config: TrainConfig, policy: torch.nn.Module) -> None:
        self.config = config
        self.policy = policy
        self.device = torch.device(str(config.device))
        self._members = (len(policy),) if isinstance(policy, Ensemble) else ()
        self._options: dict[str, Any] = {
            "horizon": config.horizon,
            "loss": config.loss,
            "control_cost": config.control_cost,
            "window": config.window,
            "decay": config.decay,
        }
        self._train_states, self._test_states = (
            config.system.initial_states(config.samples, seed=config.seed, split=split).to(
                self.device, config.torch_dtype
            )
            for split in ("train", "test")
        )
        self._parameters = [p for p in policy.parameters() if p.requires_grad]
        # On a GPU always, so that a run takes the same steps with and without a graph.
        capturable = self.device.type == "cuda" and config.optimizer not in ON_HOST
        self.optimizer = make_optimizer(
            config.optimizer,
            self._parameters,
            lr=config.lr,
            momentum=config.momentum,
            capturable=capturable,
        )
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self.step = GraphedUpdate(self.update) if self.config.graph else self.update

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Puts the optimizer into a state. Its tensors are others then, and graphs hold the old ones."""
        self.optimizer.load_state_dict(state)
        self._forget_graphs()

    def rehearse(self) -> None:
        """Computes a gradient for nothing: what it refuses is refused before a folder is touched, and
        compiling is not counted as time of the first epoch.
        """
        self._gradient(self._train_states[: self.config.batch])
        self.optimizer.zero_grad(set_to_none=True)

    def new_record(self) -> torch.Tensor:
        """Returns what `run` fills: (4, updates), of an ensemble (members, 4, updates), NaN."""
        # Filled on the device, read once an epoch: to read a number per update is to wait for the device.
        shape = (*self._members, len(RECORDED), math.ceil(self.config.samples / self.config.batch))
        return torch.full(shape, math.nan, dtype=torch.float64, device=self.device)

    def run(self, record: torch.Tensor) -> None:
        """Makes the updates of an epoch, and records them."""
        for i, x0 in enumerate(self._train_states.split(self.config.batch)):
            self.step(x0, record[..., i])

    @torch.no_grad()
    def evaluate(self) -> Any:
        """Returns train and test loss; of an ensemble a pair of each member."""
        # The loss is the same for every flow; a flow matters backwards only.
        options = {name: self._options[name] for name in ("horizon", "loss", "control_cost")}
        losses = [
            _loss(rollout(self.config.system, self.policy, x0, flow=Flow.REGULAR, **options))
            for x0 in (self._train_states, self._test_states)
        ]
        return torch.stack(losses, dim=-1).tolist()

    def _gradient(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Fills the gradients of the parameters; returns loss, cosine and agreement."""
        config = self.config
        if config.flow is Flow.COMBINED:
            pair = gradient_pair(config.system, self.policy, x0, **self._options)
            pair.assign(self.policy)
            return pair.loss.detach(), pair.cosine, pair.agreement
        self.optimizer.zero_grad(set_to_none=True)
        loss = _loss(rollout(config.system, self.policy, x0, flow=config.flow, **self._options))
        loss.backward(torch.ones_like(loss))
        return loss.detach(), None, None

    def update(self, x0: torch.Tensor, record: torch.Tensor) -> None:
        """Makes one update from the states (nworld, state_size), and records it."""
        config = self.config
        loss, cosine, agreement = self._gradient(x0)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = self._norm(gradients)
        record[..., 0], record[..., 1] = loss, norm
        if cosine is not None and agreement is not None:
            record[..., 2], record[..., 3] = cosine, agreement
        if config.clip == "norm":
            self._clip_norm(gradients, norm)
        elif config.clip == "value":
            torch.nn.utils.clip_grad_value_(self._parameters, config.clip_at)
        self.optimizer.step()

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

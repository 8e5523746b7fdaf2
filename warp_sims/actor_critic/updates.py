"""One update of actor and critic."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..bridge.autograd import operators
from ..bridge.autograd.episodes import EpisodePath, Resets, Trajectory
from ..bridge.autograd.rollout import split
from ..bridge.autograd.torch_path import TorchPath, places
from ..bridge.passes.spec import Cotangents, Spec
from ..bridge.runtime.launches import span
from ..estimators import clip_of
from ..kernels.agreement import SUMS
from ..kernels.flow import schedule
from .config import ActorCriticConfig
from .networks import Actor, Critic, observation_size
from .targets import Ends, discounts, td_lambda
from .task import as_task
from .worlds import ACTOR, CRITIC, Worlds, seed_of

PARTS = ("actor", "critic", "target")


class Updates:
    """Actor, critic, their optimizers and the worlds of a run.

    Args:
        config: The settings.
    """

    def __init__(self, config: ActorCriticConfig) -> None:
        self.config = config
        self.task = as_task(config.system, "train_actor_critic")
        dtype = config.torch_dtype
        size = observation_size(self.task)
        self.actor = Actor(config.system, config.actor_hidden, config.std, seed_of(config, ACTOR), dtype).to(
            config.device
        )
        self.critic = Critic(size, config.critic_hidden, seed_of(config, CRITIC), dtype).to(config.device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.worlds = Worlds(self.task, config)
        self.update = 0
        self._optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=config.actor_lr, betas=config.betas),
            "critic": torch.optim.Adam(self.critic.parameters(), lr=config.critic_lr, betas=config.betas),
        }
        base, check = schedule(config.flow, config.horizon, config.window, "train_actor_critic")
        clip = clip_of("train_actor_critic", config.step_clip)
        self._spec = Spec(config.system.number, base, check, config.decay, clip=clip)
        where = places(self.actor)
        self._path = TorchPath(self.actor, tuple(where[n] for n, _ in self.actor.named_parameters()), None)

    def state(self) -> dict[str, Any]:
        """Copies of all that has to be known to go on."""
        state: dict[str, Any] = {name: _copied(getattr(self, name).state_dict()) for name in PARTS}
        optimizers = {name: copy.deepcopy(o.state_dict()) for name, o in self._optimizers.items()}
        return {**state, "optimizers": optimizers, "worlds": self.worlds.state(), "update": self.update}

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to a state, which stays as it is."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))
        self.worlds.load(state["worlds"])
        self.update = state["update"]

    def rate(self, first: float) -> float:
        """The learning rate of this update."""
        done = self.update / max(self.config.updates - 1, 1)
        return first + (self.config.last_lr - first) * min(done, 1.0)

    def run(self) -> tuple[dict[str, Any], list[float]]:
        """Makes an update; returns what the log says of it, and returns of the episodes that ended in it."""
        config, worlds = self.config, self.worlds
        parameters = [p.detach() for p in self.actor.parameters()]
        fresh = worlds.fresh(self.update)
        resets = Resets(fresh, self.task.fallen, self.task.episode_steps, worlds.ages)
        path = EpisodePath(self._path._replace(inputs=worlds.noise(self.update)), resets)
        with span("forward"), torch.no_grad():
            saved, own_loss = path.forward(self._spec, worlds.states, parameters)
            run = Trajectory(saved.states, saved.controls, own_loss, *saved.kept)
        ends = Ends(run.done, run.done | run.truncated)
        with span("targets"), torch.no_grad():
            rewards = self.task.reward(run.states[:-1], run.controls)
            targets = td_lambda(
                rewards, self._values(run.next_states, ends), ends, config.gamma, config.trace
            )
        loss, direct = self._actor_loss(run, ends)
        with torch.no_grad():
            fields, _ = path.backward(self._spec, saved, parameters, *direct)
        record = self._step_actor(fields) | {"actor_loss": loss}
        with torch.no_grad():
            observed = self.task.observe(run.states[:-1]).flatten(0, 1)
            seen = self.actor.normaliser(observed)
        with span("critic"):
            record["critic_loss"] = self._train_critic(seen, targets.flatten())
        keep = config.target_keep
        with torch.no_grad():
            for own, other in zip(self.target.parameters(), self.critic.parameters()):
                own.lerp_(other, 1.0 - keep)
        self.actor.normaliser.update(observed)
        finished = worlds.end(run.states[-1], run.ages, rewards, ends.restarted)
        self.update += 1
        return record, finished

    def _values(self, led: Tensor, ends: Ends) -> Tensor:
        """The target critic's values (horizon, nworld) of the states behind the steps, 0 of failures."""
        led = torch.where(ends.failed.unsqueeze(-1), torch.zeros_like(led), led)
        return self.target(self.actor.normaliser(self.task.observe(led)))

    def _actor_loss(self, run: Trajectory, ends: Ends) -> tuple[Tensor, tuple[Cotangents, Tensor]]:
        """The actor's loss, and its direct cotangents, those of the next states apart."""
        factor = discounts(ends, self.config.gamma, run.states.dtype)
        valued = ends.ended & ~ends.failed
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (run.states, run.next_states, run.controls)]
            states, led, controls = leaves
            earned = (factor * self.task.reward(states[:-1], controls)).sum()
            ahead = self.target(self.actor.normaliser(self.task.observe(led[valued])))
            earned = earned + self.config.gamma * (factor[valued] * ahead).sum()
            loss = -earned / ends.failed.numel()
            adj, adj_next, adj_u = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return loss.detach(), (Cotangents(None, adj, adj_u), adj_next)

    def _step_actor(self, fields: Tensor) -> dict[str, Any]:
        """Combines the gradient's fields, and takes a step with them; skips one that is not finite."""
        record: dict[str, Any] = {"cosine": math.nan, "agreement": math.nan, "skipped": 0.0}
        flat = fields[0]
        if fields.shape[0] == 2:
            flat, sums = operators.combine(fields[0], fields[1], False)
            of = dict(zip(SUMS, sums))
            record["cosine"] = of["dot"] / (of["base_sq"].sqrt() * of["check_sq"].sqrt())
            record["agreement"] = of["equal"] / of["nonzero"]
        norm = flat.norm()
        record["grad_norm"] = norm
        if not math.isfinite(float(norm)):
            return record | {"skipped": 1.0}
        flat = flat * (self.config.clip_at / (norm + 1e-6)).clamp(max=1.0)
        parameters = list(self.actor.parameters())
        for p, gradient in zip(parameters, split(flat, parameters)):
            p.grad = gradient
        self._step("actor", self.config.actor_lr)
        return record

    def _step(self, name: str, first: float) -> None:
        optimizer = self._optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = self.rate(first)
        optimizer.step()

    def _train_critic(self, seen: Tensor, targets: Tensor) -> Tensor:
        """Trains the critic; returns its mean loss in the last pass.

        Args:
            seen: (rows, size), normalised observations.
            targets: (rows,).
        """
        parameters = list(self.critic.parameters())
        count = self.config.critic_batches
        batches = [(seen[i::count].contiguous(), targets[i::count].contiguous()) for i in range(count)]
        losses: list[Tensor] = []
        for _ in range(self.config.critic_passes):
            losses.clear()
            for rows, wanted in batches:
                loss = (self.critic(rows) - wanted).square().mean()
                gradients = torch.autograd.grad(loss, parameters)
                for p, gradient in zip(parameters, gradients):
                    p.grad = gradient
                torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_at)
                self._step("critic", self.config.critic_lr)
                losses.append(loss.detach())
        return torch.stack(losses).mean()


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}

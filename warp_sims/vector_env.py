"""The vector environment of `gymnasium_env`. It imports Gymnasium, which is an optional dependency."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from .bridge.autograd import operators
from .rollouts import step
from .systems import System

__all__ = ["SystemVectorEnv"]

Array = np.ndarray


class SystemVectorEnv(VectorEnv):
    """Worlds of a system as environments, stepped together; made by `gymnasium_env`, which checks."""

    metadata: dict[str, Any]

    def __init__(
        self,
        system: System,
        num_envs: int,
        *,
        reward: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
        observe: Callable[[Tensor], Tensor] | None,
        done: Callable[[Tensor], Tensor] | None,
        limit: int | None,
        scale: float,
        autoreset: str,
        seed: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.system, self.num_envs = system, num_envs
        self._reward, self._observe, self._done = reward, observe, done
        self._limit, self._scale, self._dtype, self._device = limit, scale, dtype, device
        self._same_step = autoreset == "same_step"
        self.autoreset_mode = AutoresetMode.SAME_STEP if self._same_step else AutoresetMode.NEXT_STEP
        self.metadata = {"autoreset_mode": self.autoreset_mode, "render_modes": []}
        self._random = np.random.default_rng(seed)
        self._x = self._drawn()
        self._age = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.zeros(num_envs, dtype=bool)
        seen = self._observed(self._x)
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, seen.shape[1:], np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (system.control_size,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @property
    def states(self) -> Tensor:
        """States of all worlds, (num_envs, state_size); a copy."""
        return self._x.clone()

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begins new episodes in all worlds, or in those of `options["reset_mask"]`, (num_envs,) bool.

        Args:
            seed: Seed of all initial states from now on; a list counts as one seed.
        """
        if seed is not None:
            given = [seed] if isinstance(seed, (int, np.integer)) else seed
            if any(s is not None for s in given):
                self._random = np.random.default_rng([-1 % 2**32 if s is None else s for s in given])
        fresh = np.ones(self.num_envs, dtype=bool)
        if options is not None and "reset_mask" in options:
            fresh = options["reset_mask"]
            if not isinstance(fresh, np.ndarray) or fresh.dtype != bool or fresh.shape != (self.num_envs,):
                raise ValueError(
                    f"reset: options['reset_mask'] is {fresh!r}, expected a NumPy array of bool "
                    f"({self.num_envs},)"
                )
        self._begin(fresh)
        return self._observed(self._x), {}

    def step(self, actions: Any) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One time step of all worlds: observations, rewards, terminations, truncations, infos."""
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"step: actions have shape {actions.shape}, expected {self.action_space.shape}")
        waiting = self._ended.copy()  # of "next_step": the last step ended their episodes
        if waiting.any():
            self._begin(waiting)
        clipped = self._scale * np.clip(actions, -1.0, 1.0)
        u = torch.as_tensor(clipped, dtype=self._dtype, device=self._device)
        with torch.no_grad():
            x = self._x
            y = step(self.system, x, u)
            finite = torch.isfinite(y).all(1)
            if self._reward is not None:
                reward = self._reward(x, u, y)
            else:
                reward = -operators.costs(self.system.number, y)
            reward = torch.where(finite | torch.isfinite(reward), reward, 0.0)
            over = ~finite if self._done is None else ~finite | self._done(y)
        rewards = reward.float().cpu().numpy().copy()
        terminations = over.cpu().numpy().copy()
        self._age += 1
        truncations = np.zeros(self.num_envs, dtype=bool)
        if self._limit is not None:
            truncations = (self._age >= self._limit) & ~terminations
        self._x, infos = y, {}
        if waiting.any():
            rewards[waiting], terminations[waiting], truncations[waiting] = 0.0, False, False
            self._age[waiting] = 0
            self._x = torch.where(torch.as_tensor(waiting, device=self._device).unsqueeze(1), x, y)
        self._ended = terminations | truncations
        if self._same_step and self._ended.any():
            last = self._observed(self._x)
            final = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(self._ended):
                final[i] = last[i]
            infos = {"final_obs": final, "_final_obs": self._ended.copy()}
            infos |= {"final_info": {}, "_final_info": self._ended.copy()}
            self._begin(self._ended.copy())
        return self._observed(self._x), rewards, terminations, truncations, infos

    def _begin(self, fresh: Array) -> None:
        """Puts fresh states into these worlds."""
        chosen = torch.as_tensor(fresh, device=self._device)
        self._x = torch.where(chosen.unsqueeze(1), self._drawn(), self._x)
        self._age[fresh] = 0
        self._ended[fresh] = False

    def _drawn(self) -> Tensor:
        states = self.system.initial_states(self.num_envs, seed=int(self._random.integers(2**31)))
        return states.to(self._device, self._dtype)

    def _observed(self, x: Tensor) -> Array:
        with torch.no_grad():
            seen = x if self._observe is None else self._observe(x)
        return seen.float().cpu().numpy().copy()

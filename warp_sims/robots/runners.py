"""The base class of robots that are to run along x: settings of contact, reward, start and observation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from ..kernels.system import DeviceFunctions
from ..kernels.systems import runners as _runners
from .articulated import Articulated

NOISE = 0.1


class Runner(Articulated):
    """Base of `ws.HalfCheetah` and `ws.Ant`."""

    friction: ClassVar[Literal["linear"]] = "linear"
    approach: ClassVar[bool] = True
    implicit: ClassVar[bool] = True
    slip_speed: ClassVar[float] = 0.1  # of smooth friction, which this is not
    limit_damping: ClassVar[float] = 0.1
    train_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"horizon": 32, "loss": "running"})
    episode_steps: ClassVar[int] = 1000
    """Control steps after which an episode ends."""
    bonus: ClassVar[float]
    """What a step earns that does not end the episode."""
    control_weight: ClassVar[float]
    """Weight of the squared control in the reward."""
    unseen: ClassVar[int]
    """Coordinates that a policy does not see: where the robot is on the ground."""

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return self._numbered(_runners.make_functions(self.structure, dtype, self.bonus), dtype)

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray:
        """Initial states (n, state_size): coordinates uniform within 0.1 of the start, velocities
        normal with deviation 0.1; quaternions of length 1.
        """
        random = np.random.RandomState((seed + (split == "test")) % 2**32)
        nq, nv = self.model.qpos_size, len(self.model.joints)
        q = np.array(self.model.start) + random.uniform(-NOISE, NOISE, (n, nq))
        if nq > nv:
            q[:, 3:7] /= np.linalg.norm(q[:, 3:7], axis=1, keepdims=True)
        return np.concatenate([q, NOISE * random.randn(n, nv)], axis=1)

    def observe(self, states: Tensor) -> Tensor:
        """What a policy sees (..., observations) of states (..., state_size): everything except the position
        on the ground.
        """
        return states[..., self.unseen :]

    def reward(self, states: Tensor, controls: Tensor) -> Tensor:
        """Reward (...) of steps from states under controls: the speed along x and `bonus`, less the control's
        cost.
        """
        speed = states[..., self.model.qpos_size]
        return speed + self.bonus - self.control_weight * (controls**2).sum(-1)

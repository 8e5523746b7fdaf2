"""A system as a vector environment of Gymnasium, for any library of reinforcement learning that takes one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .kernels.flow import as_int
from .plans import check_system
from .systems import System

if TYPE_CHECKING:
    from .vector_env import SystemVectorEnv

__all__ = ["gymnasium_env"]


def gymnasium_env(
    system: System,
    num_envs: int,
    *,
    reward: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    observe: Callable[[Tensor], Tensor] | None = None,
    done: Callable[[Tensor], Tensor] | None = None,
    limit: int | None = None,
    scale: float = 1.0,
    autoreset: Literal["next_step", "same_step"] = "next_step",
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> "SystemVectorEnv":
    """Returns a `gymnasium.vector.VectorEnv` (1.1 or newer) whose environments are worlds of a system.

        env = ws.gymnasium_env(ws.CartPole(poles=1), 64, limit=200, scale=10.0)
        observations, infos = env.reset(seed=0)
        observations, rewards, terminations, truncations, infos = env.step(env.action_space.sample())

    Args:
        system: Any system with initial states.
        num_envs: Worlds, at least 1.
        reward: Reward of a step, in torch, (x, u, x_next) to (n,). By default minus the system's cost of
            x_next.
        observe: States (n, state_size) to observations (n, k), in torch. By default the states.
        done: Which states end an episode, (n, state_size) to (n,), bool. By default `System.done`. A step
            that is not finite always ends the episode; if its reward is not finite either, it becomes 0.
        limit: Steps after which an episode is truncated.
        scale: Controls are `scale` times the actions, which are clipped to [-1, 1].
        autoreset: What happens to a world whose episode has ended, `metadata["autoreset_mode"]`. "next_step":
            its next step ignores the action and returns the first observation of a new episode. "same_step":
            the step that ends the episode returns that observation, and the last one is in
            `infos["final_obs"]`.
        seed: Seed of the initial states, until `reset(seed=...)` gives another.
        dtype, device: Of the simulation; observations and rewards are NumPy arrays of float32.

    Raises:
        ImportError: Gymnasium is not installed.
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """
    call = "gymnasium_env"
    check_system(system, call)
    worlds = as_int(num_envs)
    if worlds is None or worlds < 1:
        raise ValueError(f"{call}: num_envs is {num_envs!r}, expected an int of at least 1")
    steps = None if limit is None else as_int(limit)
    if limit is not None and (steps is None or steps < 1):
        raise ValueError(f"{call}: limit is {limit!r}, expected an int of at least 1 or None")
    if autoreset not in ("next_step", "same_step"):
        raise ValueError(f'{call}: autoreset is {autoreset!r}, expected "next_step" or "same_step"')
    for name, value in (("reward", reward), ("observe", observe), ("done", done)):
        if value is not None and not callable(value):
            raise TypeError(f"{call}: {name} is {value!r}, expected a function of tensors or None")
    if reward is None and not system.has_loss:
        raise ValueError(
            f"{call}: reward is None, but {type(system).__name__} has no loss of its own; pass a function of "
            "(x, u, x_next)"
        )
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise ValueError(f"{call}: scale is {scale!r}, expected a finite number above 0")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{call}: dtype is {dtype}, expected torch.float32 or torch.float64")
    try:
        from .vector_env import SystemVectorEnv
    except ImportError as error:
        raise ImportError(
            f"{call}: {error}; expected Gymnasium 1.1 or newer: pip install warp-sims[gymnasium]"
        ) from error
    given: dict[str, Any] = {"reward": reward, "observe": observe, "done": done or system.done}
    return SystemVectorEnv(
        system, worlds, limit=steps, scale=float(scale), autoreset=autoreset, seed=seed, dtype=dtype,
        device=torch.device(device), **given,
    )  # fmt: skip

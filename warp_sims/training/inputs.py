"""The inputs that a policy in training is given beside the states, drawn anew for every update."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .config import TrainConfig


def draw_inputs(config: TrainConfig, x0: Tensor, what: str, horizon: int | None = None) -> Tensor | None:
    """Returns the inputs (horizon, nworld, k) of a rollout from x0 (nworld, state_size), None for a policy of
    states only. They depend on the seed of the run and on `what` they are for, so a resumed run draws the
    same inputs.

    Raises:
        TypeError, ValueError: `config.inputs` returned something else.
    """
    draw = config.draws
    if draw is None:
        return None
    digest = hashlib.sha256(f"{config.seed} {what}".encode()).digest()
    generator = torch.Generator(x0.device).manual_seed(int.from_bytes(digest[:7], "little"))
    steps = horizon or config.horizon
    found = draw(x0.detach().clone(), steps, generator)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"train: inputs returned {type(found).__name__}, expected a tensor (horizon, nworld, k) = "
            f"({steps}, {x0.shape[0]}, any)"
        )
    if found.ndim != 3 or tuple(found.shape[:2]) != (steps, x0.shape[0]):
        raise ValueError(
            f"train: inputs returned shape {tuple(found.shape)}, expected (horizon, nworld, k) = ({steps}, "
            f"{x0.shape[0]}, any), time first"
        )
    return found.detach().to(x0)

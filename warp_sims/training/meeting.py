"""What the processes of a group agree on before they train together."""

from __future__ import annotations

import hashlib
import re

import torch

from .config import TrainConfig
from .processes import Processes


def meet(config: TrainConfig, processes: Processes) -> None:
    """Checks that all processes do the same, and gives all of them the weights of the first.

    Raises:
        ValueError: In every process, if one has another system, other settings, initial states or parameters,
            or another order of them. The message names the first process that differs.
    """
    if config.graph:
        raise ValueError(
            f"train: graph=True in a group of {processes.count} processes, expected False: a graph holds no "
            "exchange between them"
        )
    policy = config.policy
    mine = {name: repr(value) for name, value in config.settings().items() if not callable(value)}
    mine["device"] = torch.device(str(config.device)).type  # each may have a card of its own
    for name in ("loss", "combiner", "inputs"):
        value = getattr(config, name)
        # of an object, not where this process has it
        mine[name] = re.sub(" at 0x[0-9a-f]+", "", getattr(value, "__qualname__", repr(value)))
    mine["system"] = repr(config.system)
    mine["order of parameters"] = str([name for name, _ in policy.named_parameters()])
    for name, value in policy.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            trained = ", trained" * value.requires_grad
            mine[f"parameter {name}"] = f"{tuple(value.shape)}, {value.dtype}{trained}"
    for split in ("train", "test"):
        states = config.system.initial_states(config.samples, seed=config.seed, split=split)
        digest = hashlib.sha256(states.cpu().contiguous().numpy().tobytes()).hexdigest()
        mine[f"initial states ({split})"] = digest[:16]
    processes.agree("train", mine, "give every process the same system, policy and settings")
    tensors = [value for value in policy.state_dict().values() if isinstance(value, torch.Tensor)]
    with torch.no_grad():
        processes.broadcast(tensors)

"""What `profile` runs, checked."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import check_count, usable_device
from ..kernels.flow import Flow
from ..kernels.policy.layout import layout
from ..plans import Loss, check_system
from ..policies.networks import MLP, fused_network
from ..systems import System
from .work import Problem

__all__ = ["FLOWS", "Case", "make_case"]

FLOWS = (Flow.REGULAR, Flow.MODIFIED, Flow.STOPPED, Flow.COMBINED)
"""What is profiled unless something else is asked for."""


class Case(NamedTuple):
    """What is run, checked."""

    system: System
    policy: nn.Module
    flows: list[Flow]
    x0: Tensor
    horizon: int
    loss: Any
    loss_name: str
    control_cost: float
    device: torch.device
    problem: Problem
    notes: list[str]


def mean_square(states: Tensor, controls: Tensor) -> Tensor:
    """The loss of systems that have none."""
    return states.square().mean()


def make_case(
    system: System,
    policy: nn.Module | None,
    flows: Sequence[str | Flow],
    batch: int,
    horizon: int,
    loss: Loss,
    control_cost: float,
    x0: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Case:
    check_system(system, "profile")
    check_count("profile", "batch", batch)
    check_count("profile", "horizon", horizon)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"profile: dtype is {dtype}, expected torch.float32 or torch.float64")
    place = usable_device("profile", device)
    notes: list[str] = []
    if policy is None:
        policy = MLP(system.state_size, (100, 100), system.control_size)
        policy.reset_parameters(seed=0)
    elif not isinstance(policy, nn.Module):
        raise TypeError(f"profile: policy is of type {type(policy).__name__}, expected a torch.nn.Module")
    policy = copy.deepcopy(policy).to(device=place, dtype=dtype)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            "profile: policy has no trainable parameter, so no backward pass; expected one or more"
        )
    if x0 is None:
        x0 = _initial_states(system, batch, notes)
    elif not isinstance(x0, Tensor):
        raise TypeError(f"profile: x0 is of type {type(x0).__name__}, expected a tensor or None")
    elif tuple(x0.shape) != (batch, system.state_size):
        raise ValueError(
            f"profile: x0 has shape {tuple(x0.shape)}, expected (batch, state_size) = ({batch}, "
            f"{system.state_size})"
        )
    if loss is None:
        loss = "final" if system.has_loss else mean_square
    fused = fused_network(policy)
    problem = Problem(
        batch,
        horizon,
        system.state_size,
        system.control_size,
        dtype.itemsize,
        None if fused is None else layout(fused.description, dtype.itemsize),
        sum(q.numel() for q in policy.parameters()),
    )
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return Case(
        system,
        policy,
        _parse_flows(flows),
        x0.detach().to(device=place, dtype=dtype),
        horizon,
        loss,
        name + (f" + {control_cost:g} * mean squared control" if control_cost else ""),
        control_cost,
        place,
        problem,
        notes,
    )


def _parse_flows(flows: Sequence[str | Flow]) -> list[Flow]:
    if isinstance(flows, (str, Flow)):
        flows = [flows]
    found = list(dict.fromkeys(Flow.parse(flow) for flow in flows))
    if not found:
        raise ValueError("profile: flows is empty, expected at least one of R, M, N, S, C")
    return found


def _initial_states(system: System, batch: int, notes: list[str]) -> Tensor:
    try:
        return system.initial_states(batch)
    except NotImplementedError:
        notes.append(f"{type(system).__name__} has no initial states: standard normal ones")
        draw = torch.Generator().manual_seed(0)
        return torch.randn(batch, system.state_size, generator=draw, dtype=torch.float64)

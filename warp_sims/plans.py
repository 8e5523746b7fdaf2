"""Makes a plan of a call of `rollout`, `gradient_pair` or `record_rollout`: checks every argument before any
kernel runs, and collects what the bridge takes.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .bridge.autograd.fused_path import FusedPath
from .bridge.autograd.torch_path import TorchPath, places
from .bridge.passes.simulator import Simulator
from .bridge.passes.spec import (
    BY_SIZE,
    CACHED_ROWS,
    MANY_WORLDS,
    NONE_KEPT,
    STORED_BYTES,
    Spec,
    fused_segment,
    recordings_bytes,
    torch_segment,
)
from .bridge.runtime.registry import has_loss
from .bridge.runtime.team import settle
from .estimators import PerSecond, clip_of, decay_of
from .kernels.flow import MOST_STEPS, as_int, check_decay
from .policies.ensembles import Ensemble, fused_ensemble
from .policies.networks import FusedNetwork, recognise
from .probing import probe
from .systems import System
from .systems.parameters import check_parameters

__all__ = [
    "Loss",
    "Plan",
    "check_horizon",
    "check_like",
    "check_states",
    "check_system",
    "custom_loss_value",
    "make_plan",
]

Loss = str | Callable[[Tensor, Tensor], Tensor] | None
"""A loss as users give it: "final", "running", a callable of (states, controls), or None."""

_DTYPES = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A validated call: what `rollout`, `gradient_pair` and `record_rollout` share."""

    spec: Spec
    path: FusedPath | TorchPath
    """How its passes are computed, chosen once."""
    reason: str
    """Why torch evaluates the policy; empty where it runs fused."""
    names: tuple[str, ...]
    """Of the policy's parameters."""
    parameters: tuple[Tensor, ...]
    """Parameters of the policy (stacked for an ensemble), followed by physical parameters."""
    x0: Tensor
    """(nworld, state_size), or (members, nworld, state_size) for an ensemble."""
    custom_loss: Callable[[Tensor, Tensor], Tensor] | None
    has_loss: bool
    physical: tuple[str, ...] = ()
    """Names of the numbers of the physics."""

    @property
    def fused(self) -> bool:
        """Whether the policy runs inside the sweeps."""
        return isinstance(self.path, FusedPath)


def make_plan(
    call: str,
    system: System,
    policy: nn.Module,
    x0: Tensor,
    horizon: int,
    base: str,
    check: str,
    decay: Any,
    loss: Loss,
    control_cost: float,
    checkpoint_every: int | None,
    keep: bool = True,
    inputs: Any = None,
    physics: Any = None,
    stepwise: bool = False,
    clip: Any = None,
) -> Plan:
    """Checks every argument and returns the plan; nothing has run and nothing has changed when it raises.

    The system and the horizon come from `check_horizon`.

    `clip` is the largest norm of a cotangent, which users know as `clip_cotangent`.

    `stepwise`: torch evaluates the policy even if it could run inside the sweeps.

    `physics` are physical parameters by name, which users know as `parameters`.

    Without `keep` there will be no backward pass, so activations are not kept.
    """
    if not isinstance(policy, nn.Module):
        raise TypeError(
            f"{call}: policy is of type {type(policy).__name__}, expected a torch.nn.Module from (n, "
            f"{system.state_size}) to "
            f"(n, {system.control_size}); wrap a function in a module"
        )
    ensemble = policy if isinstance(policy, Ensemble) else None
    x0 = check_states(system, x0, call, "x0", None if ensemble is None else len(ensemble))
    decay = decay_of(call, system, decay) if isinstance(decay, PerSecond) else check_decay(decay, call)
    weights = _loss_weights(call, system, loss, control_cost, horizon)
    segment = _check_checkpoint(checkpoint_every, call)
    limit = math.inf if clip is None else clip_of(call, clip)
    spec = Spec(system.number, base, check, decay, *weights, clip=limit)
    foreign = isinstance(system, Simulator)
    if stepwise and ensemble is not None:
        raise ValueError(f"{call}: resets for an Ensemble, expected None; roll out its members() one by one")
    if foreign and ensemble is not None:
        raise ValueError(
            f"{call}: policy is an Ensemble on a {type(system).__name__}, expected a system with kernels: "
            "its members run inside the sweeps; roll out its members() one by one"
        )
    found = recognise(policy, system.state_size) if ensemble is None else fused_ensemble(call, ensemble)
    fused, reason = (found, "") if isinstance(found, FusedNetwork) else (None, found)
    if fused is not None and (fused.in_size, fused.out_size) != (system.state_size, system.control_size):
        raise ValueError(
            f"{call}: policy maps {fused.in_size} inputs to {fused.out_size} outputs, expected "
            f"{system.state_size} (state_size) to "
            f"{system.control_size} (control_size) for {type(system).__name__}"
        )
    inputs = _check_inputs(call, inputs, x0, horizon, ensemble is not None)
    outside = foreign or stepwise
    known = fused if inputs is None else None
    if outside or inputs is not None:
        fused = None
        reason = "the simulator is not made of kernels" if foreign else "it is given inputs beside the states"
        if stepwise:
            reason = "worlds end and begin again"
    # parameters that cannot have a gradient stay with the module
    named = fused.parameters if fused else {n: q for n, q in policy.named_parameters() if _differentiable(q)}
    names, parameters = list(named), list(named.values())
    autocast = torch.is_autocast_enabled(x0.device.type)
    device, dtype = x0.device, x0.dtype
    for i, (name, parameter) in enumerate(named.items()):
        if type(parameter) is nn.Parameter and parameter.dtype == dtype and parameter.device == device:
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{call}: policy parameter {name!r} has no shape yet, expected initialised parameters; "
                "call the policy once on a few states"
            )
        if parameter.device != x0.device:
            raise ValueError(
                f"{call}: policy parameter {name!r} is on {parameter.device}, expected {x0.device}, the "
                f"device of x0; move one with .to()"
            )
        if parameter.dtype != x0.dtype and parameter.is_floating_point():
            if not autocast:
                raise TypeError(
                    f"{call}: policy parameter {name!r} is {parameter.dtype}, expected {x0.dtype}, the dtype "
                    f"of x0; convert one with .to()"
                )
            if fused is not None:
                parameters[i] = parameter.to(x0.dtype)
    members = 0 if ensemble is None else len(ensemble)
    physical, given = None, ()
    if physics is not None:
        physical, given = check_parameters(call, system, physics, x0, members, isinstance(loss, str))
    network = "" if known is None else known.description
    constants = () if known is None else tuple(c.to(device, dtype) for c in known.constants)
    if fused is not None:
        path: FusedPath | TorchPath = FusedPath(network, constants, physical)
    else:
        where = places(policy)
        half = torch.get_autocast_dtype(x0.device.type) if autocast else None
        whole = isinstance(system, Simulator) and not system.rowwise
        path = TorchPath(
            policy, tuple(where[name] for name in names), half, whole, network, constants, inputs, physical
        )
        if known is None:
            probe(call, system, path, parameters, x0)  # which are the policy's alone
    if ensemble is not None and x0.ndim == 2:
        x0 = x0.expand(len(ensemble), *x0.shape)
    if segment is not None:
        segment = min(segment, horizon)
    elif fused is not None:
        # tracing a compiled graph, sizes can be symbols: the operator decides
        traced = torch.compiler.is_compiling()
        by_size = BY_SIZE if keep else NONE_KEPT
        segment = by_size if traced else fused_segment(network, x0, horizon, keep)
    else:
        segment = torch_segment(parameters, x0, system.control_size, spec.network_open, horizon)
        traced = torch.compiler.is_compiling()
        if x0.device.type == "cpu" and not traced:
            segment = min(segment, max(1, CACHED_ROWS // max(x0.shape[-2], 1)))
            if isinstance(path, TorchPath) and not foreign and x0.shape[0] >= MANY_WORLDS:
                kept = keep and recordings_bytes(parameters, x0, horizon) <= STORED_BYTES["cpu"]
                path = path._replace(by_steps=True, recorded=[] if kept else None)
    spec = spec._replace(segment=segment)
    own_loss = loss if callable(loss) else None
    numbers = () if physical is None else physical.names
    named, passed = tuple(names), (*parameters, *given)
    return Plan(spec, path, reason, named, passed, x0, own_loss, loss is not None, numbers)


def _check_inputs(call: str, inputs: Any, x0: Tensor, horizon: int, ensemble: bool) -> Tensor | None:
    """What the policy is given beside the states, checked."""
    if inputs is None:
        return None
    if not isinstance(inputs, Tensor):
        raise TypeError(f"{call}: inputs is of type {type(inputs).__name__}, expected a tensor or None")
    if ensemble:
        raise ValueError(f"{call}: inputs for an Ensemble, expected None; roll out its members() one by one")
    if inputs.ndim != 3 or tuple(inputs.shape[:2]) != (horizon, x0.shape[0]):
        raise ValueError(
            f"{call}: inputs has shape {tuple(inputs.shape)}, expected (horizon, nworld, k) = ({horizon}, "
            f"{x0.shape[0]}, any), time first"
        )
    check_like(inputs, x0, call, "inputs")
    if inputs.requires_grad:
        raise ValueError(
            f"{call}: inputs requires a gradient, expected a tensor that does not: none is computed for it; "
            "pass inputs.detach(), and make what is to be learned a parameter of the policy"
        )
    return inputs


def _differentiable(parameter: Tensor) -> bool:
    # a lazy parameter has a dtype, but is refused below
    return parameter.is_floating_point() or parameter.is_complex()


def custom_loss_value(call: str, plan: Plan, states: Tensor, controls: Tensor) -> Tensor:
    """The user's own loss of a trajectory, a scalar; of an ensemble one a member, (members,)."""
    assert plan.custom_loss is not None
    if plan.x0.ndim == 2:
        return _checked_loss(call, plan.custom_loss, states, controls)
    each = zip(states.unbind(1), controls.unbind(1), strict=True)
    return torch.stack([_checked_loss(call, plan.custom_loss, x, u) for x, u in each])


def _checked_loss(
    call: str, loss: Callable[[Tensor, Tensor], Tensor], states: Tensor, controls: Tensor
) -> Tensor:
    value = loss(states, controls)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{call}: loss returned {type(value).__name__}, expected a scalar tensor of (states, controls)"
        )
    if value.ndim != 0:
        raise ValueError(
            f"{call}: loss returned a tensor of shape {tuple(value.shape)}, expected a scalar; reduce it "
            f"with .mean() or .sum()"
        )
    return value


def check_system(system: Any, call: str) -> None:
    """Raises TypeError unless `system` is one, and not its class; the first check of every call."""
    if not isinstance(system, System):
        hint = "; make an instance of it" if isinstance(system, type) else ""
        raise TypeError(
            f"{call}: system is {system!r}, expected a warp_sims.System such as CartPole(poles=4){hint}"
        )
    settle()


def check_horizon(horizon: Any, call: str, system: Any, x0: Any) -> int:
    """Returns the number of steps as an int; nothing as long as it has been made.

    Raises:
        TypeError: not a whole number, or what it is checked against is no system or no tensor.
        ValueError: below 1, or trajectories from `x0` would not fit into memory or the indices of a kernel.
    """
    check_system(system, call)
    _check_tensor(system, x0, call, "x0")
    steps = as_int(horizon)
    if steps is None:
        raise TypeError(
            f"{call}: horizon is {horizon!r} of type {type(horizon).__name__}, expected an int of at least 1"
        )
    if steps < 1:
        raise ValueError(f"{call}: horizon is {steps}, expected at least 1 step")
    _check_size(call, system, x0, steps)
    return steps


_SMALL = 1 << 22
"""Numbers that fit everywhere: most rollouts need no further look."""


def _check_size(call: str, system: System, x0: Tensor, horizon: int) -> None:
    if horizon * (x0.numel() + 1) * system.control_size < _SMALL:
        return
    worlds = x0.shape[:-1].numel()
    if horizon * max(worlds * system.control_size, 1) > MOST_STEPS:
        raise ValueError(
            f"{call}: horizon is {horizon} with {worlds} worlds of {system.control_size} controls, expected "
            f"at most {MOST_STEPS} controls in one rollout, the range of a kernel's indices; shorten it or "
            "split the worlds"
        )
    numbers = (horizon + 1) * worlds * (system.state_size + system.control_size)
    # tracing a compiled graph, the machine cannot be asked
    if torch.compiler.is_compiling():
        return
    size, memory = numbers * x0.element_size(), _memory(x0.device)
    if size > memory:
        raise ValueError(
            f"{call}: horizon is {horizon} with {worlds} worlds: states and controls take {size / 2**30:.3g} "
            f"GiB, expected at most the {memory / 2**30:.3g} GiB that {x0.device} has; shorten it or split "
            "the worlds"
        )


@functools.cache
def _memory(device: torch.device) -> int:
    """Bytes of memory of a device, used or free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**47  # what an address can reach


def _check_checkpoint(every: Any, call: str) -> int | None:
    remedy = "leave it out, and the rollout's size decides"
    steps = None if every is None else as_int(every)
    if every is not None and steps is None:
        raise TypeError(
            f"{call}: checkpoint_every is {every!r} of type {type(every).__name__}, expected a number of "
            f"steps, an int of at least 1, or None; {remedy}"
        )
    if steps is not None and steps < 1:
        raise ValueError(f"{call}: checkpoint_every is {steps}, expected at least 1 step; {remedy}")
    return steps


def check_states(system: System, x: Any, call: str, name: str, members: int | None = None) -> Tensor:
    """Returns states that fit the system, and the members of an ensemble if there is one.

    Half precision becomes float32 under autocast; whatever else does not fit raises TypeError or ValueError.
    """
    _check_tensor(system, x, call, name)
    if x.layout != torch.strided:
        raise TypeError(f"{call}: {name} is {x.layout}, expected a dense tensor; use .to_dense()")
    single = x.ndim == 2 and x.shape[1] == system.state_size
    stacked = members is not None and x.ndim == 3 and x.shape[::2] == (members, system.state_size)
    if not single and not stacked:
        each = "" if members is None else f" or ({members}, nworld, {system.state_size}), an ensemble's own,"
        raise ValueError(
            f"{call}: {name} has shape {tuple(x.shape)}, expected (nworld, {system.state_size}){each} for "
            f"{type(system).__name__}"
        )
    if x.dtype not in _DTYPES:
        if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
            x = x.float()
        else:
            raise TypeError(
                f"{call}: {name} is {x.dtype}, expected torch.float32 or torch.float64; convert it with "
                f".float()"
            )
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{call}: {name} is on {x.device}, expected a CPU or a CUDA device; move it with .to()"
        )
    return x


def _check_tensor(system: System, x: Any, call: str, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{call}: {name} is of type {type(x).__name__}, expected a tensor (nworld, {system.state_size}); "
            f"use torch.as_tensor"
        )


def check_like(tensor: Tensor, like: Tensor, call: str, name: str) -> None:
    """Raises TypeError or ValueError unless dtype and device are those of the states."""
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{call}: {name} is {tensor.dtype}, expected {like.dtype}, the dtype of the states; convert one "
            f"with .to()"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{call}: {name} is on {tensor.device}, expected {like.device}, the device of the states; move "
            f"one with .to()"
        )


def _loss_weights(
    call: str, system: System, loss: Any, control_cost: Any, horizon: int
) -> tuple[float, float, float]:
    if isinstance(control_cost, bool) or not isinstance(control_cost, (int, float)):
        raise TypeError(
            f"{call}: control_cost is {control_cost!r} of type {type(control_cost).__name__}, expected a "
            f"number"
        )
    if not 0.0 <= control_cost < float("inf"):
        raise ValueError(f"{call}: control_cost is {control_cost!r}, expected a finite number of at least 0")
    if loss is None and control_cost != 0.0:
        raise ValueError(
            f"{call}: control_cost is {control_cost!r} with loss=None, expected 0: there is no loss to add "
            f"it to; "
            "add your own term to the loss that you build of out.controls"
        )
    final = running = 0.0
    if isinstance(loss, str):
        if loss not in ("final", "running"):
            raise ValueError(
                f'{call}: loss is {loss!r}, expected "final", "running", a callable of (states, controls), '
                f"or None"
            )
        # tracing a compiled graph, device functions cannot be made; the operator checks again
        if not torch.compiler.is_compiling() and not has_loss(system.number):
            raise ValueError(
                f"{call}: loss is {loss!r}, but {type(system).__name__} has no loss of its own; pass a "
                f"callable of (states, controls) or "
                "None, or give its device_functions a loss and loss_vjp"
            )
        if loss == "final":
            final = 1.0
        else:
            running = 1.0 / horizon if system.running_reduction == "mean" else 1.0
    elif loss is not None and not callable(loss):
        raise TypeError(
            f'{call}: loss is {loss!r}, expected "final", "running", a callable of (states, controls), or '
            f"None"
        )
    return final, running, float(control_cost)

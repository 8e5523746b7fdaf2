"""Policies and losses as the command line names them: the built-in ones, and `module:name` for your own."""

import argparse
import importlib
from collections.abc import Callable
from typing import Any, cast

import torch

from .estimators import Anneal, Blend, project_conflicting
from .options import HIDDEN, POLICIES, WIDTH
from .policies.networks import ACTIVATIONS, MLP, WaveCNN
from .systems import QuantumControl
from .systems.system import System
from .training.config import LOSSES


def _find(name: str, what: str) -> Any:
    """Returns what `module:name` stands for.

    Raises:
        ValueError: it cannot be imported from here.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} {name!r}: {error}; expected module:name with the module importable from here"
        ) from error


_NORMS = {"layernorm": "layer", "rmsnorm": "rms"}


def perceptron_options(name: str) -> dict[str, str]:
    """Activation and norm of an `MLP` by a name such as `mlp`, `mlp:elu` or `mlp:elu+layernorm`.

    Raises:
        ValueError: there is no such activation or norm.
    """
    _, _, words = name.partition(":")
    found: dict[str, str] = {}
    for word in words.split("+") if words else ():
        if word in ACTIVATIONS:
            found["activation"] = word
        elif word in _NORMS:
            found["norm"] = _NORMS[word]
        else:
            known = ", ".join([*ACTIVATIONS, *_NORMS])
            raise ValueError(f"policy {name!r}: {word!r} is unknown, expected mlp:A+N of {known}")
    return found


def make_policy(options: argparse.Namespace, system: System, seed: int, zero_last: bool) -> torch.nn.Module:
    """Returns the policy of --policy with its sizes, its weights drawn with `seed`.

    `module:name` is a module, or a function of the system that returns one; `zero_last` is for the built-in
    policies.

    Raises:
        ValueError: no such policy, or an option that is not for it.
    """
    name = options.network
    kind = "mlp" if name.startswith("mlp:") else name
    if kind not in POLICIES and ":" not in name:
        raise ValueError(
            f"unknown policy {name!r}, expected {', '.join(POLICIES)}, mlp:elu+layernorm and the like, or "
            "module:name for one of your own"
        )
    for option, of in (("hidden", "mlp"), ("width", "wavecnn")):
        if getattr(options, option) is not None and kind != of:
            raise ValueError(f"--{option} is not for --policy {name}")
    if kind in POLICIES:
        policy = _built_in(options, system)
        policy.reset_parameters(seed=seed, zero_last=zero_last)
        return policy
    torch.manual_seed(seed)
    return own_policy(name, system)


def own_policy(name: str, system: System) -> torch.nn.Module:
    """Returns the policy that `module:name` stands for: a module, or what a function makes for the system.

    Raises:
        ValueError: it cannot be imported from here, or is not a policy.
    """
    found = _find(name, "policy")
    policy = found if isinstance(found, torch.nn.Module) else found(system) if callable(found) else found
    if not isinstance(policy, torch.nn.Module):
        raise ValueError(
            f"policy {name!r} is {policy!r}, expected a torch.nn.Module or a function that returns one for a "
            "system"
        )
    return policy


def _built_in(options: argparse.Namespace, system: System) -> MLP | WaveCNN:
    if options.network.partition(":")[0] == "mlp":
        hidden = HIDDEN if options.hidden is None else tuple(options.hidden)
        own: dict[str, Any] = perceptron_options(options.network)
        return MLP(system.state_size, hidden, system.control_size, **own)
    if not isinstance(system, QuantumControl):
        raise ValueError(
            f"--policy wavecnn reads the wave function of a QuantumControl, not a {type(system).__name__}; "
            "give --policy mlp"
        )
    return WaveCNN(system.points, WIDTH if options.width is None else options.width)


def find_loss(name: str) -> str | Callable[..., torch.Tensor]:
    """Returns the loss of --loss: a name of ours, or a function of (states, controls).

    Raises:
        ValueError: no such loss.
    """
    if name in LOSSES:
        return name
    if ":" not in name:
        raise ValueError(
            f"unknown loss {name!r}, expected {', '.join(LOSSES)}, or module:name for a function of your own"
        )
    found = _find(name, "loss")
    if not callable(found):
        raise ValueError(f"loss {name!r} is {found!r}, expected a function of (states, controls)")
    return cast(Callable[..., torch.Tensor], found)


def find_combiner(name: str) -> Any:
    """Returns the combiner of --combiner: project, blend:W, anneal:A:B:N, or a function of a pair.

    Raises:
        ValueError: no such combiner.
    """
    kind, *numbers = name.split(":")
    try:
        if name == "project":
            return project_conflicting
        if kind == "blend" and len(numbers) == 1:
            return Blend(float(numbers[0]))
        if kind == "anneal" and len(numbers) == 3:
            return Anneal(float(numbers[0]), float(numbers[1]), int(numbers[2]))
    except ValueError as error:
        raise ValueError(f"combiner {name!r}: {error}, expected blend:0.3 or anneal:1:0:2000") from error
    return find_function(name, "combiner", "project, blend:W, anneal:A:B:N, or ")


def find_function(name: str, what: str, instead: str = "") -> Callable[..., Any]:
    """Returns the function that `module:name` stands for.

    Raises:
        ValueError: it cannot be imported from here, or is not a function.
    """
    if ":" not in name:
        raise ValueError(f"unknown {what} {name!r}, expected {instead}module:name of a function of your own")
    found = _find(name, what)
    if not callable(found):
        raise ValueError(f"{what} {name!r} is {found!r}, expected a function")
    return found

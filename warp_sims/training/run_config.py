"""A run's settings as the contents of its config.json, and back.

A system is written as its name in the registry (or `module:Class`) with its fields. A policy is written as
`module:Class` with the constructor arguments that it keeps as attributes of the same name. What cannot be
written like this (a class made inside a function, an argument that is not kept) becomes null, and must be
given when the run is loaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import systems
from ..estimators import Anneal, Blend, PerSecond
from ..kernels.flow import Flow
from ..policies.networks import ACTIVATIONS, MLP, NORMS, Bound, WaveCNN
from .config import TrainConfig
from .provenance import versions

FORMAT = "warp-sims run 1"
PARTS = ("system", "policy", "training")
"""What a run is made of; the rest of config.json says what it was made with."""


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Returns what config.json holds: enough to rebuild system and policy, and the versions in use."""
    settings = config.settings()
    flow = config.flow
    settings["flow"] = (
        flow.name.lower() if isinstance(flow, Flow) else [Flow.parse(f).name.lower() for f in flow]
    )
    if callable(config.loss):
        settings["loss"] = {"callable": _import_name(config.loss)}
    settings["combiner"] = _combiner_json(config.combiner)
    if config.inputs is not None:
        settings["inputs"] = {"callable": _import_name(config.inputs)}
    if isinstance(config.decay, PerSecond):
        settings["decay"] = {"per_second": config.decay.factor}
    return {
        "format": FORMAT,
        "system": system_json(config.system),
        "policy": {
            "class": _import_name(type(config.policy)),
            "arguments": _arguments(config.policy),
            "parameters": sum(p.numel() for p in config.policy.parameters()),
        },
        "training": settings,
        "versions": versions(),
    }


def system_json(system: systems.System) -> dict[str, Any]:
    """Returns a system as config.json holds it; `build_system` makes it again."""
    return {"class": system_name(type(system)), "fields": _fields(system)}


def from_json(
    data: Mapping[str, Any],
    *,
    system: systems.System | None = None,
    policy: torch.nn.Module | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    combiner: Callable[..., torch.Tensor] | None = None,
    inputs: Callable[..., torch.Tensor] | None = None,
) -> TrainConfig:
    """Returns the settings that `to_json` wrote; arguments given here replace them."""
    settings = dict(data["training"])
    known: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(TrainConfig) if f.name not in ("system", "policy")
    }
    for name in settings:
        if name not in known:
            raise ValueError(
                f"config.json holds the setting {name}={settings[name]!r}, which this version of warp-sims "
                "does not know; update it, or remove the line"
            )
    settings = known | settings  # of an earlier version: what it lacks is as it was then
    if isinstance(settings["loss"], dict):
        settings["loss"] = loss or _imported(settings["loss"].get("callable"), "loss")
    if settings["combiner"] is not None:
        settings["combiner"] = combiner or _build_combiner(settings["combiner"])
    if settings["inputs"] is not None:
        written = settings["inputs"].get("callable")
        settings["inputs"] = inputs or _imported(written, "inputs")
    if isinstance(settings["decay"], dict):
        factor: Any = settings["decay"].get("per_second")
        settings["decay"] = PerSecond(factor)
    if system is None:
        system = build_system(data)
    if policy is None:
        policy = _build_policy(data)
    # Where the run took place is a fact about that machine; here it continues wherever the policy is put.
    settings["device"] = None
    settings["graph"] = False
    made = settings["dtype"]
    if made is None or isinstance(made, str):
        dtypes = {"float32": torch.float32, "float64": torch.float64}
        policy = policy.to(dtypes.get(made or "float32"))
    return TrainConfig(system=system, policy=policy, **settings)


def _combiner_json(combiner: Any) -> Any:
    if isinstance(combiner, Blend):
        return {"blend": combiner.weight}
    if isinstance(combiner, Anneal):
        return {"anneal": [combiner.start, combiner.end, combiner.updates]}
    return None if combiner is None else {"callable": _import_name(combiner)}


def _build_combiner(written: Any) -> Any:
    if "blend" in written:
        return Blend(written["blend"])
    if "anneal" in written:
        return Anneal(*written["anneal"])
    return _imported(written.get("callable"), "combiner")


def build_system(data: Mapping[str, Any]) -> systems.System:
    """Returns the system of a run from the contents of its config.json."""
    written = data["system"]
    name, fields = written.get("class"), written.get("fields")
    if not isinstance(name, str) or not isinstance(fields, dict):
        raise ValueError("the run's system cannot be rebuilt from its config.json; give it as system=…")
    return _built("system", systems.resolve(name), fields)


def _build_policy(data: Mapping[str, Any]) -> torch.nn.Module:
    written = data["policy"]
    name, arguments = written.get("class"), written.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(
            "the run's policy cannot be rebuilt from its config.json, which holds the constructor "
            "arguments only of a class that can be imported and keeps each of them as an attribute of the "
            "same name; give it as policy=…"
        )
    made = _imported(name, "policy")
    if not (isinstance(made, type) and issubclass(made, torch.nn.Module)):
        raise ValueError(f"the run's policy {name!r} is no torch.nn.Module; give it as policy=…")
    if made in (MLP, WaveCNN):
        with torch.device("meta"):  # what it takes, before memory is taken
            count = sum(p.numel() for p in _built("policy", made, arguments).parameters())
        if count != written.get("parameters", count):
            raise ValueError(
                f"config.json describes a policy of {count} parameters, but holds "
                f"parameters={written['parameters']!r}; give it as policy=…"
            )
    return _built("policy", made, arguments)


def _built(what: str, made: type, arguments: Mapping[str, Any]) -> Any:
    try:
        return made(**_keywords(arguments))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the run's {what} cannot be made from its config.json ({reason}); give it as {what}=…"
        ) from error


def system_name(system_class: type) -> str | None:
    """Returns the name under which `systems.resolve` finds a class; None where it finds none."""
    for name, registered in systems.registry.items():
        if registered is system_class:
            return name
    return _import_name(system_class)


def _import_name(thing: Any) -> str | None:
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not module or not name or "<" in name:
        return None
    return f"{module}:{name}"


def _imported(name: Any, what: str) -> Any:
    module, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    try:
        if not module or not path:
            raise ValueError("it has no name that can be imported")
        return operator.attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the run's {what} cannot be imported ({error}); give it as {what}=…") from error


def _plain(value: Any) -> Any:
    """Returns `value` as JSON holds it; raises TypeError for what JSON does not hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    raise TypeError


def _fields(system: systems.System) -> dict[str, Any] | None:
    names = [f.name for f in dataclasses.fields(system) if f.init]
    needed = inspect.signature(type(system)).parameters.values()
    if any(p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in names for p in needed):
        return None  # made of functions
    try:
        return {name: _plain(getattr(system, name)) for name in names}
    except TypeError:
        return None


def _arguments(policy: torch.nn.Module) -> dict[str, Any] | None:
    if type(policy) is MLP:
        linears = [layer for layer in policy if isinstance(layer, torch.nn.Linear)]
        sizes = [layer.in_features for layer in linears] + [linears[-1].out_features]
        written = {"in_size": sizes[0], "hidden": sizes[1:-1], "out_size": sizes[-1]}
        return written | _options(policy)
    parameters = inspect.signature(type(policy)).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    try:  # dtype and device are those of the weights
        return {
            p.name: _plain(getattr(policy, p.name)) for p in parameters if p.name not in ("dtype", "device")
        }
    except (AttributeError, TypeError):
        return None


def _options(policy: MLP) -> dict[str, Any]:
    """Activation, norm and bound of a perceptron where they are not the default."""
    found: dict[str, Any] = {}
    for option, known in (("activation", ACTIVATIONS), ("norm", NORMS)):
        for name, kind in known.items():
            if any(type(layer) is kind for layer in policy):
                found[option] = name
    if isinstance(policy[-1], Bound):
        found["bound"] = [policy[-1].low, policy[-1].high]
    return {name: value for name, value in found.items() if (name, value) != ("activation", "tanh")}


def _tuples(value: Any) -> Any:
    """JSON knows lists only; frozen dataclasses and layer sizes want to be hashable."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _keywords(written: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in written.items()}

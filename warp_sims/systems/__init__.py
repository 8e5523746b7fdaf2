"""Simulated systems by name: the built-in ones, and those of users as `module:Class`."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from ..robots.ant import Ant
from ..robots.half_cheetah import HalfCheetah
from ..robots.hopper import Hopper
from ..robots.linked_pendulum import LinkedPendulum
from ..robots.robot import Robot
from .cartpole import CartPole
from .guidance import GuidanceByRepulsion
from .quadrotor import Quadrotor
from .quantum import QuantumControl
from .system import BlockFunctions, DeviceFunctions, MemoryFunctions, ParameterFunctions, System

__all__ = [
    "Ant",
    "BlockFunctions",
    "CartPole",
    "DeviceFunctions",
    "GuidanceByRepulsion",
    "HalfCheetah",
    "Hopper",
    "LinkedPendulum",
    "MemoryFunctions",
    "ParameterFunctions",
    "Quadrotor",
    "QuantumControl",
    "Robot",
    "System",
    "registry",
    "resolve",
]

registry: Mapping[str, type[System]] = MappingProxyType(
    {
        "cartpole": CartPole,
        "guidance": GuidanceByRepulsion,
        "quantum": QuantumControl,
        "hopper": Hopper,
        "cheetah": HalfCheetah,
        "ant": Ant,
        "links": LinkedPendulum,
        "quadrotor": Quadrotor,
    }
)
"""Systems by the name they have on the command line."""


def resolve(name: str) -> type[System]:
    """Returns the class of a system by its registered name or as `module:Class`.

    Raises:
        ValueError: no such system.
    """
    if name in registry:
        return registry[name]
    known = ", ".join(sorted(registry))
    if ":" not in name:
        raise ValueError(f"unknown system {name!r}, expected {known}, or module:Class for one of your own")
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"system {name!r}: {error}; expected module:Class with the module importable from here"
        ) from error
    if not (isinstance(found, type) and issubclass(found, System)):
        raise ValueError(f"system {name!r} is {found!r}, expected a class that derives from warp_sims.System")
    return found

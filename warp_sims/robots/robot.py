"""Robots as users name them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from .articulated import Articulated
from .model import Model, as_model

__all__ = ["Robot"]


@dataclasses.dataclass(frozen=True)
class Robot(Articulated):
    model: Model = None  # type: ignore
    dt: float = 0.01
    substeps: int = 1
    implicit: bool = False
    friction: Literal["smooth", "linear"] = "smooth"
    approach: bool = False
    contact_stiffness: float = 2e4
    contact_damping: float = 0.05
    friction_stiffness: float = 1e3
    slip_speed: float = 0.1
    limit_stiffness: float = 50.0
    limit_damping: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_model(self.model))
        super().__post_init__()

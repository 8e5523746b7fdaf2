"""The cart-pole as users name it; the physics is in kernels/systems/cartpole.py."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from ..kernels.system import DeviceFunctions
from ..kernels.systems import cartpole as _cartpole
from .system import System, check_types, require, require_one, require_positive

__all__ = ["CartPole"]


@dataclasses.dataclass(frozen=True)
class CartPole(System):
    """A cart with any number of independent poles, pushed by a force; the task is to swing all poles up.

    State [x, v, q_1, w_1, q_2, w_2, ...]: cart position [m] and velocity [m/s], pole angles [rad] from
    upright and rates [rad/s]. Control [force] in N. Cost of a state: 1 - mean cos q, 0 with every pole
    upright. Equations: kernels/systems/cartpole.py. The defaults are the published values; the total mass is
    1.1 kg whatever the number of poles.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range.
    """

    train_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"horizon": 100, "loss": "final"})
    bench_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"numbers": {"poles": 4}, "scaled": ("poles", (1, 2, 4, 8))}
    )

    poles: int = 4
    """Number of poles, at least 1."""
    dt: float = 0.01
    """Time step [s]."""
    gravity: float = 9.8
    """Gravity [m/s^2]."""
    pole_mass: float = 0.1
    """Mass of a pole [kg]."""
    total_mass: float = 1.1
    """Mass of cart and pole [kg]."""
    pole_length: float = 0.5
    """Half the length of a pole [m]."""

    def __post_init__(self) -> None:
        check_types(self)
        require_one(self, "poles")
        require_positive(self, "dt", "total_mass", "pole_length")
        require(
            self,
            "pole_mass",
            0 <= self.pole_mass < self.total_mass,
            f"at least 0 and below total_mass={self.total_mass}",
        )
        super().__post_init__()

    @property
    def state_size(self) -> int:
        return 2 + 2 * self.poles

    @property
    def control_size(self) -> int:
        return 1

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _cartpole.make_functions(self.poles, dtype)

    def draw(self, axes: Any, state: np.ndarray) -> None:
        """Draws the cart on its rail and every pole in a colour of its own, upright up."""
        from ..pictures.drawing import draw_cartpole

        draw_cartpole(axes, self, state)

    def sample_states(self, n: int, seed: int, split: str) -> np.ndarray:
        """Initial states (n, state_size): poles hanging, x, v and w uniform in [-1, 1], q in pi +-
        pi/6.

        n = 256 and seed 42 give the published training and test sets, bit for bit in float32.
        """
        random = np.random.RandomState(seed)
        shape = (n, 1 + self.poles, 2)
        draw = random.rand(*shape).astype(np.float32)
        if split == "test":
            draw = random.rand(*shape).astype(np.float32)
        states = 2 * draw - 1
        states[:, 1:, 0] = np.pi + states[:, 1:, 0] * np.pi / 6
        return states.reshape(n, self.state_size)

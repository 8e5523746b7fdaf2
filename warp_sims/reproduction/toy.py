"""The paper's two studies in the plane, computed by the gates and the comparison that training uses.

The landscape (the paper's first figure): with policy N(x) = a x^2 + b x and simulator S(x, u) = x + u, so
that x_{t+1} = x_t + N(x_t), the loss L = 1/2 (x_4 - 2)^2 from x_0 = -0.3 over the plane of (a, b), with the
gradient fields of R, M and C.

The rotation: the loss L = p^2 + q^2 has the gradient 2 (p, q). The field F(p, q) = (p, q) - 2 J (p, q), J the
turn by +90 degrees, points uphill everywhere too, and turns besides. Adam follows F alone, and F combined
with the gradient as M is combined with R.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from ..bridge.autograd import operators
from ..gradients import gradient_pair
from ..kernels.system import DeviceFunctions
from ..kernels.systems import toy as _toy
from ..rollouts import simulate
from ..systems import System

HORIZON = 4
START = -0.3
TARGET = 2.0
EXTENT = 4.0
"""The landscape covers [-EXTENT, EXTENT] in both parameters."""


@dataclasses.dataclass(frozen=True)
class ToySystem(System):
    """x_next = x + u with the loss 1/2 (x - target)^2.

    State [x, world]: the second component is the number of the world, by which `ToyPolicy` finds the
    parameters of that world. Control [u].
    """

    target: float = TARGET
    """Where x should end."""

    @property
    def state_size(self) -> int:
        return 2

    @property
    def control_size(self) -> int:
        return 1

    def device_functions(self, dtype: Any) -> DeviceFunctions:
        return _toy.make_functions(dtype)


class ToyPolicy(torch.nn.Module):
    """N(x) = a x^2 + b x, with parameters of its own for every world.

    Worlds do not touch each other's parameters: one backward pass gives the gradient at every point (a, b).

    Args:
        a, b: Parameters of each world, (nworld,).
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Controls (n, 1) for states (n, 2)."""
        position, world = x[:, :1], x[:, 1].long()
        return self.a[world, None] * position**2 + self.b[world, None] * position


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """Loss (points,), and gradient fields (points, 2) at points (a, b)."""

    points: np.ndarray
    loss: np.ndarray
    regular: np.ndarray
    modified: np.ndarray
    combined: np.ndarray


def landscape(a: torch.Tensor, b: torch.Tensor) -> Landscape:
    """Computes loss and fields of R, M and C at points of the plane of parameters, in float64.

    Args:
        a, b: Parameters of the points, (points,).
    """
    system, policy = ToySystem(), ToyPolicy(a.double(), b.double())
    count = len(policy.a)
    x0 = torch.stack(
        [torch.full((count,), START, dtype=torch.float64), torch.arange(count, dtype=torch.float64)], dim=1
    )
    pair = gradient_pair(system, policy, x0, horizon=HORIZON, base="modified", check="regular")

    def field(gradients: dict[str, torch.Tensor]) -> np.ndarray:
        # The loss is a mean over worlds; here every world has a loss of its own.
        return count * torch.stack([gradients["a"], gradients["b"]], dim=1).numpy()

    return Landscape(
        np.stack([policy.a.detach().numpy(), policy.b.detach().numpy()], axis=1),
        _losses(system, policy, x0),
        field(pair.check),
        field(pair.base),
        field(pair.combine()),
    )


@torch.no_grad()
def _losses(system: ToySystem, policy: ToyPolicy, x: torch.Tensor) -> np.ndarray:
    for _ in range(HORIZON):
        x = simulate(system, x, policy(x)[None])[1]
    return (0.5 * (x[:, 0] - system.target) ** 2).numpy()


def grid(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the points of a regular grid over the plane, count x count, row by row of equal b."""
    axis = torch.linspace(-EXTENT, EXTENT, count, dtype=torch.float64)
    b, a = torch.meshgrid(axis, axis, indexing="ij")
    return a.flatten(), b.flatten()


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """A descent in the plane: points (steps, 2), losses (steps,), each before the update of its step."""

    points: np.ndarray
    loss: np.ndarray


def rotation(combined: bool, steps: int = 200, lr: float = 0.1) -> Descent:
    """Follows the turning field F from (2, 4) with Adam.

    Args:
        combined: Compare F with the gradient, component by component, and keep it where the signs agree.
        steps: Evaluations of the loss, the last of them in the last step, before its update.
        lr: Learning rate.
    """
    point = torch.nn.Parameter(torch.tensor([2.0, 4.0], dtype=torch.float64))
    optimizer = torch.optim.Adam([point], lr=lr)
    points = []
    for _ in range(steps):
        at = point.detach().clone()
        points.append(at.numpy())
        turned = torch.stack([-at[1], at[0]])
        field = at - 2.0 * turned
        point.grad = operators.combine(field, 2.0 * at, False)[0] if combined else field
        optimizer.step()
    path = np.stack(points)
    return Descent(path, (path**2).sum(axis=1))

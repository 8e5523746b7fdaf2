"""Derivatives of a step that torch differentiates."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from .simulator import Pull, check_output

REPLICATED_ROWS = 1 << 14
"""Up to so many rows, Jacobians come from one pull over copies of the rows, one copy for each component of
the next state. With more rows the overhead of a pull is small, and each component has its own pull.
"""

Step = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def exact(x: Tensor) -> Iterator[None]:
    """Turns autocast off: it is for policies, not for simulators."""
    if not torch.is_autocast_enabled(x.device.type):
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield


def check_fixed(system: Any, role: str, function: Callable[..., Tensor], *arguments: Tensor) -> None:
    """Raises TypeError if a function holds a tensor that requires a gradient, which would not arrive."""
    with torch.inference_mode(False), torch.enable_grad():
        if recording() and getattr(function(*map(ordinary, arguments)), "requires_grad", False):
            raise TypeError(
                f"{type(system).__name__}: {role} uses a tensor that requires a gradient besides its "
                "arguments, expected numbers or tensors that do not: it would get none; detach it, or call "
                "requires_grad_(False) on a module"
            )


def ordinary(x: Tensor) -> Tensor:
    """The same values as a tensor that autograd may record."""
    return x.clone() if x.is_inference() else x.detach()


def recording() -> bool:
    """Whether autograd records here; below torch's dispatcher, in a traced graph, it does not."""
    probe = torch.zeros((), requires_grad=True)
    return (probe * 1.0).requires_grad


def linearize(system: Any, step: Step, x: Tensor, u: Tensor) -> tuple[Tensor, Pull]:
    """Next states and the pullback of a step, from one recording.

    Raises:
        TypeError, ValueError: the next states are not like the states, or autograd finds no dependence on the
            inputs.
    """
    with torch.inference_mode(False), torch.enable_grad(), exact(x):
        x, u = ordinary(x), ordinary(u)
        if not recording():
            x_next, pull, *_ = vjp(step, x, u)
            check_output(system, x_next, x)
            return x_next.detach(), pull
        x, u = x.requires_grad_(), u.requires_grad_()
        x_next = step(x, u)
        check_output(system, x_next, x)
        if not x_next.requires_grad:
            raise ValueError(
                f"{type(system).__name__}: step returned states without a gradient, expected states that "
                "autograd follows back to x and u: no detach(), no_grad(), .item(), numpy or torch.tensor() "
                "on the way"
            )

        def pull(adj: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.autograd.grad(x_next, (x, u), adj, retain_graph=True, allow_unused=True)
            adj_x, adj_u = (torch.zeros_like(q) if a is None else a for a, q in zip(found, (x, u)))
            return adj_x, adj_u

        return x_next.detach(), pull


def jacobians(system: Any, step: Step, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Next states, and [dS/dx dS/du] (rows, state_size, state_size + control_size), rows not mixing."""
    (rows, n), m = x.shape, u.shape[1]
    units = torch.eye(n, dtype=x.dtype, device=x.device).unsqueeze(1).expand(n, rows, n)
    if n * rows <= REPLICATED_ROWS:
        again, pull = linearize(system, step, x.repeat(n, 1), u.repeat(n, 1))
        adj_x, adj_u = pull(units.reshape(n * rows, n))
        x_next, columns = again[:rows], torch.cat((adj_x, adj_u), dim=1).view(n, rows, n + m)
    else:
        x_next, pull = linearize(system, step, x, u)
        columns = torch.stack([torch.cat(pull(unit), dim=1) for unit in units.contiguous()])
    return x_next, columns.transpose(0, 1)


def gradient(cost: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of each row's cost by that row."""
    with torch.inference_mode(False), torch.enable_grad(), exact(x):
        x = ordinary(x)
        ones = x.new_ones(x.shape[:1])
        if not recording():
            _, pull, *_ = vjp(cost, x)
            return pull(ones)[0]
        x = x.requires_grad_()
        value = cost(x)
        if not value.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(value, x, ones, allow_unused=True)
        return torch.zeros_like(x) if found is None else found

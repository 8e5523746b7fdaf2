"""Simulators whose step torch differentiates, and derivatives of functions of tensors."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import vjp

from .simulator import Pull, Simulator, check_output, name_of

REPLICATED_ROWS = 1 << 14
"""Up to so many rows, Jacobians come from one pull over copies of the rows, one copy for each component of
the next state. With more rows the overhead of a pull is small, and each component has its own pull.
"""


@contextlib.contextmanager
def exact(x: Tensor) -> Iterator[None]:
    """Turns autocast off: it is for policies, not for simulators."""
    if not torch.is_autocast_enabled(x.device.type):
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield


def ordinary(x: Tensor) -> Tensor:
    """The same values as a tensor that autograd may record."""
    return x.clone() if x.is_inference() else x.detach()


def recording() -> bool:
    """Whether autograd records here; below torch's dispatcher, in a traced graph, it does not."""
    probe = torch.zeros((), requires_grad=True)
    return (probe * 1.0).requires_grad


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


class TorchSimulator(Simulator):
    """A simulator that consists of functions of tensors."""

    _step: Callable[..., Tensor]
    _loss: Callable[..., Tensor] | None

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """Next states (n, state_size)."""
        if not torch.is_autocast_enabled(x.device.type):
            return self._step(x, u)
        with exact(x):
            return self._step(x, u)

    def first_use(self, x: Tensor, u: Tensor) -> None:
        """Raises TypeError if step or loss hold a tensor that requires a gradient."""
        self._check_fixed("step", self._step, x, u)
        if self._loss is not None:
            self._check_fixed("loss", self._loss, x)

    def _check_fixed(self, role: str, function: Callable[..., Tensor], *arguments: Tensor) -> None:
        """Raises TypeError if a function holds a tensor that requires a gradient, which would not arrive."""
        with torch.inference_mode(False), torch.enable_grad():
            if recording() and getattr(function(*map(ordinary, arguments)), "requires_grad", False):
                raise TypeError(
                    f"{name_of(self)}: {role} uses a tensor that requires a gradient besides its arguments, "
                    "expected numbers or tensors that do not: it would get none; detach it, or call "
                    "requires_grad_(False) on a module"
                )

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Pull]:
        """Next states and the pullback, from one recording.

        Raises:
            TypeError, ValueError: the next states are not like the states, or autograd finds no dependence on
                the inputs.
        """
        with torch.inference_mode(False), torch.enable_grad(), exact(x):
            x, u = ordinary(x), ordinary(u)
            if not recording():
                x_next, pull, *_ = vjp(self._step, x, u)
                check_output(self, x_next, x)
                return x_next.detach(), pull
            x, u = x.requires_grad_(), u.requires_grad_()
            x_next = self._step(x, u)
            check_output(self, x_next, x)
            if not x_next.requires_grad:
                raise ValueError(
                    f"{name_of(self)}: step returned states without a gradient, expected states that "
                    "autograd follows back to x and u: no detach(), no_grad(), .item(), numpy or "
                    "torch.tensor() on the way"
                )

            def pull(adj: Tensor) -> tuple[Tensor, Tensor]:
                found = torch.autograd.grad(x_next, (x, u), adj, retain_graph=True, allow_unused=True)
                adj_x, adj_u = (torch.zeros_like(q) if a is None else a for a, q in zip(found, (x, u)))
                return adj_x, adj_u

            return x_next.detach(), pull

    def jacobians(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Next states, and [dS/dx dS/du] (n, state_size, state_size + control_size), rows not mixing."""
        (rows, n), m = x.shape, u.shape[1]
        units = torch.eye(n, dtype=x.dtype, device=x.device).unsqueeze(1).expand(n, rows, n)
        record = TorchSimulator.linearize  # a subclass's own may not take other rows
        if n * rows <= REPLICATED_ROWS:
            again, pull = record(self, x.repeat(n, 1), u.repeat(n, 1))
            adj_x, adj_u = pull(units.reshape(n * rows, n))
            x_next, columns = again[:rows], torch.cat((adj_x, adj_u), dim=1).view(n, rows, n + m)
        else:
            x_next, pull = record(self, x, u)
            columns = torch.stack([torch.cat(pull(unit), dim=1) for unit in units.contiguous()])
        return x_next, columns.transpose(0, 1)

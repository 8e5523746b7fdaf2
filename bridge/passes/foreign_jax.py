"""Simulators whose step JAX differentiates; memory is handed over, not copied, in both directions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .foreign_torch import ordinary
from .simulator import Pull, Simulator, check_output, name_of

KEPT = 64
"""Steps whose compiled functions are kept."""


def jax_module() -> Any:
    """JAX, which is no dependency."""
    try:
        import jax
    except ImportError as error:
        raise ImportError(
            "JaxSystem: JAX is not installed, expected the package jax; pip install jax"
        ) from error
    return jax


def to_jax(x: Tensor) -> Any:
    """A tensor as JAX sees it; it must not be written to while JAX may read it.

    Raises:
        TypeError: float64, which JAX would round to float32.
    """
    jax = jax_module()
    if x.dtype == torch.float64 and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise TypeError(
            "JaxSystem: the states are torch.float64, but JAX computes in float32 unless it is told "
            'otherwise; expected torch.float32, or jax.config.update("jax_enable_x64", True) before JAX is '
            "first used"
        )
    # dlpack takes neither gradients nor strides that leave gaps
    return jax.dlpack.from_dlpack(ordinary(x).resolve_neg().contiguous())


def _compiled(function: Callable[..., Any], jit: bool) -> Callable[..., Any]:
    return jax_module().jit(function) if jit else function


@functools.lru_cache(maxsize=KEPT)
def functions_of(step: Callable[..., Any], jit: bool) -> dict[str, Callable[..., Any]]:
    """What is made of a step once, so that JAX compiles it once a shape."""
    jax = jax_module()

    def linearize(x: Any, u: Any) -> tuple[Any, Any]:
        return jax.vjp(step, x, u)

    def jacobians(x: Any, u: Any) -> tuple[Any, Any]:
        x_next, pull = jax.vjp(step, x, u)
        n = x.shape[1]
        units = jax.numpy.eye(n, dtype=x.dtype)[:, None, :].repeat(x.shape[0], axis=1)
        adj_x, adj_u = jax.vmap(pull)(units)
        return x_next, jax.numpy.concatenate((adj_x, adj_u), axis=2).transpose(1, 0, 2)

    return {
        "step": _compiled(step, jit),
        "linearize": _compiled(linearize, jit),
        "pull": _compiled(lambda pull, adj: pull(adj), jit),
        "jacobians": _compiled(jacobians, jit),
    }


@functools.lru_cache(maxsize=KEPT)
def cost_functions_of(cost: Callable[..., Any], jit: bool) -> dict[str, Callable[..., Any]]:
    """The same of a cost."""
    jax = jax_module()
    return {
        "cost": _compiled(cost, jit),
        "gradient": _compiled(jax.grad(lambda x: cost(x).sum()), jit),
    }


class JaxSimulator(Simulator):
    """A simulator that consists of functions of JAX arrays."""

    _step: Callable[..., Any]
    _loss: Callable[..., Any] | None
    _jit: bool
    """Whether they are compiled."""

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """Next states (n, state_size)."""
        return self._to_torch(self._of_step["step"](to_jax(x), to_jax(u)))

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Pull]:
        """Next states and the pullback, from one recording."""
        functions = self._of_step
        value, recorded = functions["linearize"](to_jax(x), to_jax(u))
        x_next = self._to_torch(value)
        check_output(self, x_next, x)

        def pull(adj: Tensor) -> tuple[Tensor, Tensor]:
            adj_x, adj_u = functions["pull"](recorded, to_jax(adj))
            return self._to_torch(adj_x), self._to_torch(adj_u)

        return x_next, pull

    def jacobians(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Next states, and [dS/dx dS/du] (n, state_size, state_size + control_size), rows not mixing."""
        x_next, both = self._of_step["jacobians"](to_jax(x), to_jax(u))
        return self._to_torch(x_next), self._to_torch(both)

    def cost(self, x: Tensor) -> Tensor:
        """Cost of states (n, state_size), one a row (n,)."""
        return self._to_torch(self._of_loss["cost"](to_jax(x)), "loss")

    def cost_gradient(self, x: Tensor) -> Tensor:
        """Gradient of each row's cost by that row, (n, state_size)."""
        return self._to_torch(self._of_loss["gradient"](to_jax(x)), "loss")

    @property
    def _of_step(self) -> dict[str, Callable[..., Any]]:
        return functions_of(self._step, self._jit)

    @property
    def _of_loss(self) -> dict[str, Callable[..., Any]]:
        assert self._loss is not None
        return cost_functions_of(self._loss, self._jit)

    def _to_torch(self, value: Any, what: str = "step") -> Tensor:
        """A JAX array as a tensor, when it has been computed."""
        jax = jax_module()
        if not isinstance(value, jax.Array):
            raise TypeError(
                f"{name_of(self)}: {what} returned {type(value).__name__}, expected a JAX array of states"
            )
        return torch.from_dlpack(value.block_until_ready())

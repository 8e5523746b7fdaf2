"""Checks adjoints that Warp generated, in float64, before their first use.

It compares them with finite differences at the system's own initial states, if it has any, and at random
states, through the sweeps that will use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.registry import VERIFIERS, Prepared
from . import sweeps
from .foreign_check import TOLERANCES, Source, compare, differences
from .spec import Cotangents, LossWeights, Spec

POINTS = 8
"""Initial states, and as many random ones."""


def verify(system: Any, number: int, p: Prepared) -> None:
    """Raises ValueError if a generated adjoint disagrees with finite differences.

    Args:
        system: The system, for its name and its initial states.
        number: Of the system.
        p: Its kernels for float64.
    """
    name, tolerance = type(system).__name__, TOLERANCES[torch.float64]
    with torch.inference_mode(False), torch.no_grad():
        q = drawn_points(system, p)
        n = p.state_size

        def step(q: Tensor) -> Tensor:
            return sweeps.simulate(p, q[:, :n].contiguous(), q[:, n:].unsqueeze(0).contiguous())[1]

        def cost(q: Tensor) -> Tensor:
            each = [
                sweeps.loss(p, row.expand(2, 1, n).contiguous(), row.new_zeros(1, 1, p.control_size), _FINAL)
                for row in q
            ]
            return torch.stack(each).unsqueeze(1)

        source = Source(
            f"{name}: its device functions have no step_vjp, and the one that Warp generates is wrong",
            "Warp's adjoint",
            "Warp is right about straight code, branches and static loops of up to 4 turns, not about vector "
            "components written twice, longer loops that carry values, or break; rewrite the step, or write "
            "step_vjp by hand (warp_sims.check compares it)",
        )
        compare(source, _jacobians(number, p, q), differences(step, q, tolerance), tolerance, n)
        if p.functions.loss is not None:
            source = source._replace(
                head=f"{name}: the adjoint of its loss that Warp generates is wrong", output="the cost"
            )
            given = _cost_gradients(number, p, q[:, :n])
            compare(source, given, differences(cost, q[:, :n], tolerance), tolerance, n)


_FINAL = LossWeights(1.0, 0.0, 0.0)


def drawn_points(system: Any, p: Prepared) -> Tensor:
    """Draws points, each a state followed by a control, (points, state_size + control_size)."""
    generator = torch.Generator().manual_seed(0)
    size = p.state_size + p.control_size
    q = torch.randn(2 * POINTS, size, generator=generator, dtype=torch.float64)
    try:
        own = system.initial_states(POINTS, seed=0)
    except (NotImplementedError, AttributeError, TypeError, ValueError):
        own = None  # it need not have any
    if isinstance(own, Tensor) and own.shape == (POINTS, p.state_size):
        q[:POINTS, : p.state_size] = own.to(torch.float64).cpu()
    return q.to(p.torch_device)


def _jacobians(number: int, p: Prepared, q: Tensor) -> Tensor:
    """[dS/dx dS/du] (points, state_size, state_size + control_size) by the adjoint sweep."""
    n, count = p.state_size, q.shape[0]
    states, controls = q[:, :n].repeat(n, 1), q[:, n:].repeat(n, 1).unsqueeze(0)
    adj = q.new_zeros(2, n * count, n)
    adj[1] = torch.eye(n, dtype=q.dtype, device=q.device).repeat_interleave(count, dim=0)
    both = torch.stack((states, states)).contiguous()
    mu, adj_x = sweeps.adjoint(
        p, Spec(number, "M"), both, controls.contiguous(), None, Cotangents(None, adj, None)
    )
    return torch.cat((adj_x[0], mu[0, 0]), dim=1).view(n, count, -1).transpose(0, 1)


def _cost_gradients(number: int, p: Prepared, x: Tensor) -> Tensor:
    """Gradients of the cost at the points, (points, 1, state_size), by the adjoint sweep."""
    count, n = x.shape
    states = x.expand(2, count, n).contiguous()
    controls = x.new_zeros(1, count, p.control_size)
    # with closed edges only its running cost gives a segment's first state a cotangent
    spec, g = Spec(number, "SS", running=float(count)), Cotangents(x.new_ones(()), None, None)
    carried = x.new_zeros(1, count, n)
    _, adj = sweeps.adjoint(p, spec, states, controls, None, g, 1, carried, count)
    return adj[0].unsqueeze(1)


VERIFIERS.append(verify)

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
from .spec import Cotangents, Spec

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

        def cost(x: Tensor) -> Tensor:
            return sweeps.costs(p, x.contiguous()).unsqueeze(1)

        source = Source(
            f"{name}: its device functions have no step_vjp, and the one that Warp generates is wrong",
            "Warp's adjoint",
            "Warp is right about straight code, branches and static loops of up to 4 turns, not about vector "
            "components written twice, longer loops that carry values, or break; rewrite the step, or write "
            "step_vjp by hand (warp_sims.check compares it)",
        )
        compare(source, jacobians(number, p, q), differences(step, q, tolerance), tolerance, n)
        if p.functions.loss is not None:
            source = source._replace(
                head=f"{name}: the adjoint of its loss that Warp generates is wrong", output="the cost"
            )
            given = sweeps.cost_gradients(p, number, q[:, :n]).unsqueeze(1)
            compare(source, given, differences(cost, q[:, :n], tolerance), tolerance, n)


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


def jacobians(number: int, p: Prepared, q: Tensor) -> Tensor:
    """[dS/dx dS/du] (points, state_size, state_size + control_size) by the adjoint sweep: one step in
    state_size * points worlds, with the unit cotangent of one component after the other.
    """
    n, count = p.state_size, q.shape[0]
    controls = q[:, n:].repeat(n, 1).unsqueeze(0)
    states = sweeps.simulate(p, q[:, :n].repeat(n, 1), controls)
    adj = torch.zeros_like(states)
    adj[1] = torch.eye(n, dtype=q.dtype, device=q.device).repeat_interleave(count, dim=0)
    mu, adj_x = sweeps.adjoint(p, Spec(number, "M"), states, controls, None, Cotangents(None, adj, None))
    return torch.cat((adj_x[0], mu[0, 0]), dim=1).view(n, count, -1).transpose(0, 1)


VERIFIERS.append(verify)

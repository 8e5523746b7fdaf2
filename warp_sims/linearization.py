"""Jacobians of a step, for controllers that are computed and not trained."""

import torch
from torch import Tensor

from .bridge.autograd import rollout as _bridge
from .bridge.passes.simulator import Simulator
from .plans import check_like, check_states, check_system
from .systems import System

__all__ = ["linearize"]


def linearize(system: System, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobians of one step at many points: A = dS/dx and B = dS/du.

        S(x + dx, u + du) = S(x, u) + A dx + B du + ...

    They are computed by the system's adjoint, one row of all points at a time. If the system's worlds do not
    act on each other, all rows are computed at once.

    Args:
        system: The simulated system, built in, your own or foreign.
        x: States (n, state_size), float32 or float64; of a `TapeSystem` as many as its arrays hold.
        u: Controls (n, control_size), dtype and device of x.

    Returns:
        A (n, state_size, state_size) and B (n, state_size, control_size). No gradient passes through them.
        The worlds of a `TapeSystem` are assumed not to act on each other.

    Raises:
        TypeError, ValueError: an argument does not fit, or the system's worlds act on each other; the message
            says what was expected.
    """
    call = "linearize"
    check_system(system, call)
    x = check_states(system, x, call, "x").detach()
    if not isinstance(u, Tensor):
        raise TypeError(f"{call}: u is of type {type(u).__name__}, expected a tensor")
    if tuple(u.shape) != (x.shape[0], system.control_size):
        raise ValueError(
            f"{call}: u has shape {tuple(u.shape)}, expected (n, control_size) = ({x.shape[0]}, "
            f"{system.control_size})"
        )
    check_like(u, x, call, "u")
    u, (n, size) = u.detach(), x.shape
    with torch.inference_mode(False), torch.enable_grad():
        x, u = (q.clone() if q.is_inference() else q for q in (x, u))
        if n == 0:
            both = x.new_zeros((0, size, size + system.control_size))
        elif isinstance(system, Simulator) and not system.rowwise:
            _bridge.simulate(x, u.unsqueeze(0), system.number)  # checked, if this is the first use
            both = _by_rows(system, x, u)
        else:
            # a copy of the points for every component of the next state
            points, controls = x.repeat(size, 1).requires_grad_(), u.repeat(size, 1).requires_grad_()
            units = torch.eye(size, dtype=x.dtype, device=x.device).repeat_interleave(n, dim=0)
            x_next = _bridge.simulate(points, controls.unsqueeze(0), system.number)[1]
            adj = torch.autograd.grad(x_next, (points, controls), units)
            both = torch.cat(adj, dim=1).view(size, n, -1).transpose(0, 1)
    return both[:, :, :size].contiguous(), both[:, :, size:].contiguous()


def _by_rows(system: Simulator, x: Tensor, u: Tensor) -> Tensor:
    """Those of a simulator that takes its worlds together."""
    if not system.worlds_apart:
        raise ValueError(
            f"linearize: the worlds of this {type(system).__name__} act on each other (rowwise=False), "
            "expected a system whose next state depends on one world alone; take torch.func.jacrev of "
            "warp_sims.step for all derivatives"
        )
    return system.jacobians(x, u)[1]

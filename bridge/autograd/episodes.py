"""Rollouts in which worlds end and begin again: several episodes in one horizon.

    y_{t+1} = S(x_t, u_t)                        where the step leads
    x_{t+1} = fresh where world ended, else y_{t+1}

Backwards, with lam the cotangents of x and ups those of y, a reset is a gate of its own:

    ups_{t+1} = dL/dy_{t+1} + [not ended] lam_{t+1}
    mu_t      = (dS/du)^T ups_{t+1} + dL/du_t
    lam_t     = dL/dx_t + decay [physics open] (dS/dx)^T ups_{t+1} + [network open] (dN/dx)^T mu_t

Between two steps at which worlds end, the recursion is that of flow.py, and the adjoint sweep of any rollout
runs over them. The policy is linearised at all points at once, as in other rollouts. A world whose step is
not finite has ended. If no cotangent arrives at that step, its point is left out (a select, because 0 inf is
NaN). If one does, the gradient is NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..passes.physical import with_physical
from ..passes.spec import Cotangents, Saved, Spec, pieces
from . import operators
from .torch_path import TorchPath, weight_gradients


class Resets(NamedTuple):
    """When worlds end, and where they begin again; checked by warp_sims/episodes.py."""

    fresh: Tensor
    """States that worlds begin again with, (1 or horizon, nworld, state_size): of step t those of x_{t+1}."""
    done: Callable[[Tensor], Tensor] | None
    """Which worlds end with a state (nworld, state_size): (nworld,), bool."""
    limit: int
    """Steps after which a world begins again, 0 for none."""
    ages: Tensor
    """Steps that the worlds have already lived, (nworld,) int64."""


class Trajectory(NamedTuple):
    """What a rollout with episodes gives: states, controls and loss, and what its path keeps."""

    states: Tensor
    """(horizon + 1, nworld, state_size), what the policy sees."""
    controls: Tensor
    loss: Tensor
    next_states: Tensor
    """(horizon, nworld, state_size), where the steps lead."""
    done: Tensor
    """(horizon, nworld) bool, worlds that ended with the step, or were not finite after it."""
    truncated: Tensor
    """(horizon, nworld) bool, worlds that reached the limit of steps."""
    ages: Tensor
    """(nworld,) steps since each world began, at the end of the rollout."""


class EpisodePath(NamedTuple):
    """The path of a rollout with episodes; torch evaluates the policy."""

    path: TorchPath
    resets: Resets

    kept_outputs = 1  # the next states

    def forward(self, spec: Spec, x0: Tensor, parameters: Sequence[Tensor]) -> tuple[Saved, Tensor]:
        """The trajectory, step by step, and the loss."""
        policy, values = self.path.physical.split(parameters) if self.path.physical else (parameters, None)
        resets, x, age = self.resets, x0, self.resets.ages
        states, led, controls, ends, cuts = [x0], [], [], [], []
        for t in range(spec.horizon):
            u = self.path.control(policy, x.clone() if t == 0 else x, t)
            y = operators.simulate(spec.system, x, u.unsqueeze(0), t == 0, values)[1]
            done = ~torch.isfinite(y).all(1)
            if resets.done is not None:
                done = done | resets.done(y)
            age = age + 1
            cut = (age >= resets.limit) & ~done if resets.limit else torch.zeros_like(done)
            over = done | cut
            x = torch.where(over.unsqueeze(1), resets.fresh[min(t, resets.fresh.shape[0] - 1)], y)
            age = torch.where(over, 0, age)
            for kept, value in zip((led, controls, states, ends, cuts), (y, u, x, done, cut)):
                kept.append(value)
        next_states, all_controls = torch.stack(led), torch.stack(controls)
        whole = torch.cat((x0.unsqueeze(0), next_states))
        loss = operators.loss(spec, whole, all_controls)
        kept = next_states, torch.stack(ends), torch.stack(cuts), age
        return Saved(torch.stack(states), all_controls, kept), loss

    def backward(
        self,
        spec: Spec,
        saved: Saved,
        parameters: Sequence[Tensor],
        g: Cotangents,
        adj_next: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients (fields, parameters) and cotangents of x0 (fields, nworld, state_size), fields not yet
        compared. `adj_next` are the cotangents of the next states.
        """
        policy, values = self.path.physical.split(parameters) if self.path.physical else (parameters, None)
        states, controls, (next_states, done, truncated, _) = saved
        physical = self.path.physical
        direct_next = _reached(spec, next_states, controls, g.loss, adj_next)
        spec = spec._replace(final=0.0, running=0.0)
        bad = ~(torch.isfinite(next_states).all(2) & torch.isfinite(controls).all(2))
        over = done | truncated
        ends = {t + 1 for t, ended in enumerate((over | bad).any(1).tolist()) if ended}
        # a step that is not finite is left out: another point takes its place
        ends |= {t for t, lost in enumerate(bad.any(1).tolist()) if lost}
        fields = len(spec.schedules)
        lam = states.new_zeros((fields, *states.shape[1:]))
        if g.states is not None:
            lam = lam + g.states[-1]
        grads: Any = 0.0
        adj_values: Any = 0.0
        for t0, t1 in pieces(spec.horizon, spec.segment or spec.horizon):
            x = torch.where(bad[t0:t1].unsqueeze(2), states[:1], states[t0:t1])
            recomputed, pull, jac = self.path.linearised(spec, policy, x.flatten(0, 1), t1 - t0, t0)
            self._check(recomputed, controls[t0:t1], bad[t0:t1], t0)
            u = torch.where(bad[t0:t1].unsqueeze(2), recomputed, controls[t0:t1])
            mu = states.new_empty((fields, t1 - t0, *controls.shape[1:]))
            for first, end in _stretches(t0, t1, ends):
                ups = torch.where(over[end - 1].unsqueeze(1), 0.0, lam)
                if direct_next is not None:
                    ups = ups + direct_next[end - 1]
                # a cotangent that arrives after a step that is not finite cannot be pulled back
                lost = bad[end - 1] & (ups != 0.0).any(2)
                ups = torch.where(lost.unsqueeze(2), torch.nan, ups)
                part = torch.cat((x[first - t0 : end - t0], next_states[end - 1 : end]))
                own = u[first - t0 : end - t0]
                if bool(bad[end - 1].any()):
                    last = operators.simulate(spec.system, part[-2], own[-1:], False, values)[1]
                    part[-1] = torch.where(bad[end - 1].unsqueeze(1), last, part[-1])
                direct = _direct(states, g.states, direct_next, first, end)
                direct_u = None if g.controls is None else g.controls[first:end]
                found = operators.adjoint(
                    spec,
                    part,
                    own,
                    None,
                    0.0,
                    None if jac is None else jac[first - t0 : end - t0].contiguous(),
                    g.loss,
                    direct,
                    direct_u,
                    first,
                    ups,
                    0,
                    values,
                    physical is not None and physical.wanted,
                )
                mu[:, first - t0 : end - t0], lam = found[:2]
                adj_values = adj_values + found[2]
            grads = grads + weight_gradients(pull, mu)
        if physical is not None:
            grads = with_physical(physical, grads, adj_values, parameters)
        return grads, lam

    def _check(self, recomputed: Tensor, controls: Tensor, bad: Tensor, t0: int) -> None:
        tolerance = self.path.tolerance or operators.CONTROL_TOLERANCE[controls.dtype]
        seen = torch.where(bad.unsqueeze(2), controls, recomputed)
        operators.check_recomputed(seen, controls, tolerance, t0)


def _stretches(t0: int, t1: int, ends: set[int]) -> list[tuple[int, int]]:
    """Splits the steps t0 ... t1 - 1, from the last to the first, into stretches that end where worlds end.
    Their lengths are powers of two, so that few sizes of launches are prepared.
    """
    found, end = [], t1
    marks = [t0, *sorted(t for t in ends if t0 < t < t1)]
    while end > t0:
        first = marks.pop()
        while end > first:
            length = 1 << ((end - first).bit_length() - 1)
            found.append((end - length, end))
            end -= length
    return found


def _direct(
    states: Tensor, adj_states: Tensor | None, adj_next: Tensor | None, first: int, end: int
) -> Tensor | None:
    """Direct cotangents of the states `first` ... `end` of a stretch; inside it x_t is y_t. That of the last
    state is part of what is carried.
    """
    if adj_states is None and adj_next is None:
        return None
    direct = states.new_zeros((end - first + 1, *states.shape[1:]))
    if adj_states is not None:
        direct[:-1] += adj_states[first:end]
    if adj_next is not None:
        direct[1:-1] += adj_next[first : end - 1]
    return direct


def _reached(
    spec: Spec, y: Tensor, controls: Tensor, adj_loss: Tensor | None, direct: Tensor | None
) -> Tensor | None:
    """Direct cotangents of the states y that steps lead to: those given, and those of the system's own
    loss.
    """
    if adj_loss is None or not (spec.final or spec.running) or not y.shape[1]:
        return direct
    (horizon, nworld, n), m = y.shape, controls.shape[2]
    final, running, _ = spec.weights.per_world(nworld, horizon, m)
    weights = y.new_full((horizon, 1, 1), running)
    weights[-1] += final
    cost = operators.cost_gradients(spec.system, y.flatten(0, 1))
    own = adj_loss * weights * cost.view(horizon, nworld, n)
    own = torch.where(weights == 0.0, 0.0, own)
    return own if direct is None else direct + own

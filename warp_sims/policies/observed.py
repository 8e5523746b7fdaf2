"""Policies that see what a system lets them observe."""

from __future__ import annotations

import torch

from ..systems import System

__all__ = ["Observed"]


class Observed(torch.nn.Module):
    """A policy of observations as one of states: N(x) = policy(system.observe(x)).

    `observe` is torch, row by row. Where it is made of parts and concatenations, sines, cosines, scales and
    shifts it runs inside the sweeps with the rest of the policy (`warp_sims.explain` says so), and its
    derivative is taken with that of the network. All else torch evaluates.

    Args:
        system: One that has `observe(states)`, (…, observations) of states (…, state_size).
        policy: Controls (n, control_size) for observations (n, observations).

    Raises:
        TypeError: the system has no `observe`, or the policy is no module.
    """

    def __init__(self, system: System, policy: torch.nn.Module) -> None:
        super().__init__()
        if not callable(getattr(system, "observe", None)):
            raise TypeError(
                f"Observed: {type(system).__name__} has no observe, expected a method observe(self, states) "
                "that returns the observations (n, observations) of states (n, state_size)"
            )
        if not isinstance(policy, torch.nn.Module):
            raise TypeError(f"Observed: policy is {policy!r}, expected a torch.nn.Module of observations")
        self.system = system
        self.policy = policy

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Controls (n, control_size) for states (n, state_size)."""
        return self.policy(self.system.observe(states))  # pyright: ignore[reportAttributeAccessIssue]

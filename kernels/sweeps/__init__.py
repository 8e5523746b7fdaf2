"""Sweeps over time: open loop, loss, adjoint, and those with the policy fused in."""

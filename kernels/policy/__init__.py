"""Policies inside the sweeps: the layout of their parameters, forward pass, input Jacobians, weight products."""

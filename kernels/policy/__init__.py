"""Policies inside the sweeps: layout of their parameters, forward pass, input Jacobian, weight products."""

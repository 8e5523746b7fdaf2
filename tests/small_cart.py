"""A small rollout of the cart-pole: the case on which tests of torch's own demands are made.

Its fixtures `policy` (on either road), `x0` and `cotangents` are in conftest.py.
"""

import torch

import warp_sims as ws

# Relative to the norm of each tensor, between two ways through the same kernels: only products by torch may
# sum in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

CART = ws.CartPole(poles=2, dt=0.05)
HORIZON = 7
WORLDS = 5


def run(policy, x0, flow="C", **options):
    """The rollout, with the running loss unless another is asked for."""
    return ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow, **{"loss": "running"} | options)

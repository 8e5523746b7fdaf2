"""Policies beside those that warp_sims brings, to be measured: `--policy benchmarks.policies:attention`."""

import torch
from torch import nn

import warp_sims as ws


class Attention(nn.Module):
    """One head of attention over the poles of a cart-pole, each seen with the cart: torch evaluates it.

    Args:
        poles: Number of poles.
        width: Units of a pole.
    """

    def __init__(self, poles: int, width: int = 32) -> None:
        super().__init__()
        self.poles, self.scale = poles, width**-0.5
        self.embed = nn.Linear(4, width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        # a bias changes no weight of the softmax: its gradient is zero, and rounding decides its sign
        self.key = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cart = x[:, None, :2].expand(-1, self.poles, 2)
        poles = torch.cat([cart, x[:, 2:].view(-1, self.poles, 2)], dim=-1)
        h = torch.tanh(self.embed(poles))
        weights = torch.softmax(self.scale * self.query(h) @ self.key(h).transpose(1, 2), dim=-1)
        return self.out((weights @ self.value(h)).mean(1))


def attention(system: ws.CartPole) -> Attention:
    """The policy for a cart-pole."""
    return Attention(system.poles)

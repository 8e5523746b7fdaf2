"""One of two processes that average their gradients: `python all_reduce.py RANK FOLDER`."""

import sys
from pathlib import Path

import torch
from cases import make_net, make_states

import warp_sims as ws

SYSTEM = ws.CartPole(poles=2, dt=0.05)


def mean_loss(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """NaN where there are no worlds."""
    return states[-1].square().mean()


ROUNDS = (([3, 2], "running"), ([5, 0], "running"), ([0, 5], mean_loss))
"""Worlds of each process, and the loss."""


def pair_of(first: int, worlds: int, loss) -> ws.GradientPair:
    """The pair of some of five worlds."""
    x0 = make_states(SYSTEM, 5)[first : first + worlds]
    return ws.gradient_pair(SYSTEM, make_net(SYSTEM), x0, horizon=12, loss=loss, control_cost=0.1)


def main(rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for i, (share, loss) in enumerate(ROUNDS):
        pair = pair_of(sum(share[:rank]), share[rank], loss).all_reduce()
        torch.save((pair.worlds, pair.loss, pair.flat, pair.cosine), folder / f"{i}_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

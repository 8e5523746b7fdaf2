"""A torch simulator as `ws.TorchSystem` beside the loop that most would write: one update of the cart-pole.

    python benchmarks/foreign_speed.py                  # 8 worlds, 100 steps, 4 poles, float32
    python benchmarks/foreign_speed.py --worlds 64 256

Both call the same step and the same policy (an MLP of two layers of 100), forwards and backwards. The loop is
torch's own backpropagation through time (R) or, for M, the same with the observation detached; C in the loop
is one forward pass and two backward passes over two graphs. Best of several, in turn; gradients of R and M
are compared before anything is timed.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import torch

import warp_sims as ws

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference import cartpole

HORIZON = 100


def loop(step, policy, x0, flow):
    """The update as a loop; returns the loss."""
    total = x0.new_zeros(())
    for letter in {"R": "R", "M": "M", "C": "MR"}[flow]:
        x = x0
        for _ in range(HORIZON):
            x = step(x, policy(x if letter == "R" else x.detach()))
        total = cartpole.loss(x).mean()
        total.backward()
    return total


def ours(system, policy, x0, flow):
    """The same by the engine."""
    out = ws.rollout(system, policy, x0, horizon=HORIZON, flow=flow)
    out.loss.backward()
    return out.loss


def best(contestants, repeats):
    """Best time [ms] of each, taken in turn."""
    times = dict.fromkeys(contestants, float("inf"))
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], 1e3 * (time.perf_counter() - start))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[8])
    parser.add_argument("--poles", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cart = ws.CartPole(poles=options.poles)
    step = functools.partial(cartpole.step, dt=cart.dt)
    system = ws.TorchSystem(
        step, state_size=cart.state_size, control_size=cart.control_size, loss=cartpole.loss
    )
    policy = ws.MLP(cart.state_size, (100, 100), 1)
    policy.reset_parameters(seed=1)
    print(f"{options.poles} poles, {HORIZON} steps, one thread; ms for one forward and backward pass")
    print("| worlds | flow | torch loop | TorchSystem | times faster |\n|---|---|---|---|---|")
    for worlds in options.worlds:
        x0 = cart.initial_states(worlds)
        for flow in "RMC":
            if flow != "C":
                found = []
                for run in (loop, ours):
                    policy.zero_grad()
                    run(step if run is loop else system, policy, x0, flow)
                    found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
                error = float((found[0] - found[1]).norm() / found[0].norm())
                assert error < 1e-3, f"gradients differ by {error}"
            times = best(
                {
                    "loop": functools.partial(loop, step, policy, x0, flow),
                    "ours": functools.partial(ours, system, policy, x0, flow),
                },
                options.repeats,
            )
            ratio = times["loop"] / times["ours"]
            print(f"| {worlds} | {flow} | {times['loop']:.1f} | {times['ours']:.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()

"""Position control of the quadrotor, trained on the gradient of each flow: the table of docs/quadrotor.md.

    python benchmarks/quadrotor_flows.py                     minutes on one core
    python benchmarks/quadrotor_flows.py --updates 50 --seeds 1 --dry

For each flow and horizon the same policy, initial states, batches and optimizer; the learning rate is the
best of `RATES` on seed 0, for each flow by itself. What is compared is the loss on 512 initial states that no
training saw, over the same 90 steps (3 s) for all, and how far from the target the quadrotor is at their end.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import warp_sims as ws

SYSTEM = ws.Quadrotor()
BATCH, HIDDEN, CLIP, TEST_STEPS = 64, (64, 64), 1.0, 90
RATES = (3e-3, 1e-2, 3e-2)
DAMPED = 0.9
"""Factor a step: 0.04 a second, at 30 steps a second."""
FLOWS: dict[str, dict[str, Any]] = {
    "R": {"flow": "R"},
    "M": {"flow": "M"},
    "C": {"flow": "C"},
    f"R, decay {DAMPED}": {"flow": "R", "decay": DAMPED},
    f"M, decay {DAMPED}": {"flow": "M", "decay": DAMPED},
}
PAGE = Path(__file__).parents[1] / "docs" / "quadrotor.md"
BEGIN, END = "<!-- flows: begin -->", "<!-- flows: end -->"


class Result(NamedTuple):
    loss: float
    distance: float
    seconds: float


def trained(options: dict[str, Any], horizon: int, rate: float, seed: int, updates: int) -> Result:
    """What a policy reaches that was trained in one way."""
    draw = torch.Generator().manual_seed(seed)
    policy = ws.MLP(SYSTEM.state_size, HIDDEN, SYSTEM.control_size)
    policy.reset_parameters(seed=seed, zero_last=True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    states, start = SYSTEM.initial_states(2048, seed=seed), time.perf_counter()
    for _ in range(updates):
        x0 = states[torch.randint(len(states), (BATCH,), generator=draw)]
        out = ws.rollout(SYSTEM, policy, x0, horizon=horizon, loss="running", control_cost=0.1, **options)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        test = SYSTEM.initial_states(512, seed=1000, split="test")
        out = ws.rollout(SYSTEM, policy, test, horizon=TEST_STEPS, loss="running", control_cost=0.1)
        return Result(float(out.loss), float(out.states[-1, :, :3].norm(dim=1).median()), seconds)


def row(name: str, horizon: int, seeds: int, updates: int) -> str:
    """A line of the table."""
    tried = {rate: trained(FLOWS[name], horizon, rate, 0, updates) for rate in RATES}
    finite = {rate: r for rate, r in tried.items() if r.loss == r.loss}
    rate = min(finite, key=lambda rate: finite[rate].loss)
    found = [tried[rate], *(trained(FLOWS[name], horizon, rate, s, updates) for s in range(1, seeds))]
    losses, far = [r.loss for r in found], [r.distance for r in found]
    each = " ".join(f"{loss:.3f}" for loss in losses)
    line = (
        f"| {name} | {horizon} | {rate:g} | {statistics.median(losses):.3f} | {each} | "
        f"{statistics.median(far):.3f} | {1e3 * min(r.seconds for r in found) / updates:.1f} |"
    )
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--horizons", type=int, nargs="+", default=[30, 90])
    parser.add_argument("--dry", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{options.updates} updates of {BATCH} worlds, `MLP{HIDDEN}`, Adam with a cosine schedule, gradients "
        f"clipped to a norm of {CLIP:g};\nlosses on 512 unseen initial states over {TEST_STEPS} steps, one a "
        "seed; distance is the median at their end.",
        "",
        "| flow | horizon | learning rate | loss, median | loss of each seed | distance [m] | ms an update |",
        "|---|---|---|---|---|---|---|",
        *(row(name, h, options.seeds, options.updates) for h in options.horizons for name in FLOWS),
    ]
    if options.dry:
        return
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(before + "\n\n" + "\n".join(lines) + "\n\n" + after)


if __name__ == "__main__":
    main()

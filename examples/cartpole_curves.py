"""The picture docs/cartpole_curves.png: four poles, the published settings and initial weights, flows R, M
and C, single runs of each.

    python examples/cartpole_curves.py --out runs/curves --runs 3

Training through a hundred chaotic steps amplifies rounding: a relative change of the initial weights by 1e-6
changes after some dozen epochs when, and whether, a run finds the swing-up. So every flow runs several times,
run 0 from the published weights and the others from weights changed by 1e-6, and every run is drawn. Finished
runs in the folder are not repeated.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import warp_sims as ws

WEIGHTS = Path(__file__).parents[1] / "tests" / "golden" / "init_weights_tf29_cartpole_NC4.npz"
COLOURS = {"R": "tab:gray", "M": "tab:blue", "C": "tab:red"}
NAMES = {"R": "R regular", "M": "M modified", "C": "C combined"}


def published_policy(change: int) -> ws.MLP:
    """The controller with the published initial weights, those of the first layer changed by 1e-6 for
    `change` > 0.
    """
    policy = ws.MLP(10, (100, 100), 1)
    with np.load(WEIGHTS) as weights, torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            parameter.copy_(torch.from_numpy(weights[f"w{i}"].T.copy()))
        if change:
            noise = torch.randn(policy[0].weight.shape, generator=torch.Generator().manual_seed(change))
            policy[0].weight.mul_(1 + 1e-6 * noise)
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/curves"), help="folder of the runs")
    parser.add_argument("--runs", type=int, default=3, help="runs of each flow (3)")
    parser.add_argument("--epochs", type=int, default=1000, help="epochs (1000)")
    parser.add_argument("--picture", type=Path, default=Path("docs/cartpole_curves.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for k in range(args.runs):
        for flow in COLOURS:
            folder = args.out / f"{flow}_{k}"
            if not folder.exists():
                config = ws.TrainConfig(
                    system=ws.CartPole(poles=4), policy=published_policy(k), flow=flow, epochs=args.epochs
                )
                ws.train(config, out=folder)
    draw(args.out, args.picture)


def draw(runs: Path, picture: Path) -> None:
    """Draws the test loss of every run found, smoothed over 30 epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for flow, colour in COLOURS.items():
        found = sorted(runs.glob(f"{flow}_*/log.csv"))
        for i, log in enumerate(found):
            table = np.genfromtxt(log, delimiter=",", names=True)
            loss = table["loss_test"]
            width = 30
            smooth = np.convolve(
                np.concatenate([np.full(width - 1, loss[0]), loss]), np.ones(width) / width, "valid"
            )
            label = f"{NAMES[flow]} ({len(found)} runs)" if i == 0 else None
            axes.plot(table["epoch"], smooth, color=colour, linewidth=1.4, alpha=0.85, label=label)
            fewer = loss[-1] if len(loss) else float("nan")
            print(
                f"{flow} {log.parent.name}: test loss {fewer:.4f} after {int(table['epoch'][-1]) + 1} epochs"
            )
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("test loss (1 - mean cos)")
    axes.set_title("Four poles swung up: each line one run")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(picture, dpi=130)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()

"""Pendulums of one to three links on a cart, under every flow and over several seeds: one table.

    python -m benchmarks.linked_pendulum --out runs/links --links 1 2 3 --flows R M S C --seeds 4 --epochs 200

The links are coupled (`ws.LinkedPendulum`), unlike the poles of the published cart-pole. Settings are those
of the cart-pole but for a network of 64 and 64 units: 256 initial states, batches of 8, 100 steps of 0.01 s,
the loss of the last state, Adam with rate 1e-3, no clipping. The seeds of a setting are trained together,
each as it would be alone; a run that diverges is counted. The same command goes on where it was stopped.
DIR/results.json has the test loss of every epoch, DIR/curves.png the medians.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import warp_sims as ws
from warp_sims.pictures.plots import COLOURS, need_matplotlib

HIDDEN = (64, 64)
SOLVED = 0.05  # loss below which every link stands: 18 degrees off upright, on average


def make(links: int, flow: str, seed: int, epochs: int) -> ws.TrainConfig:
    """The settings of a run."""
    system = ws.LinkedPendulum(links=links)
    policy = ws.MLP(system.state_size, HIDDEN, system.control_size)
    policy.reset_parameters(seed=seed, zero_last=True)
    return ws.TrainConfig(
        system=system, policy=policy, flow=flow, epochs=epochs, horizon=100, loss="final", checkpoint_every=25
    )


def run(links: int, flow: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains all seeds of a setting."""
    seeds = range(options.seeds)
    configs = [make(links, flow, seed, options.epochs) for seed in seeds]
    outs = [options.out / f"{links}_{flow}_{seed}" for seed in seeds]
    rows = []
    for seed, result in zip(seeds, ws.train_together(configs, outs, resume=True, progress=False)):
        log = result.log
        rows.append(
            {
                "links": links,
                "flow": flow,
                "seed": seed,
                "epochs": int(log["epoch"][-1]) + 1,
                "diverged": result.diverged is not None,
                "last": float(log["loss_test"][-1]),
                "best": float(log["loss_test"].min()),
                "cosine": float(np.nanmean(log["cosine"])) if flow == "C" else math.nan,
                "seconds": float(log["seconds"][-1]),
                "loss_test": log["loss_test"].tolist(),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Median, lowest and highest test loss after training, of each setting."""
    lines = ["| links | flow | seeds | epochs | test loss, median [lowest, highest] | best of all | solved |"]
    lines.append("|---|---|---|---|---|---|---|")
    for links, flow in dict.fromkeys((row["links"], row["flow"]) for row in rows):
        own = [row for row in rows if (row["links"], row["flow"]) == (links, flow)]
        last = [row["last"] for row in own]
        solved = sum(row["last"] < SOLVED for row in own)
        lost = sum(row["diverged"] for row in own)
        lines.append(
            f"| {links} | {flow} | {len(own)} | {min(row['epochs'] for row in own)} | {np.median(last):.3g} "
            f"[{min(last):.3g}, {max(last):.3g}] | {min(row['best'] for row in own):.3g} | {solved}"
            f"{f' ({lost} diverged)' if lost else ''} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Test losses over the epochs: medians, and every seed faintly."""
    numbers = sorted({row["links"] for row in rows})
    figure = need_matplotlib()(figsize=(4.2 * len(numbers), 3.4), dpi=110, layout="constrained")
    for axes, links in zip(np.ravel(figure.subplots(1, len(numbers), sharey=True)), numbers):
        flows = dict.fromkeys(row["flow"] for row in rows if row["links"] == links)
        for colour, flow in zip(COLOURS, flows):
            own = [row["loss_test"] for row in rows if (row["links"], row["flow"]) == (links, flow)]
            for losses in own:
                axes.plot(losses, color=colour, alpha=0.25, linewidth=0.8)
            shortest = min(map(len, own))
            axes.plot(np.median([losses[:shortest] for losses in own], axis=0), color=colour, label=flow)
        axes.set(title=f"{links} link{'s' * (links > 1)}", xlabel="epoch", yscale="log")
        axes.legend(frameon=False)
    np.ravel(figure.axes)[0].set_ylabel("test loss")
    figure.savefig(path)


def main() -> None:
    """Runs, and reports behind every setting."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=Path("runs/links"))
    parser.add_argument("--links", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--flows", nargs="+", default=["R", "M", "S", "C"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for links in options.links:
        for flow in options.flows:
            rows += run(links, flow.upper(), options)
            (options.out / "results.json").write_text(json.dumps(rows) + "\n")
            print(table(rows[-options.seeds :]).splitlines()[-1], flush=True)
    print(table(rows))
    draw(rows, options.out / "curves.png")


if __name__ == "__main__":
    main()

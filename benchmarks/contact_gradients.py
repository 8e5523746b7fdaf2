"""Where the flows part through contact: norms and cosines of the hopper's gradients over the horizon.

    python -m benchmarks.contact_gradients [--run RUN] [--out runs/contact] [--worlds 256]

From states of whole episodes under an actor (that of a run of `warp-sims train hopper --algorithm shac`, or
one that has learned nothing), the gradient of minus the mean reward over horizons of 1 to 64 steps is
computed under R and under M; and the same without contact, from the same states. DIR/contact.json has the
numbers, DIR/contact.png the picture:

    norm        of the gradient of all worlds together
    cosine      of R and M
    deviation   of one world's gradient, by the norm of the mean; from groups of worlds
    cotangent   of a state for a unit cotangent of the speed so many steps later: median of the worlds that
                stand on the ground there, and of those in the air
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import warp_sims as ws
from warp_sims.actor_critic.networks import Actor
from warp_sims.pictures.plots import COLOURS, need_matplotlib

HORIZONS = (1, 2, 4, 8, 16, 32, 64)
BLOCKS = 32  # groups of worlds whose gradients are computed one by one
WARM = 200  # steps of an episode over which the states are spread


def reward_loss(system: Any) -> Any:
    """Minus the mean reward of the steps, and the speed at the end, so that the last control matters, too."""

    def loss(states: Tensor, controls: Tensor) -> Tensor:
        return -(system.reward(states[:-1], controls).sum(0) + states[-1, :, 6]).mean() / len(controls)

    return loss


@torch.no_grad()
def visited(hopper: ws.Hopper, actor: Actor, n: int) -> Tensor:
    """States (n, 12), each of an episode of its own that has not fallen, spread over its first steps."""
    x = hopper.initial_states(4 * n, seed=1)
    out = ws.rollout(hopper, actor, x, horizon=WARM, loss=None)
    states = out.states
    alive = ~torch.cumsum(hopper.fallen(states).int(), 0).bool()
    last = alive.int().sum(0)
    random = torch.Generator().manual_seed(0)
    at = (torch.rand(4 * n, generator=random) * last).long().clamp(max=WARM)
    return states[at, torch.arange(4 * n)][:n].clone()


def gradients(system: Any, actor: Actor, x0: Tensor, horizon: int) -> Tensor:
    """Gradients (2, parameters) of R and M."""
    pair = ws.gradient_pair(
        system, actor, x0, horizon=horizon, base="regular", check="modified", loss=reward_loss(ws.Hopper())
    )
    return pair.flat


def of_horizon(system: Any, actor: Actor, x0: Tensor, horizon: int) -> dict[str, float]:
    """What the flows give over a horizon."""
    parts = torch.stack([gradients(system, actor, part, horizon) for part in x0.chunk(BLOCKS)])
    mean = parts.mean(0)
    size = len(x0) / BLOCKS
    noise = ((parts - mean).square().sum(-1).mean(0) * size).sqrt() / mean.norm(dim=-1)
    return {
        "horizon": horizon,
        "norm_R": float(mean[0].norm()),
        "norm_M": float(mean[1].norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(mean[0], mean[1], dim=0)),
        "noise_R": float(noise[0]),
        "noise_M": float(noise[1]),
    }


def growth(hopper: ws.Hopper, actor: Actor, x0: Tensor, horizon: int) -> dict[str, list[float]]:
    """Median norm of the cotangent of x_0 for a unit cotangent of the speed k steps later, by flow: of worlds
    that stand on the ground at their start, and of those in the air.
    """
    low = contact_depth(hopper, x0) < 0
    found: dict[str, list[float]] = {}
    for flow in "RM":
        for steps in range(1, horizon + 1):
            x = x0.clone().requires_grad_()
            out = ws.rollout(hopper, actor, x, horizon=steps, flow=flow, loss=None)
            (adj,) = torch.autograd.grad(out.states[-1, :, 6].sum(), x)
            norms = adj[:, 1:].norm(dim=1)
            for name, chosen in (("ground", low), ("air", ~low)):
                if bool(chosen.any()):
                    found.setdefault(f"{flow} {name}", []).append(float(norms[chosen].median()))
    found["ground"] = [float(low.float().mean())]
    return found


def contact_depth(hopper: ws.Hopper, x: Tensor) -> Tensor:
    """Height (n,) of the lowest contact point above the ground."""
    from warp_sims.robots.geometry import pose

    heights = []
    for q in x[:, :6].double().numpy():
        at = pose(hopper.model, q)
        heights.append(
            min(
                (at.position[s.link] + at.turn[s.link] @ np.array(s.centre))[2] - s.radius
                for s in hopper.model.spheres
            )
        )
    return torch.tensor(heights)


def free_of(hopper: ws.Hopper) -> ws.Robot:
    """The hopper without its contact."""
    names = ("friction", "approach", "implicit", "slip_speed", "limit_damping", "dt", "substeps")
    numbers = ("contact_stiffness", "contact_damping", "friction_stiffness", "limit_stiffness")
    settings = {name: getattr(hopper, name) for name in (*names, *numbers)}
    return ws.Robot(hopper.model._replace(spheres=()), check_stability=False, **settings)


def draw(found: dict[str, Any], path: Path) -> None:
    """The picture."""
    figure = need_matplotlib()(figsize=(11, 6.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for k, (name, rows) in enumerate(found["systems"].items()):
        horizons = [row["horizon"] for row in rows]
        style = {"marker": "o", "markersize": 3, "linestyle": "-" if name == "contact" else ":"}
        for flow in "RM":
            colour = COLOURS[0 if flow == "R" else 1]
            axes[0].plot(
                horizons,
                [row[f"norm_{flow}"] for row in rows],
                color=colour,
                label=f"{flow}, {name}",
                **style,
            )
            axes[2].plot(
                horizons,
                [row[f"noise_{flow}"] for row in rows],
                color=colour,
                label=f"{flow}, {name}",
                **style,
            )
        axes[1].plot(horizons, [row["cosine"] for row in rows], color=COLOURS[2 + k], label=name, **style)
    for name, norms in found["growth"].items():
        if len(norms) > 1:
            flow, where = name.split()
            style = {
                "color": COLOURS[0 if flow == "R" else 1],
                "linestyle": "-" if where == "ground" else ":",
            }
            axes[3].plot(range(1, len(norms) + 1), norms, label=f"{flow}, from the {where}", **style)
    for axis, title in zip(
        axes, ("norm", "cosine of R and M", "deviation of a world by the norm", "cotangent")
    ):
        axis.set(title=title, xscale="log", xlabel="steps")
        axis.legend(frameon=False, fontsize=8)
    for axis in (axes[0], axes[2], axes[3]):
        axis.set_yscale("log")
    figure.savefig(path)


def main() -> None:
    """Computes, prints, draws."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--run", help="run folder of the actor (default: one that has learned nothing)")
    parser.add_argument("--out", type=Path, default=Path("runs/contact"))
    parser.add_argument("--worlds", type=int, default=256)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    hopper = ws.Hopper()
    actor = Actor(hopper) if options.run is None else ws.load_actor(options.run)[1]
    x0 = visited(hopper, actor, options.worlds)
    found: dict[str, Any] = {"run": options.run, "worlds": options.worlds, "systems": {}}
    for name, system in (("contact", hopper), ("free", free_of(hopper))):
        rows = [of_horizon(system, actor, x0, horizon) for horizon in HORIZONS]
        found["systems"][name] = rows
        print(f"| {name}: steps | norm R | norm M | cosine | noise R | noise M |")
        print("|---|---|---|---|---|---|")
        for row in rows:
            values = [f"{row[key]:.3g}" for key in ("norm_R", "norm_M", "cosine", "noise_R", "noise_M")]
            print(f"| {row['horizon']} | {' | '.join(values)} |", flush=True)
    found["growth"] = growth(hopper, actor, x0, 32)
    for name, norms in found["growth"].items():
        print(name, [float(f"{v:.3g}") for v in norms[::4]])
    (options.out / "contact.json").write_text(json.dumps(found) + "\n")
    draw(found, options.out / "contact.png")


if __name__ == "__main__":
    main()

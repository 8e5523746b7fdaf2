"""The options of the commands, most of them made of what is declared already (`field_options`)."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NamedTuple

from . import systems
from .demo import run_demo
from .estimators import PerSecond
from .field_options import add_declared, add_flag, add_system_options
from .kernels.flow import Flow
from .pictures.animation import animate
from .training.config import CLIPS, LOSSES, ON_DIVERGENCE, TrainConfig
from .training.optimizers import OPTIMIZERS
from .training.published import COSTS, EPOCHS, FLOWS, POLES, SETTINGS, TARGETS
from .training.runs import CHECKPOINTS

DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
HIDDEN = (100, 100)
WIDTH = 60
POLICIES = ("mlp", "wavecnn")
FLOW: dict[str, Any] = {
    "metavar": "FLOW",
    "help": "backward flow: " + ", ".join(f"{f.name.lower()} ({f.value})" for f in Flow),
}
DTYPE = {"choices": ("float32", "float64"), "default": "float32", "help": "precision of states and weights"}
DEVICE = {"metavar": "DEVICE", "default": "cpu", "help": "cpu, cuda or cuda:INDEX"}


class Preset(NamedTuple):
    """What `train` and `profile` start from, see `System.train_defaults`; here that of the cart-pole."""

    horizon: int = 100
    loss: str = "final"
    control_cost: float = 0.0
    zero_last: bool = True
    policy: str = "mlp"


def preset_of(named: str | None) -> Preset:
    """Returns the preset of the named system; none named, that of the cart-pole.

    Raises:
        ValueError: the system's `train_defaults` has something that is none.
    """
    if named is None:
        return Preset()
    given = dict(systems.resolve(named).train_defaults)
    for name in given:
        if name not in Preset._fields:
            raise ValueError(
                f"system {named!r}: train_defaults has {name!r}, expected some of {', '.join(Preset._fields)}"
            )
    preset = Preset(**given)
    for name, value, known in (("loss", preset.loss, LOSSES), ("policy", preset.policy, POLICIES)):
        if value not in known:
            raise ValueError(
                f"system {named!r}: train_defaults has {name}={value!r}, expected one of {', '.join(known)}"
            )
    return preset


def add_system(parser: argparse.ArgumentParser) -> None:
    """Adds the system, which is named first: it decides which options there are."""
    known = ", ".join(sorted(systems.registry))
    parser.add_argument(
        "system",
        metavar="SYSTEM",
        help=f"{known}, or module:Class for a system of your own; its name comes before the options",
    )


def add_train_options(parser: argparse.ArgumentParser, named: str | None) -> None:
    """Adds what `train` takes; the numbers of the system too, where one is named already."""
    preset = preset_of(named)
    add_system(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help="run folder (default: runs/SYSTEM_FLOW)")
    run.add_argument("--overwrite", action="store_true", help="replace the run that stands there")
    run.add_argument(
        "--resume",
        metavar="RUN",
        help="in place of SYSTEM: go on with the run in this folder, with the settings it was begun with; "
        "--epochs N continues it up to N",
    )
    run.add_argument(
        "--algorithm",
        choices=("rollout", "shac"),
        default="rollout",
        help="rollout: backpropagation through whole rollouts, which these options are for; shac: "
        "short-horizon actor-critic, whose options `warp-sims train SYSTEM --algorithm shac --help` shows",
    )
    add_flag(run, "progress", True, "show a progress bar")
    policy = parser.add_argument_group("policy")
    add_policy(policy, preset.policy)
    add_flag(policy, "zero-last", preset.zero_last, "start with a zero output layer, so without any control")
    training = parser.add_argument_group("training")
    add_declared(
        training,
        TrainConfig,
        *(name for name in DEFAULTS if name not in ("system", "policy")),
        flow=FLOW,
        horizon={"default": preset.horizon},
        loss={
            "metavar": "LOSS",
            "default": preset.loss,
            "help": "the system's loss of the last state (final) or of all states (running), or module:name "
            "for a function of (states, controls) of your own",
        },
        control_cost={"default": preset.control_cost},
        window={"help": "truncation: both edges close at every multiple of so many steps"},
        decay={
            "type": _decay,
            "metavar": "X",
            "help": "factor in [0, 1] on what crosses the physics edge backwards: at every step, or 0.3/s "
            "for 30% left after a second of simulated time",
        },
        combiner={
            "metavar": "COMBINER",
            "help": "of flow combined, another way to make one gradient of M and R: project (conflicting "
            "ones), blend:W (W of R, the rest of M), anneal:A:B:N (W from A to B over N updates), or "
            "module:name",
        },
        inputs={
            "metavar": "module:name",
            "help": "what the policy is given beside the states, a function of (x0, horizon, generator)",
        },
        optimizer={"choices": OPTIMIZERS},
        clip={"choices": CLIPS},
        on_divergence={
            "choices": ON_DIVERGENCE,
            "help": "an update that is not finite ends the run, or is skipped",
        },
        seed={"help": "seed of the initial states and of the initial weights"},
        dtype=DTYPE,
        device=DEVICE,
        tensorboard={"action": "store_true"},
        graph={
            "action": "store_true",
            "help": "record an update as a CUDA graph and replay it; needs --device cuda",
        },
    )
    if named is not None:
        add_system_options(parser, named)


def _decay(text: str) -> float | PerSecond:
    """A factor a step, or a second: 0.3/s."""
    try:
        return PerSecond(float(text.removesuffix("/s"))) if text.endswith("/s") else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no decay ({error}), expected a number in [0, 1] such as 0.9, or 0.3/s"
        ) from error


def add_resume_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `train --resume RUN` takes: everything else is settled by the run."""
    parser.add_argument("--resume", metavar="RUN", required=True, help="run folder to go on with")
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="how many in all (default: as many as it was begun with)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:INDEX (default: as begun)")
    for option, what in (
        ("policy", "policy, a torch.nn.Module"),
        ("loss", "loss"),
        ("combiner", "combiner"),
        ("inputs", "inputs"),
    ):
        parser.add_argument(
            f"--{option}",
            dest="network" if option == "policy" else option,
            metavar="module:name",
            help=f"the run's own {what}, where its config.json does not say how it is made",
        )
    add_flag(parser, "progress", True, "show a progress bar")


def add_policy(policy: Any, default: str) -> None:
    """Adds --policy, and the sizes of the built-in ones."""
    policy.add_argument(
        "--policy",
        dest="network",
        metavar="POLICY",
        default=default,
        help=f"{', '.join(POLICIES)}, or module:name for one of your own, a torch.nn.Module or a function "
        f"that returns one for a system (default: {default})",
    )
    policy.add_argument(
        "--hidden",
        type=int,
        nargs="*",
        metavar="WIDTH",
        help=f"mlp: widths of the hidden layers (default: {' '.join(map(str, HIDDEN))})",
    )
    policy.add_argument(
        "--width", type=int, metavar="N", help=f"wavecnn: channels of the convolutions (default: {WIDTH})"
    )


def add_animate_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `animate` takes."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder; several are drawn side by side")
    parser.add_argument(
        "--out", metavar="FILE", help="file to write, .gif or .mp4 (default: animation.gif in the first RUN)"
    )
    add_declared(
        parser,
        animate,
        "world",
        "horizon",
        "checkpoint",
        "fps",
        world={"help": "which of the test states to start from"},
        checkpoint={"choices": CHECKPOINTS, "help": "weights to load"},
    )


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `demo` takes."""
    flows = {"nargs": "+", "type": str, "metavar": "FLOW", "default": ["regular", "combined"]}
    out = {"metavar": "DIR", "default": "runs/demo", "help": "folder to write"}
    add_declared(parser, run_demo, "out", "flows", "poles", "epochs", out=out, flows=flows)
    add_flag(parser, "progress", True, "show a progress bar per flow")


QUICK_EPOCHS = 5
SEEDS = 4


def add_reproduce_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `reproduce` takes."""
    parser.add_argument(
        "problem", nargs="?", choices=(*SETTINGS, "all"), default="all", help="whose settings (default: all)"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="K", help=f"seeds of the initial weights (default: {SEEDS}, --quick: 1)"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help=f"of every run (default: {EPOCHS}, --quick: {QUICK_EPOCHS})"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a trial: few epochs and one seed of every setting, flow and clip",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of all runs and the report; one that was begun is gone on with (default: "
        "runs/reproduce, --quick: runs/reproduce_quick)",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing, write the report on what there is in DIR"
    )
    add_flag(parser, "progress", True, "show how far it is and the time left")
    group = parser.add_argument_group("a part of the settings")
    letters = [flow.value for flow in FLOWS]
    group.add_argument(
        "--flows",
        nargs="+",
        metavar="FLOW",
        default=letters,
        help=f"some of {' '.join(letters)} (default: all)",
    )
    group.add_argument(
        "--clips",
        nargs="+",
        choices=(*CLIPS, "all"),
        metavar="CLIP",
        help=f"some of {' '.join(CLIPS)}, or all; the published scripts have all, which takes three times as "
        "long (default: none, --quick: all)",
    )
    for problem, option, kind, known in (
        ("cartpole", "--poles", int, POLES),
        ("guidance", "--costs", float, COSTS),
        ("quantum", "--targets", int, TARGETS),
    ):
        shown = " ".join(f"{value:g}" for value in known)
        group.add_argument(
            option, nargs="+", type=kind, metavar="X", help=f"of {problem}, some of {shown} (default: all)"
        )

"""The options of the command line, most of them made from the fields of dataclasses."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from typing import Any, NamedTuple

from . import systems
from .demo import DEMO_EPOCHS
from .estimators import PerSecond
from .flows import Flow
from .training.config import CLIPS, LOSSES, ON_DIVERGENCE, TrainConfig
from .training.optimizers import OPTIMIZERS
from .training.published import COSTS, EPOCHS, FLOWS, POLES, SETTINGS, TARGETS
from .training.runs import CHECKPOINTS

DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
HIDDEN = (100, 100)
WIDTH = 60
POLICIES = ("mlp", "wavecnn")


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


def add_train_options(parser: argparse.ArgumentParser, named: str | None) -> None:
    """Adds what `train` takes; the numbers of the system too, where one is named already."""
    preset = preset_of(named)
    known = ", ".join(sorted(systems.registry))
    parser.add_argument(
        "system",
        metavar="SYSTEM",
        help=f"{known}, or module:Class for a system of your own; its name comes before the options",
    )
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
    texts = field_texts(TrainConfig)
    kinds: dict[str, dict[str, Any]] = {
        "flow": {
            "metavar": "FLOW",
            "help": "backward flow: " + ", ".join(f"{f.name.lower()} ({f.value})" for f in Flow),
        },
        "horizon": {"type": int, "default": preset.horizon},
        "loss": {
            "metavar": "LOSS",
            "default": preset.loss,
            "help": "the system's loss of the last state (final) or of all states (running), or module:name "
            "for a function of (states, controls) of your own",
        },
        "control_cost": {"type": float, "default": preset.control_cost},
        "window": {"type": int, "help": "truncation: both edges close at every multiple of so many steps"},
        "decay": {
            "type": _decay,
            "help": "factor in [0, 1] on what crosses the physics edge backwards: at every step, or 0.3/s "
            "for 30% left after a second of simulated time",
        },
        "clip_cotangent": {"type": float},
        "combiner": {
            "metavar": "COMBINER",
            "help": "of flow combined, another way to make one gradient of M and R: project (conflicting "
            "ones), blend:W (W of R, the rest of M), anneal:A:B:N (W from A to B over N updates), or "
            "module:name",
        },
        "inputs": {
            "metavar": "module:name",
            "help": "what the policy is given beside the states, a function of (x0, horizon, generator)",
        },
        "samples": {"type": int},
        "batch": {"type": int},
        "epochs": {"type": int},
        "optimizer": {"choices": OPTIMIZERS},
        "lr": {"type": float},
        "momentum": {"type": float},
        "clip": {"choices": CLIPS},
        "clip_at": {"type": float},
        "on_divergence": {
            "choices": ON_DIVERGENCE,
            "help": "an update that is not finite ends the run, or is skipped",
        },
        "seed": {"type": int, "help": "seed of the initial states and of the initial weights"},
        "dtype": {
            "choices": ("float32", "float64"),
            "default": "float32",
            "help": "precision of states and weights",
        },
        "device": {"metavar": "DEVICE", "default": "cpu", "help": "cpu, cuda or cuda:INDEX"},
        "log_every": {"type": int},
        "checkpoint_every": {"type": int},
    }
    for name, kind in kinds.items():
        kind = {"default": DEFAULTS[name], "help": _uncapitalised(texts.get(name, "")), **kind}
        shown = "" if kind["default"] is None else f" (default: {kind['default']})"
        kind["help"] = _escaped(kind["help"].rstrip(".") + shown)
        if "choices" not in kind:
            kind.setdefault("metavar", "N" if kind.get("type") is int else "X")
        training.add_argument(_option(name), **kind)
    training.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard events into the run folder"
    )
    training.add_argument(
        "--graph",
        action="store_true",
        help="record an update as a CUDA graph and replay it; needs --device cuda",
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


def add_system_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds an option for every field of the system: `poles` becomes --poles."""
    system = systems.resolve(name)
    texts = field_texts(system)
    hints = typing.get_type_hints(system)
    group = parser.add_argument_group(f"numbers of {name}")
    taken = {word for action in parser._actions for word in action.option_strings}
    for field in dataclasses.fields(system):
        if not field.init:
            continue
        option = _option(field.name)
        kind: dict[str, Any] = {"dest": f"field:{field.name}", "default": argparse.SUPPRESS}
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        text = _uncapitalised(texts.get(field.name, "").rstrip("."))
        if field.default is not dataclasses.MISSING:
            text = f"{text} (default: {field.default})".lstrip()
        kind |= {"required": required, "help": _escaped(text)}
        if hints.get(field.name) is bool:
            kind["action"] = argparse.BooleanOptionalAction
        else:
            kind["type"] = {int: int, float: float, str: str}.get(hints.get(field.name), _literal)
            kind["metavar"] = "N" if kind["type"] is int else "X"
        # A system may have a field of a name that training takes.
        group.add_argument(option if option not in taken else f"--system-{option[2:]}", **kind)


def add_animate_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `animate` takes."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder; several are drawn side by side")
    parser.add_argument(
        "--out", metavar="FILE", help="file to write, .gif or .mp4 (default: animation.gif in the first RUN)"
    )
    parser.add_argument(
        "--world",
        type=int,
        default=0,
        metavar="N",
        help="which of the test states to start from (default: 0)",
    )
    parser.add_argument("--horizon", type=int, metavar="N", help="number of steps (default: as in training)")
    parser.add_argument(
        "--checkpoint", choices=CHECKPOINTS, default="best", help="weights to load (default: best)"
    )
    parser.add_argument(
        "--fps", type=float, default=25.0, metavar="X", help="pictures per second, one per step (default: 25)"
    )


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `demo` takes."""
    parser.add_argument(
        "--out", metavar="DIR", default="runs/demo", help="folder to write (default: runs/demo)"
    )
    parser.add_argument(
        "--flows",
        nargs="+",
        metavar="FLOW",
        default=["regular", "combined"],
        help="flows to compare (default: regular combined)",
    )
    parser.add_argument("--poles", type=int, default=4, metavar="N", help="number of poles (default: 4)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=DEMO_EPOCHS,
        metavar="N",
        help=f"epochs for each flow (default: {DEMO_EPOCHS})",
    )
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


def add_flag(parser: Any, name: str, default: bool, text: str) -> None:
    """Adds --name and --no-name."""
    parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _uncapitalised(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _literal(text: str) -> Any:
    """Reads a value that is neither a number nor a name, a tuple for example."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no Python literal such as 3, 0.5, 'name' or (1, 2)"
        ) from None


def field_texts(cls: type) -> dict[str, str]:
    """Returns what is written about each field: metadata "help", the string below it, or `Attributes:`."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        texts |= _attributes_section(owner.__doc__ or "") | _strings_below(owner)
    texts |= {f.name: f.metadata["help"] for f in dataclasses.fields(cls) if "help" in f.metadata}
    return texts


def _strings_below(cls: type) -> dict[str, str]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, SyntaxError, TypeError):  # made at run time
        return {}
    texts = {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for field, below in itertools.pairwise(statements):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        value = below.value if isinstance(below, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            texts[field.target.id] = " ".join(value.value.split())
    return texts


def _attributes_section(doc: str) -> dict[str, str]:
    lines = inspect.cleandoc(doc).splitlines()
    texts: dict[str, str] = {}
    name = None
    for line in lines[lines.index("Attributes:") + 1 :] if "Attributes:" in lines else []:
        if line and not line.startswith(" "):
            break
        start = re.match(r"    (\w+)(?: \([^)]*\))?: (.*)", line)
        if start:
            name = start.group(1)
            texts[name] = start.group(2)
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts

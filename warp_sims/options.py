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
from typing import Any

from . import systems
from .demo import DEMO_EPOCHS
from .flows import Flow
from .optimizers import OPTIMIZERS
from .runs import CHECKPOINTS
from .train_config import CLIPS, LOSSES, TrainConfig

DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainConfig)}


def add_train_options(parser: argparse.ArgumentParser, named: str | None) -> None:
    """Adds what `train` takes; the numbers of the system too, where one is named already."""
    known = ", ".join(sorted(systems.registry))
    parser.add_argument(
        "system",
        metavar="SYSTEM",
        help=f"{known}, or module:Class for a system of your own; its name comes before the options",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help="run folder (default: runs/SYSTEM_FLOW)")
    run.add_argument("--overwrite", action="store_true", help="replace the run that stands there")
    _add_flag(run, "progress", True, "show a progress bar")
    policy = parser.add_argument_group("policy, a multilayer perceptron")
    policy.add_argument(
        "--hidden",
        type=int,
        nargs="*",
        default=[100, 100],
        metavar="WIDTH",
        help="widths of the hidden layers (default: 100 100)",
    )
    _add_flag(policy, "zero-last", True, "start with a zero output layer, so without any control")
    training = parser.add_argument_group("training")
    texts = field_texts(TrainConfig)
    kinds: dict[str, dict[str, Any]] = {
        "flow": {
            "metavar": "FLOW",
            "help": "backward flow: " + ", ".join(f"{f.name.lower()} ({f.value})" for f in Flow),
        },
        "horizon": {"type": int},
        "loss": {"choices": LOSSES, "help": "the system's loss of the last state, or of all states"},
        "control_cost": {"type": float},
        "window": {"type": int, "help": "truncation: both edges close at every multiple of so many steps"},
        "decay": {"type": float},
        "samples": {"type": int},
        "batch": {"type": int},
        "epochs": {"type": int},
        "optimizer": {"choices": OPTIMIZERS},
        "lr": {"type": float},
        "momentum": {"type": float},
        "clip": {"choices": CLIPS},
        "clip_at": {"type": float},
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
    if named is not None:
        _add_system_options(parser, named)


def _add_system_options(parser: argparse.ArgumentParser, name: str) -> None:
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
    _add_flag(parser, "progress", True, "show a progress bar per flow")


def _add_flag(parser: Any, name: str, default: bool, text: str) -> None:
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

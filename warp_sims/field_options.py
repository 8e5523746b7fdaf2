"""Options made of what is declared already: the fields of a dataclass, the parameters of a function.

An annotation says what values an option takes, a default what it has where it is not given, and the docstring
(metadata "help", the string below a field, `Attributes:` or `Args:`) what it is for.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from typing import Any, NamedTuple

from . import systems

_KINDS: dict[Any, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    str: {"type": str, "metavar": "X"},
    bool: {"action": argparse.BooleanOptionalAction},
}


class Declared(NamedTuple):
    """A field or a parameter."""

    annotation: Any
    default: Any
    """`dataclasses.MISSING` where there is none."""
    text: str
    """What its docstring says."""


def declared(by: Any) -> dict[str, Declared]:
    """Returns the fields that a dataclass is made with, or the parameters of a function, by name."""
    hints = typing.get_type_hints(by)
    if isinstance(by, type):
        texts = field_texts(by)
        defaults = {
            f.name: None if f.default_factory is not dataclasses.MISSING else f.default
            for f in dataclasses.fields(by)
            if f.init
        }
    else:
        texts = _section(by.__doc__ or "", "Args:")
        defaults = {
            p.name: dataclasses.MISSING if p.default is p.empty else p.default
            for p in inspect.signature(by).parameters.values()
        }
    return {
        name: Declared(hints.get(name), default, texts.get(name, "")) for name, default in defaults.items()
    }


def _without_none(hint: Any) -> Any:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else ()
    kept = [part for part in parts if part is not type(None)]
    return kept[0] if len(kept) == 1 else hint


def add_declared(group: Any, by: Any, *names: str, **changes: dict[str, Any]) -> None:
    """Adds an option for each of these fields of a dataclass or parameters of a function.

    Args:
        group: Parser, or group of one.
        by: The dataclass or the function.
        names: Of its fields or parameters; `log_every` becomes --log-every.
        changes: By name, what `add_argument` is to be told instead. A "help" is shown with the default behind
            it.
    """
    known = declared(by)
    for name in names:
        found, change = known[name], changes.get(name, {})
        default = change.get("default", found.default)
        told = "choices" in change or "action" in change
        kind = {} if told else _KINDS.get(_without_none(found.annotation), {})
        if isinstance(default, tuple) and default:
            kind = {"nargs": "*", "type": type(default[0]), "metavar": "X"}
        text = option_help(found._replace(default=default, text=change.get("help", found.text)))
        group.add_argument(option_name(name), **{**kind, **change, "default": default, "help": text})


def add_system_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds an option for every field of the system: `poles` becomes --poles."""
    group = parser.add_argument_group(f"numbers of {name}")
    taken = {word for action in parser._actions for word in action.option_strings}
    for field, found in declared(systems.resolve(name)).items():
        # A system may have a field of a name that training takes.
        option = option_name(field if option_name(field) not in taken else f"system-{field}")
        group.add_argument(
            option,
            dest=f"field:{field}",
            default=argparse.SUPPRESS,
            required=found.default is dataclasses.MISSING,
            help=option_help(found),
            **_KINDS.get(found.annotation, {"type": _literal, "metavar": "X"}),
        )


def make_system(options: argparse.Namespace) -> systems.System:
    """Returns the system with the numbers that were given as options."""
    given = vars(options).items()
    fields = {name.removeprefix("field:"): value for name, value in given if name.startswith("field:")}
    return systems.resolve(options.system)(**fields)


def add_flag(parser: Any, name: str, default: bool, text: str) -> None:
    """Adds --name and --no-name."""
    parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text)


def option_name(field: str) -> str:
    """--log-every for `log_every`."""
    return "--" + field.replace("_", "-")


def option_help(found: Declared) -> str:
    """The text of an option, and its default behind it."""
    text, default = found.text.rstrip(".").replace('"', ""), found.default
    # "None: no bound" is how a docstring says what holds where nothing is given
    text = re.sub(r"[.;] None: ([^.;]*)$", r" (default: \1)", text)
    if default is not None and default is not dataclasses.MISSING and not isinstance(default, bool):
        shown = default if isinstance(default, (tuple, list)) else [default]
        words = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in shown)
        text = f"{text} (default: {words})".lstrip()
    text = text[:1].lower() + text[1:] if text[1:2].islower() else text
    return text.replace("%", "%%")


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
        texts |= _section(owner.__doc__ or "", "Attributes:") | _strings_below(owner)
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


def _section(doc: str, head: str) -> dict[str, str]:
    """Names and texts of a section of a docstring."""
    lines = inspect.cleandoc(doc).splitlines()
    texts: dict[str, str] = {}
    name = None
    for line in lines[lines.index(head) + 1 :] if head in lines else []:
        if line and not line.startswith(" "):
            break
        start = re.match(r"    (\w+)(?: \([^)]*\))?: (.*)", line)
        if start:
            name = start.group(1)
            texts[name] = start.group(2)
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts

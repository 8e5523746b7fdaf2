"""Mutants of the built-in adjoints: each term multiplied by 1.001 once, in every form that is written by
hand.

A term is an operand of a sum, or a value that is assigned, returned or handed to a constructor and is no sum.
Terms of the forms by value are found in Python's syntax tree, those of the native forms in their text, which
for an adjoint begins with what it shares with the step. Indices, loop bounds, conditions and zeros are no
terms; a mutant that the compiler refuses multiplied something that is no number, and does not count.
"""

import ast
import dataclasses
import functools
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import warp as wp
import warp_sims.kernels.systems.cartpole
from warp_sims.kernels.native_text import sections

import warp_sims as ws

FACTOR = "1.001"
KERNELS = Path(warp_sims.kernels.systems.cartpole.__file__).parent

SYSTEMS: dict[str, list[ws.System]] = {
    "cartpole": [ws.CartPole(poles=2)],
    "guidance": [ws.GuidanceByRepulsion(drivers=2, evaders=3)],
    "quadrotor": [ws.Quadrotor()],
    # an odd number of points leaves a row without a partner, an even one has the last meet
    "quantum": [ws.QuantumControl(points=7), ws.QuantumControl(points=6)],
}
"""What mutants are checked on, one after the other until one catches it."""


class Mutant(NamedTuple):
    """One term of one adjoint, multiplied by 1.001."""

    file: str
    """Below kernels/systems/."""
    form: str
    """As `check` calls it."""
    function: str
    """ "step_vjp", "loss_vjp" or "parameters_vjp", as `check` calls what it shows in."""
    line: int
    term: str
    source: str
    """The whole module, mutated."""

    @property
    def name(self) -> str:
        """For people, and unique."""
        return f"{self.file}:{self.line} {' '.join(self.term.split())}"

    def systems(self) -> list[ws.System]:
        """Systems with this mutant for an adjoint, in the mutated form and by value alone."""
        problem = self.file.split(".")[0].split("_")[0]
        return [_mutated(self, system) for system in SYSTEMS[problem]]


@functools.cache
def all_mutants() -> tuple[Mutant, ...]:
    """Every mutant, file by file."""
    found: list[Mutant] = []
    for problem in SYSTEMS:
        found += _of_python(f"{problem}.py")
        if (KERNELS / f"{problem}_block.h").exists():
            found += _of_text(f"{problem}_block.h", "in lanes", ("prelude", "step_vjp"))
    found += _of_text("quantum_memory.h", "in memory", ("prelude", "step_vjp"))
    found += _of_text("quantum_memory.h", "in memory", ("overlap", "loss_vjp"))
    return tuple(found)


# Mutated systems


def _load(mutant: Mutant) -> Any:
    """Imports the mutated file as a module beside the original one."""
    name = f"warp_sims.kernels.systems.mutant_{abs(hash(mutant.source))}"
    if name not in sys.modules:
        path = Path(_folder()) / f"{name.split('.')[-1]}.py"
        path.write_text(mutant.source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@functools.cache
def _folder() -> str:
    """For the sources, which Warp reads again."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    return folder.name


_kept: list[Any] = []


@functools.cache
def _functions(mutant: Mutant, system: ws.System, dtype: Any) -> ws.DeviceFunctions:
    original = system.device_functions(dtype)
    if dtype is not wp.float64:
        return original._replace(block=None, memory=None)
    module = _load(mutant)
    sizes = {
        "CartPole": ("poles",),
        "GuidanceByRepulsion": ("drivers", "evaders"),
        "QuantumControl": ("points",),
        "Quadrotor": (),
    }[type(system).__name__]
    numbers = [getattr(system, size) for size in sizes]
    if mutant.form == "by value":
        return module.make_functions(*numbers, dtype)._replace(block=None, memory=None)
    make = module.make_block_functions if mutant.form == "in lanes" else module.make_memory_functions
    made = make(*numbers, dtype, original.Params, original.State, original.Control)
    alone = original._replace(block=None, memory=None)
    return alone._replace(block=made) if mutant.form == "in lanes" else alone._replace(memory=made)


def _mutated(mutant: Mutant, system: ws.System) -> ws.System:
    def device_functions(self: Any, dtype: Any) -> ws.DeviceFunctions:
        return _functions(mutant, system, dtype)

    def parameters(self: Any, dtype: Any) -> Any:
        # the mutated file has a struct of its own
        params = device_functions(self, dtype).Params()
        given = system.parameters(dtype)
        for name in params._cls.vars:
            setattr(params, name, getattr(given, name))
        return params

    kind = type(system)
    changed = type(kind.__name__, (kind,), {"device_functions": device_functions, "parameters": parameters})
    return changed(**{field.name: getattr(system, field.name) for field in dataclasses.fields(system)})


# Terms in Python


def _of_python(file: str) -> Iterator[Mutant]:
    source = (KERNELS / file).read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()
    for function in ast.walk(ast.parse(source)):
        if not (isinstance(function, ast.FunctionDef) and function.name.endswith("_vjp")):
            continue
        # what check calls it
        what = next((w for w in ("loss_vjp", "parameters_vjp") if function.name.endswith(w)), "step_vjp")
        spans = {}
        for node in _terms_of_function(function):
            first = starts[node.lineno - 1] + node.col_offset
            last = starts[node.end_lineno - 1] + node.end_col_offset
            spans[first, last] = node.lineno
        for (first, last), line in sorted(spans.items()):
            term = data[first:last].decode()
            changed = data[:first] + f"(({term}) * dtype({FACTOR}))".encode() + data[last:]
            yield Mutant(file, "by value", what, line, term, changed.decode())


_CONSTRUCTORS = {"Vec", "Complex", "State", "Control", "Values"}
_INTEGERS = {"i", "j", "k"}


def _terms_of_function(function: ast.FunctionDef) -> Iterator[Any]:
    for statement in ast.walk(function):
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            if isinstance(target, ast.Name) and target.id in _INTEGERS:
                continue
            if isinstance(target, ast.Tuple):
                continue  # several values are no number
            yield from _terms(statement.value)
        elif isinstance(statement, ast.AugAssign):
            yield from _terms(statement.value)
        elif isinstance(statement, ast.Return) and statement.value is not None:
            value = statement.value
            for part in value.elts if isinstance(value, ast.Tuple) else [value]:
                yield from _terms(part)


def _terms(value: Any) -> Iterator[Any]:
    """The terms of an expression, and those of sums and constructors inside of it."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Add, ast.Sub)):
        yield from _terms(value.left)
        yield from _terms(value.right)
        return
    name = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else None
    if name in _CONSTRUCTORS:
        for argument in value.args:
            yield from _terms(argument)
        return
    if ast.unparse(value) != "dtype(0.0)":
        yield value
    if name != "dtype" and not isinstance(value, ast.Subscript):
        yield from _sums_inside(value)


def _sums_inside(value: Any) -> Iterator[Any]:
    for part in ast.iter_child_nodes(value):
        if isinstance(part, ast.Subscript):
            continue
        is_sum = isinstance(part, ast.BinOp) and isinstance(part.op, (ast.Add, ast.Sub))
        is_call = isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
        if is_sum or (is_call and part.func.id in _CONSTRUCTORS):
            yield from _terms(part)
        elif not (is_call and part.func.id == "dtype"):
            yield from _sums_inside(part)


# Terms in native texts


def _of_text(file: str, form: str, names: tuple[str, str]) -> Iterator[Mutant]:
    """Mutants of an adjoint whose text is these sections of a header, one behind the other."""
    module = (KERNELS / file).with_suffix(".py")
    source, header = module.read_text(), (KERNELS / file).read_text()
    adjoint = " + ".join(f'_TEXT["{name}"]' for name in names)
    assert source.count(adjoint) == 1 and source.count("sections(__file__)") == 1
    # the mutated module lies elsewhere, without a header beside it
    source = source.replace("sections(__file__)", f"sections({str(module)!r})")
    texts = {name: sections(str(module))[name] for name in names}
    for name, text in texts.items():
        first_line = header[: header.index(f"//: {name}\n")].count("\n") + 1
        for first, last in _terms_of_text(text):
            term = text[first:last]
            larger = f"({term}) * real({FACTOR})"
            if file == "quantum_memory.h" and _COMPLEX.search(term):
                larger = f"times({{real({FACTOR}), real(0)}}, {term})"
            changed = text[:first] + larger + text[last:]
            parts = texts | {name: changed}
            mutated = f"_MUTANT = {''.join(parts.values())!r}\n\n\n@functools.cache"
            whole = source.replace(adjoint, "_MUTANT").replace("@functools.cache", mutated, 1)
            line = first_line + text[:first].count("\n")
            yield Mutant(file, form, names[1], line, term, whole)


_ASSIGNMENT = re.compile(r"(?<![=<>!*/&|^])[+-]?=(?!=)")
_CALLS = re.compile(r"\b(?:f\(i, k, r, |store\(g\[f\], i0, |add_poles\(|store\(to, i0, )")
"""Calls of functions of the texts that are statements of their own; what follows are expressions."""
_NOT_A_NUMBER = re.compile(
    r"^\s*(const\s+)?(int|long long|bool|enum|word|whole)\b|\bfor \(|\*\s*\w+(\[\w+\])*\s*$|\bi0\s*$"
)
"""Before an assignment: what is assigned to is an index, a pointer, or stands in the head of a loop."""
_POINTER = re.compile(r"^\((const )?real\*\)|->c$|\.c$|^\[|^\{\{?real")
_COMPLEX = re.compile(r"^(times|reciprocal|rhs)\(|^pivot$")
"""Complex numbers of quantum_memory.h, which are no vectors."""
_CONDITION = re.compile(r"^n > ")
_ZERO = re.compile(r"^(\(vec\))?\(?(real\(0\)|0|\{\})\)?$")


def _terms_of_text(text: str) -> list[tuple[int, int]]:
    # comments, and the two functions that return indices, are blanked; nothing moves
    text = re.sub(
        r"//[^\n]*|^ *#[^\n]*|const auto (left|right) = [^\n]*",
        lambda match: " " * len(match.group()),
        text,
        flags=re.MULTILINE,
    )
    found: set[tuple[int, int]] = set()
    for match in _ASSIGNMENT.finditer(text):
        begin = max(text.rfind(c, 0, match.start()) for c in ";{}")
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if line.lstrip().startswith(("enum", "static_assert", "typedef")):
            continue
        if not _NOT_A_NUMBER.search(text[begin + 1 : match.start()]):
            found |= set(_list(text, match.end()))
    for match in re.finditer(r"\breturn\b", text):
        found |= set(_list(text, match.end()))
    for match in _CALLS.finditer(text):
        end = _end(text, match.end(), ",)")
        found |= set(_expression(text, match.end(), end))
        if not match.group().startswith("add_poles"):
            found |= set(_expression(text, end + 1, _end(text, end + 1, ",)")))
    return sorted(found)


def _end(text: str, at: int, stops: str) -> int:
    """Where the expression that begins here ends."""
    depth = 0
    while True:
        c = text[at]
        if depth == 0 and c in stops:
            return at
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return at
        at += 1


def _list(text: str, first: int) -> Iterator[tuple[int, int]]:
    """Terms of an initialiser: an expression, or a list of them in braces."""
    end = _end(text, first, ";,")
    while text[first].isspace():
        first += 1
    if text[first] != "{":
        yield from _expression(text, first, end)
        return
    at = first + 1
    while at < end:
        stop = _end(text, at, ",")
        yield from _list(text, at) if text[at:stop].strip().startswith("{") else _expression(text, at, stop)
        at = stop + 1


def _expression(text: str, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Terms at the top of an expression, and in brackets inside of it."""
    value = text[first:last].strip()
    if not value or _POINTER.match(value) or _POINTER.search(value) or re.search(r"[^=<>!]=[^=]", value):
        return
    depth, begin = 0, first
    for at in range(first, last + 1):
        c = text[at] if at < last else "+"
        if at < last:
            depth += (c in "([{") - (c in ")]}")
        if depth or c not in "+-" or text[at : at + 2] == "->":
            continue
        before = text[begin:at].strip()
        if at < last and (not before or before[-1] in "*/?:,<>"):
            continue  # a sign, not a sum
        if before and not _ZERO.match(before) and not _CONDITION.match(before):
            start = begin + len(text[begin:at]) - len(text[begin:at].lstrip())
            yield start, start + len(before)
        begin = at + 1
    # sums in brackets; a bracket behind a name holds the arguments of a call, or a cast
    for match in re.finditer(r"(\w?)\s*\(", text[first:last]):
        at = first + match.end()
        stop = _end(text, at, "")
        if text[first:at].count("[") > text[first:at].count("]"):
            continue  # an index
        if match.group(1):
            if text[at:stop].lstrip().startswith("{"):
                yield from _list(text, at)
            continue
        terms = list(_expression(text, at, stop))
        if len(terms) > 1:
            yield from terms

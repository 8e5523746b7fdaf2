"""Equations and signatures in docstrings stand as they were written: no tool has filled them like prose."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("kernels", "bridge", "warp_sims") for p in (ROOT / folder).rglob("*.py"))
OPERATORS = ("+", "-", "*", "/", "=", "->", ",", "(", "[")
BRACKETS = {"(": ")", "[": "]", "{": "}"}


def indented_blocks(docstring):
    """Indented blocks behind an empty line, which hold equations, signatures, tables or code."""
    for paragraph in docstring.split("\n\n"):
        lines = paragraph.split("\n")
        if lines[0].startswith("    ") and all(line.startswith("    ") for line in lines if line):
            yield [line[4:] for line in lines if line.strip()]


def is_code(lines):
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def broken(lines):
    """Entries of a block that a filled paragraph would have: open brackets, operators at an end, a signature
    behind other words. What is indented further goes on with an entry.
    """
    entries = []
    for line in lines:
        if line.startswith(" ") and entries:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    for text in entries:
        is_open = any(text.count(a) != text.count(b) for a, b in BRACKETS.items())
        is_rest = text.endswith(OPERATORS) or text.startswith(("->", "/", "=", ")"))
        if is_open or is_rest or (") -> " in text and " " in text.split("(")[0]):
            yield text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for lines in indented_blocks(ast.get_docstring(node) or ""):
                assert is_code(lines) or not list(broken(lines)), "\n".join(lines)


def test_what_a_formatter_makes_of_a_block():
    """Blocks of this project, as a tool once filled them."""
    for text in (
        "a_i = c_0 n - k sum (x_i - x_k) /\nd^2 a_j = -b v_j",
        "f = g (x_k -\nx_j) h = 1 / d",
        "adj_r = |r| r\n-> 0",
        "step(x: State) -> State cotangents of x\nand u loss(x: State) -> dtype",
    ):
        assert list(broken(text.split("\n")))

"""Native texts: C++ in a header file next to the module that gives it to Warp, in named sections."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import warp as wp

_SECTION = re.compile(r"^//: (\w+)\n", re.MULTILINE)


@functools.cache
def sections(module: str, *names: str) -> dict[str, str]:
    """Returns the sections of the header next to a module's file, or of the headers there with these names.
    They have names: a section goes from a line `//: name` to the next such line.

    They are bodies of device functions or parts of one. Python replaces some words (REAL, BLOCK, ...), so a
    compiler cannot read them as they are.
    """
    found: dict[str, str] = {}
    for name in names or (Path(module).stem,):
        parts = _SECTION.split(Path(module).with_name(f"{name}.h").read_text())
        found |= {name: f"\n{text}" for name, text in zip(parts[1::2], parts[2::2])}
    return found


def fill(text: str, words: Mapping[str, Any], dtype: Any) -> str:
    """Returns a text with REAL replaced by the scalar type, and every key of `words` by its value, in their
    order.
    """
    real = "float" if dtype == wp.float32 else "double"
    for word, value in {**words, "REAL": real}.items():
        text = text.replace(word, str(value))
    return text

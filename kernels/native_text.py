"""Native texts: C++ in a header beside the module that hands it to Warp, in sections with a name each."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import warp as wp

_SECTION = re.compile(r"^//: (\w+)\n", re.MULTILINE)


@functools.cache
def sections(module: str) -> dict[str, str]:
    """The sections of the header beside a module's file by name: from a line `//: name` to the next one.

    They are bodies of device functions or parts of one, with words that Python replaces (REAL, BLOCK, ...),
    so a compiler cannot read them as they are.
    """
    parts = _SECTION.split(Path(module).with_suffix(".h").read_text())
    return {name: f"\n{text}" for name, text in zip(parts[1::2], parts[2::2])}


def fill(text: str, words: Mapping[str, Any], dtype: Any) -> str:
    """Returns a text with REAL replaced by the scalar type, and every key of `words` by its value, in their
    order.
    """
    real = "float" if dtype == wp.float32 else "double"
    for word, value in {**words, "REAL": real}.items():
        text = text.replace(word, str(value))
    return text

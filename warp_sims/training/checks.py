"""Checks of the numbers in settings, in the same words for every kind of run."""

from __future__ import annotations

import math
from typing import Any

from ..kernels.flow import as_int


def whole(call: str, name: str, value: Any, at_least: int) -> int:
    """Returns a setting that is a whole number, as an int; numbers of other libraries are accepted.

    Raises:
        TypeError: It is no whole number; the message begins with `call`.
        ValueError: It is too small.
    """
    expected = f"expected a whole number of at least {at_least}"
    number = as_int(value)
    if number is None:
        raise TypeError(f"{call}: {name}={value!r} is a {type(value).__name__}, {expected}")
    if number < at_least:
        raise ValueError(f"{call}: {name}={number}, {expected}")
    return number


def real(call: str, name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """Returns a setting that is a finite number from `low` to `high`.

    Args:
        call: What the messages begin with.
        name: Of the setting.
        value: A number, of this or another library.
        low: The least.
        high: The greatest; infinite: no bound.
        above: Whether the number must be above a `low` of 0.

    Raises:
        TypeError: It is no number.
        ValueError: It is outside, or not finite.
    """
    if above:
        expected = "expected a finite number above 0"
    elif high == math.inf:
        expected = "expected a finite number of at least 0"
    else:
        expected = f"expected a number from {low:g} to {high:g}"
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{call}: {name}={value!r} is a {type(value).__name__}, {expected}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{call}: {name}={value!r} is a {type(value).__name__}, {expected}") from None
    if not math.isfinite(number) or not low <= number <= high or (above and number == low):
        raise ValueError(f"{call}: {name}={number:g}, {expected}")
    return number

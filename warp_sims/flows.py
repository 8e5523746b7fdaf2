"""Flows as users give them, turned into one letter a step."""

import operator
from collections.abc import Sequence

from .kernels.flow import Flow

__all__ = ["Flow", "check_decay", "schedule"]


MOST_STEPS = 2**31 - 1
"""Range of a kernel's indices."""


def schedule(
    flow: str | Flow | Sequence[str | Flow], horizon: int, window: int | None = None, call: str = "rollout"
) -> tuple[str, str]:
    """Returns the flow letters of the base field and, for a combined gradient, of the check field (else "").

    Entry t gates both edges that leave x_t. A window k closes both at t = k, 2k, ...

    Raises:
        TypeError: `flow` or `window` has the wrong type.
        ValueError: `flow` names no flow, has the wrong number of entries, or `window` is below 1.
    """
    if isinstance(flow, str):
        one = Flow.parse(flow)
        pair = (Flow.MODIFIED.value, Flow.REGULAR.value) if one is Flow.COMBINED else (one.value, "")
        if window is None:
            return pair[0] * horizon, pair[1] * horizon
        base, check = list(pair[0] * horizon), list(pair[1] * horizon)
    elif isinstance(flow, Sequence):
        base, check = [Flow.parse(entry).value for entry in flow], []
        if len(base) != horizon:
            raise ValueError(
                f"{call}: flow is a list of {len(base)} entries, expected one per step, horizon={horizon}; "
                "entry t gates the edges that leave x_t"
            )
        if Flow.COMBINED.value in base:
            raise ValueError(
                f"{call}: flow has 'combined' at step {base.index(Flow.COMBINED.value)}, expected 'regular', "
                f"'modified', 'network' or 'stopped' "
                "in a list: the comparison is of whole gradients, not of steps; use gradient_pair with base= "
                "and check="
            )
    else:
        raise TypeError(
            f"{call}: flow is {flow!r} of type {type(flow).__name__}, expected a name, a letter, a Flow or a "
            f"list of these"
        )
    if window is not None:
        every = as_int(window)
        if every is None:
            raise TypeError(
                f"{call}: window is {window!r} of type {type(window).__name__}, expected an int of at least "
                f"1 or None"
            )
        if every < 1:
            raise ValueError(
                f"{call}: window is {window}, expected at least 1 step (both edges close at t = window, 2 "
                f"window, ...), or None"
            )
        for t in range(every, horizon, every):
            base[t] = Flow.STOPPED.value
            if check:
                check[t] = Flow.STOPPED.value
    return "".join(base), "".join(check)


def as_int(value: object) -> int | None:
    """A whole number of any library as an int, None for everything else, True and False included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def check_decay(decay: float, call: str = "rollout") -> float:
    """Returns the decay as a float in [0, 1].

    Raises:
        TypeError: not a number.
        ValueError: outside [0, 1].
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(
            f"{call}: decay is {decay!r} of type {type(decay).__name__}, expected a number in [0, 1]"
        )
    if not 0.0 <= decay <= 1.0:  # NaN neither
        raise ValueError(
            f"{call}: decay is {decay!r}, expected a number in [0, 1]: the factor on what crosses a physics "
            f"edge, 1 for none"
        )
    return float(decay)

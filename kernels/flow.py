"""Gradient flows: which edges of the unrolled graph the backward pass may cross.

Unrolled, for t = 0 ... T-1, with the policy N and the simulator S:

    u_t     = N(x_t, theta)
    x_{t+1} = S(x_t, u_t)

two edges leave every state x_t: the *physics* edge into S and the *network* edge into N. Backwards, with lam
the cotangent of a state and mu the cotangent of a control:

    lam_T = dL/dx_T
    mu_t  = (dS/du)^T lam_{t+1} + dL/du_t
    lam_t = dL/dx_t + decay * [physics edge open] (dS/dx)^T lam_{t+1} + [network edge open] (dN/dx)^T mu_t

Source: Schnell and Thuerey, "Stabilizing Backpropagation Through Time to Learn Complex Physics", ICLR 2024.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Sequence

PHYSICS = 1
"""Bit of an edge mask: the physics edge is open."""
NETWORK = 2
"""Bit of an edge mask: the network edge is open."""
MOST_STEPS = 2**31 - 1
"""Range of a kernel's indices."""


class Flow(str, enum.Enum):
    """A gradient flow. The value is its letter, as in the paper; anywhere a flow is taken, name and
    letter work too.
    """

    REGULAR = "R"
    """Plain backpropagation through time: both edges open."""
    MODIFIED = "M"
    """Only the physics carries feedback back in time: network edge closed."""
    NETWORK = "N"
    """Only the network carries feedback back in time: physics edge closed."""
    STOPPED = "S"
    """One step at a time: both edges closed."""
    COMBINED = "C"
    """Per component of every parameter: MODIFIED where its sign is that of REGULAR, else zero."""

    @classmethod
    def parse(cls, value: str | Flow) -> Flow:
        """Returns the flow that a name, a letter or a flow stands for.

        Raises:
            TypeError: `value` is no string.
            ValueError: `value` names no flow.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise TypeError(f"flow: got {value!r} of type {type(value).__name__}, expected {_EXPECTED}")
        for flow in cls:
            if value.upper() == flow.name or value.upper() == flow.value:
                return flow
        raise ValueError(f"flow: got {value!r}, expected {_EXPECTED}")

    @property
    def edges(self) -> int:
        """The edge mask of this flow; COMBINED has none of its own (it compares two)."""
        return _EDGES[self.value]


_EXPECTED = '"regular", "modified", "network", "stopped" or "combined", or a letter "R", "M", "N", "S", "C"'
_EDGES = {"R": PHYSICS | NETWORK, "M": PHYSICS, "N": NETWORK, "S": 0}


def network_open(letters: str) -> bool:
    """Whether any of these steps, one flow letter each, leaves its network edge open."""
    return any(Flow(letter).edges & NETWORK for letter in set(letters))


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

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

PHYSICS = 1
"""Bit of an edge mask: the physics edge is open."""
NETWORK = 2
"""Bit of an edge mask: the network edge is open."""


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

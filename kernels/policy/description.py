"""How a fused policy is written down: one line, its operations in order of evaluation, separated by `|`.

Value 0 is the state, and every operation makes the next value. With v, w numbers of values:

    10|linear 0 100 p0 p1|normalize 1 layer 1e-05|affine 2 p2 p3|elu 3 1.0|linear 4 1 p4 p5

    linear v units W b          W v + b; b may be `-`
    conv v units kernel stride channels W b
                                the same at every position of a value with its channels last: W, torch's
                                (units, channels, kernel), times `kernel` positions, then `stride` further
    spread v ..., turn v rows   components in another order and zeros, see places.py
    normalize v layer eps       (v - mean) / sqrt(var + eps) over the width; `rms`: v / sqrt(mean(v^2) + eps)
    affine v S o                S v + o, component by component; each may be `-`
    add v w                     v + w
    part v first count          components first ... first + count - 1
    join v w ...                values behind one another
    elu v 1.0, tanh v, ...      an activation with its numbers, see ACTIVATIONS

Tensors are `p3`, the policy's parameter number 3 from 0, or `c0`, a constant. Numbers stand as they are,
separated by commas where there is one a component.
"""

import functools
from typing import NamedTuple

from .places import gathered


class Activation(NamedTuple):
    """What is known of an activation besides its text in activations.h."""

    numbers: int
    """Numbers that it takes."""
    by_output: bool
    """Whether its derivative is read off its output y: then it may work in place."""
    slope: tuple[str, ...] = ()
    """(b, c) where that is 1 for positive y and b y + c for others; "p" is the activation's number."""


ACTIVATIONS = {
    "tanh": Activation(0, True),
    "relu": Activation(0, True, ("0", "0")),
    "leakyrelu": Activation(1, True, ("0", "p")),  # p of at least 0
    "elu": Activation(1, True, ("1", "p")),  # p above 0
    "sigmoid": Activation(0, True),
    "silu": Activation(0, False),
    "gelu": Activation(0, False),
    "gelutanh": Activation(0, False),
    "softplus": Activation(2, False),  # beta, threshold
    "sin": Activation(0, False),
    "cos": Activation(0, False),
    "clamp": Activation(2, False),  # lowest, highest
}
"""Activations by name; their order is that of the text."""
PRODUCTS = ("linear", "conv")
"""Operations that multiply by a matrix."""


class Operation(NamedTuple):
    """One operation of a description."""

    kind: str
    inputs: tuple[int, ...]
    arguments: tuple[str, ...]
    """What else stands in the description."""
    width: int
    """Of its output."""


@functools.cache
def parse(network: str) -> tuple[int, list[Operation]]:
    """State size and operations of a description."""
    first, *lines = network.split("|")
    widths = [int(first)]
    operations = []
    for line in lines:
        kind, *words = line.split(" ")
        count = {"add": 2, "join": len(words)}.get(kind, 1)
        inputs, arguments = tuple(int(w) for w in words[:count]), tuple(words[count:])
        width = widths[inputs[0]]
        if kind == "linear":
            width = int(arguments[0])
        elif kind == "conv":
            units, kernel, stride, channels = map(int, arguments[:4])
            width = units * ((width // channels - kernel) // stride + 1)
        elif kind in ("spread", "turn"):
            width = gathered(kind, arguments, width).size
        elif kind == "part":
            width = int(arguments[1])
        elif kind == "join":
            width = sum(widths[v] for v in inputs)
        operations.append(Operation(kind, inputs, arguments, width))
        widths.append(width)
    return widths[0], operations

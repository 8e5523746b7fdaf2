"""Where the components of a gathered value come from: what a convolution reads, and how it is handed on.

A value of a convolution is a table of positions and channels. torch has the channels first, component
c * L + i of C channels at L positions; a convolution here reads and writes them last, component i * C + c, so
that the window of a position is one piece:

    spread v channels before after mode order   v with so many positions before and behind it, channels last;
                                                order says where those of v are, `first` or `last`
    turn v rows                                 (rows, columns) as (columns, rows)

Backward, each component hands its cotangent to the one that it came from.
"""

import numpy as np

PADDINGS = ("zeros", "circular", "replicate", "reflect")
"""What stands at the positions around a value, by the names that torch gives it."""


def _positions(length: int, before: int, after: int, mode: str) -> np.ndarray:
    """Position from which each of (before + length + after,) comes, -1 for a zero."""
    at = np.arange(-before, length + after)
    inside = (at >= 0) & (at < length)
    if mode == "zeros":
        return np.where(inside, at, -1)
    if mode == "circular":
        return at % length
    if mode == "replicate":
        return at.clip(0, length - 1)
    assert mode == "reflect", mode
    at = np.abs(at)
    return np.where(at < length, at, 2 * (length - 1) - at)


def gathered(kind: str, arguments: tuple[str, ...], width: int) -> np.ndarray:
    """Components (n,) of a value of `width` from which `spread` or `turn` takes its own, -1 for a zero."""
    if kind == "turn":
        rows = int(arguments[0])
        return np.arange(width).reshape(rows, width // rows).T.ravel()
    channels, before, after = (int(word) for word in arguments[:3])
    mode, order = arguments[3:]
    length = width // channels
    own = np.arange(width)
    own = own.reshape(channels, length).T if order == "first" else own.reshape(length, channels)
    at = _positions(length, before, after, mode)
    return np.where(at[:, None] < 0, -1, own[at]).ravel()

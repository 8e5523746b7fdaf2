"""Where the parameters and activations of a fused policy lie in the flat arrays that the kernels read.

A policy is a line of operations, see description.py. table.py gives every value a section of a row of
activations, [x | ...], and of a row of cotangents; each is padded to whole vectors. The packed parameters are
the matrices (rows padded; read by the backward pass), biases, scales and shifts, and behind these the
transposed matrices (read by the forward pass) and numbers.
"""

import functools
from typing import NamedTuple

import numpy as np

from .table import ACTIVATION, AFFINE, LINEAR, NORMALIZE, Column, Places, pitch, slope_of

BLOCK = 4
"""Worlds that share each weight row while it is in registers; also the rows of a CPU register tile, or half
of them."""
TILE_ROWS = 8
"""Rows to which a matrix is padded: the tallest register tile of a weight product."""


class Layout(NamedTuple):
    """Where the parameters and activations of a policy lie in the flat arrays that the kernels read."""

    state_size: int
    control_size: int
    operations: int
    """Rows of the table."""
    row: int
    """Elements of a row of activations."""
    row_adj: int
    """Elements of a row of cotangents."""
    packed: int
    """Elements of the packed parameters."""
    grads: int
    """Elements at the front of the packed parameters that have a gradient slot: matrices, biases, scales and
    shifts.
    """
    table: np.ndarray
    """(operations, columns) int32, and behind these rows what operations gather; see `table.Column`."""
    pack: np.ndarray
    """(packed,) int64: index into `numbers` and the concatenated parameters behind them, 0 for padding."""
    unpack: np.ndarray
    """(parameters,) int32: where each component of the concatenated parameters lies in the packed ones."""
    numbers: np.ndarray
    """What stands before the concatenated parameters when they are packed; the first is 0, of padding."""

    def column(self, operation: int, column: int) -> int:
        """An entry of the table."""
        return int(self.table[operation, column])

    @property
    def linear(self) -> list[int]:
        """Operations that multiply by a matrix, in order."""
        return np.flatnonzero(self.table[: self.operations, Column.KIND] == LINEAR).tolist()

    @property
    def widest(self) -> int:
        """Elements of the widest section of cotangents, at least one vector."""
        rows = self.table[: self.operations]
        return int((rows[:, Column.POSITIONS] * rows[:, Column.PITCH_UNITS]).max())


class _Packing:
    """The packed parameters on their way: which components of a tensor lie at which places.

    A tensor is a word of the description: `p3`, a parameter, `c0`, a constant, or numbers as they are.
    """

    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize
        self.size = 0
        self.parts: list[tuple[str, np.ndarray]] = []

    def matrix(self, word: str, places: np.ndarray, elements: int) -> int:
        """Takes so many elements for a tensor whose components lie at `places`; returns the first."""
        self.parts.append((word, self.size + places.ravel()))
        self.size += elements
        return self.size - elements

    def vector(self, word: str, width: int) -> int:
        """Takes room for a vector, which may be missing (`-`)."""
        return self.matrix(word, np.arange(width), pitch(width, self.itemsize))

    def numbers(self, words: tuple[str, ...]) -> int:
        """Takes room for two numbers."""
        self.parts += [(word, np.array([self.size + k])) for k, word in enumerate(words)]
        self.size += pitch(2, self.itemsize)
        return self.size - pitch(2, self.itemsize)

    def indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`pack`, `unpack` and `numbers` of the layout; a tensor's first part is where its gradient lies."""
        numbers, first = [0.0], {}
        sizes = {word: places.size for word, places in self.parts if word[0] in "pc"}
        for word, _ in self.parts:
            if word[0] not in "pc" and word != "-" and word not in first:
                first[word] = len(numbers)
                numbers += [float(number) for number in word.split(",")]
        at = len(numbers)
        for word in sorted(sizes, key=lambda w: (w[0] == "c", int(w[1:]))):
            first[word] = at
            at += sizes[word]
        pack = np.zeros(self.size, dtype=np.int64)
        found: dict[str, np.ndarray] = {}
        for word, places in self.parts:
            if word == "-":
                continue
            count = sizes.get(word, word.count(",") + 1)
            pack[places] = first[word] + np.arange(places.size) % count
            if word[0] == "p":
                found.setdefault(word, places)
        unpack = [found[word] for word in sorted(found, key=lambda w: int(w[1:]))]
        return pack, np.concatenate(unpack).astype(np.int32), np.array(numbers)


@functools.cache
def layout(network: str, itemsize: int) -> Layout:
    """Lays out a policy, by its description (description.py), for elements of `itemsize` bytes."""
    c = Column
    places = Places(network, itemsize)
    table = places.table()
    packing = _Packing(itemsize)
    for n, (i, row) in enumerate(places.rows):
        words = places.operations[i].arguments
        if row[c.KIND] == LINEAR:
            units, window = row[c.UNITS], places.window(i)
            # rows padded to a whole register tile, so that the products may write one
            at = np.arange(units)[:, None] * table[n, c.PITCH_WINDOW] + window
            tall = -(-units // TILE_ROWS) * TILE_ROWS
            table[n, c.BACKWARD] = packing.matrix(words[-2], at, tall * int(table[n, c.PITCH_WINDOW]))
            table[n, c.BIAS] = packing.vector(words[-1], units)
        elif row[c.KIND] == AFFINE:
            for bit, word, column in zip((1, 2), words, (c.BACKWARD, c.BIAS)):
                if row[c.TRAINED] & bit:
                    table[n, column] = packing.vector(word, row[c.UNITS])
    grads = packing.size
    for n, (i, row) in enumerate(places.rows):
        words = places.operations[i].arguments
        if row[c.KIND] == LINEAR:
            pitch_units = int(table[n, c.PITCH_UNITS])
            at = np.arange(row[c.UNITS])[:, None] + places.window(i) * pitch_units
            table[n, c.FORWARD] = packing.matrix(words[-2], at, row[c.WINDOW] * pitch_units)
            table[n, c.SECOND], words = slope_of(places, n)
            table[n, c.NUMBERS] = packing.numbers(words)
        elif row[c.KIND] == AFFINE:
            for bit, word, column, missing in zip((1, 2), words, (c.BACKWARD, c.BIAS), ("1.0", "0.0")):
                if not row[c.TRAINED] & bit:
                    table[n, column] = packing.vector(missing if word == "-" else word, row[c.UNITS])
        elif row[c.KIND] >= ACTIVATION or row[c.KIND] == NORMALIZE:
            table[n, c.NUMBERS] = packing.numbers(words[1:] if row[c.KIND] == NORMALIZE else words)
    pack, unpack, numbers = packing.indices()
    return Layout(
        places.values[0].width,
        places.values[-1].width,
        len(places.rows),
        places.row,
        places.row_adj,
        packing.size,
        grads,
        places.with_gathered(table),
        pack,
        unpack,
        numbers,
    )

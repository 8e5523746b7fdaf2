"""Where the parameters and activations of a composed policy lie: any chain of the operations that
composed_description.py names.

Values are sections of a row of activations, [x | ...], cotangents are sections of a row of cotangents. An
operation works in place where nobody else reads its input, forwards and backwards. What the native text of
composed.h reads is a table with a row for each operation, see `Entry`; joining and taking parts apart become
copies there.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from .composed_description import ACTIVATIONS, Operation, parse
from .composed_places import gathered
from .layout import TILE_ROWS, Column, Layout, pitch

TABLE_COLUMNS = 28
"""Columns of a composed policy's table, see `Entry`."""


class Entry(Column):
    """Columns of the table of a composed policy; those of `Column` mean the same, a `units` or a `window` is
    the width of an operation that is not linear. A linear operation at several positions writes its units
    behind one another without a gap.
    """

    KIND = 11  # CLEAR ... COPY, or ACTIVATION + the place of an activation in ACTIVATIONS
    OUTPUT = 12  # column of the output in a row
    # of the second summand; of the factor that a normalisation has found; where the components of a gathered
    # value come from, behind the rows of the table; what slope a linear operation takes along, see _slope
    SECOND = 13
    ADJ_INPUT = 14  # the same in a row of cotangents
    ADJ_OUTPUT = 15
    ADJ_SECOND = 16
    ADDS = 17  # 1: the cotangent of the input is added to what stands there, 2: that of the second summand
    NUMBERS = 18  # offset of the operation's numbers in the packed parameters
    FILL = (
        19  # elements behind an output that are padding, to be zero, where it is copied, gathered or linear
    )
    ADJ_FILL = 20  # the same behind the cotangent of its input
    TRAINED = 21  # an affine operation's scale (1) and shift (2) have gradients
    INNER = 22  # whether the input depends on parameters: without Jacobians, others need no cotangents
    CENTERED = 23  # whether a normalisation subtracts the mean
    # of the whole policy, in the first row
    RESULT = 24  # column of the controls in a row
    ADJ_RESULT = 25  # the same in a row of cotangents
    ADJ_STATE = 26  # column of the state's cotangent
    CONTROLS = 27


CLEAR, LINEAR, NORMALIZE, AFFINE, ADD, COPY, GATHER, ACTIVATION = 0, 1, 2, 3, 4, 5, 6, 16
"""Kinds of operations in the table."""
_PRODUCTS = ("linear", "conv")
_APART = ("part", "conv", "spread", "turn")
"""Operations that read some of their input, or some of it several times: their cotangents are added up."""


class _Tensor(NamedTuple):
    """A tensor of the policy, or numbers, as one of an operation's vectors or its matrix."""

    word: str
    size: int

    @property
    def trained(self) -> bool:
        return self.word.startswith("p")


@dataclasses.dataclass
class _Value:
    """A value on its way to its places."""

    width: int
    consumers: list[int]
    """Operations that read it, one of them twice if it does so twice."""
    column: int = -1
    adjoint: int = -1
    inner: bool = False
    """Whether it depends on parameters."""


class _Composer:
    """Gives every value, number and parameter its place."""

    def __init__(self, network: str, itemsize: int) -> None:
        self.itemsize = itemsize
        state_size, self.operations = parse(network)
        self.values = [_Value(state_size, [])]
        self.values += [_Value(op.width, []) for op in self.operations]
        for i, op in enumerate(self.operations):
            for v in op.inputs:
                self.values[v].consumers.append(i)
        self.row = self.row_adj = 0
        # a convolution adds whole vectors to cotangents, at any column: the last may reach beyond a section
        self.beyond = pitch(1, itemsize) if any(op.kind == "conv" for op in self.operations) else 0

    def section(self, width: int) -> int:
        """Takes a section of a row."""
        self.row += pitch(width, self.itemsize)
        return self.row - pitch(width, self.itemsize)

    def trained(self, op: Operation) -> int:
        """Which of an affine operation's vectors have gradients: 1 the scale, 2 the shift."""
        if op.kind != "affine":
            return 0
        scale, shift = (word.startswith("p") for word in op.arguments)
        return scale + 2 * shift

    def by_output(self, op: Operation) -> bool:
        """Whether an operation's backward pass reads its output."""
        return op.kind == "normalize" or (op.kind in ACTIVATIONS and ACTIVATIONS[op.kind].by_output)

    def alone(self, i: int) -> bool:
        """Whether operation i is the only reader of its first input, which no other reads either."""
        op = self.operations[i]
        v = self.values[op.inputs[0]]
        return (
            op.inputs[0] > 0
            and len(v.consumers) == 1
            and op.kind in ("normalize", "affine", "add", *ACTIVATIONS)
        )

    def place_values(self) -> None:
        """Columns of the values, in place where that loses nothing that the backward pass needs."""
        self.values[0].column = self.section(self.values[0].width)
        for i, op in enumerate(self.operations):
            source, target = self.values[op.inputs[0]], self.values[i + 1]
            target.inner = op.kind in _PRODUCTS or self.trained(op) > 0
            target.inner |= any(self.values[v].inner for v in op.inputs)
            reads_input = self.trained(op) & 1 or (
                op.kind in ACTIVATIONS and not ACTIVATIONS[op.kind].by_output
            )
            free = self.alone(i) and not reads_input
            if free and not self.by_output(self.operations[op.inputs[0] - 1]):
                target.column = source.column
            else:
                target.column = self.section(op.width)

    def place_adjoints(self) -> None:
        """The same of their cotangents; what weight products read stays."""
        for i in reversed(range(len(self.operations))):
            target = self.values[i + 1]
            if target.adjoint < 0:
                target.adjoint = self.adjoint_section(target.width)
            op = self.operations[i]
            if self.alone(i) and not self.trained(op):
                self.values[op.inputs[0]].adjoint = target.adjoint
        self.values[0].adjoint = self.adjoint_section(self.values[0].width)

    def adjoint_section(self, width: int) -> int:
        """Takes a section of a row of cotangents."""
        first = self.row_adj
        self.row_adj += pitch(width, self.itemsize) + self.beyond
        return first


def _copies(c: _Composer, i: int, op: Operation) -> list[dict[int, int]]:
    """Rows of the table that join values or take a part of one."""
    e = Entry
    target = c.values[i + 1]
    end = pitch(op.width, c.itemsize) - op.width
    if op.kind == "part":
        first, count = (int(word) for word in op.arguments)
        source = c.values[op.inputs[0]]
        return [
            {
                e.INPUT: source.column + first,
                e.OUTPUT: target.column,
                e.UNITS: count,
                e.FILL: end,
                e.ADJ_INPUT: source.adjoint + first,
                e.ADJ_OUTPUT: target.adjoint,
                e.ADDS: 1,
            }
        ]
    rows, at = [], 0
    for n, v in enumerate(op.inputs):
        source = c.values[v]
        rows.append(
            {
                e.INPUT: source.column,
                e.OUTPUT: target.column + at,
                e.UNITS: source.width,
                e.FILL: end if n == len(op.inputs) - 1 else 0,
                e.ADJ_INPUT: source.adjoint,
                e.ADJ_OUTPUT: target.adjoint + at,
                e.ADJ_FILL: pitch(source.width, c.itemsize) - source.width,
            }
        )
        at += source.width
    return rows


def _entries(c: _Composer) -> list[tuple[int, dict[int, int]]]:
    """The rows of the table, each with its operation: those of the forward pass in order, which the backward
    pass takes from the last to the first; places of parameters are still missing.
    """
    e = Entry
    rows: list[tuple[int, dict[int, int]]] = []
    for i, op in enumerate(c.operations):
        sources, target = [c.values[v] for v in op.inputs], c.values[i + 1]
        common = {
            e.INPUT: sources[0].column,
            e.OUTPUT: target.column,
            e.UNITS: op.width,
            e.ADJ_INPUT: sources[0].adjoint,
            e.ADJ_OUTPUT: target.adjoint,
        }
        if op.kind in ("part", "join"):
            own = [common | copy | {e.KIND: COPY} for copy in _copies(c, i, op)]
        elif op.kind == "linear":
            own = [common | {e.KIND: LINEAR, e.WINDOW: sources[0].width}]
        elif op.kind == "conv":
            units, kernel, stride, channels = map(int, op.arguments[:4])
            found = {e.UNITS: units, e.POSITIONS: op.width // units, e.ADDS: 1}
            found |= {e.WINDOW: kernel * channels, e.HOP: stride * channels}
            own = [common | found | {e.KIND: LINEAR}]
        elif op.kind in ("spread", "turn"):
            own = [common | {e.KIND: GATHER, e.ADDS: 1}]
        elif op.kind == "normalize":
            found = {e.KIND: NORMALIZE, e.SECOND: c.section(1), e.CENTERED: int(op.arguments[0] == "layer")}
            own = [common | found]
        elif op.kind == "affine":
            own = [common | {e.KIND: AFFINE, e.TRAINED: c.trained(op)}]
        elif op.kind == "add":
            second = {e.SECOND: sources[1].column, e.ADJ_SECOND: sources[1].adjoint}
            own = [common | {e.KIND: ADD, **second}]
        else:
            own = [common | {e.KIND: ACTIVATION + list(ACTIVATIONS).index(op.kind)}]
        inner = int(any(s.inner for s in sources))
        rows += [(i, row | {e.INNER: inner}) for row in own]
    return rows


def _order_sums(c: _Composer, rows: list[tuple[int, dict[int, int]]]) -> list[tuple[int, dict[int, int]]]:
    """Says which cotangents are written and which are added, and clears those of values that are taken
    apart before the first is added.
    """
    e = Entry
    written: set[int] = set()
    out: list[tuple[int, dict[int, int]]] = []
    taken_apart = {op.inputs[0] for op in c.operations if op.kind in _APART}
    piece = {}  # which input of a joining operation a row is
    counts: dict[int, int] = {}
    for n, (i, _) in enumerate(rows):
        piece[n] = counts.get(i, 0)
        counts[i] = piece[n] + 1
    for n in reversed(range(len(rows))):
        i, row = rows[n]
        op = c.operations[i]
        v = op.inputs[piece[n]] if op.kind == "join" else op.inputs[0]
        clears = []
        for which, value in enumerate((v, *op.inputs[1:]) if op.kind == "add" else (v,)):
            own = c.values[value]
            if value in taken_apart and value not in written:
                written.add(value)
                clear = {
                    e.KIND: CLEAR,
                    e.UNITS: own.width,
                    e.ADJ_OUTPUT: own.adjoint,
                    e.INNER: int(own.inner),
                }
                clears.append((i, clear))
            same = own.adjoint == c.values[i + 1].adjoint
            if value in written and not same and op.kind not in _APART:
                row[e.ADDS] = row.get(e.ADDS, 0) + (2 if which else 1)
            written.add(value)
        # the backward pass meets the clearing first
        out = [(i, row), *clears, *out]
    return out


def _slope(c: _Composer, rows: list[tuple[int, dict[int, int]]], n: int) -> tuple[int, tuple[str, ...]]:
    """Whether a linear operation takes an activation along in the backward pass, whose slope multiplies what
    it stores: 1 that of tanh, 2 one with numbers, which are returned too.

    It must be the only reader of the activation, which stands in front of it and works in place.
    """
    (i, row), (before, last) = rows[n], rows[n - 1]
    op, read = c.operations[i], c.operations[before]
    known = ACTIVATIONS.get(read.kind)
    if n == 0 or op.kind != "linear" or row.get(Entry.ADDS) or known is None or op.inputs[0] != before + 1:
        return 0, ()
    if len(c.values[before + 1].consumers) > 1 or last[Entry.ADJ_INPUT] != last[Entry.ADJ_OUTPUT]:
        return 0, ()
    if last[Entry.KIND] == CLEAR or not (known.slope or read.kind == "tanh"):
        return 0, ()
    return (2 if known.slope else 1), tuple(read.arguments[0] if w == "p" else w for w in known.slope)


def _window(op: Operation, window: int) -> np.ndarray:
    """Element of the window (window,) that each weight of a unit acts on, in the order of torch's tensor."""
    if op.kind == "linear":
        return np.arange(window)
    kernel, channels = int(op.arguments[1]), int(op.arguments[3])
    return np.arange(window).reshape(kernel, channels).T.ravel()


def _with_places(c: _Composer, rows: list[tuple[int, dict[int, int]]], table: np.ndarray) -> np.ndarray:
    """The table, and behind its rows the places of what is gathered; its entries say where."""
    behind: list[np.ndarray] = []
    at = table.size
    for n, (i, row) in enumerate(rows):
        if row[Entry.KIND] == GATHER:
            op = c.operations[i]
            behind.append(gathered(op.kind, op.arguments, c.values[op.inputs[0]].width))
            table[n, Entry.SECOND] = at
            at += behind[-1].size
    if not behind:
        return table
    flat = np.concatenate([table.ravel(), *behind]).astype(np.int32)
    return np.pad(flat, (0, -flat.size % TABLE_COLUMNS)).reshape(-1, TABLE_COLUMNS)


@functools.cache
def composed_layout(network: str, itemsize: int) -> Layout:
    """Lays out a composed policy for elements of `itemsize` bytes; see `layout.layout`."""
    e = Entry
    c = _Composer(network, itemsize)
    c.place_values()
    c.place_adjoints()
    rows = _order_sums(c, _entries(c))
    numbers: list[float] = [0.0, 1.0]
    table = np.zeros((len(rows), TABLE_COLUMNS), dtype=np.int32)
    for n, (_, row) in enumerate(rows):
        for column, value in row.items():
            table[n, column] = value
        table[n, e.POSITIONS] = row.get(e.POSITIONS, 1)
        table[n, e.PITCH_UNITS] = pitch(row[e.UNITS], itemsize)
        if row[e.KIND] == LINEAR:
            table[n, e.PITCH_WINDOW] = pitch(row[e.WINDOW], itemsize)
        if row[e.KIND] in (LINEAR, GATHER):
            width = row[e.UNITS] * table[n, e.POSITIONS]
            table[n, e.FILL] = pitch(width, itemsize) - width
        if row[e.KIND] == COPY and row.get(e.ADDS):
            table[n, e.ADJ_FILL] = 0
    table[0, e.SECTION] = pitch(c.values[0].width, itemsize)
    table[0, e.RESULT], table[0, e.CONTROLS] = c.values[-1].column, c.values[-1].width
    table[0, e.ADJ_RESULT], table[0, e.ADJ_STATE] = c.values[-1].adjoint, c.values[0].adjoint

    # vectors and matrices of the packed parameters: (offset, indices into their tensor, tensor)
    trained: list[tuple[int, np.ndarray, _Tensor]] = []
    fixed: list[tuple[int, np.ndarray, _Tensor]] = []
    size = 0

    def room(elements: int) -> int:
        nonlocal size
        size += pitch(elements, itemsize)
        return size - pitch(elements, itemsize)

    def vector(word: str, width: int, n: int, column: int) -> None:
        table[n, column] = room(width)
        tensor = _Tensor(word, width)
        (trained if tensor.trained else fixed).append((int(table[n, column]), np.arange(width), tensor))

    def numbers_of(words: tuple[str, ...], n: int) -> None:
        table[n, e.NUMBERS] = room(2)
        for k, word in enumerate(words):
            fixed.append((int(table[n, e.NUMBERS]) + k, np.arange(1), _Tensor(word, 1)))

    for n, (i, row) in enumerate(rows):
        arguments = c.operations[i].arguments
        if row[e.KIND] == LINEAR:
            units, window, pitch_window = (int(table[n, k]) for k in (e.UNITS, e.WINDOW, e.PITCH_WINDOW))
            # rows padded to a whole register tile, so that the products may write one
            table[n, e.BACKWARD] = size
            size += -(-units // TILE_ROWS) * TILE_ROWS * pitch_window
            at = np.arange(units)[:, None] * pitch_window + _window(c.operations[i], window)
            weight = _Tensor(arguments[-2], units * window)
            trained.append((int(table[n, e.BACKWARD]), at.ravel(), weight))
            vector(arguments[-1], units, n, e.BIAS)
        elif row[e.KIND] == AFFINE:
            for bit, word, column in zip((1, 2), arguments, (e.BACKWARD, e.BIAS)):
                if row[e.TRAINED] & bit:
                    vector(word, row[e.UNITS], n, column)
    grads = size
    for n, (i, row) in enumerate(rows):
        op = c.operations[i]
        if row[e.KIND] == LINEAR:
            units, window, pitch_units = (int(table[n, k]) for k in (e.UNITS, e.WINDOW, e.PITCH_UNITS))
            table[n, e.FORWARD] = size
            size += window * pitch_units
            at = np.arange(units)[:, None] + _window(op, window) * pitch_units
            weight = _Tensor(op.arguments[-2], units * window)
            fixed.append((int(table[n, e.FORWARD]), at.ravel(), weight))
            table[n, e.SECOND], words = _slope(c, rows, n)
            numbers_of(words, n)
        elif row[e.KIND] == AFFINE:
            for bit, word, column in zip((1, 2), op.arguments, (e.BACKWARD, e.BIAS)):
                if not row[e.TRAINED] & bit:
                    missing = "1.0" if bit == 1 else "0.0"
                    vector(missing if word == "-" else word, row[e.UNITS], n, column)
        elif row[e.KIND] >= ACTIVATION or row[e.KIND] == NORMALIZE:
            words = op.arguments[1:] if row[e.KIND] == NORMALIZE else op.arguments
            numbers_of(words, n)

    # the flat tensor that is packed: numbers, parameters, constants
    tensors = {t.word: t.size for _, _, t in [*trained, *fixed] if t.word[0] in "pc"}
    sources: dict[str, int] = {}
    for _, _, tensor in fixed:
        if tensor.word[0] not in "pc-" or len(tensor.word) > 1 and tensor.word[0] == "-":
            numbers += [float(word) for word in tensor.word.split(",")]
    at = len(numbers)
    for kind in "pc":
        for word in sorted((w for w in tensors if w[0] == kind), key=lambda w: int(w[1:])):
            sources[word] = at
            at += tensors[word]
    pack = np.zeros(size, dtype=np.int64)
    unpack: dict[str, np.ndarray] = {}
    number = 2
    for offset, places, tensor in trained:
        pack[offset + places] = sources[tensor.word] + np.arange(tensor.size)
        unpack[tensor.word] = offset + places
    for offset, places, tensor in fixed:
        if tensor.word == "-":
            continue
        if tensor.word[0] in "pc":
            pack[offset + places] = sources[tensor.word] + np.arange(tensor.size)
            continue
        count = tensor.word.count(",") + 1
        pack[offset + places] = number + np.arange(tensor.size) % count
        number += count
    order = sorted(unpack, key=lambda w: int(w[1:]))
    return Layout(
        c.values[0].width,
        c.values[-1].width,
        len(rows),
        c.row,
        c.row_adj,
        size,
        grads,
        _with_places(c, rows, table),
        pack,
        np.concatenate([unpack[word] for word in order]).astype(np.int32),
        np.array(numbers),
    )

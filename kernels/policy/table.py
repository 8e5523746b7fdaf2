"""The table of a fused policy's operations, which the kernels read: what each does, and where it finds its
input and its output.

Values are sections of a row of activations, [x | ...], cotangents are sections of a row of cotangents. An
operation works in place where nobody else reads its input, forwards and backwards. Joining and taking parts
apart become copies.

A linear operation is applied at one or more positions. At position i it reads the `window` elements of its
input that start at i * hop, and writes its units i * step behind the first. One position is a fully connected
layer, several are a convolution with channels last.
"""

import dataclasses

import numpy as np

from .description import ACTIVATIONS, PRODUCTS, Operation, parse
from .places import gathered

PAD = 64
"""Bytes to which a section of a row is padded: one AVX-512 vector. Padding is finite, and the weights that
meet it are zero."""
ALIASED = 1024
"""Rows do not lie so many bytes apart, or a multiple: a processor takes a load for one of what it has just
stored to another row of the tile, where their addresses differ by 4 KiB."""
TABLE_COLUMNS = 29


class Column:
    """Columns of the table. A `units` is the width of an operation that is not linear."""

    WINDOW = 0  # elements of the input that a linear operation reads at one position
    UNITS = 1  # units at one position
    PITCH_WINDOW = 2  # window, padded
    PITCH_UNITS = 3  # units, padded
    FORWARD = 4  # offset of the transposed matrix (window, pitch_units) in the packed parameters
    BIAS = 5  # offset of the bias (pitch_units,)
    BACKWARD = 6  # offset of the matrix (units, pitch_window)
    INPUT = 7  # column of the input in a row
    POSITIONS = 8
    HOP = 9  # elements between the windows of two positions
    SECTION = 10  # in the first row: elements of the state's section
    KIND = 11  # CLEAR ... COPY, or ACTIVATION + the place of an activation in ACTIVATIONS
    OUTPUT = 12  # column of the output in a row
    # of the second summand; of the factor that a normalisation has found; where the components of a gathered
    # value come from, behind the rows of the table; what slope a linear operation takes along, see slope_of
    SECOND = 13
    ADJ_INPUT = 14  # the same in a row of cotangents
    ADJ_OUTPUT = 15
    ADJ_SECOND = 16
    ADDS = 17  # 1: the cotangent of the input is added to what stands there, 2: that of the second summand
    NUMBERS = 18  # offset of the operation's numbers in the packed parameters
    FILL = 19  # elements of padding behind an output, to be zero, where it is copied, gathered or linear
    ADJ_FILL = 20  # the same behind the cotangent of its input
    TRAINED = 21  # an affine operation's scale (1) and shift (2) have gradients
    INNER = 22  # whether the input depends on parameters: without Jacobians, others need no cotangents
    CENTERED = 23  # whether a normalisation subtracts the mean
    STEP = 24  # elements between what a linear operation writes at two positions, see _Value
    # of the whole policy, in the first row
    RESULT = 25  # column of the controls in a row
    ADJ_RESULT = 26  # the same in a row of cotangents
    ADJ_STATE = 27  # column of the state's cotangent
    CONTROLS = 28


CLEAR, LINEAR, NORMALIZE, AFFINE, ADD, COPY, GATHER, ACTIVATION = 0, 1, 2, 3, 4, 5, 6, 16
"""Kinds of operations in the table."""
MOST_GAPS = 1.25
"""Positions are set apart, see Places.set_apart, if a value becomes at most so many times as long."""
_APART = ("part", "conv", "spread", "turn")
"""Operations that read some of their input, or some of it several times: their cotangents are added up."""


def pitch(n: int, itemsize: int) -> int:
    """Elements of a section that holds n."""
    lanes = PAD // itemsize
    return (n + lanes - 1) // lanes * lanes


@dataclasses.dataclass
class _Value:
    """A value on its way to its places: `length` components at every position, `step` elements apart."""

    width: int
    consumers: list[int]
    """Operations that read it, one of them twice if it does so twice."""
    length: int
    step: int
    column: int = -1
    adjoint: int = -1
    inner: bool = False
    """Whether it depends on parameters."""

    @property
    def extent(self) -> int:
        """Elements from its first component to its last, and the gap behind that."""
        return self.width // self.length * self.step

    def step_of(self, channels: int) -> int:
        """Elements from one position of so many channels to the next."""
        return self.step if self.length == channels else channels

    def places(self, components: np.ndarray) -> np.ndarray:
        """Elements at which these components lie, -1 for none."""
        found = components // self.length * self.step + components % self.length
        return np.where(components < 0, -1, found)


class Places:
    """Gives every value and its cotangent a place in the rows, and every operation its rows of the table."""

    def __init__(self, network: str, itemsize: int) -> None:
        self.itemsize = itemsize
        state_size, self.operations = parse(network)
        widths = [state_size, *(op.width for op in self.operations)]
        self.values = [_Value(width, [], width, width) for width in widths]
        for i, op in enumerate(self.operations):
            for v in op.inputs:
                self.values[v].consumers.append(i)
        self.set_apart()
        # a convolution adds whole vectors to cotangents, at any column: the last may reach beyond a section
        self.beyond = pitch(1, itemsize) if any(op.kind == "conv" for op in self.operations) else 0
        self.state_section = pitch(state_size, itemsize)
        self.place()
        if self.aliased(self.row):
            self.state_section += pitch(1, itemsize)
            self.place()
        self.row_adj += pitch(1, itemsize) * self.aliased(self.row_adj)

    def place(self) -> None:
        """Places everything."""
        self.row = self.row_adj = 0
        """Elements of a row."""
        self.place_values()
        self.place_adjoints()
        self.rows = _order_sums(self, _entries(self))
        """The rows of the table, each with its operation: those of the forward pass in order, which the
        backward pass takes from the last to the first; places of parameters are still missing."""

    def aliased(self, row: int) -> bool:
        """Whether rows of so many elements are a multiple of ALIASED bytes apart."""
        return row * self.itemsize % ALIASED == 0

    def set_apart(self) -> None:
        """Lets every position of a convolution begin at a whole vector, where the gaps are few and all that
        read it can read it so.
        """
        for i, op in enumerate(self.operations):
            own, read = self.values[i + 1], self.values[op.inputs[0]]
            if op.kind == "conv":
                units = int(op.arguments[0])
                step = pitch(units, self.itemsize)
                if step <= MOST_GAPS * units and self.bears_gaps(i + 1, units):
                    own.length, own.step = units, step
            elif op.kind in ACTIVATIONS and read.extent > read.width:
                own.length, own.step = read.length, read.step

    def bears_gaps(self, v: int, channels: int) -> bool:
        """Whether all that read a value can read it with gaps behind so many channels."""
        return bool(self.values[v].consumers) and all(
            self.bears_gaps(i + 1, channels)
            if self.operations[i].kind in ACTIVATIONS
            else self.operations[i].kind in ("linear", "spread", "turn")
            or (self.operations[i].kind == "conv" and int(self.operations[i].arguments[3]) == channels)
            for i in self.values[v].consumers
        )

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
        self.values[0].column = self.section(self.state_section)
        for i, op in enumerate(self.operations):
            source, target = self.values[op.inputs[0]], self.values[i + 1]
            target.inner = op.kind in PRODUCTS or self.trained(op) > 0
            target.inner |= any(self.values[v].inner for v in op.inputs)
            reads_input = self.trained(op) & 1 or (
                op.kind in ACTIVATIONS and not ACTIVATIONS[op.kind].by_output
            )
            free = self.alone(i) and not reads_input
            if free and not self.by_output(self.operations[op.inputs[0] - 1]):
                target.column = source.column
            else:
                target.column = self.section(target.extent)

    def place_adjoints(self) -> None:
        """The same of their cotangents; what weight products read stays."""
        for value in self.values:
            value.adjoint = -1
        for i in reversed(range(len(self.operations))):
            target = self.values[i + 1]
            if target.adjoint < 0:
                target.adjoint = self.adjoint_section(target.extent)
            op = self.operations[i]
            if self.alone(i) and not self.trained(op):
                self.values[op.inputs[0]].adjoint = target.adjoint
        self.values[0].adjoint = self.adjoint_section(self.values[0].extent)

    def adjoint_section(self, width: int) -> int:
        """Takes a section of a row of cotangents."""
        first = self.row_adj
        self.row_adj += pitch(width, self.itemsize) + self.beyond
        return first

    def window(self, i: int) -> np.ndarray:
        """Element of the window that each weight of a unit acts on, in the order of torch's tensor."""
        op, read = self.operations[i], self.values[self.operations[i].inputs[0]]
        if op.kind == "linear":
            return read.places(np.arange(read.width))
        kernel, channels = int(op.arguments[1]), int(op.arguments[3])
        return (np.arange(channels)[:, None] + np.arange(kernel) * read.step_of(channels)).ravel()

    def table(self) -> np.ndarray:
        """The table (operations, TABLE_COLUMNS) without the places of parameters and of what is gathered."""
        e, itemsize, first, last = Column, self.itemsize, self.values[0], self.values[-1]
        table = np.zeros((len(self.rows), TABLE_COLUMNS), dtype=np.int32)
        for n, (_, row) in enumerate(self.rows):
            for column, value in row.items():
                table[n, column] = value
            table[n, e.POSITIONS] = row.get(e.POSITIONS, 1)
            table[n, e.PITCH_UNITS] = pitch(row[e.UNITS], itemsize)
            if row[e.KIND] == LINEAR:
                table[n, e.PITCH_WINDOW] = pitch(row[e.WINDOW], itemsize)
            if row[e.KIND] in (LINEAR, GATHER):
                width = row.get(e.STEP, row[e.UNITS]) * table[n, e.POSITIONS]
                table[n, e.FILL] = pitch(width, itemsize) - width
            if row[e.KIND] == COPY and row.get(e.ADDS):
                table[n, e.ADJ_FILL] = 0
        table[0, e.SECTION] = self.state_section
        table[0, e.RESULT], table[0, e.CONTROLS] = last.column, last.width
        table[0, e.ADJ_RESULT], table[0, e.ADJ_STATE] = last.adjoint, first.adjoint
        return table

    def with_gathered(self, table: np.ndarray) -> np.ndarray:
        """The table, and behind its rows the places of what is gathered; its entries say where."""
        behind = [table.ravel()]
        for n, (i, row) in enumerate(self.rows):
            if row[Column.KIND] == GATHER:
                op, source = self.operations[i], self.values[self.operations[i].inputs[0]]
                table[n, Column.SECOND] = sum(part.size for part in behind)
                behind.append(source.places(gathered(op.kind, op.arguments, source.width)))
        flat = np.concatenate(behind).astype(np.int32)
        return np.pad(flat, (0, -flat.size % TABLE_COLUMNS)).reshape(-1, TABLE_COLUMNS)


def _copies(c: Places, i: int, op: Operation) -> list[dict[int, int]]:
    """Rows of the table that join values or take a part of one."""
    e = Column
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


def _entries(c: Places) -> list[tuple[int, dict[int, int]]]:
    """The rows of the table in the order of the forward pass."""
    e = Column
    rows: list[tuple[int, dict[int, int]]] = []
    for i, op in enumerate(c.operations):
        sources, target = [c.values[v] for v in op.inputs], c.values[i + 1]
        common = {
            e.INPUT: sources[0].column,
            e.OUTPUT: target.column,
            e.UNITS: target.extent,
            e.ADJ_INPUT: sources[0].adjoint,
            e.ADJ_OUTPUT: target.adjoint,
        }
        if op.kind in ("part", "join"):
            own = [common | copy | {e.KIND: COPY} for copy in _copies(c, i, op)]
        elif op.kind == "linear":
            own = [common | {e.KIND: LINEAR, e.WINDOW: sources[0].extent, e.STEP: op.width}]
        elif op.kind == "conv":
            units, kernel, stride, channels = map(int, op.arguments[:4])
            found = {e.UNITS: units, e.POSITIONS: op.width // units, e.ADDS: 1}
            step = sources[0].step_of(channels)
            found |= {e.WINDOW: kernel * step, e.HOP: stride * step, e.STEP: target.step_of(units)}
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


def _order_sums(c: Places, rows: list[tuple[int, dict[int, int]]]) -> list[tuple[int, dict[int, int]]]:
    """Says which cotangents are written and which are added, and clears those of values that are taken
    apart before the first is added.
    """
    e = Column
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
                    e.UNITS: own.extent,
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


def slope_of(c: Places, n: int) -> tuple[int, tuple[str, ...]]:
    """Whether the linear operation of row n takes an activation along in the backward pass, whose slope
    multiplies what it stores: 1 that of tanh, 2 one with numbers, which are returned too.

    It must be the only reader of the activation, which stands in front of it and works in place.
    """
    (i, row), (before, last) = c.rows[n], c.rows[n - 1]
    op, read = c.operations[i], c.operations[before]
    known = ACTIVATIONS.get(read.kind)
    if n == 0 or op.kind != "linear" or row.get(Column.ADDS) or known is None or op.inputs[0] != before + 1:
        return 0, ()
    if len(c.values[before + 1].consumers) > 1 or last[Column.ADJ_INPUT] != last[Column.ADJ_OUTPUT]:
        return 0, ()
    if last[Column.KIND] == CLEAR or not (known.slope or read.kind == "tanh"):
        return 0, ()
    return (2 if known.slope else 1), tuple(read.arguments[0] if w == "p" else w for w in known.slope)

"""Where the parameters and activations of a fused policy lie in the flat arrays that the kernels read.

A policy is a stack of layers. A layer is applied at one or more positions: at position i it reads the
`window` elements of its input that start at i * hop and writes its units behind one another. One position is
a fully connected layer, several are a convolution with channels last.

Rows of activations are `[x | a_1 | ... | a_L]`, each section padded to PAD bytes so that every vector load is
whole; padded entries are zero, because the padded weights are.
"""

import functools
from typing import NamedTuple

import numpy as np

BLOCK = 4
"""Worlds that share each weight row while it is in registers; also the rows of a CPU register tile, or half
of them."""
TILE_ROWS = 8
"""Rows to which a matrix is padded: the tallest register tile of a weight product."""
PAD = 64
"""Bytes to which a section of a row is padded: one AVX-512 vector."""
TABLE_COLUMNS = 12
"""Columns of the layer table, see `Column`."""


class Column:
    """Columns of the layer table."""

    WINDOW = 0  # elements of the input that one position reads
    UNITS = 1  # units at one position
    PITCH_WINDOW = 2  # window, padded
    PITCH_UNITS = 3  # units, padded
    FORWARD = 4  # offset of the transposed matrix (window, pitch_units) in the packed parameters
    BIAS = 5  # offset of the bias (pitch_units,)
    BACKWARD = 6  # offset of the matrix (units, pitch_window)
    INPUT = 7  # column of the input section in a row
    POSITIONS = 8
    HOP = 9  # elements between the windows of two positions
    SECTION = 10  # elements of the input section in a row


class Layer(NamedTuple):
    """A layer as its policy describes it."""

    units: int
    positions: int
    window: int
    """Elements of the (padded) input section that one position reads."""
    hop: int
    """Elements of the input section between two positions."""
    weight: np.ndarray
    """(units, window) int: index of each weight in the flattened parameter, -1 for padding."""


class Layout(NamedTuple):
    """Where the parameters and activations of a policy lie in the flat arrays that the kernels read."""

    state_size: int
    control_size: int
    layers: int
    row: int
    """Elements of one row of activations: sections [x | a_1 | ... | a_L]."""
    row_adj: int
    """Elements of one row of hidden cotangents: sections [d_1 | ... | d_L]; at least 1."""
    packed: int
    """Elements of the packed parameters."""
    grads: int
    """Elements at the front of the packed parameters that have a gradient slot (backward matrices and
    biases).
    """
    table: np.ndarray
    """(layers, TABLE_COLUMNS) int32; a composed policy's has what its operations gather behind these rows."""
    pack: np.ndarray
    """(packed,) int64: index into `numbers` and the concatenated parameters behind them, 0 for padding."""
    unpack: np.ndarray
    """(parameters,) int32: where each component of the concatenated parameters lies in the packed ones."""
    numbers: np.ndarray = np.zeros(1)
    """What stands before the concatenated parameters when they are packed; the first is 0, of padding."""

    def column(self, layer: int, column: int) -> int:
        """An entry of the table."""
        return int(self.table[layer, column])

    @property
    def composed(self) -> bool:
        """Whether the table is that of composed_layout.py."""
        return self.table.shape[1] > TABLE_COLUMNS

    @property
    def widest(self) -> int:
        """Elements of the widest section of hidden cotangents, at least one vector."""
        rows = self.table[: self.layers]
        outputs = rows[:, Column.POSITIONS] * rows[:, Column.PITCH_UNITS]
        return int(outputs.max())


def pitch(n: int, itemsize: int) -> int:
    """Elements of a section that holds n."""
    lanes = PAD // itemsize
    return (n + lanes - 1) // lanes * lanes


def _mlp_layers(sizes: tuple[int, ...], itemsize: int) -> list[Layer]:
    """Fully connected layers: input size, widths, output size."""
    return [
        Layer(units, 1, n_in, 0, np.arange(units * n_in).reshape(units, n_in))
        for n_in, units in zip(sizes[:-1], sizes[1:])
    ]


def _wavecnn_layers(sizes: tuple[int, ...], itemsize: int) -> list[Layer]:
    """Two convolutions of stride 2 and a linear output: state size (2 points), channels, output size.

    The state is read as (point, re/im), the windows of three points overlap by one. conv1.weight is (channel,
    1, 3, 2), conv2.weight (channel, channel, 3), out.weight (output, position * channel).
    """
    state_size, channels, outputs = sizes
    points2 = ((state_size // 2 - 3) // 2 - 2) // 2 + 1
    # as many as the second convolution reads: where its stride leaves a remainder, there is one more
    points1 = 2 * points2 + 1
    width = pitch(channels, itemsize)
    conv2 = np.full((channels, 3, width), -1)
    conv2[:, :, :channels] = (
        np.arange(channels * channels * 3).reshape(channels, channels, 3).transpose(0, 2, 1)
    )
    out = np.full((outputs, points2, width), -1)
    out[:, :, :channels] = np.arange(outputs * points2 * channels).reshape(outputs, points2, channels)
    return [
        Layer(channels, points1, 6, 4, np.arange(channels * 6).reshape(channels, 6)),
        Layer(channels, points2, 3 * width, 2 * width, conv2.reshape(channels, -1)),
        Layer(outputs, 1, points2 * width, 0, out.reshape(outputs, -1)),
    ]


_ARCHITECTURES = {"mlp": _mlp_layers, "wavecnn": _wavecnn_layers}
"""Policies that can be fused, by the name that begins their description; see `layout`."""


@functools.cache
def layout(network: str, itemsize: int) -> Layout:
    """Lays out a policy for elements of `itemsize` bytes.

    Args:
        network: "mlp:10,100,100,1" is a perceptron with these sizes; "wavecnn:64,60,1" the convolutional
            controller for a state of size 64 with 60 channels and 1 output; "composed:..." any chain of the
            operations in composed_description.py.

    The concatenated parameters are W_1, b_1, ..., W_o, b_o, each flattened: the order of the torch module's
    `parameters()`. Packed, each layer has its matrix as it is (rows padded; read by the backward pass), its
    bias, and behind all of these its transpose (read by the forward pass).
    """
    kind, _, numbers = network.partition(":")
    if kind == "composed":
        from .composed_layout import composed_layout  # which builds on this module

        return composed_layout(network, itemsize)
    sizes = tuple(int(n) for n in numbers.split(","))
    return _lay_out(sizes[0], _ARCHITECTURES[kind](sizes, itemsize), itemsize)


def _lay_out(state_size: int, layers: list[Layer], itemsize: int) -> Layout:
    c = Column
    table = np.zeros((len(layers), TABLE_COLUMNS), dtype=np.int32)
    offset = column = 0
    for i, layer in enumerate(layers):
        pitch_window, pitch_units = pitch(layer.window, itemsize), pitch(layer.units, itemsize)
        # the last window may be read beyond its end by part of a vector, or leave some of the state unread
        reach = (layer.positions - 1) * layer.hop + pitch_window
        section = pitch(max(reach, 0 if i else state_size), itemsize)
        table[i, : c.FORWARD] = layer.window, layer.units, pitch_window, pitch_units
        table[i, c.BACKWARD : c.SECTION + 1] = offset, column, layer.positions, layer.hop, section
        # rows padded to a whole register tile, so that the products may write one
        offset += (layer.units + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS * pitch_window
        table[i, c.BIAS] = offset
        offset += pitch_units
        column += section
    grads = offset
    for i, layer in enumerate(layers):
        table[i, c.FORWARD] = offset
        offset += layer.window * int(table[i, c.PITCH_UNITS])

    pack = np.zeros(offset, dtype=np.int64)
    unpack = []
    first = 0
    for layer, entry in zip(layers, table.tolist()):
        used = layer.weight >= 0
        units, window = np.nonzero(used)
        source = layer.weight[used]
        where = entry[c.BACKWARD] + units * entry[c.PITCH_WINDOW] + window
        pack[where] = 1 + first + source
        pack[entry[c.FORWARD] + window * entry[c.PITCH_UNITS] + units] = 1 + first + source
        order = np.empty(source.size, dtype=np.int64)
        order[source] = where
        unpack.append(order)
        first += source.size
        bias = entry[c.BIAS] + np.arange(layer.units)
        pack[bias] = 1 + first + np.arange(layer.units)
        unpack.append(bias)
        first += layer.units
    return Layout(
        state_size,
        layers[-1].units,
        len(layers),
        column,
        max(column - int(table[0, c.SECTION]), 1),
        offset,
        grads,
        table,
        pack,
        np.concatenate(unpack).astype(np.int32),
    )

"""Policies as stacks of dense layers, on blocks of worlds, in native snippets: forward, input Jacobian, weight products.

One block is BLOCK worlds at one time step. Three device functions, generic in the layers (read at run time from the
layout's table), one source for float32 and float64:

    forward      a_0 = x;  a_l = tanh(W_l a_{l-1} + b_l);  u = W_o a_L + b_o
    linearize    d_L = W_o[c] * (1 - a_L^2);  d_{l-1} = (W_l^T d_l) * (1 - a_{l-1}^2);  J[c] = W_1^T d_1
    weight_grad  adj_W_l += sum_rows (sum_c mu_c d_l^c) a_{l-1}^T  and likewise for b_l, W_o, b_o

`linearize` is the backward pass of the policy for a unit cotangent of control c. It does not depend on the cotangents
of the rollout, so it is taken out of the adjoint sweep; `weight_grad` scales its rows by them.

A layer is applied at one or more positions: at position i it reads the `window` elements of its input that start at i * hop and
writes its units behind one another. One position is a fully connected layer, several are a convolution with channels last.

On a CPU every layer runs through one register tile: BLOCK rows times up to four vectors of units, one fused multiply-add per
vector and k. With AVX-512 that is 16 accumulators for 8 loads, so that the multiply-add units, not the loads, are the bound
(measured: 95% of their peak at 100 units). On a GPU the threads of a block share the units of a layer, and the rows of the block stay in registers.

Rows are `[x | a_1 | ... | a_L]`, each section padded to PAD bytes so that every vector load is whole; padded entries are
zero, because the padded weights are.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import warp as wp

BLOCK = 4
"""Worlds that share each weight row while it is in registers; also the rows of a CPU register tile."""
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
    """Elements at the front of the packed parameters that have a gradient slot (backward matrices and biases)."""
    table: np.ndarray
    """(layers, TABLE_COLUMNS) int32."""
    pack: np.ndarray
    """(packed,) int64: 1 + index into the concatenated parameters, 0 for padding."""
    unpack: np.ndarray
    """(parameters,) int32: where each component of the concatenated parameters lies in the packed ones."""

    def column(self, layer: int, column: int) -> int:
        """An entry of the table."""
        return int(self.table[layer, column])

    @property
    def widest(self) -> int:
        """Elements of the widest section of hidden cotangents, at least one vector."""
        outputs = self.table[:, Column.POSITIONS] * self.table[:, Column.PITCH_UNITS]
        return int(outputs.max())


def _pitch(n: int, itemsize: int) -> int:
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

    The state is read as (point, re/im), the windows of three points overlap by one. conv1.weight is (channel, 1, 3, 2), conv2.weight
    (channel, channel, 3), out.weight (output, position * channel).
    """
    state_size, channels, outputs = sizes
    points1 = (state_size // 2 - 3) // 2 + 1
    points2 = (points1 - 3) // 2 + 1
    pitch = _pitch(channels, itemsize)
    conv2 = np.full((channels, 3, pitch), -1)
    conv2[:, :, :channels] = np.arange(channels * channels * 3).reshape(channels, channels, 3).transpose(0, 2, 1)
    out = np.full((outputs, points2, pitch), -1)
    out[:, :, :channels] = np.arange(outputs * points2 * channels).reshape(outputs, points2, channels)
    return [
        Layer(channels, points1, 6, 4, np.arange(channels * 6).reshape(channels, 6)),
        Layer(channels, points2, 3 * pitch, 2 * pitch, conv2.reshape(channels, -1)),
        Layer(outputs, 1, points2 * pitch, 0, out.reshape(outputs, -1)),
    ]


_ARCHITECTURES = {"mlp": _mlp_layers, "wavecnn": _wavecnn_layers}
"""Policies that can be fused, by the name that begins their description; see `layout`."""


@functools.lru_cache(maxsize=None)
def layout(network: str, itemsize: int) -> Layout:
    """Lays out a policy for elements of `itemsize` bytes.

    Args:
        network: "mlp:10,100,100,1" is a perceptron with these sizes; "wavecnn:64,60,1" the convolutional controller for a state of
            size 64 with 60 channels and 1 output.

    The concatenated parameters are W_1, b_1, ..., W_o, b_o, each flattened: the order of the torch module's `parameters()`. Packed, each layer
    has its matrix as it is (rows padded; read by the backward pass), its bias, and behind all of these its transpose (read by the
    forward pass).
    """
    kind, _, numbers = network.partition(":")
    sizes = tuple(int(n) for n in numbers.split(","))
    return _lay_out(sizes[0], _ARCHITECTURES[kind](sizes, itemsize), itemsize)


def _lay_out(state_size: int, layers: list[Layer], itemsize: int) -> Layout:
    c = Column
    table = np.zeros((len(layers), TABLE_COLUMNS), dtype=np.int32)
    offset = column = 0
    for i, layer in enumerate(layers):
        pitch_window, pitch_units = _pitch(layer.window, itemsize), _pitch(layer.units, itemsize)
        # the last window may be read beyond its end by part of a vector
        section = _pitch((layer.positions - 1) * layer.hop + pitch_window, itemsize)
        table[i, : c.SECTION + 1] = (
            layer.window, layer.units, pitch_window, pitch_units, 0, 0, offset, column, layer.positions, layer.hop, section
        )  # fmt: skip
        # rows padded to a whole register tile, so that the products may write one
        offset += (layer.units + BLOCK - 1) // BLOCK * BLOCK * pitch_window
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


_PRELUDE = """
typedef REAL real;
#if defined(__CUDA_ARCH__)
  #define WS_SYNC() __syncthreads()
#else
  #define WS_SYNC()
  #if defined(__AVX512F__)
    #define WS_VB 64
    #define WS_NV 4
  #else
    #define WS_VB 32
    #define WS_NV 3
  #endif
  enum { VL = WS_VB / (int)sizeof(real) };
  typedef real vec __attribute__((ext_vector_type(VL)));
  #define WS_LOAD(p) ([](const real* q_) { vec v_; __builtin_memcpy(&v_, q_, sizeof(vec)); return v_; })(p)
  #define WS_STORE(p, v) do { vec s_ = (v); __builtin_memcpy((p), &s_, sizeof(vec)); } while (0)
  #define WS_FMA(a, b, c) __builtin_elementwise_fma(a, b, c)
  #define WS_ZERO(V) \\
    vec acc[BLOCK][V]; \\
    _Pragma("unroll") for (int r = 0; r < BLOCK; ++r) \\
      _Pragma("unroll") for (int v = 0; v < V; ++v) acc[r][v] = (vec)(real(0));
  // acc[r][v] += sum_k x[r * xr + k * xk] * m[k * mk + v * VL + lane], for BLOCK rows and V vectors
  #define WS_TILE(V, x, xr, xk, m, mk, K) \\
    { const real* m_ = (m); const real* x_ = (x); \\
      for (int k = 0; k < (K); ++k, m_ += (mk), x_ += (xk)) { \\
        vec w_[V]; \\
        _Pragma("unroll") for (int v = 0; v < V; ++v) w_[v] = WS_LOAD(m_ + v * VL); \\
        _Pragma("unroll") for (int r = 0; r < BLOCK; ++r) { \\
          vec b_ = (vec)(x_[r * (xr)]); \\
          _Pragma("unroll") for (int v = 0; v < V; ++v) acc[r][v] = WS_FMA(b_, w_[v], acc[r][v]); } } }
  #define WS_EACH(V, BODY) \\
    _Pragma("unroll") for (int r = 0; r < BLOCK; ++r) \\
      _Pragma("unroll") for (int v = 0; v < V; ++v) { BODY }
#endif
"""

# tanh(x) = t / (t + 2) with t = e^{2x} - 1 = 2^n (e^r - 1) + (2^n - 1), |r| <= ln2 / 2: relative accuracy near 0, where
# controllers start. The series is cut where its remainder is below half a unit in the last place. The clamps let NaN through.
_TANH = """
  auto vtanh = [](vec x) -> vec {
    x = x > (vec)(real(LIMIT)) ? (vec)(real(LIMIT)) : x;
    x = x < (vec)(real(-LIMIT)) ? (vec)(real(-LIMIT)) : x;
    vec n = __builtin_elementwise_roundeven(x * real(2.8853900817779268147));
    vec r = WS_FMA(n, (vec)(real(-(LN2_HI))), x + x);
    r = WS_FMA(n, (vec)(real(-(LN2_LO))), r);
    vec q = (vec)(real(SERIES_LAST));
    SERIES
    vec p = WS_FMA(q * r, r, r);
    typedef INT whole; typedef whole ivec __attribute__((ext_vector_type(VL)));
    ivec e = (__builtin_convertvector(n, ivec) + whole(EXPONENT_BIAS)) << whole(MANTISSA);
    vec two_n; __builtin_memcpy(&two_n, &e, sizeof(vec));
    vec t = WS_FMA(two_n, p, two_n - real(1));
    return t / (t + real(2));
  };
"""

_LAYER = """
  enum { WINDOW, UNITS, PITCH_WINDOW, PITCH_UNITS, FORWARD, BIAS, BACKWARD, INPUT, POSITIONS, HOP, SECTION, TABLE = 12 };
"""

_FORWARD = """
  const real* P = params.data;
  real* rows = hidden.data + row0;
  for (int l = 0; l < layers; ++l) {
    const int* T = table.data + l * TABLE;
    const int units = T[UNITS], window = T[WINDOW], pitch_window = T[PITCH_WINDOW], pitch_units = T[PITCH_UNITS];
    const real* b = P + T[BIAS];
    const real* x = rows + T[INPUT];
    if (l == layers - 1) {
      // few outputs: dot products along the padded rows of W
      real* u = controls.data + u0;
#if defined(__CUDA_ARCH__)
      for (int i = lane; i < BLOCK * units; i += lanes) {
        const int r = i / units, c = i % units;
        const real* w = P + T[BACKWARD] + c * pitch_window;
        real s = b[c];
        for (int k = 0; k < window; ++k) s += x[r * row + k] * w[k];
        if (r < worlds) u[r * units + c] = s;
      }
#else
      for (int c = 0; c < units; ++c) {
        const real* w = P + T[BACKWARD] + c * pitch_window;
        for (int r = 0; r < worlds; ++r) {
          vec s = (vec)(real(0));
          for (int k = 0; k < pitch_window; k += VL) s = WS_FMA(WS_LOAD(x + r * row + k), WS_LOAD(w + k), s);
          real total = b[c];
          for (int k = 0; k < VL; ++k) total += s[k];
          u[r * units + c] = total;
        }
      }
#endif
    } else {
      const real* wt = P + T[FORWARD];
      real* y = rows + T[INPUT] + T[SECTION];
#if defined(__CUDA_ARCH__)
      for (int at = lane; at < T[POSITIONS] * pitch_units; at += lanes) {
        const int i = at / pitch_units, j = at % pitch_units;
        const real* xi = x + i * T[HOP];
        real acc[BLOCK];
        #pragma unroll
        for (int r = 0; r < BLOCK; ++r) acc[r] = b[j];
        for (int k = 0; k < window; ++k) {
          const real w = wt[k * pitch_units + j];
          #pragma unroll
          for (int r = 0; r < BLOCK; ++r) acc[r] += xi[r * row + k] * w;
        }
        #pragma unroll
        for (int r = 0; r < BLOCK; ++r) y[r * row + at] = tanh(acc[r]);
      }
      WS_SYNC();
#else
      for (int i = 0; i < T[POSITIONS]; ++i) {
        const real* xb = x + i * T[HOP];
        real* yb = y + i * pitch_units;
        int j = 0;
        #define WS_LAYER(V) \\
          for (; j + V * VL <= pitch_units; j += V * VL) { \\
            WS_ZERO(V) \\
            WS_TILE(V, xb, row, 1, wt + j, pitch_units, window) \\
            WS_EACH(V, WS_STORE(yb + r * row + j + v * VL, vtanh(acc[r][v] + WS_LOAD(b + j + v * VL)));) }
        #if WS_NV >= 4
        WS_LAYER(4)
        #endif
        WS_LAYER(3)
        WS_LAYER(2)
        WS_LAYER(1)
        #undef WS_LAYER
      }
      // the section may be longer than what is written: its end is read by padded windows
      const int* N = T + TABLE;
      for (int k = T[POSITIONS] * pitch_units; k < N[SECTION]; k += VL)
        for (int r = 0; r < BLOCK; ++r) WS_STORE(y + r * row + k, (vec)(real(0)));
#endif
    }
  }
"""

_LINEARIZE = """
#if !defined(__CUDA_ARCH__)
  const real* P = params.data;
  const real* rows = hidden.data + row0;
  real* ds = d.data + d0;
  const int* O = table.data + (layers - 1) * TABLE;
  const int x_section = table.data[SECTION];
  const real* wo = P + O[BACKWARD] + component * O[PITCH_WINDOW];
  if (layers == 1) {
    // a linear policy has no hidden rows: its Jacobian is its matrix
    if (want_jac) for (int r = 0; r < worlds; ++r) for (int i = 0; i < O[WINDOW]; ++i) jac.data[j0 + r * jr + i] = wo[i];
  } else {
    for (int r = 0; r < BLOCK; ++r) {
      const real* a = rows + r * row + O[INPUT];
      real* y = ds + r * row_adj + O[INPUT] - x_section;
      for (int j = 0; j < O[PITCH_WINDOW]; j += VL) {
        vec av = WS_LOAD(a + j);
        WS_STORE(y + j, WS_LOAD(wo + j) * (real(1) - av * av));
      }
    }
    for (int l = layers - 2; l >= (want_jac ? 0 : 1); --l) {
      const int* T = table.data + l * TABLE;
      const real* w = P + T[BACKWARD];
      const int units = T[UNITS], pitch_window = T[PITCH_WINDOW], many = T[POSITIONS] > 1;
      if (many && l > 0)
        for (int r = 0; r < BLOCK; ++r)
          for (int j = 0; j < T[SECTION]; j += VL) WS_STORE(ds + r * row_adj + T[INPUT] - x_section + j, (vec)(real(0)));
      if (many && l == 0)
        for (int r = 0; r < worlds; ++r)
          for (int i = 0; i < state_size; ++i) jac.data[j0 + r * jr + i] = real(0);
      for (int at = 0; at < T[POSITIONS]; ++at) {
        const real* x = ds + (T[INPUT] + T[SECTION] - x_section) + at * T[PITCH_UNITS];
        const real* a = rows + T[INPUT];
        real* y = ds + T[INPUT] - x_section + at * T[HOP];
        int j = 0;
        #define WS_LAYER(V) \\
          for (; j + V * VL <= pitch_window; j += V * VL) { \\
            WS_ZERO(V) \\
            WS_TILE(V, x, row_adj, 1, w + j, pitch_window, units) \\
            if (l == 0) { \\
              WS_EACH(V, if (r < worlds) for (int q = 0; q < VL; ++q) { const int i = at * T[HOP] + j + v * VL + q; \\
                           if (j + v * VL + q < T[WINDOW]) { real* p = &jac.data[j0 + r * jr + i]; \\
                             *p = many ? *p + acc[r][v][q] : acc[r][v][q]; } }) \\
            } else if (many) { \\
              WS_EACH(V, real* p = y + r * row_adj + j + v * VL; WS_STORE(p, WS_LOAD(p) + acc[r][v]);) \\
            } else { \\
              WS_EACH(V, vec av = WS_LOAD(a + r * row + j + v * VL); \\
                         WS_STORE(y + r * row_adj + j + v * VL, acc[r][v] * (real(1) - av * av));) \\
            } }
        #if WS_NV >= 4
        WS_LAYER(4)
        #endif
        WS_LAYER(3)
        WS_LAYER(2)
        WS_LAYER(1)
        #undef WS_LAYER
      }
      if (many && l > 0)
        for (int r = 0; r < BLOCK; ++r)
          for (int j = 0; j < T[SECTION]; j += VL) {
            vec av = WS_LOAD(rows + r * row + T[INPUT] + j);
            real* p = ds + r * row_adj + T[INPUT] - x_section + j;
            WS_STORE(p, WS_LOAD(p) * (real(1) - av * av));
          }
    }
  }
#endif
"""

# Rows of one chunk stay in the nearest cache for all products of the chunk. The order of the sums depends on the
# chunk alone, never on threads.
_WEIGHT_GRAD = """
#if !defined(__CUDA_ARCH__)
  const real* rows = hidden.data + row0;
  const real* ds = d.data + d0;
  const int x_section = table.data[SECTION];
  const int* O = table.data + (layers - 1) * TABLE;
  const int m = O[UNITS];
  real* sc = scratch.data;
  for (int f = 0; f < fields; ++f) {
    const real* mu_f = mu.data + f * mu_field;
    real* g = grads.data + g0 + f * g_field;
    // output layer: rows of a_L weighted by the control cotangents
    {
      const real* a = rows + O[INPUT];
      for (int c = 0; c < m; ++c) {
        real* gw = g + O[BACKWARD] + c * O[PITCH_WINDOW];
        for (int j = 0; j < O[PITCH_WINDOW]; j += VL) {
          vec s0 = WS_LOAD(gw + j), s1 = (vec)(real(0));
          for (int r = 0; r < nrows; r += 2) {
            s0 = WS_FMA((vec)(mu_f[r * m + c]), WS_LOAD(a + r * row + j), s0);
            s1 = WS_FMA((vec)(mu_f[(r + 1) * m + c]), WS_LOAD(a + (r + 1) * row + j), s1);
          }
          WS_STORE(gw + j, s0 + s1);
        }
        real s = real(0);
        for (int r = 0; r < nrows; ++r) s += mu_f[r * m + c];
        g[O[BIAS] + c] += s;
      }
    }
    for (int l = 0; l < layers - 1; ++l) {
      const int* T = table.data + l * TABLE;
      const int units = T[UNITS], pitch_window = T[PITCH_WINDOW], pitch_units = T[PITCH_UNITS];
      const int column = T[INPUT] + T[SECTION] - x_section, width = T[POSITIONS] * pitch_units;
      // hidden cotangents of this field: unit rows times the control cotangents; the bias takes their sum
      for (int at = 0; at < width; at += VL) {
        real* gb = g + T[BIAS] + at % pitch_units;
        vec s = WS_LOAD(gb);
        for (int r = 0; r < nrows; ++r) {
          vec y = (vec)(real(0));
          for (int c = 0; c < m; ++c)
            y = WS_FMA((vec)(mu_f[r * m + c]), WS_LOAD(ds + c * d_component + r * row_adj + column + at), y);
          WS_STORE(sc + r * width + at, y);
          s += y;
        }
        WS_STORE(gb, s);
      }
      const real* a = rows + T[INPUT];
      for (int o = 0; o < units; o += BLOCK) {
        real* gw = g + T[BACKWARD] + o * pitch_window;
        int j = 0;
        #define WS_LAYER(V) \\
          for (; j + V * VL <= pitch_window; j += V * VL) { \\
            WS_ZERO(V) \\
            for (int at = 0; at < T[POSITIONS]; ++at) \\
              WS_TILE(V, sc + at * pitch_units + o, 1, width, a + at * T[HOP] + j, row, nrows) \\
            WS_EACH(V, real* p = gw + r * pitch_window + j + v * VL; WS_STORE(p, WS_LOAD(p) + acc[r][v]);) }
        #if WS_NV >= 4
        WS_LAYER(4)
        #endif
        WS_LAYER(3)
        WS_LAYER(2)
        WS_LAYER(1)
        #undef WS_LAYER
      }
    }
  }
#endif
"""


def _fill(text: str, dtype: Any) -> str:
    single = dtype == wp.float32
    # sum_{k >= 2} r^(k-2) / k!, highest power first
    last = 7 if single else 14
    factorial = [1.0]
    for k in range(1, last + 1):
        factorial.append(factorial[-1] * k)
    series = "\n    ".join(f"q = WS_FMA(q, r, (vec)(real({1.0 / factorial[k]!r})));" for k in range(last - 1, 1, -1))
    values = {
        "SERIES_LAST": repr(1.0 / factorial[last]),
        "SERIES": series,
        "LIMIT": "9.1" if single else "20.0",
        "LN2_HI": "0.693359375" if single else "0.693147180369123816490",
        "LN2_LO": "-2.12194440054690581e-4" if single else "1.90821492927058770002e-10",
        "INT": "int" if single else "long long",
        "EXPONENT_BIAS": "127" if single else "1023",
        "MANTISSA": "23" if single else "52",
        "REAL": "float" if single else "double",
        "BLOCK": str(BLOCK),
    }
    for name, value in values.items():
        text = text.replace(name, value)
    return text


class NetworkFunctions(NamedTuple):
    """Device functions of a policy for one dtype."""

    forward: Any
    linearize: Any
    weight_grad: Any


@functools.lru_cache(maxsize=None)
def make_network_functions(dtype: Any) -> NetworkFunctions:
    """Returns the device functions for `dtype` (wp.float32 or wp.float64)."""

    @wp.func_native(_fill(_PRELUDE + "#if !defined(__CUDA_ARCH__)\n" + _TANH + "#endif\n" + _LAYER + _FORWARD, dtype))
    def network_forward(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        layers: int,
        row: int,
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,  # first element of the block's rows; their x sections are filled
        controls: wp.array(dtype=dtype),
        u0: wp.int64,  # first element of the block's controls
        worlds: int,  # worlds of the block that exist
        lane: int,
        lanes: int,
    ): ...

    @wp.func_native(_fill(_PRELUDE + _LAYER + _LINEARIZE, dtype))
    def network_linearize(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        layers: int,
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,
        state_size: int,
        component: int,  # the control whose cotangent is 1
        worlds: int,
        want_jac: int,
        d: wp.array(dtype=dtype),
        d0: wp.int64,
        jac: wp.array(dtype=dtype),
        j0: wp.int64,
        jr: int,  # elements between the Jacobians of two worlds
    ): ...

    @wp.func_native(_fill(_PRELUDE + _LAYER + _WEIGHT_GRAD, dtype))
    def network_weight_grad(
        table: wp.array(dtype=wp.int32),
        layers: int,
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,
        nrows: int,
        d: wp.array(dtype=dtype),
        d0: wp.int64,
        d_component: int,  # elements between the rows of two control components
        mu: wp.array(dtype=dtype),  # control cotangents of the chunk's rows, (fields, rows, m), zero where no world is
        mu_field: int,
        fields: int,
        scratch: wp.array(dtype=dtype),  # (rows of a chunk, widest section)
        grads: wp.array3d(dtype=dtype),
        g0: wp.int64,
        g_field: int,
    ): ...

    return NetworkFunctions(network_forward, network_linearize, network_weight_grad)

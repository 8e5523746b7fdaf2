"""Multilayer perceptron on blocks of worlds, in native snippets: forward, input Jacobian, weight products.

One block is BLOCK worlds at one time step. Three device functions, generic in the widths (read at run time from the
layout's table), one source for float32 and float64:

    forward      a_0 = x;  a_l = tanh(W_l a_{l-1} + b_l);  u = W_o a_L + b_o
    linearize    d_L = W_o[c] * (1 - a_L^2);  d_{l-1} = (W_l^T d_l) * (1 - a_{l-1}^2);  J[c] = W_1^T d_1
    weight_grad  adj_W_l += sum_rows (sum_c mu_c d_l^c) a_{l-1}^T  and likewise for b_l, W_o, b_o

`linearize` is the backward pass of the policy for a unit cotangent of control c. It does not depend on the cotangents
of the rollout, so it is taken out of the adjoint sweep; `weight_grad` scales its rows by them.

On a CPU every dense layer runs through one register tile: a few rows times NV vectors of units, one fused
multiply-add per vector and k. With AVX-512 that is 8 x 3 accumulators, so that the multiply-add units, not the loads, are the
bound. On a GPU the threads of a block share the units of a layer, and the rows of the block stay in registers.

Rows are `[x | a_1 | ... | a_L]`, each section padded to PAD bytes so that every vector load is whole; padded entries are
zero, because the padded weights are.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import warp as wp

BLOCK = 8
"""Worlds that share each weight row while it is in registers."""
PAD = 64
"""Bytes to which a section of a row is padded: one AVX-512 vector."""
TABLE_COLUMNS = 8
"""Columns of the layer table: n_in, n_out, pitch_in, pitch_out, forward offset, bias offset, backward offset, column of the input."""


class MlpLayout(NamedTuple):
    """Where the parameters and activations of a perceptron lie in the flat arrays that the kernels read."""

    sizes: tuple[int, ...]
    """Input size, hidden widths, output size."""
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


def _pitch(n: int, itemsize: int) -> int:
    lanes = PAD // itemsize
    return (n + lanes - 1) // lanes * lanes


@functools.lru_cache(maxsize=None)
def mlp_layout(sizes: tuple[int, ...], itemsize: int) -> MlpLayout:
    """Lays out a perceptron with the given sizes for elements of `itemsize` bytes.

    The concatenated parameters are W_1 (out, in), b_1, ..., W_o, b_o, flattened row by row: the order of
    `torch.nn.Sequential(Linear, Tanh, ..., Linear).parameters()`. Packed, each layer has its matrix as it is
    (rows padded; read by the backward pass), its bias, and behind all of these its transpose (read by the forward pass).
    """
    pitches = [_pitch(n, itemsize) for n in sizes]
    layers = len(sizes) - 1
    table = np.zeros((layers, TABLE_COLUMNS), dtype=np.int32)
    offset = 0
    for i in range(layers):
        n_in, n_out = sizes[i], sizes[i + 1]
        # rows padded to a whole register tile, so that the products may write one
        rows = (n_out + BLOCK - 1) // BLOCK * BLOCK
        table[i, :4] = n_in, n_out, pitches[i], pitches[i + 1]
        table[i, 6] = offset
        offset += rows * pitches[i]
        table[i, 5] = offset
        offset += pitches[i + 1]
        table[i, 7] = sum(pitches[:i])
    grads = offset
    for i in range(layers):
        table[i, 4] = offset
        offset += sizes[i] * pitches[i + 1]

    pack = np.zeros(offset, dtype=np.int64)
    unpack = []
    first = 1
    for i in range(layers):
        n_in, n_out, pitch_in, pitch_out, forward, bias, backward, _ = (int(v) for v in table[i])
        index = first + np.arange(n_out * n_in).reshape(n_out, n_in)
        where = backward + np.arange(n_out)[:, None] * pitch_in + np.arange(n_in)
        pack[where] = index
        pack[forward + np.arange(n_in)[:, None] * pitch_out + np.arange(n_out)] = index.T
        unpack.append(where.ravel())
        first += n_out * n_in
        pack[bias : bias + n_out] = first + np.arange(n_out)
        unpack.append(bias + np.arange(n_out))
        first += n_out
    row = sum(pitches[:-1])
    return MlpLayout(
        sizes, row, max(row - pitches[0], 1), offset, grads, table, pack, np.concatenate(unpack).astype(np.int32)
    )


_PRELUDE = """
typedef REAL real;
#if defined(__CUDA_ARCH__)
  #define WS_SYNC() __syncthreads()
#else
  #define WS_SYNC()
  #if defined(__AVX512F__)
    #define WS_VB 64
    #define WS_RT 8
    #define WS_NV 3
  #else
    #define WS_VB 32
    #define WS_RT 4
    #define WS_NV 3
  #endif
  enum { VL = WS_VB / (int)sizeof(real) };
  typedef real vec __attribute__((ext_vector_type(VL)));
  #define WS_LOAD(p) ([](const real* q_) { vec v_; __builtin_memcpy(&v_, q_, sizeof(vec)); return v_; })(p)
  #define WS_STORE(p, v) do { vec s_ = (v); __builtin_memcpy((p), &s_, sizeof(vec)); } while (0)
  #define WS_FMA(a, b, c) __builtin_elementwise_fma(a, b, c)
  // acc[r][v] = sum_k x[r * xr + k * xk] * m[k * mk + v * VL + lane], for WS_RT rows and V vectors
  #define WS_TILE(V, x, xr, xk, m, mk, K) \\
    vec acc[WS_RT][V]; \\
    _Pragma("unroll") for (int r = 0; r < WS_RT; ++r) \\
      _Pragma("unroll") for (int v = 0; v < V; ++v) acc[r][v] = (vec)(real(0)); \\
    { const real* m_ = (m); const real* x_ = (x); \\
      for (int k = 0; k < (K); ++k, m_ += (mk), x_ += (xk)) { \\
        vec w_[V]; \\
        _Pragma("unroll") for (int v = 0; v < V; ++v) w_[v] = WS_LOAD(m_ + v * VL); \\
        _Pragma("unroll") for (int r = 0; r < WS_RT; ++r) { \\
          vec b_ = (vec)(x_[r * (xr)]); \\
          _Pragma("unroll") for (int v = 0; v < V; ++v) acc[r][v] = WS_FMA(b_, w_[v], acc[r][v]); } } }
  #define WS_EACH(V, BODY) \\
    _Pragma("unroll") for (int r = 0; r < WS_RT; ++r) \\
      _Pragma("unroll") for (int v = 0; v < V; ++v) { BODY }
#endif
"""

# tanh(x) = t / (t + 2) with t = e^{2|x|} - 1 = 2^n (e^r - 1) + (2^n - 1), |r| <= ln2 / 2: relative accuracy near 0, where
# controllers start. The series is cut where its remainder is below half a unit in the last place.
_TANH = """
  auto vtanh = [](vec x) -> vec {
    vec ax = __builtin_elementwise_abs(x);
    vec y = __builtin_elementwise_min(ax, (vec)(real(LIMIT))) * real(2);
    vec n = __builtin_elementwise_roundeven(y * real(1.4426950408889634074));
    vec r = WS_FMA(n, (vec)(real(-(LN2_HI))), y);
    r = WS_FMA(n, (vec)(real(-(LN2_LO))), r);
    vec q = (vec)(real(SERIES_LAST));
    SERIES
    vec p = WS_FMA(q * r, r, r);
    typedef INT whole; typedef whole ivec __attribute__((ext_vector_type(VL)));
    ivec e = (__builtin_convertvector(n, ivec) + whole(BIAS)) << whole(MANTISSA);
    vec two_n; __builtin_memcpy(&two_n, &e, sizeof(vec));
    vec t = WS_FMA(two_n, p, two_n - real(1));
    vec y1 = t / (t + real(2));
    vec out = __builtin_elementwise_copysign(y1, x);
    return x != x ? x : out;
  };
"""

_FORWARD = """
  const real* P = params.data;
  const int* tab = table.data;
  real* rows = hidden.data + row0;
  for (int l = 0; l < layers; ++l) {
    const int* T = tab + l * 8;
    const int n_in = T[0], n_out = T[1], pitch_in = T[2], pitch_out = T[3];
    const real* b = P + T[5];
    const real* x = rows + T[7];
    if (l == layers - 1) {
      // few outputs: dot products along the padded rows of W
      real* u = controls.data + u0;
#if defined(__CUDA_ARCH__)
      for (int i = lane; i < BLOCK * n_out; i += lanes) {
        const int r = i / n_out, c = i % n_out;
        const real* w = P + T[6] + c * pitch_in;
        real s = b[c];
        for (int k = 0; k < n_in; ++k) s += x[r * row + k] * w[k];
        if (r < worlds) u[r * n_out + c] = s;
      }
#else
      for (int c = 0; c < n_out; ++c) {
        const real* w = P + T[6] + c * pitch_in;
        for (int r = 0; r < worlds; ++r) {
          vec s = (vec)(real(0));
          for (int k = 0; k < pitch_in; k += VL) s = WS_FMA(WS_LOAD(x + r * row + k), WS_LOAD(w + k), s);
          real total = b[c];
          for (int k = 0; k < VL; ++k) total += s[k];
          u[r * n_out + c] = total;
        }
      }
#endif
    } else {
      const real* wt = P + T[4];
      real* y = rows + T[7] + pitch_in;
#if defined(__CUDA_ARCH__)
      for (int j = lane; j < pitch_out; j += lanes) {
        real acc[BLOCK];
        #pragma unroll
        for (int r = 0; r < BLOCK; ++r) acc[r] = b[j];
        for (int k = 0; k < n_in; ++k) {
          const real w = wt[k * pitch_out + j];
          #pragma unroll
          for (int r = 0; r < BLOCK; ++r) acc[r] += x[r * row + k] * w;
        }
        #pragma unroll
        for (int r = 0; r < BLOCK; ++r) y[r * row + j] = tanh(acc[r]);
      }
      WS_SYNC();
#else
      for (int r0 = 0; r0 < BLOCK; r0 += WS_RT) {
        const real* xb = x + r0 * row;
        real* yb = y + r0 * row;
        int j = 0;
        #define WS_LAYER(V) \\
          for (; j + V * VL <= pitch_out; j += V * VL) { \\
            WS_TILE(V, xb, row, 1, wt + j, pitch_out, n_in) \\
            WS_EACH(V, WS_STORE(yb + r * row + j + v * VL, vtanh(acc[r][v] + WS_LOAD(b + j + v * VL)));) }
        WS_LAYER(3)
        WS_LAYER(2)
        WS_LAYER(1)
        #undef WS_LAYER
      }
#endif
    }
  }
"""

_LINEARIZE = """
#if !defined(__CUDA_ARCH__)
  const real* P = params.data;
  const int* tab = table.data;
  const real* rows = hidden.data + row0;
  real* ds = d.data + d0;
  const int* O = tab + (layers - 1) * 8;
  const int pitch0 = tab[2];
  const real* wo = P + O[6] + component * O[2];
  if (layers == 1) {
    // a linear policy has no hidden rows: its Jacobian is its matrix
    if (want_jac) for (int r = 0; r < worlds; ++r) for (int i = 0; i < O[0]; ++i) jac.data[j0 + r * jr + i] = wo[i];
  } else {
    for (int r = 0; r < BLOCK; ++r) {
      const real* a = rows + r * row + O[7];
      real* y = ds + r * row_adj + O[7] - pitch0;
      for (int j = 0; j < O[2]; j += VL) {
        vec av = WS_LOAD(a + j);
        WS_STORE(y + j, WS_LOAD(wo + j) * (real(1) - av * av));
      }
    }
    for (int l = layers - 2; l >= (want_jac ? 0 : 1); --l) {
      const int* T = tab + l * 8;
      const real* w = P + T[6];
      const int n_out = T[1], pitch_in = T[2];
      for (int r0 = 0; r0 < BLOCK; r0 += WS_RT) {
        const real* x = ds + r0 * row_adj + (T[7] + pitch_in - pitch0);
        const real* a = rows + r0 * row + T[7];
        real* y = ds + r0 * row_adj + T[7] - pitch0;
        int j = 0;
        #define WS_LAYER(V) \\
          for (; j + V * VL <= pitch_in; j += V * VL) { \\
            WS_TILE(V, x, row_adj, 1, w + j, pitch_in, n_out) \\
            if (l > 0) { \\
              WS_EACH(V, vec av = WS_LOAD(a + r * row + j + v * VL); \\
                         WS_STORE(y + r * row_adj + j + v * VL, acc[r][v] * (real(1) - av * av));) \\
            } else { \\
              WS_EACH(V, if (r0 + r < worlds) for (int q = 0; q < VL; ++q) { const int i = j + v * VL + q; \\
                           if (i < T[0]) jac.data[j0 + (r0 + r) * jr + i] = acc[r][v][q]; }) \\
            } }
        WS_LAYER(3)
        WS_LAYER(2)
        WS_LAYER(1)
        #undef WS_LAYER
      }
    }
  }
#endif
"""

# Rows of one chunk stay in the nearest cache for all products of the chunk. The order of the sums depends on the
# chunk alone, never on threads.
_WEIGHT_GRAD = """
#if !defined(__CUDA_ARCH__)
  const int* tab = table.data;
  const real* rows = hidden.data + row0;
  const real* ds = d.data + d0;
  const int pitch0 = tab[2];
  const int* O = tab + (layers - 1) * 8;
  const int m = O[1];
  real* sc = scratch.data;
  for (int f = 0; f < fields; ++f) {
    const real* mu_f = mu.data + f * mu_field;
    real* g = grads.data + g0 + f * g_field;
    // output layer: rows of a_L weighted by the control cotangents
    {
      const real* a = rows + O[7];
      for (int c = 0; c < m; ++c) {
        real* gw = g + O[6] + c * O[2];
        for (int j = 0; j < O[2]; j += VL) {
          vec s0 = WS_LOAD(gw + j), s1 = (vec)(real(0));
          for (int r = 0; r < nrows; r += 2) {
            s0 = WS_FMA((vec)(mu_f[r * m + c]), WS_LOAD(a + r * row + j), s0);
            s1 = WS_FMA((vec)(mu_f[(r + 1) * m + c]), WS_LOAD(a + (r + 1) * row + j), s1);
          }
          WS_STORE(gw + j, s0 + s1);
        }
        real s = real(0);
        for (int r = 0; r < nrows; ++r) s += mu_f[r * m + c];
        g[O[5] + c] += s;
      }
    }
    for (int l = 0; l < layers - 1; ++l) {
      const int* T = tab + l * 8;
      const int n_out = T[1], pitch_in = T[2], pitch_out = T[3];
      const int col = T[7] + pitch_in - pitch0;
      // hidden cotangents of this field: unit rows times the control cotangents; the bias takes their sum
      for (int j = 0; j < pitch_out; j += VL) {
        vec s = WS_LOAD(g + T[5] + j);
        for (int r = 0; r < nrows; ++r) {
          vec y = (vec)(real(0));
          for (int c = 0; c < m; ++c)
            y = WS_FMA((vec)(mu_f[r * m + c]), WS_LOAD(ds + c * d_component + r * row_adj + col + j), y);
          WS_STORE(sc + r * pitch_out + j, y);
          s += y;
        }
        WS_STORE(g + T[5] + j, s);
      }
      const real* a = rows + T[7];
      for (int o = 0; o < n_out; o += WS_RT) {
        real* gw = g + T[6] + o * pitch_in;
        int j = 0;
        #define WS_LAYER(V) \\
          for (; j + V * VL <= pitch_in; j += V * VL) { \\
            WS_TILE(V, sc + o, 1, pitch_out, a + j, row, nrows) \\
            WS_EACH(V, real* p = gw + r * pitch_in + j + v * VL; WS_STORE(p, WS_LOAD(p) + acc[r][v]);) }
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
    last = 8 if single else 14
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
        "BIAS": "127" if single else "1023",
        "MANTISSA": "23" if single else "52",
        "REAL": "float" if single else "double",
        "BLOCK": str(BLOCK),
    }
    for name, value in values.items():
        text = text.replace(name, value)
    return text


class MlpFunctions(NamedTuple):
    """Device functions of a perceptron for one dtype."""

    forward: Any
    linearize: Any
    weight_grad: Any


@functools.lru_cache(maxsize=None)
def make_mlp_functions(dtype: Any) -> MlpFunctions:
    """Returns the device functions for `dtype` (wp.float32 or wp.float64)."""

    @wp.func_native(_fill(_PRELUDE + "#if !defined(__CUDA_ARCH__)\n" + _TANH + "#endif\n" + _FORWARD, dtype))
    def mlp_forward(
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

    @wp.func_native(_fill(_PRELUDE + _LINEARIZE, dtype))
    def mlp_linearize(
        params: wp.array(dtype=dtype),
        table: wp.array(dtype=wp.int32),
        layers: int,
        row: int,
        row_adj: int,
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,
        component: int,  # the control whose cotangent is 1
        worlds: int,
        want_jac: int,
        d: wp.array(dtype=dtype),
        d0: wp.int64,
        jac: wp.array(dtype=dtype),
        j0: wp.int64,
        jr: int,  # elements between the Jacobians of two worlds
    ): ...

    @wp.func_native(_fill(_PRELUDE + _WEIGHT_GRAD, dtype))
    def mlp_weight_grad(
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

    return MlpFunctions(mlp_forward, mlp_linearize, mlp_weight_grad)

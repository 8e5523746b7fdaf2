"""Native text of the dense layers: what the device functions of dense.py do.

On a CPU every layer runs through register tiles: BLOCK rows times up to four vectors of units, or with
AVX-512 twice as many rows times up to three, one fused multiply-add per vector and k. That is 24 accumulators
for 11 loads, so that the multiply-add units, not the loads, are the bound: of what these can do on one core
the forward sweep reaches five sixths with 256 units a layer, and half with 100, whose padding, tanh and
physics weigh more. What the next step needs from memory is asked for behind every tile, a little at a time:
all at once it would hold up what follows. On a GPU the threads of a block share the units of a layer, and the
rows of the block stay in registers.
"""

from typing import Any

import warp as wp

from .layout import BLOCK

PRELUDE = """
typedef REAL real;
#if defined(__CUDA_ARCH__)
  #define WS_SYNC() __syncthreads()
#else
  #define WS_SYNC()
  #if defined(__AVX512F__)
    #define WS_VB 64
    #define WS_NV 4
    #define WS_RO 8
  #else
    #define WS_VB 32
    #define WS_NV 3
    #define WS_RO 4
  #endif
  enum { VL = WS_VB / (int)sizeof(real), LINE = 64 / (int)sizeof(real), FETCH = 32 * LINE };
  typedef real vec __attribute__((ext_vector_type(VL)));
  #define WS_LOAD(p) ([](const real* q_) { vec v_; __builtin_memcpy(&v_, q_, sizeof(vec)); return v_; })(p)
  #define WS_STORE(p, v) do { vec s_ = (v); __builtin_memcpy((p), &s_, sizeof(vec)); } while (0)
  #define WS_FMA(a, b, c) __builtin_elementwise_fma(a, b, c)
  #define WS_ZERO(R, V) \\
    vec acc[R][V]; \\
    _Pragma("unroll") for (int r = 0; r < R; ++r) \\
      _Pragma("unroll") for (int v = 0; v < V; ++v) acc[r][v] = (vec)(real(0));
  // acc[r][v] += sum_k x[xr(r) + k * xk] * m[k * mk + v * VL + lane], for R rows and V vectors
  #define WS_TILE(R, V, x, xr, xk, m, mk, K) \\
    { const real* m_ = (m); const real* x_ = (x); \\
      for (int k = 0; k < (K); ++k, m_ += (mk), x_ += (xk)) { \\
        vec w_[V]; \\
        _Pragma("unroll") for (int v = 0; v < V; ++v) w_[v] = WS_LOAD(m_ + v * VL); \\
        _Pragma("unroll") for (int r = 0; r < R; ++r) { \\
          vec b_ = (vec)(x_[xr(r)]); \\
          _Pragma("unroll") for (int v = 0; v < V; ++v) acc[r][v] = WS_FMA(b_, w_[v], acc[r][v]); } } }
  // the same for one vector: a second set of sums, since a few chains of additions leave the units waiting
  #define WS_NARROW_TILE(R, x, xr, m, mk, K) \\
    { const real* m_ = (m); const real* x_ = (x); vec odd_[R]; \\
      _Pragma("unroll") for (int r = 0; r < R; ++r) odd_[r] = (vec)(real(0)); \\
      int k = 0; \\
      for (; k + 1 < (K); k += 2, m_ += 2 * (mk), x_ += 2) { \\
        const vec w0_ = WS_LOAD(m_), w1_ = WS_LOAD(m_ + (mk)); \\
        _Pragma("unroll") for (int r = 0; r < R; ++r) { \\
          acc[r][0] = WS_FMA((vec)(x_[xr(r)]), w0_, acc[r][0]); \\
          odd_[r] = WS_FMA((vec)(x_[xr(r) + 1]), w1_, odd_[r]); } } \\
      if (k < (K)) { \\
        const vec w0_ = WS_LOAD(m_); \\
        _Pragma("unroll") for (int r = 0; r < R; ++r) \\
          acc[r][0] = WS_FMA((vec)(x_[xr(r)]), w0_, acc[r][0]); } \\
      _Pragma("unroll") for (int r = 0; r < R; ++r) acc[r][0] += odd_[r]; }
  #define WS_EACH(R, V, BODY) \\
    _Pragma("unroll") for (int r = 0; r < R; ++r) \\
      _Pragma("unroll") for (int v = 0; v < V; ++v) { BODY }
  // LAYER(V) takes columns j ... j + V * VL of `pitch` with R rows. Which vector goes alone, and is added up
  // in another order, depends on the pitch only: a row has the same numbers in a low and in a tall tile
  #define WS_COLUMNS(R, pitch, LAYER) \\
    { int j = 0; \\
      const int alone_ = (pitch) / VL % WS_NV == 1 ? VL : 0, even_ = (pitch) - alone_; \\
      if constexpr ((R) > BLOCK) { \\
        for (; j + 3 * VL <= even_ && j + 4 * VL != even_; j += 3 * VL) LAYER(3) \\
      } else { \\
        WS_WIDEST(LAYER) \\
        for (; j + 3 * VL <= even_; j += 3 * VL) LAYER(3) \\
      } \\
      for (; j + 2 * VL <= even_; j += 2 * VL) LAYER(2) \\
      if (alone_) LAYER(1) }
  // rows that go through together: those of one block, or of two where there are registers for their tile
  struct One { enum { ROWS = BLOCK }; };
  #if defined(__AVX512F__)
    struct Two { enum { ROWS = 2 * BLOCK }; };
    #define WS_WIDEST(LAYER) for (; j + 4 * VL <= even_; j += 4 * VL) LAYER(4)
  #else
    typedef One Two;
    #define WS_WIDEST(LAYER)
  #endif
#endif
"""

# tanh(x) = t / (t + 2) with t = e^{2x} - 1 = 2^n (e^r - 1) + (2^n - 1), |r| <= ln2 / 2: relative accuracy
# near 0, where controllers start. The series is cut where its remainder is below half a unit in the last
# place. The clamps let NaN through.
TANH = """
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

LAYER = """
  enum { WINDOW, UNITS, PITCH_WINDOW, PITCH_UNITS, FORWARD, BIAS, BACKWARD,
         INPUT, POSITIONS, HOP, SECTION, TABLE = 12 };
"""

FORWARD = """
  const real* P = params.data;
#if defined(__CUDA_ARCH__)
  real* rows = hidden.data + row0;
  for (int l = 0; l < layers; ++l) {
    const int* T = table.data + l * TABLE;
    const int units = T[UNITS], window = T[WINDOW];
    const int pitch_window = T[PITCH_WINDOW], pitch_units = T[PITCH_UNITS];
    const real* b = P + T[BIAS];
    const real* x = rows + T[INPUT];
    if (l == layers - 1) {
      real* u = controls.data + u0;
      for (int i = lane; i < BLOCK * units; i += lanes) {
        const int r = i / units, c = i % units;
        const real* w = P + T[BACKWARD] + c * pitch_window;
        real s = b[c];
        for (int k = 0; k < window; ++k) s += x[r * row + k] * w[k];
        if (r < worlds) u[r * units + c] = s;
      }
    } else {
      const real* wt = P + T[FORWARD];
      real* y = rows + T[INPUT] + T[SECTION];
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
    }
  }
#else
  const auto sum = [](auto v, const auto& halve) {
    if constexpr (sizeof(v) == sizeof(real)) return v;
    else return halve(v.lo + v.hi, halve);
  };
  // world0: the first of these worlds
  const auto pass = [&](auto size, int world0) {
    enum { ROWS = decltype(size)::ROWS };
    real* rows = hidden.data + row0 + (world0 > 0 ? BLOCK * row + gap : 0);
    const auto at_row = [&](int r) { return r * (wp::int64)row + (r < BLOCK ? 0 : gap); };
    // the rows of the next step are written for the first time: they come from memory
    int fetched = 0;
    const auto fetch = [&] {
      const int stop = fetched + FETCH < ROWS * row ? fetched + FETCH : ROWS * row;
      for (; fetched < stop; fetched += LINE)
        __builtin_prefetch(rows + BLOCK * row + fetched + (fetched < BLOCK * row ? 0 : gap), 1, 2);
    };
    for (int l = 0; l < layers; ++l) {
      const int* T = table.data + l * TABLE;
      const int units = T[UNITS], window = T[WINDOW];
      const int pitch_window = T[PITCH_WINDOW], pitch_units = T[PITCH_UNITS];
      const real* b = P + T[BIAS];
      const real* x = rows + T[INPUT];
      if (l == layers - 1) {
        // few outputs: dot products along the padded rows of W
        real* u = controls.data + u0 + world0 * units;
        const int present = worlds - world0 < ROWS ? worlds - world0 : ROWS;
        for (int c = 0; c < units; ++c) {
          const real* w = P + T[BACKWARD] + c * pitch_window;
          for (int r = 0; r < present; ++r) {
            vec s = (vec)(real(0));
            const real* x_r = x + at_row(r);
            for (int k = 0; k < pitch_window; k += VL) s = WS_FMA(WS_LOAD(x_r + k), WS_LOAD(w + k), s);
            u[r * units + c] = b[c] + sum(s, sum);
          }
        }
      } else {
        const real* wt = P + T[FORWARD];
        real* y = rows + T[INPUT] + T[SECTION];
        for (int i = 0; i < T[POSITIONS]; ++i) {
          const real* xb = x + i * T[HOP];
          real* yb = y + i * pitch_units;
          #define WS_LAYER(V) { \\
              fetch(); \\
              WS_ZERO(ROWS, V) \\
              if (V == 1) WS_NARROW_TILE(ROWS, xb, at_row, wt + j, pitch_units, window) \\
              else WS_TILE(ROWS, V, xb, at_row, 1, wt + j, pitch_units, window) \\
              WS_EACH(ROWS, V, const int at = j + v * VL; \\
                               WS_STORE(yb + at_row(r) + at, vtanh(acc[r][v] + WS_LOAD(b + at)));) }
          WS_COLUMNS(ROWS, pitch_units, WS_LAYER)
          #undef WS_LAYER
        }
        // the section may be longer than what is written: its end is read by padded windows
        const int* N = T + TABLE;
        for (int k = T[POSITIONS] * pitch_units; k < N[SECTION]; k += VL)
          for (int r = 0; r < ROWS; ++r) WS_STORE(y + at_row(r) + k, (vec)(real(0)));
      }
    }
  };
  if (worlds > BLOCK && (int)Two::ROWS > BLOCK) pass(Two(), 0);
  else for (int world = 0; world < worlds; world += BLOCK) pass(One(), world);
#endif
"""

# Cotangent of a_L in row r: for a unit cotangent of one control, or for those that the sweep has found.
UNIT_SEED = """
#if !defined(__CUDA_ARCH__)
  const int ahead = 1;
  typedef Two Tall;
  const real* wo = params.data + table.data[(layers - 1) * TABLE + BACKWARD]
    + component * table.data[(layers - 1) * TABLE + PITCH_WINDOW];
  const auto seed = [&](int r, int j) -> vec { return WS_LOAD(wo + j); };
#endif
"""
PULL_SEED = """
#if !defined(__CUDA_ARCH__)
  const int ahead = -1;
  typedef One Tall;  // one point at a time: no code for two
  const int* out = table.data + (layers - 1) * TABLE;
  const auto seed = [&](int r, int j) -> vec {
    vec s = (vec)(real(0));
    // rows without a world add nothing to the weight gradients
    if (r < worlds)
      for (int c = 0; c < out[UNITS]; ++c)
        s = WS_FMA((vec)(mu.data[mu0 + r * out[UNITS] + c]),
                   WS_LOAD(params.data + out[BACKWARD] + c * out[PITCH_WINDOW] + j), s);
    return s;
  };
#endif
"""

LINEARIZE = """
#if !defined(__CUDA_ARCH__)
  const real* P = params.data;
  const int* O = table.data + (layers - 1) * TABLE;
  const int x_section = table.data[SECTION];
  const auto pass = [&](auto size, int point) {
    enum { ROWS = decltype(size)::ROWS };
    const real* rows = hidden.data + row0 + point * (wp::int64)(BLOCK * row);
    real* ds = d.data + d0 + point * (wp::int64)(BLOCK * row_adj);
    const auto jac_row = [&](int r) { return jac.data + j0 + (point + r / BLOCK) * jt + r % BLOCK * jr; };
    const auto at_row = [&](int r) { return r * row_adj; };
    // the rows come from memory: those of the points that are next
    int fetched = 0;
    const auto fetch = [&] {
      const int stop = fetched + FETCH < ROWS * row ? fetched + FETCH : ROWS * row;
      for (; fetched < stop; fetched += LINE)
        __builtin_prefetch(rows + ahead * ROWS * row + fetched, 0, 2);
    };
    if (layers == 1) {
      // a linear policy has no hidden rows: its Jacobian is its matrix
      if (want_jac)
        for (int r = 0; r < ROWS; ++r)
          for (int j = 0; j < O[PITCH_WINDOW] && r % BLOCK < worlds; j += VL) {
            const vec y = seed(r, j);
            for (int q = 0; q < VL && j + q < O[WINDOW]; ++q) jac_row(r)[j + q] = y[q];
          }
      return;
    }
    for (int r = 0; r < ROWS; ++r) {
      const real* a = rows + r * row + O[INPUT];
      real* y = ds + r * row_adj + O[INPUT] - x_section;
      for (int j = 0; j < O[PITCH_WINDOW]; j += VL) {
        vec av = WS_LOAD(a + j);
        WS_STORE(y + j, seed(r, j) * (real(1) - av * av));
      }
    }
    // what a tile has found for the Jacobian, row after row
    real found[ROWS * 4 * VL];
    const auto add_jac = [&](int i, int left, int width, int many) {
      for (int r = 0; r < ROWS; ++r)
        for (int q = 0; q < (left < width ? left : width) && r % BLOCK < worlds; ++q)
          jac_row(r)[i + q] = many ? jac_row(r)[i + q] + found[r * width + q] : found[r * width + q];
    };
    for (int l = layers - 2; l >= (want_jac ? 0 : 1); --l) {
      const int* T = table.data + l * TABLE;
      const real* w = P + T[BACKWARD];
      const int units = T[UNITS], pitch_window = T[PITCH_WINDOW], many = T[POSITIONS] > 1;
      if (many && l > 0)
        for (int r = 0; r < ROWS; ++r)
          for (int j = 0; j < T[SECTION]; j += VL)
            WS_STORE(ds + r * row_adj + T[INPUT] - x_section + j, (vec)(real(0)));
      if (many && l == 0)
        for (int r = 0; r < ROWS; ++r)
          for (int i = 0; i < state_size && r % BLOCK < worlds; ++i) jac_row(r)[i] = real(0);
      for (int at = 0; at < T[POSITIONS]; ++at) {
        const real* x = ds + (T[INPUT] + T[SECTION] - x_section) + at * T[PITCH_UNITS];
        const real* a = rows + T[INPUT];
        real* y = ds + T[INPUT] - x_section + at * T[HOP];
        #define WS_LAYER(V) { \\
            fetch(); \\
            WS_ZERO(ROWS, V) \\
            if (V == 1) WS_NARROW_TILE(ROWS, x, at_row, w + j, pitch_window, units) \\
            else WS_TILE(ROWS, V, x, at_row, 1, w + j, pitch_window, units) \\
            if (l == 0) { \\
              WS_EACH(ROWS, V, WS_STORE(found + (r * V + v) * VL, acc[r][v]);) \\
              add_jac(at * T[HOP] + j, T[WINDOW] - j, V * VL, many); \\
            } else if (many) { \\
              WS_EACH(ROWS, V, real* p = y + r * row_adj + j + v * VL; \\
                               WS_STORE(p, WS_LOAD(p) + acc[r][v]);) \\
            } else { \\
              WS_EACH(ROWS, V, vec av = WS_LOAD(a + r * row + j + v * VL); \\
                         WS_STORE(y + r * row_adj + j + v * VL, acc[r][v] * (real(1) - av * av));) \\
            } }
        WS_COLUMNS(ROWS, pitch_window, WS_LAYER)
        #undef WS_LAYER
      }
      if (many && l > 0)
        for (int r = 0; r < ROWS; ++r)
          for (int j = 0; j < T[SECTION]; j += VL) {
            vec av = WS_LOAD(rows + r * row + T[INPUT] + j);
            real* p = ds + r * row_adj + T[INPUT] - x_section + j;
            WS_STORE(p, WS_LOAD(p) * (real(1) - av * av));
          }
    }
  };
  int point = 0;
  if ((int)Tall::ROWS > BLOCK) for (; point + 2 <= points; point += 2) pass(Tall(), point);
  for (; point < points; ++point) pass(One(), point);
#endif
"""

# Rows of one chunk stay in the nearest cache for all products of the chunk. The order of the sums depends on
# the chunk alone, never on threads.
WEIGHT_GRAD = """
#if !defined(__CUDA_ARCH__)
  const real* rows = hidden.data + row0;
  const real* ds = d.data + d0;
  const int x_section = table.data[SECTION];
  const int* O = table.data + (layers - 1) * TABLE;
  const int m = O[UNITS];
  // panels of VL columns, row after row
  real* sc = scratch.data;
  const auto at_row = [](int r) { return r; };
  // the rows of the next chunk come from a further cache
  int tiles = 0;
  for (int l = 0; l < layers - 1; ++l) {
    const int* T = table.data + l * TABLE;
    tiles += (T[UNITS] + WS_RO - 1) / WS_RO * (T[PITCH_WINDOW] / VL / 3 + 1);
  }
  const int regions = scaled ? fields : m;
  const int share = (nrows * (row + regions * row_adj) / LINE + tiles * fields) / (tiles * fields + 1);
  int region = 0, left = nrows * row;
  const real* next = rows + nrows * row;
  const auto fetch = [&] {
    for (int n = 0; n < share; ++n, next += LINE, left -= LINE) {
      if (left <= 0) {
        if (region == regions) return;
        left = nrows * row_adj;
        next = ds + region++ * d_component + left;
      }
      __builtin_prefetch(next, 0, 2);
    }
  };
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
      const auto scale = [&](auto strip, int at) {
        enum { V = decltype(strip)::VECTORS };
        real* gb = g + T[BIAS] + at % pitch_units;
        vec s[V];
        _Pragma("unroll") for (int v = 0; v < V; ++v) s[v] = WS_LOAD(gb + v * VL);
        for (int r = 0; r < nrows; ++r)
          _Pragma("unroll") for (int v = 0; v < V; ++v) {
            const real* d_r = ds + r * row_adj + column + at + v * VL;
            vec y = (vec)(real(0));
            if (scaled)
              y = WS_LOAD(d_r + f * d_component);
            else
              for (int c = 0; c < m; ++c)
                y = WS_FMA((vec)(mu_f[r * m + c]), WS_LOAD(d_r + c * d_component), y);
            WS_STORE(sc + (at + v * VL) * nrows + r * VL, y);
            s[v] += y;
          }
        _Pragma("unroll") for (int v = 0; v < V; ++v) WS_STORE(gb + v * VL, s[v]);
      };
      // strips, because a row is further from the next than the hardware looks ahead
      struct Strip { enum { VECTORS = 4 }; };
      struct Single { enum { VECTORS = 1 }; };
      for (int at = 0; at < width;)
        if (at % pitch_units + 4 * VL <= pitch_units) { scale(Strip(), at); at += 4 * VL; }
        else { scale(Single(), at); at += VL; }
      const real* a = rows + T[INPUT];
      // the columns of a tile, of all rows, stay in the nearest cache for all units
      int j = 0;
      #define WS_LAYER(V) \\
        for (; j + V * VL <= pitch_window; j += V * VL) \\
          for (int o = 0; o < units; o += WS_RO) { \\
            fetch(); \\
            WS_ZERO(WS_RO, V) \\
            for (int at = 0; at < T[POSITIONS]; ++at) \\
              WS_TILE(WS_RO, V, sc + (at * pitch_units + o - o % VL) * nrows + o % VL, at_row, VL, \\
                      a + at * T[HOP] + j, row, nrows) \\
            WS_EACH(WS_RO, V, real* p = g + T[BACKWARD] + (o + r) * pitch_window + j + v * VL; \\
                              WS_STORE(p, WS_LOAD(p) + acc[r][v]);) }
      WS_LAYER(3)
      WS_LAYER(2)
      WS_LAYER(1)
      #undef WS_LAYER
    }
  }
#endif
"""


def fill(text: str, dtype: Any) -> str:
    """Native text for `dtype`, with its constants."""
    single = dtype == wp.float32
    # sum_{k >= 2} r^(k-2) / k!, highest power first
    last = 7 if single else 14
    factorial = [1.0]
    for k in range(1, last + 1):
        factorial.append(factorial[-1] * k)
    series = "\n    ".join(
        f"q = WS_FMA(q, r, (vec)(real({1.0 / factorial[k]!r})));" for k in range(last - 1, 1, -1)
    )
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

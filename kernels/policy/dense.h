// Native text of the dense layers: what the device functions of dense.py do.
//
// On a CPU every layer runs through register tiles: BLOCK rows times up to four vectors of units, or with
// AVX-512 twice as many rows times up to three, one fused multiply-add per vector and k. That is 24 accumulators
// for 11 loads, so that the multiply-add units, not the loads, are the bound: of what these can do on one core
// the forward sweep reaches five sixths with 256 units a layer, and half with 100, whose padding, tanh and
// physics weigh more. What the next step needs from memory is asked for behind every tile, a little at a time:
// all at once it would hold up what follows. On a GPU the threads of a block share the units of a layer, and the
// rows of the block stay in registers.
//
// unit_seed: Cotangent of a_L in row r: for a unit cotangent of one control, or for those that the sweep has
// found.
// weight_grad: Rows of one chunk stay in the nearest cache for all products of the chunk. The order of the
// sums depends on the chunk alone, never on threads.

//: layer
  enum { WINDOW, UNITS, PITCH_WINDOW, PITCH_UNITS, FORWARD, BIAS, BACKWARD,
         INPUT, POSITIONS, HOP, SECTION, TABLE = 12 };
//: forward
  const real* P = params.data;
  #define WS_LAYER_OF(l) \
    const int* T = table.data + (l) * TABLE; \
    const int units = T[UNITS], window = T[WINDOW]; \
    const int pitch_window = T[PITCH_WINDOW], pitch_units = T[PITCH_UNITS]; \
    const real* b = P + T[BIAS]; \
    const real* x = rows + T[INPUT];
#if defined(__CUDA_ARCH__)
  real* rows = hidden.data + row0;
  for (int l = 0; l < layers; ++l) {
    WS_LAYER_OF(l)
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
      WS_LAYER_OF(l)
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
          #define WS_LAYER(V) { \
              fetch(); \
              WS_ZERO(ROWS, V) \
              if (V == 1) WS_NARROW_TILE(ROWS, xb, at_row, wt + j, pitch_units, window) \
              else WS_TILE(ROWS, V, xb, at_row, 1, wt + j, pitch_units, window) \
              WS_EACH(ROWS, V, const int at = j + v * VL; \
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
  #undef WS_LAYER_OF
//: unit_seed
#if !defined(__CUDA_ARCH__)
  const int ahead = 1;
  typedef Two Tall;
  const real* wo = params.data + table.data[(layers - 1) * TABLE + BACKWARD]
    + component * table.data[(layers - 1) * TABLE + PITCH_WINDOW];
  const auto seed = [&](int r, int j) -> vec { return WS_LOAD(wo + j); };
#endif
//: pull_seed
#if !defined(__CUDA_ARCH__)
  const int ahead = -1;
  typedef One Tall;  // one point at a time: no code for two
  const int points = 1;
  const wp::int64 jt = 0;
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
//: linearize
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
        #define WS_LAYER(V) { \
            fetch(); \
            WS_ZERO(ROWS, V) \
            if (V == 1) WS_NARROW_TILE(ROWS, x, at_row, w + j, pitch_window, units) \
            else WS_TILE(ROWS, V, x, at_row, 1, w + j, pitch_window, units) \
            if (l == 0) { \
              WS_EACH(ROWS, V, WS_STORE(found + (r * V + v) * VL, acc[r][v]);) \
              add_jac(at * T[HOP] + j, T[WINDOW] - j, V * VL, many); \
            } else if (many) { \
              WS_EACH(ROWS, V, real* p = y + r * row_adj + j + v * VL; \
                               WS_STORE(p, WS_LOAD(p) + acc[r][v]);) \
            } else { \
              WS_EACH(ROWS, V, vec av = WS_LOAD(a + r * row + j + v * VL); \
                         WS_STORE(y + r * row_adj + j + v * VL, acc[r][v] * (real(1) - av * av));) \
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
//: weight_grad
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
      #define WS_LAYER(V) \
        for (; j + V * VL <= pitch_window; j += V * VL) \
          for (int o = 0; o < units; o += WS_RO) { \
            fetch(); \
            WS_ZERO(WS_RO, V) \
            for (int at = 0; at < T[POSITIONS]; ++at) \
              WS_TILE(WS_RO, V, sc + (at * pitch_units + o - o % VL) * nrows + o % VL, at_row, VL, \
                      a + at * T[HOP] + j, row, nrows) \
            WS_EACH(WS_RO, V, real* p = g + T[BACKWARD] + (o + r) * pitch_window + j + v * VL; \
                              WS_STORE(p, WS_LOAD(p) + acc[r][v]);) }
      WS_LAYER(3)
      WS_LAYER(2)
      WS_LAYER(1)
      #undef WS_LAYER
    }
  }
#endif

// The backward pass of a fused policy: what `network_linearize`, `network_pull` and `network_weight_grad` of functions.py
// do, on CPUs. A GPU takes the products of bridge/passes/operations.py.
//
// unit_seed, pull_seed: cotangent of control c in row r: 1 for one of the controls, or those that the sweep has found.
// linearize: operations from the last to the first; an activation goes along with the product behind it.
// weight_grad: rows of one chunk stay in the nearest cache for all products of the chunk. The order of the sums depends
// on the chunk alone, never on threads.

//: unit_seed
#if !defined(__CUDA_ARCH__)
  const int ahead = 1;
  typedef Two Tall;
  const auto seed = [&](int r, int c) -> real { return c == component ? real(1) : real(0); };
#endif
//: pull_seed
#if !defined(__CUDA_ARCH__)
  const int ahead = -1;
  typedef One Tall;  // one point at a time: no code for two
  const int points = 1;
  const wp::int64 jt = 0;
  // rows without a world add nothing to the weight gradients
  const auto seed = [&](int r, int c) -> real {
    return r < worlds ? mu.data[mu0 + r * table.data[CONTROLS] + c] : real(0);
  };
#endif
//: linearize
#if !defined(__CUDA_ARCH__)
  const real* P = params.data;
  const int controls_of = table.data[CONTROLS];
  // a normalisation takes the scale behind it along, where the cotangent between them is nobody else's
  const auto takes_last = [](const int* T) {
    return T[KIND] == AFFINE && !T[ADDS] && T[KIND - TABLE] == NORMALIZE && T[INPUT] == T[OUTPUT - TABLE];
  };
  // everything but a product, of some rows
  const auto elementwise = [&](const int* T, const real* rows, real* ds, int count,
                               bool both) __attribute__((noinline)) {
    const int units = T[UNITS], pitch = T[PITCH_UNITS];
    const real* d_out = ds + T[ADJ_OUTPUT];
    real* d_in = ds + T[ADJ_INPUT];
    const bool adds = T[ADDS] & 1;  // read once: what a vector is stored to might be anything
    const vec p = (vec)(P[T[NUMBERS]]), q = (vec)(P[T[NUMBERS] + 1]);
    // of the value that is named, an input x or an output y
    #define WS_PULL(NAME, V) { \
        const real* from = rows + (#NAME[0] == 'x' ? T[INPUT] : T[OUTPUT]); \
        for (int r = 0; r < count; ++r) { \
          const real *at_ = from + r * row, *d_ = d_out + r * row_adj; \
          real* to_ = d_in + r * row_adj; \
          for (int j = 0; j < pitch; j += VL) { \
            const vec NAME = WS_LOAD(at_ + j); \
            const vec d = WS_LOAD(d_ + j) * (V); \
            WS_STORE(to_ + j, adds ? WS_LOAD(to_ + j) + d : d); } } \
        break; }
    switch (T[KIND]) {
      case CLEAR:
        for (int r = 0; r < count; ++r)
          for (int j = 0; j < pitch; j += VL) WS_STORE(ds + r * row_adj + T[ADJ_OUTPUT] + j, (vec)(real(0)));
        break;
      case NORMALIZE:
        // d_x = factor (d_y - mean d_y - y mean(d_y y)), the first mean where it is centered; paddings of d_y are 0
        for (int r = 0; r < count; ++r) {
          const real* y_r = rows + r * row + T[OUTPUT];
          const int* next = both ? T + TABLE : T;
          const real* d_r = ds + r * row_adj + next[ADJ_OUTPUT];
          const real* scale = P + next[BACKWARD];
          const auto given = [&](int j) -> vec {
            return both ? WS_LOAD(d_r + j) * WS_LOAD(scale + j) : WS_LOAD(d_r + j);
          };
          vec s = (vec)(real(0)), sy = (vec)(real(0));
          for (int j = 0; j < pitch; j += VL) {
            const vec d = given(j);
            s += d;
            sy = WS_FMA(d, WS_LOAD(y_r + j), sy);
          }
          const real mean = T[CENTERED] ? sum_of(s, sum_of) / real(units) : real(0);
          const real mean_y = sum_of(sy, sum_of) / real(units), factor = rows[r * row + T[SECOND]];
          for (int j = 0; j < pitch; j += VL) {
            vec d = (given(j) - mean - WS_LOAD(y_r + j) * mean_y) * factor;
            real* to = d_in + r * row_adj + j;
            if (T[ADDS] & 1) d += WS_LOAD(to);
            WS_STORE(to, d);
          }
          // paddings of what is handed on are zero again
          for (int j = units; j < pitch; ++j) d_in[r * row_adj + j] = real(0);
        }
        break;
      case AFFINE: WS_PULL(x, WS_LOAD(P + T[BACKWARD] + j))
      case ADD:
        for (int r = 0; r < count; ++r)
          for (int j = 0; j < pitch; j += VL) {
            const vec d = WS_LOAD(d_out + r * row_adj + j);
            real* second = ds + r * row_adj + T[ADJ_SECOND] + j;
            real* to = d_in + r * row_adj + j;
            if (T[ADJ_INPUT] != T[ADJ_OUTPUT]) WS_STORE(to, T[ADDS] & 1 ? WS_LOAD(to) + d : d);
            WS_STORE(second, T[ADDS] & 2 ? WS_LOAD(second) + d : d);
          }
        break;
      case COPY:
        for (int r = 0; r < count; ++r) {
          for (int j = 0; j < units; ++j) {
            const real d = d_out[r * row_adj + j];
            real* to = d_in + r * row_adj + j;
            *to = T[ADDS] & 1 ? *to + d : d;
          }
          for (int j = 0; j < T[ADJ_FILL]; ++j) d_in[r * row_adj + units + j] = real(0);
        }
        break;
      case GATHER: {
        const int* place = table.data + T[SECOND];
        for (int r = 0; r < count; ++r)
          for (int j = 0; j < units; ++j)
            if (place[j] >= 0) d_in[r * row_adj + place[j]] += d_out[r * row_adj + j];
        break;
      }
      default: WS_SLOPES
    }
    #undef WS_PULL
  };
  const auto pass = [&](auto size, int point) {
    enum { ROWS = decltype(size)::ROWS };
    const real* rows = hidden.data + row0 + point * (wp::int64)(BLOCK * row);
    real* ds = d.data + d0 + point * (wp::int64)(BLOCK * row_adj);
    const auto at_row = [&](int r) { return r * row_adj; };
    // the rows come from memory: those of the points that are next
    int fetched = 0;
    const auto fetch = [&] {
      const int stop = fetched + FETCH < ROWS * row ? fetched + FETCH : ROWS * row;
      for (; fetched < stop; fetched += LINE)
        __builtin_prefetch(rows + ahead * ROWS * row + fetched, 0, 2);
    };
    for (int r = 0; r < ROWS; ++r) {
      real* y = ds + r * row_adj + table.data[ADJ_RESULT];
      for (int c = 0; c < controls_of; ++c) y[c] = seed(r % BLOCK, c);
      for (int c = controls_of; c < (controls_of + LINE - 1) / LINE * LINE; ++c) y[c] = real(0);
    }
    for (int l = operations - 1; l >= 0; --l) {
      const int* T = table.data + l * TABLE;
      if (!want_jac && !T[INNER]) continue;
      if (T[KIND] != LINEAR) {
        const bool both = l > 0 && takes_last(T);
        fetch();
        elementwise(both ? T - TABLE : T, rows, ds, ROWS, both);
        l -= both;
        continue;
      }
      const int units = T[UNITS], pitch_window = T[PITCH_WINDOW], adds = T[ADDS] & 1, slopes = T[SECOND];
      const real* w = P + T[BACKWARD];
      const real* x = ds + T[ADJ_OUTPUT];
      real* y = ds + T[ADJ_INPUT];
      // an activation whose slope is read off its output goes along, before its cotangent is stored
      const real* a = rows + T[INPUT];
      const real* S = P + T[NUMBERS];
      const auto slope = [&](vec y_) -> vec {
        if (slopes == 1) return real(1) - y_ * y_;
        return y_ > real(0) ? (vec)(real(1)) : WS_FMA((vec)(S[0]), y_, (vec)(S[1]));
      };
      #define WS_LAYER(V) { \
          fetch(); \
          WS_ZERO(ROWS, V) \
          if (V == 1 && units > FEW) WS_NARROW_TILE(ROWS, x, at_row, w + j, pitch_window, units) \
          else WS_TILE(ROWS, V, x, at_row, 1, w + j, pitch_window, units) \
          if (slopes) \
            WS_EACH(ROWS, V, const int at = j + v * VL; \
                             WS_STORE(y + r * row_adj + at, acc[r][v] * slope(WS_LOAD(a + r * row + at)));) \
          else \
            WS_EACH(ROWS, V, real* to = y + r * row_adj + j + v * VL; \
                             WS_STORE(to, adds ? WS_LOAD(to) + acc[r][v] : acc[r][v]);) }
      for (int i = 0; i < T[POSITIONS]; ++i, x += T[STEP], y += T[HOP]) {
        WS_COLUMNS(ROWS, pitch_window, WS_LAYER)
      }
      #undef WS_LAYER
      l -= slopes != 0;
    }
    if (want_jac)
      for (int r = 0; r < ROWS; ++r)
        if (r % BLOCK < worlds)
          __builtin_memcpy(jac.data + j0 + (point + r / BLOCK) * jt + r % BLOCK * jr,
                           ds + r * row_adj + table.data[ADJ_STATE], state_size * sizeof(real));
  };
  int point = 0;
  if ((int)Tall::ROWS > BLOCK) for (; point + 2 <= points; point += 2) pass(Tall(), point);
  for (; point < points; ++point) pass(One(), point);
#endif
//: weight_grad
#if !defined(__CUDA_ARCH__)
  const real* rows = hidden.data + row0;
  const real* ds = d.data + d0;
  const int m = table.data[CONTROLS];
  // panels of VL columns, row after row
  real* sc = scratch.data;
  const auto at_row = [](int r) { return r; };
  // the rows of the next chunk come from a further cache
  int tiles = 0;
  for (int l = 0; l < operations; ++l) {
    const int* T = table.data + l * TABLE;
    if (T[KIND] == LINEAR) tiles += (T[UNITS] + WS_RO - 1) / WS_RO * (T[PITCH_WINDOW] / VL / 3 + 1);
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
  // strips of columns, because a row is further from the next than the hardware looks ahead
  struct Strip { enum { VECTORS = 4 }; };
  struct Single { enum { VECTORS = 1 }; };
  const auto in_strips = [](int pitch, const auto& take) {
    for (int at = 0; at < pitch;)
      if (at + 4 * VL <= pitch) { take(Strip(), at); at += 4 * VL; }
      else { take(Single(), at); at += VL; }
  };
  for (int f = 0; f < fields; ++f) {
    const real* mu_f = mu.data + f * mu_field;
    real* g = grads.data + g0 + f * g_field;
    // cotangent of this field: unit rows times the control cotangents
    const auto cotangent = [&](int r, int column) -> vec {
      const real* d_r = ds + r * row_adj + column;
      if (scaled) return WS_LOAD(d_r + f * d_component);
      vec y = (vec)(real(0));
      for (int c = 0; c < m; ++c) y = WS_FMA((vec)(mu_f[r * m + c]), WS_LOAD(d_r + c * d_component), y);
      return y;
    };
    for (int l = 0; l < operations; ++l) {
      const int* T = table.data + l * TABLE;
      const int units = T[UNITS], pitch_window = T[PITCH_WINDOW], pitch_units = T[PITCH_UNITS];
      const int column = T[ADJ_OUTPUT];
      const real* a = rows + T[INPUT];
      if (T[KIND] == AFFINE && T[TRAINED]) {
        const auto sums = [&](auto strip, int at) {
          enum { V = decltype(strip)::VECTORS };
          vec scale[V], shift[V];
          _Pragma("unroll") for (int v = 0; v < V; ++v) scale[v] = shift[v] = (vec)(real(0));
          for (int r = 0; r < nrows; ++r)
            _Pragma("unroll") for (int v = 0; v < V; ++v) {
              const vec y = cotangent(r, column + at + v * VL);
              scale[v] = WS_FMA(y, WS_LOAD(a + r * row + at + v * VL), scale[v]);
              shift[v] += y;
            }
          _Pragma("unroll") for (int v = 0; v < V; ++v) {
            const int j = at + v * VL;
            if (T[TRAINED] & 1) WS_STORE(g + T[BACKWARD] + j, WS_LOAD(g + T[BACKWARD] + j) + scale[v]);
            if (T[TRAINED] & 2) WS_STORE(g + T[BIAS] + j, WS_LOAD(g + T[BIAS] + j) + shift[v]);
          }
        };
        in_strips(pitch_units, sums);
      }
      if (T[KIND] != LINEAR) continue;
      // the bias takes the sum of the cotangents
      const int positions = T[POSITIONS];
      const bool few = units <= FEW && positions == 1;
      int position = 0;
      const auto scale = [&](auto strip, int at) {
        enum { V = decltype(strip)::VECTORS };
        real* gb = g + T[BIAS] + at;
        const int d_column = column + position * T[STEP], panel = position * pitch_units;
        vec s[V];
        _Pragma("unroll") for (int v = 0; v < V; ++v) s[v] = few ? (vec)(real(0)) : WS_LOAD(gb + v * VL);
        for (int r = 0; r < nrows; ++r)
          _Pragma("unroll") for (int v = 0; v < V; ++v) {
            const vec y = cotangent(r, d_column + at + v * VL);
            WS_STORE(sc + (panel + at + v * VL) * nrows + r * VL, y);
            s[v] += y;
          }
        _Pragma("unroll") for (int v = 0; v < V; ++v) WS_STORE(gb + v * VL, few ? WS_LOAD(gb + v * VL) + s[v] : s[v]);
      };
      for (; position < positions; ++position) in_strips(pitch_units, scale);
      if (few) {
        for (int c = 0; c < units; ++c)
          for (int j = 0; j < pitch_window; j += VL) {
            real* to = g + T[BACKWARD] + c * pitch_window + j;
            vec s0 = WS_LOAD(to), s1 = (vec)(real(0));
            for (int r = 0; r < nrows; r += 2) {
              s0 = WS_FMA((vec)(sc[r * VL + c]), WS_LOAD(a + r * row + j), s0);
              s1 = WS_FMA((vec)(sc[(r + 1) * VL + c]), WS_LOAD(a + (r + 1) * row + j), s1);
            }
            WS_STORE(to, s0 + s1);
          }
        continue;
      }
      // the columns of a tile, of all rows, stay in the nearest cache for all units
      int j = 0;
      #define WS_LAYER(V) \
        for (; j + V * VL <= pitch_window; j += V * VL) \
          for (int o = 0; o < units; o += WS_RO) { \
            fetch(); \
            WS_ZERO(WS_RO, V) \
            for (int i = 0; i < positions; ++i) \
              WS_TILE(WS_RO, V, sc + (i * pitch_units + o - o % VL) * nrows + o % VL, at_row, VL, \
                      a + i * T[HOP] + j, row, nrows) \
            WS_EACH(WS_RO, V, real* to = g + T[BACKWARD] + (o + r) * pitch_window + j + v * VL; \
                              WS_STORE(to, WS_LOAD(to) + acc[r][v]);) }
      WS_LAYER(3)
      WS_LAYER(2)
      WS_LAYER(1)
      #undef WS_LAYER
    }
  }
#endif

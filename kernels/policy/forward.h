// The forward pass of a fused policy, operation after operation of the table (table.py, Column): what
// `network_forward` of functions.py does.
//
// On a CPU products go through register tiles: BLOCK rows times up to four vectors of units, or with AVX-512 twice as
// many rows times up to three, one fused multiply-add per vector and k. That is 24 accumulators for 11 loads, so that
// the multiply-add units, not the loads, are the bound. Each tile prefetches part of the next step: all of it at once
// would hold up what follows. An activation goes along with the product before it. Everything else is elementwise or
// along a row, a pass of its own over rows that are in the nearest cache. On a GPU the threads of a block share the
// units of an operation, and what they add up for the rows of the block stays in registers.

//: table
  enum { WINDOW, UNITS, PITCH_WINDOW, PITCH_UNITS, FORWARD, BIAS, BACKWARD, INPUT, POSITIONS, HOP, SECTION,
         KIND, OUTPUT, SECOND, ADJ_INPUT, ADJ_OUTPUT, ADJ_SECOND, ADDS, NUMBERS, FILL, ADJ_FILL, TRAINED, INNER,
         CENTERED, STEP, RESULT, ADJ_RESULT, ADJ_STATE, CONTROLS, TABLE = 29 };
  enum { CLEAR, LINEAR, NORMALIZE, AFFINE, ADD, COPY, GATHER, ACTIVATION = 16 };
  enum { FEW = 4 };  // units of a linear operation that are no tile of their own
//: forward
  const real* P = params.data;
  const int last = table.data[RESULT], controls_of = table.data[CONTROLS];
#if defined(__CUDA_ARCH__)
  real* rows = hidden.data + row0;
  // one component of the block's rows
  const auto activate = [&](const int* T, real* values) {
    const vec p = P[T[NUMBERS]], q = P[T[NUMBERS] + 1];
    #define WS_MAP(V) { \
        _Pragma("unroll") for (int r = 0; r < BLOCK; ++r) { const vec x = values[r]; values[r] = (V); } \
        break; }
    WS_VALUES
    #undef WS_MAP
  };
  for (int l = 0; l < operations; ++l) {
    const int* T = table.data + l * TABLE;
    const int units = T[UNITS], pitch = T[PITCH_UNITS];
    const real* from = rows + T[INPUT];
    real* to = rows + T[OUTPUT];
    const auto store = [&](int column, const real* values) {
      _Pragma("unroll") for (int r = 0; r < BLOCK; ++r) rows[r * row + column] = values[r];
    };
    if (T[KIND] == CLEAR) continue;
    if (T[KIND] == LINEAR) {
      const real* wt = P + T[FORWARD];
      const real* b = P + T[BIAS];
      const int step = T[STEP], width = T[POSITIONS] * step;
      const bool activates = l + 1 < operations && T[TABLE + KIND] >= ACTIVATION && T[TABLE + INPUT] == T[OUTPUT];
      for (int at = lane; at < width; at += lanes) {
        const int j = at % step;
        const real* x = from + at / step * T[HOP];
        real acc[BLOCK];
        #pragma unroll
        for (int r = 0; r < BLOCK; ++r) acc[r] = b[j];
        for (int k = 0; k < T[WINDOW]; ++k) {
          const real w = wt[k * pitch + j];
          #pragma unroll
          for (int r = 0; r < BLOCK; ++r) acc[r] += x[r * row + k] * w;
        }
        store(T[OUTPUT] + at, acc);
        if (activates) {
          activate(T + TABLE, acc);
          store(T[TABLE + OUTPUT] + at, acc);
        }
      }
      for (int at = lane; at < BLOCK * T[FILL]; at += lanes) {
        const int place = at / T[FILL] * row + width + at % T[FILL];
        to[place] = real(0);
        if (activates) rows[place + T[TABLE + OUTPUT]] = real(0);
      }
      l += activates;
    } else if (T[KIND] == NORMALIZE) {
      // a warp a row
      for (int r = lane / 32; r < BLOCK; r += lanes / 32) {
        const real* x = from + r * row;
        const auto mean = [&](real sum) {
          #pragma unroll
          for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
          return sum / real(units);
        };
        real sum = real(0);
        if (T[CENTERED])
          for (int j = lane % 32; j < units; j += 32) sum += x[j];
        const real center = mean(sum);
        sum = real(0);
        for (int j = lane % 32; j < units; j += 32) sum += (x[j] - center) * (x[j] - center);
        const real factor = real(1) / sqrt(mean(sum) + P[T[NUMBERS]]);
        for (int j = lane % 32; j < pitch; j += 32) to[r * row + j] = j < units ? (x[j] - center) * factor : real(0);
        for (int j = lane % 32; j < 64 / (int)sizeof(real); j += 32) rows[r * row + T[SECOND] + j] = j ? real(0) : factor;
      }
    } else if (T[KIND] == COPY) {
      for (int at = lane; at < BLOCK * (units + T[FILL]); at += lanes) {
        const int r = at / (units + T[FILL]), j = at % (units + T[FILL]);
        to[r * row + j] = j < units ? from[r * row + j] : real(0);
      }
    } else if (T[KIND] == GATHER) {
      const int* place = table.data + T[SECOND];
      for (int at = lane; at < BLOCK * pitch; at += lanes) {
        const int r = at / pitch, j = at % pitch;
        to[r * row + j] = j < units && place[j] >= 0 ? from[r * row + place[j]] : real(0);
      }
    } else {
      const real* second = rows + T[SECOND];
      const real* scale = P + T[BACKWARD];
      const real* shift = P + T[BIAS];
      for (int j = lane; j < pitch; j += lanes) {
        real values[BLOCK];
        _Pragma("unroll") for (int r = 0; r < BLOCK; ++r) {
          const real x = from[r * row + j];
          values[r] = T[KIND] == AFFINE ? x * scale[j] + shift[j] : T[KIND] == ADD ? x + second[r * row + j] : x;
        }
        if (T[KIND] >= ACTIVATION) activate(T, values);
        store(T[OUTPUT] + j, values);
      }
    }
    WS_SYNC();
  }
  for (int at = lane; at < BLOCK * controls_of; at += lanes) {
    const int r = at / controls_of, c = at % controls_of;
    if (r < worlds) controls.data[u0 + at] = rows[r * row + last + c];
  }
#else
  vec place_in_vector;
  for (int i = 0; i < VL; ++i) place_in_vector[i] = real(i);
  // everything but a product, of some rows; a normalisation takes the scale and shift behind it along
  const auto at_row = [&](int r) { return r * (wp::int64)row + (r < BLOCK ? 0 : gap); };
  const auto takes_next = [](const int* T) {
    return T[KIND] == NORMALIZE && T[TABLE + KIND] == AFFINE && T[TABLE + INPUT] == T[OUTPUT];
  };
  // an activation can be of some columns
  const auto elementwise = [&](const int* T, real* rows, int count, bool both, int first,
                               int end) __attribute__((noinline)) {
    const int units = T[UNITS], pitch = T[PITCH_UNITS];
    const real* from = rows + T[INPUT];
    real* to = rows + T[OUTPUT];
    const vec p = (vec)(P[T[NUMBERS]]), q = (vec)(P[T[NUMBERS] + 1]);
    // read once: what a vector is stored to might be anything
    const auto at_row = [row = (wp::int64)row, gap = gap](int r) { return r * row + (r < BLOCK ? 0 : gap); };
    #define WS_MAP(V) { \
        for (int r = 0; r < count; ++r) \
          for (int j = first; j < end; j += VL) { \
            const vec x = WS_LOAD(from + at_row(r) + j); \
            WS_STORE(to + at_row(r) + j, (V)); } \
        break; }
    switch (T[KIND]) {
      case CLEAR: break;
      case NORMALIZE:
        for (int r = 0; r < count; ++r) {
          const real* x = from + at_row(r);
          real* y = to + at_row(r);
          const int* next = both ? T + TABLE : T;
          real* z = rows + at_row(r) + next[OUTPUT];
          const real* scale = P + next[BACKWARD];
          const real* shift = P + next[BIAS];
          const auto put = [&](int j, vec v) {
            WS_STORE(y + j, v);
            if (both) WS_STORE(z + j, WS_FMA(v, WS_LOAD(scale + j), WS_LOAD(shift + j)));
          };
          // paddings are zero
          const int whole = units / VL * VL;
          const auto tail = [&](int j) {
            return place_in_vector < (vec)(real(units - j)) ? (vec)(real(1)) : (vec)(real(0));
          };
          real center = real(0);
          if (T[CENTERED]) {
            vec s = (vec)(real(0));
            for (int j = 0; j < whole; j += VL) s += WS_LOAD(x + j);
            if (whole < units) s += WS_LOAD(x + whole) * tail(whole);
            center = sum_of(s, sum_of) / real(units);
          }
          vec s = (vec)(real(0));
          for (int j = 0; j < whole; j += VL) { const vec v = WS_LOAD(x + j) - center; s = WS_FMA(v, v, s); }
          if (whole < units) { const vec v = (WS_LOAD(x + whole) - center) * tail(whole); s = WS_FMA(v, v, s); }
          const real factor = real(1) / wp::sqrt(sum_of(s, sum_of) / real(units) + p[0]);
          for (int j = 0; j < whole; j += VL) put(j, (WS_LOAD(x + j) - center) * factor);
          for (int j = whole; j < pitch; j += VL) put(j, (WS_LOAD(x + j) - center) * factor * tail(j));
          for (int j = 0; j < LINE; ++j) rows[at_row(r) + T[SECOND] + j] = j ? real(0) : factor;
        }
        break;
      case AFFINE: WS_MAP(WS_FMA(x, WS_LOAD(P + T[BACKWARD] + j), WS_LOAD(P + T[BIAS] + j)))
      case ADD: WS_MAP(x + WS_LOAD(rows + at_row(r) + T[SECOND] + j))
      case COPY:
        for (int r = 0; r < count; ++r) {
          for (int j = 0; j < units; ++j) to[at_row(r) + j] = from[at_row(r) + j];
          for (int j = 0; j < T[FILL]; ++j) to[at_row(r) + units + j] = real(0);
        }
        break;
      case GATHER: {
        const int* place = table.data + T[SECOND];
        for (int r = 0; r < count; ++r) {
          for (int j = 0; j < units; ++j) to[at_row(r) + j] = place[j] < 0 ? real(0) : from[at_row(r) + place[j]];
          for (int j = 0; j < T[FILL]; ++j) to[at_row(r) + units + j] = real(0);
        }
        break;
      }
      default: WS_VALUES
    }
    #undef WS_MAP
  };
  // world0: the first of these worlds
  const auto pass = [&](auto size, int world0) {
    enum { ROWS = decltype(size)::ROWS };
    real* rows = hidden.data + row0 + (world0 > 0 ? BLOCK * row + gap : 0);
    // the rows of the next step are written for the first time: they come from memory
    int fetched = 0;
    const auto fetch = [&] {
      const int stop = fetched + FETCH < ROWS * row ? fetched + FETCH : ROWS * row;
      for (; fetched < stop; fetched += LINE)
        __builtin_prefetch(rows + BLOCK * row + fetched + (fetched < BLOCK * row ? 0 : gap), 1, 2);
    };
    for (int l = 0; l < operations; ++l) {
      const int* T = table.data + l * TABLE;
      if (T[KIND] != LINEAR) {
        const bool both = l + 1 < operations && takes_next(T);
        fetch();
        elementwise(T, rows, ROWS, both, 0, T[PITCH_UNITS]);
        l += both;
        continue;
      }
      const int units = T[UNITS], window = T[WINDOW], pitch_window = T[PITCH_WINDOW], pitch_units = T[PITCH_UNITS];
      const real* x = rows + T[INPUT];
      const real* b = P + T[BIAS];
      real* y = rows + T[OUTPUT];
      const int positions = T[POSITIONS], step = T[STEP];
      if (units <= FEW && positions == 1) {
        for (int r = 0; r < ROWS; ++r) {
          const real* x_r = x + at_row(r);
          real* y_r = y + at_row(r);
          for (int j = 0; j < pitch_units; j += VL) WS_STORE(y_r + j, (vec)(real(0)));
          for (int c = 0; c < units; ++c) {
            const real* w = P + T[BACKWARD] + c * pitch_window;
            vec s = (vec)(real(0));
            for (int k = 0; k < pitch_window; k += VL) s = WS_FMA(WS_LOAD(x_r + k), WS_LOAD(w + k), s);
            y_r[c] = b[c] + sum_of(s, sum_of);
          }
        }
        continue;
      }
      // an activation behind it goes along: its columns are still in the nearest cache
      const bool activates = (positions == 1 || step == pitch_units) && l + 1 < operations
        && T[TABLE + KIND] >= ACTIVATION && T[TABLE + INPUT] == T[OUTPUT];
      const real* wt = P + T[FORWARD];
      #define WS_LAYER(V) { \
          fetch(); \
          WS_ZERO(ROWS, V) \
          if (V == 1) WS_NARROW_TILE(ROWS, x, at_row, wt + j, pitch_units, window) \
          else WS_TILE(ROWS, V, x, at_row, 1, wt + j, pitch_units, window) \
          if (j + V * VL <= room) \
            WS_EACH(ROWS, V, const int at = j + v * VL; \
                             WS_STORE(y + at_row(r) + at, acc[r][v] + WS_LOAD(b + at));) \
          else \
            WS_EACH(ROWS, V, const int at = j + v * VL; \
                             const vec found = acc[r][v] + WS_LOAD(b + at); \
                             for (int q = 0; q < VL && at + q < room; ++q) y[at_row(r) + at + q] = found[q];) \
          if (activates) elementwise(T + TABLE, rows, ROWS, false, i * step + j, i * step + j + V * VL); }
      // what a position writes beyond its units, the next one overwrites; the last stays in its section
      for (int i = 0, room = positions * step + T[FILL]; i < positions; ++i, x += T[HOP], y += step, room -= step) {
        WS_COLUMNS(ROWS, pitch_units, WS_LAYER)
      }
      #undef WS_LAYER
      l += activates;
      if (positions > 1)
        for (int r = 0; r < ROWS; ++r)
          for (int j = 0; j < T[FILL]; ++j) y[at_row(r) + j] = real(0);
    }
    const int present = worlds - world0 < ROWS ? worlds - world0 : ROWS;
    for (int r = 0; r < present; ++r)
      for (int c = 0; c < controls_of; ++c)
        controls.data[u0 + (world0 + r) * controls_of + c] = rows[at_row(r) + last + c];
  };
  if (worlds > BLOCK && (int)Two::ROWS > BLOCK) pass(Two(), 0);
  else for (int world = 0; world < worlds; world += BLOCK) pass(One(), world);
#endif

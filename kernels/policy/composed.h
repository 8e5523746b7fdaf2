// Native text of composed policies: what the device functions of composed.py do, operation after operation of the
// table (composed_layout.py, Entry).
//
// Products go through the register tiles of dense.h. Everything else is elementwise or along a row, a pass
// of its own over rows that are in the nearest cache. An activation is one text for CPUs and GPUs: `vec` is a
// vector there and a scalar here.

//: table
  enum { WINDOW, UNITS, PITCH_WINDOW, PITCH_UNITS, FORWARD, BIAS, BACKWARD, INPUT, POSITIONS, HOP, SECTION,
         KIND, OUTPUT, SECOND, ADJ_INPUT, ADJ_OUTPUT, ADJ_SECOND, ADDS, NUMBERS, FILL, ADJ_FILL, TRAINED, INNER,
         CENTERED, RESULT, ADJ_RESULT, ADJ_STATE, CONTROLS, TABLE = 28 };
  enum { CLEAR, LINEAR, NORMALIZE, AFFINE, ADD, COPY, GATHER, ACTIVATION = 16 };
  enum { FEW = 4 };  // units of a linear operation that are no tile of their own
//: vectors
#if defined(__CUDA_ARCH__)
  typedef real vec;
  #define WS_EXPM1(x) expm1(x)
  #define WS_EXP(x) exp(x)
  #define WS_TANH(x) tanh(x)
  #define WS_LOG1P(x) log1p(x)
  #define WS_ERF(x) erf(x)
  #define WS_SIN(x) sin(x)
  #define WS_COS(x) cos(x)
#else
  // e^x - one = 2^n (e^r - 1) + (2^n - one), as in tanh; from LOWEST to HIGHEST, where 2^n is a number
  const auto vexp = [](vec x, real one) -> vec {
    x = x > (vec)(real(HIGHEST)) ? (vec)(real(HIGHEST)) : x;
    x = x < (vec)(real(LOWEST)) ? (vec)(real(LOWEST)) : x;
    vec n = __builtin_elementwise_roundeven(x * real(1.4426950408889634074));
    vec r = WS_FMA(n, (vec)(real(-(LN2_HI))), x);
    r = WS_FMA(n, (vec)(real(-(LN2_LO))), r);
    vec q = (vec)(real(SERIES_LAST));
    SERIES
    vec p = WS_FMA(q * r, r, r);
    typedef INT whole; typedef whole ivec __attribute__((ext_vector_type(VL)));
    ivec e = (__builtin_convertvector(n, ivec) + whole(EXPONENT_BIAS)) << whole(MANTISSA);
    vec two_n; __builtin_memcpy(&two_n, &e, sizeof(vec));
    return WS_FMA(two_n, p, two_n - one);
  };
  // log(1 + t) = 2 (s + s^3 / 3 + ...) with s = t / (2 + t), for t from 0 to 1
  const auto vlog1p = [](vec t) -> vec {
    const vec s = t / (t + real(2)), s2 = s * s;
    vec q = (vec)(real(0));
    _Pragma("unroll") for (int k = LOG_TERMS; k > 0; --k) q = WS_FMA(q, s2, (vec)(real(1) / real(2 * k + 1)));
    return real(2) * WS_FMA(q * s2, s, s);
  };
  // single precision: a rational function, that of Eigen, to 4 units in the last place of 1
  const auto verf = [](vec x) -> vec {
    if constexpr (sizeof(real) == 4) {
      x = x > (vec)(real(4)) ? (vec)(real(4)) : x;
      x = x < (vec)(real(-4)) ? (vec)(real(-4)) : x;
      const vec t = x * x;
      vec p = (vec)(real(-2.72614225801306e-10)), q = (vec)(real(-1.45660718464996e-05));
      p = WS_FMA(p, t, (vec)(real(2.77068142495902e-08)));
      p = WS_FMA(p, t, (vec)(real(-2.10102402082508e-06)));
      p = WS_FMA(p, t, (vec)(real(-5.69250639462346e-05)));
      p = WS_FMA(p, t, (vec)(real(-7.34990630326855e-04)));
      p = WS_FMA(p, t, (vec)(real(-2.95459980854025e-03)));
      p = WS_FMA(p, t, (vec)(real(-1.60960333262415e-02)));
      q = WS_FMA(q, t, (vec)(real(-2.13374055278905e-04)));
      q = WS_FMA(q, t, (vec)(real(-1.68282697438203e-03)));
      q = WS_FMA(q, t, (vec)(real(-7.37332916720468e-03)));
      q = WS_FMA(q, t, (vec)(real(-1.42647390514189e-02)));
      return x * p / q;
    } else {
      vec y;
      for (int i = 0; i < VL; ++i) y[i] = ::erf((real)x[i]);
      return y;
    }
  };
  const auto vsin = [&](vec x) -> vec { vec s, c; sincos(x, s, c); return s; };
  const auto vcos = [&](vec x) -> vec { vec s, c; sincos(x, s, c); return c; };
  #define WS_EXPM1(x) vexp(x, real(1))
  #define WS_EXP(x) vexp(x, real(0))
  #define WS_TANH(x) vtanh(x)
  #define WS_LOG1P(x) vlog1p(x)
  #define WS_ERF(x) verf(x)
  #define WS_SIN(x) vsin(x)
  #define WS_COS(x) vcos(x)
#endif
  const auto logistic = [&](vec x) -> vec { return real(1) / (real(1) + WS_EXP(-x)); };
//: values
  // y of x, with the numbers p and q
  switch (T[KIND] - ACTIVATION) {
    case 0: WS_MAP(WS_TANH(x))
    case 1: WS_MAP(x < real(0) ? (vec)(real(0)) : x)
    case 2: WS_MAP(x > real(0) ? x : p * x)
    case 3: WS_MAP(x > real(0) ? x : p * WS_EXPM1(x))
    case 4: WS_MAP(logistic(x))
    case 5: WS_MAP(x * logistic(x))
    case 6: WS_MAP(real(0.5) * x * (real(1) + WS_ERF(x * real(0.70710678118654752440))))
    case 7: WS_MAP(real(0.5) * x * (real(1) + WS_TANH(real(0.79788456080286535588) * x * (real(1) + real(0.044715) * x * x))))
    case 8: {
      // log(1 + e^z) = max(z, 0) + log(1 + e^-|z|), linear beyond q
      const auto softplus = [&](vec x) -> vec {
        const vec z = p * x, over = z > real(0) ? z : (vec)(real(0)), least = z > real(0) ? -z : z;
        return z > q ? x : (over + WS_LOG1P(WS_EXP(least))) / p;
      };
      WS_MAP(softplus(x))
    }
    case 9: WS_MAP(WS_SIN(x))
    case 10: WS_MAP(WS_COS(x))
    case 11: WS_MAP(x < p ? p : x > q ? q : x)
  }
//: slopes
  // dy / dx of x or y, with the numbers p and q
  switch (T[KIND] - ACTIVATION) {
    case 0: WS_PULL(y, real(1) - y * y)
    case 1: WS_PULL(y, y <= real(0) ? (vec)(real(0)) : (vec)(real(1)))
    case 2: WS_PULL(y, y > real(0) ? (vec)(real(1)) : p)
    case 3: WS_PULL(y, y > real(0) ? (vec)(real(1)) : y + p)
    case 4: WS_PULL(y, y * (real(1) - y))
    case 5: {
      const auto slope = [&](vec x) -> vec { const vec s = logistic(x); return s * (real(1) + x * (real(1) - s)); };
      WS_PULL(x, slope(x))
    }
    case 6: WS_PULL(x, real(0.5) * (real(1) + WS_ERF(x * real(0.70710678118654752440)))
                       + x * real(0.39894228040143267794) * WS_EXP(real(-0.5) * x * x))
    case 7: {
      const auto slope = [&](vec x) -> vec {
        const vec t = WS_TANH(real(0.79788456080286535588) * x * (real(1) + real(0.044715) * x * x));
        const vec inner = real(0.79788456080286535588) * (real(1) + real(0.134145) * x * x);
        return real(0.5) * (real(1) + t) + real(0.5) * x * (real(1) - t * t) * inner;
      };
      WS_PULL(x, slope(x))
    }
    case 8: WS_PULL(x, p * x > q ? (vec)(real(1)) : logistic(p * x))
    case 9: WS_PULL(x, WS_COS(x))
    case 10: WS_PULL(x, -WS_SIN(x))
    case 11: WS_PULL(x, x < p ? (vec)(real(0)) : x > q ? (vec)(real(0)) : (vec)(real(1)))
  }
//: forward
  const real* P = params.data;
  const int last = table.data[RESULT], controls_of = table.data[CONTROLS];
#if defined(__CUDA_ARCH__)
  real* rows = hidden.data + row0;
  for (int l = 0; l < layers; ++l) {
    const int* T = table.data + l * TABLE;
    const int units = T[UNITS], pitch = T[PITCH_UNITS];
    const real* from = rows + T[INPUT];
    real* to = rows + T[OUTPUT];
    const vec p = P[T[NUMBERS]], q = P[T[NUMBERS] + 1];
    if (T[KIND] == CLEAR) continue;
    if (T[KIND] == LINEAR) {
      const real* wt = P + T[FORWARD];
      const real* b = P + T[BIAS];
      const int width = T[POSITIONS] * units;
      for (int at = lane; at < width; at += lanes) {
        const int j = at % units;
        const real* x = from + at / units * T[HOP];
        real acc[BLOCK];
        #pragma unroll
        for (int r = 0; r < BLOCK; ++r) acc[r] = b[j];
        for (int k = 0; k < T[WINDOW]; ++k) {
          const real w = wt[k * pitch + j];
          #pragma unroll
          for (int r = 0; r < BLOCK; ++r) acc[r] += x[r * row + k] * w;
        }
        #pragma unroll
        for (int r = 0; r < BLOCK; ++r) to[r * row + at] = acc[r];
      }
      for (int at = lane; at < BLOCK * T[FILL]; at += lanes) to[at / T[FILL] * row + width + at % T[FILL]] = real(0);
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
        const real factor = real(1) / sqrt(mean(sum) + p);
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
      #define WS_MAP(V) { \
          for (int at = lane; at < BLOCK * pitch; at += lanes) { \
            const int j = at % pitch, place = at / pitch * row + j; \
            const vec x = from[place]; \
            to[place] = (V); } \
          break; }
      switch (T[KIND]) {
        case AFFINE: WS_MAP(x * P[T[BACKWARD] + j] + P[T[BIAS] + j])
        case ADD: WS_MAP(x + rows[place + T[SECOND]])
        default: WS_VALUES
      }
      #undef WS_MAP
    }
    WS_SYNC();
  }
  for (int at = lane; at < BLOCK * controls_of; at += lanes) {
    const int r = at / controls_of, c = at % controls_of;
    if (r < worlds) controls.data[u0 + at] = rows[r * row + last + c];
  }
#else
  const auto sum_of = [](auto v, const auto& halve) {
    if constexpr (sizeof(v) == sizeof(real)) return v;
    else return halve(v.lo + v.hi, halve);
  };
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
    for (int l = 0; l < layers; ++l) {
      const int* T = table.data + l * TABLE;
      if (T[KIND] != LINEAR) {
        const bool both = l + 1 < layers && takes_next(T);
        fetch();
        elementwise(T, rows, ROWS, both, 0, T[PITCH_UNITS]);
        l += both;
        continue;
      }
      const int units = T[UNITS], window = T[WINDOW], pitch_window = T[PITCH_WINDOW], pitch_units = T[PITCH_UNITS];
      const real* x = rows + T[INPUT];
      const real* b = P + T[BIAS];
      real* y = rows + T[OUTPUT];
      const int positions = T[POSITIONS];
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
      const bool activates = positions == 1 && l + 1 < layers && T[TABLE + KIND] >= ACTIVATION && T[TABLE + INPUT] == T[OUTPUT];
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
          if (activates) elementwise(T + TABLE, rows, ROWS, false, j, j + V * VL); }
      // what a position writes beyond its units, the next one overwrites; the last stays in its section
      for (int i = 0, room = positions * units + T[FILL]; i < positions; ++i, x += T[HOP], y += units, room -= units) {
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
  const auto sum_of = [](auto v, const auto& halve) {
    if constexpr (sizeof(v) == sizeof(real)) return v;
    else return halve(v.lo + v.hi, halve);
  };
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
    for (int l = layers - 1; l >= 0; --l) {
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
          if (V == 1) WS_NARROW_TILE(ROWS, x, at_row, w + j, pitch_window, units) \
          else WS_TILE(ROWS, V, x, at_row, 1, w + j, pitch_window, units) \
          if (slopes) \
            WS_EACH(ROWS, V, const int at = j + v * VL; \
                             WS_STORE(y + r * row_adj + at, acc[r][v] * slope(WS_LOAD(a + r * row + at)));) \
          else \
            WS_EACH(ROWS, V, real* to = y + r * row_adj + j + v * VL; \
                             WS_STORE(to, adds ? WS_LOAD(to) + acc[r][v] : acc[r][v]);) }
      for (int i = 0; i < T[POSITIONS]; ++i, x += units, y += T[HOP]) {
        WS_COLUMNS(ROWS, pitch_window, WS_LAYER)
      }
      #undef WS_LAYER
      l -= slopes != 0;
    }
    if (want_jac)
      for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < state_size && r % BLOCK < worlds; ++i)
          jac.data[j0 + (point + r / BLOCK) * jt + r % BLOCK * jr + i] = ds[r * row_adj + table.data[ADJ_STATE] + i];
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
  for (int l = 0; l < layers; ++l) {
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
    for (int l = 0; l < layers; ++l) {
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
      int position = 0;
      const auto scale = [&](auto strip, int at) {
        enum { V = decltype(strip)::VECTORS };
        real* gb = g + T[BIAS] + at;
        const int d_column = column + position * units, panel = position * pitch_units;
        vec s[V];
        _Pragma("unroll") for (int v = 0; v < V; ++v) s[v] = WS_LOAD(gb + v * VL);
        for (int r = 0; r < nrows; ++r)
          _Pragma("unroll") for (int v = 0; v < V; ++v) {
            const vec y = cotangent(r, d_column + at + v * VL);
            WS_STORE(sc + (panel + at + v * VL) * nrows + r * VL, y);
            s[v] += y;
          }
        _Pragma("unroll") for (int v = 0; v < V; ++v) WS_STORE(gb + v * VL, s[v]);
      };
      for (; position < positions; ++position) in_strips(pitch_units, scale);
      if (units <= FEW && positions == 1) {
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

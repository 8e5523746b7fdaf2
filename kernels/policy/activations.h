// Activations of a fused policy and their derivatives: one text for CPUs, where `vec` is a vector, and for GPUs, where
// it is a scalar.

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
  // tanh(x) = t / (t + 2) with t = e^{2x} - 1 = 2^n (e^r - 1) + (2^n - 1), |r| <= ln2 / 2: relative accuracy near 0,
  // where controllers start. The clamps let NaN through.
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
  // sum of a vector
  const auto sum_of = [](auto v, const auto& halve) {
    if constexpr (sizeof(v) == sizeof(real)) return v;
    else return halve(v.lo + v.hi, halve);
  };
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

//: sincos
  const auto fma = [](vec a, vec b, vec c) -> vec { return __builtin_elementwise_fma(a, b, c); };
  const auto sincos = [&](vec q, vec& s, vec& c) {
    const vec n = __builtin_elementwise_roundeven(q * real(0.63661977236758134308));
    vec r = fma(n, (vec)(real(-(PART_1))), q);
    r = fma(n, (vec)(real(-(PART_2))), r);
    r = fma(n, (vec)(real(-(PART_3))), r);
    const vec t = r * r;
    vec ps = (vec)(real(SINE_LAST)), pc = (vec)(real(COSINE_LAST));
    SINE
    COSINE
    const vec sine = fma(t * r, ps, r), cosine = fma(t * t, pc, fma(t, (vec)(real(-0.5)), (vec)(real(1))));
    typedef INT whole; typedef whole ivec __attribute__((ext_vector_type(L)));
    // quadrant n mod 4 from the low bits of a float, which hold for |n| < 2^22
    ivec k; const vec shifted = n + real(SHIFT); __builtin_memcpy(&k, &shifted, sizeof(vec));
    const auto odd = (k & 1) != 0;
    s = odd ? cosine : sine;
    c = odd ? sine : cosine;
    enum { TO_SIGN = 8 * (int)sizeof(real) - 2 };
    const ivec sign_s = (k & 2) << TO_SIGN, sign_c = ((k + 1) & 2) << TO_SIGN;
    ivec bits;
    __builtin_memcpy(&bits, &s, sizeof(vec)); bits ^= sign_s; __builtin_memcpy(&s, &bits, sizeof(vec));
    __builtin_memcpy(&bits, &c, sizeof(vec)); bits ^= sign_c; __builtin_memcpy(&c, &bits, sizeof(vec));
    const vec size = __builtin_elementwise_abs(q);
    bool small = true;
    _Pragma("unroll") for (int l = 0; l < L; ++l) small &= size[l] <= real(1e4);
    if (!small)  // only these lanes: a world does not depend on its neighbours
      for (int l = 0; l < L; ++l)
        if (!(size[l] <= real(1e4))) { s[l] = wp::sin((real)q[l]); c[l] = wp::cos((real)q[l]); }
  };

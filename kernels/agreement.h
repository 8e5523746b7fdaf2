//: lanes
#if !defined(__CUDA_ARCH__)
  typedef REAL real;
  enum { L = 8 };
  typedef real vec __attribute__((ext_vector_type(L)));
  typedef double dvec __attribute__((ext_vector_type(L)));
  typedef decltype(vec() < vec()) mask;  // integers, -1 where the comparison holds
  const real* const bs = wp::address(base, member, begin);
  const real* const cs = wp::address(check, member, begin);
  real* const out = wp::address(combined, member, begin);
  const auto at = [](const real* from, int i) {
    vec v;
    __builtin_memcpy(&v, from + i, sizeof(vec));
    return v;
  };
  dvec dot = (dvec)(0.0), base_sq = dot, check_sq = dot;
  mask equal = (mask)(0), nonzero = equal, nonfinite = equal, nonfinite_base = equal, nonfinite_check = equal,
       survived = equal;
  const vec largest = (vec)(real(LARGEST));
  for (int i = 0; i < count; i += L) {
    // behind the end zeros, which count as nothing
    const int rest = count - i;
    vec b = (vec)(real(0)), c = b;
    if (rest >= L) { b = at(bs, i); c = at(cs, i); }
    else for (int l = 0; l < rest; ++l) { b[l] = bs[i + l]; c[l] = cs[i + l]; }
    const vec kept = keep_check ? c : b, zero = (vec)(real(0));
    // a comparison with NaN does not hold
    const mask finite_b = __builtin_elementwise_abs(b) <= largest;
    const mask finite_c = __builtin_elementwise_abs(c) <= largest;
    const mask finite_kept = keep_check ? finite_c : finite_b;
    const mask finite_other = keep_check ? finite_b : finite_c;
    const mask agree = ((b > zero) == (c > zero)) & ((b < zero) == (c < zero)) & finite_other;
    const vec result = (agree | ~finite_kept) ? kept : zero;
    if (rest >= L) __builtin_memcpy(out + i, &result, sizeof(vec));
    else for (int l = 0; l < rest; ++l) out[i + l] = result[l];
    const mask any = (b != zero) | (c != zero);
    nonzero -= any;
    equal -= any & agree & finite_kept;
    nonfinite += 1 + (finite_b & finite_c);
    nonfinite_base += 1 + finite_b;
    nonfinite_check += 1 + finite_c;
    survived -= result != zero;
    const dvec b2 = __builtin_convertvector(b, dvec), c2 = __builtin_convertvector(c, dvec);
    dot += b2 * c2;
    base_sq += b2 * b2;
    check_sq += c2 * c2;
  }
  const auto sum = [](auto v) { double s = 0.0; for (int l = 0; l < L; ++l) s += (double)v[l]; return s; };
  double* const row = wp::address(stats, chunk, 0);
  row[0] = sum(dot); row[1] = sum(base_sq); row[2] = sum(check_sq);
  row[3] = sum(equal); row[4] = sum(nonzero); row[5] = sum(nonfinite);
  row[6] = sum(nonfinite_base); row[7] = sum(nonfinite_check); row[8] = sum(survived);
#endif

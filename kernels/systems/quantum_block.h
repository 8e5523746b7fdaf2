// prelude: Lane l is world l % W, from the left wall for l < W, from the right wall beyond. Row k is grid
// point left(k), right(k); of an odd number of points the right end has one row less, its row 0 is none.

//: prelude
#if !defined(__CUDA_ARCH__)
  typedef REAL real;
  enum { W = BLOCK, L = 2 * W, N = POINTS, ODD = N & 1, K = (N + ODD) / 2 };
  typedef real vec __attribute__((ext_vector_type(L)));
  const auto left = [](int k) { return k; };
  const auto right = [](int k) { return ODD && k == 0 ? N - 1 : N - 1 - k + ODD; };
  // grid point k of all worlds; `part` 0 is the real, 1 the imaginary one
  const auto gather = [&](const real* const* x, int k, int part) -> vec {
    vec v;
    const int a = 2 * left(k) + part, b = 2 * right(k) + part;
    _Pragma("unroll") for (int w = 0; w < W; ++w) { v[w] = x[w][a]; v[w + W] = x[w][b]; }
    return v;
  };
  const auto swap_ends = [](vec v) -> vec {
    vec s;
    _Pragma("unroll") for (int l = 0; l < L; ++l) s[l] = v[(l + W) % L];
    return s;
  };
  const auto keep_left = [](vec v, real other) -> vec {
    _Pragma("unroll") for (int l = W; l < L; ++l) v[l] = other;
    return v;
  };
  const long long row0 = (long long)t * nworld + world0;
  const real kappa = p.kappa;
  vec slope, number, toward;  // r_j = slope (j + 1) - i kappa;  j + 1 in row k is number + k toward
  _Pragma("unroll") for (int l = 0; l < L; ++l) {
    const int world = l % W < worlds ? l % W : worlds - 1;
    slope[l] = ((const real*)controls.data)[row0 + world] * p.field;
    number[l] = l < W ? real(1) : real(N + ODD);
    toward[l] = l < W ? real(1) : real(-1);
  }
  vec wr[K], wi[K];
  struct OneField { char size[1]; };
  struct TwoFields { char size[2]; };
  // as many right sides at once as there are fields: v_j to (vr, vi), replaced by z_j
  const auto solve = [&](auto fields, auto rhs, real conj, vec (*vr)[K], vec (*vi)[K]) {
    enum { F = sizeof(fields.size) };
    vec er, ei, gr = (vec)(real(1)), gi = (vec)(real(0));
    vec yr[F], yi[F], cr[F], ci[F];
    for (int f = 0; f < F; ++f) cr[f] = ci[f] = (vec)(real(0));
    for (int k = 0; k < K; ++k) {
      er = slope * (number + toward * real(k)) + gr;
      ei = gi - kappa;
      const vec dr = er + real(1);
      const vec s = real(1) / (dr * dr + ei * ei);
      wr[k] = dr * s;
      wi[k] = -ei * s;
      gr = er * wr[k] - ei * wi[k];
      gi = er * wi[k] + ei * wr[k];
      _Pragma("unroll") for (int f = 0; f < F; ++f) {
        yr[f] = cr[f] + kappa * conj * gather(rhs[f], k, 1);
        yi[f] = ci[f] - kappa * gather(rhs[f], k, 0);
        cr[f] = wr[k] * yr[f] - wi[k] * yi[f];
        ci[f] = wr[k] * yi[f] + wi[k] * yr[f];
        vr[f][k] = cr[f];
        vi[f][k] = ci[f];
      }
      if (ODD && k == 0) {
        gr = keep_left(gr, real(1));
        gi = keep_left(gi, real(0));
        _Pragma("unroll") for (int f = 0; f < F; ++f) {
          cr[f] = keep_left(cr[f], real(0));
          ci[f] = keep_left(ci[f], real(0));
        }
      }
    }
    // the middle: e_a + e_b + e_a e_b is the same from both sides
    const vec or_ = swap_ends(er), oi = swap_ends(ei);
    const vec mr = er + or_ + (er * or_ - ei * oi), mi = ei + oi + (er * oi + ei * or_);
    const vec s = real(1) / (mr * mr + mi * mi);
    _Pragma("unroll") for (int f = 0; f < F; ++f) {
      const vec nr = yr[f] + (or_ * yr[f] - oi * yi[f]) + swap_ends(yr[f]);
      const vec ni = yi[f] + (or_ * yi[f] + oi * yr[f]) + swap_ends(yi[f]);
      cr[f] = vr[f][K - 1] = (nr * mr + ni * mi) * s;
      ci[f] = vi[f][K - 1] = (ni * mr - nr * mi) * s;
    }
    for (int k = K - 2; k >= 0; --k)
      _Pragma("unroll") for (int f = 0; f < F; ++f) {
        const vec zr = vr[f][k] + (wr[k] * cr[f] - wi[k] * ci[f]);
        const vec zi = vi[f][k] + (wr[k] * ci[f] + wi[k] * cr[f]);
        cr[f] = vr[f][k] = zr;
        ci[f] = vi[f][k] = zi;
      }
  };
#endif
//: step
#if !defined(__CUDA_ARCH__)
  const real* x[1][W];
  for (int w = 0; w < W; ++w)
    x[0][w] = (const real*)states.data + (row0 + (w < worlds ? w : worlds - 1)) * 2 * N;
  vec zr[1][K], zi[1][K];
  solve(OneField(), x, real(1), zr, zi);
  for (int w = 0; w < worlds; ++w) {
    const real* from = x[0][w];
    real* to = (real*)states.data + (row0 + nworld + w) * 2 * N;
    for (int k = 0; k < K; ++k) {
      const int a = 2 * left(k), b = 2 * right(k);
      to[a] = 2 * zr[0][k][w] - from[a];
      to[a + 1] = 2 * zi[0][k][w] - from[a + 1];
      if (ODD && k == 0) continue;
      to[b] = 2 * zr[0][k][w + W] - from[b];
      to[b + 1] = 2 * zi[0][k][w + W] - from[b + 1];
    }
  }
#endif
//: step_vjp
#if !defined(__CUDA_ARCH__)
  const int horizon = adj_u.shape[1];
  const auto pull = [&](auto fields) {
    enum { F = sizeof(fields.size) };
    real* g[F][W];
    const real *x[W], *x_next[W];
    for (int w = 0; w < W; ++w) {
      const int world = w < worlds ? w : worlds - 1;
      x[w] = (const real*)states.data + (row0 + world) * 2 * N;
      x_next[w] = x[w] + (long long)nworld * 2 * N;
      const long long to = world0 + world;
      for (int f = 0; f < F; ++f) g[f][w] = (real*)adj.data + ((long long)f * nworld + to) * 2 * N;
    }
    vec zr[F][K], zi[F][K], sum[F];
    solve(fields, g, real(-1), zr, zi);
    for (int f = 0; f < F; ++f) sum[f] = (vec)(real(0));
    for (int k = 0; k < K; ++k) {
      vec at = number + toward * real(k);
      if (ODD && k == 0) at = keep_left(at, real(0));
      const vec pr = at * (gather(x, k, 0) + gather(x_next, k, 0));
      const vec pi = at * (gather(x, k, 1) + gather(x_next, k, 1));
      _Pragma("unroll") for (int f = 0; f < F; ++f) sum[f] += zr[f][k] * pi + zi[f][k] * pr;
    }
    const real half_step = real(0.5) * p.dt * p.dx;
    for (int f = 0; f < F; ++f)
      for (int w = 0; w < worlds; ++w) {
        ((real*)adj_u.data)[((long long)f * horizon + t) * nworld + world0 + w] =
          half_step * (sum[f][w] + sum[f][w + W]);
        real* to = g[f][w];
        for (int k = 0; k < K; ++k) {
          const int a = 2 * left(k), b = 2 * right(k);
          to[a] = 2 * zr[f][k][w] - to[a];
          to[a + 1] = -2 * zi[f][k][w] - to[a + 1];
          if (ODD && k == 0) continue;
          to[b] = 2 * zr[f][k][w + W] - to[b];
          to[b + 1] = -2 * zi[f][k][w + W] - to[b + 1];
        }
      }
  };
  if (adj_u.shape[0] == 2) pull(TwoFields()); else pull(OneField());
#endif

//: prelude
#if !defined(__CUDA_ARCH__)
  typedef REAL real;
  enum { W = BLOCK, G = 4, L = W * G, P = POLES, SIZE = 2 + 2 * P };
  static_assert(W == 4, "the shuffles are written for four worlds");
  typedef real vec __attribute__((ext_vector_type(L)));
  typedef real row __attribute__((ext_vector_type(2 * G)));
SINCOS
  // q and w of the poles behind pole i0 of all worlds, 0 where there is no pole
  const auto load = [&](const real* const* x, int i0, vec& q, vec& w) {
    row r[W];
    _Pragma("unroll") for (int k = 0; k < W; ++k) {
      const real* from = x[k] + 2 + 2 * i0;
      if (i0 + G <= P) { __builtin_memcpy(&r[k], from, sizeof(row)); }
      else _Pragma("unroll") for (int j = 0; j < 2 * G; ++j) r[k][j] = j < 2 * (P % G) ? from[j] : real(0);
    }
    const auto join = [](row a, row b) -> vec {
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    };
    const vec a = join(r[0], r[1]), b = join(r[2], r[3]);
    q = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    w = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  };
  const auto store = [&](real* const* x, int i0, vec q, vec w) {
    row r[W];
    r[0] = __builtin_shufflevector(q, w, 0, 16, 1, 17, 2, 18, 3, 19);
    r[1] = __builtin_shufflevector(q, w, 4, 20, 5, 21, 6, 22, 7, 23);
    r[2] = __builtin_shufflevector(q, w, 8, 24, 9, 25, 10, 26, 11, 27);
    r[3] = __builtin_shufflevector(q, w, 12, 28, 13, 29, 14, 30, 15, 31);
    for (int k = 0; k < worlds; ++k) {
      real* to = x[k] + 2 + 2 * i0;
      if (i0 + G <= P) { __builtin_memcpy(to, &r[k], sizeof(row)); }
      else _Pragma("unroll") for (int j = 0; j < 2 * (P % G); ++j) to[j] = r[k][j];
    }
  };
  const auto spread = [](const real* a) -> vec {
    vec v;
    _Pragma("unroll") for (int l = 0; l < L; ++l) v[l] = a[l / G];
    return v;
  };
  // adds the poles behind i0 of each world
  const auto add_poles = [](vec v, int i0, real* sums) {
    _Pragma("unroll") for (int l = 0; l < L; ++l) if (i0 + l % G < P) sums[l / G] += v[l];
  };
  const long long row0 = (long long)t * nworld + world0;
  const real inv_total = real(1) / p.total_mass;
  const real k = p.pole_mass * p.pole_length * inv_total;
  const real *x[W];
  real force[W];
  _Pragma("unroll") for (int r = 0; r < W; ++r) {
    const long long at = row0 + (r < worlds ? r : worlds - 1);
    x[r] = (const real*)states.data + at * SIZE;
    force[r] = ((const real*)controls.data)[at];
  }
  const vec push = spread(force) * inv_total;
  vec q, w, s, c, a, inv_d, wd;
  const auto accelerate = [&](int i0) {
    load(x, i0, q, w);
    sincos(q, s, c);
    a = push + k * s * w * w;
    inv_d = real(1) / (p.pole_length * (real(4) / real(3) - p.pole_mass * inv_total * c * c));
    wd = (p.gravity * s - c * a) * inv_d;
  };
#endif
//: step
#if !defined(__CUDA_ARCH__)
  real* to[W];
  real pull[W];
  _Pragma("unroll") for (int r = 0; r < W; ++r) {
    to[r] = (real*)states.data + (row0 + nworld + r) * SIZE;
    pull[r] = real(0);
  }
  for (int i0 = 0; i0 < P; i0 += G) {
    accelerate(i0);
    add_poles(s * w * w - wd * c, i0, pull);
    w += p.dt * wd;
    store(to, i0, q + p.dt * w, w);
  }
  for (int r = 0; r < worlds; ++r) {
    const real v = x[r][1] + p.dt * (force[r] * inv_total + k * pull[r]);
    to[r][1] = v;
    to[r][0] = x[r][0] + p.dt * v;
  }
#endif
//: step_vjp
#if !defined(__CUDA_ARCH__)
  const int fields = adj_u.shape[0], horizon = adj_u.shape[1];
  real* g[2][W];
  real adj_v[2][W], adj_f[2][W];
  vec adj_vd[2];
  for (int f = 0; f < fields; ++f) {
    real scaled[W];
    _Pragma("unroll") for (int r = 0; r < W; ++r) {
      const long long world = world0 + (r < worlds ? r : worlds - 1);
      g[f][r] = (real*)adj.data + ((long long)f * nworld + world) * SIZE;
      adj_v[f][r] = g[f][r][1] + p.dt * g[f][r][0];
      adj_f[f][r] = scaled[r] = p.dt * adj_v[f][r];
    }
    adj_vd[f] = spread(scaled);
  }
  for (int i0 = 0; i0 < P; i0 += G) {
    accelerate(i0);
    for (int f = 0; f < fields; ++f) {
      vec adj_q_next, adj_w;
      load(g[f], i0, adj_q_next, adj_w);
      adj_w += p.dt * adj_q_next;
      const vec adj_num = (p.dt * adj_w - k * c * adj_vd[f]) * inv_d;
      const vec adj_a = -c * adj_num;
      const vec through = k * w * (adj_vd[f] + adj_a);
      const vec adj_s = p.gravity * adj_num + through * w;
      const vec adj_c = (real(2) * k * c * wd - a) * adj_num - k * wd * adj_vd[f];
      add_poles(adj_a, i0, adj_f[f]);
      store(g[f], i0, adj_q_next + c * adj_s - s * adj_c, adj_w + real(2) * s * through);
    }
  }
  for (int f = 0; f < fields; ++f)
    for (int r = 0; r < worlds; ++r) {
      g[f][r][1] = adj_v[f][r];
      ((real*)adj_u.data)[(long long)f * horizon * nworld + row0 + r] = adj_f[f][r] * inv_total;
    }
#endif

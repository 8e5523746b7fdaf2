//: prelude
#if !defined(__CUDA_ARCH__)
  typedef REAL real;
  enum { W = BLOCK, D = DRIVERS, N = D + EVADERS, SIZE = 4 * N };
  static_assert(W == 4, "the shuffles are written for four worlds");
  typedef real vec __attribute__((ext_vector_type(W)));
  // the four numbers of agent i in four worlds, and back
  const auto transpose = [](vec (&r)[4]) {
    const vec a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    const vec b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const vec c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const vec d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  };
  const auto load = [&](const real* const* from, int i, vec (&r)[4]) {
    _Pragma("unroll") for (int w = 0; w < W; ++w) __builtin_memcpy(&r[w], from[w] + 4 * i, sizeof(vec));
    transpose(r);
  };
  const auto store = [&](real* const* to, int i, vec (&r)[4]) {
    transpose(r);
    for (int w = 0; w < worlds; ++w) __builtin_memcpy(to[w] + 4 * i, &r[w], sizeof(vec));
  };
  const long long row0 = (long long)t * nworld + world0;
  const real *x[W], *u[W];
  _Pragma("unroll") for (int w = 0; w < W; ++w) {
    const long long at = row0 + (w < worlds ? w : worlds - 1);
    x[w] = (const real*)states.data + at * SIZE;
    u[w] = (const real*)controls.data + at * 2 * D;
  }
  vec s[N][4];
  vec herd[2] = {(vec)(real(0)), (vec)(real(0))};
  for (int i = 0; i < N; ++i) {
    load(x, i, s[i]);
    if (i >= D) { herd[0] += s[i][0]; herd[1] += s[i][1]; }
  }
  const auto control = [&](int k) -> vec {
    vec v;
    _Pragma("unroll") for (int w = 0; w < W; ++w) v[w] = u[w][k];
    return v;
  };
  // calls f(i, k, r, factor, slope) for each pair: r = x_i - x_k, and factor r is the force on i; on k it is
  // the opposite. Evaders do not push drivers. slope is the derivative of the factor by |r|, over |r|.
  const auto each_pair = [&](auto f) {
    for (int i = 0; i < N; ++i)
      for (int k = i + 1; k < N; ++k) {
        vec r[2] = {s[i][0] - s[k][0], s[i][1] - s[k][1]};
        const vec n = __builtin_elementwise_sqrt(r[0] * r[0] + r[1] * r[1]);
        const auto apart = n > real(0);
        const vec m = apart ? n : (vec)(real(1)), d = n + p.softening;
        const vec share = real(1) / (d * m);
        const vec inv_d = share * m, inv_n = apart ? share * d : (vec)(real(0));
        const vec inv_d2 = inv_d * inv_d;
        if (i >= D) {  // attraction: of i by k
          const vec g = p.flocking_length * inv_d2 - inv_d;
          f(i, k, r, -p.flocking * g,
            -p.flocking * (inv_d2 - real(2) * p.flocking_length * inv_d2 * inv_d) * inv_n);
        } else {
          const real strength = k < D ? p.driver_repulsion : p.evader_repulsion;
          f(i, k, r, strength * inv_d2, real(-2) * strength * inv_d2 * inv_d * inv_n);
        }
      }
  };
#endif
//: step
#if !defined(__CUDA_ARCH__)
  vec a[N][2];
  for (int i = 0; i < N; ++i) {
    const real drag = i < D ? p.driver_drag : p.evader_drag;
    a[i][0] = -drag * s[i][2];
    a[i][1] = -drag * s[i][3];
    if (i < D) {
      const vec c0 = control(2 * i), c1 = control(2 * i + 1);
      const vec cx = s[i][0] - herd[0], cy = s[i][1] - herd[1];
      a[i][0] += c0 * cx - c1 * cy;
      a[i][1] += c0 * cy + c1 * cx;
    }
  }
  each_pair([&](int i, int k, vec (&r)[2], vec factor, vec) {
    const vec fx = factor * r[0], fy = factor * r[1];
    if (i >= D || k < D) { a[i][0] += fx; a[i][1] += fy; }
    a[k][0] -= fx;
    a[k][1] -= fy;
  });
  real* to[W];
  for (int w = 0; w < W; ++w) to[w] = (real*)states.data + (row0 + nworld + w) * SIZE;
  for (int i = 0; i < N; ++i) {
    vec next[4] = {s[i][0] + p.dt * s[i][2], s[i][1] + p.dt * s[i][3],
                   s[i][2] + p.dt * a[i][0], s[i][3] + p.dt * a[i][1]};
    store(to, i, next);
  }
#endif
//: step_vjp
#if !defined(__CUDA_ARCH__)
  const int fields = adj_u.shape[0], horizon = adj_u.shape[1];
  real* g[2][W];
  vec b[2][N][2], adj_x[2][N][2];
  for (int f = 0; f < fields; ++f) {
    for (int w = 0; w < W; ++w) {
      const long long world = world0 + (w < worlds ? w : worlds - 1);
      g[f][w] = (real*)adj.data + ((long long)f * nworld + world) * SIZE;
    }
    vec adj_herd[2] = {(vec)(real(0)), (vec)(real(0))};
    for (int i = 0; i < N; ++i) {
      vec r[4];
      load(g[f], i, r);
      const vec bx = p.dt * r[2], by = p.dt * r[3];
      b[f][i][0] = bx;
      b[f][i][1] = by;
      adj_x[f][i][0] = r[0];
      adj_x[f][i][1] = r[1];
      if (i < D) {
        const vec c0 = control(2 * i), c1 = control(2 * i + 1);
        const vec cx = s[i][0] - herd[0], cy = s[i][1] - herd[1];
        const vec adj_c0 = cx * bx + cy * by, adj_c1 = cx * by - cy * bx;
        const vec tx = c0 * bx + c1 * by, ty = c0 * by - c1 * bx;
        adj_x[f][i][0] += tx;
        adj_x[f][i][1] += ty;
        adj_herd[0] -= tx;
        adj_herd[1] -= ty;
        for (int w = 0; w < worlds; ++w) {
          real* to = (real*)adj_u.data + (((long long)f * horizon + t) * nworld + world0 + w) * 2 * D + 2 * i;
          to[0] = adj_c0[w];
          to[1] = adj_c1[w];
        }
      }
    }
    for (int j = D; j < N; ++j) { adj_x[f][j][0] += adj_herd[0]; adj_x[f][j][1] += adj_herd[1]; }
  }
  each_pair([&](int i, int k, vec (&r)[2], vec factor, vec slope) {
    const bool both = i >= D || k < D;
    for (int f = 0; f < fields; ++f) {
      vec fx = -b[f][k][0], fy = -b[f][k][1];
      if (both) { fx += b[f][i][0]; fy += b[f][i][1]; }
      const vec along = slope * (r[0] * fx + r[1] * fy);
      const vec tx = factor * fx + along * r[0], ty = factor * fy + along * r[1];
      adj_x[f][i][0] += tx;
      adj_x[f][i][1] += ty;
      adj_x[f][k][0] -= tx;
      adj_x[f][k][1] -= ty;
    }
  });
  for (int f = 0; f < fields; ++f)
    for (int i = 0; i < N; ++i) {
      const real drag = i < D ? p.driver_drag : p.evader_drag;
      vec r[4];
      load(g[f], i, r);
      vec out[4] = {adj_x[f][i][0], adj_x[f][i][1],
                    r[2] + p.dt * r[0] - drag * b[f][i][0], r[3] + p.dt * r[1] - drag * b[f][i][1]};
      store(g[f], i, out);
    }
#endif

// prelude: Of an even number of points the left end has one row more than the right, FIRST is 1: row 0 has no
// partner.
// overlap: The target is a parameter of the kernel. Indexed by constants, as up to 32 points, it is read
// where it is; in a loop, the compiler copies it to local memory first.

//: prelude
  typedef REAL real;
  enum { N = POINTS, MIDDLE = N / 2, PAIRS = N - 1 - MIDDLE, FIRST = MIDDLE - PAIRS };
  struct Complex { real re, im; };
  struct OneField { char size[1]; };
  struct TwoFields { char size[2]; };
  const auto times = [](Complex a, Complex b) -> Complex {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  };
  const auto reciprocal = [](Complex a) -> Complex {
    const real s = real(1) / (a.re * a.re + a.im * a.im);
    return {a.re * s, -a.im * s};
  };
  const real kappa = p.kappa;
  const real slope = wp::address(controls, t, world)->c[0] * p.field;
  // As many right sides at once as there are fields: rhs(f, j) gives them, take(j, z) gets the solutions at
  // grid point j, every point once.
  const auto solve = [&](auto fields, auto rhs, auto take) {
    enum { F = sizeof(fields.size) };
    struct End { Complex g, v[F]; };
    Complex w[N], v[F][N];
    const auto add_right_side = [&](Complex before, int f, int j) -> Complex {
      const Complex right = rhs(f, j);
      return {before.re + kappa * right.im, before.im - kappa * right.re};
    };
    const auto eliminate = [&](End& end, int j) {
      const Complex e = {slope * real(j + 1) + end.g.re, end.g.im - kappa};
      const Complex pivot = reciprocal({e.re + real(1), e.im});
      w[j] = pivot;
      end.g = times(e, pivot);
      _Pragma("unroll") for (int f = 0; f < F; ++f)
        v[f][j] = end.v[f] = times(pivot, add_right_side(end.v[f], f, j));
    };
    const auto substitute = [&](Complex* z, int j) {
      _Pragma("unroll") for (int f = 0; f < F; ++f) {
        const Complex next = times(w[j], z[f]);
        z[f] = {v[f][j].re + next.re, v[f][j].im + next.im};
      }
      take(j, z);
    };
    End left = {{real(1), real(0)}, {}}, right = left;
    if (FIRST) eliminate(left, 0);
    _Pragma("unroll 1") for (int k = 0; k < PAIRS; ++k) {
      eliminate(left, FIRST + k);
      eliminate(right, N - 1 - k);
    }
    const Complex pivot = reciprocal(
      {slope * real(MIDDLE + 1) + left.g.re + right.g.re, left.g.im + right.g.im - kappa});
    Complex z[F], y[F];
    _Pragma("unroll") for (int f = 0; f < F; ++f) {
      const Complex both = {left.v[f].re + right.v[f].re, left.v[f].im + right.v[f].im};
      z[f] = y[f] = times(pivot, add_right_side(both, f, MIDDLE));
    }
    take(MIDDLE, z);
    _Pragma("unroll 1") for (int k = PAIRS - 1; k >= 0; --k) {
      substitute(z, FIRST + k);
      substitute(y, N - 1 - k);
    }
    if (FIRST) substitute(z, 0);
  };
//: step
  const real* x = wp::address(states, t, world)->c;
  real* x_next = wp::address(states, t + 1, world)->c;
  solve(
    OneField(),
    [&](int, int j) -> Complex { return {x[2 * j], x[2 * j + 1]}; },
    [&](int j, const Complex* z) {
      x_next[2 * j] = 2 * z[0].re - x[2 * j];
      x_next[2 * j + 1] = 2 * z[0].im - x[2 * j + 1];
    });
//: step_vjp
  const real* x = wp::address(states, t, world)->c;
  const real* x_next = wp::address(states, t + 1, world)->c;
  const auto pull = [&](auto fields) {
    enum { F = sizeof(fields.size) };
    real sum[F] = {};
    solve(
      fields,
      [&](int f, int j) -> Complex {
        const real* g = adj.data[f].c;
        return {g[2 * j], -g[2 * j + 1]};
      },
      [&](int j, const Complex* z) {
        const real re = real(j + 1) * (x[2 * j] + x_next[2 * j]);
        const real im = real(j + 1) * (x[2 * j + 1] + x_next[2 * j + 1]);
        _Pragma("unroll") for (int f = 0; f < F; ++f) {
          sum[f] += z[f].re * im + z[f].im * re;
          real* g = adj.data[f].c;
          g[2 * j] = 2 * z[f].re - g[2 * j];
          g[2 * j + 1] = -2 * z[f].im - g[2 * j + 1];
        }
      });
    const real half_step = real(0.5) * p.dt * p.dx;
    for (int f = 0; f < F; ++f) adj_u.data[f].c[0] = half_step * sum[f];
  };
  if (adj.shape[0] == 2) pull(TwoFields()); else pull(OneField());
//: overlap
  typedef REAL real;
  enum { N = POINTS };
  const real* x = wp::address(states, t, world)->c;
  real re = 0, im = 0;
  _Pragma("unroll 32") for (int j = 0; j < N; ++j) {
    re += p.eigenstate.c[j] * x[2 * j];
    im += p.eigenstate.c[j] * x[2 * j + 1];
  }
//: loss
  return real(1) - (re * re + im * im);
//: loss_vjp
  re *= -2 * adj_loss;
  im *= -2 * adj_loss;
  for (int f = 0; f < adj.shape[0]; ++f) {
    real* g = adj.data[f].c;
    _Pragma("unroll 32") for (int j = 0; j < N; ++j) {
      g[2 * j] += re * p.eigenstate.c[j];
      g[2 * j + 1] += im * p.eigenstate.c[j];
    }
  }

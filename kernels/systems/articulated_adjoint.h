// Adjoint of a substep of an articulated body; equations: articulated.py. After articulated_forward.h and
// articulated_forces.h. Kinematics, velocities, inertias and factor are those of the forward pass, and serve all
// gradient fields.

  struct Pull {
    vec W[NL + 1][6], gW[NL + 1][6], gA[NL + 1][6], gV[NL + 1][6], E[NL + 1][6];
    vec w[NV];
  };

  // q/|q| o exp(r): cotangents in the tangent space, from those of the end to those of q (in place) and of r
  const auto turn_vjp = [&](const vec* r, vec* x, vec* adj_r) {
    const vec r2 = dot3(r, r), angle = root(r2);
    vec sine, cosine;
    sincos(real(0.5) * angle, sine, cosine);
    const vec k = r2 > (vec)(real(SMALL)) ? sine / angle : real(0.5) - r2 * real(1.0 / 48.0);
    const vec a = real(2) * k * k, s1 = real(2) * k * cosine;
    const vec series = real(1.0 / 6.0) + r2 * (real(-1.0 / 120.0) + r2 * (real(1.0 / 5040.0) + r2 * (
      real(-1.0 / 362880.0) + r2 * (real(1.0 / 39916800.0) - r2 * real(1.0 / 6227020800.0)))));
    const vec b = r2 > (vec)(real(0.25)) ? (real(1) - s1) / r2 : series;
    vec rx[3], rrx[3];
    set_zero(rx, 3);
    set_zero(rrx, 3);
    add_cross(rx, r, x);
    add_cross(rrx, r, rx);
    _Pragma("unroll") for (int c = 0; c < 3; ++c) {
      adj_r[c] = x[c] + a * rx[c] + b * rrx[c];
      x[c] += s1 * rx[c] + a * rrx[c];
    }
  };

  // A: accelerations with the slot's qdd. On entry adj_q (tangent) and adj_v are of the state behind the
  // substep, then of that before it; adj_u is added to.
  const auto pull = [&](const Slot& s, Pull& g, const vec (*A)[6], const vec* u, vec* adj_q, vec* adj_v, vec* adj_u) {
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      const int k = DOF[i];
      if (KIND[i] == BALL) {
        vec r[3], adj_r[3];
        _Pragma("unroll") for (int c = 0; c < 3; ++c) r[c] = h * (s.v[k + c] + h * s.qdd[k + c]);
        turn_vjp(r, adj_q + k, adj_r);
        _Pragma("unroll") for (int c = 0; c < 3; ++c) adj_v[k + c] += h * adj_r[c];
      } else _Pragma("unroll 1") for (int c = k; c < DOF[i + 1]; ++c) adj_v[c] += h * adj_q[c];
    }
    _Pragma("unroll 1") for (int k = 0; k < NV; ++k) g.w[k] = h * adj_v[k];
    solve(s, g.w);
    _Pragma("unroll 1") for (int k = 0; k < NV; ++k) g.w[k] = -g.w[k];
    // root to leaf
    set_zero(g.W[0], 6);
    set_zero(g.gW[0], 6);
    set_zero(g.gA[0], 6);
    set_zero(g.gV[0], 6);
    if (TOUCHES) set_zero(g.E[0], 6);
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      vec W[6];
      _Pragma("unroll") for (int c = 0; c < 6; ++c) W[c] = g.W[PARENT[i]][c];
      add_joint_motion(s.S, g.w, i, W);
      _Pragma("unroll") for (int c = 0; c < 6; ++c) g.W[i][c] = W[c];
      vec gW[6], gA[6], gV[6];
      set_zero(gW, 6);
      set_zero(gA, 6);
      set_zero(gV, 6);
      if (MASSIVE[i]) {                     // gW = I A + V x* H,  gA = I W,  gV = -(W x* H + I X)
        const real m = N[LINK + LINK_WORDS * (i - 1) + MASS];
        vec H[6], X[6];
        apply_inertia(m, s.C[i], s.J[i], s.V[i], H);
        apply_inertia(m, s.C[i], s.J[i], A[i], gW);
        add_force_cross(gW, s.V[i], H);
        apply_inertia(m, s.C[i], s.J[i], W, gA);
        set_zero(X, 6);
        add_motion_cross(X, W, s.V[i]);     // -X = W x V
        apply_inertia(m, s.C[i], s.J[i], X, gV);
        sub_force_cross(gV, W, H);
      }
      _Pragma("unroll") for (int c = 0; c < 6; ++c) {
        g.gW[i][c] = gW[c];
        g.gA[i][c] = gA[c];
        g.gV[i][c] = gV[c];
      }
      if (TOUCHES) set_zero(g.E[i], 6);
    }
    if (NPOINT) ground_forces_vjp(s, g.W, g.gW, g.gV, g.E);
    if (NPAIR) pair_forces_vjp(s, g.W, g.gW, g.gV, g.E);
    if (NFLUID) fluid_forces_vjp(s, g.W, g.gW, g.gV);
    // leaf to root, sums over subtrees
    _Pragma("unroll 1") for (int i = NL; i >= 1; --i) {
      const int before = PARENT[i];
      vec y[6], z[6], gV[6], sv[6];
      set_zero(sv, 6);
      add_joint_motion(s.S, s.v, i, sv);
      _Pragma("unroll") for (int c = 0; c < 6; ++c) y[c] = gV[c] = g.gV[i][c];
      sub_force_cross(y, s.V[before], g.gA[i]);
      add_force_cross(gV, sv, g.gA[i]);
      if (TOUCHES) { _Pragma("unroll") for (int c = 0; c < 6; ++c) z[c] = g.E[i][c]; }
      else set_zero(z, 6);
      sub_force_cross(z, s.V[before], gV);
      sub_force_cross(z, A[before], g.gA[i]);
      sub_force_cross(z, g.W[before], g.gW[i]);
      _Pragma("unroll 1") for (int k = DOF[i]; k < DOF[i + 1]; ++k) {
        adj_q[k] += dot6(s.S[k], z);
        adj_v[k] += dot6(s.S[k], y);
      }
      _Pragma("unroll") for (int c = 0; c < 6; ++c) {
        g.gV[before][c] += gV[c];
        g.gA[before][c] += g.gA[i][c];
        g.gW[before][c] += g.gW[i][c];
        if (TOUCHES) g.E[before][c] += g.E[i][c];
      }
    }
    joint_forces_vjp(s, u, g.w, adj_q, adj_v, adj_u);
  };

  // qpos cotangents to the tangent space and back: theta = E^T G / 2, G = 2 E theta / |q|, columns of E q o (0, e)
  const auto to_tangent = [&](const vec* q, const vec* adj, vec* adj_q) {
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      const int k = DOF[i];
      const vec* const g = adj + QPOS[i];
      if (KIND[i] != BALL) {
        _Pragma("unroll 1") for (int c = 0; c < DOF[i + 1] - k; ++c) adj_q[k + c] = g[c];
        continue;
      }
      const vec *const r = q + QPOS[i];
      adj_q[k] = real(0.5) * (r[0] * g[1] - r[1] * g[0] + r[3] * g[2] - r[2] * g[3]);
      adj_q[k + 1] = real(0.5) * (r[0] * g[2] - r[2] * g[0] + r[1] * g[3] - r[3] * g[1]);
      adj_q[k + 2] = real(0.5) * (r[0] * g[3] - r[3] * g[0] + r[2] * g[1] - r[1] * g[2]);
    }
  };
  const auto from_tangent = [&](const vec* q, const vec* adj_q, vec* adj) {
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      const int k = DOF[i];
      vec* const g = adj + QPOS[i];
      if (KIND[i] != BALL) {
        _Pragma("unroll 1") for (int c = 0; c < DOF[i + 1] - k; ++c) g[c] = adj_q[k + c];
        continue;
      }
      const vec *const r = q + QPOS[i];
      const vec f = real(2) / (r[0] * r[0] + dot3(r + 1, r + 1));
      const vec x = f * adj_q[k], y = f * adj_q[k + 1], z = f * adj_q[k + 2];
      g[0] = -(r[1] * x + r[2] * y + r[3] * z);
      g[1] = r[0] * x - r[3] * y + r[2] * z;
      g[2] = r[3] * x + r[0] * y - r[1] * z;
      g[3] = r[1] * y - r[2] * x + r[0] * z;
    }
  };

  // adj (fields, NQ + NV) of x_next becomes that of x; adj_u (fields, NU) is overwritten
  const auto substeps_vjp = [&](Slot* slots, vec (*trail)[NQ + 2 * NV], Work& w, const vec* u, const vec* x_next,
                                int fields, vec (*adj)[NQ + NV], vec (*adj_u)[NU]) {
    Pull g;
    vec adj_q[2][NV];
    _Pragma("unroll 1") for (int f = 0; f < fields; ++f) {
      to_tangent(x_next, adj[f], adj_q[f]);
      set_zero(adj_u[f], NU);
    }
    _Pragma("unroll 1") for (int k = SUBSTEPS - 1; k >= 0; --k) {
      Slot& s = slots[k % KEPT];
      if (RECORD && k < SUBSTEPS - 1) {
        _Pragma("unroll 1") for (int j = 0; j < NQ; ++j) s.q[j] = trail[k][j];
        _Pragma("unroll 1") for (int j = 0; j < NV; ++j) { s.v[j] = trail[k][NQ + j]; s.qdd[j] = trail[k][NQ + NV + j]; }
        place(s);
        mass_matrix(s, w);
        factorize(s);
      }
      accelerate(s, true, w.A);
      _Pragma("unroll 1") for (int f = 0; f < fields; ++f) pull(s, g, w.A, u, adj_q[f], adj[f] + NQ, adj_u[f]);
      /* COLLECT */
    }
    _Pragma("unroll 1") for (int f = 0; f < fields; ++f) from_tangent(slots[0].q, adj_q[f], adj[f]);
  };

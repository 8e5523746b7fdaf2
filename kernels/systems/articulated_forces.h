// Forces on an articulated body other than inertia: joints, actuators, contact, fluid; each beside its adjoint.
//
// The adjoints are of L = -w . f with the cotangent w of the joint accelerations' equation, see articulated.py.

  // springs, dampers, limits and actuators: to tau (NV)
  const auto joint_forces = [&](const Slot& s, const vec* u, vec* tau) {
    _Pragma("unroll 1") for (int k = 0; k < NV; ++k) tau[k] = -N[DOFS + DOF_WORDS * k + DAMPING] * s.v[k];
    _Pragma("unroll 1") for (int e = 0; e < NSPRING; ++e) {
      const real* const n = N + SPRING + 2 * e;
      tau[SPRING_DOF[e]] -= n[0] * (s.q[SPRING_QPOS[e]] - n[1]);
    }
    const real ke = N[GLOBAL + LIMIT_KE], kd = N[GLOBAL + LIMIT_KD];
    _Pragma("unroll 1") for (int e = 0; e < NLIMIT; ++e) {
      const real* const n = N + LIMIT + 2 * e;
      const vec x = s.q[LIMIT_QPOS[e]], y = s.v[LIMIT_DOF[e]];
      tau[LIMIT_DOF[e]] += ke * (positive(n[0] - x) * positive(real(1) - kd * y)
                                 - positive(x - n[1]) * positive(real(1) + kd * y));
    }
    _Pragma("unroll 1") for (int a = 0; a < NU; ++a) {
      const real* const n = N + ACTUATOR + ACTUATOR_WORDS * a;
      vec x = u[a];
      x = x < n[CTRL_LOW] ? (vec)(n[CTRL_LOW]) : x > n[CTRL_HIGH] ? (vec)(n[CTRL_HIGH]) : x;
      vec f = n[GAIN] * x + n[BIAS];
      if (AFFINE) {
        f += n[GEAR] * (n[BIAS + 1] * s.q[ACTUATOR_QPOS[a]] + n[BIAS + 2] * s.v[ACTUATOR_DOF[a]]);
        f = f < n[FORCE_LOW] ? (vec)(n[FORCE_LOW]) : f > n[FORCE_HIGH] ? (vec)(n[FORCE_HIGH]) : f;
      }
      tau[ACTUATOR_DOF[a]] += n[GEAR] * f;
    }
  };

  const auto joint_forces_vjp = [&](const Slot& s, const vec* u, const vec* w, vec* adj_q, vec* adj_v, vec* adj_u) {
    _Pragma("unroll 1") for (int k = 0; k < NV; ++k) adj_v[k] += N[DOFS + DOF_WORDS * k + DAMPING] * w[k];
    _Pragma("unroll 1") for (int e = 0; e < NSPRING; ++e) adj_q[SPRING_DOF[e]] += N[SPRING + 2 * e] * w[SPRING_DOF[e]];
    const real ke = N[GLOBAL + LIMIT_KE], kd = N[GLOBAL + LIMIT_KD];
    _Pragma("unroll 1") for (int e = 0; e < NLIMIT; ++e) {
      const real* const n = N + LIMIT + 2 * e;
      const vec x = s.q[LIMIT_QPOS[e]], y = s.v[LIMIT_DOF[e]], zero = (vec)(real(0));
      const vec below = positive(n[0] - x), above = positive(x - n[1]);
      const vec s_below = positive(real(1) - kd * y), s_above = positive(real(1) + kd * y);
      const vec g = ke * w[LIMIT_DOF[e]];
      adj_q[LIMIT_DOF[e]] += g * ((below > zero ? s_below : zero) + (above > zero ? s_above : zero));
      adj_v[LIMIT_DOF[e]] += g * kd * ((s_below > zero ? below : zero) + (s_above > zero ? above : zero));
    }
    _Pragma("unroll 1") for (int a = 0; a < NU; ++a) {
      const real* const n = N + ACTUATOR + ACTUATOR_WORDS * a;
      const vec zero = (vec)(real(0));
      vec x = u[a], g = -n[GEAR] * w[ACTUATOR_DOF[a]];
      const vec clipped = x < n[CTRL_LOW] ? (vec)(n[CTRL_LOW]) : x > n[CTRL_HIGH] ? (vec)(n[CTRL_HIGH]) : x;
      if (AFFINE) {
        const vec f = n[GAIN] * clipped + n[BIAS]
          + n[GEAR] * (n[BIAS + 1] * s.q[ACTUATOR_QPOS[a]] + n[BIAS + 2] * s.v[ACTUATOR_DOF[a]]);
        g = f < n[FORCE_LOW] ? zero : f > n[FORCE_HIGH] ? zero : g;
        adj_q[ACTUATOR_DOF[a]] += g * n[BIAS + 1] * n[GEAR];
        adj_v[ACTUATOR_DOF[a]] += g * n[BIAS + 2] * n[GEAR];
      }
      adj_u[a] += x < n[CTRL_LOW] ? zero : x > n[CTRL_HIGH] ? zero : g * n[GAIN];
    }
  };

  // Normal force ke d s and what friction is bounded by; `out` is the velocity away from the surface. Either
  // s = max(0, 1 - kd out), which bounds friction too, or, APPROACH, s = 1 + kd max(0, -out) for the normal
  // force alone.
  struct Normal { vec d, slope, s, force, bound; };
  const auto normal_force = [&](vec depth, vec out) -> Normal {
    const real ke = N[GLOBAL + CONTACT_KE], kd = N[GLOBAL + CONTACT_KD];
    const vec zero = (vec)(real(0));
    Normal n;
    n.d = positive(depth);
    n.s = APPROACH ? real(1) + kd * positive(-out) : positive(real(1) - kd * out);
    n.slope = APPROACH ? (out < zero ? (vec)(-kd) : zero) : (n.s > zero ? (vec)(-kd) : zero);
    n.force = ke * n.d * n.s;
    n.bound = APPROACH ? ke * n.d : n.force;
    return n;
  };
  // adjoints of depth and of the velocity away, from those of force and bound
  const auto normal_force_vjp = [&](const Normal& n, vec depth, vec adj_force, vec adj_bound, vec& adj_depth, vec& adj_out) {
    const real ke = N[GLOBAL + CONTACT_KE];
    const vec g = APPROACH ? adj_force * n.s + adj_bound : (adj_force + adj_bound) * n.s;
    adj_depth = depth > (vec)(real(0)) ? ke * g : (vec)(real(0));
    adj_out = ke * n.d * n.slope * (APPROACH ? adj_force : adj_force + adj_bound);
  };
  // friction -g v_t
  const auto friction = [&](real mu, vec bound, vec v2) -> vec {
    if (SMOOTH) {
      const real vs = N[GLOBAL + CONTACT_VS];
      return mu * bound / root(v2 + vs * vs);
    }
    const vec kf = (vec)(N[GLOBAL + CONTACT_KF]), g = mu * bound / root(v2 + real(1e-30));
    return g < kf ? g : kf;
  };
  // of L += g (w_t . v_t) with x = w_t . v_t: adj_v_t = g w_t - along v_t, and what reaches the bound
  const auto friction_vjp = [&](real mu, vec bound, vec v2, vec x, vec& g, vec& along, vec& adj_bound) {
    if (SMOOTH) {
      const real vs = N[GLOBAL + CONTACT_VS];
      const vec r2 = v2 + vs * vs, r = real(1) / root(r2);
      g = mu * bound * r;
      along = g * x * r * r;
      adj_bound = mu * x * r;
      return;
    }
    const vec kf = (vec)(N[GLOBAL + CONTACT_KF]), zero = (vec)(real(0));
    const vec r = real(1) / root(v2 + real(1e-30)), slip = mu * bound * r;
    g = slip < kf ? slip : kf;
    along = slip < kf ? g * x * r * r : zero;
    adj_bound = slip < kf ? mu * x * r : zero;
  };
  const auto velocity_at = [&](const vec* V, const vec* at, vec* v) {       // of a point of a spatial motion
    _Pragma("unroll") for (int c = 0; c < 3; ++c) v[c] = V[3 + c];
    add_cross(v, V, at);
  };
  const auto add_wrench = [&](vec* F, const vec* at, const vec* f) {        // F += [at x f; f]
    add_cross(F, at, f);
    _Pragma("unroll") for (int c = 0; c < 3; ++c) F[3 + c] += f[c];
  };
  const auto sub_wrench = [&](vec* F, const vec* at, const vec* f) {
    sub_cross(F, at, f);
    _Pragma("unroll") for (int c = 0; c < 3; ++c) F[3 + c] -= f[c];
  };
  const auto point_of = [&](const Slot& s, int link, const real* local, vec* at) {
    rotate(s.R[link], local, at);
    _Pragma("unroll") for (int c = 0; c < 3; ++c) at[c] += s.P[link][c];
  };

  // spheres on the ground: subtracted from F
  const auto ground_forces = [&](const Slot& s, vec (*F)[6]) {
    _Pragma("unroll 1") for (int e = 0; e < NPOINT; ++e) {
      const real* const n = N + POINT + POINT_WORDS * e;
      const int i = POINT_LINK[e];
      vec at[3], v[3], f[3];
      point_of(s, i, n, at);
      at[2] -= n[RADIUS];
      velocity_at(s.V[i], at, v);
      const Normal normal = normal_force(N[GLOBAL + GROUND] - at[2] - s.o[2], v[2]);
      const vec g = friction(n[FRICTION], normal.bound, v[0] * v[0] + v[1] * v[1]);
      f[0] = -g * v[0];
      f[1] = -g * v[1];
      f[2] = normal.force;
      sub_wrench(F[i], at, f);
    }
  };

  // G: cotangents of a body's W, V, and E, what turns with neither
  const auto ground_forces_vjp = [&](const Slot& s, const vec (*Wm)[6], vec (*gW)[6], vec (*gV)[6], vec (*E)[6]) {
    _Pragma("unroll 1") for (int e = 0; e < NPOINT; ++e) {
      const real* const n = N + POINT + POINT_WORDS * e;
      const int i = POINT_LINK[e];
      vec at[3], v[3], w[3], f[3], gv[3], g, along, adj_bound, adj_depth, adj_out;
      point_of(s, i, n, at);
      at[2] -= n[RADIUS];
      velocity_at(s.V[i], at, v);
      velocity_at(Wm[i], at, w);
      const vec depth = N[GLOBAL + GROUND] - at[2] - s.o[2];
      const Normal normal = normal_force(depth, v[2]);
      friction_vjp(n[FRICTION], normal.bound, v[0] * v[0] + v[1] * v[1], w[0] * v[0] + w[1] * v[1], g, along, adj_bound);
      normal_force_vjp(normal, depth, -w[2], adj_bound, adj_depth, adj_out);
      f[0] = -g * v[0];
      f[1] = -g * v[1];
      f[2] = normal.force;
      gv[0] = g * w[0] - along * v[0];
      gv[1] = g * w[1] - along * v[1];
      gv[2] = adj_out;
      sub_wrench(gW[i], at, f);
      add_wrench(gV[i], at, gv);
      // the lowest point moves with the centre, a radius above it
      vec moved[3] = {(vec)(real(0)), (vec)(real(0)), -adj_depth}, sum[3];
      add_wrench(E[i], at, moved);
      add_cross(E[i], v, gv);
      sub_cross(E[i], w, f);
      _Pragma("unroll") for (int c = 0; c < 3; ++c) sum[c] = moved[c];
      add_cross(sum, gv, s.V[i]);
      sub_cross(sum, f, Wm[i]);
      E[i][0] -= n[RADIUS] * sum[1];
      E[i][1] += n[RADIUS] * sum[0];
    }
  };

  // two spheres on each other: they touch at the point that divides the line of their centres by the radii
  struct Touch { vec at[3], a[3], b[3], n[3], v[3], vt[3], depth, out, inverse; };
  const auto touch = [&](const Slot& s, int e) -> Touch {
    const real* const n = N + PAIR + PAIR_WORDS * e;
    const int i = PAIR_A[e], j = PAIR_B[e];
    const real share = n[SECOND + RADIUS] / (n[RADIUS] + n[SECOND + RADIUS]);
    Touch t;
    vec x[3], other[3];
    point_of(s, i, n, t.a);
    point_of(s, j, n + SECOND, t.b);
    _Pragma("unroll") for (int c = 0; c < 3; ++c) {
      x[c] = t.a[c] - t.b[c];
      t.at[c] = share * t.a[c] + (real(1) - share) * t.b[c];
    }
    const vec distance = root(dot3(x, x));
    t.inverse = real(1) / distance;
    t.depth = (n[RADIUS] + n[SECOND + RADIUS]) - distance;
    velocity_at(s.V[i], t.at, t.v);
    velocity_at(s.V[j], t.at, other);
    _Pragma("unroll") for (int c = 0; c < 3; ++c) { t.n[c] = x[c] * t.inverse; t.v[c] -= other[c]; }
    t.out = dot3(t.n, t.v);
    _Pragma("unroll") for (int c = 0; c < 3; ++c) t.vt[c] = t.v[c] - t.out * t.n[c];
    return t;
  };
  const auto pair_forces = [&](const Slot& s, vec (*F)[6]) {
    _Pragma("unroll 1") for (int e = 0; e < NPAIR; ++e) {
      const Touch t = touch(s, e);
      const Normal normal = normal_force(t.depth, t.out);
      const vec g = friction(N[PAIR + PAIR_WORDS * e + FRICTION], normal.bound, dot3(t.vt, t.vt));
      vec f[3];
      _Pragma("unroll") for (int c = 0; c < 3; ++c) f[c] = normal.force * t.n[c] - g * t.vt[c];
      sub_wrench(F[PAIR_A[e]], t.at, f);
      add_wrench(F[PAIR_B[e]], t.at, f);
    }
  };
  const auto pair_forces_vjp = [&](const Slot& s, const vec (*Wm)[6], vec (*gW)[6], vec (*gV)[6], vec (*E)[6]) {
    _Pragma("unroll 1") for (int e = 0; e < NPAIR; ++e) {
      const int i = PAIR_A[e], j = PAIR_B[e];
      const real* const n = N + PAIR + PAIR_WORDS * e;
      const real share = n[SECOND + RADIUS] / (n[RADIUS] + n[SECOND + RADIUS]);
      const Touch t = touch(s, e);
      vec va[3], vb[3], wa[3], wb[3], w[3], wt[3], f[3], gv[3], gx[3], g, along, adj_bound, adj_depth, adj_out;
      velocity_at(s.V[i], t.at, va);
      velocity_at(s.V[j], t.at, vb);
      velocity_at(Wm[i], t.at, wa);
      velocity_at(Wm[j], t.at, wb);
      _Pragma("unroll") for (int c = 0; c < 3; ++c) w[c] = wa[c] - wb[c];
      // L = -w . f,  f = force n - g v_t,  v_t = v - (n . v) n
      const Normal normal = normal_force(t.depth, t.out);
      const vec wn = dot3(w, t.n);
      _Pragma("unroll") for (int c = 0; c < 3; ++c) wt[c] = w[c] - wn * t.n[c];
      friction_vjp(n[FRICTION], normal.bound, dot3(t.vt, t.vt), dot3(wt, t.vt), g, along, adj_bound);
      normal_force_vjp(normal, t.depth, -wn, adj_bound, adj_depth, adj_out);
      vec adj_n[3];
      _Pragma("unroll") for (int c = 0; c < 3; ++c) {
        f[c] = normal.force * t.n[c] - g * t.vt[c];
        const vec adj_vt = g * wt[c] - along * t.vt[c];
        gv[c] = adj_vt + adj_out * t.n[c];
        // of n: from the force, from v_t (adj_vt is tangential), and from n . v
        adj_n[c] = adj_out * t.v[c] - normal.force * w[c] - t.out * adj_vt - g * wn * t.vt[c];
      }
      const vec along_n = dot3(adj_n, t.n);
      _Pragma("unroll") for (int c = 0; c < 3; ++c)
        gx[c] = (adj_n[c] - along_n * t.n[c]) * t.inverse - adj_depth * t.n[c];
      sub_wrench(gW[i], t.at, f);
      add_wrench(gW[j], t.at, f);
      add_wrench(gV[i], t.at, gv);
      sub_wrench(gV[j], t.at, gv);
      // the centres move with their spheres, the point with both
      vec ga[3], gb[3], ma[3], mb[3];
      set_zero(ga, 3);
      set_zero(gb, 3);
      add_cross(ga, gv, s.V[i]);
      sub_cross(ga, f, Wm[i]);
      sub_cross(gb, gv, s.V[j]);
      add_cross(gb, f, Wm[j]);
      _Pragma("unroll") for (int c = 0; c < 3; ++c) {
        const vec both = ga[c] + gb[c];
        ma[c] = gx[c] + share * both;
        mb[c] = (real(1) - share) * both - gx[c];
      }
      add_wrench(E[i], t.a, ma);
      sub_wrench(E[i], t.at, ga);
      add_cross(E[i], va, gv);
      sub_cross(E[i], wa, f);
      add_wrench(E[j], t.b, mb);
      sub_wrench(E[j], t.at, gb);
      sub_cross(E[j], vb, gv);
      add_cross(E[j], wb, f);
    }
  };

  // drag of the box of a body's inertia, about its centre and in its principal axes: -(linear + square |x|) x
  const auto in_axes = [&](const Slot& s, int e, const vec* x, vec* B, vec* c, vec* y) {
    const real* const n = N + FLUID + FLUID_WORDS * e;
    const int i = FLUID_LINK[e];
    vec v[3];
    point_of(s, i, n, c);
    velocity_at(x, c, v);
    _Pragma("unroll") for (int k = 0; k < 9; k += 3)
      _Pragma("unroll") for (int j = 0; j < 3; ++j)
        B[k + j] = s.R[i][k] * n[AXES + j] + s.R[i][k + 1] * n[AXES + 3 + j] + s.R[i][k + 2] * n[AXES + 6 + j];
    _Pragma("unroll") for (int j = 0; j < 3; ++j) {
      y[j] = B[j] * x[0] + B[3 + j] * x[1] + B[6 + j] * x[2];
      y[3 + j] = B[j] * v[0] + B[3 + j] * v[1] + B[6 + j] * v[2];
    }
  };
  const auto add_from_axes = [&](const vec* B, const vec* c, const vec* y, vec* F) {
    vec f[3];
    _Pragma("unroll") for (int k = 0; k < 3; ++k) {
      F[k] += B[3 * k] * y[0] + B[3 * k + 1] * y[1] + B[3 * k + 2] * y[2];
      f[k] = B[3 * k] * y[3] + B[3 * k + 1] * y[4] + B[3 * k + 2] * y[5];
    }
    add_wrench(F, c, f);
  };
  const auto fluid_forces = [&](const Slot& s, vec (*F)[6]) {
    _Pragma("unroll 1") for (int e = 0; e < NFLUID; ++e) {
      const real* const n = N + FLUID + FLUID_WORDS * e;
      vec B[9], c[3], x[6];
      in_axes(s, e, s.V[FLUID_LINK[e]], B, c, x);
      _Pragma("unroll") for (int k = 0; k < 6; ++k)
        x[k] *= n[LINEAR + k] + n[SQUARE + k] * (x[k] > (vec)(real(0)) ? x[k] : -x[k]);
      add_from_axes(B, c, x, F[FLUID_LINK[e]]);
    }
  };
  const auto fluid_forces_vjp = [&](const Slot& s, const vec (*Wm)[6], vec (*gW)[6], vec (*gV)[6]) {
    fluid_forces(s, gW);
    _Pragma("unroll 1") for (int e = 0; e < NFLUID; ++e) {
      const real* const n = N + FLUID + FLUID_WORDS * e;
      vec B[9], c[3], x[6], y[6];
      in_axes(s, e, s.V[FLUID_LINK[e]], B, c, x);
      in_axes(s, e, Wm[FLUID_LINK[e]], B, c, y);
      _Pragma("unroll") for (int k = 0; k < 6; ++k)
        y[k] *= n[LINEAR + k] + real(2) * n[SQUARE + k] * (x[k] > (vec)(real(0)) ? x[k] : -x[k]);
      add_from_axes(B, c, y, gV[FLUID_LINK[e]]);
    }
  };

  // qdd of the slot's state, with everything that its adjoint needs
  const auto dynamics = [&](Slot& s, Work& w, const vec* u) {
    place(s);
    accelerate(s, false, w.A);
    inertial_forces(s, w.A, w.F);
    if (NPOINT) ground_forces(s, w.F);
    if (NPAIR) pair_forces(s, w.F);
    if (NFLUID) fluid_forces(s, w.F);
    joint_forces(s, u, s.qdd);
    subtract_joint_parts(s, w.F, s.qdd);
    mass_matrix(s, w);
    factorize(s);
    solve(s, s.qdd);
  };

  // semi-implicit Euler step of length h; of a ball: q/|q| o exp(h v)
  const auto turn = [&](const vec* q, const vec* v, vec* q_next) {
    vec r[3], sine, cosine;
    _Pragma("unroll") for (int c = 0; c < 3; ++c) r[c] = h * v[c];
    const vec r2 = dot3(r, r), angle = root(r2);
    sincos(real(0.5) * angle, sine, cosine);
    const vec k = r2 > (vec)(real(SMALL)) ? sine / angle : real(0.5) - r2 * real(1.0 / 48.0);
    const vec one = real(1) / root(q[0] * q[0] + dot3(q + 1, q + 1));
    const vec a = one * q[0], b = one * q[1], c = one * q[2], d = one * q[3];
    const vec x = k * r[0], y = k * r[1], z = k * r[2];
    q_next[0] = a * cosine - b * x - c * y - d * z;
    q_next[1] = a * x + b * cosine + c * z - d * y;
    q_next[2] = a * y + c * cosine + d * x - b * z;
    q_next[3] = a * z + d * cosine + b * y - c * x;
  };
  const auto advance = [&](const Slot& s, vec* q_next, vec* v_next) {
    _Pragma("unroll 1") for (int k = 0; k < NV; ++k) v_next[k] = s.v[k] + h * s.qdd[k];
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      const vec *const q = s.q + QPOS[i], *const v = v_next + DOF[i];
      if (KIND[i] == BALL) turn(q, v, q_next + QPOS[i]);
      else _Pragma("unroll 1") for (int k = 0; k < DOF[i + 1] - DOF[i]; ++k) q_next[QPOS[i] + k] = q[k] + h * v[k];
    }
  };

  // all substeps forwards; what KEPT of them found stays; RECORD: so do the states of all
  const auto substeps = [&](Slot* slots, vec (*trail)[NQ + 2 * NV], Work& w, const vec* u, vec* x_next) {
    _Pragma("unroll 1") for (int k = 0; k < SUBSTEPS; ++k) {
      Slot& s = slots[k % KEPT];
      dynamics(s, w, u);
      if (RECORD) {
        _Pragma("unroll 1") for (int j = 0; j < NQ; ++j) trail[k][j] = s.q[j];
        _Pragma("unroll 1") for (int j = 0; j < NV; ++j) { trail[k][NQ + j] = s.v[j]; trail[k][NQ + NV + j] = s.qdd[j]; }
      }
      advance(s, x_next, x_next + NQ);
      if (k + 1 < SUBSTEPS) {
        Slot& next = slots[(k + 1) % KEPT];
        _Pragma("unroll 1") for (int j = 0; j < NQ; ++j) next.q[j] = x_next[j];
        _Pragma("unroll 1") for (int j = 0; j < NV; ++j) next.v[j] = x_next[NQ + j];
      }
    }
  };

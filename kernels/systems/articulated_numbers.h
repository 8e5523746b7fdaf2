// Cotangents of an articulated body's numbers in a substep; equations: articulated.py. Between articulated_forces.h
// and articulated_adjoint.h, which calls it behind each substep's `pull`.

  vec found[NUMBERS];
  set_zero(found, NUMBERS);

  // added to `found`, in the order of Structure.number_places; g: w and W of the substep, A: its accelerations
  const auto collect = [&](const Slot& s, const auto& g, const vec (*A)[6], const vec* u) {
    vec* to = found;
    _Pragma("unroll 1") for (int k = 0; k < NV; ++k) {
      *to++ += g.w[k] * s.qdd[k];
      *to++ += g.w[k] * (IMPLICIT ? s.v[k] + h * s.qdd[k] : s.v[k]);
    }
    _Pragma("unroll 1") for (int a = 0; a < NU; ++a) {
      const real* const n = N + ACTUATOR + ACTUATOR_WORDS * a;
      vec x = u[a];
      x = x < n[CTRL_LOW] ? (vec)(n[CTRL_LOW]) : x > n[CTRL_HIGH] ? (vec)(n[CTRL_HIGH]) : x;
      vec f = n[GAIN] * x + n[BIAS];
      if (AFFINE) {
        const vec rest = n[BIAS + 1] * s.q[ACTUATOR_QPOS[a]] + n[BIAS + 2] * s.v[ACTUATOR_DOF[a]];
        const vec force = f + n[GEAR] * rest;
        f = force < n[FORCE_LOW] ? (vec)(n[FORCE_LOW]) : force > n[FORCE_HIGH] ? (vec)(n[FORCE_HIGH])
            : force + n[GEAR] * rest;
      }
      *to++ -= g.w[ACTUATOR_DOF[a]] * f;
    }
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      if (!MASSIVE[i]) continue;
      const real* const n = N + LINK + LINK_WORDS * (i - 1);
      const vec* const R = s.R[i];
      vec c[3], X[6];
      rotate(R, n + CENTRE, c);
      _Pragma("unroll") for (int k = 0; k < 3; ++k) c[k] += s.P[i][k];
      set_zero(X, 6);
      add_motion_cross(X, g.W[i], s.V[i]);
      const vec* const pairs[2][2] = {{g.W[i], A[i]}, {X, s.V[i]}};
      _Pragma("unroll 1") for (int e = 0; e < 2; ++e) {
        const vec *const a = pairs[e][0], *const b = pairs[e][1];
        vec ac[3], bc[3], turn[3], al[3], bl[3];          // at the centre; angular, in the link's axes
        _Pragma("unroll") for (int k = 0; k < 3; ++k) { ac[k] = a[3 + k]; bc[k] = b[3 + k]; turn[k] = (vec)(real(0)); }
        add_cross(ac, a, c);
        add_cross(bc, b, c);
        add_cross(turn, bc, a);
        add_cross(turn, ac, b);
        to[0] += dot3(ac, bc);
        _Pragma("unroll") for (int k = 0; k < 3; ++k) {
          to[1 + k] += n[MASS] * (R[k] * turn[0] + R[3 + k] * turn[1] + R[6 + k] * turn[2]);
          al[k] = R[k] * a[0] + R[3 + k] * a[1] + R[6 + k] * a[2];
          bl[k] = R[k] * b[0] + R[3 + k] * b[1] + R[6 + k] * b[2];
        }
        _Pragma("unroll") for (int k = 0; k < 3; ++k) to[4 + k] += al[k] * bl[k];
        to[7] += al[0] * bl[1] + al[1] * bl[0];
        to[8] += al[0] * bl[2] + al[2] * bl[0];
        to[9] += al[1] * bl[2] + al[2] * bl[1];
      }
      to += 10;
    }
  };

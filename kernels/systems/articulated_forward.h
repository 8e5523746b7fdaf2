// Forward dynamics of an articulated body; equations and frames: articulated.py.
//
// Part of a function body: `real`, `vec` (a world in each lane, or one world), sizes, tables and the offsets
// into the numbers N of the model come before it. All loops over links, degrees of freedom and points stay
// loops; what they find lies in memory, in Slot (kept for the backward pass) and Work.

  const real* const N = (const real*)p.numbers.data;
  const real h = N[GLOBAL + DT];

  struct Slot {
    vec q[NQ], v[NV], qdd[NV];
    vec o[3];                               // position of the origin of all spatial vectors
    vec R[NL + 1][9], P[NL + 1][3];         // axes of a link as columns, its position from the origin
    vec S[NV][6], V[NL + 1][6];             // motion axes; spatial velocities
    vec C[NL + 1][3], J[NL + 1][6];         // mass times centre; inertia about the origin: xx yy zz xy xz yz
    vec L[NM], D[NV];                       // factor of the mass matrix, inverse pivots
  };
  struct Work {
    vec A[NL + 1][6], F[NL + 1][6];         // spatial accelerations, forces
    vec C[NL + 1][3], J[NL + 1][6];         // inertia of subtrees
  };

  const auto set_zero = [](vec* a, int n) { for (int i = 0; i < n; ++i) a[i] = (vec)(real(0)); };
  const auto positive = [](vec x) -> vec { return x > (vec)(real(0)) ? x : (vec)(real(0)); };
  const auto dot3 = [](const vec* a, const vec* b) -> vec { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; };
  const auto dot6 = [](const vec* a, const vec* b) -> vec {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + a[4] * b[4] + a[5] * b[5];
  };
  const auto add_cross = [](vec* c, const vec* a, const vec* b) {      // c += a x b
    c[0] += a[1] * b[2] - a[2] * b[1];
    c[1] += a[2] * b[0] - a[0] * b[2];
    c[2] += a[0] * b[1] - a[1] * b[0];
  };
  const auto sub_cross = [](vec* c, const vec* a, const vec* b) {      // c -= a x b
    c[0] -= a[1] * b[2] - a[2] * b[1];
    c[1] -= a[2] * b[0] - a[0] * b[2];
    c[2] -= a[0] * b[1] - a[1] * b[0];
  };
  const auto add_motion_cross = [&](vec* c, const vec* a, const vec* b) {   // c += a x b, motions
    add_cross(c, a, b);
    add_cross(c + 3, a, b + 3);
    add_cross(c + 3, a + 3, b);
  };
  const auto add_force_cross = [&](vec* c, const vec* a, const vec* f) {    // c += a x* f
    add_cross(c, a, f);
    add_cross(c, a + 3, f + 3);
    add_cross(c + 3, a, f + 3);
  };
  const auto sub_force_cross = [&](vec* c, const vec* a, const vec* f) {    // c -= a x* f
    sub_cross(c, a, f);
    sub_cross(c, a + 3, f + 3);
    sub_cross(c + 3, a, f + 3);
  };
  const auto apply_inertia = [&](real m, const vec* C, const vec* J, const vec* x, vec* f) {  // f = I x
    f[0] = J[0] * x[0] + J[3] * x[1] + J[4] * x[2];
    f[1] = J[3] * x[0] + J[1] * x[1] + J[5] * x[2];
    f[2] = J[4] * x[0] + J[5] * x[1] + J[2] * x[2];
    add_cross(f, C, x + 3);
    f[3] = m * x[3];
    f[4] = m * x[4];
    f[5] = m * x[5];
    sub_cross(f + 3, C, x);
  };
  const auto rotate = [](const vec* R, const real* a, vec* b) {         // b = R a
    b[0] = R[0] * a[0] + R[1] * a[1] + R[2] * a[2];
    b[1] = R[3] * a[0] + R[4] * a[1] + R[5] * a[2];
    b[2] = R[6] * a[0] + R[7] * a[1] + R[8] * a[2];
  };
  const auto add_joint_motion = [](const vec (*S)[6], const vec* x, int i, vec* y) {   // y += sum_k S_k x_k
    for (int k = DOF[i]; k < DOF[i + 1]; ++k)
      _Pragma("unroll") for (int c = 0; c < 6; ++c) y[c] += S[k][c] * x[k];
  };

  // R, P of all links, axes S, velocities V, inertias about the origin
  const auto place = [&](Slot& s) {
    _Pragma("unroll") for (int c = 0; c < 9; ++c) s.R[0][c] = (vec)(real(c % 4 == 0));
    set_zero(s.P[0], 3);
    set_zero(s.V[0], 6);
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      const real* const n = N + LINK + LINK_WORDS * (i - 1);
      const vec* const R0 = s.R[PARENT[i]];
      vec* const R = s.R[i];
      vec* const P = s.P[i];
      rotate(R0, n + OFFSET, P);
      _Pragma("unroll") for (int c = 0; c < 3; ++c) P[c] += s.P[PARENT[i]][c];
      if (TURNED[i]) {
        _Pragma("unroll") for (int c = 0; c < 9; c += 3)
          _Pragma("unroll") for (int j = 0; j < 3; ++j)
            R[c + j] = R0[c] * n[TURN + j] + R0[c + 1] * n[TURN + 3 + j] + R0[c + 2] * n[TURN + 6 + j];
      } else {
        _Pragma("unroll") for (int c = 0; c < 9; ++c) R[c] = R0[c];
      }
      const vec* const q = s.q + QPOS[i];
      if (KIND[i] == HINGE) {               // about the third axis
        vec sine, cosine;
        sincos(q[0] - n[Q0], sine, cosine);
        _Pragma("unroll") for (int c = 0; c < 9; c += 3) {
          const vec x = R[c], y = R[c + 1];
          R[c] = cosine * x + sine * y;
          R[c + 1] = cosine * y - sine * x;
        }
      } else if (KIND[i] == SLIDE) {        // along the third axis
        const vec way = q[0] - n[Q0];
        _Pragma("unroll") for (int c = 0; c < 3; ++c) P[c] += R[3 * c + 2] * way;
      } else if (KIND[i] == SLIDES) {       // along the axes of the world
        _Pragma("unroll") for (int c = 0; c < 3; ++c) P[c] = s.P[0][c] + q[c];
      } else {                              // a ball: by a quaternion
        const vec two = real(2) / (q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
        const vec x = two * q[1], y = two * q[2], z = two * q[3];
        const vec xx = x * q[1], yy = y * q[2], zz = z * q[3], xy = x * q[2], xz = x * q[3], yz = y * q[3];
        const vec wx = x * q[0], wy = y * q[0], wz = z * q[0];
        const vec B[9] = {real(1) - yy - zz, xy - wz, xz + wy, xy + wz, real(1) - xx - zz, yz - wx,
                          xz - wy, yz + wx, real(1) - xx - yy};
        _Pragma("unroll") for (int c = 0; c < 9; c += 3) {
          const vec a = R[c], b = R[c + 1], d = R[c + 2];
          _Pragma("unroll") for (int j = 0; j < 3; ++j) R[c + j] = a * B[j] + b * B[3 + j] + d * B[6 + j];
        }
      }
      if (i == ORIGIN) {                    // what comes next is measured from here
        _Pragma("unroll") for (int c = 0; c < 3; ++c) s.o[c] = P[c];
        _Pragma("unroll 1") for (int j = 0; j <= ORIGIN; ++j)
          _Pragma("unroll") for (int c = 0; c < 3; ++c) s.P[j][c] -= s.o[c];
      }
    }
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      const real* const n = N + LINK + LINK_WORDS * (i - 1);
      const vec *const R = s.R[i], *const P = s.P[i];
      vec (*const S)[6] = s.S + DOF[i];
      if (KIND[i] == HINGE || KIND[i] == BALL) {
        const int first = KIND[i] == HINGE ? 2 : 0;
        _Pragma("unroll 1") for (int k = 0; k < (KIND[i] == HINGE ? 1 : 3); ++k) {
          _Pragma("unroll") for (int c = 0; c < 3; ++c) S[k][c] = R[3 * c + first + k];
          set_zero(S[k] + 3, 3);
          add_cross(S[k] + 3, P, S[k]);
        }
      } else if (KIND[i] == SLIDE) {
        set_zero(S[0], 3);
        _Pragma("unroll") for (int c = 0; c < 3; ++c) S[0][3 + c] = R[3 * c + 2];
      } else {
        _Pragma("unroll 1") for (int k = 0; k < 3; ++k)
          _Pragma("unroll") for (int c = 0; c < 6; ++c) S[k][c] = (vec)(real(c == 3 + k));
      }
      vec V[6];
      _Pragma("unroll") for (int c = 0; c < 6; ++c) V[c] = s.V[PARENT[i]][c];
      add_joint_motion(s.S, s.v, i, V);
      _Pragma("unroll") for (int c = 0; c < 6; ++c) s.V[i][c] = V[c];
      if (MASSIVE[i]) {                     // J = R J_link R^T + m (|c|^2 - c c^T)
        const real m = n[MASS];
        const real *const j = n + INERTIA;
        vec c[3], T[9];
        rotate(R, n + CENTRE, c);
        _Pragma("unroll") for (int k = 0; k < 3; ++k) c[k] += P[k];
        _Pragma("unroll") for (int k = 0; k < 9; k += 3) {
          T[k] = R[k] * j[0] + R[k + 1] * j[3] + R[k + 2] * j[4];
          T[k + 1] = R[k] * j[3] + R[k + 1] * j[1] + R[k + 2] * j[5];
          T[k + 2] = R[k] * j[4] + R[k + 1] * j[5] + R[k + 2] * j[2];
        }
        const vec mx = m * c[0], my = m * c[1], mz = m * c[2];
        s.C[i][0] = mx;
        s.C[i][1] = my;
        s.C[i][2] = mz;
        s.J[i][0] = dot3(T, R) + (my * c[1] + mz * c[2]);
        s.J[i][1] = dot3(T + 3, R + 3) + (mx * c[0] + mz * c[2]);
        s.J[i][2] = dot3(T + 6, R + 6) + (mx * c[0] + my * c[1]);
        s.J[i][3] = dot3(T, R + 3) - mx * c[1];
        s.J[i][4] = dot3(T, R + 6) - mx * c[2];
        s.J[i][5] = dot3(T + 3, R + 6) - my * c[2];
      }
    }
  };

  // A of all links: A = A0 + S qdd + V0 x (S v)
  const auto accelerate = [&](const Slot& s, bool moved, vec (*A)[6]) {
    set_zero(A[0], 3);
    _Pragma("unroll") for (int c = 0; c < 3; ++c) A[0][3 + c] = (vec)(-N[GLOBAL + GRAVITY + c]);
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      vec a[6], sv[6];
      set_zero(sv, 6);
      add_joint_motion(s.S, s.v, i, sv);
      _Pragma("unroll") for (int c = 0; c < 6; ++c) a[c] = A[PARENT[i]][c];
      if (moved) add_joint_motion(s.S, s.qdd, i, a);
      add_motion_cross(a, s.V[PARENT[i]], sv);
      _Pragma("unroll") for (int c = 0; c < 6; ++c) A[i][c] = a[c];
    }
  };

  // I A + V x* I V of all links, 0 without mass
  const auto inertial_forces = [&](const Slot& s, const vec (*A)[6], vec (*F)[6]) {
    set_zero(F[0], 6);
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      vec f[6];
      set_zero(f, 6);
      if (MASSIVE[i]) {
        const real m = N[LINK + LINK_WORDS * (i - 1) + MASS];
        vec H[6];
        apply_inertia(m, s.C[i], s.J[i], A[i], f);
        apply_inertia(m, s.C[i], s.J[i], s.V[i], H);
        add_force_cross(f, s.V[i], H);
      }
      _Pragma("unroll") for (int c = 0; c < 6; ++c) F[i][c] = f[c];
    }
  };

  // F becomes its sums over subtrees; tau -= S . F
  const auto subtract_joint_parts = [&](const Slot& s, vec (*F)[6], vec* tau) {
    _Pragma("unroll 1") for (int i = NL; i >= 1; --i) {
      _Pragma("unroll 1") for (int k = DOF[i]; k < DOF[i + 1]; ++k) tau[k] -= dot6(s.S[k], F[i]);
      _Pragma("unroll") for (int c = 0; c < 6; ++c) F[PARENT[i]][c] += F[i][c];
    }
  };

  // Mh = M + diag(armature) [+ h diag(damping)] to L. Row k holds the entries of k and of what is above it, from
  // the root on; there are no others.
  const auto mass_matrix = [&](Slot& s, Work& w) {
    _Pragma("unroll 1") for (int i = 1; i <= NL; ++i) {
      _Pragma("unroll") for (int c = 0; c < 3; ++c) w.C[i][c] = MASSIVE[i] ? s.C[i][c] : (vec)(real(0));
      _Pragma("unroll") for (int c = 0; c < 6; ++c) w.J[i][c] = MASSIVE[i] ? s.J[i][c] : (vec)(real(0));
    }
    _Pragma("unroll 1") for (int i = NL; i >= 1; --i) {
      const real m = N[LINK + LINK_WORDS * (i - 1) + SUBTREE_MASS];
      _Pragma("unroll 1") for (int k = DOF[i + 1] - 1; k >= DOF[i]; --k) {
        vec f[6];
        apply_inertia(m, w.C[i], w.J[i], s.S[k], f);
        const real* const d = N + DOFS + DOF_WORDS * k;
        vec* const row = s.L + ROW[k];
        int at = DEPTH[k];
        row[at] = dot6(s.S[k], f) + (IMPLICIT ? d[ARMATURE] + h * d[DAMPING] : d[ARMATURE]);
        _Pragma("unroll 1") for (int j = ABOVE[k]; j >= 0; j = ABOVE[j]) row[--at] = dot6(s.S[j], f);
      }
      if (PARENT[i]) {
        vec *const C = w.C[PARENT[i]], *const J = w.J[PARENT[i]];
        _Pragma("unroll") for (int c = 0; c < 3; ++c) C[c] += w.C[i][c];
        _Pragma("unroll") for (int c = 0; c < 6; ++c) J[c] += w.J[i][c];
      }
    }
  };

  // Mh = L^T D L, in place
  const auto factorize = [&](Slot& s) {
    _Pragma("unroll 1") for (int k = NV - 1; k >= 0; --k) {
      vec* const row = s.L + ROW[k];
      const vec d = real(1) / row[DEPTH[k]];
      s.D[k] = d;
      _Pragma("unroll 1") for (int i = ABOVE[k]; i >= 0; i = ABOVE[i]) {
        vec* const other = s.L + ROW[i];
        const vec a = row[DEPTH[i]] * d;
        _Pragma("unroll 1") for (int j = 0; j <= DEPTH[i]; ++j) other[j] -= a * row[j];
        row[DEPTH[i]] = a;
      }
    }
  };

  const auto solve = [&](const Slot& s, vec* x) {
    _Pragma("unroll 1") for (int k = NV - 1; k >= 0; --k) {
      const vec* const row = s.L + ROW[k];
      const vec y = x[k];
      _Pragma("unroll 1") for (int i = ABOVE[k]; i >= 0; i = ABOVE[i]) x[i] -= row[DEPTH[i]] * y;
      x[k] = y * s.D[k];
    }
    _Pragma("unroll 1") for (int k = 0; k < NV; ++k) {
      const vec* const row = s.L + ROW[k];
      vec y = x[k];
      _Pragma("unroll 1") for (int i = ABOVE[k]; i >= 0; i = ABOVE[i]) y -= row[DEPTH[i]] * x[i];
      x[k] = y;
    }
  };

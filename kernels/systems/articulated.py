"""Articulated rigid bodies with contact: forward dynamics, a semi-implicit Euler step, hand-written adjoints.

Spatial vectors [angular; linear] have the axes of the world and stand at the position of the first body, so
that their numbers do not grow with the way it has gone. With a x b = [aw x bw; av x bw + aw x bv] of motions
and a x* f = [aw x n + av x f; aw x f] of a motion and a force, axes S of a joint, and V0, A0 the values
before it:

    V = V0 + S v        A = A0 + S qdd + V0 x (S v),  of the world [0; -g]         F = I A + V x* I V - f
    tau = S . (sum of F over the subtree)        M = S_i . (inertia of the subtree of i) S_j

    qdd = Mh^-1 (joint forces - tau(qdd = 0))      Mh = M + diag(armature) [+ h diag(damping), implicit]
    v' = v + h qdd      q' = q + h v'       of a ball q' = q/|q| o exp(h v')

Mh = L^T D L in the order of the tree has no entries but those of a joint and the joints above it. Backwards,
with the cotangent adj_qdd, w is one more solve with the same factor:

    w = -Mh^-1 adj_qdd        W = W0 + S w,  of the world 0        X = V x W        H = I V

    per body            gW = I A + V x* H - f        gA = I W        gV = -(W x* H + I X)
    leaf to root,       adj_v += S . (gV - V0 x* gA)        gV += (S v) x* gA
    sums of subtrees    adj_q += S . (E - V0 x* gV - A0 x* gA - W0 x* gW)

The kinematics are not reversed: turning a subtree together with its V, A, W leaves w . tau as it is, so the
derivative along a joint is that of turning (V0, A0, W0) the other way. E is not zero for what does not turn
along: the ground and the other sphere of a pair. Cotangents of qpos are taken to the tangent space of a ball,
theta = E^T G / 2 with columns q o (0, e_i), and back as G = 2 E theta / |q|; through exp(r), with phi = |r|,

    adj_r = x + a r x x + b r x (r x x)        x -> x + sin(phi)/phi r x x + a r x (r x x)
    a = (1 - cos phi) / phi^2                  b = (phi - sin phi) / phi^3

Cotangents of the numbers: w . tau = W . (I A) + (W x V) . (I V) is linear in mass, centre and inertia; with
a_c, b_c the velocities of two motions a, b at the centre c of mass, J about it, summed over both products,

    a . I b = m a_c . b_c + aw . J bw            adj_m += a_c . b_c
    adj_c += m (b_c x aw + a_c x bw)             adj_J += aw bw^T, in the axes of the link
    adj_armature = w qdd        adj_damping = w v, implicit w (v + h qdd)        adj_gear = -w dforce/dgear

Contact of a sphere: p its lowest point, depth d, velocity v (v_n away from the ground, v_t along it):

    s = max(0, 1 - kd v_n)       N = ke d s       f = N n - g v_t
    g = min(kf, mu N / |v_t|)  or, smooth,  mu N / sqrt(|v_t|^2 + vs^2)
    approaching bodies damped only:   s = 1 + kd max(0, -v_n),  and friction is bounded by mu ke d

Two spheres touch where the line between their centres is divided by their radii. Joint limits are such
springs, ke depth max(0, 1 -+ kd v). A fluid drags on the box with a body's inertia (MuJoCo's inertia box).

Three forms have the same text: worlds in vector lanes for CPUs, one world in memory, and one by value. The
text is in articulated_forward.h, _forces.h, _numbers.h and _adjoint.h, the tables are in
articulated_tables.py.

Sources: Featherstone, Rigid Body Dynamics Algorithms (2008), for RNEA, the composite inertias and L^T D L;
the adjoint and the contact's are derived from the equations above.
State [qpos, qvel] as MuJoCo has them, control as its ctrl; units SI.
"""

import functools
from pathlib import Path
from typing import Any

import warp as wp

from ..policy.layout import BLOCK
from ..system import BlockFunctions, DeviceFunctions, MemoryFunctions, ParameterFunctions
from .articulated_tables import Structure, kept_substeps, source
from .lanes import sincos
from .native_block import fill, native_block

WIDE = 8
"""Worlds of the wide block form: vectors of 32 bytes in float32, of 64 in float64. Four lanes take 1.6 times
as long, sixteen 0.9 times with twice the scratch."""

_LANES = """
  enum { W = WORLDS, L = W };
  typedef real vec __attribute__((ext_vector_type(W)));
SINCOS
  const auto root = [](vec x) -> vec { return __builtin_elementwise_sqrt(x); };
  const auto lane = [](vec& x, int w) -> real& { return ((real*)&x)[w]; };
"""
_ONE = """
  enum { W = 1 };
  typedef real vec;
  const auto sincos = [](vec q, vec& s, vec& c) { s = wp::sin(q); c = wp::cos(q); };
  const auto root = [](vec x) -> vec { return wp::sqrt(x); };
  const auto lane = [](vec& x, int) -> real& { return x; };
"""
_LOAD = """
  vec x_next[NQ + NV], u[NU];
  Work work;
  Slot slots[KEPT];
  vec trail[RECORD ? SUBSTEPS : 1][NQ + 2 * NV];
  for (int w = 0; w < W; ++w) {
    const real *const x = state_of(w), *const c = control_of(w);
    for (int k = 0; k < NQ; ++k) lane(slots[0].q[k], w) = x[k];
    for (int k = 0; k < NV; ++k) lane(slots[0].v[k], w) = x[NQ + k];
    for (int k = 0; k < NU; ++k) lane(u[k], w) = c[k];
  }
  substeps(slots, trail, work, u, x_next);
"""
_STORE = """
  for (int w = 0; w < worlds; ++w) {
    real* const to = next_of(w);
    for (int k = 0; k < NQ + NV; ++k) to[k] = lane(x_next[k], w);
  }
"""
_PULL = """
  vec adj_x[2][NQ + NV], adj_c[2][NU];
  for (int f = 0; f < fields; ++f)
    for (int w = 0; w < W; ++w) {
      const real* const from = adj_of(f, w < worlds ? w : worlds - 1);
      for (int k = 0; k < NQ + NV; ++k) lane(adj_x[f][k], w) = from[k];
    }
  substeps_vjp(slots, trail, work, u, x_next, fields, adj_x, adj_c);
  for (int f = 0; f < fields; ++f)
    for (int w = 0; w < worlds; ++w) {
      real *const to = adj_of(f, w), *const to_u = adj_u_of(f, w);
      for (int k = 0; k < NQ + NV; ++k) to[k] = lane(adj_x[f][k], w);
      for (int k = 0; k < NU; ++k) to_u[k] = lane(adj_c[f][k], w);
    }
"""

# Where the numbers of a world lie, for each form of the step.
_BLOCK = """
  const long long row0 = (long long)t * nworld + world0;
  const auto row_of = [&](int w) -> long long { return row0 + (w < worlds ? w : worlds - 1); };
  const auto state_of = [&](int w) -> const real* {
    return (const real*)states.data + row_of(w) * (NQ + NV);
  };
  const auto control_of = [&](int w) -> const real* { return (const real*)controls.data + row_of(w) * NU; };
"""
_BLOCK_NEXT = """
  const auto next_of = [&](int w) -> real* { return (real*)states.data + (row0 + nworld + w) * (NQ + NV); };
"""
_BLOCK_ADJ = """
  const int fields = adj_u.shape[0], horizon = adj_u.shape[1];
  const auto adj_of = [&](int f, int w) -> real* {
    return (real*)adj.data + ((long long)f * nworld + world0 + w) * (NQ + NV);
  };
  const auto adj_u_of = [&](int f, int w) -> real* {
    return (real*)adj_u.data + ((long long)f * horizon * nworld + row0 + w) * NU;
  };
"""
_MEMORY = """
  const int worlds = 1;
  const auto state_of = [&](int) -> const real* { return wp::address(states, t, world)->c; };
  const auto control_of = [&](int) -> const real* { return wp::address(controls, t, world)->c; };
"""
_MEMORY_NEXT = """
  const auto next_of = [&](int) -> real* { return wp::address(states, t + 1, world)->c; };
"""
_MEMORY_ADJ = """
  const int fields = adj.shape[0];
  const auto adj_of = [&](int f, int) -> real* { return adj.data[f].c; };
  const auto adj_u_of = [&](int f, int) -> real* { return adj_u.data[f].c; };
"""
_VALUE = """
  const int worlds = 1;
  const auto state_of = [&](int) -> const real* { return x.c; };
  const auto control_of = [&](int) -> const real* { return c.c; };
"""
_VALUE_NEXT = """
  wp::vec_t<NQ + NV, real> result;
  const auto next_of = [&](int) -> real* { return result.c; };
"""
_VALUE_ADJ = """
  const int fields = 1;
  wp::vec_t<NQ + NV + NU, real> result;
  for (int k = 0; k < NQ + NV; ++k) result.c[k] = adj.c[k];
  const auto adj_of = [&](int, int) -> real* { return result.c; };
  const auto adj_u_of = [&](int, int) -> real* { return result.c + NQ + NV; };
"""

# The numbers' cotangents through a step, by value.
_PULL_NUMBERS = """
  wp::vec_t<NUMBERS, real> result;
  vec adj_x[2][NQ + NV], adj_c[2][NU];
  for (int k = 0; k < NQ + NV; ++k) adj_x[0][k] = adj.c[k];
  substeps_vjp(slots, trail, work, u, x_next, 1, adj_x, adj_c);
  for (int k = 0; k < NUMBERS; ++k) result.c[k] = found[k];
  return result;
"""

_INSPECT = """
  Slot s;
  Work work;
  vec c[NU], zero[NV], bias_forces[NV];
  for (int k = 0; k < NQ; ++k) s.q[k] = *wp::address(qpos, world, k);
  for (int k = 0; k < NV; ++k) { s.v[k] = *wp::address(qvel, world, k); bias_forces[k] = vec(0); }
  for (int k = 0; k < NU; ++k) c[k] = *wp::address(ctrl, world, k);
  place(s);
  accelerate(s, false, work.A);
  inertial_forces(s, work.A, work.F);
  if (NPOINT) ground_forces(s, work.F);
  if (NPAIR) pair_forces(s, work.F);
  if (NFLUID) fluid_forces(s, work.F);
  subtract_joint_parts(s, work.F, bias_forces);
  mass_matrix(s, work);
  for (int k = 0; k < NV; ++k) {
    *wp::address(bias, world, k) = -bias_forces[k];
    for (int j = 0; j < NV; ++j) *wp::address(mass, world, k, j) = real(0);
  }
  for (int k = 0; k < NV; ++k)
    for (int j = k; j >= 0; j = ABOVE[j])
      *wp::address(mass, world, k, j) = *wp::address(mass, world, j, k) = s.L[ROW[k] + DEPTH[j]];
  dynamics(s, work, c);
  for (int k = 0; k < NV; ++k) *wp::address(qacc, world, k) = s.qdd[k];
"""


def _read(name: str) -> str:
    return Path(__file__).with_name(f"articulated_{name}.h").read_text()


_FORWARD, _FORCES, _ADJOINT = _read("forward"), _read("forces"), _read("adjoint")
_NUMBERS = _read("numbers")


def _text(structure: Structure, dtype: Any, worlds: int, body: str, kept: int) -> str:
    """A function body: the model, one of both kinds of `vec`, the dynamics and what is done with them."""
    vectors = _LANES.replace("SINCOS", sincos(dtype)).replace("WORLDS", str(worlds)) if worlds > 1 else _ONE
    small = "  #define SMALL 1e-6\n  typedef REAL real;\n"
    text = small + source(structure, kept) + vectors + _FORWARD + _FORCES + body
    return f"#if !defined(__CUDA_ARCH__)\n{text}\n#endif\n" if worlds > 1 else text


@functools.cache
def make_params(dtype: Any) -> Any:
    """Returns the Warp struct of the parameters: the model's numbers, in the order of `Structure.words`."""

    @wp.struct
    class ArticulatedParams:
        numbers: wp.array(dtype=dtype)

    return ArticulatedParams


@functools.cache
def make_functions(structure: Structure, dtype: Any) -> DeviceFunctions:
    """Returns the device functions for models of this structure and `dtype` (wp.float32 or wp.float64)."""
    size, inputs = structure.qpos_size + structure.dofs, len(structure.actuators)
    Params = make_params(dtype)
    State = wp.types.vector(length=size, dtype=dtype)
    Control = wp.types.vector(length=inputs, dtype=dtype)
    Both = wp.types.vector(length=size + inputs, dtype=dtype)
    itemsize = 4 if dtype == wp.float32 else 8

    def one(body: str, kept: int) -> str:
        return fill(_text(structure, dtype, 1, body, kept), {}, dtype)

    kept = kept_substeps(structure, itemsize, 1)

    @wp.func_native(one(_VALUE + _VALUE_NEXT + _LOAD + _STORE + "  return result;\n", 1))
    def articulated_step(x: State, c: Control, p: Params) -> State: ...

    @wp.func_native(one(_ADJOINT + _VALUE + _VALUE_ADJ + _LOAD + _PULL + "  return result;\n", kept))
    def step_vjp_value(x: State, c: Control, p: Params, adj: State) -> Both: ...

    @wp.func
    def articulated_step_vjp(x: State, c: Control, p: Params, adj_x_next: State):
        both = step_vjp_value(x, c, p, adj_x_next)
        adj_x = State()
        adj_c = Control()
        for k in range(size):
            adj_x[k] = both[k]
        for k in range(inputs):
            adj_c[k] = both[size + k]
        return adj_x, adj_c

    @wp.func_native(one(_MEMORY + _MEMORY_NEXT + _LOAD + _STORE, 1))
    def step_in_memory(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        world: int,
    ): ...

    @wp.func_native(one(_ADJOINT + _MEMORY + _MEMORY_ADJ + _LOAD + _PULL, kept))
    def step_vjp_in_memory(
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        p: Params,
        t: int,
        world: int,
        adj: wp.array(dtype=State),  # (fields,)
        adj_u: wp.array(dtype=Control),  # (fields,)
    ): ...

    def lanes(worlds: int) -> BlockFunctions:
        kept = kept_substeps(structure, itemsize, worlds)
        step = _text(structure, dtype, worlds, _BLOCK + _BLOCK_NEXT + _LOAD + _STORE, 1)
        step_vjp = _text(structure, dtype, worlds, _ADJOINT + _BLOCK + _BLOCK_ADJ + _LOAD + _PULL, kept)
        return native_block(step, step_vjp, {}, dtype, Params, State, Control)

    memory = MemoryFunctions(step_in_memory, step_vjp_in_memory)
    return DeviceFunctions(
        Params,
        State,
        Control,
        articulated_step,
        articulated_step_vjp,
        block=lanes(BLOCK),
        memory=memory,
        wide=lanes(WIDE),
        wide_worlds=WIDE,
    )


@functools.cache
def make_parameter_functions(structure: Structure, dtype: Any, names: tuple[str, ...]) -> ParameterFunctions:
    """Returns the `ParameterFunctions` for the numbers of `Structure.number_places`, by these names."""
    functions = make_functions(structure, dtype)
    Params, State, Control = functions.Params, functions.State, functions.Control
    places = structure.number_places()
    Values = wp.types.vector(length=len(places), dtype=dtype)
    kept = kept_substeps(structure, 4 if dtype == wp.float32 else 8, 1)
    adjoint = _ADJOINT.replace("/* COLLECT */", "collect(s, g, w.A, u);")
    body = f"  enum {{ NUMBERS = {len(places)} }};\n{_NUMBERS}{adjoint}{_VALUE}{_LOAD}{_PULL_NUMBERS}"

    @wp.func_native(fill(_text(structure, dtype, 1, body, kept), {}, dtype))
    def articulated_numbers_vjp(x: State, c: Control, p: Params, adj: State) -> Values: ...

    return ParameterFunctions(names, Values, articulated_numbers_vjp, array="numbers", places=places)


@functools.cache
def make_inspect(structure: Structure, dtype: Any) -> wp.Kernel:
    """Returns the kernel that writes the parts of a step (accelerations, mass matrix, bias), one world a
    thread; for checks, not for speed.
    """
    Params = make_params(dtype)

    @wp.func_native(fill(_text(structure, dtype, 1, _INSPECT, 1), {}, dtype))
    def inspect_world(
        qpos: wp.array2d(dtype=dtype),
        qvel: wp.array2d(dtype=dtype),
        ctrl: wp.array2d(dtype=dtype),
        p: Params,
        world: int,
        qacc: wp.array2d(dtype=dtype),
        mass: wp.array3d(dtype=dtype),
        bias: wp.array2d(dtype=dtype),
    ): ...

    @wp.kernel(module="unique", enable_backward=False)
    def inspect(
        # In:
        qpos: wp.array2d(dtype=dtype),  # (nworld, nq)
        qvel: wp.array2d(dtype=dtype),  # (nworld, nv)
        ctrl: wp.array2d(dtype=dtype),  # (nworld, nu)
        p: Params,
        # Out:
        qacc: wp.array2d(dtype=dtype),  # (nworld, nv) accelerations
        mass: wp.array3d(dtype=dtype),  # (nworld, nv, nv) Mh
        bias: wp.array2d(dtype=dtype),  # (nworld, nv) joint forces that hold the accelerations at 0
    ):
        inspect_world(qpos, qvel, ctrl, p, wp.tid(), qacc, mass, bias)

    return inspect

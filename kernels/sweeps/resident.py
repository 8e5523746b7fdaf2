"""The forward sweep for GPUs: a block of threads holds a policy's weights in registers for all time steps.

A thread owns one unit of every hidden layer, or one of `split` interleaved parts of it, and keeps the weights
that it multiplies with. Activations of the block's worlds lie in shared memory. Each is read as part of a
16-byte broadcast to a whole warp. Nothing of the network is read from global memory again. With s the part of
a thread and V the number of elements in 16 bytes, at each position of a layer (see layout.py):

    share_s = sum_i sum_{q < V} w[i V + q] x[(i split + s) V + q]      registers times broadcasts
    a_j     = tanh(b_j + sum_s share_s)                                neighbouring lanes exchange their sums
    u_c     = b_c + sum_k W_o[c, k] a_L[k]                             a warp per world and control

A barrier follows every layer. The first threads of a block, one for each world, compute the step of the
physics and keep the state in their registers. The rows are written to memory in one piece, 16 bytes a thread.

The sizes of the network must be known when the kernel is compiled, so there is a kernel for each network. It
exists only if the weights fit the registers (`make_plan`). Other networks take the sweep of fused_rollout.py.
"""

import functools
from typing import Any, NamedTuple

import warp as wp

from ..policy.description import ACTIVATIONS
from ..policy.layout import BLOCK, Layout, layout
from ..policy.table import ACTIVATION, CLEAR, LINEAR, Column
from ..system import DeviceFunctions
from ..systems.elements import REGISTER_BYTES, is_large, make_elements, takes_memory
from .blocks import block_worlds
from .forms import sweep_kernel
from .rollout import make_cost

BANK = 16
"""Bytes of one load from shared memory."""
REGISTERS = {128: 128, 256: 128, 512: 48}
"""Sizes of a block, and the number of 32-bit registers that each of its threads may use for weights. A
multiprocessor has 65536 for all threads, a thread at most 255, and the step of the physics needs some.
"""
SHARED_BYTES = 46 << 10
"""Shared memory of a block: the 48 KiB that need no opt-in, less what Warp takes."""
MOST_SPLIT = 4
"""Numbers of parts of a unit: what so many threads read together lies within a padded section."""
LATENCY_WORLDS = 256
"""Up to so many worlds a block has one world, and (nearly) a multiprocessor for itself. Beyond, a block has
BLOCK worlds, and the sums of one hide the latency of the others.
"""


class HiddenLayer(NamedTuple):
    """How the threads of a block share a hidden layer."""

    split: int
    """Threads of a unit, a power of two."""
    count: int
    """Weights of a thread, whole loads of 16 bytes."""
    first: int
    """Where they begin among the thread's weights; the bias of the unit follows them."""


class Plan(NamedTuple):
    """How a network is placed in the registers and the shared memory of a block."""

    network: str
    itemsize: int
    worlds: int
    """Worlds of a block, a divisor of BLOCK."""
    threads: int
    hidden: tuple[HiddenLayer, ...]
    weights: int
    """Elements that a thread keeps, weights and biases."""

    @property
    def layout(self) -> Layout:
        """Where parameters and activations lie in memory."""
        return layout(self.network, self.itemsize)

    def blocks(self, nworld: int) -> int:
        """Blocks of threads for `nworld` worlds of one policy: whole BLOCKs, as rows are stored in these."""
        return (nworld + BLOCK - 1) // BLOCK * (BLOCK // self.worlds)


def choose_plan(network: str, itemsize: int, nworld: int) -> Plan | None:
    """Returns the plan to take, None for the sweep of fused_rollout.py. The latter is also taken for a large
    state in double precision, whose step needs the registers (with the weights in them it spilled 30 to 90
    bytes).
    """
    large = layout(network, itemsize).state_size * itemsize > REGISTER_BYTES
    return None if large and itemsize == 8 else make_plan(network, itemsize, nworld)


@functools.cache
def make_plan(network: str, itemsize: int, nworld: int) -> Plan | None:
    """Returns how blocks of threads share a network in a rollout of `nworld` worlds.

    Returns None for a policy that is no chain of linear layers and convolutions with tanh between them, or if
    the weights do not fit the registers of the largest block, or the activations its shared memory.
    """
    lay = layout(network, itemsize)
    lanes = BANK // itemsize
    if not _is_chain(lay) or any(lay.column(i, Column.HOP) % lanes for i in lay.linear):
        return None
    output = lay.control_size * (lay.column(lay.linear[-1], Column.PITCH_WINDOW) + 1)
    worlds = 1 if nworld <= LATENCY_WORLDS else BLOCK
    while worlds * (lay.row + lay.control_size) + output > SHARED_BYTES // itemsize:
        if worlds == 1:
            return None
        worlds //= 2
    for threads, registers in REGISTERS.items():
        hidden, weights = _share(lay, threads, lanes)
        if hidden and weights * itemsize <= registers * 4:
            return Plan(network, itemsize, worlds, threads, tuple(hidden), weights)
    return None


def _is_chain(lay: Layout) -> bool:
    """Whether a policy is a chain of linear operations with tanh between them, at least two."""
    kinds = [lay.column(i, Column.KIND) for i in range(lay.operations)]
    kinds = [kind for kind in kinds if kind != CLEAR]  # which is for the backward pass
    between = ACTIVATION + list(ACTIVATIONS).index("tanh")
    return len(kinds) > 1 and kinds == [LINEAR, between] * (len(kinds) // 2) + [LINEAR]


def _share(lay: Layout, threads: int, lanes: int) -> tuple[list[HiddenLayer], int]:
    """Splits the hidden layers over threads; none where a layer has more units than there are threads."""
    hidden, first = [], 0
    for i in lay.linear[:-1]:
        window, units = lay.column(i, Column.WINDOW), lay.column(i, Column.UNITS)
        if units > threads:
            return [], 0
        split = MOST_SPLIT
        while split * units > threads:
            split //= 2
        count = -(-window // (lanes * split)) * lanes
        hidden.append(HiddenLayer(split, count, first))
        first += count + 1
    return hidden, first


LAYER_COLUMNS = "WINDOW UNITS PITCH_UNITS FORWARD BIAS INPUT POSITIONS HOP OUTPUT STEP"
"""What the text knows of a layer, see `Column`."""
_UNROLL = '_Pragma("unroll")'


def _sum_over_lanes(name: str, size: str, most: str) -> str:
    """Gives every lane the sums over those that differ from it in the bits below `most`."""
    return f"""{_UNROLL} for (int bit = 1; bit < {most}; bit *= 2)
        {_UNROLL} for (int r = 0; r < {size}; ++r)
          {name}[r] += __shfl_xor_sync(0xffffffffu, {name}[r], bit);"""


def _constants(plan: Plan) -> str:
    lay = plan.layout
    last = lay.linear[-1]
    values = {
        "THREADS": plan.threads,
        "WORLDS": plan.worlds,
        "LANES": BANK // plan.itemsize,
        "ROW": lay.row,
        "STATE": lay.state_size,
        "CONTROLS": lay.control_size,
        "OUT_INPUT": lay.column(last, Column.INPUT),
        "OUT_WINDOW": lay.column(last, Column.WINDOW),
        "OUT_PITCH": lay.column(last, Column.PITCH_WINDOW),
        "OUT_MATRIX": lay.column(last, Column.BACKWARD),
        "OUT_BIAS": lay.column(last, Column.BIAS),
    }
    listed = ", ".join(f"{name} = {value}" for name, value in values.items())
    real = "float" if plan.itemsize == 4 else "double"
    return f"""
  typedef {real} real;
  enum {{ {listed} }};
  struct alignas({BANK}) Bank {{ real of[LANES]; }};
"""


def _layer_constants(plan: Plan, i: int) -> str:
    lay, share = plan.layout, plan.hidden[i]
    operation = lay.linear[i]
    values = {"SPLIT": share.split, "COUNT": share.count, "FIRST": share.first}
    for name in LAYER_COLUMNS.split():
        values[name] = lay.column(operation, getattr(Column, name))
    return "enum { " + ", ".join(f"{name} = {value}" for name, value in values.items()) + " };"


def _load_text(plan: Plan) -> str:
    """The text that fills a thread's weights `w` from `params`."""
    layers = "".join(
        f"""
  {{
    {_layer_constants(plan, i)}
    const int unit = lane / SPLIT;
    {_UNROLL} for (int k = 0; k < COUNT; ++k) {{
      const int from = k / LANES * (LANES * SPLIT) + lane % SPLIT * LANES + k % LANES;
      w.c[FIRST + k] = unit < UNITS && from < WINDOW ? P[FORWARD + from * PITCH_UNITS + unit] : real(0);
    }}
    w.c[FIRST + COUNT] = unit < UNITS ? P[BIAS + unit] : real(0);
  }}"""
        for i in range(len(plan.hidden))
    )
    return f"{_constants(plan)}\n  const real* P = params.data;{layers}\n"


def _policy_text(plan: Plan, read_state: str) -> str:
    """The text of one evaluation of the policy: from the states of a block's worlds to `us`, their controls.

    It keeps the rows [x | a_1 | ... ] in `rows` and writes them to `hidden`. Between two barriers no lane
    reads what another lane has written. `read_state` is the expression for component i of the thread's state.
    """
    begin = f"""{_constants(plan)}
  alignas({BANK}) __shared__ real rows[WORLDS * ROW];
  __shared__ real matrix[CONTROLS * (OUT_PITCH + 1)];
  __shared__ real us[WORLDS * CONTROLS];
  if (fresh) {{
    // paddings stay zero from here on
    for (int i = lane; i < WORLDS * ROW; i += THREADS) rows[i] = real(0);
    for (int i = lane; i < CONTROLS * OUT_PITCH; i += THREADS) matrix[i] = params.data[OUT_MATRIX + i];
    for (int i = lane; i < CONTROLS; i += THREADS)
      matrix[CONTROLS * OUT_PITCH + i] = params.data[OUT_BIAS + i];
    __syncthreads();
  }}
  if (owner)
    for (int i = 0; i < STATE; ++i) rows[lane * ROW + i] = {read_state};
  __syncthreads();
"""
    layers = "".join(
        f"""
  {{
    {_layer_constants(plan, i)}
    const int unit = lane / SPLIT;
    _Pragma("unroll 1") for (int position = 0; position < POSITIONS; ++position) {{
      const real* read = rows + INPUT + position * HOP + lane % SPLIT * LANES;
      real sums[WORLDS][LANES];
      {_UNROLL} for (int r = 0; r < WORLDS; ++r)
        {_UNROLL} for (int q = 0; q < LANES; ++q) sums[r][q] = real(0);
      {_UNROLL} for (int k = 0; k < COUNT; k += LANES)
        {_UNROLL} for (int r = 0; r < WORLDS; ++r) {{
          const Bank bank = *reinterpret_cast<const Bank*>(read + r * ROW + k * SPLIT);
          {_UNROLL} for (int q = 0; q < LANES; ++q) sums[r][q] += bank.of[q] * w.c[FIRST + k + q];
        }}
      real share[WORLDS];
      {_UNROLL} for (int r = 0; r < WORLDS; ++r) {{
        share[r] = sums[r][0];
        {_UNROLL} for (int q = 1; q < LANES; ++q) share[r] += sums[r][q];
      }}
      {_sum_over_lanes("share", "WORLDS", "SPLIT")}
      real* written = rows + OUTPUT + position * STEP + unit;
      // the threads of a unit take the worlds in turn
      {_UNROLL} for (int r = 0; r < WORLDS; ++r)
        if (unit < UNITS && r % SPLIT == lane % SPLIT)
          written[r * ROW] = tanh(share[r] + w.c[FIRST + COUNT]);
    }}
  }}
  __syncthreads();
"""
        for i in range(len(plan.hidden))
    )
    end = f"""
  Bank* stored = reinterpret_cast<Bank*>(hidden.data + row0);
  const Bank* banks = reinterpret_cast<const Bank*>(rows);
  for (int i = lane; i < WORLDS * ROW / LANES; i += THREADS) stored[i] = banks[i];
  for (int first = 0; first < WORLDS * CONTROLS; first += THREADS / 32) {{
    const int at = first + lane / 32;
    const real* a = rows + at / CONTROLS * ROW + OUT_INPUT;
    const real* weights = matrix + at % CONTROLS * OUT_PITCH;
    real sum[1] = {{real(0)}};
    if (at < WORLDS * CONTROLS)
      for (int k = lane % 32; k < OUT_WINDOW; k += 32) sum[0] += a[k] * weights[k];
    {_sum_over_lanes("sum", "1", "32")}
    if (at < WORLDS * CONTROLS && lane % 32 == 0)
      us[at] = sum[0] + matrix[CONTROLS * OUT_PITCH + at % CONTROLS];
  }}
  __syncthreads();
"""
    return begin + layers + end


@functools.cache
def make_resident_rollout(functions: DeviceFunctions, dtype: Any, plan: Plan) -> wp.Kernel:
    """Returns the forward sweep of a system under a planned network, for CUDA.

    Launch with dim=(members * plan.blocks(member_worlds), plan.threads) and block_dim=plan.threads: every
    block must be whole.
    """
    Params, State, Control = functions.Params, functions.State, functions.Control
    step = functions.step
    size, _, put, begin = make_elements(State)
    # a small state stays in registers, a large one is read back from where it has been written
    in_memory = takes_memory(functions)
    kept = not in_memory and not is_large(State)
    step_in_memory = functions.memory.step if functions.memory else None
    cost = make_cost(functions, in_memory)
    has_cost = cost is not None
    read_state = "x.c[i]" if kept else "wp::address(states, t, world)->c[i]"
    Weights = wp.types.vector(length=plan.weights, dtype=dtype)
    worlds_of_block = plan.worlds
    parts = BLOCK // plan.worlds
    row = plan.layout.row

    @wp.func_native(
        f"  wp::vec_t<{plan.weights}, {'float' if plan.itemsize == 4 else 'double'}> w;"
        f"{_load_text(plan)}  return w;"
    )
    def load_weights(params: wp.array(dtype=dtype), lane: int) -> Weights: ...

    @wp.func_native(
        f"{_policy_text(plan, read_state)}"
        f"  wp::vec_t<CONTROLS, real> u;\n"
        f"  for (int c = 0; c < CONTROLS; ++c) u.c[c] = us[(lane < WORLDS ? lane : 0) * CONTROLS + c];\n"
        f"  return u;\n"
    )
    def policy(
        x: State,
        states: wp.array2d(dtype=State),
        t: int,
        world: int,
        owner: wp.bool,  # whether the thread has a world
        fresh: wp.bool,  # at the block's first evaluation
        w: Weights,
        params: wp.array(dtype=dtype),
        hidden: wp.array2d(dtype=dtype),
        row0: wp.int64,  # first element of the block's rows
        lane: int,
    ) -> Control: ...

    def resident_rollout(
        # In:
        x0: wp.array(dtype=State),  # (nworld,)
        p: Params,
        params: wp.array2d(dtype=dtype),  # (members, layout.packed) of the policies
        horizon: int,
        nworld: int,
        member_worlds: int,  # worlds of one policy, see blocks.py
        w_final: dtype,
        w_running: dtype,
        w_control: dtype,
        # Out:
        states: wp.array2d(dtype=State),  # (horizon + 1, nworld)
        controls: wp.array2d(dtype=Control),  # (horizon, nworld)
        hidden: wp.array2d(dtype=dtype),  # (blocks * horizon * BLOCK, row), blocks of BLOCK worlds
        world_loss: wp.array(dtype=dtype),  # (nworld,)
    ):
        group, lane = wp.tid()
        block = group / wp.static(parts)
        first_row = (group % wp.static(parts)) * wp.static(worlds_of_block)
        member, world0, worlds = block_worlds(block, member_worlds)
        own_params = params[member]
        # The first threads have a world each. Rows of a block that have none stay zero, also in memory.
        r = first_row + lane
        owner = lane < wp.static(worlds_of_block) and r < worlds
        world = world0 + wp.min(r, worlds - 1)

        w = load_weights(own_params, lane)
        x = State()
        if owner:
            begin(states, x0, world)
            if wp.static(kept):
                x = x0[world]
        total = dtype(0.0)
        effort = dtype(0.0)
        for t in range(horizon):
            row0 = wp.int64((block * horizon + t) * wp.static(BLOCK) + first_row) * wp.int64(wp.static(row))
            u = policy(x, states, t, world, owner, t == 0, w, own_params, hidden, row0, lane)
            if owner:
                controls[t, world] = u
                if wp.static(kept):
                    x = step(x, u, p)
                    states[t + 1, world] = x
                elif wp.static(in_memory):
                    step_in_memory(states, controls, p, t, world)
                else:
                    x_next = step(states[t, world], u, p)
                    for i in range(size()):
                        put(states, t + 1, world, i, x_next[i])
                effort += wp.dot(u, u)
                if wp.static(has_cost):
                    if w_running != dtype(0.0):
                        total += w_running * cost(states, p, t + 1, world)
        if owner:
            if wp.static(has_cost):
                if w_final != dtype(0.0):
                    total += w_final * cost(states, p, horizon, world)
            if w_control != dtype(0.0):
                total += w_control * effort
            world_loss[world] = total

    return sweep_kernel(resident_rollout, launch_bounds=(plan.threads, 1))

"""A training update with Warp's generated adjoints: every step's launches on one `wp.Tape`, flow R.

Nothing is differentiated by hand. As a Warp user would write it for speed:

* dense layers are tiles (`wp.tile_matmul`), with bias and activation in the same kernel; convolutions gather
  their windows and are dense layers then; the simulator has one thread per world;
* arrays of all steps are allocated once, so forward and backward pass are captured as one graph and replayed;
* parameters are shared with torch, whose fused Adam is one call (Warp's own launches a kernel per array).

The simulators and losses are the device functions that the engine has, differentiated by Warp; the
hand-written adjoints beside them are not used. Their loops must be unrolled, Warp 1.19 differentiates no
others. The step of the quantum problem is written anew: the engine's overwrites components of a vector,
which Warp's adjoint counts twice (its gradient was off by a factor of 1e21).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import warp as wp

import warp_sims as ws

ROWS = 32
"""Rows of a tile."""
MAX_UNROLL = 128


class WarpTape:
    """One training problem and its update. The interface of all peers; see README.md.

    Arguments as those of `TorchEager`; `flow` is R, the only one that a generated adjoint has.
    """

    flows = ("R",)

    def __init__(
        self,
        system: Mapping[str, float],
        widths: Sequence[int],
        x0: np.ndarray,
        weights: Sequence[np.ndarray],
        horizon: int,
        flow: str,
        loss: str,
        *,
        lr: float = 1e-3,
        dtype: str = "float32",
        problem: str = "cartpole",
        control_cost: float = 0.0,
        device: str = "cpu",
    ):
        if flow != "R" or loss not in ("final", "running"):
            raise ValueError(f"WarpTape: flow={flow!r}, loss={loss!r}")
        if [w.shape[0] for w in weights[0:-2:2]] != list(widths):
            raise ValueError(f"WarpTape: weights do not belong to widths {tuple(widths)}")
        kind = getattr(torch, dtype)
        self._dtype = {"float32": wp.float32, "float64": wp.float64}[dtype]
        self._torch_device = torch.device(device)
        wp.init()
        self._device = wp.device_from_torch(self._torch_device)
        self._params = [
            torch.tensor(w, dtype=kind, device=device, requires_grad=True) for w in _as_matrices(weights)
        ]
        self._shapes = [w.shape for w in weights]
        for p in self._params:
            p.grad = torch.zeros_like(p)
        self._optimizer = torch.optim.Adam(self._params, lr=lr, fused=True)
        self._weights = [wp.from_torch(p) for p in self._params]  # their gradients too

        self._system = _system(problem, system, x0.shape[1], weights[-1].shape[0])
        self._problem, self._horizon, self._loss, self._control_cost = problem, horizon, loss, control_cost
        n, m = x0.shape[0], weights[-1].shape[0]
        self._states = self._array(horizon + 1, n, x0.shape[1])
        self._states[0].assign(x0.astype(dtype))
        self._controls = self._array(horizon, n, m)
        self._hidden = [self._array(*shape) for shape in self._hidden_shapes(n, widths)]
        self._total = self._array(n)  # of each world: one number for all loses digits in float32
        self._graph: Any = None

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Why it cannot run on a device, or None."""
        if device.startswith("cuda") and not wp.is_cuda_available():
            return "this Warp finds no CUDA device"
        return None

    def update(self) -> float:
        """One training update in place; returns the loss before it."""
        stream = None
        if self._device.is_cuda:
            stream = wp.stream_from_torch(torch.cuda.current_stream(self._torch_device))
        if self._graph is None:
            # Modules are compiled and loaded before anything is captured.
            self._forward_backward()
            with wp.ScopedCapture(device=self._device) as capture:
                self._forward_backward()
            self._graph = capture.graph
            wp.synchronize_device(self._device)
        wp.capture_launch(self._graph, stream=stream)
        self._optimizer.step()
        return float(wp.to_torch(self._total).double().sum())

    def gradients(self) -> list[np.ndarray]:
        """Gradients of the latest update, in the layout of the weights given."""
        return self._given([p.grad for p in self._params if p.grad is not None])

    def weights(self) -> list[np.ndarray]:
        """Copies of the present weights."""
        return self._given([p.detach() for p in self._params])

    def _given(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        return [
            (t.reshape(s[0], s[2], s[1]).transpose(1, 2) if len(s) == 3 else t.reshape(s))
            .cpu()
            .numpy()
            .copy()
            for t, s in zip(tensors, self._shapes, strict=True)
        ]

    def _array(self, *shape: int) -> Any:
        return wp.zeros(shape, dtype=self._dtype, device=self._device, requires_grad=True)

    def _hidden_shapes(self, n: int, widths: Sequence[int]) -> list[tuple[int, ...]]:
        if self._problem != "quantum":
            return [(self._horizon, n, width) for width in widths]
        first = (self._system.points - 3) // 2 + 1
        second = (first - 3) // 2 + 1
        return [
            (self._horizon, n * first, 6),
            (self._horizon, n * first, widths[0]),
            (self._horizon, n * second, 3 * widths[0]),
            (self._horizon, n * second, widths[1]),
        ]

    # Launches

    def _forward_backward(self) -> None:
        for array in (self._states, self._controls, *self._hidden, *self._weights, self._total):
            array.grad.zero_()
        self._total.zero_()
        with wp.Tape() as tape:
            for t in range(self._horizon):
                self._policy(t)
                inputs = [self._states[t], self._controls[t], self._system.parameters(self._dtype)]
                self._launch(self._kernels.step, inputs, [self._states[t + 1]], inputs[0].shape[0])
            self._losses()
        self._total.grad.fill_(1.0)
        tape.backward()

    @functools.cached_property
    def _kernels(self) -> Any:
        return _make_kernels(self._system.device_functions(self._dtype), self._dtype)

    def _launch(self, kernel: Any, inputs: list, outputs: list, dim: Any) -> None:
        wp.launch(kernel, dim=dim, inputs=inputs, outputs=outputs, device=self._device)

    def _policy(self, t: int) -> None:
        x, w = self._states[t], self._weights
        if self._problem != "quantum":
            for layer, hidden in enumerate(self._hidden):
                self._dense(x, w[2 * layer], w[2 * layer + 1], hidden[t], True)
                x = hidden[t]
            self._dense(x, w[-2], w[-1], self._controls[t], False)
            return
        windows1, h1, windows2, h2 = (array[t] for array in self._hidden)
        self._windows(x, 2, windows1)
        self._dense(windows1, w[0], w[1], h1, True)
        n = x.shape[0]
        self._windows(h1.reshape((n, -1)), h1.shape[1], windows2)
        self._dense(windows2, w[2], w[3], h2, True)
        self._dense(h2.reshape((n, -1)), w[4], w[5], self._controls[t], False)

    def _dense(self, x: Any, weight: Any, bias: Any, y: Any, activate: bool) -> None:
        kernel, columns = _make_dense(x.shape[1], y.shape[1], activate, self._dtype)
        tiles = (-(-x.shape[0] // ROWS), -(-y.shape[1] // columns))
        inputs, device = [x, weight, bias], self._device
        wp.launch_tiled(kernel, dim=tiles, inputs=inputs, outputs=[y], block_dim=64, device=device)

    def _windows(self, x: Any, channels: int, y: Any) -> None:
        self._launch(self._kernels.windows, [x, channels, y.shape[0] // x.shape[0]], [y], y.shape)

    def _losses(self) -> None:
        horizon, n, m = self._controls.shape
        first, count = (1, horizon) if self._loss == "running" else (horizon, 1)
        steps = count if self._system.running_reduction == "mean" else 1
        params = self._system.parameters(self._dtype)
        inputs = [self._states, params, first, self._dtype(1.0 / (n * steps))]
        self._launch(self._kernels.loss, inputs, [self._total], (count, n))
        if self._control_cost:
            inputs = [self._controls, self._dtype(self._control_cost / (horizon * n * m))]
            self._launch(self._kernels.effort, inputs, [self._total], self._controls.shape)


def _system(problem: str, numbers: Mapping[str, float], state_size: int, controls: int) -> Any:
    if problem == "cartpole":
        return ws.CartPole(poles=(state_size - 2) // 2, **numbers)
    if problem == "guidance":
        drivers = controls // 2
        return ws.GuidanceByRepulsion(drivers=drivers, evaders=state_size // 4 - drivers, **numbers)
    return ws.QuantumControl(points=state_size // 2, **numbers)


def _as_matrices(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Kernels of convolutions as matrices (out, window), windows (point, channel)."""
    return [
        np.ascontiguousarray(w.transpose(0, 2, 1) if w.ndim == 3 else w).reshape(w.shape[0], -1)
        if w.ndim > 1
        else w
        for w in weights
    ]


class _Kernels:
    """The kernels of one system."""

    def __init__(self, step: Any, windows: Any, loss: Any, effort: Any):
        self.step, self.windows, self.loss, self.effort = step, windows, loss, effort


@functools.cache
def _make_kernels(functions: Any, dtype: Any) -> _Kernels:
    Params, State, Control = functions.Params, functions.State, functions.Control
    cost = functions.loss
    one_step = functions.step if "eigenstate" not in Params.vars else _make_quantum_step(functions, dtype)
    state_size, controls = State._length_, Control._length_
    options = {"enable_backward": True, "module": "unique", "module_options": {"max_unroll": MAX_UNROLL}}

    @wp.kernel(**options)
    def step(
        x: wp.array2d(dtype=dtype), u: wp.array2d(dtype=dtype), p: Params, x_next: wp.array2d(dtype=dtype)
    ):
        i = wp.tid()
        state = State()
        control = Control()
        for k in range(wp.static(state_size)):
            state[k] = x[i, k]
        for k in range(wp.static(controls)):
            control[k] = u[i, k]
        after = one_step(state, control, p)
        for k in range(wp.static(state_size)):
            x_next[i, k] = after[k]

    @wp.kernel(**options)
    def windows(x: wp.array2d(dtype=dtype), channels: int, positions: int, y: wp.array2d(dtype=dtype)):
        row, k = wp.tid()
        y[row, k] = x[row // positions, 2 * channels * (row % positions) + k]

    @wp.kernel(**options)
    def loss(
        states: wp.array3d(dtype=dtype), p: Params, first: int, weight: dtype, total: wp.array1d(dtype=dtype)
    ):
        t, i = wp.tid()
        state = State()
        for k in range(wp.static(state_size)):
            state[k] = states[first + t, i, k]
        wp.atomic_add(total, i, weight * cost(state, p))

    @wp.kernel(**options)
    def effort(controls: wp.array3d(dtype=dtype), weight: dtype, total: wp.array1d(dtype=dtype)):
        t, i, k = wp.tid()
        wp.atomic_add(total, i, weight * controls[t, i, k] * controls[t, i, k])

    return _Kernels(step, windows, loss, effort)


def _make_quantum_step(functions: Any, dtype: Any) -> Any:
    """Crank-Nicolson, psi' = 2 M^-1 psi - psi; every component of a vector is written once."""
    Params, State, Control = functions.Params, functions.State, functions.Control
    points = State._length_ // 2
    Complex = wp.types.vector(length=2, dtype=dtype)

    @wp.func
    def times(a: Complex, b: Complex) -> Complex:
        return Complex(a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0])

    @wp.func
    def quantum_step(x: State, u: Control, p: Params) -> State:
        inv_dx2 = dtype(1.0) / (p.dx * p.dx)
        off = dtype(-0.5) * p.dt * inv_dx2
        pivots = State()
        eliminated = State()
        pivot = Complex()
        z = Complex()
        for j in range(points):
            alpha = dtype(0.5) * p.dt * (dtype(2.0) * inv_dx2 + u[0] * dtype(j + 1) * p.dx)
            re = dtype(1.0) + off * off * pivot[0]
            im = alpha + off * off * pivot[1]
            size = re * re + im * im
            pivot = Complex(re / size, -im / size)
            z = times(pivot, Complex(x[2 * j] + off * z[1], x[2 * j + 1] - off * z[0]))
            pivots[2 * j] = pivot[0]
            pivots[2 * j + 1] = pivot[1]
            eliminated[2 * j] = z[0]
            eliminated[2 * j + 1] = z[1]
        x_next = State()
        half = Complex()
        for k in range(points):
            j = points - 1 - k
            up = times(Complex(pivots[2 * j], pivots[2 * j + 1]), half)
            half = Complex(eliminated[2 * j] + off * up[1], eliminated[2 * j + 1] - off * up[0])
            x_next[2 * j] = dtype(2.0) * half[0] - x[2 * j]
            x_next[2 * j + 1] = dtype(2.0) * half[1] - x[2 * j + 1]
        return x_next

    return quantum_step


@functools.cache
def _make_dense(inputs: int, units: int, activate: bool, dtype: Any) -> tuple[Any, int]:
    """A dense layer y = x w^T + b, tanh or linear, and how many of its units a tile has."""
    columns, depth = min(units, 64), min(inputs, 64)
    blocks = -(-inputs // depth)

    @wp.func
    def tanh(value: dtype) -> dtype:
        return wp.tanh(value)

    @wp.kernel(enable_backward=True, module="unique", module_options={"max_unroll": MAX_UNROLL})
    def dense(
        x: wp.array2d(dtype=dtype),
        w: wp.array2d(dtype=dtype),
        b: wp.array1d(dtype=dtype),
        y: wp.array2d(dtype=dtype),
    ):
        i, j = wp.tid()
        total = wp.tile_zeros(shape=(ROWS, columns), dtype=dtype)
        for k in range(wp.static(blocks)):
            left = wp.tile_load(x, shape=(ROWS, depth), offset=(i * ROWS, k * depth))
            right = wp.tile_load(w, shape=(columns, depth), offset=(j * columns, k * depth))
            wp.tile_matmul(left, wp.tile_transpose(right), total)
        bias = wp.tile_load(b, shape=columns, offset=j * columns)
        out = total + wp.tile_broadcast(bias, shape=(ROWS, columns))
        if wp.static(activate):
            wp.tile_store(y, wp.tile_map(tanh, out), offset=(i * ROWS, j * columns))
        else:
            wp.tile_store(y, out, offset=(i * ROWS, j * columns))

    return dense, columns

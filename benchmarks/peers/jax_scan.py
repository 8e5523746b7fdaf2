"""A training update as someone fluent in JAX would write it: one jitted `lax.scan` over time.

What an expert would do for speed is here, because a weak peer proves nothing:

* the whole update (rollout, gradients, comparison, Adam) is one program, and its buffers are donated;
* the combined flow shares one forward pass: a gate that acts in the backward pass only is opened and closed
  under `vmap`, so the rollout is not batched but the pullback is (up to 1.7 times as fast as two calls);
* three plans for the backward pass, of which the benchmark takes the fastest for each size:
    scan    reverse-mode of the scan, as `jax.grad` gives it
    remat   the same, activations recomputed (`jax.checkpoint`): less memory traffic, faster for large batches
    wide    gradients by controls first, then batched VJPs of the policy over blocks of all rows: faster for
            small batches and for the modified flow
  `unroll=4` gained nothing and is not offered.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

# Before JAX is imported: by default it takes three quarters of a GPU's memory, which others need, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .jax_problems import PROBLEMS, perceptron

# On a GPU JAX rounds the factors of float32 products to TF32 unless told otherwise: gradients were off by
# 5e-4. Ours and torch's products are in float32.
jax.config.update("jax_default_matmul_precision", "highest")

PLANS = ("scan", "remat", "wide")
DECAY = 0.9
"""Of Adam's first moment."""
# Rows of the policy that the wide plan takes at a time; more of them fall out of the cache.
WIDE_ROWS = 16384


@jax.custom_vjp
def gate(x, is_open):
    """Identity; its cotangent passes where is_open."""
    return x


gate.defvjp(
    lambda x, is_open: (x, is_open),
    lambda is_open, adj_x: (jnp.where(is_open, adj_x, jnp.zeros_like(adj_x)), None),
)

NETWORK_EDGE = {
    "R": lambda x: x,
    "M": jax.lax.stop_gradient,
}


def combine(base, check):
    """Per component, base where both have one sign, else 0; NaN in base stays."""
    return jnp.where((jnp.sign(base) == jnp.sign(check)) | jnp.isnan(base), base, 0.0)


class JaxScan:
    """One training problem and its jitted update. The interface of all peers; see README.md.

    Args:
        system: Parameters of the problem's step, see jax_problems.py.
        widths: Hidden layers; for quantum the channels of both convolutions.
        x0: Initial states, ``(n, s)``.
        weights: ``[W1 (out, in), b1, W2, b2, ...]``.
        horizon: Number of steps.
        flow: ``R``, ``M`` or ``C``.
        loss: ``"final"`` or ``"running"``.
        lr: Learning rate of Adam.
        dtype: ``"float32"`` or ``"float64"``.
        plan: One of `PLANS`.
        problem: One of `PROBLEMS`.
        control_cost: Weight of the mean squared control.
        device: ``"cpu"`` or ``"cuda"``.
        policy: Activation and norm of another perceptron than the published, ``"elu+layernorm"`` for example.
    """

    plans = PLANS
    policies = ("mlp",)

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Why it cannot run on a device, or None."""
        try:
            jax.devices(device)
        except RuntimeError as error:
            return f"{error} (pip install 'jax[cuda12]' for an NVIDIA GPU)"
        return None

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
        plan: str = "scan",
        problem: str = "cartpole",
        control_cost: float = 0.0,
        device: str = "cpu",
        policy: str | None = None,
    ):
        if flow not in ("R", "M", "C") or loss not in ("final", "running") or plan not in PLANS:
            raise ValueError(f"JaxScan: flow={flow!r}, loss={loss!r}, plan={plan!r}")
        if [w.shape[0] for w in weights[:-2] if w.ndim > 1] != list(widths):
            raise ValueError(f"JaxScan: weights do not belong to widths {tuple(widths)}")
        self._problem, self._control_cost = PROBLEMS[problem], control_cost
        if policy is not None:
            own = perceptron(policy)
            self._problem = self._problem._replace(policy=own[0], pack=own[1], unpack=own[2])
        self._system = {name: float(value) for name, value in system.items()}
        self._device = jax.devices(device)[0]
        self._horizon, self._flow, self._loss, self._plan = horizon, flow, loss, plan
        self._x64 = dtype == "float64"
        self._optimizer = optax.adam(lr, b1=DECAY)
        with self._scope():
            # Copies, because the first update gives the buffers away.
            self._params = [
                tuple(jnp.array(array, dtype=dtype) for array in layer)
                for layer in self._problem.pack(weights)
            ]
            self._x0 = jnp.array(x0, dtype=dtype)
            self._state = self._optimizer.init(self._params)
        self._update = jax.jit(self._trace_update, donate_argnums=(0, 1))
        self._updates = 0

    def update(self) -> float:
        """One training update in place; returns the loss before it."""
        with self._scope():
            self._params, self._state, loss = self._update(self._params, self._state, self._x0)
            jax.block_until_ready((self._params, self._state))
            self._updates += 1
            return float(loss)

    def gradients(self) -> list[np.ndarray]:
        """Gradients of the first update, right after it, in the layout of the weights given.

        Adam's first moment then holds them, scaled: the program that is timed need not return them.
        """
        if self._updates != 1:
            raise RuntimeError(f"JaxScan.gradients: after {self._updates} updates, expected exactly 1")
        with self._scope():
            moment = optax.tree_utils.tree_get(self._state, "mu")
            return self._problem.unpack(jax.tree.map(lambda m: m / (1 - DECAY), moment))

    def weights(self) -> list[np.ndarray]:
        """Copies of the present weights."""
        return self._problem.unpack(self._params)

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        with jax.enable_x64(self._x64), jax.default_device(self._device):
            yield

    # Below, everything is traced.

    def _trace_update(self, params, state, x0):
        loss, grads = self._trace_value_and_grad(params, x0)
        updates, state = self._optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def _trace_value_and_grad(self, params, x0):
        backward = (
            self._wide_value_and_grad if self._plan == "wide" else jax.value_and_grad(self._rollout_loss)
        )
        if self._flow != "C":
            return backward(params, x0, NETWORK_EDGE[self._flow])

        def under_gate(is_open):
            return backward(params, x0, lambda x: gate(x, is_open))

        # The value does not depend on the gate, hence is not batched; out_axes=None says so and checks it.
        loss, pair = jax.vmap(under_gate, out_axes=(None, 0))(jnp.array([False, True]))
        return loss, jax.tree.map(lambda both: combine(both[0], both[1]), pair)

    def _scan(self, params, x0, network_edge, extra=None):
        """Roll out; returns the loss, the states x_0 ... x_{T-1} and the controls."""

        step, policy = self._problem.step, self._problem.policy

        def body(x, extra_t):
            u = policy(params, network_edge(x))
            if extra_t is not None:
                u = u + extra_t
            return step(x, u, **self._system), (x, u)

        if self._plan == "remat":
            body = jax.checkpoint(body)
        x_last, (states, controls) = jax.lax.scan(body, x0, extra, length=self._horizon)
        reached = x_last[None]
        if self._loss == "running":
            reached = jnp.concatenate((states[1:], reached))
        costs = self._problem.cost(reached, controls.shape[-1], self._system).mean(axis=1)
        loss = costs.mean() if self._problem.running == "mean" else costs.sum()
        if self._control_cost:
            loss = loss + self._control_cost * jnp.mean(controls**2)
        return loss, (states, controls)

    def _rollout_loss(self, params, x0, network_edge):
        return self._scan(params, x0, network_edge)[0]

    def _wide_value_and_grad(self, params, x0, network_edge):
        nworld, state_size = x0.shape

        def of_controls(extra):
            return self._scan(jax.lax.stop_gradient(params), x0, network_edge, extra)

        controls = jax.eval_shape(self._problem.policy, params, x0).shape[1]
        extra = jnp.zeros((self._horizon, nworld, controls), x0.dtype)
        (loss, (states, _)), adj_controls = jax.value_and_grad(of_controls, has_aux=True)(extra)

        divisors = [k for k in range(1, self._horizon + 1) if self._horizon % k == 0]
        steps = max(k for k in divisors if k * nworld <= WIDE_ROWS or k == 1)
        blocks = (
            states.reshape(-1, steps * nworld, state_size),
            adj_controls.reshape(-1, steps * nworld, controls),
        )

        def accumulate(grads, block):
            x, adj_u = block
            _, pull = jax.vjp(lambda p: self._problem.policy(p, x), params)
            return jax.tree.map(jnp.add, grads, pull(adj_u)[0]), None

        grads, _ = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), blocks)
        return loss, grads

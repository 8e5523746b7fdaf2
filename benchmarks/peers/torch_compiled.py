"""A training update in compiled torch: the eager program with its step, policy and simulator, compiled.

What an expert would do for speed is here, and what was tried beside it:

* one graph for all batch sizes, flows R and C, and processes that find inductor's cache; all other sizes are
  constants of it;
* the loop over time stays in Python. Compiled in pieces of ten steps an update of the cart-pole at batch 8
  took 0.8 of the time, and compiling 8 times as long, minutes; all 100 steps at once take longer than that.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .torch_eager import TorchEager
from .torch_problems import PROBLEMS, perceptron

# Complex products go to torch's own kernels, as in the eager program; constants are computed while tracing.
warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")


class TorchCompiled(TorchEager):
    """One training problem and its update; arguments as those of `TorchEager`."""

    policies = ("mlp",)

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        # The combined flow goes backwards twice through one graph, whose buffers must not be given away.
        torch._functorch.config.donated_buffer = False
        # As every later state: else the first step would be another graph.
        self._x0.requires_grad_()
        problem = named.get("problem", "cartpole")
        self._compiled = _compiled(
            problem, named.get("policy"), tuple(self._system.items()), self._x0.dtype, self._x0.device
        )

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Why it cannot run on a device, or None."""
        if device.startswith("cuda"):
            from torch.utils._triton import has_triton

            return super().unavailable(device) or (None if has_triton() else "torch.compile needs triton")
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return "torch.compile needs a C++ compiler"
        return None

    def _advance(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        # One tensor given twice would be another graph than two.
        seen = x.view_as(x) if seen is x else seen
        for tensor in (x, seen):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self._compiled(x, seen, *self._params)


@functools.cache
def _compiled(
    problem: str, kind: str | None, numbers: tuple, dtype: torch.dtype, device: torch.device
) -> Callable:
    step = PROBLEMS[problem].step
    policy = PROBLEMS[problem].policy if kind is None else perceptron(kind)
    system = dict(numbers)

    def advance(x: Tensor, seen: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        u = policy(params, seen)
        return u, step(x, u, **system)

    # All problems share this code: with the default of 8 the later ones would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(advance, fullgraph=True)

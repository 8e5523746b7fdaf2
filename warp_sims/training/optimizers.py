"""The optimizers that training offers by name: torch's own, and Adam as Keras has it."""

# torch has no public names for what its own optimizers do to all parameters at once (_foreach_...).
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

OPTIMIZERS = ("adam", "sgd", "adagrad", "adadelta", "rmsprop")
ON_HOST = ("adagrad",)
"""Optimizers that count their steps on the host, so that no CUDA graph can hold a step."""


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    momentum: float = 0.0,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Returns the optimizer called `name` for `parameters`.

    Args:
        name: One of `OPTIMIZERS`.
        parameters: The parameters to train.
        lr: Learning rate.
        momentum: Only for `sgd`.
        capturable: Keep everything that changes from step to step on the device, so that a CUDA graph can
            hold a step; not for those of `ON_HOST`.
    """
    if name == "adam":
        return KerasAdam(parameters, lr=lr, capturable=capturable)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    if name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=lr)
    if name == "adadelta":
        return torch.optim.Adadelta(parameters, lr=lr, capturable=capturable)
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, capturable=capturable)
    raise ValueError(f"optimizer={name!r} is not known; give one of {', '.join(OPTIMIZERS)}")


class KerasAdam(torch.optim.Optimizer):
    """Adam as Keras takes its steps, which the published runs follow.

        m += (1 - b1) (g - m)
        v += (1 - b2) (g^2 - v)
        p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon)

    It differs from `torch.optim.Adam` in two points. First, torch adds epsilon to the bias-corrected root of
    v, Keras to the uncorrected one. If gradients are small, the first updates differ by 1e-3 of their size.
    Second, Keras computes the rate in front of m in the precision of the parameters. In float32 the rate is
    too small by 6.7e-6 in the first step and by 4e-6 in the thousandth. These errors all have one sign, so
    they exceed rounding errors: after 64 updates of the published runs our weights differ from the published
    ones by 4e-6 of the distance that these moved, and by 2e-5 without this detail.

    Args:
        parameters: The parameters to train.
        lr: Learning rate.
        betas: Decay rates (b1, b2) of the first and second moment.
        epsilon: Keras's epsilon.
        capturable: Count the steps on the device, so that a CUDA graph can hold one.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-7,
        capturable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "epsilon": epsilon, "capturable": capturable, "updates": 0}
        super().__init__(parameters, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of another `KerasAdam`, wherever that counts its steps."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"] if self.state[p]]
            updates = next((s["updates"].item() for s in states if "updates" in s), group["updates"])
            group["capturable"], group["updates"] = self.defaults["capturable"], round(updates)
            for p in group["params"]:
                self.state[p].pop("updates", None)
                if group["capturable"] and self.state[p]:
                    self.state[p]["updates"] = torch.full((), updates, dtype=torch.float64, device=p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Takes a step; `closure` is there for torch's signature and must be None."""
        if closure is not None:
            raise ValueError("KerasAdam.step: closure is given, expected None; compute gradients before")
        for group in self.param_groups:
            self._step(group, [p for p in group["params"] if p.grad is not None])

    def _step(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                if group["capturable"]:
                    # not called "step", which torch would cast when a state is loaded
                    self.state[p]["updates"] = torch.zeros((), dtype=torch.float64, device=p.device)
        first, second = ([self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq"))
        gradients = [p.grad for p in parameters if p.grad is not None]
        b1, b2 = group["betas"]
        # lists of tensors per operation: 80 us for a small policy. torch's fused step takes half of that, but
        # 5 ms where another process uses the cores, because its threads wait for each other
        torch._foreach_lerp_(first, gradients, 1.0 - b1)
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 1.0 - b2)
        change = torch._foreach_sqrt(second)
        torch._foreach_add_(change, group["epsilon"])
        dtype = parameters[0].dtype
        if group["capturable"]:
            counts = [self.state[p]["updates"] for p in parameters]
            torch._foreach_add_(counts, 1.0)
            rate = _rate(group, dtype, counts[0], lambda x: x.to(dtype))
        else:
            group["updates"] += 1
            count = np.array([group["updates"]], dtype=np.float64)
            rate = _rate(group, dtype, count, lambda x: x.astype(_real(dtype))).item()
        scaled = torch._foreach_mul(first, rate)
        torch._foreach_div_(scaled, change)
        torch._foreach_sub_(parameters, scaled)


def _real(dtype: torch.dtype) -> type[np.floating]:
    return np.float32 if dtype == torch.float32 else np.float64


def _rate(group: dict[str, Any], dtype: torch.dtype, count: Any, cast: Callable[[Any], Any]) -> Any:
    """lr sqrt(1 - b2^t) / (1 - b1^t) for t = `count`, an array of numpy or torch in double precision, in the
    arithmetic of `dtype`, to which `cast` takes such arrays.
    """
    lr, b1, b2 = (float(_real(dtype)(x)) for x in (group["lr"], *group["betas"]))
    # the powers to the last bit: next to 1, a unit there is worth 3e-5 of the first rate
    left1, left2 = (1.0 - cast(b**count) for b in (b1, b2))
    return lr * left2**0.5 / left1

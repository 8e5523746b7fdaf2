"""Policies that the engine fuses into its sweeps. Any other torch module works too and is evaluated by torch."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["MLP", "FusedNetwork", "fused_network"]


class MLP(nn.Sequential):
    """Multilayer perceptron, tanh between the layers and a linear output: Linear, Tanh, ..., Linear.

    Args:
        in_size: Size of the input, the system's `state_size`.
        hidden: Widths of the hidden layers; () makes a linear policy.
        out_size: Size of the output, the system's `control_size`.
        dtype, device: Of the parameters, as everywhere in torch.

    Maps (n, in_size) to (n, out_size). `state_dict` keys are 0.weight (hidden[0], in_size), 0.bias (hidden[0],), 2.weight, ...
    Parameters start as `reset_parameters()` leaves them.

    Raises:
        TypeError, ValueError: a size is no int or below 1.
    """

    def __init__(
        self,
        in_size: int,
        hidden: Sequence[int] = (100, 100),
        out_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(hidden, int) or not isinstance(hidden, Sequence):
            raise TypeError(f"MLP: hidden is {hidden!r}, expected a sequence of widths such as (100, 100), () for a linear policy")
        sizes = (in_size, *hidden, out_size)
        for size in sizes:
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"MLP: size {size!r} is of type {type(size).__name__}, expected an int")
            if size < 1:
                raise ValueError(f"MLP: size {size} in {sizes}, expected sizes of at least 1")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(len(sizes) - 1):
            if i:
                layers[str(2 * i - 1)] = nn.Tanh()
            layers[str(2 * i)] = nn.Linear(sizes[i], sizes[i + 1], dtype=dtype, device=device)
        super().__init__(layers)
        self.reset_parameters()

    def __getitem__(self, index: Any) -> Any:
        """Layer by number; a slice is a plain `nn.Sequential`, which need not be a perceptron."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))  # type: ignore[arg-type]
        return super().__getitem__(index)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None, zero_last: bool = False) -> None:
        """Draws Glorot-uniform weights and sets the biases to zero.

        Args:
            seed: Makes the draw reproducible, the same on every device; None draws from torch's global generator.
            zero_last: Zeroes the output layer's weight, as the published cart-pole and guidance runs do: the controller starts at zero.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        linears = [m for m in self if isinstance(m, nn.Linear)]
        for m in linears:
            limit = math.sqrt(6.0 / (m.in_features + m.out_features))
            m.weight.copy_((torch.rand(m.weight.shape, generator=generator, dtype=torch.float64) * 2 - 1) * limit)
            if m.bias is not None:
                m.bias.zero_()
        if zero_last:
            linears[-1].weight.zero_()


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class FusedNetwork(NamedTuple):
    """A policy that the fused sweeps reproduce exactly."""

    description: str
    """For kernels/dense.py, which lays it out."""
    in_size: int
    out_size: int


def fused_network(policy: nn.Module) -> FusedNetwork | None:
    """Describes a policy that runs inside the sweeps, or returns None where torch must evaluate it.

    Only `MLP` itself, unchanged: a subclass, a hook, a parametrization, a replaced layer or shared parameters take the torch road.
    """
    if type(policy) is not MLP or _hooked(policy):
        return None
    layers = list(policy)
    sizes: list[int] = []
    parameters = []
    for i, m in enumerate(layers):
        if _hooked(m) or type(m) is not (nn.Tanh if i % 2 else nn.Linear):
            return None
        if isinstance(m, nn.Linear):
            if m.bias is None or (sizes and sizes[-1] != m.in_features):
                return None
            sizes += [m.out_features] if sizes else [m.in_features, m.out_features]
            parameters += [m.weight, m.bias]
    if len(layers) % 2 == 0 or any(a is b for i, a in enumerate(parameters) for b in parameters[:i]):
        return None
    return FusedNetwork("mlp:" + ",".join(str(size) for size in sizes), sizes[0], sizes[-1])

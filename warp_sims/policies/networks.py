"""Policies that the engine brings along, and which modules it fuses into its sweeps. Any other torch module
works too and is evaluated by torch.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..bridge.runtime.compat import is_changed
from .recognition import composition_of, tensors_of

__all__ = ["MLP", "Bound", "FusedNetwork", "WaveCNN", "explain", "fused_network", "recognise"]


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}
"""Activations of `MLP` by name, with torch's defaults."""
NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
"""Normalisations of `MLP` by name, with torch's defaults."""


class Bound(nn.Module):
    """low + (high - low) sigmoid(x): controls between two numbers.

    Args:
        low, high: Bounds of every control, low < high.

    Raises:
        ValueError: the bounds are no finite numbers in this order.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"Bound: low is {low!r} and high {high!r}, expected finite numbers, low < high")
        self.low, self.high = float(low), float(high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Controls between the bounds, shape of x."""
        return self.low + (self.high - self.low) * torch.sigmoid(x)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"


class MLP(nn.Sequential):
    """Multilayer perceptron with a linear output: Linear, (norm,) activation, ..., Linear(, Bound).

    Args:
        in_size: Size of the input, the system's `state_size`.
        hidden: Widths of the hidden layers; () makes a linear policy.
        out_size: Size of the output, the system's `control_size`.
        activation: Of the hidden layers: "tanh", "relu", "leaky_relu", "elu", "silu", "gelu", "sigmoid",
            "softplus".
        norm: "layer" or "rms" puts a LayerNorm or an RMSNorm before each activation.
        bound: (low, high) keeps every control between two numbers, see `Bound`.
        dtype, device: Of the parameters, as everywhere in torch.

    Maps (n, in_size) to (n, out_size). `state_dict` keys are those of the `nn.Sequential` that it is: without
    norm 0.weight (hidden[0], in_size), 0.bias (hidden[0],), 2.weight, ... Parameters start as
    `reset_parameters()` leaves them.

    Raises:
        TypeError, ValueError: a size is no int or below 1, or there is no such activation, norm or bound.
    """

    def __init__(
        self,
        in_size: int,
        hidden: Sequence[int] = (100, 100),
        out_size: int = 1,
        *,
        activation: str = "tanh",
        norm: str | None = None,
        bound: tuple[float, float] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(hidden, int) or not isinstance(hidden, Sequence):
            raise TypeError(
                f"MLP: hidden is {hidden!r}, expected a sequence of widths such as (100, 100), () for a "
                f"linear policy"
            )
        sizes = (in_size, *hidden, out_size)
        for size in sizes:
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"MLP: size {size!r} is of type {type(size).__name__}, expected an int")
            if size < 1:
                raise ValueError(f"MLP: size {size} in {sizes}, expected sizes of at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if norm is not None and norm not in NORMS:
            raise ValueError(f"MLP: norm is {norm!r}, expected None or one of {', '.join(NORMS)}")
        if bound is not None and (not isinstance(bound, Sequence) or len(bound) != 2):
            raise TypeError(f"MLP: bound is {bound!r}, expected None or two numbers (low, high)")
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            if i and norm is not None:
                layers.append(NORMS[norm](sizes[i], **place))
            if i:
                layers.append(ACTIVATIONS[activation]())
            layers.append(nn.Linear(sizes[i], sizes[i + 1], **place))
        if bound is not None:
            layers.append(Bound(*bound))
        super().__init__(*layers)
        self.reset_parameters()

    def __getitem__(self, index: Any) -> Any:
        """Layer by number; a slice is a plain `nn.Sequential`, which need not be a perceptron."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))  # type: ignore[arg-type]
        return super().__getitem__(index)

    def reset_parameters(self, seed: int | None = None, zero_last: bool = False) -> None:
        """Draws Glorot-uniform weights and sets the biases to zero; norms scale by 1 and shift by 0.

        Args:
            seed: Makes the draw reproducible, the same on every device; None draws from torch's global
                generator.
            zero_last: Zeroes the output layer's weight, as the published cart-pole and guidance runs do: the
                controller starts at zero.
        """
        for module in self:
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        _glorot([m for m in self if isinstance(m, nn.Linear)], seed, zero_last)


class WaveCNN(nn.Module):
    """The published convolutional controller for `QuantumControl`: two strided convolutions, tanh behind
    each, a linear output.

    Args:
        points: Grid points of the wave function, at least 7.
        width: Channels of both convolutions.
        dtype, device: Of the parameters, as everywhere in torch.

    Maps wave functions (n, 2 points), [Re psi_1, Im psi_1, ...], to controls (n, 1). Parameters, with p =
    ((points - 1) // 2 - 1) // 2 positions (7 for 32 points): conv1.weight (width, 1, 3, 2), conv1.bias,
    conv2.weight (width, width, 3), conv2.bias, out.weight (1, p * width), out.bias; out reads the features
    flattened as (position, channel).

    Raises:
        TypeError, ValueError: a size is no int or too small.
    """

    def __init__(
        self,
        points: int = 32,
        width: int = 60,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (("points", points, 7), ("width", width, 1)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"WaveCNN: {name} is {size!r} of type {type(size).__name__}, expected an int")
            if size < least:
                raise ValueError(f"WaveCNN: {name} is {size}, expected at least {least}")
        self.points, self.width = points, width
        self.conv1 = nn.Conv2d(1, width, (3, 2), stride=2, dtype=dtype, device=device)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, dtype=dtype, device=device)
        self.out = nn.Linear(_positions(points) * width, 1, dtype=dtype, device=device)
        self.reset_parameters()

    def reset_parameters(self, seed: int | None = None, zero_last: bool = False) -> None:
        """Draws Glorot-uniform weights and sets the biases to zero; see `MLP.reset_parameters`."""
        _glorot([self.conv1, self.conv2, self.out], seed, zero_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Controls (n, 1) for wave functions (n, 2 points)."""
        h = torch.tanh(self.conv1(x.reshape(-1, 1, self.points, 2))).squeeze(-1)
        h = torch.tanh(self.conv2(h))
        return self.out(h.transpose(1, 2).flatten(1))


@torch.no_grad()
def _glorot(layers: Sequence[Any], seed: int | None, zero_last: bool) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for layer in layers:
        receptive = math.prod(layer.weight.shape[2:])
        limit = math.sqrt(6.0 / (receptive * (layer.weight.shape[0] + layer.weight.shape[1])))
        layer.weight.copy_(
            (torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1)
            * limit
        )
        if layer.bias is not None:
            layer.bias.zero_()
    if zero_last:
        layers[-1].weight.zero_()


class FusedNetwork(NamedTuple):
    """A policy that the fused sweeps reproduce exactly."""

    description: str
    """For kernels/policy/layout.py, which lays it out."""
    in_size: int
    out_size: int
    parameters: dict[str, torch.Tensor]
    """By name, in the order of the module's `parameters()`."""
    constants: tuple[torch.Tensor, ...] = ()
    """Vectors that it has besides, from buffers."""


def fused_network(policy: nn.Module, in_size: int | None = None) -> FusedNetwork | None:
    """Describes a policy that runs inside the sweeps, or returns None where torch must evaluate it."""
    found = recognise(policy, in_size)
    return found if isinstance(found, FusedNetwork) else None


def recognise(policy: nn.Module, in_size: int | None = None) -> FusedNetwork | str:
    """Describes a policy that runs inside the sweeps, or says why torch must evaluate it.

    `MLP` and `WaveCNN` themselves, unchanged, are known; any other module is looked into, see
    `recognition.composition_of`. Hooks, parametrizations and shared parameters take the torch path.

    Args:
        policy: The module.
        in_size: Size of its input, the system's `state_size`; by default what its first linear layer reads,
            or the size of the `Unflatten` before a convolution.
    """
    found = _known(policy)
    if found is not None:
        return found
    if torch.compiler.is_compiling():
        return "a graph is traced by torch.compile, which only MLP and WaveCNN run fused in"
    if in_size is None:
        first = next((m for m in policy.modules() if isinstance(m, _FIRST)), None)
        if first is None:
            return "it has no linear layer"
        in_size = first.in_features if isinstance(first, nn.Linear) else _flat_size(first)
        if in_size is None:
            return f"its first layer, a {type(first).__name__}, says no size of the states, expected in_size"
    composition = composition_of(policy, in_size)
    if isinstance(composition, str):
        return composition
    tensors = tensors_of(policy, composition.parameters)
    if len({id(q) for q in tensors}) < len(tensors):
        return "parameters are shared"
    constants = tuple(constant() for constant in composition.constants)
    named = dict(zip(composition.parameters, tensors))
    return FusedNetwork(composition.description, composition.in_size, composition.out_size, named, constants)


def explain(policy: nn.Module, in_size: int | None = None) -> str:
    """How rollouts evaluate a policy: the operations that run inside the sweep, or why torch evaluates it.

    Args:
        policy: Any module.
        in_size: Size of its input, the system's `state_size`; by default what its first linear layer reads,
            or the size of the `Unflatten` before a convolution.

    Returns:
        A text of several lines to print.

    Raises:
        TypeError: `policy` is no module.
    """
    if not isinstance(policy, nn.Module):
        raise TypeError(f"explain: policy is of type {type(policy).__name__}, expected a torch.nn.Module")
    found = recognise(policy, in_size)
    name = type(policy).__name__
    if isinstance(found, str):
        return (
            f"{name}: torch evaluates it, because {found}.\n"
            "Step by step in the forward pass, all steps at once in the backward pass. These run inside the "
            "sweep:\n"
            "Linear, Conv1d, LayerNorm, RMSNorm, activations, sums of values, scales and shifts by numbers, "
            "buffers and parameters,\n"
            "sines and cosines, parts and concatenations of values, (n, channels, length) and back."
        )
    count = sum(q.numel() for q in found.parameters.values())
    first = f"{name}: runs inside the sweep, {found.in_size} to {found.out_size}, {count} parameters"
    lines = found.description.split("|")[1:]
    steps = [f"  {i + 1}: {line}" for i, line in enumerate(lines)]
    return "\n".join([f"{first}; value 0 is the state:", *steps])


_FIRST = (nn.Linear, nn.Conv1d, nn.Unflatten)
"""Modules that may say what a policy reads, where they come first."""


def _flat_size(first: nn.Module) -> int | None:
    """Size of the states that an `Unflatten` reads, None of other modules."""
    if not isinstance(first, nn.Unflatten) or not all(type(n) is int for n in first.unflattened_size):
        return None
    found = math.prod(first.unflattened_size)
    return found if found > 0 else None


def _known(policy: nn.Module) -> FusedNetwork | None:
    """An unchanged `MLP` with tanh, or `WaveCNN`."""
    # read from the module dictionaries: this runs at every call, and named_parameters() takes longer than the
    # rest of the checks
    kind = type(policy)
    if (kind is not MLP and kind is not WaveCNN) or is_changed(policy):
        return None
    if kind is MLP and any(type(m) not in (nn.Linear, nn.Tanh) for m in policy._modules.values()):
        return None
    parameters: dict[str, torch.Tensor] = {}
    for name, layer in policy._modules.items():
        if layer is None or is_changed(layer):
            return None
        if layer._parameters and list(layer._parameters) != ["weight", "bias"]:
            return None
        for key, value in layer._parameters.items():
            if value is None:
                return None
            parameters[f"{name}.{key}"] = value
    if len({id(value) for value in parameters.values()}) < len(parameters):
        return None
    return _fused_mlp(policy, parameters) if kind is MLP else _fused_wavecnn(policy, parameters)


def _fused_mlp(policy: nn.Module, parameters: dict[str, torch.Tensor]) -> FusedNetwork | None:
    layers = list(policy._modules.values())
    sizes: list[int] = []
    shapes: list[tuple[int, ...]] = []
    for i, m in enumerate(layers):
        if type(m) is not (nn.Tanh if i % 2 else nn.Linear):
            return None
        if isinstance(m, nn.Linear):
            if sizes and sizes[-1] != m.in_features:
                return None
            sizes += [m.out_features] if sizes else [m.in_features, m.out_features]
            shapes += [(m.out_features, m.in_features), (m.out_features,)]
    if len(layers) % 2 == 0 or [q.shape for q in parameters.values()] != shapes:
        return None
    lines = [str(sizes[0])]
    for i, units in enumerate(sizes[1:]):
        lines += [f"tanh {2 * i - 1}"] * (i > 0) + [f"linear {2 * i} {units} p{2 * i} p{2 * i + 1}"]
    return FusedNetwork("|".join(lines), sizes[0], sizes[-1], parameters)


def _fused_wavecnn(policy: Any, parameters: dict[str, torch.Tensor]) -> FusedNetwork | None:
    if [type(m) for m in policy._modules.values()] != [nn.Conv2d, nn.Conv1d, nn.Linear]:
        return None
    points, width = policy.points, policy.width
    shapes = [(width, 1, 3, 2), (width,), (width, width, 3), (width,), (1, _positions(points) * width), (1,)]
    if [tuple(q.shape) for q in parameters.values()] != shapes:
        return None
    # the first convolution reads three points of two numbers each
    lines = f"conv 0 {width} 6 4 1 p0 p1|tanh 1|conv 2 {width} 3 2 {width} p2 p3|tanh 3|linear 4 1 p4 p5"
    return FusedNetwork(f"{2 * points}|{lines}", 2 * points, 1, parameters)


def _positions(points: int) -> int:
    """Positions behind both convolutions of `WaveCNN`."""
    return ((points - 3) // 2 - 2) // 2 + 1

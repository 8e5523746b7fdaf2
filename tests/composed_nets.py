"""Random networks of the grammar that runs fused, as torch modules that hypothesis draws."""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "elu": lambda: nn.ELU(0.7),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(1.5, 6.0),
    "identity": nn.Identity,
}
NORMS = {
    "layer": nn.LayerNorm,
    "layer, no bias": lambda width: nn.LayerNorm(width, bias=False),
    "layer, plain": lambda width: nn.LayerNorm(width, eps=1e-3, elementwise_affine=False),
    "rms": lambda width: nn.RMSNorm(width, eps=1e-2),
    "rms, plain": lambda width: nn.RMSNorm(width, elementwise_affine=False),
}


class Standardized(nn.Module):
    """(x - mean) / sqrt(var + eps), from buffers, clipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, width))
        self.register_buffer("var", torch.linspace(0.3, 2.0, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp((x - self.mean) / torch.sqrt(self.var + 1e-5), -3.0, 3.0)


class Features(nn.Module):
    """The input, sines and cosines of some of it, and a part of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_size = width + 2 * len(range(0, width, 2)) + 1

    def forward(self, x: Tensor) -> Tensor:
        angles = x[:, ::2]
        return torch.cat((x.sin()[:, ::2], angles.cos(), x, x[:, -1:]), dim=-1)


class Residual(nn.Module):
    """x + f(x), or f(x) - x."""

    def __init__(self, inner: nn.Module, minus: bool) -> None:
        super().__init__()
        self.inner, self.minus = inner, minus

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - x if self.minus else x + self.inner(x)


class Skips(nn.Module):
    """The input, read again behind a sum that has read it already, and doubled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) + x)
        return self.second(h) + x + (h + h)


class Gain(nn.Module):
    """A trained scale and shift of every component."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift + x * self.scale


class SharedNorm(nn.Module):
    """A normalised value that a scale and shift reads, and a sum reads again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.gain = width, Gain(width)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.layer_norm(x, (self.width,))
        return torch.tanh(self.gain(y)) + y


class Bounded(nn.Module):
    """low + (high - low) sigmoid(x), or scale tanh(x)."""

    def __init__(self, smooth: bool) -> None:
        super().__init__()
        self.smooth, self.low, self.high = smooth, -1.5, 2.0

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.low + (self.high - self.low) * torch.sigmoid(x) if self.smooth else 2.5 * functional.tanh(x)
        )


class Table(nn.Module):
    """(n, width) as (n, rows, columns), with the sizes that the input has."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], self.rows, -1)


class Turned(nn.Module):
    """Channels and positions the other way, flat: what a convolution gives, position after position."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.size(0), -1)


class Position(nn.Module):
    """A linear layer at every position."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, units)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 1)).mT


class Channels(nn.Module):
    """Of (n, channels, length): a trained table, buffers along either axis, channels and positions in another
    order, a channel alone, and all of it once more.
    """

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(channels, length)), nn.Parameter(torch.zeros(length))
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, channels)[:, None])
        self.register_buffer("level", torch.linspace(0.5, 2.0, length))

    def forward(self, x: Tensor) -> Tensor:
        h = (x - self.mean) * self.scale / self.level
        first = h[:, 0] + self.shift
        h = torch.cat((h[:, 1:], first.unsqueeze(1)), dim=1) + x
        a, b = h.split((1, h.shape[2] - 1), dim=-1)
        return torch.cat((b.sin(), a), -1) - h


def filled(net: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network with seeded parameters, strong enough for flows to disagree."""
    generator = torch.Generator().manual_seed(seed)
    net = net.to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim >= 2:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.8 + 0.4 * noise)
    return net


PADDED = ("zeros", "circular", "replicate", "reflect")


@st.composite
def convolutions(draw: st.DrawFn, width: int) -> tuple[list[nn.Module], int]:
    """Convolutions of a value of this width, which is flat again behind them, and its width."""
    channels = draw(st.sampled_from([c for c in range(1, width + 1) if width % c == 0]))
    length = width // channels
    parts: list[nn.Module] = [Table(channels) if draw(st.booleans()) else nn.Unflatten(1, (channels, length))]
    for _ in range(draw(st.integers(1, 2))):
        around, stride = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        mode = draw(st.sampled_from(PADDED))
        around = min(around, {"circular": length, "reflect": length - 1}.get(mode, around))
        kernel = draw(st.integers(1, min(4, length + 2 * around)))
        units, bias = draw(st.sampled_from([1, 3, 4, 16, 17])), draw(st.booleans())
        parts.append(nn.Conv1d(channels, units, kernel, stride, around, padding_mode=mode, bias=bias))
        channels, length = units, (length + 2 * around - kernel) // stride + 1
        for kind in draw(
            st.lists(st.sampled_from(["activation", "norm", "residual", "line", "table"]), max_size=2)
        ):
            if kind == "activation":
                parts.append(ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]())
            elif kind == "norm" and channels * length > 1:
                parts.append(nn.LayerNorm((channels, length)))
            elif kind == "residual":
                inner = nn.Conv1d(channels, channels, 3, padding="same")
                parts.append(Residual(nn.Sequential(inner, nn.Tanh()), draw(st.booleans())))
            elif kind == "line":
                parts.append(Position(channels, channels))
            elif kind == "table" and min(channels, length) > 1:
                parts.append(Channels(channels, length))
    parts.append(Turned() if draw(st.booleans()) else nn.Flatten())
    return parts, channels * length


@st.composite
def networks(draw: st.DrawFn, state_size: int, control_size: int) -> nn.Module:
    """A random chain from states to controls, float64."""
    parts: list[nn.Module] = []
    width = state_size
    if draw(st.booleans()):
        parts.append(Standardized(width))
    if draw(st.booleans()):
        parts.append(Features(width))
        width = parts[-1].out_size
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.integers(0, 3)) == 0:
            convolved, width = draw(convolutions(width))
            parts += convolved
        units = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 40]))
        parts.append(nn.Linear(width, units, bias=draw(st.booleans())))
        width = units
        for _ in range(draw(st.integers(0, 3))):
            kind = draw(
                st.sampled_from(["activation", "activation", "norm", "residual", "skips", "gain", "shared"])
            )
            if kind == "activation":
                parts.append(ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]())
            elif kind == "norm" and width > 1:
                parts.append(NORMS[draw(st.sampled_from(sorted(NORMS)))](width))
            elif kind == "skips":
                parts.append(Skips(width))
            elif kind == "shared" and width > 1:
                parts.append(SharedNorm(width))
            elif kind == "gain":
                parts.append(Gain(width))
            elif kind == "residual":
                activation = ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]()
                parts.append(
                    Residual(nn.Sequential(nn.Linear(width, width), activation), draw(st.booleans()))
                )
    parts.append(nn.Linear(width, control_size))
    if draw(st.booleans()):
        parts.append(Bounded(draw(st.booleans())))
    return filled(nn.Sequential(*parts), draw(st.integers(0, 99)))


def with_norms(state_size: int, control_size: int, seed: int, width: int = 40) -> nn.Module:
    """ELU and LayerNorm, as reinforcement learning uses them."""
    first = nn.Linear(state_size, width), nn.LayerNorm(width), nn.ELU()
    second = nn.Linear(width, 17), nn.LayerNorm(17), nn.ELU()
    return filled(nn.Sequential(*first, *second, nn.Linear(17, control_size)), seed)


def everything(state_size: int, control_size: int, seed: int) -> nn.Module:
    """Every element of the grammar once."""
    parts: list[nn.Module] = [Standardized(state_size), Features(state_size)]
    width = parts[-1].out_size
    for activation in ACTIVATIONS.values():
        parts += [nn.Linear(width, 9, bias=len(parts) % 4 > 0), activation()]
        width = 9
    for norm in NORMS.values():
        parts += [nn.Linear(9, 9), norm(9)]
    parts += [Gain(9), Skips(9), Residual(nn.Sequential(nn.Linear(9, 9), nn.SiLU()), minus=False)]
    parts += [
        Residual(nn.Linear(9, 9), minus=True),
        nn.Linear(9, control_size),
        Bounded(smooth=True),
        Bounded(False),
    ]
    return filled(nn.Sequential(*parts), seed)


def convolved(state_size: int, control_size: int, seed: int) -> nn.Module:
    """Every element that has channels and positions once, with few channels and with more than a vector."""
    parts: list[nn.Module] = [Table(2), nn.Conv1d(2, 20, 2, padding=1), nn.SiLU()]
    length = state_size // 2 + 1
    for mode in PADDED:
        parts += [nn.Conv1d(20, 20, 3, padding=1, padding_mode=mode, bias=mode != "reflect"), nn.Tanh()]
    parts += [Channels(20, length), nn.LayerNorm((20, length)), Position(20, 5), nn.ELU()]
    parts += [nn.CircularPad1d((2, 1)), nn.Conv1d(5, 3, 2, stride=2), Turned()]
    return filled(nn.Sequential(*parts, nn.Linear(3 * ((length + 1) // 2 + 1), control_size)), seed)


class Attention(nn.Module):
    """A token a pole, attending to the others: a policy that torch evaluates."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, width), nn.Linear(width, 1)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        poles = x[:, 2:].unflatten(-1, (-1, 2))
        cart = x[:, None, :2].expand_as(poles)
        h = torch.tanh(self.embed(torch.cat((cart, poles), -1)))
        scores = self.query(h) @ self.key(h).transpose(1, 2) / h.shape[-1] ** 0.5
        return self.out((scores.softmax(-1) @ self.value(h)).mean(1))


def attention(system) -> nn.Module:
    """For `bench --policy composed_nets:attention`."""
    return Attention()

"""A composed policy in torch: what its operations mean, and their wide products, the way of GPUs.

`evaluate` is the plain reading of a description, see kernels/policy/composed_layout.py. `linearize` and
`weight_grad` do on the stored rows of a forward sweep what kernels/policy/composed.h does, and stand in for
those of wide.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.policy.composed_layout import (
    ACTIVATION,
    ACTIVATIONS,
    ADD,
    AFFINE,
    CLEAR,
    COPY,
    LINEAR,
    NORMALIZE,
    Entry,
    parse,
)
from ..runtime.tracing import span
from .wide import Rows

VALUES: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leakyrelu": lambda x, slope: functional.leaky_relu(x, slope),
    "elu": lambda x, alpha: functional.elu(x, alpha),
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelutanh": lambda x: functional.gelu(x, approximate="tanh"),
    "softplus": lambda x, beta, threshold: functional.softplus(x, beta, threshold),
    "sin": torch.sin,
    "cos": torch.cos,
    "clamp": lambda x, low, high: torch.clamp(x, low, high),
}
"""Activations in torch."""


def evaluate(network: str, parameters: Sequence[Tensor], constants: Sequence[Tensor], x: Tensor) -> Tensor:
    """Controls (n, control_size) of states x (n, state_size) by a description."""
    _, operations = parse(network)
    values = [x]

    def vector(word: str, missing: float) -> Tensor | float:
        if word == "-":
            return missing
        if word[0] in "pc":
            return (parameters if word[0] == "p" else constants)[int(word[1:])]
        found = [float(part) for part in word.split(",")]
        return x.new_tensor(found) if len(found) > 1 else found[0]

    for op in operations:
        v, words = values[op.inputs[0]], op.arguments
        if op.kind == "linear":
            bias = None if words[2] == "-" else parameters[int(words[2][1:])]
            out = functional.linear(v, parameters[int(words[1][1:])], bias)
        elif op.kind == "normalize" and words[0] == "layer":
            out = functional.layer_norm(v, (op.width,), eps=float(words[1]))
        elif op.kind == "normalize":
            out = functional.rms_norm(v, (op.width,), eps=float(words[1]))
        elif op.kind == "affine":
            out = v * vector(words[0], 1.0) + vector(words[1], 0.0)
        elif op.kind == "add":
            out = v + values[op.inputs[1]]
        elif op.kind == "part":
            first, count = map(int, words)
            out = v[..., first : first + count]
        elif op.kind == "join":
            out = torch.cat([values[i] for i in op.inputs], -1)
        else:
            out = VALUES[op.kind](v, *map(float, words))
        values.append(out)
    return values[-1]

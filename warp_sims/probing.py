"""Tries a policy that torch evaluates on a few rows, before a rollout relies on it."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bridge.autograd import operators
from .bridge.autograd.torch_path import TorchPath, call_with, places
from .bridge.runtime.arrays import capturing
from .bridge.runtime.compat import transforming
from .policies.recognition import record_of
from .systems import System

_PROBE_ROWS = 4
_KEPT = 8
"""Shapes and states of a module that are remembered as tried."""
_tried: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
"""What each policy has been tried with."""


def probe(call: str, system: System, policy: TorchPath, parameters: Sequence[Tensor], x0: Tensor) -> None:
    """Tries a policy that torch evaluates on a few rows: shape and dtype of its output, rows that mix,
    randomness.

    It leaves no trace: buffers are copies, and the random state is restored. The backward pass, which
    recomputes all controls, finds mistakes that do not show here. A policy that has passed is not tried again
    with states of the same shape unless its attributes change. Nothing is tried while a graph is traced or
    captured, because no value can be read.
    """
    if torch.compiler.is_compiling() or x0.shape[0] == 0 or transforming():
        return
    if capturing(x0.device):
        return
    # what it depends on: tried once for each
    key = (
        system.control_size,
        x0.shape,
        x0.dtype,
        x0.device,
        policy.autocast,
        None if policy.inputs is None else policy.inputs.shape,
        record_of(policy.module),
    )
    tried = _tried.setdefault(policy.module, [])
    if key in tried:
        return
    rows = x0[:_PROBE_ROWS].detach()
    given = None if policy.inputs is None else policy.inputs[0, :_PROBE_ROWS]
    fixed = policy.substitutes([parameter.detach() for parameter in parameters])
    held = places(policy.module, buffers=True)
    written: list[str] = []
    with (
        torch.no_grad(),
        torch.random.fork_rng([x0.device] if x0.device.type == "cuda" else []),
        torch.autocast(
            x0.device.type, dtype=policy.autocast or torch.bfloat16, enabled=policy.autocast is not None
        ),
    ):

        def evaluate(x: Tensor) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in policy.module.named_buffers()}
            copy = x.clone()
            beside = None if given is None else given.repeat(x.shape[0] // given.shape[0], 1)
            substitutes = fixed | {place: buffers[name] for name in held for place in held[name]}
            try:
                u = call_with(policy.module, substitutes, copy, beside)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                beside_states = "required positional argument" in str(error) and given is None
                hint = "; what it takes beside the states is given as inputs="
                raise ValueError(
                    f"{call}: policy failed on states of shape {tuple(x.shape)}, expected a map to "
                    f"(n, {system.control_size}): {error}{hint if beside_states else ''}"
                ) from error
            if not bool(((copy == x) | (x != x)).all()):
                raise ValueError(
                    f"{call}: policy changes its input in place, expected the states as they are: they are "
                    "simulated from and read again in the backward pass; work on x.clone()"
                )
            for name, before in policy.module.named_buffers():
                if buffers[name].shape != before.shape or not bool(
                    ((buffers[name] == before) | (buffers[name] != buffers[name])).all()
                ):
                    written.append(name)
            return u

        u = evaluate(rows)
        expected = (rows.shape[0], system.control_size)
        if not isinstance(u, Tensor):
            raise TypeError(
                f"{call}: policy returned {type(u).__name__}, expected a tensor of shape (n, "
                f"{system.control_size})"
            )
        if tuple(u.shape) != expected:
            raise ValueError(
                f"{call}: policy returned shape {tuple(u.shape)} for {rows.shape[0]} states, expected "
                f"{expected}"
            )
        if not u.is_floating_point():
            raise TypeError(f"{call}: policy returned {u.dtype}, expected {x0.dtype}")
        tolerance = (policy.tolerance or operators.CONTROL_TOLERANCE[x0.dtype]) * (1.0 + u.abs().max())
        again = evaluate(rows)
        mixed = evaluate(torch.cat([rows, 1.5 * rows.flip(0) + 0.25]))[: rows.shape[0]]
        for other, what, remedy in (
            (
                again,
                "deterministic: the same states gave other controls",
                "remove dropout or noise, or call policy.eval()",
            ),
            (
                mixed,
                "row by row: a row's control changed with the other rows of the batch",
                "remove batch normalisation in training mode, or call policy.eval()",
            ),
        ):
            off = (other - u).abs()
            if bool((off > tolerance).any()):
                raise ValueError(
                    f"{call}: policy is not {what} (by {float(off.max()):.3g}), expected the same; {remedy}"
                )
        if written:
            raise ValueError(
                f"{call}: policy writes its buffer {written[0]!r} when it is called, expected no state of "
                f"its own: "
                "all steps are recomputed at once in the backward pass; call policy.eval() or keep that "
                "state outside"
            )
    tried.append(key)
    del tried[:-_KEPT]

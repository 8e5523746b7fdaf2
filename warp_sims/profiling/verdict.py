"""Decides by finite differences which adjoint of a step is right, the hand-written one or Warp's."""

from typing import Any, NamedTuple

import torch
import warp as wp
from torch import Tensor

from ..bridge.runtime.arrays import stream
from ..bridge.runtime.launches import PREPARING
from ..bridge.runtime.registry import Prepared, prepare
from ..checking.forms import forms_of
from ..checking.functions import compare_adjoint, draw_points, jacobian_of_step, pulled_back
from ..checking.report import Comparison
from ..kernels.sweeps.generated import make_generated_kernels
from ..systems import System

__all__ = ["GeneratedStep", "Verdict", "array_of", "decide"]

POINTS, SEED = 12, 0
SHOWN = 2
"""Disagreements that are named."""


class Verdict(NamedTuple):
    """What finite differences in float64 say about both adjoints of one step."""

    by_hand: tuple[Comparison, ...]
    """Of every form of the system that this device has."""
    generated: Comparison

    @property
    def hand_is_right(self) -> bool:
        """Whether every hand-written form agrees with finite differences."""
        return all(comparison.agrees for comparison in self.by_hand)

    @property
    def trusted(self) -> str:
        """The reference for errors: the hand-written adjoint, unless only the generated one is right."""
        return "generated" if self.generated.agrees and not self.hand_is_right else "hand-written"

    def notes(self) -> list[str]:
        """Says which adjoint is wrong, and where."""
        hand = [c for c in self.by_hand if not c.agrees]
        said = []
        if self.hand_is_right and self.generated.agrees:
            said.append(
                "finite differences agree with the hand-written and with the generated adjoint of a step"
            )
        for comparison in hand:
            said.append(
                f"finite differences: the hand-written {comparison.what} is wrong; {_named(comparison)}"
            )
        if hand and self.generated.agrees:
            said.append("Warp's generated adjoint of a step is right: errors are relative to it")
        if not self.generated.agrees:
            also = "also " if hand else "the hand-written adjoint of a step is right, "
            said.append(f"finite differences: {also}Warp's generated one is wrong; {_named(self.generated)}")
        if hand and not self.generated.agrees:
            said.append("no adjoint is right: errors are relative to a wrong gradient")
        return said


def _named(comparison: Comparison) -> str:
    worst = sorted(comparison.disagreements, key=lambda d: -(d.size or 0.0))
    words = [f"{d.output} by {d.input} is {d.found:.6g}, should be {d.expected:.6g}" for d in worst[:SHOWN]]
    more = len(worst) - SHOWN
    return "; ".join(words) + (f"; and {more} more" if more > 0 else "")


def decide(system: System, device: torch.device) -> Verdict:
    """Compares both adjoints of a step with finite differences, in float64."""
    p = prepare(system.number, torch.float64, device)
    forms = forms_of(system, p.functions, torch.float64, device)
    points = draw_points(system, forms[0], POINTS, SEED)
    if not len(points.x):
        raise ValueError(
            f"profile: against='generated', but the step of {type(system).__name__} is not finite at any "
            "state it was tried at; warp-sims check says more"
        )
    step = jacobian_of_step(forms[0], points)
    return Verdict(
        tuple(compare_adjoint(f"step_vjp {form.name}", pulled_back(form, points, 1), step) for form in forms),
        compare_adjoint("generated adjoint", _generated(system, device, points.x, points.u), step),
    )


def _generated(system: System, device: torch.device, x: Tensor, u: Tensor) -> Tensor:
    """The Jacobian by Warp's generated adjoint (points, state_size, state_size + control_size)."""
    count, size = x.shape
    unit = torch.eye(size, dtype=torch.float64).repeat(count, 1).to(device)
    x, u = (t.repeat_interleave(size, 0).to(device).requires_grad_() for t in (x, u))
    x_next = GeneratedStep.apply(x, u, prepare(system.number, torch.float64, device))
    return torch.cat(torch.autograd.grad(x_next, (x, u), unit), dim=1).cpu().unflatten(0, (count, size))


class GeneratedStep(torch.autograd.Function):
    """One step as a torch operation with Warp's generated adjoint: (x, u, prepared) -> x_next."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, p: Prepared) -> Tensor:
        x, u = x.contiguous(), u.contiguous()
        x_next = torch.empty_like(x)
        ctx.save_for_backward(x, u, x_next)
        ctx.prepared = p
        _launch_step(p, x, u, x_next)
        return x_next

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        x, u, x_next = ctx.saved_tensors
        p, f = ctx.prepared, ctx.prepared.functions
        adj_x, adj_u = torch.zeros_like(x), torch.zeros_like(u)
        # a copy: generated adjoints zero what they have read
        adj_x_next = cotangents[0].clone(memory_format=torch.contiguous_format)
        given = [array_of(adj_x, f.State), array_of(adj_u, f.Control), f.Params()]
        _launch_step(
            p, x, u, x_next, adj_inputs=given, adj_outputs=[array_of(adj_x_next, f.State)], adjoint=True
        )
        return adj_x, adj_u, None


def _launch_step(p: Prepared, x: Tensor, u: Tensor, x_next: Tensor, **adjoint: Any) -> None:
    """Launches the step, or its generated adjoint with what that takes besides."""
    f = p.functions
    with stream(x.device):
        wp.launch(
            make_generated_kernels(f).step,
            x.shape[0],
            inputs=[array_of(x, f.State), array_of(u, f.Control), p.params],
            outputs=[array_of(x_next, f.State)],
            device=p.device,
            record_tape=False,
            **adjoint,
        )


def array_of(tensor: Tensor, dtype: Any) -> wp.array:
    """A tensor as a Warp array of these elements, on the same memory."""
    with PREPARING:
        return wp.from_torch(tensor.detach(), dtype=dtype, requires_grad=False)

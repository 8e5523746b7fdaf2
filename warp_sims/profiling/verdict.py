"""Decides by finite differences which adjoint of a step is right, the hand-written one or Warp's."""

from typing import Any, NamedTuple

import torch
import warp as wp
from torch import Tensor

from ..bridge.runtime.arrays import stream
from ..bridge.runtime.launches import PREPARING
from ..bridge.runtime.registry import prepare
from ..checking.forms import forms_of
from ..checking.functions import compare_adjoint, draw_points, jacobian_of_step, pulled_back
from ..checking.report import Comparison
from ..kernels.sweeps.generated import make_generated_kernels
from ..systems import System

__all__ = ["Verdict", "decide"]

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
    p = prepare(system.number, torch.float64, device)
    f, kernel = p.functions, make_generated_kernels(p.functions).step
    count, size = x.shape
    unit = torch.eye(size, dtype=torch.float64).repeat(count, 1).to(device)
    x, u = (t.repeat_interleave(size, 0).to(device) for t in (x, u))
    x_next, adj_x, adj_u = torch.empty_like(x), torch.zeros_like(x), torch.zeros_like(u)

    def array(tensor: Tensor, dtype: Any) -> wp.array:
        return wp.from_torch(tensor, dtype=dtype, requires_grad=False)

    with PREPARING, stream(device):
        inputs = [array(x, f.State), array(u, f.Control), p.params]
        outputs = [array(x_next, f.State)]
        wp.launch(kernel, len(x), inputs=inputs, outputs=outputs, device=p.device, record_tape=False)
        wp.launch(
            kernel,
            len(x),
            inputs=inputs,
            outputs=outputs,
            adj_inputs=[array(adj_x, f.State), array(adj_u, f.Control), f.Params()],
            adj_outputs=[array(unit, f.State)],
            adjoint=True,
            device=p.device,
            record_tape=False,
        )
    return torch.cat([adj_x, adj_u], dim=1).cpu().unflatten(0, (count, size))

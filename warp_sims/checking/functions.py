"""Step, loss and their adjoints by themselves: finite differences, forms, dtypes, sizes, repetition."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..bridge.runtime.arrays import WARP_DTYPE
from ..bridge.runtime.contract import functions_of
from ..systems import System
from .compare import Tolerance, compare, exactly, names, settled
from .differences import Derivative, differentiate
from .forms import BY_VALUE, Form, Outputs, forms_of
from .physical import check_parameters
from .report import Comparison

__all__ = [
    "Points",
    "check_functions",
    "compare_adjoint",
    "draw_points",
    "jacobian_of_step",
    "no_finite_step",
    "pulled_back",
]

DIFFERENCES = "finite differences"
DOUBLE = Tolerance(1e-6, 1e-10)
"""Of adjoints in float64 against finite differences. Measured: the built-in systems are within 2e-9."""
FORM = Tolerance(1e-9, 1e-12)
"""Of one form against another in float64: other orders of sums. Measured: 3e-15."""
SINGLE = Tolerance(2e-4, 1e-5)
"""Of float32 against float64: rounding of 6e-8, and cancellation of two or three digits. Measured: 2e-6."""
SIZES = (1, 3, 17)
"""Numbers of worlds that no block or vector divides."""


class Points(NamedTuple):
    """Where step and loss are tried; all numbers are exact in float32."""

    x: Tensor
    """States (points, state_size)."""
    u: Tensor
    """Controls (points, control_size)."""
    scale: Tensor
    """(state_size + control_size,) sizes of the components."""
    length: Tensor
    """(state_size + control_size,) over which lengths the step changes, roughly."""
    notes: tuple[str, ...]

    @property
    def both(self) -> Tensor:
        """(points, state_size + control_size)."""
        return torch.cat([self.x, self.u], dim=1)


def draw_points(system: System, form: Form, count: int, seed: int) -> Points:
    """Draws points for all functions: the system's own initial states, the same with noise, and states that
    random controls lead to from there, a third each. A system without initial states gets normal ones.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    states, controls = form.sizes
    each = (count + 2) // 3
    notes = []
    try:
        own = system.initial_states(each).detach().to("cpu", torch.float64)
    except NotImplementedError:
        notes.append("the system has no initial states: normal ones")
        own = normal(each, states)
    scale = own.abs().amax(0)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)
    spread = 0.5 * (own.amax(0) - own.amin(0))
    length = torch.where(spread > 1e-6 * scale, torch.minimum(spread, scale), scale)
    x = own
    for _ in range(5):
        x = form.run(x, normal(each, controls), own[None], own[:, 0]).x_next
    x = torch.cat([own, own + 0.5 * scale * normal(each, states), x])
    u = normal(3 * each, controls)
    x, u = x.float().double(), u.float().double()
    outputs = form.run(x, u, x[None], x[:, 0])
    finite = outputs.x_next.isfinite().all(1) & x.isfinite().all(1)
    if not finite.all():
        notes.append(f"{int((~finite).sum())} of {len(finite)} points left out: the step is not finite there")
    one = torch.ones(controls, dtype=torch.float64)
    return Points(x[finite], u[finite], torch.cat([scale, one]), torch.cat([length, one]), tuple(notes))


def jacobian_of_step(form: Form, points: Points) -> Derivative:
    """Derivatives of the next state by state and control, by finite differences: (points, state_size,
    state_size + control_size).
    """
    states = form.sizes[0]

    def step(both: Tensor) -> Tensor:
        x, u = both[:, :states], both[:, states:]
        return form.run(x, u, x[None], x[:, 0]).x_next

    return differentiate(step, points.both, points.length)


def _gradient_of_loss(form: Form, points: Points) -> Derivative:
    """(points, 1, state_size)."""

    def cost(x: Tensor) -> Tensor:
        u = points.u[:1].expand(x.shape[0], -1)
        found = form.run(x, u, x[None], x[:, 0]).cost
        assert found is not None
        return found[:, None]

    return differentiate(cost, points.x, points.length[: form.sizes[0]])


def pulled_back(form: Form, points: Points, fields: int) -> Tensor:
    """The Jacobian by the adjoint: unit cotangents of every component, with two fields the second in reverse
    order.
    """
    count, states = points.x.shape
    unit = torch.eye(states, dtype=torch.float64).repeat(count, 1)
    adj = unit[None] if fields == 1 else torch.stack([unit, unit.flip(1)])
    x, u = (t.repeat_interleave(states, 0) for t in (points.x, points.u))
    found = form.run(x, u, adj, torch.ones(x.shape[0]))
    both = torch.cat([found.adj_x[-1], found.adj_u[-1]], dim=1).unflatten(0, (count, states))
    return both if fields == 1 else both.flip(1)


def compare_adjoint(what: str, found: Tensor, step: Derivative) -> Comparison:
    """Compares the Jacobian by an adjoint of a step (see `pulled_back`) with that by finite differences.

    Of a small step the Jacobian by the state is nearly the identity; what differs from it is looked at.
    """
    states, inputs = step.value.shape[1:]
    identity = torch.eye(states, inputs, dtype=torch.float64)
    return compare(
        what,
        "float64",
        DIFFERENCES,
        found,
        step.value,
        names("x_next", states),
        names("x", states) + names("u", inputs - states),
        DOUBLE,
        share=identity,
        usable=settled(step, identity, DOUBLE),
    )


class _Checker:
    """The comparisons of one system; what they share is computed once."""

    def __init__(self, system: System, device: torch.device, count: int, seed: int) -> None:
        scalar = WARP_DTYPE[torch.float64]
        self.forms = forms_of(system, functions_of(system, scalar), torch.float64, device)
        self.system, self.device = system, device
        self.points = draw_points(system, self.forms[0], count, seed)
        self.states, self.controls = self.forms[0].sizes
        self.has_loss = self.forms[0].functions.loss is not None
        self.draw = torch.Generator().manual_seed(seed + 1)
        self.next_names = names("x_next", self.states)
        self.input_names = names("x", self.states) + names("u", self.controls)
        self.identity = torch.eye(self.states, self.states + self.controls, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=torch.float64)

    def trial(self, form: Form, worlds: int | None = None, fields: int = 2) -> Outputs:
        """Runs a form at the first points with random cotangents, the same whatever the number of worlds."""
        draw = torch.Generator().manual_seed(7)
        x, u = self.points.x, self.points.u
        n = max(len(x), max(SIZES))
        adj = torch.randn((2, n, self.states), generator=draw, dtype=torch.float64).float().double()
        x, u = (t.repeat(n // len(t) + 1, 1)[:n] for t in (x, u))
        cost = adj[0, :, 0]
        worlds = n if worlds is None else worlds
        return form.run(x[:worlds], u[:worlds], adj[:fields, :worlds], cost[:worlds])

    def run(self, single: bool) -> Iterator[Comparison]:
        step = jacobian_of_step(self.forms[0], self.points)
        usable = settled(step, self.identity, DOUBLE)
        gradient = _gradient_of_loss(self.forms[0], self.points) if self.has_loss else None
        for form in self.forms:
            yield from self._adjoint_of_step(form, step)
            yield from self._adjoint_of_loss(form, gradient)
            yield from self._other_form(form)
            yield from self._exact(form)
        if not single:
            return
        functions = functions_of(self.system, WARP_DTYPE[torch.float32])
        for form, double in zip(
            forms_of(self.system, functions, torch.float32, self.device), self.forms, strict=True
        ):
            yield from self._single(form, double, usable, gradient)

    def _compare(
        self,
        form: Form,
        what: str,
        against: str,
        found: Tensor,
        expected: Tensor,
        tolerance: Tolerance,
        outputs: list[str] | None = None,
        **options: Tensor,
    ) -> Comparison:
        """Compares derivatives (points, outputs, inputs) of the next state, or of other `outputs`, by state
        and control, of a loss by the state.
        """
        inputs, outputs = self.input_names[: found.shape[2]], outputs or self.next_names
        return compare(what, form.dtype_name, against, found, expected, outputs, inputs, tolerance, **options)

    def _adjoint_of_step(self, form: Form, step: Derivative) -> Iterator[Comparison]:
        found = pulled_back(form, self.points, 1)
        yield compare_adjoint(f"step_vjp {form.name}", found, step)
        if form.name != BY_VALUE:
            second = pulled_back(form, self.points, 2)
            what = f"step_vjp {form.name}, second field"
            yield self._compare(form, what, "the first field", second, found, FORM)
        # an adjoint is linear in the cotangent: neither a threshold nor a constant hides behind unit ones
        size = 10.0 ** self.normal(len(self.points.x), 1)
        adj = size * self.normal(len(self.points.x), self.states)
        out = form.run(self.points.x, self.points.u, adj[None], adj[:, 0])
        both = torch.cat([out.adj_x[0], out.adj_u[0]], dim=1)
        expected = torch.einsum("poi,po->pi", found, adj)
        found, expected = (both / size)[:, None], (expected / size)[:, None]
        outputs, tolerance = ["x_next (random cotangents)"], FORM._replace(floor=1e-11)
        what = f"step_vjp {form.name}"
        yield self._compare(form, what, "its unit cotangents", found, expected, tolerance, outputs)

    def _adjoint_of_loss(self, form: Form, gradient: Derivative | None) -> Iterator[Comparison]:
        adj_cost = self.normal(len(self.points.x))
        out = form.run(self.points.x, self.points.u, self.points.x[None], adj_cost)
        if gradient is None or out.adj_x_cost is None:
            return
        found, usable = (out.adj_x_cost[0] / adj_cost[:, None])[:, None], settled(gradient, None, DOUBLE)
        what, expected = f"loss_vjp {form.name}", gradient.value
        yield self._compare(form, what, DIFFERENCES, found, expected, DOUBLE, ["loss"], usable=usable)

    def _other_form(self, form: Form) -> Iterator[Comparison]:
        """The values of a further form against those by value."""
        if form.name == BY_VALUE:
            return
        first, other = self.trial(self.forms[0]), self.trial(form)
        x = self.points.x
        x = x.repeat(len(first.x_next) // len(x) + 1, 1)[: len(first.x_next)]
        floor = FORM.floor * float(1.0 + x.abs().max())
        yield from self._values(form, BY_VALUE, other, first, FORM._replace(floor=floor), FORM, x)

    def _values(
        self,
        form: Form,
        against: str,
        found: Outputs,
        expected: Outputs,
        of_step: Tolerance,
        of_loss: Tolerance,
        start: Tensor | float = 0.0,
    ) -> Iterator[Comparison]:
        """What step (less `start`) and loss give, beside the same of another form or dtype."""
        for name, a, b, outputs, tolerance in (
            ("step", found.x_next - start, expected.x_next - start, self.next_names, of_step),
            ("loss", found.cost, expected.cost, ["loss"], of_loss),
        ):
            if a is not None and b is not None:
                a, b = (t.reshape(len(t), -1, 1) for t in (a, b))
                yield compare(f"{name} {form.name}", form.dtype_name, against, a, b, outputs, [""], tolerance)

    def _exact(self, form: Form) -> Iterator[Comparison]:
        """Numbers of worlds, repetition, what is written and what is not."""
        dtype = form.dtype_name
        whole, again = self.trial(form), self.trial(form)
        parts = [(f"{name}, run again", a, b) for name, a, b in _pairs(again, whole, len(whole.x_next))]
        yield exactly(
            f"all {form.name}",
            dtype,
            "the same, run again",
            _different(parts, 0.0),
            sum(p[1].numel() for p in parts),
        )
        failed, compared = [], 0
        for fields in (1, 2):
            for worlds in SIZES:
                found = self.trial(form, worlds, fields)
                pairs = list(_pairs(found, whole, worlds))
                failed += _different([(f"{n} of {worlds} worlds", a, b) for n, a, b in pairs], 1e-12)
                failed += [f"{what} is written, {worlds} worlds" for what in found.astray]
                compared += sum(p[1].numel() for p in pairs)
        yield exactly(
            f"all {form.name}",
            dtype,
            f"{', '.join(map(str, SIZES))} worlds alone",
            sorted(set(failed)),
            compared,
        )
        unwritten = [name for name, a, _ in _pairs(whole, whole, len(whole.x_next)) if bool(a.isnan().any())]
        yield exactly(f"outputs {form.name}", dtype, "NaN before the call", unwritten, len(whole.x_next))

    def _single(
        self, form: Form, double: Form, usable: Tensor, gradient: Derivative | None
    ) -> Iterator[Comparison]:
        """Float32 against float64 at the same points."""
        first, other = self.trial(double), self.trial(form)
        yield from self._values(form, "float64", other, first, SINGLE, SINGLE)
        found, expected = pulled_back(form, self.points, 1), pulled_back(double, self.points, 1)
        what, share = f"step_vjp {form.name}", self.identity
        yield self._compare(form, what, "float64", found, expected, SINGLE, share=share, usable=usable)
        if other.adj_x_cost is not None and first.adj_x_cost is not None and gradient is not None:
            found, expected = other.adj_x_cost[0][:, None], first.adj_x_cost[0][:, None]
            what = f"loss_vjp {form.name}"
            yield self._compare(form, what, "float64", found, expected, SINGLE, ["loss"])
        yield from self._exact(form)


def _pairs(found: Outputs, whole: Outputs, worlds: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Outputs by name, and the same of the first worlds of another run."""
    for name in ("x_next", "cost"):
        a, b = getattr(found, name), getattr(whole, name)
        if a is not None:
            yield name, a, b[:worlds]
    for name in ("adj_x", "adj_u", "adj_x_cost"):
        a, b = getattr(found, name), getattr(whole, name)
        if a is not None:
            yield name, a, b[: a.shape[0], :worlds]


def _different(parts: list[tuple[str, Tensor, Tensor]], relative: float) -> list[str]:
    """Names of those that differ by more than this, relative to their largest number."""
    failed = []
    for name, a, b in parts:
        nan = a.isnan() & b.isnan()
        off = torch.where(nan, 0.0, (a - b).abs())
        size = torch.where(b.isfinite(), b.abs(), 0.0).max()
        if not bool((off <= relative * size).all()):
            failed.append(name)
    return failed


def no_finite_step() -> Comparison:
    """Of a system whose step gives NaN or infinity wherever it is tried."""
    return exactly("step by value", "float64", "a finite result", ["x_next at every point"], 0)


def check_functions(
    system: System, device: torch.device, count: int, seed: int, single: bool = True
) -> tuple[list[Comparison], list[str]]:
    """Returns the comparisons of a system's own functions, and what is to be said about them; without
    `single` those in float64 alone.
    """
    checker = _Checker(system, device, count, seed)
    if not len(checker.points.x):
        return [no_finite_step()], list(checker.points.notes)
    found, notes = list(checker.run(single)), list(checker.points.notes)
    try:
        found += check_parameters(system, checker.points.both, device, DOUBLE)
    except ValueError as error:  # generated ones that are wrong are refused where they are used
        notes.append(f"no physical parameters: {error}")
    return found, notes

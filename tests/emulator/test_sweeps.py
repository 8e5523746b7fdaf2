"""The sweeps without a policy, and the comparison of two gradients, by the kernels of a GPU, executed."""

import dataclasses

import pytest
import torch
import warp as wp
from cases import make_states
from own_systems import Pendulum, Unicycle
from warp_sims.bridge.passes import sweeps
from warp_sims.bridge.passes.spec import Cotangents, Spec
from warp_sims.bridge.runtime import registry
from warp_sims.kernels.agreement import CHUNK
from warp_sims.kernels.sweeps.rollout import make_gpu_kernels

import warp_sims as ws

from .device import CPU
from .library import WHOLE
from .problems import in_every_order, open_loop, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
"""Relative to the norm of each tensor: the same sums, contracted and ordered by other compilers in other
forms of the step."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

SYSTEMS = {
    **{f"{n} poles": ws.CartPole(poles=n) for n in (1, 2, 4, 7, 9)},
    **{
        f"{d} drivers, {e} evaders": ws.GuidanceByRepulsion(d, e) for d, e in ((1, 1), (2, 4), (3, 7), (5, 2))
    },
    **{f"{n} points": ws.QuantumControl(points=n) for n in (4, 5, 17, 32)},
    "own system": Pendulum(),
    "own system, no loss": Unicycle(),
}


SOME = ("4 poles", "2 drivers, 4 evaders", "17 points", "own system", "own system, no loss")
"""Systems of ordinary runs."""


def on_cpu(system, dtype):
    return registry.prepare(registry.register(system), dtype, CPU)


def on_emulator(emulator, system, dtype, make=None, **functions):
    """What a GPU would launch; with `make` by kernels of a form of one's own."""
    with emulator.standing_in():
        p = registry.prepare(registry.register(system), dtype, CPU)
    if make is None:
        return p
    own = p.functions._replace(**functions)
    return dataclasses.replace(p, functions=own, kernels=make(own, p.dtype))


def assert_same(found, expected, dtype):
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "nworld, horizon, check, outside", [(5, 3, "", True), (17, 2, "R", True), (1, 9, "R", False)]
)
@DTYPES
@pytest.mark.parametrize("name", SYSTEMS if WHOLE else SOME)
def test_open_loop_loss_and_adjoint(name, dtype, nworld, horizon, check, outside, emulator):
    shape = nworld, horizon, check, outside
    system = SYSTEMS[name]
    expected = open_loop(on_cpu(system, dtype), system, *shape)
    p = on_emulator(emulator, system, dtype)
    assert p.kernels.worlds == 1, "the form of a GPU takes a world a thread"
    found = in_every_order(emulator, lambda: open_loop(p, system, *shape))
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("nworld, horizon", [(1, 100), (300, 2)])
@pytest.mark.parametrize("name", ["4 poles", "2 drivers, 4 evaders", "32 points"])
def test_long_and_many(name, nworld, horizon, emulator):
    """More worlds than a block has threads, and a block that is not whole."""
    system = SYSTEMS[name]
    expected = open_loop(on_cpu(system, torch.float64), system, nworld, horizon, "R", True)
    p = on_emulator(emulator, system, torch.float64)
    found = in_every_order(emulator, lambda: open_loop(p, system, nworld, horizon, "R", True))
    assert_same(found, expected, torch.float64)


OTHER_FORMS = {
    "small state in memory": ("4 points", make_gpu_kernels, {}),
    "large state by value": ("17 points", make_gpu_kernels, {"memory": None}),
}
"""Forms that a GPU takes for a state of another size, or for systems without a step in memory."""


@DTYPES
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms(form, dtype, emulator):
    name, make, functions = OTHER_FORMS[form]
    system = SYSTEMS[name]
    expected = open_loop(on_cpu(system, dtype), system, 5, 4, "R", True)
    p = on_emulator(emulator, system, dtype, make, **functions)
    assert_same(in_every_order(emulator, lambda: open_loop(p, system, 5, 4, "R", True)), expected, dtype)


@pytest.mark.parametrize("keep_check", [False, True])
@DTYPES
@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, 1300, 70_001])
def test_comparison(size, dtype, keep_check, emulator):
    """Bit for bit, non-finite components among them; the sums, in float64, to their order."""
    base, check = torch.randn(2, 3, size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    check[:, ::3] = base[:, ::3]
    base[:, ::7] = check[:, 1::5] = 0.0
    check[0, 0], base[1, 0], base[2, -1] = torch.nan, torch.inf, torch.nan
    expected = sweeps.combine(base, check, keep_check)
    with emulator.standing_in():
        found = in_every_order(
            emulator, lambda: [t.nan_to_num(7.0) for t in sweeps.combine(base, check, keep_check)]
        )
        combined, sums = sweeps.combine(base, check, keep_check)
    torch.testing.assert_close(combined, expected[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(sums, expected[1], rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(found[0], combined.nan_to_num(7.0), rtol=0, atol=0)


def test_a_closed_gate_selects(emulator):
    """An infinite Jacobian behind a closed edge leaves no NaN."""
    for name in ("4 poles", "17 points"):
        system = SYSTEMS[name]
        p = on_emulator(emulator, system, torch.float64)
        controls = torch.zeros(3, 2, 1, dtype=torch.float64)
        states = sweeps.simulate(p, make_states(system, 2), controls)
        jac = torch.full((3, 2, 1, system.state_size), torch.inf, dtype=torch.float64)
        back = Spec(0, "MMM")
        g = Cotangents(None, torch.ones_like(states), None)
        mu, adj_x0 = sweeps.adjoint(p, back, states, controls, jac, g)
        assert torch.isfinite(adj_x0).all() and torch.isfinite(mu).all() and adj_x0.any()


def test_no_form_of_a_cpu_is_left(emulator):
    """The kernels of the emulated device are those of a GPU, not those that the CPU has."""
    for dtype in (torch.float32, torch.float64):
        for system in SYSTEMS.values():
            own, gpu = on_cpu(system, dtype).kernels, on_emulator(emulator, system, dtype).kernels
            assert gpu.worlds == 1 and gpu.simulate is not own.simulate
    assert wp.get_device("cpu").is_cpu and not emulator.is_cpu

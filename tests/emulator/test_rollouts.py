"""Whole rollouts by the kernels of a GPU, executed: the CPU's numbers, the same bits in any order of lanes.

Forward sweep, linearisation and weight products (bridge/passes/operations.py), adjoint sweep. Random
cotangents on every output at once; memory that nothing writes is NaN.
"""

import random

import pytest
import torch
from cases import make_net
from warp_sims.bridge.passes import spec as segments

import warp_sims as ws

from .library import WHOLE
from .problems import FORMS, PROBLEMS, Case, Problem, assert_as_on_a_cpu, form_of_sweep, in_every_order

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

SOME = ("cartpole", "odd widths", "wide", "guidance", "quantum", "links", "composed", "own system, no loss")
"""Problems of ordinary runs."""


def compare(emulator, form, case, **options):
    expected = case.run(**options)
    with emulator.standing_in(), form_of_sweep(form):
        found = in_every_order(emulator, lambda: case.run(**options))
    assert_as_on_a_cpu(found, expected)
    return found


@pytest.mark.parametrize("members, nworld, horizon", [(0, 1, 1), (0, 17, 2), (3, 5, 3)])
@pytest.mark.parametrize("form", FORMS)
@DTYPES
@pytest.mark.parametrize("name", PROBLEMS if WHOLE else SOME)
def test_as_on_a_cpu(name, dtype, form, members, nworld, horizon, emulator):
    compare(emulator, form, Case(name, dtype, nworld, horizon, members))


@pytest.mark.parametrize("nworld, horizon", [(3, 100), (300, 2)])
@pytest.mark.parametrize("form", ["as chosen", "any network"])
@pytest.mark.parametrize("name", ["cartpole", "odd widths", "guidance", "quantum"])
def test_long_and_many(name, form, nworld, horizon, emulator):
    """In float64: a hundred steps amplify the rounding of float32 by more than any mistake."""
    compare(emulator, form, Case(name, torch.float64, nworld, horizon))


@pytest.mark.parametrize(
    "options",
    [
        {"base": "R", "check": ""},
        {"base": "N", "check": "S", "decay": 1.0},
        {"base": "M", "check": "R", "decay": 0.0},
        {"base": "RMNSRMN", "check": "SNMRRRS"},
        {"base": "SSSSSSS", "check": ""},
    ],
    ids=repr,
)
@DTYPES
@pytest.mark.parametrize("name", ["odd widths", "guidance", "quantum", "own system, no loss"])
def test_flows_schedules_and_decay(name, dtype, options, emulator):
    compare(emulator, "as chosen", Case(name, dtype, 3, 7), **options)


@pytest.mark.parametrize("segment", [1, 3, 7])
@pytest.mark.parametrize("form", FORMS)
@DTYPES
@pytest.mark.parametrize("name", ["odd widths", "guidance", "quantum"])
def test_checkpointed_segments(name, dtype, form, segment, emulator):
    """Activations that the sweep gives again, in segments: the trajectory has the bits it has without."""
    case = Case(name, dtype, 5, 7, members=2)
    found = compare(emulator, form, case, base="RMNSRMM", segment=segment)
    with emulator.standing_in(), form_of_sweep(form):
        whole = case.run(base="RMNSRMM")
    assert all(map(torch.equal, found[:2], whole[:2]))


def test_products_in_pieces(emulator, monkeypatch):
    """Kept activations, but products over a step at a time: the adjoint sweep carries a cotangent between."""
    monkeypatch.setitem(segments.SEGMENT_BYTES, "cuda", 1)
    compare(emulator, "as chosen", Case("guidance", torch.float64, 5, 4, members=2), base="RMNR")


@pytest.mark.parametrize("segment", [0, 2])
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("everything composed", torch.float64),
        ("composed herd", torch.float64),
        ("composed herd", torch.float32),
        ("convolutions", torch.float64),
        ("convolved herd", torch.float64),
        ("convolved herd", torch.float32),
    ],
)
def test_every_operation_of_composed_policies(name, dtype, segment, emulator):
    """The cart-pole in float64 alone: behind 20 layers its feedback amplifies float32's rounding to 3e-5."""
    compare(emulator, "as chosen", Case(name, dtype, 6, 3, members=2), segment=segment)


def test_what_is_not_written_would_show(emulator):
    """The check that the others rely on: memory that torch gives is NaN."""
    with form_of_sweep(FORMS[0]):
        assert torch.empty(5).isnan().all() and torch.ones(3).new_empty((2, 2)).isnan().all()


def draw_case(seed):
    """A problem of any shape, and options of its backward pass."""
    draw = random.Random(seed)
    systems = [
        ws.CartPole(poles=draw.randint(1, 6)),
        ws.GuidanceByRepulsion(draw.randint(1, 4), draw.randint(1, 8)),
        ws.QuantumControl(points=draw.randint(4, 24)),
    ]
    widths = [draw.choice([1, 3, 8, 31, 32, 33, 64, 127, 200]) for _ in range(draw.randint(0, 3))]
    horizon, members = draw.choice([1, 2, 5, 9]), draw.choice([0, 0, 1, 3])
    problem = Problem(
        draw.choice(systems), lambda system, seed: make_net(system, widths, seed=seed, gain=1.0)
    )
    dtype, form = draw.choice([torch.float32, torch.float64]), draw.choice(FORMS)
    options = {
        "base": "".join(draw.choices("RMNS", k=horizon)),
        "check": draw.choice(["", "".join(draw.choices("RMNS", k=horizon))]),
        "decay": draw.choice([0.0, 0.5, 1.0]),
        "segment": draw.choice([0, 0, 1, 3]),
    }
    return form, Case(problem, dtype, draw.choice([1, 2, 3, 4, 6, 9]), horizon, members), options


@pytest.mark.parametrize("seed", range(100 if WHOLE else 8))
def test_cases_drawn_at_random(seed, emulator):
    form, case, options = draw_case(seed)
    compare(emulator, form, case, **options)

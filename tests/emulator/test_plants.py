"""The emulator finds mistakes: each planted one, by the detector that must find it.

A selection, in which every detector and every barrier of one kernel of a kind is; all with EMULATOR=whole.
"""

import pytest
import torch

from . import library
from .plants import BARRIERS, PLANTS, WORKS, expected, find
from .problems import form_of_sweep

SELECTION = ("resident", "any network")
"""Kernels whose barriers are removed in ordinary runs."""
TEXTS = {
    "mask of half a warp in an exchange",
    "rows of shared memory not cleared",
    "one piece of a row too many stored",
    "padding of a row not cleared",
    "padding of one row too many",
    "component of a cotangent one too high",
    "one component too many",
}
"""Changes of the text that are compiled in ordinary runs."""

CHOSEN = [p for p in PLANTS if library.WHOLE or p.what in TEXTS or (p.barrier >= 0 and p.work in SELECTION)]


@pytest.mark.parametrize("plant", CHOSEN, ids=lambda p: f"{p.work}: {p.what}")
def test_found(plant):
    if plant.detector in ("races", "bounds") and not library.has_sanitizers():
        pytest.skip("needs g++ with its sanitizers")
    assert plant.detector in find(plant).detectors


@pytest.mark.parametrize("work", BARRIERS)
def test_every_barrier_has_its_plant(work, emulator):
    """The text has as many barriers as the list of plants removes; none of them is in other kernels."""
    emulator.recorded = []
    try:
        with emulator.standing_in(), form_of_sweep(WORKS[work].form):
            found = WORKS[work].run()
        counts = {r.name: len(library.barriers(r.command.text)[1]) for r in emulator.recorded}
    finally:
        emulator.recorded = None
    assert counts == {WORKS[work].kernel: BARRIERS[work]}
    assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("work", [w for w in WORKS if w not in BARRIERS])
def test_no_other_kernel_has_a_barrier(work, emulator):
    emulator.recorded = []
    try:
        with emulator.standing_in(), form_of_sweep(WORKS[work].form):
            WORKS[work].run()
        assert not any(library.barriers(r.command.text)[1] for r in emulator.recorded)
    finally:
        emulator.recorded = None
    assert all(torch.isfinite(t).all() for t in expected(work))

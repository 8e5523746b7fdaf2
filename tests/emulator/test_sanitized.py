"""GPU kernels under sanitizers: no race within a block or between blocks, no access beside an array.

Each kernel of a rollout is launched again in a process of its own, once for each sanitizer. A selection of
problems; all of them with EMULATOR=whole.
"""

import pytest
import torch
from warp_sims.bridge.passes import sweeps
from warp_sims.bridge.runtime import registry

import warp_sims as ws

from . import replay
from .device import CPU
from .library import WHOLE, has_sanitizers
from .problems import FORMS, PROBLEMS, Case, form_of_sweep, open_loop

pytestmark = pytest.mark.skipif(not has_sanitizers(), reason="needs g++ with its sanitizers")

MODES = pytest.mark.parametrize("mode", ["bounds", "races"])
CASES = [("guidance", torch.float32)]
if WHOLE:
    CASES = [(name, torch.float32) for name in PROBLEMS] + [
        (n, torch.float64) for n in ("guidance", "quantum")
    ]


def assert_clean(emulator, mode, run):
    """Of every kernel that runs, the last launch: in a sweep over segments it carries a cotangent."""
    emulator.recorded = []
    try:
        with emulator.standing_in():
            run()
        last = {(r.name, r.threads): r for r in emulator.recorded}
    finally:
        emulator.recorded = None
    assert last
    for launch in last.values():
        assert replay.check(launch, mode) == "", launch.name
    return {name for name, _ in last}


@MODES
@pytest.mark.parametrize("form", FORMS if WHOLE else FORMS[1:])
@pytest.mark.parametrize("name, dtype", CASES)
def test_rollouts(name, dtype, form, mode, emulator):
    case = Case(name, dtype, 5, 3)
    with form_of_sweep(form):
        ran = assert_clean(emulator, mode, case.run)
    assert "adjoint" in ran and ran & {"resident_rollout", "fused_rollout"}


@pytest.mark.skipif(not WHOLE, reason="a part of EMULATOR=whole")
@MODES
@pytest.mark.parametrize("form", FORMS)
def test_segments_of_an_ensemble(form, mode, emulator):
    case = Case("guidance", torch.float32, 5, 5, members=2)
    with form_of_sweep(form):
        assert_clean(emulator, mode, lambda: case.run(segment=2))


SYSTEMS = {"large state": ws.QuantumControl(points=17), "small state": ws.CartPole(poles=2)}


@MODES
@pytest.mark.parametrize("name", SYSTEMS if WHOLE else ["large state"])
def test_sweeps_and_comparison(name, mode, emulator):
    system = SYSTEMS[name]

    def run():
        p = registry.prepare(registry.register(system), torch.float32, CPU)
        open_loop(p, system, 5, 3, "R", True)
        open_loop(p, system, 5, 3, "", False)
        sweeps.combine(*torch.randn(2, 2, 700), False)

    assert assert_clean(emulator, mode, run) == {"simulate", "loss", "adjoint", "combine"}

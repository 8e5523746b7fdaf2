"""Mutants of the built-in adjoints, some of them; all: `make mutants`, docs/mutants.md."""

import pytest
from mutants import FACTOR, all_mutants
from mutation_run import check_mutant


def test_mutants_are_those_of_the_page():
    """Every hand-written form of every built-in adjoint has some, and each differs from its source once."""
    mutants = all_mutants()
    counts = {(m.file, m.function) for m in mutants}
    assert counts == {
        *(
            (f"{name}.py", what)
            for name in ("cartpole", "guidance", "quantum", "quadrotor")
            for what in ("step_vjp", "loss_vjp", "parameters_vjp")
        ),
        *((f"{name}_block.h", "step_vjp") for name in ("cartpole", "guidance", "quantum")),
        *(("quantum_memory.h", what) for what in ("step_vjp", "loss_vjp")),
    }
    assert len({(m.name, m.source) for m in mutants}) == len(mutants) > 400
    assert all(m.source.count(FACTOR) == 1 for m in mutants)


@pytest.mark.parametrize("number", range(0, 560, 60))
def test_some_mutants_are_caught(number):
    mutant = all_mutants()[number]
    outcome = check_mutant(mutant)
    assert outcome.verdict == "caught", outcome
    assert outcome.where.startswith(f"{mutant.function} {mutant.form}") and " by " in outcome.where

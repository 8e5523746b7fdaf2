"""Checks every mutant of the built-in adjoints (see mutants.py), and writes docs/mutants.md.

python tests/mutation_run.py                    all of them, some minutes: `make mutants`
python tests/mutation_run.py --every 20         every 20th, and nothing is written
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import warp as wp
from mutants import FACTOR, Mutant, all_mutants

from warp_sims.checking.functions import check_functions

PAGE = Path(__file__).parents[1] / "docs" / "mutants.md"


class Outcome(NamedTuple):
    """What `check` said about a mutant."""

    name: str
    verdict: str
    """ "caught", "missed", or "no number": the compiler refuses to multiply it."""
    where: str
    """Of the first disagreement: function, form, output and input."""
    size: float


def check_mutant(mutant: Mutant) -> Outcome:
    """Checks a mutant in float64. Caught is what `check` finds in the function and form that were mutated."""
    for system in mutant.systems():
        try:
            comparisons, _ = check_functions(system, torch.device("cpu"), 12, 0, single=False)
        except Exception as error:  # Warp raises nothing more specific
            if "build failed" not in str(error):
                raise
            return Outcome(mutant.name, "no number", "", 0.0)
        for comparison in comparisons:
            if comparison.what.startswith(f"{mutant.function} {mutant.form}") and comparison.disagreements:
                worst = max(comparison.disagreements, key=lambda d: d.size or 0.0)
                where = f"{comparison.what}: {worst.output} by {worst.input}"
                return Outcome(mutant.name, "caught", where, worst.size or 0.0)
    return Outcome(mutant.name, "missed", "", 0.0)


def _start() -> None:
    torch.set_num_threads(1)
    wp.config.log_level = wp.LOG_ERROR
    # hundreds of kernels that nobody needs again
    wp.config.kernel_cache_dir = tempfile.mkdtemp(prefix="mutants")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the compiler refuses, it explains at length


def _check_number(number: int) -> Outcome:
    return check_mutant(all_mutants()[number])


def main() -> int:
    """Runs the command line; returns 1 where a mutant is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th mutant (default: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--file", help="of one file of kernels/ alone")
    options = parser.parse_args()
    mutants = all_mutants()
    numbers = [i for i, m in enumerate(mutants) if options.file in (None, m.file)][:: options.every]
    start = time.perf_counter()
    outcomes = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, spawn, _start) as pool:
        for outcome in pool.map(_check_number, numbers):
            outcomes.append(outcome)
            print(
                f"{len(outcomes):4}/{len(numbers)} {outcome.verdict:10} {outcome.name}   {outcome.where}",
                flush=True,
            )
    seconds = time.perf_counter() - start
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    print(f"{dict(counts)} in {seconds:.0f} s with {options.jobs} processes")
    if options.every == 1 and options.file is None:
        PAGE.write_text(page([mutants[i] for i in numbers], outcomes, seconds, options.jobs))
        print(f"written: {PAGE}")
    return 1 if counts["missed"] else 0


def page(mutants: list[Mutant], outcomes: list[Outcome], seconds: float, jobs: int) -> str:
    """The page of a full run."""
    rows = collections.defaultdict(collections.Counter)
    smallest = collections.defaultdict(lambda: float("inf"))
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        key = mutant.file, mutant.form
        rows[key][outcome.verdict] += 1
        if outcome.verdict == "caught":
            smallest[key] = min(smallest[key], outcome.size)
    total = sum(rows.values(), collections.Counter())
    made = sum(total.values()) - total["no number"]
    lines = [
        "# Planted errors",
        "",
        f"`make mutants` multiplies each term of each built-in adjoint by {FACTOR} once, and checks the "
        "system as\n`warp-sims check` does, in float64. It writes this page (`tests/mutation_run.py`).",
        "",
        f"**{total['caught']} of {made} mutants are caught**, in the function and form that were changed, "
        f"with output\nand input named. It took {seconds:.0f} s with {jobs} processes, most of it compiling. "
        "A relative difference\nof 1e-6 is allowed; the smallest that was caught stands in the last column.",
        "",
        "| file | form | mutants | caught | smallest difference |",
        "|---|---|---|---|---|",
    ]
    for (file, form), row in rows.items():
        count = sum(row.values()) - row["no number"]
        lines.append(
            f"| `kernels/{file}` | {form} | {count} | {row['caught']} | {smallest[file, form]:.1e} |"
        )
    for verdict, title in (
        ("missed", "Missed"),
        ("no number", "Not counted: the compiler refuses to multiply what is no number"),
    ):
        names = [outcome.name for outcome in outcomes if outcome.verdict == verdict]
        if names:
            lines += ["", f"{title}:", "", *(f"- `{name}`" for name in names)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

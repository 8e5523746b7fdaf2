"""The command `warp-sims check`: its options, and what it prints."""

from __future__ import annotations

import argparse

from ..field_options import add_declared, add_system_options
from ..options import DEVICE, add_system
from ..systems import System
from .run import PARTS, check

__all__ = ["add_check_options", "run_check"]


def add_check_options(parser: argparse.ArgumentParser, named: str | None) -> None:
    """Adds what `check` takes; the numbers of the system too, where one is named already."""
    add_system(parser)
    what = parser.add_argument_group("what is checked")
    what.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        default=list(PARTS),
        help=f"some of {' '.join(PARTS)} (default: all)",
    )
    add_declared(what, check, "points", "seed", "device", device=DEVICE)
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - for the standard output")
    if named is not None:
        add_system_options(parser, named)


def run_check(options: argparse.Namespace, system: System) -> int:
    """Runs `warp-sims check`; returns 0 where everything agrees, else 1."""
    report = check(
        system,
        parts=options.parts,
        points=options.points,
        seed=options.seed,
        device=options.device,
    )
    print(report.to_json() if options.json == "-" else report.table())
    if options.json not in (None, "-"):
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(report.to_json() + "\n")
        print(f"json: {options.json}")
    return 0 if report.agrees else 1

"""The command `warp-sims bench`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from ..systems import registry
from .case import FLOWS, PUBLISHED
from .report import against, check_page, page, summary, tables, write_page
from .run import FORMAT, bench
from .settings import BATCHES, SCALES, Settings

QUICK = {"batches": (8,), "flows": ("R", "C"), "rounds": 3, "block": 0.02, "memory": False}
_SLOW_TO_START = ("torch-compile", "warp-tape")
"""Peers that compile for tens of seconds: `--quick` has them only where they are named."""

DEFAULTS = Settings(devices=("cpu",))


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `bench` takes."""
    add = parser.add_argument
    add(
        "systems",
        metavar="SYSTEM",
        nargs="*",
        help=f"{', '.join(sorted(registry))}, or module:Class, with their train_defaults; the peers know "
        f"{', '.join(PUBLISHED)} (default: these)",
    )
    add("--flows", nargs="+", metavar="FLOW", help=f"some of {' '.join(FLOWS)} (default: all)")
    batches = " ".join(map(str, BATCHES))
    add("--batch", nargs="+", type=int, metavar="N", help=f"numbers of worlds (default: {batches})")
    add(
        "--widths", nargs="+", metavar="WxW", help="hidden layers, 32x32 for example (default: the published)"
    )
    add(
        "--policy",
        nargs="+",
        metavar="POLICY",
        help="instead of the published one, mlp:elu+layernorm and the like, or module:name",
    )
    add(
        "--device",
        nargs="+",
        metavar="DEVICE",
        help="cpu, cuda or cuda:INDEX (default: cpu, and cuda where there is one)",
    )
    add(
        "--contestants",
        nargs="+",
        metavar="NAME",
        help="some of warp-sims and the peers, NAME:PLAN for one plan of a peer (default: all)",
    )
    add(
        "--peers",
        type=Path,
        metavar="DIR",
        help="folder of the peers (default: benchmarks/peers of the checkout this package is used from)",
    )
    add(
        "--rounds",
        type=int,
        metavar="N",
        help=f"turns of every contestant, at most (default: {DEFAULTS.rounds})",
    )
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="that a contestant may take in a row; one that is too slow is left out, and that is said "
        f"(default: {DEFAULTS.time_limit:g})",
    )
    add(
        "--scaling",
        choices=tuple(SCALES),
        help="instead of the matrix, time against the worlds, the horizon, the poles or the grid points, all "
        "sizes and flows of a problem in turns; ours alone and 256 worlds unless asked for more",
    )
    add(
        "--ensemble",
        nargs="+",
        type=int,
        metavar="K",
        help="instead of the matrix, K networks trained together beside one alone, of ours; 8 worlds, R and "
        "C unless asked for more",
    )
    add("--no-memory", action="store_true", help="no first calls and memory, which need fresh processes")
    add(
        "--quick",
        action="store_true",
        help="a trial of two minutes: batch 8, flows R and C, 3 rounds, peers that start fast, no memory",
    )
    add("--json", type=Path, metavar="FILE", help="write every measurement")
    add(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="write the tables as a page; of one that exists only what stands between its markers",
    )
    add("--against-report", type=Path, metavar="FILE", help="earlier --json file to stand beside")


def run_bench(options: argparse.Namespace) -> int:
    """Runs the command; returns 1 if a contestant was wrong or failed, else 0.

    Raises:
        ValueError, OSError: an option makes no sense, or a file cannot be read or written.
    """
    settings = _settings(options)
    earlier = None
    if options.against_report is not None:
        earlier = _earlier(options.against_report)
    for path in (options.json, options.markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"bench: {path}: there is no folder {path.absolute().parent}")
    if options.markdown is not None:
        check_page(options.markdown)
    report = bench(settings, lambda text: print(text, flush=True))
    command = shlex.join(["warp-sims", *options.words])
    report["command"] = command
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    beside = against(report, earlier) if earlier is not None else []
    if options.markdown is not None:
        write_page(options.markdown, [*page(report, command), *beside])
    print("\n" + "\n".join([*tables(report), *beside, *summary(report)]))
    return 1 if any(row["wrong"] for row in [*report["rows"], *report["ensembles"]]) else 0


def _earlier(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither text nor JSON
        raise ValueError(f"bench: --against-report {path}: {error}; give a file of bench --json") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(
            f"bench: --against-report {path} is no report of format {FORMAT}; give a file that bench --json "
            "of this version wrote"
        )
    return report


def _settings(options: argparse.Namespace) -> Settings:
    """The settings that the options stand for; --quick and --scaling change defaults only."""
    known: dict[str, Any] = {}
    if options.scaling == "worlds" and options.batch:
        raise ValueError(
            f"bench: --batch {' '.join(map(str, options.batch))} with --scaling worlds, which takes "
            f"{', '.join(map(str, SCALES['worlds']))} worlds; leave --batch out"
        )
    if options.scaling:
        known |= {"batches": (256,), "contestants": ("warp-sims",), "memory": False}
    if options.ensemble:
        known |= {"batches": (8,), "flows": ("R", "C")}
    if options.quick:
        known |= QUICK
    given: dict[str, Any] = {
        "problems": tuple(dict.fromkeys(options.systems)),
        "flows": tuple(dict.fromkeys(flow.upper() for flow in options.flows or ())),
        "batches": tuple(sorted(set(options.batch or ()))),
        "widths": tuple(_widths(text) for text in options.widths or ()),
        "policies": tuple(dict.fromkeys(options.policy or ())),
        "devices": tuple(dict.fromkeys(options.device or ())),
        "contestants": tuple(options.contestants or ()),
        "peers": options.peers,
        "rounds": options.rounds,
        "time_limit": options.time_limit,
        "scaling": options.scaling,
        "ensemble": tuple(sorted(set(options.ensemble or ()))),
    }
    known |= {name: value for name, value in given.items() if value not in (None, (), "")}
    if options.no_memory:
        known["memory"] = False
    if "devices" not in known:
        known["devices"] = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if options.scaling and not options.systems:
        known["problems"] = PUBLISHED
    return Settings(**known, without=_SLOW_TO_START if options.quick and not options.contestants else ())


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split("x"))
    except ValueError:
        raise ValueError(
            f"bench: --widths {text!r}, expected whole numbers with an x between, as 100x100"
        ) from None

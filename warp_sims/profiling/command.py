"""The command `warp-sims profile`: its options, and what it runs."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from ..field_options import add_declared, add_flag, add_system_options
from ..named import make_policy
from ..options import DEVICE, DTYPE, add_policy, add_system, preset_of
from ..systems import System
from ..training.config import LOSSES
from .case import FLOWS
from .run import AGAINST, profile


def add_profile_options(parser: argparse.ArgumentParser, named: str | None) -> None:
    """Adds what `profile` takes; the numbers of the system too, where one is named already."""
    preset = preset_of(named)
    add_system(parser)
    policy = parser.add_argument_group("policy")
    add_policy(policy, preset.policy)
    run = parser.add_argument_group("what is run")
    letters = [flow.value for flow in FLOWS]
    run.add_argument(
        "--flow",
        dest="flows",
        nargs="+",
        metavar="FLOW",
        default=letters,
        help=f"names or letters (default: {' '.join(letters)})",
    )
    add_declared(
        run,
        profile,
        *("batch", "horizon", "loss", "control_cost", "dtype", "device", "repeats"),
        horizon={"default": preset.horizon},
        loss={
            "choices": LOSSES,
            "help": "the system's loss of the last state, or of all states (default: "
            f"{preset.loss}; for a system without a loss the mean square of its states)",
        },
        control_cost={"default": preset.control_cost, "help": "weight of the mean squared control"},
        dtype=DTYPE,
        device=DEVICE,
    )
    out = parser.add_argument_group("what is reported")
    add_declared(out, profile, "against", "arch", against={"choices": AGAINST})
    add_flag(out, "kernels", True, "compile every kernel anew, for its time and what it takes of a GPU")
    out.add_argument("--json", metavar="FILE", help="write everything as JSON; - for the standard output")
    out.add_argument("--trace", metavar="FILE", help="write a trace for chrome://tracing or ui.perfetto.dev")
    if named is not None:
        add_system_options(parser, named)


def run_profile(options: argparse.Namespace, system: System) -> None:
    """Runs `warp-sims profile`."""
    policy = make_policy(options, system, seed=0, zero_last=False)
    for path in (options.json, options.trace):
        _check_writable(path)
    result = profile(
        system,
        policy,
        flows=options.flows,
        batch=options.batch,
        horizon=options.horizon,
        loss=options.loss or (preset_of(options.system).loss if system.has_loss else None),
        control_cost=options.control_cost,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        repeats=options.repeats,
        against=options.against,
        compile_times=options.kernels,
        arch=options.arch,
    )
    print(result.to_json() if options.json == "-" else result.table())
    if options.json not in (None, "-"):
        result.write_json(options.json)
        print(f"json: {options.json}")
    if options.trace is not None:
        result.write_trace(options.trace)
        print(f"trace: {options.trace}", file=sys.stderr if options.json == "-" else sys.stdout)


def _check_writable(path: str | None) -> None:
    """Refuses a file that cannot be written before minutes are spent on what belongs into it."""
    if path in (None, "-"):
        return
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise ValueError(f"{path}: cannot be written; give a file in a folder that exists")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"{path}: cannot be written, permission denied; give another file")

"""`warp-sims train SYSTEM --algorithm shac`: options, made from the fields of the settings, and the run."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence

import torch

from ..field_options import add_declared, add_flag, add_system_options, make_system
from ..options import FLOW
from ..training.runs import ACTOR_CRITIC, is_run, read_config
from .config import ALGORITHMS, ActorCriticConfig
from .folder import from_json
from .run import ActorCriticResult, train_actor_critic

SETTINGS = [f.name for f in dataclasses.fields(ActorCriticConfig) if f.name != "system"]


def asks_for_actor_critic(words: Sequence[str]) -> bool:
    """Whether the words of a command line name one of these algorithms, or a run of one to be resumed."""
    if _value(words, "--algorithm") in ALGORITHMS:
        return True
    run = _value(words, "--resume")
    return run is not None and is_run(run, ACTOR_CRITIC)


def _value(words: Sequence[str], option: str) -> str | None:
    """The value of an option among words, None where it is not there."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else (words[i + 1] if i + 1 < len(words) else None)
    return None


def add_actor_critic_options(
    parser: argparse.ArgumentParser, words: Sequence[str], named: str | None
) -> None:
    """Adds what `train --algorithm shac` takes, or what going on with such a run does."""
    resumed = _value(words, "--resume") is not None
    if resumed:
        parser.add_argument("--resume", metavar="RUN", required=True, help="run folder to go on with")
        parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:INDEX (default: as begun)")
        parser.add_argument("--algorithm", choices=ALGORITHMS, help=argparse.SUPPRESS)
    else:
        parser.add_argument("system", metavar="SYSTEM", help="a system with episodes, such as hopper")
        parser.add_argument(
            "--algorithm", choices=ALGORITHMS, required=True, help="shac: short-horizon actor-critic"
        )
        parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/SYSTEM_shac_FLOW)")
        parser.add_argument("--overwrite", action="store_true", help="replace the run that stands there")
        flow = {**FLOW, "help": f"{FLOW['help']}; regular is SHAC"}
        dtype = {"choices": ("float32", "float64")}
        training = parser.add_argument_group("training")
        add_declared(
            training, ActorCriticConfig, *SETTINGS, flow=flow, dtype=dtype, device={"metavar": "DEVICE"}
        )
    run = parser.add_argument_group("how it runs")
    run.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="stop behind the update in which so many seconds are over; --resume goes on",
    )
    run.add_argument("--threads", type=int, metavar="N", help="threads of the CPU (default: torch's)")
    add_flag(run, "progress", True, "show a progress bar")
    if not resumed and named is not None:
        add_system_options(parser, named)


def run_actor_critic(options: argparse.Namespace) -> None:
    """Trains, or goes on with a run."""
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads is {options.threads}, expected at least 1")
        torch.set_num_threads(options.threads)
    given = vars(options)
    if "resume" in given:
        moved = {} if options.device is None else {"device": options.device}
        config = from_json(read_config(options.resume, ACTOR_CRITIC), **moved)
        out, resume, overwrite = options.resume, True, False
    else:
        config = ActorCriticConfig(make_system(options), **{name: given[name] for name in SETTINGS})
        label = options.system.rpartition(":")[2].lower()
        out = options.out or os.path.join("runs", f"{label}_{options.algorithm}_{config.settings()['flow']}")
        resume, overwrite = False, options.overwrite
    result = train_actor_critic(
        config,
        out,
        overwrite=overwrite,
        resume=resume,
        time_limit=options.time_limit,
        progress=options.progress,
    )
    _report(result)


def _report(result: ActorCriticResult) -> None:
    log, out = result.log, str(result.path)
    known = log["return_eval"] == log["return_eval"]
    returns, updates = log["return_eval"][known], log["update"][known]
    print(
        f"return {returns[0]:.0f} before training, {returns[-1]:.0f} behind update {updates[-1]}, best "
        f"{returns.max():.0f}; {log['seconds'][-1]:.0f} s"
    )
    if not result.finished:
        print(f"to go on: warp-sims train --resume {shlex.quote(out)}")
    print(f"to see it move: warp-sims animate {shlex.quote(out)}")

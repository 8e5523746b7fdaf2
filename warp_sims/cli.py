"""The command line: `warp-sims` and `python -m warp_sims`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import warp as wp

from . import __version__
from .actor_critic.command import add_actor_critic_options, asks_for_actor_critic, run_actor_critic
from .bench.command import add_bench_options, run_bench
from .checking.command import add_check_options, run_check
from .demo import run_demo
from .field_options import make_system
from .kernels.flow import Flow
from .named import find_combiner, find_function, find_loss, make_policy, own_policy
from .options import (
    DEFAULTS,
    QUICK_EPOCHS,
    SEEDS,
    add_animate_options,
    add_demo_options,
    add_reproduce_options,
    add_resume_options,
    add_train_options,
)
from .pictures.animation import animate
from .pictures.plots import need_matplotlib
from .profiling.command import add_profile_options, run_profile
from .reproduction.report import write_report
from .reproduction.run import RunFailed, reproduce
from .training.config import CLIPS, TrainConfig
from .training.processes import join, launched, leave
from .training.published import EPOCHS, SETTINGS, Scale, make_jobs
from .training.resuming import resumed_config
from .training.run_config import build_system
from .training.runs import read_config
from .training.train import TrainResult, train

INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


class UsageError(Exception):
    """What the command line refuses, in one line."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 1 (training failed, a contestant of the benchmark was
    wrong, a check disagreed), 2 (refused) or 130 (Ctrl-C).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in words
    try:
        with _importable_here(), _quiet_warp():
            options = _parse(words)
            options.words = words
            code = options.run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (FloatingPointError, RunFailed) as error:
        if traceback:
            raise
        return _fail(error, 1)
    except (UsageError, ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        if traceback:
            raise
        return _fail(error, 2)
    return code or 0


def _fail(error: Exception, code: int) -> int:
    print("warp-sims: error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


@contextlib.contextmanager
def _importable_here() -> Iterator[None]:
    """Puts the current directory on the path, as `python -m` does, so that `module:Class` is found there."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


@contextlib.contextmanager
def _quiet_warp() -> Iterator[None]:
    """Keeps Warp's notes on compiled modules out of the output. Only the command line does so, not the
    library.
    """
    level = wp.config.log_level
    wp.config.log_level = wp.LOG_ERROR
    try:
        yield
    finally:
        wp.config.log_level = level


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="warp-sims",
        description="Trains controllers through simulators, on the gradient flow that suits physics.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"warp-sims {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], summary: str, more: str = ""
    ) -> _Parser:
        made = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}", allow_abbrev=False
        )
        made.set_defaults(run=run)
        made.add_argument("--traceback", action="store_true", help="show where in the program an error arose")
        return made

    train_command = command(
        "train",
        _run_train,
        "train a controller through a simulator",
        "The defaults are the published settings of the system, for one of your own its train_defaults or "
        "those of the cart-pole. "
        "`warp-sims train SYSTEM --help` shows them, and lists the numbers of that system as options, too.",
    )
    if words[:1] == ["train"] and asks_for_actor_critic(words):
        add_actor_critic_options(train_command, words, _named_system("train", words))
        train_command.set_defaults(run=run_actor_critic)
    elif words[:1] == ["train"] and any(word.partition("=")[0] == "--resume" for word in words):
        add_resume_options(train_command)
        train_command.set_defaults(run=_run_resumed)
    else:
        # The system that is named decides which options there are: `train cartpole --poles 4`.
        add_train_options(train_command, _named_system("train", words))
    add_animate_options(command("animate", _run_animate, "draw the controlled system of a run as GIF or MP4"))
    add_demo_options(
        command(
            "demo",
            _run_demo,
            "train a cart-pole controller with two flows side by side, and draw what came out",
        )
    )
    add_profile_options(
        command(
            "profile",
            _run_profile,
            "show where the time of a rollout and its gradients goes",
            "Every launch and every wide product, beside what this machine can do. "
            "`warp-sims profile SYSTEM --help` lists the numbers of that system as options, too.",
        ),
        _named_system("profile", words),
    )
    add_check_options(
        command(
            "check",
            _run_check,
            "check a system's adjoints against finite differences, and every form of its step",
            "Exits with 1 where something disagrees; the table names the output and the input. "
            "`warp-sims check SYSTEM --help` lists the numbers of that system as options, too.",
        ),
        _named_system("check", words),
    )
    add_reproduce_options(
        command(
            "reproduce",
            _run_reproduce,
            "run the paper's experiments again, and report on them",
            "It can be stopped at any moment; the same command goes on where it was.",
        )
    )
    add_bench_options(
        command(
            "bench",
            run_bench,
            "time training updates of the published problems beside JAX, torch and others, in one run",
            "Every contestant's loss and gradients are compared with float64 ones before it is timed. The "
            "others are in benchmarks/peers of the repository; without them ours is measured alone.",
        )
    )
    return parser.parse_args(words)


def _named_system(command: str, words: list[str]) -> str | None:
    """Returns the system that the command line names, if it is for this command."""
    named = words[1] if words[:1] == [command] and len(words) > 1 else None
    if named is not None and named.startswith("-"):
        if named not in ("-h", "--help") and named.partition("=")[0] != "--resume":
            raise UsageError(f"{named} stands before the system; give warp-sims {command} SYSTEM {named} …")
        named = None
    return named


def _run_train(options: argparse.Namespace) -> None:
    given = vars(options)
    system = make_system(options)
    settings = {name: given[name] for name in DEFAULTS if name in given and name != "system"}
    flow = Flow.parse(options.flow)
    settings["loss"] = find_loss(options.loss)
    settings |= _functions(options)
    policy = make_policy(options, system, options.seed, options.zero_last)
    policy.to(getattr(torch, options.dtype))
    with _processes(options.device) as device:
        settings["device"] = device
        try:
            policy.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"device {options.device!r} cannot be used ({error}); give cpu, cuda or cuda:INDEX"
            ) from error
        config = TrainConfig(system=system, policy=policy, **settings)
        label = type(system).__name__.lower() if ":" in options.system else options.system
        out = options.out or os.path.join("runs", f"{label}_{flow.name.lower()}")
        _report(train(config, out, overwrite=options.overwrite, progress=options.progress))


def _run_resumed(options: argparse.Namespace) -> None:
    with _processes(options.device) as device:
        policy = None
        if options.network is not None:
            policy = own_policy(options.network, build_system(read_config(options.resume)))
        loss = None if options.loss is None else find_loss(options.loss)
        if isinstance(loss, str):
            raise UsageError(f"--loss {loss} is not for --resume, expected module:name of the run's own loss")
        config = resumed_config(
            options.resume,
            epochs=options.epochs,
            device=device,
            policy=policy,
            loss=loss,
            **_functions(options),
        )
        result = train(config, options.resume, resume=True, progress=options.progress)
        _report(result)


def _functions(options: argparse.Namespace) -> dict[str, Any]:
    """The combiner and the inputs, if the options name them."""
    found: dict[str, Any] = {}
    if options.combiner is not None:
        found["combiner"] = find_combiner(options.combiner)
    if options.inputs is not None:
        found["inputs"] = find_function(options.inputs, "inputs")
    return found


@contextlib.contextmanager
def _processes(device: str | None) -> Iterator[str | None]:
    """Joins the other processes if torchrun started this one; returns the device of this process."""
    if not launched():
        yield device
        return
    try:
        yield join(device)
    finally:
        leave()


def _report(result: TrainResult) -> None:
    """Prints the result of a training; of several processes only the first does."""
    if result.path is None:
        return
    log, out = result.log, str(result.path)
    best = int(log["loss_test"].argmin())
    print(
        f"test loss {log['loss_test'][0]:.4g} before training, {log['loss_test'][-1]:.4g} after "
        f"{log['seconds'][-1]:.0f} s; best {log['loss_test'][best]:.4g} in epoch {log['epoch'][best]}"
    )
    print(f"curves: {os.path.join(out, 'curves.png')}")
    print(f"to see it move: warp-sims animate {shlex.quote(out)}")


def _run_animate(options: argparse.Namespace) -> None:
    runs = options.runs
    source: Any = runs[0]
    if len(runs) > 1:
        titles = [os.path.basename(os.path.normpath(run)) for run in runs]
        source = dict(zip(titles if len(set(titles)) == len(runs) else runs, runs, strict=True))
    path = animate(
        source,
        options.out,
        world=options.world,
        horizon=options.horizon,
        checkpoint=options.checkpoint,
        fps=options.fps,
    )
    print(f"animation: {path}")


def _run_demo(options: argparse.Namespace) -> None:
    curves, animation = run_demo(
        options.out,
        flows=options.flows,
        poles=options.poles,
        epochs=options.epochs,
        progress=options.progress,
    )
    print(f"curves:    {curves}")
    print(f"animation: {animation}")


def _run_profile(options: argparse.Namespace) -> None:
    run_profile(options, make_system(options))


def _run_check(options: argparse.Namespace) -> int:
    return run_check(options, make_system(options))


def _run_reproduce(options: argparse.Namespace) -> None:
    need_matplotlib()  # the report comes hours later
    quick = options.quick
    out = options.out or os.path.join("runs", "reproduce_quick" if quick else "reproduce")
    if not options.report_only:
        problems = list(SETTINGS) if options.problem == "all" else [options.problem]
        parts = {"cartpole": "poles", "guidance": "costs", "quantum": "targets"}
        chosen = {part: getattr(options, part) for part in parts.values() if getattr(options, part)}
        for problem, part in parts.items():
            if part in chosen and problem not in problems:
                raise UsageError(f"--{part} is for {problem}, not for {options.problem}")
        clips = options.clips or (["all"] if quick else ["none"])
        jobs = make_jobs(
            problems,
            seeds=_first_given(options.seeds, 1 if quick else SEEDS),
            flows=options.flows,
            clips=CLIPS if "all" in clips else clips,
            **chosen,
        )
        scale = Scale(_first_given(options.epochs, QUICK_EPOCHS if quick else EPOCHS))
        try:
            reproduce(jobs, out, scale=scale, workers=options.jobs, progress=options.progress)
        except KeyboardInterrupt:
            print(
                f"stopped; everything so far is in {out}, the same command goes on where it was. A report "
                f"on what there is: warp-sims reproduce --report-only --out {shlex.quote(out)}",
                file=sys.stderr,
            )
            raise
    print(f"report: {write_report(out)}")


def _first_given(value: int | None, default: int) -> int:
    return default if value is None else value

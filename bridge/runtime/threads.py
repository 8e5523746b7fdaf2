"""Torch's threads where they would hang or be slow: in a forked process, and on busy cores."""

import os
import warnings

import torch

_ASKED_EVERY = 1024
"""Rollouts between two looks at the machine's load."""

_HOME = os.getpid()


class _Watch:
    """What is known of this process; one look a rollout, which costs less than a microsecond."""

    def __init__(self) -> None:
        self.settled = _HOME
        self.calls = 0
        self.warned = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ


_watch = _Watch()


def settle() -> None:
    """Called before each rollout.

    A forked process is left with one thread of torch's: the others did not survive, and the first parallel
    operation would wait for them for ever. Where other programs keep all cores busy and torch's threads wait
    by spinning, which makes an update up to 60 times slower, it says so once.
    """
    if torch.compiler.is_compiling():
        return
    if _watch.settled != os.getpid():
        _settle_fork()
    if not _watch.warned:
        if _watch.calls % _ASKED_EVERY == 0:
            _look_at_load()
        _watch.calls += 1


def _settle_fork() -> None:
    _watch.settled = os.getpid()
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "warp_sims: this process was forked from one that had used torch, whose threads do not survive a "
            "fork; it computes on one thread (start processes with the spawn method for more)",
            RuntimeWarning,
            stacklevel=5,
        )


def others_fill(load: float, cores: int, threads: int) -> bool:
    """Whether programs beside this one, which may have `threads` running, give every core something to do."""
    return threads > 1 and load - threads > cores


def _look_at_load() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if others_fill(load, cores, torch.get_num_threads()):
        _watch.warned = True
        warnings.warn(
            f"warp_sims: the {cores} cores are busy (load {load:.1f}), and torch's threads wait for each "
            "other by spinning, which can make a small rollout tens of times slower; import warp_sims before "
            "torch, or start with OMP_WAIT_POLICY=PASSIVE in the environment",
            RuntimeWarning,
            stacklevel=5,
        )

"""What `warp-sims bench` is asked to measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from ..named import perceptron_options
from ..systems import registry
from .case import FLOWS, PUBLISHED, Case, benched, is_perceptron

BATCHES = (8, 64, 256, 1024, 4096, 16384)
SCALES = {
    "worlds": (64, 256, 1024, 4096, 16384),
    "horizon": (25, 50, 100, 200, 400),
    **dict(filter(all, (benched(name).scaled for name in registry))),
}
"""What scaling varies, and over which values."""


LEAST_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Attributes:
        problems: Names of systems, or `module:Class`.
        flows: Some of R, M, C.
        batches: Numbers of worlds, ascending.
        devices: `cpu`, `cuda` or `cuda:INDEX`.
        widths: Hidden layers of several networks; empty for the published one.
        policies: Kinds of policies, see `Case.kind`; empty for the published one.
        contestants: Names, `name` or `name:plan`; None for all.
        peers: Folder of the peers; None for that of the repository, if there is one.
        rounds: Turns of every contestant, at most.
        block: Seconds per turn, about.
        time_limit: Seconds that one contestant may take in one row, its first updates aside.
        memory: Whether first calls and memory are measured, in fresh processes.
        without: Contestants that are left out where none are named, by name.
        scaling: One of `SCALES`, to vary that, measured in turns instead of row by row; empty for the matrix.
        ensemble: Numbers of networks trained together, measured instead of the matrix; empty for the matrix.
    """

    problems: tuple[str, ...] = PUBLISHED
    flows: tuple[str, ...] = tuple(FLOWS)
    batches: tuple[int, ...] = BATCHES
    devices: tuple[str, ...] = ("cpu",)
    widths: tuple[tuple[int, ...], ...] = ()
    policies: tuple[str, ...] = ()
    contestants: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    peers: Path | None = None
    rounds: int = 9
    block: float = 0.05
    time_limit: float = 8.0
    memory: bool = True
    scaling: str = ""
    ensemble: tuple[int, ...] = ()

    def rounds_for(self, seconds: float) -> int:
        """Rounds of a row whose slowest update takes so long: a turn is an update, and another to warm up."""
        return max(LEAST_ROUNDS, min(self.rounds, int(self.time_limit / 2 / max(seconds, 1e-6))))

    def __post_init__(self) -> None:
        for value in self.flows:
            if value not in FLOWS:
                raise ValueError(f"bench: {value!r} is none of the flows, expected {', '.join(FLOWS)}")
        for problem in self.problems:
            benched(problem)
        for name in ("problems", "flows", "batches", "devices"):
            if not getattr(self, name):
                raise ValueError(f"bench: {name} is empty, expected at least one")
        whole = {
            "batch": self.batches,
            "rounds": (self.rounds,),
            "widths": sum(self.widths, ()),
            "ensemble": self.ensemble,
        }
        for name, values in whole.items():
            if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
                raise ValueError(f"bench: {name} holds {min(values)}, expected whole numbers of at least 1")
        for name in ("block", "time_limit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"bench: {name} is {getattr(self, name)}, expected seconds above 0")
        if self.scaling and self.ensemble:
            raise ValueError("bench: scaling and ensemble are two measurements; give one of them")
        if self.scaling and self.scaling not in SCALES:
            raise ValueError(f"bench: scaling is {self.scaling!r}, expected one of {', '.join(SCALES)}")
        if self.scaling and not self.scaled_problems:
            raise ValueError(f"bench: none of {', '.join(self.problems)} has {self.scaling}")
        for widths in self.widths:
            for problem in filter(_convolutional, self.problems):
                if len(widths) != 2 or widths[0] != widths[1]:
                    raise ValueError(
                        f"bench: widths {'x'.join(map(str, widths))} do not fit {problem}, whose two "
                        "convolutions have one width; give 32x32 for example, or other problems"
                    )
        for kind in self.policies:
            if is_perceptron(kind):
                perceptron_options(kind)
            elif ":" not in kind:
                raise ValueError(
                    f"bench: policy is {kind!r}, expected mlp:elu+layernorm and the like, or module:name"
                )
            if self.ensemble and not is_perceptron(kind):
                raise ValueError(
                    f"bench: policy {kind} in an ensemble, expected mlp:elu+layernorm and the like"
                )
            for problem in filter(_convolutional, self.problems):
                raise ValueError(
                    f"bench: policy {kind} is not for {problem}, whose policy is convolutional; name other "
                    "problems"
                )
        for device in self.devices:
            _check_device(device)

    @property
    def scaled_problems(self) -> tuple[str, ...]:
        """The problems that have what scaling varies."""
        if self.scaling in ("", "horizon", "worlds"):
            return self.problems
        return tuple(p for p in self.problems if benched(p).scaled[0] == self.scaling)

    def cases(self) -> Iterator[Case]:
        """All rows, in the order in which they are measured: rows of one reference follow one another."""
        for device in self.devices:
            for problem in self.scaled_problems:
                for kind, widths in self._networks():
                    for batch in SCALES["worlds"] if self.scaling == "worlds" else self.batches:
                        for value in SCALES[self.scaling] if self.scaling not in ("", "worlds") else (0,):
                            for flow in self.flows:
                                horizon, size = (value, 0) if self.scaling == "horizon" else (0, value)
                                yield Case(problem, flow, batch, device, widths, horizon, size, kind)

    def _networks(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Policies, one after the other, with all widths; a module of the user's has its own."""
        for kind in self.policies or ("",):
            given = not kind or is_perceptron(kind)
            for widths in self.widths if given and self.widths else ((),):
                yield kind, widths


def _convolutional(problem: str) -> bool:
    return Case(problem, "R", 1).convolutional


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only these are measured")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"bench: device {name!r} cannot be used ({reason}); give cpu, cuda or cuda:INDEX"
        ) from error

"""What `check` returns: comparisons, and in each the outputs and inputs that disagree."""

import dataclasses
import json
from typing import Any

__all__ = ["CheckReport", "Comparison", "Disagreement"]

SHOWN = 6
"""Disagreements of one comparison in the table, the largest first."""


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """One output and one input where a comparison failed, at the point where they differ most."""

    output: str
    input: str
    found: float | None
    expected: float | None
    size: float | None
    """The difference as the comparison measures it, beside its `tolerance`; None where there is no number."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One thing compared with another, which should be the same."""

    what: str
    """Function and form: "step_vjp by value"."""
    dtype: str
    against: str
    compared: int
    """Numbers that were compared."""
    left_out: int
    """Numbers that were not: finite differences did not settle, or one-sided ones differ (a kink)."""
    worst: float
    """Largest difference, relative to the largest value of the same output and input over all points."""
    tolerance: float
    disagreements: tuple[Disagreement, ...]
    unchecked: tuple[str, ...] = ()
    """Outputs and inputs of which every number was left out: of these nothing is known."""

    @property
    def agrees(self) -> bool:
        """Whether nothing disagreed."""
        return not self.disagreements


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """The outcome of `check`: print it, or ask `agrees`."""

    system: str
    device: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether every comparison agreed."""
        return all(comparison.agrees for comparison in self.comparisons)

    @property
    def disagreements(self) -> tuple[tuple[Comparison, Disagreement], ...]:
        """All disagreements, each with its comparison."""
        return tuple((c, d) for c in self.comparisons for d in c.disagreements)

    def table(self) -> str:
        """Returns a line for each comparison, and below one that failed a line for each output and input."""
        wide = max(len(c.what) for c in self.comparisons)
        other = max(len(c.against) for c in self.comparisons)
        lines = [f"{self.system} on {self.device}, {self.seconds:.1f} s", ""]
        head = f"{'':9} {'checked':{wide}} {'dtype':8} {'against':{other}} {'numbers':>8} {'left out':>8}"
        lines.append(f"{head} {'worst':>8} {'allowed':>8}")
        for c in self.comparisons:
            verdict = "agrees" if c.agrees else "DISAGREES"
            line = (
                f"{verdict:9} {c.what:{wide}} {c.dtype:8} {c.against:{other}} {c.compared:8} {c.left_out:8}"
            )
            lines.append(f"{line} {c.worst:8.1e} {c.tolerance:8.0e}")
            largest = sorted(c.disagreements, key=lambda d: -(float("inf") if d.size is None else d.size))
            lines += [f"            {_words(d)}" for d in largest[:SHOWN]]
            if len(largest) > SHOWN:
                lines.append(f"            and {len(largest) - SHOWN} more")
            if c.unchecked:
                more = len(c.unchecked) - SHOWN
                lines.append(
                    f"            not checked at any point: {', '.join(c.unchecked[:SHOWN])}"
                    + (f" and {more} more" if more > 0 else "")
                )
        lines += ["", *(f"note: {note}" for note in self.notes)]
        failed = sum(not c.agrees for c in self.comparisons)
        count = len(self.comparisons)
        lines.append(
            f"{failed} of {count} comparisons disagree" if failed else f"all {count} comparisons agree"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Returns everything as JSON; a number that is not finite is null."""
        data = dataclasses.asdict(self) | {"agrees": self.agrees}
        return json.dumps(_finite(data), indent=2, allow_nan=False)


def _words(d: Disagreement) -> str:
    by = f" by {d.input}" if d.input else ""
    if d.found is None or d.expected is None:
        return d.output + by
    return f"{d.output}{by}: {d.found:.9g}, expected {d.expected:.9g}" + (
        "" if d.size is None else f" (off by {d.size:.1e})"
    )


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not abs(data) < float("inf") else data

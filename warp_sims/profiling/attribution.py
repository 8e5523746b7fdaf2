"""Divides wall time among the events that ran. The sum over all names is the wall time, also with several
threads.
"""

from collections.abc import Sequence

from ..bridge.runtime.tracing import Event

__all__ = ["REST", "attribute"]

REST = "(torch, Python)"
"""The time in which nothing was recorded."""


def attribute(events: Sequence[Event], start: int, end: int) -> dict[str, int]:
    """Divides the time from `start` to `end` among the events in it, by name [ns].

    At each moment the innermost event of each thread gets an equal part. A moment without any event is
    `REST`. An event inside another one on its thread has both names, "outer / inner".

    Args:
        events: As `Tracer.events` returns them; those that end outside are cut.
        start, end: Bounds in the clock of the events [ns].
    """
    bounds: list[tuple[int, int, int, int]] = []
    for i, event in enumerate(events):
        first, last = max(event.start, start), min(event.end, end)
        if first < last:
            # where two meet, the ended one leaves first; of two that begin or end together the longer is
            # the outer one
            bounds += [(first, 1, -last, i), (last, 0, -first, i)]
    bounds.sort()
    stacks: dict[int, list[str]] = {}
    found: dict[str, int] = {}
    now = start
    for at, begins, _, i in bounds:
        _divide(found, stacks, at - now)
        now = at
        event = events[i]
        stack = stacks.setdefault(event.thread, [])
        if begins:
            stack.append(f"{stack[-1]} / {event.name}" if stack else event.name)
        else:
            stack.pop()
    _divide(found, stacks, end - now)
    return found


def _divide(found: dict[str, int], stacks: dict[int, list[str]], time: int) -> None:
    if not time:
        return
    names = [stack[-1] for stack in stacks.values() if stack] or [REST]
    for i, name in enumerate(names):
        # whole nanoseconds, none lost
        found[name] = found.get(name, 0) + time * (i + 1) // len(names) - time * i // len(names)

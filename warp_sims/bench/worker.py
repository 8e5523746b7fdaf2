"""A process that measures one contestant's first call and memory: `python -m warp_sims.bench.worker`.

Its argument is a line of JSON with `entrant`, `case` and `plan`, its last line of output one with the
results.
"""

from __future__ import annotations

import json
import sys

import warp as wp

from .case import Case
from .contestants import Entrant
from .timing import first_call_and_memory


def main(text: str) -> None:
    """Does what the line of JSON says."""
    job = json.loads(text)
    wp.config.log_level = wp.LOG_ERROR
    case = Case(**{**job["case"], "widths": tuple(job["case"]["widths"])})
    print(json.dumps(first_call_and_memory(Entrant(**job["entrant"]), case, job["plan"])))


if __name__ == "__main__":
    main(sys.argv[1])

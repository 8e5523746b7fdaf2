"""Memory does not grow with the number of updates; `make memory` looks at 20 000 of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

UPDATES = 1600
MOST = 2.0
"""MB. A weight matrix of 32 times 32 that is kept for each update would take 5; allocators vary by 1."""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory from Linux")
def test_memory_is_flat():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "long_run.py"), str(UPDATES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "MB at the end" in line]
    assert len(lines) == 2
    for line in lines:
        assert float(line.split()[-5]) < MOST, line

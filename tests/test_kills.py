"""Training that is killed and resumed, in processes of their own; `make kills` does it 200 times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 24


@pytest.mark.skipif(os.name != "posix", reason="forks, and sends SIGKILL")
def test_a_training_that_is_killed_loses_nothing():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "kills.py"), str(KILLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{KILLS} trainings ended by SIGKILL" in done.stdout

"""docs/simulators.md: its Python runs as printed, from one file, because Warp reads the source of kernels."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_the_page_runs(tmp_path):
    pytest.importorskip("jax")
    text = (ROOT / "docs" / "simulators.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 6
    program = tmp_path / "page.py"
    program.write_text("\n\n".join(blocks))
    names = runpy.run_path(str(program))
    assert names["system"].nworld == 8
    assert names["mass"].grad is not None
    # from rest at the bottom, one step under a torque of 1
    assert torch.allclose(names["x"], torch.tensor([0.05 * 0.05, 0.05]).expand(8, 2))


def test_links_lead_somewhere():
    page = ROOT / "docs" / "simulators.md"
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / link).is_file(), link

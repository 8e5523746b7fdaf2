"""The README's Python runs as printed, and the examples run."""

import re
import runpy
from pathlib import Path

import warp_sims as ws
from warp_sims.bench.report import BEGIN, END

ROOT = Path(__file__).parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_examples(capsys):
    first, own_simulator, pair = python_blocks()
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    names: dict = {}
    for block in (first, own_simulator, pair):
        exec(block, names)
    printed = capsys.readouterr().out
    assert "states (101, 8, 10), controls (100, 8, 1)" in printed and "cosine of M and R" in printed
    assert all(p.grad is not None for p in names["policy"].parameters())


def test_readme_names_every_flow_and_system():
    text = (ROOT / "README.md").read_text()
    for flow in ws.Flow:
        assert f'`"{flow.name.lower()}"` | {flow.value} |' in text
    for name in ws.systems.registry:
        assert f"warp-sims train {name}" in text


def test_readme_pictures_exist():
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).is_file(), picture


def test_results_are_of_one_run():
    """A page that `warp-sims bench --markdown` writes into has its place for it once."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1


def test_pendulum_example(capsys):
    example = runpy.run_path(str(ROOT / "examples" / "pendulum.py"))
    system = example["Pendulum"]()
    out = ws.rollout(system, ws.MLP(2, (8,), 1), system.initial_states(4), horizon=5, flow="C")
    assert out.loss is not None and 0.0 <= out.loss.item() <= 2.0

"""The repository as a package: names, layers, and what an installation brings."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import warp_sims as ws

ROOT = Path(__file__).parents[1]


def run_python(code, cwd, *, isolated=False):
    """Runs a program in a fresh interpreter, from `cwd`, with this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not isolated:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ((node.level, f"{module}.{alias.name}".strip(".")) for alias in node.names)


def test_rooms_install_under_the_package_and_nowhere_else(tmp_path):
    """From any directory, one name each: `kernels` alone must stay free for other packages."""
    code = (
        "import sys, warp_sims, warp_sims.kernels.systems.cartpole, warp_sims.bridge.autograd.rollout\n"
        "print(warp_sims.kernels.systems.cartpole.__name__, warp_sims.bridge.autograd.rollout.__name__)\n"
        "print('kernels' in sys.modules, 'bridge' in sys.modules)"
    )
    names = ["warp_sims.kernels.systems.cartpole", "warp_sims.bridge.autograd.rollout"]
    assert run_python(code, tmp_path)[-4:] == [*names, "False", "False"]
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bridge" / "__init__.py").exists()


def test_a_bare_import_needs_the_core_dependencies_only(tmp_path):
    """Neither imported nor needed: what the extras bring may be missing altogether."""
    optional = ["matplotlib", "rich", "imageio", "PIL", "tensorboard", "jax", "mujoco"]
    code = (
        f"import sys\nfor name in {optional!r}: sys.modules[name] = None\nimport warp_sims, "
        "warp_sims.cli\nprint(warp_sims.__version__)"
    )
    assert run_python(code, tmp_path)[-1] == ws.__version__


def test_layers_import_downwards_only():
    """kernels, then bridge/runtime, bridge/passes, bridge/autograd, then what users call."""
    order = ["kernels", "bridge/runtime", "bridge/passes", "bridge/autograd"]
    for room in ("kernels", "bridge"):
        for path in sorted((ROOT / room).rglob("*.py")):
            here = path.parent.relative_to(ROOT)
            floor = next(i for i, name in enumerate(order) if here.is_relative_to(name))
            for level, name in imports_of(path):
                assert not name.startswith("warp_sims"), f"{path} reaches upward: {name}"
                assert room == "bridge" or name.split(".")[0] != "torch", f"{path} imports torch"
                if level:
                    base = Path(*here.parts[: len(here.parts) - level + 1])
                    target = base / name.replace(".", "/")
                    allowed = any(target.is_relative_to(lower) for lower in order[: floor + 1])
                    assert allowed, f"{path} reaches upward: {target}"


def test_public_names_are_there():
    for name in ws.__all__:
        assert hasattr(ws, name), name
    for name in ("TrainConfig", "TrainResult", "train", "load_run", "animate"):
        assert name in ws.__all__, name


def test_constraints_hold_the_exact_set():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert "torch==2.13.0" in lines
    for line in lines:
        assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*(; python_version >= "3\.11")?', line), line


def test_core_dependencies_are_three():
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = re.findall(r"^dependencies = \[(.*)\]$", text, flags=re.M)
    assert [
        re.match(r"[a-z-]+", part.strip(' "')).group() for part in line.split(",") if "<" not in part
    ] == [
        "warp-lang",
        "numpy",
        "torch",
    ]


@pytest.mark.slow
def test_wheel_holds_the_three_rooms_and_works_without_the_checkout(tmp_path):
    source = tmp_path / "source"  # a build leaves folders beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("warp_sims", "kernels", "bridge"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    command.append(str(source))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("warp_sims-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for room, inside in (
        ("kernels", "warp_sims/kernels"),
        ("bridge", "warp_sims/bridge"),
        ("warp_sims", "warp_sims"),
    ):
        for path in [*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.h")]:
            assert f"{inside}/{path.relative_to(ROOT / room).as_posix()}" in names, path
    assert {"warp_sims/py.typed", "warp_sims/kernels/policy/forward.h"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"warp_sims", f"warp_sims-{ws.__version__}.dist-info"}
    assert any(name.endswith("/entry_points.txt") for name in names)
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import warp_sims, warp_sims.kernels.systems.cartpole as k\n"
        f"print(warp_sims.__file__.startswith({str(target)!r}), k.__file__.startswith({str(target)!r}))"
    )
    assert run_python(code, tmp_path, isolated=True)[-2:] == ["True", "True"]

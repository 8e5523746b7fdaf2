"""A system that was registered by "Add a system in three files" works in every command."""

from types import MappingProxyType

import pytest
from own_systems import Pendulum, Unicycle

import warp_sims as ws
from warp_sims.cli import main


@pytest.fixture
def registered(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    known = {**ws.systems.registry, "pendulum": Pendulum, "unicycle": Unicycle}
    monkeypatch.setattr(ws.systems, "registry", MappingProxyType(known))


def test_a_registered_system_works_in_every_command(registered, capsys):
    small = [
        "--horizon",
        "4",
        "--no-progress",
        "--hidden",
        "4",
        "--samples",
        "4",
        "--batch",
        "2",
        "--epochs",
        "1",
    ]
    assert main(["train", "pendulum", *small]) == 0
    assert main(["animate", "runs/pendulum_combined"]) == 0
    assert (
        main(["profile", "pendulum", "--batch", "2", "--horizon", "3", "--repeats", "1", "--no-kernels"]) == 0
    )
    assert main(["check", "pendulum", "--parts", "sizes"]) == 0
    bench = [
        "bench",
        "pendulum",
        "--batch",
        "2",
        "--widths",
        "4",
        "--flows",
        "R",
        "--rounds",
        "3",
        "--no-memory",
    ]
    assert main([*bench, "--contestants", "warp-sims"]) == 0
    for command in ("train", "profile", "check", "bench"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "pendulum", "--help"])
    capsys.readouterr()
    for words, expected in (
        (["train", "unicycle"], "Unicycle has no initial states of its own; define initial_states"),
        (["reproduce", "pendulum"], "invalid choice: 'pendulum'"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.strip().splitlines()) == 1


def test_presets_belong_to_the_system(registered, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("warp_sims.cli.train", lambda config, out, **options: seen.append(config) or 1 / 0)
    preset = {"horizon": 17, "loss": "running", "control_cost": 0.25}
    monkeypatch.setattr(Pendulum, "train_defaults", preset)
    with pytest.raises(ZeroDivisionError):
        main(["train", "pendulum"])
    assert {name: getattr(seen[0], name) for name in preset} == preset
    for wrong, words in (({"horizons": 3}, "'horizons'"), ({"policy": "cnn"}, "policy='cnn'")):
        monkeypatch.setattr(Pendulum, "train_defaults", wrong)
        assert main(["train", "pendulum"]) == 2
        assert f"train_defaults has {words}, expected" in capsys.readouterr().err

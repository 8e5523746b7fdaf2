"""Training: the published update rule, the log, the run folder, and what is refused."""

import copy
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import warp_sims as ws
from warp_sims.training.optimizers import KerasAdam
from warp_sims.training.runs import RunFolder

GOLDEN = Path(__file__).parent / "golden"
HEADER = "epoch,loss_batch,loss_train,loss_test,grad_norm,cosine,agreement,seconds,nonfinite,zeros"
SYSTEM = ws.CartPole(poles=1)


def small_policy(seed=0, zero_last=False):
    policy = ws.MLP(SYSTEM.state_size, (8,), SYSTEM.control_size)
    policy.reset_parameters(seed=seed, zero_last=zero_last)
    return policy


def small_config(policy=None, **settings):
    settings = {"horizon": 5, "samples": 8, "batch": 4, "epochs": 2, "flow": "modified"} | settings
    return ws.TrainConfig(system=SYSTEM, policy=policy or small_policy(), **settings)


def weights_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()


def gradient(policy, flow, **settings):
    """The gradient of the first batch, as training should see it."""
    x0 = SYSTEM.initial_states(8, seed=42, split="train")[:4]
    policy = copy.deepcopy(policy)
    ws.rollout(SYSTEM, policy, x0, horizon=5, flow=flow, loss="final", **settings).loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


# The update rule


def test_adam_takes_the_steps_of_keras():
    """Against Keras's formula in float64, with gradients down to the size of epsilon."""
    generator = np.random.default_rng(0)
    gradients = generator.standard_normal((30, 40)) * 10.0 ** generator.uniform(-9, 0, 40)
    parameter = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = KerasAdam([parameter], lr=1e-3)
    expected, m, v = np.zeros(40), np.zeros(40), np.zeros(40)
    for t, g in enumerate(gradients, start=1):
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        expected -= 1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7)
        # rounding alone: 30 steps of double precision
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-15)


def test_adam_finds_its_rate_in_the_precision_of_the_parameters():
    """In the golden runs the first step of a large gradient falls short of the rate by 6.7e-6, as in
    Keras's float32 arithmetic.
    """
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 100.0)
        KerasAdam([parameter], lr=1e-3).step()
    short = [1 + parameter.item() / 1e-3 for parameter in parameters]
    assert short == pytest.approx([6.67e-6, 1e-7 / math.sqrt(1e-3) / 100], rel=0.05)


def test_adam_continues_from_its_state_dict():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = KerasAdam([first], lr=0.1)
    for _ in range(3):
        first.grad = torch.full((3,), 1e-6)
        optimizer.step()
    second.data.copy_(first.data)
    restored = KerasAdam([second], lr=0.1)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, o in ((first, optimizer), (second, restored)):
        parameter.grad = torch.full((3,), -2e-6)
        o.step()
    assert torch.equal(first, second)


def test_first_updates_follow_the_published_program():
    """Two epochs of flow M with 4 poles from the published weights and data: 64 updates, unshuffled."""
    reference = np.load(GOLDEN / "first_updates_cartpole_NC4_P_NONE.npz")
    initial = np.load(GOLDEN / "init_weights_tf29_cartpole_NC4.npz")
    system = ws.CartPole(poles=4)
    policy = ws.MLP(system.state_size, (100, 100), 1)
    start = [initial[f"w{i}"] for i in range(6)]
    with torch.no_grad():
        for parameter, w in zip(policy.parameters(), start):
            parameter.copy_(torch.from_numpy(w.T.copy()))
    config = ws.TrainConfig(system=system, policy=policy, flow="modified", epochs=2)
    log = ws.train(config, progress=False).log
    losses = np.array([reference[f"update{i}"][0] for i in range(64)])
    np.testing.assert_allclose(log["loss_batch"][1:], losses.reshape(2, 32).mean(axis=1), rtol=1e-6)
    for i, (parameter, w) in enumerate(zip(policy.parameters(), start)):
        after = reference[f"w{i}_after64"].T
        error = np.linalg.norm(parameter.detach().numpy() - after)
        # float32 against another program's float32, over 64 steps: a share of the way that the weights went
        assert error <= 2e-5 * np.linalg.norm(after - w.T), f"w{i}"


@pytest.mark.parametrize(
    ("name", "settings", "own"),
    [
        ("sgd", {}, lambda p: torch.optim.SGD(p, lr=0.1)),
        ("sgd", {"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ("adagrad", {}, lambda p: torch.optim.Adagrad(p, lr=0.1)),
        ("adadelta", {}, lambda p: torch.optim.Adadelta(p, lr=0.1)),
        ("rmsprop", {}, lambda p: torch.optim.RMSprop(p, lr=0.1)),
    ],
)
def test_other_optimizers_are_those_of_torch(name, settings, own):
    policy, other = small_policy(), small_policy()
    # one batch an epoch, so that two epochs are two updates: momentum shows in the second
    ws.train(
        small_config(policy, optimizer=name, lr=0.1, samples=4, epochs=2, flow="regular", **settings),
        progress=False,
    )
    optimizer = own(other.parameters())
    x0 = SYSTEM.initial_states(4, seed=42, split="train")
    for _ in range(2):
        optimizer.zero_grad()
        ws.rollout(SYSTEM, other, x0, horizon=5, flow="regular", loss="final").loss.backward()
        optimizer.step()
    assert torch.equal(weights_of(policy), weights_of(other))


@pytest.mark.parametrize("flow", ["regular", "modified", "network", "stopped", "combined"])
@pytest.mark.parametrize("clip", ["none", "value", "norm"])
def test_one_update_is_the_clipped_gradient(flow, clip):
    policy = small_policy(seed=3)
    before, expected = weights_of(policy), gradient(policy, flow)
    norm = expected.norm()
    bound = float(expected.abs().median()) if clip == "value" else float(norm) / 3
    config = small_config(
        policy, flow=flow, optimizer="sgd", lr=1.0, clip=clip, clip_at=bound, samples=4, epochs=1
    )
    # the seeded draw of 4 states begins like that of 8, so it is the same batch
    log = ws.train(config, progress=False).log
    if clip == "value":
        expected = expected.clamp(-bound, bound)
    elif clip == "norm":
        expected = expected * (bound / norm)
    # float32 weights of size 1, from which a gradient is subtracted
    torch.testing.assert_close(before - weights_of(policy), expected, rtol=1e-4, atol=3e-7)
    assert log["grad_norm"][1] == pytest.approx(float(norm), rel=1e-5), "the norm is that before clipping"


def test_settings_reach_the_rollout():
    """Window, decay, control cost, loss and a schedule of flows: one update is the gradient under them."""
    x0 = SYSTEM.initial_states(4, seed=42, split="train")
    for settings in (
        {"flow": "regular", "window": 2, "decay": 0.5, "control_cost": 0.3, "loss": "running"},
        {"flow": ["M", "R", "S", "N", "M"], "loss": "running"},
        {"flow": "regular", "loss": "running", "decay": ws.PerSecond(1e-3), "clip_cotangent": 0.05},
        {"flow": "modified", "loss": lambda states, controls: states[-1].square().mean()},
    ):
        policy = small_policy(seed=5)
        other = copy.deepcopy(policy)
        ws.train(
            small_config(policy, optimizer="sgd", lr=1.0, samples=4, epochs=1, **settings), progress=False
        )
        ws.rollout(SYSTEM, other, x0, horizon=5, **{"loss": "final"} | settings).loss.backward()
        moved = torch.cat(
            [(b - a).detach().flatten() for a, b in zip(policy.parameters(), other.parameters())]
        )
        torch.testing.assert_close(
            moved, torch.cat([p.grad.flatten() for p in other.parameters()]), rtol=1e-4, atol=3e-7
        )


# The log and the folder


def test_log_says_what_happened(tmp_path):
    policy = small_policy(zero_last=True)
    result = ws.train(small_config(policy, flow="combined"), tmp_path / "run", progress=False)
    assert result.policy is policy
    assert result.path == tmp_path / "run"
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert lines[0] == HEADER
    assert [line.split(",")[0] for line in lines[1:]] == ["-1", "0", "1"]
    first = dict(zip(HEADER.split(","), lines[1].split(",")))
    assert [name for name, field in first.items() if field == ""] == [
        "loss_batch",
        "grad_norm",
        "cosine",
        "agreement",
        "nonfinite",
        "zeros",
    ]

    x_test = SYSTEM.initial_states(8, seed=42, split="test")
    loss = float(ws.rollout(SYSTEM, policy, x_test, horizon=5, flow="regular", loss="final").loss.detach())
    assert float(lines[-1].split(",")[3]) == pytest.approx(loss, rel=1e-6)
    log = result.log
    assert log["epoch"].tolist() == [-1, 0, 1]
    assert np.all(np.diff(log["seconds"]) > 0)
    assert np.all(np.abs(log["cosine"][1:]) <= 1 + 1e-6)
    assert np.all((log["agreement"][1:] > 0) & (log["agreement"][1:] <= 1))
    assert sorted(os.listdir(tmp_path / "run")) == [
        "checkpoint_best.pt",
        "checkpoint_first.pt",
        "checkpoint_last.pt",
        "config.json",
        "curves.png",
        "log.csv",
    ]


def test_only_combined_has_a_cosine():
    log = ws.train(small_config(), progress=False).log
    assert np.isnan(log["cosine"]).all()
    assert np.isnan(log["agreement"]).all()


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ws.train(small_config(), progress=False).path is None
    assert list(tmp_path.iterdir()) == []


def test_rows_may_stand_epochs_apart():
    every, second = (ws.train(small_config(epochs=5, log_every=n), progress=False).log for n in (1, 2))
    assert second["epoch"].tolist() == [-1, 1, 3, 4]
    assert second["loss_test"][1:].tolist() == every["loss_test"][[2, 4, 5]].tolist()
    assert second["loss_batch"][1] == pytest.approx(every["loss_batch"][1:3].mean())
    assert second["grad_norm"][1] == pytest.approx(math.sqrt(np.square(every["grad_norm"][1:3]).mean()))


def test_a_run_can_be_loaded(tmp_path):
    policy = small_policy()
    at_first = weights_of(policy)
    config = small_config(policy, flow="combined", epochs=3, optimizer="sgd", momentum=0.9, lr=0.01, window=2)
    result = ws.train(config, tmp_path / "run", progress=False)
    loaded, again, log = ws.load_run(tmp_path / "run")
    assert loaded.system == SYSTEM
    assert loaded.settings() == config.settings()
    assert loaded.policy is again
    assert torch.equal(weights_of(again), weights_of(policy))
    assert torch.equal(weights_of(ws.load_run(tmp_path / "run", checkpoint="first")[1]), at_first)
    np.testing.assert_allclose(log["loss_test"], result.log["loss_test"], rtol=1e-8)
    # a run continues from what was loaded
    more = ws.train(loaded, progress=False)
    assert more.log["loss_test"][0] == pytest.approx(result.log["loss_test"][-1], rel=1e-6)


def test_best_is_the_lowest_test_loss(tmp_path):
    # A rate at which the loss soon rises again.
    config = small_config(flow="regular", optimizer="sgd", lr=30.0, epochs=6, horizon=20, loss="running")
    log = ws.train(config, tmp_path / "run", progress=False).log
    best = int(log["loss_test"].argmin())
    assert best < len(log["epoch"]) - 1, "the case is to have its best epoch before its last"
    checkpoint = torch.load(tmp_path / "run" / "checkpoint_best.pt", weights_only=True)
    assert checkpoint["epoch"] == log["epoch"][best]
    policy = ws.load_run(tmp_path / "run", checkpoint="best")[1]
    x_test = SYSTEM.initial_states(8, seed=42, split="test")
    loss = float(ws.rollout(SYSTEM, policy, x_test, horizon=20, flow="regular", loss="running").loss.detach())
    assert loss == pytest.approx(log["loss_test"][best], rel=1e-6)


def test_checkpoints_are_plain_weights_and_optimizer_state(tmp_path):
    policy = small_policy()
    ws.train(small_config(policy), tmp_path / "run", progress=False)
    checkpoint = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    assert set(checkpoint) == {"epoch", "policy", "optimizer"}
    assert checkpoint["epoch"] == 1
    small_policy(seed=9).load_state_dict(checkpoint["policy"])
    optimizer = KerasAdam(small_policy().parameters())
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert optimizer.param_groups[0]["updates"] == 4


class OwnPolicy(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(SYSTEM.state_size, width), torch.nn.Linear(width, 1)
        )

    def forward(self, x):
        return self.layers(x)


def test_a_policy_that_config_cannot_describe_is_handed_over(tmp_path):
    policy = OwnPolicy(3)
    ws.train(small_config(policy), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="policy=") as error:
        ws.load_run(tmp_path / "run")
    assert "constructor arguments" in str(error.value)
    again = ws.load_run(tmp_path / "run", policy=OwnPolicy(3))[1]
    assert torch.equal(weights_of(again), weights_of(policy))
    with pytest.raises(ValueError, match="do not fit"):
        ws.load_run(tmp_path / "run", policy=OwnPolicy(4))


def test_config_says_versions_and_settings(tmp_path):
    ws.train(small_config(loss=_own_loss), tmp_path / "run", progress=False)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__
    assert set(config["versions"]) == {"python", "warp-sims", "torch", "warp-lang", "numpy"}
    assert config["system"]["class"] == "cartpole"
    assert config["system"]["fields"]["poles"] == 1
    assert config["policy"]["arguments"] == {"in_size": 4, "hidden": [8], "out_size": 1}
    assert config["training"]["loss"] == {"callable": f"{__name__}:_own_loss"}


def _own_loss(states, controls):
    return states[-1].square().mean()


def test_a_log_that_a_killed_process_left_is_read(tmp_path):
    ws.train(small_config(epochs=3), tmp_path / "run", progress=False)
    log = tmp_path / "run" / "log.csv"
    log.write_text(log.read_text()[:-9])
    assert ws.load_run(tmp_path / "run")[2]["epoch"].tolist() == [-1, 0, 1]


def test_tensorboard_on_request_only(tmp_path):
    pytest.importorskip("tensorboard")
    ws.train(small_config(tensorboard=True), tmp_path / "run", progress=False)
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
    ws.train(small_config(), tmp_path / "run", overwrite=True, progress=False)
    assert list((tmp_path / "run").glob("events.out.tfevents.*")) == []
    with pytest.raises(ValueError, match="out="):
        ws.train(small_config(tensorboard=True), progress=False)


# What goes wrong


def test_an_existing_run_is_left_alone(tmp_path):
    ws.train(small_config(), tmp_path / "run", progress=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ws.train(small_config(), tmp_path / "run", progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_overwrite_takes_the_place_of_a_run_only(tmp_path):
    ws.train(small_config(epochs=3), tmp_path / "run", progress=False)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    ws.train(small_config(epochs=1), tmp_path / "run", overwrite=True, progress=False)
    assert ws.load_run(tmp_path / "run")[2]["epoch"].tolist() == [-1, 0]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"format": "something else"}')
    with pytest.raises(FileExistsError, match="no run"):
        ws.train(small_config(), other, overwrite=True, progress=False)
    assert (other / "config.json").read_text() == '{"format": "something else"}'


def test_a_failed_start_destroys_nothing(tmp_path):
    ws.train(small_config(), tmp_path / "run", progress=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    wrong = ws.MLP(SYSTEM.state_size, (8,), 2)
    for out, overwrite in ((tmp_path / "run", True), (tmp_path / "new" / "deeper", False)):
        with pytest.raises(ValueError):
            ws.train(small_config(wrong), out, overwrite=overwrite, progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert not (tmp_path / "new").exists(), "folders made for the run are gone again"


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("warp_sims.training.updates.rollout", lambda *a, **k: pytest.fail("training began"))
    with pytest.raises(OSError, match="cannot be written"):
        ws.train(small_config(), tmp_path / "file" / "run", progress=False)
    with pytest.raises(FileExistsError, match="no folder"):
        ws.train(small_config(), tmp_path / "file", overwrite=True, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    policy = small_policy()
    calls = []

    def loss(states, controls):
        calls.append(0)
        # before training: 2 evaluations and a gradient; epoch 0: 2 updates and 2 evaluations; the second
        # update of epoch 1
        scale = math.inf if len(calls) == 9 else 1.0
        return states[-1].square().mean() * scale

    config = small_config(policy, epochs=5, loss=loss, flow="regular")
    with pytest.raises(FloatingPointError, match=r"epoch 1, update 1 of 2.*inf.*smaller lr") as error:
        ws.train(config, tmp_path / "run", progress=False)
    assert str(tmp_path / "run") in str(error.value)
    _, kept, log = ws.load_run(tmp_path / "run", loss=loss)
    assert log["epoch"].tolist() == [-1, 0]
    assert torch.isfinite(weights_of(kept)).all()
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0


def test_an_interruption_leaves_the_last_finished_epoch(tmp_path, capsys):
    policy = small_policy()
    calls = []

    def loss(states, controls):
        calls.append(0)
        if len(calls) == 13:  # the second update of epoch 2: see above
            raise KeyboardInterrupt
        return states[-1].square().mean()

    config = small_config(policy, epochs=5, loss=loss, flow="regular", checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        ws.train(config, tmp_path / "run", progress=False)
    assert f"after epoch 1; the run so far is in {tmp_path / 'run'}" in capsys.readouterr().err
    _, kept, log = ws.load_run(tmp_path / "run", loss=loss)
    assert log["epoch"].tolist() == [-1, 0, 1]
    x_test = SYSTEM.initial_states(8, seed=42, split="test")
    value = float(ws.rollout(SYSTEM, kept, x_test, horizon=5, flow="regular", loss=loss).loss.detach())
    assert value == pytest.approx(log["loss_test"][-1], rel=1e-6)
    assert not torch.equal(weights_of(kept), weights_of(policy)), "epoch 2 had begun"


def test_an_interruption_between_epochs(tmp_path, monkeypatch):
    """Ctrl-C while a row is being written: log and checkpoint have the same epoch, nothing is half done."""
    append = RunFolder.append

    def interrupted(self, row):
        if row["epoch"] == 1:
            signal.raise_signal(signal.SIGINT)
        append(self, row)

    monkeypatch.setattr(RunFolder, "append", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ws.train(small_config(epochs=5, checkpoint_every=100), tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert ws.load_run(tmp_path / "run")[2]["epoch"].tolist() == [-1, 0, 1]
    assert torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)["epoch"] == 1


def test_without_matplotlib_and_rich_the_run_is_kept(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "rich", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match=r"warp-sims\[cli\]"):
        ws.train(small_config(), tmp_path / "run", progress=True)
    assert ws.load_run(tmp_path / "run")[2]["epoch"].tolist() == [-1, 0, 1]
    assert not (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"horizon": 0}, ValueError, ("horizon=0", "at least 1")),
        ({"horizon": 2.5}, TypeError, ("horizon=2.5", "whole number")),
        ({"samples": True}, TypeError, ("samples=True", "whole number")),
        ({"batch": 9}, ValueError, ("batch=9", "samples=8")),
        ({"epochs": -1}, ValueError, ("epochs=-1",)),
        ({"seed": -1}, ValueError, ("seed=-1",)),
        ({"lr": 0.0}, ValueError, ("lr=0", "above 0")),
        ({"lr": math.nan}, ValueError, ("lr=nan", "finite")),
        ({"lr": "fast"}, TypeError, ("'fast'",)),
        ({"control_cost": -0.1}, ValueError, ("control_cost=-0.1", "at least 0")),
        ({"clip_cotangent": 0.0}, ValueError, ("TrainConfig: clip_cotangent is 0.0", "above 0")),
        ({"clip_cotangent": True}, TypeError, ("TrainConfig: clip_cotangent is True", "above 0")),
        ({"clip": "both"}, ValueError, ("'both'", "'norm'")),
        ({"clip_at": 0}, ValueError, ("clip_at=0",)),
        ({"optimizer": "lion"}, ValueError, ("'lion'", "'adagrad'")),
        ({"momentum": 0.9}, ValueError, ("momentum=0.9", "optimizer='sgd'")),
        ({"loss": "mean"}, ValueError, ("'mean'", "'running'", "callable")),
        ({"loss": None}, TypeError, ("None", "'running'")),
        ({"decay": 1.5}, ValueError, ("1.5", "[0, 1]")),
        ({"window": 0}, ValueError, ("0", "at least 1")),
        ({"flow": "X"}, ValueError, ("'X'", "combined")),
        ({"flow": ["M"] * 4}, ValueError, ("4", "horizon=5")),
        ({"flow": ["M"] * 4 + ["C"]}, ValueError, ("combined",)),
        ({"dtype": "float64"}, ValueError, ("float32", "float64", "policy.double()")),
        ({"dtype": "float16"}, ValueError, ("'float16'",)),
        ({"device": "meta"}, ValueError, ("'meta'", "'cpu'", "policy.to")),
        ({"tensorboard": "yes"}, TypeError, ("'yes'",)),
    ],
)
def test_wrong_settings_are_named(settings, kind, words):
    with pytest.raises(kind) as error:
        small_config(**settings)
    for word in words:
        assert word in str(error.value)


def test_wrong_system_and_policy_are_named():
    with pytest.raises(TypeError, match=r"expected a ws\.System"):
        ws.TrainConfig(system="cartpole", policy=small_policy())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        ws.TrainConfig(system=SYSTEM, policy=torch.tanh)
    with pytest.raises(ValueError, match="no parameter"):
        ws.TrainConfig(system=SYSTEM, policy=torch.nn.Tanh())
    with pytest.raises(TypeError, match=r"expected a ws\.TrainConfig"):
        ws.train({"epochs": 3})


def test_double_precision(tmp_path):
    policy = small_policy().double()
    config = small_config(policy, flow="combined")
    assert config.dtype == "float64"
    ws.train(config, tmp_path / "run", progress=False)
    assert ws.load_run(tmp_path / "run")[1][0].weight.dtype == torch.float64

"""Runs trained together: each writes what it would write alone, whatever becomes of the others."""

import copy
import math

import numpy as np
import pytest
import torch

import warp_sims as ws
from warp_sims.training.config import CLIPS
from warp_sims.training.runs import read_checkpoint, read_log
from warp_sims.training.together import TrainingTogether
from warp_sims.training.train import TrainingRun
from warp_sims.training.updates import Updates

SYSTEM = ws.CartPole(poles=1)
BOX = ws.QuantumControl(points=8)
HERD = ws.GuidanceByRepulsion(drivers=1, evaders=2)


def make_policy(system, seed, dtype=torch.float32):
    # 13 units: torch's vectors have tails, which lie elsewhere when members are stacked
    policy = ws.WaveCNN(8, 5) if system is BOX else ws.MLP(system.state_size, (13,), system.control_size)
    policy.reset_parameters(seed=seed)
    return policy.to(dtype)


def make_configs(count=3, system=SYSTEM, dtype=torch.float32, **settings):
    settings = {"horizon": 6, "samples": 10, "batch": 4, "epochs": 4, "lr": 0.05} | settings
    policies = [make_policy(system, seed, dtype) for seed in range(count)]
    return [ws.TrainConfig(system=system, policy=policy, **settings) for policy in policies]


def folders(path, count=3):
    return [path / f"seed{k}" for k in range(count)]


def together(path, **settings):
    configs = make_configs(**settings)
    return ws.train_together(configs, folders(path, len(configs)), progress=False)


def alone(path, **settings):
    configs = make_configs(**settings)
    return [ws.train(c, out, progress=False) for c, out in zip(configs, folders(path, len(configs)))]


def assert_same(a, b, where=""):
    """Nested contents of a checkpoint, to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype, where
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}")
        assert a.untyped_storage().nbytes() == a.numel() * a.itemsize, f"{where} drags others along"
    else:
        assert a == b, where


def assert_same_log(a, b):
    assert a.keys() == b.keys()
    for name, values in a.items():
        if name == "cosine":
            # sums of products whose order follows the number of members
            np.testing.assert_allclose(values, b[name], rtol=1e-5)
        elif name != "seconds":
            np.testing.assert_array_equal(values, b[name], err_msg=name)


def files_of(folder):
    """What there is of a run that was stopped in between, too."""
    return sorted(p.name for p in folder.iterdir() if p.name != "checkpoint_previous.pt")


def assert_same_folder(a, b):
    assert files_of(a) == files_of(b)
    assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()
    assert_same_log(read_log(a), read_log(b))
    for name in ("first", "last", "best"):
        x, y = read_checkpoint(a, name), read_checkpoint(b, name)
        for checkpoint in (x, y):  # of epochs that no row has yet; they hold the cosine
            records = checkpoint.pop("records", [])
            assert all(r.untyped_storage().nbytes() == r.numel() * r.itemsize for r in records)
            checkpoint["records"] = [torch.stack([r[0], r[1], r[3]]) for r in records]
        assert_same(x, y, name)


def assert_as_alone(tmp_path, **settings):
    found = together(tmp_path / "together", **settings)
    expected = alone(tmp_path / "alone", **settings)
    for a, b, x, y in zip(found, expected, folders(tmp_path / "together"), folders(tmp_path / "alone")):
        assert_same(a.policy.state_dict(), b.policy.state_dict(), "policy")
        assert_same_log(a.log, b.log)
        assert a.path == x and a.diverged is None
        assert_same_folder(x, y)
    return found


# As alone


@pytest.mark.parametrize("flow", ["regular", "combined"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adagrad", "adadelta", "rmsprop"])
def test_updates_as_alone(optimizer, clip, flow):
    settings = {"optimizer": optimizer, "clip": clip, "clip_at": 1e-3, "flow": flow, "epochs": 2}
    settings["momentum"] = 0.9 if optimizer == "sgd" else 0.0
    found = ws.train_together(make_configs(**settings), progress=False)
    for result, config in zip(found, make_configs(**settings)):
        expected = ws.train(config, progress=False)
        assert_same(result.policy.state_dict(), expected.policy.state_dict(), "policy")
        assert_same_log(result.log, expected.log)
        # the bound acts
        assert clip == "none" or result.log["grad_norm"][1:].max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"flow": "modified", "dtype": torch.float64, "control_cost": 0.1, "loss": "running"},
        {"flow": "combined", "system": HERD, "loss": "running", "window": 3},
        {"flow": "combined", "system": BOX, "loss": "running", "count": 2},
        {"flow": ["R", "M", "N", "S", "R", "M"], "decay": 0.9},
        {"flow": "combined", "decay": ws.PerSecond(0.1), "clip_cotangent": 0.05},
        # rows three epochs apart, checkpoints two; steps that overshoot: the best epoch is not the last
        {"flow": "regular", "log_every": 3, "checkpoint_every": 2, "epochs": 5, "lr": 0.5},
    ],
    ids=["double", "herd", "box", "schedule", "clipped", "rows"],
)
def test_folders_as_alone(settings, tmp_path):
    assert_as_alone(tmp_path, **settings)


@pytest.mark.parametrize("count", [1, 2])
def test_published_sizes_as_alone(count, threads):
    """Tensors that torch shares among threads: stacked, elsewhere than alone."""
    threads(count)
    policies = [ws.MLP(4, (100, 100), 1) for _ in range(4)]
    configs = [
        [ws.TrainConfig(SYSTEM, copy.deepcopy(p), horizon=5, samples=16, epochs=2) for p in policies]
        for _ in range(2)
    ]
    found = ws.train_together(configs[0], progress=False)
    for result, config in zip(found, configs[1]):
        expected = ws.train(config, progress=False)
        assert_same(result.policy.state_dict(), expected.policy.state_dict())


def test_losses_of_all_members_at_once():
    """As devices other than the CPU evaluate them."""
    configs = make_configs(flow="modified", system=HERD, loss="running")
    found = Updates(configs[0], ws.Ensemble([config.policy for config in configs])).evaluate()
    assert found == [Updates(config, config.policy).evaluate() for config in configs]
    run = TrainingRun(configs[0])
    with run:
        run.end_epoch(torch.ones_like(run.updates.new_record()), [3.0, 2.0])
    assert (run.result().log["loss_train"][-1], run.test_loss) == (3.0, 2.0)


def test_one_run_needs_no_ensemble():
    """Any policy trains alone, and through the same call."""
    nets = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.SiLU(), torch.nn.Linear(3, 1))]
    nets.append(copy.deepcopy(nets[0]))
    first, second = (ws.TrainConfig(SYSTEM, net, horizon=5, samples=8, epochs=2) for net in nets)
    (result,) = ws.train_together([first], progress=False)
    assert_same_log(result.log, ws.train(second, progress=False).log)


# A run that diverges


@pytest.mark.parametrize(
    "steps, bias, reason",
    [
        ({"lr": 0.05, "control_cost": 1e-3}, 1e6, "gradient in epoch 0, update 0 of 3, is nan"),
        # steps that overshoot: in the end all diverge, one of them earlier
        ({"lr": 1.2, "control_cost": 1.0}, 5e2, "gradient in epoch 1, update 0 of 3, is inf"),
        ({"lr": 1.2, "control_cost": 1.0}, 1e4, "train loss after epoch 0 is nan"),
    ],
)
def test_a_diverged_run_harms_no_other(steps, bias, reason, tmp_path):
    def configs():
        made = make_configs(flow="modified", optimizer="sgd", **steps)
        with torch.no_grad():
            made[1].policy[-1].bias.fill_(bias)  # a force of this size
        return made

    found = ws.train_together(configs(), folders(tmp_path / "together"), progress=False)
    expected = []
    for k, config in enumerate(configs()):
        out = tmp_path / "alone" / f"seed{k}"
        try:
            expected.append(ws.train(config, out, progress=False))
        except FloatingPointError as error:
            expected.append(error)
    assert reason in str(found[1].diverged)
    assert len(found[1].log["epoch"]) < len(found[0].log["epoch"])
    for a, b in zip(found, expected):
        if isinstance(b, FloatingPointError):
            assert str(a.diverged).replace("together", "alone") == str(b)
        else:
            assert a.diverged is None
            assert_same(a.policy.state_dict(), b.policy.state_dict())
    for a, b in zip(folders(tmp_path / "together"), folders(tmp_path / "alone")):
        assert_same_folder(a, b)


def test_a_loss_that_raises_for_one_run(tmp_path):
    """An error that follows from a loss that was not finite ends that run; the others repeat the epoch."""
    configs = make_configs(flow="modified")
    with TrainingTogether(configs, folders(tmp_path / "together")) as together:
        together.run_epoch()
        group = together._group
        assert group is not None
        original, count = group._updates.step, [0]

        def update(x0, record):
            original(x0, record)
            count[0] += 1
            if count[0] == 2:
                record[1, 0] = math.nan
                raise ArithmeticError("it shows one update later")

        group._updates.step = update
        together.run_epoch()
        assert [run.epoch for run in together.runs] == [0, 0, 0]
        assert [run.diverged is None for run in together.runs] == [True, False, True]
        assert isinstance(together.runs[1].diverged.__cause__, ArithmeticError)
        while together.active:
            together.run_epoch()
    expected = alone(tmp_path / "alone", flow="modified")
    for k in (0, 2):
        assert_same(together.runs[k].config.policy.state_dict(), expected[k].policy.state_dict())
    assert read_log(tmp_path / "together" / "seed1")["epoch"].tolist() == [-1, 0]


def test_an_error_of_no_single_run_is_raised(tmp_path):
    calls = []

    def loss(states, controls):
        calls.append(0)
        if len(calls) == 20:
            raise ArithmeticError("mine")
        return states[-1].square().mean()

    with pytest.raises(ArithmeticError, match="mine"):
        ws.train_together(make_configs(flow="modified", loss=loss), folders(tmp_path), progress=False)
    for out in folders(tmp_path):
        assert read_checkpoint(out)["epoch"] == read_log(out)["epoch"][-1]


# Stopping and going on


@pytest.mark.parametrize("flow", ["combined", "regular"])
def test_runs_at_different_epochs_come_together(tmp_path, flow):
    """One was stopped after three epochs, one after one, one has not begun, one is finished."""
    settings = {"flow": flow, "count": 4, "epochs": 5, "checkpoint_every": 1, "log_every": 2}
    for config, out, epochs in zip(make_configs(**settings), folders(tmp_path, 4), (3, 1, 0, 5)):
        if epochs:
            with TrainingRun(config, out) as run:
                for _ in range(epochs):
                    run.run_epoch()
    finished = {p: p.read_bytes() for p in folders(tmp_path, 4)[3].iterdir() if p.suffix in (".csv", ".json")}
    sizes = []
    with TrainingTogether(make_configs(**settings), folders(tmp_path, 4), resume=True) as together:
        while together.active:
            sizes.append(len(together.run_epoch()))
    assert sizes == [1, 2, 2, 3, 3]
    assert {p: p.read_bytes() for p in finished} == finished
    alone(tmp_path / "alone", **settings)
    for a, b in zip(folders(tmp_path, 4), folders(tmp_path / "alone", 4)):
        assert_same_folder(a, b)


def test_an_interruption_leaves_usable_folders(tmp_path, capsys):
    calls = []

    def loss(states, controls):
        calls.append(0)
        # before training each run takes 3; an epoch is 3 updates of 3 runs, then 2 evaluations of each: this
        # is in the evaluation of the second run after epoch 1
        if len(calls) == 3 * 3 + (9 + 6) + 9 + 3:
            raise KeyboardInterrupt
        return states[-1].square().mean()

    settings = {"flow": "modified", "loss": loss, "checkpoint_every": 100}
    with pytest.raises(KeyboardInterrupt):
        together(tmp_path / "together", **settings)
    said = capsys.readouterr().err
    assert f"after epoch 1; the run so far is in {tmp_path / 'together' / 'seed0'}" in said
    assert f"after epoch 0; the run so far is in {tmp_path / 'together' / 'seed1'}" in said
    assert [read_checkpoint(out)["epoch"] for out in folders(tmp_path / "together")] == [1, 0, 0]
    calls.append(0)
    again = make_configs(**settings)
    ws.train_together(again, folders(tmp_path / "together"), resume=True, progress=False)
    alone(tmp_path / "alone", **settings)
    for a, b in zip(folders(tmp_path / "together"), folders(tmp_path / "alone")):
        assert_same_folder(a, b)


def test_a_run_that_ends_is_written_at_once(tmp_path):
    """Before the others end: whoever stops the process then loses nothing that is finished."""
    settings = {"flow": "modified", "count": 2, "checkpoint_every": 100}
    configs = make_configs(**settings)
    with TrainingRun(configs[0], folders(tmp_path)[0]) as run:
        for _ in range(2):
            run.run_epoch()
    with TrainingTogether(make_configs(**settings), folders(tmp_path, 2), resume=True) as both:
        both.runs[1].diverged = FloatingPointError("as if")
        while both.active:
            both.run_epoch()
        assert read_checkpoint(folders(tmp_path)[0])["epoch"] == 3
        assert (folders(tmp_path)[0] / "curves.png").is_file()


# What is refused


def test_what_differs_is_named(tmp_path):
    base = make_configs(2, flow="modified")
    different = {
        "flow": "regular",
        "lr": 0.1,
        "epochs": 5,
        "seed": 3,
        "clip": "norm",
        "log_every": 2,
        "system": ws.CartPole(poles=1, dt=0.02),
    }
    for name, value in different.items():
        other = make_configs(2, **{"flow": "modified"} | {name: value})[1]
        with pytest.raises(ValueError, match=f"config 1 has {name}=.* like config 0"):
            ws.train_together([base[0], other], progress=False)
    with pytest.raises(ValueError, match="policy of config 1 is that of another"):
        ws.train_together([base[0], base[0]], progress=False)
    with pytest.raises(ValueError, match="configs is empty"):
        ws.train_together([], progress=False)
    with pytest.raises(TypeError, match="configs is a TrainConfig, expected a list"):
        ws.train_together(base[0], progress=False)
    with pytest.raises(TypeError, match=r"config 1 is a MLP, expected a ws\.TrainConfig"):
        ws.train_together([base[0], base[1].policy], progress=False)
    for outs, error in (("runs", TypeError), (["a"], ValueError), (["a", "./a"], ValueError)):
        with pytest.raises(error, match="outs"):
            ws.train_together(base, outs, progress=False)


def test_policies_that_torch_evaluates_are_refused():
    nets = [torch.nn.Linear(4, 1) for _ in range(2)]
    configs = [ws.TrainConfig(SYSTEM, net, horizon=5, samples=8) for net in nets]
    with pytest.raises(TypeError, match="policy 0 is of type Linear"):
        ws.train_together(configs, progress=False)


def test_an_ensemble_is_no_policy_of_a_run():
    ensemble = ws.Ensemble([make_policy(SYSTEM, seed) for seed in range(2)])
    with pytest.raises(TypeError, match="policy is an Ensemble.*train_together"):
        ws.TrainConfig(system=SYSTEM, policy=ensemble)


def test_a_refused_start_touches_no_folder(tmp_path):
    ws.train(make_configs(flow="modified")[0], tmp_path / "seed2", progress=False)
    before = {p: p.read_bytes() for p in (tmp_path / "seed2").iterdir()}
    with pytest.raises(FileExistsError, match="seed2 exists"):
        ws.train_together(make_configs(flow="modified"), folders(tmp_path), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["seed2"]
    assert {p: p.read_bytes() for p in (tmp_path / "seed2").iterdir()} == before

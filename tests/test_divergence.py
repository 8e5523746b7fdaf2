"""Numbers that stop being finite: found, located, undone or skipped, never a training that stands still."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import warp_sims as ws
from warp_sims.training.runs import read_checkpoint, read_log
from warp_sims.training.train import TrainingRun

SYSTEM = ws.CartPole(poles=1, dt=0.05)


def overflowing():
    """A policy under which 1600 steps are so chaotic that the regular gradient overflows float32, and the
    modified one does not.
    """
    policy = ws.MLP(SYSTEM.state_size, (8,), 1)
    policy.reset_parameters(seed=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(30.0)
    return policy


def calm(seed=0):
    policy = ws.MLP(SYSTEM.state_size, (8,), 1)
    policy.reset_parameters(seed=seed)
    return policy


def config_of(policy, **settings):
    settings = {"horizon": 5, "samples": 8, "batch": 4, "epochs": 3, "flow": "modified"} | settings
    return ws.TrainConfig(system=SYSTEM, policy=policy, **settings)


def weights_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()


# The combined flow


def test_a_field_that_overflows_stops_the_run(tmp_path):
    """M is finite and R is NaN: every component of C is 0, and weights would never move."""
    policy = overflowing()
    pair = ws.gradient_pair(SYSTEM, policy, SYSTEM.initial_states(4), horizon=1600)
    assert [int(n) for n in pair.nonfinite_fields] == [0, 49] and pair.zeros == 1.0
    before = weights_of(policy)
    config = config_of(policy, horizon=1600, flow="combined", samples=4)
    with pytest.raises(FloatingPointError) as error:
        ws.train(config, tmp_path / "run", progress=False)
    words = str(error.value)
    assert "regular gradient (check) in epoch 0, update 0 of 1, is NaN or infinite in all 49" in words
    assert "all states and controls of it are finite; the time step is dt=0.05" in words
    assert "weights from before training again" in words and "\n" not in words
    assert torch.equal(weights_of(policy), before)


@pytest.mark.parametrize("policy_of", [overflowing, calm])
def test_columns_say_what_was_lost(policy_of):
    settings = {"horizon": 800, "flow": "combined", "samples": 4, "epochs": 1, "lr": 1e-12}
    policy = policy_of()
    pair = ws.gradient_pair(SYSTEM, policy, SYSTEM.initial_states(4, split="train"), horizon=800)
    log = ws.train(config_of(policy, **settings), progress=False).log
    assert np.isnan(log["nonfinite"][0]) and np.isnan(log["zeros"][0])
    assert log["nonfinite"][1] == float(pair.nonfinite)
    assert log["zeros"][1] == pytest.approx(float(pair.zeros), rel=1e-12)
    assert 0.0 < log["zeros"][1] < 1.0


def test_some_components_that_overflow_are_counted(monkeypatch):
    """NaN and infinity in R give 0 there, and training goes on."""
    original = ws.training.updates.gradient_pair

    def spoiled(*arguments, **options):
        pair = original(*arguments, **options)
        flat = pair.flat.clone()
        flat[1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        return dataclasses.replace(pair, flat=flat)

    monkeypatch.setattr("warp_sims.training.updates.gradient_pair", spoiled)
    policy = calm()
    before = weights_of(policy)
    log = ws.train(config_of(policy, flow="combined", epochs=2), progress=False).log
    assert log["nonfinite"].tolist()[1:] == [6.0, 6.0]  # 3 in each of 2 updates
    moved = weights_of(policy) != before
    assert not moved[:3].any() and moved[3:].any()


# What becomes of such an update


def loss_that_is(value, at):
    """A loss that is `value` when it is called for the `at`-th time."""
    calls = []

    def loss(states, controls):
        calls.append(0)
        return states[-1].square().mean() * (value if len(calls) - 1 in at else 1.0)

    return loss


BEFORE = 3  # calls before training: two evaluations and a rehearsal
EPOCH = 4  # two updates and two evaluations


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_update_changes_nothing(value):
    skipped = {BEFORE + EPOCH}  # the first of epoch 1
    settings = {"flow": "regular", "optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "on_divergence": "skip"}
    policy, twin = calm(), calm()
    run = ws.train(config_of(policy, loss=loss_that_is(value, skipped), epochs=2, **settings), progress=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    batches = SYSTEM.initial_states(8, split="train").split(4)
    for x0 in (batches[0], batches[1], batches[1]):
        optimizer.zero_grad()
        ws.rollout(
            SYSTEM, twin, x0, horizon=5, flow="regular", loss=lambda x, u: x[-1].square().mean()
        ).loss.backward()
        optimizer.step()
    assert torch.equal(weights_of(policy), weights_of(twin))
    log = run.log
    assert np.isfinite(log["loss_batch"][1:]).all() and np.isfinite(log["grad_norm"][1:]).all()
    assert log["nonfinite"].tolist()[1:] == [0.0, float(weights_of(policy).numel())]


def test_an_epoch_of_skipped_updates_stops_the_run(tmp_path):
    """Else training would stand still without a word."""
    policy = overflowing()
    config = config_of(policy, horizon=1600, flow="combined", samples=4, batch=2, on_divergence="skip")
    with pytest.raises(FloatingPointError, match=r"update 0 of 2.*every other update.*all of them skipped"):
        ws.train(config, progress=False)


def test_settings_that_do_not_go_with_skipping():
    with pytest.raises(ValueError, match="on_divergence='ignore', expected one of 'stop', 'skip'"):
        config_of(calm(), on_divergence="ignore")
    configs = [config_of(calm(k), on_divergence="skip") for k in range(2)]
    with pytest.raises(ValueError, match=r"on_divergence='skip' with 2 configs.*train each on its own"):
        ws.train_together(configs, progress=False)


# The last finite weights


@pytest.mark.parametrize("log_every", [1, 4])
def test_weights_that_are_not_finite_are_never_kept(log_every, tmp_path, monkeypatch):
    """Rows of the log are four epochs apart: between them no loss is looked at."""
    policy = calm()
    original = ws.training.updates.Updates.run
    epochs = []

    def run(self, record, count=None):
        original(self, record, count)
        epochs.append(0)
        if len(epochs) == 3:
            with torch.no_grad():
                policy[2].weight[0, 3] = math.nan

    monkeypatch.setattr(ws.training.updates.Updates, "run", run)
    config = config_of(policy, epochs=8, log_every=log_every, checkpoint_every=1)
    with TrainingRun(config, tmp_path / "run") as training:
        training.run_epoch()
        training.run_epoch()
        good = weights_of(policy)
        with pytest.raises(FloatingPointError) as error:
            training.run_epoch()
    assert "2.weight after epoch 2 holds NaN or infinity" in str(error.value)
    assert "the policy has its weights from after epoch 1 again" in str(error.value)
    assert torch.equal(weights_of(policy), good)
    kept = read_checkpoint(tmp_path / "run")
    assert kept["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in kept["policy"].values())


def test_weights_are_put_back_when_a_loss_is_not_finite():
    policy = calm()
    loss = loss_that_is(math.inf, {BEFORE + EPOCH + 1})
    with TrainingRun(config_of(policy, loss=loss, flow="regular")) as run:
        run.run_epoch()
        good = weights_of(policy)
        with pytest.raises(FloatingPointError, match=r"epoch 1, update 1 of 2.*after epoch 0 again"):
            run.run_epoch()
    assert torch.equal(weights_of(policy), good)


def test_of_runs_that_train_together_one_is_put_back():
    policies = [calm(k) for k in range(3)]
    with torch.no_grad():
        policies[1][-1].bias.fill_(1e6)  # a force whose gradient overflows
    before = weights_of(policies[1])
    results = ws.train_together([config_of(policy) for policy in policies], progress=False)
    assert [result.diverged is not None for result in results] == [False, True, False]
    assert "from before training again" in str(results[1].diverged)
    assert torch.equal(weights_of(policies[1]), before)


# Where it begins


class Kick(torch.nn.Module):
    """No control, but a great one for states beyond a position."""

    def __init__(self, beyond):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.zeros(1))
        self.beyond = beyond

    def forward(self, x):
        return self.factor * x[:, :1] + torch.where(x[:, :1] > self.beyond, 1e30, 0.0)


def kicked(worlds=5, world=3, dt=0.05):
    """Initial states of which one moves to the right, beyond 0.42 after step 8."""
    system = ws.CartPole(poles=1, dt=dt)
    x0 = torch.zeros(worlds, system.state_size)
    x0[world, 1] = 0.42 / (8.5 * dt)
    return system, Kick(0.42), x0


@pytest.mark.parametrize("loss", ["final", "running", None])
def test_a_rollout_says_where_it_diverged(loss):
    system, policy, x0 = kicked()
    options = {"horizon": 40, "flow": "regular", "loss": loss}
    out = ws.rollout(system, policy, x0, **options)
    finite = torch.isfinite(out.states).all(-1)
    step = int((~finite).any(1).nonzero()[0])
    assert (~finite)[step].nonzero().tolist() == [[3]] and step > 8
    with pytest.raises(FloatingPointError) as error:
        ws.rollout(system, policy, x0, locate_divergence=True, **options)
    assert f"world 3, in its state at step {step} of 40" in str(error.value)
    assert "dt=0.05" in str(error.value) and "\n" not in str(error.value)


def test_a_control_that_is_not_finite_comes_before_the_state():
    system, _, x0 = kicked()

    class Root(torch.nn.Module):
        def forward(self, x):
            return (0.2 - x[:, :1]).sqrt()  # NaN beyond 0.2

    with pytest.raises(FloatingPointError, match=r"world 3, in its control at step \d+ of 20.*is nan"):
        ws.rollout(system, Root(), x0, horizon=20, flow="regular", locate_divergence=True)


def test_a_member_that_diverged_is_named():
    nets = [calm(k) for k in range(3)]
    with torch.no_grad():
        nets[2][-1].bias.fill_(math.inf)
    x0 = SYSTEM.initial_states(4)
    with pytest.raises(FloatingPointError, match=r"world 0 of member 2, in its control at step 0"):
        ws.rollout(SYSTEM, ws.Ensemble(nets), x0, horizon=3, flow="regular", locate_divergence=True)


def test_a_loss_that_is_not_finite_though_the_states_are():
    with pytest.raises(FloatingPointError, match="the loss is nan though all states and controls are finite"):
        ws.rollout(
            SYSTEM,
            calm(),
            SYSTEM.initial_states(3),
            horizon=3,
            loss=lambda x, u: (x.sum() * 0.0 - 1.0).log(),
            flow="regular",
            locate_divergence=True,
        )


@pytest.mark.parametrize("flow", ["regular", "combined"])
def test_in_the_good_case_no_trajectory_is_read(flow, monkeypatch):
    monkeypatch.setattr(
        "warp_sims.training.divergence.locate", lambda *tensors: pytest.fail("a pass over all states")
    )
    x0 = SYSTEM.initial_states(3)
    policy = calm()
    one, other = (
        ws.rollout(SYSTEM, policy, x0, horizon=9, flow=flow, locate_divergence=wanted)
        for wanted in (True, False)
    )
    assert torch.equal(one.states, other.states) and torch.equal(one.loss, other.loss)


def test_training_says_where_it_diverged(tmp_path):
    """In the second update of the second epoch; the first ones are repeated to find it."""
    system, policy, x0 = kicked(worlds=8, world=6)

    class Moved(ws.CartPole):
        def initial_states(self, n, seed=42, split="train"):
            return x0[:n] if split == "train" else torch.zeros(n, self.state_size)

    settings = {"horizon": 40, "flow": "regular", "samples": 8, "batch": 4, "epochs": 3, "lr": 1e-3}
    # the whole training set is evaluated before training: it has to be finite then
    policy.beyond = 10.0
    run = TrainingRun(ws.TrainConfig(Moved(poles=1, dt=0.05), policy, **settings), tmp_path / "run")
    with run:
        run.run_epoch()
        policy.beyond = 0.42
        with pytest.raises(FloatingPointError) as error:
            run.run_epoch()
    assert "loss in epoch 1, update 1 of 2, is" in str(error.value)
    assert "world 2, in its state at step" in str(error.value) and "dt=0.05" in str(error.value)
    assert read_log(tmp_path / "run")["epoch"].tolist() == [-1, 0]

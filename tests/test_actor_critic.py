"""The short-horizon actor-critic: one update against plain torch, exact resume, settings, commands."""

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from cart_task import CartTask
from reference import actor_critic as reference
from reference import cartpole
from warp_sims.bridge.autograd import operators
from warp_sims.kernels.agreement import SUMS

import warp_sims as ws
from warp_sims.actor_critic.networks import Normaliser
from warp_sims.actor_critic.targets import td_lambda
from warp_sims.actor_critic.updates import Updates
from warp_sims.cli import main

# Relative to the norm: float64, some ten steps, both ways.
TOLERANCE = 1e-11

SMALL = {
    "worlds": 17,
    "horizon": 9,
    "updates": 7,
    "actor_hidden": (8, 5),
    "critic_hidden": (6,),
    "critic_passes": 2,
    "log_every": 3,
    "eval_every": 3,
    "eval_worlds": 4,
    "checkpoint_every": 2,
}


def settings(**changes):
    return ws.ActorCriticConfig(CartTask(), **(SMALL | changes))


def begun(**changes):
    """Updates behind the first: ages differ, and normaliser and target critic are not what they began as.
    The actor answers with some force, so that its network edge matters.
    """
    updates = Updates(settings(dtype="float64", clip_at=1e9, **changes))
    with torch.no_grad():
        updates.actor.gaussian.mean[-1].weight.mul_(100.0)
    updates.run()
    return updates


def gradient_of(updates):
    """The actor's gradient of the next update, flat, and what the critic was trained on."""
    seen = {}
    train = updates._train_critic

    def spy(rows, targets):
        seen["targets"] = targets.clone()
        return train(rows, targets)

    updates._train_critic = spy
    record, _ = updates.run()
    flat = torch.cat([p.grad.flatten() for p in updates.actor.parameters()])
    return flat, seen["targets"], record


def reference_of(updates, flow, decay):
    """The same by plain torch: the gradient, the targets (horizon, nworld), and the worlds."""
    config, task, worlds = updates.config, updates.task, updates.worlds
    actor, target = copy.deepcopy(updates.actor), copy.deepcopy(updates.target)
    step = functools.partial(cartpole.step, dt=task.dt)
    fresh = worlds.fresh(updates.update)
    noise = worlds.noise(updates.update)

    def value(x):
        return target(actor.normaliser(task.observe(x)))

    found = reference.rollout(step, actor, task, worlds.states, worlds.ages, noise, fresh, flow, decay)
    loss = reference.actor_loss(found, value, config.gamma, noise.shape[0] * noise.shape[1])
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(actor.parameters()))])
    targets = torch.tensor(reference.targets(found, value, config.gamma, config.trace), dtype=torch.float64).T
    return flat, targets, found, loss


def close(a, b, tolerance=TOLERANCE):
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("flow", ["R", "M", "N", "S"])
def test_one_update_is_that_of_plain_torch(flow, decay):
    updates = begun(flow=flow, decay=decay)
    wanted, targets, worlds, loss = reference_of(updates, flow, decay)
    ends = [(len(r), failed) for pieces, *_ in worlds for r, _, failed in pieces]
    assert sum(failed for _, failed in ends) >= 3, "some episodes fail"
    assert sum(not failed for _, failed in ends) >= 17 + 3, "some run out of time within the horizon"
    found, trained, record = gradient_of(updates)
    assert close(found, wanted)
    assert close(trained.view_as(targets), targets)
    assert math.isclose(float(record["actor_loss"]), float(loss), rel_tol=1e-12)
    assert torch.allclose(updates.worlds.states, torch.stack([x for *_, x, _ in worlds]), atol=1e-12)
    assert updates.worlds.ages.tolist() == [age for *_, age in worlds]


def test_the_combined_update_keeps_where_signs_agree():
    updates = begun(flow="C")
    base, *_ = reference_of(updates, "M", 1.0)
    check, *_ = reference_of(updates, "R", 1.0)
    found, _, record = gradient_of(updates)
    wanted = torch.where(base.sign() == check.sign(), base, torch.zeros_like(base))
    assert close(found, wanted, 1e-10)
    assert 0 < int((wanted == 0).sum()) < wanted.numel(), "some signs differ"
    cosine = torch.nn.functional.cosine_similarity(base, check, dim=0)
    assert math.isclose(float(record["cosine"]), float(cosine), rel_tol=1e-9)
    stats = dict(zip(SUMS, operators.combine(base, check, False)[1]))
    assert math.isclose(float(record["agreement"]), float(stats["equal"] / stats["nonzero"]), rel_tol=1e-12)


def test_a_step_clip_bounds_what_enters_a_step():
    """A bound that nothing reaches changes nothing; one that all reach makes the gradient smaller."""
    flat = {}
    for clip in (None, 1e9, 1e-3):
        updates = begun(step_clip=clip)
        flat[clip], *_ = gradient_of(updates)
    assert torch.equal(flat[None], flat[1e9])
    assert flat[1e-3].norm() < 0.5 * flat[None].norm()


def test_td_targets_without_trace_look_one_step_ahead():
    from warp_sims.actor_critic.targets import Ends

    rewards, values = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)
    ends = Ends(*(torch.rand(2, 5, 3) < 0.3).unbind(0))
    ends = Ends(ends.failed, ends.failed | ends.restarted)
    one = rewards + 0.9 * torch.where(ends.failed, 0.0, values)
    assert torch.allclose(td_lambda(rewards, values, ends, 0.9, 0.0), one, atol=1e-14)


def test_the_normaliser_has_mean_and_deviation_of_all_it_saw():
    parts = [torch.randn(n, 4, dtype=torch.float64) * 3 + 5 for n in (1, 17, 300)]
    normaliser = Normaliser(4, torch.float64)
    for part in parts:
        normaliser.update(part)
    seen = torch.cat(parts)
    assert torch.allclose(normaliser.mean, seen.mean(0), atol=1e-12)
    assert torch.allclose(normaliser.variance, seen.var(0, correction=0), rtol=1e-12)
    out = normaliser(seen)
    assert torch.allclose(out.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(out.std(0, correction=0), torch.ones(4, dtype=torch.float64), atol=1e-5)


def same(a, b):
    """Whether two checkpoints hold the same, wall time aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("flow", ["R", "C"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_that_stopped_goes_on_to_the_last_bit(flow, stop, tmp_path, monkeypatch):
    from warp_sims.actor_critic import run as module
    from warp_sims.training.runs import read_checkpoint

    assert ws.train_actor_critic(settings(flow=flow), tmp_path / "whole", progress=False).finished
    run_update = module._Run.run_update

    def interrupted(run):
        if run.updates.update == stop:
            raise KeyboardInterrupt
        run_update(run)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "run_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ws.train_actor_critic(settings(flow=flow), tmp_path / "parts", progress=False)
    short = ws.train_actor_critic(
        settings(flow=flow), tmp_path / "parts", resume=True, time_limit=1e-9, progress=False
    )
    assert not short.finished and short.log["update"][-1] <= stop + 1
    assert main(["train", "--resume", str(tmp_path / "parts"), "--no-progress"]) == 0
    for name in ("first", "best", "last"):
        a, b = (read_checkpoint(tmp_path / folder, name) for folder in ("whole", "parts"))
        assert same(a, b), name
    (*_, wanted), (*_, log) = (ws.load_actor(tmp_path / name) for name in ("whole", "parts"))
    assert log["update"].tolist() == [0, 3, 6, 7]
    for name in log:
        if name != "seconds":
            np.testing.assert_array_equal(log[name], wanted[name])


def test_what_was_saved_is_the_policy(tmp_path):
    result = ws.train_actor_critic(settings(updates=2), tmp_path / "run", progress=False)
    config, actor, log = ws.load_actor(tmp_path / "run")
    x0 = config.system.initial_states(5, seed=1)
    with torch.no_grad():
        assert torch.equal(actor(x0), result.actor(x0))
        out = ws.rollout(config.system, actor, x0, horizon=3, loss=None)
    assert torch.equal(out.controls[0], result.actor(x0))
    assert config.settings() == settings(updates=2).settings() and log["update"][-1] == 2


def test_other_settings_and_folders_in_the_way_are_refused(tmp_path):
    ws.train_actor_critic(settings(updates=2), tmp_path / "run", progress=False)
    with pytest.raises(FileExistsError, match="overwrite"):
        ws.train_actor_critic(settings(updates=2), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"training gamma=0\.99, now gamma=0\.9"):
        ws.train_actor_critic(settings(updates=2, gamma=0.9), tmp_path / "run", resume=True, progress=False)
    (tmp_path / "run" / "checkpoint_last.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint_last"):
        ws.train_actor_critic(settings(updates=2), tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"worlds": 0}, ValueError, "worlds=0, expected a whole number of at least 1"),
        ({"gamma": 1.5}, ValueError, "gamma=1.5, expected a number from 0 to 1"),
        ({"flow": "sideways"}, ValueError, "sideways"),
        ({"decay": 2.0}, ValueError, "decay"),
        ({"actor_hidden": 5}, TypeError, "actor_hidden=5, expected widths"),
        ({"clip_at": "1"}, TypeError, "clip_at='1' is a str"),
        ({"clip_at": b"1"}, TypeError, "clip_at=b'1' is a bytes"),
        ({"device": "abacus"}, ValueError, "abacus"),
        ({"system": ws.CartPole()}, ValueError, "CartPole has no observe, reward, fallen, episode_steps"),
        ({"system": 3}, TypeError, "expected a ws.System"),
    ],
)
def test_bad_settings_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        dataclasses.replace(settings(), **changes)


def test_states_that_are_lost_end_their_episodes_and_skip_the_update():
    updates = Updates(settings())
    before = copy.deepcopy(updates.actor.state_dict())
    updates.worlds.states[3, 1] = 1e30  # its square overflows: fallen in the first step
    record, _ = updates.run()
    assert bool(torch.isfinite(updates.worlds.states).all())
    if record["skipped"]:
        assert all(
            torch.equal(before[n], v) for n, v in updates.actor.gaussian.state_dict().items() if n in before
        )


def test_the_command_line_trains_stops_and_goes_on(tmp_path, capsys):
    words = ["train", "hopper", "--algorithm", "shac", "--flow", "M", "--worlds", "5", "--horizon", "4"]
    words += ["--updates", "3", "--eval-worlds", "2", "--actor-hidden", "8", "--critic-hidden", "8", "4"]
    words += ["--out", str(tmp_path / "run"), "--no-progress", "--threads", "1", "--substeps", "4"]
    assert main([*words, "--time-limit", "1e-9"]) == 0
    assert f"to go on: warp-sims train --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "run"), "--no-progress"]) == 0
    assert "return" in capsys.readouterr().out
    config, _, log = ws.load_actor(tmp_path / "run")
    assert log["update"][-1] == 3 and config.settings()["flow"] == "modified"
    assert config.actor_hidden == (8,) and config.critic_hidden == (8, 4) and config.system.substeps == 4
    assert main(["train", "cartpole", "--algorithm", "shac"]) == 2
    assert "observe" in capsys.readouterr().err

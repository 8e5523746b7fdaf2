"""`ws.gymnasium_env`: worlds of a system as a vector environment, in both modes of beginning again."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import cost_of
from foreign_carts import torch_cart
from own_systems import Unicycle

import warp_sims as ws

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")
CART = ws.CartPole(poles=1, dt=0.05)
ENVS, LIMIT = 5, 7


def fast(x):
    return x[:, 1].abs() > 1.2


def make(autoreset, **options):
    given = {"done": fast, "limit": LIMIT, "scale": 8.0, "seed": 3, "dtype": torch.float64} | options
    return ws.gymnasium_env(CART, ENVS, autoreset=autoreset, **given)


def actions_of(env, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1.3, 1.3, (steps, *env.action_space.shape))


def test_spaces_and_mode():
    mode = gymnasium.vector.AutoresetMode
    for name, expected in (("next_step", mode.NEXT_STEP), ("same_step", mode.SAME_STEP)):
        env = make(name)
        assert isinstance(env, gymnasium.vector.VectorEnv) and env.metadata["autoreset_mode"] is expected
        assert env.num_envs == ENVS and env.observation_space.shape == (ENVS, 4)
        assert env.single_action_space == gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        seen, infos = env.reset()
        assert env.observation_space.contains(seen) and infos == {}
        seen, rewards, terminations, truncations, _ = env.step(env.action_space.sample())
        assert env.observation_space.contains(seen)
        assert rewards.shape == terminations.shape == truncations.shape == (ENVS,)
        assert terminations.dtype == truncations.dtype == bool
        env.close()


def test_next_step_ends_at_the_last_state_and_begins_at_the_next_step():
    env = make("next_step")
    seen, _ = env.reset(seed=1)
    waiting, age, ends = np.zeros(ENVS, bool), np.zeros(ENVS, int), 0
    for action in actions_of(env, 40):
        x = env.states
        u = 8.0 * torch.as_tensor(action).clamp(-1, 1)
        seen, rewards, terminations, truncations, infos = env.step(action)
        y = ws.step(CART, x, u)
        age += 1
        ended, cut = fast(y).numpy(), age >= LIMIT
        cost = cost_of(CART)(y).numpy()
        ended, cut = ended & ~waiting, cut & ~ended & ~waiting
        assert np.array_equal(terminations, ended) and np.array_equal(truncations, cut) and infos == {}
        assert np.allclose(rewards, np.where(waiting, 0.0, -cost), atol=1e-6)
        assert np.allclose(seen[~waiting], y[~waiting].numpy(), atol=1e-6)
        # a new episode: hanging, as initial states are
        assert np.all(np.abs(seen[waiting][:, 2] - np.pi) <= np.pi / 6 + 1e-6)
        age[waiting] = 0
        waiting = ended | cut
        ends += waiting.sum()
    assert ends > 10


def test_same_step_returns_the_first_observation_of_the_next_episode():
    env = make("same_step")
    env.reset(seed=1)
    age, ends = np.zeros(ENVS, int), 0
    for action in actions_of(env, 40):
        x = env.states
        seen, rewards, terminations, truncations, infos = env.step(action)
        y = ws.step(CART, x, 8.0 * torch.as_tensor(action).clamp(-1, 1))
        age += 1
        over = fast(y).numpy() | (age >= LIMIT)
        assert np.array_equal(terminations | truncations, over)
        assert np.allclose(rewards, -cost_of(CART)(y).numpy(), atol=1e-6)
        assert np.allclose(seen[~over], y[~over].numpy(), atol=1e-6)
        assert np.all(np.abs(seen[over][:, 2] - np.pi) <= np.pi / 6 + 1e-6)
        assert ("final_obs" in infos) == bool(over.any())
        if over.any():
            assert np.array_equal(infos["_final_obs"], over)
            for i in range(ENVS):
                last = infos["final_obs"][i]
                assert (last is None) == (not over[i])
                assert last is None or np.allclose(last, y[i].numpy(), atol=1e-6)
        age[over] = 0
        ends += over.sum()
    assert ends > 10


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_a_seed_is_a_run(autoreset):
    runs = []
    for seed in (1, 1, 2):
        env = make(autoreset)
        runs.append([env.reset(seed=seed)[0], *(env.step(a)[0] for a in actions_of(env, 15))])
    assert all(np.array_equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert not np.array_equal(runs[0][0], runs[2][0])


def test_a_mask_resets_some():
    env = make("next_step", limit=None, done=None)
    env.reset(seed=1)
    seen = env.step(actions_of(env, 1)[0])[0]
    mask = np.arange(ENVS) % 2 == 0
    after, _ = env.reset(options={"reset_mask": mask})
    assert np.array_equal(seen[~mask], after[~mask]) and (seen[mask] != after[mask]).any(1).all()
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": [True]})


def test_reward_observation_and_foreign_systems():
    def seen(x):
        return torch.stack((x[:, 0], x[:, 2].cos(), x[:, 2].sin()), 1)

    def reward(x, u, y):
        return u[:, 0] + 10 * x[:, 0] + 100 * y[:, 0]

    system = torch_cart(CART, initial_states=lambda n, seed, split: CART.initial_states(n, seed))
    env = ws.gymnasium_env(system, ENVS, reward=reward, observe=seen, dtype=torch.float64)
    first, _ = env.reset(seed=0)
    x, action = env.states, actions_of(env, 1)[0]
    found, rewards, *_ = env.step(action)
    u = torch.as_tensor(action).clamp(-1, 1)
    y = ws.step(CART, x, u)
    assert env.observation_space.shape == first.shape == (ENVS, 3)
    assert np.allclose(found, seen(y).numpy(), atol=1e-6)
    assert np.allclose(rewards, reward(x, u, y).numpy(), atol=1e-4)
    default = ws.gymnasium_env(
        torch_cart(CART, initial_states=lambda n, seed, split: CART.initial_states(n)), 2
    )
    default.reset()
    assert default.step(np.zeros((2, 1)))[1].shape == (2,)


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_a_world_that_diverges_ends(autoreset):
    system = ws.TorchSystem(
        lambda x, u: x + torch.exp(200.0 * u), state_size=1, control_size=1, check=False,
        loss=lambda x: x[:, 0].square(), initial_states=lambda n, seed, split: torch.ones(n, 1),
    )  # fmt: skip
    env = ws.gymnasium_env(system, 3, autoreset=autoreset)
    env.reset()
    action = np.array([[1.0], [-1.0], [1.0]])
    _, rewards, terminations, _, _ = env.step(action)
    assert terminations.tolist() == [True, False, True] and rewards[0] == 0.0
    seen, _, terminations, _, _ = env.step(-np.ones((3, 1)))
    assert not terminations.any() and np.isfinite(seen).all()


def test_wrappers_of_gymnasium():
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(make("next_step"))
    env.reset(seed=0)
    lengths = []
    for action in actions_of(env, 40):
        infos = env.step(action)[4]
        lengths += [int(k) for k in infos["episode"]["l"][infos["_episode"]]] if "episode" in infos else []
    assert lengths and max(lengths) == LIMIT


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"num_envs": 0}, ValueError, "num_envs is 0, expected an int of at least 1"),
        ({"limit": 0}, ValueError, "limit is 0"),
        ({"autoreset": "disabled"}, ValueError, "autoreset is 'disabled', expected \"next_step\""),
        ({"reward": 1}, TypeError, "reward is 1, expected a function"),
        ({"scale": 0.0}, ValueError, "scale is 0.0"),
        ({"dtype": torch.float16}, TypeError, "dtype is torch.float16"),
        ({"system": Unicycle()}, ValueError, "reward is None, but Unicycle has no loss"),
        ({"system": ws.CartPole}, TypeError, "make an instance of it"),
    ],
)
def test_what_does_not_fit(options, error, words):
    given = {"system": CART, "num_envs": 3} | options
    with pytest.raises(error, match=f"gymnasium_env: .*{words}"):
        ws.gymnasium_env(given.pop("system"), given.pop("num_envs"), **given)


def test_actions_of_another_shape():
    env = make("next_step")
    env.reset()
    with pytest.raises(ValueError, match=r"actions have shape \(5,\), expected \(5, 1\)"):
        env.step(np.zeros(5))


def test_without_gymnasium(monkeypatch):
    monkeypatch.delitem(sys.modules, "warp_sims.vector_env", raising=False)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install warp-sims\[gymnasium\]"):
        ws.gymnasium_env(CART, 2)


def test_ppo_trains_on_it():
    """The example beside flow C, shortened."""
    pytest.importorskip("stable_baselines3")
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "ppo_beside_c.py"))
    course = example["by_ppo"](steps=16 * 6400, worlds=64)
    assert course[-1][0] == 16 * 6400 and course[-1][2] < 0.9 * course[0][2]
    *_, last = example["by_gradient"](updates=80)
    assert last[2] < course[-1][2]


def test_ppo_of_rsl_rl_trains_on_it():
    """The same with the other library, whose environments are never reset from outside."""
    pytest.importorskip("rsl_rl")
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "ppo_beside_c.py"))
    course = list(example["by_rsl_rl"](steps=16 * 6400, worlds=64))
    assert course[-1][0] == 16 * 6400 and course[-1][2] < 0.9 * course[0][2]
    env = example["adapted_for_rsl_rl"](
        ws.gymnasium_env(example["SYSTEM"], 3, limit=2, autoreset="same_step", seed=0)
    )
    _, _, over, extras = env.step(torch.zeros(3, 1))
    assert not over.any() and env.episode_length_buf.tolist() == [1, 1, 1]
    seen, rewards, over, extras = env.step(torch.zeros(3, 1))
    assert over.all() and extras["time_outs"].all() and env.episode_length_buf.tolist() == [0, 0, 0]
    assert seen["policy"].shape == (3, 4) and rewards.shape == (3,)

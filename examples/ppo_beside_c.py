"""The same physics by reinforcement learning and by its gradient: PPO of a library beside flow C.

    pip install stable-baselines3         # or rsl-rl-lib, with --library rsl-rl
    python examples/ppo_beside_c.py

A pole is to swing up and stay there: the cost is the mean of 1 - cos q over 100 steps from hanging. Both
policies have the same shape and see the same states. PPO meets the system as a Gymnasium environment, flow C
as a rollout. What is printed is the cost on states that neither was trained on, after so many simulated steps
and seconds; stable-baselines3 has its defaults but for a rollout of one episode and a falling learning rate,
rsl-rl what its own examples train robots with, but for the same rollout and no bonus on entropy.
"""

import argparse
import contextlib
import io
import time

import numpy as np
import torch

import warp_sims as ws

SYSTEM = ws.CartPole(poles=1, dt=0.02)
HORIZON, FORCE, HIDDEN = 100, 10.0, (64, 64)
"""Steps of an episode; force of an action of 1 [N], the largest; hidden units."""


class Bounded(torch.nn.Module):
    """A policy whose forces are bounded as those of the environment are."""

    def __init__(self):
        super().__init__()
        self.net = ws.MLP(SYSTEM.state_size, HIDDEN, SYSTEM.control_size)
        self.net.reset_parameters(seed=0, zero_last=True)  # no force at first: tanh saturates

    def forward(self, x):
        return FORCE * torch.tanh(self.net(x))


class Clipped(torch.nn.Module):
    """The mean action of a stable-baselines3 policy, as the environment takes it."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, x):
        return FORCE * self.policy.get_distribution(x).mode().clamp(-1.0, 1.0)


@torch.no_grad()
def tried(policy):
    """Cost on 512 initial states of the test set."""
    x0 = SYSTEM.initial_states(512, seed=5, split="test")
    return float(ws.rollout(SYSTEM, policy, x0, horizon=HORIZON, loss="running").loss)


def by_gradient(updates=400, worlds=64):
    """Yields simulated steps, seconds and the cost."""
    policy, states = Bounded(), SYSTEM.initial_states(2048, seed=1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    draw, seconds = torch.Generator().manual_seed(0), 0.0
    for update in range(1, updates + 1):
        start = time.perf_counter()
        x0 = states[torch.randint(len(states), (worlds,), generator=draw)]
        out = ws.rollout(SYSTEM, policy, x0, horizon=HORIZON, flow="combined", loss="running")
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if update % (updates // 8) == 0:
            yield update * worlds * HORIZON, seconds, tried(policy)


def adapted(env):
    """A vector environment of Gymnasium ("same_step") as one of stable-baselines3."""
    from stable_baselines3.common.vec_env import VecEnv

    class Adapted(VecEnv):
        def __init__(self):
            super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

        def reset(self):
            return env.reset()[0]

        def step_async(self, actions):
            self._actions = actions

        def step_wait(self):
            seen, rewards, terminations, truncations, infos = env.step(self._actions)
            over = terminations | truncations
            each = [{} for _ in range(self.num_envs)]
            for i in np.flatnonzero(over):
                each[i] = {
                    "terminal_observation": infos["final_obs"][i],
                    "TimeLimit.truncated": truncations[i],
                }
            return seen, rewards, over, each

        def close(self):
            env.close()

        def get_attr(self, name, indices=None):
            return [getattr(env, name, None)] * self.num_envs

        def set_attr(self, name, value, indices=None):
            raise NotImplementedError("the worlds have no attributes of their own")

        def env_method(self, name, *args, indices=None, **kwargs):
            raise NotImplementedError("the worlds have no methods of their own")

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * self.num_envs

    return Adapted()


def by_ppo(steps=1_000_000, worlds=64):
    """Returns the same of stable-baselines3's PPO."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    course, start, spent = [], time.perf_counter(), 0.0

    class Watch(BaseCallback):
        """Tries the policy eight times on the way, off the clock."""

        def _on_rollout_start(self):
            if self.num_timesteps >= (len(course) + 1) * steps // 8:
                note(self.model)

        def _on_step(self):
            return True

    def note(model):
        nonlocal spent
        now = time.perf_counter()
        course.append((model.num_timesteps, now - start - spent, tried(Clipped(model.policy))))
        spent += time.perf_counter() - now

    env = ws.gymnasium_env(SYSTEM, worlds, limit=HORIZON, scale=FORCE, autoreset="same_step", seed=1)
    model = PPO(
        "MlpPolicy",
        adapted(env),
        n_steps=HORIZON,
        batch_size=worlds * HORIZON // 8,
        seed=0,
        device="cpu",
        learning_rate=lambda left: 1e-3 * left,
        policy_kwargs={"net_arch": list(HIDDEN)},
    )
    model.learn(steps, callback=Watch())
    note(model)
    return course


def adapted_for_rsl_rl(env):
    """A vector environment of Gymnasium ("same_step") as one of rsl-rl, which never resets it."""
    from rsl_rl.env import VecEnv
    from tensordict import TensorDict

    class Adapted(VecEnv):
        def __init__(self):
            self.num_envs, self.num_actions = env.num_envs, SYSTEM.control_size
            self.max_episode_length, self.device, self.cfg = HORIZON, "cpu", {}
            self.episode_length_buf = torch.zeros(env.num_envs, dtype=torch.long)
            self._seen = env.reset()[0]

        def get_observations(self):
            return TensorDict({"policy": torch.from_numpy(self._seen)}, batch_size=[self.num_envs])

        def step(self, actions):
            self._seen, rewards, terminations, truncations, _ = env.step(actions.numpy())
            over = torch.from_numpy(terminations | truncations)
            self.episode_length_buf = torch.where(over, 0, self.episode_length_buf + 1)
            extras = {"time_outs": torch.from_numpy(truncations)}
            return self.get_observations(), torch.from_numpy(rewards), over.long(), extras

    return Adapted()


class Mean(torch.nn.Module):
    """The mean action of an rsl-rl policy, as the environment takes it."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, x):
        return FORCE * self.policy({"policy": x}).clamp(-1.0, 1.0)


def by_rsl_rl(steps=1_000_000, worlds=64):
    """Yields the same of rsl-rl's PPO."""
    from rsl_rl.runners import OnPolicyRunner

    torch.manual_seed(0)
    env = ws.gymnasium_env(SYSTEM, worlds, limit=HORIZON, scale=FORCE, autoreset="same_step", seed=1)
    net = {"class_name": "MLPModel", "hidden_dims": list(HIDDEN), "activation": "elu"}
    spread = {"class_name": "GaussianDistribution", "init_std": 1.0}
    settings = {
        "num_steps_per_env": HORIZON,
        "save_interval": 1 << 30,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**net, "distribution_cfg": spread},
        "critic": net,
        "algorithm": {"class_name": "PPO", "entropy_coef": 0.0},
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table at every rollout
        runner = OnPolicyRunner(adapted_for_rsl_rl(env), settings)
    seconds, rounds = 0.0, max(1, steps // (8 * worlds * HORIZON))
    for part in range(1, 9):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(rounds)
        seconds += time.perf_counter() - start
        yield part * rounds * worlds * HORIZON, seconds, tried(Mean(runner.alg.get_policy()))


LIBRARIES = {"sb3": by_ppo, "rsl-rl": by_rsl_rl}


def main(library="sb3", **options):
    """Prints both courses, and returns their last lines."""
    last = {}
    for name, course in (("flow C", by_gradient), ("PPO", LIBRARIES[library])):
        print(f"{name:8} {'steps':>10} {'seconds':>9} {'cost':>8}")
        for steps, seconds, cost in course(**options.get(name, {})):
            print(f"{'':8} {steps:10} {seconds:9.1f} {cost:8.4f}", flush=True)
            last[name] = (steps, seconds, cost)
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=LIBRARIES, default="sb3", help="whose PPO (default: sb3)")
    torch.set_num_threads(1)
    main(parser.parse_args().library)

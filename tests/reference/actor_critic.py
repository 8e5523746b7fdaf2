"""One gradient of a short-horizon actor-critic in plain torch, world by world and step by step.

The loss is minus the discounted rewards of all pieces and what the target critic says of their last states,
per step of a world (Xu et al., ICLR 2022). Targets of the critic are the weighted mean of all n-step returns:

    G_i = (1 - lambda) sum_{n=1}^{N-1} lambda^(n-1) G_i^(n) + lambda^(N-1) G_i^(N)
    G_i^(n) = sum_{k<n} gamma^k r_{i+k} + gamma^n V'(x_{i+n})

with N steps left of the piece, and V' = 0 behind a failure.
"""


def through(x, is_open, decay=1.0):
    """The values of x, with a gradient only through an open edge, times the decay."""
    return decay * x + (1 - decay) * x.detach() if is_open else x.detach()


def rollout(step, policy, task, x0, ages, noise, fresh, flow, decay):
    """Pieces of every world: (rewards, last state, failed) and the states seen, in the order of time.

    Args:
        step: (1, n), (1, m) -> (1, n).
        policy: (1, n), (1, m) -> (1, m).
        task: With reward, fallen, episode_steps.
        x0: (nworld, n).
        ages: (nworld,) steps of the episodes so far.
        noise: (horizon, nworld, m).
        fresh: (horizon, nworld, n).
        flow: R, M, N or S.
        decay: Of what crosses the physics edge.
    """
    physics, network = flow in "RM", flow in "RN"
    worlds = []
    for w in range(x0.shape[0]):
        x, age = x0[w : w + 1], int(ages[w])
        pieces, rewards, states = [], [], []
        for t in range(noise.shape[0]):
            u = policy(through(x, network), noise[t, w : w + 1])
            rewards.append(task.reward(x, u)[0])
            states.append(x.detach()[0])
            x = step(through(x, physics, decay), u)
            age += 1
            failed = bool(task.fallen(x)[0])
            if failed or age >= task.episode_steps or t == noise.shape[0] - 1:
                pieces.append((rewards, x, failed))
                rewards = []
            if failed or age >= task.episode_steps:
                x, age = fresh[t, w : w + 1], 0
        worlds.append((pieces, states, x.detach()[0], age))
    return worlds


def actor_loss(worlds, value, gamma, steps):
    """The actor's loss; `value` maps states (1, n) to (1,)."""
    total = 0.0
    for pieces, *_ in worlds:
        for rewards, last, failed in pieces:
            for k, reward in enumerate(rewards):
                total = total - gamma**k * reward
            if not failed:
                total = total - gamma ** len(rewards) * value(last)[0]
    return total / steps


def targets(worlds, value, gamma, trace):
    """Targets of the critic, a list a world."""
    found = []
    for pieces, states, *_ in worlds:
        own, t = [], 0
        for rewards, last, failed in pieces:
            n = len(rewards)
            ahead = [
                *(float(value(x.unsqueeze(0))) for x in states[t + 1 : t + n]),
                0.0 if failed else float(value(last.detach())),
            ]
            r = [float(reward.detach()) for reward in rewards]
            for i in range(n):
                left = n - i
                steps = [
                    sum(gamma**k * r[i + k] for k in range(m)) + gamma**m * ahead[i + m - 1]
                    for m in range(1, left + 1)
                ]
                mean = (1 - trace) * sum(trace ** (m - 1) * steps[m - 1] for m in range(1, left))
                own.append(mean + trace ** (left - 1) * steps[-1])
            t += n
        found.append(own)
    return found

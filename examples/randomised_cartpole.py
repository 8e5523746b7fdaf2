"""Domain randomisation: a policy for carts whose poles it does not know, beside one for the nominal cart.

    python examples/randomised_cartpole.py

Both are trained on the same initial states with the same number of updates. One always meets the nominal
pole; of the other every world has a mass and a length of its own, drawn anew for every update
(`ws.rollout(..., parameters=...)`, one value a world). Then both meet poles that neither was told of.
"""

import torch

import warp_sims as ws

SYSTEM = ws.CartPole(poles=1, dt=0.02)
HORIZON, WORLDS, UPDATES = 100, 64, 1500


def drawn(n, low, high, draw):
    """Masses and lengths of `n` poles, as factors of the nominal ones, uniform in the logarithm."""
    bounds = torch.tensor([low, high]).log()
    factors = (bounds[0] + (bounds[1] - bounds[0]) * torch.rand(2, n, generator=draw)).exp()
    return {"pole_mass": SYSTEM.pole_mass * factors[0], "pole_length": SYSTEM.pole_length * factors[1]}


def loss_of(states, controls):
    """Poles upright and slow over the last third, the cart near the middle."""
    x, v, q, w = states[2 * HORIZON // 3 :].unbind(-1)
    return (1 - q.cos() + 0.02 * w.square() + 0.05 * x.square() + 0.01 * v.square()).mean()


def trained(randomised, updates=UPDATES, seed=0):
    draw = torch.Generator().manual_seed(seed)
    policy = ws.MLP(SYSTEM.state_size, (32, 32), SYSTEM.control_size)
    policy.reset_parameters(seed=seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    states = SYSTEM.initial_states(1024, seed=seed)
    for _ in range(updates):
        x0 = states[torch.randint(len(states), (WORLDS,), generator=draw)]
        given = drawn(WORLDS, 0.5, 2.0, draw) if randomised else None
        out = ws.rollout(SYSTEM, policy, x0, horizon=HORIZON, loss=loss_of, parameters=given)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return policy


@torch.no_grad()
def tried(policy, low, high):
    """Loss of a policy on 512 poles it has not met."""
    given = drawn(512, low, high, torch.Generator().manual_seed(99))
    x0 = SYSTEM.initial_states(512, seed=7, split="test")
    return float(ws.rollout(SYSTEM, policy, x0, horizon=HORIZON, loss=loss_of, parameters=given).loss)


def main(updates=UPDATES, seeds=(0, 1, 2)):
    """Returns the losses (nominal poles, unknown poles) of each policy, means over the seeds."""
    found = {}
    for name, randomised in (("nominal", False), ("randomised", True)):
        policies = [trained(randomised, updates, seed) for seed in seeds]
        ranges = ((0.999, 1.001), (0.5, 2.0))
        found[name] = [sum(tried(p, *r) for p in policies) / len(policies) for r in ranges]
        print(
            f"trained on {name} poles: loss {found[name][0]:.4f} there, {found[name][1]:.4f} on unknown ones"
        )
    return found


if __name__ == "__main__":
    main()

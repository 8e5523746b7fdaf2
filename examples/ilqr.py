"""Iterative LQR on a simulator's Jacobians: swings the pole of a cart up and holds it, without a network.

    python examples/ilqr.py

The controls u_0 ... u_{T-1} of one world minimise a sum of quadratic costs of states and controls. Each
iteration linearises the step at all points of the trajectory at once (`ws.linearize`), goes back over them

    Q_x  = c_x + A' V_x          Q_u  = c_u + B' V_x
    Q_xx = c_xx + A' V_xx A      Q_ux = B' V_xx A      Q_uu = c_uu + B' V_xx B + mu

    k = -Q_uu^-1 Q_u     K = -Q_uu^-1 Q_ux     V_x = Q_x + K' Q_uu k + K' Q_u + Q_ux' k
    V_xx = Q_xx + K' Q_uu K + K' Q_ux + Q_ux' K

and goes forward again with u + a k + K (x - x_old), for several step lengths a in one batch of worlds.

Source: Tassa, Erez and Todorov, "Synthesis and stabilization of complex behaviors through online trajectory
optimization", IROS 2012, with second derivatives of the step left out.
"""

import math

import torch

import warp_sims as ws

HORIZON = 150
LENGTHS = 0.5 ** torch.arange(12, dtype=torch.float64)
"""Step lengths that are tried, all in one batch."""
RUNNING = torch.tensor([0.1, 0.1, 1.0, 0.1], dtype=torch.float64)
"""Weights of position, velocity, angle and rate at every step."""
FINAL = torch.tensor([10.0, 10.0, 100.0, 10.0], dtype=torch.float64)
CONTROL = 1e-3
LARGEST = 30.0
"""Largest force [N] in the forward pass, so that no step length throws the cart away."""


def costs_of(states, controls):
    """Cost of trajectories (T + 1, n, 4) and (T, n, 1), one a world: quadratic in the angle from upright."""
    running = 0.5 * (RUNNING * states[:-1].square()).sum((0, 2))
    effort = 0.5 * CONTROL * controls.square().sum((0, 2))
    return running + effort + 0.5 * (FINAL * states[-1].square()).sum(1)


def gains(system, states, controls, mu):
    """k (T, 1) and K (T, 1, 4) of the backward sweep; None where Q_uu is not positive."""
    a, b = ws.linearize(system, states[:-1], controls)
    v_x, v_xx = FINAL * states[-1], torch.diag(FINAL)
    open_loop, feedback = torch.empty_like(controls), torch.empty(*controls.shape, states.shape[1]).double()
    for t in reversed(range(controls.shape[0])):
        q_x = RUNNING * states[t] + a[t].T @ v_x
        q_u = CONTROL * controls[t] + b[t].T @ v_x
        q_xx = torch.diag(RUNNING) + a[t].T @ v_xx @ a[t]
        q_ux = b[t].T @ v_xx @ a[t]
        q_uu = CONTROL + b[t].T @ v_xx @ b[t] + mu
        if q_uu <= 0:
            return None
        open_loop[t], feedback[t] = -q_u / q_uu[0], -q_ux / q_uu
        k, gain = open_loop[t], feedback[t]
        v_x = q_x + gain.T @ (q_uu @ k) + gain.T @ q_u + q_ux.T @ k
        v_xx = q_xx + gain.T @ q_uu @ gain + gain.T @ q_ux + q_ux.T @ gain
        v_xx = 0.5 * (v_xx + v_xx.T)
    return open_loop, feedback


def forward(system, states, controls, open_loop, feedback):
    """Trajectories (T + 1, lengths, 4) and controls (T, lengths, 1) of all step lengths."""
    x = states[0].expand(len(LENGTHS), -1)
    xs, us = [x], []
    for t in range(controls.shape[0]):
        u = controls[t] + LENGTHS[:, None] * open_loop[t] + (x - states[t]) @ feedback[t].T
        u = u.clamp(-LARGEST, LARGEST)
        x = ws.step(system, x, u)
        xs.append(x)
        us.append(u)
    return torch.stack(xs), torch.stack(us)


def solve(system, iterations=150):
    """States (T + 1, 4), controls (T, 1) and the cost after each iteration, from hanging at rest."""
    x0 = torch.tensor([[0.0, 0.0, math.pi, 0.0]], dtype=torch.float64)
    # a little push, or the pole would not know which way to go
    controls = 0.1 * torch.sin(torch.arange(HORIZON, dtype=torch.float64) * 0.1).view(-1, 1)
    states = ws.simulate(system, x0, controls.unsqueeze(1))[:, 0]
    costs, mu = [float(costs_of(states.unsqueeze(1), controls.unsqueeze(1)))], 1.0
    for _ in range(iterations):
        found = gains(system, states, controls, mu)
        if found is not None:
            tried, given = forward(system, states, controls, *found)
            each = costs_of(tried, given)
            best = int(each.argmin())
            if each[best] < costs[-1]:
                done = costs[-1] - float(each[best]) < 1e-9 * costs[-1]
                states, controls, mu = tried[:, best], given[:, best], max(0.5 * mu, 1e-9)
                costs.append(float(each[best]))
                if done:
                    break
                continue
        mu *= 4.0
        if mu > 1e9:
            break
    return states, controls, costs


def main():
    states, controls, costs = solve(ws.CartPole(poles=1, dt=0.02))
    print(f"cost {costs[0]:.1f} -> {costs[-1]:.3f} in {len(costs) - 1} iterations")
    print(
        f"angle [rad] {states[0, 2]:.3f} -> {states[-1, 2]:.4f}, largest force {controls.abs().max():.1f} N"
    )


if __name__ == "__main__":
    main()

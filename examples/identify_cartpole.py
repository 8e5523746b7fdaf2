"""System identification: the mass and the length of a cart-pole's poles from one noisy trajectory.

    python examples/identify_cartpole.py

A cart with one pole is pushed by a known force for two seconds, and its positions and angles are measured
with noise. The numbers of the physics that explain them are found by gradient descent through the simulator
(`ws.simulate(..., parameters=...)`), in short pieces: from a measured state the simulation is followed for
`PIECE` steps only, because over the whole trajectory errors grow until the loss has many minima (multiple
shooting with fixed starts).
"""

import torch

import warp_sims as ws

PIECE, PIECES = 10, 20
NOISE = 2e-3
"""Standard deviation of every measured component (m, m/s, rad, rad/s)."""
TRUE = {"pole_mass": 0.25, "pole_length": 0.35}
GUESS = {"pole_mass": 0.1, "pole_length": 0.5}


def measured(system, seed):
    """Noisy states (PIECES * PIECE + 1, 1, 4) and the forces that led to them."""
    draw = torch.Generator().manual_seed(seed)
    controls = 8.0 * torch.randn(PIECES * PIECE, 1, 1, generator=draw, dtype=torch.float64)
    x0 = torch.tensor([[0.0, 0.0, 2.5, 0.0]], dtype=torch.float64)
    true = {name: torch.tensor(value, dtype=torch.float64) for name, value in TRUE.items()}
    states = ws.simulate(system, x0, controls, parameters=true)
    return states + NOISE * torch.randn(states.shape, generator=draw, dtype=torch.float64), controls


def identify(seed=0, iterations=200):
    """Returns the numbers that explain a trajectory, by name."""
    system = ws.CartPole(poles=1)
    states, controls = measured(system, seed)
    starts, ends = states[:-1:PIECE, 0], states[1:].view(PIECES, PIECE, 4).transpose(0, 1)
    pushes = controls.view(PIECES, PIECE, 1).transpose(0, 1)
    logs = {name: torch.tensor(v, dtype=torch.float64).log().requires_grad_() for name, v in GUESS.items()}
    optimizer = torch.optim.Adam(logs.values(), lr=0.03)
    for i in range(iterations):
        # logarithms keep masses and lengths above 0
        numbers = {name: q.exp() for name, q in logs.items()}
        found = ws.simulate(system, starts, pushes, parameters=numbers)
        loss = (found[1:] - ends).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 40 == 0 or i == iterations - 1:
            shown = ", ".join(f"{name} {q.detach():.4f}" for name, q in numbers.items())
            print(f"{i:4}  error {float(loss.detach().sqrt()):.5f}  {shown}")
    return {name: float(q.detach().exp()) for name, q in logs.items()}


if __name__ == "__main__":
    found = identify()
    for name, value in TRUE.items():
        print(f"{name}: {found[name]:.4f}, true {value}, off by {abs(found[name] / value - 1):.2%}")

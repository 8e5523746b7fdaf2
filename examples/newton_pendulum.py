"""A policy trained through a model of Newton's: a double pendulum, driven at its first joint, comes to rest.

    pip install newton                    # 1.8 or later; float32, on a CPU too
    python examples/newton_pendulum.py

State [q_1, q_2, qd_1, qd_2] in generalised coordinates [rad, rad/s], control [torque] in N m, held for four
substeps of SolverFeatherstone. The solver keeps its matrices on itself, and a tape reads them again: one
solver object for every substep, or the gradients are wrong without a word.
"""

import newton
import torch
import warp as wp

import warp_sims as ws

WORLDS, SUBSTEPS, DT = 8, 4, 0.02


def make_model(worlds: int) -> newton.Model:
    """Two links of 0.5 m and 1 kg each, hanging, joints about the y axis."""
    link = newton.ModelBuilder()
    bodies = [link.add_link(mass=1.0, inertia=wp.mat33(wp.diag(wp.vec3(0.02)))) for _ in range(2)]
    joints = [
        link.add_joint_revolute(
            parent=parent,
            child=child,
            axis=(0.0, 1.0, 0.0),
            parent_xform=wp.transform((0.0, 0.0, -0.25 if parent >= 0 else 0.0), wp.quat_identity()),
            child_xform=wp.transform((0.0, 0.0, 0.25), wp.quat_identity()),
        )
        for parent, child in zip((-1, bodies[0]), bodies)
    ]
    link.add_articulation(joints)
    builder = newton.ModelBuilder()
    builder.replicate(link, worlds)
    return builder.finalize(requires_grad=True)


def make_system(worlds: int = WORLDS, one_solver: bool = False) -> ws.TapeSystem:
    """The model as a system for `worlds` worlds; `one_solver` makes the mistake named above."""
    model = make_model(worlds)
    states = [model.state(requires_grad=True) for _ in range(SUBSTEPS + 1)]
    solvers = [newton.solvers.SolverFeatherstone(model) for _ in range(SUBSTEPS)]
    if one_solver:
        solvers = solvers[:1] * SUBSTEPS
    control = model.control(requires_grad=True)
    torque = wp.zeros(worlds, dtype=float, requires_grad=True)

    def launch() -> None:
        wp.launch(first_joint, dim=worlds, inputs=[torque], outputs=[control.joint_f])
        for i, solver in enumerate(solvers):
            states[i].clear_forces()
            solver.step(states[i], states[i + 1], control, None, DT / SUBSTEPS)

    def cost(x: torch.Tensor) -> torch.Tensor:
        return x[:, :2].square().sum(1) + 0.1 * x[:, 2:].square().sum(1)

    first, last = states[0], states[-1]
    return ws.TapeSystem(
        launch,
        inputs=[first.joint_q, first.joint_qd],
        controls=[torque],
        outputs=[last.joint_q, last.joint_qd],
        state_size=4,
        control_size=1,
        loss=cost,
    )


@wp.kernel
def first_joint(torque: wp.array(dtype=float), joint_f: wp.array(dtype=float)):
    world = wp.tid()
    joint_f[2 * world] = torque[world]


def main(updates: int = 30, flow: str = "combined") -> list[float]:
    """Trains, and returns the loss of each update."""
    system = make_system()
    policy = ws.MLP(4, (32,), 1)
    policy.reset_parameters(seed=1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-2)
    x0 = torch.randn(WORLDS, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for update in range(updates):
        optimizer.zero_grad()
        out = ws.rollout(system, policy, x0, horizon=40, flow=flow, loss="running")
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        if update % 5 == 0 or update == updates - 1:
            print(f"update {update}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()

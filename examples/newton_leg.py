"""A policy trained through contact in a model of Newton's: a leg pushes itself off the ground.

    pip install newton                    # 1.8 or later; float32, on a CPU too
    python examples/newton_leg.py

State [body, foot, their rates]: height of the body [m], height of the foot's centre above the body's [m],
rates [m/s]; control [force] in N, which drives foot and body apart, held for eight substeps of
SolverFeatherstone. A force between the two does not move their common centre: what lifts the body is the
contact of foot and ground, and the gradient goes through it. The body is to be at 0.8 m after 0.8 s, from
0.45 to 0.55 m.
"""

import newton
import torch
import warp as wp

import warp_sims as ws

WORLDS, SUBSTEPS, DT = 8, 8, 0.02
REST, RADIUS, TARGET = 0.45, 0.05, 0.8
"""Length of the unloaded spring, radius of the foot and the height to reach [m]."""


def make_model(worlds: int) -> newton.Model:
    """A body of 1 kg that slides up and down, and below it a foot of 0.2 kg on a spring, above the ground."""
    leg = newton.ModelBuilder()
    inertia = wp.mat33(wp.diag(wp.vec3(0.02)))
    body, foot = leg.add_link(mass=1.0, inertia=inertia), leg.add_link(mass=0.2, inertia=inertia)
    # no damping (kd): its force begins with a jump, whose moment no derivative of the steps contains; the gap
    # is how far from the ground a pair still counts as one that may touch: everywhere
    surface = newton.ModelBuilder.ShapeConfig(density=0.0, ke=2e3, kd=0.0, kf=0.0, mu=0.0, gap=10.0)
    leg.add_shape_sphere(foot, radius=RADIUS, cfg=surface)
    up = {"axis": (0.0, 0.0, 1.0)}
    spring = {"stiffness": 200.0, "damping": 2.0, "rest_q": -REST}
    joints = [
        leg.add_joint_prismatic(parent=-1, child=body, **up),
        leg.add_joint_prismatic(parent=body, child=foot, **up, **spring),
    ]
    leg.add_articulation(joints)
    builder = newton.ModelBuilder()
    builder.replicate(leg, worlds)
    builder.add_ground_plane(cfg=surface)
    return builder.finalize(requires_grad=True)


def make_contacts(model: newton.Model) -> newton.Contacts:
    """The pairs of foot and ground, found once: the foot does not turn, and the solver measures their
    distance itself at every substep. Where bodies turn, `collide` belongs into the launches.
    """
    pipeline = newton.CollisionPipeline(model, broad_phase="explicit", requires_grad=True)
    contacts = pipeline.contacts()
    pipeline.collide(model.state(), contacts)
    return contacts


def make_system(worlds: int = WORLDS) -> ws.TapeSystem:
    """The model as a system for `worlds` worlds."""
    model = make_model(worlds)
    contacts = make_contacts(model)
    states = [model.state(requires_grad=True) for _ in range(SUBSTEPS + 1)]
    # what a solver keeps is read again by the tape: one for every substep
    solvers = [newton.solvers.SolverFeatherstone(model) for _ in range(SUBSTEPS)]
    control = model.control(requires_grad=True)
    force = wp.zeros(worlds, dtype=float, requires_grad=True)

    def launch() -> None:
        wp.launch(apart, dim=worlds, inputs=[force], outputs=[control.joint_f])
        for i, solver in enumerate(solvers):
            states[i].clear_forces()
            solver.step(states[i], states[i + 1], control, contacts, DT / SUBSTEPS)

    first, last = states[0], states[-1]
    return ws.TapeSystem(
        launch,
        inputs=[first.joint_q, first.joint_qd],
        controls=[force],
        outputs=[last.joint_q, last.joint_qd],
        state_size=4,
        control_size=1,
        loss=lambda x: (x[:, 0] - TARGET).square(),
        initial_states=initial_states,
    )


@wp.kernel
def apart(force: wp.array(dtype=float), joint_f: wp.array(dtype=float)):
    world = wp.tid()
    joint_f[2 * world + 1] = -force[world]


def initial_states(n: int, seed: int = 0, split: str = "train") -> torch.Tensor:
    """Legs at rest, the spring unloaded, the foot from 5 cm above the ground to 5 cm in it: (n, 4)."""
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    x = torch.zeros(n, 4)
    x[:, 0] = REST + 0.1 * torch.rand(n, generator=generator)
    x[:, 1] = -REST
    return x


def main(updates: int = 30, flow: str = "regular") -> list[float]:
    """Trains, and returns the loss of each update."""
    system = make_system()
    policy = ws.MLP(4, (32,), 1, bound=(-60.0, 60.0))
    policy.reset_parameters(seed=1, zero_last=True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-2)
    x0 = system.initial_states(WORLDS)
    losses = []
    for update in range(updates):
        optimizer.zero_grad()
        out = ws.rollout(system, policy, x0, horizon=40, flow=flow)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(out.loss.item())
        if update % 5 == 0 or update == updates - 1:
            body = out.states[-1, :, 0].detach()
            print(
                f"update {update}: loss {losses[-1]:.4f}, body at {float(body.min()):.2f} to "
                f"{float(body.max()):.2f} m"
            )
    return losses


if __name__ == "__main__":
    main()

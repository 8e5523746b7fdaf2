"""Models of Newton's as systems, where newton is installed: examples/newton_pendulum.py and newton_leg.py."""

import runpy
from pathlib import Path

import pytest
import torch
import warp as wp
from cases import Evaluated, make_net

import warp_sims as ws

newton = pytest.importorskip("newton")
EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = runpy.run_path(str(EXAMPLES / "newton_pendulum.py"))
LEG = runpy.run_path(str(EXAMPLES / "newton_leg.py"))


def test_gradient_of_a_rollout():
    """Against central differences along the gradient, in float32."""
    system, net = EXAMPLE["make_system"](3), make_net(ws.CartPole(poles=1), dtype=torch.float32, gain=1.0)
    policy = Evaluated(net)
    x0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(x):
        return ws.rollout(system, policy, x, horizon=5, flow="R", loss="running").loss

    (gradient,) = torch.autograd.grad(loss(x0), x0)
    along = gradient / gradient.norm()
    with torch.no_grad():
        difference = (loss(x0 + 1e-2 * along) - loss(x0 - 1e-2 * along)) / 2e-2
    # rounding of a difference of float32, and its length squared
    assert abs(float(difference / gradient.norm()) - 1.0) < 2e-3


def test_one_solver_for_all_substeps_is_refused():
    system = EXAMPLE["make_system"](2, one_solver=True)
    with pytest.raises(ValueError, match=r"TapeSystem: the gradient of step is wrong: d x_next\[\d\]"):
        ws.step(system, torch.ones(2, 4), torch.ones(2, 1))


def test_it_learns():
    losses = EXAMPLE["main"](updates=6)
    assert losses[-1] < 0.7 * losses[0]


def test_gradient_through_a_contact():
    """A foot that presses on the ground and one in the air, against central differences of the same steps, in
    float32; the derivatives of the foot's rate by heights and force are those of the contact's spring.
    """
    system = LEG["make_system"](2)
    x = torch.tensor([[0.47, -0.44, 0.1, -0.2], [0.8, -0.5, 0.3, 0.1]])
    u = torch.tensor([[8.0], [-5.0]])
    jac = torch.cat(ws.linearize(system, x, u), dim=2)
    columns = []
    for j in range(5):
        h = 1e-3 if j < 4 else 1e-2
        up, down = (torch.cat((x, u), 1) for _ in range(2))
        up[:, j] += h
        down[:, j] -= h
        columns.append(
            (ws.step(system, *up.split([4, 1], 1)) - ws.step(system, *down.split([4, 1], 1))) / (2 * h)
        )
    difference = torch.stack(columns, dim=2)
    # rounding of a difference of float32
    largest = difference.abs().amax(dim=2, keepdim=True)
    assert float(((jac - difference).abs() / largest).max()) < 2e-3
    assert float(jac[0, 3, 0]) < -20.0 and abs(float(jac[1, 3, 0])) < 1e-6


def test_a_foot_near_the_edge_of_its_contact_is_not_refused():
    """The gradient is right; a difference of 3 mm reaches across the edge, one of 1 mm does not."""
    x = torch.tensor([[0.5, -0.46, 0.0, 0.0], [0.6, -0.55, 0.1, -0.3]])
    ws.step(LEG["make_system"](2), x, torch.zeros(2, 1))


def test_a_rollout_through_a_touchdown():
    """Central differences along the gradient, of a rollout in which feet meet the ground and leave it."""
    system, net = LEG["make_system"](3), make_net(ws.CartPole(poles=1), dtype=torch.float32, gain=1.0)
    x0 = system.initial_states(3) + torch.tensor([0.1, 0.0, 0.0, 0.0])

    def out(x):
        return ws.rollout(system, Evaluated(net), x, horizon=14, flow="R", loss="running")

    start = x0.clone().requires_grad_()
    whole = out(start)
    foot = whole.states[:, :, :2].sum(2) - LEG["RADIUS"]
    assert bool((foot[0] > 0.0).all()) and bool((foot[-1] < 0.0).any())
    (gradient,) = torch.autograd.grad(whole.loss, start)
    along = gradient / gradient.norm()
    with torch.no_grad():
        difference = (out(x0 + 3e-3 * along).loss - out(x0 - 3e-3 * along).loss) / 6e-3
    # what a touchdown within a substep leaves
    assert abs(float(difference / gradient.norm()) - 1.0) < 1e-2


def test_a_solver_that_does_not_differentiate_is_refused():
    """SolverXPBD steps the same leg, but its adjoint is not that of its step."""
    model, steps = LEG["make_model"](2), LEG["SUBSTEPS"]
    contacts, states = (
        LEG["make_contacts"](model),
        [model.state(requires_grad=True) for _ in range(steps + 1)],
    )
    solvers = [newton.solvers.SolverXPBD(model) for _ in range(steps)]
    control, force = model.control(requires_grad=True), wp.zeros(2, dtype=float, requires_grad=True)
    given, led = (
        [wp.zeros_like(a, requires_grad=True) for a in (states[0].joint_q, states[0].joint_qd)]
        for _ in range(2)
    )

    def launch():
        newton.eval_fk(model, *given, states[0])
        wp.launch(LEG["apart"], dim=2, inputs=[force], outputs=[control.joint_f])
        for i, solver in enumerate(solvers):
            states[i].clear_forces()
            solver.step(states[i], states[i + 1], control, contacts, LEG["DT"] / steps)
        newton.eval_ik(model, states[-1], *led)

    system = ws.TapeSystem(launch, inputs=given, controls=[force], outputs=led, state_size=4, control_size=1)
    x = torch.tensor([[0.5, -0.455, 0.0, 0.0], [0.6, -0.56, 0.1, -0.3]])
    with pytest.raises(ValueError, match="TapeSystem: the gradient of step is wrong"):
        ws.step(system, x, torch.tensor([[20.0], [-3.0]]))


def test_a_leg_learns_through_its_contact():
    losses = LEG["main"](updates=9)
    assert losses[-1] < 0.2 * losses[0]

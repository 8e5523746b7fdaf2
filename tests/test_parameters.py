"""`parameters=`: numbers of the physics as tensors, against autograd through the torch references."""

import dataclasses
import functools
import runpy
from pathlib import Path

import pytest
import torch
import warp as wp
from cases import (
    FLOWS,
    ROADS,
    SEED,
    assert_close,
    make_cotangents,
    make_net,
    make_states,
    objective_of,
    on_road,
)
from own_systems import Pendulum, pendulum_functions
from reference import cartpole, guidance, pendulum, quantum
from reference import rollout as oracle
from test_estimators import Clip
from test_generated_adjoints import Bare, BareCart

import warp_sims as ws

# Relative to the norm of each tensor, over 12 steps with strong feedback: both sides round at every step.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}
HORIZON, WORLDS = 12, 11  # one block of worlds is full, one is not

CART = ws.CartPole(poles=2, dt=0.05)
HERD = ws.GuidanceByRepulsion(drivers=2, evaders=3)
WAVE = ws.QuantumControl(points=8)


def cart_step(x, u, *, dt=CART.dt, pole_length=CART.pole_length, **numbers):
    return cartpole.step(x, u, dt=dt, length=pole_length, **numbers)


swing = functools.partial(pendulum.step, **{f.name: f.default for f in dataclasses.fields(Pendulum)})


HERD_NUMBERS = ("driver_drag", "driver_repulsion", "evader_drag", "evader_repulsion")
SYSTEMS = {
    "cartpole": (CART, cart_step, ("dt", "gravity", "pole_mass", "total_mass", "pole_length")),
    "guidance": (
        HERD,
        guidance.step,
        ("dt", *HERD_NUMBERS, "flocking", "flocking_length", "softening"),
    ),
    "quantum": (WAVE, quantum.step, ("dt", "length")),
    "generated for a hand-written step": (
        Pendulum(),
        swing,
        ("dt", "gravity", "mass", "length", "damping"),
    ),
    "all generated": (Bare(), swing, ("dt", "gravity", "mass", "length", "damping")),
}


def numbers_of(system, names, kind, dtype=torch.float64):
    """Numbers near the system's own: one for all worlds, one a world, or both by turns."""
    draw, found = torch.Generator().manual_seed(SEED + 5), {}
    for i, name in enumerate(names):
        shape = () if kind == "one" or (kind == "mixed" and i % 2) else (WORLDS,)
        value = getattr(system, name)
        q = value * (1 + 0.1 * torch.rand(shape, generator=draw, dtype=torch.float64))
        found[name] = q.to(dtype).requires_grad_()
    return found


def with_numbers(step, numbers):
    """A step of rows, each with its own numbers."""
    names = list(numbers)
    axes = tuple(0 if q.ndim else None for q in numbers.values())

    def row(x, u, *given):
        return step(x[None], u[None], **dict(zip(names, given)))[0]

    mapped = torch.func.vmap(row, in_dims=(0, 0, *axes))
    return lambda x, u: mapped(x, u, *numbers.values())


def expected_numbers(step, policy, x0, flow, objective, numbers, **options):
    """Gradients of the numbers by autograd through the unrolled reference, edge by edge."""
    if flow == "C":
        base, check = (
            expected_numbers(step, policy, x0, letter, objective, numbers, **options) for letter in "MR"
        )
        return {name: oracle.combine(base[name], check[name]) for name in numbers}
    edges, stepped = oracle.schedule(flow, HORIZON, options.get("window")), with_numbers(step, numbers)
    limit = options.get("clip_cotangent", torch.inf)
    states, controls = oracle.rollout(
        lambda x, u: Clip.apply(stepped(x, u), limit), policy, x0, edges, options.get("decay", 1.0)
    )
    found = torch.autograd.grad(objective(states, controls), list(numbers.values()))
    return dict(zip(numbers, found))


def found_numbers(system, policy, x0, flow, loss, cotangents, numbers, **options):
    out = ws.rollout(system, policy, x0, horizon=HORIZON, flow=flow, loss=loss, parameters=numbers, **options)
    outputs, adjoints = (out.states, out.controls, out.loss), cotangents
    if out.loss is None:
        outputs, adjoints = outputs[:2], cotangents[:2]
    given = list(numbers.values())
    parameters = [q for q in policy.parameters() if q.requires_grad]
    found = torch.autograd.grad(outputs, [*given, *parameters], adjoints)
    return dict(zip(numbers, found)), list(found[len(given) :])


def own_loss(states, controls):
    return states[1:].square().mean() + (states[-1] * states[0].sin()).mean() + controls.square().mean()


def compared(system, step, road, kind, flow, names, dtype=torch.float64, **options):
    net, x0 = make_net(system, gain=1.0), make_states(system, WORLDS)
    numbers, cotangents = numbers_of(system, names, kind), make_cotangents(system, HORIZON, WORLDS)
    objective = oracle.weighted(
        cotangents.states, cotangents.controls, objective_of(system, own_loss), cotangents.loss
    )
    given = {k: v for k, v in options.items() if k != "checkpoint_every"}
    expected = expected_numbers(step, net, x0, flow, objective, numbers, **given)
    net, x0, cotangents = net.to(dtype), x0.to(dtype), [c.to(dtype) for c in cotangents]
    numbers = {name: q.detach().to(dtype).requires_grad_() for name, q in numbers.items()}
    found, _ = found_numbers(system, on_road(road, net), x0, flow, own_loss, cotangents, numbers, **options)
    assert_close(found, expected, TOLERANCE[dtype])
    return found


WAYS = {
    "plain": {},
    "decay and window": {"decay": 0.7, "window": 5},
    "segments": {"checkpoint_every": 5},
    "clipped": {"clip_cotangent": 1.0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("case", SYSTEMS)
def test_gradients(case, road, flow, way):
    system, step, names = SYSTEMS[case]
    for kind in ("one", "each", "mixed"):
        compared(system, step, road, kind, flow, names, **WAYS[way])


def test_clipping_changes_them():
    """Else a comparison of clipped ones proved nothing."""
    for system, step, names in SYSTEMS.values():
        for flow in "RM":
            found, free = (
                compared(system, step, "fused", "one", flow, names, **WAYS[w]) for w in ("clipped", "plain")
            )
            assert any(abs(found[n] - free[n]) > 1e-3 * abs(free[n]) for n in names), (system, flow)


def test_flows_differ():
    """Where two flows agree, comparing each with its reference would prove little."""
    found = [compared(CART, cart_step, "fused", "one", flow, ("pole_mass",))["pole_mass"] for flow in "RMNS"]
    for i, a in enumerate(found):
        assert all(abs(a - b) > 1e-3 * abs(b) for b in found[:i])


@pytest.mark.parametrize("flow", ["R", "M"])
@pytest.mark.parametrize("case", ["cartpole", "guidance", "quantum"])
def test_single_precision(case, flow):
    system, step, names = SYSTEMS[case]
    compared(system, step, "fused", "each", flow, names, torch.float32)


@functools.cache
def wrong_functions(dtype):
    """Right by state and control, wrong by a number: Warp loses the first turns of a long loop."""
    State = wp.types.vector(length=1, dtype=dtype)

    @wp.struct
    class Params:
        rate: dtype

    @wp.func
    def step(x: State, u: State, p: Params) -> State:
        growth = p.rate
        for _ in range(9):
            growth = growth * p.rate + dtype(0.1) * wp.sin(growth)
        return State(x[0] + u[0] + growth)

    @wp.func
    def step_vjp(x: State, u: State, p: Params, adj: State):
        return adj, adj

    return ws.DeviceFunctions(Params, State, State, step, step_vjp)


@dataclasses.dataclass(frozen=True)
class Growing(ws.System):
    rate: float = 0.9
    state_size = 1
    control_size = 1

    def device_functions(self, dtype):
        return wrong_functions(dtype)


def test_a_wrong_generated_cotangent_is_refused():
    x, system = torch.ones(2, 1), Growing()
    ws.step(system, x, x)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Growing: .* d x_next\[0\] / d rate is .* by Warp's adjoint"):
            ws.step(system, x, x, parameters={"rate": 0.8})


@functools.cache
def with_own_vjp(dtype, right):
    """The pendulum with the cotangent of one number by hand."""
    functions = pendulum_functions(dtype)
    State, Control, Params = functions.State, functions.Control, functions.Params
    Values = wp.types.vector(length=1, dtype=dtype)

    @wp.func
    def vjp(x: State, u: Control, p: Params, adj: State) -> Values:
        s = adj[1] + p.dt * adj[0]
        inertia = p.mass * p.length * p.length
        return Values(-dtype(right) * p.dt * s * x[1] / inertia)

    return functions._replace(parameters=ws.ParameterFunctions(("damping",), Values, vjp))


@dataclasses.dataclass(frozen=True)
class Damped(Pendulum):
    right: float = 1.0

    def device_functions(self, dtype):
        return with_own_vjp(dtype, self.right)


def test_cotangents_by_hand_and_their_check():
    compared(Damped(), swing, "fused", "each", "R", ("damping",))
    assert ws.check(Damped(), parts=("functions",)).agrees
    report = ws.check(Damped(right=1.001), parts=("functions",))
    assert not report.agrees and "parameters_vjp" in str(report)
    assert all("damping" in str(wrong) for wrong in report.disagreements)


def test_ensembles():
    """Every member is given the numbers; their gradients are compared before they are summed."""
    x0, numbers = make_states(CART, WORLDS), numbers_of(CART, ("pole_mass", "pole_length"), "mixed")
    nets = [make_net(CART, seed=seed) for seed in (1, 2)]
    for flow in "RC":
        out = ws.rollout(
            CART, ws.Ensemble(nets), x0, horizon=HORIZON, flow=flow, loss="running", parameters=numbers
        )
        found = torch.autograd.grad(out.loss.sum(), list(numbers.values()))
        total = [0.0, 0.0]
        for net in nets:
            alone = ws.rollout(CART, net, x0, horizon=HORIZON, flow=flow, loss="running", parameters=numbers)
            own = torch.autograd.grad(alone.loss, list(numbers.values()))
            total = [a + b for a, b in zip(total, own)]
        for a, b in zip(found, total):
            assert_close(a, b, 1e-12)


@pytest.mark.parametrize("road", ROADS)
def test_gradient_pair(road):
    x0, numbers = make_states(CART, WORLDS), numbers_of(CART, ("pole_mass", "pole_length"), "mixed")
    numbers["total_mass"] = torch.tensor(1.2, dtype=torch.float64)  # which wants no gradient
    policy = on_road(road, make_net(CART))
    options = {"horizon": HORIZON, "loss": "running", "parameters": numbers}
    pair = ws.gradient_pair(CART, policy, x0, **options)
    wanted = [numbers["pole_mass"], numbers["pole_length"]]
    for flow, gradients in (("M", pair.base), ("R", pair.check), ("C", pair.combine())):
        out = ws.rollout(CART, policy, x0, flow=flow, **options)
        for name, expected in zip(
            ("pole_mass", "pole_length"), torch.autograd.grad(out.loss, wanted, retain_graph=True)
        ):
            assert_close(gradients[name], expected, 1e-12)
    assert "total_mass" not in pair.names
    pair.assign(policy)
    assert all(q.grad is not None for q in policy.parameters())


def test_one_number_for_all_is_the_system_with_it():
    """To the last bit: the same forms of the step run."""
    other = dataclasses.replace(CART, pole_mass=0.15)
    for dtype in (torch.float32, torch.float64):
        net, x0 = make_net(CART, dtype=dtype), make_states(CART, WORLDS, dtype)
        expected = ws.rollout(other, net, x0, horizon=HORIZON)
        found = ws.rollout(CART, net, x0, horizon=HORIZON, parameters={"pole_mass": 0.15})
        assert found.fused and all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3]))
        each = torch.full((WORLDS,), 0.15, dtype=dtype)
        found = ws.rollout(CART, net, x0, horizon=HORIZON, parameters={"pole_mass": each})
        for a, b in zip(found[:3], expected[:3]):
            assert_close(a, b, TOLERANCE[dtype])


def test_two_rollouts_alive_at_once():
    net, x0 = make_net(CART), make_states(CART, WORLDS)
    masses = [torch.tensor(m, dtype=torch.float64, requires_grad=True) for m in (0.1, 0.3)]
    alone, together = [], []
    for mass in masses:
        out = ws.rollout(CART, net, x0, horizon=HORIZON, flow="R", parameters={"pole_mass": mass})
        alone.append(torch.autograd.grad(out.loss, mass)[0])
    outs = [
        ws.rollout(CART, net, x0, horizon=HORIZON, flow="R", parameters={"pole_mass": mass})
        for mass in masses
    ]
    together = [torch.autograd.grad(out.loss, mass)[0] for out, mass in zip(outs, masses)]
    assert alone == together and alone[0] != alone[1]


def test_open_loop_and_transforms():
    x0, controls = make_states(CART, 3), make_cotangents(CART, 4, 3).controls
    numbers = {name: q[:3].detach() for name, q in numbers_of(CART, ("pole_mass", "dt"), "each").items()}

    def run(mass, dt):
        return ws.simulate(CART, x0, controls, parameters={"pole_mass": mass, "dt": dt})

    mass, dt = (q.requires_grad_() for q in numbers.values())
    assert torch.autograd.gradcheck(run, (mass, dt))
    value = torch.func.grad(lambda m: run(m, dt.detach())[-1].square().sum())(mass.detach())
    (expected,) = torch.autograd.grad(run(mass, dt)[-1].square().sum(), mass)
    assert_close(value, expected, 1e-13)
    assert ws.step(CART, x0[:0], controls[0, :0], parameters={"pole_mass": 0.2}).shape == (0, 6)


def wrong_dtype():
    return torch.tensor(0.1, dtype=torch.float64)


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"pole": 0.1}, ValueError, "has 'pole', expected .* dt, gravity, pole_mass, total_mass"),
        ({"pole_mass": wrong_dtype()}, TypeError, r"\['pole_mass'\] is torch.float64"),
        ({"pole_mass": torch.ones(2)}, ValueError, r"has shape \(2,\), expected \(\) .* \(3,\)"),
        ({"pole_mass": torch.ones(3, 1)}, ValueError, r"has shape \(3, 1\)"),
        ({"pole_mass": "light"}, TypeError, "is of type str"),
        ({"pole_mass": float("nan")}, ValueError, "NaN or infinity"),
        ([0.1], TypeError, "is of type list, expected a dictionary"),
    ],
)
def test_what_does_not_fit(given, error, words):
    net, x0 = make_net(CART, dtype=torch.float32), make_states(CART, 3, torch.float32)
    with pytest.raises(error, match=f"rollout: parameters.*{words}"):
        ws.rollout(CART, net, x0, horizon=3, parameters=given)
    with pytest.raises(error, match=f"step: parameters.*{words}"):
        ws.step(CART, x0, x0[:, :1], parameters=given)


def test_a_number_that_the_loss_reads_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Weighted(Pendulum):
        def device_functions(self, dtype):
            return weighted_functions(dtype)

    net, x0 = make_net(Weighted(), dtype=torch.float32), make_states(Weighted(), 3, torch.float32)
    with pytest.raises(ValueError, match="'mass', which the loss of Weighted reads"):
        ws.rollout(Weighted(), net, x0, horizon=3, parameters={"mass": 1.2})
    ws.rollout(Weighted(), net, x0, horizon=3, parameters={"length": 1.2})
    ws.rollout(Weighted(), net, x0, horizon=3, loss=own_loss, parameters={"mass": 1.2})


@functools.cache
def weighted_functions(dtype):
    functions = pendulum_functions(dtype)
    State, Params = functions.State, functions.Params

    @wp.func
    def loss(x: State, p: Params) -> dtype:
        return p.mass * x[0] * x[0]

    @wp.func
    def loss_vjp(x: State, p: Params, adj_loss: dtype) -> State:
        return State(dtype(2.0) * adj_loss * p.mass * x[0], dtype(0.0))

    return functions._replace(loss=loss, loss_vjp=loss_vjp)


def test_robots_name_theirs():
    system = ws.Hopper()
    x0 = system.initial_states(2)
    with pytest.raises(ValueError, match="expected numbers of the physics of this Hopper: .*mass_of_"):
        ws.step(system, x0, torch.zeros(2, system.control_size), parameters={"mass": 1.0})


def test_a_cart_with_all_generated():
    compared(BareCart(poles=2, dt=0.05), cart_step, "fused", "mixed", "R", ("dt", "pole_mass", "pole_length"))


def test_masks_of_worlds_by_numbers_do_not_mix():
    """The number of one world moves that world alone."""
    x0, net = make_states(CART, WORLDS), make_net(CART)
    masses = torch.full((WORLDS,), 0.1, dtype=torch.float64)
    before = ws.rollout(CART, net, x0, horizon=HORIZON, parameters={"pole_mass": masses}).states
    masses[4] = 0.4
    after = ws.rollout(CART, net, x0, horizon=HORIZON, parameters={"pole_mass": masses}).states
    changed = (before != after).any(0).any(-1)
    assert changed.tolist() == [world == 4 for world in range(WORLDS)]


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_example_identifies():
    example = runpy.run_path(str(EXAMPLES / "identify_cartpole.py"))
    for seed in (1, 2):
        found = example["identify"](seed)
        for name, value in example["TRUE"].items():
            assert abs(found[name] / value - 1) < 0.02, (seed, name)


def test_the_example_randomises():
    example = runpy.run_path(str(EXAMPLES / "randomised_cartpole.py"))
    found = example["main"](updates=60, seeds=(0,))
    untrained = example["tried"](example["trained"](True, 0), 0.5, 2.0)
    assert max(found["randomised"]) < 0.95 * untrained

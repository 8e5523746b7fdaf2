"""Foreign simulators: the cart-pole written in torch, in JAX and as launches on a Warp tape gives the
gradients of `ws.CartPole`, and what would give wrong ones is refused.
"""

import contextlib

import pytest
import torch
import warp as wp
from cases import (
    FLOWS,
    Evaluated,
    assert_all_differ,
    assert_close,
    gradients,
    make_cotangents,
    make_net,
    make_states,
)
from foreign_carts import jax_cart, sizes, tape_cart, torch_cart

import warp_sims as ws

CART = ws.CartPole(poles=2)
HORIZON, WORLDS = 9, 3
KINDS = ("torch", "torch_steps", "jax", "tape")
TOLERANCE = 1e-13
"""Of float64: the same equations in another order, over 9 steps."""
OPTIONS = {
    "plain": {},
    "decay": {"decay": 0.9},
    "decay_0": {"decay": 0.0},
    "window": {"window": 4},
    "checkpointing": {"checkpoint_every": 4},
    "all": {"decay": 0.9, "window": 4, "checkpoint_every": 2},
}


@contextlib.contextmanager
def doubles():
    """JAX in float64, for this thread."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def cart(request):
    """The cart-pole of a kind."""
    kind = request.param
    if kind == "jax":
        pytest.importorskip("jax")
        with doubles():
            yield jax_cart(CART)
    elif kind == "tape":
        yield tape_cart(CART, WORLDS)
    else:
        yield torch_cart(CART, rowwise=kind == "torch")


each_kind = pytest.mark.parametrize("cart", KINDS, indirect=True)


@each_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss", ["final", "running", None])
def test_gradients(cart, options, loss):
    """Of every flow, with cotangents on all outputs at once."""
    net, x0 = Evaluated(make_net(CART)), make_states(CART, WORLDS)
    asked = {
        "loss": loss,
        "control_cost": 0.0 if loss is None else 0.1,
        "cotangents": make_cotangents(CART, HORIZON, WORLDS),
    }
    found = []
    for flow in FLOWS:
        expected = gradients(CART, net, x0, HORIZON, flow, **asked, **options)
        found.append(gradients(cart, net, x0, HORIZON, flow, **asked, **options))
        assert_close(found[-1], expected, TOLERANCE)
    if "decay_0" not in str(options) and options.get("decay") != 0.0:
        assert_all_differ([f["0.weight"] for f in found])


@each_kind
def test_schedule_and_own_loss(cart):
    flow = list("RMNSRMNSR")

    def loss(states, controls):
        return states[1:].square().mean() + controls.abs().mean()

    net, x0 = Evaluated(make_net(CART)), make_states(CART, WORLDS)
    assert_close(
        gradients(cart, net, x0, HORIZON, flow, loss=loss),
        gradients(CART, net, x0, HORIZON, flow, loss=loss),
        TOLERANCE,
    )


@each_kind
def test_open_loop_and_one_step(cart):
    x0, c = make_states(CART, WORLDS).requires_grad_(), make_cotangents(CART, HORIZON, WORLDS)
    controls = c.controls.clone().requires_grad_()
    for run, adj in (
        (lambda system: ws.simulate(system, x0, controls), c.states),
        (lambda system: ws.step(system, x0, controls[0]), c.states[0]),
    ):
        ours, theirs = run(cart), run(CART)
        assert_close(ours, theirs.detach(), TOLERANCE)
        for a, b in zip(*(torch.autograd.grad(y, (x0, controls), adj) for y in (ours, theirs))):
            assert_close(a, b, TOLERANCE)


@each_kind
def test_gradient_pair(cart):
    net, x0 = make_net(CART), make_states(CART, WORLDS)
    ours, theirs = (ws.gradient_pair(system, net, x0, horizon=HORIZON) for system in (cart, CART))
    assert_close(ours.flat, theirs.flat, TOLERANCE)
    assert_close(ours.combine(), theirs.combine(), TOLERANCE)


@each_kind
def test_one_recording_serves_both_fields(cart, monkeypatch):
    """C pulls twice from a recording, it does not record twice."""
    count = []
    kind = type(cart)
    for name in ("linearize", "jacobians"):
        before = getattr(kind, name)

        def counted(self, x, u, before=before):
            count.append(x.shape[0])
            return before(self, x, u)

        monkeypatch.setattr(kind, name, counted)
    net, x0 = Evaluated(make_net(CART)), make_states(CART, WORLDS)
    ws.rollout(cart, net, x0, horizon=HORIZON, flow="R").states.sum()
    count.clear()
    points = []
    for flow in "RC":
        out = ws.rollout(cart, net, x0, horizon=HORIZON, flow=flow)
        count.clear()
        out.loss.backward()
        points.append(list(count))
    assert points[0] == points[1] and sum(points[0]) == HORIZON * WORLDS


@pytest.mark.parametrize("kind", ["torch", "jax", "tape"])
def test_float32(kind):
    if kind == "jax":
        pytest.importorskip("jax")
    cart = {"torch": torch_cart, "jax": jax_cart, "tape": lambda c: tape_cart(c, WORLDS, wp.float32)}[kind](
        CART
    )
    net, x0 = Evaluated(make_net(CART, dtype=torch.float32)), make_states(CART, WORLDS, torch.float32)
    for flow in "RMNS":
        found = gradients(cart, net, x0, HORIZON, flow, loss="running")
        # rounding of 9 steps in another order
        assert_close(found, gradients(CART, net, x0, HORIZON, flow, loss="running"), 2e-5)


def test_autocast_is_for_the_policy():
    net, x0 = make_net(CART, dtype=torch.float32), make_states(CART, WORLDS, torch.float32)

    def step(x, u):
        return torch.cat((x[:, :1] @ x.new_ones(1, 5), u), dim=1)  # a product, which autocast would round

    system = ws.TorchSystem(step, **sizes(CART), loss=lambda x: (x @ x.new_ones(6, 1))[:, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ws.rollout(system, net, x0, horizon=3, flow="R")
        out.loss.backward()
    assert out.states.dtype == torch.float32
    assert torch.equal(out.states[1, :, 0], x0[:, 0])


def test_large_jacobians_go_through_in_segments(monkeypatch):
    """The same gradient, whichever way Jacobians are taken."""
    from warp_sims.bridge.passes import foreign, foreign_torch

    net, x0 = Evaluated(make_net(CART)), make_states(CART, WORLDS)
    expected = gradients(torch_cart(CART), net, x0, HORIZON, "C", loss="running")
    per_step = WORLDS * 6 * 7
    monkeypatch.setattr(foreign, "JACOBIAN_ELEMENTS", 2 * per_step)
    assert_close(gradients(torch_cart(CART), net, x0, HORIZON, "C", loss="running"), expected, TOLERANCE)
    monkeypatch.setattr(foreign_torch, "REPLICATED_ROWS", 0)
    assert_close(gradients(torch_cart(CART), net, x0, HORIZON, "C", loss="running"), expected, TOLERANCE)
    monkeypatch.setattr(foreign, "JACOBIAN_WORK", 0)
    assert_close(gradients(torch_cart(CART), net, x0, HORIZON, "C", loss="running"), expected, TOLERANCE)


def test_worlds_that_act_on_each_other():
    """Recorded step by step, and by autograd through the whole loop."""

    def step(x, u):
        return x + 0.1 * torch.tanh(x.mean(0, keepdim=True) * x) + 0.1 * u * x.sum()

    system = ws.TorchSystem(step, state_size=2, control_size=1, rowwise=False)
    net = torch.nn.Linear(2, 1, dtype=torch.float64)
    x0 = make_states(ws.CartPole(poles=1), 3)[:, :2]
    out = ws.rollout(system, net, x0, horizon=5, flow="R", loss=lambda x, u: x[-1].square().sum())
    out.loss.backward()
    x = x0
    for _ in range(5):
        x = step(x, net(x))
    assert_close(net.weight.grad, torch.autograd.grad(x.square().sum(), net.weight)[0], TOLERANCE)


class Root(torch.nn.Module):
    """A policy whose derivative is infinite where the second component of the state is 0."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.gain * (1.0 + x[:, 1:].abs().sqrt())


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize(("flow", "decay"), [("S", 1.0), ("M", 0.0)])
def test_a_closed_gate_selects(flow, decay, rowwise):
    """What does not cross a closed edge may be infinite: a root at 0, of the step and of the policy."""

    def step(x, u):
        return torch.stack((x[:, 0] + u[:, 0], x[:, 1].sqrt()), dim=1)

    system = ws.TorchSystem(step, state_size=2, control_size=1, check=False, rowwise=rowwise)
    policy, x0 = Root(), torch.zeros(2, 2, dtype=torch.float64).requires_grad_()
    out = ws.rollout(system, policy, x0, horizon=3, flow=flow, decay=decay, loss=None)
    out.states[:, :, 0].sum().backward()
    assert policy.gain.grad == 6.0  # each of three controls of two worlds, on the state behind it
    assert torch.equal(x0.grad, torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 2))


@pytest.mark.parametrize("rowwise", [True, False])
def test_no_worlds(rowwise):
    net, x0 = make_net(CART), make_states(CART, 0).requires_grad_()
    out = ws.rollout(torch_cart(CART, rowwise=rowwise), net, x0, horizon=3)
    out.loss.backward()
    assert out.loss == 0.0 and x0.grad.shape == (0, 6)
    assert all(not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("kind", ["torch", "tape"])
def test_in_a_compiled_graph(kind):
    torch._dynamo.reset()  # which makes a number of what differs between two systems
    system = torch_cart(CART) if kind == "torch" else tape_cart(CART, WORLDS)
    net, x0 = make_net(CART), make_states(CART, WORLDS)

    def update(x):
        return ws.rollout(system, net, x, horizon=4, flow="C", loss="running").loss

    expected = torch.autograd.grad(update(x0), list(net.parameters()))
    compiled = torch.compile(update, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x0), list(net.parameters())), expected):
        assert_close(a, b, TOLERANCE)


def test_under_inference_mode_and_on_a_tape():
    net, x0 = make_net(CART), make_states(CART, WORLDS)
    with torch.inference_mode():
        out = ws.rollout(torch_cart(CART), net, x0.clone(), horizon=HORIZON)
    assert_close(out.states, ws.rollout(CART, net, x0, horizon=HORIZON).states.detach(), TOLERANCE)
    found = []
    for system in (CART, torch_cart(CART), tape_cart(CART, WORLDS)):
        start = wp.from_torch(x0.clone(), requires_grad=True)
        with wp.Tape() as tape:
            states, _ = ws.record_rollout(tape, system, net, start, horizon=HORIZON, flow="M")
        states.grad.fill_(1.0)
        tape.backward()
        found.append(wp.to_torch(start.grad).clone())
    assert_close(found[1], found[0], TOLERANCE)
    assert_close(found[2], found[0], TOLERANCE)


def test_function_transforms():
    x0, controls = make_states(CART, WORLDS), torch.zeros(4, WORLDS, 1, dtype=torch.float64)

    def last(system):
        return torch.func.grad(lambda x: ws.simulate(system, x, controls)[-1].square().sum())(x0)

    assert_close(last(torch_cart(CART)), last(CART), TOLERANCE)


def test_training(tmp_path):
    def draw(n, seed, split):
        return CART.initial_states(n, seed=seed, split=split)

    system = torch_cart(CART, initial_states=draw)
    policy = ws.MLP(6, (8,), 1)
    config = ws.TrainConfig(system=system, policy=policy, horizon=10, samples=16, batch=8, epochs=2)
    result = ws.train(config, out=tmp_path / "run")
    assert len(result.log["epoch"]) == 3
    with pytest.raises(ValueError, match="give it as system="):
        ws.load_run(tmp_path / "run")
    assert ws.load_run(tmp_path / "run", system=system)

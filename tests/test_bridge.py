"""What torch asks of an operation: layouts, saved tensors, transforms, compilation, and errors elsewhere."""

import contextlib
from collections import Counter

import pytest
import torch
import warp as wp
from cases import (
    FLOWS,
    ROADS,
    Evaluated,
    assert_close,
    error_of,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
)
from own_systems import Unicycle
from torch import nn

import warp_sims as ws

# Relative to the norm of each tensor, between two ways through the same kernels: only products by torch may
# sum in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

CART = ws.CartPole(poles=2, dt=0.05)
HORIZON = 7
WORLDS = 5


@pytest.fixture(params=ROADS)
def policy(request):
    return on_road(request.param, make_net(CART))


@pytest.fixture
def x0():
    return make_states(CART, WORLDS)


@pytest.fixture
def cotangents():
    return make_cotangents(CART, HORIZON, WORLDS)


def run(policy, x0, flow="C", **options):
    return ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow, **{"loss": "running"} | options)


# Layouts


def layouts(tensor):
    """The same numbers in memory of other shapes."""
    padded = torch.full((*(2 * size + 1 for size in tensor.shape),), torch.nan, dtype=tensor.dtype)
    strided = padded[tuple(slice(1, None, 2) for _ in tensor.shape)]
    reversed_axes = torch.empty(tensor.shape[::-1], dtype=tensor.dtype).permute(*reversed(range(tensor.ndim)))
    offset = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype)[3:].view(tensor.shape)
    for target in (strided, reversed_axes, offset):
        yield target.copy_(tensor)


@pytest.mark.parametrize("flow", ["R", "C"])
def test_layouts_of_inputs_and_cotangents(policy, x0, cotangents, flow):
    tolerance = 0.0 if type(policy) is ws.MLP else TOLERANCE[x0.dtype]
    expected = gradients(CART, policy, x0, HORIZON, flow, cotangents=cotangents)
    for other_x0 in layouts(x0):
        found = gradients(CART, policy, other_x0, HORIZON, flow, cotangents=cotangents)
        assert_close(found, expected, tolerance)
    for states, controls in zip(layouts(cotangents.states), layouts(cotangents.controls), strict=True):
        other = cotangents._replace(states=states, controls=controls)
        found = gradients(CART, policy, x0, HORIZON, flow, cotangents=other)
        assert_close(found, expected, tolerance)


def test_expanded_inputs_and_cotangents(policy):
    row = make_states(CART, 1).requires_grad_()
    scale = torch.tensor(0.7, dtype=torch.float64)
    found = []
    for x0 in (row.expand(WORLDS, -1), row.repeat(WORLDS, 1)):
        out = run(policy, x0, "R")
        adjoints = scale.expand(out.states.shape), scale.expand(out.controls.shape), scale
        outputs = out.states, out.controls, out.loss
        found.append(torch.autograd.grad(outputs, [row, *policy.parameters()], adjoints))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("horizon, nworld", [(1, 1), (1, 3), (2, 1)])
def test_expanded_cotangents_of_size_one(policy, horizon, nworld):
    """Strides of axes of size one may be anything, and the tensor still counts as contiguous."""
    x0 = make_states(CART, nworld).requires_grad_()
    found = []
    for materialize in (False, True):
        out = ws.rollout(CART, policy, x0, horizon=horizon, flow="R", loss=None)
        g = torch.tensor(0.7, dtype=torch.float64).expand(out.controls.shape)
        found.append(torch.autograd.grad(out.controls, x0, g.clone() if materialize else g)[0])
    assert torch.equal(*found)


def test_layouts_of_parameters(x0, cotangents):
    net = make_net(CART)
    expected = gradients(CART, net, x0, HORIZON, "C", cotangents=cotangents)
    for linear in (net[0], net[2], net[4]):
        linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    assert not net[0].weight.is_contiguous()
    assert_close(gradients(CART, net, x0, HORIZON, "C", cotangents=cotangents), expected, 0.0)


@pytest.mark.parametrize("system", [CART, Unicycle()], ids=lambda s: type(s).__name__)
def test_layouts_in_open_loop(system):
    x0 = make_states(system, WORLDS)
    c = make_cotangents(system, HORIZON, WORLDS)
    expected = ws.simulate(system, x0, c.controls)
    for one, other in zip(layouts(x0), layouts(c.controls), strict=True):
        assert torch.equal(ws.simulate(system, one, other), expected)
        assert torch.equal(ws.step(system, one, other[0]), expected[1])


# Several rollouts and backward passes


def test_two_rollouts_alive_at_once(policy, x0):
    """Of the same shape, so that nothing of one may lie where the other reads."""
    other_x0, other = make_states(CART, WORLDS, seed=7), make_net(CART, seed=7)
    expected = [gradients(CART, p, x, HORIZON, "C") for p, x in ((policy, x0), (other, other_x0))]
    x0, other_x0 = x0.requires_grad_(), other_x0.requires_grad_()
    policy.zero_grad(), other.zero_grad()
    first, second = (
        ws.rollout(CART, p, x, horizon=HORIZON, flow="C") for p, x in ((policy, x0), (other, other_x0))
    )
    first.loss.backward()
    second.loss.backward()
    for p, x, out, one in ((policy, x0, first, expected[0]), (other, other_x0, second, expected[1])):
        found = {name.removeprefix("net."): q.grad for name, q in p.named_parameters()}
        assert_close(found | {"x0": x.grad, "loss": out.loss}, one, 0.0)


def test_more_shapes_than_launches_are_kept_for(policy):
    """Whatever is prepared once per shape belongs to that shape."""
    shapes = [(horizon, nworld) for horizon in range(1, 6) for nworld in range(1, 9)]
    first, second = (
        [gradients(CART, policy, make_states(CART, n), horizon, "C") for horizon, n in shapes]
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert_close(other, one, 0.0)
    for (horizon, n), one in list(zip(shapes, first, strict=True))[::7]:
        expected = expected_gradients(CART, policy, make_states(CART, n), horizon, "C")
        assert_close(one, expected, 1e-12)


def test_backward_twice(policy, x0, cotangents):
    x0 = x0.requires_grad_()
    out = run(policy, x0)
    inputs = [x0, *policy.parameters()]
    outputs = out.states, out.controls, out.loss
    first = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
    run(policy, 2 * x0.detach()).loss.backward()  # something else in between
    second = torch.autograd.grad(outputs, inputs, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, inputs, cotangents)


def test_combined_gradients_of_two_backward_passes_add(policy, x0):
    """And C(a) + C(b) is not C(a + b)."""
    parameters = list(policy.parameters())
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(WORLDS, CART.state_size, generator=draw, dtype=torch.float64) for _ in range(2))
    out = run(policy, x0, loss=None)
    both = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(out.states[-1], parameters, c, retain_graph=True)]
        )
        for c in (a, b, a + b)
    ]
    for c in (a, b):
        out.states[-1].backward(c, retain_graph=True)
    assert torch.equal(torch.cat([p.grad.flatten() for p in parameters]), both[0] + both[1])
    assert not torch.allclose(both[0] + both[1], both[2])


@pytest.mark.parametrize("what", ["states", "controls", "parameter"])
def test_a_change_of_a_saved_tensor_raises(policy, x0, what):
    out = run(policy, x0)
    loss = out.loss + out.states.sum() * 0
    with torch.no_grad():
        changed = next(policy.parameters()) if what == "parameter" else getattr(out, what)
        changed.add_(1e-12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_change_of_x0_afterwards_does_no_harm(policy, x0):
    """The trajectory holds a copy."""
    expected = gradients(CART, policy, x0, HORIZON, "C")
    policy.zero_grad()
    out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow="C")
    x0.fill_(torch.nan)
    out.loss.backward()
    found = {name.removeprefix("net."): q.grad for name, q in policy.named_parameters()}
    assert_close(found, {name: expected[name] for name in found}, 0.0)


# Derivatives that are not there

NO_SECOND = "second derivatives through a rollout are not implemented"
NO_FORWARD = "forward-mode derivatives .* through a rollout are not implemented"


@pytest.mark.parametrize("flow", FLOWS)
def test_second_derivatives_raise(policy, x0, flow):
    x0 = x0.requires_grad_()
    weight = next(policy.parameters())
    for inner in (x0, weight):
        (gradient,) = torch.autograd.grad(run(policy, x0, flow).loss, inner, create_graph=True)
        for outer in (x0, weight):
            with pytest.raises(NotImplementedError, match=NO_SECOND):
                torch.autograd.grad(gradient.square().sum(), outer, retain_graph=True)

    def gradient_of(x):
        return torch.func.grad(lambda x: run(policy, x, flow).loss)(x).square().sum()

    with pytest.raises(NotImplementedError, match=NO_SECOND):
        torch.func.grad(gradient_of)(x0.detach())


def test_second_derivatives_in_open_loop_raise(x0, cotangents):
    x0, u = x0.requires_grad_(), cotangents.controls[0].requires_grad_()
    (gradient,) = torch.autograd.grad(ws.step(CART, x0, u).square().sum(), x0, create_graph=True)
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        gradient.sum().backward()


@pytest.mark.parametrize("flow", FLOWS)
def test_forward_mode_raises(policy, x0, flow):
    def loss(x):
        return run(policy, x, flow).loss

    with pytest.raises(NotImplementedError, match=NO_FORWARD):
        torch.func.jvp(loss, (x0,), (torch.ones_like(x0),))
    with pytest.raises((NotImplementedError, RuntimeError), match=f"{NO_FORWARD}|does not have vmap support"):
        torch.func.jacfwd(loss)(x0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x0, torch.ones_like(x0))
        with pytest.raises(NotImplementedError, match=NO_FORWARD):
            loss(dual)
        with pytest.raises(NotImplementedError, match=NO_FORWARD):
            ws.step(CART, dual, x0[:, :1])


def test_forward_mode_of_parameters_raises(policy, x0):
    parameters = dict(policy.named_parameters())
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    runner = Runner(policy, "R")
    with pytest.raises(NotImplementedError, match=NO_FORWARD):
        torch.func.jvp(
            lambda p: torch.func.functional_call(runner, p, (x0,)),
            (named(runner),),
            ({f"policy.{name}": t for name, t in tangents.items()},),
        )


# Who gets a gradient


@pytest.mark.parametrize("flow", FLOWS)
def test_frozen_parameters_get_none(policy, x0, cotangents, flow):
    expected = expected_gradients(CART, policy, x0, HORIZON, flow, cotangents=cotangents)
    parameters = dict(policy.named_parameters())
    for name in parameters:
        if name.endswith(("0.bias", "2.weight")):
            parameters[name].requires_grad_(False)
    found = gradients(CART, policy, x0, HORIZON, flow, cotangents=cotangents)
    assert set(found) == set(expected) - {"0.bias", "2.weight"}
    assert all(p.grad is None for p in parameters.values() if not p.requires_grad)
    assert_close(found, {name: expected[name] for name in found}, 1e-12)

    policy.requires_grad_(False).zero_grad()
    found = gradients(CART, policy, x0, HORIZON, flow, cotangents=cotangents)
    assert set(found) == {"x0", "loss"} and all(p.grad is None for p in parameters.values())
    assert_close(found["x0"], expected["x0"], 1e-12)
    out = run(policy, x0, flow)
    assert not out.loss.requires_grad and not out.states.requires_grad


def test_without_gradients_at_all(policy, x0):
    expected = run(policy, x0)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = run(policy, x0)
        assert not out.loss.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(out[:3], expected[:3], strict=True))


def test_inference_mode_leaves_nothing_behind(policy):
    """Memory that was prepared there can be written afterwards, too."""
    x0 = make_states(CART, 6)  # a shape of this test alone
    expected = expected_gradients(CART, policy, x0, HORIZON, "C", loss="running")
    with torch.inference_mode():
        pair = ws.gradient_pair(CART, policy, x0, horizon=HORIZON, loss="running")
        own = ws.gradient_pair(CART, policy, x0, horizon=HORIZON, loss=mean_of_cosines)
    found = gradients(CART, policy, x0, HORIZON, "C", loss="running")
    assert_close(found, expected, 1e-12)
    again = ws.gradient_pair(CART, policy, x0, horizon=HORIZON, loss=mean_of_cosines)
    combined = {name.removeprefix("net."): gradient for name, gradient in pair.combine().items()}
    assert_close(combined, {name: found[name] for name in combined}, 1e-12)
    assert_close(own.base, again.base, 1e-12)


def mean_of_cosines(states, controls):
    return states.cos().mean() + controls.cos().mean()


def test_parameters_of_the_loss_get_ordinary_gradients(policy, x0):
    """Also under C, where those of the policy are compared."""
    scale = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)

    def loss(states, controls):
        return scale[0] * states[-1].square().mean() + (scale[1] * controls).sin().mean()

    out = run(policy, x0, "C", loss=loss)
    out.loss.backward()
    with torch.no_grad():
        expected = torch.stack(
            (out.states[-1].square().mean(), (out.controls * (scale[1] * out.controls).cos()).mean())
        )
    assert_close(scale.grad, expected, 1e-13)
    plain = expected_gradients(CART, policy, x0, HORIZON, "C", loss=lambda s, c: loss(s, c))
    found = {name.removeprefix("net."): p.grad for name, p in policy.named_parameters()}
    assert_close(found, {name: plain[name] for name in found}, 1e-12)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("loss", ["final", "running", None])
def test_no_worlds(policy, flow, loss):
    x0 = torch.empty(0, CART.state_size, dtype=torch.float64, requires_grad=True)
    out = ws.rollout(
        CART, policy, x0, horizon=HORIZON, flow=flow, loss=loss, control_cost=0.0 if loss is None else 0.1
    )
    assert out.states.shape == (HORIZON + 1, 0, 6) and out.controls.shape == (HORIZON, 0, 1)
    total = out.states.sum() + out.controls.sum()
    if loss is not None:
        assert out.loss.item() == 0.0
        total = total + out.loss
    total.backward()
    assert x0.grad.shape == x0.shape
    assert all(p.grad.shape == p.shape and not p.grad.any() for p in policy.parameters())


def test_no_worlds_in_open_loop():
    x0, u = torch.empty(0, 6, requires_grad=True), torch.empty(3, 0, 1, requires_grad=True)
    states = ws.simulate(CART, x0, u)
    states.sum().backward()
    assert states.shape == (4, 0, 6) and x0.grad.shape == (0, 6) and u.grad.shape == (3, 0, 1)
    assert ws.step(CART, x0, u[0]).shape == (0, 6)


# Compilation, autocast, torch.func


class Runner(nn.Module):
    """A module that rolls its policy out: what torch.func and torch.compile are given."""

    def __init__(self, policy, flow):
        super().__init__()
        self.policy, self.flow = policy, flow

    def forward(self, x0):
        out = run(self.policy, x0, self.flow)
        return out.loss + out.states.sin().sum() + out.controls.square().sum()


def named(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def eager(runner, x0):
    x0 = x0.detach().requires_grad_()
    parameters = dict(runner.named_parameters())
    value = runner(x0)
    found = torch.autograd.grad(value, [x0, *parameters.values()])
    return value.detach(), found[0], dict(zip(parameters, found[1:], strict=True))


@pytest.mark.parametrize("flow", FLOWS)
def test_functional_gradients(policy, x0, flow):
    runner = Runner(policy, flow)
    value, adj_x0, adj_parameters = eager(runner, x0)
    actual, found = torch.func.grad_and_value(runner)(x0)
    assert_close(found, value, TOLERANCE[x0.dtype])
    assert_close(actual, adj_x0, TOLERANCE[x0.dtype])

    def by_parameters(parameters):
        return torch.func.functional_call(runner, parameters, (x0,))

    assert_close(torch.func.grad(by_parameters)(named(runner)), adj_parameters, TOLERANCE[x0.dtype])


@pytest.mark.parametrize("flow", FLOWS)
def test_functional_gradients_taken_later(policy, x0, flow):
    """The pullback of `torch.func.vjp` is called when the transform is over."""
    runner = Runner(policy, flow)
    _, adj_x0, _ = eager(runner, x0)
    _, pull = torch.func.vjp(runner, x0)
    assert_close(pull(torch.tensor(-2.0, dtype=x0.dtype))[0], -2.0 * adj_x0, TOLERANCE[x0.dtype])


def compile_and_compare(runner, x0, backend):
    value, adj_x0, adj_parameters = eager(runner, x0)
    torch._dynamo.reset()
    compiled = torch.compile(runner, fullgraph=True, backend=backend)
    for _ in range(2):
        x0 = x0.detach().requires_grad_()
        runner.zero_grad()
        actual = compiled(x0)
        actual.backward()
        assert_close(actual, value, TOLERANCE[x0.dtype])
        assert_close(x0.grad, adj_x0, TOLERANCE[x0.dtype])
        assert_close({n: p.grad for n, p in runner.named_parameters()}, adj_parameters, TOLERANCE[x0.dtype])
    return compiled


@pytest.mark.parametrize("flow", FLOWS)
def test_compiled(policy, x0, flow):
    compile_and_compare(Runner(policy, flow), x0, "aot_eager")


@pytest.mark.slow
def test_compiled_by_inductor(policy, x0):
    compile_and_compare(Runner(policy.float(), "C"), x0.float(), "inductor")


@pytest.mark.parametrize("road", ["fused", pytest.param("torch", marks=pytest.mark.slow)])
def test_compiled_for_other_numbers_of_worlds(road):
    runner = Runner(on_road(road, make_net(CART)), "C")
    compiled = compile_and_compare(runner, make_states(CART, 3), "aot_eager")
    for nworld in (4, 17, 1):
        x0 = make_states(CART, nworld).requires_grad_()
        compiled(x0).backward()
        assert_close(x0.grad, eager(runner, x0)[1], TOLERANCE[x0.dtype])


def test_compiled_schedules_windows_and_open_loop(policy, x0, cotangents):
    def several(x0, u):
        out = ws.rollout(
            CART,
            policy,
            x0,
            horizon=3,
            flow=["R", "M", "N"],
            window=2,
            decay=0.5,
            loss="final",
            control_cost=0.1,
        )
        return out.loss + ws.simulate(CART, x0, u).sum() + ws.step(CART, out.states[-1], u[0]).sum()

    found = []
    torch._dynamo.reset()
    for function in (several, torch.compile(several, fullgraph=True, backend="aot_eager")):
        x, u = x0.detach().requires_grad_(), cotangents.controls.detach().requires_grad_()
        found.append(torch.autograd.grad(function(x, u), (x, u, *policy.parameters())))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, TOLERANCE[x0.dtype])


def test_checks_of_values_survive_compilation(policy, x0):
    torch._dynamo.reset()
    compiled = torch.compile(Runner(policy, "R"), fullgraph=True, backend="aot_eager")
    compiled(x0)
    x0[3, 1] = torch.nan
    with pytest.raises(ValueError, match="world 3"):
        compiled(x0)


@pytest.mark.parametrize("flow", FLOWS)
def test_autocast(flow):
    """A fused policy runs in the dtype of x0; another as torch runs it."""
    net, x0 = make_net(CART, dtype=torch.float32), make_states(CART, WORLDS, torch.float32)
    plain = gradients(CART, net, x0, HORIZON, flow)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(gradients(CART, net, x0, HORIZON, flow), plain, 0.0)
        found = gradients(CART, Evaluated(net), x0, HORIZON, flow)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())

    class ByHand(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return net(x).float()

    by_hand = ByHand()
    by_hand.net = net
    expected = gradients(CART, by_hand, x0, HORIZON, flow)
    assert_close(found, expected, TOLERANCE[torch.float32])
    assert error_of(found["0.weight"], plain["0.weight"]) > 1e-4  # bfloat16 was there


def test_a_policy_of_another_dtype_under_autocast(policy):
    x0 = make_states(CART, WORLDS, torch.float32)
    policy.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for flow in FLOWS:
            policy.zero_grad()
            out = ws.rollout(CART, policy, x0, horizon=HORIZON, flow=flow)
            out.loss.backward()
            assert out.states.dtype == torch.float32
            assert all(p.grad.dtype == torch.bfloat16 for p in policy.parameters())


def test_half_precision_states_under_autocast(policy):
    policy = policy.float()
    x0 = make_states(CART, WORLDS, torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(policy, x0)
    out.loss.backward()
    assert out.states.dtype == torch.float32 and x0.grad.dtype == torch.bfloat16


# Launches


@pytest.fixture
def launches(monkeypatch):
    """Counts the kernels that run, by the name of their function."""
    counts = Counter()
    launch, replay = wp.launch, wp.Launch.launch

    def name(kernel):
        return kernel.func.__name__.strip("_")

    def counted_launch(kernel, *args, **kwargs):
        if not kwargs.get("record_cmd"):
            counts[name(kernel)] += 1
        return launch(kernel, *args, **kwargs)

    def counted_replay(self, *args, **kwargs):
        counts[name(self.kernel)] += 1
        return replay(self, *args, **kwargs)

    monkeypatch.setattr(wp, "launch", counted_launch)
    monkeypatch.setattr(wp.Launch, "launch", counted_replay)
    return counts


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("horizon", [1, 100])
def test_launches_of_a_fused_rollout(launches, flow, horizon):
    net, x0 = make_net(CART), make_states(CART, 3)
    gradients(CART, net, x0, horizon, flow)  # compiles, prepares
    launches.clear()
    gradients(CART, net, x0, horizon, flow)
    assert launches["fused_rollout"] == 1
    assert launches["adjoint"] == 1
    # one field of parameters and one of x0 are compared
    assert launches["combine"] == (2 if flow == "C" else 0)
    wide = {"network_linearize": 1, "network_weight_grad": 1}
    assert all(launches[name] == count for name, count in wide.items())
    assert launches.total() == 2 + launches["combine"] + sum(wide.values()), launches


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("horizon", [1, 100])
def test_launches_of_a_policy_that_torch_evaluates(launches, flow, horizon):
    """Step by step forwards, where the policy stands between two steps; one sweep backwards."""
    policy, x0 = Evaluated(make_net(CART)), make_states(CART, 3)
    calls = []
    policy.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    gradients(CART, policy, x0, horizon, flow)
    launches.clear()
    calls.clear()
    out = ws.rollout(CART, policy, x0, horizon=horizon, flow=flow)
    assert launches["simulate"] == horizon and launches["adjoint"] == 0
    forwards = len(calls)
    out.loss.backward()
    assert launches["simulate"] == horizon and launches["adjoint"] == 1
    # no second rollout: backwards, all points at once, once by the parameters and once by the states
    assert set(calls[forwards:]) == {horizon * 3} and len(calls) - forwards <= 2


def test_launches_of_a_pair(launches):
    net, x0 = make_net(CART), make_states(CART, 3)
    ws.gradient_pair(CART, net, x0, horizon=100)
    launches.clear()
    pair = ws.gradient_pair(CART, net, x0, horizon=100)
    assert launches["fused_rollout"] == 1 and launches["adjoint"] == 1 and launches["combine"] == 0
    for _ in range(2):
        pair.combine(), pair.cosine, pair.agreement, pair.nonfinite, pair.norms
    assert launches["combine"] == 1


# Policies that torch evaluates


class Mixing(nn.Module):
    """Subtracts the mean over the batch from `least` rows on."""

    def __init__(self, least=0):
        super().__init__()
        self.linear, self.least = nn.Linear(6, 1, dtype=torch.float64), least

    def forward(self, x):
        return self.linear(x - x.mean(0) if x.shape[0] >= self.least else x)


class Noisy(nn.Module):
    """Draws noise, in every call or from some call on."""

    def __init__(self, quiet=0):
        super().__init__()
        self.linear, self.quiet = nn.Linear(6, 1, dtype=torch.float64), quiet

    def forward(self, x):
        self.quiet -= 1
        return self.linear(x) + (1e-3 * torch.randn(x.shape[0], 1, dtype=x.dtype) if self.quiet < 0 else 0.0)


def batch_normalised():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


@pytest.mark.parametrize(
    "make, reason",
    [
        (Mixing, "not row by row"),
        (Noisy, "not deterministic"),
        (batch_normalised, "not row by row"),
        (
            lambda: nn.Sequential(nn.Linear(6, 40), nn.Dropout(), nn.Linear(40, 1)).double(),
            "not deterministic",
        ),
    ],
)
def test_policies_that_are_refused_at_once(make, reason, x0, launches):
    policy = make()
    with pytest.raises(ValueError, match=f"rollout: policy is {reason}"):
        run(policy, x0)
    with pytest.raises(ValueError, match=f"gradient_pair: policy is {reason}"):
        ws.gradient_pair(CART, policy, x0, horizon=HORIZON)
    assert launches.total() == 0
    assert run(batch_normalised().eval(), x0).loss.isfinite()


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("make", [lambda: Mixing(least=30), lambda: Noisy(quiet=4)], ids=["mixing", "noisy"])
def test_policies_that_only_the_backward_pass_sees(make, flow, x0):
    """The trial has few rows and few calls; the recomputation sees every control."""
    out = run(make(), x0, flow)
    with pytest.raises(ValueError, match="step .* world .* row by row and deterministically"):
        out.loss.backward()
    with pytest.raises(ValueError, match="step .* world .* row by row and deterministically"):
        ws.gradient_pair(CART, make(), x0, horizon=HORIZON)


def test_the_trial_leaves_no_trace(x0):
    policy, noisy, quiet = batch_normalised(), Noisy(), Evaluated(make_net(CART))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="row by row"):
        run(policy, x0)
    with pytest.raises(ValueError, match="deterministic"):
        run(noisy, x0)
    run(quiet, x0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


# Memory


@contextlib.contextmanager
def poison():
    """Memory that torch hands out uninitialised is full of NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.zeros(1).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("nworld", [1, 3, 17])
@pytest.mark.parametrize("system, hidden", [(CART, (9, 7)), (Unicycle(), (33, 8))], ids=["cart", "unicycle"])
@pytest.mark.parametrize("road", ROADS)
def test_kernels_overwrite_their_outputs(road, system, hidden, nworld, flow, request):
    """Worlds that fill their blocks or do not, layers that fill their vectors or do not."""
    policy, x0 = on_road(road, make_net(system, hidden)), make_states(system, nworld)
    horizon = 9  # of this test alone: nothing is prepared before there is poison
    c = make_cotangents(system, horizon, nworld)

    def everything():
        for loss in (None, mean_of_cosines):
            yield gradients(system, policy, x0, horizon, flow, loss=loss, cotangents=c)
        yield {"states": ws.simulate(system, x0, c.controls)}
        pair = ws.gradient_pair(
            system,
            policy,
            x0,
            horizon=horizon,
            loss=mean_of_cosines,
            control_cost=0.2,
            check=flow.replace("C", "R"),
        )
        yield pair.base | {"loss": pair.loss, "cosine": pair.cosine}
        yield pair.check
        yield pair.combine("check")

    with poison():
        poisoned = list(everything())
    clean = list(everything())
    for one, other in zip(poisoned, clean, strict=True):
        assert all(tensor.isfinite().all() for tensor in other.values())
        assert_close(one, other, 0.0)

"""What torch asks of an operation: layouts, several at once, saved tensors, and who gets a gradient."""

import contextlib

import pytest
import torch
from cases import (
    FLOWS,
    ROADS,
    assert_close,
    expected_gradients,
    gradients,
    make_cotangents,
    make_net,
    make_states,
    on_road,
)
from own_systems import Unicycle
from small_cart import CART, HORIZON, TOLERANCE, WORLDS, run
from torch import nn

import warp_sims as ws

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

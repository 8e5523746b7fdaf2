"""Transforms of torch: second derivatives and forward mode, torch.func, torch.compile, autocast."""

import pytest
import torch
from cases import (
    FLOWS,
    Evaluated,
    assert_close,
    error_of,
    gradients,
    make_net,
    make_states,
    on_road,
)
from small_cart import CART, HORIZON, TOLERANCE, WORLDS, run
from torch import nn

import warp_sims as ws

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
    # what its cache holds was made for the shapes of another day
    with torch._inductor.config.patch(force_disable_caches=True):
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


@pytest.mark.parametrize("road", ["fused", "torch"])
def test_one_graph_for_several_systems_and_numbers(road):
    """A compiler takes numbers that change for symbols: none of them may be asked for its value."""
    policy = on_road(road, make_net(ws.CartPole(poles=1)))
    x0 = make_states(ws.CartPole(poles=1), 5)

    def loss(system, horizon, decay, control_cost):
        return ws.rollout(
            system, policy, x0, horizon=horizon, flow="R", decay=decay, control_cost=control_cost
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for arguments in (
        (ws.CartPole(poles=1), 4, 1.0, 0.0),
        (ws.CartPole(poles=1, dt=0.02), 4, 1.0, 0.0),
        (ws.CartPole(poles=1, dt=0.03), 4, 0.9, 0.1),
        (ws.CartPole(poles=1, dt=0.03), 5, 0.8, 0.2),
        (ws.CartPole(poles=1), 6, 0.7, 0.3),
    ):
        assert torch.equal(compiled(*arguments), loss(*arguments))

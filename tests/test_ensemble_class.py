"""`Ensemble` as a module: members, copies, optimizers, transforms of torch, and what is refused.

That members compute what they would alone is in test_ensembles.py.
"""

import copy
import pickle

import pytest
import torch
from cases import FLOWS, Evaluated, assert_close, gradients, make_net
from ensemble_cases import CART, CASES, HORIZON, TOLERANCE, assert_same_bits, backward_of, make, member_of

import warp_sims as ws

# The module


@pytest.mark.parametrize("case", CASES)
def test_controls_of_an_ensemble(case):
    _, nets, x = make(case)
    ensemble = ws.Ensemble(nets)
    expected = torch.stack([net(own) for net, own in zip(nets, x)])
    assert_close(ensemble(x), expected, TOLERANCE[torch.float64])
    assert_close(ensemble(x[0]), torch.stack([net(x[0]) for net in nets]), TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", CASES)
def test_members_come_back(case):
    _, nets, _ = make(case)
    ensemble = ws.Ensemble(nets)
    assert len(ensemble) == len(nets) == len(ensemble.members())
    assert list(ensemble.state_dict()) == list(nets[0].state_dict())
    for k, (net, member) in enumerate(zip(nets, ensemble)):
        assert type(member) is type(net)
        assert_same_bits(member.state_dict(), net.state_dict())
        assert_same_bits(ensemble[k - len(nets)].state_dict(), net.state_dict())
        assert ws.policies.networks.fused_network(member) is not None
    tail = ensemble[1:]
    assert isinstance(tail, ws.Ensemble) and len(tail) == 2
    assert_same_bits(tail[0].state_dict(), nets[1].state_dict())


def test_copies_share_nothing():
    _, nets, _ = make()
    ensemble = ws.Ensemble(nets)
    before = {name: q.clone() for name, q in ensemble.state_dict().items()}
    with torch.no_grad():
        for policy in (*nets, *ensemble.members(), ensemble[:2]):
            for parameter in policy.parameters():
                parameter.zero_()
    assert_same_bits(ensemble.state_dict(), before)


def test_copies_of_an_ensemble():
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)
    fresh = ws.Ensemble([ws.MLP(6, (9, 7), 1) for _ in nets]).double()
    fresh.load_state_dict(ensemble.state_dict())
    expected = backward_of(system, ensemble, x0)
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble)), fresh):
        assert_same_bits(backward_of(system, other, x0), expected)
    assert ensemble.float()[0][0].weight.dtype == torch.float32


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_one_optimizer_is_many(optimizer):
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)
    together = optimizer(ensemble.parameters(), lr=1e-2)
    alone = [optimizer(net.parameters(), lr=1e-2) for net in nets]
    for _ in range(5):
        together.zero_grad()
        ws.rollout(system, ensemble, x0, horizon=HORIZON).loss.sum().backward()
        together.step()
        for net, own, x in zip(nets, alone, x0):
            own.zero_grad()
            ws.rollout(system, net, x, horizon=HORIZON).loss.backward()
            own.step()
    for member, net in zip(ensemble, nets):
        assert_close(member.state_dict(), net.state_dict(), TOLERANCE[torch.float64])


# Transforms


class Runner(torch.nn.Module):
    """A module that rolls its policy out."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, x0):
        return ws.rollout(CART, self.policy, x0, horizon=HORIZON).loss.sum()


def test_functional_gradients():
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)
    runner = Runner(ensemble)

    def loss(parameters, x):
        return torch.func.functional_call(runner, {f"policy.{n}": q for n, q in parameters.items()}, (x,))

    parameters = {name: q.detach() for name, q in ensemble.named_parameters()}
    actual, adj_x0 = torch.func.grad(loss, argnums=(0, 1))(parameters, x0)
    for k, net in enumerate(nets):
        alone = gradients(system, net, x0[k], HORIZON, "C")
        alone.pop("loss")
        assert_same_bits(member_of(actual | {"x0": adj_x0}, k), alone)


@pytest.mark.parametrize("flow", FLOWS)
def test_compiled(flow):
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)

    def loss(x):
        out = ws.rollout(system, ensemble, x, horizon=HORIZON, flow=flow)
        return (out.loss * torch.arange(1.0, 4.0)).sum() + out.states.sin().sum()

    torch._dynamo.reset()
    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        ensemble.zero_grad()
        x = x0.clone().requires_grad_()
        value = run(x)
        value.backward()
        found.append({n: p.grad for n, p in ensemble.named_parameters()} | {"x0": x.grad, "": value.detach()})
    assert_close(found[1], found[0], TOLERANCE[torch.float64])


def test_autocast():
    """A fused policy runs in the dtype of x0."""
    system, nets, x0 = make(dtype=torch.float32)
    ensemble = ws.Ensemble(nets).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ws.rollout(system, ensemble, x0, horizon=HORIZON)
    expected = ws.rollout(system, copy.deepcopy(ensemble).float(), x0, horizon=HORIZON)
    assert torch.equal(out.states, expected.states) and out.loss.dtype == torch.float32


def test_second_derivatives_raise():
    system, nets, x0 = make()
    x0.requires_grad_()
    value = ws.rollout(system, ws.Ensemble(nets), x0, horizon=HORIZON).loss.sum()
    (gradient,) = torch.autograd.grad(value, x0, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.square().sum().backward()


# What does not fit


class Own(ws.MLP):
    """A subclass may compute anything."""


@pytest.mark.parametrize(
    "policies, error, message",
    [
        (list, ValueError, "policies is empty, expected at least one"),
        (lambda: make_net(CART), TypeError, "policies is of type MLP, expected a list"),
        (lambda: iter([make_net(CART)]), TypeError, "expected a list of policies"),
        (lambda: [make_net(CART), 3], TypeError, "policy 1 is of type int"),
        (lambda: [Evaluated(make_net(CART))], TypeError, "policy 0 is of type Evaluated, expected a plain"),
        (lambda: [Own(6, (9,), 1)], TypeError, "policy 0 is of type Own"),
        (
            lambda: [ws.WaveCNN(8), ws.MLP(16, (9,), 1)],
            TypeError,
            "policy 1 is of type MLP, expected WaveCNN",
        ),
        (
            lambda: [make_net(CART), make_net(CART, (9, 8))],
            ValueError,
            r"operations 6\|linear 0 9 p0 p1\|tanh 1\|linear 2 8",
        ),
        (
            lambda: [ws.WaveCNN(8, 4), ws.WaveCNN(8, 5)],
            ValueError,
            r"policy 1 has the operations 16\|conv 0 5",
        ),
        (
            lambda: [make_net(CART), make_net(CART).float()],
            TypeError,
            "is torch.float32, expected torch.float64",
        ),
        (lambda: [make_net(CART), make_net(CART).to("meta")], ValueError, "is on meta, expected cpu"),
        (
            lambda: [make_net(CART), make_net(CART).requires_grad_(False)],
            ValueError,
            "requires_grad=False, expected True like policy 0; freeze it in all",
        ),
    ],
)
def test_members_that_do_not_fit(policies, error, message):
    with pytest.raises(error, match=message):
        ws.Ensemble(policies())


def test_a_hooked_member():
    nets = [make_net(CART), make_net(CART)]
    nets[1].register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match="policy 1 is a changed MLP"):
        ws.Ensemble(nets)


@pytest.mark.parametrize("shape", [(2, 5, 6), (4, 5, 6), (3, 5, 7), (5, 7), (3, 1, 5, 6), (6,)])
def test_states_that_do_not_fit(shape):
    system, nets, _ = make()
    ensemble, x0 = ws.Ensemble(nets), torch.zeros(shape, dtype=torch.float64)
    for call in (ws.rollout, ws.gradient_pair):
        with pytest.raises(ValueError, match=r"expected \(nworld, 6\) or \(3, nworld, 6\)"):
            call(system, ensemble, x0, horizon=HORIZON)
    if shape != (3, 1, 5, 6) and shape[-1] == 6 and len(shape) == 3:
        with pytest.raises(ValueError, match=r"expected \(n, in_size\) or \(3, n, in_size\)"):
            ensemble(x0)


def test_stacked_states_of_a_single_policy():
    system, nets, x0 = make()
    with pytest.raises(ValueError, match=r"expected \(nworld, 6\) for CartPole"):
        ws.rollout(system, nets[0], x0, horizon=HORIZON)


def test_states_that_are_not_finite():
    system, nets, x0 = make()
    x0[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of 15 worlds hold NaN or infinity .world 2 of member 1"):
        ws.rollout(system, ws.Ensemble(nets), x0, horizon=HORIZON)


def test_types_and_sizes_that_do_not_fit():
    system, nets, x0 = make()
    ensemble = ws.Ensemble(nets)
    with pytest.raises(TypeError, match="parameter '0.weight' is torch.float64, expected torch.float32"):
        ws.rollout(system, ensemble, x0.float(), horizon=HORIZON)
    with pytest.raises(ValueError, match="policy maps 6 inputs to 1 outputs, expected 10"):
        ws.rollout(ws.CartPole(poles=4), ensemble, torch.zeros(5, 10, dtype=x0.dtype), horizon=HORIZON)
    with pytest.raises(ValueError, match="loss returned a tensor of shape"):
        ws.rollout(system, ensemble, x0, horizon=HORIZON, loss=lambda x, u: x.mean((0, 1)))


class Louder(ws.Ensemble):
    """A subclass may compute anything."""


def hooked(nets):
    ensemble = ws.Ensemble(nets)
    ensemble.register_forward_hook(lambda *args: None)
    return ensemble


def replaced(nets):
    ensemble = ws.Ensemble(nets)
    ensemble.get_submodule("0").weight = torch.nn.Parameter(torch.zeros(2, 9, 6, dtype=torch.float64))
    return ensemble


def parametrized(nets):
    ensemble = ws.Ensemble(nets)
    torch.nn.utils.parametrizations.weight_norm(ensemble.get_submodule("0"))
    return ensemble


@pytest.mark.parametrize("change", [Louder, hooked, replaced, parametrized])
def test_changed_ensembles(change):
    system, nets, x0 = make()
    for call in (ws.rollout, ws.gradient_pair):
        with pytest.raises(TypeError, match=rf"{call.__name__}: policy is a changed Ensemble .* members\(\)"):
            call(system, change(nets), x0, horizon=HORIZON)


def test_ensembles_on_a_tape():
    wp = pytest.importorskip("warp")
    system, nets, x0 = make()
    with wp.Tape() as tape, pytest.raises(TypeError, match=r"policy is an Ensemble.*members\(\)"):
        ws.record_rollout(tape, system, ws.Ensemble(nets), x0[0], horizon=HORIZON)


@pytest.mark.parametrize(
    "index, error", [(3, IndexError), (-4, IndexError), ("0", TypeError), (True, TypeError)]
)
def test_index_that_does_not_fit(index, error):
    with pytest.raises(error, match="Ensemble: index"):
        ws.Ensemble(make()[1])[index]

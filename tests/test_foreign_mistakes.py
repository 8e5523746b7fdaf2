"""What would give a foreign simulator a wrong gradient, or none, is refused; each mistake planted once."""

import re

import pytest
import torch
import warp as wp
from cases import make_net, make_states
from foreign_carts import jax_cart, numbers, sizes, tape_cart
from reference import cartpole

import warp_sims as ws

CART = ws.CartPole(poles=2)
WORLDS = 3


def right(x, u):
    return cartpole.step(x, u, **numbers(CART))


def run(system, dtype=torch.float64, worlds=WORLDS, **options):
    """One update; raises where the system is refused."""
    net, x0 = make_net(CART, dtype=dtype), make_states(CART, worlds, dtype)
    out = ws.rollout(system, net, x0, horizon=4, flow="C", **options)
    out.loss.backward()


def of(step, **options):
    options = {"loss": cartpole.loss} | options
    return ws.TorchSystem(step, **sizes(CART), **options)


COLUMNS = [slice(i, i + 1) for i in range(6)]


def dropped(column):
    """The step with one component of its state cut off."""

    def step(x, u):
        return right(torch.cat([x[:, c].detach() if c == column else x[:, c] for c in COLUMNS], dim=1), u)

    return step


def scaled(output, factor):
    """The step with the gradient of one component of its next state scaled."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(y):
            return y.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, adj):
            return factor * adj

    def step(x, u):
        y = right(x, u)
        return torch.cat([Scale.apply(y[:, c]) if c == output else y[:, c] for c in COLUMNS], dim=1)

    return step


WRONG_GRADIENTS = (
    {f"drops x[{i}]": dropped(c) for i, c in enumerate(COLUMNS)}
    | {f"scales x_next[{i}] by 0.999": scaled(c, 0.999) for i, c in enumerate(COLUMNS)}
    | {f"negates x_next[{i}]": scaled(c, -1.0) for i, c in enumerate(COLUMNS)}
    | {"drops u[0]": lambda x, u: right(x, u.detach())}
    | {"a term through numpy": lambda x, u: right(x, u) + torch.from_numpy(0.1 * x.detach().numpy())}
    | {"a term through no_grad": lambda x, u: right(x, u) + 0.01 * torch.no_grad()(torch.sin)(x)}
)


@pytest.mark.parametrize("rowwise", [True, False], ids=["rows", "steps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mistake", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_refused(mistake, dtype, rowwise):
    with pytest.raises(ValueError, match=r"d x_next\[\d\] / d [xu]\[\d\] is .* by finite differences"):
        run(of(WRONG_GRADIENTS[mistake], rowwise=rowwise), dtype)


@pytest.mark.parametrize("rowwise", [True, False], ids=["rows", "steps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_right_one_is_not(dtype, rowwise):
    run(of(right, rowwise=rowwise), dtype)


def test_a_wrong_one_may_be_meant():
    run(of(WRONG_GRADIENTS["drops u[0]"], check=False))


def test_the_wrong_derivative_is_named():
    with pytest.raises(ValueError, match=r"d x_next\[\d\] / d x\[4\] is 0 by the simulator"):
        run(of(dropped(COLUMNS[4])))


def remembering():
    calls = []

    def step(x, u):
        calls.append(1)
        return right(x, u) + 1e-3 * len(calls)

    return step


def in_place(x, u):
    x[:, 0] += 1.0
    return right(x, u)


OTHER = {
    "returns another shape": (
        lambda x, u: right(x, u)[:, :4],
        ValueError,
        r"shape \(3, 4\) for states of shape",
    ),
    "returns another dtype": (lambda x, u: right(x, u).float(), TypeError, "torch.float32 for states of"),
    "returns no tensor": (lambda x, u: right(x, u).numpy(), TypeError, "returned ndarray"),
    "cut off from its inputs": (lambda x, u: right(x, u).detach(), ValueError, "without a gradient"),
    "changes its input": (in_place, ValueError, "in place"),
    "draws noise": (lambda x, u: right(x, u) + torch.rand_like(x), ValueError, "no random numbers"),
    "remembers": (remembering(), ValueError, "no state of its own"),
    "mixes rows": (lambda x, u: right(x, u) + x.mean(0), ValueError, "rowwise=False"),
}


@pytest.mark.parametrize("mistake", OTHER)
def test_what_a_step_must_not_do(mistake):
    step, error, words = OTHER[mistake]
    with pytest.raises(error, match=words):
        run(of(step))


LOSSES = {
    "scalar": (lambda x: x.square().mean(), ValueError, r"expected \(3,\)"),
    "no tensor": (lambda x: 0.0, TypeError, "returned float"),
    "mixes rows": (lambda x: (x - x.mean(0)).square().sum(1), ValueError, "cost changed"),
    "drops a part": (
        lambda x: x[:, 0].square() + x[:, 1].detach().square(),
        ValueError,
        r"d x\[1\]|the cost / d x\[1\]",
    ),
}


@pytest.mark.parametrize("mistake", LOSSES)
def test_what_a_loss_must_not_do(mistake):
    loss, error, words = LOSSES[mistake]
    with pytest.raises(error, match=words):
        run(of(right, loss=loss))


def test_a_step_that_changes_later_is_caught_in_the_backward_pass():
    shift = [0.0]
    system = of(lambda x, u: right(x, u) + shift[0])
    run(system)
    net, x0 = make_net(CART), make_states(CART, WORLDS)
    out = ws.rollout(system, net, x0, horizon=4, flow="R")
    shift[0] = 0.1
    with pytest.raises(ValueError, match=r"at step \d, world .* when recomputed"):
        out.loss.backward()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"state_size": 0}, ValueError, "state_size is 0, expected at least 1"),
        ({"state_size": 2.0}, TypeError, "state_size is 2.0"),
        ({"control_size": True}, TypeError, "control_size is True"),
        ({"loss": "final"}, TypeError, "loss is 'final'"),
        ({"rowwise": 1}, TypeError, "rowwise is 1"),
    ],
)
def test_arguments(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ws.TorchSystem(right, **(sizes(CART) | options))


def test_a_loss_that_is_missing_is_refused_in_a_compiled_graph_too():
    """Where a graph is traced, no check of arguments can ask for it."""
    system, net = of(right, loss=None), make_net(CART)
    traced = torch.compile(lambda x: ws.rollout(system, net, x, horizon=2).loss, backend="eager")
    with pytest.raises(Exception, match="no loss of its own; pass a callable of"):
        traced(make_states(CART, 2))


def test_what_needs_kernels_says_so():
    system = of(right)
    with pytest.raises(TypeError, match="no device functions"):
        ws.check(system)
    members = ws.Ensemble([make_net(CART) for _ in range(2)])
    with pytest.raises(ValueError, match="one by one"):
        ws.rollout(system, members, make_states(CART, 2), horizon=2)
    with pytest.raises(ValueError, match="no loss of its own"):
        run(of(right, loss=None))
    with pytest.raises(ValueError, match="maps 6 inputs"):
        ws.rollout(
            ws.TorchSystem(right, state_size=4, control_size=1),
            make_net(CART),
            torch.zeros(1, 4).double(),
            horizon=2,
            loss=None,
        )


def test_what_is_to_be_learned_is_no_number():
    mass = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match="step uses a tensor that requires a gradient besides"):
        run(of(lambda x, u: mass * right(x, u)))
    with pytest.raises(TypeError, match="loss uses a tensor that requires a gradient besides"):
        run(of(right, loss=lambda x: mass * x[:, 0]))
    run(of(lambda x, u: mass.detach() * right(x, u)))


def test_systems_are_told_apart():
    assert of(right) != of(right)
    system = of(right)
    assert system == system and len({system, of(right)}) == 2


def test_jax_says_no_to_float64():
    pytest.importorskip("jax")
    with pytest.raises(TypeError, match="jax_enable_x64"):
        run(jax_cart(CART))


def test_a_wrong_gradient_of_jax():
    jax = pytest.importorskip("jax")
    system = jax_cart(CART)
    step = system._step
    cut = ws.JaxSystem(lambda x, u: step(jax.lax.stop_gradient(x), u), **sizes(CART))
    with pytest.raises(ValueError, match="by finite differences"):
        run(cut, torch.float32, loss=lambda x, u: x.square().mean())
    with pytest.raises(TypeError, match="returned list"):
        run(ws.JaxSystem(lambda x, u: [x], **sizes(CART)), torch.float32, loss=lambda x, u: x.square().mean())


def test_a_tape_has_a_number_of_worlds_and_a_dtype():
    system = tape_cart(CART, WORLDS)
    assert system.nworld == WORLDS
    with pytest.raises(ValueError, match="given 5 worlds, expected 3"):
        run(system, worlds=5)
    with pytest.raises(TypeError, match=r"torch\.float32, expected torch\.float64"):
        run(system, torch.float32)


def test_a_stale_pull_is_refused():
    system, x = tape_cart(CART, WORLDS), make_states(CART, WORLDS)
    u = torch.zeros(WORLDS, 1, dtype=torch.float64)
    _, pull = system.linearize(x, u)
    first = pull(torch.ones_like(x))
    for again, before in zip(pull(torch.ones_like(x)), first):  # gradients do not pile up
        assert torch.equal(again, before)
    system.advance(x, u)
    with pytest.raises(ValueError, match="overwritten the arrays"):
        pull(torch.ones_like(x))


@wp.kernel
def double(x: wp.array2d(dtype=wp.float64), u: wp.array2d(dtype=wp.float64), y: wp.array2d(dtype=wp.float64)):
    i, j = wp.tid()
    y[i, j] = wp.float64(2.0) * x[i, j] + u[i, 0] * u[i, 0]


def tape_of(launch_of, grads=(True, True, True), shapes=((3, 2), (3, 1), (3, 2))):
    x, u, y = (wp.zeros(s, dtype=wp.float64, requires_grad=g) for s, g in zip(shapes, grads))
    return ws.TapeSystem(
        lambda: launch_of(x, u, y), inputs=[x], controls=[u], outputs=[y], state_size=2, control_size=1
    )


def doubled(x, u, y):
    wp.launch(double, dim=x.shape, inputs=[x, u], outputs=[y])


def writes_its_input(x, u, y):
    doubled(x, u, y)
    wp.copy(x, y)


def through_an_array_without_gradient(x, u, y):
    between = wp.zeros(x.shape, dtype=wp.float64)
    wp.launch(double, dim=x.shape, inputs=[x, u], outputs=[between])
    wp.copy(y, between)


def copies(x, u, y, kept={}):  # noqa: B006
    between = kept.setdefault(x.ptr, wp.zeros(x.shape, dtype=wp.float64, requires_grad=True))
    wp.launch(double, dim=x.shape, inputs=[x, u], outputs=[between])
    wp.copy(y, between)


def test_gradients_do_not_pile_up_in_between():
    system = tape_of(copies)
    x, u = torch.full((3, 2), 0.5, dtype=torch.float64), torch.full((3, 1), 0.3, dtype=torch.float64)
    _, pull = system.linearize(x, u)
    for _ in range(2):
        for array in (*system._tape.inputs, *system._tape.outputs):
            array.grad.fill_(5.0)  # whatever another tape has left
        adj_x, adj_u = pull(torch.ones_like(x))
        assert torch.equal(adj_x, torch.full_like(x, 2.0))
        assert torch.allclose(adj_u, torch.full_like(u, 2 * 2 * 0.3), rtol=1e-15)


def test_mistakes_on_a_tape():
    x = torch.full((3, 2), 0.5, dtype=torch.float64)
    u = torch.full((3, 1), 0.3, dtype=torch.float64)
    ws.step(tape_of(doubled), x, u)
    with pytest.raises(ValueError, match="changed its inputs"):
        ws.step(tape_of(writes_its_input), x, u)
    with pytest.raises(ValueError, match="by finite differences"):
        ws.step(tape_of(through_an_array_without_gradient), x, u)
    with pytest.raises(ValueError, match="has no gradient"):
        tape_of(doubled, grads=(True, False, True))
    with pytest.raises(ValueError, match=r"controls hold 2 worlds"):
        tape_of(doubled, shapes=((3, 2), (2, 1), (3, 2)))
    with pytest.raises(ValueError, match="inputs hold 5 numbers"):
        tape_of(doubled, shapes=((5, 1), (3, 1), (3, 2)))

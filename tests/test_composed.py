"""Policies that are composed of the grammar's elements: their gradients against autograd in float64, what
runs fused, and what does not, with the reason.
"""

import pytest
import torch
from cases import assert_close, cost_of, error_of, make_cotangents, make_states, step_of
from composed_nets import (
    ACTIVATIONS,
    NORMS,
    PADDED,
    Bounded,
    Channels,
    Features,
    Gain,
    Position,
    Residual,
    SharedNorm,
    Skips,
    Standardized,
    Table,
    Turned,
    convolved,
    everything,
    filled,
    networks,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_systems import Unicycle
from reference import rollout as oracle
from torch import nn
from torch.nn import functional
from warp_sims.bridge.passes.operations import evaluate
from warp_sims.kernels.policy.layout import layout
from warp_sims.kernels.policy.table import Column

import warp_sims as ws
from warp_sims.policies.networks import recognise

# Relative to the norm of all gradients together: a bias before a normalisation has a gradient that is zero
# but for rounding. Both sides round at every step, and the feedback amplifies it.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-4}
UNDECIDED = 1e-9
"""Size, relative to all gradients, below which rounding decides the sign of a component."""

CART = ws.CartPole(poles=1, dt=0.05)
TWO = Unicycle()


def found_of(system, policy, x0, horizon, flow, cotangents, **options):
    """Gradients by parameter name, and of "x0", of one rollout."""
    policy.zero_grad()
    x0 = x0.clone().requires_grad_()
    loss = None if system is TWO else "final"
    out = ws.rollout(system, policy, x0, horizon=horizon, flow=flow, loss=loss, **options)
    assert out.fused, out.path
    outputs, adjoints = [out.states, out.controls], list(cotangents[:2])
    if loss:
        outputs, adjoints = [*outputs, out.loss], list(cotangents)
    torch.autograd.backward(outputs, adjoints)
    return {name: q.grad for name, q in policy.named_parameters()} | {"x0": x0.grad}


def check(system, policy, nworld, horizon, flow, decay=1.0, tolerance=TOLERANCE[torch.float64], **options):
    """Holds the gradients of a rollout against autograd through the unrolled loop."""
    x0 = make_states(system, nworld)
    cotangents = make_cotangents(system, horizon, nworld)
    own = None if system is TWO else oracle.final(cost_of(system))
    objective = oracle.weighted(cotangents.states, cotangents.controls, own, cotangents.loss)
    found = found_of(system, policy, x0, horizon, flow, cotangents, decay=decay, **options)
    fields = [
        oracle.gradients(step_of(system), policy, x0, letter, horizon, objective, decay=decay)
        for letter in ("MR" if flow == "C" else flow)
    ]
    named = [f.parameters | {"x0": f.x0} for f in fields]
    size = sum(float(g.square().sum()) for f in named for g in f.values()) ** 0.5
    for name, base in named[0].items():
        expected, decided = base, torch.ones_like(base, dtype=torch.bool)
        if flow == "C":
            other = named[1][name]
            expected = torch.where(base.sign() == other.sign(), base, 0.0)
            decided = (base.abs() > UNDECIDED * size) & (other.abs() > UNDECIDED * size)
        off = torch.where(decided, found[name] - expected, 0.0).abs().max() / size
        assert float(off) <= tolerance, (name, float(off))


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.data(),
    st.sampled_from([CART, TWO]),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from("RMNSC"),
    st.sampled_from([1.0, 0.7, 0.0]),
    st.sampled_from([None, 1, 2]),
)
def test_gradients_of_random_compositions(data, system, nworld, horizon, flow, decay, every):
    policy = data.draw(networks(system.state_size, system.control_size))
    check(system, policy, nworld, horizon, flow, decay, checkpoint_every=every)


class Written(nn.Module):
    """A convolution by torch's functions, of a value with one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(2, 1, 3)), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        n, width = x.shape
        h = functional.pad(x.reshape(n, 1, width), (1, 2), mode="circular")
        h = functional.conv1d(h, self.weight, self.bias, stride=2)
        return torch.flatten(h, 1)[:, : width // 2 * 2]


def around_convolution(**options):
    """20 components to 20, through channels of several widths."""
    options = {"padding": 2} | options
    first = nn.Conv1d(2, 17, 3, **options)
    length = first(torch.zeros(1, 2, 10)).shape[-1]
    return nn.Sequential(Table(2), first, nn.GELU(), nn.Flatten(), nn.Linear(17 * length, 20))


ELEMENTS = {
    **ACTIVATIONS,
    **{f"{name} norm": lambda make=make: make(20) for name, make in NORMS.items()},
    "gain": lambda: Gain(20),
    "norm read twice": lambda: SharedNorm(20),
    "residual": lambda: Residual(nn.Sequential(nn.Linear(20, 20), nn.SiLU()), minus=False),
    "skips": lambda: Skips(20),
    "minus residual": lambda: Residual(nn.Linear(20, 20), minus=True),
    "scaled and shifted": lambda: Standardized(20),
    **{f"convolution, {mode}": lambda mode=mode: around_convolution(padding_mode=mode) for mode in PADDED},
    "convolution of windows apart": lambda: around_convolution(stride=3, padding=0),
    "convolution, same": lambda: around_convolution(padding="same", padding_mode="circular"),
    "convolution, same, even": lambda: nn.Sequential(
        Table(4), nn.Conv1d(4, 4, 2, padding="same"), nn.Conv1d(4, 4, 4, padding="same"), nn.Flatten()
    ),
    "convolution, a position": lambda: nn.Sequential(Table(4), nn.Conv1d(4, 20, 4, 3), nn.Flatten()),
    "linear by position": lambda: nn.Sequential(Table(4), Position(4, 4), nn.Flatten()),
    "channels": lambda: nn.Sequential(Table(4), Channels(4, 5), Turned()),
    "functional convolution": lambda: Written(),
    "bound": lambda: Bounded(smooth=True),
    "bound by tanh": lambda: Bounded(smooth=False),
}


def around(element: nn.Module, system, width=20) -> nn.Sequential:
    """The element behind and before a linear layer."""
    return nn.Sequential(nn.Linear(system.state_size, width), element, nn.Linear(width, system.control_size))


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of even kernels, torch's own
@pytest.mark.parametrize("system", [CART, TWO], ids=["one control", "two controls"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_every_element(name, system):
    policy = filled(around(ELEMENTS[name](), system), 5)
    for flow in "RC":
        check(system, policy, 5, 7, flow)


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_element_in_single_precision(name):
    """Against the same in double precision."""
    policy = filled(around(ELEMENTS[name](), CART), 5)
    x0, cotangents = make_states(CART, 6), make_cotangents(CART, 8, 6)
    expected = found_of(CART, policy, x0, 8, "R", cotangents)
    single = [c.float() for c in cotangents]
    found = found_of(CART, policy.float(), x0.float(), 8, "R", single)
    size = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) <= TOLERANCE[torch.float32] * size, key


def test_large_inputs_of_activations():
    """Where exponentials overflow, in both precisions, values and slopes are those of torch."""
    for dtype in (torch.float32, torch.float64):
        points = torch.tensor(
            [-1e4, -800.0, -90.0, -30.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 30.0, 90.0, 800.0, 1e4]
        )
        for name in ACTIVATIONS:
            net = nn.Sequential(nn.Linear(4, 13), ACTIVATIONS[name](), nn.Linear(13, 1)).to(dtype)
            with torch.no_grad():
                net[0].weight.zero_()
                net[0].bias.copy_(points)
                net[2].weight.copy_(torch.linspace(0.1, 1.0, 13))  # no two terms of the control cancel
            x0 = torch.zeros(3, 4, dtype=dtype)
            out = ws.rollout(CART, net, x0, horizon=1, flow="R", loss=None)
            (grad,) = torch.autograd.grad(out.controls.sum(), net[0].bias)
            control = net(x0)
            (expected,) = torch.autograd.grad(control.sum(), net[0].bias)
            assert out.fused
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            assert_close(out.controls[0], control, tolerance)
            assert_close(grad, expected, tolerance)


def test_features_and_parts():
    check(CART, filled(nn.Sequential(Features(4), nn.Linear(9, 1)), 3), 5, 6, "R")
    check(
        CART, filled(nn.Sequential(Features(4), nn.Linear(9, 6), Features(6), nn.Linear(13, 1)), 3), 5, 6, "R"
    )


def test_convolutions_of_an_ensemble():
    """Each member has the bits that it has alone."""

    def make(seed):
        first = nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 17, 3, padding=1, padding_mode="circular"), nn.SiLU()
        second = nn.Conv1d(17, 3, 2, padding=1), nn.LayerNorm((3, 3)), nn.Flatten(), nn.Linear(9, 1)
        return filled(nn.Sequential(*first, *second), seed)

    policies = [make(seed) for seed in (3, 4, 5)]
    x0 = make_states(CART, 15).unflatten(0, (3, 5))
    ensemble = ws.Ensemble(policies)
    together = ws.rollout(CART, ensemble, x0, horizon=6, flow="C")
    assert together.fused
    together.loss.sum().backward()
    stacked = dict(ensemble.named_parameters())
    for k, policy in enumerate(policies):
        alone = ws.rollout(CART, policy, x0[k], horizon=6, flow="C")
        alone.loss.backward()
        assert torch.equal(together.states[:, k], alone.states)
        found = [q.grad[k] for q in stacked.values()]
        assert all(map(torch.equal, found, [q.grad for q in policy.parameters()]))


def test_controls_of_a_convolution():
    """Whose last vector ends behind its section, where the factor of a normalisation stands."""
    before = nn.Linear(3, 6), nn.LayerNorm(6, elementwise_affine=False)
    policy = nn.Sequential(*before, Table(1), nn.Conv1d(1, 1, 5), nn.Flatten())
    for flow in "RC":
        check(TWO, filled(policy, 3), 5, 5, flow)


def test_convolutions_of_convolutions():
    """In a row, with several controls, and of more channels than a tile is wide."""
    for system in (CART, TWO):
        if system.state_size % 2 == 0:
            policy = convolved(system.state_size, system.control_size, 3)
        else:
            line = Table(1), nn.Conv1d(1, 5, 2), nn.SiLU(), nn.Conv1d(5, 3, 2, padding=1), nn.Flatten()
            policy = filled(nn.Sequential(*line, nn.Linear(9, system.control_size)), 3)
        for flow in "RMCN":
            check(system, policy, 6, 5, flow)
        check(system, policy, 6, 5, "R", checkpoint_every=2)
    wide = nn.Conv1d(2, 100, 2, padding=1), nn.Tanh(), nn.Conv1d(100, 70, 2), nn.Tanh(), Turned()
    check(CART, filled(nn.Sequential(Table(2), *wide, nn.Linear(140, 1)), 3), 9, 3, "C")


class Cosine(nn.Module):
    def forward(self, x):
        return torch.cos(x)


def test_positions_with_gaps_behind_them():
    """Of 14 and 15 channels, a whole vector apart: read by convolutions, by a layer, and by what reorders
    them, for zeros around them and for channels first; cosine makes gaps that are not zero.
    """
    first = Table(2), nn.Conv1d(2, 14, 1), Cosine()
    middle = nn.Conv1d(14, 15, 2, padding=1), nn.SiLU()
    ends = {
        "reordered": (nn.Flatten(), nn.Linear(45, 1)),
        "by position": (nn.Conv1d(15, 14, 1), nn.Tanh(), Turned(), nn.Linear(42, 1)),
    }
    for end in ends.values():
        policy = filled(nn.Sequential(*first, *middle, *end), 3)
        found = layout(ws.policies.networks.fused_network(policy, 4).description, 8)
        steps = [found.column(i, Column.STEP) for i in found.linear if found.column(i, Column.POSITIONS) > 1]
        assert set(steps) == {16}
        for flow in "RC":
            check(CART, policy, 9, 4, flow)


@pytest.mark.parametrize("make", [convolved, everything])
def test_no_row_is_read_before_it_is_written(make, monkeypatch):
    """Where memory that torch gives is NaN, the bits are those that they are with zeros in it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    policy, x0 = make(4, 1, 3), make_states(CART, 6)
    cotangents = make_cotangents(CART, 5, 6)
    expected = found_of(CART, policy, x0, 5, "R", cotangents)
    torch.use_deterministic_algorithms(True)
    try:
        found = found_of(CART, policy, x0, 5, "R", cotangents)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], g) for name, g in expected.items())


def test_published_sizes():
    """ELU and LayerNorm, as reinforcement learning uses them, in tiles of every width."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((4, 400), (400, 200), (200, 100)):
        layers += [nn.Linear(n_in, n_out), nn.ELU(), nn.LayerNorm(n_out)]
    check(CART, filled(nn.Sequential(*layers, nn.Linear(100, 1)), 3), 9, 5, "C")


# What runs fused


def test_buffers_are_read_at_every_rollout():
    policy = filled(nn.Sequential(Standardized(4), nn.Linear(4, 1)), 2)
    x0 = make_states(CART, 3)
    before = ws.rollout(CART, policy, x0, horizon=2)
    policy[0].mean.add_(1.0)
    after = ws.rollout(CART, policy, x0, horizon=2)
    assert before.fused and after.fused
    assert_close(after.controls[0], policy(x0).detach(), 1e-12)
    assert error_of(after.controls[0], before.controls[0]) > 0.01


class Switched(nn.Module):
    """What it does depends on attributes, some of them inside others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.options, self.scale = nn.Linear(4, 1), {"squash": [True]}, 2.0

    def forward(self, x):
        u = self.scale * self.layer(x)
        return u.tanh() if self.options["squash"][0] else u


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "scale", 3.0),
        lambda p: p.options["squash"].__setitem__(0, False),
        lambda p: setattr(p, "layer", nn.Linear(4, 1, dtype=torch.float64)),
        lambda p: p.layer.weight.data.mul_(2.0),
    ],
    ids=["number", "nested", "layer", "weights"],
)
def test_a_changed_module_is_traced_anew(change):
    policy, x0 = filled(Switched(), 4), make_states(CART, 3)
    assert ws.rollout(CART, policy, x0, horizon=1).fused
    change(policy)
    out = ws.rollout(CART, policy, x0, horizon=1)
    assert out.fused
    assert_close(out.controls[0], policy(x0), 1e-12)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 1), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


class Misleading(nn.Module):
    """Its graph is not what it computes: it looks at what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x) if isinstance(x, torch.fx.Proxy) else 2 * self.layer(x)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        return self.a(x) * self.b(x)


class Detached(Product):
    def forward(self, x):
        return self.a(x).detach() + self.b(x)


class Branching(Product):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        h = self.layer(x)
        return self.out(self.relu(h) + h)


class Cube(nn.Module):
    def forward(self, x):
        return x.view(-1, 1, 2, 2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.inner(self.inner(x)))


def hooked():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    net[1].register_forward_hook(lambda module, args, output: 2 * output)
    return net


def parametrized():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    nn.utils.parametrizations.weight_norm(net[0])
    return net


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    net[2].weight = net[0].weight
    return net


class DoubleLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def through(layer, width):
    """The layer between (n, 2, 2) and a linear layer that reads so many components."""
    return lambda: nn.Sequential(Table(2), layer, nn.Flatten(), nn.Linear(width, 1))


REFUSED = {
    "dilation": (through(nn.Conv1d(2, 3, 2, dilation=2, padding=1), 6), "dilation 2, expected 1"),
    "groups": (through(nn.Conv1d(2, 4, 2, groups=2), 4), "2 groups, expected 1"),
    "pooling": (through(nn.AvgPool1d(2), 2), "AvgPool1d"),
    "norm of positions": (through(nn.LayerNorm(2), 4), "normalisation is over (2,), expected (2, 2)"),
    "three axes": (lambda: nn.Sequential(Cube(), nn.Flatten(), nn.Linear(4, 1)), "more than two axes"),
    "hook": (hooked, "hook"),
    "parametrization": (parametrized, "ParametrizedLinear"),
    "tied": (tied, "shared"),
    "counting": (Counting, "changes its attributes"),
    "misleading": (Misleading, "other controls than its graph"),
    "product": (Product, "multiplied"),
    "detached": (Detached, "detach"),
    "branching": (Branching, "torch.fx cannot trace it"),
    "in place": (InPlace, "in place"),
    "used twice": (Twice, "used twice"),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval(),
        "BatchNorm1d",
    ),
    "negative slope": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(-0.5), nn.Linear(3, 1)), "slope"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_evaluates_says_why(name):
    make, reason = REFUSED[name]
    policy, x0 = filled(make(), 6), make_states(CART, 3)
    found = recognise(policy, 4)
    assert isinstance(found, str) and reason in found, found
    if name == "counting":
        return  # the torch path refuses it, too
    out = ws.rollout(CART, policy, x0, horizon=1, flow="R")
    assert not out.fused and reason in out.path
    assert_close(out.controls[0], policy(x0), 1e-12)


@pytest.mark.parametrize(
    "layers, reason",
    [
        ((Table(1), nn.Linear(4, 1)), "its output has shape (n, 1, 1), expected (n, controls)"),
        ((nn.Conv1d(4, 1, 1),), "reads a value of shape (n, 4), expected (n, 4, length)"),
        ((Table(2), nn.Conv1d(3, 1, 1), nn.Flatten()), "(n, 2, 2), expected (n, 3, length)"),
        ((Table(2), nn.Conv1d(2, 1, 3), nn.Flatten()), "3 positions reads 2"),
        (
            (Table(2), nn.Conv1d(2, 1, 3, padding=2, padding_mode="reflect"), nn.Flatten()),
            "(2, 2) of reflect",
        ),
        ((nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 1, 1), nn.Flatten()), "is given the shape (3, 1)"),
    ],
)
def test_what_fails_in_torch_too_says_why(layers, reason):
    found = ws.explain(nn.Sequential(*layers), 4)
    assert "torch evaluates it" in found and reason in found, found


def test_explain_knows_the_states_of_a_convolution():
    layers = nn.Unflatten(1, (2, -1)), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(3, 1)
    assert "expected in_size" in ws.explain(nn.Sequential(*layers))
    sized = nn.Sequential(nn.Unflatten(1, (2, 2)), *layers[1:])
    assert "runs inside the sweep, 4 to 1" in ws.explain(sized)


def test_a_subclass_that_keeps_to_the_grammar_means_what_it_does():
    policy = filled(nn.Sequential(nn.Linear(4, 5), nn.ELU(), DoubleLinear(5, 1)), 3)
    check(CART, policy, 4, 5, "R")


def test_the_description_is_what_the_module_computes():
    policy, x = (
        filled(nn.Sequential(Features(4), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 1)), 3),
        make_states(CART, 4),
    )
    found = recognise(policy, 4)
    assert not isinstance(found, str)
    assert_close(
        evaluate(found.description, list(found.parameters.values()), found.constants, x), policy(x), 1e-14
    )

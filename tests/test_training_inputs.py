"""Training with inputs, and with other combinations of two gradients: against plain loops, and resumed."""

import functools

import pytest
import torch
from cases import assert_close, cost_of, make_net, step_of
from reference import rollout as oracle

import warp_sims as ws
from warp_sims.cli import main
from warp_sims.training.optimizers import KerasAdam

CART = ws.CartPole(poles=1)
TOLERANCE = 1e-11
"""Of weights behind six updates in float64."""
SETTINGS = {"horizon": 7, "samples": 6, "batch": 2, "lr": 1e-2, "dtype": "float64", "seed": 3}


class Tracker(torch.nn.Module):
    """Controls from states and a reference of two numbers."""

    def __init__(self):
        super().__init__()
        self.net = make_net(CART)
        self.gain = torch.nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def forward(self, x, reference):
        return torch.tanh(self.net(x)) + (reference * self.gain * x[:, :2]).sum(1, keepdim=True)


def references(x0, horizon, generator):
    return torch.randn(horizon, x0.shape[0], 2, generator=generator, dtype=x0.dtype)


def gaussian():
    return ws.GaussianPolicy(make_net(CART), std=0.3)


def config(policy, **more):
    return ws.TrainConfig(CART, policy, **SETTINGS | {"epochs": 2, "inputs": None} | more)


def trained(policy, **more):
    ws.train(config(policy, **more), progress=False)
    return [p.detach().clone() for p in policy.parameters()]


def by_loop(policy, draw, flow, combine=None):
    """The weights behind two epochs of a plain loop; `draw` gives the inputs of an update."""
    optimizer = KerasAdam(policy.parameters(), lr=SETTINGS["lr"])
    states = CART.initial_states(SETTINGS["samples"], seed=SETTINGS["seed"]).double()
    update = 0
    for _ in range(2):
        for x0 in states.split(SETTINGS["batch"]):
            given, fields = draw(x0, update), []
            for letter in flow:
                x = x0
                for t in range(SETTINGS["horizon"]):
                    seen = x if letter == "R" else x.detach()
                    u = policy(seen) if given is None else policy(seen, given[t])
                    x = step_of(CART)(x, u)
                fields.append(torch.autograd.grad(cost_of(CART)(x).mean(), list(policy.parameters())))
            for i, p in enumerate(policy.parameters()):
                pair = torch.stack([f[i] for f in fields])
                p.grad = pair[0] if combine is None else combine(pair, update)
            optimizer.step()
            update += 1
    return [p.detach() for p in policy.parameters()]


def recorded(draw):
    """A draw that keeps what it gave of each batch of an update."""
    kept = []

    def drawing(x0, horizon, generator):
        found = draw(x0, horizon, generator)
        if x0.shape[0] == SETTINGS["batch"]:
            kept.append(found)
        return found

    return drawing, kept


@pytest.mark.parametrize("flow", "RM")
def test_references(flow):
    """Weights are those of the loop, with other inputs at every update."""
    drawing, kept = recorded(references)
    found = trained(Tracker(), flow=flow, inputs=drawing)
    # the first is for the rehearsal, and is what the first update is given
    assert len(kept) == 7 and torch.equal(kept[0], kept[1])
    assert len({float(w.sum()) for w in kept}) == 6
    for a, b in zip(found, by_loop(Tracker(), lambda x0, update: kept[1 + update], flow)):
        assert_close(a, b, TOLERANCE)


def test_gaussian_policy():
    """It trains as it is, on noise of its own."""
    policy = gaussian()
    drawing, kept = recorded(lambda x0, horizon, generator: policy.draw(horizon, x0, generator=generator))
    with_drawn = trained(policy, flow="R", inputs=drawing)
    found = trained(gaussian(), flow="R")
    assert all(torch.equal(a, b) for a, b in zip(found, with_drawn))
    for a, b in zip(found, by_loop(gaussian(), lambda x0, update: kept[1 + update], "R")):
        assert_close(a, b, TOLERANCE)
    assert not torch.equal(found[0], gaussian().log_std)


@pytest.mark.parametrize(
    "combiner, combine",
    [
        (ws.Blend(0.3), lambda q, _: 0.7 * q[0] + 0.3 * q[1]),
        (ws.Anneal(1.0, 0.0, 4), lambda q, i: q[1] + min(i / 4, 1.0) * (q[0] - q[1])),
        (lambda q: q[1], lambda q, _: q[1]),
        (None, lambda q, _: oracle.combine(q[0].flatten(), q[1].flatten()).view(q[0].shape)),
    ],
    ids=["blend", "anneal", "own", "published"],
)
def test_combiners(combiner, combine):
    found = trained(make_net(CART), flow="C", combiner=combiner)
    for a, b in zip(found, by_loop(make_net(CART), lambda x0, update: None, "MR", combine)):
        assert_close(a, b, TOLERANCE)


@pytest.mark.parametrize(
    "make, more",
    [
        (Tracker, {"flow": "C", "inputs": references}),
        (gaussian, {"flow": "R"}),
        (functools.partial(make_net, CART), {"flow": "C", "combiner": ws.Anneal(1.0, 0.0, 9)}),
        (functools.partial(make_net, CART), {"flow": "C", "combiner": ws.project_conflicting}),
    ],
    ids=["references", "noise", "anneal", "project"],
)
def test_resumed_to_the_bit(make, more, tmp_path):
    whole, policy = trained(make(), epochs=4, **more), make()
    ws.train(config(policy, epochs=2, **more), tmp_path / "run", progress=False)
    policy = make()
    result = ws.train(config(policy, epochs=4, **more), tmp_path / "run", resume=True, progress=False)
    assert result.log["epoch"].tolist() == [-1, 0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(whole, policy.parameters()))


def test_what_a_run_is_resumed_with(tmp_path):
    """Other settings are refused, and a run folder says its own."""
    net, anneal = functools.partial(make_net, CART), ws.Anneal(1.0, 0.25, 9)
    ws.train(config(net(), flow="C", combiner=anneal), tmp_path / "run", progress=False)
    again, _, _ = ws.load_run(tmp_path / "run")
    assert again.combiner == anneal and again.inputs is None
    with pytest.raises(ValueError, match="begun with training combiner="):
        other = config(net(), flow="C", combiner=ws.Blend(0.5))
        ws.train(other, tmp_path / "run", resume=True, progress=False)
    ws.train(config(net(), flow="C", combiner=lambda q: q[0]), tmp_path / "own", progress=False)
    with pytest.raises(ValueError, match="combiner cannot be imported"):
        ws.load_run(tmp_path / "own")
    assert ws.load_run(tmp_path / "own", combiner=ws.project_conflicting)[0].combiner is not None


@pytest.mark.parametrize(
    "more, error, words",
    [
        ({"inputs": 3}, TypeError, "inputs=3, expected a function of"),
        ({"inputs": lambda x, t, g: x}, ValueError, r"inputs returned shape \(6, 4\), expected \(horizon"),
        ({"inputs": lambda x, t, g: None}, TypeError, "inputs returned NoneType"),
        ({"combiner": 1}, TypeError, "combiner=1, expected a function of two gradients"),
        ({"combiner": ws.Blend(0.1), "flow": "R"}, ValueError, "expected flow='combined'"),
    ],
)
def test_what_does_not_fit(more, error, words):
    with pytest.raises(error, match=words):
        trained(Tracker(), **{"flow": "C", "inputs": references} | more)


def test_annealing_is_checked():
    for given, error, words in (
        ((1.5, 0.0, 3), ValueError, "start is 1.5"),
        ((1.0, "0", 3), TypeError, "end is '0'"),
        ((1.0, 0.0, 0), ValueError, "updates is 0"),
        ((1.0, 0.0, 2.5), TypeError, "updates is 2.5"),
    ):
        with pytest.raises(error, match=words):
            ws.Anneal(*given)
    assert [ws.Anneal(1.0, 0.5, 2).at(i).weight for i in range(4)] == [1.0, 0.75, 0.5, 0.5]


def test_together(tmp_path):
    """Each has the weights that it would have alone, to the bit, resumed too."""

    def policies():
        return [ws.GaussianPolicy(make_net(CART, seed=seed), std=0.3) for seed in (1, 2)]

    for epochs in (1, 3):
        both, folders = policies(), [tmp_path / "a", tmp_path / "b"]
        ws.train_together(
            [config(policy, epochs=epochs) for policy in both], folders, resume=True, progress=False
        )
    for policy, one in zip(both, policies()):
        alone = trained(one, epochs=3)
        assert all(torch.equal(a, b) for a, b in zip(alone, policy.parameters()))


def test_an_annealed_ensemble():
    nets = [make_net(CART, seed=seed) for seed in (1, 2)]
    more = {"flow": "C", "combiner": ws.Anneal(1.0, 0.0, 4)}
    ws.train_together([config(net, **more) for net in nets], progress=False)
    for seed, net in zip((1, 2), nets):
        alone = trained(make_net(CART, seed=seed), **more)
        assert all(torch.equal(a, b) for a, b in zip(alone, net.parameters()))


def test_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_given.py").write_text(
        "import torch, warp_sims as ws\n"
        "def policy(system):\n    return ws.GaussianPolicy(ws.MLP(system.state_size, (5,), 1))\n"
        "def zeros(x0, horizon, generator):\n    return torch.zeros(horizon, x0.shape[0], 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    sizes = [
        "--horizon",
        "5",
        "--samples",
        "4",
        "--batch",
        "2",
        "--epochs",
        "2",
        "--no-progress",
        "--poles",
        "1",
    ]
    asked = ["train", "cartpole", "--policy", "mine_given:policy", *sizes]
    assert main([*asked, "--out", "noise"]) == 0
    assert main([*asked, "--out", "none", "--inputs", "mine_given:zeros", "--combiner", "project"]) == 0
    assert main(["train", "cartpole", *sizes, "--out", "r_to_m", "--combiner", "anneal:1:0:3"]) == 0
    assert ws.load_run("r_to_m")[0].combiner == ws.Anneal(1.0, 0.0, 3)
    resumed = ["train", "--resume", "none", "--policy", "mine_given:policy", "--epochs", "3", "--no-progress"]
    assert main(resumed) == 0
    assert main([*asked, "--combiner", "mean"]) == 2
    assert "unknown combiner 'mean', expected project, blend:W" in capsys.readouterr().err

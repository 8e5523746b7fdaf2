"""What surrounds a CUDA graph of an update, without a GPU: batches, records, lifetimes, refusals, optimizer.

The graphs themselves are tested on a GPU, in test_gpu.py.
"""

import gc
import weakref

import pytest
import torch
from warp_sims.bridge.runtime.arrays import constant, keeping
from warp_sims.bridge.runtime.graphs import nothing_is_collected
from warp_sims.bridge.runtime.launches import Pool

import warp_sims as ws
from warp_sims.cli import main
from warp_sims.training.graphed import WARM_UP, GraphedUpdate
from warp_sims.training.optimizers import KerasAdam
from warp_sims.training.run_config import from_json, to_json
from warp_sims.training.train import TrainingRun


class StandIn:
    """A graph that calls what it has recorded, on the tensors that it was recorded with."""

    made = 0

    def __init__(self, function, device):
        type(self).made += 1
        self.replay = function


def config(flow="C", **settings):
    system = ws.CartPole(poles=1)
    policy = ws.MLP(system.state_size, (5,), 1)
    policy.reset_parameters(seed=1)
    settings = {"samples": 22, "batch": 8, "epochs": 4, "horizon": 5, **settings}
    return ws.TrainConfig(system=system, policy=policy, flow=flow, **settings)


@pytest.mark.parametrize("flow", ["R", "C"])
def test_recorded_updates_are_the_updates(flow, monkeypatch):
    expected = ws.train(config(flow), progress=False)
    monkeypatch.setattr("warp_sims.training.graphed.Graph", StandIn)
    StandIn.made = 0
    updated = []
    with TrainingRun(config(flow)) as run:
        update = run.updates.update

        def counted(x0, record):
            updated.append(x0)
            update(x0, record)

        run.updates.step = GraphedUpdate(counted)
        while not run.done:
            run.run_epoch()
    result = run.result()
    assert StandIn.made == 2, "one for whole batches, one for the rest of the samples"
    static = {x0.data_ptr() for x0 in updated[3 * WARM_UP :]}
    assert len(static) == 2, "recorded updates read their own copy of the batch"
    for a, b in zip(result.policy.parameters(), expected.policy.parameters()):
        assert torch.equal(a, b)
    for name in ("loss_batch", "grad_norm", "cosine", "agreement", "loss_test"):
        assert result.log[name].tobytes() == expected.log[name].tobytes(), name


def test_a_graph_keeps_what_caches_may_forget():
    pool = Pool(lambda key: [key])
    alive = []
    with keeping(alive):
        with pool.borrow("a") as item:
            pass
        table = constant((3,), lambda key: torch.arange(*key).numpy(), torch.device("cpu"))
    assert any(kept is item for kept in alive)
    assert any(kept is table for kept in alive)
    with pool.borrow("b"):
        pass
    assert len(alive) == 2, "outside a capture nothing is kept"


def test_graphs_need_cuda(capsys):
    with pytest.raises(ValueError, match="graphs need CUDA.*cuda"):
        config(graph=True)
    with pytest.raises(TypeError, match="graph='yes'.*True or False"):
        config(graph="yes")
    assert main(["train", "cartpole", "--graph"]) == 2
    assert "graphs need CUDA" in capsys.readouterr().err


def test_a_run_with_a_graph_is_loaded_anywhere():
    written = to_json(config())
    assert written["training"]["graph"] is False
    written["training"]["graph"] = True
    assert from_json(written).graph is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_on_the_device_takes_the_steps_of_adam(dtype):
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, 2), (5,))
    start = [torch.randn(s, generator=draw, dtype=dtype) for s in shapes]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    optimizers = KerasAdam(ours, lr=1e-2, capturable=True), KerasAdam(theirs, lr=1e-2)
    for update in range(7):
        if update == 4:
            # each takes over from the other
            states = [optimizer.state_dict() for optimizer in optimizers]
            optimizers = KerasAdam(ours, lr=1e-2, capturable=True), KerasAdam(theirs, lr=1e-2)
            for optimizer, state in zip(optimizers, reversed(states)):
                optimizer.load_state_dict(state)
        for a, b in zip(ours, theirs):
            # small ones, where the place of epsilon shows
            a.grad = 1e-6 * torch.randn(a.shape, generator=draw, dtype=dtype)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs):
            moved = (b.detach() - start[0 if a.ndim == 2 else 1]).abs().max()
            # a few units in the last place of the weights a step
            assert (a - b).abs().max() <= 20 * torch.finfo(dtype).eps * b.abs().max()
            assert moved > 1e-3


def test_adam_takes_no_closure():
    optimizer = KerasAdam([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    optimizer.step()  # no gradient, no step


def test_a_loaded_optimizer_has_no_graph_of_the_old_one():
    """Runs that train together hand the state of their optimizers over at every epoch."""
    with TrainingRun(config()) as run:
        run.run_epoch()
        updates = run.updates
        updates.step = GraphedUpdate(updates.update)
        updates.load_optimizer(updates.optimizer.state_dict())
        assert updates.step == updates.update


def test_no_garbage_is_destroyed_during_a_capture():
    """What is unreachable goes before; what becomes so during the capture goes behind it."""

    class Old:
        def __init__(self):
            self.itself = self

    before, during = Old(), Old()
    seen = weakref.ref(before), weakref.ref(during)
    del before
    with nothing_is_collected():
        assert seen[0]() is None and not gc.isenabled()
        del during
        kept = [Old() for _ in range(10_000)]
        assert seen[1]() is not None
    assert gc.isenabled()
    del kept

"""Memory of large tensors on a CPU: kept while nobody refers to it, and never given to two."""

import gc
import threading

import pytest
import torch
from cases import make_net
from warp_sims.bridge.runtime import arrays
from warp_sims.bridge.runtime.arrays import Reserve

import warp_sims as ws


@pytest.fixture
def reserve(monkeypatch):
    """A reserve of 100 bytes in place of the real one, for tensors of 16 bytes and more."""
    reserve = Reserve(100)
    monkeypatch.setattr(arrays, "RESERVE", reserve)
    monkeypatch.setattr(arrays, "_LARGE", 16)
    return reserve


def make(*shape, dtype=torch.float32):
    return arrays.empty(torch.empty(0, dtype=dtype), *shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_comes_back_when_the_last_reference_is_gone(reserve, dtype):
    tensor = make(2, 4, dtype=dtype)
    assert tensor.shape == (2, 4) and tensor.dtype == dtype and tensor.is_contiguous()
    address = tensor.data_ptr()
    for hold in (lambda t: t[1:], lambda t: t.detach(), lambda t: t.numpy(), lambda t: t.untyped_storage()):
        held = hold(tensor)
        del tensor
        assert not reserve.idle and make(2, 4, dtype=dtype).data_ptr() != address
        reserve.idle.clear()
        del held
        assert len(reserve.idle) == 1
        tensor = make(2, 4, dtype=dtype)
        assert tensor.data_ptr() == address and not reserve.idle


def test_kept_memory_begins_on_a_cache_line_and_is_given_back(reserve):
    for count in (5, 9, 10):
        kept = make(count)
        assert kept.data_ptr() % 64 == 0
        del kept
    assert len(reserve.idle) > 0
    ws.empty_cache()
    assert not reserve.idle


def test_sizes_and_bounds(reserve):
    for count in (5, 10, 10, 8):  # of 4 bytes
        kept = make(count)
        del kept
    assert [block.bytes.nbytes for block in reserve.idle] == [20, 40, 32]
    both = make(10), make(10)
    assert both[0].data_ptr() != both[1].data_ptr()
    del both
    assert [block.bytes.nbytes for block in reserve.idle] == [40, 40], "the oldest goes first"
    large = make(26)
    del large
    assert not reserve.idle, "more than is kept at all"
    small = make(3)
    del small
    assert not reserve.idle


def test_threads(reserve):
    """Whoever holds a tensor is alone in writing to it."""
    wrong = []

    def work(number):
        for _ in range(2000):
            tensor = make(6).fill_(number)
            wrong.extend([number] if bool((tensor != number).any()) else [])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 1 <= len(reserve.idle) <= 4


@pytest.mark.parametrize("flow", ["R", "C"])
def test_rollouts_in_used_memory(reserve, flow):
    """What earlier rollouts left behind changes nothing."""
    system = ws.CartPole(poles=1)
    policy, x0 = make_net(system), system.initial_states(5).double()
    reserve.most = 1 << 20

    def gradients():
        policy.zero_grad()
        out = ws.rollout(system, policy, x0, horizon=7, flow=flow)
        out.loss.backward()
        return [out.states, out.controls, out.loss, *(p.grad for p in policy.parameters())]

    first = [t.detach().clone() for t in gradients()]
    gc.collect()
    assert reserve.idle
    for block in reserve.idle:
        block.bytes.fill(255)  # NaN
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))

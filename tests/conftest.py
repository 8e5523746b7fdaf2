"""Settings of the test process, and fixtures that several files use."""

import signal

import pytest
import torch
import warp as wp
from cases import ROADS, make_cotangents, make_net, make_states, on_road
from small_cart import CART, HORIZON, WORLDS
from warp_sims.bridge.passes import fused, fused_backward, sweeps

# The tensors here are small: threads that wait for each other cost several times the work.
# Tests of threads set their own number.
torch.set_num_threads(1)
# Started in the background of a script, pytest ignores SIGINT, and so would the programs that tests start and
# interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Warp's notes on every module that it compiles would bury the output.
wp.config.log_level = wp.LOG_WARNING


@pytest.fixture(params=ROADS)
def policy(request):
    """A perceptron for small_cart.py, fused and evaluated by torch."""
    return on_road(request.param, make_net(CART))


@pytest.fixture
def x0():
    """Initial states for small_cart.py."""
    return make_states(CART, WORLDS)


@pytest.fixture
def cotangents():
    """Cotangents of all that the rollout of small_cart.py returns."""
    return make_cotangents(CART, HORIZON, WORLDS)


@pytest.fixture
def threads(monkeypatch):
    """Sets the number of threads, which then share all work, however little."""
    for module, name in (
        (fused, "THREAD_PRODUCTS"),
        (fused_backward, "SUM_CHUNKS_PER_THREAD"),
        (sweeps, "WORLD_STEPS_PER_THREAD"),
        (sweeps, "CHUNKS_PER_THREAD"),
    ):
        monkeypatch.setattr(module, name, 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

"""What might end the process, tried in one of its own."""

import os
import subprocess
import sys

import pytest

PROLOGUE = """
import threading, warnings
import torch
import warp as wp
import warp_sims as ws
from cases import Evaluated, make_net, make_states
warnings.simplefilter("ignore")
wp.config.log_level = wp.LOG_WARNING
torch.set_num_threads(2)
cart = ws.CartPole(poles=1)
x0 = make_states(cart, 200, torch.float32)
net = make_net(cart, dtype=torch.float32)

def gradient(policy, x0, flow="C"):
    out = ws.rollout(cart, policy, x0, horizon=10, flow=flow)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, list(policy.parameters()))])

def in_threads(count, work):
    failed, together = [], threading.Barrier(count)
    def run(i):
        together.wait()
        try:
            work(i)
        except BaseException as error:
            failed.append(repr(error))
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
"""


def run(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-2000:]}"


@pytest.mark.parametrize("policy", ["net", "Evaluated(net)"])
def test_threads(policy):
    """Rollouts of other numbers at once, of one shape: none reads or writes where another does.

    Each thread has its own policy, because torch.func.functional_call puts tensors into the module it calls.
    """
    run(f"""
import copy
starts = [make_states(cart, n, torch.float32, seed) for seed in range(4) for n in (3, 200)]
policies = [copy.deepcopy({policy}) for _ in starts]
expected = [gradient(policy, x) for policy, x in zip(policies, starts)]
def work(i):
    for _ in range(20):
        assert torch.equal(gradient(policies[i], starts[i]), expected[i]), i
in_threads(len(starts), work)
""")


@pytest.mark.parametrize("policy", ["net", "Evaluated(net)"])
def test_first_use_in_several_threads(policy):
    """Whoever comes first compiles and loads; the others wait."""
    run(f"""
import copy
policies = [copy.deepcopy({policy}) for _ in range(8)]
found = [None] * 8
def work(i):
    found[i] = gradient(policies[i], x0)
in_threads(8, work)
assert all(torch.equal(one, found[0]) for one in found)
""")


def test_a_forked_process():
    """Threads do not survive a fork."""
    run("""
import os
expected = gradient(net, x0)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(gradient(net, x0), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")


def test_tensors_without_memory_of_their_own():
    """Subclasses that wrap other tensors, as distributed ones do: right or refused."""
    run("""
from torch.testing._internal.two_tensor import TwoTensor
expected, x_next = gradient(net, x0), ws.step(cart, x0, x0[:, :1])
twice = TwoTensor(x0, x0)
wrapped = make_net(cart, dtype=torch.float32)
wrapped[0].weight = torch.nn.Parameter(TwoTensor(wrapped[0].weight.detach(), wrapped[0].weight.detach()))
for call, right in (
    (lambda: gradient(net, twice), expected),
    (lambda: gradient(Evaluated(net), twice), expected),
    (lambda: gradient(wrapped, x0), expected),
    (lambda: gradient(Evaluated(wrapped), x0), expected),
    (lambda: ws.step(cart, twice, x0[:, :1]), x_next),
    (lambda: ws.step(cart, x0, TwoTensor(x0[:, :1], x0[:, :1])), x_next),
):
    try:
        found = call()
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        continue
    assert torch.allclose(getattr(found, "a", found), right, rtol=1e-4)
""")

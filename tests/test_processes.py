"""What might end the process or depends on a first use, each tried in a process of its own."""

import os
import subprocess
import sys

PROLOGUE = """
import copy, os, threading, warnings
import torch
import warp as wp
import warp_sims as ws
from cases import Evaluated, make_net, make_states
warnings.simplefilter("ignore")
wp.config.log_level = wp.LOG_WARNING
torch.set_num_threads(2)
cart = ws.CartPole(poles=1)
net = make_net(cart, dtype=torch.float32)
policies = net, Evaluated(net)
x0 = make_states(cart, 200, torch.float32)

def gradient(policy, x0, flow="C"):
    out = ws.rollout(cart, policy, x0, horizon=10, flow=flow)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, list(policy.parameters()))])
"""


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-2000:]}"


def test_threads():
    """Whoever comes first compiles and loads; later, none reads or writes where another does.

    Each thread has a policy of its own: torch.func.functional_call puts tensors into the module it calls.
    """
    run("""
def at_once(policy, starts):
    own = [copy.deepcopy(policy) for _ in starts]
    found, failed, together = [[] for _ in starts], [], threading.Barrier(len(starts))

    def work(i):
        together.wait()
        try:
            for _ in range(4):
                found[i].append(gradient(own[i], starts[i]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(starts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for x, results in zip(starts, found):
        alone = gradient(policy, x)
        assert all(torch.equal(result, alone) for result in results)

for dtype in (torch.float32, torch.float64):
    for policy in policies:
        at_once(policy.to(dtype), [make_states(cart, 200, dtype, seed) for seed in range(8)])
        at_once(policy, [make_states(cart, n, dtype, seed) for seed in range(4) for n in (3, 70)])
""")


def test_a_forked_process():
    """The engine's threads do not survive a fork. Torch's may hang, so it evaluates nothing here."""
    run("""
expected = gradient(net, x0)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(gradient(net, x0), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")


def test_a_default_device():
    """Memory lies where the states are, from the first use on."""
    run("""
for policy in policies:
    with torch.device("meta"):
        found = gradient(policy, x0), ws.gradient_pair(cart, policy, x0, horizon=10).flat
        x_next = ws.step(cart, x0, x0[:, :1])
    assert torch.equal(found[0], gradient(policy, x0))
    assert torch.equal(found[1], ws.gradient_pair(cart, policy, x0, horizon=10).flat)
    assert torch.equal(x_next, ws.step(cart, x0, x0[:, :1]))
""")


def test_tensors_without_memory_of_their_own():
    """Subclasses that wrap other tensors, as distributed ones do: right or refused."""
    run("""
from torch.testing._internal.two_tensor import TwoTensor

expected, x_next = gradient(net, x0), ws.step(cart, x0, x0[:, :1])
twice = TwoTensor(x0, x0)
wrapped = copy.deepcopy(net)
weight = net[0].weight.detach()
wrapped[0].weight = torch.nn.Parameter(TwoTensor(weight, weight))
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

"""What might end the process or depends on a first use, each tried in a process of its own."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from warp_sims.bridge.runtime import team, waiting

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
    """Threads do not survive a fork, neither the engine's nor torch's, which are busy here on both sides."""
    run("""
import signal

large = make_states(cart, 9000, torch.float32)  # from 32768 numbers on torch uses its threads
wide = make_net(cart, (100, 100), torch.float32)
expected = [gradient(p, large) for p in (wide, Evaluated(wide))]
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = [gradient(p, large) for p in (wide, Evaluated(wide))]
    right = torch.get_num_threads() == 1 and all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found, expected)
    )
    os._exit(0 if right else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.get_num_threads() == 2
""")


def test_a_spawned_process():
    run("""
import multiprocessing

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(torch.get_num_threads)
    assert torch.equal(gradient(net, x0), gradient(net, x0))
""")


@pytest.mark.parametrize(("order", "policy"), [("warp_sims, torch", "PASSIVE"), ("torch, warp_sims", None)])
def test_threads_that_wait_step_aside_on_busy_cores(order, policy):
    """As far as it can be chosen: the runtime reads it once, when torch is loaded."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = f"import {order}, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(waiting.cores())]
    try:
        found = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert found.stdout.strip() == str(policy)


def test_how_threads_wait_is_chosen(monkeypatch):
    """Asleep where other programs fill the cores; the environment is asked first."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(waiting, "cores", lambda: 2)
    for threads, policy in ((2, None), (3, "PASSIVE")):
        monkeypatch.setattr(waiting, "running", lambda threads=threads: threads)
        waiting.choose()
        assert os.environ.get("OMP_WAIT_POLICY") == policy
    for given in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        monkeypatch.setattr(os, "environ", dict(given))
        waiting.choose()
        assert os.environ == given


def test_the_threads_that_run_are_the_fewest_seen(monkeypatch):
    seen = iter(["1 1 1 5/90 1", "1 1 1 2/90 1", "1 1 1 4/90 1", "1 1 1 3/90 1", "1 1 1 9/90 1"])
    monkeypatch.setattr(waiting.Path, "read_text", lambda _: next(seen))
    monkeypatch.setattr(waiting, "cores", lambda: 1)
    assert waiting.running() == 2
    monkeypatch.setattr(waiting.Path, "read_text", lambda _: "something else")
    assert waiting.running() == 0


def test_busy_cores_are_named_once(monkeypatch):
    watch = team._Watch()
    watch.warned = False
    monkeypatch.setattr(team, "_watch", watch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(waiting, "running", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        team.settle()
    monkeypatch.setattr(waiting, "running", lambda: 1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3 * team._ASKED_EVERY):
            team.settle()
    assert ["OMP_WAIT_POLICY=PASSIVE" in str(w.message) for w in caught] == [True]


@pytest.mark.parametrize("damage", ["object", "metadata", "folder"])
def test_a_damaged_kernel_cache(tmp_path, damage):
    """What cannot be read or written is named, with what to do."""
    code = """
import sys, torch, warp as wp
import warp_sims as ws
cart = ws.CartPole(poles=1)
print(ws.step(cart, torch.zeros(1, 4), torch.zeros(1, 1)))
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WARP_CACHE_PATH": str(tmp_path / "cache"),
    }

    def start():
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    if damage == "folder":
        (tmp_path / "cache").write_text("")
    else:
        assert start().returncode == 0
        for path in (tmp_path / "cache").rglob({"object": "*.o", "metadata": "*.meta"}[damage]):
            path.write_text("")
    last = start().stderr.splitlines()[-1]
    assert (
        last.startswith("RuntimeError: the cache of compiled kernels in")
        and "remove the cache folder" in last
    )


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


def test_what_an_import_takes_along():
    """Torch and Warp, and nothing that is needed later or elsewhere."""
    code = (
        "import sys, warp_sims; print(*(name for name in sys.modules if '.' not in name or 'dynamo' in name))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    unwanted = {"torch._dynamo", "matplotlib", "rich", "jax", "tensorboard", "sympy", "PIL", "mujoco"}
    assert not unwanted & set(found.stdout.split())
    assert found.stderr == ""

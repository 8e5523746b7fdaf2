"""Whether two versions of the engine compute the same bits on a CPU.

    python benchmarks/same_bits.py write before.json        in the version before
    python benchmarks/same_bits.py compare before.json      in the version after: exit status 1 if one differs

Every case is a rollout with its gradients, a pair of gradients, an open loop, or a rollout of an ensemble;
what is kept of it is a digest of all numbers. Torch must be the same build, and the machine of its kind.
"""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import warp_sims as ws

SYSTEMS = {
    "cartpole1": ws.CartPole(poles=1),
    "cartpole4": ws.CartPole(poles=4),
    "guidance": ws.GuidanceByRepulsion(drivers=2, evaders=3),
    "quantum": ws.QuantumControl(points=8),
}
WORLDS, HORIZONS = (1, 7, 19, 130), (1, 12)
FLOWS = ("R", "M", "N", "S", "C", "list")
OPTIONS = (
    {},
    {"decay": 0.9, "window": 5},
    {"loss": "running", "control_cost": 0.3},
    {"loss": None},
    {"checkpoint_every": 4},
    {"loss": "running", "decay": 0.0, "checkpoint_every": 3},
)


class _Evaluated(nn.Module):
    """A hyperbolic tangent that torch evaluates: `atleast_2d` runs in no sweep."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.atleast_2d(torch.tanh(x))


def make_policy(system: ws.System, kind: str, dtype: torch.dtype) -> nn.Module:
    """A policy with seeded weights: fused into the sweep, or evaluated by torch."""
    n, m = system.state_size, system.control_size
    generator = torch.Generator().manual_seed(1)
    if kind == "wave":
        policy: nn.Module = ws.WaveCNN(points=n // 2, width=6)
    else:
        hidden = {"linear": (), "small": (9, 7), "wide": (100, 100), "torch": (12,)}[kind]
        policy = ws.MLP(n, hidden, m)
    if kind == "torch":
        policy = nn.Sequential(policy, _Evaluated())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return policy.to(dtype)


def states_of(system: ws.System, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Seeded initial states."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, system.state_size, generator=generator).to(dtype)


def digest(*tensors: Tensor | None) -> str:
    """Of the bytes of all numbers."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(b"none" if tensor is None else tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def schedule(flow: str, horizon: int) -> str | list[str]:
    """A flow by its letter, or another one every step."""
    return [("R", "M", "S", "N")[t % 4] for t in range(horizon)] if flow == "list" else flow


def rolled(system: ws.System, policy: nn.Module, x0: Tensor, horizon: int, flow: str, options: dict) -> str:
    """Digest of a rollout and of what its backward pass gives."""
    x0 = x0.clone().requires_grad_()
    policy.zero_grad()
    out = ws.rollout(system, policy, x0, horizon=horizon, flow=schedule(flow, horizon), **options)
    value = (out.states**2).sum() + out.controls.sum() if out.loss is None else out.loss.sum()
    value.backward()
    return digest(out.states, out.controls, out.loss, x0.grad, *(q.grad for q in policy.parameters()))


def cases() -> Iterator[tuple[str, str]]:
    """Name and digest of every case."""
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    for (name, system), (kind, dtype) in itertools.product(SYSTEMS.items(), dtypes.items()):
        policies = ["linear", "small", "wide", "torch"] + (["wave"] if name == "quantum" else [])
        for worlds, horizon in itertools.product(WORLDS, HORIZONS):
            x0 = states_of(system, (worlds,), dtype)
            controls = (
                0.1 * states_of(system, (horizon, worlds), dtype)[..., : system.control_size].contiguous()
            )
            states = ws.simulate(system, x0, controls.requires_grad_())
            states.sum().backward()
            key = f"{name} {kind} worlds={worlds} horizon={horizon}"
            yield f"simulate {key}", digest(states, controls.grad)
            for policy_kind in policies:
                policy = make_policy(system, policy_kind, dtype)
                for flow, (i, options) in itertools.product(FLOWS, enumerate(OPTIONS)):
                    if i and (flow not in "RC" or worlds == 1):
                        continue
                    label = f"rollout {key} {policy_kind} flow={flow} options={i}"
                    yield label, rolled(system, policy, x0, horizon, flow, options)
                pair = ws.gradient_pair(system, policy, x0, horizon=horizon, loss="running")
                yield f"pair {key} {policy_kind}", digest(pair.loss, pair.flat, *pair.combine().values())
            if worlds == 7:
                members = [make_policy(system, "small", dtype) for _ in range(3)]
                for flow in "RC":
                    found = rolled(system, ws.Ensemble(members), x0, horizon, flow, {})
                    yield f"ensemble {key} flow={flow}", found


def main() -> int:
    """Writes or compares the digests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = dict(cases())
    if arguments.action == "write":
        arguments.file.write_text(json.dumps(found, indent=0))
        print(f"{len(found)} cases written to {arguments.file}")
        return 0
    before = json.loads(arguments.file.read_text())
    changed = [name for name in found if before.get(name) != found[name]]
    missing = before.keys() - found.keys()
    print(f"{len(found)} cases, {len(changed)} with other bits, {len(missing)} missing")
    for name in changed[:20]:
        print("  ", name)
    if len(changed) > 20:
        print(f"   and {len(changed) - 20} more")
    return int(bool(changed or missing))


if __name__ == "__main__":
    sys.exit(main())

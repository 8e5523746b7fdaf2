"""The contestants of `warp-sims bench`: ours, and the peers in a folder, by default `benchmarks/peers/` of
the repository.

A folder of peers is a Python package whose `PEERS` maps names to `module:Class`. A class of it

- is built with the arguments of `Case.peer_arguments`, and with `plan=` where it names several `plans`;
- `update()` does one whole training update in place, returns the loss before it, and is done when it returns;
- `gradients()` returns, after the first update, the gradients of that update as numpy arrays in the order and
  layout of the weights given: what is timed is what is checked;
- `policies` (optional) says which policies it takes besides the published ones: "mlp", of which it is given
  `policy=` as `elu+layernorm`, and "module", which it is given itself;
- `plans` (optional) names several ways to compute the update, of which the fastest in a trial competes;
  `flows` names the flows that it has, `problems` the systems, by default the published ones;
- `unavailable(device)` (optional, a class method) returns why it cannot run here, or None.

Modules are imported when they are asked for. One that raises `ImportError` is skipped with a line.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..rollouts import rollout
from ..training.graphed import GraphedUpdate
from ..training.optimizers import make_optimizer
from .case import FLOWS, PUBLISHED, Case, is_perceptron

OURS = "warp-sims"


class Contestant(Protocol):
    """A training problem and its update."""

    def update(self) -> float:
        """One training update in place; returns the loss before it."""
        ...

    def gradients(self) -> list[np.ndarray]:
        """Gradients of the first update, right after it."""
        ...


class WarpSims:
    """Ours, by the calls that a user would write, with the optimizer of `ws.train`; on a GPU the update is a
    CUDA graph, as with its `graph=True`.
    """

    def __init__(self, case: Case, policy: torch.nn.Module | None = None):
        self._system, self._policy = case.system, (policy or case.policy()).to(case.device)
        self._x0 = self._system.initial_states(case.batch).to(case.device)
        self._options = {**case.rollout_options(), "flow": FLOWS[case.flow]}
        on_gpu = self._x0.device.type == "cuda"
        parameters = list(self._policy.parameters())
        self._optimizer = make_optimizer("adam", parameters, lr=1e-3, capturable=on_gpu)
        self._loss = self._x0.new_zeros(1)
        self._step = GraphedUpdate(self._update) if on_gpu else self._update

    def _update(self, x0: torch.Tensor, loss: torch.Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        out = rollout(self._system, self._policy, x0, **self._options)
        assert out.loss is not None  # the cases have losses
        out.loss.sum().backward()
        self._optimizer.step()
        loss[0] = out.loss.detach().reshape(-1)[0]

    def update(self) -> float:
        """One training update in place; returns the loss before it."""
        self._step(self._x0, self._loss)
        return self._loss.item()

    def gradients(self) -> list[np.ndarray]:
        """Gradients of the latest update."""
        return [p.grad.cpu().numpy().copy() for p in self._policy.parameters() if p.grad is not None]


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A contestant that has not been built yet.

    Attributes:
        name: Name in tables.
        target: `module:Class` inside the folder of peers; empty for ours.
        folder: That folder; empty for ours.
        plan: The only plan it may take; empty for any.
    """

    name: str
    target: str = ""
    folder: str = ""
    plan: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is ours."""
        return not self.target

    def plans(self) -> tuple[str, ...]:
        """The plans that compete for its place."""
        if self.ours or self.plan:
            return (self.plan,)
        return tuple(getattr(self._made_by(), "plans", ("",)))

    def flows(self) -> tuple[str, ...]:
        """The flows that it offers."""
        return tuple(FLOWS) if self.ours else tuple(getattr(self._made_by(), "flows", FLOWS))

    def problems(self) -> tuple[str, ...]:
        """The systems whose equations it has; of ours nobody asks."""
        return tuple(getattr(self._made_by(), "problems", PUBLISHED))

    def takes(self, case: Case) -> bool:
        """Whether it offers the problem, the flow and the policy of a case."""
        if self.ours or case.flow not in self.flows() or case.problem not in self.problems():
            return self.ours
        policies = getattr(self._made_by(), "policies", ())
        return not case.kind or ("mlp" if is_perceptron(case.kind) else "module") in policies

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on a device, or None."""
        if self.ours:
            return None
        try:
            made_by = self._made_by()
        except ImportError as error:
            return f"{error} (pip install 'warp-sims[bench]' brings what the peers need)"
        known = tuple(getattr(made_by, "plans", ("",)))
        if self.plan and self.plan not in known:
            raise ValueError(
                f"bench: --contestants {self.name}: no such plan, expected {', '.join(known) or 'none'}"
            )
        asked = getattr(made_by, "unavailable", None)
        return asked(device) if asked else None

    def build(self, case: Case, plan: str = "") -> Contestant:
        """The contestant at the initial weights of a case."""
        if self.ours:
            return WarpSims(case)
        options = {"plan": plan} if plan else {}
        return self._made_by()(**case.peer_arguments(), **options)

    def _made_by(self) -> Callable[..., Any]:
        package = _package(self.folder)
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(f"{package}.{module}"), name)


def default_folder() -> Path | None:
    """The peers of the repository if this package is used from a checkout, else None."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
    return folder if (folder / "__init__.py").is_file() else None


@functools.cache
def _package(folder: str) -> str:
    """Imports a folder of peers as a package; returns its name."""
    init = Path(folder) / "__init__.py"
    if not init.is_file():
        raise ValueError(
            f"bench: --peers {folder}: no __init__.py in it; give a folder as benchmarks/peers is"
        )
    name = f"warp_sims_peers_{len([m for m in sys.modules if m.startswith('warp_sims_peers_')])}"
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[folder])
    assert spec is not None and spec.loader is not None  # the file exists
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def entrants(asked: Sequence[str] | None, folder: Path | None) -> list[Entrant]:
    """The contestants that are asked for, by `name` or `name:plan`; all by default, ours first.

    Raises:
        ValueError: a name that is not known, or a folder without peers.
    """
    known = {OURS: Entrant(OURS)}
    if folder is not None:
        peers = getattr(sys.modules[_package(str(folder.resolve()))], "PEERS", None)
        if not isinstance(peers, dict):
            raise ValueError(
                f"bench: --peers {folder}: its __init__.py has no PEERS, a dict of name: module:Class"
            )
        known |= {name: Entrant(name, target, str(folder.resolve())) for name, target in peers.items()}
    if asked is None:
        return list(known.values())
    chosen = []
    for text in dict.fromkeys(asked):
        name, _, plan = text.partition(":")
        if name not in known or (plan and name == OURS):
            where = "" if folder else "; the peers are in benchmarks/peers of the repository, see --peers"
            raise ValueError(
                f"bench: --contestants {text}: unknown, expected some of {', '.join(known)}{where}"
            )
        chosen.append(dataclasses.replace(known[name], name=text, plan=plan))
    return chosen

"""One training update of a published problem, beside peers: forward, backward, comparison, Adam.

    python benchmarks/update.py cartpole --quick
    python benchmarks/update.py quantum --batch 8 64 --flow R C --markdown FILE
    python benchmarks/update.py cartpole --widths 32x32 100x100

All contestants run in this process, in turns (A B C, B C A, ...), so that a change of the machine's speed
meets all of them. A turn is one update that is not counted, then updates until `--block` seconds are over;
its result is the mean time of one. Reported are medians and quartiles over the turns; ratios are taken
within a round. First calls, which compile, and memory are measured in a fresh process for each contestant.

Beforehand every contestant's gradients are compared with float64 ones; a row where one is wrong is not timed.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from benchmarks import harness
from benchmarks.harness import Entrant, Entry, Row
from benchmarks.problems import DRIVERS, EVADERS, POINTS, POLES, PUBLISHED, Case

FLOWS = {"R": "regular", "M": "modified", "C": "combined"}


# Components below this share of their array's size have no sign in float32; C may then keep or drop them.
UNDECIDED = 1e-3


class WarpSims:
    """Ours, by the calls that a user would write; the interface is that of the peers."""

    def __init__(
        self,
        system: Mapping[str, float],
        widths: Sequence[int],
        x0: np.ndarray,
        weights: Sequence[np.ndarray],
        horizon: int,
        flow: str,
        loss: str,
        *,
        problem: str,
        control_cost: float,
    ):
        import torch

        import warp_sims as ws

        self._rollout = ws.rollout
        if problem == "quantum":
            self._system = ws.QuantumControl(points=POINTS, target=int(system["target"]))
            self._policy = ws.WaveCNN(POINTS, widths[0])
        else:
            made = {
                "cartpole": ws.CartPole(poles=POLES),
                "guidance": ws.GuidanceByRepulsion(DRIVERS, EVADERS),
            }
            self._system = made[problem]
            self._policy = ws.MLP(x0.shape[1], tuple(widths), self._system.control_size)
        with torch.no_grad():
            for parameter, array in zip(self._policy.parameters(), weights, strict=True):
                parameter.copy_(torch.tensor(array))
        self._x0 = torch.tensor(x0)
        self._options = {"horizon": horizon, "flow": FLOWS[flow], "loss": loss}
        self._options["control_cost"] = control_cost
        self._optimizer = torch.optim.Adam(self._policy.parameters(), lr=1e-3, fused=True)

    def update(self) -> float:
        """One training update in place; returns the loss before it."""
        self._optimizer.zero_grad()
        out = self._rollout(self._system, self._policy, self._x0, **self._options)
        out.loss.backward()
        self._optimizer.step()
        return out.loss.item()

    def gradients(self) -> list[np.ndarray]:
        """Gradients at the present weights."""
        self._optimizer.zero_grad()
        self._rollout(self._system, self._policy, self._x0, **self._options).loss.backward()
        return [parameter.grad.numpy().copy() for parameter in self._policy.parameters()]


OURS = "warp_sims"
# Where there are several plans, the fastest one competes.
CONTESTANTS = {
    OURS: [Entrant(__name__, "WarpSims", needs=("torch", "warp_sims"))],
    "jax": [Entrant("benchmarks.peers.jax_scan", "JaxScan", plan) for plan in ("scan", "remat", "wide")],
    # what most would write; "jax" is the fastest of three, one of which takes this engine's road
    "jax-scan": [Entrant("benchmarks.peers.jax_scan", "JaxScan", "scan")],
    "torch": [Entrant("benchmarks.peers.torch_eager", "TorchEager")],
}


def build(entrant: Entrant, case: Case) -> Any:
    """A contestant at the initial weights of a case."""
    arguments, named = case.peer_arguments()
    return entrant.load()(*arguments, **named)


def available(names: Sequence[str], problem: str) -> list[str]:
    """The contestants that can run here; says why of the others. Any other failure is a bug and is raised."""
    found = []
    for name in names:
        try:
            build(CONTESTANTS[name][0], Case(problem, (4, 4), 1, "R", horizon=1)).update()
        except (ImportError, AttributeError, NotImplementedError) as error:
            print(f"{name}: skipped, {type(error).__name__}: {error}")
        else:
            found.append(name)
    return found


# Gradients

Gradients = Sequence[np.ndarray]


def reference_gradients(case: Case) -> dict[str, Gradients]:
    """Gradients of M and R in float64, from torch's autograd."""
    from benchmarks.peers.torch_eager import TorchEager

    return {
        flow: TorchEager(*arguments, dtype="float64", **named).gradients()
        for flow in "MR"
        for arguments, named in [replace(case, flow=flow).peer_arguments()]
    }


def gradient_error(found: Gradients, flow: str, reference: Mapping[str, Gradients]) -> float:
    """Relative error of a gradient; infinite where it is not finite, and where C decided otherwise.

    Where a component of M or R is too small to have a sign in float32, C may hold M or 0. All other decisions
    are checked one by one, because few and small components differ between M and C.
    """
    error = size = 0.0
    for g, m, r in zip(found, reference["M"], reference["R"], strict=True):
        if flow == "C":
            expected = np.where(np.sign(m) == np.sign(r), m, 0.0)
            decided = (abs(m) > UNDECIDED * _rms(m)) & (abs(r) > UNDECIDED * _rms(r))
            if np.any(decided & ((g == 0.0) != (expected == 0.0))):
                return float("inf")
            difference = np.where(decided, g - expected, np.minimum(abs(g), abs(g - m)))
        else:
            expected = m if flow == "M" else r
            difference = g - expected
        error += float((difference**2).sum())
        size += float((expected**2).sum())
    ratio = (error / size) ** 0.5
    return ratio if np.isfinite(ratio) else float("inf")


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt((array**2).mean()))


# Rows


def run_case(
    case: Case, names: Sequence[str], args: argparse.Namespace, reference: Mapping[str, Gradients]
) -> Row:
    """Check, time and weigh all contestants of one row."""
    row: Row = {"columns": case.columns, "case": asdict(case), "notes": [], "contestants": {}, "ratios": {}}
    print("\n" + ", ".join(f"{name} {value}" for name, value in case.columns.items()))

    plans: dict[str, list[Entry]] = {}
    for name in names:
        plans[name] = []
        for entrant in CONTESTANTS[name]:
            contestant = build(entrant, case)
            error = gradient_error(contestant.gradients(), case.flow, reference)
            plans[name].append(Entry(name, entrant, contestant, error))
            if error > PUBLISHED[case.problem].tolerance:
                label = f"{name} {entrant.plan}".strip()
                _note(row, f"{label}: gradients are off by {error:.1e} (relative), row not timed")
    if row["notes"]:
        return row

    entries = [harness.fastest(several, args.block / 2) for several in plans.values()]
    for entry in list(entries):
        seconds = harness.turn(entry) / 1e3
        if entry.name == "torch" and seconds > args.limit:
            entries.remove(entry)
            _note(row, f"torch left out, one update takes {seconds:.1f} s (limit {args.limit:g} s)")
    harness.measure(entries, args.repeats, args.block)

    for entry in entries:
        result = row["contestants"][entry.name] = _result(entry)
        if args.fresh:
            result |= harness.in_fresh_process(__file__, entry.entrant, asdict(case), entry.name == OURS)
        print(_summary(entry.name, result))
    ours = [entry for entry in entries if entry.name == OURS]
    for entry in entries:
        if ours and entry is not ours[0]:
            ratio = row["ratios"][entry.name] = harness.ratios(entry, ours[0])
            low, high = ratio["quartiles"]
            print(f"  {entry.name} / {OURS}: {ratio['median']:.2f} [{low:.2f}, {high:.2f}]")
    return row


def _result(entry: Entry) -> dict[str, Any]:
    low, middle, high = harness.quartiles(entry.times_ms)
    return {
        "plan": entry.entrant.plan,
        "gradient_error": entry.gradient_error,
        "median_ms": middle,
        "quartiles_ms": [low, high],
        "times_ms": entry.times_ms,
    }


def _summary(name: str, result: Mapping[str, Any]) -> str:
    low, high = result["quartiles_ms"]
    text = f"  {name:10s} {result['plan']:6s} {result['median_ms']:9.3f} ms [{low:.3f}, {high:.3f}]"
    text += f"  gradient error {result['gradient_error']:.0e}"
    if "peak_mib" in result:
        text += f"  first call {result['first_call_s']:.2f} s"
        text += f"  peak {result['peak_updates_mib']:.0f} MiB, {result['peak_mib']:.0f} with first call"
    return text


def _note(row: Row, text: str) -> None:
    row["notes"].append(text)
    print(f"  {text}")


# Command line


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    machine, repeats, published = report["environment"], report["repeats"], PUBLISHED[report["problem"]]
    cost = f" with control cost {published.control_cost:g}" if published.control_cost else ""
    loss = {"final": "loss at the last step", "running": "running loss"}[published.loss] + cost
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"# One training update of {published.title}",
        "",
        f"Written by `python benchmarks/update.py {' '.join(report['arguments'])}`.",
        "",
        f"- machine: {cpu}; load before the run {machine['load']:.1f}",
        f"- versions: {versions}",
        f"- {published.horizon} steps, float32, {loss}; forward, backward, comparison (C), Adam",
        f"- {repeats} rounds, in turns in one process; milliseconds per update: median [quartiles]",
        "- ratio: peer / ours within a round, median [quartiles]; above 1 ours is faster",
        "- jax: the fastest of its plans, named after the time (`benchmarks/peers/jax_scan.py`)",
        f"- all gradients checked against float64 to {published.tolerance:g} before anything was timed",
        "",
        *harness.tables(report["rows"], list(CONTESTANTS), OURS),
    ]
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line; `--quick` changes defaults only."""
    parser = argparse.ArgumentParser(
        description="One training update of a published problem, beside JAX and eager torch."
    )
    add = parser.add_argument
    add("problem", nargs="?", choices=list(PUBLISHED), default="cartpole", help="what is trained (cartpole)")
    add("--widths", nargs="+", metavar="WxW", help="hidden layers (100x100; quantum: channels, 60x60)")
    add("--batch", nargs="+", type=int, default=[8, 64, 256, 1024], help="numbers of worlds (8 64 256 1024)")
    add("--flow", nargs="+", choices=list(FLOWS), default=list(FLOWS), help="gradient flows (all)")
    add(
        "--contestants",
        nargs="+",
        choices=list(CONTESTANTS),
        default=list(CONTESTANTS),
        help="who competes (all)",
    )
    add("--repeats", type=int, default=15, help="rounds (%(default)s)")
    add("--block", type=float, default=0.1, help="seconds per turn (%(default)s)")
    add(
        "--limit",
        type=float,
        default=1.0,
        help="seconds per update above which torch is left out (%(default)s)",
    )
    add("--no-fresh", dest="fresh", action="store_false", help="skip first calls and memory")
    add("--quick", action="store_true", help="batch 8, flows R and C, 3 rounds: does it work?")
    add("--json", type=Path, metavar="FILE", help="write every measurement")
    add("--markdown", type=Path, metavar="FILE", help="write a page with tables")
    add("--job", help=argparse.SUPPRESS)
    if "--quick" in argv:
        parser.set_defaults(batch=[8], flow=["R", "C"], repeats=3, block=0.03)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 1 if gradients were wrong anywhere, or nobody could run."""
    args = parse(argv)
    if args.job:
        job = json.loads(args.job)
        entrant = Entrant(**job["entrant"])
        case = Case(**{**job["case"], "widths": tuple(job["case"]["widths"])})
        print(json.dumps(harness.first_call_and_memory(entrant, lambda: build(entrant, case))))
        return 0

    machine = harness.environment()
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}; {versions}")
    names = available(args.contestants, args.problem)
    if not names:
        return 1

    rows = []
    published = PUBLISHED[args.problem]
    sizes = [tuple(map(int, widths.split("x"))) for widths in args.widths or []] or [published.widths]
    for size in sizes:
        for batch in args.batch:
            case = Case(args.problem, size, batch, "R", published.horizon)
            reference = reference_gradients(case)
            rows += [run_case(replace(case, flow=flow), names, args, reference) for flow in args.flow]

    report = {
        "environment": machine,
        "problem": args.problem,
        "arguments": list(argv),
        "repeats": args.repeats,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(report))
    return 0 if all(row["contestants"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

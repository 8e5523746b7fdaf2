"""Hopper under several flows and seeds: runs side by side, each on cores of its own, and one table.

    python -m benchmarks.hopper_runs --out runs/hopper --flows R M C R:0.9 --seeds 3 --time-limit 400

A flow is a letter, with a decay behind a colon. Every run is `warp-sims train hopper --algorithm shac` in a
process of its own. Kernels are compiled once before the others start. When the time is over all runs stop
with a checkpoint, and the same command goes on with them. DIR/results.json holds settings, versions and the
log of every run, DIR/results.csv a line for each, DIR/runs.tar.gz their logs and checkpoints. Nothing but
torch, NumPy and Warp is needed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LAST = 10  # logged rows over which `mean_last` and `train` are means
STARTING = 8.0  # seconds that a run may take until its time begins to count
STOPPING = 12.0  # seconds from the end of their time to that of all, for the last update and the report
PATIENCE = 30.0  # seconds behind the end of its time after which a run is ended
SUMMARY = (
    "flow",
    "decay",
    "seed",
    "worlds",
    "updates",
    "steps",
    "seconds",
    "last",
    "mean_last",
    "best",
    "train",
)
KEPT = ("config.json", "log.csv", "checkpoint_last.pt", "checkpoint_best.pt")
TRAIN = (sys.executable, "-m", "warp_sims", "train")


class Job(NamedTuple):
    """One run."""

    flow: str
    decay: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.flow}{'' if self.decay == 1 else f'_{self.decay:g}'}_{self.seed}"


def jobs_of(flows: list[str], seeds: int, first: int) -> list[Job]:
    """All runs, seed by seed, so that a stop leaves whole sets of flows."""
    found = []
    for seed in range(first, first + seeds):
        for flow in flows:
            letter, _, decay = flow.partition(":")
            found.append(Job(letter.upper(), float(decay or 1), seed))
    return found


def command(job: Job, folder: Path, options: argparse.Namespace, seconds: float) -> list[str]:
    """The command of a run, or that which goes on with it."""
    words = list(TRAIN)
    if (folder / "checkpoint_last.pt").exists():
        words += ["--resume", str(folder), "--device", options.device]
    else:
        words += ["hopper", "--algorithm", "shac", "--out", str(folder), "--overwrite"]
        words += ["--flow", job.flow, "--decay", str(job.decay), "--seed", str(job.seed)]
        words += ["--worlds", str(options.worlds), "--updates", str(options.updates)]
        words += ["--device", options.device, *options.more]
    return [*words, "--threads", str(options.threads), "--no-progress", "--time-limit", f"{seconds:.0f}"]


def environment(threads: int) -> dict[str, str]:
    """What a run finds: as many threads as it is given, and this checkout."""
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    return {**os.environ, **own}


def warm_up(options: argparse.Namespace) -> None:
    """Compiles the kernels of one and of two gradient fields, so that no two processes do."""
    folder = options.out / "warm_up"
    for flow in ("R", "C"):
        words = [*TRAIN, "hopper", "--algorithm", "shac", "--flow", flow, "--worlds", "64"]
        words += ["--updates", "1", "--eval-worlds", "8", "--out", str(folder), "--overwrite"]
        words += ["--no-progress", "--device", options.device]
        subprocess.run(words, check=True, env=environment(options.threads), stdout=subprocess.DEVNULL)


def run_all(jobs: list[Job], options: argparse.Namespace) -> None:
    """Runs the jobs, as many at once as there is room for, until all are done or the time is over."""
    ends = options.began + options.time_limit - STOPPING
    waiting, running = list(jobs), {}
    while waiting or running:
        while waiting and len(running) < options.parallel and time.monotonic() < ends:
            job = waiting.pop(0)
            seconds = max(ends - time.monotonic() - STARTING, 1.0)
            words = command(job, options.out / job.name, options, seconds)
            with open(options.out / f"{job.name}.txt", "a") as said:
                env = environment(options.threads)
                running[job] = subprocess.Popen(words, env=env, stdout=said, stderr=said)
        now = time.monotonic()
        if now >= ends:
            waiting.clear()
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                if process.returncode:
                    print(f"{job.name} failed: {options.out / job.name}.txt", flush=True)
            elif now >= ends + PATIENCE:
                process.terminate()
        time.sleep(0.2)


def row_of(job: Job, folder: Path) -> dict[str, Any] | None:
    """What came of a run so far; None where it has no log."""
    try:
        with open(folder / "log.csv", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        settings = json.loads((folder / "config.json").read_text())
    except OSError:
        return None
    if not lines:
        return None
    log = {name: [float(line[name] or "nan") for line in lines] for name in lines[0]}
    returns = [value for value in log["return_eval"] if not math.isnan(value)]
    trained = [value for value in log["return_train"] if not math.isnan(value)]
    values = {
        "worlds": settings["training"]["worlds"],
        "updates": int(log["update"][-1]),
        "steps": int(log["steps"][-1]),
        "seconds": log["seconds"][-1],
        "last": returns[-1] if returns else math.nan,
        "mean_last": float(np.mean(returns[-LAST:])) if len(returns) > LAST else math.nan,
        "best": max(returns, default=math.nan),
        "train": float(np.mean(trained[-LAST:])) if trained else math.nan,
    }
    made = {name: settings[name] for name in ("training", "system", "versions")}
    return {**job._asdict(), **values, "log": log, **made}


def report(jobs: list[Job], out: Path) -> None:
    """Writes and prints what came of all runs."""
    rows = [row for job in jobs if (row := row_of(job, out / job.name)) is not None]
    (out / "results.json").write_text(json.dumps(rows) + "\n")
    with open(out / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, SUMMARY, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    with tarfile.open(out / "runs.tar.gz", "w:gz") as archive:
        for job in jobs:
            for name in KEPT:
                if (out / job.name / name).exists():
                    archive.add(out / job.name / name, f"{job.name}/{name}")
    print("| flow | decay | seeds | updates | last return, median [lowest, highest] | best | s an update |")
    print("|---|---|---|---|---|---|---|")
    for flow, decay in dict.fromkeys((row["flow"], row["decay"]) for row in rows):
        own = [row for row in rows if (row["flow"], row["decay"]) == (flow, decay)]
        last = [row["last"] for row in own]
        each = np.median([row["seconds"] / max(row["updates"], 1) for row in own])
        updates, best = min(row["updates"] for row in own), max(row["best"] for row in own)
        print(
            f"| {flow} | {decay:g} | {len(own)} | {updates} | "
            f"{np.median(last):.0f} [{min(last):.0f}, {max(last):.0f}] | {best:.0f} | {each:.2f} |"
        )


def main() -> None:
    """Runs, and reports."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=Path("runs/hopper"))
    parser.add_argument("--flows", nargs="+", default=["R", "M", "C", "R:0.9"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--worlds", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--parallel", type=int, help="runs at once (default: cores / threads)")
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds for all of it")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further options of train")
    options = parser.parse_args()
    options.began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.parallel is None:
        options.parallel = max(1, (os.cpu_count() or 1) // options.threads)
    jobs = jobs_of(options.flows, options.seeds, options.first_seed)
    if not options.report_only:
        warm_up(options)
        print(f"kernels after {time.monotonic() - options.began:.0f} s", flush=True)
        run_all(jobs, options)
    report(jobs, options.out)


if __name__ == "__main__":
    main()

"""The report on a matrix of runs: one self-contained page, the pictures on it, and a table of all runs."""

from __future__ import annotations

import base64
import csv
import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..pictures.plots import need_matplotlib
from ..training.config import CLIPS
from ..training.durable import PARTIAL
from ..training.published import FLOWS, SETTINGS, Job, Scale, facts
from ..training.runs import OUTCOME, Log, read_config, read_log
from . import toy
from .figures import FLOW_LABELS, Logs, cosines, curves, draw_landscape, draw_rotation, smoothing
from .run import read_scale

PAGE = "report.html"
TABLE = "results.csv"
PROBLEMS = {"cartpole": "Cart-pole", "guidance": "Guidance by repulsion", "quantum": "Quantum control"}
CLIP_TITLES = {"none": "no clipping", "value": "clipped by value to 1", "norm": "clipped by norm to 1"}


@dataclass(frozen=True, eq=False)
class Result:
    """What there is of one run."""

    job: Job
    log: Log
    outcome: dict[str, Any] | None
    """None while it is not finished."""
    versions: dict[str, str]

    @property
    def epochs(self) -> int:
        """Epochs that it has done."""
        return int(self.log["epoch"][-1]) + 1

    @property
    def final(self) -> float:
        """Test loss after the last of them."""
        return float(self.log["loss_test"][-1])

    @property
    def best(self) -> float:
        """Lowest test loss."""
        return float(self.log["loss_test"].min())

    @property
    def best_epoch(self) -> int:
        """Epoch of the lowest test loss, -1 before training."""
        return int(self.log["epoch"][self.log["loss_test"].argmin()])

    @property
    def status(self) -> str:
        """finished, diverged or unfinished."""
        if self.outcome is None:
            return "unfinished"
        return "diverged" if self.outcome["diverged"] else "finished"


def write_report(out: str | os.PathLike[str]) -> Path:
    """Writes the report on all runs below a folder, finished or not.

    Args:
        out: A folder that `reproduce` wrote.

    Returns:
        The page; pictures and table lie beside it.

    Raises:
        FileNotFoundError: `out` is no such folder, or holds no run with a row in its log.
    """
    need_matplotlib()
    out = Path(out)
    scale = read_scale(out)
    results = collect(out)
    if not results:
        raise FileNotFoundError(f"folder {out} holds no run yet; begin one with `warp-sims reproduce`")
    _write_table(results, out / TABLE)
    body = "".join(
        _problem(problem, [r for r in results if r.job.problem == problem], scale, out)
        for problem in PROBLEMS
        if any(r.job.problem == problem for r in results)
    )
    page = _TEMPLATE.format(
        summary=_summary(results, scale), body=body, toy=_toy(out), settings=_settings(results, scale)
    )
    partial = out / (PAGE + PARTIAL)
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out / PAGE)
    return out / PAGE


def collect(out: Path) -> list[Result]:
    """Reads every run below a folder that has something to show, in the order of the published settings."""
    results = []
    for problem, settings in SETTINGS.items():
        for name in settings:
            for flow in FLOWS:
                for clip in CLIPS:
                    folder = out / problem / name / f"{flow.name.lower()}_{clip}"
                    seeds = sorted(int(p.name[4:]) for p in folder.glob("seed*") if p.name[4:].isdigit())
                    for seed in seeds:
                        result = _read(out, Job(problem, name, flow.name.lower(), clip, seed))
                        if result is not None:
                            results.append(result)
    return results


def _read(out: Path, job: Job) -> Result | None:
    folder = job.folder(out)
    try:
        log, versions = read_log(folder), read_config(folder)["versions"]
    except (OSError, ValueError):  # a run that was stopped at its very beginning
        return None
    if not len(log["epoch"]):
        return None
    try:
        outcome = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        outcome = None
    return Result(job, log, outcome, versions)


def _write_table(results: Sequence[Result], path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["problem", "setting", "flow", "clip", "seed", "status", "epochs"]
            + [
                "loss_first",
                "loss_final",
                "loss_best",
                "epoch_best",
                "grad_norm_final",
                "cosine_mean",
                "seconds",
            ]
        )
        for r in results:
            cosine = r.log["cosine"][~_nan(r.log["cosine"])]
            numbers = [r.log["loss_test"][0], r.final, r.best, r.best_epoch, r.log["grad_norm"][-1]]
            numbers += [cosine.mean() if len(cosine) else math.nan, r.log["seconds"][-1]]
            job = [r.job.problem, r.job.setting, r.job.flow, r.job.clip, r.job.seed, r.status, r.epochs]
            writer.writerow(job + ["" if math.isnan(n) else f"{n:.6g}" for n in numbers])


def _nan(values: Any) -> Any:
    return values != values


def _summary(results: Sequence[Result], scale: Scale) -> str:
    counts = {s: sum(r.status == s for r in results) for s in ("finished", "diverged", "unfinished")}
    done = counts["finished"] + counts["diverged"]
    count = len({r.job.seed for r in results})
    seeds = "one seed" if count == 1 else f"{count} seeds"
    parts = [f"{done} of {len(results)} runs of {scale.epochs} epochs are finished, from {seeds} of weights."]
    if counts["diverged"]:
        parts.append(f"{counts['diverged']} of them ended early with a loss that was not finite.")
    if counts["unfinished"]:
        parts.append(
            f"{counts['unfinished']} are not: they are shown as far as they got; the same command goes on."
        )
    if scale.epochs < 100:
        parts.append("So few epochs show that everything runs, not what the flows are worth.")
    return " ".join(parts)


def _problem(problem: str, results: Sequence[Result], scale: Scale, out: Path) -> str:
    clips = [clip for clip in CLIPS if any(r.job.clip == clip for r in results)]
    parts = [f'<section id="{problem}"><h2>{PROBLEMS[problem]}</h2>']
    for clip in clips:
        chosen = [r for r in results if r.job.clip == clip]
        logs: dict[tuple[str, str], list[Log]] = {}
        for r in chosen:
            logs.setdefault((r.job.setting, r.job.flow), []).append(r.log)
        parts.append(f"<h3>{CLIP_TITLES[clip].capitalize()}</h3>")
        parts.append(_figures(problem, clip, logs, scale, out))
        parts.append(_losses(problem, chosen, scale))
    return "".join(parts) + "</section>"


def _figures(problem: str, clip: str, logs: Logs, scale: Scale, out: Path) -> str:
    width = smoothing(scale.epochs)
    how = (
        "Median over seeds; the band reaches from the lowest to the highest."
        if any(len(seeds) > 1 for seeds in logs.values())
        else "One seed."
    )
    how += f" Each is a trailing mean of {width} epochs." if width > 1 else ""
    name = PROBLEMS[problem]
    shown = []
    loss = out / f"{problem}_{clip}_loss.png"
    curves(problem, logs, "loss_test", "test loss", scale.epochs, loss)
    shown.append(_figure(loss, f"{name}: test loss by flow, one panel a setting. {how}"))
    size = out / f"{problem}_{clip}_update_size.png"
    curves(problem, logs, "grad_norm", "update size", scale.epochs, size)
    text = (
        f"{name}: size of the update, the root of the mean squared norm of the gradient over the updates of "
        f"an epoch, before clipping. {how}"
    )
    shown.append(_figure(size, text))
    cosine = out / f"{problem}_{clip}_cosine.png"
    if cosines(problem, logs, scale.epochs, cosine):
        text = f"{name}: cosine of M and R where C is trained, mean over the updates of an epoch. {how}"
        shown.append(_figure(cosine, text))
    return "".join(shown)


def _losses(problem: str, results: Sequence[Result], scale: Scale) -> str:
    rows = []
    for name, setting in SETTINGS[problem].items():
        groups = {
            flow: [r for r in results if (r.job.setting, r.job.flow) == (name, flow)] for flow in FLOW_LABELS
        }
        groups = {flow: group for flow, group in groups.items() if group}
        finals = {flow: median(r.final for r in group) for flow, group in groups.items()}
        for flow, group in groups.items():
            first = f'<th rowspan="{len(groups)}">{html.escape(setting.title)}</th>'
            mark = ' class="least"' if finals[flow] == min(finals.values()) else ""
            diverged = sum(r.status == "diverged" for r in group)
            epochs = sorted({r.epochs for r in group})
            done = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]}–{epochs[-1]}"
            note = f", {diverged} diverged" if diverged else ""
            rows.append(
                f"<tr>{first if flow == next(iter(groups)) else ''}<td>{FLOW_LABELS[flow]}</td>"
                f"<td{mark}>{_spread([r.final for r in group])}</td>"
                f"<td>{_spread([r.best for r in group])}</td>"
                f"<td>{len(group)}</td><td>{done} of {scale.epochs}{note}</td></tr>"
            )
    columns = ("setting", "flow", "final test loss", "best test loss", "seeds", "epochs")
    head = "".join(f"<th>{column}</th>" for column in columns)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="note">Test losses as median (lowest – highest) over seeds: after the last epoch, and the '
        "lowest of all epochs. Bold: the lowest final median of a setting.</p>"
    )


def _spread(values: Sequence[float]) -> str:
    middle = _number(median(values))
    return middle if len(values) == 1 else f"{middle} ({_number(min(values))} – {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def _toy(out: Path) -> str:
    plane, turned = out / "toy_landscape.png", out / "toy_rotation.png"
    draw_landscape(plane)
    alone, combined = toy.rotation(False), toy.rotation(True)
    draw_rotation(alone, combined, turned)
    return _figure(
        plane,
        "The paper’s first figure: policy N(x) = θ₁x² + θ₂x, simulator S(x, u) = x + u, four steps from "
        "−0.3, loss ½(x₄ − 2)². Colours: loss. Arrows: direction of descent under each flow, all of one "
        "length; a dot where the field is zero, for C where it keeps neither component.",
    ) + _figure(
        turned,
        "Rotation: loss θ₁² + θ₂², Adam with rate 0.1 from (2, 4), 200 steps along θ − 2Jθ (J: turn by "
        "+90°), alone and combined with the gradient as C combines M with R. Loss in the last step: "
        f"{alone.loss[-1]:.3g} alone, {combined.loss[-1]:.3g} combined.",
    )


def _settings(results: Sequence[Result], scale: Scale) -> str:
    parts = []
    for problem, title in PROBLEMS.items():
        names = [n for n in SETTINGS[problem] if any(r.job.setting == n for r in results)]
        for name in names if problem in {r.job.problem for r in results} else []:
            setting = SETTINGS[problem][name]
            parts.append(
                f"<details><summary>{title}, {html.escape(setting.title)}</summary>"
                + _pairs(facts(setting, scale))
                + "</details>"
            )
    machines = _distinct(r.outcome["machine"] for r in results if r.outcome)
    versions = _distinct(r.versions for r in results)
    parts.append("<h3>Versions</h3>" + "".join(_pairs(v.items()) for v in versions))
    parts.append(
        "<h3>Machine</h3>" + ("".join(_pairs(m.items()) for m in machines) or "<p>No run is finished.</p>")
    )
    return "".join(parts)


def _distinct(items: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(item) for item in items)]


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in pairs)
    return f"<dl>{rows}</dl>"


def _figure(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = html.escape(text)
    return (
        f'<figure><div class="wide"><img alt="{text}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>warp-sims reproduce</title>
<style>
body {{ margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; }}
h2 {{ margin-top: 3rem; border-bottom: 1px solid #ccc; }}
figure {{ margin: 1.5rem 0; }}
figcaption, .note {{ color: #555; font-size: .9rem; }}
.wide {{ overflow-x: auto; }}
img {{ display: block; width: 100%; min-width: 32rem; height: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }}
th, td {{ padding: .25rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}
.least {{ font-weight: bold; }}
summary {{ cursor: pointer; padding: .2rem 0; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0 1rem;
  font-size: .9rem; }}
dt {{ color: #555; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>The paper’s experiments, run again</h1>
<p>Schnell and Thuerey, “Stabilizing Backpropagation Through Time to Learn Complex Physics”, ICLR 2024. Flows:
R regular, M modified, S stopped, C combined. Every run trains on the published data; its seed draws the
initial weights.</p>
<p>{summary}</p>
{body}
<section id="toy"><h2>Two studies in the plane</h2>{toy}</section>
<section id="settings"><h2>Settings, versions, machine</h2>{settings}</section>
</body>
</html>
"""

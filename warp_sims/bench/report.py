"""What `warp-sims bench` found, as text: first the rows in which a peer wins, then tables."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .case import benched, network_name
from .contestants import OURS
from .timing import PAUSE, spread

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
"""Of a page that is written again, what stands outside of these two lines is kept."""

Row = dict[str, Any]


def summary(report: dict[str, Any]) -> list[str]:
    """Lines of Markdown: where a peer wins, how much faster ours is, how flows and sizes compare."""
    rows = report["rows"]
    if report["ensembles"]:
        return []
    compared = [(row, peer, ratio) for row in rows for peer, ratio in row["ratios"].items()]
    lost = [
        f"{_title(row)}: {peer} {1 / ratio['median']:.2g} times as fast as ours"
        for row, peer, ratio in compared
        if ratio["median"] < 1
    ]
    wrong = [
        f"{_title(row)}: {note}"
        for row in rows
        for note in row["notes"]
        if "WRONG" in note or "FAILED" in note
    ]
    lines = []
    if wrong:
        lines += ["**Wrong or failed, and not timed:**", "", *(f"- {text}" for text in wrong), ""]
    if lost:
        lines += [
            f"**A peer wins in {len(lost)} of {len(compared)} comparisons:**",
            "",
            *(f"- {text}" for text in lost),
        ]
    elif compared:
        lines.append(f"**No peer wins in any of {len(compared)} comparisons.**")
    else:
        lines.append("Nothing was compared: no peer ran.")
    lines.append("")
    lines += _by_peer(compared)
    if not report["settings"]["scaling"]:
        lines += _between_flows(rows) + _between_sizes(rows)
    return lines


def _by_peer(compared: Sequence[tuple[Row, str, Any]]) -> list[str]:
    """How many times as fast as each peer, by problem and device."""
    out = []

    def kind(item: tuple[Row, str, Any]) -> tuple[str, str, str]:
        return item[1], item[0]["case"]["problem"], item[0]["case"]["device"]

    for (peer, problem, device), group in itertools.groupby(sorted(compared, key=kind), kind):
        ratios = [ratio["median"] for _, _, ratio in group]
        out.append(
            [
                peer,
                problem,
                device,
                str(len(ratios)),
                _number(min(ratios)),
                _number(statistics.median(ratios)),
            ]
            + [_number(max(ratios)), f"{sum(r >= 2 for r in ratios)} of {len(ratios)}"]
        )
    if not out:
        return []
    head = ["peer", "problem", "device", "rows", "least", "median", "most", "at least 2"]
    return ["Time of a peer over ours, within a round:", "", *table(head, out), ""]


def _between_flows(rows: Sequence[Row]) -> list[str]:
    """Time of C and M over R, ours."""
    out = []
    for key, group in itertools.groupby(rows, lambda row: {**row["case"], "flow": ""}):
        times = {row["case"]["flow"]: row["contestants"].get(OURS) for row in group}
        medians = {flow: found["seconds"]["median"] for flow, found in times.items() if found}
        if "R" in medians and len(medians) > 1:
            cells = [_number(medians[flow] / medians["R"]) if flow in medians else "-" for flow in "MC"]
            out.append([key["problem"], key["device"], _network(key), str(key["batch"]), *cells])
    if not out:
        return []
    head = ["problem", "device", "network", "batch", "M / R", "C / R"]
    return [
        "Ours, time of a flow over that of R (rows follow one another, not in turns):",
        "",
        *table(head, out),
        "",
    ]


def _between_sizes(rows: Sequence[Row]) -> list[str]:
    """Cost per world-step of the most worlds over that of 64, ours."""
    kinds: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if OURS in row["contestants"]:
            case = row["case"]
            kind = case["problem"], case["device"], _network(case), case["flow"]
            kinds.setdefault(kind, {})[case["batch"]] = _world_step(row, OURS)
    out = [
        [*kind, str(max(costs)), _number(costs[max(costs)] / costs[64])]
        for kind, costs in kinds.items()
        if 64 in costs and max(costs) > 64
    ]
    if not out:
        return []
    head = ["problem", "device", "network", "flow", "worlds", "cost per world-step / that of 64"]
    return ["Ours, cost of more worlds:", "", *table(head, out), ""]


# Tables


def tables(report: dict[str, Any]) -> list[str]:
    """Lines of Markdown: times of every row, then first calls and memory, then what was left out."""
    rows = report["rows"]
    lines = []
    for (problem, device), group in itertools.groupby(
        rows, lambda r: (r["case"]["problem"], r["case"]["device"])
    ):
        lines += [f"## {_heading(problem, device)}", ""]
        some = list(group)
        lines += (_scaling_table if report["settings"]["scaling"] else _times)(some, report)
        fresh = [
            r for r in report["memory"] if (r["case"]["problem"], r["case"]["device"]) == (problem, device)
        ]
        if fresh:
            lines += _fresh(fresh)
        notes = [f"- {_title(row)}: {note}" for row in [*some, *fresh] for note in row["notes"]]
        if notes:
            lines += ["Left out, wrong or failed:", "", *notes, ""]
    return lines + _ensembles(report["ensembles"])


def _ensembles(rows: Sequence[Row]) -> list[str]:
    """Time of K members together, and per member over that of one policy alone."""
    if not rows:
        return []
    head = ["problem", "device", "network", "batch", "flow", "members", "ms"]
    head.append("per member / alone")
    out = []
    for row in rows:
        case = row["case"]
        kind = [case["problem"], case["device"], _network(case), str(case["batch"]), case["flow"]]
        for members, result in row["members"].items():
            ratio = _spread(result["per_member"]) if "per_member" in result else "-"
            out.append(
                [*kind, members if members != "0" else "alone", _spread(result["seconds"], 1e3), ratio]
            )
    notes = [f"- {_title(row)}: {note}" for row in rows for note in row["notes"]]
    return ["Networks trained together, an update of all members:", "", *table(head, out), "", *notes]


def _heading(problem: str, device: str) -> str:
    return f"{problem}, {device}"


def _names(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["contestants"])
    return sorted(found, key=lambda name: name != OURS)


def _times(rows: Sequence[Row], report: dict[str, Any]) -> list[str]:
    names = _names(rows)
    with_ours = OURS in names
    head = ["network", "batch", "flow"]
    for name in names:
        head.append(f"{name} [ms]")
        if name == OURS:
            head += ["us per world-step", "GFLOP/s", "of product", "of copy"]
        elif with_ours:
            head.append(f"{name} / ours")
    out = []
    for row in rows:
        cells = [_network(row["case"]), str(row["case"]["batch"]), row["case"]["flow"]]
        for name in names:
            result = row["contestants"].get(name)
            cells.append(_spread(result["seconds"], 1e3, result["plan"]) if result else "-")
            if name == OURS:
                cells += _rates(row, report) if result else ["-"] * 4
            elif with_ours:
                ratio = row["ratios"].get(name)
                cells.append(_spread(ratio) if ratio else "-")
        out.append(cells)
    return [*table(head, out), ""]


def _rates(row: Row, report: dict[str, Any]) -> list[str]:
    """Cost per world-step, arithmetic rate, and shares of both ceilings, ours."""
    seconds = row["contestants"][OURS]["seconds"]["median"]
    ceiling = report["ceilings"][row["case"]["device"]]
    flops = row["operations"] / seconds
    if not flops:
        return [_number(1e6 * _world_step(row, OURS)), "-", "-", "-"]
    return [
        _number(1e6 * _world_step(row, OURS)),
        _number(flops / 1e9),
        f"{flops / ceiling['flops']:.0%}",
        f"{row['bytes'] / seconds / ceiling['bytes']:.0%}",
    ]


def _world_step(row: Row, name: str) -> float:
    case = row["case"]
    return row["contestants"][name]["seconds"]["median"] / (case["batch"] * case["horizon"])


def _scaling_table(rows: Sequence[Row], report: dict[str, Any]) -> list[str]:
    """Time against what is varied. All ratios are taken within a round: to the smallest size, to the size
    before (as an exponent, 1 is linear), and to flow R of the same size.
    """
    varied = report["settings"]["scaling"]

    def value(row: Row) -> int:
        return row["case"][{"worlds": "batch", "horizon": "horizon"}.get(varied, "size")]

    def kind(row: Row) -> tuple[str, ...]:
        worlds = [] if varied == "worlds" else [str(row["case"]["batch"])]
        return _network(row["case"]), *worlds, row["case"]["flow"]

    head = ["network", *([] if varied == "worlds" else ["batch"]), "flow", varied, "contestant", "ms"]
    head += [f"per unit of {varied} / least", "exponent", "/ R"]
    out = []
    for name in _names(rows):
        timed = [row for row in rows if name in row["contestants"]]
        for _, group in itertools.groupby(sorted(timed, key=lambda row: (kind(row), value(row))), kind):
            least = before = None
            for row in group:
                result = row["contestants"][name]
                times, size = result["times"], value(row)
                cells = [*kind(row), str(size), name, _spread(result["seconds"], 1e3, result["plan"])]
                if least is None or before is None:
                    least = row
                    cells += ["-", "-"]
                else:
                    first = least["contestants"][name]["times"], value(least)
                    last = before["contestants"][name]["times"], value(before)
                    growth = [t / size / (o / first[1]) for t, o in zip(times, first[0], strict=True)]
                    steps = math.log(size / last[1])
                    exponents = [math.log(t / o) / steps for t, o in zip(times, last[0], strict=True)]
                    cells += [_spread(spread(growth)), _spread(spread(exponents))]
                before = row
                regular = next((r for r in timed if _is_regular(r, row)), None)
                if regular is None or regular is row:
                    cells.append("-")
                else:
                    pairs = zip(times, regular["contestants"][name]["times"], strict=True)
                    cells.append(_spread(spread([t / o for t, o in pairs])))
                out.append(cells)
    note = (
        "Sizes and flows take turns, ratios are taken within a round. Exponent: log of the time's ratio "
        f"over log of the ratio of {varied}, to the row before; 1: linear."
    )
    return [*table(head, out), "", note, ""]


def _is_regular(row: Row, like: Row) -> bool:
    """Whether a row is that of flow R for the case of another."""
    return _identity({"case": {**like["case"], "flow": "R"}}) == _identity(row)


def _fresh(rows: Sequence[Row]) -> list[str]:
    names = _names(rows)
    head = [
        "network",
        "batch",
        *(f"{name} {what}" for name in names for what in ("first call [s]", "peak [MiB]")),
    ]
    out = []
    for row in rows:
        cells = [_network(row["case"]), str(row["case"]["batch"])]
        for name in names:
            result = row["contestants"].get(name)
            if result is None:
                cells += ["-", "-"]
                continue
            cached = f" ({result['first_call_cached_s']:.2f})" if "first_call_cached_s" in result else ""
            cells.append(f"{result['first_call_s']:.2f}{cached}")
            cells.append(f"{result['peak_updates_mib']:.0f} ({result['peak_mib']:.0f})")
        out.append(cells)
    return [
        "Flow R in a fresh process without compiled kernels: first call, compiling included (in parentheses,",
        "ours with kernels on disk); peak memory above the process after imports, of later updates (in",
        "parentheses: with the first).",
        "",
        *table(head, out),
        "",
    ]


def against(report: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """Lines of Markdown: ours beside an earlier report, as times and relative to the rate of matrix products
    of both machines.
    """
    then = {_identity(row): row for row in earlier["rows"] if OURS in row["contestants"]}
    out = []
    for row in report["rows"]:
        past = then.get(_identity(row))
        if past is None or OURS not in row["contestants"]:
            continue
        device = row["case"]["device"]
        old, new = (r["contestants"][OURS]["seconds"]["median"] for r in (past, row))
        speed = report["ceilings"][device]["flops"] / earlier["ceilings"][device]["flops"]
        out.append(
            [
                _title(row),
                f"{1e3 * old:.3g}",
                f"{1e3 * new:.3g}",
                f"{old / new:.2f}",
                f"{old / new / speed:.2f}",
            ]
        )
    if not out:
        return ["No row of the earlier report is in this one.", ""]
    head = ["row", "then [ms]", "now [ms]", "then / now", "by product rates"]
    return [f"Ours beside the report of {earlier['date']}:", "", *table(head, out), ""]


def _identity(row: Row) -> tuple:
    # what is empty is missing in reports that are older than it
    given = sorted((name, value) for name, value in row["case"].items() if value != "")
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in given)


# Pages


def page(report: dict[str, Any], command: str) -> list[str]:
    """The whole report as lines of Markdown."""
    machine, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    ceilings = [
        f"{device} matrix product {reached['flops'] / 1e9:.0f} GFLOP/s (float32), "
        f"copy {reached['bytes'] / 1e9:.0f} GB/s"
        for device, reached in report["ceilings"].items()
    ]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    return [
        f"Written by `{command}` on {report['date']}, in {report['seconds'] / 60:.0f} minutes.",
        "",
        f"- machine: {cpu}; load before the run {machine['load']}"
        + "".join(f"; {name}" for name in machine.get("gpus", [])),
        f"- versions: {versions}",
        f"- ceilings, measured in this run: {'; '.join(ceilings)}",
        "- a row is one training update, float32: forward, backward, comparison (C), Adam",
        f"- contestants take turns in one process, each after a rest of {PAUSE} s, "
        f"{settings['rounds']} rounds at most; medians [quartiles]; ratios are taken within a round, above 1 "
        "ours is faster; a word after a time names the plan",
        "- before a contestant is timed, loss and gradients of its first update are compared with float64",
        "- GFLOP/s and shares of the ceilings: operations that the mathematics needs, products of the "
        "network alone; bytes of a stored trajectory, written and read once; recomputation is not counted",
        *(f"- {text}" for text in report["skipped"]),
        "",
        *summary(report),
        *tables(report),
    ]


def check_page(path: Path) -> None:
    """Refuses a page that `write_page` could not write; to be called before anything is measured.

    Raises:
        ValueError: the file is there and has no markers.
        OSError: its folder is not there.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"bench: {path}: there is no folder {path.parent}")
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text.partition(BEGIN)[2]:
            raise ValueError(
                f"bench: --markdown {path}: the file exists and has no lines {BEGIN} and {END}; put them "
                "where the tables belong, or give another file"
            )


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Writes a page; of one that is there already, replaces what stands between the two markers."""
    check_page(path)
    text = path.read_text(encoding="utf-8") if path.exists() else f"# What was measured\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text("\n".join([before + BEGIN, "", *lines, END + after]), encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, columns aligned."""
    rows = [list(head), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _title(row: Row) -> str:
    case = row["case"]
    size = f", {case['size']} {benched(case['problem']).scaled[0]}" if case["size"] else ""
    sizes = f"batch {case['batch']}, {case['horizon']} steps{size}"
    return f"{case['problem']} {_network(case)}, {case['device']}, {sizes}, {case['flow']}"


def _network(case: dict[str, Any]) -> str:
    return network_name(case["widths"], case["kind"])


def _number(value: float) -> str:
    return f"{value:.3g}"


def _spread(found: dict[str, Any], scale: float = 1.0, suffix: str = "") -> str:
    low, high = found["quartiles"]
    return f"{scale * found['median']:.3g} [{scale * low:.3g}, {scale * high:.3g}] {suffix}".strip()

"""What `warp-sims bench` writes: summary, tables, the comparison with an earlier report, the page."""

from warp_sims.bench.contestants import OURS
from warp_sims.bench.report import BEGIN, END, against, summary, tables, write_page


def fake_row(flow, batch, seconds, ratio=None, **case):
    case = {
        "problem": "cartpole",
        "device": "cpu",
        "widths": [8, 8],
        "horizon": 100,
        "size": 0,
        "kind": "",
    } | case
    found = {"plan": "", "seconds": {"median": seconds, "quartiles": [seconds, seconds]}}
    ratios = {} if ratio is None else {"peer": {"median": ratio, "quartiles": [ratio, ratio]}}
    contestants = {OURS: found} | ({"peer": found} if ratio else {})
    return {
        "case": case | {"flow": flow, "batch": batch},
        "operations": 10**9,
        "bytes": 10**9,
        "contestants": contestants,
        "ratios": ratios,
        "notes": [],
        "wrong": [],
    }


def fake_report(*rows):
    ceilings = {"cpu": {"flops": 1e11, "bytes": 1e10}}
    return {
        "ensembles": [],
        "rows": list(rows),
        "memory": [],
        "settings": {"scaling": ""},
        "ceilings": ceilings,
        "date": "then",
    }


def test_summary_says_first_where_a_peer_wins():
    rows = [fake_row("R", 64, 0.1, 0.5), fake_row("C", 64, 0.13, 3.0), fake_row("R", 128, 0.24, 2.0)]
    lines = summary(fake_report(*rows))
    assert lines[0] == "**A peer wins in 1 of 3 comparisons:**"
    assert "batch 64" in lines[2] and "peer 2 times as fast as ours" in lines[2]
    text = "\n".join(lines)
    assert "2 of 3" in text  # at least twice as fast
    assert "| 1.3 " in text  # C over R
    assert "| 1.2 " in text  # per world-step, 128 worlds over 64
    assert summary(fake_report(rows[1]))[0] == "**No peer wins in any of 1 comparisons.**"
    shares = "\n".join(tables(fake_report(rows[0])))
    assert "| 10%" in shares and "| 100%" in shares  # 1e10 of 1e11 operations, 1e10 of 1e10 bytes per second


def test_against_an_earlier_report_takes_the_machine_into_account():
    then, now = fake_report(fake_row("R", 64, 0.2)), fake_report(fake_row("R", 64, 0.1))
    now["ceilings"]["cpu"]["flops"] = 2e11
    text = "\n".join(against(now, then))
    assert "| 2.00 " in text and "| 1.00 " in text
    assert "No row" in against(now, fake_report(fake_row("M", 64, 0.2)))[0]
    # reports that are older than a field do not have it
    del then["rows"][0]["case"]["kind"]
    assert "| 2.00 " in "\n".join(against(now, then))


def test_write_page_makes_a_new_page(tmp_path):
    write_page(tmp_path / "new.md", ["one"])
    write_page(tmp_path / "new.md", ["two"])
    assert (tmp_path / "new.md").read_text() == f"# What was measured\n\n{BEGIN}\n\ntwo\n{END}\n"

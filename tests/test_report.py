"""The page about the paper's experiments: what it holds, and the studies in the plane that are part of it."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import warp_sims as ws
from warp_sims.reproduction import toy
from warp_sims.reproduction.report import write_report
from warp_sims.reproduction.run import reproduce
from warp_sims.training.published import SETTINGS, Job, Scale, make_jobs
from warp_sims.training.runs import read_log

ROOT = Path(__file__).parents[1]
TINY = Scale(epochs=2, horizon=6, samples=16)  # guidance: a control reaches an evader in the fourth step

# The report


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """A tiny matrix with every problem, two seeds and two clips, and the report on it."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    jobs = make_jobs(SETTINGS, seeds=2, flows="MC", poles=[1], costs=[0.1], targets=[3])
    jobs += make_jobs(["cartpole"], seeds=1, flows="C", clips=["norm"], poles=[1, 2])
    assert reproduce(jobs, out, scale=TINY, workers=2, progress=False) == len(jobs)
    return out, jobs, write_report(out)


@pytest.mark.slow
def test_the_matrix_is_done_and_not_repeated(matrix):
    out, jobs, _ = matrix
    for job in jobs:
        config, _, log = ws.load_run(job.folder(out))
        assert config.flow.name.lower() == job.flow
        assert config.clip == job.clip
        assert log["epoch"].tolist() == [-1, 0, 1]
        assert (job.folder(out) / "curves.png").is_file()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("seed*/*")}
    assert reproduce(jobs, out, scale=TINY, progress=False) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("seed*/*")} == before


@pytest.mark.slow
def test_the_page_is_self_contained_and_says_what_was_run(matrix):
    out, jobs, page = matrix
    text = page.read_text(encoding="utf-8")
    pictures = sorted(p.name for p in out.glob("*.png"))
    # by problem and clip: loss, update size, cosine; and two studies
    assert len(pictures) == 4 * 3 + 2
    assert text.count('src="data:image/png;base64,') == len(pictures)
    assert not re.search(r'<script|<link|@import|url\(|(?:src|href)="(?!data:)', text)
    assert 'name="viewport"' in text
    without_pictures = re.sub(r"base64,[^\"]*", "", text)
    assert str(out) not in without_pictures
    assert str(ROOT) not in without_pictures
    assert f"{len(jobs)} of {len(jobs)} runs of 2 epochs are finished, from 2 seeds" in without_pictures
    for said in ("CartPole(poles=1, ", "WaveCNN(points=32, width=60)", torch.__version__, "6.17", "0.0646"):
        assert said in without_pictures
    outcome = json.loads((jobs[0].folder(out) / "outcome.json").read_text())
    assert outcome["machine"]["cpu"] in without_pictures


@pytest.mark.slow
def test_the_table_holds_every_run(matrix):
    out, jobs, _ = matrix
    with open(out / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(jobs)
    for line in table:
        job = Job(line["problem"], line["setting"], line["flow"], line["clip"], int(line["seed"]))
        log = read_log(job.folder(out))
        assert float(line["loss_final"]) == pytest.approx(log["loss_test"][-1], rel=1e-5)
        assert float(line["loss_best"]) == pytest.approx(log["loss_test"].min(), rel=1e-5)
        assert (line["status"], line["epochs"]) == ("finished", "2")
        assert bool(line["cosine_mean"]) == (job.flow == "combined")


# The studies in the plane


def torch_field(points, cut):
    """Gradient of the toy loss by torch; `cut` closes the network's edge, as M does."""
    theta = torch.from_numpy(points).requires_grad_()
    x = torch.full((len(points),), -0.3, dtype=torch.float64)
    for _ in range(4):
        seen = x.detach() if cut else x
        x = x + theta[:, 0] * seen**2 + theta[:, 1] * seen
    loss = 0.5 * (x - 2) ** 2
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    return loss.detach().numpy(), gradient.numpy()


def test_the_fields_of_the_landscape_are_those_of_torch():
    points = np.random.default_rng(0).uniform(-4, 4, (100, 2))
    found = toy.landscape(*torch.from_numpy(points).T)
    loss, regular = torch_field(points, cut=False)
    _, modified = torch_field(points, cut=True)
    # rounding of double precision, the more the closer four steps come to cancelling
    np.testing.assert_allclose(found.loss, loss, rtol=1e-11)
    np.testing.assert_allclose(found.regular, regular, rtol=1e-10)
    np.testing.assert_allclose(found.modified, modified, rtol=1e-10)
    agree = np.sign(modified) == np.sign(regular)
    assert 0.2 < agree.mean() < 0.98
    np.testing.assert_allclose(found.combined, np.where(agree, modified, 0.0), rtol=1e-10)


def test_the_rotation_study_gives_the_published_losses():
    alone, combined = toy.rotation(False), toy.rotation(True)
    assert alone.loss[-1] == pytest.approx(6.2, rel=0.02)
    assert combined.loss[-1] == pytest.approx(0.065, rel=0.02)
    assert alone.points[0].tolist() == combined.points[0].tolist() == [2.0, 4.0]
    assert len(alone.loss) == 200

"""The study of image sizes in small: from images of digits to results, tables and figures."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from benchmarks import losses, scale
from distil import evaluate, metrics, report


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The study with networks, steps and images that take seconds."""
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 20), ("held-out", 10)):
        for i in range(count):
            place = tmp_path / "runs/scale/mnist" / part / str(i % 10)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32), np.uint8)).save(place / f"{i}.png")
    tiny = {"channels": 16, "teacher_norm_groups": 2, "channel_mults": (1, 1), "teacher_steps": 3, "steps": 2}
    monkeypatch.setattr(scale, "RECIPE", scale.RECIPE | tiny | {"batch_size": 4, "sample_steps": 3, "kd": ("out",)})
    for name, value in {"HERE": tmp_path / "found", "ROOT": tmp_path, "METHODS": ("out",), "STEPS": (2, 1)}.items():
        monkeypatch.setattr(scale, name, value)
    monkeypatch.setattr(scale, "SAMPLES", 6)
    monkeypatch.setattr(scale, "FITTED", 5)
    monkeypatch.setattr(metrics, "macs", lambda net: 0)
    monkeypatch.setattr(report, "curves", lambda *_: None)
    monkeypatch.setattr(metrics, "fit_classifier", functools.partial(metrics.fit_classifier, steps=5))
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_the_page_shows_the_table_of_the_committed_results():
    page = (scale.ROOT / "docs/scale.md").read_text("utf-8")
    for table in (scale.table(), scale.table(0.7), scale.table(first=False), scale.table(0.7, first=False)):
        assert table in page and len(table.splitlines()) >= 2 + len(scale.METHODS)


def test_sizes_that_cannot_be_are_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "image_size 9 cannot be halved" in refused(scale.main, ["8", "9"], capsys)
    assert "--prune 2.0 cannot be used" in refused(scale.main, ["8", "--prune", "2"], capsys)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_study_of_sizes_from_images_to_figures(small, capsys):
    assert scale.main(["8", "16", "--seeds", "0", "1", "--figures"]) == 0
    found = scale.results()
    assert [*found] == [(size, 0.9, norms, True) for size in (8, 16) for norms in ("keep", "scale")]
    for (size, _, norms, _), run in found.items():
        assert (run["settings"]["image_size"], run["settings"]["norm_groups"], run["settings"]["flip"]) == (
            size, norms, False
        )  # fmt: skip
        ways = ["out", "out, calibrated", "out, calibrated, clip", "out, clip"]
        assert sorted({row["method"] for row in run["students"]}) == ways and len(run["students"]) == 8
        assert [row["steps"] for row in run["first_errors"]] == [2, 2, 1, 1]
        assert "6 generated, 3 steps, against 20 training images; fitted on 5 held-out" in run["protocol"]
    assert [line.split()[1] for line in scale.table().splitlines()[2:]] == ["8x8,", "8x8,", "16x16,", "16x16,"]
    one = found[8, 0.9, "keep", True]["first_errors"]  # the only step of one step: what it says is what comes out
    assert all(row["measured"] >= row["predicted"] > 0 for row in one if row["steps"] == 1)
    for picture in ("scale.png", "first_error.png"):
        assert Image.open(small / "docs" / picture).size[0] > 500
    assert evaluate.main(["found/8-0.9-keep"]) == 0
    assert re.search(r"^\| out, calibrated \(n=2\) +\|", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_of_the_sixteen_losses_is_nothing_for_equal_outputs_and_something_for_others(name):
    loss, generator = losses.LOSSES[name], torch.Generator().manual_seed(0)
    e_t, e_s = (torch.randn(2, 1, 8, 8, generator=generator) for _ in range(2))
    assert float(loss(e_t, e_t, scale.RECIPE["steps"])) < 1e-5
    assert torch.autograd.functional.jacobian(lambda x: loss(x, e_t, scale.RECIPE["steps"]), e_s).abs().max() > 1e-3


def test_what_the_losses_are_named_after():
    e_t, e_s = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    found = {name: float(loss(e_s, e_t, 0)) for name, loss in losses.LOSSES.items()}
    assert found["w linear"] == found["w cosine"] == found["coarse only"]  # w is 0 at the first step
    assert found["w constant"] == pytest.approx(found["coarse only"] + found["fine only"], rel=1e-5)
    assert found["coarse + MSE"] == pytest.approx(
        found["coarse only"] + float((e_s - e_t).square().sum()) / 2, rel=1e-5
    )
    assert found["one line"] > found["one line, released"]  # its coarse term counts a quarter
    line = losses.LOSSES["one line"]
    assert line(e_s, 2 * e_s + 1, 0) == pytest.approx(2 * 64, rel=1e-3)  # |b0| + |b1 - 1| = 2 for each element
    assert losses.squares(e_s)[0, 1].flatten().tolist() == e_s[0, 0, :4, 4:].flatten().tolist()
    assert sorted(losses.shuffled(e_s)[0].flatten().tolist()) == sorted(e_s[0].flatten().tolist())


def test_the_study_of_losses_trains_each_once_and_prints_as_a_run_does(small, monkeypatch, capsys):
    monkeypatch.setattr(losses, "LOSSES", {name: losses.LOSSES[name] for name in ("one line", "w cosine")})
    assert losses.main(["8", "--seeds", "1"]) == 0
    monkeypatch.setattr(losses, "distil", lambda *_: pytest.fail("trained again"))
    assert losses.main(["8", "--seeds", "1"]) == 0
    capsys.readouterr()
    assert evaluate.main(["losses-8-0.9-scale"]) == 0
    shown = re.findall(r"^\| (.+?) +\|", capsys.readouterr().out, re.MULTILINE)
    assert sorted(shown) == ["method", "none", "one line", "out", "out+feat", "teacher", "w cosine"]


def test_the_study_of_the_capacity_gap_has_students_of_each_teacher(small, monkeypatch, capsys):
    monkeypatch.setattr(losses, "SHARES", (0.5,))
    assert losses.main(["8", "--seeds", "1", "2", "--gap"]) == 0
    run = json.loads(Path("gap-8-0.9-scale/metrics.json").read_text())
    found = [(row["method"], row["seed"]) for row in run["students"]]
    of = [
        (f"{loss}, from {name}", seed)
        for name in ("the teacher", "50% pruned")
        for seed in (1, 2)
        for loss in losses.GAP
    ]
    assert sorted(found) == sorted([*of, ("50% pruned", 0)])
    sizes = {row["method"]: row["parameters"] for row in run["students"]}
    assert sizes["out, from the teacher"] == sizes["place, from 50% pruned"] < sizes["50% pruned"]

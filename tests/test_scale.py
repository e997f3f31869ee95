"""The study of image sizes in small: from images of digits to results, tables and figures."""

import functools
import re

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from benchmarks import scale
from distil import evaluate, metrics


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
    monkeypatch.setattr(metrics, "fit_classifier", functools.partial(metrics.fit_classifier, steps=5))
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_the_page_shows_the_table_of_the_committed_results():
    page = (scale.ROOT / "docs/scale.md").read_text("utf-8")
    for table in (scale.table(), scale.table(prune=0.7), scale.table(first=False)):
        assert table in page and len(table.splitlines()) > 2 * len(scale.METHODS)


def test_sizes_that_cannot_be_are_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "image_size 9 cannot be halved" in refused(scale.main, ["8", "9"], capsys)
    assert "--prune 2.0 cannot be used" in refused(scale.main, ["8", "--prune", "2"], capsys)
    assert not [*tmp_path.iterdir()]


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

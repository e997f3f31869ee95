"""benchmarks/gpu.py: that all of it runs on tiny networks, goes on where it stopped, and outlives what fails."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import refused

from benchmarks import bench, gpu
from distil import data, machine, networks
from models import UNet

SMALL = ["--quick", "--device", "cpu"]


@pytest.mark.slow
def test_an_unattended_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "METHODS", ("none", "place"))
    parts = ["ways", "pace", "kept"]
    for only in (parts[:1], parts, parts):
        assert gpu.main([*SMALL, "--only", *only]) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "runs/small.json").read_text())
    assert list(result["sections"]) == parts and not any("error" in part for part in result["sections"].values())
    assert all(printed.count(f"\n{part}: ") == 1 for part in parts)  # none was measured twice
    rows = {part: result["sections"][part]["rows"] for part in parts}
    assert [row["what"] for row in rows["ways"]] == ["fp32", "fp32, channels last"]
    assert {row["what"]: row["steps"] for row in rows["pace"]} == {"teacher": 2, "students": 2}
    named = [f"{method}{way}" for method in gpu.METHODS for way in ("", ", calibrated")]
    assert sorted(row["method"] for row in rows["kept"]) == sorted(["teacher", *named])
    left = {path.name for path in (tmp_path / "runs/small/keep").iterdir()}
    assert left == {"metrics.json", "samples.png", "curves.png", "log.jsonl"}


@pytest.mark.soak
def test_the_other_parts_run_on_tiny_networks(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    assert gpu.main(SMALL) == 0  # FSDP2 and Stable Diffusion among them
    assert list(json.loads((tmp_path / "runs/small.json").read_text())["sections"]) == list(gpu.PARTS)


def test_a_part_that_fails_is_recorded_and_tried_again(tmp_path, monkeypatch, capsys):
    def small(b):
        """Has room."""
        yield {"n": 1}

    def large(b):
        """Has none."""
        yield {"n": 1}
        if len(b.sections) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory:\n  2 GiB")

    def last(b):
        """Comes after it."""
        yield from gpu.timed(b, {"good": lambda: None, "bad": lambda: {}["key"]})

    monkeypatch.setattr(gpu, "PARTS", {part.__name__: part for part in (small, large, last)})
    command = [*SMALL, "--out", str(tmp_path / "gpu.json"), "--only", "small", "large", "last"]
    assert gpu.main(command) == 1
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections["large"]["error"] == "OutOfMemoryError: CUDA out of memory: 2 GiB"
    assert sections["large"]["rows"] == sections["small"]["rows"] == [{"n": 1}]  # what it had till then stays
    good, bad = sections["last"]["rows"]
    assert good["vs_first_row"] == 1 and bad == {"what": "bad", "error": "KeyError: 'key'"}
    assert gpu.main(command) == 0
    assert "error" not in json.loads((tmp_path / "gpu.json").read_text())["sections"]["large"]


def test_it_ends_in_time_with_what_it_has(tmp_path, monkeypatch, capsys):
    def endless(b):
        """Takes longer."""
        yield {"n": 1}
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(gpu, "PARTS", {"quick": lambda b: iter(()), "endless": endless})
    gpu.PARTS["quick"].__doc__ = "Nothing."
    path = tmp_path / "gpu.json"
    command = [*SMALL, "--out", str(path), "--only", "quick", "endless", "--minutes", "0.03"]
    assert gpu.main(command) == 143
    assert list(json.loads(path.read_text())["sections"]) == ["quick"]
    assert "the same command goes on" in capsys.readouterr().out


def test_the_teacher_of_its_runs_is_that_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "photographs", lambda folder, n: folder)
    b = bench.Setup.__new__(bench.Setup)
    b.quick, b.size, b.batch, b.device, b.folder = False, 64, 96, torch.device("cpu"), tmp_path
    b.sections = {"pace": {"rows": [{"what": "teacher", "steps": 3000}, {"what": "students", "steps": 600}]}}
    settings = gpu.run_settings(b, "keep")
    with torch.device("meta"):
        pixels = np.broadcast_to(np.uint8(0), (10, 3, 64, 64))
        teacher = networks.new_network(settings, data.Images(pixels, None, "photographs"))
        published = UNet(64)
    assert gpu.metrics.parameters(teacher) == 78_700_803 and teacher.config == published.config | {"dropout": 0.1}
    assert (settings.prune, settings.norm_groups) == (0.9, "keep")  # of which a student of 1,312,076 comes
    assert (settings.steps, settings.teacher_steps) == (600, 3000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu"], "gpu.py: error: there is no GPU here: with --quick"),
        ([*SMALL, "--minutes", "0"], "--minutes 0.0 cannot be used, it must be above 0"),
        ([*SMALL, "--out", "other.json"], "other.json is of another gpu (another, now none): give another --out"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    about = {"options": {"small": True}, "official": False, "machine": machine.describe() | {"gpu": "another"}}
    (tmp_path / "other.json").write_text(json.dumps(about | {"sections": {}}))
    assert words in refused(gpu.main, arguments, capsys)

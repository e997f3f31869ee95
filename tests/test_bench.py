"""bench.py: that it runs and says what it promises, and that what it times is what train.py does. Never a time."""

import argparse
import copy
import json
import re
from pathlib import Path

import pytest
import torch

import bench
import data
import train
from diffusion import DDPM

ROOT = Path(__file__).parents[1]
PAGES = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
TABLES = re.findall(r"<!-- bench\.py (\S+) (\w+) -->\n(.*?)\n\n", PAGES, re.DOTALL)
COLUMNS = {  # of every row of a section
    "loss": {"shape", "loss", "ms", "peak_MiB"},
    "step": {"what", "batch", "s"},
    "students": {"students", "s_per_step", "vs_n_runs"},
    "growth": {"what", "ms"},
    "sampling": {"network", "batch", "images_per_s", "gmacs", "macs_ratio", "speed_up"},
    "overhead": {"what", "out_s", "place_s", "overhead_percent"},
}


@pytest.fixture
def setup():
    return bench.Setup(argparse.Namespace(device="cpu", quick=True, compile=False, repeat=1, official=None))


def test_a_quick_run_prints_every_table_and_writes_all_numbers(tmp_path, capsys):
    sections = [name for name in bench.SECTIONS if name != "startup"]  # that one starts other processes
    path = tmp_path / "bench.json"
    assert bench.main(["--quick", "--device", "cpu", "--only", *sections, "--out", str(path)]) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert result["machine"].keys() >= {"processor", "cores", "threads", "gpu", "torch", "python"}
    assert not result["official"] and "--official" in printed
    assert list(result["sections"]) == sections
    assert bench.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed
    for name, section in result["sections"].items():
        assert f"\n{name}: {section['what']}" in printed
        assert all(row.keys() >= COLUMNS[name] for row in section["rows"])
        numbers = [value for row in section["rows"] for value in row.values() if not isinstance(value, str)]
        assert torch.tensor(numbers).isfinite().all()


def test_what_cannot_be_compared_with_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--quick", "--official", str(tmp_path)])
    assert stop.value.code == 2
    assert "no clone" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "section", "written"), TABLES, ids=[section for _, section, _ in TABLES])
def test_the_tables_of_the_readme_are_those_of_the_committed_run(file, section, written):
    assert written == bench.table(json.loads((ROOT / file).read_text())["sections"][section]["rows"])


@pytest.mark.parametrize("method", ["out", "place"])
def test_the_step_that_is_timed_is_the_step_of_the_training_loop(setup, method, tmp_path):
    settings = setup.settings(steps=1, kd=(method,))
    ours = setup.student(settings, method)
    theirs = copy.deepcopy(ours)
    images = data.Images(setup.pixels[: setup.batch].numpy(), None, "random", True)
    setup.pixels = torch.from_numpy(images.images[data.batch_indices(setup.batch, setup.batch, 0, settings.seed)])
    setup.step([ours], settings)
    train.train(settings, [theirs], setup.tapped, images, DDPM(), tmp_path, start=0, device=setup.device)
    for got, want in zip(ours.bare.parameters(), theirs.bare.parameters(), strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(ours.ema.parameters(), theirs.ema.parameters(), strict=True):
        torch.testing.assert_close(got, want)


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert bench.exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_the_peak_counts_what_is_held_at_once():
    mib = 2**18  # float32
    assert bench.peak_bytes(lambda: [torch.ones(mib) for _ in range(4)], torch.device("cpu")) == pytest.approx(
        4 * 2**20, rel=0.01
    )

    def one_after_the_other():
        for _ in range(4):
            torch.ones(mib)

    assert bench.peak_bytes(one_after_the_other, torch.device("cpu")) == pytest.approx(2**20, rel=0.01)


def test_cases_take_turns_after_one_turn_to_warm_up():
    seen = []
    times = bench.seconds({name: lambda name=name: seen.append(name) for name in "abc"}, 2, torch.device("cpu"))
    assert "".join(seen) == "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}

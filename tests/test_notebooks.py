"""The notebooks run, at reduced size, and what they show came from the code that stands in them, at full size."""

import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_BUDGET = 120  # seconds, generous: at reduced size a cell takes a few
MAX_BYTES = 1_500_000

spec = importlib.util.spec_from_file_location("run", ROOT / "notebooks/run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what the notebooks use, so that they write nothing into the checkout and share one folder of runs."""
    root = tmp_path_factory.mktemp("clone")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, root)
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks")
    (root / "notebooks").mkdir()
    return root


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_changes_nothing_outside_its_folder(path, clone, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_FAST", "1")
    before = {file.name for file in clone.iterdir()}
    run.execute(path, clone / "notebooks", timeout=CELL_BUDGET)  # a cell that raises, or is late, raises here
    assert {file.name for file in clone.iterdir()} - before <= {"__pycache__"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_outputs_came_from_the_present_source(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if run.needs_record(cell)]
    stale = [cell.source for cell in cells if cell.metadata.get("source_hash") != run.fingerprint(cell.source)]
    assert stale == [], "run `make notebooks`"
    assert sum(bool(cell.outputs) for cell in cells) >= 5
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size < MAX_BYTES


def test_a_changed_cell_is_noticed():
    cell = nbformat.v4.new_code_cell("x = 1", metadata={"source_hash": run.fingerprint("x = 1")})
    assert cell.metadata.source_hash != run.fingerprint("x = 2")
    assert run.needs_record(cell)
    assert not run.needs_record(nbformat.v4.new_markdown_cell("x = 1"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_badge_question_answer_and_minutes(path):
    first, second = nbformat.read(path, as_version=4).cells[:2]
    assert f"/notebooks/{path.name})" in first.source and "colab-badge.svg" in first.source
    assert "**Question.**" in first.source and "**Answer.**" in first.source and " minute" in first.source
    assert second.metadata["tags"] == ["setup"] and 'torch"' not in second.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_minutes_are_those_of_the_committed_run(path):
    notebook = nbformat.read(path, as_version=4)
    executed, first = notebook.metadata["executed"], notebook.cells[0].source
    (readme,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| [{path.stem}]")]
    minutes = int(re.search(r"About (\d+) minutes?", first)[1])
    assert f"on {executed['cores']} CPU cores" in first
    if executed["from_nothing"]:
        assert readme.split(" | ")[2] == str(minutes)
        assert abs(minutes - executed["minutes"]) <= max(1, 0.1 * minutes)
    else:  # what is recorded is too short, so the README has to say where its figure comes from
        assert readme.split(" | ")[2] == f"{minutes} \\*" and minutes > executed["minutes"]

"""The notebooks run, at reduced size, and what they show came from the code that stands in them, at full size."""

import re
import shutil

import nbclient
import nbformat
import pytest
from conftest import ROOT, refused
from nbclient.util import run_sync
from PIL import Image

from distil import data, machine, metrics
from notebooks import run

NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
CELL_BUDGET = 120  # seconds, generous: at reduced size a cell takes a few
each = pytest.mark.parametrize("name", NOTEBOOKS)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what the notebooks use, so that they write nothing into the checkout and share one folder of runs."""
    root = tmp_path_factory.mktemp("clone")
    for file in [*ROOT.glob("*.py"), *ROOT.glob("distil/*.py"), ROOT / "notebooks/analysis.py"]:
        (root / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, root / file.relative_to(ROOT))
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks")
    for size in (8, 16):  # in small nothing is measured: a ruler of four steps stands in for that of 400
        metrics.digit_classifier(size, root / "notebooks" / data.CACHE, steps=4)
        made = root / "notebooks" / data.CACHE / f"digit-classifier-{size}-4-v2.safetensors"
        made.rename(made.with_name(made.name.replace("-4-", "-400-")))
    presets = root / "distil/presets.py"
    wide = presets.read_text("utf-8")
    presets.write_text(wide.replace('"channels": 64, "timesteps"', '"channels": 16, "timesteps"'), "utf-8")  # of digits
    assert presets.read_text("utf-8") != wide
    Image.new("RGB", (8, 8)).save(root / "curves.png")  # nobody looks at those of each small run
    with (root / "distil/report.py").open("a") as file:
        file.write(
            f"\n\ndef curves(path, log):\n    path.write_bytes(Path({str(root / 'curves.png')!r}).read_bytes())\n"
        )
    return root


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks: torch, scikit-learn and matplotlib are imported once."""
    manager = nbclient.NotebookClient(nbformat.v4.new_notebook()).create_kernel_manager()
    yield manager
    if manager.has_kernel:
        run_sync(manager.shutdown_kernel)(now=True)


def outside(clone):
    """{file: when it was written} of all but the folder of the notebooks."""
    files = [file for file in clone.rglob("*") if not {"notebooks", "__pycache__"} & set(file.relative_to(clone).parts)]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


@pytest.mark.slow
@each
def test_a_notebook_runs_from_top_to_bottom_and_changes_nothing_outside_its_folder(name, clone, kernel, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_SIZE", "tiny")
    before = outside(clone)
    if kernel.has_kernel:  # no name of the notebook before it is left
        forget = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")])
        nbclient.NotebookClient(forget, km=kernel).execute()
    # a cell that raises, or is late, raises here
    run.execute(ROOT / f"notebooks/{name}.ipynb", clone / "notebooks", timeout=CELL_BUDGET, km=kernel)
    assert outside(clone) == before


def test_a_notebook_that_is_not_there_is_one_sentence(capsys):
    assert "run.py: error: there is no notebook 99" in refused(run.main, ["99"], capsys)


@each
def test_the_committed_outputs_came_from_the_present_source(name):
    code = [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"][1:]  # the first one is the set-up
    for cell in code:
        assert cell.metadata.get("source_hash") == machine.digest(cell.source.encode()), "run `make notebooks`"
    assert sum(bool(cell.outputs) for cell in code) >= 5
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert (ROOT / f"notebooks/{name}.ipynb").stat().st_size < 1_500_000


@each
def test_a_notebook_opens_with_question_answer_and_the_minutes_of_its_committed_run(name):
    title, setup = NOTEBOOKS[name].cells[:2]
    assert "**Question.**" in title.source and "**Answer.**" in title.source
    assert setup.metadata["tags"] == ["setup"] and 'REPOSITORY = "' in setup.source
    executed, minutes = NOTEBOOKS[name].metadata["executed"], int(re.search(r"About (\d+) minutes?", title.source)[1])
    assert f"on {executed['cores']} CPU cores" in title.source
    (line,) = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith(f"| [{name}]")]
    alone = (executed.get("load") or 0) <= executed["cores"]  # nothing else ran on the machine
    if executed["from_nothing"] and alone:
        assert line.split(" | ")[2] == str(minutes)
        assert abs(minutes - executed["minutes"]) <= max(1, 0.1 * minutes)
    else:  # what is recorded is too short or too long, so the README has to say where its figure comes from
        assert line.split(" | ")[2] == f"{minutes} \\*" and (minutes > executed["minutes"] or not alone)

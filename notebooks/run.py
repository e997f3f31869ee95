"""Execute notebooks at their full size and record what each output came from.

    python notebooks/run.py                     # all of them, as `make notebooks` does
    python notebooks/run.py notebooks/01*.ipynb

Outputs are written into the notebooks, without progress bars. Beside those of every code cell stands a hash of the
source that gave them, and in the notebook's metadata how long it all took, on what, whether from nothing or with what
an earlier call had kept, and how many processes wanted to run in the last 15 minutes; tests/test_notebooks.py compares
all with what is there and what is said. What a run needs later again (teachers, students) is kept in notebooks/runs:
without that folder all is computed anew.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).parents[1]))
from distil import machine
from distil.command import Parser

HERE = Path(__file__).resolve().parent


def execute(path: Path, folder: Path, **limits) -> nbformat.NotebookNode:
    """The notebook of `path`, all its cells executed in `folder`. limits: of NotebookClient, such as `timeout`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        nbclient.exceptions.CellTimeoutError: a cell took longer than `timeout` seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, record_timing=False, **limits).execute()
    return notebook


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("run.py", "Execute notebooks at full size and record their outputs.")
    parser.add_argument("notebooks", metavar="NOTEBOOK", nargs="*", type=Path, help="[all]")
    os.environ.pop("NOTEBOOK_SIZE", None)
    from_nothing = not (HERE / "runs").exists()
    paths = parser.parse_args(arguments).notebooks or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            parser.error(f"there is no notebook {path}: name files, as {HERE.name}/01*.ipynb")
    for path in paths:
        print(f"{path.name}: ", end="", flush=True)
        began = time.monotonic()
        notebook = execute(path, HERE, timeout=None)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.metadata["source_hash"] = machine.digest(cell.source.encode())
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        minutes = round((time.monotonic() - began) / 60, 1)
        load = round(os.getloadavg()[2], 1) if hasattr(os, "getloadavg") else None  # Windows does not count it
        executed = {"minutes": minutes, "from_nothing": from_nothing, "load": load}
        notebook.metadata["executed"] = executed | machine.describe()
        nbformat.write(notebook, path)
        print(f"{minutes} minutes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

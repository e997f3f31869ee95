"""The README keeps its word: its code runs, its commands parse, its tables are those of the committed runs."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

import evaluate
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))])
COMMANDS = [
    shlex.split(line, comments=True)
    for line in re.findall(r"(?:^|`)((?:python|torchrun) [^`\n]*)", PAGES, re.MULTILINE)
    if "train.py" in line
]
TABLES = re.findall(r"<!-- evaluate\.py (\S+) -->\n(.*?)\n\n", PAGES, re.DOTALL)


def test_the_python_code_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "coarse" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_of_the_readme_are_understood(command):
    arguments = command[command.index("train.py") + 1 :]
    if arguments not in (["--help"], ["--list-presets"]):
        train.parse(arguments)


@pytest.mark.parametrize(("folder", "shown"), TABLES, ids=[folder for folder, _ in TABLES])
def test_the_tables_of_the_readme_are_those_of_the_committed_runs(folder, shown, capsys):
    assert evaluate.main([str(ROOT / folder)]) == 0
    table = capsys.readouterr().out.split("\n\n")[0]
    assert shown == table


def test_the_files_and_pictures_that_the_readme_names_exist():
    named = re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"^\| `([\w./]+(?:\.py|/))` \|", README, re.MULTILINE)
    assert len(TABLES) >= 2 and "benchmarks/" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_table_of_the_folds_is_that_of_the_committed_runs():
    runs = {
        path.parent.name: json.loads(path.read_text()) for path in (ROOT / "benchmarks/fold").glob("*/metrics.json")
    }
    page = (ROOT / "docs/fold.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.* ± .*) \|$", page, re.MULTILINE)
    assert [int(steps) for steps, _ in rows] == [125, 25, 10, 5]
    for steps, shown in rows:
        seeds = [runs[f"{steps}-seed{seed}"] for seed in range(3)]
        columns = [[run["same_steps"][which] for run in seeds] for which in (0, 1)]
        columns += [[run["students"][0] for run in seeds]]
        names = ("pruned-ddim", "pruned", "pruned-1500-ddim", "pruned-1500")
        columns += [runs[f"{steps}-{name}"]["students"] for name in names]
        values = [[row["frechet_pixels"] for row in column] for column in columns]
        assert all(len(column) == 3 for column in values)
        expected = [f"{statistics.fmean(column):.2f} ± {statistics.stdev(column):.2f}" for column in values]
        assert shown.split(" | ") == expected

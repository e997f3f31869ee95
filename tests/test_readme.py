"""The front page and the docs keep their word: code runs, commands parse, numbers are those of the committed runs."""

import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

import train
from distil import command as command_line
from distil import evaluate, sample, settings
from distil.command import flag
from models import UNet

README = ROOT / "README.md"
PAGES = {page: page.read_text("utf-8") for page in [README, *sorted((ROOT / "docs").glob("*.md"))]}
EVERYTHING = "\n".join(PAGES.values())

# ---- Code and commands -----------------------------------------------------------------------------------------------


def test_the_python_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 8}
    UNet(8, in_channels=1, **small).save("runs/mine/student")  # what the command above it leaves behind
    first, second = re.findall(r"```python\n(.*?)```", PAGES[README], re.DOTALL)
    exec(compile(first, "README.md", "exec"), {})
    assert re.fullmatch(r"coarse [\d.]+  fine [\d.]+  w [\d.]+  slope -?[\d.]+\n", capsys.readouterr().out)
    names = {}
    exec(compile(second, "README.md", "exec"), names)
    assert names["images"].shape == (16, 1, 8, 8)
    assert names["images"].dtype.itemsize == 1


def commands() -> list[str]:
    """Every command line of the pages that starts python or torchrun, in a block or between backticks."""
    return sorted(set(re.findall(r"(?:^|`)((?:python|torchrun) (?!-c)[^`\n]*)", EVERYTHING, re.MULTILINE)))


class UnderstoodError(Exception):
    """A command line was read to its end without a complaint."""


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_is_understood(command, monkeypatch):
    words = [word for word in shlex.split(command, comments=True) if word not in ("...", "--")]
    program = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("distil."))
    arguments = words[program + 1 :]
    if words[program] == "train.py" and arguments in (["--help"], ["--list-presets"]):
        with pytest.raises(SystemExit, match="0"):
            settings.parse(arguments)
        return
    if words[program] == "train.py":
        settings.parse(arguments)
        return
    module = importlib.import_module(words[program].removesuffix(".py").replace("/", "."))
    parse, read = argparse.ArgumentParser.parse_args, command_line.Parser.read

    def parse_and_stop(parser, *given):
        parse(parser, *given)
        raise UnderstoodError

    def read_and_stop(parser, *given):  # here the limits of each value are looked at
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            read(parser, *given)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(command_line.Parser, "read", read_and_stop)
    with pytest.raises(UnderstoodError):
        module.main(arguments)


def test_what_make_is_asked_for_is_in_the_makefile():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    asked = set(re.findall(r"(?:^|`)make (\w+)", EVERYTHING, re.MULTILINE))
    assert {"demo", "test"} <= asked <= set(targets)
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_an_address_is_put_into_badges_and_notebooks_by_one_command(tmp_path):
    for name in ("Makefile", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    for address in ("https://github.com/someone/first", "https://github.com/other/second"):  # again replaces it
        subprocess.run(["make", "address", f"REPOSITORY={address}"], cwd=tmp_path, check=True, capture_output=True)
        badges = (tmp_path / "README.md").read_text("utf-8").splitlines()[1]
        assert badges.count(f"{address}/actions") == 2
        assert f"/github/{address.removeprefix('https://github.com/')}/blob/main/" in badges
        for path in (tmp_path / "notebooks").glob("*.ipynb"):
            assert f'REPOSITORY = "{address}"' in nbformat.read(path, as_version=4).cells[1].source
    assert not list(tmp_path.rglob("*.bak"))


def test_the_page_of_a_folder_of_photographs_works_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = PAGES[ROOT / "docs/your_own.md"]
    photographs, script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(photographs.replace("range(300)", "range(24)"), "your_own.md", "exec"), {})
    command, draw = (
        re.search(rf"^python {start}.*$", page, re.MULTILINE)[0] for start in ("train.py --data photos$", "-m")
    )
    run = re.search(r"RUN|runs/\S+", draw)[0]
    small = (
        "--image-size 8 --channels 16 --channel-mults 1,2 --num-res-blocks 1 --teacher-norm-groups 2 --teacher-steps 2"
    )
    small += f" --steps 2 --batch-size 4 --eval-samples 8 --sample-steps 2 --device cpu --out {run}"
    assert train.main(settings.parse([*command.split()[2:], *small.split()])) == 0
    assert "24 images of 3x8x8; teacher " in (out := capsys.readouterr().out) and "| place " in out
    assert sample.main(draw.split()[3:]) == 0
    exec(compile(script.replace("steps=50", "steps=2"), "your_own.md", "exec"), {})
    assert len(list(Path(f"more/{Path(run).name}").glob("*.png"))) == len(list(Path().glob("*.png"))) == 16
    kept = {path.name for path in Path(run).iterdir()}
    assert kept >= {"student", "samples.png", "curves.png", "metrics.json", "README.md"}
    assert settings.parse(command.split()[2:]).out == run


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def evaluated(folder: str, capsys) -> str:
    """The table that the command prints of a committed run."""
    assert evaluate.main([str(ROOT / folder)]) == 0
    return capsys.readouterr().out.split("\n\n")[0]


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by the names of its columns."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


TABLES = re.findall(r"<!-- evaluate (\S+) -->\n(.*?)\n\n", EVERYTHING, re.DOTALL)


@pytest.mark.parametrize(("folder", "shown"), TABLES)
def test_a_table_is_that_of_the_committed_run(folder, shown, capsys):
    whole = evaluated(folder, capsys)
    columns = cells(shown)[0]
    if len(columns) == len(cells(whole)[0]):
        assert shown == whole
    assert cells(shown) == [{name: row[name] for name in columns} for row in cells(whole)]


def test_the_front_page_has_one_table_of_results_with_four_columns():
    ((folder, shown),) = re.findall(r"<!-- evaluate (\S+) -->\n(.*?)\n\n", PAGES[README], re.DOTALL)
    assert folder == "benchmarks/digits8-keep"
    assert list(cells(shown)[0]) == ["method", "Frechet px", "Frechet digits", "MSE to teacher"]


BETWEEN = {  # what the front page says between its tables: (run, method, column) of each number in it
    "in every seed of the table, {} against {}, and at 16x16 {} against {} (LIFT {}; three "
    "seeds), and there in the digit features too, {} against {}.": [
        *[("digits8-keep", name, "px") for name in ("place", "out")],
        *[("digits16-keep", name, "px") for name in ("place", "out", "lift")],
        *[("digits16-keep", name, "digits") for name in ("place", "out")],
    ],
    "the digit classifier prefers OutKD in every seed, {} against {}.": [
        ("digits8-keep", name, "digits") for name in ("out", "place")
    ],
    "at 16x16 `none` is then at {}, `out` at {}, `place` at {}, `lift` at {} (teacher {}).": [
        ("digits16-scale", name, "px") for name in ("none", "out", "place", "lift", "teacher")
    ],
    "takes `none` from {} to {}, `out` from {} to {}, `place` from {} to {} (8x8, five seeds": [
        ("calibrate-digits8-keep", f"{name}{way}", "px")
        for name in ("none", "out", "place") for way in ("", ", calibrated")
    ],
    "where no loss prevents the collapse, `out` from {:.0f}, {:.0f} and {:.0f} to": [
        (f"scale/{size}-0.9-keep", "out", "px") for size in (8, 16, 32)
    ],
    "to {}, {} and {} ([docs/scale.md]": [(f"scale/{size}-0.9-keep", "out, calibrated", "px") for size in (8, 16, 32)],
    "[`--head statistics`](docs/head.md) learns it: `none` is at {} where it was at {} (five": [
        (f"calibrate-head8-keep{head}", "none", "px") for head in ("-head", "")
    ],
}  # fmt: skip


@pytest.mark.parametrize(("said", "numbers"), BETWEEN.items(), ids=range(len(BETWEEN)))
def test_the_numbers_between_the_tables_are_means_of_committed_runs(said, numbers, capsys):
    section = re.search(r"^## What the loss buys.*?(?=^## )", PAGES[README], re.DOTALL | re.MULTILINE)[0]
    means = []
    for run, method, column in numbers:
        rows = {row["method"].partition(" (n=")[0]: row for row in cells(evaluated(f"benchmarks/{run}", capsys))}
        means.append(rows[method][f"Frechet {column}"].split()[0])
    assert said.format(*(map(float, means) if ":" in said else means)) in " ".join(section.split())


@pytest.mark.parametrize(
    ("run", "key", "first", "second"),
    [("digits8-keep", "pixels", "place", "out"), ("digits8-keep", "digits", "out", "place"),
     ("digits16-keep", "pixels", "place", "out"), ("digits16-keep", "digits", "place", "out"),
     *[("digits8-demo-seeds", "pixels", *pair) for pair in (("out", "none"), ("lift", "out"), ("place", "out"))]],
)  # fmt: skip
def test_what_is_said_of_every_seed_holds_in_every_seed(run, key, first, second):
    rows = json.loads((ROOT / f"benchmarks/{run}/metrics.json").read_text("utf-8"))["students"]
    of = {(row["method"], row["seed"]): row[f"frechet_{key}"] for row in rows}
    seeds = {seed for _, seed in of}
    assert len(seeds) >= 3 and all(of[first, seed] < of[second, seed] for seed in seeds)


def test_the_demo_gives_the_numbers_that_the_front_page_expects():
    run = json.loads((ROOT / "benchmarks/digits8-demo/metrics.json").read_text("utf-8"))
    found = {student["method"]: f"{student['frechet_pixels']:.1f}" for student in run["students"]}
    found["teacher"] = f"{run['teacher']['frechet_pixels']:.1f}"
    sentence = re.search(r"Expect a Frechet distance in the pixels \(`Frechet px`\)(.*?)\.\n", PAGES[README], re.DOTALL)
    assert dict(re.findall(r"`?(\w+)`?\s+([\d.]+\d)", sentence[1])) == found
    recipe = re.search(r"^demo:.*?\n\t\S+ train\.py (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    asked = settings.plain(settings.parse(shlex.split(recipe)))
    free = settings.FREE | {"device"}
    assert {name: value for name, value in run["settings"].items() if name not in free} == {
        name: value for name, value in asked.items() if name not in free and name in run["settings"]
    }


def test_the_table_of_the_ends_of_folds_is_that_of_the_study():
    found = json.loads((ROOT / "benchmarks/fold.json").read_text())["rows"]
    shown = re.findall(r"^\| (\d+), (as it is|x0 clamped) \| (.* ± .*) \|$", PAGES[ROOT / "docs/fold.md"], re.MULTILINE)
    assert {int(steps) for steps, *_ in shown} == {row["steps"] for row in found} and len(shown) % 2 == 0
    for steps, sampler, cells in shown:
        expected = []
        for run in ("pruned", "pruned, fold published", "pruned, fold last"):
            about = {"steps": int(steps), "run": run, "clip_x0": sampler != "as it is", "method": "place"}
            values = [row["frechet_pixels"] for row in found if about.items() <= row.items()]
            assert len(values) == 3
            expected.append(f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}")
        assert cells.split(" | ") == expected


def test_the_table_of_the_folds_is_that_of_the_committed_runs():
    runs = {
        path.parent.name: json.loads(path.read_text()) for path in (ROOT / "benchmarks/fold").glob("*/metrics.json")
    }
    rows = re.findall(r"^\| (\d+) \| (.* ± .*) \|$", PAGES[ROOT / "docs/fold.md"], re.MULTILINE)
    assert [int(steps) for steps, _ in rows] == [125, 25, 10, 5]
    for steps, shown in rows:
        seeds = [runs[f"{steps}-seed{seed}"] for seed in range(3)]
        columns = [[run["same_steps"][which] for run in seeds] for which in (0, 1)]
        columns += [[run["students"][0] for run in seeds]]
        names = ("pruned-1500-ddim", "pruned-1500")
        columns += [runs[f"{steps}-{name}"]["students"] for name in names]
        values = [[row["frechet_pixels"] for row in column] for column in columns]
        assert all(len(column) == 3 for column in values)
        expected = [f"{statistics.fmean(column):.2f} ± {statistics.stdev(column):.2f}" for column in values]
        assert shown.split(" | ") == expected


# ---- What was published ---------------------------------------------------------------------------------------------


def shown(value) -> str:
    """A setting as a table shows it."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def test_the_page_of_published_settings_holds_what_the_presets_hold():
    page, rows = PAGES[ROOT / "docs/as-published.md"], []
    proofs = "".join(file.read_text("utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    flags = {flag(name) for kind in (settings.Settings, evaluate.Flags) for name in kind.__dataclass_fields__}
    for section in page.split("\n## ")[1:]:
        command = re.search(r"^`python train.py (.*)`$", section, re.MULTILINE)
        resolved = settings.parse(shlex.split(command[1])) if command else None
        for row in re.findall(r"^\| (.+) \| (.+) \| (.+) \| (equal|different) \| (.+) \|$", section, re.MULTILINE):
            what, published, here, verdict, why = row
            if name := re.fullmatch(r"`--([\w-]+)`", what):
                assert here == shown(getattr(resolved, name[1].replace("-", "_"))), row
                assert (published == here) == (verdict == "equal"), row
            named, tests = set(re.findall(r"`(--[\w-]+)", " ".join(row))), re.findall(r"`(test_\w+)`", why)
            assert named <= flags and all(f"def {test}(" in proofs for test in tests), row
            assert tests if verdict == "equal" else "No flag" in why or re.search("`--", why), row
            rows.append(what)
    assert len(rows) == page.count("| equal |") + page.count("| different |") > 90


# ---- Files and links -------------------------------------------------------------------------------------------------


def test_the_front_page_is_short():
    assert len(PAGES[README].splitlines()) <= 183


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    text = PAGES[page]
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    folders = "distil|notebooks|benchmarks|docs|tests"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*|[a-z_]+\.py|requirements\S*\.txt)`", text)
    missing = [name for name in links if not (page.parent / name).exists()]
    missing += [name for name in paths if not (ROOT / name).exists() and name != "notebooks/runs"]
    assert missing == []
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
    assert "OWNER" not in text


def test_the_front_page_names_every_file_of_the_package_below_those_that_it_imports():
    listed = re.findall(r"^(?:- \*\*|  )(.*)$", PAGES[README].split("## Reading order")[1], re.MULTILINE)
    named = re.findall(r"`distil/(\w+)\.py`", "\n".join(listed))
    assert sorted(named) == sorted({file.stem for file in (ROOT / "distil").glob("*.py")} - {"__init__"})
    for i, name in enumerate(named):
        for line in ast.parse((ROOT / "distil" / f"{name}.py").read_text("utf-8")).body:
            if isinstance(line, ast.ImportFrom) and line.module.partition(".")[0] == "distil":
                used = [alias.name for alias in line.names] if line.module == "distil" else [line.module[7:]]
                assert set(used) <= set(named[:i]), name


# ---- The package -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of an environment's packages that holds the wheel of this project, as pip would unpack it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for file in [*ROOT.glob("*.py"), *(ROOT / name for name in ("README.md", "LICENSE", "pyproject.toml"))]:
        shutil.copy(file, source)
    for folder in ("distil", "docs"):
        shutil.copytree(ROOT / folder, source / folder)
    build = "from setuptools import build_meta; build_meta.build_wheel('built')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next((source / "built").glob("*.whl"))) as archive:
        archive.extractall(site)
    return site


def distribution(site: Path) -> PathDistribution:
    return PathDistribution(next(site.glob("*.dist-info")))


def requirement(line: str) -> tuple[str, frozenset[str]]:
    """ "torch-pruning>=1.6,<2" -> its name and its limits."""
    name, limits = re.match(r"([\w-]+)\s*(.*)", line).groups()
    return name.lower().replace("_", "-"), frozenset(limits.replace(" ", "").split(","))


def requirements(site: Path) -> dict[str, set[tuple[str, frozenset[str]]]]:
    """What the wheel needs, by extra; "" without any."""
    found = {}
    for line in distribution(site).requires:
        needed, _, extra = line.partition(";")
        extra = re.sub(r".*== [\"'](\w+)[\"']", r"\1", extra).strip()
        found.setdefault(extra, set()).add(requirement(needed.strip()))
    return found


def test_the_wheel_is_the_loss_alone_and_hides_no_module_of_its_user(wheel, tmp_path):
    (info,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"lift_place.py", info.name}
    assert distribution(wheel).metadata["License-Expression"] == "MIT"
    assert requirements(wheel)[""] == {requirement("torch>=2.7")}
    (tmp_path / "models").mkdir()
    for name in ("models/__init__.py", "data.py", "diffusion.py", "train.py"):
        (tmp_path / name).write_text("MINE = True\n")
    (tmp_path / "mine.py").write_text(
        "import torch, data, diffusion, lift_place, models, train\n"
        "from lift_place import place\n"
        "assert models.MINE and data.MINE and diffusion.MINE and train.MINE\n"
        "same = torch.randn(2, 3, 8, 8)\n"
        "print(lift_place.__file__, place(same, same).loss.item())\n"
    )
    run = [sys.executable, "mine.py"]
    out = subprocess.run(run, cwd=tmp_path, env={"PYTHONPATH": str(wheel)}, check=True, capture_output=True, text=True)
    assert out.stdout.split() == [str(wheel / "lift_place.py"), "0.0"]


def test_requirements_txt_is_the_sum_of_the_extras(wheel):
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    listed = [requirement(line) for line in lines if line]
    assert len(listed) == len(set(listed))
    assert set(listed) == set().union(*requirements(wheel).values())


def test_the_extras_that_the_pages_name_exist(wheel):
    named = set(",".join(re.findall(r"\.\[([\w,]+)\]", EVERYTHING)).split(","))
    assert named
    assert named <= set(requirements(wheel))


# the names that packages have for pip, where these are not those of their modules
PACKAGES = {"PIL": "pillow", "cleanfid": "clean-fid", "sklearn": "scikit-learn", "torch_pruning": "torch-pruning"}
# of --log, which says what to install, and of benchmarks/scale.py, which does too
CHOSEN_BY_THE_USER = {"tensorboard", "wandb", "trackio", "mlxtend"}


def imported(file: Path, *, everywhere: bool) -> set[str]:
    """The packages that a file imports: at its top, or everywhere and by `machine.library` too."""
    tree = ast.parse(file.read_text("utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and everywhere and getattr(node.func, "attr", "") == "library":
            found |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    ours = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]} | {path.name for path in ROOT.iterdir()}
    names = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - ours - CHOSEN_BY_THE_USER
    return {PACKAGES.get(name, name) for name in names}


def test_the_extras_cover_what_is_imported(wheel):
    known = {extra: {name for name, _ in needed} for extra, needed in requirements(wheel).items()}
    assert imported(ROOT / "lift_place.py", everywhere=True) == known[""] == {"torch"}
    code = [ROOT / "models.py", ROOT / "train.py", *(ROOT / "distil").glob("*.py")]
    whole = {name.replace("_", "-") for file in code for name in imported(file, everywhere=True)}
    at_start = {name.replace("_", "-") for file in code for name in imported(file, everywhere=False)}
    assert at_start <= known[""] | known["train"]
    assert whole <= set().union(*known.values()) - known["dev"]
    others = [file for folder in ("notebooks", "benchmarks", "tests") for file in (ROOT / folder).glob("*.py")]
    rest = {name.replace("_", "-") for file in others for name in imported(file, everywhere=True)}
    assert rest <= set().union(*known.values())

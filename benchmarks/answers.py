"""What the benchmarks share: a question is a function, its answer is a table, and all answers are one JSON file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distil import disk, machine
from distil.command import Parser

Row = dict[str, Any]

Section = Callable[[Any], Iterable[Row]]  # answers a question, which its docstring asks, row by row


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; what a row lacks is a dash."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = [head]
    for row in rows:
        values = [row.get(key, "-") for key in head]
        lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def shown(name: str, section: Row) -> str:
    parts = [f"{name}: {section['what']}", table(section["rows"]) if section["rows"] else "", section.get("error", "")]
    return "\n\n".join(filter(None, parts))


def measure(b: Any, sections: dict[str, Section], result: Row, path: Path) -> bool:
    """Answers the questions that `result` does not hold yet, prints their tables and writes all to `path` after each.
    One that fails, for memory or a missing library, is kept with its error and the next one begins. Whether all are
    answered."""
    for name, section in sections.items():
        if "error" not in result["sections"].get(name, {"error": ""}):
            continue
        began, found = time.perf_counter(), {"what": " ".join(section.__doc__.split()), "rows": []}
        try:
            found["rows"].extend(section(b))
        except Exception as error:
            found["error"] = machine.sentence(error)
        result["sections"][name] = found
        result["seconds"] = round(result.get("seconds", 0) + time.perf_counter() - began)
        print(f"\n{shown(name, found)}", flush=True)
        disk.write_json(path, result, indent=1)  # after every section: a run may be cut short
    return not any("error" in section for section in result["sections"].values())


def saved(path: Path) -> str:
    """The tables of the JSON that an earlier call wrote; ValueError for another file."""
    try:
        sections = disk.read_json(path, "it is not what a benchmark writes")["sections"]
        return "\n\n".join(shown(name, section) for name, section in sections.items())
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}: name one that a benchmark wrote") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what a benchmark writes") from error


def parser_of(program: str, about: str, sections: dict[str, Section], out: str) -> Parser:
    """The flags of a program that answers these questions."""
    parser = Parser(program, about)
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections), help="sections [all]")
    parser.add_argument("--official", metavar="DIR", help="a clone of the authors' repository [none]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda [auto]")
    parser.add_argument("--threads", type=int, help="threads on a CPU [as torch finds them]")
    parser.add_argument("--repeat", type=int, help="repetitions [5 on a CPU, 30 on a GPU]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--quick", action="store_true", help="tiny networks, one repetition")
    parser.add_argument("--out", default=out, help=f"the JSON [{out}]")
    return parser


def answer(options: argparse.Namespace, b: Any, sections: dict[str, Section]) -> int:
    """Measures the sections that are asked for. Returns the exit code: 1 if one failed."""
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {key: value for key, value in vars(options).items() if key not in ("official", "tinyfusion", "out")}
    result: Row = {"machine": machine.describe(), "options": about, "official": bool(b.authors), "sections": {}}
    done = measure(b, {name: sections[name] for name in options.only}, result, path)
    print(f"\n{result['seconds']} s; all numbers: {path}")
    return 0 if done else 1

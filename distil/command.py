"""Command lines: of every program the flags are the fields of a dataclass, made by `option`. Quick, without torch."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import signal
import sys
from dataclasses import field, fields
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any


def numbers(text: str) -> tuple[int, ...]:
    """ "0,2,5" -> (0, 2, 5)."""
    return tuple(int(part) for part in text.split(","))


def number_or_numbers(text: str) -> int | tuple[int, ...]:
    """ "5" -> 5, "0,2,5" -> (0, 2, 5)."""
    return numbers(text) if "," in text else int(text)


LARGEST = {int: 10**9, numbers: 10**9, float: 1e6}  # of all flags that name no limit of their own
SEED = {"low": 0, "high": 2**63 - 1}


def option(default: Any, text: str, kind: type = str, **limits: Any) -> Any:
    """A field of Settings that is also a flag. limits: choices, or low <= value <= high, above < value < below, or
    folder=True for where to write."""
    most = {"high": LARGEST[kind]} if kind in LARGEST and "below" not in limits else {}
    return field(default=default, metadata={"text": text, "kind": kind, **most, **limits})


def flag(name: str) -> str:
    """The flag of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


LIMITS = (("low", ge, "at least"), ("above", gt, "above"), ("high", le, "at most"), ("below", lt, "below"))


def check(name: str, value: Any, limits: Any) -> None:
    """ValueError, with what would work, unless the value keeps the limits of its field."""
    if value == "" or "\0" in str(value):
        raise ValueError(f"{name} {value!r} cannot be used, it must have characters, and none of them may be NUL")
    if limits.get("folder"):
        file = next((place for place in (Path(value), *Path(value).parents) if os.path.isfile(place)), None)
        if file is not None:
            raise ValueError(f"{name} {file} is a file: give a folder")
    choices = limits.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        hint = "; several are separated by spaces" if "," in str(value) else hint
        raise ValueError(f"{name} {value} is not known, choose from {', '.join(choices)}{hint}")
    bounds = [(limits[key], compare, text) for key, compare, text in LIMITS if key in limits]
    if missed := [f"{text} {bound}" for bound, compare, text in bounds if not compare(value, bound)]:
        hint = f"; {value:g} % is {value / 100:g}" if limits.get("below") == 1 and 1 < value < 100 else ""
        raise ValueError(f"{name} {value} cannot be used, it must be {' and '.join(missed)}{hint}")


def check_fields(given: Any) -> None:
    """ValueError unless every value in `given`, of a dataclass made by `option`, keeps the limits of its field."""
    for item in fields(given):
        value = getattr(given, item.name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                check(flag(item.name), one, item.metadata)


def leave_on_signals(program: str) -> None:
    """From here on Ctrl-C and SIGTERM end the program with one line and exit code 130 or 143, without a traceback."""

    def leave(number: int, frame: Any) -> None:
        print(f"\n{program}: ended by {signal.Signals(number).name}; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


KINDS = {  # what their values look like
    "int": "a whole number, as 1000",
    "float": "a number, as 0.9",
    "numbers": "whole numbers with commas between them, as 1,2,2",
    "number_or_numbers": "a whole number, or several with commas between them, as 0,40,80",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one sentence and exit code 2."""

    def __init__(self, program: str, description: str | None = None):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(program, description=description, formatter_class=raw, allow_abbrev=False)

    def parse_args(self, argv: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """As argparse's; a program whose own command line this is ends with one line on Ctrl-C and SIGTERM."""
        if argv is None:
            leave_on_signals(self.prog)
            if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
                sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: file names may be no UTF-8
        return super().parse_args(argv, namespace)

    def error(self, message: str) -> None:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.65)
        if message.startswith("unrecognized") and unknown.startswith("--") and near:
            message = f"there is no {unknown}; did you mean {near[0]}?"
        if wrong := re.match(r"argument (\S+): invalid (\w+) value: '(.*)'", message):
            message = f"{wrong[1]} {wrong[3]} cannot be used, it must be {KINDS[wrong[2]]}"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_options(self, kind: type, presets: tuple[str, ...] = (), groups: dict[str, str] | None = None) -> None:
        """A flag for every field of the dataclass `kind`; those named in `presets` have their default from one.
        groups: the titles under which --help shows the flags, each by the field with which it begins."""
        group: Any = self
        for item in fields(kind):
            if title := (groups or {}).get(item.name):
                group = self.add_argument_group(title)
            limits = item.metadata
            default = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
            if default is None:
                default = "preset" if item.name in presets else "none"
            choices = f": {', '.join(limits['choices'])}" if "choices" in limits else ""
            given: dict[str, Any] = {"help": f"{limits['text']}{choices} [{default}]", "default": argparse.SUPPRESS}
            if limits["kind"] is bool:
                given["action"] = "store_true" if item.default is False else argparse.BooleanOptionalAction
            else:
                given["type"] = limits["kind"]
                given |= {"nargs": "+"} if isinstance(item.default, tuple) else {}
            group.add_argument(flag(item.name), **given)

    def read(self, argv: list[str] | None, kind: type, *others: str) -> tuple[Any, dict[str, Any]]:
        """An object of the dataclass `kind`, and what was given for the arguments `others` that are no fields of it."""
        given = vars(self.parse_args(argv))
        rest = {name: given.pop(name) for name in others}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        try:
            return kind(**given), rest
        except ValueError as error:
            self.error(str(error))

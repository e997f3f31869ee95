"""The study behind docs/calibrate.md: the students of a finished run as they are, clamped, calibrated, and both.

    python benchmarks/calibrate.py RUN OUT                    from one noise: OUT/metrics.json and OUT/samples.png
    python benchmarks/calibrate.py RUN OUT --ways plain calibrated --sample-steps 10 --fit 32

OUT/metrics.json has the form of a run's, so `python -m distil.evaluate OUT` prints its table.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from distil import disk, doctor, machine, report, sample
from distil.calibrate import Calibrated
from distil.command import Parser, check
from distil.settings import plain

WAYS = ("plain", "clip", "calibrated", "calibrated, clip")


def study(case: doctor.Case, kinds: Sequence[str], knots: int | None = None, more: str = "") -> list[doctor.Way]:
    """Each student of a case in these `WAYS`, fitted at that many timesteps, by default at those of the sampler.
    more: what its name says after the method."""
    times, ways = case.process.timesteps(knots or len(case.times)), []
    if any("clip" in kind for kind in kinds) and not case.clamped.clip_x0:
        raise ValueError(f"{case.clamped.sampler} steps cannot clamp an image: leave the ways with clip out")
    fitted = case.fit(times) if any("calibrated" in kind for kind in kinds) else {}
    for name, student in case.students.items():
        method, _, seed = name.rpartition("-")
        for kind in kinds:
            label = f"{method}{more}" if kind == "plain" else f"{method}{more}, {kind}"
            net = Calibrated(student, fitted[name]) if "calibrated" in kind else student
            about = {"method": label, "seed": int(seed)}
            ways.append(doctor.Way(f"{label}-{seed}", net, about, case.clamped if "clip" in kind else None))
    return ways


def open_run(run: Path, flags: sample.Flags, n: int = 300) -> doctor.Case:
    """The students of a run by method and seed, one alone too, whose folder does not say them."""
    case, settings = doctor.open_case(run, flags, n=n), doctor.run_settings(run)
    names = [f"{method}-{seed}" for method in settings.kd for seed in settings.seeds]
    return case if len(names) > 1 else case._replace(students=dict(zip(names, case.students.values(), strict=True)))


def write(
    out: Path, run: Path, steps: int, protocol: str, rows: list[dict[str, Any]], samples: dict[str, Tensor], **more: Any
) -> None:
    """OUT/metrics.json in the form of a run's, of a sampler of so many steps, OUT/samples.png of the first seed's
    students where there are samples, and a printed table."""
    settings = plain(doctor.run_settings(run)) | {"sample_steps": steps}
    found = {"settings": settings, "machine": machine.describe(), "protocol": protocol, **more}
    out.mkdir(parents=True, exist_ok=True)
    disk.write_json(out / "metrics.json", {**found, "teacher": rows[0], "students": rows[1:]}, indent=1)
    seed = f"-{rows[1]['seed']}"
    first = {name.removesuffix(seed): x for name, x in samples.items() if name == "teacher" or name.endswith(seed)}
    if first:
        report.grid(out / "samples.png", first, lines=1)
    print(f"{report.table(rows)}\n\n{protocol}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("calibrate.py", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--num", type=int, default=300, help="samples of each network [300]")
    parser.add_argument("--sample-steps", type=int, help="[the run's]")
    parser.add_argument("--knots", type=int, help="timesteps to fit at; others are interpolated [the sampler's]")
    parser.add_argument("--fit", type=int, default=300, help="images to fit on, held out where there are such [300]")
    parser.add_argument("--teacher", help="another one to fit to and to compare with [the run's]")
    given = parser.parse_args(argv)

    with machine.refusing("calibrate.py"):
        check("OUT", given.out, {"folder": True})
        for name, least in {"knots": 1, "fit": 1, "num": 2}.items():
            if (value := getattr(given, name)) is not None:
                check(f"--{name}", value, {"low": least})
        flags = sample.Flags(num=given.num, sample_steps=given.sample_steps, teacher=given.teacher)
        case = open_run(given.run, flags, given.fit)
        ways = study(case, given.ways, given.knots)
    rows, samples = case.compare(ways)
    kind = "held-out" if case.held_out else "training"
    protocol = (
        f"{given.num} generated, {len(case.times)} steps, {given.knots or len(case.times)} timesteps fitted on "
        f"{len(case.x0)} {kind} images; clip: the predicted image is clamped to [-1, 1] at every step"
    )
    write(given.out, given.run, len(case.times), protocol, rows, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The study behind docs/calibrate.md: the students of a finished run as they are, clamped, calibrated, and both.

    python benchmarks/calibrate.py RUN OUT                    from one noise: OUT/metrics.json and OUT/samples.png
    python benchmarks/calibrate.py RUN OUT --ways plain calibrated --sample-steps 10 --fit 32

OUT/metrics.json has the form of a run's, so `python -m distil.evaluate OUT` prints its table.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from distil import doctor, machine, report, sample
from distil.calibrate import Calibrated
from distil.settings import plain

WAYS = {"plain": (False, False), "clip": (False, True), "calibrated": (True, False), "calibrated, clip": (True, True)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("calibrate.py", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--num", type=int, default=300, help="samples of each network [300]")
    parser.add_argument("--sample-steps", type=int, help="[the run's]")
    parser.add_argument("--knots", type=int, help="timesteps to fit at; others are interpolated [the sampler's]")
    parser.add_argument("--fit", type=int, default=300, help="held-out images to fit on at most [300]")
    parser.add_argument("--teacher", help="another one to fit to and to compare with [the run's]")
    given = parser.parse_args(argv)

    flags = sample.Flags(num=given.num, sample_steps=given.sample_steps, teacher=given.teacher)
    case, ways = doctor.open_case(given.run, flags, n=given.fit), []
    knots = case.process.timesteps(given.knots or len(case.times))
    for name, calibration in case.fit(knots).items():
        method, _, seed = name.rpartition("-")
        for way in given.ways:
            calibrated, clip = WAYS[way]
            net = Calibrated(case.students[name], calibration) if calibrated else case.students[name]
            label = method if way == "plain" else f"{method}, {way}"
            about = {"method": label, "seed": int(seed)}
            ways.append(doctor.Way(f"{label}-{seed}", net, about, case.clamped if clip else None))
    (teacher, *rows), samples = case.compare(ways)
    protocol = (
        f"{given.num} generated, {len(case.times)} steps, {len(knots)} timesteps fitted on {len(case.x0)} held-out "
        "images; clip: the predicted image is clamped to [-1, 1] at every step"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    found = {"settings": plain(doctor.run_settings(given.run)), "machine": machine.describe(), "protocol": protocol}
    machine.write_json(given.out / "metrics.json", {**found, "teacher": teacher, "students": rows}, indent=1)
    first = {name.removesuffix("-0"): x for name, x in samples.items() if name == "teacher" or name.endswith("-0")}
    report.grid(given.out / "samples.png", first, lines=1)
    print(f"{report.table([teacher, *rows])}\n\n{protocol}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

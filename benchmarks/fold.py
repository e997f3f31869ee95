"""The study behind docs/fold.md: students of few steps on the digits, by index set and with or without clamped x0.

python benchmarks/fold.py        # trains what is missing below runs/fold, writes benchmarks/fold.json
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from distil import machine, report
from distil.prepare import prepare, teacher_settings
from distil.settings import Settings

TEACHER = {"channels": 32, "eval_samples": 200}
PRUNED = TEACHER | {"norm_groups": "scale", "kd": ("place",), "seeds": (0, 1, 2)}
WHOLE = TEACHER | {"prune": 0.0, "kd": ("out",), "steps": 200, "lr": 1e-3}
ENDS = ("published", "last")


def finished(name: str, **given) -> dict:
    """What metrics.json holds of this run below runs/fold, trained, evaluated anew or only read."""
    with contextlib.redirect_stdout(None):
        found = train.distil(prepare(Settings(**given, out=f"runs/fold/{name}")))
    if found is None:
        raise SystemExit("stopped and saved; the same command goes on")
    return found


def kinds(steps: int) -> dict[str, dict]:
    """The runs for one number of sampling steps, {name: settings}; those of all timesteps are trained once."""
    own = teacher_settings(Settings(**TEACHER, out="runs/fold")).out + "/teacher"
    fold = {end: {"fold_steps": steps, "fold_end": end} for end in ENDS}
    runs = {}
    for length in (300, 1500):
        runs[f"pruned-{length}"] = PRUNED | {"steps": length, "lambda_feat": 0.0, "sample_steps": steps}
        runs |= {f"pruned-{length}-{end}{steps}": PRUNED | {"steps": length} | fold[end] for end in ENDS}
    for seed in range(3):
        seeds = {"seed": seed, "seeds": (seed,), "teacher": own}
        runs |= {f"whole-{end}{steps} {seed}": WHOLE | seeds | fold[end] for end in ENDS}
    return runs


def main() -> None:
    file, rows = Path(__file__).with_suffix(".json"), []
    for steps in (5, 10, 25):
        for name, given in kinds(steps).items():
            for clip in (False, True):
                found = finished(name, **given, clip_x0=clip)
                about = {"steps": steps, "run": name.split()[0]}
                for row in [*found["students"], *found.get("same_steps", [])]:
                    kept = {key: row.get(key) for key in ("method", "seed", "frechet_pixels", "frechet_digits")}
                    rows.append(about | {"clip_x0": clip, "run_seed": found["settings"]["seed"]} | kept)
                machine.write_json(file, {"machine": machine.describe(), "commit": report.commit(), "rows": rows})


if __name__ == "__main__":
    main()

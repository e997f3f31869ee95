"""The study behind docs/fold.md: students of few steps on the digits, by where a fold ends, x0 clamped or not.

python benchmarks/fold.py 125 25 10 5        # trains what is missing below runs/fold, writes benchmarks/fold.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distil import disk, machine
from distil.settings import Settings
from notebooks.analysis import finished

PRUNED = {
    "channels": 32,
    "eval_samples": 200,
    "norm_groups": "scale",
    "kd": ("place",),
    "seeds": (0, 1, 2),
    "steps": 300,
}


def kinds(steps: int) -> dict[str, dict]:
    """The runs for one number of sampling steps, {name: settings}; the one of all timesteps is trained once."""
    runs = {"pruned": PRUNED | {"lambda_feat": 0.0, "sample_steps": steps}}
    for end in ("published", "last"):
        runs[f"pruned, fold {end}"] = PRUNED | {"fold_steps": steps, "fold_end": end}
    return runs


def main(argv: list[str] | None = None) -> None:
    parser, rows = argparse.ArgumentParser(description=__doc__), []
    parser.add_argument("steps", nargs="+", type=int, help="of the sampler, as 5 10")
    for steps in parser.parse_args(argv).steps:
        for name, given in kinds(steps).items():
            folder = name if name == "pruned" else f"{name} {steps}"
            for clip in (False, True):
                found = finished(
                    Settings(**given, clip_x0=clip, out=f"runs/fold/{folder.replace(', ', '-').replace(' ', '-')}")
                )
                for row in [*found["students"], *found.get("same_steps", [])]:
                    kept = {key: row.get(key) for key in ("method", "seed", "frechet_pixels", "frechet_digits")}
                    rows.append({"steps": steps, "run": name, "clip_x0": clip, **kept})
                found = {"machine": machine.describe(), "rows": rows}
                disk.write_json(Path(__file__).with_suffix(".json"), found)


if __name__ == "__main__":
    main()

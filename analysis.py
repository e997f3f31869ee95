"""What the notebooks share: where a student's error comes from, small studies with a loss of one's own, one plot style.

    path = sampling_path(teacher, process, noise, steps=50)          the teacher's way from noise to images
    corrected_path(student, process, path)                           the student's, two numbers per step put right
    error_by_timestep(student, teacher, process, x0, timesteps)      coarse and fine error, b0, b1
    error_maps(student, teacher, process, x0, timesteps)             where in the image, when
    finished(settings)                                               a run of train.py, made or read
    distil(teacher, images, settings, process, losses)               its loop in twenty lines, with any loss
    committed(name)                                                  the numbers of a run that is kept in benchmarks/

Symbols as in `lift_place`: e_S and e_T are the outputs of student and teacher at one noised input, b0 + b1 e_S the line
that fits e_T best; B batch, C channels, G groups, S sampling steps, T the number of timesteps that are looked at.
Sources: the paper's Fig. 2 (corrected sampling), Figs. 3, 8, 9 (error maps), arXiv 2605.19729.
"""

import contextlib
import copy
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import evaluate
import train
from evaluate import COLORS
from lift_place import Distillation, lift, place
from models import load, prune_channels

Loss = Callable[
    [Tensor, Tensor, int], Tensor
]  # (e_S, e_T, step) -> what is added to the diffusion loss, a sum over C, H, W

# ---------------------------------------------------------------------------------------------------------------------
# Lines


def group_numbers(student: Tensor, teacher: Tensor, group_size: int = 16) -> Tensor:
    """The group that `place` puts every element in, 0 for the smallest errors: (B, C, *spatial) int64."""
    rank = (teacher - student).abs().flatten(2).argsort(-1).argsort(-1)  # (B, C, N), ties as in `place`
    return (rank // group_size).view(student.shape)


def apply_lines(x: Tensor, parts: Distillation, groups: Tensor | None = None) -> Tensor:
    """b0 + b1 x, with the lines of `lift`, or of `place` for the elements' `groups`. x, groups: (B, C, *spatial).

    Raises:
        ValueError: lines of several groups, and no word on which element is in which.
    """
    if groups is None:
        if parts.b0.shape[-1] != 1:
            raise ValueError(f"lines for {parts.b0.shape[-1]} groups per channel: say which element is in which group")
        groups = torch.zeros_like(x, dtype=torch.int64)
    b0, b1 = (b.gather(-1, groups.flatten(2)).view(x.shape) for b in (parts.b0, parts.b1))  # (B, C, *spatial)
    return b0 + b1 * x


# ---------------------------------------------------------------------------------------------------------------------
# Regression-corrected sampling (paper, Fig. 2)


class SamplingPath(NamedTuple):
    """One network's way from noise to images."""

    timesteps: list[int]  # S, noisiest first
    states: Tensor  # (S + 1, B, C, *spatial), from the start noise to the samples
    outputs: Tensor  # (S, B, C, *spatial), what the network said at each state but the last


@torch.no_grad()
def sampling_path(net: nn.Module, process, noise: Tensor, steps: int) -> SamplingPath:
    """DDIM sampling as `process.sample` does it (eta 0), with everything on the way kept. noise: (B, C, *spatial)."""
    timesteps = process.timesteps(steps)
    states, outputs = [noise], []
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        outputs.append(net(states[-1], torch.full((len(noise),), t, device=noise.device)))
        states.append(process.step(states[-1], outputs[-1], t, t_next))
    return SamplingPath(timesteps, torch.stack(states), torch.stack(outputs))


@torch.no_grad()
def corrected_path(
    student: nn.Module, process, path: SamplingPath, *, teacher: nn.Module | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the student, but step with b0 + b1 e_S, the line fitted at each step and for each image and channel.

    As in the paper the line is fitted at the TEACHER's state of that step (`path`, from `sampling_path` of the teacher)
    and applied at the student's own, which starts from the same noise: the teacher never sees the student's samples.

    Args:
        path: of the teacher.
        teacher: given, the line is fitted at the student's own state instead: an oracle.
        group_size: a line for each group of so many elements, as `place` groups them, instead of one per channel.

    Returns:
        samples (B, C, *spatial), not clamped; b0 and b1, (S, B, C, G) each.
    """
    x, b0, b1 = path.states[0], [], []
    for i, (t, t_next) in enumerate(zip(path.timesteps, [*path.timesteps[1:], -1], strict=True)):
        now = torch.full((len(x),), t, device=x.device)
        e_s = student(x, now)
        if teacher is None:
            at, e_t = student(path.states[i], now), path.outputs[i]
        else:
            at, e_t = e_s, teacher(x, now)
        if group_size is None:
            parts, groups = lift(at, e_t), None
        else:
            parts, groups = place(at, e_t, group_size=group_size), group_numbers(at, e_t, group_size)
        x = process.step(x, apply_lines(e_s, parts, groups), t, t_next)
        b0.append(parts.b0)
        b1.append(parts.b1)
    return x, torch.stack(b0), torch.stack(b1)


# ---------------------------------------------------------------------------------------------------------------------
# Where and when the error is


@torch.no_grad()
def outputs_at(nets: Iterable[nn.Module], process, x0: Tensor, t: int, seed: int = 0) -> list[Tensor]:
    """Each network's output (B, C, *spatial) at the images x0 noised to timestep t; one noise for all t of a seed."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    times = torch.full((len(x0),), t, device=x0.device)
    x_t = process.add_noise(x0, noise, times)
    return [net(x_t, times) for net in nets]


def error_by_timestep(
    student: nn.Module,
    teacher: nn.Module,
    process,
    x0: Tensor,
    timesteps: Sequence[int],
    *,
    group_size: int = 16,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The student's mean squared error against the teacher, taken apart by the lines that `lift` and `place` fit.

    Returns, each (T,) on the CPU:
        total: mean of (e_T - e_S)^2.
        fine: what is left of it after one line for each image and channel.
        coarse: total - fine, what those two numbers account for.
        fine_groups: what is left after a line for each group of `group_size` elements of equal error.
        b0, b1: mean over images and channels of intercept and slope.
        b0_abs, b1_abs: mean of |b0| and of |b1 - 1|.
    """
    found = []
    for t in timesteps:
        e_s, e_t = outputs_at((student, teacher), process, x0, t, seed)
        line, groups = lift(e_s, e_t), place(e_s, e_t, group_size=group_size)
        total = (e_t - e_s).square().mean()
        found.append({"total": total, "fine": line.fine, "coarse": total - line.fine, "fine_groups": groups.fine})
        found[-1] |= {"b0": line.b0.mean(), "b1": line.b1.mean()}
        found[-1] |= {"b0_abs": line.b0.abs().mean(), "b1_abs": (line.b1 - 1).abs().mean()}
    return {key: torch.stack([row[key] for row in found]).cpu() for key in found[0]}


def error_maps(
    student: nn.Module, teacher: nn.Module, process, x0: Tensor, timesteps: Sequence[int], draws: int = 1
) -> Tensor:
    """(e_T - e_S)^2 averaged over channels and over `draws` noises, the same for all timesteps: (T, B, H, W), CPU."""
    maps = torch.zeros(len(timesteps), len(x0), *x0.shape[2:])
    for i, t in enumerate(timesteps):
        for seed in range(draws):
            e_s, e_t = outputs_at((student, teacher), process, x0, t, seed)
            maps[i] += (e_t - e_s).square().mean(1).cpu() / draws  # (B, H, W)
    return maps


def share_of_worst(maps: Tensor, fraction: float = 0.1) -> Tensor:
    """The share of an error map's sum that lies in its worst pixels. maps: (..., H, W), not negative -> (...)."""
    flat = maps.flatten(-2).sort(-1, descending=True).values  # (..., N)
    return flat[..., : max(1, round(fraction * flat.shape[-1]))].sum(-1) / flat.sum(-1)


def rank_correlation(maps: Tensor) -> Tensor:
    """Spearman's correlation between the error maps of any two timesteps, mean over images: (T, B, H, W) -> (T, T)."""
    ranks = maps.flatten(2).argsort(-1).argsort(-1).double()  # (T, B, N)
    ranks = ranks - ranks.mean(-1, keepdim=True)
    ranks = ranks / ranks.norm(dim=-1, keepdim=True)
    return torch.einsum("sbn,tbn->st", ranks, ranks) / maps.shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# Small studies


def finished(settings: train.Settings) -> dict:
    """The metrics.json of this run, which is trained, resumed, or only read if it is finished; prints no table.

    Raises:
        ValueError, OSError: of `train.prepare`, what is wrong with the settings.
        KeyboardInterrupt: the run was interrupted; it is saved, and the same call goes on.
    """
    with contextlib.redirect_stdout(None):
        metrics = train.distil(train.prepare(settings))
    if metrics is None:
        raise KeyboardInterrupt(f"{settings.out}: stopped and saved; the same call goes on")
    return metrics


def committed(name: str) -> dict:
    """The metrics.json of a run that is kept in benchmarks/; its command and commit stand in README.md or docs/."""
    return json.loads((Path(__file__).parent / "benchmarks" / name / "metrics.json").read_text("utf-8"))


def sum_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance, summed over one sample and averaged over the batch, as in pixel space. a, b: (B, ...) -> ()."""
    return nn.functional.mse_loss(a.float(), b.float(), reduction="sum") / a.shape[0]


def distil(
    teacher: nn.Module,
    images: data.Images,
    settings: train.Settings,
    process,
    losses: dict[str, Loss],
    *,
    start: nn.Module | None = None,
    snapshots: Iterable[int] = (),
) -> dict[int, dict[tuple[str, int], nn.Module]]:
    """What train.py does, with distillation losses of one's own: a student for each loss and seed, side by side.

    Same images, noise, timesteps, pruning, optimizer, clipping and weight average as `train.py` with these settings;
    no features or logs. The students are kept in `settings.out`, where a second call finds them.

    Args:
        losses: {name: loss(e_S, e_T, step)}; a loss is a sum over C, H, W and a mean over the batch.
        start: the network that the students are pruned from; None: the teacher.
        snapshots: numbers of steps after which to keep a copy, beside the last.

    Returns:
        {number of steps: {(name, seed): weight average}}, on the device of the teacher.

    Raises:
        ValueError: the folder holds students of other settings, or of losses with other names.
    """
    device, folder = next(teacher.parameters()).device, Path(settings.out)
    keep, names = sorted({*snapshots, settings.steps}), [(name, seed) for seed in settings.seeds for name in losses]
    record, about = folder / "distil.json", {**train.plain(settings), "losses": list(losses), "keep": keep}
    if not record.exists():
        students = {}
        for seed in settings.seeds:
            net = prune_channels(start or teacher, settings.prune, settings.importance, settings.norm_groups, seed=seed)
            for name in losses:
                students[name, seed] = train.Student(settings, "none", seed, copy.deepcopy(net).to(device), None)
        with contextlib.closing(data.batches(images, settings.batch_size, settings.seed)) as stream:
            for step in tqdm(range(settings.steps), desc=folder.name, unit="step", mininterval=1.0):
                x0, noise, t, cond = train.batch(
                    settings, *next(stream), slice(None), images.flip, process, step, device, teacher
                )
                x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)  # (B, C, H, W)
                with torch.no_grad():
                    e_t = teacher(x_t, t, cond)
                for (name, _), student in students.items():
                    e_s = student.net(x_t, t, cond)
                    (sum_of_squares(e_s, target) + losses[name](e_s, e_t, step)).backward()
                    student.update(settings, step)
                for (name, seed), student in students.items() if step + 1 in keep else ():
                    student.ema.save(folder / f"{step + 1}" / f"{name}-{seed}")
        record.write_text(json.dumps(about, indent=2) + "\n")
    elif json.loads(record.read_text()) != about:
        raise ValueError(f"{folder} holds students of other settings or losses: name another folder, or delete it")
    return {
        step: {(n, seed): load(folder / f"{step}" / f"{n}-{seed}").to(device) for n, seed in names} for step in keep
    }


def rate(
    nets: dict[tuple[str, int], nn.Module], process, teacher_samples: Tensor, real, classifier=None, **options
) -> list[dict]:
    """Rows for `evaluate.table`: every network sampled from the teacher's noise and scored. options: of `sample`."""
    rows = []
    for (name, seed), net in nets.items():
        samples = evaluate.sample(net, process, len(teacher_samples), label=f"sampling {name}", **options)
        scores = evaluate.score(samples, teacher_samples, real, classifier)
        rows.append({"method": name, "seed": seed, "parameters": evaluate.parameters(net), **scores})
    return rows


def by_method(rows: Iterable[dict], key: str) -> dict[str, list[float]]:
    """One number of each row, gathered by method: {method: a value per seed}. rows: as `evaluate.rows` gives them."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "seed" in row:
            found.setdefault(row["method"], []).append(row[key])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One plot style

STYLE = {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "image.interpolation": "nearest",
}


def panels(rows: int = 1, columns: int = 1, width: float = 3.6, height: float = 2.8, **options):
    """matplotlib's figure and axes in the style of all notebooks; width and height of one panel in inches."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)


def spread(axis, x: Sequence[float], values: Sequence[Sequence[float]], name: str, **options) -> None:
    """A line of means over seeds, in the method's colour, and a band from the smallest to the largest.

    values: (seeds, len(x)), or one row for a single line.
    """
    values = torch.as_tensor(torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in values]))
    options = {"color": COLORS.get(name), "label": name, **options}
    (line,) = axis.plot(x, values.mean(0), **options)
    axis.fill_between(x, values.amin(0), values.amax(0), color=line.get_color(), alpha=0.15, linewidth=0)


def dots(axis, groups: dict[str, Sequence[float]], colors: dict[str, str] | None = None) -> None:
    """A column for each group: a dot for every seed, a dash at their mean."""
    for i, (name, values) in enumerate(groups.items()):
        color = (colors or COLORS).get(name, "#0072b2")
        axis.plot([i] * len(values), values, "o", color=color, markersize=5, alpha=0.6, markeredgewidth=0)
        axis.hlines(sum(values) / len(values), i - 0.3, i + 0.3, color=color, linewidth=2)
    axis.set_xticks(
        range(len(groups)), groups, rotation=30 if len(groups) > 4 else 0, ha="right" if len(groups) > 4 else "center"
    )
    axis.grid(axis="x", visible=False)


def trend(axis, found: dict[str, dict[str, Sequence[float]]], methods: Iterable[str], **options) -> None:
    """A line for each method through its means, bars from least to most. found: {x: {method: a value per seed}}."""
    for method in methods:
        values, color = [one[method] for one in found.values()], COLORS[method]
        axis.plot(list(found), [sum(v) / len(v) for v in values], marker="o", color=color, **options)
        axis.vlines(list(found), [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.4)


def image_row(axes, images: Iterable[Tensor], titles: Iterable[str], **options) -> None:
    """Images (H, W) side by side, without ticks. options: of imshow; by default gray, from -1 to 1."""
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(image.cpu(), **({"cmap": "gray", "vmin": -1, "vmax": 1} | options))
        axis.set_title(title, loc="center")
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)

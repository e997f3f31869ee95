"""What the notebooks share: where a student's error comes from, small studies with a loss of one's own, one plot style.

    path = sampling_path(teacher, process, noise, steps=50)          the teacher's way from noise to images
    corrected_path(student, process, path)                           the student's, each image and channel put right
    error_by_timestep(student, teacher, process, x0, timesteps)      coarse and fine error, b0, b1
    error_maps(student, teacher, process, x0, timesteps)             where in the image, when
    finished(settings)                                               a run of train.py, made or read
    distil(teacher, images, settings, process, losses)               students of any losses, by the step of train.py
    committed(name)                                                  the numbers of a run that is kept in benchmarks/

They go for every network and process: `cond` is what a network is told, of an output that also has a variance the
prediction is looked at, and a sampler's steps are those of the process.

Symbols as in `lift_place`: e_S and e_T are the outputs of student and teacher at one noised input, b0 + b1 e_S the line
that fits e_T best; B batch, C channels, G groups, S sampling steps, T the number of timesteps that are looked at.
Sources: the paper's Fig. 2 (corrected sampling), Figs. 3, 8, 9 (error maps), arXiv 2605.19729.
"""

import contextlib
import copy
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import train
from distil import data, disk, doctor, machine, metrics, sample
from distil.batches import batches
from distil.fast_loss import lift, place
from distil.prepare import prepare
from distil.process import Process, split
from distil.report import COLORS, LINES
from distil.settings import Settings, plain
from distil.students import Student
from lift_place import Distillation
from models import Network, load, prune_channels

Cond = dict[str, Tensor] | None  # of a network, (B, ...) each
Loss = Callable[[Tensor, Tensor, int], Tensor]  # (e_S, e_T, step) -> what is added to the diffusion loss, ()
Nets = dict[tuple[str, int], Network]  # {(name of the loss, seed): its student}

# ---- Lines -----------------------------------------------------------------------------------------------------------


def group_numbers(student: Tensor, teacher: Tensor, group_size: int = 16) -> Tensor:
    """The group that `place` puts every element in, 0 for the smallest errors: (B, C, *spatial) int64."""
    rank = (teacher - student).abs().flatten(2).argsort(-1).argsort(-1)  # (B, C, N), ties as in `place`
    return (rank // group_size).view(student.shape)


def apply_lines(x: Tensor, parts: Distillation, groups: Tensor) -> Tensor:
    """b0 + b1 x, with the line of each element's group. x, groups: (B, C, *spatial)."""
    b0, b1 = (b.gather(-1, groups.flatten(2)).view(x.shape) for b in (parts.b0, parts.b1))  # (B, C, *spatial)
    return b0 + b1 * x


# ---- Regression-corrected sampling (paper, Fig. 2) -------------------------------------------------------------------


def predict(net: nn.Module, x: Tensor, t: float, cond: Cond = None) -> Tensor:
    """The prediction of a network at time t for all of x (B, C, *spatial), without its variance: as x."""
    return split(net(x, torch.full((len(x),), t, device=x.device), cond), x.shape[1])[0].float()


class SamplingPath(NamedTuple):
    """One network's way from noise to images."""

    times: list  # S + 1, noisiest first, `process.clean` at the end
    states: Tensor  # (S + 1, B, C, *spatial), from the start noise to the samples
    outputs: Tensor  # (S, B, C, *spatial), what the network said at each state but the last


@torch.no_grad()
def sampling_path(net: nn.Module, process: Process, noise: Tensor, steps: int, cond: Cond = None) -> SamplingPath:
    """Sampling as `process.sample` does it (eta 0), with everything on the way kept. noise: (B, C, *spatial)."""
    times, states, outputs = [*process.timesteps(steps), process.clean], [noise], []
    for t, t_next in pairwise(times):
        outputs.append(predict(net, states[-1], t, cond))
        states.append(process.step(states[-1], outputs[-1], t, t_next))
    return SamplingPath(times, torch.stack(states), torch.stack(outputs))


@torch.no_grad()
def corrected_path(
    student: nn.Module, process: Process, path: SamplingPath, teacher: nn.Module | None = None,
    group_size: int | None = None, cond: Cond = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sample a student that steps with b0 + b1 e_S, the line of each step, image and channel.

    As in the paper the line is fitted at the TEACHER's state of that step and applied at the student's own, which
    starts from the same noise: the teacher never sees the student's samples.

    Args:
        path: of the teacher.
        teacher: given, the line is fitted at the student's own state instead: an oracle.
        group_size: a line for each group of so many elements, as `place` groups them, instead of one per channel.

    Returns:
        samples (B, C, *spatial), not clamped; b0 and b1, (S, B, C, G) each.
    """
    x, b0, b1 = path.states[0], [], []
    for i, (t, t_next) in enumerate(pairwise(path.times)):
        e_s = predict(student, x, t, cond)
        if teacher is None:
            at, e_t = predict(student, path.states[i], t, cond), path.outputs[i]
        else:
            at, e_t = e_s, predict(teacher, x, t, cond)
        if group_size is None:
            parts, groups = lift(at, e_t), torch.zeros_like(x, dtype=torch.int64)
        else:
            parts, groups = place(at, e_t, group_size=group_size), group_numbers(at, e_t, group_size)
        x = process.step(x, apply_lines(e_s, parts, groups), t, t_next)
        b0.append(parts.b0)
        b1.append(parts.b1)
    return x, torch.stack(b0), torch.stack(b1)


# ---- Where and when the error is -------------------------------------------------------------------------------------


@torch.no_grad()
def outputs_at(
    nets: Iterable[nn.Module], process: Process, x0: Tensor, t: float, seed: int = 0, cond: Cond = None
) -> list[Tensor]:
    """Each network's prediction (B, C, *spatial) at the images x0 noised to time t; one noise for all t of a seed. The
    first is a student, whose process it is, the others its teachers."""
    noise, now = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0), torch.full((len(x0),), t)
    x_t = process.add_noise(x0, noise, now.to(x0.device))
    student, *others = nets
    return [predict(student, x_t, t, cond), *(predict(net, x_t, process.phi(now)[0].item(), cond) for net in others)]


def error_by_timestep(
    student: nn.Module, teacher: nn.Module, process: Process, x0: Tensor, timesteps: Sequence[float], cond: Cond = None
) -> dict[str, Tensor]:
    """The student's mean squared error against the teacher, taken apart by the lines that `lift` fits.

    Returns, each (T,) on the CPU:
        total: mean of (e_T - e_S)^2.
        fine: what is left of it after one line for each image and channel.
        coarse: total - fine, what those two numbers account for.
        b0_abs, b1_abs: mean over images and channels of |b0| and of |b1 - 1|.
    """
    rows = doctor.lines(student, teacher, process, x0, timesteps, cond)
    _, total, fine, b0, b1 = torch.tensor(rows).T.contiguous()
    return {"total": total, "fine": fine, "coarse": total - fine, "b0_abs": b0, "b1_abs": b1}


def error_maps(
    student: nn.Module, teacher: nn.Module, process: Process, x0: Tensor, timesteps: Sequence[float], draws: int = 1,
    cond: Cond = None,
) -> Tensor:  # fmt: skip
    """(e_T - e_S)^2 averaged over channels and over `draws` noises, the same for all timesteps: (T, B, H, W), CPU."""
    maps = torch.zeros(len(timesteps), len(x0), *x0.shape[2:])
    for i, t in enumerate(timesteps):
        for seed in range(draws):
            e_s, e_t = outputs_at((student, teacher), process, x0, t, seed, cond)
            maps[i] += (e_t - e_s).square().mean(1).cpu() / draws  # (B, H, W)
    return maps


def share_of_worst(maps: Tensor) -> Tensor:
    """The share of an error map's sum that lies in its worst tenth of pixels; (..., H, W), not negative -> (...)."""
    flat = maps.flatten(-2).sort(-1, descending=True).values  # (..., N)
    return flat[..., : round(0.1 * flat.shape[-1])].sum(-1) / flat.sum(-1)


def rank_correlation(maps: Tensor) -> Tensor:
    """Spearman's correlation between the error maps of any two timesteps, mean over images: (T, B, H, W) -> (T, T)."""
    ranks = maps.flatten(2).argsort(-1).argsort(-1).double()  # (T, B, N)
    ranks = nn.functional.normalize(ranks - ranks.mean(-1, keepdim=True), dim=-1)
    return torch.einsum("sbn,tbn->st", ranks, ranks) / maps.shape[1]


# ---- Small studies ---------------------------------------------------------------------------------------------------


def finished(settings: Settings) -> dict[str, Any]:
    """The metrics.json of this run, which is trained, resumed, or only read if it is finished; prints no table.

    Raises:
        ValueError, OSError: of `prepare`, what is wrong with the settings.
        SystemExit: the run was interrupted; it is saved, and the same call goes on.
    """
    with contextlib.redirect_stdout(None):
        return train.distil(prepare(settings))


def committed(name: str) -> dict[str, Any]:
    """The metrics.json of a run that is kept in benchmarks/; its command and commit stand in README.md or docs/."""
    return json.loads((Path(__file__).parents[1] / "benchmarks" / name / "metrics.json").read_text("utf-8"))


def sum_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance, summed over one sample and averaged over the batch, as in pixel space. a, b: (B, ...) -> ()."""
    return nn.functional.mse_loss(a.float(), b.float(), reduction="sum") / a.shape[0]


def distil(
    teacher: Network, images: data.Images, settings: Settings, process: Process, losses: dict[str, Loss], *,
    start: Network | None = None, snapshots: Iterable[int] = (),
) -> dict[int, Nets]:  # fmt: skip
    """What train.py does, with distillation losses of one's own: a student for each loss and seed, side by side.

    Batches, pruning and steps are those of `train.py` with these settings; no features, logs or checkpoints. The
    students are kept in `settings.out`, where a second call finds them.

    Args:
        losses: {name: loss(e_S, e_T, step)}, a sum over C, H, W and a mean over the batch as the diffusion loss is. One
            that keeps a state is copied for each student.
        start: the network that the students are pruned from; None: the teacher.
        snapshots: numbers of steps after which to keep a copy, beside the last.

    Returns:
        {number of steps: {(name, seed): weight average}}, on the device of the teacher.

    Raises:
        ValueError: the folder holds students of other settings, or of losses with other names.
    """
    device, folder, keep = next(teacher.parameters()).device, Path(settings.out), sorted({*snapshots, settings.steps})
    record, about = folder / "distil.json", {**plain(settings), "losses": list(losses), "keep": keep}

    def method(name: str, loss: Loss) -> train.Method:
        """What a student of this loss learns from: the data and, beside it, the loss."""
        alone = train.resolve(settings, "none")
        return alone._replace(name=name, output=lambda e_s, e_t, w, step: (loss(e_s, e_t, step), None))

    if not record.exists():
        students = []
        for seed in settings.seeds:
            net = prune_channels(start or teacher, settings.prune, settings.importance, settings.norm_groups, seed=seed)
            for name, loss in losses.items():
                own = machine.on_device(copy.deepcopy(net), device)
                students.append(Student(settings, method(name, copy.deepcopy(loss)), seed, own))
        with contextlib.closing(batches(settings, images, process, teacher)) as stream:
            for at in tqdm(range(settings.steps), desc=folder.name, unit="step", mininterval=1.0):
                train.step(settings, students, teacher, process, next(stream), at)
                for student in students if at + 1 in keep else ():
                    student.ema.save(folder / f"{at + 1}" / student.name)
        disk.write_json(record, about)
    elif about | json.loads(record.read_text("utf-8")) != about:  # what an earlier version did not say is not compared
        raise ValueError(f"{folder} holds students of other settings or losses: name another folder, or delete it")
    names = [(name, seed) for seed in settings.seeds for name in losses]
    return {steps: {(n, s): load(folder / f"{steps}" / f"{n}-{s}").to(device) for n, s in names} for steps in keep}


def rate(nets: Nets, process: Process, teacher_samples: Tensor, real, classifier=None, **options: Any) -> list[dict]:
    """Rows for `report.table`: every network sampled from the teacher's noise and scored. options: of `sample`."""
    rows, ruler = [], metrics.Ruler(real, classifier)
    for (name, seed), net in nets.items():
        samples = sample.sample(net, process, len(teacher_samples), label=f"sampling {name}", **options)
        scores = ruler.score(samples, teacher_samples)
        rows.append({"method": name, "seed": seed, "parameters": metrics.parameters(net), **scores})
    return rows


def by_method(rows: Iterable[dict], key: str) -> dict[str, list[float]]:
    """One number of each row, gathered by method: {method: a value per seed}. rows: as `report.rows` gives them."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "seed" in row:
            found.setdefault(row["method"], []).append(row[key])
    return found


# ---- One plot style --------------------------------------------------------------------------------------------------

STYLE = {
    "figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10, "image.interpolation": "nearest",
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6, "lines.linewidth": 1.5, "legend.frameon": False,
}  # fmt: skip


def panels(rows: int = 1, columns: int = 1, width: float = 3.6, height: float = 2.8, **options: Any):
    """matplotlib's figure and axes in the style of all notebooks; width and height of one panel in inches."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)


def spread(axis, x: Sequence[float], values: Sequence[Sequence[float]], name: str, **options: Any) -> None:
    """A line of means over seeds, in the method's colour, and a band from the smallest to the largest.

    values: (seeds, len(x)), or one row for a single line.
    """
    values = torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in values])
    look = {"color": COLORS.get(name), "linestyle": LINES.get(name), "label": name}
    (line,) = axis.plot(x, values.mean(0), **look | options)
    axis.fill_between(x, values.amin(0), values.amax(0), color=line.get_color(), alpha=0.15, linewidth=0)


def dots(axis, groups: dict[str, Sequence[float]], colors: dict[str, str] = COLORS) -> None:
    """A line for each group, its name at the left: a dot for every seed, a dash at their mean."""
    for i, (name, values) in enumerate(groups.items()):
        color = colors.get(name, COLORS["place"])
        axis.plot(values, [i] * len(values), "o", color=color, markersize=5, alpha=0.6, markeredgewidth=0)
        axis.vlines(sum(values) / len(values), i - 0.3, i + 0.3, color=color, linewidth=2)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)  # the first one on top
    axis.grid(axis="y", visible=False)


def trend(axis, found: dict[str, dict[str, Sequence[float]]], methods: Iterable[str], **options: Any) -> None:
    """A line for each method through its means, bars from least to most. found: {x: {method: a value per seed}}."""
    for name in methods:
        values, color = [one[name] for one in found.values()], COLORS[name]
        look = {"marker": "o", "color": color, "label": name} | options
        axis.plot(list(found), [sum(v) / len(v) for v in values], **look)
        axis.vlines(list(found), [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.4)
    axis.margins(x=0.12)  # room for the names below the outer points


def image_row(axes, images: Iterable[Tensor], titles: Iterable[str], **options: Any) -> None:
    """Images (H, W) side by side, without ticks. options: of imshow; by default gray, from -1 to 1."""
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(image.cpu(), **{"cmap": "gray", "vmin": -1, "vmax": 1, **options})
        axis.set_title(title, loc="center")
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)


def draw_maps(maps: dict[str, Tensor], x0: Tensor, image: int, timesteps: Sequence[float]) -> None:
    """A row of panels for each student: one image of x0 (B, C, H, W), then its map at each timestep, with the share of
    the error that lies in the worst tenth of the pixels, mean over all images. maps: {name: (T, B, H, W)}."""
    _, axes = panels(len(maps), 1 + len(timesteps), width=1.4, height=1.5, squeeze=False)
    for row, (name, found) in zip(axes, maps.items(), strict=True):
        shares = share_of_worst(found).mean(1)  # (T,)
        titles = [f"t = {t} ({share:.0%})" for t, share in zip(timesteps, shares, strict=True)]
        image_row(row[:1], [x0[image].mean(0)], [name])
        image_row(row[1:], found[:, image], titles, cmap="magma", vmin=0, vmax=None)

"""From settings to a checked run: data, teacher, students. What cannot work is refused before anything is written."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
from distil import data, importance, machine, teachers, text_to_image
from distil.fast_loss import place
from distil.machine import Damaged, digest, find_device, hash_seed, note, on_device, rank_0_first, rank_and_world, say
from distil.process import Process, check_guidance, make_process, process_of
from distil.settings import (
    ARCHS,
    EVALUATION,
    FREE,
    SD_STUDENTS,
    SHAPE,
    SIZES,
    Settings,
    flag,
    plain,
    preset,
    restored,
)
from distil.students import autocast
from models import (
    DiT,
    Network,
    UNet,
    check_blocks,
    group_widths,
    load_checkpoint,
    prune_channels,
    prune_depth,
    regroup,
    uniform_blocks,
)


class Batch(NamedTuple):
    """What a step shows to teacher and students alike; B samples of shape C, H, W."""

    x0: Tensor  # (B, C, H, W), clean
    noise: Tensor  # (B, C, H, W)
    x_t: Tensor  # (B, C, H, W), noised
    target: Tensor  # (B, C, H, W), what the process asks for
    t: Tensor  # (B,)
    cond: dict[str, Tensor]  # of the networks, (B, ...) each; {} for those that take none

    def part(self, rows: slice) -> Batch:
        return Batch(*(x[rows] for x in self[:-1]), {key: value[rows] for key, value in self.cond.items()})


def batches(
    settings: Settings, images: data.Images, process: Process, net: Network, start: int = 0, whole: bool = False
) -> Iterator[Batch]:
    """The batches of steps start, start + 1, ... as this process sees them: its share, or with `whole` all rows.

    What is random is drawn for the whole batch from (seed, step), so it does not depend on the number of processes.

    net: says which conditions the networks take, and in what share of the samples they are dropped, for teacher and
    students alike, so that samples can be guided; the batches lie on its device. `whole` ones are not mirrored.
    """
    rank, world = (0, 1) if whole else rank_and_world()
    rows = slice(rank * settings.batch_size // world, (rank + 1) * settings.batch_size // world)
    settings = replace(settings, flip=settings.flip and not whole)
    with contextlib.closing(data.batches(images, settings.batch_size, settings.seed, start, rows=rows)) as stream:
        for step, (pixels, cond) in enumerate(stream, start):
            yield draw(settings, pixels, cond, process, net, step, rows)


def draw(
    settings: Settings, pixels: Tensor, cond: dict[str, Tensor], process: Process, net: Network, step: int,
    rows: slice = slice(None),
) -> Batch:  # fmt: skip
    """The `rows` of the batch of a step: images in [-1, 1] or latents, noise, times, conditions.

    pixels: (B, C, H, W) uint8, the images of these rows; or (B, 2, C, H, W) float32, latents of an image and its mirror
    image. cond: what the data knows of them. net: as of `batches`.
    """
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(hash_seed(settings.seed, step))

    def uniform() -> Tensor:  # (B,)
        return torch.rand(settings.batch_size, generator=generator, device=device)[rows]

    pixels = pixels.to(device, non_blocking=True)
    mirrored = uniform() < 0.5 if settings.flip else torch.zeros(len(pixels), dtype=torch.bool, device=device)  # (B,)
    if pixels.dtype == torch.uint8:  # of latents the mirror images are there
        pixels = data.to_float(torch.stack([pixels, pixels.flip(-1)], dim=1))  # (B, 2, C, H, W)
    x0 = pixels[torch.arange(len(pixels), device=device), mirrored.long()]  # (B, C, H, W)
    noise = torch.randn(settings.batch_size, *x0.shape[1:], generator=generator, device=device)[rows]  # (B, C, H, W)
    t = process.sample_t(settings.batch_size, generator=generator, device=device)[rows]  # (B,)
    cond = {key: cond[key].to(device, non_blocking=True) for key in net.conditions}
    if net.condition_dropout > 0:
        dropped = uniform() < net.condition_dropout  # (B,)
        for key, null in net.no_condition().items():
            shape = (-1, *[1] * (cond[key].ndim - 1))
            cond[key] = torch.where(dropped.reshape(shape), null.to(cond[key]), cond[key])
    return Batch(x0, noise, process.add_noise(x0, noise, t), process.target(x0, noise, t), t, cond)


# ---- The run ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What `prepare` found out before anything is written."""

    settings: Settings
    device: torch.device
    images: data.Images  # to train on
    held_out: data.Images | None  # never trained on: says how low a distance can get
    teacher: Network | None  # None: has to be trained first
    student: Network | None  # None: made from the teacher
    vae: text_to_image.Vae | None  # of latents, to look at samples
    checkpoint: dict[str, Any] | None
    metrics: dict[str, Any] | None  # of the finished run, if it is one


def prepare(settings: Settings) -> Run:
    """Load and check everything a run needs; writes nothing.

    ValueError, OSError: one sentence that says what is wrong and what would work.
    """
    device = find_device(settings.device)
    settings = sized(settings, device)
    check_out(settings)
    check_machine(settings)
    with rank_0_first():  # what rank 0 downloads the others find; before the data, which may take hours
        teacher, student = (open_network(name, settings) for name in ("teacher", "student"))
    images, held_out = open_data(settings, teacher and teacher.channels)
    if images.record is not None:  # the run remembers what shows its latents
        settings = replace(settings, vae=settings.vae or images.record["vae"])
    with rank_0_first():
        teacher = open_teacher(settings, images, teacher)
    student = fitted("student", student, settings, images)
    check_students(settings, images, teacher, student)
    check_steps(settings, teacher, student)
    vae = open_vae(settings, images, device)
    checkpoint = read_checkpoint(settings, Path(settings.out), images.about)
    metrics = read_metrics(settings, Path(settings.out))
    return Run(settings, device, images, held_out, teacher, student, vae, checkpoint, metrics)


def sized(settings: Settings, device: torch.device) -> Settings:
    """The settings, with what their preset leaves to the device and the number of images: a line of SIZES."""
    if settings.dataset not in SIZES:
        return settings
    if settings.data is None:
        raise ValueError(f"--dataset {settings.dataset} needs --data, the folder that holds the images")
    on_gpu, n = device.type == "cuda", len(data.image_files(Path(settings.data)))
    row = next(row for gpu, most, row in SIZES[settings.dataset] if gpu == on_gpu and n <= most)
    taken = {name: value for name, value in row.items() if settings.channels is None or name not in SHAPE}
    return replace(settings, **{name: value for name, value in taken.items() if getattr(settings, name) is None})


def check_out(settings: Settings) -> None:
    """ValueError where the run would write over files that are not of a run, or among the images that it reads."""
    out, folders = Path(settings.out), {"--out": settings.out}
    if settings.teacher == "train":
        folders["the folder of the teacher,"] = teacher_settings(settings).out
    for what, folder in folders.items():
        if settings.data is not None and Path(folder).resolve().is_relative_to(Path(settings.data).resolve()):
            pictures = "its pictures would be taken for images of yours"
            raise ValueError(f"{what} {folder} lies in --data {settings.data}, {pictures}: keep them apart")
    config = out / "config.json"
    if config.is_file() and "kd" in machine.read_json(config, "bring it back, or give another --out"):
        return
    # before its config a run leaves hidden files; its checkpoints are looked at when they are read
    others = sorted(path.name for path in out.glob("*") if not path.name.startswith((".", "checkpoint.")))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        names = f"{', '.join(others[:3])}{more}"
        raise ValueError(f"--out {out} holds files that are not of a run ({names}): give another folder")


def check_machine(settings: Settings) -> None:
    """ValueError where the processes or libraries that the settings need are not there."""
    world = rank_and_world()[1]
    if settings.batch_size % world:
        raise ValueError(f"--batch-size {settings.batch_size} cannot be split over {world} processes: give a multiple")
    if settings.fsdp and not dist.is_initialized():
        raise ValueError("--fsdp splits the students over several processes: start them with torchrun")
    if settings.log != "jsonl" and importlib.util.find_spec(settings.log) is None:
        raise ValueError(f"--log {settings.log} needs a library that is not installed: pip install {settings.log}")


def open_data(settings: Settings, channels: int | None = None) -> tuple[data.Images, data.Images | None]:
    """The images to train on, and those that are held out where there are such.

    channels: of images that may be read gray or in colour; None: what they are.
    """
    given = {"channels": channels} if settings.dataset in SIZES else {}
    with rank_0_first():  # it downloads and decodes; the others find the result
        images = data.load(settings.dataset, settings.data, image_size=settings.image_size, **given)
    check_images(settings, images)
    if settings.dataset != "digits":
        return images, None
    return images, data.load("digits", image_size=settings.image_size, split="test")


def check_images(settings: Settings, images: data.Images) -> None:
    """ValueError where there are too few images to score samples, or none that --group-size divides."""
    n = len(images.images)
    if settings.eval_samples and n < 6:
        remedy = "add images, or evaluate nothing with --eval-samples 0"
        raise ValueError(f"{settings.data} holds {n} images, too few to compare samples with: {remedy}")
    probe = torch.zeros(1, *images.shape)  # (1, C, H, W)
    place(probe, probe, group_size=settings.group_size)  # refuses a group size that does not fit


class Opened(NamedTuple):
    """A network that was given. One from a checkpoint file is built once the images are known."""

    build: Callable[[data.Images], Network]
    channels: int = 3  # of the images that it takes


def open_teacher(settings: Settings, images: data.Images, given: Opened | None = None) -> Network | None:
    """The teacher; None where it has to be trained first."""
    if given is not None:
        return fitted("teacher", given, settings, images)
    with torch.device("meta"):
        new_network(settings, images)  # refuses data that no teacher can be made for
    folder = Path(teacher_settings(settings).out) / "teacher"
    return teachers.load(folder) if (folder / "config.json").exists() else None


def open_network(name: str, settings: Settings) -> Opened | None:
    """What the setting `name` gives: a saved folder, a hub id, a public checkpoint file, or `auto`; None if it is to be
    made here.

    ValueError, OSError: it is not there, or cannot be read.
    """
    where = getattr(settings, name)
    if where in ("auto", "train") and settings.arch not in NEW:
        raise ValueError(f"--arch {settings.arch} needs --teacher, a diffusers pipeline: a folder or a hub id")
    made = SD_STUDENTS if name == "student" and ARCHS[settings.arch].pruning == "stages" else ()
    if where is None or where == "train" or where in made:
        return None
    if Path(where).is_file():
        models.read_weights(Path(where))
        return Opened(lambda images: load_checkpoint(new_network(settings, images), where))
    if Path(where).suffix in FILES:
        raise FileNotFoundError(f"{flag(name)} {where}: there is no such file")
    if where == "auto":
        teachers.find_public(settings.dataset)
        return Opened(lambda images: teachers.public_teacher(settings.dataset))
    net = teachers.load(where)
    return Opened(lambda images: net, net.shape[0])


FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")  # of checkpoints


def fitted(name: str, opened: Opened | None, settings: Settings, images: data.Images) -> Network | None:
    """The network that was opened, for these images; ValueError if it is made for others."""
    if opened is None:
        return None
    net = opened.build(images)
    what, theirs = f"{flag(name)} {getattr(settings, name)}", net.process.get("name", settings.process)
    if net.arch != settings.arch:
        raise ValueError(f"{what} is a {type(net).__name__}: it goes with --arch {net.arch}, not {settings.arch}")
    if theirs != settings.process:
        raise ValueError(f"{what} was trained for the process {theirs}: use --process {theirs}")
    if net.predicts_variance and settings.is_flow:
        raise ValueError(f"{what} predicts a variance, of which the process {settings.process} has none")
    check_conditions(what, net.conditions, settings.data, images, net.num_classes)
    try:
        net.fit(images.shape, images.no_condition, settings.caption_dropout)
    except ValueError as error:
        raise ValueError(f"{what} does not fit {settings.data or settings.dataset}: {error}") from error
    check_guidance(what, net, settings.guidance)
    return net


def check_conditions(
    network: str, conditions: tuple[str, ...], where: str | None, images: data.Images, classes: int | None = None
) -> None:
    """ValueError where a network needs to be told what the data at `where` does not know, or knows fewer classes."""
    if "y" in conditions and images.labels is None:
        remedy = "put its images into one folder a class"
        raise ValueError(f"{network} needs classes, and {where} has none: {remedy}")
    if "text" in conditions and images.no_condition is None:
        remedy = "make its latents with python -m distil.latents --text PIPELINE"
        raise ValueError(f"{network} needs captions, and {where} has none: {remedy}")
    if classes is not None and images.labels.max() >= classes:
        known = f"the classes 0 to {classes - 1}, but the data has a class {images.labels.max()}"
        raise ValueError(f"{network} knows {known}: use a network made for such")


def check_students(settings: Settings, images: data.Images, teacher: Network | None, student: Network | None) -> None:
    """ValueError where the students that the settings ask for cannot be made."""
    with torch.device("meta"):
        source = teacher or new_network(settings, images)
    if lonely := models.lonely_norms(source):
        remedy = "train one with fewer, --teacher-norm-groups" if teacher is None else "prefer one with fewer groups"
        note(f"WARNING: {lonely} norms of the teacher have one channel a group and erase its mean and scale: {remedy}")
    if source.pruning == "stages" and settings.student is None:
        raise ValueError(f"--arch {settings.arch} needs --student: {', '.join(SD_STUDENTS)}, or a folder")
    if source.pruning == "channels" and source.source is not None and student is None:  # some cannot be pruned
        prune_channels(copy.deepcopy(source).to("meta"), settings.prune, "random", settings.norm_groups)
    net = student or source
    if settings.head is not None and "head" not in net.config:
        whose = "the student is" if student is not None else "the students are"
        raise ValueError(f"--head is of networks of our own, but {whose} of {net.source}: leave it out")
    if student is not None:
        check_given(settings, student, source)
    if source.pruning != "blocks" or student is not None:
        return
    depth = len(source.blocks)
    if settings.keep is not None:
        check_blocks(depth, settings.keep)
    n = kept_blocks(settings, depth)
    drawn = settings.depth_method == "random" and settings.init == "teacher"  # and nothing but the blocks
    if len(settings.seeds) > 1 and drawn and n in (1, 2, depth):
        same = "the seeds would draw the same ones, for the first and the last always stay"
        raise ValueError(
            f"--prune {settings.prune:g} keeps {n} of {depth} blocks: {same}; give one seed, or another --prune"
        )


def check_given(settings: Settings, student: Network, teacher: Network) -> None:
    """ValueError where a student to start from does not go with its teacher."""
    what = f"--student {settings.student}"
    if len(student.blocks) > len(teacher.blocks):
        more = f"{len(student.blocks)} blocks, its teacher {len(teacher.blocks)}"
        raise ValueError(f"{what} has {more}: use a student with at most as many")
    check_classes(what, student, teacher)
    if student.condition_dropout > 0 and teacher.no_condition() is None:
        raise ValueError(f"{what} learns without the class, too, and its teacher cannot: use a student that does not")
    if student.predicts_variance > teacher.predicts_variance and any(settings.terms(name)[0] for name in settings.kd):
        raise ValueError(f"{what} predicts a variance and its teacher none: use a student that predicts none, either")
    regrouped(settings, student, teacher)  # refuses norms of other names
    if settings.fold_steps is None and any(map(settings.compares_features, settings.kd)):
        check_features(what, student, teacher)


def check_classes(what: str, student: Network, teacher: Network) -> None:
    """ValueError where a student, called `what`, is told other classes than its teacher."""
    if student.num_classes != teacher.num_classes:
        knows, its = (net.num_classes or "no" for net in (student, teacher))
        raise ValueError(f"{what} knows {knows} classes, its teacher {its}: use a student of the same classes")


def check_features(what: str, student: Network, teacher: Network) -> None:
    """ValueError where the features of a student, called `what`, cannot be compared with those of its teacher."""
    remedy = "to compare no features use --lambda-feat 0"
    ours, theirs = student.feature_layers(teacher), teacher.feature_layers(student)
    if teacher.pruning == "blocks":
        pairs = [(net.feature_channels(names)[0], net.config["patch_size"])
                 for net, names in ((student, ours), (teacher, theirs))]  # fmt: skip
        if pairs[0] != pairs[1]:
            (own, side), (wide, its) = pairs
            sizes = f"of width {own} from patches of {side}, its teacher of {wide} from {its}"
            raise ValueError(f"{what} has tokens {sizes}: {remedy}")
    elif len(ours) != len(theirs) or (teacher.pruning == "channels" and ours != theirs):
        counts = f"{len(ours)} features against {len(theirs)}"
        raise ValueError(f"{what} has other layers than its teacher, {counts}: {remedy}")


def check_steps(settings: Settings, teacher: Network | None, student: Network | None) -> None:
    """ValueError where the timesteps of the run, of its teacher and of a given student do not go together."""
    known = {"name": settings.process, "sampler": settings.sampler}  # a sampler may refuse what a network predicts
    process = make_process(**known) if teacher is None else process_of(teacher, **known)
    if settings.fold_steps is not None:
        try:
            process = process.fold(settings.fold_steps, settings.fold_end)
        except ValueError as error:
            raise ValueError(f"--fold-steps cannot be used: {error}") from error
    try:
        process.timesteps(settings.sample_steps)
    except ValueError as error:
        has = f"the teacher has {process.steps} timesteps: {error}"
        raise ValueError(f"--sample-steps {settings.sample_steps} cannot be used, {has}") from error
    if student is None:
        return
    own, what = process_of(student, settings.process), f"--student {settings.student}"
    if own.steps != process.steps:
        remedy = f"use --fold-steps {own.steps}, or another student"
        raise ValueError(f"{what} has {own.steps} timesteps, this run {process.steps}: {remedy}")
    if not agree(own, process):
        raise ValueError(f"{what} was trained for other noise at a timestep, or to predict something else than the run")


def agree(one: Process, other: Process) -> bool:
    """Whether two processes with the same number of timesteps add the same noise at each, and ask for the same."""
    t = torch.tensor(one.timesteps(one.steps))
    x0, noise = torch.tensor([1.0, 2.0]).expand(len(t), 2).T
    said = [(of.add_noise(x0, noise, t), of.target(x0, noise, t)) for of in (one, other)]
    return all(map(torch.equal, *said))


def open_vae(settings: Settings, images: data.Images, device: torch.device) -> text_to_image.Vae | None:
    """The VAE that shows what latents look like, if samples are to be drawn; ValueError if it is not the data's."""
    if images.record is None and settings.vae is not None:
        raise ValueError(f"--vae is for latents, but {settings.data or settings.dataset} holds images")
    if images.record is None or not settings.eval_samples:
        return None
    where = settings.vae or images.record["vae"]
    if where is None:
        remedy = "name it with --vae, or evaluate nothing with --eval-samples 0"
        raise ValueError(f"{settings.data} does not say which VAE made its latents: {remedy}")
    vae = text_to_image.Vae(where, device)
    vae.check(images.record)
    return vae


# ---- What a run will be ----------------------------------------------------------------------------------------------


def outlook(settings: Settings, images: data.Images, teacher: Network, student: Network, trained: bool = True) -> str:
    """One line on the size of a run, and how to change it."""
    sizes = [sum(p.numel() for p in net.parameters()) for net in (teacher, student)]
    first = "" if trained else f", {settings.teacher_steps:,} steps"
    size, count = "x".join(map(str, images.shape)), f"{len(images.images):,} " if images.fingerprint else ""
    return (
        f"{count}images of {size}; teacher {sizes[0]:,} parameters{first}; students {sizes[1]:,} "
        f"({sizes[1] / sizes[0]:.1%}), {settings.steps:,} steps of {settings.batch_size} images; other sizes: "
        "--image-size, --channels, --batch-size, --teacher-steps, --steps"
    )


def sketch(settings: Settings, images: data.Images, teacher: Network | None = None) -> tuple[Network, Network]:
    """The teacher, a new one without weights if none is given, and a student of its kind."""
    with torch.device("meta"):
        teacher = teacher or new_network(settings, images)
    run = Run(settings, torch.device("cpu"), images, *[None] * 4, checkpoint={}, metrics=None)
    return teacher, headed(settings, SMALLER[teacher.pruning](run, teacher, None, None, 0), 0)


def dry_run(settings: Settings) -> str:
    """What a command comes to, and what is missing for it. Nothing is trained, fetched, decoded or written."""
    settings = sized(settings, find_device(settings.device))
    check_out(settings)
    lines = [json.dumps(plain(settings), indent=2)]
    if settings.data is None:
        lines.append(f"data: {settings.dataset}; what is not in {data.ROOT}/ is fetched, or you are told from where")
    else:
        lines.append(f"data: {settings.data}" + ("" if Path(settings.data).is_dir() else " is missing"))
    made, public = Path(teacher_settings(settings).out, "teacher"), teachers.PUBLIC.get(settings.dataset)
    file, otherwise = settings.teacher, "is missing"
    if file == "train":
        file, otherwise = made, f"is trained first, {settings.teacher_steps:,} steps"
    elif file == "auto" and public:
        file, otherwise = Path(made.parents[1], public.file), f"is missing: it is that of {public.url}"
    elif text_to_image.HUB_ID.fullmatch(file):
        otherwise = "is no folder here, so it is taken from the hub"
    there = Path(file).exists()
    lines.append(f"teacher: {file}" + ("" if there else f" {otherwise}"))
    usual = settings.teacher in ("auto", "train")
    given = open_network("teacher", settings) if (there and not usual) or (usual and settings.arch not in NEW) else None
    start = open_network("student", settings) if settings.student and Path(settings.student).exists() else None
    images = pretended(settings, given and given.channels)
    if images is not None and (there or usual):
        check_images(settings, images)
        teacher, student = fitted("teacher", given, settings, images), fitted("student", start, settings, images)
        check_students(settings, images, teacher, student)
        check_steps(settings, teacher, student)
        teacher, made = sketch(settings, images, teacher)
        lines.append(outlook(settings, images, teacher, student or made, settings.teacher != "train" or there))
    return "\n".join(lines)


def pretended(settings: Settings, channels: int | None = None) -> data.Images | None:
    """Images as those of a run are, without a pixel of them; None for latents that are not there. Those of a folder are
    counted, of others there are ten, without a fingerprint. channels: of a folder's images; None takes 3."""
    _, _, own = data.DATASETS[settings.dataset]
    channels = own or channels
    if settings.dataset == "digits":
        data.check_digits(settings.image_size)
    if Path(settings.data or "", data.RECORD).exists():
        return data.load(settings.dataset, settings.data, image_size=settings.image_size)
    if own is None and settings.dataset not in SIZES:
        return None
    names = data.image_files(Path(settings.data)) if settings.dataset in SIZES else []
    n, known = len(names) or 10, digest("\n".join(names).encode("utf-8", "surrogateescape")) if names else ""
    pixels = np.broadcast_to(np.uint8(0), (n, channels or 3, settings.image_size, settings.image_size))
    return data.Images(pixels, np.arange(n) % 10, settings.dataset, fingerprint=known)


# ---- What an earlier run left ----------------------------------------------------------------------------------------


def read_checkpoint(settings: Settings, folder: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, or None if it has none. about: `Images.about` of its data.

    ValueError: none is whole (they are kept aside), or it belongs to a run with other settings or data (named).
    OSError: it cannot be read now, and is left as it is.
    """
    found, damage = None, []
    with rank_0_first():
        for path in (folder / "checkpoint.pt", folder / "checkpoint.prev.pt"):
            try:
                found = open_checkpoint(path) if path.exists() and found is None else found
            except Damaged:
                aside = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
                path.rename(aside)
                damage.append(f"{path} cannot be read (truncated or damaged), so it was moved to {aside}")
    if damage and found is None:
        remedy = f"this run from step 0, or put a good copy at {folder / 'checkpoint.pt'} and it resumes from there"
        raise ValueError(f"{', and '.join(damage)}: the same command now starts {remedy}")
    if found is None:
        return None
    path = folder / ("checkpoint.prev.pt" if damage else "checkpoint.pt")
    kinds = {"step": int, "settings": dict, "students": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is no checkpoint of train.py: move it away, or give another --out")
    refuse_other_settings(settings, found["settings"], path)
    if not 0 <= found["step"] <= settings.steps:
        raise ValueError(f"{path} says step {found['step']} of {settings.steps}: move it away, or give another --out")
    former = found.get("data", about)  # those of earlier versions do not say it
    if former != about:
        counts = f"{former.get('images')} images then, {about['images']} now"
        what = counts if former.get("images") != about["images"] else f"{counts}, but not the same"
        remedy = "bring them back as they were, or give another --out"
        raise ValueError(f"the data has changed since {path} was written ({what}): {remedy}")
    if damage:
        say(f"{damage[0]}; the run goes on from the checkpoint before it, {path}")
    return found


def open_checkpoint(path: Path) -> Any:
    """What a checkpoint holds. Damaged, or OSError for what has nothing to do with its contents."""
    sealed = False
    try:
        sealed = machine.check_seal(path, "put a good copy there")
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # torch.load has no error of its own: many kinds come out of a damaged file
        if sealed or isinstance(error, OSError | MemoryError) or "allocate" in str(error):
            reason = f"{type(error).__name__}: {error}"
            raise OSError(f"{path} cannot be read now ({reason}); it was left as it is") from error
        raise Damaged(f"{path} is damaged ({error})") from error


def read_metrics(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run; None if there is none, or if it was evaluated otherwise."""
    path, remedy = folder / "metrics.json", "remove it, and the same command evaluates again"
    if not path.exists():
        return None
    metrics = machine.read_json(path, remedy)
    kinds = {"settings": dict, "students": list, "teacher": dict, "protocol": str}
    if not all(isinstance(metrics.get(key), kind) for key, kind in kinds.items()):
        raise Damaged(f"{path} is not what train.py writes: {remedy}")
    refuse_other_settings(settings, metrics["settings"], path)
    now, former = plain(settings), plain(restored(metrics["settings"]))
    return metrics if all(former[name] == now[name] for name in EVALUATION) else None


def refuse_other_settings(settings: Settings, former: dict[str, Any], path: Path) -> None:
    """ValueError that names the settings in which the run at `path` differs, where they make it another run."""
    chosen = {"taylor_batch": settings.taylor_batch}  # long ago: a checkpoint brings its own channels
    now, former = plain(settings), plain(restored({**chosen, **former}))
    differ = [name for name in now if name not in FREE | EVALUATION and now[name] != former[name]]
    if differ:
        changes = ", ".join(f"{flag(name)} was {former[name]}, is {now[name]}" for name in differ)
        raise ValueError(f"{path} is of a run with other settings ({changes}): give the former ones, or another --out")


# ---- Teachers --------------------------------------------------------------------------------------------------------


def new_unet(settings: Settings, images: data.Images, config: dict[str, Any]) -> UNet:
    channels, size, _ = images.shape
    return UNet(size, channels, channels=settings.channels, dropout=settings.dropout, **config)


def new_dit(settings: Settings, images: data.Images, config: dict[str, Any]) -> DiT:
    check_conditions("--arch dit", ("y",), settings.data, images)
    channels, size, _ = images.shape
    classes = 1000 if settings.dataset == "imagenet" else int(images.labels.max()) + 1
    config = {"num_classes": classes, "learn_sigma": not settings.is_flow, **config}
    return DiT(size, in_channels=channels, hidden_size=settings.channels, **config)


NEW: dict[str, Callable] = {"unet": new_unet, "dit": new_dit}  # --arch of which a teacher can be trained here


def new_network(settings: Settings, images: data.Images) -> Network:
    """The untrained teacher of a data set."""
    return NEW[settings.arch](settings, images, network_config(settings))


def network_config(settings: Settings) -> dict[str, Any]:
    """How a new teacher is built, beside its width: as its preset says, and a U-Net as its width and size allow.

    As many of its levels as halve the image size without rest; groups of about four channels, where the preset says
    nothing (32 groups of the published 128 channels). ValueError for a size that cannot be halved.
    """
    config, size = dict(preset(settings.dataset, settings.prune, settings.arch)["network"]), settings.image_size
    if "channel_mults" not in config:
        return config
    fit = next((n for n in range(len(config["channel_mults"]), 1, -1) if size % 2 ** (n - 1) == 0), 0)
    config["channel_mults"] = settings.channel_mults or config["channel_mults"][:fit]
    if not config["channel_mults"]:
        remedy = f"use --image-size {size - size % 8 or 8}, or one level with --channel-mults 1"
        raise ValueError(f"--image-size {size} cannot be halved, which a U-Net does between its levels: {remedy}")
    if settings.num_res_blocks:
        config["num_res_blocks"] = settings.num_res_blocks
    groups = settings.teacher_norm_groups or config.get("norm_groups") or models.usual_groups(settings.channels)
    return config if groups == config.get("norm_groups", 32) else config | {"norm_groups": groups}


def teacher_settings(settings: Settings) -> Settings:
    """The run that trains the teacher: the same loop, with one unpruned student and the data alone."""
    shared = ("dataset", "arch", "data", "image_size", "seed", "batch_size", "warmup", "decay", "lr_end", "clip", "ema",
              "dropout", "channels", "constants", "process", "precision", "compile", "accumulate")  # fmt: skip
    own = {name: getattr(settings, name) for name in shared} | {"steps": settings.teacher_steps}
    own |= {"lr": settings.teacher_lr, "prune": 0.0, "kd": ("none",), "seeds": (settings.seed,), "eval_samples": 0}
    own |= {"lambda_diff": 1.0}
    given = {name: getattr(settings, name) for name in sorted(SHAPE)}
    own |= {name: value for name, value in given.items() if value is not None}
    usual = preset(settings.dataset, settings.prune, settings.arch, settings.fold_steps)
    given = {name: getattr(settings, name) for name in ("ema_warmup", "timesteps", "flip")}
    own |= {name: value for name, value in given.items() if value != usual[name]}  # only others are named
    key = hashlib.sha256(json.dumps([own, network_config(settings)]).encode()).hexdigest()[:8]
    watch = {name: getattr(settings, name) for name in FREE - {"out"}}
    return Settings(**own, **watch, out=f"runs/teachers/{settings.dataset}{settings.image_size or ''}-{key}")


# ---- Students --------------------------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Batch], Tensor]  # (output of a network, batch) -> the diffusion loss, ()


def smaller(run: Run, teacher: Network, process: Process, loss: Loss) -> list[Network]:
    """The network that the students of each seed start from: some of the teacher's channels, blocks or stages."""
    if run.student is not None:
        return [regrouped(run.settings, run.student, teacher)] * len(run.settings.seeds)
    return [SMALLER[teacher.pruning](run, teacher, process, loss, seed) for seed in run.settings.seeds]


def regrouped(settings: Settings, student: Network, teacher: Network) -> Network:
    """A student to start from, its norms with as many channels a group as the teacher's if these are to scale."""
    if settings.norm_groups == "keep" or teacher.pruning != "channels":
        return student
    return regroup(student, group_widths(teacher))


def of_channels(run: Run, teacher: Network, process: Process, loss: Loss, seed: int) -> Network:
    settings = run.settings
    # a checkpoint brings its own weights: then any channels will do
    importance_of = settings.importance if run.checkpoint is None else "random"
    if importance_of == "taylor" and any(p.grad is None for p in teacher.parameters()):
        few = min(settings.taylor_steps or process.steps, process.steps)
        timesteps = range(0, process.steps, process.steps // few)[:few]
        batch = first_batch(run, teacher, process, settings.taylor_batch)
        importance.accumulate_gradients(
            teacher, process, batch.x0, batch.noise, settings.taylor_threshold, timesteps, cond=batch.cond
        )
    net = prune_channels(teacher, settings.prune, importance_of, settings.norm_groups, seed=seed)
    left = sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in teacher.parameters())
    if run.checkpoint is None and abs(1 - math.sqrt(left) - settings.prune) > 0.1:
        why = "no norm loses a group: a teacher with fewer of them (--teacher-norm-groups) loses more"
        note(f"WARNING: --prune {settings.prune:g} leaves {left:.0%} of the parameters instead of about "
             f"{(1 - settings.prune) ** 2:.0%}, for {why}")  # fmt: skip
    return net


def of_stages(run: Run, teacher: Network, process: Process, loss: Loss, seed: int) -> Network:
    torch.manual_seed(hash_seed(seed))  # of the weights of C_* students, which are not the teacher's
    return text_to_image.bk_sdm(teacher, run.settings.student)


def of_blocks(run: Run, teacher: Network, process: Process, loss: Loss, seed: int) -> Network:
    settings, depth = run.settings, len(teacher.blocks)
    n = kept_blocks(settings, depth)
    # a checkpoint brings its own weights: then any blocks will do
    method = settings.depth_method if run.checkpoint is None else "uniform"
    if settings.keep is not None or n == depth:
        keep = list(settings.keep or range(depth))
    elif method == "first":
        keep = list(range(n))
    elif method == "random":
        keep = importance.random_blocks(depth, n, seed)
    elif method == "shortgpt":
        batch = first_batch(run, teacher, process)
        influence = importance.block_influence(teacher, process, batch.x0, batch.noise, batch.cond)
        influence[-1] = math.inf  # the last one always stays
        keep = same_on_all(sorted(influence.topk(n).indices.tolist()), run.device)
    elif method == "learned":
        keep = same_on_all(learned(run, teacher, process, loss, n, seed), run.device)
    else:
        keep = uniform_blocks(depth, n)
    if run.checkpoint is None:
        say(f"seed {seed}: the students keep the blocks {', '.join(map(str, keep))} of {depth}")
    return prune_depth(teacher, keep)


SMALLER = {"channels": of_channels, "stages": of_stages, "blocks": of_blocks}  # by `Network.pruning`


def kept_blocks(settings: Settings, depth: int) -> int:
    """How many of `depth` blocks stay."""
    return max(1, round(depth * (1 - settings.prune)))


def same_on_all(keep: list[int], device: torch.device) -> list[int]:
    """What was measured may differ by rounding between processes: rank 0 decides."""
    if not dist.is_initialized():
        return keep
    chosen = torch.tensor(keep, device=device)
    dist.broadcast(chosen, 0)
    return chosen.tolist()


def learned(run: Run, teacher: Network, process: Process, loss: Loss, n: int, seed: int) -> list[int]:
    """The n blocks that TinyFusion's learned choice leaves."""
    stream = batches(run.settings, run.images, process, teacher)

    def of_step(net: nn.Module, step: int) -> Tensor:
        batch = next(stream)
        with autocast(run.settings, run.device):
            output = net(batch.x_t, batch.t, batch.cond)
        return loss(output, batch)

    with contextlib.closing(stream):
        return importance.learned_blocks(teacher, n, of_step, run.settings.depth_steps, seed=seed)


def first_batch(run: Run, net: Network, process: Process, size: int | None = None) -> Batch:
    """One whole batch, from which pruning learns what matters. size: other than that of the run."""
    settings = replace(run.settings, batch_size=size or run.settings.batch_size)
    with contextlib.closing(batches(settings, run.images, process, net, whole=True)) as stream:
        return next(stream)


def start_of(run: Run, net: Network, seed: int, process: dict[str, Any]) -> Network:
    """A copy of `net` as a student of this seed starts: on the device, trainable, with the dropout of the settings.

    process: how it will understand time, as `Network.process`.
    """
    settings, net = run.settings, copy.deepcopy(net)
    net.process = process
    if settings.init == "random":
        torch.manual_seed(hash_seed(seed))
        net.reset_parameters()
    headed(settings, net, seed)
    if settings.recompute:
        net.recompute()
    net.set_dropout(settings.dropout)
    return on_device(net, run.device).requires_grad_(True)


def headed(settings: Settings, net: Network, seed: int) -> Network:
    """The student `net` with the head that the settings ask for, or its own: one to start from may bring that."""
    if settings.head is not None and net.head is None:
        torch.manual_seed(hash_seed(seed))
        net.set_head(settings.head)
    return net

"""What cannot work is refused before anything is written: one sentence says what is wrong and what would work."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch
import torch.distributed as dist

import models
from distil import data, disk, text_to_image
from distil.command import flag
from distil.importance import groups_of
from distil.machine import note, rank_and_world
from distil.networks import kept_blocks, new_network, regrouped, teacher_settings
from distil.pictures import check_apart
from distil.presets import SD_STUDENTS, preset
from distil.process import Process, check_clip, check_guidance, check_sampler, make_process, process_of
from distil.settings import Settings
from models import Network, check_blocks, prune_channels


def check_unused(settings: Settings) -> None:
    """ValueError for flags that say how a teacher is trained here where one is given, or fetched."""
    usual = preset(settings.dataset, settings.prune, settings.arch, settings.fold_steps)
    for name in sorted(settings.unused):
        if getattr(settings, name) not in (None, usual.get(name)):
            its = f"is of a teacher that is trained here, and --teacher {settings.teacher} brings its own"
            raise ValueError(f"{flag(name)} {its}: leave it out")


def check_out(settings: Settings) -> None:
    """ValueError where the run would write over files that are not of a run, or among the images that it reads."""
    out, folders = Path(settings.out), {"--out": settings.out}
    if settings.teacher == "train":
        folders["the folder of the teacher,"] = teacher_settings(settings).out
    for what, folder in folders.items():
        check_apart(what, folder, settings.data)
    config = out / "config.json"
    if config.is_file() and "kd" in disk.read_json(config, "bring it back, or give another --out"):
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


def check_images(settings: Settings, images: data.Images) -> None:
    """ValueError where there are too few images to score samples, or they are not as the settings say."""
    n = len(images.images)
    if settings.eval_samples and n < 6:
        remedy = "add images, or evaluate nothing with --eval-samples 0"
        raise ValueError(f"{settings.data} holds too few images to compare samples with, {n} and not 6: {remedy}")
    if settings.vae is not None and images.record is None:
        raise ValueError(f"--vae is for latents, but {settings.data or settings.dataset} holds images: leave it out")
    check_clip(settings.clip_x0, latents=images.record is not None)
    _, height, width = images.shape
    if (n := height * width) % settings.group_size:
        fits = ", ".join(str(k) for k in range(2, 65) if n % k == 0) or "none"
        remedy = f"give another --image-size, a multiple of 4 for groups of 16, or a --group-size that does: {fits}"
        raise ValueError(f"--group-size {settings.group_size} does not cut {height}x{width} pixels: {remedy}")


def check_students(settings: Settings, images: data.Images, teacher: Network | None, student: Network | None) -> None:
    """ValueError where the students that the settings ask for cannot be made."""
    with torch.device("meta"):
        source = teacher or new_network(settings, images)
    check_guidance("the teacher", source, settings.guidance)
    if lonely := models.lonely_norms(source):
        remedy = "train one with fewer, --teacher-norm-groups" if teacher is None else "prefer one with fewer groups"
        note(f"WARNING: {lonely} norms of the teacher have one channel a group and erase its mean and scale: {remedy}")
    if source.num_classes is not None and (n := int(images.labels.max()) + 1) < source.num_classes:
        same = "class i of the data, in the order of its folders, is taken for class i of the teacher"
        note(f"WARNING: the teacher knows {source.num_classes} classes and the data has {n}: {same}")
    if source.pruning == "stages" and settings.student is None:
        raise ValueError(f"--arch {settings.arch} needs --student: {', '.join(SD_STUDENTS)}, or a folder")
    if source.pruning == "stages" and student is None:
        text_to_image.bk_sdm(copy.deepcopy(source).to("meta"), settings.student)  # some cannot be cut so
    if source.pruning == "channels" and source.source is not None and student is None:  # some cannot be pruned
        prune_channels(copy.deepcopy(source).to("meta"), settings.prune, "random", settings.norm_groups)
    net = student or source
    if settings.head is not None and not net.can_head:
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
    if settings.depth_method == "learned" and settings.keep is None and n < depth:
        groups_of(depth, n)
    drawn = settings.depth_method == "random" and settings.init == "teacher"  # and nothing but the blocks
    if len(settings.seeds) > 1 and drawn and n in (1, 2, depth):
        same = "the seeds would draw the same, for the first and the last always stay: give one, or another --prune"
        raise ValueError(f"--prune {settings.prune:g} keeps {n} of {depth} blocks: {same}")


def check_given(settings: Settings, student: Network, teacher: Network) -> None:
    """ValueError where a student to start from does not go with its teacher."""
    what = f"--student {settings.student}"
    if len(student.blocks) > len(teacher.blocks):
        more = f"{len(student.blocks)} blocks, its teacher {len(teacher.blocks)}"
        raise ValueError(f"{what} has {more}: use a student with at most as many")
    check_classes(what, student, teacher)
    if student.condition_dropout > 0 and teacher.no_condition() is None:
        raise ValueError(f"{what} learns without the class, too, and its teacher cannot: use a student that does not")
    compared = any(settings.terms(name)[0] for name in settings.kd)
    if student.predicts_variance and not teacher.predicts_variance and compared:
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
        if teacher is not None and teacher.predicts_variance:
            raise ValueError("--fold-steps takes a teacher that predicts no variance: it would be that of all steps")
        try:
            process = process.fold(settings.fold_steps, settings.fold_end)
        except ValueError as error:
            raise ValueError(f"--fold-steps cannot be used: {error}") from error
    try:
        check_sampler(process, settings.sample_steps, settings.eta)
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

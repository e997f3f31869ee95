"""From settings to a checked run: data, teacher, students. What cannot work is refused before anything is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import models
from distil import data, disk, pictures, teachers, text_to_image
from distil.checks import check_images, check_machine, check_out, check_steps, check_students, check_unused
from distil.command import flag
from distil.earlier import read_checkpoint, read_metrics, refuse_other_data
from distil.machine import agreed, digest, find_device, rank_0_first
from distil.networks import SMALLER, Run, check_conditions, headed, new_network, teacher_settings
from distil.presets import ARCHS, SD_STUDENTS, SHAPE, SIZES, TEACHERS
from distil.process import check_guidance, check_name
from distil.settings import Settings, plain
from distil.students import find_dtype
from models import Network, load_checkpoint


def prepare(settings: Settings) -> Run:
    """Load and check everything a run needs; writes nothing.

    ValueError, OSError: one sentence that says what is wrong and what would work.
    """
    device = find_device(settings.device)
    check_unused(settings)
    asked, settings = settings, sized(settings, device)
    check_out(settings)
    check_machine(settings)
    with rank_0_first():  # what rank 0 downloads the others find; before the data, which may take hours
        teacher, student = (open_network(name, settings) for name in ("teacher", "student"))
    settings = as_large(settings, asked, teacher)
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
    metrics = read_metrics(settings, Path(settings.out), same_data="data" in (checkpoint or {}))
    dtypes = [str(find_dtype(settings, device, frozen)) for frozen in (False, True)]
    step = checkpoint and checkpoint["step"]
    agreed("the run", (images.about, teacher is None, step, metrics is None, dtypes))
    return Run(settings, device, images, held_out, teacher, student, vae, checkpoint, metrics)


def sized(settings: Settings, device: torch.device) -> Settings:
    """The settings, with what their preset leaves to the device and the number of images: a line of SIZES."""
    if settings.dataset not in SIZES:
        return settings
    if settings.data is None:
        raise ValueError(f"--dataset {settings.dataset} needs --data, the folder that holds the images")
    on_gpu, n = device.type == "cuda", len(pictures.image_files(Path(settings.data)))
    row = next(row for gpu, most, row in SIZES[settings.dataset] if gpu == on_gpu and n <= most)
    taken = {name: value for name, value in row.items() if settings.channels is None or name not in SHAPE}
    return replace(settings, **{name: value for name, value in taken.items() if getattr(settings, name) is None})


def as_large(settings: Settings, asked: Settings, teacher: Opened | None) -> Settings:
    """The settings, with images as large as a teacher takes them that is given, where no size was `asked` for."""
    if asked.image_size is not None or settings.dataset not in SIZES or teacher is None or teacher.size is None:
        return settings
    return replace(settings, image_size=teacher.size)


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


class Opened(NamedTuple):
    """A network that was given. One from a checkpoint file is built once the images are known."""

    build: Callable[[data.Images], Network]
    channels: int = 3  # of the images that it takes
    size: int | None = None  # their height and width; None: of a checkpoint file the settings say it


def open_teacher(
    settings: Settings, images: data.Images, given: Opened | None = None, its_own: bool = True
) -> Network | None:
    """The teacher; None where it has to be trained first. its_own: whether these must be the images of its training."""
    if given is None:
        with torch.device("meta"):
            new_network(settings, images)  # refuses data that no teacher can be made for
        folder = Path(teacher_settings(settings).out)
        if not (folder / "teacher" / "config.json").exists():
            return None
        if its_own and (seen := folder / SEEN).exists():  # earlier versions did not write it
            remedy = f"bring them back as they were, or remove {folder}, and a teacher of these is trained"
            refuse_other_data(disk.read_json(seen, remedy), images.about, folder / "teacher", remedy)
        given = Opened(lambda images: teachers.load(folder / "teacher"))
    return fitted("teacher", given, settings, images)


def open_network(name: str, settings: Settings) -> Opened | None:
    """What the setting `name` gives: a saved folder, a hub id, a public checkpoint file, or `auto`; None if it is to be
    made here.

    ValueError, OSError: it is not there, or cannot be read.
    """
    where, is_teacher = getattr(settings, name), name == "teacher"
    if is_teacher and where in ("auto", "train") and ARCHS[settings.arch].text:
        raise ValueError(f"--arch {settings.arch} needs --teacher, a diffusers pipeline: a folder or a hub id")
    made = ("train",) if is_teacher else SD_STUDENTS if ARCHS[settings.arch].pruning == "stages" else ()
    if where is None or where in made:
        return None
    if Path(where).is_file():
        first = models.read_weights(Path(where)).get("conv_in.weight")  # of a U-Net
        channels = 3 if first is None else first.shape[1]
        return Opened(lambda images: load_checkpoint(new_network(settings, images), where), channels)
    if Path(where).suffix in FILES:
        public = teachers.PUBLIC.get(settings.dataset) if is_teacher else None
        remedy = f": fetch {public.url} and put it there" if public else ""
        raise FileNotFoundError(f"{flag(name)} {where}: there is no such file{remedy}")
    if is_teacher and where == "auto":
        teachers.find_public(settings.dataset)
        return Opened(lambda images: teachers.public_teacher(settings.dataset))
    net = teachers.load(where)
    if net.arch != settings.arch:
        remedy = f"it goes with --arch {net.arch}, not {settings.arch}"
        if ARCHS[net.arch].text:
            remedy += ", and learns from latents: python -m distil.latents makes them, --dataset latents reads them"
        raise ValueError(f"{flag(name)} {where} is a {type(net).__name__}: {remedy}")
    return Opened(lambda images: net, *net.shape[:2])


FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")  # of checkpoints
SEEN = "data.json"  # beside a teacher that was trained here: `Images.about` of its data


def fitted(name: str, opened: Opened | None, settings: Settings, images: data.Images) -> Network | None:
    """The network that was opened, for these images; ValueError if it is made for others."""
    if opened is None:
        return None
    net = opened.build(images)
    what = f"{flag(name)} {getattr(settings, name)}"
    check_name(what, net, settings.process)
    check_conditions(what, net.conditions, settings.data, images, net.num_classes)
    try:
        net.fit(images.shape, images.no_condition, settings.caption_dropout)
    except ValueError as error:
        raise ValueError(f"{what} does not fit {settings.data or settings.dataset}: {error}") from error
    check_guidance(what, net, settings.guidance)
    return net


def open_vae(settings: Settings, images: data.Images, device: torch.device) -> text_to_image.Vae | None:
    """The VAE that shows what latents look like, if samples are to be drawn; ValueError if it is not the data's."""
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


def sketch(
    settings: Settings, images: data.Images, teacher: Network | None = None, student: Network | None = None
) -> tuple[Network, Network]:
    """The teacher, a new one without weights if none is given, and a student of its kind, or as one given starts."""
    with torch.device("meta"):
        teacher = teacher or new_network(settings, images)
    run = Run(settings, torch.device("cpu"), images, checkpoint={})  # with a checkpoint nothing is measured
    student = copy.deepcopy(student) if student else SMALLER[teacher.pruning](run, teacher, None, None, 0)
    return teacher, headed(settings, student, 0)


def dry_run(settings: Settings) -> str:
    """What a command comes to, and what is missing for it. Nothing is trained, fetched, decoded or written."""
    check_unused(settings)
    asked, settings = settings, sized(settings, find_device(settings.device))
    check_out(settings)
    made, public = Path(teacher_settings(settings).out, "teacher"), teachers.PUBLIC.get(settings.dataset)
    file, otherwise = settings.teacher, "is missing"
    if file == "auto" and public is None and not ARCHS[settings.arch].text:
        teachers.find_public(settings.dataset)  # says that there is none, and for which there are
    if file == "train":
        file, otherwise = made, f"is trained first, {settings.teacher_steps:,} steps"
    elif file == "auto" and public:
        file, otherwise = Path(TEACHERS, public.file), f"is missing: it is fetched from {public.url}"
        if public.by_hand:
            otherwise = f"is missing: fetch {public.url} with a browser and put it there"
    elif text_to_image.HUB_ID.fullmatch(file):
        otherwise = "is no folder here, so it is taken from the hub"
    there = Path(file).exists()
    usual = settings.teacher in ("auto", "train")
    given = open_network("teacher", settings) if (ARCHS[settings.arch].text if usual else there) else None
    start = open_network("student", settings) if settings.student and Path(settings.student).exists() else None
    settings = as_large(settings, asked, given)
    lines = [json.dumps(plain(settings), indent=2)]
    if settings.data is None:
        lines.append(f"data: {settings.dataset}; {data.DATASETS[settings.dataset][3]}")
    else:
        lines.append(f"data: {settings.data}" + ("" if Path(settings.data).is_dir() else " is missing"))
    lines.append(f"teacher: {file}" + ("" if there else f" {otherwise}"))
    if start is None and settings.student is not None and settings.student not in SD_STUDENTS:
        lines.append(f"student: {settings.student} is missing, or a hub id")
    images = pretended(settings, given and given.channels)
    if images is not None and (there or usual):
        check_images(settings, images)
        teacher, student = fitted("teacher", given, settings, images), fitted("student", start, settings, images)
        check_students(settings, images, teacher, student)
        check_steps(settings, teacher, student)
        trained = settings.teacher != "train" or there
        lines.append(outlook(settings, images, *sketch(settings, images, teacher, student), trained=trained))
    return "\n".join(lines)


def pretended(settings: Settings, channels: int | None = None) -> data.Images | None:
    """Images as those of a run are, without a pixel of them; None for latents that are not there. Those of a folder are
    counted, of others there are ten, without a fingerprint. channels: of a folder's images; None: what they are."""
    _, _, own, _ = data.DATASETS[settings.dataset]
    if settings.dataset == "digits":
        data.check_digits(settings.image_size)
    if Path(settings.data or "", data.RECORD).exists():
        return data.load(settings.dataset, settings.data, image_size=settings.image_size)
    if own is None and settings.dataset not in SIZES:
        return None
    names = pictures.image_files(Path(settings.data)) if settings.dataset in SIZES else []
    channels = own or channels or (1 if pictures.are_gray(Path(settings.data), names) else 3)
    n, known = len(names) or 10, digest("\n".join(names).encode("utf-8", "surrogateescape")) if names else ""
    pixels = np.broadcast_to(np.uint8(0), (n, channels, settings.image_size, settings.image_size))
    labels = pictures.folder_labels(names) if names else range(n)
    return data.Images(pixels, None if labels is None else np.array(labels), settings.dataset, fingerprint=known)

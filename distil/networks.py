"""The networks of a run: a teacher that is trained here, and the students that are made from any teacher."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
from distil import data, importance, text_to_image
from distil.batches import Batch, batches
from distil.machine import digest, hash_seed, note, on_device, say
from distil.presets import SHAPE, TEACHERS, preset
from distil.process import Process
from distil.settings import FREE, Settings
from distil.students import autocast, find_dtype
from models import DiT, Network, UNet, group_widths, prune_channels, prune_depth, regroup, uniform_blocks


@dataclass
class Run:
    """What `prepare` found out before anything is written."""

    settings: Settings
    device: torch.device
    images: data.Images  # to train on
    held_out: data.Images | None = None  # never trained on: says how low a distance can get
    teacher: Network | None = None  # None: has to be trained first
    student: Network | None = None  # None: made from the teacher
    vae: text_to_image.Vae | None = None  # of latents, to look at samples
    checkpoint: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None  # of the finished run, if it is one


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
    if classes is not None and not 0 <= images.labels.min() <= images.labels.max() < classes:
        odd = images.labels.min() if images.labels.min() < 0 else images.labels.max()
        known = f"the classes 0 to {classes - 1}, but the data has a class {odd}"
        raise ValueError(f"{network} knows {known}: use a network made for such")


def new_unet(settings: Settings, images: data.Images, config: dict[str, Any]) -> UNet:
    channels, size, _ = images.shape
    return UNet(size, channels, channels=settings.channels, dropout=settings.dropout, **config)


def new_dit(settings: Settings, images: data.Images, config: dict[str, Any]) -> DiT:
    channels, size, _ = images.shape
    check_conditions("--arch dit", ("y",), settings.data, images)
    classes = 1000 if settings.dataset == "imagenet" else int(images.labels.max()) + 1
    config = {"num_classes": classes, "learn_sigma": not settings.is_flow, **config}
    return DiT(size, in_channels=channels, hidden_size=settings.channels, **config)


NEW: dict[str, Callable] = {"unet": new_unet, "dit": new_dit}  # --arch of which a teacher can be trained here


def new_network(settings: Settings, images: data.Images) -> Network:
    """The untrained teacher of a data set."""
    return NEW[settings.arch](settings, images, network_config(settings))


def network_config(settings: Settings) -> dict[str, Any]:
    """How a new teacher is built, beside its width: as its preset says, and a U-Net as its width and size allow.

    As many of its levels as halve the image size without rest, the last of 2 pixels or more; groups of about four
    channels, where the preset says nothing (32 groups of the published 128 channels). ValueError for other sizes.
    """
    config, size = dict(preset(settings.dataset, settings.prune, settings.arch)["network"]), settings.image_size
    if "channel_mults" not in config:
        return config
    fit = next((n for n in range(len(config["channel_mults"]), 1, -1) if size % 2 ** (n - 1) == 0 < size // 2**n), 0)
    config["channel_mults"] = settings.channel_mults or config["channel_mults"][:fit]
    if not config["channel_mults"]:
        remedy = f"use --image-size {size - size % 8 or 8}, or one level with --channel-mults 1"
        raise ValueError(f"--image-size {size} cannot be halved, which a U-Net does between its levels: {remedy}")
    if (n := len(config["channel_mults"])) > 1 and size < 2**n:
        fewer = ",".join(map(str, config["channel_mults"][: max(1, size.bit_length() - 1)]))
        raise ValueError(f"--image-size {size} has one pixel in the last of {n} levels: use --channel-mults {fewer}")
    if settings.num_res_blocks:
        config["num_res_blocks"] = settings.num_res_blocks
    groups = settings.teacher_norm_groups or config.get("norm_groups") or models.usual_groups(settings.channels)
    if settings.channels % groups:
        remedy = f"give a multiple of {groups}, or --teacher-norm-groups that divide it"
        raise ValueError(f"--channels {settings.channels} cannot be split into {groups} groups: {remedy}")
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
    usual = preset(settings.dataset, 0.0, settings.arch)
    given = {name: getattr(settings, name) for name in ("ema_warmup", "timesteps", "flip")}
    own |= {name: value for name, value in given.items() if value != usual[name]}  # only others are named
    named = own | {"compile": False, "accumulate": 1}  # they make no other teacher; once they stood in its name
    key = digest(json.dumps([named, network_config(settings)]).encode())[:8]
    watch = {name: getattr(settings, name) for name in FREE - {"out"}}
    return Settings(**own | watch, out=f"{TEACHERS}/{settings.dataset}{settings.image_size or ''}-{key}")


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
        timesteps = [i * process.steps // few for i in range(few)]
        batch = first_batch(run, teacher, process, settings.taylor_batch)
        importance.accumulate_gradients(
            teacher, process, batch.x0, batch.noise, settings.taylor_threshold, timesteps, cond=batch.cond
        )
    net = prune_channels(teacher, settings.prune, importance_of, settings.norm_groups, seed=seed)
    left = sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in teacher.parameters())
    if run.checkpoint is None and abs(1 - math.sqrt(left) - settings.prune) > 0.1:
        more = " (--teacher-norm-groups)" if settings.teacher == "train" else ""
        why = f"no norm loses a group: a teacher with fewer of them{more} loses more"
        note(f"WARNING: --prune {settings.prune:g} leaves {left:.0%} of the parameters instead of about "
             f"{(1 - settings.prune) ** 2:.0%}, for {why}")  # fmt: skip
    if run.checkpoint is None and dist.is_initialized():  # importance may differ by rounding: all take those of rank 0
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, 0)
    return net


def of_stages(run: Run, teacher: Network, process: Process, loss: Loss, seed: int) -> Network:
    torch.manual_seed(hash_seed(seed))  # of the weights of C_* students, which are not the teacher's
    return text_to_image.bk_sdm(teacher, run.settings.student)


def of_blocks(run: Run, teacher: Network, process: Process, loss: Loss, seed: int) -> Network:
    settings, depth = run.settings, len(teacher.blocks)
    n = kept_blocks(settings, depth)
    method, kept = settings.depth_method, None
    if run.checkpoint is not None:  # it brings its own weights, and says which blocks; older ones do not
        states = [state for name, state in run.checkpoint.get("students", {}).items() if name.endswith(f"-{seed}")]
        method, kept = "uniform", next((state.get("blocks") for state in states), None)
    if kept or settings.keep is not None or n == depth:
        keep = list(kept or settings.keep or range(depth))
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
    stream, precise = batches(run.settings, run.images, process, teacher), run.settings
    if find_dtype(precise, run.device) == torch.float16:  # its gradients would need a scaler
        precise = replace(precise, precision="fp32")

    def of_step(net: nn.Module, step: int) -> Iterator[Tensor]:
        batch = next(stream)
        for part in batch.parts(precise.accumulate).values():
            with autocast(precise, run.device):
                output = net(part.x_t, part.t, part.cond)
            yield loss(output, part) * (len(part.t) / len(batch.t))

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

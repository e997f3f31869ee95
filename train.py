"""Distil a pruned diffusion student from its teacher, in one command.

    python train.py                                              # the digits demo: minutes on a CPU
    python train.py --kd none out lift place --seeds 0 1 2       # several methods and seeds, one teacher pass per batch
    python train.py --data FOLDER --image-size 32 --prune 0.7    # any folder of images
    python train.py --arch dit --prune 0.5 --kd none out place   # a class-conditional transformer that loses blocks

A run reads settings -> data -> teacher (given, cached, or trained first) -> students (pruned from the teacher) ->
distil -> evaluate, and lives in one folder: config.json, log.jsonl, checkpoint.pt, student/, samples.png, curves.png,
metrics.json. The same command resumes it. Everything random is a function of (seed, step), so a resumed run equals an
uninterrupted one, and a run does not depend on how a batch is split over processes (torchrun).
"""

from __future__ import annotations

from settings import EVALUATION, FOLDED, FREE, METHODS, SD_STUDENTS, TEACHERS, Settings, flag, parse, plain, preset

if __name__ == "__main__":  # --help, --dry-run and mistakes are answered before torch, which takes seconds to load
    parse(description=__doc__)

import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import foreign
import lift_place
from diffusion import DDPM, PROCESSES, Process, process_named, split
from evaluate import find_device, rank_and_world
from lift_place import Distillation, adaptive, schedule
from models import (
    DiT,
    Network,
    Tapped,
    UNet,
    accumulate_gradients,
    block_influence,
    check_blocks,
    feature_channels,
    feature_loss,
    layer_map,
    learned_blocks,
    load_checkpoint,
    masked_feature_loss,
    mean_feature_loss,
    prune_channels,
    prune_depth,
    random_blocks,
    uniform_blocks,
)

# --arch, --precision
KINDS: dict[str, type[Network]] = {"unet": UNet, "dit": DiT, "sd": foreign.TextUNet, "mmdit": foreign.MMDiT}
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---------------------------------------------------------------------------------------------------------------------
# The objective


class Batch(NamedTuple):
    """What a step shows to teacher and students alike; B samples of shape C, H, W."""

    x0: Tensor  # (B, C, H, W), clean
    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    cond: dict[str, Tensor]  # of the networks, (B, ...) each; {} for those that take none

    def part(self, rows: slice) -> Batch:
        cond = {key: value[rows] for key, value in self.cond.items()}
        return Batch(self.x0[rows], self.noise[rows], self.t[rows], cond)


# How the published settings reduce, beside what PRESETS of lift_place.py says: their feature losses.
FEATURES = {
    "diff-pruning": feature_loss,
    "bk-sdm": mean_feature_loss,
    "tinyfusion": masked_feature_loss,
}


def squared_error(settings: Settings, a: Tensor, b: Tensor) -> Tensor:
    """Squared distance, (B, ...) each -> (): its mean, or summed over a sample and averaged over the batch."""
    error = nn.functional.mse_loss(a.float(), b.float())
    return error * a[0].numel() if lift_place.PRESETS[settings.constants]["reduction"] == "sum" else error


def absolute_error(settings: Settings, a: Tensor, b: Tensor, elements: int) -> Tensor:
    """Absolute distance, (B, ...) each -> (): its mean, or summed as over a sample of so many elements."""
    error = nn.functional.l1_loss(a.float(), b.float())
    return error * elements if lift_place.PRESETS[settings.constants]["reduction"] == "sum" else error


def terms(settings: Settings, method: str) -> tuple[str | None, bool]:
    """The output distance of a method, and whether it has a feature term that counts."""
    if settings.fold_steps is None:
        return METHODS[method][0], METHODS[method][1] and settings.lambda_feat > 0
    return FOLDED[method][0], FOLDED[method][1] and settings.lambda_hidden > 0


def objective(
    settings: Settings,
    process: Process,
    method: str,
    batch: Batch,
    x_t: Tensor,
    output: Tensor,
    teacher_output: Tensor | None,
    features: list[Tensor],
    teacher_features: list[Tensor],
    weight: Any,
    lambda_feat: float,
) -> tuple[Tensor, Distillation | None]:
    """L = lambda_diff L_diffusion + lambda_out L_KD + lambda_feat L_FeatKD (paper, Method).

    With --fold-steps OutKD is the absolute error, and the feature term lambda_hidden times that of the last feature,
    scaled as if it had as many elements as the output (SFDDM: the means of both, weighted alike).

    Of networks that predict their variance, the variational bound joins L_diffusion and the same bound to the teacher
    L_KD (TinyFusion); OutKD, LIFT and PLACE look at the prediction alone.

    Args:
        x_t: (B, C, H, W), what the networks saw.
        output, teacher_output: (B, C, H, W), or (B, 2 C, H, W) with a variance.
        features, teacher_features: outputs of the tapped layers, the student's through its adapters; [] without them.
        weight: what `place` takes.
        lambda_feat: at this step.

    Returns:
        the loss, and the parts of LIFT or PLACE where the method has them.
    """
    prediction, variance = split(output, x_t.shape[1])
    loss = squared_error(settings, prediction, process.target(batch.x0, batch.noise, batch.t))
    if variance is not None:
        loss = loss + process.bound(output, batch.x0, x_t, batch.t)
    loss = settings.lambda_diff * loss
    distance, _ = terms(settings, method)
    parts = None
    if distance is not None:
        teacher_prediction, _ = split(teacher_output, x_t.shape[1])
        if distance == "mse":
            kd = squared_error(settings, prediction, teacher_prediction)
        elif distance == "l1":
            kd = absolute_error(settings, prediction, teacher_prediction, x_t[0].numel())
        else:
            parts = fit(settings, distance, prediction, teacher_prediction, weight)
            kd = parts.loss
        if variance is not None:
            kd = kd + process.bound(output, batch.x0, x_t, batch.t, teacher_output)
        loss = loss + settings.lambda_out * kd
    if features and settings.fold_steps is not None:
        hidden = absolute_error(settings, features[-1], teacher_features[-1], x_t[0].numel())
        loss = loss + settings.lambda_hidden * hidden
    elif features:
        loss = loss + lambda_feat * FEATURES[settings.constants](features, teacher_features)
    return loss, parts


def feature_weight(settings: Settings, step: int) -> float:
    """lambda_feat at a step: constant, or falling linearly to 0 over `feat_stages` parts of the run (TinyFusion)."""
    stages = settings.feat_stages
    return settings.lambda_feat * (1 - step * stages // settings.steps / max(stages - 1, 1) if stages else 1.0)


def fit(settings: Settings, distance: str, output: Tensor, teacher_output: Tensor, weight: Any = None) -> Distillation:
    """`place` or `lift` with the constants of the settings."""
    constants = {**lift_place.PRESETS[settings.constants], "weight": weight}
    constants["norm"] = settings.norm or constants["norm"]
    del constants["group_size"]
    if distance == "lift":
        return lift_place.lift(output, teacher_output, **constants)
    return lift_place.place(output, teacher_output, group_size=settings.group_size, **constants)


# ---------------------------------------------------------------------------------------------------------------------
# Students


class Student:
    """A network in training: its module, its weight average, its optimizer."""

    def __init__(self, settings: Settings, method: str, seed: int, net: nn.Module, teacher: nn.Module | None) -> None:
        """`teacher`: tapped when this method has a feature term. The average starts from the weights of `net`."""
        self.method, self.seed, self.name, self.seconds = method, seed, f"{method}-{seed}", 0.0
        device = next(net.parameters()).device
        self.net = net.train()
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.module = self.bare = self.net
        self.whole = None
        if terms(settings, method)[1] and isinstance(teacher, Tapped):
            torch.manual_seed(hash_seed(seed))  # of the adapters
            self.module = self.bare = Tapped(net, *tapping(settings, net, teacher)).to(device)
        if settings.compile:
            self.bare.compile()  # in place: the names of the parameters stay
        if settings.fsdp:  # weights, gradients, optimizer and average are split over the processes
            from torch.distributed.fsdp import fully_shard

            self.whole = copy.deepcopy(self.ema).to("meta")
            for root, inside in ((self.bare, self.net), (self.ema, self.ema)):
                for stage in inside.stages():
                    fully_shard(stage)
                fully_shard(root)
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": device.type != "mps"}
        self.optimizer = torch.optim.AdamW(self.bare.parameters(), **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=find_dtype(settings, device) == torch.float16)
        if dist.is_initialized() and not settings.fsdp:
            self.module = DistributedDataParallel(self.bare)

    def sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients of several processes are averaged once, in the backward pass of the last part of a batch."""
        if self.whole is not None:
            self.bare.set_requires_gradient_sync(last)
        alone = last or self.whole is not None or not dist.is_initialized()
        return contextlib.nullcontext() if alone else self.module.no_sync()

    def update(self, settings: Settings, step: int) -> Tensor:
        """Clip (the network, not its adapters), step, average. Returns the gradient norm before clipping, ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(settings, step)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), settings.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        rate = min(settings.ema, (1 + step) / (10 + step))  # short runs would otherwise average over their start
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - rate)
        return norm if self.whole is None else norm.full_tensor()

    def gather(self) -> None:
        """After training: a split average is put together again, on the CPU of rank 0. Every process has to call it."""
        if self.whole is not None:
            from torch.distributed.checkpoint import state_dict as sharded

            options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = sharded.get_model_state_dict(self.ema, options=options)
            if state:  # on rank 0
                self.whole.load_state_dict(state, assign=True)
            self.ema = self.whole

    def state(self) -> dict[str, Any]:
        """What `restore` takes. Every process has to call it if the weights are split; rank 0 gets them all."""
        if self.whole is not None:
            from torch.distributed.checkpoint import state_dict as sharded

            options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
            parts = {"module": self.bare, "ema": self.ema}
            parts = {name: sharded.get_model_state_dict(net, options=options) for name, net in parts.items()}
            parts["optimizer"] = sharded.get_optimizer_state_dict(self.bare, self.optimizer, options=options)
            return {"seconds": self.seconds, **parts, "scaler": self.scaler.state_dict()}
        parts = {"module": self.bare, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler}
        return {"seconds": self.seconds, **{name: part.state_dict() for name, part in parts.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        if self.whole is not None:
            from torch.distributed.checkpoint import state_dict as sharded

            options = sharded.StateDictOptions(full_state_dict=True)
            sharded.set_model_state_dict(self.bare, state["module"], options=options)
            sharded.set_model_state_dict(self.ema, state["ema"], options=options)
            sharded.set_optimizer_state_dict(self.bare, self.optimizer, state["optimizer"], options=options)
        else:
            self.bare.load_state_dict(state["module"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.seconds = state["seconds"]


def lr_factor(settings: Settings, step: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then constant or cosine to `lr_end`."""
    warm, end = min(1.0, (step + 1) / (settings.warmup + 1)), settings.lr_end / settings.lr
    cosine = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return warm * (cosine if settings.decay == "cosine" else 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(
    settings: Settings,
    students: list[Student],
    teacher: nn.Module | None,
    images: data.Images,
    process: Process,
    folder: Path,
    *,
    start: int,
    device: torch.device,
) -> bool:
    """Train all students side by side: one batch, one noise, one teacher pass per step for all of them.

    Args:
        teacher: a network, `Tapped` when a student needs features; None trains on the data alone.
        folder: where checkpoint.pt and log.jsonl go.
        start: the steps that the students have behind them.

    Returns:
        True at the end; False when Ctrl-C or a scheduler's SIGTERM ended it early, after saving a checkpoint.
    """
    rank, world = rank_and_world()
    rows = slice(rank * settings.batch_size // world, (rank + 1) * settings.batch_size // world)
    weight_over_ranks = adaptive_over_ranks if world > 1 else None
    half = autocast(settings, device)
    stream = data.batches(images, settings.batch_size, settings.seed, start, rows=rows)
    bar = tqdm(initial=start, total=settings.steps, desc=folder.name, unit="step", disable=rank > 0, mininterval=1.0)
    with Stop() as stop, open_log(settings, folder) as log, contextlib.closing(stream), bar:
        for step in range(start, settings.steps):
            began = time.perf_counter()
            whole = batch(settings, *next(stream), rows, images.flip, process, step, device, students[0].ema)
            watched = step % settings.log_every == 0 or step + 1 == settings.steps
            needed = teacher is not None and (watched or any(any(METHODS[student.method]) for student in students))
            weight = schedule(settings.schedule, step, settings.steps)
            weight = weight_over_ranks if weight is None else weight
            for rows_of_part in torch.arange(len(whole.t)).chunk(settings.accumulate):
                first, size = int(rows_of_part[0]), len(rows_of_part)
                part = whole.part(slice(first, first + size))
                x_t = process.add_noise(part.x0, part.noise, part.t)  # (B, C, H, W)
                teacher_output, teacher_features = None, []
                with torch.no_grad(), half:
                    if needed:
                        teacher_t = part.t if settings.fold_steps is None else process.phi(part.t)
                        teacher_output, teacher_features = predict(teacher, x_t, teacher_t, part.cond)
                shared, began = time.perf_counter() - began, time.perf_counter()
                for student in students:
                    torch.manual_seed(hash_seed(student.seed, step, rank, first))  # of the dropout
                    with student.sync(last=first + size == len(whole.t)):
                        with half:
                            output, features = predict(student.module, x_t, part.t, part.cond)
                        student.loss, parts = objective(
                            settings, process, student.method, part, x_t, output, teacher_output, features,
                            teacher_features, weight, feature_weight(settings, step),
                        )  # fmt: skip
                        student.scaler.scale(student.loss * (size / len(whole.t))).backward()
                    if watched:
                        student.numbers = diagnose(settings, x_t.shape[1], output, teacher_output, parts)
                    now = time.perf_counter()
                    student.seconds += now - began + shared * any(METHODS[student.method])
                    began = now
            for student in students:
                norm = student.update(settings, step)
                if watched:
                    numbers = {"loss": student.loss, "grad_norm": norm, **student.numbers}
                    values = mean_over_ranks(torch.stack([n.detach().float() for n in numbers.values()])).tolist()
                    record = {"step": step, "student": student.name, "method": student.method, "seed": student.seed}
                    record["lr"] = student.optimizer.param_groups[0]["lr"]
                    log({**record, **dict(zip(numbers, values, strict=True))})
                now = time.perf_counter()
                student.seconds += now - began
                began = now
            bar.update()
            if stop.asked or (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                save_checkpoint(settings, students, folder, step + 1)
            if stop.asked:
                return step + 1 == settings.steps
    return True


def batch(
    settings: Settings,
    pixels: Tensor,
    cond: dict[str, Tensor],
    rows: slice,
    flip: bool,
    process: Process,
    step: int,
    device: torch.device,
    net: Network,
) -> Batch:
    """The rows of a step's batch for this process: images in [-1, 1] or latents, noise, timesteps, conditions.

    What is random is drawn for the whole batch from (seed, step), so it does not depend on the number of processes.

    Args:
        pixels: (B, C, H, W) uint8, the images of these rows; or (B, 2, C, H, W) float32, latents of an image and its
            mirror image.
        cond: what the data knows of them.
        net: says which conditions the networks take, and in what share of the samples they are dropped, for teacher
            and students alike, so that samples can be guided.
    """
    generator = torch.Generator(device).manual_seed(hash_seed(settings.seed, step))
    uniform = lambda: torch.rand(settings.batch_size, generator=generator, device=device)[rows]  # noqa: E731  (B,)
    pixels = pixels.to(device, non_blocking=True)
    mirrored = uniform() < 0.5 if flip else torch.zeros(len(pixels), dtype=torch.bool, device=device)  # (B,)
    if pixels.dtype == torch.uint8:
        x0 = data.mirror(data.to_float(pixels), mirrored) if flip else data.to_float(pixels)  # (B, C, H, W)
    else:
        x0 = pixels[torch.arange(len(pixels), device=device), mirrored.long()]  # (B, C, H, W)
    noise = torch.randn(settings.batch_size, *x0.shape[1:], generator=generator, device=device)[rows]  # (B, C, H, W)
    t = process.sample_t(settings.batch_size, generator=generator, device=device)[rows]  # (B,)
    cond = {key: cond[key].to(device, non_blocking=True) for key in net.conditions}
    if net.condition_dropout > 0:
        dropped = uniform() < net.condition_dropout  # (B,)
        for key, null in net.no_condition().items():
            shape = (-1, *[1] * (cond[key].ndim - 1))
            cond[key] = torch.where(dropped.reshape(shape), null.to(cond[key]), cond[key])
    return Batch(x0, noise, t, cond)


def predict(module: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output (B, C, H, W), and the features of a tapped network or []."""
    result = module(x_t, t, cond)
    return result if isinstance(result, tuple) else (result, [])


def find_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """What the networks compute in: --precision, by default half precision on GPUs (bf16 where they have it)."""
    if settings.precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return DTYPES[settings.precision] or torch.float32


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """The context in which the networks run."""
    dtype = find_dtype(settings, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def diagnose(
    settings: Settings, channels: int, output: Tensor, teacher_output: Tensor | None, parts: Distillation | None
) -> dict[str, Tensor]:
    """What a log line says of a student beside its loss: the parts of its own LIFT or PLACE, else those of PLACE."""
    if teacher_output is None:
        return {}
    with torch.no_grad():
        output, teacher_output = output[:, :channels], teacher_output[:, :channels]  # without variances
        parts = parts or fit(settings, "place", output, teacher_output)
        mse = (output - teacher_output).square().mean()
    lines = {"b0": parts.b0.mean(), "b1": parts.b1.mean()}
    return {"coarse": parts.coarse, "fine": parts.fine, "w": parts.weight, **lines, "mse": mse}


def hash_seed(*numbers: int) -> int:
    """One seed from several numbers; near ones give unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


@contextlib.contextmanager
def open_log(settings: Settings, folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends a record to log.jsonl, and to tensorboard or wandb if asked for; rank 0 alone writes."""
    if rank_and_world()[0] > 0:
        yield lambda record: None
        return
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / "log.jsonl").open("a", buffering=1))
        also = None
        if settings.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = stack.enter_context(SummaryWriter(str(folder)))
            also = writer.add_scalar
        elif settings.log == "wandb":
            import wandb

            run = stack.enter_context(wandb.init(project="lift-place", name=folder.name, config=plain(settings)))
            also = lambda key, value, step: run.log({key: value}, step=step)  # noqa: E731

        def log(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            for key in record.keys() - {"step", "student", "method", "seed"} if also else ():
                also(f"{record['student']}/{key}", record[key], record["step"])

        yield log


class Stop:
    """Inside the block Ctrl-C and SIGTERM only set `asked`, so that a step is finished and saved before the end.

    Several processes keep the ordinary behaviour: they would not agree on the step at which to stop.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread() and rank_and_world()[1] == 1:
            self.former = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in getattr(self, "former", {}).items():
            signal.signal(number, handler)


def mean_over_ranks(x: Tensor) -> Tensor:
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def adaptive_over_ranks(x: Tensor) -> Tensor:
    """The adaptive weight of the whole batch, so that a result does not depend on how the batch is split."""
    return adaptive(mean_over_ranks(x))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(settings: Settings, students: list[Student], folder: Path, step: int) -> None:
    """Write checkpoint.pt: plain tensors and numbers. A kill at any moment leaves the old one or the new one."""
    states = {}
    if rank_and_world()[0] == 0 or settings.fsdp:
        states = {student.name: student.state() for student in students}
    if rank_and_world()[0] == 0:
        torch.save({"step": step, "settings": plain(settings), "students": states}, folder / "checkpoint.pt.new")
        os.replace(folder / "checkpoint.pt.new", folder / "checkpoint.pt")


def read_checkpoint(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """The checkpoint of a run, or None if it has none.

    Raises:
        ValueError: the file cannot be read (it is kept aside), or belongs to a run with other settings (named).
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: many kinds come out of a damaged file
        aside = path.with_name(f"checkpoint.pt.broken-{time.strftime('%Y%m%d-%H%M%S')}")
        path.rename(aside)
        raise ValueError(
            f"{path} cannot be read (truncated or damaged), so it was moved to {aside}: the same command now starts "
            f"this run from step 0, or put a good copy at {path} and it resumes from there"
        ) from error
    refuse_other_settings(settings, checkpoint["settings"], path, free=FREE | EVALUATION)
    return checkpoint


def refuse_other_settings(settings: Settings, former: dict[str, Any], path: Path, free: set[str]) -> None:
    now = plain(settings)
    differ = [name for name in now if name not in free and now[name] != former.get(name)]
    if differ:
        changes = ", ".join(f"{flag(name)} was {former.get(name)}, is {now[name]}" for name in differ)
        raise ValueError(f"{path} is of a run with other settings ({changes}): give the former ones, or another --out")


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Run:
    """What `prepare` found out before anything is written."""

    settings: Settings
    device: torch.device
    images: data.Images  # to train on
    held_out: data.Images | None  # never trained on: says how low a distance can get
    teacher: nn.Module | None  # None: has to be trained first,
    teacher_checkpoint: dict[str, Any] | None  # from here on
    student: nn.Module | None  # None: pruned from the teacher
    vae: foreign.Vae | None  # of latents, to look at samples
    checkpoint: dict[str, Any] | None
    metrics: dict[str, Any] | None  # of the finished run, if it is one


def prepare(settings: Settings) -> Run:
    """Load and check everything a run needs; writes nothing.

    Raises:
        ValueError, OSError: one sentence that says what is wrong and what would work.
    """
    device = find_device(settings.device)
    folder, world = Path(settings.out), rank_and_world()[1]
    if settings.batch_size % world:
        raise ValueError(f"--batch-size {settings.batch_size} cannot be split over {world} processes: give a multiple")
    if settings.fsdp and not dist.is_initialized():
        raise ValueError("--fsdp splits the students over several processes: start them with torchrun")
    library = settings.log if settings.log != "jsonl" else None
    if library and importlib.util.find_spec(library) is None:
        raise ValueError(f"--log {library} needs a library that is not installed: pip install {library}")
    size = {"image_size": settings.image_size}
    with rank_0_first():  # it downloads and decodes; the others find the result
        images = data.load(settings.dataset, settings.data, **size)
    if settings.eval_samples and len(images.images) < 6:
        raise ValueError(
            f"{settings.data} holds {len(images.images)} images, too few to compare samples with: add images, or "
            "evaluate nothing with --eval-samples 0"
        )
    held_out = data.load("digits", **size, split="test") if settings.dataset == "digits" else None
    if settings.arch == "dit" and images.labels is None:
        raise ValueError(
            f"--arch dit needs classes, and {settings.data} has none: put its images into one folder a class"
        )
    if settings.arch in ("sd", "mmdit"):
        if images.no_condition is None:
            raise ValueError(
                f"--arch {settings.arch} needs captions, and {settings.data} has none: make its latents with "
                "python data.py encode --text PIPELINE"
            )
        if settings.teacher in ("auto", "train"):
            raise ValueError(f"--arch {settings.arch} needs --teacher, a diffusers pipeline: a folder or a hub id")
        if settings.arch == "sd" and settings.student is None:
            raise ValueError(f"--arch sd needs --student: {', '.join(SD_STUDENTS)}, or a folder")
    teacher, teacher_checkpoint = None, None
    with rank_0_first():
        if settings.teacher != "train":
            teacher = open_network("--teacher", settings.teacher, settings, images)
        else:
            own = teacher_settings(settings)
            kept = Path(own.out) / "teacher"
            teacher = foreign.load(kept) if (kept / "config.json").exists() else None
            teacher_checkpoint = read_checkpoint(own, Path(own.out)) if teacher is None else None
    student = None
    if settings.student is not None and not (settings.arch == "sd" and settings.student in SD_STUDENTS):
        student = open_network("--student", settings.student, settings, images)
    if settings.arch in ("dit", "mmdit") and student is None:
        with torch.device("meta"):
            depth = len((teacher or new_network(settings, images)).blocks)
        if settings.keep is not None:
            check_blocks(depth, settings.keep)
        n = kept_blocks(settings, depth)
        if len(settings.seeds) > 1 and settings.depth_method == "random" and n in (1, 2, depth):
            raise ValueError(
                f"--prune {settings.prune:g} keeps {n} of {depth} blocks: the seeds would draw the same ones, for the "
                "first and the last always stay; give one seed, or another --prune"
            )
    check_steps(settings, teacher, student)
    probe = torch.zeros(1, *images.shape)  # (1, C, H, W)
    fit(settings, "place", probe, probe)  # refuses a group size that does not fit
    vae = None
    if images.record is not None and settings.eval_samples:
        if (settings.vae or images.record["vae"]) is None:
            raise ValueError(
                f"{settings.data} does not say which VAE made its latents: name it with --vae, or evaluate nothing "
                "with --eval-samples 0"
            )
        vae = foreign.Vae(settings.vae or images.record["vae"], device)
        vae.check(images.record)
    checkpoint, metrics = read_checkpoint(settings, folder), None
    if (folder / "metrics.json").exists():
        metrics = json.loads((folder / "metrics.json").read_text())
        refuse_other_settings(settings, metrics["settings"], folder / "metrics.json", free=FREE | EVALUATION)
        if any(metrics["settings"].get(name) != getattr(settings, name) for name in EVALUATION):
            metrics = None  # evaluated otherwise: evaluate again
    return Run(settings, device, images, held_out, teacher, teacher_checkpoint, student, vae, checkpoint, metrics)


def check_steps(settings: Settings, teacher: nn.Module | None, student: nn.Module | None) -> None:
    """ValueError where the timesteps of the run, of its teacher and of a given student do not go together."""
    total, fold = 1000 if teacher is None else evaluate.process_of(teacher).steps, settings.fold_steps
    if fold is not None and total != 1000 and total % fold:
        raise ValueError(
            f"--fold-steps {fold} does not match --teacher {settings.teacher}, which has {total} timesteps: take a "
            f"divisor of {total}"
        )
    has = fold or total
    if settings.sample_steps > has:
        raise ValueError(f"--sample-steps {settings.sample_steps} cannot be used, the teacher has {has} timesteps")
    if student is not None and student.config.get("fold_steps") not in (None, has):
        raise ValueError(
            f"--student {settings.student} has {student.config['fold_steps']} timesteps, this run {has}: "
            f"use --fold-steps {student.config['fold_steps']}, or another student"
        )


def open_network(name: str, where: str, settings: Settings, images: data.Images) -> nn.Module:
    """A network for these images: a saved folder, a hub id, a public checkpoint file, or `auto`.

    Raises:
        ValueError, OSError: it is not there, cannot be read, or is made for other images.
    """
    if Path(where).is_file():
        net = new_network(settings, images)
        load_checkpoint(net, where)
    else:
        net = foreign.public_teacher(settings.dataset) if where == "auto" else foreign.load(where)
    if not isinstance(net, KINDS[settings.arch]):
        kind = KINDS[settings.arch].__name__
        raise ValueError(f"{name} {where} is a {type(net).__name__}, but --arch {settings.arch} takes a {kind}")
    if isinstance(net, foreign.Diffusers):
        theirs = foreign.process_of(where)
        if theirs not in (None, settings.process):
            raise ValueError(f"{name} {where} was trained for the process {theirs}: use --process {theirs}")
        try:
            net.fit(images.shape, images.no_condition, settings.caption_dropout)
        except ValueError as error:
            raise ValueError(f"{name} {where} does not fit {settings.data}: {error}") from error
    if net.shape != images.shape:
        raise ValueError(
            f"{name} {where} takes samples of shape {net.shape}, but the data is {images.shape}: use one that fits"
        )
    if isinstance(net, DiT) and net.config["learn_sigma"] and PROCESSES[settings.process][0] is not DDPM:
        raise ValueError(f"{name} {where} predicts a variance, of which the process {settings.process} has none")
    if isinstance(net, DiT) and images.labels is not None and images.labels.max() >= net.config["num_classes"]:
        raise ValueError(
            f"{name} {where} knows the classes 0 to {net.config['num_classes'] - 1}, but the data has a class "
            f"{images.labels.max()}: use a network made for such"
        )
    return net


def new_network(settings: Settings, images: data.Images) -> Network:
    """The untrained teacher of a data set."""
    channels, size, _ = images.shape
    config = TEACHERS[settings.dataset, settings.arch]
    if settings.arch == "unet":
        return UNet(size, channels, channels=settings.channels, dropout=settings.dropout, **config)
    classes = 1000 if settings.dataset == "imagenet" else int(images.labels.max()) + 1
    config = {"num_classes": classes, "learn_sigma": PROCESSES[settings.process][0] is DDPM, **config}
    return DiT(size, in_channels=channels, hidden_size=settings.channels, **config)


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 runs the block before the other processes do."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def on_device(net: nn.Module, device: torch.device) -> nn.Module:
    """`net` on the device, in the memory layout in which its convolutions are fast there."""
    return net.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)


def teacher_settings(settings: Settings) -> Settings:
    """The run that trains the teacher: the same loop, with one unpruned student and the data alone."""
    shared = ("dataset", "arch", "data", "image_size", "seed", "batch_size", "warmup", "decay", "lr_end", "clip", "ema",
              "dropout", "channels", "constants", "process", "precision", "compile", "accumulate")  # fmt: skip
    own = {name: getattr(settings, name) for name in shared} | {"steps": settings.teacher_steps}
    own |= {"lr": settings.teacher_lr, "prune": 0.0, "kd": ("none",), "seeds": (settings.seed,), "eval_samples": 0}
    own |= {"lambda_diff": 1.0}
    key = hashlib.sha256(json.dumps([own, TEACHERS[settings.dataset, settings.arch]]).encode()).hexdigest()[:8]
    watch = {name: getattr(settings, name) for name in FREE - {"out"}}
    return Settings(**own, **watch, out=f"runs/teachers/{settings.dataset}{settings.image_size or ''}-{key}")


def train_teacher(run: Run, process: Process) -> nn.Module | None:
    """The teacher of this data set, kept for later runs. None: stopped early."""
    settings = teacher_settings(run.settings)
    folder = Path(settings.out)
    say(f"teacher: training one for {settings.steps} steps in {folder}")
    torch.manual_seed(settings.seed)
    net = on_device(new_network(settings, run.images), run.device)
    student = Student(settings, "none", settings.seed, net, None)
    if not resume(settings, [student], None, run, process, run.teacher_checkpoint):
        return None
    if rank_and_world()[0] == 0:
        student.ema.save(folder / "teacher")
    return student.ema


def resume(
    settings: Settings, students: list[Student], teacher: nn.Module | None, run: Run, process: Process, checkpoint: Any
) -> bool:
    """Train from the checkpoint on, or from the start. False: stopped early."""
    folder, start = Path(settings.out), 0
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        start = checkpoint["step"]
        for student in students:
            student.restore(checkpoint["students"][student.name])
        say(f"{folder}: resumed at step {start} of {settings.steps}")
    if rank_and_world()[0] == 0:
        (folder / "config.json").write_text(json.dumps(plain(settings), indent=2) + "\n")
        trim_log(folder / "log.jsonl", start)
    done = train(settings, students, teacher, run.images, process, folder, start=start, device=run.device)
    if not done:
        say(f"{folder}: stopped and saved; the same command goes on")
    return done


def pruned(run: Run, teacher: Network, process: Process) -> list[Network]:
    """The network that the students of each seed start from: some of the teacher's channels or blocks."""
    settings = run.settings
    if run.student is not None:
        return [run.student] * len(settings.seeds)
    if settings.arch == "sd":
        nets = []
        for seed in settings.seeds:
            torch.manual_seed(hash_seed(seed))  # of the weights of C_* students, which are not the teacher's
            nets.append(foreign.bk_sdm(teacher, settings.student))
        return nets
    # a checkpoint brings its own weights: then any channels or blocks will do
    fresh = run.checkpoint is None
    if settings.arch == "unet":
        importance = settings.importance if fresh else "magnitude"
        if importance == "taylor":
            # all 1000 timesteps as published, but never more passes than the distillation itself makes
            timesteps = range(0, process.steps, max(1, process.steps // settings.steps))
            x0, noise, _, _ = first_batch(run, teacher, process)
            accumulate_gradients(teacher, process, x0, noise, settings.taylor_threshold, timesteps)
        return [
            prune_channels(teacher, settings.prune, importance, settings.norm_groups, seed=seed)
            for seed in settings.seeds
        ]
    nets = []
    for seed in settings.seeds:
        keep = choose_blocks(run, teacher, process, settings.depth_method if fresh else "uniform", seed)
        if fresh:
            say(f"seed {seed}: the students keep the blocks {', '.join(map(str, keep))} of {len(teacher.blocks)}")
        nets.append(prune_depth(teacher, keep))
    return nets


def first_batch(run: Run, net: Network, process: Process) -> Batch:
    """One whole batch, from which pruning learns what matters."""
    with contextlib.closing(data.batches(run.images, run.settings.batch_size, run.settings.seed)) as stream:
        return batch(run.settings, *next(stream), slice(None), False, process, 0, run.device, net)


def kept_blocks(settings: Settings, depth: int) -> int:
    """How many of `depth` blocks stay."""
    return max(1, round(depth * (1 - settings.prune)))


def choose_blocks(run: Run, teacher: Network, process: Process, method: str, seed: int) -> list[int]:
    """The teacher's blocks that stay, by --keep, or --prune and a method of DEPTH_METHODS."""
    settings, depth = run.settings, len(teacher.blocks)
    n = kept_blocks(settings, depth)
    if settings.keep is not None or n == depth:
        return list(settings.keep or range(depth))
    if method == "shortgpt":
        x0, noise, _, cond = first_batch(run, teacher, process)
        influence = block_influence(teacher, process, x0, noise, cond)
        influence[-1] = math.inf  # the last one always stays
        keep = sorted(influence.topk(n).indices.tolist())
    elif method == "learned":
        rank, world = rank_and_world()
        rows = slice(rank * settings.batch_size // world, (rank + 1) * settings.batch_size // world)
        plain_loss = replace(settings, lambda_diff=1.0)
        with contextlib.closing(data.batches(run.images, settings.batch_size, settings.seed, rows=rows)) as stream:

            def loss(net: nn.Module, step: int) -> Tensor:
                part = batch(settings, *next(stream), rows, run.images.flip, process, step, run.device, teacher)
                x_t = process.add_noise(part.x0, part.noise, part.t)  # (B, C, H, W)
                with autocast(settings, run.device):
                    output = net(x_t, part.t, part.cond)
                return objective(plain_loss, process, "none", part, x_t, output, None, [], [], None, 0.0)[0]

            keep = learned_blocks(teacher, n, loss, settings.depth_steps, seed=seed)
    else:
        choose = {
            "uniform": uniform_blocks,
            "first": lambda _, n: list(range(n)),
            "random": partial(random_blocks, seed=seed),
        }
        return choose[method](depth, n)
    if dist.is_initialized():  # what was measured may differ by rounding: rank 0 decides
        chosen = torch.tensor(keep, device=run.device)
        dist.broadcast(chosen, 0)
        keep = chosen.tolist()
    return keep


def tap(settings: Settings, teacher: Network, student: Network) -> Tapped:
    """The teacher with the features that those of the student are compared with."""
    if isinstance(teacher, foreign.TextUNet):
        return Tapped(teacher, teacher.feature_layers(student))
    names = teacher.feature_layers()
    if settings.fold_steps is not None:  # the last one, what the output is made from
        names = names[-1:]
    elif hasattr(teacher, "blocks"):
        names = [names[i] for i in layer_map(len(student.blocks), len(teacher.blocks))]
    return Tapped(teacher, names)


def tapping(settings: Settings, student: Network, teacher: Tapped) -> tuple[list[str], list[int] | None]:
    """The student's layers to compare with the teacher's, and the widths to adapt them to; None where they agree."""
    if isinstance(student, foreign.TextUNet):
        names = student.feature_layers(teacher.net)
    else:
        names = student.feature_layers()[-len(teacher.names) :]
    if hasattr(student, "blocks"):
        return names, None
    widths = feature_channels(teacher.net, teacher.names)
    # FitNet adapts them all the same, SFDDM and BK-SDM compare features of one width as they are
    fitnet = isinstance(student, UNet) and settings.fold_steps is None
    return names, widths if fitnet or widths != feature_channels(student, names) else None


def make_students(run: Run, nets: list[Network], tapped: nn.Module, fold_steps: int | None) -> list[Student]:
    """One student per method and seed; those of one seed start from the same network."""
    settings, students = run.settings, []
    for seed, start in zip(settings.seeds, nets, strict=True):
        net = copy.deepcopy(start)
        if settings.init == "random":
            torch.manual_seed(hash_seed(seed))
            net = type(net)(**net.config)
        net = on_device(net, run.device).requires_grad_(True)
        if fold_steps is not None:
            net.config["fold_steps"] = fold_steps
        if settings.recompute:
            net.checkpoint()
        if "dropout" in net.config:
            net.config["dropout"] = settings.dropout
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.dropout
        students += [Student(settings, method, seed, copy.deepcopy(net), tapped) for method in settings.kd]
    return students


def distil(run: Run) -> dict[str, Any] | None:
    """The whole run: teacher, students, training, evaluation. Returns what metrics.json holds; None: stopped early."""
    settings, folder = run.settings, Path(run.settings.out)
    if run.metrics is not None:
        say(f"{folder}: this run is finished, nothing to train; its results:")
        report(run.metrics, folder)
        return run.metrics
    teacher = run.teacher
    if teacher is None:
        teacher = train_teacher(run, process_named(settings.process, settings.spacing))
    if teacher is None:
        return None
    process = evaluate.process_of(teacher, settings.process, settings.spacing, settings.clip_x0)
    teacher = on_device(teacher, run.device).eval().requires_grad_(True)  # for the gradients that Taylor pruning needs
    nets = pruned(run, teacher, process)
    teacher.requires_grad_(False).zero_grad(set_to_none=True)
    if isinstance(teacher, foreign.Diffusers):
        half = find_dtype(settings, run.device) == torch.bfloat16
        teacher.to(torch.bfloat16 if half else torch.float32)  # frozen, it needs no more than it computes with
    features = any(terms(settings, method)[1] for method in settings.kd)
    tapped = tap(settings, teacher, nets[0]) if features else teacher
    students = make_students(run, nets, tapped, settings.fold_steps or teacher.config.get("fold_steps"))
    if settings.fold_steps is not None:
        process = process.fold(settings.fold_steps)  # of the students
    if settings.compile:
        tapped.compile()
    if not resume(settings, students, tapped, run, process, run.checkpoint):
        return None
    for student in students:
        student.gather()
    if rank_and_world()[0] > 0:
        return None
    for student in students:
        student.ema.save(student_folder(folder, student, students))
    metrics = measure(run, teacher, students, process)
    for place in (folder, *(student_folder(folder, student, students) for student in students)):
        evaluate.card(place, metrics)
    (folder / "metrics.json.new").write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(folder / "metrics.json.new", folder / "metrics.json")
    report(metrics, folder)
    return metrics


def student_folder(folder: Path, student: Student, students: list[Student]) -> Path:
    return folder / "student" / student.name if len(students) > 1 else folder / "student"


def measure(run: Run, teacher: Network, students: list[Student], process: Process) -> dict[str, Any]:
    """Sample the teacher and every student from the same noise, score them, draw samples.png and curves.png.

    Of a fold the teacher is sampled in its usual number of steps, which is what students are compared with, in as many
    steps as they have (plain DDIM, what one would do instead), and at the very timesteps that theirs stand for.
    """
    settings, folder, n = run.settings, Path(run.settings.out), run.settings.eval_samples
    sizes = lambda net: {"parameters": evaluate.parameters(net), "macs": evaluate.macs(net)}  # noqa: E731
    metrics = {"settings": plain(settings), "machine": evaluate.machine(), "protocol": "not evaluated"}
    metrics |= {"teacher": sizes(teacher), "students": []}
    for student in students:
        about = {"method": student.method, "seed": student.seed, "seconds": round(student.seconds, 1)}
        metrics["students"].append({**about, **sizes(student.ema)})
    evaluate.curves(folder / "curves.png", folder / "log.jsonl")
    if n == 0:
        return metrics
    real = run.images.images[:50_000] if run.vae is None else evaluate.decoded(run.vae, run.images, n)  # (N, C, H, W)
    classifier = evaluate.digit_classifier(settings.image_size) if settings.dataset == "digits" else None
    labels = torch.arange(n) % teacher.config["num_classes"] if "y" in teacher.conditions else None  # (n,)
    cond = None if labels is None else {"y": labels}
    if "text" in teacher.conditions:  # of the very images that `decoded` shows
        cond = run.images.conditions(np.linspace(0, len(run.images.images) - 1, n).round().astype(int))
    options = {"seed": settings.seed, "eta": settings.eta, "device": run.device}
    options |= {"guidance": settings.guidance, "cond": cond, "vae": run.vae}
    own = evaluate.process_of(teacher, settings.process, settings.spacing, settings.clip_x0)
    steps = settings.sample_steps
    ways = {"teacher": (teacher, own, steps)}
    if settings.fold_steps is not None:
        usual = min(preset(settings.dataset, settings.prune)["sample_steps"], own.steps)
        theirs = process.phi(torch.tensor(process.timesteps(steps))).tolist()
        ways = {"teacher": (teacher, own, usual), f"teacher, {steps} steps": (teacher, own, steps)}
        ways[f"teacher, {steps} folded"] = (teacher, own, theirs)
    samples = {}
    for name, (net, its, at) in ways.items():
        samples[name] = evaluate.sample(net, its, n, steps=at, label=f"sampling {name}", **options)
    scores = {name: evaluate.score(x, samples["teacher"], real, classifier, labels) for name, x in samples.items()}
    metrics["teacher"] |= scores.pop("teacher")
    if scores:
        metrics["same_steps"] = [{"method": name, **sizes(teacher), **row} for name, row in scores.items()]
    if run.held_out is not None:
        held_out, theirs = data.to_float(run.held_out.images), torch.from_numpy(run.held_out.labels)
        metrics["floor"] = evaluate.score(held_out, None, real, classifier, None if labels is None else theirs)
    for student, numbers in zip(students, metrics["students"], strict=True):
        x = evaluate.sample(student.ema, process, n, steps=steps, label=f"sampling {student.name}", **options)
        numbers.update(evaluate.score(x, samples["teacher"], real, classifier, labels))
        samples.setdefault(student.method, x)  # the grid shows the first seed of each method
        ways.setdefault(student.method, (student.ema, process, steps))
    by_class = {"columns": teacher.config["num_classes"]} if labels is not None and len(labels.unique()) <= 16 else {}
    evaluate.grid(folder / "samples.png", samples, **by_class)
    if settings.fold_steps is not None:
        noise = evaluate.interpolate(teacher.shape, settings.seed)
        between = {name: its.sample(net, noise.shape, at, noise=noise) for name, (net, its, at) in ways.items()}
        evaluate.grid(folder / "interpolations.png", between)
    sampler, told = process.sampler, ""
    if settings.fold_steps is not None:
        sampler = f"teacher {sampler}, {ways['teacher'][2]} steps; others {sampler}"
    if cond:
        told = f"guidance {settings.guidance:g}, {'classes in turn' if labels is not None else 'captions'}"
    metrics["protocol"] = evaluate.protocol(
        len(real),
        n,
        n_floor=0 if run.held_out is None else len(run.held_out.images),
        sampler=sampler,
        steps=steps,
        eta=settings.eta,
        ema=settings.ema,
        seed=settings.seed,
        told=told,
        classifier=classifier,
    )
    return metrics


def report(metrics: dict[str, Any], folder: Path) -> None:
    say(f"\n{evaluate.table(evaluate.rows(metrics))}\n\n{metrics['protocol']}\nsamples, curves and numbers: {folder}")


def trim_log(path: Path, step: int) -> None:
    """Drop the lines from `step` on: a killed run logged them, and the resumed one will log them again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may cut the last line
        path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] < step))


def say(text: str) -> None:
    if rank_and_world()[0] == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str] | None = None) -> int:
    settings = parse(argv, __doc__)
    if "RANK" in os.environ:  # started by torchrun
        cuda = settings.device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the others wait while rank 0 downloads and decodes
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    try:
        run = prepare(settings)
    except (ValueError, OSError, ImportError) as error:  # what a user gave; what comes later keeps its traceback
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    distil(run)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a run can be told: the flags of train.py, the presets, and what is refused. No torch, so that all this is quick.

Settings(dataset="celeba", prune=0.9)     # the preset of that row of the paper's table, every value resolved
parse(["--kd", "none", "place"])          # the same from a command line
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, NamedTuple

# ---- Names, each with what it stands for -----------------------------------------------------------------------------

# --kd: the distance of the outputs to the teacher's, and whether one of features joins it (paper, Table 1). The second
# pair is that of --fold-steps: SFDDM's distances, absolute ones, and the last feature wherever there is a teacher.
METHODS: dict[str, tuple] = {
    "none": ((None, False), (None, False)),
    "out": (("squared", False), ("absolute", True)),
    "feat": ((None, True), None),
    "out+feat": (("squared", True), None),
    "lift": (("lift", True), ("lift", True)),
    "place": (("place", True), ("place", True)),
}

# --constants: the published settings, PRESETS of lift_place.py and FEATURES of students.py by name.
CONSTANTS = ("diff-pruning", "bk-sdm", "tinyfusion")


class Arch(NamedTuple):
    """What --arch stands for."""

    pruning: str  # what makes such a network smaller, as `models.Network.pruning`
    text: bool = False  # it reads text: a network of diffusers, which has to be given


ARCHS = {"unet": Arch("channels"), "dit": Arch("blocks"), "sd": Arch("stages", True), "mmdit": Arch("blocks", True)}

# --process: a kind of distil/process.py and its arguments. "sd" is Stable Diffusion 1, 2-base and 2.1-base, "sd-v" 2
# and 2.1 at 768 pixels, "sfddm" the teacher of SFDDM, "sd3" Stable Diffusion 3 and 3.5.
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "schedule": "scaled_linear"}
PROCESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("ddpm", {}),
    "sd": ("ddpm", STABLE),
    "sd-v": ("ddpm", {**STABLE, "prediction": "v"}),
    "sfddm": ("ddpm", {"steps": 1024, "schedule": "sigmoid_alpha_bar"}),
    "flow": ("flow", {}),
    "sd3": ("flow", {"shift": 3.0}),
}

# --student of --arch sd: the students of BK-SDM, with the widths of those that do not keep the teacher's.
SD_STUDENTS: dict[str, tuple[int, ...] | None] = {
    "base": None, "small": None, "tiny": None, "C_base": (256, 512, 1024, 1024), "C_small": (224, 448, 896, 896),
    "C_tiny": (192, 384, 768, 768), "C_micro": (160, 320, 640, 640), "C_extreme": (128, 256, 512, 512),
}  # fmt: skip
SAMPLERS = ("ddim", "pndm")  # of DDPM
TIMESTEPS = ("antithetic", "uniform")  # of a training batch of DDPM
WEIGHTS = ("adaptive", "constant", "linear", "cosine", "learned")  # w: schedules of lift_place.py, and a parameter
PRECISIONS = {"auto": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SPACINGS = ("leading", "linspace", "quad")  # of the timesteps of a sampler, as `DDPM.timesteps` has them
DEPTH_METHODS = ("uniform", "first", "random", "shortgpt", "learned")  # which blocks of a transformer stay

# ---- The presets -----------------------------------------------------------------------------------------------------
# one line for each published result says all of it. `prune` 1.0 stands for every other ratio.

# The paper's pixel space, as released: Table 1. `eval_samples` 0: its numbers take 50,000 samples and Inception
# features, see `python -m distil.evaluate --help`. `network`: the rest of the teacher's arguments.
PAPER = {
    "arch": "unet", "process": "ddpm", "constants": "diff-pruning", "network": {},
    "clip": 1.0, "ema": 0.9999, "dropout": 0.1, "lambda_diff": 1.0, "lambda_out": 1.0, "lambda_feat": 1e-6,
    "feat_stages": 0, "lr": 2e-4, "weight_decay": 0.0, "warmup": 0, "decay": "constant", "lr_end": 0.0,
    "importance": "taylor", "depth_method": "uniform", "depth_steps": 1000, "init": "teacher", "caption_dropout": 0.0,
    "eval_samples": 0, "sample_steps": 100, "eta": 0.0, "spacing": "leading", "guidance": 1.0, "clip_x0": False,
    "norm_groups": "keep", "ema_warmup": False, "timesteps": "antithetic", "flip": True,
    "sampler": "ddim", "teacher": "auto", "teacher_steps": 500_000, "teacher_lr": 2e-4, "channels": 128,
}  # fmt: skip
CELEBA = PAPER | {
    "dataset": "celeba",
    "image_size": 64,
    "network": {"channel_mults": (1, 2, 2, 2, 4)},
    "batch_size": 96,
    "taylor_batch": 64,
}
LSUN = PAPER | {"image_size": 256, "network": {"channel_mults": (1, 1, 2, 2, 4, 4)}, "batch_size": 16, "lr": 2e-5,
                "clip": 0.0, "ema": 0.999, "dropout": 0.0, "teacher_steps": 2_400_000, "teacher_lr": 2e-5}  # fmt: skip
BEDROOM = LSUN | {"dataset": "lsun_bedroom", "taylor_batch": 4}
# Class-conditional latents, as TinyFusion has them: Table 3.
TINYFUSION = PAPER | {"arch": "dit", "constants": "tinyfusion", "dropout": 0.0, "lambda_diff": 0.1, "lambda_out": 0.9,
                      "lambda_feat": 1e-2, "feat_stages": 100, "decay": "cosine", "lr_end": 1e-4,
                      "depth_method": "learned", "depth_steps": 10_000, "sample_steps": 250, "eta": 1.0,
                      "spacing": "linspace", "guidance": 1.5, "teacher_lr": 1e-4, "channels": 1152,
                      "timesteps": "uniform"}  # fmt: skip
IMAGENET = TINYFUSION | {"dataset": "imagenet", "image_size": 256, "batch_size": 256, "steps": 500_000}  # DiT-XL/2
# Text to image, as BK-SDM has it: Table 2, with --student base, small or tiny.
BK_SDM = PAPER | {"dataset": "latents", "arch": "sd", "process": "sd", "constants": "bk-sdm", "batch_size": 128,
                  "steps": 50_000, "lr": 5e-5, "weight_decay": 1e-2, "dropout": 0.0, "lambda_feat": 1.0,
                  "caption_dropout": 0.1, "sample_steps": 25, "guidance": 7.5, "timesteps": "uniform",
                  "ema_warmup": True, "sampler": "pndm"}  # fmt: skip
# The demos keep what decides the paper's effect: GroupNorm that pruning turned into instance norm, the reductions, the
# lambdas, clip 1.0; how long and how fast they learn fits a CPU.
DIGITS = {"dataset": "digits", "image_size": 8, "warmup": 50, "decay": "cosine", "lr_end": 0.0, "ema": 0.99,
          "dropout": 0.0, "sample_steps": 50, "teacher": "train", "channels": 64, "timesteps": "antithetic",
          "ema_warmup": True, "flip": False}  # a mirrored 2 is no digit # fmt: skip

# What a line leaves open (None) is chosen by whether there is a GPU and by the number of images: the first row of SIZES
# that fits. Teachers of 32 and 64 channels have 8 channels a group, so that a tenth of them can stay.
ON_CPU = {"image_size": 32, "channels": 32, "channel_mults": (1, 2, 2), "num_res_blocks": 1, "teacher_norm_groups": 4,
          "batch_size": 16, "teacher_steps": 800, "steps": 600, "teacher_lr": 1e-3, "lr": 3e-3, "decay": "cosine",
          "warmup": 50, "ema": 0.99, "dropout": 0.0, "importance": "random", "eval_samples": 100}  # fmt: skip
ON_GPU = {"image_size": 64, "channels": 128, "batch_size": 64, "teacher_steps": 50_000, "steps": 20_000, "lr": 2e-4,
          "teacher_lr": 2e-4, "decay": "constant", "warmup": 500, "ema": 0.999, "dropout": 0.1, "importance": "taylor",
          "eval_samples": 2000}  # fmt: skip
FEW = {"channels": 64, "teacher_norm_groups": 8, "teacher_steps": 20_000, "steps": 10_000}
SIZES: dict[str, list[tuple[bool, float, dict[str, Any]]]] = {  # by data set: (on a GPU?, images at most, settings)
    "folder": [(False, inf, ON_CPU), (True, 5_000, ON_GPU | FEW), (True, inf, ON_GPU)]
}
OPEN = ("image_size", "channels", "batch_size", "teacher_steps", "steps", "lr", "teacher_lr", "decay", "warmup", "ema",
        "dropout", "importance", "eval_samples")  # fmt: skip
SHAPE = {"channel_mults", "num_res_blocks", "teacher_norm_groups"}  # these go with `channels`

# A --prune between two lines of a data set takes the next one. What is not in one of the paper's tables is ours (celeba
# at 0.3 is only in the released code).
PRESETS: list[dict[str, Any]] = [
    PAPER | DIGITS | {"prune": 1.0, "steps": 1500, "batch_size": 32, "lr": 5e-3, "importance": "random",
                      "eval_samples": 1500, "teacher_steps": 1700, "teacher_lr": 1e-3,
                      "network": {"channel_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": (),
                                  "norm_groups": 8}},
    TINYFUSION | DIGITS | {"prune": 1.0, "steps": 1000, "batch_size": 64, "lr": 1e-3, "depth_method": "random",
                           "depth_steps": 300, "eval_samples": 1000, "teacher_steps": 2000, "teacher_lr": 3e-3,
                           "network": {"depth": 8, "num_heads": 4, "num_classes": 10}},
    CELEBA | {"prune": 0.3, "steps": 100_000},
    CELEBA | {"prune": 0.5, "steps": 200_000},
    CELEBA | {"prune": 0.7, "steps": 240_000},
    CELEBA | {"prune": 0.9, "steps": 500_000},
    BEDROOM | {"prune": 0.3, "steps": 200_000},
    BEDROOM | {"prune": 0.5, "steps": 500_000},
    BEDROOM | {"prune": 0.7, "steps": 700_000},
    LSUN | {"dataset": "lsun_church", "prune": 1.0, "steps": 500_000, "taylor_batch": 2},
    PAPER | {"dataset": "cifar10", "image_size": 32, "prune": 1.0, "steps": 100_000, "batch_size": 128,
             "taylor_batch": 128, "spacing": "quad", "network": {"channel_mults": (1, 2, 2, 2)}},
    # Not as in the paper: norms that keep their channels, and clamping, without which short training shows noise.
    PAPER | {"dataset": "folder", "prune": 1.0, "teacher": "train", "sample_steps": 50, "norm_groups": "scale",
             "clip_x0": True, "ema_warmup": True, "network": {"channel_mults": (1, 2, 2, 2)}, **dict.fromkeys(OPEN)},
    IMAGENET | {"prune": 0.5},  # DiT-D14
    IMAGENET | {"prune": 0.75},  # D7
    IMAGENET | {"prune": 0.86},  # D4
    TINYFUSION | {"dataset": "latents", "prune": 1.0, "steps": 50_000, "batch_size": 64, "ema": 0.999,
                  "depth_method": "uniform", "depth_steps": 1000, "teacher": "train", "teacher_steps": 100_000,
                  "channels": 384, "network": {"depth": 12, "num_heads": 6}},  # DiT-S/2
    BK_SDM | {"prune": 1.0},
    BK_SDM | {"prune": 1.0, "arch": "mmdit", "process": "sd3", "constants": "tinyfusion", "lambda_diff": 0.1,
              "lambda_out": 0.9, "lambda_feat": 1e-2, "sample_steps": 28, "guidance": 7.0, "sampler": "ddim"},
]  # fmt: skip

# What --fold-steps changes in a line: SFDDM has no term for the data. Of its published settings only that of CIFAR-10
# is known, unpruned and from scratch (with --process sfddm --fold-steps 128).
FOLD = {"lambda_diff": 0.0, "spacing": "leading"}
FOLD_CIFAR10 = {"steps": 10_000, "batch_size": 50, "lr": 2e-4, "ema": 0.0, "dropout": 0.0, "init": "random",
                "timesteps": "uniform"}  # fmt: skip


def preset(dataset: str, prune: float, arch: str | None = None, fold_steps: Any = None) -> dict[str, Any]:
    """The settings of a data set: the line of PRESETS with the smallest ratio not below `prune`, else its last.

    arch: None is the architecture of the data set's first line.
    """
    arch = arch or next(row["arch"] for row in PRESETS if row["dataset"] == dataset)
    lines = [row for row in PRESETS if (row["dataset"], row["arch"]) == (dataset, arch)]
    line = next((row for row in lines if prune <= row["prune"]), lines[-1])
    if fold_steps is not None:
        published = FOLD_CIFAR10 if dataset == "cifar10" and prune == 0 else {}
        end = "published" if isinstance(fold_steps, int) else None
        line = line | FOLD | {"sample_steps": max(1, folded_to(fold_steps)), "fold_end": end} | published
    return line


def numbers(text: str) -> tuple[int, ...]:
    """ "0,2,5" -> (0, 2, 5)."""
    return tuple(int(part) for part in text.split(","))


def number_or_numbers(text: str) -> int | tuple[int, ...]:
    """ "5" -> 5, "0,2,5" -> (0, 2, 5)."""
    return numbers(text) if "," in text else int(text)


def folded_to(fold_steps: int | Sequence[int]) -> int:
    """How many steps a --fold-steps leaves."""
    return fold_steps if isinstance(fold_steps, int) else len(fold_steps)


LARGEST = {int: 10**9, numbers: 10**9, float: 1e6}  # of all flags that name no limit of their own
SEED = {"low": 0, "high": 2**63 - 1}


def option(default: Any, text: str, kind: type = str, **limits: Any) -> Any:
    """A field of Settings that is also a flag. limits: choices, or low <= value <= high, above < value < below, or
    folder=True for where to write."""
    most = {"high": LARGEST[kind]} if kind in LARGEST and "below" not in limits else {}
    return field(default=default, metadata={"text": text, "kind": kind, **most, **limits})


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, and nothing else. Counts are in steps of the global batch.

    None stands for the preset of the data set; after construction it is left only where it means: without, or as usual.

    Raises:
        ValueError: a value that cannot be used; one sentence says what would work.
    """

    dataset: str = option("digits", "images", choices=tuple(dict.fromkeys(row["dataset"] for row in PRESETS)))
    arch: str | None = option(None, "the teacher's architecture", choices=tuple(ARCHS))
    data: str | None = option(None, "folder with the data set's files, or of images; alone it means --dataset folder")
    vae: str | None = option(None, "of latents, to look at samples: folder or hub id; else the one that made them")
    image_size: int | None = option(None, "pixels; digits: 8 or 16", int, low=1, high=4096)
    flip: bool | None = option(None, "mirror half of the images of a step, left to right; not of digits", bool)
    prune: float = option(
        0.9, "share of each layer's channels, or dit: of the blocks, that goes", float, low=0, below=1
    )
    keep: tuple[int, ...] | None = option(
        None, "dit, mmdit: the blocks that stay, as 0,2,5: no --prune", numbers, low=0
    )
    depth_method: str | None = option(None, "dit, mmdit: which blocks stay", choices=DEPTH_METHODS)
    depth_steps: int | None = option(None, "steps of choosing them with learned", int, low=1)
    importance: str | None = option(None, "which channels stay", choices=("taylor", "magnitude", "random"))
    taylor_threshold: float = option(0.0, "taylor stops where the loss is below this share of its peak", float, low=0)
    taylor_batch: int | None = option(None, "images that it looks at; without a preset a batch", int, low=1)
    taylor_steps: int | None = option(None, "timesteps that it looks at, evenly spaced; all", int, low=1)
    norm_groups: str | None = option(None, "their number stays, or scales with the width", choices=("keep", "scale"))
    head: str | None = option(None, "unet, dit: of the students, gives back what norms erase", choices=("statistics",))
    kd: tuple[str, ...] = option(("place",), "methods, one or more", choices=tuple(METHODS))
    seeds: tuple[int, ...] = option(
        (0,), "a student per method and seed: of its channels or blocks, dropout", int, **SEED
    )
    seed: int = option(0, "of what students share: teacher, order of the images, noise, timesteps", int, **SEED)
    teacher: str | None = option(None, "checkpoint, folder, hub id, auto (the public one), train (here, kept in runs)")
    student: str | None = option(None, f"network to start from: a folder; sd: or {', '.join(SD_STUDENTS)}")
    init: str | None = option(None, "their first weights: the teacher's, or random ones", choices=("teacher", "random"))
    fold_steps: int | tuple[int, ...] | None = option(
        None, "T' of students of few steps (SFDDM), or the timesteps, as 0,40,80", number_or_numbers, low=0, high=1024
    )
    fold_end: str | None = option(None, "of T' timesteps: as published, or at T - 1", choices=("published", "last"))
    teacher_steps: int | None = option(None, "steps of the teacher's own training", int, low=1)
    teacher_lr: float | None = option(None, "its learning rate", float, above=0)
    channels: int | None = option(None, "its width at the first level, or dit: of a token", int, low=1, high=8192)
    channel_mults: tuple[int, ...] | None = option(
        None, "unet: its widths at all levels in multiples of that, as 1,2,2", numbers, low=1
    )
    num_res_blocks: int | None = option(None, "unet: its blocks at every level", int, low=1)
    teacher_norm_groups: int | None = option(None, "unet: groups of its norms; of about 4 channels", int, low=1)
    process: str | None = option(None, "of time: what is predicted, noise, v or velocity", choices=tuple(PROCESSES))
    steps: int | None = option(None, "distillation steps", int, low=1)
    batch_size: int | None = option(None, "images per step, over all processes", int, low=1, high=10**6)
    lr: float | None = option(None, "learning rate of Adam", float, above=0)
    weight_decay: float | None = option(None, "of AdamW; with 0 it is Adam", float, low=0)
    warmup: int | None = option(None, "steps over which the learning rate grows from 0", int, low=0)
    decay: str | None = option(None, "what follows the warm-up", choices=("constant", "cosine"))
    lr_end: float | None = option(None, "where cosine ends", float, low=0)
    clip: float | None = option(None, "largest gradient norm of a student, 0: no clipping", float, low=0)
    ema: float | None = option(None, "rate of the weight average that is evaluated and saved", float, low=0, below=1)
    ema_warmup: bool | None = option(None, "lower its rate in the first steps, to (1 + step) / (10 + step)", bool)
    timesteps: str | None = option(None, "of a batch: in pairs t, T - 1 - t, or each alone", choices=TIMESTEPS)
    dropout: float | None = option(None, "dropout of the students; the teacher predicts without", float, low=0, below=1)
    caption_dropout: float | None = option(None, "share of captions dropped, for guidance", float, low=0, below=1)
    lambda_diff: float | None = option(None, "weight of the diffusion loss", float, low=0)
    lambda_out: float | None = option(None, "weight of the output loss of out, lift, place", float, low=0)
    lambda_feat: float | None = option(None, "weight of the feature loss of feat, lift, place", float, low=0)
    lambda_hidden: float = option(1.0, "with --fold-steps: weight of the last feature's distance", float, low=0)
    feat_stages: int | None = option(None, "equal parts of a run in which it falls to 0; 0: it stays", int, low=0)
    constants: str | None = option(None, "of which published setting: those of all losses", choices=CONSTANTS)
    group_size: int = option(16, "K of place: elements per group", int, low=2)
    halve_group_size: int = option(0, "how often K is halved, after equal parts of the run", int, low=0, high=20)
    lift_per: str = option("channel", "lift: one line for each channel, or sample", choices=("channel", "sample"))
    norm: str | None = option(None, "coarse term l1 or l2, instead of the published one", choices=("l1", "l2"))
    schedule: str = option("adaptive", "w of lift and place", choices=WEIGHTS)
    eval_samples: int | None = option(
        None, "images to sample from every student, 0: no evaluation", int, low=0, high=10**7
    )
    sampler: str | None = option(None, "of DDPM: DDIM, or diffusers' PNDM; a flow has its own", choices=SAMPLERS)
    sample_steps: int | None = option(None, "its steps", int, low=1, high=1024)
    eta: float | None = option(None, "DDIM eta: 0 deterministic, 1 ancestral DDPM", float, low=0, high=1)
    spacing: str | None = option(None, "of the sampler: as ddim's, DiT's, ddim's for CIFAR-10", choices=SPACINGS)
    clip_x0: bool | None = option(None, "clamp the predicted image at every step; the paper does not", bool)
    guidance: float | None = option(None, "scale of classifier-free guidance, 1: none", float, low=0)
    out: str | None = option(None, "folder of the run; by default runs/ and a name made from the settings", folder=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "of the networks; losses and weights stay fp32", choices=PRECISIONS)
    teacher_precision: str | None = option(
        None, "of the frozen teacher, where not that of all networks", choices=("fp32", "bf16")
    )
    compile: bool = option(False, "torch.compile the networks: slow to start, faster to run", bool)
    recompute: bool = option(False, "sd, mmdit: gradient checkpointing, less memory for a third more time", bool)
    fsdp: bool = option(False, "split the students over the processes (torch FSDP2), not only the batch", bool)
    accumulate: int = option(1, "parts of a batch, to save memory; lift and place take one more pass", int, low=1)
    log: str = option("jsonl", "log.jsonl, or another beside it", choices=("jsonl", "tensorboard", "wandb", "trackio"))
    log_every: int = option(25, "steps between lines of log.jsonl", int, low=1)
    save_every: int = option(500, "steps between checkpoints", int, low=1)
    preview_every: int | None = option(
        None, "steps between previews: student/, samples.png, curves.png; 0: none; by default at every checkpoint", int,
        low=0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.data is not None and self.dataset == "digits":
            self._set("dataset", "folder")
        known = [row["arch"] for row in PRESETS if row["dataset"] == self.dataset]
        if known and self.arch in (None, *known):
            row = preset(self.dataset, self.prune, self.arch, self.fold_steps)
            if self.process in PROCESSES and PROCESSES[self.process][0] == "flow":
                row = row | {"eta": 0.0, "clip_x0": False, "sampler": "ddim"}  # a flow has nothing of all this
            if self.student is not None:
                row = row | {"norm_groups": "keep"}  # they are what they are, unless they are to be changed
            for name, value in row.items():
                if name in self.__dataclass_fields__ and getattr(self, name) is None:
                    self._set(name, value)
        check_fields(self)
        if self.arch not in known:
            names = ", ".join(dict.fromkeys(known))
            raise ValueError(f"--arch {self.arch} has no preset for {self.dataset}, only {names}")
        self._refuse()
        if self.out is None:
            self._set("out", f"runs/{self._name()}")

    def _set(self, name: str, value: Any) -> None:
        """Fills in a value; nobody else changes settings, they are frozen."""
        object.__setattr__(self, name, value)

    @property
    def is_flow(self) -> bool:
        return PROCESSES[self.process][0] == "flow"

    @property
    def usual_steps(self) -> int:
        """The sampler's steps for a network of all timesteps: those of the preset where --fold-steps has fewer."""
        if self.fold_steps is None:
            return self.sample_steps
        return preset(self.dataset, self.prune, self.arch)["sample_steps"]

    def terms(self, method: str) -> tuple[str | None, bool] | None:
        """The output distance of a method, and whether it has one of features; None: not with these settings."""
        return METHODS[method][0 if self.fold_steps is None else 1]

    def compares_features(self, method: str) -> bool:
        """Whether a method has a distance of features, and one that counts."""
        weight = self.lambda_feat if self.fold_steps is None else self.lambda_hidden
        return self.terms(method)[1] and weight > 0

    def _refuse(self) -> None:
        """ValueError where values do not go together."""
        for name in ("kd", "seeds"):
            if len(set(getattr(self, name))) != len(getattr(self, name)) or not getattr(self, name):
                raise ValueError(f"{flag(name)} takes one or more values, each named once")
        if self.is_flow and (self.eta > 0 or self.fold_steps is not None or self.clip_x0 or self.sampler != "ddim"):
            raise ValueError(
                f"--eta, --clip-x0, --sampler and --fold-steps are of DDPM, --process {self.process} has none of it"
            )
        if self.sampler == "pndm" and (self.eta > 0 or self.fold_steps is not None or self.clip_x0):
            raise ValueError("--sampler pndm goes without --eta, --fold-steps and --clip-x0: use --sampler ddim")
        arch = ARCHS[self.arch]
        if self.recompute and not arch.text:
            raise ValueError("--recompute is for --arch sd and mmdit; elsewhere --accumulate saves memory")
        if self.head is not None and arch.text:
            raise ValueError(f"--head is for --arch unet and dit: {self.arch} takes none")
        if self.keep is not None and arch.pruning != "blocks":
            raise ValueError("--keep names blocks of a transformer: use --prune, or --arch dit")
        if arch.pruning != "channels" and self.norm_groups != "keep":
            raise ValueError(
                f"--norm-groups scale is of a U-Net that loses channels: --arch {self.arch} has none of it"
            )
        if self.keep is not None and self.student is not None:
            raise ValueError("--keep names blocks of the teacher, and --student brings its own: give one of the two")
        if arch.pruning == "blocks" and (self.channel_mults or self.teacher_norm_groups):
            raise ValueError("--channel-mults and --teacher-norm-groups are of a U-Net: use --arch unet")
        drawn = ("--depth-method", self.depth_method)
        if arch.pruning == "channels":
            drawn = ("--importance", self.importance)
        chosen = drawn[1] != "random" or self.student or self.keep or self.prune == 0
        if len(self.seeds) > 1 and self.dropout == 0 and self.init != "random" and chosen:
            raise ValueError(
                f"--seeds {' '.join(map(str, self.seeds))} would train the same student several times, for without "
                "dropout a seed draws nothing but random channels, blocks or weights: prune with "
                f"{drawn[0]} random, or use --init random, or one seed"
            )
        if self.group_size % (n := 2**self.halve_group_size) or self.group_size < 2 * n:
            raise ValueError(
                f"--halve-group-size {self.halve_group_size} cannot be used: groups of {self.group_size} elements "
                "must stay whole, and of at least 2"
            )
        if self.schedule == "learned" and self.fsdp:
            raise ValueError("--schedule learned does not go with --fsdp: use DDP, or another schedule")
        if self.fold_end is not None and not isinstance(self.fold_steps, int):
            raise ValueError("--fold-end says how T' timesteps end: use it with --fold-steps and a number")
        if self.fold_steps is not None:
            self._refuse_fold()
        if "none" in self.kd and self.lambda_diff == 0:
            raise ValueError(
                "--kd none learns from the data alone: with --fold-steps give --lambda-diff 1, or another above 0"
            )
        if 0 < (self.eval_samples or 0) < 6:
            raise ValueError(f"--eval-samples {self.eval_samples} cannot be used, it must be 0 (none) or at least 6")

    def _refuse_fold(self) -> None:
        allowed = [method for method in METHODS if self.terms(method) is not None]
        if unknown := [method for method in self.kd if method not in allowed]:
            raise ValueError(
                f"--kd {unknown[0]} does not go with --fold-steps, where every method that has a teacher carries "
                f"the last feature: choose from {', '.join(allowed)}"
            )
        if ARCHS[self.arch].pruning != "channels":
            raise ValueError("--fold-steps takes --arch unet: the variance that others predict is that of all steps")
        if self.sample_steps > max(1, n := folded_to(self.fold_steps)):  # 0 is refused with the process
            raise ValueError(f"--sample-steps {self.sample_steps} cannot be used, a student of {n} has at most {n}")

    def _name(self) -> str:
        """The name of the run's folder: what it makes, then whatever differs from the preset."""
        usual = preset(self.dataset, self.prune, self.arch, self.fold_steps)
        parts = [f"{self.dataset}{self.image_size or ''}"]
        parts += [self.arch] * (ARCHS[self.arch].pruning != "channels")
        if self.student is not None:
            parts.append(brief(self.student))
        else:
            parts.append(f"keep{brief(self.keep)}" if self.keep else f"prune{brief(self.prune)}")
        parts += self.kd
        if self.seeds != (0,):
            counted = self.seeds == tuple(range(len(self.seeds)))
            parts.append(f"{len(self.seeds)}seeds" if counted else f"seeds{brief(self.seeds)}")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in NAMED | FREE | EVALUATION and value != usual.get(item.name, item.default):
                parts.append(f"{item.name}{'=' * isinstance(value, str)}{brief(value)}")
        name = "-".join(parts)
        if len(name) > 150:  # a folder's name has its limit
            name = f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return name


def brief(value: Any) -> str:
    """A value in the name of a folder: of a path its last two parts, without the suffix of a file."""
    if isinstance(value, str):
        *_, above, name = ("", "", *Path(value.removesuffix(".pth").removesuffix(".ckpt")).parts)
        return ".".join(filter(None, (above.strip("./\\:"), name)))
    if isinstance(value, tuple):
        return ".".join(map(str, value))
    return "" if value is True else f"{value:g}"


def once(config: dict[str, Any]) -> dict[str, Any]:
    """What a run of this config, perhaps of an older version, did before these settings could be chosen."""
    return {"fold_end": "last" if config.get("fold_steps") else None, "ema_warmup": True, "timesteps": "antithetic",
            "halve_group_size": 0, "lift_per": "channel", "sampler": "ddim"}  # fmt: skip


# Settings that a run may change without becoming another run: where it is and how it is watched; how it is evaluated.
FREE = {"out", "device", "log", "log_every", "save_every", "preview_every"}
EVALUATION = {"eval_samples", "sampler", "sample_steps", "eta", "spacing", "clip_x0", "guidance", "vae"}
NAMED = {"dataset", "arch", "image_size", "student", "prune", "keep", "kd", "seeds"}  # they begin the name of a run


GROUPS = {  # of --help: what people want to say with the flags, by the first of them
    "dataset": "your images, and the kind of network",
    "prune": "what of the teacher stays in a student",
    "kd": "methods to compare, and repeats",
    "teacher": "networks that you have, or the teacher that is trained here",
    "steps": "how long and how fast students learn",
    "lambda_diff": "the loss",
    "eval_samples": "samples and scores at the end",
    "out": "the folder of the run, the machine, what is logged and saved",
}


def flag(name: str) -> str:
    """The flag of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


LIMITS = (("low", ge, "at least"), ("above", gt, "above"), ("high", le, "at most"), ("below", lt, "below"))


def check(name: str, value: Any, limits: Any) -> None:
    """ValueError, with what would work, unless the value keeps the limits of its field."""
    if value == "" or "\0" in str(value):
        raise ValueError(f"{name} {value!r} cannot be used, it must have characters, and none of them may be NUL")
    if limits.get("folder"):
        file = next((place for place in (Path(value), *Path(value).parents) if os.path.isfile(place)), None)
        if file is not None:
            raise ValueError(f"{name} {file} is a file: give a folder")
    choices = limits.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} {value} is not known, choose from {', '.join(choices)}{hint}")
    bounds = [(limits[key], compare, text) for key, compare, text in LIMITS if key in limits]
    if not all(compare(value, bound) for bound, compare, _ in bounds):
        wanted = " and ".join(f"{text} {bound}" for bound, _, text in bounds)
        raise ValueError(f"{name} {value} cannot be used, it must be {wanted}")


def check_fields(given: Any) -> None:
    """ValueError unless every value in `given`, of a dataclass made by `option`, keeps the limits of its field."""
    for item in fields(given):
        value = getattr(given, item.name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                check(flag(item.name), one, item.metadata)


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON would give them back."""
    return json.loads(json.dumps(asdict(settings)))


def restored(config: dict[str, Any]) -> Settings:
    """The settings of which `plain` gave this, perhaps in an older version; ValueError for what cannot be used."""
    config = {**once(config), **config}
    known = {name: value for name, value in config.items() if name in Settings.__dataclass_fields__}
    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


# ---- Command lines ---------------------------------------------------------------------------------------------------
# of every program they are the fields of a dataclass, made by `option`


def leave_on_signals(program: str) -> None:
    """From here on Ctrl-C and SIGTERM end the program with one line and exit code 130 or 143, without a traceback."""

    def leave(number: int, frame: Any) -> None:
        print(f"\n{program}: ended by {signal.Signals(number).name}; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one sentence and exit code 2."""

    def __init__(self, program: str, description: str | None = None):
        super().__init__(program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, argv: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """As argparse's; a program whose own command line this is ends with one line on Ctrl-C and SIGTERM."""
        if argv is None:
            leave_on_signals(self.prog)
        return super().parse_args(argv, namespace)

    def error(self, message: str) -> None:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.65)
        if message.startswith("unrecognized") and unknown.startswith("--") and near:
            message = f"there is no {unknown}; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_options(self, kind: type, presets: tuple[str, ...] = (), groups: dict[str, str] | None = None) -> None:
        """A flag for every field of the dataclass `kind`; those named in `presets` have their default from one.
        groups: the titles under which --help shows the flags, each by the field with which it begins."""
        group: Any = self
        for item in fields(kind):
            if title := (groups or {}).get(item.name):
                group = self.add_argument_group(title)
            limits = item.metadata
            default = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
            if default is None:
                default = "preset" if item.name in presets else "none"
            choices = f": {', '.join(limits['choices'])}" if "choices" in limits else ""
            given: dict[str, Any] = {"help": f"{limits['text']}{choices} [{default}]", "default": argparse.SUPPRESS}
            if limits["kind"] is bool:
                given["action"] = "store_true" if item.default is False else argparse.BooleanOptionalAction
            else:
                given["type"] = limits["kind"]
                given |= {"nargs": "+"} if isinstance(item.default, tuple) else {}
            group.add_argument(flag(item.name), **given)

    def read(self, argv: list[str] | None, kind: type, *others: str) -> tuple[Any, dict[str, Any]]:
        """An object of the dataclass `kind`, and what was given for the arguments `others` that are no fields of it."""
        given = vars(self.parse_args(argv))
        rest = {name: given.pop(name) for name in others}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        try:
            return kind(**given), rest
        except ValueError as error:
            self.error(str(error))


def parse(argv: list[str] | None = None, description: str | None = None) -> Settings:
    """Settings from the command line of train.py; ends the program after --help and the like, and after a mistake."""
    return parse_command(argv, description)[0]


def parse_command(argv: list[str] | None = None, description: str | None = None) -> tuple[Settings, bool]:
    """The same, and whether it is only a --dry-run."""
    parser = Parser("train.py", description)
    parser.add_options(Settings, tuple(PRESETS[0]), GROUPS)
    parser.add_argument("--dry-run", action="store_true", help="print the settings, the sizes, what is missing; stop")
    parser.add_argument("--list-presets", action="store_true", help="print the table of presets and stop")
    settings, asked = parser.read(argv, Settings, "dry_run", "list_presets")
    if asked["list_presets"]:
        print(presets())
        parser.exit(0)
    return settings, asked["dry_run"]


def presets() -> str:
    """The table of PRESETS, aligned: what differs between published settings."""
    columns = ("dataset", "arch", "prune", "steps", "batch_size", "lr", "clip", "ema", "dropout", "lambda_diff",
               "lambda_out", "lambda_feat", "ema_warmup", "timesteps", "sampler")  # fmt: skip
    lines = [columns]
    for row in PRESETS:
        values = (row[name] for name in columns)
        lines.append([f"{value:g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    notes = ["A line is for every --prune up to its own: 1 is for all that no other line of the data set is for.",
             "None: by the device and the number of images, as --dry-run shows."]  # fmt: skip
    return "\n".join([*table, "", *notes])

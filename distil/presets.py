"""What the names of the command line stand for, and the presets: one line for each published result says all of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

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
    "taylor_threshold": 0.0,
}  # fmt: skip
CELEBA = PAPER | {"dataset": "celeba", "image_size": 64, "network": {"channel_mults": (1, 2, 2, 2, 4)},
                  "batch_size": 96, "taylor_batch": 64}  # fmt: skip
LSUN = PAPER | {"image_size": 256, "network": {"channel_mults": (1, 1, 2, 2, 4, 4)}, "batch_size": 16, "lr": 2e-5,
                "clip": 0.0, "ema": 0.999, "dropout": 0.0, "teacher_steps": 2_400_000, "teacher_lr": 2e-5,
                "taylor_threshold": 0.01}  # fmt: skip
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
# What the config.json of a run says of its sampler, and the value where neither a flag nor a run says anything.
SAMPLER = {"sampler": "ddim", "sample_steps": None, "eta": 0.0, "spacing": "leading", "clip_x0": False, "guidance": 1.0,
           "process": "ddpm", "vae": None, "teacher": None}  # fmt: skip
TEACHERS = "runs/teachers"  # where those are kept that were trained here, or fetched
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
             "taylor_batch": 128, "taylor_threshold": 0.05, "spacing": "quad",
             "network": {"channel_mults": (1, 2, 2, 2)}},
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
                "timesteps": "uniform", "clip": 0.0, "flip": False}  # fmt: skip


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


def folded_to(fold_steps: int | Sequence[int]) -> int:
    """How many steps a --fold-steps leaves."""
    return fold_steps if isinstance(fold_steps, int) else len(fold_steps)


def table() -> str:
    """The table of PRESETS, aligned: what differs between published settings."""
    columns = ("dataset", "arch", "prune", "steps", "batch_size", "lr", "clip", "ema", "dropout", "lambda_diff",
               "lambda_out", "lambda_feat", "ema_warmup", "timesteps", "sampler")  # fmt: skip
    lines = [columns]
    for row in PRESETS:
        values = (row[name] for name in columns)
        lines.append([f"{value:g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    notes = ["A line is for every --prune up to its own, the last one of a data set for all above, too.",
             "None: by the device and the number of images, as --dry-run shows."]  # fmt: skip
    return "\n".join([*table, "", *notes])

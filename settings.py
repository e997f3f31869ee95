"""What a run can be told: the flags of train.py, the presets, and what is refused. No torch, so that all this is quick.

Settings(dataset="celeba", prune=0.9)     # the preset of that row of the paper's table, every value resolved
parse(["--kd", "none", "place"])          # the same from a command line
"""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import asdict, dataclass, field, fields
from operator import ge, gt, le, lt
from typing import Any

# ---------------------------------------------------------------------------------------------------------------------
# Names of what the other files hold, so that none of them has to be loaded to read a command line

ARCHS = ("unet", "dit", "sd", "mmdit")  # --arch; the last two are Stable Diffusion's 1 and 2, and 3, and must be given
CONSTANTS = ("diff-pruning", "bk-sdm", "tinyfusion")  # PRESETS of lift_place.py
FLOWS = ("flow", "sd3")
PROCESSES = ("ddpm", "sd", "sd-v", *FLOWS)  # of diffusion.py
SD_STUDENTS = ("base", "small", "tiny", "C_base", "C_small", "C_tiny", "C_micro", "C_extreme")  # of foreign.py
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# --kd: which output distance to the teacher, and whether the feature distance joins it (paper, Table 1).
METHODS: dict[str, tuple[str | None, bool]] = {
    "none": (None, False),
    "out": ("mse", False),
    "feat": (None, True),
    "out+feat": ("mse", True),
    "lift": ("lift", True),
    "place": ("place", True),
}

# The same with --fold-steps: SFDDM's distances, absolute instead of squared ones, and the last feature in all of them.
FOLDED: dict[str, tuple[str | None, bool]] = {
    "none": (None, False),
    "out": ("l1", True),
    "lift": ("lift", True),
    "place": ("place", True),
}

# --depth-method: which blocks of a transformer stay (models.py).
DEPTH_METHODS = ("uniform", "first", "random", "shortgpt", "learned")

# The presets, one line per published result: the paper's Table 1 for celeba and lsun_bedroom (celeba at 0.3 is only in
# the released code), Table 3 for imagenet (D14, D7, D4), Table 2 for sd (with --student base, small or tiny). Nothing
# is published for the others, so those lines are ours. The demos (digits) keep what decides the paper's effect:
# GroupNorm that pruning turned into instance norm, the reductions, the lambdas, clip 1.0; how long and how fast they
# learn fits a CPU. A --prune between two lines of a data set takes the next one.
COLUMNS = ("dataset", "arch", "prune", "steps", "batch_size", "lr", "clip", "ema", "dropout",
           "lambda_diff", "lambda_out", "lambda_feat")  # fmt: skip
PRESETS: list[dict[str, Any]] = [
    dict(zip(COLUMNS, row, strict=True))
    for row in [
        # data set       arch    prune   steps  batch  lr    clip  ema    dropout  lambda: diff, out, feat
        ("digits",       "unet",  1.0,    1500,   32, 5e-3,  1.0, 0.99,   0.0,     1.0, 1.0, 1e-6),
        ("digits",       "dit",   1.0,    1000,   64, 1e-3,  1.0, 0.99,   0.0,     0.1, 0.9, 1e-2),
        ("celeba",       "unet",  0.3,  100000,   96, 2e-4,  1.0, 0.9999, 0.1,     1.0, 1.0, 1e-6),
        ("celeba",       "unet",  0.5,  200000,   96, 2e-4,  1.0, 0.9999, 0.1,     1.0, 1.0, 1e-6),
        ("celeba",       "unet",  0.7,  240000,   96, 2e-4,  1.0, 0.9999, 0.1,     1.0, 1.0, 1e-6),
        ("celeba",       "unet",  0.9,  500000,   96, 2e-4,  1.0, 0.9999, 0.1,     1.0, 1.0, 1e-6),
        ("lsun_bedroom", "unet",  0.3,  200000,   16, 2e-5,  0.0, 0.999,  0.0,     1.0, 1.0, 1e-6),
        ("lsun_bedroom", "unet",  0.5,  500000,   16, 2e-5,  0.0, 0.999,  0.0,     1.0, 1.0, 1e-6),
        ("lsun_bedroom", "unet",  0.7,  700000,   16, 2e-5,  0.0, 0.999,  0.0,     1.0, 1.0, 1e-6),
        ("lsun_church",  "unet",  1.0,  500000,   16, 2e-5,  0.0, 0.999,  0.0,     1.0, 1.0, 1e-6),
        ("cifar10",      "unet",  1.0,  100000,  128, 2e-4,  1.0, 0.9999, 0.1,     1.0, 1.0, 1e-6),
        ("folder",       "unet",  1.0,   20000,   64, 2e-4,  1.0, 0.999,  0.1,     1.0, 1.0, 1e-6),
        ("imagenet",     "dit",   0.5,  500000,  256, 2e-4,  1.0, 0.9999, 0.0,     0.1, 0.9, 1e-2),
        ("imagenet",     "dit",   0.75, 500000,  256, 2e-4,  1.0, 0.9999, 0.0,     0.1, 0.9, 1e-2),
        ("imagenet",     "dit",   0.86, 500000,  256, 2e-4,  1.0, 0.9999, 0.0,     0.1, 0.9, 1e-2),
        ("latents",      "dit",   1.0,   50000,   64, 2e-4,  1.0, 0.999,  0.0,     0.1, 0.9, 1e-2),
        ("latents",      "sd",    1.0,   50000,  128, 5e-5,  1.0, 0.9999, 0.0,     1.0, 1.0, 1.0),
        ("latents",      "mmdit", 1.0,   50000,  128, 5e-5,  1.0, 0.9999, 0.0,     0.1, 0.9, 1e-2),
    ]
]  # fmt: skip

# What --fold-steps changes in a line: SFDDM has no term for the data. Of its published settings only that of CIFAR-10
# is known, unpruned and from scratch (there T = 1024 to 128 with sigmoid betas, here T = 1000 and linear ones).
FOLD = {"lambda_diff": 0.0}
FOLDS = {"cifar10": {"steps": 10_000, "batch_size": 50, "lr": 2e-4, "ema": 0.0, "dropout": 0.0, "init": "random"}}

# What the lines of a data set and architecture share. `eval_samples` 0: the numbers of the paper take 50,000 samples
# and Inception features, see `python evaluate.py --help`. The constants name the published setting, with its reductions
# and its kind of feature loss.
PAPER = {"warmup": 0, "decay": "constant", "lr_end": 0.0, "importance": "taylor", "depth_method": "uniform",
         "depth_steps": 1000, "constants": "diff-pruning", "feat_stages": 0, "eval_samples": 0, "sample_steps": 100,
         "eta": 0.0, "spacing": "leading", "guidance": 1.0, "process": "ddpm", "weight_decay": 0.0,
         "caption_dropout": 0.0, "init": "teacher",
         "teacher": "auto", "teacher_steps": 500_000, "teacher_lr": 2e-4, "channels": 128}  # fmt: skip
TINYFUSION = PAPER | {"decay": "cosine", "lr_end": 1e-4, "depth_method": "learned", "depth_steps": 10_000,
                      "constants": "tinyfusion", "feat_stages": 100, "sample_steps": 250, "eta": 1.0,
                      "spacing": "linspace", "guidance": 1.5, "teacher_lr": 1e-4, "channels": 1152}  # fmt: skip
BK_SDM = PAPER | {"constants": "bk-sdm", "weight_decay": 1e-2, "caption_dropout": 0.1, "process": "sd",
                  "sample_steps": 25, "guidance": 7.5}  # fmt: skip
SHARED: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "unet"): PAPER | {"image_size": 8, "warmup": 50, "decay": "cosine", "importance": "random",
                                 "eval_samples": 1500, "sample_steps": 50, "teacher": "train", "teacher_steps": 1700,
                                 "teacher_lr": 1e-3, "channels": 64},
    ("digits", "dit"): TINYFUSION | {"image_size": 8, "warmup": 50, "lr_end": 0.0, "depth_method": "random",
                                     "depth_steps": 300, "eval_samples": 1000, "sample_steps": 50,
                                     "teacher": "train", "teacher_steps": 2000, "teacher_lr": 3e-3, "channels": 64},
    ("celeba", "unet"): PAPER | {"image_size": 64},
    ("lsun_bedroom", "unet"): PAPER | {"image_size": 256, "teacher_steps": 2_400_000, "teacher_lr": 2e-5},
    ("lsun_church", "unet"): PAPER | {"image_size": 256, "teacher_steps": 2_400_000, "teacher_lr": 2e-5},
    ("cifar10", "unet"): PAPER | {"image_size": 32},
    ("folder", "unet"): PAPER | {"image_size": 64, "warmup": 500, "eval_samples": 2000, "teacher": "train",
                                 "teacher_steps": 50_000},
    ("imagenet", "dit"): TINYFUSION | {"image_size": 256},
    ("latents", "dit"): TINYFUSION | {"depth_method": "uniform", "depth_steps": 1000, "teacher": "train",
                                      "teacher_steps": 100_000, "channels": 384},
    ("latents", "sd"): BK_SDM,
    ("latents", "mmdit"): BK_SDM | {"constants": "tinyfusion", "process": "sd3", "sample_steps": 28, "guidance": 7.0},
}  # fmt: skip

# The teacher that is trained when none is given, or that a public checkpoint fills: the rest of its arguments.
TEACHERS: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "unet"): {"channel_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 8},
    ("digits", "dit"): {"depth": 8, "num_heads": 4, "num_classes": 10},
    ("celeba", "unet"): {"channel_mults": (1, 2, 2, 2, 4)},
    ("lsun_bedroom", "unet"): {"channel_mults": (1, 1, 2, 2, 4, 4)},
    ("lsun_church", "unet"): {"channel_mults": (1, 1, 2, 2, 4, 4)},
    ("cifar10", "unet"): {"channel_mults": (1, 2, 2, 2)},
    ("folder", "unet"): {"channel_mults": (1, 2, 2, 2)},
    ("imagenet", "dit"): {},  # DiT-XL/2
    ("latents", "dit"): {"depth": 12, "num_heads": 6},  # DiT-S/2
}


def preset(dataset: str, prune: float, arch: str | None = None, fold_steps: int | None = None) -> dict[str, Any]:
    """The settings of a data set: the line of PRESETS with the smallest ratio not below `prune`, else its last.

    arch: None is the architecture of the data set's first line.
    """
    arch = arch or next(row["arch"] for row in PRESETS if row["dataset"] == dataset)
    lines = [row for row in PRESETS if (row["dataset"], row["arch"]) == (dataset, arch)]
    line = next((row for row in lines if prune <= row["prune"]), lines[-1])
    line = {**SHARED[dataset, arch], **line}
    if fold_steps is not None:
        line |= FOLD | {"sample_steps": fold_steps} | (FOLDS.get(dataset, {}) if prune == 0 else {})
    return line


def numbers(text: str) -> tuple[int, ...]:
    """ "0,2,5" -> (0, 2, 5)."""
    return tuple(int(part) for part in text.split(","))


def option(default: Any, text: str, kind: type = str, **limits: Any) -> Any:
    """A field of Settings that is also a flag. limits: choices, or low <= value <= high, above < value < below."""
    return field(default=default, metadata={"text": text, "kind": kind, **limits})


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, and nothing else. Counts are in steps of the global batch.

    None stands for the preset of the data set; after construction it is left only where it means: without, or as usual.

    Raises:
        ValueError: a value that cannot be used; one sentence says what would work.
    """

    dataset: str = option("digits", "images", choices=tuple(dict.fromkeys(name for name, _ in SHARED)))
    arch: str | None = option(None, "the teacher's architecture", choices=ARCHS)
    data: str | None = option(None, "folder with the data set's files, or of images; alone it means --dataset folder")
    vae: str | None = option(
        None, "of latents, to look at samples: folder or hub id, by default the one that made them"
    )
    image_size: int | None = option(None, "pixels; digits: 8 or 16", int, low=1)
    prune: float = option(0.9, "share that pruning removes of each layer's channels, or dit: of the blocks", float,
                          low=0, below=1)  # fmt: skip
    keep: tuple[int, ...] | None = option(
        None, "dit, mmdit: the blocks that stay, as 0,2,5, instead of --prune", numbers, low=0
    )
    depth_method: str | None = option(None, "dit, mmdit: which blocks stay", choices=DEPTH_METHODS)
    depth_steps: int | None = option(None, "steps of choosing them with learned", int, low=1)
    importance: str | None = option(None, "which channels stay", choices=("taylor", "magnitude", "random"))
    taylor_threshold: float = option(0.0, "taylor stops where the loss is below this share of its peak", float, low=0)
    norm_groups: str = option("keep", "their number stays, or scales with the width", choices=("keep", "scale"))
    kd: tuple[str, ...] = option(("place",), "methods, one or more", choices=tuple(METHODS))
    seeds: tuple[int, ...] = option((0,), "a student per method and seed: draws its channels or blocks, and dropout",
                                    int, low=0)  # fmt: skip
    seed: int = option(0, "of what students share: teacher, order of the images, noise, timesteps", int, low=0)
    teacher: str | None = option(None, "checkpoint, folder, hub id, auto (the public one), train (here, kept in runs)")
    student: str | None = option(None, "folder of a network to start from, instead of a pruned teacher; sd: or "
                                 f"{', '.join(SD_STUDENTS)}")  # fmt: skip
    init: str | None = option(None, "their first weights: the teacher's, or random ones", choices=("teacher", "random"))
    fold_steps: int | None = option(None, "T' of students of few steps (SFDDM)", int, low=1, high=1000)
    teacher_steps: int | None = option(None, "steps of the teacher's own training", int, low=1)
    teacher_lr: float | None = option(None, "its learning rate", float, above=0)
    channels: int | None = option(None, "its width at the first level, or dit: of a token", int, low=1)
    process: str | None = option(None, "what is predicted from what: noise, v, or the velocity of a flow",
                                 choices=PROCESSES)  # fmt: skip
    steps: int | None = option(None, "distillation steps", int, low=1)
    batch_size: int | None = option(None, "images per step, over all processes", int, low=1)
    lr: float | None = option(None, "learning rate of Adam", float, above=0)
    weight_decay: float | None = option(None, "of AdamW; with 0 it is Adam", float, low=0)
    warmup: int | None = option(None, "steps over which the learning rate grows from 0", int, low=0)
    decay: str | None = option(None, "what follows the warm-up", choices=("constant", "cosine"))
    lr_end: float | None = option(None, "where cosine ends", float, low=0)
    clip: float | None = option(None, "largest gradient norm of a student, 0: no clipping", float, low=0)
    ema: float | None = option(None, "rate of the weight average that is evaluated and saved", float, low=0, below=1)
    dropout: float | None = option(None, "dropout of the students; the teacher predicts without", float, low=0, below=1)
    caption_dropout: float | None = option(None, "share of the samples whose caption training drops, so that guidance "
                                           "has what to guide away from", float, low=0, below=1)  # fmt: skip
    lambda_diff: float | None = option(None, "weight of the diffusion loss", float, low=0)
    lambda_out: float | None = option(None, "weight of the output loss of out, lift, place", float, low=0)
    lambda_feat: float | None = option(None, "weight of the feature loss of feat, lift, place", float, low=0)
    lambda_hidden: float = option(1.0, "with --fold-steps: weight of the last feature's distance", float, low=0)
    feat_stages: int | None = option(None, "equal parts of a run in which that weight falls to 0, 0: it stays", int,
                                     low=0)  # fmt: skip
    constants: str | None = option(None, "published setting: constants of lift and place, sums or means, feature loss",
                                   choices=CONSTANTS)  # fmt: skip
    group_size: int = option(16, "K of place: elements per group", int, low=2)
    norm: str | None = option(None, "coarse term l1 or l2, instead of the published one", choices=("l1", "l2"))
    schedule: str = option("adaptive", "w of lift and place", choices=("adaptive", "constant", "linear", "cosine"))
    eval_samples: int | None = option(None, "images to sample from every student, 0: no evaluation", int, low=0)
    sample_steps: int | None = option(None, "DDIM steps", int, low=1, high=1000)
    eta: float | None = option(None, "DDIM eta: 0 deterministic, 1 ancestral DDPM", float, low=0, high=1)
    spacing: str | None = option(
        None, "timesteps of the sampler, as in ddim or as in DiT", choices=("leading", "linspace")
    )
    clip_x0: bool = option(
        False, "clamp the predicted image at every step of the sampler, which the paper does not", bool
    )
    guidance: float | None = option(None, "scale of classifier-free guidance, 1: none", float, low=0)
    out: str | None = option(None, "folder of the run; by default runs/ and a name made from the settings")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "of the networks; losses and weights stay fp32", choices=PRECISIONS)
    compile: bool = option(False, "torch.compile the networks: slow to start, faster to run", bool)
    recompute: bool = option(False, "sd, mmdit: gradient checkpointing, less memory for a third more time", bool)
    fsdp: bool = option(False, "split the students over the processes (torch FSDP2), not only the batch", bool)
    accumulate: int = option(1, "parts in which a process takes its share of a batch, to save memory", int, low=1)
    log: str = option("jsonl", "log.jsonl, or another beside it", choices=("jsonl", "tensorboard", "wandb"))
    log_every: int = option(25, "steps between lines of log.jsonl", int, low=1)
    save_every: int = option(500, "steps between checkpoints", int, low=1)

    def __post_init__(self) -> None:
        if self.data is not None and self.dataset == "digits":
            object.__setattr__(self, "dataset", "folder")
        if self.process in FLOWS and self.eta is None:
            object.__setattr__(self, "eta", 0.0)
        known = [row["arch"] for row in PRESETS if row["dataset"] == self.dataset]
        if known and self.arch in (None, *known):
            for name, value in preset(self.dataset, self.prune, self.arch, self.fold_steps).items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        for item in fields(self):
            given = getattr(self, item.name)
            for value in given if isinstance(given, tuple) else () if given is None else (given,):
                check(flag(item.name), value, item.metadata)
        if self.arch not in known:
            raise ValueError(
                f"--arch {self.arch} has no preset for {self.dataset}, only {', '.join(dict.fromkeys(known))}"
            )
        for name in ("kd", "seeds"):
            if len(set(getattr(self, name))) != len(getattr(self, name)) or not getattr(self, name):
                raise ValueError(f"{flag(name)} takes one or more values, each named once")
        if self.process in FLOWS and (self.eta > 0 or self.fold_steps is not None or self.clip_x0):
            raise ValueError(
                f"--eta, --clip-x0 and --fold-steps are of DDPM's sampler, --process {self.process} has none of it"
            )
        if self.recompute and self.arch not in ("sd", "mmdit"):
            raise ValueError("--recompute is for --arch sd and mmdit; elsewhere --accumulate saves memory")
        if self.keep is not None and self.arch == "unet":
            raise ValueError("--keep names blocks of a transformer: use --prune, or --arch dit")
        drawn = ("--importance", self.importance) if self.arch == "unet" else ("--depth-method", self.depth_method)
        chosen = drawn[1] != "random" or self.student or self.keep or self.prune == 0
        if len(self.seeds) > 1 and self.dropout == 0 and self.init != "random" and chosen:
            raise ValueError(
                f"--seeds {' '.join(map(str, self.seeds))} would train the same student several times, for without "
                "dropout a seed draws nothing but random channels, blocks or weights: prune with "
                f"{drawn[0]} random, or use --init random, or one seed"
            )
        if self.fold_steps is not None:
            if unknown := [method for method in self.kd if method not in FOLDED]:
                raise ValueError(
                    f"--kd {unknown[0]} does not go with --fold-steps, where every method that has a teacher carries "
                    f"the last feature: choose from {', '.join(FOLDED)}"
                )
            if self.arch != "unet":
                raise ValueError(
                    "--fold-steps takes --arch unet: the variance that others predict is that of all steps"
                )
            if self.sample_steps > self.fold_steps:
                raise ValueError(
                    f"--sample-steps {self.sample_steps} cannot be used, a student of --fold-steps {self.fold_steps} "
                    f"has at most {self.fold_steps}"
                )
        if "none" in self.kd and self.lambda_diff == 0:
            raise ValueError(
                "--kd none learns from the data alone: with --fold-steps give --lambda-diff 1, or another above 0"
            )
        if 0 < self.eval_samples < 6:
            raise ValueError(f"--eval-samples {self.eval_samples} cannot be used, it must be 0 (none) or at least 6")
        if self.out is None:
            several = f"-{len(self.seeds)}seeds" if len(self.seeds) > 1 else ""
            what = f"keep{'.'.join(map(str, self.keep))}" if self.keep else f"prune{self.prune:g}"
            what = self.student if self.student in SD_STUDENTS else what
            arch = "" if self.arch == "unet" else f"-{self.arch}"
            what += "" if self.fold_steps is None else f"-fold{self.fold_steps}"
            what += "" if self.process == SHARED[self.dataset, self.arch]["process"] else f"-{self.process}"
            name = f"{self.dataset}{self.image_size or ''}{arch}-{what}-{'-'.join(self.kd)}{several}"
            object.__setattr__(self, "out", f"runs/{name}")


# Settings that a run may change without becoming another run: where it is and how it is watched; how it is evaluated.
FREE = {"out", "device", "log", "log_every", "save_every"}
EVALUATION = {"eval_samples", "sample_steps", "eta", "spacing", "clip_x0", "guidance", "vae"}


def flag(name: str) -> str:
    """The flag of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


LIMITS = (("low", ge, "at least"), ("above", gt, "above"), ("high", le, "at most"), ("below", lt, "below"))


def check(name: str, value: Any, limits: Any) -> None:
    """ValueError, with what would work, unless the value keeps the limits of its field."""
    choices = limits.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} {value} is not known, choose from {', '.join(choices)}{hint}")
    bounds = [(limits[key], compare, text) for key, compare, text in LIMITS if key in limits]
    if not all(compare(value, bound) for bound, compare, _ in bounds):
        wanted = " and ".join(f"{text} {bound}" for bound, _, text in bounds)
        raise ValueError(f"{name} {value} cannot be used, it must be {wanted}")


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON would give them back."""
    return json.loads(json.dumps(asdict(settings)))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"train.py: error: {message}\n")


def parse(argv: list[str] | None = None, description: str | None = None) -> Settings:
    """Settings from the command line of train.py; ends the program after --help and the like, and after a mistake."""
    parser = Parser("train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in fields(Settings):
        several = isinstance(item.default, tuple)
        default = " ".join(map(str, item.default)) if several else item.default
        default = default if default is not None else "preset" if item.name in preset("digits", 0) else "none"
        more = {"nargs": "+"} if several else {}
        choices = item.metadata.get("choices", ())
        text = f"{item.metadata['text']}{': ' * bool(choices)}{', '.join(choices)} [{default}]"
        more |= {"action": "store_true"} if item.metadata["kind"] is bool else {"type": item.metadata["kind"]}
        parser.add_argument(flag(item.name), help=text, default=argparse.SUPPRESS, **more)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--list-presets", action="store_true", help="print the table of presets and stop")
    given = vars(parser.parse_args(argv))
    listed, dry = given.pop("list_presets"), given.pop("dry_run")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        settings = Settings(**given)
    except ValueError as error:
        parser.error(str(error))
    if listed or dry:
        print(presets() if listed else json.dumps(plain(settings), indent=2))
        parser.exit(0)
    return settings


def presets() -> str:
    """The table of PRESETS, aligned."""
    rows = [
        COLUMNS,
        *([f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()] for row in PRESETS),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

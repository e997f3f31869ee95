"""The flags of train.py, and which of them do not go together. No torch, so that all this is quick.

Settings(dataset="celeba", prune=0.9)     # the preset of that row of the paper's table, every value resolved
parse(["--kd", "none", "place"])          # the same from a command line
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distil import presets
from distil.command import SEED, Parser, check_fields, flag, number_or_numbers, numbers, option
from distil.presets import ARCHS, METHODS, PRESETS, PROCESSES, SAMPLERS, SD_STUDENTS, SHAPE, SPACINGS, folded_to, preset


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
    vae: str | None = option(None, "of latents, to look at samples: folder or hub id; else the one that encoded them")
    image_size: int | None = option(None, "pixels; digits: 8 or 16", int, low=1, high=4096)
    flip: bool | None = option(None, "mirror half of the images of a step, left to right; not of digits", bool)
    prune: float = option(
        0.9, "share of each layer's channels, or dit: of the blocks, that goes", float, low=0, below=1
    )
    keep: tuple[int, ...] | None = option(
        None, "dit, mmdit: the blocks that stay, as 0,2,5: no --prune", numbers, low=0
    )
    depth_method: str | None = option(None, "dit, mmdit: which blocks stay", choices=presets.DEPTH_METHODS)
    depth_steps: int | None = option(None, "steps of choosing them with learned", int, low=1)
    importance: str | None = option(None, "which channels stay", choices=("taylor", "magnitude", "random"))
    taylor_threshold: float | None = option(
        None, "taylor stops where the loss is below this part of the largest", float, low=0, high=1
    )
    taylor_batch: int | None = option(None, "images that it looks at; without a preset a batch", int, low=1)
    taylor_steps: int | None = option(None, "timesteps that it looks at, evenly spaced; all", int, low=1)
    norm_groups: str | None = option(None, "of students: their number stays, or scales", choices=("keep", "scale"))
    head: str | None = option(None, "unet, dit: gives students back what norms erase", choices=("statistics",))
    kd: tuple[str, ...] = option(("place",), "methods, one or more", choices=tuple(METHODS))
    seeds: tuple[int, ...] = option(
        (0,), "one student per method and seed, which draws channels or blocks, and dropout", int, **SEED
    )
    seed: int = option(0, "of what all students share: teacher, order of the images, noise, timesteps", int, **SEED)
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
    teacher_norm_groups: int | None = option(None, "unet: groups of its norms; else of about 4 channels", int, low=1)
    process: str | None = option(None, "diffusion, and its prediction: noise, v or velocity", choices=tuple(PROCESSES))
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
    timesteps: str | None = option(None, "of a batch: in pairs t, T - 1 - t, or each alone", choices=presets.TIMESTEPS)
    dropout: float | None = option(None, "dropout of the students; the teacher predicts without", float, low=0, below=1)
    caption_dropout: float | None = option(None, "share of captions dropped, for guidance", float, low=0, below=1)
    lambda_diff: float | None = option(None, "weight of the diffusion loss", float, low=0)
    lambda_out: float | None = option(None, "weight of the output loss", float, low=0)
    lambda_feat: float | None = option(None, "weight of the feature loss", float, low=0)
    lambda_hidden: float = option(1.0, "with --fold-steps: weight of the last feature's distance", float, low=0)
    feat_stages: int | None = option(None, "equal parts of a run in which it falls to 0; 0: it stays", int, low=0)
    constants: str | None = option(None, "published setting whose constants the losses have", choices=presets.CONSTANTS)
    group_size: int = option(16, "K of place: elements per group", int, low=2)
    halve_group_size: int = option(0, "how often K is halved, after equal parts of the run", int, low=0, high=20)
    lift_per: str = option("channel", "lift: one line for each channel, or sample", choices=("channel", "sample"))
    norm: str | None = option(None, "coarse term l1 or l2, instead of the published one", choices=("l1", "l2"))
    schedule: str = option("adaptive", "w of lift and place", choices=presets.WEIGHTS)
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
    precision: str = option("auto", "of the networks; losses and weights stay fp32", choices=presets.PRECISIONS)
    teacher_precision: str | None = option(
        None, "of the frozen teacher, where not that of all networks", choices=("fp32", "bf16")
    )
    compile: bool = option(False, "torch.compile the networks: slow to start; on CPUs it gains nothing", bool)
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
        for name in ("data", "teacher", "student", "vae"):  # photos/ and ./photos are photos
            if os.path.exists(given := getattr(self, name) or ""):
                self._set(name, posixpath.normpath(given))
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
    def of_time(self) -> dict[str, Any]:
        """What these say of a process beside its kind."""
        return {name: getattr(self, name) for name in ("spacing", "clip_x0", "timesteps", "sampler")}

    @property
    def unused(self) -> set[str]:
        """What says how a teacher is trained here, where one is given or fetched. A checkpoint file holds weights
        alone: of its network they say the shape."""
        if self.teacher == "train":
            return set()
        return {"teacher_steps", "teacher_lr"} | (set() if Path(self.teacher).is_file() else {"channels", *SHAPE})

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
            of_ddpm = "--eta, --clip-x0, --sampler and --fold-steps are of DDPM"
            raise ValueError(f"{of_ddpm}, --process {self.process} has none of it")
        if self.sampler == "pndm" and (self.eta > 0 or self.fold_steps is not None or self.clip_x0):
            raise ValueError("--sampler pndm goes without --eta, --fold-steps and --clip-x0: use --sampler ddim")
        usual = preset(self.dataset, self.prune, self.arch, self.fold_steps)
        for names, read, whose in READ:
            for name in names if not read(self) else ():
                if getattr(self, name) not in (None, self.__dataclass_fields__[name].default, usual.get(name)):
                    raise ValueError(f"{flag(name)} {whose}: leave it out")
        if self.keep is not None and self.student is not None:
            raise ValueError("--keep names blocks of the teacher, and --student brings its own: give one of the two")
        drawn = ("--depth-method", self.depth_method)
        if ARCHS[self.arch].pruning == "channels":
            drawn = ("--importance", self.importance)
        chosen = drawn[1] != "random" or self.student or self.keep or self.prune == 0
        chosen = chosen and self.head is None and not SD_STUDENTS.get(self.student)  # these draw weights as well
        if len(self.seeds) > 1 and self.dropout == 0 and self.init != "random" and chosen:
            prune = "" if self.student or self.keep or self.prune == 0 else f"prune with {drawn[0]} random, or "
            raise ValueError(
                f"--seeds {' '.join(map(str, self.seeds))} would train the same student several times, for without "
                "dropout a seed draws nothing but random channels, blocks or weights: "
                f"{prune}use --init random, or one seed"
            )
        if self.group_size % (n := 2**self.halve_group_size) or self.group_size < 2 * n:
            raise ValueError(
                f"--halve-group-size {self.halve_group_size} cannot be used: groups of {self.group_size} elements "
                "must stay whole, and of at least 2"
            )
        if self.schedule == "learned" and self.fsdp:
            raise ValueError("--schedule learned does not go with --fsdp: use DDP, or another schedule")
        if self.fold_steps is not None:
            self._refuse_fold()
        if "none" in self.kd and self.lambda_diff == 0:
            raise ValueError("--kd none learns from the data alone: with --fold-steps give --lambda-diff 1")
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
        if ARCHS[self.arch].pruning != "channels":
            parts.append(self.arch)
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
                parts.append(f"{item.name}{'=' if isinstance(value, str) else ''}{brief(value)}")
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


# Which flags are read only sometimes, and when. Unread, another value than the usual one would name a run like another.
READ: tuple[tuple[tuple[str, ...], Callable[[Settings], bool], str], ...] = (
    (("importance", "norm_groups"), lambda s: ARCHS[s.arch].pruning == "channels",
     "is of a U-Net that loses channels, --arch unet"),
    (("channel_mults", "num_res_blocks", "teacher_norm_groups"), lambda s: ARCHS[s.arch].pruning != "blocks",
     "is of a U-Net, --arch unet"),
    (("keep", "depth_method"), lambda s: ARCHS[s.arch].pruning == "blocks",
     "is of a transformer that loses blocks, --arch dit or mmdit"),
    (("prune",), lambda s: s.keep is None, "says how many blocks go, and --keep which ones stay"),
    (("depth_steps",), lambda s: s.depth_method == "learned", "is of --depth-method learned"),
    (("taylor_threshold", "taylor_batch", "taylor_steps"), lambda s: s.importance == "taylor",
     "is of --importance taylor"),
    (("recompute",), lambda s: ARCHS[s.arch].text, "is for --arch sd and mmdit; elsewhere --accumulate saves memory"),
    (("caption_dropout",), lambda s: ARCHS[s.arch].text, "is for networks that read captions, --arch sd and mmdit"),
    (("head",), lambda s: not ARCHS[s.arch].text, "is for --arch unet and dit"),
    (("flip",), lambda s: s.dataset != "digits", "is not of digits, which mirrored are none"),
    (("lr_end",), lambda s: s.decay == "cosine", "is of --decay cosine"),
    (("lambda_hidden",), lambda s: s.fold_steps is not None, "is of --fold-steps"),
    (("fold_end",), lambda s: isinstance(s.fold_steps, int), "is of --fold-steps and a number"),
    (("schedule",), lambda s: {"lift", "place"} & {*s.kd}, "is of --kd lift and place"),
    (("halve_group_size",), lambda s: "place" in s.kd, "is of --kd place"),
    (("lift_per",), lambda s: "lift" in s.kd, "is of --kd lift"),
)  # fmt: skip


def once(config: dict[str, Any]) -> dict[str, Any]:
    """What a run of this config, perhaps of an older version, did before these settings could be chosen."""
    return {"fold_end": "last" if config.get("fold_steps") else None, "ema_warmup": True, "timesteps": "antithetic",
            "halve_group_size": 0, "lift_per": "channel", "sampler": "ddim"}  # fmt: skip


# Settings that a run may change without becoming another run: where it is, how it is watched, and fitted into memory;
# how it is evaluated.
FREE = {"out", "device", "log", "log_every", "save_every", "preview_every", "accumulate", "compile", "recompute"}
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


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON would give them back."""
    return json.loads(json.dumps(asdict(settings)))


def restored(config: dict[str, Any]) -> Settings:
    """The settings of which `plain` gave this, perhaps in an older version; ValueError for what cannot be used."""
    config = {**once(config), **config}
    if config.get("importance") != "taylor":  # which was 0 for all when nothing read it
        config["taylor_threshold"] = None
    known = {name: value for name, value in config.items() if name in Settings.__dataclass_fields__}
    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def parse(argv: list[str] | None = None) -> Settings:
    """Settings from the command line of train.py; ends the program after --help and the like, and after a mistake."""
    return parse_command(argv)[0]


def parse_command(argv: list[str] | None = None, description: str | None = None) -> tuple[Settings, bool]:
    """The same, and whether it is only a --dry-run."""
    parser = Parser("train.py", description)
    parser.add_options(Settings, tuple(PRESETS[0]), GROUPS)
    parser.add_argument("--dry-run", action="store_true", help="print the settings, the sizes, what is missing; stop")
    parser.add_argument("--list-presets", action="store_true", help="print the table of presets and stop")
    settings, asked = parser.read(argv, Settings, "dry_run", "list_presets")
    if asked["list_presets"]:
        print(presets.table())
        parser.exit(0)
    return settings, asked["dry_run"]

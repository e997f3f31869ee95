"""Networks of others, made to fit at the edge: what lies downstream only knows `net(x_t, t, cond)`.

    teacher = load("google/ddpm-ema-bedroom-256")     # a hub id, a diffusers folder, or a folder of our own
    teacher = public_teacher("cifar10")               # the checkpoint behind the paper's Table 1, downloaded once

diffusers' UNet2DModel becomes our own `UNet`, output for output, without diffusers, where that has all its settings,
and a `PixelUNet` elsewhere, which is saved as a diffusers folder again.
"""

import inspect
import json
import math
import os
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models
from distil import disk, machine
from distil.presets import PROCESSES, TEACHERS
from distil.process import DDPM, RectifiedFlow, process_of
from distil.text_to_image import HUB_ID, WEIGHTS, WRAPPERS, Diffusers, first_line
from models import FILES, DiT, Network, UNet, build, check_fit, read_weights

INSIDE = tuple(wrapper.folder for wrapper in WRAPPERS.values())  # where the network lies in a pipeline
SCHEDULERS = (  # where its settings lie, seen from a pipeline, old or new, and from the network in one
    "scheduler/scheduler_config.json", "scheduler_config.json", "../scheduler/scheduler_config.json",
)  # fmt: skip


def load(where: str | os.PathLike) -> Network:
    """The network `where`, on the CPU, in eval mode: a folder that `net.save` or diffusers wrote, or a hub id.

    UNet2DModel becomes our `UNet` or a `PixelUNet`, UNet2DConditionModel a `TextUNet`, SD3Transformer2DModel an
    `MMDiT`. A whole pipeline is taken by its network, whose `process` is then that of the pipeline's scheduler.
    FileNotFoundError: a file is missing or cannot be fetched. ValueError: one is damaged, or describes what we do not
    have. ImportError: it needs diffusers, and that is missing.
    """
    pipeline = Path(where)
    if not pipeline.exists() and HUB_ID.fullmatch(pipeline.as_posix()):
        pipeline = _from_hub(pipeline.as_posix())
    places = [pipeline, *(pipeline / name for name in INSIDE)]
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None:
        return models.load(pipeline)  # which says what is missing
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind is None:
            net = models.load(folder)
            process_of(net)  # refuses one that there is not
            return net
        ours = _unet_config(config)
        if ours is None and kind not in FOREIGN:
            raise ValueError(f"it is a {kind}, of diffusers only {', '.join(FOREIGN)} can be read")
        weights = _weights(folder)
        if ours is None:
            copies = {name: weights.pop(name).to(torch.float32, copy=True) for name in [*weights]}  # never all twice
            net = FOREIGN[kind].of(config, copies)
        else:
            net = build(UNet, ours, ddim_names(weights, len(ours["channel_mults"])))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith(f"{folder} "):
            raise
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from error
    scheduler = next((pipeline / file for file in SCHEDULERS if (pipeline / file).is_file()), None)
    net.process = config.get("_process", {}) if scheduler is None else _process(scheduler)  # our own students say it
    return net.eval()


# Of diffusers' schedulers: words for ours, and settings of which ours know but one value. What only concerns sampling
# (spacing, clipping, the order of a solver) is left to the flags of a run.
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
FIXED = {"rescale_betas_zero_snr": False, "trained_betas": None, "timestep_type": "discrete"}
FIXED_FLOW = {"use_dynamic_shifting": False, "num_train_timesteps": 1000}


def _process(file: Path) -> dict[str, Any]:
    """The process for which a pipeline was trained, by the settings of its scheduler, as `Network.process`.

    ValueError, which names the setting, for what no process here has.
    """
    config = json.loads(file.read_text())
    name = config.get("_class_name", "scheduler without a name")
    flow = name.startswith("FlowMatch")
    kind, process, fixed = ("flow", RectifiedFlow, FIXED_FLOW) if flow else ("ddpm", DDPM, FIXED)
    defaults = {key: argument.default for key, argument in inspect.signature(process).parameters.items()}
    if flow:
        said = {"shift": config.get("shift", 1.0)}
    else:
        words = {"beta_schedule": BETAS, "prediction_type": PREDICTIONS}
        config = {"prediction_type": "epsilon", **config}  # very old files do not say it
        if wrong := [key for key in words if config.get(key) not in words[key]]:
            raise ValueError(f"{file} describes a {name} whose {wrong[0]} is {config.get(wrong[0])!r}, "
                             f"of which only {', '.join(words[wrong[0]])} can be distilled")  # fmt: skip
        said = {"steps": config.get("num_train_timesteps", 1000), "schedule": BETAS[config["beta_schedule"]]}
        said |= {key: config.get(key, defaults[key]) for key in ("beta_start", "beta_end")}
        said["prediction"] = PREDICTIONS[config["prediction_type"]]
    if wrong := [key for key, value in fixed.items() if config.get(key, value) != value]:
        raise ValueError(f"{file} describes a {name} whose {wrong[0]} is {config[wrong[0]]!r}, "
                         f"of which only {fixed[wrong[0]]!r} can be distilled")  # fmt: skip
    for known, (its_kind, arguments) in PROCESSES.items():
        if its_kind == kind and {**defaults, **arguments} == {**defaults, **said}:
            return {"name": known}
    return {"name": kind} | {key: value for key, value in said.items() if value != defaults[key]}


def _weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a diffusers folder, of one file or of the shards that its index names, by their names of today;
    never unpickled."""
    for name in WEIGHTS:
        files, index = [name], folder / f"{name}.index.json"
        if not (folder / name).is_file() and index.is_file():
            files = sorted({*json.loads(index.read_text())["weight_map"].values()})
        elif not (folder / name).is_file():
            continue
        found = {key: tensor for file in files for key, tensor in read_weights(folder / file).items()}
        return {".".join(OLD_NAMES.get(part, part) for part in key.split(".")): found[key] for key in found}
    raise FileNotFoundError(f"{folder} has a config.json, but no {' and no '.join(WEIGHTS)}")


OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of diffusers before 0.15


def _from_hub(name: str) -> Path:
    """The folder into which huggingface_hub put the network of the model `name`."""
    absent = f"there is no folder {name}, and as a Hugging Face model it"
    hub = machine.library("huggingface_hub", absent, "huggingface_hub")
    sharded = WEIGHTS[0].replace(".safetensors", "-*-of-*.safetensors"), f"{WEIGHTS[0]}.index.json"
    for weights in ((FILES[0], WEIGHTS[0], *sharded), WEIGHTS[1:]):  # old models have no safetensors
        files = [f"{place}{file}" for place in ("", *(f"{i}/" for i in INSIDE)) for file in ("config.json", *weights)]
        try:
            folder = Path(hub.snapshot_download(name, allow_patterns=[*files, *SCHEDULERS[:2]]))
        except Exception as error:  # no network, in the words of any library, no such model, no such name
            raise FileNotFoundError(f"{absent} cannot be fetched: {first_line(error)}") from error
        if any(any(folder.glob(file)) for file in files if not file.endswith(".json")):
            return folder
    raise FileNotFoundError(f"{absent} holds no {FILES[0]} and no {' or '.join(WEIGHTS)}")


# Settings of UNet2DModel that `UNet` has not: the value that it needs, and diffusers' own default if that is another.
NEEDED = {
    "act_fn": "silu", "add_attention": True, "attn_norm_num_groups": None, "center_input_sample": False,
    "class_embed_type": None, "downsample_type": "conv", "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D", "num_class_embeds": None, "resnet_time_scale_shift": "default",
    "time_embedding_dim": None, "time_embedding_type": "positional", "upsample_type": "conv",
    "attention_head_dim": None,  # one head
    "downsample_padding": 0,  # below and to the right
    "flip_sin_to_cos": False,
    "freq_shift": 1,  # the lowest frequency is 1e-4
    "norm_eps": 1e-6,
}  # fmt: skip
DEFAULTS = {
    "attention_head_dim": 8, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
}  # fmt: skip
NAMES = (  # from diffusers' names to ddim's, one after the other; there the way up counts its levels down
    (r"^time_embedding\.linear_1\.", "temb.dense.0."), (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^conv_norm_out\.", "norm_out."), (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."), (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^(down|up)_blocks\.", r"\1."), (r"\.resnets\.", ".block."), (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."), (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."), (r"\.group_norm\.", ".norm."),
    (r"\.to_q\.", ".q."), (r"\.to_k\.", ".k."), (r"\.to_v\.", ".v."), (r"\.to_out\.0\.", ".proj_out."),
)  # fmt: skip


def _unet_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of the `UNet` that a config.json of diffusers describes; None if there is none."""
    size, widths = config.get("sample_size"), config.get("block_out_channels")
    downs, ups = config.get("down_block_types", []), config.get("up_block_types")
    attends = [{"DownBlock2D": False, "AttnDownBlock2D": True}.get(kind) for kind in downs]
    fits = [
        config["_class_name"] == "UNet2DModel",
        all(config.get(name, DEFAULTS.get(name, needed)) == needed for name, needed in NEEDED.items()),
        isinstance(size, int) and bool(widths) and not any(width % widths[0] for width in widths),
        bool(widths) and len(downs) == len(widths) and None not in attends,
        ups == [kind.replace("Down", "Up") for kind in downs[::-1]],
    ]
    if not all(fits):
        return None
    return {
        "image_size": size,
        **{name: config.get(name, 3) for name in ("in_channels", "out_channels")},
        "channels": widths[0],
        "channel_mults": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attention_resolutions": [size // 2**i for i, attention in enumerate(attends) if attention],
        "dropout": config.get("dropout", 0.0),
        "norm_groups": config.get("norm_num_groups", 32),
    }


def ddim_names(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The weights of a UNet2DModel with that many levels, under ddim's names."""
    renamed = {}
    for theirs, tensor in state.items():
        name = re.sub(r"(?<=^up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), theirs)
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        linear = tensor.ndim == 2 and ".attn" in name  # diffusers has linear layers where ddim has 1x1 convolutions
        renamed[name] = tensor[:, :, None, None] if linear else tensor
    return renamed


class PixelUNet(Diffusers):
    """diffusers' UNet2DModel of any settings, as it is; cond: y (B,) where it knows classes.

    Pruned it is a UNet2DModel of other settings: one width for each of the teacher's, all of them different, in whole
    heads of attention. The lowest frequencies of its timestep thin out with the first width.
    """

    arch, source, folder, asked = "unet", "UNet2DModel", "unet", ""
    blocks, last_layer, widths = (), "net.conv_out", {}

    def __init__(self, net: nn.Module):
        super().__init__(net)
        if (kind := self.config["class_embed_type"]) is not None:
            raise ValueError(f"its class_embed_type is {kind!r}: use one that counts classes")
        self.levels, self.num_classes = len(self.config["block_out_channels"]), self.config["num_class_embeds"]
        self.conditions = () if self.num_classes is None else ("y",)
        if isinstance(size := self.config["sample_size"], list | tuple):
            self.shape = (self.shape[0], *size)

    def fit(self, shape: tuple[int, ...], null: dict[str, Tensor] | None = None, dropout: float = 0.0) -> None:
        if self.config["sample_size"] is None:  # made for no size: as for any
            self.config["sample_size"] = list(shape[1:])
            self.net.register_to_config(sample_size=list(shape[1:]))
            self.shape = (self.shape[0], *shape[1:])
        Network.fit(self, shape)

    def feature_layers(self, other: Network | None = None) -> list[str]:
        """Every residual block, in running order."""
        names, parts = [name for name, _ in self.named_modules()], ("down_blocks", "mid_block", "up_blocks")
        return [name for part in parts for name in names if re.fullmatch(rf"net\.{part}\.(\d+\.)?resnets\.\d+", name)]

    def widths_left(self, ratio: float) -> dict[int, int]:
        """{width of a level: what is left of it}, whole groups and heads; in the same order, and no two alike."""
        groups, heads, left, before = self._groups(), self.config["attention_head_dim"] or 1, {}, 0
        for width in sorted({*self.config["block_out_channels"]}):
            unit = next(unit for unit in (math.lcm(groups, heads), groups, 1) if width % unit == 0)
            keep = width - (width - int(width * (1 - ratio))) // unit * unit
            left[width] = before = max(keep, (before // unit + 1) * unit)
        return left

    def _groups(self) -> int:
        return math.lcm(*(self.config[name] or 1 for name in GROUPS))

    def left(self, root: str, layers: list[nn.Module], channels: int, ratio: float) -> tuple[int, int, int]:
        left, first = self.widths_left(ratio), self.config["block_out_channels"][0]
        if root.startswith(("net.time_embedding.", "net.class_embedding.")):
            return 1, 1, channels * left[first] // first
        run = self.config["attention_head_dim"] or 1
        if re.search(r"\.to_[qkv]$", root):
            return 1, run, left[channels] // run
        groups = math.gcd(self._groups(), channels)
        return groups, 1, left.get(channels, channels) // groups

    def narrowed(self, ratio: float) -> "PixelUNet":
        left, state, config = self.widths_left(ratio), self.net.state_dict(), dict(self.config)
        widths = config["block_out_channels"]
        config["block_out_channels"] = [left[width] for width in widths]
        if config["time_embedding_dim"] is not None:
            config["time_embedding_dim"] = len(state["time_embedding.linear_1.weight"])
        if config["time_embedding_type"] == "positional":  # the nearest of its frequencies
            old, new, shift = widths[0] // 2, left[widths[0]] // 2, config["freq_shift"]
            kept = [round(i * (old - shift) / max(1, new - shift)) for i in range(new)]
            inputs = state["time_embedding.linear_1.weight"]  # (D, sines and cosines)
            state["time_embedding.linear_1.weight"] = inputs[:, [*kept, *(old + i for i in kept)]]
        try:
            return self.like(config, {name: tensor.clone() for name, tensor in state.items()})
        except ValueError as error:
            raise ValueError(f"a {self.source} like this cannot be pruned, give it a --student: {error}") from error

    def with_groups(self, groups: dict[str, int]) -> "PixelUNet":
        config, fewest = dict(self.config), min(groups.values())  # it has one number for all
        for name in GROUPS:
            if config[name] is not None:
                config[name] = max(n for n in range(1, fewest + 1) if config[name] % n == 0)
        return self.like(config, {name: tensor.clone() for name, tensor in self.net.state_dict().items()})


GROUPS = ("norm_num_groups", "attn_norm_num_groups")  # settings that hold numbers of groups
FOREIGN: dict[str, type[Diffusers]] = {**WRAPPERS, PixelUNet.source: PixelUNet}


def export_snippet(source: str, student: str, teacher: str) -> str:
    """Markdown: how the pipeline `teacher` takes the student in a folder, a network whose `source` is that."""
    return f"""```python
from diffusers import DiffusionPipeline, {source}

student = {source}.from_pretrained("{student}")
pipeline = DiffusionPipeline.from_pretrained("{teacher}", {FOREIGN[source].folder}=student)
image = pipeline({FOREIGN[source].asked}).images[0]
```"""


class Public(NamedTuple):
    """A public checkpoint: `kind(**config)` takes it."""

    file: str  # its name among the teachers
    url: str
    md5: str | None  # None: none is published
    config: dict[str, Any]
    hub: str | None = None  # the same network on the Hugging Face hub
    kind: type[Network] = UNet
    by_hand: bool = False  # the page at `url` is for people with a browser


# The paper's teachers, averaged weights. URL and md5 as in pesser/pytorch_diffusion, ckpt_util.py (converted from the
# DDPM release), for CelebA the link in the README of ermongroup/ddim, for ImageNet facebookresearch/DiT, download.py.
_CIFAR = {"image_size": 32, "channel_mults": (1, 2, 2, 2), "dropout": 0.1}
_LSUN = {"image_size": 256, "channel_mults": (1, 1, 2, 2, 4, 4)}
_HEIBOX, _DRIVE = "https://heibox.uni-heidelberg.de/f", "https://drive.google.com/file/d"
PUBLIC = {
    "celeba": Public("ddim_celeba.pth", f"{_DRIVE}/1R_H-fJYXSH79wfSKs9D-fuKQVan5L-GR/view", None,
                     {"image_size": 64, "dropout": 0.1}, by_hand=True),
    "cifar10": Public("ema_diffusion_cifar10_model-790000.ckpt", f"{_HEIBOX}/2e4f01e2d9ee49bab1d5/?dl=1",
                      "1fa350b952534ae442b1d5235cce5cd3", _CIFAR),
    "lsun_bedroom": Public("ema_diffusion_lsun_bedroom_model-2388000.ckpt", f"{_HEIBOX}/b95206528f384185889b/?dl=1",
                           "1921fa46b66a3665e450e42f36c2720f", _LSUN, "google/ddpm-ema-bedroom-256"),
    "lsun_church": Public("ema_diffusion_lsun_church_model-4432000.ckpt", f"{_HEIBOX}/44ccb50ef3c6436db52e/?dl=1",
                          "fdc68a23938c2397caba4a260bc2445f", _LSUN, "google/ddpm-ema-church-256"),
    "imagenet": Public("DiT-XL-2-256x256.pt", "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt", None,
                       {}, kind=DiT),
}  # fmt: skip


def public_teacher(dataset: str, cache: str | os.PathLike = TEACHERS) -> Network:
    """The public teacher of a data set of `PUBLIC`, downloaded into `cache` once, by one process; on the CPU, in eval
    mode. ValueError: another data set, a damaged file. OSError: the file cannot be had."""
    public, path, by_hand = find_public(dataset, cache)
    try:
        if not public.by_hand:
            download(public.url, path, public.md5)
    except (OSError, ValueError) as error:
        raise OSError(f"{error}; if that does not help, {by_hand}") from error
    try:
        weights = read_weights(path)
        with torch.device("meta"):  # a pruned network would also be one, by the shapes of its weights
            check_fit(public.kind(**public.config), weights)
        return build(public.kind, public.config, weights).eval()
    except ValueError as error:
        raise ValueError(f"{path} is no teacher for {dataset}: {error}") from error


def find_public(dataset: str, cache: str | os.PathLike = TEACHERS) -> tuple[Public, Path, str]:
    """The public teacher of a data set, its place in `cache`, and how to get it by hand. ValueError: none is known.
    FileNotFoundError: it is not there, and no program can fetch it."""
    if dataset not in PUBLIC:
        use = "use --teacher PATH or --teacher train"
        raise ValueError(f"no public teacher is known for {dataset}, only for {', '.join(PUBLIC)}: {use}")
    public = PUBLIC[dataset]
    path = Path(cache) / public.file
    others = f"--teacher {public.hub} or --teacher train" if public.hub else "--teacher train"
    by_hand = f"fetch {public.url} with a browser and give it as --teacher PATH (or put it at {path}), or use {others}"
    if public.by_hand and not path.is_file():
        raise FileNotFoundError(f"the public teacher for {dataset} cannot be downloaded by a program: {by_hand}")
    return public, path, by_hand


def download(url: str, path: Path, md5: str | None) -> None:
    """Fetches a checkpoint, unless `path` is there and right; it appears whole and checked, or not at all.
    OSError: the server cannot be reached. ValueError: a wrong checksum or, if none is known, no checkpoint."""
    from torchvision.datasets.utils import check_integrity

    if check_integrity(path, md5):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.whole(path) as part:
        try:
            torch.hub.download_url_to_file(url, str(part))
        except (OSError, HTTPException) as error:
            raise OSError(f"{url} cannot be downloaded: {error}") from error
        if not check_integrity(part, md5):
            raise ValueError(f"{url} sent {part.stat().st_size:,} bytes whose md5 is not {md5}; they were removed")
        if md5 is None:
            read_weights(part)  # a download that was cut off looks complete to torch.hub

"""Networks of others, made to fit at the edge: what lies downstream only knows `net(x_t, t, cond)`.

    teacher = load("google/ddpm-ema-bedroom-256")     # a hub id, a diffusers folder, or a folder of our own
    teacher = public_teacher("cifar10")               # the checkpoint behind the paper's Table 1, downloaded once

diffusers' UNet2DModel becomes our own `UNet`, output for output; diffusers itself is not needed for that.
"""

import hashlib
import json
import os
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor
from tqdm import tqdm

import models
from models import FILES, Network, UNet, _build, _read_weights


def load(where: str | os.PathLike) -> Network:
    """The network `where`, on the CPU, in eval mode: what `net.save(folder)` wrote, or diffusers' UNet2DModel.

    A whole diffusers pipeline is taken by its network. A name like "google/ddpm-ema-bedroom-256" that is no folder here
    is fetched from the Hugging Face hub.
    FileNotFoundError if a file is missing or cannot be fetched; ValueError if one is damaged, if the weights do not fit
    the config, or for a diffusers network that `UNet` cannot express.
    """
    folder = Path(where)
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", folder.as_posix()):
        folder = _from_hub(folder.as_posix())
    if not (folder / "config.json").is_file() and (folder / "unet" / "config.json").is_file():
        folder = folder / "unet"  # a whole diffusers pipeline
    try:
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
        if isinstance(config, dict) and "_class_name" in config:
            config = _diffusers_config(config)
            return _build(UNet, config, _diffusers_weights(folder, len(config["channel_mults"]))).eval()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    return models.load(folder)


# ---- The VAE of latent diffusion -------------------------------------------------------------------------------------


class Vae:
    """diffusers' AutoencoderKL: images (B, 3, H, W) to latents (B, channels, H / factor, W / factor) and back.

    where   a folder (also of a whole pipeline) or a Hugging Face id

    `record` names it and how its latents are scaled: latent = (posterior sample - shift) * scaling.
    ImportError without diffusers, with what to install; FileNotFoundError, ValueError if there is none at `where`.
    """

    def __init__(self, where: str | os.PathLike, device: torch.device | str = "cpu"):
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError("latents need diffusers: pip install -r requirements-diffusers.txt") from error
        folder = Path(where)
        if not folder.exists() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(where)):
            raise FileNotFoundError(f"--vae {where} is neither a folder nor a Hugging Face id such as owner/name")
        inside = {"subfolder": "vae"} if (folder / "vae" / "config.json").is_file() else {}
        try:
            self.net = AutoencoderKL.from_pretrained(str(where), use_safetensors=True, **inside)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"--vae {where} cannot be loaded: {str(error).splitlines()[0]}") from error
        self.net.requires_grad_(False).eval().to(device)
        config, digest = self.net.config, hashlib.sha256()
        for tensor in self.net.state_dict().values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.channels, self.factor = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self.scaling, self.shift = config.scaling_factor, config.shift_factor or 0.0
        self.record = {"vae": str(where), "fingerprint": digest.hexdigest()[:16]}
        self.record |= {"scaling": self.scaling, "shift": self.shift}

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Samples of the posterior, scaled: (B, 3, H, W) uint8, noise (B, channels, h, w) -> as noise, on the CPU."""
        x = images.to(self.net.device).float() / 127.5 - 1
        posterior = self.net.encode(x).latent_dist
        sample = posterior.mean + posterior.std * noise.to(x.device)
        return ((sample - self.shift) * self.scaling).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """Images (B, 3, H, W) float32, about [-1, 1], where the latents (B, channels, h, w) are."""
        x = latents / self.scaling + self.shift
        return torch.cat([self.net.decode(part.to(self.net.device)).sample.to(part) for part in x.split(batch)])

    def check(self, record: dict[str, Any]) -> None:
        """ValueError unless this VAE is the one of the `record` of latents (see data.encode)."""
        keys = [
            key for key in ("fingerprint", "scaling", "shift") if record.get(key, self.record[key]) != self.record[key]
        ]
        if keys:
            theirs, ours = (", ".join(f"{key} {r[key]}" for key in ("vae", *keys)) for r in (record, self.record))
            raise ValueError(
                f"the latents were made by another VAE ({theirs}) than this one ({ours}): name that with --vae"
            )


# ---- diffusers' UNet2DModel ------------------------------------------------------------------------------------------

# What diffusers' UNet2DModel can be told and `UNet` cannot: the value that `UNet` has, and below that diffusers' own
# default where it is another one.
DIFFUSERS_NEEDED = {
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": None,  # one head
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 0,  # below and to the right
    "downsample_type": "conv",
    "flip_sin_to_cos": False,
    "freq_shift": 1,  # the lowest frequency is 1e-4
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": 1e-6,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
DIFFUSERS_DEFAULTS = {
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
}
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DIFFUSERS_NAMES = (  # from diffusers' names to ddim's, one after the other; there the way up counts its levels down
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."),
    (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^(down|up)_blocks\.", r"\1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_q|query)\.", ".q."),  # the second name is that of diffusers before 0.15
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
)


def _diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the `UNet` that a config.json of diffusers describes; ValueError where there is none."""
    if config["_class_name"] != "UNet2DModel":
        raise ValueError(f"it is a {config['_class_name']}, of diffusers only UNet2DModel can be read")
    for name, needed in DIFFUSERS_NEEDED.items():
        value = config.get(name, DIFFUSERS_DEFAULTS.get(name, needed))
        if value != needed:
            raise ValueError(f"its setting {name} is {value!r}, but UNet only knows {needed!r}")
    size, widths = config.get("sample_size"), config.get("block_out_channels")
    if not isinstance(size, int) or not widths or any(width % widths[0] for width in widths):
        raise ValueError(
            f"UNet needs a sample_size, block_out_channels in multiples of the first, not {size}, {widths}"
        )
    downs, ups = config.get("down_block_types", []), config.get("up_block_types")
    attends = [{"DownBlock2D": False, "AttnDownBlock2D": True}.get(kind) for kind in downs]
    if len(downs) != len(widths) or None in attends or ups != [kind.replace("Down", "Up") for kind in downs[::-1]]:
        raise ValueError(f"UNet needs (Attn)DownBlock2D and, mirrored, (Attn)UpBlock2D, not {downs} and {ups}")
    return {
        "image_size": size,
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "channels": widths[0],
        "channel_mults": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attention_resolutions": [size // 2**i for i, attention in enumerate(attends) if attention],
        "dropout": config.get("dropout", 0.0),
        "norm_groups": config.get("norm_num_groups", 32),
    }


def _diffusers_weights(folder: Path, levels: int) -> dict[str, Tensor]:
    """The weights of a UNet2DModel with that many levels, under ddim's names."""
    if not (files := [folder / name for name in DIFFUSERS_FILES if (folder / name).is_file()]):
        raise FileNotFoundError(f"{folder} has a config.json, but no {' and no '.join(DIFFUSERS_FILES)}")
    state = {}
    for theirs, tensor in _read_weights(files[0]).items():
        name = re.sub(r"(?<=^up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), theirs)
        for pattern, ours in DIFFUSERS_NAMES:
            name = re.sub(pattern, ours, name)
        linear = tensor.ndim == 2 and ".attn" in name  # diffusers has linear layers where ddim has 1x1 convolutions
        state[name] = tensor[:, :, None, None] if linear else tensor
    return state


# ---- The hub ---------------------------------------------------------------------------------------------------------


def _from_hub(name: str) -> Path:
    """The folder into which huggingface_hub put the model `name`: its network and nothing else."""
    absent = f"there is no folder {name}, and as a Hugging Face model it"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(f"{absent} needs one more package: pip install huggingface_hub") from error
    for weights in ((FILES[0], DIFFUSERS_FILES[0]), DIFFUSERS_FILES[1:]):  # old models have no safetensors
        files = [f"{inside}{file}" for inside in ("", "unet/") for file in ("config.json", *weights)]
        try:
            folder = Path(snapshot_download(name, allow_patterns=files))
        except (OSError, ValueError) as error:  # no network, no such model, no such name
            raise FileNotFoundError(f"{absent} cannot be fetched: {str(error).splitlines()[0]}") from error
        if any((folder / file).is_file() for file in files if not file.endswith("config.json")):
            return folder
    raise FileNotFoundError(f"{absent} holds no {FILES[0]} and no {' or '.join(DIFFUSERS_FILES)}")


# ---- Public teachers -------------------------------------------------------------------------------------------------


class Public(NamedTuple):
    """A public checkpoint: `UNet(**unet)` takes it."""

    file: str  # its name among the teachers
    url: str
    md5: str | None  # None: the page at `url` is for people, so the file has to be fetched by hand
    unet: dict[str, Any]
    hub: str | None = None  # the same network on the Hugging Face hub


# The teachers of the paper's pixel experiments, averaged weights. URL and md5 as in pytorch_diffusion/ckpt_util.py of
# pesser/pytorch_diffusion (converted from the DDPM release), for CelebA the link in the README of ermongroup/ddim.
_LSUN = {"image_size": 256, "channel_mults": (1, 1, 2, 2, 4, 4)}
PUBLIC = {
    "celeba": Public(
        "ddim_celeba.pth",
        "https://drive.google.com/file/d/1R_H-fJYXSH79wfSKs9D-fuKQVan5L-GR/view",
        None,
        {"image_size": 64, "dropout": 0.1},
    ),
    "cifar10": Public(
        "ema_diffusion_cifar10_model-790000.ckpt",
        "https://heibox.uni-heidelberg.de/f/2e4f01e2d9ee49bab1d5/?dl=1",
        "1fa350b952534ae442b1d5235cce5cd3",
        {"image_size": 32, "channel_mults": (1, 2, 2, 2), "dropout": 0.1},
    ),
    "lsun_bedroom": Public(
        "ema_diffusion_lsun_bedroom_model-2388000.ckpt",
        "https://heibox.uni-heidelberg.de/f/b95206528f384185889b/?dl=1",
        "1921fa46b66a3665e450e42f36c2720f",
        _LSUN,
        "google/ddpm-ema-bedroom-256",
    ),
    "lsun_church": Public(
        "ema_diffusion_lsun_church_model-4432000.ckpt",
        "https://heibox.uni-heidelberg.de/f/44ccb50ef3c6436db52e/?dl=1",
        "fdc68a23938c2397caba4a260bc2445f",
        _LSUN,
        "google/ddpm-ema-church-256",
    ),
}


def public_teacher(dataset: str, cache: str | os.PathLike = "runs/teachers", progress: bool = True) -> UNet:
    """The public teacher of a data set of `PUBLIC`, downloaded into `cache` once; on the CPU, in eval mode.

    For one process at a time. ValueError for other data sets and damaged files; OSError, with what to do instead, where
    the file cannot be had.
    """
    if dataset not in PUBLIC:
        raise ValueError(
            f"no public teacher is known for {dataset}, only for {', '.join(PUBLIC)}: "
            "use --teacher PATH or --teacher train"
        )
    file, url, md5, config, hub = PUBLIC[dataset]
    path = Path(cache) / file
    others = f"--teacher {hub} or --teacher train" if hub else "--teacher train"
    by_hand = f"fetch {url} with a browser and give it as --teacher PATH (or put it at {path}), or use {others}"
    if md5 is not None:
        try:
            download(url, path, md5, progress)
        except (OSError, ValueError) as error:
            raise OSError(f"{error}; if that does not help, {by_hand}") from error
    elif not path.is_file():
        raise FileNotFoundError(f"the public teacher for {dataset} cannot be downloaded by a program: {by_hand}")
    try:
        return _build(UNet, config, _read_weights(path)).eval()
    except ValueError as error:
        raise ValueError(f"{path} is no teacher for {dataset}: {error}") from error


def download(url: str, path: str | os.PathLike, md5: str | None = None, progress: bool = True) -> None:
    """Fetches `url` to `path`, unless that file is there and right; goes on where an earlier attempt was cut off.

    The file grows as `path`.part and appears at `path` whole, with its checksum verified.
    OSError if the server cannot be reached or breaks off; ValueError for a wrong checksum, the file is then removed.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if path.is_file() and (md5 is None or _md5(path) == md5):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        total = _fetch(url, part, progress)
    except (OSError, HTTPException) as error:
        raise OSError(f"{url} cannot be downloaded: {error}") from error
    size = part.stat().st_size
    if total is not None and size < total:
        raise OSError(f"{url} broke off after {size:,} of {total:,} bytes: the same command goes on from there")
    if md5 is not None and (found := _md5(part)) != md5:
        part.unlink()
        raise ValueError(f"{url} sent {size:,} bytes with md5 {found} instead of {md5}; they were removed")
    os.replace(part, path)


def _fetch(url: str, part: Path, progress: bool) -> int | None:
    """Appends to `part` what it lacks of `url`. Returns how many bytes it should have then, None: not known."""
    start = part.stat().st_size if part.is_file() else 0
    try:
        with urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=60) as response:
            start = start if response.status == 206 else 0  # 200: the server sends everything once more
            length = response.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            label = part.name.removesuffix(".part")
            with (
                part.open("ab" if start else "wb") as file,
                tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=label, disable=not progress) as bar,
            ):
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            return total
    except HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return start  # nothing was missing: an earlier attempt ended just before the file got its name
        part.unlink()  # not the beginning of this file
        return _fetch(url, part, progress)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

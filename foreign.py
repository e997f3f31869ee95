"""Networks of others, made to fit at the edge: what lies downstream only knows `net(x_t, t, cond)`.

    teacher = load("google/ddpm-ema-bedroom-256")     # a hub id, a diffusers folder, or a folder of our own
    teacher = public_teacher("cifar10")               # the checkpoint behind the paper's Table 1, downloaded once
    student = bk_sdm(load("STABLE_DIFFUSION_2"), "base")      # 865.9 M -> 583.5 M, weights taken from the teacher
    student = prune_depth(load("STABLE_DIFFUSION_3"), 12)     # 2028 M -> 1009 M, of models.py
    student.save("student")                           # a diffusers folder: DiffusionPipeline takes it as it is

diffusers' UNet2DModel becomes our own `UNet`, output for output; diffusers itself is not needed for that. Its networks
that read text stay what they are, inside a `TextUNet` (Stable Diffusion 1 and 2) or an `MMDiT` (Stable Diffusion 3),
and need diffusers: `pip install -r requirements-diffusers.txt`.
"""

import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import tempfile
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
from diffusion import STABLE
from models import FILES, DiT, Network, UNet, _build, _check_fit, _read_weights


def load(where: str | os.PathLike) -> Network:
    """The network `where`, on the CPU, in eval mode: what `net.save(folder)` wrote, or a network of diffusers.

    UNet2DModel becomes our `UNet`, UNet2DConditionModel a `TextUNet`, SD3Transformer2DModel an `MMDiT`. A whole
    diffusers pipeline is taken by its network. A name like "google/ddpm-ema-bedroom-256" that is no folder here is
    fetched from the Hugging Face hub.
    FileNotFoundError if a file is missing or cannot be fetched; ValueError if one is damaged, if the weights do not fit
    the config, or for a diffusers network of another kind; ImportError if it needs diffusers, and that is missing.
    """
    folder = _find(where)
    if not (folder / "config.json").is_file():  # a whole diffusers pipeline?
        folder = next((folder / name for name in INSIDE if (folder / name / "config.json").is_file()), folder)
    try:
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
        if isinstance(config, dict) and config.get("_class_name") in WRAPPERS:
            state = {name: w.to(torch.float32, copy=True) for name, w in _diffusers_state(folder).items()}
            return WRAPPERS[config["_class_name"]].of(config, state).eval()
        if isinstance(config, dict) and "_class_name" in config:
            config = _diffusers_config(config)
            return _build(UNet, config, _diffusers_weights(folder, len(config["channel_mults"]))).eval()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    return models.load(folder)


def _find(where: str | os.PathLike) -> Path:
    """`where` as a folder: a name on the hub is fetched, unless a folder here has that name."""
    folder = Path(where)
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", folder.as_posix()):
        return _from_hub(folder.as_posix())
    return folder


def process_of(where: str | os.PathLike) -> str | None:
    """For which of `diffusion.PROCESSES` the pipeline `where` was trained, by its scheduler; None if it has none here.

    ValueError for a scheduler that none of them is.
    """
    file = _find(where) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    name = config.get("_class_name", "")
    if name.startswith("FlowMatch"):
        found = {1.0: "flow", 3.0: "sd3"}.get(config.get("shift", 1.0))
        found = None if config.get("use_dynamic_shifting") else found
    else:
        betas = tuple(config.get(key) for key in ("beta_start", "beta_end", "beta_schedule"))
        kinds = {"ddpm": (1e-4, 2e-2, "linear"), "sd": (STABLE["beta_start"], STABLE["beta_end"], "scaled_linear")}
        found = next((kind for kind, known in kinds.items() if betas == known), None)
        prediction = config.get("prediction_type", "epsilon")
        found = {("sd", "v_prediction"): "sd-v"}.get((found, prediction), found if prediction == "epsilon" else None)
    if found is None:
        raise ValueError(f"{file} describes a {name} with settings that no process here has")
    return found


def library(name: str, purpose: str) -> Any:
    """The optional library `name`; ImportError, in one sentence that says what installs it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name != name:
            raise
        raise ImportError(f"{purpose} needs {name}: pip install -r requirements-diffusers.txt") from error


# ---- The VAE of latent diffusion -------------------------------------------------------------------------------------


class Vae:
    """diffusers' AutoencoderKL: images (B, 3, H, W) to latents (B, channels, H / factor, W / factor) and back.

    where   a folder (also of a whole pipeline) or a Hugging Face id

    `record` names it and how its latents are scaled: latent = (posterior sample - shift) * scaling.
    ImportError without diffusers, with what to install; FileNotFoundError, ValueError if there is none at `where`.
    """

    def __init__(self, where: str | os.PathLike, device: torch.device | str = "cpu"):
        kind = library("diffusers", "a VAE").AutoencoderKL
        folder = Path(where)
        if not folder.exists() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(where)):
            raise FileNotFoundError(f"--vae {where} is neither a folder nor a Hugging Face id such as owner/name")
        inside = {"subfolder": "vae"} if (folder / "vae" / "config.json").is_file() else {}
        read = partial(kind.from_pretrained, str(where), use_safetensors=True)
        try:
            try:
                self.net = read(**inside)
            except OSError:  # on the hub it may be part of a pipeline
                if folder.exists():
                    raise
                self.net = read(subfolder="vae")
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
        known = ", ".join(["UNet2DModel", *WRAPPERS])
        raise ValueError(f"it is a {config['_class_name']}, of diffusers only {known} can be read")
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
    state = {}
    for theirs, tensor in _diffusers_state(folder).items():
        name = re.sub(r"(?<=^up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), theirs)
        for pattern, ours in DIFFUSERS_NAMES:
            name = re.sub(pattern, ours, name)
        linear = tensor.ndim == 2 and ".attn" in name  # diffusers has linear layers where ddim has 1x1 convolutions
        state[name] = tensor[:, :, None, None] if linear else tensor
    return state


def _diffusers_state(folder: Path) -> dict[str, Tensor]:
    """The weights in a diffusers folder, of one file or of the shards that its index names; never unpickled."""
    for name in DIFFUSERS_FILES:
        if (folder / name).is_file():
            return _read_weights(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            shards = sorted({*json.loads(index.read_text())["weight_map"].values()})
            return {key: tensor for shard in shards for key, tensor in _read_weights(folder / shard).items()}
    raise FileNotFoundError(f"{folder} has a config.json, but no {' and no '.join(DIFFUSERS_FILES)}")


# ---- diffusers' networks that read text ------------------------------------------------------------------------------


class Diffusers(Network):
    """A network of diffusers behind our call, `net(x_t, t, {"text": ..}) -> prediction`; `net.net` is that network.

    It computes in the dtype of its weights, so a frozen teacher may be bfloat16 throughout, and returns that of x_t.
    `config` is that of diffusers, with the names that our own networks have beside it.
    """

    kind: str  # its class in diffusers
    folder: str  # where it lies in a pipeline
    unit: int  # height and width of a sample must be multiples of it
    widths: dict[str, int]  # of what it reads, by the names in `conditions`
    largest: float = math.inf  # height and width of a sample

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.null = net, None
        self.config = {name: value for name, value in net.config.items() if not name.startswith("_")}
        self.shape = (self.config["in_channels"], self.config["sample_size"], self.config["sample_size"])

    def fit(self, shape: tuple[int, int, int], null: dict[str, Tensor], dropout: float) -> None:
        """Makes it a network for samples of `shape` (C, H, W), which may be of another size than its config says.

        null     the `cond` of one sample that stands for none: the embedding of the empty prompt
        dropout  the share of the samples of which training drops the captions

        ValueError if it cannot take such samples or such embeddings.
        """
        widths = {name: value.shape[-1] for name, value in null.items()}
        if widths != self.widths:
            raise ValueError(f"it reads embeddings of widths {self.widths}, but the data has {widths or 'none'}")
        if shape[0] != self.shape[0] or shape[1] % self.unit or shape[2] % self.unit:
            raise ValueError(
                f"it takes samples of {self.shape[0]} channels, height and width multiples of {self.unit}, not {shape}"
            )
        if max(shape[1:]) > self.largest:
            raise ValueError(f"it knows positions for a height and width of {self.largest} at most, not {shape[1:]}")
        self.shape, self.null, self.condition_dropout = tuple(shape), null, dropout

    def no_condition(self) -> dict[str, Tensor] | None:
        return self.null

    def smaller(self, config: dict[str, Any], state: dict[str, Tensor] | None) -> "Diffusers":
        """One with another config, for the same data; `state` holds its weights, which it takes as its own, or None."""
        if state is None:
            with torch.device(next(self.parameters()).device):
                net = self.of(config)
        else:
            net = self.of(config, state)
        net.shape, net.null, net.condition_dropout = self.shape, self.null, self.condition_dropout
        return net.to(next(self.parameters()).dtype).train(self.training)

    @classmethod
    def of(cls, config: dict[str, Any], state: dict[str, Tensor] | None = None) -> "Diffusers":
        """A new one of diffusers' settings (those not given are its defaults), with random weights or with `state`."""
        network = getattr(library("diffusers", f"a {cls.kind}"), cls.kind)
        known = inspect.signature(network.__init__).parameters
        settings = {name: value for name, value in config.items() if name in known}
        if state is None:
            return cls(network(**settings))
        with torch.device("meta"):
            net = network(**settings)
        _check_fit(net, state)
        net.load_state_dict(state, assign=True)
        return cls(net.requires_grad_(True))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a diffusers folder: `load` gives the network back bit for bit, and pipelines of diffusers take it.

        Each file appears whole or not at all, config.json last: a new folder without it is unfinished.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as parts:
            self.net.save_pretrained(parts, max_shard_size="1TB")
            for name in sorted(os.listdir(parts), key=lambda name: name == "config.json"):
                shutil.copymode(Path(parts) / "config.json", Path(parts) / name)  # the weights would be for us alone
                os.replace(Path(parts) / name, folder / name)

    def checkpoint(self, enable: bool = True) -> None:
        """Gradient checkpointing: activations inside the blocks are computed again in the backward pass, not kept."""
        (self.net.enable_gradient_checkpointing if enable else self.net.disable_gradient_checkpointing)()

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """x_t (B, C, H, W), t (B,), cond with the tensors of `conditions` -> (B, out_channels, H, W)."""
        if set(cond or {}) != set(self.conditions):
            given = ", ".join(cond) if cond else "nothing"
            raise ValueError(f"a {self.kind} needs cond with {' and '.join(self.conditions)}, but got {given}")
        dtype = next(self.net.parameters()).dtype
        return self.run(x_t.to(dtype), t, **{name: value.to(dtype) for name, value in cond.items()}).to(x_t.dtype)

    def feature(self, output: Tensor | tuple) -> Tensor:
        """The feature in what a layer of `feature_layers` returns: the image's, not the text's."""
        raise NotImplementedError


class TextUNet(Diffusers):
    """diffusers' UNet2DConditionModel, the network of Stable Diffusion 1 and 2; cond: text (B, L, D) of its encoder.

    Its prediction is the noise, or the v of the models that are trained so; the process has to be told which.
    """

    kind, folder, conditions = "UNet2DConditionModel", "unet", ("text",)

    @property
    def unit(self) -> int:
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def widths(self) -> dict[str, int]:
        return {"text": self.config["cross_attention_dim"]}

    def run(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.net(x_t, t, encoder_hidden_states=text, return_dict=False)[0]

    def stages(self) -> list[nn.Module]:
        stages = [*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks]
        return [stage for stage in stages if stage is not None]

    def feature_layers(self, other: "TextUNet | None" = None) -> list[str]:
        """Names of the layers whose outputs are compared with those of `other`, in BK-SDM and its successors' order.

        Same widths: every stage of the way down and up, 8 for Stable Diffusion. Against a network with fewer stages
        its innermost one way down is compared before its downsampling, at the last attention's proj_out, and of the way
        up the last ones. Other widths (C_*): all down- and upsampling convolutions, the last convolution on the way
        down, the last attentions of the middle and of the way up: 9.
        """
        other = self if other is None else other
        mine, theirs = (list(net.net.config.block_out_channels) for net in (self, other))
        layers, n = self.net.config.layers_per_block, len(mine)
        if mine[: len(theirs)] != theirs[: len(mine)]:
            names = [f"down_blocks.{i}.downsamplers.0.conv" for i in range(n - 1)]
            names += [f"down_blocks.{n - 1}.resnets.{layers - 1}.conv2", "mid_block.attentions.0.proj_out"]
            names += [f"up_blocks.{i}.upsamplers.0.conv" for i in range(n - 1)]
            names += [f"up_blocks.{n - 1}.attentions.{layers}.proj_out"]
        else:
            k = min(n, len(theirs))
            names = [f"down_blocks.{i}" for i in range(k)] + [f"up_blocks.{i}" for i in range(n - k, n)]
            if n != len(theirs):
                names[k - 1] = f"down_blocks.{k - 1}.attentions.{layers - 1}.proj_out"
        return [f"net.{name}" for name in names]

    def feature(self, output: Tensor | tuple) -> Tensor:
        output = output[0] if isinstance(output, tuple) else output  # a stage on the way down also returns its skips
        # Stable Diffusion 2 has a linear layer as proj_out: (B, HW, C) -> (B, C, HW, 1)
        return output.transpose(1, 2)[..., None] if output.ndim == 3 else output


# The students of BK-SDM (https://arxiv.org/abs/2305.15798) lose the second of two layers in every stage; "small" also
# loses the middle, "tiny" the innermost stages as well. Those called C_* keep all layers and have these widths instead.
BK_SDM = ("base", "small", "tiny")
NARROW = {
    "C_base": (256, 512, 1024, 1024),
    "C_small": (224, 448, 896, 896),
    "C_tiny": (192, 384, 768, 768),
    "C_micro": (160, 320, 640, 640),
    "C_extreme": (128, 256, 512, 512),
}


def bk_sdm(net: TextUNet, size: str) -> TextUNet:
    """A smaller, independent student of a Stable Diffusion 1 or 2 network.

    size   "base", "small" or "tiny": every weight is the teacher's, by the published rules (on the way up the last of
           three layers takes the place of the second); or a key of `NARROW`: random weights.

    On the meta device it tells the size without weights: Stable Diffusion 2.1, 865.9 M, becomes 583.5, 485.8, 326.8 M.
    The copy has the device, dtype and mode of `net`; all its parameters are trainable. ValueError for another `size`,
    and for a network that is not built like Stable Diffusion's (two layers per stage, four stages, a middle).
    """
    if not isinstance(net, TextUNet):
        raise ValueError(f"bk_sdm takes a network of Stable Diffusion 1 or 2, not a {type(net).__name__}")
    config, state = {**net.net.config}, net.net.state_dict()
    if size not in (*BK_SDM, *NARROW):
        raise ValueError(f"{size} is no student of BK-SDM, choose from {', '.join((*BK_SDM, *NARROW))}")
    widths = config["block_out_channels"]
    if config["layers_per_block"] != 2 or len(widths) != 4 or config["mid_block_type"] is None:
        raise ValueError(
            "bk_sdm takes a whole Stable Diffusion (4 stages of 2 layers and a middle), not "
            f"{len(widths)} stages of {config['layers_per_block']}, middle {config['mid_block_type']}"
        )
    if size in NARROW:
        heads = config["attention_head_dim"]  # diffusers' word for the number of heads
        heads = [heads] * 4 if isinstance(heads, int) else heads
        config["attention_head_dim"] = [
            next(n for n in range(most, 0, -1) if width % n == 0)  # not every width divides by the teacher's number
            for most, width in zip(heads, NARROW[size], strict=True)
        ]
        return net.smaller({**config, "block_out_channels": NARROW[size]}, None)

    config["layers_per_block"] = 1
    if size != "base":
        config["mid_block_type"] = None
    if size == "tiny":
        config = {name: value[:3] if isinstance(value, (list, tuple)) else value for name, value in config.items()}
        config["up_block_types"] = net.net.config["up_block_types"][1:]
    with torch.device("meta"):
        names = TextUNet.of(config).net.state_dict()
    taken = {}
    for name in names:
        theirs = re.sub(r"^(up_blocks\.\d\.\w+)\.1\.", r"\1.2.", name)
        if size == "tiny":
            theirs = re.sub(r"^up_blocks\.(\d)", lambda stage: f"up_blocks.{int(stage[1]) + 1}", theirs)
        taken[name] = state[theirs].clone()
    return net.smaller(config, taken)


class MMDiT(Diffusers):
    """diffusers' SD3Transformer2DModel, the network of Stable Diffusion 3 and 3.5; it predicts the velocity.

    cond: text (B, L, joint_attention_dim), the tokens of all encoders, and pooled (B, pooled_projection_dim).
    """

    kind, folder, conditions = "SD3Transformer2DModel", "transformer", ("text", "pooled")
    text_tokens = 77 + 256  # of CLIP and of T5, as the pipeline gives them

    @property
    def unit(self) -> int:
        return self.config["patch_size"]

    @property
    def largest(self) -> int:
        return self.config["patch_size"] * self.config["pos_embed_max_size"]

    @property
    def widths(self) -> dict[str, int]:
        return {"text": self.config["joint_attention_dim"], "pooled": self.config["pooled_projection_dim"]}

    def run(self, x_t: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        inputs = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t}
        return self.net(x_t, **inputs, return_dict=False)[0]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.net.transformer_blocks

    def keep_blocks(self, keep: list[int]) -> "MMDiT":
        """An independent MMDiT of these blocks, in this order; `models.prune_depth` checks them and calls this.

        The last block does not update the text, for nobody reads it after that, so it has fewer weights. Where another
        one becomes the last it loses those weights too: the result computes exactly what the kept blocks compute, and
        its config describes it.
        """
        config, blocks = {**self.net.config}, len(self.blocks)
        config["num_layers"] = len(keep)
        config["dual_attention_layers"] = [new for new, i in enumerate(keep) if i in config["dual_attention_layers"]]
        state = {name: w for name, w in self.net.state_dict().items() if not name.startswith("transformer_blocks.")}
        for new, i in enumerate(keep):
            block = self.blocks[i].state_dict()
            block = _without_text_output(block) if i == keep[-1] < blocks - 1 else block
            state |= {f"transformer_blocks.{new}.{name}": tensor for name, tensor in block.items()}
        return self.smaller(config, {name: tensor.clone() for name, tensor in state.items()})

    def feature_layers(self) -> list[str]:
        """Names of the layers whose outputs feature distillation compares: the blocks."""
        return [f"net.transformer_blocks.{i}" for i in range(len(self.blocks))]

    def feature(self, output: tuple) -> Tensor:
        return output[1]  # a block returns the tokens of the text, or None, and those of the image, (B, N, D)


def memory(teacher: Diffusers, student: Diffusers, processes: int = 1) -> dict[str, float]:
    """Bytes that a step of distillation keeps on each GPU, from the sizes alone: both may be on the meta device.

    teacher     2 a parameter: frozen, bfloat16
    student     20 a parameter: weights, gradients, two moments of AdamW and the average, all float32; --fsdp splits
                them over `processes`
    copies      2 a parameter: the student's weights as autocast casts them, which the backward pass reads
    activation  for each image of the batch, of an MMDiT with --recompute: 2 (B, N, D) tensors in bfloat16 for each
                block and 28 for the one that is computed again, N tokens of image and text; 0 of a U-Net: not known
    """
    sizes = [sum(p.numel() for p in net.parameters()) for net in (teacher, student)]
    activation = 0
    if isinstance(student, MMDiT):
        tokens = student.shape[1] * student.shape[2] // student.unit**2 + MMDiT.text_tokens
        width = student.config["num_attention_heads"] * student.config["attention_head_dim"]
        activation = 2 * tokens * width * (2 * len(student.blocks) + 28)
    return {
        "teacher": 2 * sizes[0],
        "student": 20 * sizes[1] / processes,
        "copies": 2 * sizes[1],
        "activation": activation,
    }


def _without_text_output(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an MMDiT block for the last place, where it reads the text and does not update it."""
    state = {name: w for name, w in block.items() if not name.startswith(("ff_context.", "attn.to_add_out."))}
    for name in ("norm1_context.linear.weight", "norm1_context.linear.bias"):
        shift, scale = block[name].chunk(6)[:2]  # of shift, scale, gate around the attention, and again around the MLP
        state[name] = torch.cat([scale, shift])  # the last block's norm has them the other way round
    return state


WRAPPERS: dict[str, type[Diffusers]] = {wrapper.kind: wrapper for wrapper in (TextUNet, MMDiT)}
EXPORT = {  # how a pipeline of diffusers takes a student, by --arch
    arch: f"""```python
from diffusers import DiffusionPipeline, {wrapper.kind}

student = {wrapper.kind}.from_pretrained("{{student}}")
pipeline = DiffusionPipeline.from_pretrained("{{teacher}}", {wrapper.folder}=student)
image = pipeline("a photograph of an astronaut riding a horse").images[0]
```"""
    for arch, wrapper in {"sd": TextUNet, "mmdit": MMDiT}.items()
}
INSIDE = tuple(wrapper.folder for wrapper in WRAPPERS.values())  # where the network lies in a pipeline


# ---- The text encoders of a pipeline ---------------------------------------------------------------------------------


class TextEncoder:
    """The tokenizers and text encoders of a Stable Diffusion pipeline: prompts to the `cond` of its network.

    where  a diffusers pipeline, a folder or a Hugging Face id; of it only what belongs to the text is read
    t5     False leaves out the largest encoder of Stable Diffusion 3 (4.8 B parameters); the pipeline's rule for that
           is zeros in the place of its tokens

    `shapes` says what `encode` gives for one prompt, {"text": (L, D)} and for Stable Diffusion 3 also {"pooled": (P,)}.
    Without T5 all but the corner `stored` (L', D') of the text is zero. `record` names it all.
    ImportError without diffusers or transformers; ValueError if there are no text encoders at `where`.
    """

    def __init__(self, where: str | os.PathLike, device: torch.device | str = "cpu", t5: bool = True):
        diffusers = library("diffusers", "embedding text")
        library("transformers", "embedding text")
        self.device = torch.device(device)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        try:
            index = diffusers.DiffusionPipeline.load_config(str(where))
            kind = next((kind for kind in WRAPPERS.values() if index.get(kind.folder, [0, 0])[1] == kind.kind), None)
            if kind is None or "text_encoder" not in index:
                raise ValueError("it is no pipeline of Stable Diffusion")
            network = getattr(diffusers, kind.kind)
            with torch.device("meta"):  # the pipeline only asks it for its settings
                net = network.from_config(network.load_config(str(where), subfolder=kind.folder))
            unused = {"vae", "safety_checker", "feature_extractor", "image_encoder", *(() if t5 else T5)} & {*index}
            self.pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(where),
                **{kind.folder: net},
                **dict.fromkeys((*unused, *(name for name in T5 if index.get(name) == [None, None]))),
            )
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{where} has no text encoders that can be read: {str(error).splitlines()[0]}") from error
        parts = {
            name: part for name, part in self.pipeline.components.items() if name.startswith("text_encoder") and part
        }
        digest = hashlib.sha256()
        for part in parts.values():
            part.requires_grad_(False).eval().to(self.device, dtype)
            for tensor in part.state_dict().values():
                digest.update(str(tensor.flatten()[:1000].to("cpu", torch.bfloat16).tolist()).encode())
        self.kind = kind
        self.shapes = {name: tuple(value.shape[1:]) for name, value in self.encode([""]).items()}
        self.stored = self.shapes["text"]
        if kind is MMDiT and T5[0] not in parts:
            widths = [part.config.hidden_size for part in parts.values()]
            self.stored = (self.pipeline.tokenizer_max_length, sum(widths))
        self.record = {"text": str(where), "text_encoders": sorted(parts), "text_fingerprint": digest.hexdigest()[:16]}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The `cond` of these prompts, float32 on the CPU: text (B, L, D) and, where the network has it, pooled (B, P).

        As the pipeline itself does it: padded to a fixed length, the rest of a long prompt cut off.
        """
        if self.kind is MMDiT:
            text, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, None, None, device=self.device, do_classifier_free_guidance=False
            )
            return {"text": text.float().cpu(), "pooled": pooled.float().cpu()}
        return {"text": self.pipeline.encode_prompt(prompts, self.device, 1, False)[0].float().cpu()}


class ClipScore:
    """The mean cosine between the CLIP embeddings of images and of their prompts.

    where  a CLIP model of transformers, folder or hub id; the paper's is laion/CLIP-ViT-g-14-laion2B-s34B-b88K

    ImportError without transformers; ValueError for a model that cannot be read.
    """

    def __init__(self, where: str | os.PathLike, device: torch.device | str = "cpu"):
        transformers = library("transformers", "the CLIP score")
        try:
            self.model = transformers.CLIPModel.from_pretrained(str(where)).eval().to(device)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(where))
            self.processor = transformers.CLIPImageProcessor.from_pretrained(str(where))
        except (OSError, ValueError) as error:
            raise ValueError(f"--clip {where} cannot be loaded: {str(error).splitlines()[0]}") from error

    @torch.no_grad()
    def __call__(self, images: Any, prompts: list[str]) -> float:
        """images (n, 3, H, W) uint8, an array; n prompts."""
        total, longest = 0.0, self.model.config.text_config.max_position_embeddings
        for first in range(0, len(prompts), 64):
            some = slice(first, first + 64)
            tokens = self.tokenizer(
                prompts[some], padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            pixels = self.processor(list(images[some].transpose(0, 2, 3, 1)), return_tensors="pt")
            output = self.model(**tokens.to(self.model.device), **pixels.to(self.model.device))
            total += (output.image_embeds * output.text_embeds).sum().item()  # both of length 1
        return total / len(prompts)


T5 = ("text_encoder_3", "tokenizer_3")  # in a pipeline of Stable Diffusion 3


# ---- The hub ---------------------------------------------------------------------------------------------------------


def _from_hub(name: str) -> Path:
    """The folder into which huggingface_hub put the model `name`: its network and nothing else."""
    absent = f"there is no folder {name}, and as a Hugging Face model it"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(f"{absent} needs one more package: pip install huggingface_hub") from error
    sharded = DIFFUSERS_FILES[0].replace(".safetensors", "-*-of-*.safetensors"), f"{DIFFUSERS_FILES[0]}.index.json"
    for weights in ((FILES[0], DIFFUSERS_FILES[0], *sharded), DIFFUSERS_FILES[1:]):  # old models have no safetensors
        files = [f"{place}{file}" for place in ("", *(f"{i}/" for i in INSIDE)) for file in ("config.json", *weights)]
        files.append("scheduler/scheduler_config.json")
        try:
            folder = Path(snapshot_download(name, allow_patterns=files))
        except (OSError, ValueError) as error:  # no network, no such model, no such name
            raise FileNotFoundError(f"{absent} cannot be fetched: {str(error).splitlines()[0]}") from error
        if any(any(folder.glob(file)) for file in files if not file.endswith(".json")):
            return folder
    raise FileNotFoundError(f"{absent} holds no {FILES[0]} and no {' or '.join(DIFFUSERS_FILES)}")


# ---- Public teachers -------------------------------------------------------------------------------------------------


class Public(NamedTuple):
    """A public checkpoint: `kind(**config)` takes it."""

    file: str  # its name among the teachers
    url: str
    md5: str | None  # None: none is published
    config: dict[str, Any]
    hub: str | None = None  # the same network on the Hugging Face hub
    kind: type[Network] = UNet
    by_hand: bool = False  # the page at `url` is for people, so the file has to be fetched with a browser


# The paper's teachers, averaged weights. URL and md5 as in pytorch_diffusion/ckpt_util.py of pesser/pytorch_diffusion
# (converted from the DDPM release), for CelebA the link in the README of ermongroup/ddim, for ImageNet download.py of
# facebookresearch/DiT.
_LSUN = {"image_size": 256, "channel_mults": (1, 1, 2, 2, 4, 4)}
PUBLIC = {
    "celeba": Public(
        "ddim_celeba.pth",
        "https://drive.google.com/file/d/1R_H-fJYXSH79wfSKs9D-fuKQVan5L-GR/view",
        None,
        {"image_size": 64, "dropout": 0.1},
        by_hand=True,
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
    "imagenet": Public(
        "DiT-XL-2-256x256.pt", "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt", None, {}, kind=DiT
    ),
}


def public_teacher(dataset: str, cache: str | os.PathLike = "runs/teachers", progress: bool = True) -> Network:
    """The public teacher of a data set of `PUBLIC`, downloaded into `cache` once; on the CPU, in eval mode.

    For one process at a time. ValueError for other data sets and damaged files; OSError, with what to do instead, where
    the file cannot be had.
    """
    if dataset not in PUBLIC:
        raise ValueError(
            f"no public teacher is known for {dataset}, only for {', '.join(PUBLIC)}: "
            "use --teacher PATH or --teacher train"
        )
    file, url, md5, config, hub, kind, people_only = PUBLIC[dataset]
    path = Path(cache) / file
    others = f"--teacher {hub} or --teacher train" if hub else "--teacher train"
    by_hand = f"fetch {url} with a browser and give it as --teacher PATH (or put it at {path}), or use {others}"
    if not people_only:
        try:
            download(url, path, md5, progress)
        except (OSError, ValueError) as error:
            raise OSError(f"{error}; if that does not help, {by_hand}") from error
    elif not path.is_file():
        raise FileNotFoundError(f"the public teacher for {dataset} cannot be downloaded by a program: {by_hand}")
    try:
        return _build(kind, config, _read_weights(path)).eval()
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

"""Stable Diffusion 1, 2 and 3: its networks behind our call, students, its VAE and text encoders, the CLIP score.

    student = bk_sdm(teachers.load("STABLE_DIFFUSION_2"), "base")      # 865.9 M -> 583.5 M, weights of the teacher
    student = prune_depth(teachers.load("STABLE_DIFFUSION_3"), 12)     # 2028 M -> 1009 M, of models.py

All this needs diffusers: `pip install -e ".[sd]"`. Its argument names are known in this file only.
"""

import contextlib
import inspect
import json
import math
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from distil import disk, machine, pictures
from distil.presets import SD_STUDENTS
from models import Network, check_fit, fingerprint, sealed

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name
INSTALL = '-e ".[sd]"'
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # in a diffusers folder
# from our names to diffusers'
ARGUMENTS = {"text": "encoder_hidden_states", "pooled": "pooled_projections", "y": "class_labels"}
ENCODED, DECODED = 2**22, 2**20  # pixels that a VAE is given at once, and gives: 64 and 16 images of 256x256
T5 = ("text_encoder_3", "tokenizer_3")  # in a pipeline of Stable Diffusion 3


class Diffusers(Network):
    """A network of diffusers, `net`, behind our call. It computes in the dtype of its weights, and returns x_t's."""

    folder: str  # where it lies in a pipeline
    asked: str = '"a photograph of an astronaut riding a horse"'  # what its pipeline is called with
    unit: int  # height and width of a sample must be multiples of it
    largest: float = math.inf  # and not above this
    widths: dict[str, int]  # of what it reads, by the names in `conditions`
    drops = ".resnets."  # stands in the names of the layers that the setting `dropout` of a U-Net is for

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.null = net, None
        self.config = {name: value for name, value in net.config.items() if not name.startswith("_")}
        self.shape = (self.config["in_channels"], self.config["sample_size"], self.config["sample_size"])
        self.predicts_variance = self.config["out_channels"] == 2 * self.config["in_channels"]

    @classmethod
    def of(cls, config: dict[str, Any], state: dict[str, Tensor] | None = None) -> "Diffusers":
        """A new one of diffusers' settings, where given, with random weights or with `state`."""
        network = getattr(machine.library("diffusers", f"a {cls.source}", INSTALL), cls.source)
        known = inspect.signature(network.__init__).parameters
        settings = {name: value for name, value in config.items() if name in known}
        if state is None:
            return cls(network(**settings))
        with torch.device("meta"):
            net = network(**settings)
        check_fit(net, state)
        net.load_state_dict(state, assign=True)
        if lost := [name for name, value in net.named_buffers() if value.is_meta and name not in state]:
            raise ValueError(f"its {lost[0]} is computed and not saved, which is not known here: use other blocks")
        return cls(net.requires_grad_(True))

    def like(self, config: dict[str, Any], state: dict[str, Tensor] | None = None) -> "Diffusers":
        """As `Network.like`, in the same dtype and for the same data; without `state` its weights are random."""
        with torch.device(next(self.parameters()).device):
            net = self.of(config, state)
        net.shape, net.process = self.shape, self.process
        net.null, net.condition_dropout = self.null, self.condition_dropout
        return net.to(next(self.parameters()).dtype).train(self.training)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """x_t (B, C, H, W), t (B,), cond with the tensors of `conditions` -> (B, out_channels, H, W)."""
        if set(cond or {}) != set(self.conditions):
            given = ", ".join(cond or ["nothing"])
            raise ValueError(f"a {self.source} needs cond with {' and '.join(self.conditions)}, but got {given}")
        dtype = next(self.net.parameters()).dtype
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in (cond or {}).items()}
        inputs = {ARGUMENTS[name]: value for name, value in inputs.items()}
        return self.net(x_t.to(dtype), timestep=t, **inputs, return_dict=False)[0].to(x_t.dtype)

    def fit(self, shape: tuple[int, ...], null: dict[str, Tensor] | None = None, dropout: float = 0.0) -> None:
        """As `Network.fit`; `shape` may be another size than its config says, `null` embeds the empty prompt."""
        widths = {name: value.shape[-1] for name, value in (null or {}).items()}
        channels, unit, largest = self.shape[0], self.unit, self.largest
        if widths != self.widths:
            raise ValueError(f"it reads embeddings of widths {self.widths}, but the data has {widths or 'none'}")
        if shape[0] != channels or shape[1] % unit or shape[2] % unit:
            raise ValueError(f"it takes {channels} channels, height and width multiples of {unit}, not {shape}")
        if max(shape[1:]) > largest:
            raise ValueError(f"it knows positions for a height and width of {largest} at most, not {shape[1:]}")
        self.shape, self.null, self.condition_dropout = tuple(shape), null, dropout
        if shape[1] == shape[2]:  # its students are saved with it, and pipelines ask them; it is one number
            self.config["sample_size"] = shape[1]
            self.net.register_to_config(sample_size=shape[1])

    def no_condition(self) -> dict[str, Tensor] | None:
        return self.null

    def stages(self) -> list[nn.Module]:
        if self.blocks:
            return list(self.blocks)
        parts = [*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks]  # of a U-Net
        return [part for part in parts if part is not None]

    def set_dropout(self, p: float) -> None:
        """As diffusers sets it: in residual blocks, not in attention."""
        if "dropout" in self.config:
            self.config["dropout"] = p
            self.net.register_to_config(dropout=p)
        for name, module in self.named_modules():
            if isinstance(module, nn.Dropout) and self.drops in name:
                module.p = p

    def reset_parameters(self) -> None:
        self.net.load_state_dict(self.of(self.config).net.state_dict())

    def settle(self, dtype: torch.dtype) -> None:
        self.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)

    def recompute(self) -> None:
        self.net.enable_gradient_checkpointing()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a diffusers folder, config.json last, which pipelines take as it is."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}
        with disk.whole(folder / "config.json") as config, disk.whole(folder / WEIGHTS[0]) as weights:
            said = json.loads(self.net.to_json_string())  # diffusers passes over names with an underscore
            config.write_text(json.dumps(said | ({"_process": self.process} if self.process else {}), indent=2) + "\n")
            try:
                save_file(state, weights, metadata=sealed(state))
            except SafetensorError as error:  # as it says that the disk is full
                raise OSError(f"{folder / WEIGHTS[0]} cannot be written: {error}") from error
            weights.chmod(config.stat().st_mode)  # safetensors would shut out all other users


class TextUNet(Diffusers):
    """diffusers' UNet2DConditionModel of Stable Diffusion 1 and 2, for noise or v; cond: text (B, L, D)."""

    arch, source, folder = "sd", "UNet2DConditionModel", "unet"
    conditions, pruning, blocks = ("text",), "stages", ()

    def __init__(self, net: nn.Module):
        super().__init__(net)
        if more := self.config["addition_embed_type"]:
            raise ValueError(f"it is told more than a text ({more}), as Stable Diffusion XL is: use one of 1 or 2")
        if more := self.config["class_embed_type"] or self.config["num_class_embeds"]:
            raise ValueError(f"it is told a class beside the text ({more}): use one that reads text alone")
        self.unit = 2 ** (len(self.config["block_out_channels"]) - 1)
        self.widths = {"text": self.config["cross_attention_dim"]}

    @staticmethod
    def embed(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """The `cond` of these prompts by the encoders of a pipeline."""
        return {"text": pipeline.encode_prompt(prompts, device, 1, False)[0]}

    def feature_layers(self, other: Network | None = None) -> list[str]:
        """What BK-SDM and its successors compare: stages, or where widths differ (C_*) the layers named here. Where one
        has fewer stages, the innermost one way down that both have is compared before its downsampling."""
        mine, theirs = (list(net.config["block_out_channels"]) for net in (self, other or self))
        layers, n = self.config["layers_per_block"], len(mine)
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


class MMDiT(Diffusers):
    """diffusers' SD3Transformer2DModel of Stable Diffusion 3, for the velocity; cond: text (B, L, D), pooled (B, P)."""

    arch, source, folder, drops = "mmdit", "SD3Transformer2DModel", "transformer", ""
    conditions, pruning = ("text", "pooled"), "blocks"

    def __init__(self, net: nn.Module):
        super().__init__(net)
        self.unit, self.width = self.config["patch_size"], net.inner_dim
        self.largest = self.unit * self.config["pos_embed_max_size"]
        self.widths = {"text": self.config["joint_attention_dim"], "pooled": self.config["pooled_projection_dim"]}

    @staticmethod
    def embed(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        found = pipeline.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False)
        return {"text": found[0], "pooled": found[2]}

    @property
    def blocks(self) -> nn.ModuleList:
        return self.net.transformer_blocks

    def keep_blocks(self, keep: list[int]) -> "MMDiT":
        """As `Network.keep_blocks`. A block that becomes the last one loses the weights that update the text, for
        nobody reads it after that."""
        dual = [new for new, i in enumerate(keep) if i in self.net.config["dual_attention_layers"]]
        config = {**self.net.config, "num_layers": len(keep), "dual_attention_layers": dual}
        state = {name: w for name, w in self.net.state_dict().items() if not name.startswith("transformer_blocks.")}
        for new, i in enumerate(keep):
            block = self.blocks[i].state_dict()
            if i == keep[-1] and i < len(self.blocks) - 1:
                unread = "ff_context.", "attn.to_add_out."
                block = {name: w for name, w in block.items() if not name.startswith(unread)}
                for name in ("norm1_context.linear.weight", "norm1_context.linear.bias"):
                    shift, scale = block[name].chunk(6)[:2]  # the last block's norm has but these, the other way round
                    block[name] = torch.cat([scale, shift])
            state |= {f"transformer_blocks.{new}.{name}": tensor for name, tensor in block.items()}
        return self.like(config, {name: tensor.clone() for name, tensor in state.items()})

    def block_tokens(self, args: tuple, kwargs: dict, output: tuple) -> tuple[Tensor, Tensor]:
        return kwargs["hidden_states"], self.feature(output)

    def skip_block(self, on: Tensor, args: tuple, kwargs: dict, output: tuple) -> tuple[Tensor | None, Tensor]:
        context, tokens = output
        if context is not None:  # the last block has none to pass on
            context = super().skip_block(on, (kwargs["encoder_hidden_states"],), {}, context)
        return context, super().skip_block(on, (kwargs["hidden_states"],), {}, tokens)

    def feature(self, output: tuple) -> Tensor:
        return output[1]  # a block returns the tokens of the text, or None, and those of the image, (B, N, D)


WRAPPERS: dict[str, type[Diffusers]] = {wrapper.source: wrapper for wrapper in (TextUNet, MMDiT)}


def bk_sdm(net: Network, size: str) -> TextUNet:
    """A smaller, independent student of a Stable Diffusion 1 or 2 network (https://arxiv.org/abs/2305.15798).

    size: a name in `presets.SD_STUDENTS`. "base" lost the second of two layers in every stage, "small" also the
        middle, "tiny" the innermost stages as well: every weight is the teacher's (on the way up the last of three
        layers takes the place of the second). C_* keep all layers, narrower ones: random weights.

    ValueError for another `size`, and for a network that is not built like Stable Diffusion's.
    """
    if not isinstance(net, TextUNet):
        raise ValueError(f"bk_sdm takes a network of Stable Diffusion 1 or 2, not a {type(net).__name__}")
    if size not in SD_STUDENTS:
        raise ValueError(f"{size} is no student of BK-SDM, choose from {', '.join(SD_STUDENTS)}")
    config, narrow = {**net.net.config}, SD_STUDENTS[size]
    stages, layers, middle = len(config["block_out_channels"]), config["layers_per_block"], config["mid_block_type"]
    if (stages, layers) != (4, 2) or middle is None:
        raise ValueError(f"bk_sdm takes 4 stages of 2 layers and a middle, not {stages} of {layers}, middle {middle}")
    if narrow is not None:
        heads = config["attention_head_dim"]  # diffusers' word for the number of heads, by which widths must divide
        heads = [heads] * 4 if isinstance(heads, int) else heads
        pairs = zip(heads, narrow, strict=True)
        config["attention_head_dim"] = [max(n for n in range(1, most + 1) if width % n == 0) for most, width in pairs]
        return net.like({**config, "block_out_channels": narrow})

    config |= {"layers_per_block": 1, "mid_block_type": middle if size == "base" else None}
    if size == "tiny":
        config = {name: value[:3] if isinstance(value, list | tuple) else value for name, value in config.items()}
        config["up_block_types"] = net.config["up_block_types"][1:]
    with torch.device("meta"):
        names = TextUNet.of(config).net.state_dict()
    state, taken = net.net.state_dict(), {}
    for name in names:
        theirs = re.sub(r"^(up_blocks\.\d\.\w+)\.1\.", r"\1.2.", name)
        if size == "tiny":
            theirs = re.sub(r"^up_blocks\.(\d)", lambda stage: f"up_blocks.{int(stage[1]) + 1}", theirs)
        taken[name] = state[theirs].clone()
    return net.like(config, taken)


class Vae:
    """diffusers' AutoencoderKL: images (B, 3, H, W) to latents (B, channels, H / factor, W / factor) and back.

    where: a folder (also of a whole pipeline) or a hub id; FileNotFoundError, ValueError if it cannot be loaded.
    record: its name, and how its latents are scaled: latent = (posterior sample - shift) * scaling.
    """

    def __init__(self, where: str | os.PathLike, device: torch.device | str = "cpu"):
        kind = machine.library("diffusers", "a VAE", INSTALL).AutoencoderKL
        folder, read = Path(where), partial(kind.from_pretrained, str(where), use_safetensors=True)
        if not folder.exists() and not HUB_ID.fullmatch(str(where)):
            raise FileNotFoundError(f"--vae {where} is neither a folder nor a Hugging Face id such as owner/name")
        part = "vae" if (folder / "vae" / "config.json").is_file() else None
        if folder.is_dir() and not any((folder / (part or ".")).glob("diffusion_pytorch_model*.safetensors*")):
            missing = "it holds no diffusion_pytorch_model.safetensors, the weights of an AutoencoderKL"
            raise ValueError(f"--vae {where} cannot be loaded: {missing}")  # diffusers would print a line of its own
        with loading(f"--vae {where} cannot be loaded"):
            try:
                self.net = read(subfolder=part)
            except OSError:
                if folder.exists():
                    raise
                self.net = read(subfolder="vae")  # on the hub it may be part of a pipeline
            self.net.requires_grad_(False).eval().to(device)
        config = self.net.config
        self.channels, self.factor = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self.scaling, self.shift = config.scaling_factor, config.shift_factor or 0.0
        self.record = {"vae": str(where), "fingerprint": fingerprint(self.net.state_dict().values())}
        self.record |= {"scaling": self.scaling, "shift": self.shift}

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Samples of the posterior, scaled: (B, 3, H, W) uint8, noise (B, channels, h, w) -> as noise, on the CPU."""
        n = max(1, ENCODED // math.prod(images.shape[2:]))
        samples = []
        for some, its in zip(images.split(n), noise.split(n), strict=True):
            posterior = self.net.encode(some.to(self.net.device).float() / 127.5 - 1).latent_dist
            samples.append(posterior.mean + posterior.std * its.to(self.net.device))
        return ((torch.cat(samples) - self.shift) * self.scaling).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32, about [-1, 1], where the latents (B, channels, h, w) are."""
        x, n = latents / self.scaling + self.shift, max(1, DECODED // (math.prod(latents.shape[2:]) * self.factor**2))
        return torch.cat([self.net.decode(part.to(self.net.device)).sample.to(part) for part in x.split(n)])

    def check(self, record: dict[str, Any]) -> None:
        """ValueError unless this VAE is the one of the `record` of latents (see distil/latents.py)."""
        own = self.record
        if keys := [key for key in own if key != "vae" and record.get(key, own[key]) != own[key]]:
            theirs, ours = (", ".join(f"{key} {r[key]}" for key in ("vae", *keys)) for r in (record, own))
            raise ValueError(f"the latents are of another VAE ({theirs}) than this one ({ours}): name that with --vae")


class TextEncoder:
    """The tokenizers and text encoders of a Stable Diffusion pipeline: prompts to the `cond` of its network.

    where: the pipeline, a folder or hub id, of which the text's part is read; ValueError if it has none.
    t5: False leaves out the largest encoder of Stable Diffusion 3 (4.8 B parameters): zeros for its tokens.
    shapes: of what `encode` gives for one prompt, {"text": (L, D)} and for Stable Diffusion 3 also {"pooled": (P,)}.
    stored: (L', D'), the corner of the text outside of which it is zero.
    """

    def __init__(self, where: str | os.PathLike, device: torch.device | str = "cpu", t5: bool = True):
        diffusers = machine.library("diffusers", "embedding text", INSTALL)
        machine.library("transformers", "embedding text", INSTALL)
        self.device = torch.device(device)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        with loading(f"{where} has no text encoders that can be read"):
            index = diffusers.DiffusionPipeline.load_config(str(where))
            kinds = [kind for kind in WRAPPERS.values() if index.get(kind.folder, [0, 0])[1] == kind.source]
            if not kinds or "text_encoder" not in index or (kinds == [TextUNet] and "text_encoder_2" in index):
                raise ValueError("it is no pipeline of Stable Diffusion 1, 2 or 3")
            self.kind, *_ = kinds
            network = getattr(diffusers, self.kind.source)
            with torch.device("meta"):  # the pipeline only asks it for its settings
                net = network.from_config(network.load_config(str(where), subfolder=self.kind.folder))
            unused = {"vae", "safety_checker", "feature_extractor", "image_encoder", *(() if t5 else T5)}
            absent = {name for name in index if name in unused or index[name] == [None, None]}
            given = {self.kind.folder: net, **dict.fromkeys(absent)}
            self.pipeline = diffusers.DiffusionPipeline.from_pretrained(str(where), use_safetensors=True, **given)
            parts = self.pipeline.components
            encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder") and part}
            for name, part in encoders.items():
                check_tokenizer(parts[name.replace("text_encoder", "tokenizer")], part)
                part.requires_grad_(False).eval().to(self.device, dtype)
            self.shapes = {name: tuple(value.shape[1:]) for name, value in self.encode([""]).items()}
        # Not models.fingerprint: it hashes the first values in bfloat16, which all devices and old records agree on.
        weights = [tensor for part in encoders.values() for tensor in part.state_dict().values()]
        first = [tensor.flatten()[:1000].to("cpu", torch.bfloat16) for tensor in weights]
        self.stored = self.shapes["text"]
        if T5[0] in parts and T5[0] not in encoders:
            widths = [part.config.hidden_size for part in encoders.values()]
            self.stored = (self.pipeline.tokenizer_max_length, sum(widths))
        self.record = {"text": str(where), "text_encoders": sorted(encoders)}
        self.record["text_fingerprint"] = machine.digest(*(str(tensor.tolist()).encode() for tensor in first))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The `cond` of these prompts as the pipeline makes it, (B, *shapes[name]) float32 on the CPU."""
        found = self.kind.embed(self.pipeline, prompts, self.device)
        return {name: value.float().cpu() for name, value in found.items()}


class ClipScore:
    """The mean cosine between the CLIP embeddings of images and of their prompts; `where` is a folder or hub id, of the
    paper laion/CLIP-ViT-g-14-laion2B-s34B-b88K. size: in pixels, to which images are brought first, in the paper 256.
    ValueError if it cannot be read."""

    def __init__(self, where: str | os.PathLike, device: torch.device | str = "cpu", size: int | None = None):
        self.size = size
        transformers = machine.library("transformers", "the CLIP score", INSTALL)
        options = {"use_safetensors": True, "dtype": torch.float32}
        with loading(f"--clip {where} cannot be loaded"):
            self.model = transformers.CLIPModel.from_pretrained(str(where), **options).eval().to(device)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(where))
            self.processor = transformers.CLIPImageProcessor.from_pretrained(str(where))
            check_tokenizer(self.tokenizer, self.model.text_model)

    @torch.no_grad()
    def __call__(self, images: Any, prompts: list[str]) -> float:
        """Of an array of images (n, 3, H, W) uint8 and n prompts."""
        total, longest = 0.0, self.model.config.text_config.max_position_embeddings
        for first in range(0, len(prompts), 64):
            some, how = slice(first, first + 64), {"return_tensors": "pt"}
            tokens = self.tokenizer(prompts[some], padding=True, truncation=True, max_length=longest, **how)
            part = images[some] if self.size is None else pictures.squash(images[some], self.size)  # (B, 3, H, W)
            pixels = self.processor(list(part.transpose(0, 2, 3, 1)), **how)
            output = self.model(**tokens.to(self.model.device), **pixels.to(self.model.device))
            total += (output.image_embeds * output.text_embeds).sum().item()  # both of length 1
        return total / len(prompts)


def check_tokenizer(tokenizer: Any, encoder: nn.Module) -> None:
    """ValueError where the files of a tokenizer are missing: transformers makes one then that knows no word."""
    if (n := len(tokenizer)) < encoder.config.vocab_size / 2:
        raise ValueError(f"its tokenizer knows {n} words of {encoder.config.vocab_size}: its vocabulary is missing")


@contextlib.contextmanager
def loading(failed: str) -> Iterator[None]:
    """ValueError, what `failed` and why, where the block cannot load something: files are damaged in any way, networks
    fail in the words of any library. Memory that does not suffice says nothing of a file."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{failed}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The messages of diffusers, transformers and the hub are long; their first line says what is wrong."""
    return str(error).partition("\n")[0]

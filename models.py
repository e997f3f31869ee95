"""The networks, and how to make them smaller.

A network is `net(x_t, t, cond=None) -> prediction`: x_t (B, C, H, W), t (B,), cond a dict of tensors or None. Here are

- `UNet`, the pixel-space network of DDIM (https://arxiv.org/abs/2010.02502) and of Diff-Pruning
  (https://arxiv.org/abs/2305.10924), and `DiT`, the transformer on latents (https://arxiv.org/abs/2212.09748); their
  parameters carry the original names, so public checkpoints fit as they are;
- `net.save(folder)` and `load(folder)`: model.safetensors + config.json, never a pickle;
- `load_checkpoint`, which fills a network from the checkpoint files that others published (more in foreign.py);
- `prune_channels`, which removes a share of the channels of every layer and returns a smaller network of its own, and
  `accumulate_gradients`, from which it can tell which channels matter;
- `prune_depth`, which keeps some of the blocks, and ways to choose them: `uniform_blocks`, `random_blocks`,
  `block_influence`, `learned_blocks`;
- `Tapped`, which also reads the features between the blocks, for FitNet distillation (https://arxiv.org/abs/1412.6550).

    teacher = UNet(64, dropout=0.1)                 # CelebA, 78.7 M parameters
    student = prune_channels(teacher, ratio=0.9)    # 1.3 M, weights taken from the teacher
    student.save("student")
    student = load("student")

Letters in shape comments: B batch, C channels, H W height and width, N tokens, D width of tokens or time embedding.
"""

import argparse
import copy
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from tqdm import tqdm

FILES = ("model.safetensors", "config.json")  # of a saved network, in the order in which they appear


class Network(nn.Module):
    """What all networks have: `config`, a dict for JSON that rebuilds them by `type(net)(**net.config)`, and `save`."""

    config: dict
    shape: tuple[int, int, int]  # (C, H, W) of what it takes
    conditions: tuple[str, ...] = ()  # the keys of `cond` that it takes
    condition_dropout: float = 0.0  # share of the samples whose `cond` training replaces by `no_condition()`
    guided_channels: int | None = None  # how many channels guidance acts on; None: all

    def no_condition(self) -> dict[str, Tensor] | None:
        """The `cond` of one sample that stands for none, as guidance needs it; None if there is none."""
        return None

    def stages(self) -> list[nn.Module]:
        """The parts that run one after the other, in which FSDP gathers the weights; [] for all at once."""
        return list(getattr(self, "blocks", []))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes model.safetensors and config.json into `folder`; `load(folder)` gives the network back, bit for bit.

        Each file appears whole or not at all, config.json last: a new folder without it is unfinished.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"class": type(self).__name__, **self.config}
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        (folder / "model.safetensors.part").write_bytes(to_bytes(state))  # save_file would shut out all other users
        (folder / "config.json.part").write_text(json.dumps(config, indent=1) + "\n")
        for name in FILES:
            os.replace(folder / f"{name}.part", folder / name)


# ---- U-Net -----------------------------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of t at dim // 2 frequencies from 1 to 1e-4, both included: (B,) -> (B, dim), float32.

    As in DDPM (https://arxiv.org/abs/2006.11239); an odd `dim` is filled up with a zero.
    """
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * freqs  # (B, dim // 2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))  # (B, dim)


class _Plan:
    """Tells the blocks, by layer name, how wide a layer is and into how many groups a norm splits its channels.

    It writes down what it was asked, in the order in which the layers run: `full` holds the layers that set a width and
    what it is before any pruning, `norms` the norm layers, `features` the layers that FitNet distillation compares.
    """

    def __init__(self, widths: dict[str, int] | None, norm_groups: int | dict[str, int]):
        self.widths, self.norm_groups = widths or {}, norm_groups
        self.full: dict[str, int] = {}
        self.norms: list[str] = []
        self.features: list[str] = []

    def width(self, name: str, full: int) -> int:
        self.full[name] = full
        if self.widths.get(name, full) < 1:
            raise ValueError(f"widths: {name} needs at least one channel, not {self.widths[name]}")
        return self.widths.get(name, full)

    def norm(self, name: str, channels: int) -> nn.GroupNorm:
        self.norms.append(name)
        groups = self.norm_groups.get(name, 0) if isinstance(self.norm_groups, dict) else self.norm_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"norm_groups: {name} has {channels} channels, they cannot be split into {groups} groups")
        return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions, the time between them, and a shortcut: (B, C, H, W), (B, D) -> (B, out_channels, H, W).

    `full` and `out_full` are the widths in and out before any pruning. They decide whether the shortcut is a
    convolution, so pruning never adds or removes one. Where it is none, conv2 is as wide as the input.
    """

    def __init__(self, name: str, plan: _Plan, width: int, full: int, out_full: int, temb_width: int, dropout: float):
        super().__init__()
        plan.features.append(name)
        hidden = plan.width(f"{name}.conv1", out_full)
        self.out_channels = plan.width(f"{name}.nin_shortcut", out_full) if full != out_full else width
        self.norm1 = plan.norm(f"{name}.norm1", width)
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1)
        self.temb_proj = nn.Linear(temb_width, hidden)
        self.norm2 = plan.norm(f"{name}.norm2", hidden)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(hidden, self.out_channels, 3, padding=1)
        if full != out_full:
            self.nin_shortcut = nn.Conv2d(width, self.out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, hidden, H, W)
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, out_channels, H, W)
        # the shortcut first: torch-pruning walks backwards through such sums, and pruning is greedy, so this order
        # decides which group of layers is cut before which, and it is the published one
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention between all pixels, one head, with a residual: (B, C, H, W) -> the same shape."""

    def __init__(self, name: str, plan: _Plan, width: int, full: int):
        super().__init__()
        plan.features.append(name)
        inner = plan.width(f"{name}.q", full)  # k and v have the same
        self.norm = plan.norm(f"{name}.norm", width)
        self.q, self.k, self.v = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, inner), scaled by inner^-0.5: the CURRENT width
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves H and W; pads below and to the right only, as ddim does."""

    def __init__(self, name: str, plan: _Plan, width: int, full: int):
        super().__init__()
        plan.features.append(f"{name}.conv")
        self.conv = nn.Conv2d(width, plan.width(f"{name}.conv", full), 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H / 2, W / 2)


class Upsample(nn.Module):
    """Doubles H and W: nearest neighbour, then a convolution."""

    def __init__(self, name: str, plan: _Plan, width: int, full: int):
        super().__init__()
        plan.features.append(f"{name}.conv")
        self.conv = nn.Conv2d(width, plan.width(f"{name}.conv", full), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class UNet(Network):
    """The ddim U-Net: `net(x_t, t) -> prediction`, (B, in_channels, H, W), (B,) -> (B, out_channels, H, W).

    image_size       height and width it is made for; decides at which levels attention stands
    channels         width of the first level; level i has channels * channel_mults[i]
    num_res_blocks   blocks of a level on the way down; on the way up there is one more
    attention_resolutions  sizes of the feature map at which attention follows every block (the middle always has one)
    norm_groups      groups of every GroupNorm, or {norm layer name: groups}
    widths           of a pruned net: {layer name: output channels} for layers that set a width (`net.plan.full` names
                     them); all other widths follow from these
    fold_steps       of a student of few steps: T', its timesteps are those of `DDPM().fold(T')`. A note for who samples
                     it; the network itself is the same

    Published settings: CelebA 64 `UNet(64, dropout=0.1)`, CIFAR-10 `UNet(32, channel_mults=(1, 2, 2, 2), dropout=0.1)`,
    LSUN 256 `UNet(256, channel_mults=(1, 1, 2, 2, 4, 4))`. ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        channel_mults: tuple[int, ...] = (1, 2, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        norm_groups: int | dict[str, int] = 32,
        widths: dict[str, int] | None = None,
        fold_steps: int | None = None,
    ):
        channel_mults, attention_resolutions = list(channel_mults), list(attention_resolutions)
        out_channels = in_channels if out_channels is None else out_channels
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        if not channel_mults or min(image_size, in_channels, out_channels, num_res_blocks, *channel_mults) < 1:
            raise ValueError("image_size, in_channels, out_channels, num_res_blocks and channel_mults must be positive")
        if channels < 4:
            raise ValueError(f"channels must be at least 4 (the time embedding needs two frequencies), not {channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        levels = len(channel_mults)
        if image_size % 2 ** (levels - 1):
            raise ValueError(f"image_size {image_size} cannot be halved {levels - 1} times, once between two levels")

        self.shape = (in_channels, image_size, image_size)
        self.plan = plan = _Plan(widths, norm_groups)
        fulls = [channels * mult for mult in channel_mults]
        attends = [image_size // 2**i in attention_resolutions for i in range(levels)]
        d0, d1 = (plan.width(f"temb.dense.{i}", 4 * channels) for i in range(2))
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(channels, d0), nn.Linear(d0, d1)])

        # what flows between the layers: `width` channels, `full` of them before any pruning
        width, full = plan.width("conv_in", channels), channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        skips = [(width, full)]
        self.down = nn.ModuleList()
        for i in range(levels):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for j in range(num_res_blocks):
                level.block.append(ResnetBlock(f"down.{i}.block.{j}", plan, width, full, fulls[i], d1, dropout))
                width, full = level.block[-1].out_channels, fulls[i]
                if attends[i]:
                    level.attn.append(AttnBlock(f"down.{i}.attn.{j}", plan, width, full))
                skips.append((width, full))
            if i < levels - 1:
                level.downsample = Downsample(f"down.{i}.downsample", plan, width, full)
                width = level.downsample.conv.out_channels
                skips.append((width, full))
            self.down.append(level)

        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock("mid.block_1", plan, width, full, full, d1, dropout)
        self.mid.attn_1 = AttnBlock("mid.attn_1", plan, width, full)
        self.mid.block_2 = ResnetBlock("mid.block_2", plan, width, full, full, d1, dropout)

        self.up = nn.ModuleList()
        for i in reversed(range(levels)):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for j in range(num_res_blocks + 1):
                skip_width, skip_full = skips.pop()
                width, full = width + skip_width, full + skip_full
                level.block.append(ResnetBlock(f"up.{i}.block.{j}", plan, width, full, fulls[i], d1, dropout))
                width, full = level.block[-1].out_channels, fulls[i]
                if attends[i]:
                    level.attn.append(AttnBlock(f"up.{i}.attn.{j}", plan, width, full))
            if i > 0:
                level.upsample = Upsample(f"up.{i}.upsample", plan, width, full)
                width = level.upsample.conv.out_channels
            self.up.insert(0, level)  # up[i] works at the resolution of down[i]

        self.norm_out = plan.norm("norm_out", width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        named = {*plan.widths, *(norm_groups if isinstance(norm_groups, dict) else ())}
        if unknown := named - {*plan.full, *plan.norms}:
            raise ValueError(f"widths or norm_groups name {min(unknown)}, but no layer of this network asks for that")

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """x_t (B, in_channels, H, W), t (B,) integers or floats -> (B, out_channels, H, W); `cond` must be empty."""
        channels, factor = self.conv_in.in_channels, 2 ** (len(self.down) - 1)
        if x_t.ndim != 4 or x_t.shape[1] != channels or x_t.shape[2] % factor or x_t.shape[3] % factor:
            shape = tuple(x_t.shape)
            raise ValueError(f"x_t must be (B, {channels}, H, W) with H and W multiples of {factor}, not {shape}")
        if cond:
            raise ValueError(f"this UNet takes no condition, but cond holds {', '.join(cond)}")

        temb = timestep_embedding(t, self.temb.dense[0].in_features).to(x_t.dtype)  # (B, channels)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))  # (B, D)
        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            for j, block in enumerate(level.block):
                h = block(h, temb)
                h = level.attn[j](h) if level.attn else h
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)  # H, W halve
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                h = level.attn[j](h) if level.attn else h
            if hasattr(level, "upsample"):
                h = level.upsample(h)  # H, W double
        return self.conv_out(F.silu(self.norm_out(h)))

    def feature_layers(self) -> list[str]:
        """Names of the layers whose outputs FitNet distillation compares, in the order in which they run.

        Every block, every attention and the convolution of every down- and upsampling, as in the paper's code: 41 for
        CelebA, 34 for CIFAR-10, 48 for LSUN.
        """
        return list(self.plan.features)


# ---- DiT -------------------------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, 1, D): adaptive layer norm's affine part."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Self-attention between all tokens: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class DiTBlock(nn.Module):
    """Attention and MLP with adaLN-Zero: the condition c (B, D) sets shift, scale and gate of both; h (B, N, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)  # (B, 1, D)
        h = h + gate1 * self.attn(modulate(self.norm1(h), shift1, scale1))
        return h + gate2 * self.mlp(modulate(self.norm2(h), shift2, scale2))


class DiT(Network):
    """The diffusion transformer of Peebles and Xie (arXiv 2212.09748), with the parameter names of their code.

    `net(x_t, t, {"y": labels}) -> prediction`: (B, in_channels, H, W), (B,), (B,) int64 -> (B, out_channels, H, W).

    input_size       height and width of x_t (latents: an eighth of the image)
    patch_size       side of the squares of x_t that become one token each
    hidden_size      width D of a token; depth: number of blocks; mlp_ratio: width of an MLP / D
    num_classes      labels are 0 .. num_classes - 1; num_classes itself means "no class"
    class_dropout_prob  share of the labels that training replaces by "no class", for classifier-free guidance; at 0
                     that label does not exist. The training loop draws, so that student and teacher see the same
    learn_sigma      out_channels = 2 in_channels: the prediction, then what the variance is interpolated with

    The default is DiT-XL/2 for 256x256 images. ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
    ):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        if min(input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes) < 1:
            raise ValueError("the sizes of a DiT must be positive")
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"a DiT needs an input_size in multiples of patch_size and a hidden_size in multiples of num_heads and "
                f"4, not {input_size}, {patch_size}, {hidden_size}, {num_heads}"
            )
        self.shape, self.conditions = (in_channels, input_size, input_size), ("y",)
        self.condition_dropout = class_dropout_prob
        self.guided_channels = min(3, in_channels)  # the published sampler guides three of the four latent channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)
        # a fixed table, but a parameter, as upstream, where it counts among them
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(position_table(grid, hidden_size)[None], requires_grad=False)  # (1, N, D)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = nn.Module()
        self.final_layer.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.final_layer.linear = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self._initialize()

    def _initialize(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the output as 0
        for parent in (*self.blocks, self.final_layer):
            nn.init.zeros_(parent.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def requires_grad_(self, requires_grad: bool = True) -> "DiT":
        """For all parameters but the fixed table of positions."""
        super().requires_grad_(requires_grad)
        self.pos_embed.requires_grad_(False)
        return self

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """x_t (B, C, H, W), t (B,) integers or floats, cond {"y": (B,) int64} -> (B, out_channels, H, W)."""
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"x_t must be {('B', *self.shape)}, not {tuple(x_t.shape)}")
        if not cond or "y" not in cond:
            raise ValueError('this DiT needs the classes, cond = {"y": labels (B,)}')
        h = self.x_embedder.proj(x_t).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D)
        c = self.t_embedder.mlp(frequencies(t, 256).to(h.dtype))  # (B, D)
        c = c + self.y_embedder.embedding_table(cond["y"])  # (B, D)
        for block in self.blocks:
            h = block(h, c)  # (B, N, D)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)  # (B, 1, D)
        h = self.final_layer.linear(modulate(self.final_layer.norm_final(h), shift, scale))  # (B, N, p * p * C_out)
        rows, p = self.shape[1] // self.config["patch_size"], self.config["patch_size"]
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)  # (B, C_out, H, W)

    def no_condition(self) -> dict[str, Tensor] | None:
        """The `cond` of one sample that means "no class", () each; None if the network was made without it."""
        return {"y": torch.tensor(self.config["num_classes"])} if self.config["class_dropout_prob"] > 0 else None

    def keep_blocks(self, keep: list[int]) -> "DiT":
        """An independent DiT of these blocks, in this order."""
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("blocks.")}
        for new, old in enumerate(keep):
            block = self.blocks[old].state_dict().items()
            state |= {f"blocks.{new}.{name}": tensor for name, tensor in block}
        return _build(DiT, {**self.config, "depth": len(keep)}, state).train(self.training)

    def feature_layers(self) -> list[str]:
        """Names of the layers whose outputs feature distillation compares: the blocks."""
        return [f"blocks.{i}" for i in range(len(self.blocks))]

    def attention_macs(self) -> int:
        """Multiply-adds of the products inside attention, for one image: no layer makes them, so counters miss them."""
        tokens = self.pos_embed.shape[1]
        return len(self.blocks) * 2 * tokens**2 * self.config["hidden_size"]


def frequencies(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines of t at dim / 2 frequencies from 1 down to just above 1e-4: (B,) -> (B, dim), float32."""
    freqs = torch.exp(torch.arange(dim // 2, dtype=torch.float32, device=t.device) * (-math.log(10000) / (dim // 2)))
    angles = t.float()[:, None] * freqs  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim)


def position_table(grid: int, dim: int) -> Tensor:
    """The fixed positions of grid x grid tokens, (grid^2, dim): sines and cosines of the column, then of the row."""
    place = torch.arange(grid, dtype=torch.float64)
    angles = place[:, None] * 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (grid, dim / 4)
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    column, row = one.expand(grid, -1, -1), one[:, None].expand(-1, grid, -1)  # (grid, grid, dim / 2)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()  # (grid^2, dim)


# ---- Loading ---------------------------------------------------------------------------------------------------------

NETWORKS = {"UNet": UNet, "DiT": DiT}  # what a config.json may name as its "class"


def load(folder: str | os.PathLike) -> Network:
    """The network that `net.save(folder)` wrote, on the CPU, in eval mode; `foreign.load` also reads those of others.

    FileNotFoundError if a file is missing; ValueError if one is damaged, or if the weights do not fit the config.
    """
    folder = Path(folder)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        found = [*folder.glob("*/model.safetensors"), *folder.glob("*/*/model.safetensors")]
        inside = sorted(str(path.parent.relative_to(folder)) for path in found)
        hint = f"; networks in it: {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"{folder} is not a saved network: it has no {' and no '.join(missing)}{hint}")
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict) or config.get("class") not in NETWORKS:
            raise ValueError(f'config.json must have a "class", one of: {", ".join(NETWORKS)}')
        return _build(NETWORKS[config.pop("class")], config, load_file(folder / "model.safetensors")).eval()
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def _build(network: type[Network], config: dict, state: dict[str, Tensor]) -> Network:
    """A network from its config and a copy of `state`; made on the meta device, so nothing is initialised in vain."""
    with torch.device("meta"):
        net = network(**config)
    _check_fit(net, state)
    net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return net


def _check_fit(net: nn.Module, state: dict[str, Tensor]) -> None:
    """ValueError that names the first few weights of `state` that are absent, too many, or of another shape."""
    ours = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    pairs = {name: (ours.get(name, "absent"), theirs.get(name, "absent")) for name in {**ours, **theirs}}
    wrong = [f"{name} is {a} by the config, but {b} in the weights" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError("; ".join(wrong[:3]) + more)


def load_checkpoint(net: Network, path: str | os.PathLike) -> None:
    """Fills `net` from a public checkpoint file; its device, dtype and mode stay.

    Reads a plain state dict (pesser/pytorch_diffusion), the list [model, optimizer, epoch, step, EMA] of
    ermongroup/ddim and Diff-Pruning, {"ema": ...} as of DiT, {"model": ...}, {"state_dict": ...} and .safetensors, with
    or without a "module." before the names; averaged weights where there are any. Nothing in the file is ever executed.

    OSError if the file cannot be opened; ValueError if it is damaged, holds pickled objects or no weights, or does not
    fit.
    """
    state = _read_weights(Path(path))
    try:
        _check_fit(net, state)
    except ValueError as error:
        settings = ", ".join(f"{name}={value!r}" for name, value in net.config.items())
        raise ValueError(f"{path} does not fit {type(net).__name__}({settings}): {error}") from error
    net.load_state_dict(state)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """{name: tensor} from a checkpoint file of any format that `load_checkpoint` knows, on the CPU."""
    with path.open("rb") as file:  # a file that is not there is no damaged file
        try:
            if path.suffix == ".safetensors":
                content = load_file(path)
            else:
                with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's settings: plain data
                    content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no error of its own: at least six kinds come out of a cut file
            if pickled := re.search(r"GLOBAL (\S+)", str(error)):
                raise ValueError(
                    f"{path} holds a pickled {pickled[1]}, and opening that would run code from the file; if you trust "
                    "it, write its weights to a new file, where its own source code can be imported: python -c "
                    f"\"import torch; x = torch.load('{path}', 'cpu', weights_only=False); "
                    "x = x if isinstance(x, list) else [x]; "
                    "[p.data.copy_(e) for e, p in zip(sum(x[4:5], []), x[0].parameters())]; "  # Diff-Pruning's average
                    "torch.save(x[0].state_dict(), 'weights.pt')\""
                ) from error
            size = path.stat().st_size
            raise ValueError(
                f"{path} ({size:,} bytes) is cut off, damaged, or no checkpoint: fetch it again"
            ) from error

    if isinstance(content, list) and content:  # [model, optimizer, epoch, step, EMA], the last one absent without EMA
        content = content[4] if len(content) > 4 and isinstance(content[4], dict) else content[0]
    if isinstance(content, dict):
        content = next((content[key] for key in ("ema", "model", "state_dict") if key in content), content)
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no weights: neither a state dict nor a list or dict with one")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


# ---- Channel pruning -------------------------------------------------------------------------------------------------


def accumulate_gradients(
    net: nn.Module,
    process: Any,
    x0: Tensor,
    noise: Tensor,
    thr: float = 0.0,
    timesteps: Iterable[int] = range(1000),
    progress: bool = True,
) -> int:
    """Sums the gradients of the diffusion loss over timesteps into `.grad`, for `prune_channels(..., "taylor")`.

    The rule of Diff-Pruning: ONE batch and ONE noise, the network in eval mode. L_t is the squared error summed over an
    image, averaged over the batch. The sum ends before the first t with L_t < thr * (the largest L so far): from so
    noisy images little is learnt. thr 0, the published choice for CelebA, never stops; 0.05 is that for CIFAR-10.

    process    a process of diffusion.py: `add_noise(x0, noise, t)` and `target(x0, noise, t)`
    x0, noise  (B, C, H, W) on the device of `net`, images in [-1, 1]; published batches: CelebA 64, LSUN bedroom 4

    Older gradients are dropped; mode and requires_grad of `net` stay. Returns how many timesteps were summed.
    ValueError for a `thr` outside [0, 1] or a loss that is not finite.
    """
    if not 0 <= thr <= 1:
        raise ValueError(f"thr is a share of the largest loss, in [0, 1], not {thr}")
    training, trainable = net.training, [p.requires_grad for p in net.parameters()]
    net.eval().requires_grad_(True).zero_grad()
    largest, summed = 0.0, 0
    try:
        with torch.enable_grad():
            for step in tqdm(timesteps, desc="importance", disable=not progress):
                t = torch.full(x0.shape[:1], step, device=x0.device)  # (B,)
                prediction, target = net(process.add_noise(x0, noise, t), t), process.target(x0, noise, t)
                loss = F.mse_loss(prediction.float(), target.float(), reduction="sum") / len(x0)
                if not loss.isfinite():
                    raise ValueError(f"the loss at timestep {step} is {loss.item()}: no importance can be told from it")
                largest = max(largest, loss.item())
                if loss.item() < thr * largest:
                    break
                loss.backward()
                summed += 1
    finally:
        net.train(training)
        for p, flag in zip(net.parameters(), trainable, strict=True):
            p.requires_grad_(flag)
    return summed


def prune_channels(
    net: UNet, ratio: float, importance: str | Callable = "magnitude", norm_groups: str = "keep", seed: int = 0
) -> UNet:
    """A smaller, independent copy of `net` in which every layer lost the share `ratio` of its channels.

    The rule of Diff-Pruning (https://arxiv.org/abs/2305.10924): channels that are added to each other go together. Of C
    such channels C - int(C * (1 - ratio)) are to go; where a GroupNorm of g groups sees them, a g-th of that, rounded
    down, goes from EACH group, so the width stays a multiple of g (32 groups, ratio 0.9: 128 -> 32). Always the least
    important go.

    importance   "magnitude": sum of w^2 over all weights that write or read a channel;
                 "taylor": what Diff-Pruning takes, sum of (w * gradient)^2 over the same weights, plus |w * gradient|
                 of the norms' weights; first call `accumulate_gradients(net, ...)`;
                 "random": uniform, drawn from `seed`;
                 or a function from a torch-pruning Group to one score per channel. The modules in the group are
                 copies of those in `net`; their `.grad` is that of `net`.
    norm_groups  "keep" the NUMBER of groups, as the paper does (fewer only where it does not divide the new width).
                 At 90 % most groups are left with one channel: an instance norm, which erases its mean and scale;
                 "scale" it, so that the channels PER group stay (or the next larger number that divides the width).
                 Widths and parameters are the same either way.
    The copy has the device, dtype and mode of `net`; all its parameters are trainable. "random" also works on the meta
    device: sizes without weights. ValueError for a bad argument.
    """
    import torch_pruning as tp

    if not isinstance(net, UNet):
        raise ValueError(f"prune_channels takes a UNet, not a {type(net).__name__}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share of channels to remove, in [0, 1), not {ratio}")
    if norm_groups not in ("keep", "scale"):
        raise ValueError(f'norm_groups must be "keep" or "scale", not {norm_groups!r}')
    generator = torch.Generator().manual_seed(seed)
    known = {
        "magnitude": partial(_score, taylor=False),
        "taylor": partial(_score, taylor=True),
        "random": lambda group: torch.rand(len(group[0].idxs), generator=generator),
    }
    if importance not in known and not callable(importance):
        raise ValueError(f'importance must be "magnitude", "taylor", "random" or a function, not {importance!r}')
    if importance == "taylor" and any(p.grad is None for p in net.parameters()):
        raise ValueError('importance "taylor" needs gradients: call accumulate_gradients(net, ...) first')
    score = importance if callable(importance) else known[importance]

    # torch-pruning cuts this copy in place; the result is then rebuilt from a config, so that it is a plain UNet
    cut = _build(UNet, net.config, net.state_dict())
    for new, old in zip(cut.parameters(), net.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()

    # Which channels belong together does not depend on the image size, so trace the smallest: 2x2 pixels on the lowest
    # level (one would be too few for an instance norm). Tracing 256x256 would take 20 GiB.
    size = 2 ** len(cut.down)
    x = cut.conv_in.weight.new_zeros(1, cut.conv_in.in_channels, size, size)
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(cut, {"x_t": x, "t": x.new_zeros(1)})
    for group in graph.get_all_groups(ignored_layers=[cut.conv_out], root_module_types=[nn.Conv2d, nn.Linear]):
        root, prune = group[0].dep.target.module, group[0].dep.handler
        channels = root.weight.shape[0]
        norms = [dep.target.module for dep, _ in group if isinstance(dep.target.module, nn.GroupNorm)]
        g = max((norm.num_groups for norm in norms if channels % norm.num_groups == 0), default=1)
        remove = min((channels - int(channels * (1 - ratio))) // g, channels // g - 1)  # of each group; one stays
        if remove > 0:
            scores = rearrange(score(group).float().cpu(), "(g n) -> g n", g=g)
            lowest = scores.argsort(dim=1, stable=True)[:, :remove] + torch.arange(g)[:, None] * (channels // g)
            graph.get_pruning_group(root, prune, sorted(lowest.flatten().tolist())).prune()

    widths = {name: cut.get_submodule(name).weight.shape[0] for name in cut.plan.full}
    groups = {}
    for name in cut.plan.norms:
        old, width = net.get_submodule(name), cut.get_submodule(name).num_channels
        n = old.num_channels // old.num_groups if norm_groups == "scale" else math.ceil(width / old.num_groups)
        groups[name] = next((width // k for k in range(n, width) if width % k == 0), 1)  # k >= n channels in each group
    config = {
        **net.config,
        "widths": {name: width for name, width in widths.items() if width != cut.plan.full[name]},
        "norm_groups": groups if len(set(groups.values())) > 1 else groups["norm_out"],
    }
    return _build(UNet, config, cut.state_dict()).train(net.training)


def _score(group, taylor: bool) -> Tensor:
    """One score per channel of a torch-pruning group: the sum of w^2 over every weight that writes or reads it.

    With `taylor` w is w * gradient, and norms add the absolute value of theirs; otherwise norms do not count. Nor do
    layers that meet a channel several times (their vectors are longer than the first one). No normalisation.
    """
    scores = []
    for dep, idxs in group:
        weight = getattr(dep.target.module, "weight", None)
        if weight is None:
            continue
        value = weight.detach().float() * (weight.grad.float() if taylor else 1)
        if weight.ndim > 1:
            reads = dep.handler.__name__ == "prune_in_channels"
            scores.append((value.transpose(0, 1) if reads else value).square().flatten(1).sum(1)[idxs])
        elif taylor:
            scores.append(value.abs()[idxs])
    return sum(score for score in scores if len(score) == len(scores[0]))


# ---- Depth pruning ---------------------------------------------------------------------------------------------------
# Works on every network with a list `blocks` of blocks that keep the shape of what they pass on, and `keep_blocks`.


def prune_depth(net: Network, keep: int | Sequence[int]) -> Network:
    """A shallower, independent copy of `net` that has only the blocks `keep`: their indices, or how many, then evenly.

    ValueError for indices that are not there, not growing, or none at all.
    """
    depth = len(net.blocks)
    keep = uniform_blocks(depth, keep) if isinstance(keep, int) else [int(i) for i in keep]
    check_blocks(depth, keep)
    return net.keep_blocks(keep)


def check_blocks(depth: int, keep: Sequence[int]) -> None:
    """ValueError unless `keep` holds growing numbers of some of `depth` blocks."""
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= depth:
        raise ValueError(f"the blocks that stay must be growing numbers from 0 to {depth - 1}, not {list(keep)}")


def uniform_blocks(depth: int, n: int) -> list[int]:
    """n of `depth` blocks, evenly spaced from the first to the last (28, 14: the scheme of BK-SDM in TinyFusion)."""
    if not 1 <= n <= depth:
        raise ValueError(f"of {depth} blocks 1 to {depth} can stay, not {n}")
    return [round(i * (depth - 1) / max(n - 1, 1)) for i in range(n)]


def random_blocks(depth: int, n: int, seed: int) -> list[int]:
    """n of `depth` blocks, drawn from `seed`; the first and the last stay, for they talk to the layers outside."""
    ends = [0, depth - 1][-n:] if n < 2 else [0, depth - 1]
    inner = torch.randperm(depth - 2, generator=torch.Generator().manual_seed(seed))[: n - len(ends)] + 1
    return sorted({*ends, *inner.tolist()})


@torch.no_grad()
def block_influence(
    net: Network, process: Any, x0: Tensor, noise: Tensor, cond: dict[str, Tensor] | None = None, progress: bool = True
) -> Tensor:
    """How much each block changes what it passes on, 1 - cos(in, out) averaged over tokens and timesteps: (depth,).

    ShortGPT's block influence (arXiv 2403.03853), measured where the network works: on properly noised inputs, once at
    each of the process's timesteps.

    x0, noise, cond  B samples and their conditions; timestep t is seen with sample t mod B
    """
    training, sums = net.training, torch.zeros(len(net.blocks), dtype=torch.float64)
    cosines: dict[int, Tensor] = {}

    def watch(i: int, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        before, after = args[0] if args else kwargs["hidden_states"], output if args else output[-1]  # (B, N, D) each
        cosines[i] = F.cosine_similarity(before.float(), after.float(), dim=-1).mean().double().cpu()

    hooks = [block.register_forward_hook(partial(watch, i), with_kwargs=True) for i, block in enumerate(net.blocks)]
    net.eval()
    try:
        timesteps = torch.arange(process.steps, device=x0.device)
        for t in tqdm(timesteps.split(len(x0)), desc="block influence", disable=not progress):
            part = None if cond is None else {key: value[: len(t)] for key, value in cond.items()}
            net(process.add_noise(x0[: len(t)], noise[: len(t)], t), t, part)
            sums += torch.stack([cosines[i] for i in range(len(sums))]) * len(t)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return (1 - sums / process.steps).float()


class GatedDepth(nn.Module):
    """A network in which every group of consecutive blocks draws, sample by sample, which of them act.

    TinyFusion's differentiable choice (arXiv 2412.01199): the blocks form g groups of M, of each of which N may stay.
    A group has one logit for each of its C(M, N) options; a forward pass draws one by the straight-through
    Gumbel-softmax, and a block that is switched off passes on what it got. All blocks are computed, so the loss
    reaches the logits.

    keep       number of blocks that stay; the groups are as small as they can be: 14 of 28 are 14 groups of 1:2
    lora_rank  the network learns to live without the dropped blocks through low-rank updates of this rank at every
               linear layer, its own weights frozen; 0: through its own weights

    `tau` is the temperature; `choice(gates)` the blocks that the logits (g, options) favour. Hooks on the blocks of
    `net` stay: give it a copy.
    """

    def __init__(self, net: Network, keep: int, lora_rank: int = 8):
        super().__init__()
        depth = len(net.blocks)
        if not 1 <= keep < depth:
            raise ValueError(f"of {depth} blocks 1 to {depth - 1} can be chosen, not {keep}")
        groups = math.gcd(depth, keep)
        size, stay = depth // groups, keep // groups
        if (count := math.comb(size, stay)) > 5000:
            raise ValueError(f"{keep} of {depth} blocks give {count:,} options a group, too many to choose from")
        device = next(net.parameters()).device
        options = [[float(i in option) for i in range(size)] for option in itertools.combinations(range(size), stay)]
        self.net, self.tau = net, 1.0
        self.register_buffer("options", torch.tensor(options, device=device))  # (options, M)
        self.gates = nn.Parameter(torch.full((groups, len(options)), 0.02, device=device))
        self.mask = None
        for i, block in enumerate(net.blocks):
            block.register_forward_hook(partial(self._switch, i), with_kwargs=True)
        if lora_rank:
            net.requires_grad_(False)
            for layer in [layer for layer in net.modules() if isinstance(layer, nn.Linear)]:
                nn.utils.parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, lora_rank))

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None, hard: bool = False) -> Tensor:
        """As the network; `hard`: with the favoured options instead of drawn ones."""
        if hard:
            one_hot = F.one_hot(self.gates.argmax(1), len(self.options)).float().expand(len(x_t), -1, -1)
        else:  # the factor 100 makes a learning rate fit for weights fit for logits
            logits = 100 * self.gates.expand(len(x_t), -1, -1)  # (B, g, options)
            one_hot = F.gumbel_softmax(logits, self.tau, hard=True)  # (B, g, options)
        self.mask = (one_hot @ self.options).flatten(1)  # (B, depth)
        try:
            return self.net(x_t, t, cond)
        finally:
            self.mask = None

    def _switch(self, i: int, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self.mask is None:
            return output
        on = self.mask[:, i, None, None]  # (B, 1, 1)
        blend = lambda before, after: (on * after + (1 - on) * before).to(after.dtype)  # noqa: E731
        if args:
            return blend(args[0], output)
        context, tokens = output  # of MMDiT's blocks; the last one has no context to pass on
        context = None if context is None else blend(kwargs["encoder_hidden_states"], context)
        return context, blend(kwargs["hidden_states"], tokens)

    def choice(self, gates: Tensor) -> list[int]:
        """The blocks that stay, of the logits (g, options)."""
        return self.options[gates.argmax(1)].flatten().nonzero().flatten().tolist()


class LoRA(nn.Module):
    """weight (out, in) -> weight + 2 B A with A (rank, in), B (out, rank), B = 0 at the start (arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rank = min(rank, *weight.shape)
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]).normal_(std=weight.shape[1] ** -0.5))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * self.up @ self.down


def learned_blocks(
    net: Network,
    keep: int,
    loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    *,
    lora_rank: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> list[int]:
    """The `keep` blocks that TinyFusion's learned choice would leave, for `prune_depth`; `net` stays as it is.

    loss   (network, step) -> scalar: the loss of one batch for a network that is called as `net` is. Published: the
           diffusion loss alone, batch 128, one epoch of ImageNet
    steps  the temperature falls from 4 to 0.1 over them

    Published settings: AdamW, 1e-3 for the logits, 1e-4 for the rest, clip 1, decision by an average of rate 0.999.
    The result does not depend on torch's global random state, and leaves it as it was. ValueError for a `keep` that
    cannot be chosen, or a loss that is not finite.
    """
    device = next(net.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)  # of the low-rank updates
        gated = GatedDepth(copy.deepcopy(net), keep, lora_rank).train()
        learned = [p for p in gated.net.parameters() if p.requires_grad]
        groups = [{"params": [gated.gates], "lr": 1e-3}, {"params": learned, "lr": 1e-4}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0)
        average = gated.gates.detach().clone()
        for step in tqdm(range(steps), desc="choosing blocks", disable=not progress):
            gated.tau = 4 + (0.1 - 4) * step / max(steps - 1, 1)
            torch.manual_seed(seed * 1_000_003 + step)
            value = loss(gated, step)
            if not value.isfinite():
                raise ValueError(f"the loss at step {step} of choosing blocks is {value.item()}: nothing can be learnt")
            value.backward()
            nn.utils.clip_grad_norm_([gated.gates, *learned], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.lerp_(gated.gates.detach(), max(0.001, 9 / (10 + step)))  # warmed up: short runs forget the start
    return gated.choice(average)


# ---- Features for distillation ---------------------------------------------------------------------------------------


class Tapped(nn.Module):
    """A network that also returns its features: `tapped(x_t, t, cond) -> (prediction, [features])`.

    net          the bare network; it stays usable alone, and `tapped.net.parameters()` leaves the adapters out
    names        the layers to read, by default `net.feature_layers()`; their features come in this order
    adapters_to  channels of the teacher's features: each feature passes a 1x1 convolution without bias to that width,
                 initialised U(-0.005, 0.005), as in the paper's code. None: features as they are.

    For multi-GPU training wrap all of it, DDP(Tapped(...)), so that the adapters' gradients are averaged too.
    AttributeError for a name that is no layer of `net`, ValueError for `adapters_to` of another length.
    """

    def __init__(self, net: nn.Module, names: list[str] | None = None, adapters_to: list[int] | None = None):
        super().__init__()
        self.net, self.adapters = net, None
        self.names = net.feature_layers() if names is None else list(names)
        if adapters_to is not None:
            if len(adapters_to) != len(self.names):
                raise ValueError(f"{len(self.names)} features, but {len(adapters_to)} widths in adapters_to")
            pairs = zip(feature_channels(net, self.names), adapters_to, strict=True)
            self.adapters = nn.ModuleList([nn.Conv2d(own, theirs, 1, bias=False) for own, theirs in pairs])
            for adapter in self.adapters:
                nn.init.uniform_(adapter.weight, -0.005, 0.005)
        # the hooks stay (torch.compile cannot trace their coming and going) and do nothing while no forward below runs
        self.recorder = _Recorder()
        for name in self.names:
            net.get_submodule(name).register_forward_hook(self.recorder)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        outputs: dict[nn.Module, Tensor] = {}
        outer, self.recorder.outputs = self.recorder.outputs, outputs
        try:
            prediction = self.net(x_t, t, cond)
        finally:
            self.recorder.outputs = outer  # nothing of this call stays behind
        features = [outputs[self.net.get_submodule(name)] for name in self.names]  # each (B, C, H, W), C H W its own
        if hasattr(self.net, "feature"):
            features = [self.net.feature(output) for output in features]  # foreign layers return more than a tensor
        if self.adapters is not None:
            features = [adapter(f) for adapter, f in zip(self.adapters, features, strict=True)]
        return prediction, features


class _Recorder:
    """A forward hook that puts a layer's output into `outputs` while that is a dict."""

    def __init__(self) -> None:
        self.outputs: dict[nn.Module, Tensor] | None = None

    def __call__(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self.outputs is not None:
            self.outputs[layer] = output


def feature_channels(net: nn.Module, names: list[str] | None = None) -> list[int]:
    """Channels of these layers' outputs (default `net.feature_layers()`): those of the last convolution in each.

    A layer without any is itself linear (as the ends of some foreign attentions are).
    """
    names = net.feature_layers() if names is None else names
    convs = [[m for m in net.get_submodule(name).modules() if isinstance(m, nn.Conv2d)] for name in names]
    return [
        (layers or [net.get_submodule(name)])[-1].weight.shape[0] for name, layers in zip(names, convs, strict=True)
    ]


def feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Sum over the points of mean_B sum_CHW (student - teacher)^2, no gradient to the teacher; (B, C, H, W) each."""
    pairs = zip(student, teacher, strict=True)
    return sum(F.mse_loss(s.float(), t.detach().float(), reduction="sum") for s, t in pairs) / len(student[0])


def mean_feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """BK-SDM's: sum over the points of mean (student - teacher)^2, no gradient to the teacher; same shapes."""
    return sum(F.mse_loss(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True))


def masked_feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """TinyFusion's: mean over the points of mean (m_S h_S - m_T h_T)^2, no gradient to the teacher; (B, N, D) each.

    Each side's mask m drops what is 2 standard deviations or more from the mean of its sample (massive activations).
    """

    def masked(h: Tensor) -> Tensor:
        std, mean = torch.std_mean(h, dim=(1, 2), keepdim=True)  # (B, 1, 1)
        return h * ((h - mean).abs() < 2 * std)  # (B, N, D)

    pairs = zip(student, teacher, strict=True)
    return sum(F.mse_loss(masked(s.float()), masked(t.detach().float())) for s, t in pairs) / len(student)


# Which of a deep teacher's blocks the blocks of a shallow student are compared with, where it is not the rule below:
# published are D14 <- D28: 2i + 1, D7 <- D28: 4i + 3, D7 <- D14: 2i + 1 and these.
LAYER_MAPS = {(4, 28): [1, 8, 15, 22], (4, 7): [1, 3, 4, 6]}


def layer_map(student_depth: int, teacher_depth: int) -> list[int]:
    """The teacher's block for each of the student's: the last one of as many equal stretches."""
    if student_depth > teacher_depth:
        raise ValueError(f"a student of {student_depth} blocks cannot be mapped to a teacher of {teacher_depth}")
    rule = [math.ceil((i + 1) * teacher_depth / student_depth) - 1 for i in range(student_depth)]
    return LAYER_MAPS.get((student_depth, teacher_depth), rule)

"""The networks, and how to make them smaller.

A network is `net(x_t, t, cond=None) -> prediction`: x_t (B, C, H, W), t (B,), cond a dict of tensors or None. Here are
`UNet`, the pixel-space network of DDIM (arXiv 2010.02502), and `DiT`, the transformer on latents (arXiv 2212.09748);
their parameters carry the original names, so public checkpoints fit as they are.

    teacher = UNet(64, dropout=0.1)                 # CelebA, 78.7 M parameters
    student = prune_channels(teacher, ratio=0.9)    # 1.3 M, weights taken from the teacher
    student.save("student")                         # model.safetensors + config.json, never a pickle
    student = load("student")

Letters in shape comments: B batch, C channels, H W height and width, N tokens, D width of tokens or time embedding.
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

FILES = ("model.safetensors", "config.json")  # of a saved network, in the order in which they appear


class Network(nn.Module):
    """What every network has. Code outside a network uses these members and no others."""

    config: dict[str, Any]  # rebuilds it together with its weights; plain data, for JSON
    shape: tuple[int, int, int]  # (C, H, W) of what it takes
    arch: str  # what --arch calls it
    process: dict[str, Any] = {}  # noqa: RUF012  how it understands time: arguments of `distil.process.make_process`
    conditions: tuple[str, ...] = ()  # the keys of `cond` that it takes
    condition_dropout: float = 0.0  # share of the samples whose `cond` training replaces by `no_condition()`
    guided_channels: int | None = None  # how many channels guidance acts on; None: all
    num_classes: int | None = None  # how many classes it knows; None: it takes none
    predicts_variance: bool = False  # its output has 2 C channels, see distil/process.py
    levels: int = 1  # of resolution; height and width halve between them
    last_layer: str = "conv_out"  # whose outputs are never pruned
    pruning: str = "channels"  # what makes it smaller: "channels", "blocks" or "stages"
    blocks: Sequence[nn.Module]  # equal parts, of which some may be left out; () without
    width: int | None = None  # of a token, where it has blocks
    kept: list[int] | None = None  # of a network that `prune_depth` made: which blocks of the other one these are
    can_head: bool = False  # it takes a `StatisticsHead`
    source: str | None = None  # its class, if it is a network of diffusers

    def __init__(self):
        super().__init__()
        self.head: nn.Module | None = None  # what its output passes through last: `head(x_t, t, output)`

    def no_condition(self) -> dict[str, Tensor] | None:
        """The `cond` of one sample that stands for none, as guidance needs it; None if there is none."""
        return None

    def fit(self, shape: tuple[int, ...], null: dict[str, Tensor] | None = None, dropout: float = 0.0) -> None:
        """Makes it a network for samples of `shape` (C, H, W), with `null` as `no_condition()` for a share `dropout`.

        ValueError if it cannot take them.
        """
        if tuple(shape) != self.shape:
            raise ValueError(f"it takes samples of shape {self.shape}, not {tuple(shape)}: use one that fits")

    def stages(self) -> list[nn.Module]:
        """The parts that run one after the other, in which FSDP gathers the weights; [] for all at once."""
        return list(self.blocks)

    def left(self, root: str, layers: list[nn.Module], channels: int, ratio: float) -> tuple[int, int, int]:
        """What `prune_channels` leaves of the channels that these `layers` share, of which `root` names one.

        (groups, run, stay): of each of so many equal groups `stay` runs of `run` neighbours. This is Diff-Pruning's.
        """
        norms = [layer.num_groups for layer in layers if isinstance(layer, nn.GroupNorm)]
        groups = max((g for g in norms if channels % g == 0), default=1)
        remove = (channels - int(channels * (1 - ratio))) // groups
        return groups, 1, max(1, channels // groups - remove)

    def narrowed(self, ratio: float) -> "Network":
        """Of a copy that torch-pruning made narrower by `ratio`: a network that is built for these widths."""
        raise NotImplementedError

    def norms(self) -> dict[str, nn.GroupNorm]:
        """All norm layers of groups by name."""
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, nn.GroupNorm)}

    def with_groups(self, groups: dict[str, int]) -> "Network":
        """An independent network with the same weights under norms of about so many groups each."""
        raise NotImplementedError

    def keep_blocks(self, keep: list[int]) -> "Network":
        """An independent network of these `blocks`, in this order."""
        raise NotImplementedError

    def block_tokens(self, args: tuple, kwargs: dict, output: Any) -> tuple[Tensor, Tensor]:
        """Of a call of one of its blocks: the tokens (B, N, D) that went in, and those that came out."""
        return args[0], output

    def skip_block(self, on: Tensor, args: tuple, kwargs: dict, output: Any) -> Any:
        """The output of a block where `on` (B, 1, 1) is 1, and what went into it where `on` is 0."""
        return (on * output + (1 - on) * args[0]).to(output.dtype)

    def feature_layers(self, other: "Network | None" = None) -> list[str]:
        """Names of the layers whose outputs feature distillation compares, where `other` is the other network."""
        names = {module: name for name, module in self.named_modules()}
        return [names[block] for block in self.blocks]

    def feature(self, output: Any) -> Tensor:
        """The feature in what such a layer returns."""
        return output

    def feature_channels(self, names: list[str]) -> list[int]:
        """Channels of the features of these layers: those of the last convolution in each, or of the layer itself."""
        if self.pruning == "blocks":
            return [self.width] * len(names)
        layers = [self.get_submodule(name) for name in names]
        convs = [[module for module in layer.modules() if isinstance(module, nn.Conv2d)] for layer in layers]
        return [[layer, *inside][-1].weight.shape[0] for layer, inside in zip(layers, convs, strict=True)]

    def attention_macs(self) -> int:
        """Multiply-adds of the products inside attention, for one sample; counters of layers miss them. A U-Net's are
        left out, as in the counts that Diff-Pruning publishes."""
        return 0

    def settle(self, dtype: torch.dtype) -> None:
        """As a frozen teacher it may keep its weights in what it computes with, `dtype`."""

    def recompute(self) -> None:
        """From now on activations inside the blocks are computed again in the backward pass instead of kept."""
        raise ValueError(f"a {type(self).__name__} cannot recompute its activations: --accumulate saves memory, too")

    def set_dropout(self, p: float) -> None:
        """The dropout of all layers that have one."""
        if "dropout" in self.config:
            self.config["dropout"] = p
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    def reset_parameters(self) -> None:
        """New random weights for every layer, as torch draws them."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def set_head(self, head: str | None) -> None:
        """Gives it a new head, "statistics" (`StatisticsHead`), which starts as the identity, or takes it away."""
        if not self.can_head or head not in (None, "statistics"):
            raise ValueError(f'a head is "statistics" or None, of a UNet or a DiT: {head!r} on a {type(self).__name__}')
        self.config["head"] = head
        self.head = None if head is None else StatisticsHead(self.shape[0]).to(next(self.parameters()).device)

    @classmethod
    def empty(cls, config: dict[str, Any], state: dict[str, Tensor]) -> "Network":
        """A network of this config that the weights `state` fit, for the meta device."""
        return cls(**config)

    def check_widths(self) -> None:
        """ValueError if the layers do not fit each other; where the config says every width they always do."""

    def like(self, config: dict[str, Any], state: dict[str, Tensor]) -> "Network":
        """An independent network of this kind with other weights; mode and process are those of this one."""
        net = build(type(self), config, state).train(self.training)
        net.process = self.process
        return net

    def save(self, folder: str | os.PathLike) -> None:
        """Writes model.safetensors and config.json into `folder`; `load(folder)` gives the network back, bit for bit.

        Half precision comes back as the same numbers in float32.

        Each file appears whole or not at all, config.json last: a new folder without it is unfinished.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"class": type(self).__name__, **self.config} | ({"process": self.process} if self.process else {})
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        contents = to_bytes(state, sealed(state)), f"{json.dumps(config, indent=1)}\n".encode()
        for name, content in zip(FILES, contents, strict=True):
            part = folder / f".{name}.part"  # one process at a time saves here; what a killed one left is overwritten
            try:
                with part.open("wb") as file:  # save_file would shut out all other users
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, folder / name)
            finally:
                part.unlink(missing_ok=True)


# ---- What instance norms erase ---------------------------------------------------------------------------------------


def statistics(x_t: Tensor, e: Tensor) -> Tensor:
    """[1, mean x_t, std x_t, mean e, std e] of each image and channel: (B, C, *spatial) twice -> (B, C, 5) float32."""
    both = torch.stack([x_t.flatten(2).float(), e.flatten(2).float()])  # (2, B, C, N)
    variance, mean = torch.var_mean(both, dim=3, correction=0)  # (2, B, C) each
    std = (variance + 1e-8).sqrt()  # of a flat image the root alone has no gradient
    return torch.stack([torch.ones_like(mean[0]), mean[0], std[0], mean[1], std[1]], dim=2)


def correct(x_t: Tensor, output: Tensor, weights: Tensor) -> Tensor:
    """An output whose prediction e became b0 + b1 e, with (b0, b1 - 1) = statistics(x_t, e) @ weights.

    x_t      (B, C, *spatial), what the network saw
    output   (B, C or 2 C, *spatial): e, and a variance, which stays as it is
    weights  (B, C, 5, 2); zeros give the output back, bit for bit
    """
    e = output[:, : x_t.shape[1]]  # (B, C, *spatial)
    line = (statistics(x_t, e)[..., None] * weights).sum(2)  # (B, C, 2)
    b0, slope = line.unflatten(1, (-1, *[1] * (e.ndim - 2))).unbind(-1)  # (B, C, 1, 1) each
    return torch.cat([(e + b0 + slope * e).to(output.dtype), output[:, e.shape[1] :]], dim=1)


class StatisticsHead(nn.Module):
    """`correct` with weights that a small MLP makes of the time: x_t, t (B,), output -> the output, corrected.

    It starts as the identity and learns with its network. 10 C numbers a timestep; of C = 1 channel 1,386 parameters.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 10 * channels))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        weights = self.mlp(timestep_embedding(t, 32).to(self.mlp[0].weight.dtype))  # (B, 10 C)
        return correct(x_t, output, weights.unflatten(1, (-1, 5, 2)))


# ---- U-Net -----------------------------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, dim: int, ends: bool = True) -> Tensor:
    """Sines, then cosines of t at dim // 2 frequencies from 1 down to 1e-4: (B,) -> (B, dim), float32.

    As in DDPM; an odd `dim` is filled up with a zero. ends=False is DiT's: cosines first, 1e-4 itself left out.
    """
    half = dim // 2
    steps = half - 1 if ends else half
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / steps))
    angles = t.float()[:, None] * freqs  # (B, dim // 2)
    waves = [angles.sin(), angles.cos()] if ends else [angles.cos(), angles.sin()]
    return F.pad(torch.cat(waves, dim=1), (0, dim % 2))  # (B, dim)


class ResnetBlock(nn.Module):
    """Two convolutions, the time between them, and a shortcut: (B, C, H, W), (B, D) -> (B, out_channels, H, W).

    The shortcut is a convolution where the widths differ as built; pruning never adds or removes one.
    """

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, in_channels, eps=1e-6)  # `set_norm_groups` says how many groups
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(1, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out_channels, H, W)
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, out_channels, H, W)
        # the shortcut first: torch-pruning walks backwards through such sums, and pruning is greedy, so this order
        # decides which group of layers is cut before which, and it is the published one
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention between all pixels, one head, with a residual: (B, C, H, W) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # contiguous, for PyTorch's fused attention takes nothing else and is two to three times as fast on thin layers
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c").contiguous() for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, C), scaled by the CURRENT width of q ^ -0.5
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class UNet(Network):
    """The ddim U-Net: `net(x_t, t) -> prediction`, (B, in_channels, H, W), (B,) -> (B, out_channels, H, W).

    image_size       height and width it is made for; decides at which levels attention stands
    channels         width of the first level; level i has channels * channel_mults[i]
    num_res_blocks   blocks of a level on the way down; on the way up there is one more
    attention_resolutions  sizes of the feature map at which attention follows every block (the middle always has one)
    norm_groups      groups of every GroupNorm, or {norm layer name: groups}
    head             "statistics" gives back what norms of few channels a group erase, see `StatisticsHead`

    These are the widths before any pruning; those of a pruned network are the shapes of its weights (`build`).
    Published settings: CelebA 64 `UNet(64, dropout=0.1)`, CIFAR-10 `UNet(32, channel_mults=(1, 2, 2, 2), dropout=0.1)`,
    LSUN 256 `UNet(256, channel_mults=(1, 1, 2, 2, 4, 4))`. ValueError for sizes that do not fit together.
    """

    arch, blocks, can_head = "unet", (), True

    def __init__(
        self, image_size: int, in_channels: int = 3, out_channels: int | None = None, channels: int = 128,
        channel_mults: tuple[int, ...] = (1, 2, 2, 2, 4), num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (16,), dropout: float = 0.0,
        norm_groups: int | dict[str, int] = 32, head: str | None = None,
    ):  # fmt: skip
        channel_mults, attention_resolutions = list(channel_mults), list(attention_resolutions)
        out_channels = in_channels if out_channels is None else out_channels
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config, self.levels, self.predicts_variance = config, len(channel_mults), out_channels == 2 * in_channels
        if not channel_mults or min(image_size, in_channels, out_channels, num_res_blocks, *channel_mults) < 1:
            raise ValueError("image_size, in_channels, out_channels, num_res_blocks and channel_mults must be positive")
        if channels < 4:
            raise ValueError(f"channels must be at least 4 (the time embedding needs two frequencies), not {channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        if image_size % 2 ** (halvings := self.levels - 1):
            raise ValueError(f"image_size {image_size} cannot be halved {halvings} times, once between two levels")
        self.shape, d = (in_channels, image_size, image_size), 4 * channels
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(channels, d), nn.Linear(d, d)])
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)

        def level(i: int, inputs: list[int]) -> nn.Module:
            """The blocks of level i, one for each of these widths of its input."""
            part, width = nn.Module(), channels * channel_mults[i]
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for incoming in inputs:
                part.block.append(ResnetBlock(incoming, width, d, dropout))
                if image_size // 2**i in attention_resolutions:
                    part.attn.append(AttnBlock(width))
            return part

        width, skips = channels, [channels]  # of what flows between the layers, and of what the way up will read
        self.down = nn.ModuleList()
        for i in range(self.levels):
            before, width = width, channels * channel_mults[i]
            self.down.append(level(i, [before, *[width] * (num_res_blocks - 1)]))
            skips += [width] * num_res_blocks
            if i < self.levels - 1:
                self.down[i].downsample = nn.Module()
                self.down[i].downsample.conv = nn.Conv2d(width, width, 3, stride=2)
                skips.append(width)
        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(width, width, d, dropout)
        self.mid.attn_1 = AttnBlock(width)
        self.mid.block_2 = ResnetBlock(width, width, d, dropout)

        self.up = nn.ModuleList()
        for i in reversed(range(self.levels)):
            before, width = width, channels * channel_mults[i]
            self.up.insert(0, level(i, [w + skips.pop() for w in [before, *[width] * num_res_blocks]]))
            if i > 0:
                self.up[0].upsample = nn.Module()  # up[i] works at the resolution of down[i]
                self.up[0].upsample.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm_out = nn.GroupNorm(1, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self.set_norm_groups(norm_groups)
        self.set_head(head)

    def set_norm_groups(self, norm_groups: int | dict[str, int]) -> None:
        """The groups of every norm, or {norm layer name: groups}; ValueError if they do not divide its channels."""
        norms = self.norms()
        named = norm_groups if isinstance(norm_groups, dict) else dict.fromkeys(norms, norm_groups)
        if unknown := named.keys() - norms.keys():
            raise ValueError(f"norm_groups names {min(unknown)}, but no norm of this network is called so")
        for name, norm in norms.items():
            norm.num_groups = named.get(name, 0)
            if norm.num_groups < 1 or norm.num_channels % norm.num_groups:
                cut = f"{norm.num_channels} channels, they cannot be split into {norm.num_groups} groups"
                raise ValueError(f"norm_groups: {name} has {cut}")
        self.config["norm_groups"] = norm_groups

    def narrowed(self, ratio: float) -> "UNet":
        return regroup(self, group_widths(self))

    def with_groups(self, groups: dict[str, int]) -> "UNet":
        net = copy.deepcopy(self).requires_grad_(True)
        net.set_norm_groups(groups if len({*groups.values()}) > 1 else max(groups.values()))  # one for all
        net.check_widths()
        return net

    @classmethod
    def empty(cls, config: dict[str, Any], state: dict[str, Tensor]) -> "UNet":
        """A U-Net as wide as the weights `state`, for the meta device; ValueError if these do not fit together."""
        net = cls(**{**config, "norm_groups": 1})
        for name, layer in net.named_modules():
            if type(layer) in SIZES and {f"{name}.weight", f"{name}.bias"} <= state.keys():
                shapes, built = (state[f"{name}.weight"].shape, state[f"{name}.bias"].shape), layer.weight.shape
                if len(shapes[0]) != len(built) or shapes[0][2:] != built[2:] or shapes[1] != shapes[0][:1]:
                    raise ValueError(f"{name} cannot have a weight {tuple(shapes[0])} and a bias {tuple(shapes[1])}")
                layer.weight, layer.bias = (nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes)
                for attribute, size in zip(SIZES[type(layer)], shapes[0], strict=False):
                    setattr(layer, attribute, size)
        net.set_norm_groups(config.get("norm_groups", 32))
        if (frequencies := net.temb.dense[0].in_features) != net.config["channels"]:  # pruning never changes it
            raise ValueError(f"temb.dense.0 takes {frequencies} numbers, but the config has {net.config['channels']}")
        return net

    @torch.no_grad()
    def check_widths(self) -> None:
        side, training = min(self.shape[1], 2**self.levels), self.training  # small, with 2x2 pixels at the lowest level
        x_t = self.conv_in.weight.new_zeros(1, self.shape[0], side, side)  # on the meta device this would take longer
        try:
            output = self.eval()(x_t, x_t.new_zeros(1))
        except (RuntimeError, ValueError) as error:  # an instance norm takes no single pixel
            raise ValueError(f"shapes of the weights do not fit together, or {side}x{side} pixels: {error}") from error
        finally:
            self.train(training)
        if output.shape[1] != self.config["out_channels"]:
            raise ValueError(f"the weights give {output.shape[1]} channels, the config {self.config['out_channels']}")

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """x_t (B, in_channels, H, W), t (B,) integers or floats -> (B, out_channels, H, W); `cond` must be empty."""
        channels, factor, shape = self.conv_in.in_channels, 2 ** (len(self.down) - 1), tuple(x_t.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % factor or shape[3] % factor:
            raise ValueError(f"x_t must be (B, {channels}, H, W) with H and W multiples of {factor}, not {shape}")
        if cond:
            raise ValueError(f"this UNet takes no condition, but cond holds {', '.join(cond)}")

        temb = timestep_embedding(t, self.temb.dense[0].in_features).to(x_t.dtype)  # (B, channels)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))  # (B, D)
        h = self.conv_in(x_t)
        skips = [h]
        for i, level in enumerate(self.down):
            for j, block in enumerate(level.block):
                h = block(h, temb)
                h = level.attn[j](h) if level.attn else h
                skips.append(h)
            if i < len(self.down) - 1:
                h = level.downsample.conv(F.pad(h, (0, 1, 0, 1)))  # H, W halve; below and to the right, as ddim pads
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for i, level in reversed(list(enumerate(self.up))):
            for j, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                h = level.attn[j](h) if level.attn else h
            if i > 0:
                h = level.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))  # H, W double
        output = self.conv_out(F.silu(self.norm_out(h)))  # (B, out_channels, H, W)
        return output if self.head is None else self.head(x_t, t, output)

    def reset_parameters(self) -> None:  # in running order, in which a new network draws its weights
        for name in ("temb", "conv_in", *self.feature_layers(), "norm_out", "conv_out"):
            for module in self.get_submodule(name).modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        self.set_head(self.config["head"])

    def feature_layers(self, other: Network | None = None) -> list[str]:
        """Every block, every attention and the convolution of every down- and upsampling, in running order.

        As in the paper's code: 41 for CelebA, 34 for CIFAR-10, 48 for LSUN.
        """
        names = []
        for way, levels in (("down", range(len(self.down))), ("up", reversed(range(len(self.up))))):
            if way == "up":
                names += ["mid.block_1", "mid.attn_1", "mid.block_2"]
            for i in levels:
                level = getattr(self, way)[i]
                for j in range(len(level.block)):
                    names += [f"{way}.{i}.block.{j}", *([f"{way}.{i}.attn.{j}"] if level.attn else [])]
                if hasattr(level, f"{way}sample"):
                    names.append(f"{way}.{i}.{way}sample.conv")
        return names


SIZES = {  # what the axes of a layer's weight are called
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.GroupNorm: ("num_channels",),
}


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
    class_dropout_prob  share of the labels that training replaces by "no class", for guidance; 0: there is no such one
    learn_sigma      out_channels = 2 in_channels: the prediction, then what the variance is interpolated with
    head             "statistics" or None, as of a `UNet`

    The default is DiT-XL/2 for 256x256 images. ValueError for sizes that do not fit together.
    """

    arch, pruning, can_head = "dit", "blocks", True

    def __init__(
        self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
        depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, num_classes: int = 1000,
        class_dropout_prob: float = 0.1, learn_sigma: bool = True, head: str | None = None,
    ):  # fmt: skip
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        if min(input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes) < 1:
            raise ValueError("the sizes of a DiT must be positive")
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            wants = "an input_size in multiples of patch_size and a hidden_size in multiples of num_heads and 4"
            raise ValueError(f"a DiT needs {wants}, not {input_size}, {patch_size}, {hidden_size}, {num_heads}")
        self.shape, self.conditions = (in_channels, input_size, input_size), ("y",)
        self.num_classes, self.predicts_variance = num_classes, learn_sigma
        self.condition_dropout, self.width = class_dropout_prob, hidden_size
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
        self.set_head(head)

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

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._initialize()
        self.set_head(self.config["head"])

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
        c = self.t_embedder.mlp(timestep_embedding(t, 256, ends=False).to(h.dtype))  # (B, D)
        c = c + self.y_embedder.embedding_table(cond["y"])  # (B, D)
        for block in self.blocks:
            h = block(h, c)  # (B, N, D)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)  # (B, 1, D)
        h = self.final_layer.linear(modulate(self.final_layer.norm_final(h), shift, scale))  # (B, N, p * p * C_out)
        rows, p = self.shape[1] // self.config["patch_size"], self.config["patch_size"]
        output = rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)  # (B, C_out, H, W)
        return output if self.head is None else self.head(x_t, t, output)

    def no_condition(self) -> dict[str, Tensor] | None:
        return {"y": torch.tensor(self.num_classes)} if self.condition_dropout > 0 else None

    def keep_blocks(self, keep: list[int]) -> "DiT":
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("blocks.")}
        for new, old in enumerate(keep):
            state |= {f"blocks.{new}.{name}": tensor for name, tensor in self.blocks[old].state_dict().items()}
        return self.like({**self.config, "depth": len(keep)}, state)

    def attention_macs(self) -> int:
        return len(self.blocks) * 2 * self.pos_embed.shape[1] ** 2 * self.config["hidden_size"]


def position_table(grid: int, dim: int) -> Tensor:
    """The fixed positions of grid x grid tokens, (grid^2, dim): sines and cosines of the column, then of the row."""
    place = torch.arange(grid, dtype=torch.float64)
    angles = place[:, None] * 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (grid, dim / 4)
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    column, row = one.expand(grid, -1, -1), one[:, None].expand(-1, grid, -1)  # (grid, grid, dim / 2)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()  # (grid^2, dim)


# ---- Loading ---------------------------------------------------------------------------------------------------------

NETWORKS = {"UNet": UNet, "DiT": DiT}  # what a config.json may name as its "class"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that change with any bit of the tensors, whatever device they are on."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def sealed(state: dict[str, Tensor]) -> dict[str, str]:
    """The metadata of a .safetensors file with these weights: `read_weights` finds out by them if a bit has changed."""
    return {"format": "pt", "fingerprint": fingerprint(state[name] for name in sorted(state))}


def load(folder: str | os.PathLike) -> Network:
    """The network that `net.save(folder)` wrote, on the CPU, in eval mode; `distil.teachers.load` reads others, too.

    FileNotFoundError if a file is missing; ValueError if one is damaged, or if the weights do not fit the config.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is not a saved network: there is no such folder")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        found = [*folder.glob("*/model.safetensors"), *folder.glob("*/*/model.safetensors")]
        inside = ", ".join(sorted(str(path.parent.relative_to(folder)) for path in found))
        hint = f"; networks in it: {inside}" if inside else ""
        raise FileNotFoundError(f"{folder} is not a saved network: it has no {' and no '.join(missing)}{hint}")
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict) or config.get("class") not in NETWORKS:
            raise ValueError(f'config.json must have a "class", one of: {", ".join(NETWORKS)}')
        network, process = NETWORKS[config.pop("class")], dict(config.pop("process", {}))
        config.pop("widths", None)  # of older files; the weights have them, too
        if (steps := config.pop("fold_steps", None)) is not None:  # of older files
            process = {"fold": steps}
        if isinstance(fold := process.get("fold"), int):  # of older files, too: the ends of so many equal parts
            process["fold"] = [(t + 1) * 1000 // fold - 1 for t in range(fold)]
        net = build(network, config, read_weights(folder / "model.safetensors")).eval()
    except Exception as error:  # a config can be wrong in any way; what torch says of it comes as any kind of error
        if isinstance(error, OSError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
    net.process = process
    return net


def build(network: type[Network], config: dict[str, Any], state: dict[str, Tensor]) -> Network:
    """A network from its config and a copy of `state`; made on the meta device, so nothing is initialised in vain.

    ValueError if the weights do not fit the config.
    """
    largest = max([10_000, *(size for tensor in state.values() for size in tensor.shape)])
    for name, value in config.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not 0 <= number <= largest:  # it would fill the memory
                raise ValueError(f"{name} is {number} in config.json, which does not fit the weights")
    with torch.device("meta"):
        net = network.empty(config, state)
    check_fit(net, state)
    net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    net.check_widths()
    return net


def check_fit(net: nn.Module, state: dict[str, Tensor]) -> None:
    """ValueError that names the first few weights of `state` that are absent, too many, or of another shape."""
    ours = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    pairs = {name: (ours.get(name, "absent"), theirs.get(name, "absent")) for name in {**ours, **theirs}}
    wrong = [f"{name} is {a} by the config, but {b} in the weights" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError("; ".join(wrong[:3]) + more)


def load_checkpoint(net: Network, path: str | os.PathLike) -> Network:
    """Fills `net` from a public checkpoint file, and returns it; its device, dtype and mode stay.

    OSError if the file cannot be opened; ValueError if it is damaged, holds pickled objects or no weights, or does not
    fit.
    """
    state = read_weights(Path(path))
    try:
        check_fit(net, state)
    except ValueError as error:
        settings = ", ".join(f"{name}={value!r}" for name, value in net.config.items())
        raise ValueError(f"{path} does not fit {type(net).__name__}({settings}): {error}") from error
    net.load_state_dict(state)
    return net


def read_weights(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a checkpoint file, on the CPU. Nothing in the file is ever executed.

    Weights in half precision become float32. ValueError: a file that is damaged or holds something else.
    Reads a plain state dict (pesser/pytorch_diffusion), the list [model, optimizer, epoch, step, EMA] of
    ermongroup/ddim and Diff-Pruning, {"ema": ...} as of DiT, {"model": ...}, {"state_dict": ...} and .safetensors, with
    or without a "module." before the names; averaged weights where there are any.
    """
    with path.open("rb") as file:  # a file that is not there is no damaged file
        try:
            if path.suffix == ".safetensors":
                content = load_file(path)
                with safe_open(path, "pt") as opened:
                    expected = opened.metadata() or {}
                if expected.get("fingerprint") not in (None, sealed(content)["fingerprint"]):
                    raise ValueError("another checksum")
            else:
                with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's settings: plain data
                    content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no error of its own: at least six kinds come out of a cut file
            if pickled := re.search(r"GLOBAL (\S+)", str(error)):
                raise ValueError(f"{path} holds a pickled {pickled[1]}, and {PICKLED.format(path=path)}") from error
            if isinstance(error, OSError | MemoryError):
                raise OSError(f"{path} cannot be read: {error}") from error
            size = f"{path.stat().st_size:,} bytes"
            remedy = "fetch it again, or remove it and give the command again that wrote it"
            raise ValueError(f"{path} ({size}) is cut off, damaged, or no checkpoint: {remedy}") from error
    if isinstance(content, list) and content:  # [model, optimizer, epoch, step, EMA], the last one absent without EMA
        content = content[4] if len(content) > 4 and isinstance(content[4], dict) else content[0]
    if isinstance(content, dict):
        content = next((content[key] for key in ("ema", "model", "state_dict") if key in content), content)
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no weights: neither a state dict nor a list or dict with one")
    wrong = [name for name, x in content.items() if not (x.is_floating_point() and x.isfinite().all())]
    if wrong:
        raise ValueError(f"{path} holds no weights that can be used: {wrong[0]} is not all finite floats")
    halves = (torch.float16, torch.bfloat16)
    content = {name: tensor.float() if tensor.dtype in halves else tensor for name, tensor in content.items()}
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


PICKLED = (  # Diff-Pruning's files hold [network, ..., its averaged weights as a list]
    "opening it would run code from the file; if you trust it, write its weights to a new file where its code can "
    "be imported: python -c \"import torch; x = torch.load('{path}', 'cpu', weights_only=False); "
    "x = x if isinstance(x, list) else [x]; [p.data.copy_(e) for e, p in zip(sum(x[4:5], []), x[0].parameters())]; "
    "torch.save(x[0].state_dict(), 'weights.pt')\""
)


# ---- Pruning ---------------------------------------------------------------------------------------------------------


def prune_channels(
    net: Network, ratio: float, importance: str | Callable = "magnitude", norm_groups: str = "keep", seed: int = 0
) -> Network:
    """A smaller, independent copy of `net` in which every layer lost the share `ratio` of its channels.

    The rule of Diff-Pruning (arXiv 2305.10924): channels that are added to each other go together. Of C such channels
    C - int(C * (1 - ratio)) are to go, the least important ones; where a GroupNorm of g groups sees them, a g-th of
    that, rounded down, goes from EACH group, so the width stays a multiple of g (32 groups, ratio 0.9: 128 -> 32).

    importance   "magnitude": sum of w^2 over all weights that write or read a channel; "taylor", the paper's: sum of
                 (w * gradient)^2 over the same weights, plus |w * gradient| of the norms' weights (first call
                 `distil.importance.accumulate_gradients`); "random", drawn from `seed`; or a function from a
                 torch-pruning Group to a score per channel
    norm_groups  "keep" the NUMBER of groups, as the paper does (fewer only where it does not divide the new width). At
                 90 % most groups are left with one channel: an instance norm, which erases its mean and scale.
                 "scale" it, so that the channels PER group stay (or the next larger number that divides the width)

    The copy has the device, dtype and mode of `net`. "random" works on the meta device too. ValueError for a bad
    argument.
    """
    import torch_pruning as tp

    if getattr(net, "pruning", None) != "channels":  # a user may give any module
        raise ValueError(f"prune_channels takes a UNet, not a {type(net).__name__}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share of channels to remove, in [0, 1), not {ratio}")
    if norm_groups not in ("keep", "scale"):
        raise ValueError(f'norm_groups must be "keep" or "scale", not {norm_groups!r}')
    score = _scores(net, importance, seed)

    cut = copy.deepcopy(net).requires_grad_(True)  # torch-pruning cuts it in place; a plain network takes its weights
    for new, old in zip(cut.parameters(), net.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    head, cut.head = cut.head, None  # it has no channels to lose
    # Which channels belong together does not depend on the image size, so trace the smallest: 2x2 pixels on the lowest
    # level (one would be too few for an instance norm). Tracing 256x256 would take 20 GiB.
    x = next(cut.parameters()).new_zeros(1, net.shape[0], 2**net.levels, 2**net.levels)
    t = torch.zeros(1, dtype=torch.long, device=x.device)
    with torch.enable_grad():
        inputs = {"x_t": x, "t": t, "cond": dict.fromkeys(net.conditions, t)}
        graph = tp.DependencyGraph()
        graph.get_pruner_of_module = functools.cache(graph.get_pruner_of_module)  # it is asked 177,000 times for CelebA
        graph.build_dependency(cut, inputs)
    names, last = {module: name for name, module in cut.named_modules()}, [cut.get_submodule(net.last_layer)]
    for group in graph.get_all_groups(ignored_layers=last, root_module_types=[nn.Conv2d, nn.Linear]):
        root, prune = group[0].dep.target.module, group[0].dep.handler
        channels = root.weight.shape[0]
        g, run, stay = net.left(names[root], [dep.target.module for dep, _ in group], channels, ratio)
        n = channels // (g * run)  # runs in a group
        if stay < n:
            scores = rearrange(score(group).float().cpu(), "(g n r) -> g n r", g=g, r=run).sum(2)
            lowest = scores.argsort(dim=1, stable=True)[:, : n - stay] + torch.arange(g)[:, None] * n  # (g, n - stay)
            gone = lowest[..., None] * run + torch.arange(run)  # (g, n - stay, run)
            graph.get_pruning_group(root, prune, sorted(gone.flatten().tolist())).prune()
    cut.head = head
    small = cut.train(net.training).narrowed(ratio)  # tracing has put it into eval mode
    return small if norm_groups == "keep" else regroup(small, group_widths(net))


def regroup(net: Network, channels_per_group: int | dict[str, int]) -> Network:
    """An independent copy of `net` whose norms have groups of this many channels: the same weights, another function.

    Pruning leaves norms of one channel a group, which erase its mean and scale; wider groups keep them. The network
    has to be trained on for a while. {norm layer name: channels} for norms that differ, as `group_widths` gives them.
    Where the number does not divide a width, the next larger one that does is taken. ValueError for a number below 1,
    or for names that are not those of the norms.
    """
    norms = net.norms()
    if not norms:
        raise ValueError(f"regroup takes a network with norms of groups, and a {type(net).__name__} has none")
    wanted = channels_per_group if isinstance(channels_per_group, dict) else dict.fromkeys(norms, channels_per_group)
    if wanted.keys() != norms.keys():
        named = ", ".join(wanted) or "none"
        raise ValueError(f"channels_per_group must name the norms {', '.join(norms)}, not {named}")
    if min(wanted.values()) < 1:
        raise ValueError(f"channels_per_group must be at least 1, not {min(wanted.values())}")
    groups = {name: _groups(norm.num_channels, wanted[name]) for name, norm in norms.items()}
    return net.with_groups(groups)


def group_widths(net: Network) -> dict[str, int]:
    """{norm layer name: channels in each of its groups}, rounded up where pruning has left a remainder."""
    return {name: math.ceil(norm.num_channels / norm.num_groups) for name, norm in net.norms().items()}


def usual_groups(channels: int) -> int:
    """Groups for the norms of a new U-Net with so many channels at its first level: of about four, at most 32."""
    return _groups(channels, max(4, math.ceil(channels / 32)))


def lonely_norms(net: nn.Module) -> int:
    """How many norms have one channel a group: instance norms, which erase each channel's mean and scale."""
    norms = (layer for layer in net.modules() if isinstance(layer, nn.GroupNorm))
    return sum(norm.num_groups == norm.num_channels > 1 for norm in norms)


def _groups(width: int, channels_per_group: int) -> int:
    """Into how many groups of at least so many channels a norm of this width can be cut."""
    return next((width // k for k in range(channels_per_group, width) if width % k == 0), 1)


def _scores(net: UNet, importance: str | Callable, seed: int) -> Callable[[Any], Tensor]:
    """The function from a torch-pruning group to one score per channel that `importance` names."""
    if callable(importance):
        return importance
    if importance == "random":
        generator = torch.Generator().manual_seed(seed)
        return lambda group: torch.rand(len(group[0].idxs), generator=generator)
    if importance not in ("magnitude", "taylor"):
        raise ValueError(f'importance must be "magnitude", "taylor", "random" or a function, not {importance!r}')
    taylor = importance == "taylor"
    if taylor and any(p.grad is None for p in net.parameters()):
        raise ValueError('importance "taylor" needs gradients: call accumulate_gradients(net, ...) first')

    def squares(group: Any) -> Tensor:
        """The sum of w^2, or (w * gradient)^2, over every weight that writes or reads a channel; no normalisation.

        Layers that meet a channel several times do not count: their vectors are longer than the first one.
        """
        scores = []
        for dep, idxs in group:
            weight = getattr(dep.target.module, "weight", None)
            if weight is None or (weight.ndim == 1 and not taylor):
                continue
            value = weight.detach().float() * (weight.grad.float() if taylor else 1)
            if weight.ndim == 1:  # of a norm
                scores.append(value.abs()[idxs])
            else:
                reads = dep.handler.__name__ == "prune_in_channels" or isinstance(dep.target.module, nn.Embedding)
                scores.append((value.transpose(0, 1) if reads else value).square().flatten(1).sum(1)[idxs])
        return sum(score for score in scores if len(score) == len(scores[0]))

    return squares


def prune_depth(net: Network, keep: int | Sequence[int]) -> Network:
    """A shallower, independent copy of `net` that has only the blocks `keep`: their indices, or how many, then evenly.

    ValueError for indices that are not there, not growing, or none at all.
    """
    depth = len(net.blocks)
    keep = uniform_blocks(depth, keep) if isinstance(keep, int) else [int(i) for i in keep]
    check_blocks(depth, keep)
    small = net.keep_blocks(keep)
    small.kept = keep
    return small


def check_blocks(depth: int, keep: Sequence[int]) -> None:
    """ValueError unless `keep` holds growing numbers of some of `depth` blocks."""
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= depth:
        raise ValueError(f"the blocks that stay must be growing numbers from 0 to {depth - 1}, not {list(keep)}")


def uniform_blocks(depth: int, n: int) -> list[int]:
    """n of `depth` blocks, evenly spaced from the first to the last (28, 14: the scheme of BK-SDM in TinyFusion)."""
    if not 1 <= n <= depth:
        raise ValueError(f"of {depth} blocks 1 to {depth} can stay, not {n}")
    return [round(i * (depth - 1) / max(n - 1, 1)) for i in range(n)]
